// Instructions that only compute capability 9.0 has (target sm_90a): mbarriers with transaction counts, the tensor memory
// accelerator (TMA), wgmma, register reallocation. As in ptx.cuh, each has a body that follows the PTX ISA for the
// emulator: descriptors are decoded, the 128-byte swizzle is applied to addresses, barriers have phases.
#pragma once
#include "ptx.cuh"

#if defined(RIDGE_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RIDGE_HOPPER

// What the driver makes of a tensor's address, shape and box. The emulator's own has the fields below.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// ---- mbarriers: a phase ends when `arrivals` threads have come and all announced bytes have been copied

#ifdef RIDGE_EMULATED
namespace emulate {
struct Mbarrier {
    unsigned arrivals : 12, pending : 12, phase : 1;
    int bytes;
    void settle() {
        if (pending || bytes) return;
        phase ^= 1;
        pending = arrivals;
    }
};
static_assert(sizeof(Mbarrier) == 8);
inline Mbarrier& mbarrier(unsigned long long* at) {
    return *reinterpret_cast<Mbarrier*>(at);
}
}  // namespace emulate
#endif

RIDGE_INLINE void mbarrier_init(unsigned long long* barrier, unsigned arrivals) {
#ifdef RIDGE_EMULATED
    emulate::mbarrier(barrier) = {arrivals, arrivals, 0, 0};
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes initialised barriers visible to the copy engine; a __syncthreads() follows for the block's threads.
RIDGE_INLINE void mbarrier_init_fence() {
#ifndef RIDGE_EMULATED
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

RIDGE_INLINE void mbarrier_arrive(unsigned long long* barrier) {
#ifdef RIDGE_EMULATED
    emulate::Mbarrier& b = emulate::mbarrier(barrier);
    if (!b.pending) emulate::fail("more arrivals at an mbarrier than it expects");
    --b.pending;
    b.settle();
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives and announces bytes that copies will bring in this phase.
RIDGE_INLINE void mbarrier_arrive_expect(unsigned long long* barrier, unsigned bytes) {
#ifdef RIDGE_EMULATED
    emulate::mbarrier(barrier).bytes += static_cast<int>(bytes);
    mbarrier_arrive(barrier);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}

// Waits until the phase of this parity has ended.
RIDGE_INLINE void mbarrier_wait(unsigned long long* barrier, unsigned parity) {
#ifdef RIDGE_EMULATED
    emulate::wait_until([=] { return emulate::mbarrier(barrier).phase != parity; }, "an mbarrier");
#else
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// ---- TMA

// Box rows are 128, 64 or 32 bytes in shared memory and swizzled over as many: bits 4-6, 4-5 or 4 of an address are xored with
// those from bit 7 on. With 128 bytes, 16-byte chunk c of row r lies at chunk c ^ (r % 8). `to` is a multiple of eight rows. What
// lies outside the tensor is zeros, and counts as bytes too.

#ifdef RIDGE_EMULATED
namespace emulate {

// `planes` is 0 in a map of a matrix.
struct Map {
    unsigned long long address, cols, rows, row_bytes, planes, plane_bytes;
    unsigned box_cols, box_rows, element_bytes;
};

inline void copy_box(void* to, const TensorMap& map, unsigned long long* barrier, unsigned col, unsigned row, unsigned plane, bool three) {
    const Map f = *reinterpret_cast<const Map*>(map.bytes);
    const unsigned width = f.box_cols * f.element_bytes;
    if (three != (f.planes > 0)) fail("a TMA box of another rank than its map");
    if (width != 128 && width != 64 && width != 32) fail("a TMA box of %u bytes in a row", width);
    if (reinterpret_cast<uintptr_t>(to) % (8 * width)) fail("a TMA box at an address that is not a multiple of %u", 8 * width);
    if (three && plane >= f.planes) fail("a TMA box of plane %u", plane);
    const unsigned char* from = reinterpret_cast<const unsigned char*>(f.address) + plane * f.plane_bytes;
    for (unsigned r = 0; r < f.box_rows; ++r)
        for (unsigned c = 0; c < f.box_cols; ++c) {
            const unsigned offset = r * width + c * f.element_bytes;
            unsigned char* at = static_cast<unsigned char*>(to) + (offset ^ (offset >> 7 & (width / 16 - 1)) << 4);
            memset(at, 0, f.element_bytes);
            if (row + r < f.rows && col + c < f.cols)
                memcpy(at, from + (row + r) * f.row_bytes + (col + c) * f.element_bytes, f.element_bytes);
        }
    Mbarrier& b = mbarrier(barrier);
    b.bytes -= static_cast<int>(f.box_rows * width);
    b.settle();
}

}  // namespace emulate
#endif

// Begins to copy the box of a matrix whose first element is (row, col) to shared memory.
RIDGE_INLINE void tma_load(void* to, const TensorMap& map, unsigned long long* barrier, unsigned col, unsigned row) {
#ifdef RIDGE_EMULATED
    emulate::copy_box(to, map, barrier, col, row, 0, false);
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(col), "r"(row), "r"(shared_address(barrier))
        : "memory");
#endif
}

// The same of one of several matrices that lie at equal distances.
RIDGE_INLINE void tma_load(void* to, const TensorMap& map, unsigned long long* barrier, unsigned col, unsigned row, unsigned plane) {
#ifdef RIDGE_EMULATED
    emulate::copy_box(to, map, barrier, col, row, plane, true);
#else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(col), "r"(row), "r"(plane), "r"(shared_address(barrier))
        : "memory");
#endif
}

RIDGE_INLINE void tma_prefetch_map(const TensorMap& map) {
#ifndef RIDGE_EMULATED
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// ---- warpgroups

// Waits for the four warps of a warpgroup; each has an `id` of its own, from 1 on.
RIDGE_INLINE void warpgroup_barrier(unsigned id) {
#ifdef RIDGE_EMULATED
    emulate::named_barrier(id, 128);
#else
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
#endif
}

template <unsigned COUNT>
RIDGE_INLINE void give_up_registers() {
#ifndef RIDGE_EMULATED
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <unsigned COUNT>
RIDGE_INLINE void take_registers() {
#ifndef RIDGE_EMULATED
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// ---- wgmma: d[64, 256] (+)= a[64, k] · b[256, k]ᵀ by the four warps of a warpgroup, 32 bytes of k
//
// Warp i of the warpgroup has rows 16 i ... 16 i + 15; in it, with j = 0 ... 31:
//   d[4j], d[4j + 1]: row g, columns 8j + 2t, 8j + 2t + 1       d[4j + 2], d[4j + 3]: row g + 8, the same columns

// The descriptor of an operand whose rows are 128 bytes of k, in 128-byte swizzle: bits 0-13 the address / 16, 16-29 unused
// in this layout (by convention 1), 32-45 the distance of groups of eight rows / 16, 62-63 the swizzle (1: 128 bytes).
RIDGE_INLINE unsigned long long wgmma_operand(const void* shared) {
#ifdef RIDGE_EMULATED
    const unsigned long long address = static_cast<const unsigned char*>(shared) - emulate::dynamic_shared;
#else
    const unsigned long long address = shared_address(shared);
#endif
    return (address & 0x3ffff) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

RIDGE_INLINE void wgmma_fence() {
#ifndef RIDGE_EMULATED
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
RIDGE_INLINE void wgmma_commit() {
#ifndef RIDGE_EMULATED
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int N>
RIDGE_INLINE void wgmma_wait() {
#ifndef RIDGE_EMULATED
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

#ifdef RIDGE_EMULATED
namespace emulate {

// The 32 bytes of row `row` of an operand, element by element.
template <class Element>
inline void operand_row(unsigned long long descriptor, unsigned row, float* out) {
    using Stored = typename Element::Stored;
    if (descriptor >> 62 != 1) fail("wgmma of an operand that is not in 128-byte swizzle");
    const unsigned start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    for (unsigned i = 0; i < 32 / sizeof(Stored); ++i) {
        const unsigned address = start + row % 8 * 128 + row / 8 * eight_rows + i * sizeof(Stored);
        Stored stored;
        memcpy(&stored, dynamic_shared + (address ^ (address >> 3 & 0x70)), sizeof stored);
        out[i] = Element::load(stored);
    }
}

// Done when it is asked for: the earliest that a device could.
template <class Element>
inline void wgmma(float (&d)[128], unsigned long long a, unsigned long long b, bool add) {
    constexpr unsigned K = 32 / sizeof(typename Element::Stored);
    gather(FULL_WARP, "", 0, "wgmma");
    const unsigned warp = current->number / 32 % 4, g = lane() / 4, t = lane() % 4;
    float left[2][K], right[K];
    for (unsigned half = 0; half < 2; ++half) operand_row<Element>(a, 16 * warp + g + 8 * half, left[half]);
    for (unsigned j = 0; j < 32; ++j)
        for (unsigned c = 0; c < 2; ++c) {
            operand_row<Element>(b, 8 * j + 2 * t + c, right);
            for (unsigned half = 0; half < 2; ++half) {
                float& out = d[4 * j + 2 * half + c];
                double sum = add ? out : 0.0;
                for (unsigned k = 0; k < K; ++k) sum += static_cast<double>(left[half][k]) * right[k];
                out = static_cast<float>(sum);
            }
        }
}

}  // namespace emulate
#define RIDGE_WGMMA(instruction, element, flags) emulate::wgmma<element>(d, a, b, add)
#else
#define RIDGE_WGMMA_8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define RIDGE_WGMMA_32(i) RIDGE_WGMMA_8(i), RIDGE_WGMMA_8(i + 8), RIDGE_WGMMA_8(i + 16), RIDGE_WGMMA_8(i + 24)
#define RIDGE_WGMMA(instruction, element, flags)                                                                   \
    asm volatile(                                                                                                  \
        "{\n"                                                                                                      \
        ".reg .pred p;\n"                                                                                          \
        "setp.ne.b32 p, %130, 0;\n" instruction                                                                    \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                 \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                         \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                         \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                         \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                         \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                         \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "             \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "        \
        "%128, %129, p, " flags ";\n"                                                                              \
        "}\n"                                                                                                      \
        : RIDGE_WGMMA_32(0), RIDGE_WGMMA_32(32), RIDGE_WGMMA_32(64), RIDGE_WGMMA_32(96)                            \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#endif

// Sums start anew unless `add`.
template <class Element>
RIDGE_INLINE void wgmma_64x256(float (&d)[128], unsigned long long a, unsigned long long b, bool add);
template <>
RIDGE_INLINE void wgmma_64x256<BF16>(float (&d)[128], unsigned long long a, unsigned long long b, bool add) {
    RIDGE_WGMMA("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", BF16, "1, 1, 0, 0");
}
template <>
RIDGE_INLINE void wgmma_64x256<F16>(float (&d)[128], unsigned long long a, unsigned long long b, bool add) {
    RIDGE_WGMMA("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16", F16, "1, 1, 0, 0");
}
template <>
RIDGE_INLINE void wgmma_64x256<E4M3>(float (&d)[128], unsigned long long a, unsigned long long b, bool add) {
    RIDGE_WGMMA("wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3", E4M3, "1, 1");
}

#endif
