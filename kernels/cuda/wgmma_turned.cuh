// Hopper's wgmma with its first operand in registers and its second turned over, as attention has them (hopper.cuh has the
// products of a GEMM). PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
//
// The second operand b[k, n] lies with n contiguous, in panels of 64 or 16 elements of n: a row of 128 or 32 bytes per k, eight of
// them a block, and 16-byte chunks swizzled within it as TMA has them (hopper.cuh). Panels begin at multiples of a block.
#pragma once
#include "hopper.cuh"

#ifdef RIDGE_HOPPER

// Where chunk `chunk` (of 8 elements) of row `row` of a panel of 64 lies, in elements.
RIDGE_INLINE unsigned swizzled(unsigned row, unsigned chunk) {
    return row * 64 + (chunk ^ row % 8) * 8;
}

// The descriptor of an operand whose panels of WIDTH elements are `panel_bytes` apart; its blocks of eight rows follow each other.
template <unsigned WIDTH>
RIDGE_INLINE unsigned long long wgmma_turned_operand(const void* shared, unsigned panel_bytes) {
    static_assert(WIDTH == 64 || WIDTH == 16, "panels of 128 or 32 bytes");
    // As hopper.cuh has it: in this direction bits 16-29 are the distance of panels, 32-45 that of blocks along k; 62-63 are the
    // swizzle: 1 of 128 bytes, 2 of 64, 3 of 32.
    const unsigned long long address = wgmma_operand(shared) & 0x3fff, block = 8 * 2 * WIDTH;
    return address | static_cast<unsigned long long>(panel_bytes >> 4) << 16 | block >> 4 << 32 | (WIDTH == 64 ? 1ull : 3ull) << 62;
}

// What this thread wrote to shared memory is seen by matrix instructions after the next barrier.
RIDGE_INLINE void fence_shared_for_async() {
#ifndef RIDGE_EMULATED
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Called before the fence and after the wait: sums are written before the one and read after the other, which a compiler that
// does not know what these instructions do to registers would not see.
template <int N>
RIDGE_INLINE void wgmma_settle(float (&d)[N]) {
#ifndef RIDGE_EMULATED
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#ifdef RIDGE_EMULATED
namespace emulate {

// A warp has 16 rows of a and d in the layout of mma.m16n8k16, d as n / 8 tiles side by side.
template <class Element, int N>
inline void wgmma_turned(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long descriptor, bool add, const char* what) {
    struct Fragment {
        unsigned a[4];
    };
    const auto all = exchange(FULL_WARP, Fragment{{a[0], a[1], a[2], a[3]}}, what);
    if (descriptor >> 62 == 0) fail("%s of an operand without a swizzle", what);
    // Bytes of a row, and elements of a panel.
    const unsigned width = 256u >> (descriptor >> 62), elements = width / 2;
    const size_t start = (descriptor & 0x3fff) << 4, panel = (descriptor >> 16 & 0x3fff) << 4, block = (descriptor >> 32 & 0x3fff) << 4;
    const auto b = [&](unsigned k, unsigned n) {
        const size_t at = start + n / elements * panel + k / 8 * block + k % 8 * width + n % elements * 2;
        unsigned short stored;
        memcpy(&stored, dynamic_shared + (at ^ (at >> 7 & (width / 16 - 1)) << 4), 2);
        return static_cast<double>(Element::load(stored));
    };
    const unsigned g = lane() / 4, t = lane() % 4;
    for (unsigned tile = 0; tile < N / 8; ++tile)
        for (unsigned column = 0; column < 2; ++column) {
            double low = add ? d[4 * tile + column] : 0.0f, high = add ? d[4 * tile + 2 + column] : 0.0f;
            for (unsigned k = 0; k < 16; ++k) {
                const Fragment& from = all[4 * g + k % 8 / 2];
                const auto element = [&](unsigned word) { return Element::load(static_cast<unsigned short>(word >> (16 * (k % 2)))); };
                const double x = b(k, 8 * tile + 2 * t + column);
                low += element(from.a[k / 8 * 2]) * x;
                high += element(from.a[k / 8 * 2 + 1]) * x;
            }
            d[4 * tile + column] = static_cast<float>(low);
            d[4 * tile + 2 + column] = static_cast<float>(high);
        }
}

}  // namespace emulate
#endif

#define RIDGE_D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RIDGE_D32(d, i) RIDGE_D8(d, i), RIDGE_D8(d, i + 8), RIDGE_D8(d, i + 16), RIDGE_D8(d, i + 24)
#define RIDGE_32                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "     \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RIDGE_64                                                                                                   \
    RIDGE_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "    \
             "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#ifdef RIDGE_EMULATED
#define RIDGE_TURNED_64(type, Element) emulate::wgmma_turned<Element, 64>(d, a, b, add, "wgmma.m64n64k16." type)
#define RIDGE_TURNED_128(type, Element) emulate::wgmma_turned<Element, 128>(d, a, b, add, "wgmma.m64n128k16." type)
#else
#define RIDGE_TURNED_64(type, Element)                                                                              \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
                 " {" RIDGE_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"                                        \
                 : RIDGE_D32(d, 0)                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define RIDGE_TURNED_128(type, Element)                                                                             \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "."     \
                 type " {" RIDGE_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"                                   \
                 : RIDGE_D32(d, 0), RIDGE_D32(d, 32)                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#endif

// d[64, n] = a[64, 16] · b[16, n], or += with `add`. All four warps of the group come with the same b; the results are there, and
// a and b may change, after `wgmma_wait`.
RIDGE_INLINE void wgmma_m64k16(F16, float (&d)[32], const unsigned (&a)[4], unsigned long long b, bool add) {
    RIDGE_TURNED_64("f16", F16);
}
RIDGE_INLINE void wgmma_m64k16(BF16, float (&d)[32], const unsigned (&a)[4], unsigned long long b, bool add) {
    RIDGE_TURNED_64("bf16", BF16);
}
RIDGE_INLINE void wgmma_m64k16(F16, float (&d)[64], const unsigned (&a)[4], unsigned long long b, bool add) {
    RIDGE_TURNED_128("f16", F16);
}
RIDGE_INLINE void wgmma_m64k16(BF16, float (&d)[64], const unsigned (&a)[4], unsigned long long b, bool add) {
    RIDGE_TURNED_128("bf16", BF16);
}

#endif
