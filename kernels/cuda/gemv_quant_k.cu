// Products of 1 to 64 rows with weights in blocks of 256 elements. See gemv.cuh.
#include "gemv.cuh"

RIDGE_GEMV(q2_k, gemv::Quantised<quant::Q2_K>)
RIDGE_GEMV(q3_k, gemv::Quantised<quant::Q3_K>)
RIDGE_GEMV(q4_k, gemv::Quantised<quant::Q4_K>)
RIDGE_GEMV(q5_k, gemv::Quantised<quant::Q5_K>)
RIDGE_GEMV(q6_k, gemv::Quantised<quant::Q6_K>)
