// Rows of quantised embedding tables to f32, to the bits of `dequantize_row` in src/quant/.
#include "dequant.cuh"

// out[row] = table[ids[row]], four elements per thread at a time. A block per row; `width` is whole blocks.
template <class Q>
RIDGE_INLINE void embed(unsigned width, const unsigned* ids, const unsigned char* table, float* out) {
    const unsigned long long blocks = width / Q::BLOCK;
    table += ids[blockIdx.x] * blocks * Q::BYTES;
    float4* const quads = reinterpret_cast<float4*>(out + static_cast<unsigned long long>(blockIdx.x) * width);
    for (unsigned i = threadIdx.x; i < width / 4; i += blockDim.x) {
        const unsigned char* const block = table + static_cast<unsigned long long>(i / (Q::BLOCK / 4)) * Q::BYTES;
        const unsigned at = i % (Q::BLOCK / 4), group = at * 4 / Q::GROUP;
        const unsigned quad = Q::quad(block, at / 4, at % 4);
        const float scale = Q::scale(block, group), minimum = Q::minimum(block, group);
        quads[i] = make_float4(quant::value<Q>(quad, 0, scale, minimum), quant::value<Q>(quad, 1, scale, minimum),
                               quant::value<Q>(quad, 2, scale, minimum), quant::value<Q>(quad, 3, scale, minimum));
    }
}

#define RIDGE_EMBED(name, Q)                                                                          \
    extern "C" __global__ void embed_##name(unsigned width, const unsigned* ids,                     \
                                            const unsigned char* table, float* out) {                \
        embed<quant::Q>(width, ids, table, out);                                                     \
    }
RIDGE_EMBED(q4_0, Q4_0)
RIDGE_EMBED(q4_1, Q4_1)
RIDGE_EMBED(q5_0, Q5_0)
RIDGE_EMBED(q5_1, Q5_1)
RIDGE_EMBED(q8_0, Q8_0)
RIDGE_EMBED(q2_k, Q2_K)
RIDGE_EMBED(q3_k, Q3_K)
RIDGE_EMBED(q4_k, Q4_K)
RIDGE_EMBED(q5_k, Q5_K)
RIDGE_EMBED(q6_k, Q6_K)
RIDGE_EMBED(iq4_nl, IQ4_NL)
RIDGE_EMBED(mxfp4, MXFP4)
