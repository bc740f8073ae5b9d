// PTX instructions as functions. Each has a body for the device and, for the emulator, one that follows the PTX ISA's
// description of the same instruction ("Matrix Fragments for mma.m16n8k16", "ldmatrix", "cp.async"), so that a kernel
// with a wrong fragment layout computes something wrong there too.
//
// In a warp, lane l has g = l / 4 and t = l % 4.
#pragma once
#include "common.cuh"

#ifndef RIDGE_EMULATED
RIDGE_INLINE unsigned shared_address(const void* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
#endif

// ---- copies from global to shared memory that run beside the thread

// 16 bytes, or 16 zeros if not `valid` (then nothing is read). Both addresses are multiples of 16.
RIDGE_INLINE void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef RIDGE_EMULATED
    emulate::copy_later(shared, global, valid ? 16 : 0, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

// Closes the group of the copies begun since the last call.
RIDGE_INLINE void cp_async_commit() {
#ifdef RIDGE_EMULATED
    emulate::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the N newest groups of this thread are under way. Other threads see them after a barrier.
template <int N>
RIDGE_INLINE void cp_async_wait() {
#ifdef RIDGE_EMULATED
    emulate::wait_copies(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- ldmatrix: four 8 x 8 matrices of 16-bit elements

// Lanes 8i..8i+7 give the addresses of the rows of matrix i, 16 bytes each. r[i] is row g, elements 2t and 2t + 1.
RIDGE_INLINE void ldmatrix_x4(unsigned (&r)[4], const void* shared) {
#ifdef RIDGE_EMULATED
    if (reinterpret_cast<uintptr_t>(shared) % 16) emulate::fail("ldmatrix of a row that is not aligned to 16 bytes");
    const auto rows = emulate::exchange(FULL_WARP, *static_cast<const uint4*>(shared), "ldmatrix");
    const unsigned lane = emulate::lane();
    for (unsigned i = 0; i < 4; ++i) memcpy(&r[i], reinterpret_cast<const char*>(&rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
#endif
}

// The same of the matrices turned over: r[i] is column g, rows 2t and 2t + 1.
RIDGE_INLINE void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared) {
#ifdef RIDGE_EMULATED
    if (reinterpret_cast<uintptr_t>(shared) % 16) emulate::fail("ldmatrix of a row that is not aligned to 16 bytes");
    const auto rows = emulate::exchange(FULL_WARP, *static_cast<const uint4*>(shared), "ldmatrix.trans");
    const unsigned lane = emulate::lane();
    for (unsigned i = 0; i < 4; ++i) {
        unsigned short pair[2];
        for (unsigned h = 0; h < 2; ++h)
            memcpy(&pair[h], reinterpret_cast<const char*>(&rows[8 * i + lane % 4 * 2 + h]) + lane / 4 * 2, 2);
        r[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
#endif
}

// ---- mma: d[16, 8] += a[16, k] · b[k, 8], f32 sums
//
// With e elements per register (2 of 16 bits, 4 of 8 bits) and k = 8 e:
//   a[0]: row g,     k = e t ...        b[0]: column g, k = e t ...            d[0], d[1]: row g,     columns 2t, 2t + 1
//   a[1]: row g + 8, k = e t ...        b[1]: column g, k = 4 e + e t ...      d[2], d[3]: row g + 8, columns 2t, 2t + 1
//   a[2]: row g,     k = 4 e + e t ...
//   a[3]: row g + 8, k = 4 e + e t ...

#ifdef RIDGE_EMULATED
namespace emulate {

// Products and their sum are exact here but for the last rounding; the order within an instruction is not documented.
template <class Element>
inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const char* what) {
    struct Fragments {
        unsigned a[4], b[2];
        float d[4];
    };
    using Stored = typename Element::Stored;
    constexpr unsigned PER = 4 / sizeof(Stored), K = 8 * PER;
    const auto element = [](unsigned word, unsigned i) -> double {
        return Element::load(static_cast<Stored>(word >> (8 * sizeof(Stored) * i)));
    };
    const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
    const auto all = exchange(mine, what, [&](Fragments* (&lanes)[32]) {
        double left[16][K], right[K][8], sums[16][8];
        for (unsigned l = 0; l < 32; ++l) {
            const unsigned g = l / 4, t = l % 4;
            for (unsigned half = 0; half < 2; ++half)
                for (unsigned i = 0; i < PER; ++i) {
                    const unsigned k = (4 * half + t) * PER + i;
                    left[g][k] = element(lanes[l]->a[2 * half], i);
                    left[g + 8][k] = element(lanes[l]->a[2 * half + 1], i);
                    right[k][g] = element(lanes[l]->b[half], i);
                }
            for (unsigned i = 0; i < 4; ++i) sums[g + i / 2 * 8][2 * t + i % 2] = lanes[l]->d[i];
        }
        for (unsigned row = 0; row < 16; ++row)
            for (unsigned k = 0; k < K; ++k)
                for (unsigned column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
        for (unsigned l = 0; l < 32; ++l)
            for (unsigned i = 0; i < 4; ++i) lanes[l]->d[i] = static_cast<float>(sums[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
    });
    for (unsigned i = 0; i < 4; ++i) d[i] = all[lane()].d[i];
}

}  // namespace emulate
#define RIDGE_MMA(instruction, element) emulate::mma<element>(d, a, b, instruction)
#else
#define RIDGE_MMA(instruction, element)                                                                  \
    asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

RIDGE_INLINE void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    RIDGE_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", BF16);
}

RIDGE_INLINE void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    RIDGE_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", F16);
}

// Devices of compute capability 8.9 and later.
#if defined(RIDGE_EMULATED) || __CUDA_ARCH__ >= 890
RIDGE_INLINE void mma_m16n8k32_e4m3(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    RIDGE_MMA("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", E4M3);
}
#endif

// ---- arithmetic

// 2^x, at most 2 units in the last place off; subnormal results are flushed to zero.
RIDGE_INLINE float exp2_approx(float x) {
#ifdef RIDGE_EMULATED
    return exp2f(x);
#else
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
#endif
}
