// Products of 1 to 64 rows with weights in blocks of 32 elements. See gemv.cuh.
#include "gemv.cuh"

RIDGE_GEMV(q4_0, gemv::Quantised<quant::Q4_0>)
RIDGE_GEMV(q4_1, gemv::Quantised<quant::Q4_1>)
RIDGE_GEMV(q5_0, gemv::Quantised<quant::Q5_0>)
RIDGE_GEMV(q5_1, gemv::Quantised<quant::Q5_1>)
RIDGE_GEMV(q8_0, gemv::Quantised<quant::Q8_0>)
RIDGE_GEMV(iq4_nl, gemv::Quantised<quant::IQ4_NL>)
RIDGE_GEMV(mxfp4, gemv::Quantised<quant::MXFP4>)
