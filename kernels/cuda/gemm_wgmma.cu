// y[m, n] = x[m, k] · w[n, k]ᵀ by Hopper's wgmma. Experimental: no device has run this, and it is off by default.
// Architectures: sm_90a
//
//   blocks stay, one per multiprocessor, and take tiles of 128 x 256 in turn
//       warpgroup 0   one thread: TMA brings 128 bytes of k of x and w into the next free stage
//       warpgroups 1, 2   64 rows each: wgmma from shared memory, sums in 128 registers per thread
//       a stage's `full` barrier counts its bytes; `empty` counts the eight warps that have read it
//   finish: bias, residual or gate, and store
//
// While the consumers finish a tile the producer fills stages of the next. Every output is one chain of wgmma in
// ascending k: the sums do not depend on m or on the row's place. They may differ from mma.sync's in the last bits.
//
// A gated product takes 128 rows of each matrix. Edges are zeros that TMA fills in. Rows are whole numbers of 16 bytes.
#include "finish.cuh"
#include "hopper.cuh"

#ifdef RIDGE_HOPPER

namespace wgmma {

constexpr unsigned BM = 128, BN = 256, ROW_BYTES = 128, STAGES = 4;
constexpr unsigned X_BYTES = BM * ROW_BYTES, W_BYTES = BN * ROW_BYTES, STAGE_BYTES = X_BYTES + W_BYTES;
// Finishing goes by 32 columns through shared memory, each warp's 16 rows in its own part of it.
constexpr unsigned PART = 32, PITCH = PART + 8, PART_BYTES = 8 * 16 * PITCH * 4;

struct Product {
    const TensorMap &x, &w, &up;
    const float *x_scales, *w_scales, *up_scales;
    const float* bias;
    void* y;
    unsigned m, n, k, finish, activation;
};

struct Tile {
    unsigned row, col;
};

// Tiles go down the rows of x first, so that blocks at work together share columns of w.
template <bool GATED>
RIDGE_INLINE Tile tile_at(const Product& p, unsigned index) {
    const unsigned down = (p.m + BM - 1) / BM;
    return {index % down * BM, index / down * (GATED ? BN / 2 : BN)};
}
template <bool GATED>
RIDGE_INLINE unsigned tiles(const Product& p) {
    constexpr unsigned COLS = GATED ? BN / 2 : BN;
    return (p.m + BM - 1) / BM * ((p.n + COLS - 1) / COLS);
}

template <class Element, class Compute, bool SCALED, bool GATED>
RIDGE_INLINE void run(const Product& p) {
    RIDGE_DYNAMIC_SHARED(unsigned char, shared);
    unsigned char* parts = shared + STAGES * STAGE_BYTES;
    unsigned long long* full = reinterpret_cast<unsigned long long*>(parts + PART_BYTES);
    unsigned long long* empty = full + STAGES;
    constexpr unsigned STEP = ROW_BYTES / sizeof(typename Element::Stored);
    const unsigned group = threadIdx.x / 128, count = tiles<GATED>(p), steps = (p.k + STEP - 1) / STEP;

    if (threadIdx.x == 0) {
        tma_prefetch_map(p.x);
        tma_prefetch_map(p.w);
        for (unsigned s = 0; s < STAGES; ++s) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], 8);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    // Stages are numbered through all tiles of the block; its phase is how often a stage has been round.
    unsigned stage = 0, phase = 0;
    const auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };
    if (group == 0) {
        give_up_registers<40>();
        if (threadIdx.x == 0)
            for (unsigned index = blockIdx.x; index < count; index += gridDim.x) {
                const Tile tile = tile_at<GATED>(p, index);
                for (unsigned step = 0; step < steps; ++step, advance()) {
                    // The first time round, the phase before the first counts as ended.
                    mbarrier_wait(&empty[stage], phase ^ 1);
                    mbarrier_arrive_expect(&full[stage], STAGE_BYTES);
                    unsigned char* to = shared + stage * STAGE_BYTES;
                    tma_load(to, p.x, &full[stage], step * STEP, tile.row);
                    tma_load(to + X_BYTES, p.w, &full[stage], step * STEP, tile.col);
                    tma_load(to + X_BYTES + W_BYTES / 2, GATED ? p.up : p.w, &full[stage], step * STEP,
                             GATED ? tile.col : tile.col + BN / 2);
                }
            }
    } else {
        take_registers<232>();
        const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        for (unsigned index = blockIdx.x; index < count; index += gridDim.x) {
            const Tile tile = tile_at<GATED>(p, index);
            float sums[128];
            unsigned long long* read = nullptr;
            for (unsigned step = 0; step < steps; ++step, advance()) {
                mbarrier_wait(&full[stage], phase);
                const unsigned char* x = shared + stage * STAGE_BYTES + (group - 1) * 64 * ROW_BYTES;
                const unsigned char* w = shared + stage * STAGE_BYTES + X_BYTES;
                wgmma_fence();
#pragma unroll
                for (unsigned at = 0; at < ROW_BYTES; at += 32)
                    wgmma_64x256<Element>(sums, wgmma_operand(x + at), wgmma_operand(w + at), step > 0 || at > 0);
                wgmma_commit();
                // One step stays under way; the one before it is done with its stage.
                wgmma_wait<1>();
                if (read && lane == 0) mbarrier_arrive(read);
                read = &empty[stage];
            }
            wgmma_wait<0>();
            if (lane == 0) mbarrier_arrive(read);

            float* mine = reinterpret_cast<float*>(parts) + ((group - 1) * 4 + warp) * 16 * PITCH;
            const Finish<Compute> finish{p.y, p.bias, p.n, p.finish};
            // Two parts at once where the second is the gate's other matrix.
            constexpr unsigned COLS = GATED ? BN / 2 : BN, WIDTH = GATED ? PART / 2 : PART;
#pragma unroll
            for (unsigned part = 0; part < COLS / WIDTH; ++part) {
                __syncwarp();
#pragma unroll
                for (unsigned j = 0; j < PART / 8; ++j) {
                    const unsigned half = j / (WIDTH / 8), within = j % (WIDTH / 8);
                    const unsigned from = 4 * (part * WIDTH / 8 + within + half * (BN / 2 / 8));
                    float* at = mine + lane / 4 * PITCH + 8 * j + lane % 4 * 2;
                    *reinterpret_cast<float2*>(at) = make_float2(sums[from], sums[from + 1]);
                    *reinterpret_cast<float2*>(at + 8 * PITCH) = make_float2(sums[from + 2], sums[from + 3]);
                }
                __syncwarp();
#pragma unroll 1
                for (unsigned pair = lane; pair < 16 * WIDTH / 2; pair += 32) {
                    const unsigned in_row = pair / (WIDTH / 2), in_col = pair % (WIDTH / 2) * 2;
                    const unsigned row = tile.row + (group - 1) * 64 + 16 * warp + in_row;
                    const unsigned col = tile.col + part * WIDTH + in_col;
                    if (row >= p.m || col >= p.n) continue;
                    float2 out = *reinterpret_cast<const float2*>(mine + in_row * PITCH + in_col);
                    if constexpr (SCALED) {
                        out.x *= p.x_scales[row] * p.w_scales[col];
                        if (col + 1 < p.n) out.y *= p.x_scales[row] * p.w_scales[col + 1];
                    }
                    if constexpr (GATED) {
                        float2 up = *reinterpret_cast<const float2*>(mine + in_row * PITCH + WIDTH + in_col);
                        if constexpr (SCALED) {
                            up.x *= p.x_scales[row] * p.up_scales[col];
                            if (col + 1 < p.n) up.y *= p.x_scales[row] * p.up_scales[col + 1];
                        }
                        out.x = activate(p.activation, out.x) * up.x;
                        out.y = activate(p.activation, out.y) * up.y;
                    }
                    finish.put_pair(row, col, out.x, out.y);
                }
            }
        }
    }
}

}  // namespace wgmma

// Grid: as many blocks as multiprocessors, or as tiles if there are fewer. 384 threads. Dynamic shared memory: 4 stages of
// 48 KiB, 20 KiB for finishing, 64 bytes of barriers.
#define RIDGE_GEMM_WGMMA(name, Element)                                                                                     \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                    \
        gemm_wgmma_##name(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const float* bias,      \
                          void* y, unsigned m, unsigned n, unsigned k, unsigned finish) {                                   \
        wgmma::run<Element, Element, false, false>({x, w, w, 0, 0, 0, bias, y, m, n, k, finish, 0});                        \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                    \
        gemm_wgmma_##name##_gated(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap gate,              \
                                  const __grid_constant__ TensorMap up, void* y, unsigned m, unsigned n, unsigned k,        \
                                  unsigned finish, unsigned activation) {                                                   \
        wgmma::run<Element, Element, false, true>({x, gate, up, 0, 0, 0, 0, y, m, n, k, finish, activation});               \
    }

RIDGE_GEMM_WGMMA(bf16, BF16)
RIDGE_GEMM_WGMMA(f16, F16)

// fp8 (e4m3) with a scale per row of x and of w; narrow results are bf16.
extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_e4m3(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const float* x_scales,
                    const float* w_scales, const float* bias, void* y, unsigned m, unsigned n, unsigned k, unsigned finish) {
    wgmma::run<E4M3, BF16, true, false>({x, w, w, x_scales, w_scales, w_scales, bias, y, m, n, k, finish, 0});
}
extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_e4m3_gated(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap gate,
                          const __grid_constant__ TensorMap up, const float* x_scales, const float* gate_scales,
                          const float* up_scales, void* y, unsigned m, unsigned n, unsigned k, unsigned finish, unsigned activation) {
    wgmma::run<E4M3, BF16, true, true>({x, gate, up, x_scales, gate_scales, up_scales, 0, y, m, n, k, finish, activation});
}

#endif
