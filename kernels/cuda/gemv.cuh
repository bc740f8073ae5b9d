// y[m, n] = x[m, k] · w[n, k]ᵀ for 1 to 64 rows of x: every weight is read once for all of them, from memory straight into the
// registers that mma.sync multiplies from, and decoded there.
//
//   a block computes 32 columns of y (two tiles of 16 rows of w; gated: one tile of each matrix) for all rows of x
//       eight warps share out k, STEP elements in turn
//           each 32 elements: two mma per tile of w and 8 rows of x
//       the warps' sums are added up in the order of the warps
//
// **One order.** How k is shared out and added up depends on k and the format alone, and the columns of an mma do not know of
// each other: a row's result is the same, bit for bit, in whatever company it is multiplied.
//
// w takes the place of mma's A and x that of its B, so that few rows of x waste nothing but instructions. The elements that an
// mma sums over may come in any order if A and B agree on it: lane t takes elements that lie together in memory, 8 of 32 of
// plain weights, 4 of each 16 of quantised ones.
//
// Quantised weights are multiplied as the integers they are, which bf16 holds exactly; scales and minima are applied to the
// sums of their group, in f32: only x is rounded. The sums of x that minima need come from an mma with ones.
//
// A format F has
//   STEP            elements that a warp takes in turn           UNIT     elements of a lane's loads, four lanes together
//   GROUP           elements of a scale, 16 or 32, or 0: none    MINIMA   whether groups have a minimum
//   Matrix(w, factors, n, k)   a matrix of this shape;   load(row, unit, t, left, lane): a unit of a row of which `left` elements
//                   are not before it
//   Lane            what it loads;   words(lane, u, words): the u-th 32 elements of it, as mma takes them
#pragma once
#include "finish.cuh"
#include "planes.cuh"
#include "ptx.cuh"

namespace gemv {

constexpr unsigned WARPS = 8, COLS = 32, CHUNK = 32;

// 16-bit weights as they are.
template <class T>
struct Plain {
    using Compute = T;
    static constexpr unsigned STEP = 128, UNIT = CHUNK, GROUP = 0;
    static constexpr bool MINIMA = false;
    typedef uint4 Lane;
    struct Matrix {
        const unsigned char* w;
        unsigned k;
        RIDGE_INLINE Matrix(const unsigned char* w, const float*, unsigned, unsigned k) : w(w), k(k) {}
        // k is a multiple of 8: a lane's elements are inside or outside together.
        RIDGE_INLINE void load(unsigned row, unsigned unit, unsigned t, unsigned left, Lane& lane) const {
            const uint4* at = reinterpret_cast<const uint4*>(w + 2 * (static_cast<size_t>(row) * k + UNIT * unit));
            lane = 8 * t < left ? __ldg(at + t) : make_uint4(0, 0, 0, 0);
        }
    };
    static RIDGE_INLINE void words(const Lane& v, unsigned, unsigned (&words)[4]) {
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    static RIDGE_INLINE void x_fragment(const unsigned short* x, unsigned t, unsigned left, unsigned (&words)[4]) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (8 * t < left) v = __ldg(reinterpret_cast<const uint4*>(x) + t);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    static RIDGE_INLINE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        if constexpr (T::IS_BF16)
            mma_m16n8k16_bf16(d, a, b);
        else
            mma_m16n8k16_f16(d, a, b);
    }
};

// fp8 weights, widened to bf16, which holds every value of theirs. A factor per row of w goes with them.
struct Fp8 {
    using Compute = BF16;
    static constexpr unsigned STEP = 128, UNIT = CHUNK, GROUP = 0;
    static constexpr bool MINIMA = false;
    typedef uint2 Lane;
    struct Matrix {
        const unsigned char* w;
        unsigned k;
        RIDGE_INLINE Matrix(const unsigned char* w, const float*, unsigned, unsigned k) : w(w), k(k) {}
        // k is a multiple of 8.
        RIDGE_INLINE void load(unsigned row, unsigned unit, unsigned t, unsigned left, Lane& lane) const {
            const uint2* at = reinterpret_cast<const uint2*>(w + static_cast<size_t>(row) * k + UNIT * unit);
            lane = 8 * t < left ? __ldg(at + t) : make_uint2(0, 0);
        }
    };
    static RIDGE_INLINE unsigned widen(unsigned pair) {
        return bf16_pair(e4m3_to_f32(static_cast<unsigned char>(pair & 255u)), e4m3_to_f32(static_cast<unsigned char>(pair >> 8 & 255u)));
    }
    static RIDGE_INLINE void words(const Lane& v, unsigned, unsigned (&words)[4]) {
        words[0] = widen(v.x), words[1] = widen(v.x >> 16), words[2] = widen(v.y), words[3] = widen(v.y >> 16);
    }
    static RIDGE_INLINE void x_fragment(const unsigned short* x, unsigned t, unsigned left, unsigned (&words)[4]) {
        Plain<BF16>::x_fragment(x, t, left, words);
    }
    static RIDGE_INLINE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }
};

// The same with a factor for each 128 rows and 128 columns.
struct Fp8Blocks {
    using Compute = BF16;
    static constexpr unsigned STEP = 128, UNIT = CHUNK, GROUP = CHUNK, BLOCK = 128;
    static constexpr bool MINIMA = false;
    struct Lane {
        uint2 codes;
        float factor;
        RIDGE_INLINE float scale(unsigned) const { return factor; }
    };
    struct Matrix {
        Fp8::Matrix codes;
        const float* factors;
        RIDGE_INLINE Matrix(const unsigned char* w, const float* factors, unsigned n, unsigned k)
            : codes(w, factors, n, k), factors(factors) {}
        RIDGE_INLINE void load(unsigned row, unsigned unit, unsigned t, unsigned left, Lane& lane) const {
            codes.load(row, unit, t, left, lane.codes);
            lane.factor = __ldg(factors + row / BLOCK * ((codes.k + BLOCK - 1) / BLOCK) + unit * UNIT / BLOCK);
        }
    };
    static RIDGE_INLINE void words(const Lane& lane, unsigned u, unsigned (&words)[4]) { Fp8::words(lane.codes, u, words); }
    static RIDGE_INLINE void x_fragment(const unsigned short* x, unsigned t, unsigned left, unsigned (&words)[4]) {
        Plain<BF16>::x_fragment(x, t, left, words);
    }
    static RIDGE_INLINE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }
};

template <class Q>
struct Quantised {
    using Compute = BF16;
    static constexpr unsigned STEP = Q::STEP, UNIT = quant::UNIT, GROUP = Q::GROUP;
    static constexpr bool MINIMA = Q::MINIMA;
    typedef quant::Lane<Q> Lane;
    struct Matrix {
        const unsigned char* w;
        quant::Planes<Q> planes;
        RIDGE_INLINE Matrix(const unsigned char* w, const float*, unsigned n, unsigned k) : w(w), planes(n, k) {}
        RIDGE_INLINE void load(unsigned row, unsigned unit, unsigned t, unsigned, Lane& lane) const {
            planes.load(w, row, unit, t, lane);
        }
    };
    static RIDGE_INLINE void words(const Lane& lane, unsigned u, unsigned (&words)[4]) {
#pragma unroll
        for (unsigned j = 0; j < 2; ++j) quant::to_bf16<Q>(lane.quad(2 * u + j), words[2 * j], words[2 * j + 1]);
    }
    // k is a multiple of 32: a chunk is inside or outside as a whole, which the caller has asked.
    static RIDGE_INLINE void x_fragment(const unsigned short* x, unsigned t, unsigned, unsigned (&words)[4]) {
#pragma unroll
        for (unsigned j = 0; j < 2; ++j) {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(x) + 4 * j + t);
            words[2 * j] = v.x, words[2 * j + 1] = v.y;
        }
    }
    static RIDGE_INLINE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }
};

struct Product {
    const unsigned short* x;
    const unsigned char *w, *up;
    const float* bias;
    void* y;
    unsigned m, n, k, finish, gated, activation;
    // A factor per row of w and of up, or null for none; and the factors that the format itself has.
    const float *w_scales, *up_scales, *w_factors, *up_factors;
};

// ROWS / 8 tiles of rows of x: sums[tile of w][tile of x][as mma has them].
template <class F, unsigned ROWS>
struct Skinny {
    static constexpr unsigned TILES = ROWS / 8;
    using Sums = float[2][TILES][4];

    // The 32 elements at `x_at`, the `u`-th of what the lane has loaded of its four rows of w: g and g + 8 of both tiles.
    static RIDGE_INLINE void chunk(const Product& p, const typename F::Lane (&lanes)[4], unsigned x_at, unsigned u, Sums& sums) {
        const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        unsigned w[4][4];
#pragma unroll
        for (unsigned r = 0; r < 4; ++r) F::words(lanes[r], u, w[r]);
        float scales[4][2], minima[4][2];
        if constexpr (F::GROUP != 0) {
#pragma unroll
            for (unsigned r = 0; r < 4; ++r)
#pragma unroll
                for (unsigned j = 0; j < CHUNK / F::GROUP; ++j) {
                    scales[r][j] = lanes[r].scale((CHUNK * u + 16 * j) / F::GROUP);
                    if constexpr (F::MINIMA) minima[r][j] = lanes[r].minimum((CHUNK * u + 16 * j) / F::GROUP);
                }
        }
#pragma unroll
        for (unsigned tile = 0; tile < TILES; ++tile) {
            if (tile > 0 && 8 * tile >= p.m) continue;
            const unsigned row = 8 * tile + g;
            unsigned x[4] = {0, 0, 0, 0};
            if (row < p.m) F::x_fragment(p.x + static_cast<size_t>(row) * p.k + x_at, t, p.k - x_at, x);
            multiply(w, x, scales, minima, sums[0][tile], sums[1][tile]);
        }
    }

    static RIDGE_INLINE void multiply(const unsigned (&w)[4][4], const unsigned (&x)[4], const float (&scales)[4][2],
                                      const float (&minima)[4][2], float (&first)[4], float (&second)[4]) {
        // mma j sums over words 2j and 2j + 1 of both.
        const auto mma = [&](float(&d)[4], unsigned tile, unsigned j) {
            const unsigned a[4] = {w[2 * tile][2 * j], w[2 * tile + 1][2 * j], w[2 * tile][2 * j + 1], w[2 * tile + 1][2 * j + 1]};
            const unsigned b[2] = {x[2 * j], x[2 * j + 1]};
            F::mma(d, a, b);
        };
        if constexpr (F::GROUP == 0) {
#pragma unroll
            for (unsigned j = 0; j < 2; ++j) {
                mma(first, 0, j);
                mma(second, 1, j);
            }
        } else {
            constexpr unsigned GROUPS = CHUNK / F::GROUP;
#pragma unroll
            for (unsigned group = 0; group < GROUPS; ++group) {
                float of_x[4] = {};
                if constexpr (F::MINIMA) {
                    const unsigned ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
                    for (unsigned j = group; j < (GROUPS == 1 ? 2 : group + 1); ++j) {
                        const unsigned b[2] = {x[2 * j], x[2 * j + 1]};
                        F::mma(of_x, ones, b);
                    }
                }
#pragma unroll
                for (unsigned tile = 0; tile < 2; ++tile) {
                    float part[4] = {};
#pragma unroll
                    for (unsigned j = group; j < (GROUPS == 1 ? 2 : group + 1); ++j) mma(part, tile, j);
                    float(&sum)[4] = tile == 0 ? first : second;
#pragma unroll
                    for (unsigned i = 0; i < 4; ++i) {
                        const unsigned r = 2 * tile + i / 2;
                        sum[i] = fmaf(scales[r][group], part[i], sum[i]);
                        if constexpr (F::MINIMA) sum[i] = fmaf(-minima[r][group], of_x[i], sum[i]);
                    }
                }
            }
        }
    }

    static RIDGE_INLINE void run(const Product& p) {
        constexpr unsigned PITCH = ROWS + 1, UNITS = F::STEP / F::UNIT, CHUNKS = F::UNIT / CHUNK;
        // With many rows a unit has work enough to hide its loads behind; with few, all of a step's are asked for at once.
        constexpr unsigned UNROLL = ROWS == 8 ? UNITS : (UNITS + 1) / 2;
        RIDGE_DYNAMIC_SHARED(float, partial);  // [warp][column][row of x]
        const unsigned warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const unsigned per_block = p.gated ? COLS / 2 : COLS, first_col = blockIdx.x * per_block;
        const typename F::Matrix first(p.w, p.w_factors, p.n, p.k);
        const typename F::Matrix second = p.gated ? typename F::Matrix(p.up, p.up_factors, p.n, p.k) : first;
        unsigned rows[4];
#pragma unroll
        for (unsigned r = 0; r < 4; ++r)
            // Columns beyond the last one compute it again; nobody stores them.
            rows[r] = min(first_col + r % 2 * 8 + g + (r >= 2 && !p.gated ? 16 : 0), p.n - 1);
        Sums sums = {};
        const auto unit = [&](unsigned at, bool whole) {
            typename F::Lane lanes[4];
#pragma unroll
            for (unsigned r = 0; r < 4; ++r) (r < 2 ? first : second).load(rows[r], at / F::UNIT, t, p.k - at, lanes[r]);
#pragma unroll
            for (unsigned u = 0; u < CHUNKS; ++u)
                if (whole || at + CHUNK * u < p.k) chunk(p, lanes, at + CHUNK * u, u, sums);
        };
        unsigned at = warp * F::STEP;
        for (; at + F::STEP <= p.k; at += WARPS * F::STEP) {
#pragma unroll(UNROLL)
            for (unsigned i = 0; i < UNITS; ++i) unit(at + F::UNIT * i, true);
        }
        // The last step may not be whole, unless a step is a block; it is one warp's.
        if constexpr (F::STEP == 128) {
#pragma unroll 1
            for (unsigned i = 0; i < UNITS; ++i)
                if (at + F::UNIT * i < p.k) unit(at + F::UNIT * i, false);
        }

#pragma unroll
        for (unsigned which = 0; which < 2; ++which)
#pragma unroll
            for (unsigned tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (unsigned i = 0; i < 4; ++i) {
                    const unsigned col = 16 * which + 8 * (i / 2) + g, row = 8 * tile + 2 * t + i % 2;
                    partial[(warp * COLS + col) * PITCH + row] = sums[which][tile][i];
                }
        __syncthreads();
        const Finish<typename F::Compute> finish{p.y, p.bias, p.n, p.finish};
        const auto total = [&](unsigned col, unsigned row) {
            float sum = 0.0f;
#pragma unroll
            for (unsigned from = 0; from < WARPS; ++from) sum += partial[(from * COLS + col) * PITCH + row];
            return sum;
        };
        for (unsigned i = threadIdx.x; i < per_block * p.m; i += WARPS * 32) {
            const unsigned col = i % per_block, row = i / per_block;
            if (first_col + col >= p.n) continue;
            float value = total(col, row);
            if (p.w_scales) value *= p.w_scales[first_col + col];
            if (p.gated) {
                float up = total(16 + col, row);
                if (p.up_scales) up *= p.up_scales[first_col + col];
                value = activate(p.activation, value) * up;
            }
            finish.put(row, first_col + col, value);
        }
    }
};

}  // namespace gemv

// Grid: n / 32, or n / 16 if gated, rounded up. 256 threads. Dynamic shared memory: 8 * 32 * (rows + 1) floats.
#define RIDGE_GEMV_ROWS(name, format, rows)                                                                                \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                                   \
        gemv_##name##_##rows(const unsigned short* x, const unsigned char* w, const unsigned char* up, const float* bias,  \
                             void* y, unsigned m, unsigned n, unsigned k, unsigned finish, unsigned gated,                 \
                             unsigned activation) {                                                                        \
        gemv::Skinny<format, rows>::run({x, w, up, bias, y, m, n, k, finish, gated, activation, 0, 0, 0, 0});                    \
    }
#define RIDGE_GEMV(name, format)           \
    RIDGE_GEMV_ROWS(name, format, 8)       \
    RIDGE_GEMV_ROWS(name, format, 32)      \
    RIDGE_GEMV_ROWS(name, format, 64)

// The same with a factor per row of w (and of up).
#define RIDGE_GEMV_SCALED_ROWS(name, format, rows)                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                                   \
        gemv_##name##_##rows(const unsigned short* x, const unsigned char* w, const unsigned char* up, const float* bias,  \
                             void* y, unsigned m, unsigned n, unsigned k, unsigned finish, unsigned gated,                 \
                             unsigned activation, const float* w_scales, const float* up_scales) {                         \
        gemv::Skinny<format, rows>::run({x, w, up, bias, y, m, n, k, finish, gated, activation, w_scales, up_scales, 0, 0}); \
    }
#define RIDGE_GEMV_SCALED(name, format)      \
    RIDGE_GEMV_SCALED_ROWS(name, format, 8)  \
    RIDGE_GEMV_SCALED_ROWS(name, format, 32) \
    RIDGE_GEMV_SCALED_ROWS(name, format, 64)

// The same with a factor per block of w (and of up), which the format applies.
#define RIDGE_GEMV_BLOCKS_ROWS(name, format, rows)                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                                   \
        gemv_##name##_##rows(const unsigned short* x, const unsigned char* w, const unsigned char* up, const float* bias,  \
                             void* y, unsigned m, unsigned n, unsigned k, unsigned finish, unsigned gated,                 \
                             unsigned activation, const float* w_factors, const float* up_factors) {                       \
        gemv::Skinny<format, rows>::run(                                                                                   \
            {x, w, up, bias, y, m, n, k, finish, gated, activation, 0, 0, w_factors, up_factors});                         \
    }
#define RIDGE_GEMV_BLOCKS(name, format)      \
    RIDGE_GEMV_BLOCKS_ROWS(name, format, 8)  \
    RIDGE_GEMV_BLOCKS_ROWS(name, format, 32) \
    RIDGE_GEMV_BLOCKS_ROWS(name, format, 64)
