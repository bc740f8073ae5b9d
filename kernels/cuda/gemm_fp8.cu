// The tensor-core product (gemm_mma.cuh) of fp8 (e4m3) by fp8, with a factor per row of x and per row or block of w; the rows
// that it reads; and what NVIDIA's library leaves to do.
// Architectures: sm_89 sm_90a sm_100a
#include "elements.cuh"
#include "gemm_mma.cuh"

#if defined(RIDGE_EMULATED) || __CUDA_ARCH__ >= 890

template <bool BY_BLOCK>
struct E4M3Product {
    using Element = E4M3;
    using Compute = BF16;
    static constexpr bool SCALED = true, BLOCKS = BY_BLOCK;
    static RIDGE_INLINE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k32_e4m3(d, a, b); }
};

// As in gemm_mma.cu. k is a multiple of 16.
#define RIDGE_GEMM_FP8(name, BY_BLOCK, BM, BN, WM, WN, STAGES)                                                             \
    extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32)                                                 \
        gemm_fp8_##name(const unsigned char* x, const unsigned char* w, const float* x_scales, const float* w_scales,      \
                        const float* bias, void* y, unsigned m, unsigned n, unsigned k, unsigned finish) {                 \
        Gemm<E4M3Product<BY_BLOCK>, BM, BN, WM, WN, STAGES, false>::run(                                                   \
            {x, w, w, x_scales, w_scales, w_scales, bias, y, m, n, k, finish, 0});                                         \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32)                                                 \
        gemm_fp8_##name##_gated(const unsigned char* x, const unsigned char* gate, const unsigned char* up,                \
                                const float* x_scales, const float* gate_scales, const float* up_scales, void* y,          \
                                unsigned m, unsigned n, unsigned k, unsigned finish, unsigned activation) {                \
        Gemm<E4M3Product<BY_BLOCK>, BM, BN, WM, WN, STAGES, true>::run(                                                    \
            {x, gate, up, x_scales, gate_scales, up_scales, 0, y, m, n, k, finish, activation});                           \
    }

RIDGE_GEMM_FP8(128x128, false, 128, 128, 64, 64, 3)
RIDGE_GEMM_FP8(64x64, false, 64, 64, 32, 32, 4)
// Sums and totals together take twice the registers: warps of half as many rows.
RIDGE_GEMM_FP8(blocks_128x128, true, 128, 128, 32, 64, 3)
RIDGE_GEMM_FP8(blocks_64x64, true, 64, 64, 32, 32, 4)

// A row's scale, its largest magnitude over 448, and what its elements are multiplied by. A row of zeros has scale zero. All
// threads of a block of 256 come with their largest; every one gets both.
RIDGE_INLINE float2 row_scale(float most, float* partial) {
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = most;
    __syncthreads();
    for (unsigned warp = 0; warp < 8; ++warp) most = fmaxf(most, partial[warp]);
    const float scale = __fdiv_rn(most, 448.0f);
    return make_float2(scale, scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f);
}

// Each row of x[rows, k] (bf16) divided by its scale and rounded to e4m3. A block per row.
extern "C" __global__ void __launch_bounds__(256)
    quantize_rows_e4m3(const unsigned short* x, unsigned char* out, float* scales, unsigned k) {
    __shared__ float largest[8];
    const size_t row = blockIdx.x;
    float most = 0.0f;
    for (unsigned i = threadIdx.x; i < k; i += 256) most = fmaxf(most, fabsf(bf16_to_f32(x[row * k + i])));
    const float2 scale = row_scale(most, largest);
    if (threadIdx.x == 0) scales[row] = scale.x;
    for (unsigned i = threadIdx.x; i < k; i += 256) out[row * k + i] = f32_to_e4m3(bf16_to_f32(x[row * k + i]) * scale.y);
}

// rms_norm_bf16 (rows.cu) and quantize_rows_e4m3 of what it gives, in one pass and to the same bits. The normed rows are written
// to `normed` too, unless that is null. A block per row.
extern "C" __global__ void __launch_bounds__(256)
    rms_norm_e4m3(unsigned k, float eps, const float* x, const float* weight, unsigned char* out, float* scales,
                  unsigned short* normed) {
    __shared__ float partial[8], largest[8];
    const size_t row = blockIdx.x;
    x += row * k;
    const float inverse = inverse_rms(k, eps, x, partial);
    const auto element = [&](unsigned i) { return f32_to_bf16(x[i] * inverse * weight[i]); };
    float most = 0.0f;
    for (unsigned i = threadIdx.x; i < k; i += 256) most = fmaxf(most, fabsf(bf16_to_f32(element(i))));
    const float2 scale = row_scale(most, largest);
    if (threadIdx.x == 0) scales[row] = scale.x;
    for (unsigned i = threadIdx.x; i < k; i += 256) {
        const unsigned short v = element(i);
        if (normed) normed[row * k + i] = v;
        out[row * k + i] = f32_to_e4m3(bf16_to_f32(v) * scale.y);
    }
}

// y = finish(sums[m, n] * factors) of a product of fp8 that was made without its factors. y may be `sums`. A block per row.
extern "C" __global__ void __launch_bounds__(256)
    scale_product(const float* sums, const float* x_scales, const float* w_scales, const float* bias, void* y, unsigned n,
                  unsigned finish) {
    const unsigned row = blockIdx.x;
    const Finish<BF16> out{y, bias, n, finish};
    const float* from = sums + static_cast<size_t>(row) * n;
    const float scale = x_scales[row];
    for (unsigned col = 2 * threadIdx.x; col < n; col += 512) {
        const float first = from[col] * scale * w_scales[col];
        const float second = col + 1 < n ? from[col + 1] * scale * w_scales[col + 1] : 0.0f;
        out.put_pair(row, col, first, second);
    }
}

// out[unit][row] = scales[row], a unit per block in y: a row's factor for each of its 128 columns. Any number of blocks of 256 in x.
extern "C" __global__ void __launch_bounds__(256) repeat_scales(const float* scales, float* out, unsigned rows) {
    const unsigned row = blockIdx.x * 256 + threadIdx.x;
    if (row < rows) out[static_cast<size_t>(blockIdx.y) * rows + row] = scales[row];
}

#endif
