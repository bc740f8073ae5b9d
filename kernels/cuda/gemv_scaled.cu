// Products of 1 to 64 rows with weights that have a factor per row: fp8 (e4m3), and fp4 in blocks with fp8 scales. See gemv.cuh.
#include "gemv.cuh"

RIDGE_GEMV_SCALED(e4m3, gemv::Fp8)
RIDGE_GEMV_SCALED(nvfp4, gemv::Quantised<quant::NVFP4>)
