// y[m, n] = x[m, k] · w[n, k]ᵀ without tensor cores, in f32: for F32 weights, and for rows that are not whole numbers of 16
// bytes, which the tensor-core kernels cannot take. Slow and exact: for small models, odd shapes and tests.
//
// A block computes 64 x 64 outputs, a thread 4 x 4 of them; each step takes 16 elements of k of 64 rows of x and of w to
// shared memory. Every output is one chain of fused multiply-adds in ascending k.
#include "finish.cuh"

template <class T, bool GATED>
RIDGE_INLINE void gemm_simt(const typename T::Stored* x, const typename T::Stored* w, const typename T::Stored* up,
                            const float* bias, void* y, unsigned m, unsigned n, unsigned k, unsigned finish,
                            unsigned activation) {
    constexpr unsigned TILE = 64, STEP = 16, PITCH = TILE + 4, WEIGHTS = GATED ? 2 : 1;
    __shared__ float xs[STEP][PITCH], ws[WEIGHTS][STEP][PITCH];
    const unsigned m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE;
    const unsigned ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
    float sums[WEIGHTS][4][4] = {};
    for (unsigned at = 0; at < k; at += STEP) {
        for (unsigned i = threadIdx.x; i < TILE * STEP; i += 256) {
            const unsigned row = i / STEP, step = i % STEP;
            const bool inside = at + step < k;
            const size_t x_at = static_cast<size_t>(m0 + row) * k + at + step;
            const size_t w_at = static_cast<size_t>(n0 + row) * k + at + step;
            xs[step][row] = inside && m0 + row < m ? T::load(x[x_at]) : 0.0f;
            ws[0][step][row] = inside && n0 + row < n ? T::load(w[w_at]) : 0.0f;
            if constexpr (GATED) ws[1][step][row] = inside && n0 + row < n ? T::load(up[w_at]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (unsigned step = 0; step < STEP; ++step)
#pragma unroll
            for (unsigned which = 0; which < WEIGHTS; ++which)
#pragma unroll
                for (unsigned i = 0; i < 4; ++i)
#pragma unroll
                    for (unsigned j = 0; j < 4; ++j)
                        sums[which][i][j] = fmaf(xs[step][ty + i], ws[which][step][tx + j], sums[which][i][j]);
        __syncthreads();
    }
    const Finish<T> out{y, bias, n, finish};
#pragma unroll
    for (unsigned i = 0; i < 4; ++i)
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            if (m0 + ty + i >= m || n0 + tx + j >= n) continue;
            float value = sums[0][i][j];
            if constexpr (GATED) value = activate(activation, value) * sums[1][i][j];
            out.put(m0 + ty + i, n0 + tx + j, value);
        }
}

// Grid: (m / 64, n / 64), rounded up. 256 threads.
#define RIDGE_GEMM_SIMT(name, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        gemm_simt_##name(const T::Stored* x, const T::Stored* w, const float* bias, void* y, unsigned m, unsigned n,       \
                         unsigned k, unsigned finish) {                                                                    \
        gemm_simt<T, false>(x, w, 0, bias, y, m, n, k, finish, 0);                                                         \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        gemm_simt_##name##_gated(const T::Stored* x, const T::Stored* gate, const T::Stored* up, void* y, unsigned m,      \
                                 unsigned n, unsigned k, unsigned finish, unsigned activation) {                           \
        gemm_simt<T, true>(x, gate, up, 0, y, m, n, k, finish, activation);                                                \
    }

RIDGE_GEMM_SIMT(f32, F32)
RIDGE_GEMM_SIMT(f16, F16)
RIDGE_GEMM_SIMT(bf16, BF16)
