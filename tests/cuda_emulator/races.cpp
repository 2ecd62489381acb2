#include "races.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

void Races::barrier() {
    generation++;
    used = 0;
    memset(written, 0, sizeof written);
    memset(read, 0, sizeof read);
    overwritten.clear();
}

void Races::sync(Clocks& clocks, int warp, unsigned mask) {
    uint16_t most[32] = {};
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        for (int i = 0; i < 32; i++) {
            // What a lane did up to now has its clock and counts as known from the next on.
            const uint16_t clock = static_cast<uint16_t>(clocks[warp][lane][i] + (i == lane));
            if (clock > most[i]) most[i] = clock;
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) memcpy(clocks[warp][lane], most, sizeof most);
    }
}

bool Races::ordered(const Clocks& clocks, const Access& before, int thread) {
    if (before.thread == thread) return true;
    if (before.thread / 32 != thread / 32) return false;
    return clocks[thread / 32][thread % 32][before.thread % 32] > before.clock;
}

Races::Byte& Races::find(uintptr_t address) {
    if (2 * used >= table.size()) {
        std::vector<Byte> old(2 * table.size());
        old.swap(table);
        for (Byte& byte : old) {
            if (byte.generation == generation) find(byte.address) = byte;
        }
    }
    size_t at = address * 0x9e3779b97f4a7c15ull >> 20 & (table.size() - 1);
    while (table[at].generation == generation && table[at].address != address) at = (at + 1) & (table.size() - 1);
    if (table[at].generation != generation) {
        table[at] = Byte();
        table[at].address = address;
        table[at].generation = generation;
        used++;
    }
    return table[at];
}

// Function and line of the code at an address, as well as binutils can tell.
static std::string place(const void* code) {
    Dl_info info = {};
    if (!dladdr(code, &info) || !info.dli_fname) return "?";
    char command[1200];
    const size_t offset = reinterpret_cast<size_t>(code) - reinterpret_cast<size_t>(info.dli_fbase) - 1;
    snprintf(command, sizeof command, "addr2line -Cfpe '%s' 0x%zx 2> /dev/null", info.dli_fname, offset);
    std::string text;
    if (FILE* pipe = popen(command, "r")) {
        char line[600];
        if (fgets(line, sizeof line, pipe)) text = line;
        pclose(pipe);
    }
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text.empty() ? "code at " + std::to_string(offset) : text;
}

std::string Races::report(const Access& before, const char* did, const Access& now, const char* does,
    uintptr_t address) {
    char text[2000];
    snprintf(text, sizeof text, "race: thread %d %s and thread %d %s 0x%zx with no barrier between\n    %s\n    %s",
        before.thread, did, now.thread, does, static_cast<size_t>(address), place(before.code).c_str(),
        place(now.code).c_str());
    return text;
}

std::string Races::last() {
    std::string found;
    for (const Overwritten& o : overwritten) {
        if (*o.p == o.value) continue;
        found = report(o.before, "wrote", o.now, "writes", reinterpret_cast<uintptr_t>(o.p));
        break;
    }
    overwritten.clear();
    return found;
}

std::string Races::access(int thread, const void* p, size_t bytes, bool write, bool atomic, const void* code) {
    enum { WRITE = 1, READ = 2, OTHER = 4 };
    if (!overwritten.empty()) {
        std::string found = last();
        if (!found.empty()) return found;
    }
    const uintptr_t first = reinterpret_cast<uintptr_t>(p);
    const Clocks& clocks = write ? written : read;
    const Access now = {static_cast<uint16_t>(thread), atomic, clocks[thread / 32][thread % 32][thread % 32], code};
    for (uintptr_t address = first; address < first + bytes; address++) {
        Byte& byte = find(address);
        auto races = [&](const Clocks& known, const Access& before) {
            return !(before.atomic && atomic) && !ordered(known, before, thread);
        };
        const char* does = write ? "writes" : "reads";
        if (byte.there & WRITE && races(written, byte.write)) {
            if (!write || atomic) return report(byte.write, "wrote", now, does, address);
            const unsigned char* at = static_cast<const unsigned char*>(p) + (address - first);
            overwritten.push_back({at, *at, byte.write, now});
        }
        if (write) {
            for (const auto& [bit, before] : {std::pair<int, const Access&>(READ, byte.read), {OTHER, byte.other}}) {
                if (byte.there & bit && races(read, before)) return report(before, "read", now, does, address);
            }
            byte.write = now;
            byte.there |= WRITE;
        } else if (!(byte.there & READ) || byte.read.thread == thread) {
            byte.read = now;
            byte.there |= READ;
        } else {
            byte.other = now;
            byte.there |= OTHER;
        }
    }
    return "";
}
