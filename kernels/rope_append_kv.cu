// `ops::RopeAppendKv`: a warp for each head of a row, eight heads to a block.
#include "prelude.cuh"

struct RopeAppendKvArgs {
    const u32* positions;
    const u32* slots;
    const float* cos;
    const float* sin;
    const float* query_gain; // null without a norm
    const float* key_gain;
    float* qkv;
    void* keys;
    void* values;
    u32 query;
    u32 kv;
    u32 dim;
    // Elements from one row of the cache to the next; zeros fill it up.
    u32 stride;
    // Rows of `cos` and `sin`.
    u32 context;
    // Slots that the cache has.
    u32 slot_count;
    float query_eps;
    float key_eps;
};

template <typename T>
DEVICE void rope_append_kv(const RopeAppendKvArgs& a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 heads = a.query + 2 * a.kv;
    const u32 pieces = (heads + THREADS / WARP - 1) / (THREADS / WARP);
    const u32 row = blockIdx.x / pieces;
    const u32 head = blockIdx.x % pieces * (THREADS / WARP) + threadIdx.x / WARP;
    const u32 lane = threadIdx.x % WARP;
    if (head >= heads) return;

    float* x = a.qkv + (u64(row) * heads + head) * a.dim;
    const bool is_query = head < a.query;
    const bool is_key = !is_query && head < a.query + a.kv;
    const float* gain = is_query ? a.query_gain : is_key ? a.key_gain : nullptr;
    float inverse = 1.0f;
    if (gain) {
        float squares = 0.0f;
        for (u32 i = lane; i < a.dim; i += WARP) squares = __fmaf_rn(x[i], x[i], squares);
        const float mean = __fdiv_rn(reduce_warp(squares, Add()), static_cast<float>(a.dim));
        inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + (is_query ? a.query_eps : a.key_eps)));
    }

    const u32 half = a.dim / 2;
    const Rotation rotation{a.cos, a.sin, a.context, half};
    const u32 position = a.positions[row];
    const u32 slot = a.slots[row];
    if (!is_query && slot >= a.slot_count) return;
    T* to = nullptr;
    const u32 kv_head = head - a.query - (is_key ? 0 : a.kv);
    if (!is_query) {
        to = cache_row(static_cast<T*>(is_key ? a.keys : a.values), slot, kv_head, a.kv, a.stride);
    }
    const auto pair = [&](u32 i, float& low, float& high) {
        low = x[i];
        high = x[i + half];
        if (gain) {
            low = low * inverse * gain[i];
            high = high * inverse * gain[i + half];
        }
        if (is_query || is_key) rotation.pair(low, high, position, i);
    };
    float low;
    float high;
    if (is_query) {
        for (u32 i = lane; i < half; i += WARP) {
            pair(i, low, high);
            x[i] = low;
            x[i + half] = high;
        }
        return;
    }
    if constexpr (SCALED<T>) {
        u32 most = 0;
        for (u32 i = lane; i < half; i += WARP) {
            pair(i, low, high);
            most = max(most, max(magnitude_bits(low), magnitude_bits(high)));
        }
        const Int8Row row_of(reduce_warp(most, Most()));
        if (lane == 0) *cache_scale(is_key ? a.keys : a.values, a.slot_count, slot, kv_head, a.kv, a.stride) = row_of.scale;
        for (u32 i = lane; i < half; i += WARP) {
            pair(i, low, high);
            to[i] = row_of(low);
            to[i + half] = row_of(high);
        }
        if (a.dim + lane < a.stride) to[a.dim + lane] = 0;
    } else {
        for (u32 i = lane; i < half; i += WARP) {
            pair(i, low, high);
            to_cache(low, to[i]);
            to_cache(high, to[i + half]);
        }
        // The end of the row is read too.
        if (a.dim + lane < a.stride) to_cache(0.0f, to[a.dim + lane]);
    }
}

KERNEL(rope_append_kv_f32, RopeAppendKvArgs, THREADS) { rope_append_kv<float>(a); }
KERNEL(rope_append_kv_f16, RopeAppendKvArgs, THREADS) { rope_append_kv<u16>(a); }
KERNEL(rope_append_kv_int8, RopeAppendKvArgs, THREADS) { rope_append_kv<i8>(a); }
