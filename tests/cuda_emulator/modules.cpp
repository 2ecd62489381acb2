// Modules, functions and launches.
//
// A module's image is looked at as a driver would: its format, what it was compiled for, the names
// and the arguments of its kernels. What runs is the code that g++ made of the same source.
#include "barriers.h"
#include "driver.h"

#include <elf.h>
#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <fstream>
#include <iterator>

namespace {

std::atomic<uint64_t> launches{0};
std::atomic<int> fail_next{0};

// The PTX version that came with a version of CUDA (PTX ISA, "Release Notes").
int newest_ptx(int driver) {
    static const int TABLE[][2] = {{13000, 90}, {12090, 88}, {12080, 87}, {12070, 86}, {12050, 85}, {12040, 84},
        {12030, 83}, {12020, 82}, {12010, 81}, {12000, 80}, {11080, 78}, {11070, 77}, {11060, 76}, {11050, 75},
        {11040, 74}, {11030, 73}, {11020, 72}, {11010, 71}, {11000, 70}};
    for (auto& [version, ptx] : TABLE) {
        if (driver >= version) return ptx;
    }
    return 0;
}

Result check_ptx(const std::string& text) {
    int major = 0, minor = 0, target = 0;
    const size_t version = text.find(".version "), sm = text.find(".target sm_");
    if (version == std::string::npos || sm == std::string::npos) return INVALID_PTX;
    sscanf(text.c_str() + version, ".version %d.%d", &major, &minor);
    char letter = 0;
    sscanf(text.c_str() + sm, ".target sm_%d%c", &target, &letter);
    const Settings& s = settings();
    if (10 * major + minor > newest_ptx(s.driver)) return UNSUPPORTED_PTX_VERSION;
    const int device = 10 * s.major + s.minor;
    if (target > device || (letter == 'a' && target != device)) return NO_BINARY_FOR_GPU;
    return SUCCESS;
}

// The length of an ELF file, from its tables; 0 where this is none of CUDA's.
size_t elf_bytes(const char* image) {
    Elf64_Ehdr head;
    memcpy(&head, image, sizeof head);
    constexpr int CUDA = 190; // EM_CUDA
    if (head.e_ident[EI_CLASS] != ELFCLASS64 || head.e_machine != CUDA) return 0;
    size_t end = std::max<size_t>(head.e_shoff + size_t(head.e_shentsize) * head.e_shnum,
        head.e_phoff + size_t(head.e_phentsize) * head.e_phnum);
    end = std::max(end, sizeof head);
    for (int i = 0; i < head.e_shnum; i++) {
        Elf64_Shdr section;
        memcpy(&section, image + head.e_shoff + size_t(head.e_shentsize) * static_cast<size_t>(i), sizeof section);
        if (section.sh_type != SHT_NOBITS) end = std::max<size_t>(end, section.sh_offset + section.sh_size);
    }
    return end;
}

Result check_cubin(const std::string& image) {
    Elf64_Ehdr head;
    memcpy(&head, image.data(), sizeof head);
    // As NVRTC 12 writes it: the architecture in the lowest byte; a bit for the variants with an "a".
    const int target = static_cast<int>(head.e_flags & 0xff);
    const bool exact = head.e_flags & 0x800;
    const Settings& s = settings();
    const int device = 10 * s.major + s.minor;
    if (exact ? target != device : target / 10 != s.major || target > device) return NO_BINARY_FOR_GPU;
    return SUCCESS;
}

// The bytes of a kernel's arguments in the image; 0 where they are not found, -1 without the kernel.
long argument_bytes(const Module& module, const std::string& name) {
    if (module.ptx) {
        const size_t entry = module.image.find(".entry " + name + "(");
        if (entry == std::string::npos) return -1;
        const std::string parameter = name + "_param_0[";
        const size_t at = module.image.find(parameter, entry);
        return at == std::string::npos ? 0 : atol(module.image.c_str() + at + parameter.size());
    }
    const char* image = module.image.data();
    Elf64_Ehdr head;
    memcpy(&head, image, sizeof head);
    auto section = [&](int i) {
        Elf64_Shdr s;
        memcpy(&s, image + head.e_shoff + size_t(head.e_shentsize) * static_cast<size_t>(i), sizeof s);
        return s;
    };
    const char* names = image + section(head.e_shstrndx).sh_offset;
    long bytes = -1;
    for (int i = 0; i < head.e_shnum; i++) {
        const Elf64_Shdr s = section(i);
        if (names + s.sh_name == ".text." + name) bytes = std::max(bytes, 0l);
        if (names + s.sh_name != ".nv.info." + name) continue;
        // Items of a format, a name, and either a value or the bytes that follow (format 4).
        const unsigned char* at = reinterpret_cast<const unsigned char*>(image) + s.sh_offset;
        const unsigned char* end = at + s.sh_size;
        while (at + 4 <= end) {
            const unsigned value = at[2] | static_cast<unsigned>(at[3]) << 8;
            constexpr unsigned char PARAMETER_BYTES = 0x19; // EIATTR_CBANK_PARAM_SIZE
            if (at[0] == 3 && at[1] == PARAMETER_BYTES) bytes = static_cast<long>(value);
            at += 4 + (at[0] == 4 ? value : 0);
        }
    }
    return bytes;
}

struct Launch {
    dim3 grid, block;
    unsigned shared;
    CUstream stream;
};

Result launch(CUfunction handle, const Launch& l, void** parameters, void** extra) {
    IN_CONTEXT(context);
    auto function = find(context->functions, handle);
    auto stream = find_stream(*context, l.stream);
    if (!function || !stream) return INVALID_HANDLE;
    const TrineKernel& kernel = *function->kernel;
    auto refuse = [&](const char* why) {
        fprintf(stderr, "CUDA emulator: launch of %s: %s (grid %u x %u x %u, block %u x %u x %u, %u bytes shared)\n",
            kernel.name, why, l.grid.x, l.grid.y, l.grid.z, l.block.x, l.block.y, l.block.z, l.shared);
        return INVALID_VALUE;
    };
    if (extra || !parameters) return refuse("the kernel's one argument is wanted as a parameter");
    if (!l.grid.x || !l.grid.y || !l.grid.z || !l.block.x || !l.block.y || !l.block.z) return refuse("nothing to run");
    if (l.grid.x > 2147483647u || l.grid.y > 65535 || l.grid.z > 65535) return refuse("the grid is too large");
    if (l.block.x > 1024 || l.block.y > 1024 || l.block.z > 64) return refuse("the block is too large");
    if (uint64_t(l.block.x) * l.block.y * l.block.z > kernel.threads) return refuse("more threads than the kernel was compiled for");
    if (l.shared > static_cast<unsigned>(function->most_shared)) return refuse("more dynamic shared memory than was set");
    // Aligned as on the device, in memory that every replay of a graph reads.
    if (kernel.argument_bytes > 4096) return refuse("the argument is too large");
    std::shared_ptr<void> argument(aligned_alloc(16, (kernel.argument_bytes + 15) / 16 * 16), free);
    memcpy(argument.get(), parameters[0], kernel.argument_bytes);
    Context* broken = context.get();
    const Launch shape = l;
    Work work;
    work.launch = true;
    work.run = [=, &kernel]() -> Outcome {
        const uint64_t number = ++launches;
        if (const int result = fail_next.exchange(0)) {
            return {static_cast<Result>(result), std::string("kernel ") + kernel.name + " was asked to fail"};
        }
        if (settings().fail_launch && number == static_cast<uint64_t>(settings().fail_launch)) {
            return {ILLEGAL_ADDRESS, std::string("kernel ") + kernel.name + " was asked to fail"};
        }
        const auto run = [&] { return run_grid(kernel, argument.get(), shape.grid, shape.block, shape.shared); };
        Outcome outcome = barriers_are_tested() ? run_with_and_without_barriers(*broken, kernel.name, run) : run();
        if (outcome.result == SUCCESS && settings().check) {
            Hold hold(state);
            outcome = check_memory(*broken);
            if (outcome.result != SUCCESS) outcome.text = std::string("after kernel ") + kernel.name + ": " + outcome.text;
        }
        return outcome;
    };
    return enqueue(hold, *context, stream, std::move(work));
}

} // namespace

// --- modules

EXPORT Result cuModuleLoadData(CUmodule* result, const void* image) {
    IN_CONTEXT(context);
    auto module = std::make_shared<Module>();
    module->context = context.get();
    const char* bytes = static_cast<const char*>(image);
    if (memcmp(bytes, ELFMAG, SELFMAG) == 0) {
        const size_t length = elf_bytes(bytes);
        if (!length) return INVALID_IMAGE;
        module->image.assign(bytes, length);
        if (Result wrong = check_cubin(module->image)) return wrong;
    } else {
        module->ptx = true;
        module->image = bytes;
        if (module->image.find(".version") == std::string::npos) return INVALID_IMAGE;
        if (Result wrong = check_ptx(module->image)) return wrong;
    }
    context->modules[module.get()] = module;
    *result = module.get();
    return SUCCESS;
}
EXPORT Result cuModuleLoadDataEx(CUmodule* result, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(result, image);
}
EXPORT Result cuModuleLoad(CUmodule* result, const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return FILE_NOT_FOUND;
    const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    return cuModuleLoadData(result, bytes.c_str());
}
EXPORT Result cuModuleUnload(CUmodule handle) {
    IN_CONTEXT(context);
    auto module = find(context->modules, handle);
    if (!module) return INVALID_HANDLE;
    run_all(hold, *context, false);
    for (auto at = context->functions.begin(); at != context->functions.end();) {
        at = at->second->module == module ? context->functions.erase(at) : std::next(at);
    }
    context->modules.erase(handle);
    return context->error;
}
EXPORT Result cuModuleGetFunction(CUfunction* result, CUmodule handle, const char* name) {
    IN_CONTEXT(context);
    auto module = find(context->modules, handle);
    if (!module) return INVALID_HANDLE;
    const long bytes = argument_bytes(*module, name);
    if (bytes < 0) return NOT_FOUND;
    const TrineKernel* kernel = find_kernel(name);
    if (!kernel) {
        fprintf(stderr, "CUDA emulator: was not built with kernel %s; run tools/build_cuda_emulator.sh\n", name);
        return NOT_FOUND;
    }
    if (bytes && static_cast<size_t>(bytes) != kernel->argument_bytes) {
        fprintf(stderr, "CUDA emulator: the image's kernel %s takes %ld bytes and the emulator's %zu: one is stale\n",
            name, bytes, kernel->argument_bytes);
        return NOT_FOUND;
    }
    for (auto& [other, function] : context->functions) {
        if (function->module == module && function->kernel == kernel) return *result = other, SUCCESS;
    }
    auto function = std::make_shared<Function>();
    function->module = module;
    function->kernel = kernel;
    context->functions[function.get()] = function;
    *result = function.get();
    return SUCCESS;
}
EXPORT Result cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) { return NOT_FOUND; }

// --- functions

EXPORT Result cuFuncGetAttribute(int* value, int attribute, CUfunction handle) {
    IN_CONTEXT(context);
    auto function = find(context->functions, handle);
    if (!function) return INVALID_HANDLE;
    switch (attribute) {
        case 0: *value = static_cast<int>(function->kernel->threads); break; // threads of a block at most
        case 4: *value = 32; break; // registers, which a CPU cannot tell
        case 5: *value = 84; break; // PTX version
        case 6: *value = 10 * settings().major + settings().minor; break; // binary version
        case 8: *value = function->most_shared; break; // dynamic shared memory at most
        default: *value = 0; // static shared memory, constants, spills
    }
    return SUCCESS;
}
EXPORT Result cuFuncSetAttribute(CUfunction handle, int attribute, int value) {
    IN_CONTEXT(context);
    auto function = find(context->functions, handle);
    if (!function) return INVALID_HANDLE;
    if (attribute == 8) {
        int most = 0;
        cuDeviceGetAttribute(&most, 97, 0);
        if (value < 0 || value > most) return INVALID_VALUE;
        function->most_shared = value;
    }
    return SUCCESS;
}
EXPORT Result cuFuncSetCacheConfig(CUfunction handle, int) {
    IN_CONTEXT(context);
    return find(context->functions, handle) ? SUCCESS : INVALID_HANDLE;
}
EXPORT Result cuFuncGetName(const char** name, CUfunction handle) {
    IN_CONTEXT(context);
    auto function = find(context->functions, handle);
    if (!function) return INVALID_HANDLE;
    *name = function->kernel->name;
    return SUCCESS;
}
EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction handle, int threads,
    size_t shared, unsigned) {
    IN_CONTEXT(context);
    auto function = find(context->functions, handle);
    if (!function) return INVALID_HANDLE;
    if (threads <= 0) return INVALID_VALUE;
    // As if threads and shared memory were the only limits.
    int most_threads = 0, most_shared = 0;
    cuDeviceGetAttribute(&most_threads, 39, 0);
    cuDeviceGetAttribute(&most_shared, 81, 0);
    *blocks = std::min(most_threads / threads, static_cast<int>(static_cast<size_t>(most_shared) / (shared + 1024)));
    return SUCCESS;
}
EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction f, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}

// --- launches

EXPORT Result cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
    unsigned bz, unsigned shared, CUstream stream, void** parameters, void** extra) {
    return launch(function, {{gx, gy, gz}, {bx, by, bz}, shared, stream}, parameters, extra);
}
EXPORT Result cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
    unsigned, CUstream, void**) {
    return NOT_SUPPORTED; // blocks of a launch run one after the other
}

// CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute {
    int id;
    int padding;
    unsigned char value[64];
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    CUstream stream;
    const LaunchAttribute* attributes;
    unsigned count;
};
EXPORT Result cuLaunchKernelEx(const LaunchConfig* c, CUfunction function, void** parameters, void** extra) {
    for (unsigned i = 0; i < c->count; i++) {
        constexpr int IGNORE = 0, PROGRAMMATIC_STREAM_SERIALIZATION = 6;
        const int id = c->attributes[i].id;
        if (id == IGNORE) continue;
        if (id != PROGRAMMATIC_STREAM_SERIALIZATION) return NOT_SUPPORTED;
        if (settings().major < 9) return NOT_SUPPORTED;
    }
    return launch(function, {{c->grid[0], c->grid[1], c->grid[2]}, {c->block[0], c->block[1], c->block[2]}, c->shared,
        c->stream}, parameters, extra);
}

// --- for tests inside a process

// The next kernel to run fails with this error.
EXPORT void trine_emulator_fail_next_launch(int result) { fail_next = result; }
// The kernels that have run.
EXPORT uint64_t trine_emulator_launches() { return launches; }
