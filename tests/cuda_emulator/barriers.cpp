#include "barriers.h"

#include "driver.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

// Not `thread_local`, which would look for constructors.
extern __thread char trine_shared_begin[16], trine_shared_end[16];

namespace {

constexpr int MOST_SITES = 1024;
// Launches that a barrier is left out of before it counts as one that nothing misses, and orders of
// the threads in each.
constexpr int MOST_LAUNCHES = 300, ORDERS = 4;
// Launches with all barriers, by which bytes are known that depend on the order of blocks alone.
constexpr int CONTROLS = 3;
// More device memory than this is not copied again and again.
constexpr size_t MOST_MEMORY = 64 << 20;

struct Site {
    std::string name, file;
    int line = 0;
    // Since the launch began, in all of its blocks.
    std::atomic<bool> reached{false};
    long launches = 0; // that came to it and were looked at
    int tried = 0; // that it was left out of
    std::string missed; // by what, and how
};

std::mutex sites_lock;
Site sites[MOST_SITES];
std::atomic<int> site_count{0};
std::atomic<int> left_out{-1};
std::atomic<uint64_t> order{0}, waits{0}, limit{~0ull};
std::atomic<bool> spoiled{false};
// Held by whoever leaves barriers out, shared by all other work.
std::shared_mutex alone;
// Kernels all of whose barriers are missed, as far as is known.
std::set<std::string> done;

int site_of(const char* name, const char* file, int line) {
    const char* slash = strrchr(file, '/');
    const char* base = slash ? slash + 1 : file;
    std::lock_guard<std::mutex> hold(sites_lock);
    for (int i = 0; i < site_count; i++) {
        if (sites[i].line == line && sites[i].file == base && sites[i].name == name) return i;
    }
    if (site_count == MOST_SITES) {
        fprintf(stderr, "CUDA emulator: more than %d barriers\n", MOST_SITES);
        abort();
    }
    Site& site = sites[site_count];
    site.name = name;
    site.file = base;
    site.line = line;
    return site_count++;
}

// What processes before this one found.
void read_up(const char* path) {
    FILE* file = fopen(path, "r");
    if (!file) return;
    char line[4096], name[256], base[256], missed[3072];
    int number = 0;
    while (fgets(line, sizeof line, file)) {
        // Without the last field nothing missed it.
        if (sscanf(line, "%255[^\t]\t%d\t%255[^\t]\t%*d\t%*d\t%3071[^\n]", base, &number, name, missed) == 4) {
            sites[site_of(name, base, number)].missed = missed;
        }
    }
    fclose(file);
}

void write_down() {
    std::string text;
    for (int i = 0; i < site_count; i++) {
        const Site& site = sites[i];
        if (!site.launches) continue;
        text += site.file + "\t" + std::to_string(site.line) + "\t" + site.name + "\t" + std::to_string(site.launches) +
            "\t" + std::to_string(site.tried) + "\t" + site.missed + "\n";
    }
    const int file = open(getenv("TRINE_EMULATOR_BARRIERS"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    // One write, so that processes do not write into each other's lines.
    if (file < 0 || write(file, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
        perror("CUDA emulator: TRINE_EMULATOR_BARRIERS");
    }
    if (file >= 0) close(file);
}

// A copy of all memory of a device.
struct Memory {
    std::vector<std::pair<char*, std::vector<char>>> parts;

    explicit Memory(const Context& context) {
        for (const auto& [p, allocation] : context.memory) {
            char* at = reinterpret_cast<char*>(static_cast<size_t>(p));
            parts.emplace_back(at, std::vector<char>(at, at + allocation.bytes));
        }
    }
    void restore() const {
        for (const auto& [at, bytes] : parts) {
            if (memcmp(at, bytes.data(), bytes.size()) != 0) memcpy(at, bytes.data(), bytes.size());
        }
    }
};

// How many bytes of memory are others than in all of these copies, which agree about them.
size_t others(const std::vector<Memory>& copies) {
    size_t count = 0;
    for (size_t i = 0; i < copies[0].parts.size(); i++) {
        const auto& [at, bytes] = copies[0].parts[i];
        if (memcmp(at, bytes.data(), bytes.size()) == 0) continue;
        for (size_t j = 0; j < bytes.size(); j++) {
            bool agree = at[j] != bytes[j];
            for (const Memory& other : copies) agree = agree && other.parts[i].second[j] == bytes[j];
            count += agree;
        }
    }
    return count;
}

bool is_wanted(const Site& site) {
    return site.reached && site.missed.empty() && site.tried < MOST_LAUNCHES;
}

// Runs a launch without a barrier, from the memory before it, until something misses the barrier.
void leave_out(int number, const char* kernel, const Memory& before, const std::vector<Memory>& after,
    const std::function<Outcome()>& run) {
    Site& site = sites[number];
    site.tried++;
    for (uint64_t n = 1; n <= ORDERS && site.missed.empty(); n++) {
        before.restore();
        order = n << 40;
        left_out = number;
        const Outcome without = run();
        left_out = -1;
        if (without.result != SUCCESS) {
            site.missed = without.text;
        } else if (const size_t count = others(after)) {
            site.missed = std::string("kernel ") + kernel + ": " + std::to_string(count) + " other bytes in memory";
        }
        std::replace(site.missed.begin(), site.missed.end(), '\n', ' ');
    }
}

} // namespace

bool barriers_are_tested() {
    static const bool tested = [] {
        const char* file = getenv("TRINE_EMULATOR_BARRIERS");
        if (!file || !*file) return false;
        read_up(file);
        atexit(write_down);
        return true;
    }();
    return tested;
}

std::shared_lock<std::shared_mutex> beside_barriers() {
    return barriers_are_tested() ? std::shared_lock<std::shared_mutex>(alone) : std::shared_lock<std::shared_mutex>();
}

bool barrier_is_left_out(const char* name, const char* file, int line) {
    if (!barriers_are_tested()) return false;
    // A file's name is at one address for all barriers of an object, and a barrier is come to by many
    // threads one after the other.
    thread_local const char* last_file = nullptr;
    thread_local const char* last_name = nullptr;
    thread_local int last_line = 0, last = 0;
    if (file != last_file || line != last_line || name != last_name) {
        last = site_of(name, file, line);
        last_file = file;
        last_line = line;
        last_name = name;
    }
    std::atomic<bool>& reached = sites[last].reached;
    if (!reached.load(std::memory_order_relaxed)) reached.store(true, std::memory_order_relaxed);
    return left_out.load(std::memory_order_relaxed) == last;
}

uint64_t other_order() { return order.load(std::memory_order_relaxed); }
uint64_t most_waits() { return limit.load(std::memory_order_relaxed); }
void block_has_waited(uint64_t times) {
    uint64_t most = waits;
    while (times > most && !waits.compare_exchange_weak(most, times)) {}
}

void spoil_static_shared() {
    if (!spoiled) return;
    char *const begin = trine_shared_begin, *const end = trine_shared_end;
    if (end < begin) {
        fprintf(stderr, "CUDA emulator: the linker has moved the kernels' shared memory\n");
        abort();
    }
    memset(begin, 0xcd, static_cast<size_t>(end - begin));
}

namespace {

// A launch of a kernel of which nothing new is to be expected; it may run beside others.
Outcome run_as_it_is(const std::function<Outcome()>& run) {
    std::shared_lock<std::shared_mutex> beside(alone);
    const Outcome outcome = run();
    for (int i = 0; i < site_count; i++) {
        if (!is_wanted(sites[i])) continue;
        // Which kernel came to it is not known here: the next launch of each is looked at.
        std::lock_guard<std::mutex> hold(sites_lock);
        done.clear();
        break;
    }
    return outcome;
}

} // namespace

Outcome run_with_and_without_barriers(Context& context, const char* kernel, const std::function<Outcome()>& run) {
    bool known = false;
    {
        std::lock_guard<std::mutex> hold(sites_lock);
        known = done.count(kernel) > 0;
    }
    if (known) return run_as_it_is(run);

    std::unique_lock<std::shared_mutex> no_other(alone);
    Hold hold(state); // nothing is allocated or freed meanwhile
    size_t bytes = 0;
    for (const auto& [p, allocation] : context.memory) bytes += allocation.bytes;
    if (bytes > MOST_MEMORY) return run();
    std::vector<Memory> before, after;
    before.emplace_back(context);
    for (int i = 0; i < site_count; i++) sites[i].reached = false;
    waits = 0;
    spoiled = true;
    const Outcome outcome = run();
    after.emplace_back(context);
    std::vector<int> wanted;
    for (int i = 0; i < site_count; i++) {
        if (is_wanted(sites[i])) wanted.push_back(i);
        if (sites[i].reached) sites[i].launches++;
    }
    if (wanted.empty()) {
        std::lock_guard<std::mutex> hold_sites(sites_lock);
        done.insert(kernel);
    } else if (outcome.result == SUCCESS) {
        bool sound = true;
        for (int i = 1; i < CONTROLS && sound; i++) {
            before[0].restore();
            order = static_cast<uint64_t>(i) << 32;
            sound = run().result == SUCCESS;
            after.emplace_back(context);
        }
        limit = 10 * waits + 1000;
        for (const int i : wanted) {
            if (sound) leave_out(i, kernel, before[0], after, run);
        }
        limit = ~0ull;
        order = 0;
        after[0].restore();
    }
    spoiled = false;
    for (int i = 0; i < site_count; i++) sites[i].reached = false;
    return outcome;
}
