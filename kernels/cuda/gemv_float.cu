// Products of 1 to 64 rows with plain weights: gemv.cuh for bf16 and f16, and a simple kernel for f32 and for rows that are
// not whole numbers of 16 bytes.
#include "gemv.cuh"

RIDGE_GEMV(bf16, gemv::Plain<BF16>)
RIDGE_GEMV(f16, gemv::Plain<F16>)

// A warp computes one column for eight rows of x: a lane sums every 32nd element, then the lanes' sums are added by halves.
// That depends on k alone.
template <class T>
RIDGE_INLINE void gemv_simt(const typename T::Stored* x, const typename T::Stored* w, const typename T::Stored* up,
                            const float* bias, void* y, unsigned m, unsigned n, unsigned k, unsigned finish, unsigned gated,
                            unsigned activation) {
    constexpr unsigned ROWS = 8;
    const unsigned col = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y * ROWS;
    if (col >= n) return;
    const unsigned rows = min(ROWS, m - row);
    float sums[2][ROWS] = {};
    for (unsigned at = lane; at < k; at += 32) {
        const float first = T::load(w[static_cast<size_t>(col) * k + at]);
        const float second = gated ? T::load(up[static_cast<size_t>(col) * k + at]) : 0.0f;
#pragma unroll
        for (unsigned r = 0; r < ROWS; ++r) {
            const float v = r < rows ? T::load(x[static_cast<size_t>(row + r) * k + at]) : 0.0f;
            sums[0][r] = fmaf(v, first, sums[0][r]);
            sums[1][r] = fmaf(v, second, sums[1][r]);
        }
    }
    const Finish<T> out{y, bias, n, finish};
#pragma unroll
    for (unsigned r = 0; r < ROWS; ++r) {
        if (r >= rows) continue;
#pragma unroll
        for (unsigned bits = 16; bits > 0; bits /= 2) {
            sums[0][r] += __shfl_xor_sync(FULL_WARP, sums[0][r], bits);
            if (gated) sums[1][r] += __shfl_xor_sync(FULL_WARP, sums[1][r], bits);
        }
        if (lane == 0) out.put(row + r, col, gated ? activate(activation, sums[0][r]) * sums[1][r] : sums[0][r]);
    }
}

// Grid: (n / 8, m / 8), rounded up. 256 threads.
#define RIDGE_GEMV_SIMT(name, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        gemv_simt_##name(const T::Stored* x, const T::Stored* w, const T::Stored* up, const float* bias, void* y,          \
                         unsigned m, unsigned n, unsigned k, unsigned finish, unsigned gated, unsigned activation) {       \
        gemv_simt<T>(x, w, up, bias, y, m, n, k, finish, gated, activation);                                               \
    }

RIDGE_GEMV_SIMT(f32, F32)
RIDGE_GEMV_SIMT(f16, F16)
RIDGE_GEMV_SIMT(bf16, BF16)
