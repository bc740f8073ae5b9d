// Products of 1 to 64 rows with weights that have factors in f32: fp8 (e4m3) with one per row or per block of 128 x 128, and fp4 in
// blocks with fp8 scales, with one per row. See gemv.cuh.
#include "gemv.cuh"

RIDGE_GEMV_SCALED(e4m3, gemv::Fp8)
RIDGE_GEMV_BLOCKS(e4m3_blocks, gemv::Fp8Blocks)
RIDGE_GEMV_SCALED(nvfp4, gemv::Quantised<quant::NVFP4>)
