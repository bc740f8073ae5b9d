// Quantised matrices to bf16, for products of many rows, and to f32.
#include "dequant.cuh"

// `quads` groups of four elements; rows are whole numbers of blocks, so the matrix is one long row. Blocks of 256 threads,
// a quad each, the grid as large as it needs to be or shorter.
template <class Q, class Store>
RIDGE_INLINE void dequantize(const unsigned char* w, unsigned long long quads, Store store) {
    const unsigned long long stride = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    for (unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < quads; i += stride) {
        const unsigned char* block = w + i / (Q::BLOCK / 4) * Q::BYTES;
        const unsigned at = static_cast<unsigned>(i % (Q::BLOCK / 4)), sixteen = at / 4, group = at * 4 / Q::GROUP;
        const unsigned quad = Q::quad(block, sixteen, at % 4);
        const float scale = Q::scale(block, group), minimum = Q::minimum(block, group);
        float v[4];
#pragma unroll
        for (unsigned e = 0; e < 4; ++e) v[e] = quant::value<Q>(quad, e, scale, minimum);
        store(i, v);
    }
}

#define RIDGE_DEQUANT(name, Q)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        dequant_##name##_bf16(const unsigned char* w, uint2* out, unsigned long long quads) {                              \
        dequantize<quant::Q>(w, quads, [=](unsigned long long i, const float(&v)[4]) {                                     \
            out[i] = make_uint2(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]));                                             \
        });                                                                                                                \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        dequant_##name##_f32(const unsigned char* w, float4* out, unsigned long long quads) {                              \
        dequantize<quant::Q>(w, quads, [=](unsigned long long i, const float(&v)[4]) {                                     \
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
