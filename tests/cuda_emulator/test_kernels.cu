// Kernels that only the emulator's own tests run; some of them are wrong.
#include "prelude.cuh"

struct TestArgs {
    const u8* in;
    const u8* more;
    u8* out;
    u32 n;
    u32 padding;
};

#ifndef REDUCE

// One warp: fragments loaded as the prelude says, from row-major A and column-major B (n × k).
template <typename T, typename C, int K, void (*mma)(C (&)[4], const u32 (&)[4], const u32 (&)[2])>
DEVICE void test_mma(const TestArgs& a) {
    wait_for_previous_kernel();
    constexpr int E = 4 / sizeof(T); // elements of a register
    const T* A = reinterpret_cast<const T*>(a.in);
    const T* B = reinterpret_cast<const T*>(a.more);
    C* out = reinterpret_cast<C*>(a.out);
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 x[4], y[2];
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i % 2), column = E * t + K / 2 * (i / 2);
        x[i] = *reinterpret_cast<const u32*>(A + row * K + column);
    }
    for (int i = 0; i < 2; i++) y[i] = *reinterpret_cast<const u32*>(B + g * K + E * t + K / 2 * i);
    C c[4];
    for (int i = 0; i < 4; i++) c[i] = out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    mma(c, x, y);
    for (int i = 0; i < 4; i++) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}
KERNEL(test_mma_s8, TestArgs, 32) { test_mma<i8, i32, 32, mma_s8>(a); }
KERNEL(test_mma_bf16, TestArgs, 32) { test_mma<u16, float, 16, mma_bf16>(a); }
KERNEL(test_mma_f16, TestArgs, 32) { test_mma<u16, float, 16, mma_f16>(a); }

// Thread `n` leaves in front of a barrier.
KERNEL(test_exit, TestArgs, 256) {
    wait_for_previous_kernel();
    if (threadIdx.x == a.n) return;
    __syncthreads();
}
// Two places of a barrier at a time.
KERNEL(test_two_barriers, TestArgs, 256) {
    wait_for_previous_kernel();
    if (threadIdx.x < a.n) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
// A lane that others wait for goes to a barrier.
KERNEL(test_lost_lane, TestArgs, 64) {
    wait_for_previous_kernel();
    if (threadIdx.x != a.n) __shfl_sync(0xffffffffu, 1, 0);
    __syncthreads();
}
KERNEL(test_no_wait, TestArgs, 32) {}
KERNEL(test_write, TestArgs, 32) {
    wait_for_previous_kernel();
    if (threadIdx.x == 0) a.out[a.n] = 1;
}
KERNEL(test_misaligned, TestArgs, 32) {
    wait_for_previous_kernel();
    *reinterpret_cast<uint4*>(a.out) = *reinterpret_cast<const uint4*>(a.in + a.n);
}
KERNEL(test_shift, TestArgs, 32) {
    wait_for_previous_kernel();
    *reinterpret_cast<u32*>(a.out) = 1u << a.n;
}
KERNEL(test_overflow, TestArgs, 32) {
    wait_for_previous_kernel();
    DYNAMIC_SHARED(shared);
    if (threadIdx.x == 0) shared[a.n] = 1;
    a.out[0] = shared[0];
}

// Copies 16 bytes a thread through shared memory, in two groups, and counts blocks atomically.
KERNEL(test_copy, TestArgs, 64) {
    wait_for_previous_kernel();
    DYNAMIC_SHARED(shared);
    const u32 at = threadIdx.x * 16;
    const u64 from = u64(blockIdx.x) * 1024 + at;
    copy_async(shared + at, a.in + from, from < a.n);
    copy_async_commit();
    copy_async(shared + 1024 + at, a.more + from, true);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const u32 other = (threadIdx.x ^ 63) * 16;
    uint4 x = *reinterpret_cast<const uint4*>(shared + other);
    copy_async_wait<0>();
    __syncthreads();
    const uint4 y = *reinterpret_cast<const uint4*>(shared + 1024 + other);
    x.x += y.x;
    x.y += y.y;
    x.z += y.z;
    x.w += y.w;
    *reinterpret_cast<uint4*>(a.out + 16 + from) = x;
    if (threadIdx.x == 0) atomicAdd(reinterpret_cast<u32*>(a.out), 1);
}

// Lane sums three ways, and half of a warp on its own.
KERNEL(test_shuffle, TestArgs, 64) {
    wait_for_previous_kernel();
    u32* out = reinterpret_cast<u32*>(a.out) + threadIdx.x * 4;
    const u32 lane = threadIdx.x % 32;
    u32 x = threadIdx.x + 1;
    for (int d = 16; d; d /= 2) x += __shfl_down_sync(0xffffffffu, x, d);
    out[0] = __shfl_sync(0xffffffffu, x, 0);
    out[1] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    const u64 wide = __shfl_xor_sync(0xffffffffu, u64(threadIdx.x) << 33, 1);
    out[2] = static_cast<u32>(wide >> 33);
    if (lane < 16) out[3] = __any_sync(0xffffu, lane == 5);
    else out[3] = 2 + __all_sync(0xffff0000u, lane >= 16);
}

#endif // REDUCE

// Sums of what threads have, twice with the same shared memory: needs both of `reduce_block`'s
// barriers. Compiled again without each of them, as `test_reduce_without_1` and `_2`.
#ifndef REDUCE
#define REDUCE test_reduce
#endif
#define NAMED_KERNEL(name, Args, threads) KERNEL(name, Args, threads)
NAMED_KERNEL(REDUCE, TestArgs, 256) {
    wait_for_previous_kernel();
    const u32* in = reinterpret_cast<const u32*>(a.in);
    u32* out = reinterpret_cast<u32*>(a.out) + 2 * (blockIdx.x * 256 + threadIdx.x);
    const u32 x = in[blockIdx.x * 256 + threadIdx.x];
    out[0] = reduce_block(x, Add());
    out[1] = reduce_block(x * x, Add());
}
