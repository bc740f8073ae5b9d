// Quantised matrices to bf16, for products of many rows, and to f32.
#include "planes.cuh"

// Of a matrix [n, k]: a block of threads per row, a thread four elements at a time.
template <class Q, class Store>
RIDGE_INLINE void dequantize(const unsigned char* w, unsigned n, unsigned k, Store store) {
    const quant::Planes<Q> planes(n, k);
    for (unsigned i = threadIdx.x; i < k / 4; i += blockDim.x) {
        const unsigned unit = i * 4 / quant::UNIT, at = i % (quant::UNIT / 4), group = at * 4 / Q::GROUP;
        const unsigned quad = planes.quad(w, blockIdx.x, unit, at / 4, at % 4);
        const typename Q::Factors factors = planes.factors(w, blockIdx.x, unit);
        const float scale = Q::scale(factors, group), minimum = Q::minimum(factors, group);
        float v[4];
#pragma unroll
        for (unsigned e = 0; e < 4; ++e) v[e] = quant::value<Q>(quad, e, scale, minimum);
        store(static_cast<size_t>(blockIdx.x) * (k / 4) + i, v);
    }
}

// With a factor per row.
extern "C" __global__ void __launch_bounds__(256)
    dequant_nvfp4_bf16(const unsigned char* w, const float* factors, uint2* out, unsigned n, unsigned k) {
    const float factor = factors[blockIdx.x];
    dequantize<quant::NVFP4>(w, n, k, [=](size_t i, const float(&v)[4]) {
        out[i] = make_uint2(bf16_pair(v[0] * factor, v[1] * factor), bf16_pair(v[2] * factor, v[3] * factor));
    });
}

#define RIDGE_DEQUANT(name, Q)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        dequant_##name##_bf16(const unsigned char* w, uint2* out, unsigned n, unsigned k) {                                \
        dequantize<quant::Q>(w, n, k, [=](size_t i, const float(&v)[4]) {                                                  \
            out[i] = make_uint2(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]));                                             \
        });                                                                                                                \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        dequant_##name##_f32(const unsigned char* w, float4* out, unsigned n, unsigned k) {                                \
        dequantize<quant::Q>(w, n, k, [=](size_t i, const float(&v)[4]) {                                                  \
            out[i] = make_float4(v[0], v[1], v[2], v[3]);                                                                  \
        });                                                                                                                \
    }

RIDGE_DEQUANT(q4_0, Q4_0)
RIDGE_DEQUANT(q4_1, Q4_1)
RIDGE_DEQUANT(q5_0, Q5_0)
RIDGE_DEQUANT(q5_1, Q5_1)
RIDGE_DEQUANT(q8_0, Q8_0)
RIDGE_DEQUANT(q2_k, Q2_K)
RIDGE_DEQUANT(q3_k, Q3_K)
RIDGE_DEQUANT(q4_k, Q4_K)
RIDGE_DEQUANT(q5_k, Q5_K)
RIDGE_DEQUANT(q6_k, Q6_K)
RIDGE_DEQUANT(iq4_nl, IQ4_NL)
RIDGE_DEQUANT(mxfp4, MXFP4)
