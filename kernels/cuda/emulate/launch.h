// The library's door: kernels by name, with the kinds of their parameters, so that a launch whose arguments do not fit
// is refused instead of read as something else. A generated unit includes a `.cu` file and then lists its kernels.
#pragma once
#include <utility>

#include "language.h"

namespace emulate {

struct Kernel {
    const char* name;
    // A letter per parameter: p pointer, u and i 32 bits, U 64 bits, f float, b 128 bytes.
    const char* kinds;
    void (*call)(void**);
};

template <class P>
constexpr char kind() {
    if constexpr (std::is_pointer_v<P>) return 'p';
    else if constexpr (std::is_same_v<P, float>) return 'f';
    else if constexpr (std::is_integral_v<P> && sizeof(P) == 4) return std::is_signed_v<P> ? 'i' : 'u';
    else if constexpr (std::is_integral_v<P> && sizeof(P) == 8) return 'U';
    else {
        static_assert(sizeof(P) == 128, "a parameter of a kind that no launch can give");
        return 'b';
    }
}

template <auto F>
struct Call;
template <class... P, void (*F)(P...)>
struct Call<F> {
    static constexpr char kinds[] = {kind<std::remove_cv_t<P>>()..., 0};
    template <size_t... I>
    static void spread(void** arguments, std::index_sequence<I...>) {
        F(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
    }
    static void run(void** arguments) { spread(arguments, std::index_sequence_for<P...>{}); }
};

inline int launch(const Kernel& entry, const uint32_t* grid, const uint32_t* block, uint32_t shared_bytes,
                  const char* kinds, void** arguments, uint32_t order, uint64_t seed) {
    current = nullptr;
    failed = false;
    blockIdx = {0, 0, 0};
    if (strcmp(kinds, entry.kinds) != 0) fail("arguments of kinds %s for parameters %s", kinds, entry.kinds);
    const uint64_t count = static_cast<uint64_t>(block[0]) * block[1] * block[2];
    if (count == 0 || count > THREADS_MAX || block[2] > 64) fail("blocks of %u x %u x %u", block[0], block[1], block[2]);
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535)
        fail("a grid of %u x %u x %u", grid[0], grid[1], grid[2]);
    if (failed) return 1;
    // 1024 bytes is the strictest alignment that a swizzled tile needs. Bytes after the end catch what runs over it.
    constexpr size_t ALIGN = 1024, GUARD = 256;
    unsigned char* memory = static_cast<unsigned char*>(aligned_alloc(ALIGN, (shared_bytes + GUARD + ALIGN - 1) / ALIGN * ALIGN));
    if (!memory) return 1;
    dynamic_shared = memory;
    blockDim = {block[0], block[1], block[2]};
    gridDim = {grid[0], grid[1], grid[2]};
    thread_count = static_cast<unsigned>(count);
    kernel = entry.call;
    kernel_arguments = arguments;
    Shuffle shuffle{seed * 0x9E3779B97F4A7C15ull | 1};
    for (uint32_t z = 0; z < grid[2] && !failed; ++z)
        for (uint32_t y = 0; y < grid[1] && !failed; ++y)
            for (uint32_t x = 0; x < grid[0] && !failed; ++x) {
                blockIdx = {x, y, z};
                // Shared memory begins undefined: all ones are NaN in every float type.
                memset(memory, 0xff, shared_bytes + GUARD);
                run_block(static_cast<Order>(order), shuffle);
                for (size_t i = 0; i < GUARD && !failed; ++i)
                    if (memory[shared_bytes + i] != 0xff) fail("wrote %zu bytes beyond its shared memory", i + 1);
            }
    free(memory);
    return failed;
}

}  // namespace emulate

#define RIDGE_KERNEL(name) {#name, ::emulate::Call<&name>::kinds, &::emulate::Call<&name>::run}

// After the `.cu` file: everything that the library shows.
#define RIDGE_KERNELS(...)                                                                                          \
    static const ::emulate::Kernel ridge_kernels[] = {__VA_ARGS__};                                                 \
    extern "C" __attribute__((visibility("default"))) int ridge_emulate(                                            \
        const char* name, const uint32_t* grid, const uint32_t* block, uint32_t shared_bytes, const char* kinds,    \
        void** arguments, uint32_t order, uint64_t seed, char* message, size_t message_bytes) {                     \
        ::emulate::message = message;                                                                               \
        ::emulate::message_bytes = message_bytes;                                                                   \
        for (const ::emulate::Kernel& entry : ridge_kernels)                                                        \
            if (strcmp(entry.name, name) == 0)                                                                      \
                return ::emulate::launch(entry, grid, block, shared_bytes, kinds, arguments, order, seed);          \
        snprintf(message, message_bytes, "the source has no kernel of this name");                                  \
        return 1;                                                                                                   \
    }
