// The tensor-core product (gemm_mma.cuh) of bf16 and f16, in the tiles that `plan/gemm.rs` chooses from.
#include "gemm_mma.cuh"

// Grid: (m / BM, n / columns), rounded up. Dynamic shared memory: STAGES * (BM + BN) * 128 bytes.
#define RIDGE_GEMM(name, product, BM, BN, WM, WN, STAGES)                                                                  \
    extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32)                                                 \
        gemm_mma_##name(const unsigned char* x, const unsigned char* w, const float* bias, void* y, unsigned m,            \
                        unsigned n, unsigned k, unsigned finish) {                                                         \
        Gemm<product, BM, BN, WM, WN, STAGES, false>::run({x, w, w, 0, 0, 0, bias, y, m, n, k, finish, 0});                \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32)                                                 \
        gemm_mma_##name##_gated(const unsigned char* x, const unsigned char* gate, const unsigned char* up, void* y,       \
                                unsigned m, unsigned n, unsigned k, unsigned finish, unsigned activation) {                \
        Gemm<product, BM, BN, WM, WN, STAGES, true>::run({x, gate, up, 0, 0, 0, 0, y, m, n, k, finish, activation});       \
    }

RIDGE_GEMM(bf16_128x256, Bf16Product, 128, 256, 64, 64, 3)
RIDGE_GEMM(bf16_128x128, Bf16Product, 128, 128, 64, 64, 3)
RIDGE_GEMM(bf16_64x64, Bf16Product, 64, 64, 32, 32, 4)
RIDGE_GEMM(f16_128x256, F16Product, 128, 256, 64, 64, 3)
RIDGE_GEMM(f16_128x128, F16Product, 128, 128, 64, 64, 3)
RIDGE_GEMM(f16_64x64, F16Product, 64, 64, 32, 32, 4)
