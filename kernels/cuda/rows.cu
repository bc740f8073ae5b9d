// What is done to each row of activations: norms, rotation, gates, sums, embeddings. A row's result depends on that row
// alone, in an order of operations that depends on its width alone.
#include "elements.cuh"

// out[row] = x[row] / rms(x[row]) * weight. A block per row, of whole warps; shared memory: a float per warp.
template <class Out>
__device__ void rms_norm(unsigned width, float eps, const float* x, const float* weight, typename Out::Stored* out) {
    RIDGE_DYNAMIC_SHARED(float, partial);
    x += static_cast<unsigned long long>(blockIdx.x) * width;
    out += static_cast<unsigned long long>(blockIdx.x) * width;
    const float inverse = inverse_rms(width, eps, x, partial);
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) out[i] = Out::store(x[i] * inverse * weight[i]);
}

// Rotates (and, with a weight, norms) each head of x[rows, heads, head_dim] by the angles of its row, cos and
// sin[rows, pairs]; elements from 2 * pairs on are only normed. A warp per row and head. `out` may be `x` in f32: a warp
// has read its head when its first element is written.
template <class Out>
__device__ void rotate_heads(unsigned rows, unsigned heads, unsigned head_dim, unsigned pairs, float eps,
                             const float* x, const float* weight, const float* cos, const float* sin,
                             typename Out::Stored* out) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned long long head = static_cast<unsigned long long>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= static_cast<unsigned long long>(rows) * heads) return;
    x += head * head_dim;
    out += head * head_dim;
    cos += head / heads * pairs;
    sin += head / heads * pairs;
    float inverse = 1.0f;
    if (weight) {
        float sum = 0.0f;
        for (unsigned d = lane; d < head_dim; d += 32) sum = fmaf(x[d], x[d], sum);
        inverse = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(head_dim) + eps);
    }
    const auto normed = [&](unsigned d) { return weight ? x[d] * inverse * weight[d] : x[d]; };
    for (unsigned i = lane; i < pairs; i += 32) {
        const float a = normed(i), b = normed(i + pairs), c = cos[i], s = sin[i];
        // Products and sums are rounded one by one, as on the CPU.
        out[i] = Out::store(__fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s)));
        out[i + pairs] = Out::store(__fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s)));
    }
    for (unsigned d = 2 * pairs + lane; d < head_dim; d += 32) out[d] = Out::store(normed(d));
}

RIDGE_INLINE float silu(float x) {
    return x / (1.0f + expf(-x));
}
RIDGE_INLINE float gelu_tanh(float x) {
    const float inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

// out[i] = activation(gate[i]) * up[i]. Any grid of one dimension.
template <class Out, float (*activation)(float)>
__device__ void gate(unsigned long long n, const float* gate, const float* up, typename Out::Stored* out) {
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    for (unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
        out[i] = Out::store(activation(gate[i]) * up[i]);
}

// out[row] = table[ids[row]]. A block per row.
template <class In>
__device__ void embed(unsigned width, const unsigned* ids, const typename In::Stored* table, float* out) {
    table += static_cast<unsigned long long>(ids[blockIdx.x]) * width;
    out += static_cast<unsigned long long>(blockIdx.x) * width;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) out[i] = In::load(table[i]);
}

#define RIDGE_ROWS(name, Type)                                                                                        \
    extern "C" __global__ void rms_norm_##name(unsigned width, float eps, const float* x, const float* weight,        \
                                               Type::Stored* out) {                                                   \
        rms_norm<Type>(width, eps, x, weight, out);                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void rotate_heads_##name(unsigned rows, unsigned heads, unsigned head_dim, unsigned pairs,  \
                                                   float eps, const float* x, const float* weight, const float* cos,  \
                                                   const float* sin, Type::Stored* out) {                             \
        rotate_heads<Type>(rows, heads, head_dim, pairs, eps, x, weight, cos, sin, out);                              \
    }                                                                                                                 \
    extern "C" __global__ void silu_mul_##name(unsigned long long n, const float* left, const float* up,              \
                                               Type::Stored* out) {                                                   \
        gate<Type, silu>(n, left, up, out);                                                                           \
    }                                                                                                                 \
    extern "C" __global__ void gelu_tanh_mul_##name(unsigned long long n, const float* left, const float* up,         \
                                                    Type::Stored* out) {                                              \
        gate<Type, gelu_tanh>(n, left, up, out);                                                                      \
    }                                                                                                                 \
    extern "C" __global__ void embed_##name(unsigned width, const unsigned* ids, const Type::Stored* table,           \
                                            float* out) {                                                             \
        embed<Type>(width, ids, table, out);                                                                          \
    }

RIDGE_ROWS(f32, F32)
RIDGE_ROWS(f16, F16)
RIDGE_ROWS(bf16, BF16)

// x[i] += y[i]. Any grid of one dimension.
extern "C" __global__ void add(unsigned long long n, float* x, const float* y) {
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    for (unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
        x[i] += y[i];
}

// out[i] = in[rows[i]], rows of `words` 32-bit words. A block per row; `out` and `in` do not overlap.
extern "C" __global__ void gather_rows(unsigned words, const unsigned* rows, const unsigned* in, unsigned* out) {
    in += static_cast<unsigned long long>(rows[blockIdx.x]) * words;
    out += static_cast<unsigned long long>(blockIdx.x) * words;
    for (unsigned i = threadIdx.x; i < words; i += blockDim.x) out[i] = in[i];
}
