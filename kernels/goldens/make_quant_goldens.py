#!/usr/bin/env python3
"""Writes quant_goldens.bin: seeded random blocks of every GGML type Ridge reads, and what gguf-py decodes them to.

Run: python3 kernels/goldens/make_quant_goldens.py

Layout, little-endian: for each type
    u32 ggml type, u32 number of blocks, the blocks' bytes, the decoded f32 values;
then the same again for encoders, with the marker 0x80000000 set in the type: u32 elements, the f32 values, the encoded bytes.
"""

import pathlib
import struct

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

TYPES = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0,
         T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.MXFP4]
# Byte offsets of the f16 scales (and minima) in a block; random bytes there would be infinities and NaNs.
F16_AT = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.IQ4_NL: [0],
          T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
ENCODED = [T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.MXFP4]


def random_blocks(rng, qtype):
    length, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = 256 if length == 1 else 2048 // length if length == 32 else 12
    if length == 1:
        # Finite values of many magnitudes, the subnormal f16 among them.
        values = rng.standard_normal(blocks) * 10.0 ** rng.uniform(-8, 4, blocks)
        return blocks, quantize(values.astype(np.float32), qtype).view(np.uint8)
    data = rng.integers(0, 256, (blocks, size), dtype=np.uint8)
    for at in F16_AT.get(qtype, []):
        # Scales down to the subnormals, which real K blocks have.
        scales = rng.standard_normal(blocks) * 10.0 ** rng.uniform(-7, 0, blocks)
        data[:, at:at + 2] = scales.astype(np.float16).view(np.uint8).reshape(blocks, 2)
    return blocks, data


def main():
    rng = np.random.default_rng(20261120)
    out = bytearray()
    for qtype in TYPES:
        blocks, data = random_blocks(rng, qtype)
        out += struct.pack("<II", int(qtype), blocks) + data.tobytes()
        out += np.ascontiguousarray(dequantize(data, qtype), dtype="<f4").tobytes()
    for qtype in ENCODED:
        values = (rng.standard_normal((8, 32)) * 10.0 ** rng.uniform(-4, 3, (8, 1))).astype(np.float32)
        values[3] = 0
        out += struct.pack("<II", int(qtype) | 1 << 31, values.size) + values.tobytes()
        out += quantize(values, qtype).tobytes()
    pathlib.Path(__file__).with_name("quant_goldens.bin").write_bytes(out)
    print(len(out), "bytes")


main()
