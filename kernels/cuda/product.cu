// Products with plain weights, the simplest way: a thread per element, one chain of multiply-adds along k. Exact order, no
// tensor cores; what the faster kernels are compared with, and what runs where they have nothing for a type.
#include "elements.cuh"

using namespace elements;

// y[row, n] = x[row, k] · w[n, k] (+ bias[n]), stored in `out_type`, or added to y in f32. Grid: {blocks along n, rows}.
template <class X, class W>
__device__ void product(unsigned n, unsigned k, const typename X::Stored* x, const typename W::Stored* w, const float* bias,
                        unsigned add, unsigned out_type, void* y) {
    const unsigned column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= n) return;
    x += static_cast<unsigned long long>(blockIdx.y) * k;
    w += static_cast<unsigned long long>(column) * k;
    float sum = 0.0f;
    for (unsigned i = 0; i < k; ++i) sum = fmaf(X::load(x[i]), W::load(w[i]), sum);
    if (bias) sum += bias[column];
    const unsigned long long at = static_cast<unsigned long long>(blockIdx.y) * n + column;
    if (add) static_cast<float*>(y)[at] += sum;
    else store_as(out_type, y, at, sum);
}

#define RIDGE_PRODUCT(x_name, X, w_name, W)                                                                          \
    extern "C" __global__ void product_##x_name##_##w_name(unsigned n, unsigned k, const X::Stored* x,               \
                                                           const W::Stored* w, const float* bias, unsigned add,      \
                                                           unsigned out_type, void* y) {                             \
        product<X, W>(n, k, x, w, bias, add, out_type, y);                                                           \
    }
RIDGE_PRODUCT(f32, F32, f32, F32)
RIDGE_PRODUCT(f16, F16, f16, F16)
RIDGE_PRODUCT(bf16, BF16, bf16, BF16)
RIDGE_PRODUCT(bf16, BF16, f16, F16)
RIDGE_PRODUCT(bf16, BF16, f32, F32)
