// The tensor-core product (gemm_mma.cuh) of fp8 (e4m3) by fp8, with a factor per row of x and of w; and the rows that it reads.
// Architectures: sm_89 sm_90a sm_100a
#include "gemm_mma.cuh"

#if defined(RIDGE_EMULATED) || __CUDA_ARCH__ >= 890

struct E4M3Product {
    using Element = E4M3;
    using Compute = BF16;
    static constexpr bool SCALED = true;
    static RIDGE_INLINE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k32_e4m3(d, a, b); }
};

// As in gemm_mma.cu. k is a multiple of 16.
#define RIDGE_GEMM_FP8(name, BM, BN, WM, WN, STAGES)                                                                       \
    extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32)                                                 \
        gemm_fp8_##name(const unsigned char* x, const unsigned char* w, const float* x_scales, const float* w_scales,      \
                        const float* bias, void* y, unsigned m, unsigned n, unsigned k, unsigned finish) {                 \
        Gemm<E4M3Product, BM, BN, WM, WN, STAGES, false>::run(                                                             \
            {x, w, w, x_scales, w_scales, w_scales, bias, y, m, n, k, finish, 0});                                         \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32)                                                 \
        gemm_fp8_##name##_gated(const unsigned char* x, const unsigned char* gate, const unsigned char* up,                \
                                const float* x_scales, const float* gate_scales, const float* up_scales, void* y,          \
                                unsigned m, unsigned n, unsigned k, unsigned finish, unsigned activation) {                \
        Gemm<E4M3Product, BM, BN, WM, WN, STAGES, true>::run(                                                              \
            {x, gate, up, x_scales, gate_scales, up_scales, 0, y, m, n, k, finish, activation});                           \
    }

RIDGE_GEMM_FP8(128x128, 128, 128, 64, 64, 3)
RIDGE_GEMM_FP8(64x64, 64, 64, 32, 32, 4)

// Each row of x[rows, k] (bf16) divided by its scale, the largest magnitude over 448, and rounded to e4m3. A row of zeros has
// scale zero. A block of 256 threads per row.
extern "C" __global__ void __launch_bounds__(256)
    quantize_rows_e4m3(const unsigned short* x, unsigned char* out, float* scales, unsigned k) {
    __shared__ float largest[8];
    const size_t row = blockIdx.x;
    float most = 0.0f;
    for (unsigned i = threadIdx.x; i < k; i += 256) most = fmaxf(most, fabsf(bf16_to_f32(x[row * k + i])));
#pragma unroll
    for (unsigned bits = 16; bits > 0; bits /= 2) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, bits));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    __syncthreads();
    for (unsigned warp = 0; warp < 8; ++warp) most = fmaxf(most, largest[warp]);
    const float scale = __fdiv_rn(most, 448.0f), inverse = scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
    if (threadIdx.x == 0) scales[row] = scale;
    for (unsigned i = threadIdx.x; i < k; i += 256) out[row * k + i] = f32_to_e4m3(bf16_to_f32(x[row * k + i]) * inverse);
}

#endif
