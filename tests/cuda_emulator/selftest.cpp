// Tests of the emulator itself, through the driver API as a program finds it: `libcuda.so.1` by
// dlopen. The argument is the folder of the library that has the test kernels too.
#include <dlfcn.h>
#include <elf.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

typedef unsigned long long Ptr;
static void* library;
static int failures = 0;

template <typename... A>
static int call(const char* name, A... a) {
    void* f = dlsym(library, name);
    if (!f) {
        fprintf(stderr, "no %s\n", name);
        exit(1);
    }
    return reinterpret_cast<int (*)(A...)>(f)(a...);
}
#define CHECK(is, wanted) check(is, wanted, #is, __LINE__)
template <typename A, typename B>
static void check(A is, B wanted, const char* what, int line) {
    if (is == static_cast<A>(wanted)) return;
    fprintf(stderr, "selftest.cpp:%d: %s is %lld, not %lld\n", line, what, static_cast<long long>(is),
        static_cast<long long>(wanted));
    failures++;
}

static const char* const NAMES[] = {"test_mma_s8", "test_mma_bf16", "test_mma_f16", "test_exit", "test_two_barriers",
    "test_lost_lane", "test_no_wait", "test_write", "test_overflow", "test_misaligned", "test_shift", "test_copy",
    "test_shuffle", "test_reduce", "test_reduce_without_1", "test_reduce_without_2", "rms_norm_quantize"};
static std::string ptx = ".version 8.4\n.target sm_80\n";

struct Args {
    Ptr in, more, out;
    uint32_t n, padding;
};

struct Gpu {
    void *context = nullptr, *stream = nullptr, *module = nullptr;
    Gpu() {
        CHECK(call("cuDevicePrimaryCtxRetain", &context, 0), 0);
        CHECK(call("cuCtxSetCurrent", context), 0);
        CHECK(call("cuStreamCreate", &stream, 1u), 0);
        CHECK(call("cuModuleLoadData", &module, static_cast<const void*>(ptx.c_str())), 0);
    }
    ~Gpu() { CHECK(call("cuDevicePrimaryCtxRelease_v2", 0), 0); }
    Ptr alloc(size_t bytes) {
        Ptr p = 0;
        CHECK(call("cuMemAlloc_v2", &p, bytes), 0);
        return p;
    }
    template <typename T> Ptr upload(const std::vector<T>& x) {
        const Ptr p = alloc(x.size() * sizeof(T));
        CHECK(call("cuMemcpyHtoDAsync_v2", p, static_cast<const void*>(x.data()), x.size() * sizeof(T), stream), 0);
        return p;
    }
    template <typename T> std::vector<T> download(Ptr p, size_t n) {
        std::vector<T> x(n);
        CHECK(call("cuMemcpyDtoHAsync_v2", static_cast<void*>(x.data()), p, n * sizeof(T), stream), 0);
        return x;
    }
    template <typename A>
    int launch(const char* name, unsigned grid, unsigned block, const A& args, unsigned shared = 0) {
        void* function = nullptr;
        CHECK(call("cuModuleGetFunction", &function, module, name), 0);
        void* parameters[] = {const_cast<A*>(&args)};
        return call("cuLaunchKernel", function, grid, 1u, 1u, block, 1u, 1u, shared, stream, parameters,
            static_cast<void**>(nullptr));
    }
    int sync() { return call("cuStreamSynchronize", stream); }
};

// --- operations

static std::mt19937 rng(7);

static void mma() {
    Gpu gpu;
    std::vector<signed char> a(16 * 32), b(8 * 32);
    std::vector<int> c(16 * 8);
    for (auto& x : a) x = static_cast<signed char>(rng());
    for (auto& x : b) x = static_cast<signed char>(rng());
    for (auto& x : c) x = static_cast<int>(rng() % 1000);
    const Ptr out = gpu.upload(c);
    CHECK(gpu.launch("test_mma_s8", 1, 32, Args{gpu.upload(a), gpu.upload(b), out, 0, 0}), 0);
    const auto got = gpu.download<int>(out, c.size());
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            int sum = c[i * 8 + j];
            for (int k = 0; k < 32; k++) sum += a[i * 32 + k] * b[j * 32 + k];
            CHECK(got[i * 8 + j], sum);
        }
    }
    for (const bool half : {false, true}) {
        std::vector<uint16_t> x(16 * 16), y(8 * 16);
        std::vector<float> z(16 * 8);
        auto value = [&](uint16_t v) { return half ? half_to_float(v) : trine_bf16(v); };
        auto number = [&] {
            const float v = static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 300.0f;
            return half ? float_to_half(v) : static_cast<uint16_t>(__float_as_uint(v) >> 16);
        };
        std::generate(x.begin(), x.end(), number);
        std::generate(y.begin(), y.end(), number);
        for (auto& v : z) v = static_cast<float>(rng() % 100) / 7.0f;
        const Ptr floats = gpu.upload(z);
        CHECK(gpu.launch(half ? "test_mma_f16" : "test_mma_bf16", 1, 32,
            Args{gpu.upload(x), gpu.upload(y), floats, 0, 0}), 0);
        const auto result = gpu.download<float>(floats, z.size());
        for (int i = 0; i < 16; i++) {
            for (int j = 0; j < 8; j++) {
                float sum = z[i * 8 + j];
                for (int k = 0; k < 16; k++) sum += value(x[i * 16 + k]) * value(y[j * 16 + k]);
                CHECK(__float_as_uint(result[i * 8 + j]), __float_as_uint(sum));
            }
        }
    }
}

static void built_ins() {
    // All halves there and back; all floats in coarse steps against the processor's conversion.
    for (unsigned h = 0; h < 0x10000; h++) {
        const float f = half_to_float(static_cast<unsigned short>(h));
        _Float16 reference;
        const unsigned short bits = static_cast<unsigned short>(h);
        memcpy(&reference, &bits, 2);
        if (f == f) {
            CHECK(__float_as_uint(f), __float_as_uint(static_cast<float>(reference)));
            CHECK(float_to_half(f), h);
        } else {
            CHECK((h & 0x7fff) > 0x7c00, true);
        }
    }
    for (uint64_t bits = 0; bits < 0x100000000ull; bits += 9973) {
        const float f = __uint_as_float(static_cast<unsigned>(bits));
        if (f != f) continue;
        const _Float16 reference = static_cast<_Float16>(f);
        unsigned short wanted;
        memcpy(&wanted, &reference, 2);
        CHECK(float_to_half(f), wanted);
    }
    CHECK(__dp4a(0x80ff017f, 0x80ff017f, 5), 128 * 128 + 1 + 1 + 127 * 127 + 5);
    CHECK(__byte_perm(0x33221100, 0x77665584, 0x4c57), 0x84ff5577u);
    CHECK(__float2int_rn(2.5f), 2);
    CHECK(__float2int_rn(3e9f), 2147483647);
    CHECK(__float2int_rn(NAN), 0);
    CHECK(__umulhi(0x80000000u, 6), 3u);
    CHECK(__clz(0), 32);
    CHECK(__ffs(8), 4);
    CHECK(__brev(1), 0x80000000u);
}

static void shuffles_and_copies() {
    Gpu gpu;
    const Ptr out = gpu.alloc(64 * 16);
    CHECK(gpu.launch("test_shuffle", 1, 64, Args{0, 0, out, 0, 0}), 0);
    const auto got = gpu.download<uint32_t>(out, 64 * 4);
    for (unsigned i = 0; i < 64; i++) {
        CHECK(got[4 * i], i < 32 ? 528u : 528u + 1024u);
        CHECK(got[4 * i + 1], 0x49249249u);
        CHECK(got[4 * i + 2], i ^ 1);
        CHECK(got[4 * i + 3], i % 32 < 16 ? 1u : 3u);
    }
    const unsigned blocks = 37;
    std::vector<uint32_t> x(blocks * 256), y(blocks * 256);
    for (auto& v : x) v = static_cast<uint32_t>(rng());
    for (auto& v : y) v = static_cast<uint32_t>(rng());
    const Ptr to = gpu.alloc(16 + blocks * 1024);
    CHECK(call("cuMemsetD8Async", to, 0, size_t(16), gpu.stream), 0);
    const unsigned there = blocks * 1024 - 512;
    CHECK(gpu.launch("test_copy", blocks, 64, Args{gpu.upload(x), gpu.upload(y), to, there, 0}, 2048), 0);
    const auto sums = gpu.download<uint32_t>(to, 4 + blocks * 256);
    CHECK(sums[0], blocks);
    for (unsigned i = 0; i < blocks * 256; i++) {
        const unsigned from = i / 256 * 256 + ((i % 256 / 4 ^ 63) * 4 + i % 4);
        CHECK(sums[4 + i], (from * 4 < there ? x[from] : 0) + y[from]);
    }
}

// --- errors

static void sticky(const char* kernel, unsigned threads, unsigned n, int error, unsigned shared = 0) {
    fprintf(stderr, "(an error is wanted) ");
    {
        Gpu gpu;
        const Ptr out = gpu.alloc(1000);
        CHECK(gpu.launch(kernel, 1, threads, Args{out, out, out, n, 0}, shared), 0);
        CHECK(gpu.sync(), error);
        Ptr p = 0;
        CHECK(call("cuMemAlloc_v2", &p, size_t(16)), error);
        CHECK(gpu.sync(), error);
        CHECK(call("cuCtxSynchronize"), error);
        size_t free_bytes = 0, total = 0;
        CHECK(call("cuMemGetInfo_v2", &free_bytes, &total), error);
    }
    size_t (*allocated)() = reinterpret_cast<size_t (*)()>(dlsym(library, "trine_emulator_allocated_bytes"));
    CHECK(allocated(), 0u);
    Gpu again;
    again.alloc(16);
    CHECK(again.sync(), 0);
}

static void errors() {
    sticky("test_exit", 256, 77, 719);
    sticky("test_exit", 256, 255, 719);
    sticky("test_two_barriers", 256, 128, 719);
    sticky("test_lost_lane", 64, 40, 719);
    sticky("test_no_wait", 32, 0, 719);
    sticky("test_write", 32, 1024, 700);
    sticky("test_misaligned", 32, 4, 716);
    sticky("test_shift", 32, 32, 719);
    sticky("test_overflow", 32, 512, 700, 512);
    call("trine_emulator_fail_next_launch", 702);
    sticky("test_write", 32, 0, 702);

    Gpu gpu;
    const Ptr out = gpu.alloc(1000);
    Ptr p = 0;
    CHECK(call("cuMemAlloc_v2", &p, size_t(1) << 40), 2);
    CHECK(call("cuMemAlloc_v2", &p, size_t(0)), 1);
    std::vector<char> bytes(2000);
    CHECK(call("cuMemcpyHtoD_v2", out, static_cast<const void*>(bytes.data()), size_t(1001)), 1);
    const Args args{out, out, out, 0, 0};
    CHECK(gpu.launch("test_copy", 1, 128, args), 1); // threads
    CHECK(gpu.launch("test_copy", 1, 64, args, 48 * 1024 + 1), 1); // shared memory
    CHECK(gpu.launch("test_copy", 0, 64, args), 1);
    void* function = nullptr;
    CHECK(call("cuModuleGetFunction", &function, gpu.module, "test_copy"), 0);
    CHECK(call("cuFuncSetAttribute", function, 8, 99 * 1024), 0);
    CHECK(call("cuFuncSetAttribute", function, 8, 228 * 1024), 1);
    CHECK(call("cuModuleGetFunction", &function, gpu.module, "nothing"), 500);
    void* module = nullptr;
    CHECK(call("cuModuleLoadData", &module, static_cast<const void*>(".version 9.9\n.target sm_80\n")), 222);
    CHECK(call("cuModuleLoadData", &module, static_cast<const void*>(".version 8.0\n.target sm_100\n")), 209);
    CHECK(call("cuModuleLoadData", &module, static_cast<const void*>("nonsense")), 200);
    CHECK(gpu.sync(), 0);
    // One byte behind an allocation is found when it is freed.
    fprintf(stderr, "(an error is wanted) ");
    CHECK(gpu.launch("test_write", 1, 32, Args{out, out, out, 1000, 0}), 0);
    CHECK(gpu.sync(), 0);
    CHECK(call("cuMemFree_v2", out), 700);
}

// --- streams, events and graphs

static void streams() {
    Gpu gpu;
    const Ptr out = gpu.alloc(256);
    void* host = nullptr;
    CHECK(call("cuMemHostAlloc", &host, size_t(256), 0u), 0);
    unsigned char* bytes = static_cast<unsigned char*>(host);
    // Nothing arrives before it is waited for.
    CHECK(call("cuMemsetD8Async", out, 7, size_t(256), gpu.stream), 0);
    CHECK(call("cuMemcpyDtoHAsync_v2", host, out, size_t(256), gpu.stream), 0);
    CHECK(bytes[0], 0xcd);
    void *event = nullptr, *other = nullptr, *begin = nullptr;
    CHECK(call("cuEventCreate", &event, 0u), 0);
    CHECK(call("cuEventCreate", &begin, 0u), 0);
    CHECK(call("cuEventRecord", event, gpu.stream), 0);
    CHECK(call("cuEventQuery", event), 600);
    CHECK(call("cuStreamCreate", &other, 1u), 0);
    CHECK(call("cuEventRecord", begin, other), 0);
    CHECK(call("cuStreamWaitEvent", other, event, 0u), 0);
    CHECK(call("cuEventRecord", event, other), 0);
    CHECK(call("cuEventSynchronize", event), 0);
    CHECK(bytes[255], 7);
    float ms = -1;
    CHECK(call("cuEventElapsedTime", &ms, begin, event), 0);
    CHECK(ms >= 0, true);

    // A graph adds one to a byte, thrice replayed; nothing of the capture runs by itself.
    CHECK(call("cuMemsetD8Async", out, 0, size_t(256), gpu.stream), 0);
    CHECK(call("cuStreamBeginCapture_v2", gpu.stream, 1), 0);
    std::vector<uint32_t> unused(256);
    CHECK(gpu.launch("test_copy", 1, 64, Args{out, out, out, 0, 0}, 48 * 1024 + 1), 1);
    CHECK(gpu.launch("test_write", 1, 32, Args{out, out, out, 3, 0}), 0);
    CHECK(call("cuMemcpyDtoHAsync_v2", host, out, size_t(4), gpu.stream), 0);
    void *graph = nullptr, *executable = nullptr;
    CHECK(call("cuStreamEndCapture", gpu.stream, &graph), 0);
    CHECK(call("cuGraphInstantiateWithFlags", &executable, graph, 0ull), 0);
    CHECK(call("cuGraphDestroy", graph), 0);
    CHECK(gpu.sync(), 0);
    CHECK(bytes[3], 7);
    for (int i = 0; i < 3; i++) {
        CHECK(call("cuMemsetD8Async", out, i, size_t(256), gpu.stream), 0);
        CHECK(call("cuGraphLaunch", executable, gpu.stream), 0);
        CHECK(gpu.sync(), 0);
        CHECK(bytes[2], i);
        CHECK(bytes[3], 1);
    }
    CHECK(call("cuGraphExecDestroy", executable), 0);
    // An allocation ends a capture.
    CHECK(call("cuStreamBeginCapture_v2", gpu.stream, 1), 0);
    Ptr p = 0;
    CHECK(call("cuMemAlloc_v2", &p, size_t(16)), 900);
    CHECK(call("cuStreamEndCapture", gpu.stream, &graph), 901);
    CHECK(call("cuMemAlloc_v2", &p, size_t(16)), 0);
}

// --- barriers

// How many of the sums of `reduce_block` are wrong, or -1 where the launch failed.
static int wrong_sums(const char* name) {
    Gpu gpu;
    const unsigned blocks = 8;
    std::vector<uint32_t> x(blocks * 256);
    for (auto& v : x) v = static_cast<uint32_t>(rng());
    const Ptr out = gpu.alloc(blocks * 256 * 8);
    CHECK(gpu.launch(name, blocks, 256, Args{gpu.upload(x), 0, out, 0, 0}), 0);
    if (gpu.sync()) return -1;
    const auto got = gpu.download<uint32_t>(out, blocks * 512);
    int wrong = 0;
    for (unsigned i = 0; i < blocks * 256; i++) {
        uint32_t sum = 0, squares = 0;
        for (unsigned j = i / 256 * 256; j < i / 256 * 256 + 256; j++) {
            sum += x[j];
            squares += x[j] * x[j];
        }
        wrong += got[2 * i] != sum;
        wrong += got[2 * i + 1] != squares;
    }
    return wrong;
}

// --- the first kernel

struct NormArgs {
    Ptr input, gain, values, scales, sums, normed;
    uint32_t width, stride;
    float eps;
    uint32_t padding;
};
// Whether the kernel's results are those of plain sums, within rounding.
static bool norm_is_right(unsigned rows, unsigned width) {
    Gpu gpu;
    const unsigned stride = (width + 255) / 256 * 256;
    std::vector<float> x(rows * width), gain(width);
    for (auto& v : x) v = static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 100.0f;
    for (auto& v : gain) v = 0.5f + static_cast<float>(rng() % 100) / 100.0f;
    const Ptr values = gpu.alloc(rows * stride), scales = gpu.alloc(4 * rows), sums = gpu.alloc(4 * rows);
    const Ptr normed = gpu.alloc(4 * rows * width);
    CHECK(gpu.launch("rms_norm_quantize", rows, 256, NormArgs{gpu.upload(x), gpu.upload(gain), values, scales, sums, normed, width,
        stride, 1e-5f, 0}), 0);
    const auto q = gpu.download<signed char>(values, rows * stride);
    const auto s = gpu.download<float>(scales, rows);
    const auto t = gpu.download<int>(sums, rows);
    const auto n = gpu.download<float>(normed, rows * width);
    CHECK(gpu.sync(), 0);
    bool right = true;
    for (unsigned r = 0; r < rows; r++) {
        double squares = 0, most = 0;
        for (unsigned i = 0; i < width; i++) squares += double(x[r * width + i]) * x[r * width + i];
        const double inverse = 1 / sqrt(squares / width + 1e-5);
        int sum = 0;
        for (unsigned i = 0; i < width; i++) {
            const double y = x[r * width + i] * inverse * gain[i];
            most = std::max(most, fabs(y));
            right = right && fabs(n[r * width + i] - y) <= 1e-5 * std::max(1.0, fabs(y));
            right = right && abs(q[r * stride + i] - static_cast<int>(lrintf(n[r * width + i] * s[r]))) == 0;
            sum += q[r * stride + i];
        }
        for (unsigned i = width; i < stride; i++) right = right && q[r * stride + i] == 0;
        right = right && fabs(s[r] - 127 / most) < 1e-4 * s[r] && t[r] == sum;
    }
    return right;
}

// --- what the environment asks for

// The result of loading a cubin, without kernels, for some architecture.
static int load_cubin(unsigned flags) {
    Elf64_Ehdr head = {};
    memcpy(head.e_ident, ELFMAG, SELFMAG);
    head.e_ident[EI_CLASS] = ELFCLASS64;
    head.e_machine = 190;
    head.e_flags = flags;
    void* module = nullptr;
    return call("cuModuleLoadData", &module, static_cast<const void*>(&head));
}
constexpr unsigned SM_80 = 0x500550, SM_90A = 0x5a0d5a; // as NVRTC 12.4 writes them

// In a process of its own, started with the environment to test.
static void probe(const std::string& what) {
    int devices = 0, version = 0;
    CHECK(call("cuDriverGetVersion", &version), 0);
    if (what == "no device") {
        CHECK(call("cuInit", 0u), 100);
        CHECK(call("cuDeviceGetCount", &devices), 3);
        return;
    }
    CHECK(call("cuInit", 0u), 0);
    CHECK(call("cuDeviceGetCount", &devices), 0);
    Gpu gpu;
    if (what == "old") {
        CHECK(devices, 3);
        CHECK(version, 11080);
        int major = 0, minor = 0, shared = 0;
        CHECK(call("cuDeviceComputeCapability", &major, &minor, 2), 0);
        CHECK(10 * major + minor, 86);
        CHECK(call("cuDeviceGetAttribute", &shared, 97, 0), 0);
        CHECK(shared, 99 * 1024);
        CHECK(load_cubin(SM_80), 0);
        CHECK(load_cubin(SM_90A), 209);
        // PTX 8.4 is newer than the driver.
        void* module = nullptr;
        CHECK(call("cuModuleLoadData", &module, static_cast<const void*>(".version 8.4\n.target sm_80\n")), 222);
    } else if (what == "small") {
        size_t free_bytes = 0, total = 0;
        const Ptr first = gpu.alloc(1000);
        CHECK(call("cuMemGetInfo_v2", &free_bytes, &total), 0);
        CHECK(total, 4096u);
        CHECK(free_bytes, 3072u);
        Ptr p = 0;
        CHECK(call("cuMemAlloc_v2", &p, size_t(3073)), 2);
        CHECK(call("cuMemAlloc_v2", &p, size_t(3072)), 0);
        CHECK(call("cuMemFree_v2", first), 0);
        gpu.alloc(1024);
        CHECK(load_cubin(SM_90A), 0);
        CHECK(load_cubin(SM_80), 209);
    } else {
        const Ptr out = gpu.alloc(16);
        const Args args{out, out, out, 0, 0};
        CHECK(gpu.launch("test_write", 1, 32, args), 0);
        CHECK(gpu.sync(), 0);
        // Behind the end, and found at once.
        CHECK(gpu.launch("test_write", 1, 32, Args{out, out, out, what == "check" ? 17u : 1u, 0}), 0);
        CHECK(gpu.sync(), 700);
    }
}

int main(int count, char** arguments) {
    if (count < 2) return 2;
    const std::string folder = arguments[1];
    // Before `cuInit`, a driver answers this.
    library = dlopen((folder + "/libcuda.so.1").c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    for (const char* name : NAMES) ptx += std::string(".visible .entry ") + name + "(\n)\n";
    if (count > 3) {
        if (strcmp(arguments[3], "old") == 0) ptx.replace(0, 12, ".version 7.0");
        probe(arguments[3]);
        return failures ? 1 : 0;
    }
    auto in_environment = [&](const char* variables, const char* what) {
        const std::string command =
            std::string("TRINE_EMULATOR_") + variables + " '" + arguments[0] + "' '" + folder + "' - '" + what + "'";
        CHECK(system(command.c_str()), 0);
    };
    in_environment("DEVICES=0", "no device");
    in_environment("DEVICES=3 TRINE_EMULATOR_CC=8.6 TRINE_EMULATOR_DRIVER=11080", "old");
    in_environment("MEMORY=4096", "small");
    fprintf(stderr, "(two errors are wanted) ");
    in_environment("FAIL_LAUNCH=2", "fail");
    in_environment("CHECK=1", "check");

    int version = 0, devices = 0;
    CHECK(call("cuDeviceGetCount", &devices), 3);
    CHECK(call("cuInit", 0u), 0);
    CHECK(call("cuDriverGetVersion", &version), 0);
    CHECK(version, 12080);
    CHECK(call("cuDeviceGetCount", &devices), 0);
    CHECK(devices, 1);

    built_ins();
    mma();
    shuffles_and_copies();
    errors();
    streams();
    CHECK(wrong_sums("test_reduce"), 0);
    // The checked build finds the race itself.
    const bool checked = count > 2 && strcmp(arguments[2], "checked") == 0;
    for (const char* name : {"test_reduce_without_1", "test_reduce_without_2"}) {
        if (checked) fprintf(stderr, "(a race is wanted) ");
        const int wrong = wrong_sums(name);
        CHECK(checked ? wrong == -1 : wrong > 0, true);
    }
    for (unsigned width : {1u, 3u, 255u, 256u, 257u, 1000u, 2560u}) CHECK(norm_is_right(5, width), true);
    if (!failures) fprintf(stderr, "CUDA emulator: all of its tests pass\n");
    return failures ? 1 : 0;
}
