// What becomes of a product's sums: bias, residual, gate, and the type they are stored in. Shared by all matrix kernels.
#pragma once
#include "common.cuh"

// Kinds of finish; `src/cuda/ops/gemm.rs` has the same numbers.
constexpr unsigned STORE_F32 = 0;   // y = v + bias, f32
constexpr unsigned STORE_NARROW = 1;  // y = v + bias, in the compute type
constexpr unsigned ADD_F32 = 2;     // y += v + bias, f32: a residual connection
// Activations of a gated product.
constexpr unsigned SILU = 0;
constexpr unsigned GELU_TANH = 1;

RIDGE_INLINE float activate(unsigned activation, float x) {
    if (activation == SILU) return x / (1.0f + __expf(-x));
    return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
}

// y is [rows, n]; T is the compute type.
template <class T>
struct Finish {
    void* y;
    const float* bias;
    unsigned n, kind;

    RIDGE_INLINE void put(unsigned row, unsigned col, float value) const {
        const size_t at = static_cast<size_t>(row) * n + col;
        if (bias) value += bias[col];
        if (kind == STORE_F32)
            static_cast<float*>(y)[at] = value;
        else if (kind == ADD_F32)
            static_cast<float*>(y)[at] += value;
        else
            static_cast<typename T::Stored*>(y)[at] = T::store(value);
    }

    // Columns `col` (even) and `col + 1`, in one access where both exist and y is aligned for it.
    RIDGE_INLINE void put_pair(unsigned row, unsigned col, float first, float second) const {
        if (n % 2 || reinterpret_cast<size_t>(y) % 8) {
            if (col < n) put(row, col, first);
            if (col + 1 < n) put(row, col + 1, second);
            return;
        }
        if (col >= n) return;
        const size_t at = static_cast<size_t>(row) * n + col;
        if (bias) first += bias[col], second += bias[col + 1];
        if (kind == STORE_NARROW) {
            *reinterpret_cast<unsigned*>(static_cast<typename T::Stored*>(y) + at) = T::pair(first, second);
            return;
        }
        float2* to = reinterpret_cast<float2*>(static_cast<float*>(y) + at);
        if (kind == ADD_F32) {
            const float2 old = *to;
            first += old.x, second += old.y;
        }
        *to = make_float2(first, second);
    }
};
