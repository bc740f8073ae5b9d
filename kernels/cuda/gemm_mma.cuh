// y[m, n] = x[m, k] · w[n, k]ᵀ on tensor cores by mma.sync: devices of compute capability 8.0 and later.
//
//   each block computes a tile of BM x BN outputs
//       each step takes 128 bytes of k of BM rows of x and BN rows of w to shared memory by cp.async, STAGES deep
//       each warp multiplies WM x WN of them: fragments by ldmatrix, sums in registers
//   finish: scales, bias, residual or gate, and store
//
// A row of a tile is 128 bytes, eight chunks of 16; chunk c of row r lies at place c ^ (r % 8), so that neither the copies
// (a row's chunks side by side) nor ldmatrix (eight rows' chunk c) meet in a bank.
//
// Every output is one chain of mma instructions in ascending k, whatever the tile: the sums do not depend on m, on the row's
// place or on the tile that was chosen.
//
// With a factor per block of w (BLOCKS: 128 rows by a step of k, which is 128 bytes) the chain is cut there: each step's sums are
// multiplied by the block's factor and added up in f32, in ascending k too.
//
// A gated product takes half of a warp's columns from `w` and the other half, for the same outputs, from `up`.
//
// Rows of x and w are whole numbers of 16 bytes and aligned to them. Edges of m, n and k are filled with zeros.
#pragma once
#include "finish.cuh"
#include "ptx.cuh"

// What an instruction multiplies, and what the sums are stored as.
struct Bf16Product {
    using Element = BF16;
    using Compute = BF16;
    static constexpr bool SCALED = false, BLOCKS = false;
    static RIDGE_INLINE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }
};
struct F16Product {
    using Element = F16;
    using Compute = F16;
    static constexpr bool SCALED = false, BLOCKS = false;
    static RIDGE_INLINE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k16_f16(d, a, b); }
};

struct Product {
    const unsigned char *x, *w, *up;
    // For fp8: one factor per row of x; and one per row, or per block, of w and up.
    const float *x_scales, *w_scales, *up_scales;
    const float* bias;
    void* y;
    unsigned m, n, k, finish, activation;
};

template <class P, unsigned BM, unsigned BN, unsigned WM, unsigned WN, unsigned STAGES, bool GATED>
struct Gemm {
    static constexpr unsigned ROW_BYTES = 128, CHUNKS = 8, BLOCK_ROWS = 128;
    static constexpr unsigned WARPS_N = BN / WN, THREADS = BM / WM * WARPS_N * 32;
    static constexpr unsigned STAGE_BYTES = (BM + BN) * ROW_BYTES;
    static constexpr unsigned BYTES = sizeof(typename P::Element::Stored);
    // Columns of outputs of a block and of a warp.
    static constexpr unsigned COLS = GATED ? BN / 2 : BN, WARP_COLS = GATED ? WN / 2 : WN;
    // Floats between rows of sums in shared memory: eight rows' pairs then lie in different banks.
    static constexpr unsigned PITCH = WN + 8;
    static_assert(BM / WM * WARPS_N * WM * PITCH * 4 <= STAGES * STAGE_BYTES, "the sums fit where the stages were");
    static_assert((BM + BN) * CHUNKS % THREADS == 0 && BM % (THREADS / CHUNKS) == 0, "copies are shared out evenly");
    static_assert(WM % 16 == 0 && WN % 16 == 0, "a warp takes whole fragments, columns by two");
    static_assert(!P::BLOCKS || (BYTES == 1 && BLOCK_ROWS % COLS == 0), "a step is a block's columns, a tile within its rows");

    static RIDGE_INLINE unsigned place(unsigned row, unsigned chunk) {
        return row * ROW_BYTES + (chunk ^ row % CHUNKS) * 16;
    }

    // Begins to copy step `step` of k to a stage.
    static RIDGE_INLINE void copy(const Product& p, unsigned char* stage, unsigned step) {
        const unsigned chunk = threadIdx.x % CHUNKS, row_bytes = p.k * BYTES;
        const unsigned at = step * ROW_BYTES + chunk * 16;
        const unsigned m0 = blockIdx.x * BM, n0 = blockIdx.y * COLS;
#pragma unroll
        for (unsigned r = 0; r < BM + BN; r += THREADS / CHUNKS) {
            const unsigned tile_row = r + threadIdx.x / CHUNKS;
            const unsigned char* from = p.x;
            unsigned row, rows;
            if (r < BM) {
                row = m0 + tile_row;
                rows = p.m;
            } else {
                const unsigned column = tile_row - BM, in_warp = column % WN;
                const bool up = GATED && in_warp >= WARP_COLS;
                row = n0 + column / WN * WARP_COLS + (up ? in_warp - WARP_COLS : in_warp);
                rows = p.n;
                from = up ? p.up : p.w;
            }
            const bool valid = row < rows && at < row_bytes;
            if (valid) from += static_cast<size_t>(row) * row_bytes + at;
            cp_async_16(stage + place(tile_row, chunk), from, valid);
        }
    }

    static RIDGE_INLINE void run(const Product& p) {
        RIDGE_DYNAMIC_SHARED(unsigned char, stages);
        const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const unsigned warp_row = warp / WARPS_N * WM, warp_col = warp % WARPS_N * WN;
        const unsigned steps = (p.k * BYTES + ROW_BYTES - 1) / ROW_BYTES;
        float sums[WM / 16][WN / 8][4] = {};
        float totals[P::BLOCKS ? WM / 16 : 1][P::BLOCKS ? WN / 8 : 1][4] = {};
        // A warp's columns lie in one block of rows of w.
        const unsigned block_row = min(blockIdx.y * COLS + warp_col / WN * WARP_COLS, p.n - 1) / BLOCK_ROWS * steps;

#pragma unroll 1
        for (unsigned s = 0; s < STAGES - 1; ++s) {
            if (s < steps) copy(p, stages + s * STAGE_BYTES, s);
            cp_async_commit();
        }
        for (unsigned step = 0; step < steps; ++step) {
            cp_async_wait<STAGES - 2>();
            // Everybody's copies of this step are done, and everybody is done with the stage that is filled next.
            __syncthreads();
            const unsigned next = step + STAGES - 1;
            if (next < steps) copy(p, stages + next % STAGES * STAGE_BYTES, next);
            cp_async_commit();

            const unsigned char* x = stages + step % STAGES * STAGE_BYTES;
            const unsigned char* w = x + BM * ROW_BYTES;
#pragma unroll
            for (unsigned part = 0; part < CHUNKS; part += 2) {
                unsigned a[WM / 16][4], b[WN / 16][4];
#pragma unroll
                for (unsigned i = 0; i < WM / 16; ++i)
                    ldmatrix_x4(a[i], x + place(warp_row + 16 * i + lane % 16, part + lane / 16));
#pragma unroll
                for (unsigned j = 0; j < WN / 16; ++j)
                    ldmatrix_x4(b[j], w + place(warp_col + 16 * j + lane / 16 * 8 + lane % 8, part + lane / 8 % 2));
#pragma unroll
                for (unsigned i = 0; i < WM / 16; ++i)
#pragma unroll
                    for (unsigned j = 0; j < WN / 8; ++j) {
                        const unsigned pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                        P::mma(sums[i][j], a[i], pair);
                    }
            }
            if constexpr (P::BLOCKS) {
                const float factor = __ldg(p.w_scales + block_row + step), of_up = GATED ? __ldg(p.up_scales + block_row + step) : 0.0f;
#pragma unroll
                for (unsigned i = 0; i < WM / 16; ++i)
#pragma unroll
                    for (unsigned j = 0; j < WN / 8; ++j)
#pragma unroll
                        for (unsigned e = 0; e < 4; ++e) {
                            totals[i][j][e] = fmaf(8 * j < WARP_COLS ? factor : of_up, sums[i][j][e], totals[i][j][e]);
                            sums[i][j][e] = 0.0f;
                        }
            }
        }
        if constexpr (P::BLOCKS)
#pragma unroll
            for (unsigned i = 0; i < WM / 16; ++i)
#pragma unroll
                for (unsigned j = 0; j < WN / 8; ++j)
#pragma unroll
                    for (unsigned e = 0; e < 4; ++e) sums[i][j][e] = totals[i][j][e];

        // The sums go through shared memory, each warp's own part of it: lanes then store whole rows, and the code that
        // finishes a pair is there once, not once per register.
        cp_async_wait<0>();
        __syncthreads();
        float* mine = reinterpret_cast<float*>(stages) + warp * WM * PITCH;
#pragma unroll
        for (unsigned i = 0; i < WM / 16; ++i)
#pragma unroll
            for (unsigned j = 0; j < WN / 8; ++j) {
                float* at = mine + (16 * i + lane / 4) * PITCH + 8 * j + lane % 4 * 2;
                *reinterpret_cast<float2*>(at) = make_float2(sums[i][j][0], sums[i][j][1]);
                *reinterpret_cast<float2*>(at + 8 * PITCH) = make_float2(sums[i][j][2], sums[i][j][3]);
            }
        __syncwarp();
        const Finish<typename P::Compute> finish{p.y, p.bias, p.n, p.finish};
        constexpr unsigned PAIRS = WARP_COLS / 2;
#pragma unroll 1
        for (unsigned pair = lane; pair < WM * PAIRS; pair += 32) {
            const unsigned row = blockIdx.x * BM + warp_row + pair / PAIRS, in_warp = pair % PAIRS * 2;
            const unsigned col = blockIdx.y * COLS + warp_col / WN * WARP_COLS + in_warp;
            if (row >= p.m || col >= p.n) continue;
            const float* at = mine + pair / PAIRS * PITCH + in_warp;
            float2 out = *reinterpret_cast<const float2*>(at);
            const auto scale = [&](float2& pair, const float* of_w) {
                const float of_x = p.x_scales[row];
                pair.x *= P::BLOCKS ? of_x : of_x * of_w[col];
                if (col + 1 < p.n) pair.y *= P::BLOCKS ? of_x : of_x * of_w[col + 1];
            };
            if constexpr (P::SCALED) scale(out, p.w_scales);
            if constexpr (GATED) {
                float2 up = *reinterpret_cast<const float2*>(at + WARP_COLS);
                if constexpr (P::SCALED) scale(up, p.up_scales);
                out.x = activate(p.activation, out.x) * up.x;
                out.y = activate(p.activation, out.y) * up.y;
            }
            finish.put_pair(row, col, out.x, out.y);
        }
    }
};
