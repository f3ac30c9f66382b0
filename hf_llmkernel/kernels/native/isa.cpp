// Which instruction set is in use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace llmk {
namespace {

const Kernels* const kBestFirst[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kPortable,
};

bool runs_here(const Kernels& level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (&level == &kAvx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") && runs_here(kAvx2);
    if (&level == &kAvx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return true;
}

const Kernels* find(const char* name) {
    for (const Kernels* level : kBestFirst)
        if (runs_here(*level) && (name == nullptr || std::strcmp(name, level->name) == 0)) return level;
    return nullptr;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* level = in_use.load(std::memory_order_acquire);
    if (level == nullptr) {
        const char* wanted = std::getenv("LLMKERNEL_ISA");
        level = find(wanted != nullptr && *wanted != 0 ? wanted : nullptr);
        if (level == nullptr) level = find(nullptr);
        in_use.store(level, std::memory_order_release);
    }
    return *level;
}

}  // namespace llmk

LLMK_API int llmk_abi() { return LLMK_ABI; }

#ifndef LLMK_SOURCES
#define LLMK_SOURCES ""
#endif
// The build reads it from the file, to see whether that is of the present sources.
LLMK_API const char* llmk_sources() { return LLMK_SOURCES; }

LLMK_API const char* llmk_isa() { return llmk::kernels().name; }

LLMK_API const char* llmk_set_isa(const char* name) {
    const llmk::Kernels* level = llmk::find(name);
    if (level == nullptr) return "the processor has no such instruction set, or the library does not know it";
    llmk::in_use.store(level, std::memory_order_release);
    return nullptr;
}
