// Takes a file's quantised blocks apart into the planes of planes.cuh: once, when a matrix is brought to the device.
#include "blocks.cuh"
#include "planes.cuh"

// The words of one plane of a row: BITS bits of each code, from bit SHIFT on.
template <class B, class Q, unsigned BITS, unsigned SHIFT>
RIDGE_INLINE void pack_codes(const unsigned char* row, unsigned k, unsigned units, unsigned* out) {
    constexpr unsigned TOGETHER = BITS < 4 ? BITS : 4, PER_WORD = 8 / BITS, MASK = (0xffu >> (8 - BITS)) * 0x01010101u;
    for (unsigned i = threadIdx.x; i < units * 4 * BITS; i += blockDim.x) {
        const unsigned unit = i / (4 * BITS), at = i % (4 * BITS), t = at % (4 * TOGETHER) / TOGETHER;
        const unsigned w = at / (4 * TOGETHER) * TOGETHER + at % TOGETHER;
        unsigned word = 0;
#pragma unroll
        for (unsigned f = 0; f < PER_WORD; ++f) {
            const unsigned element = unit * quant::UNIT + 16 * (PER_WORD * w + f);
            if (element >= k) continue;
            const unsigned codes = B::codes(row + static_cast<size_t>(element / Q::BLOCK) * B::BYTES, element % Q::BLOCK / 16, t);
            word |= (codes >> SHIFT & MASK) << (f * BITS);
        }
        out[i] = word;
    }
}

// The scales of one plane of a row: COUNT bytes a step, of the blocks' bytes FIRST ... FIRST + EACH - 1.
template <class B, class Q, unsigned COUNT, unsigned FIRST, unsigned EACH>
RIDGE_INLINE void pack_scales(const unsigned char* row, unsigned k, unsigned steps, unsigned char* out) {
    constexpr unsigned BLOCKS = Q::STEP / Q::BLOCK;
    for (unsigned i = threadIdx.x; i < steps * COUNT; i += blockDim.x) {
        const unsigned step = i / COUNT, part = i % COUNT / EACH, block = step * BLOCKS + part;
        const bool there = part < BLOCKS && block < k / Q::BLOCK;
        out[i] = there ? row[static_cast<size_t>(block) * B::BYTES + FIRST + i % COUNT % EACH] : 0;
    }
}

// Rows first_row ... of a matrix [n, k], a block of threads each; `from` is the first of these rows, `to` the whole matrix.
template <class B, class Q>
RIDGE_INLINE void pack(const unsigned char* from, unsigned first_row, unsigned n, unsigned k, unsigned char* to) {
    const quant::Planes<Q> planes(n, k);
    const size_t row = first_row + blockIdx.x, unit = row * planes.units, step = unit / Q::PARTS;
    from += static_cast<size_t>(blockIdx.x) * (k / Q::BLOCK) * B::BYTES;
    pack_codes<B, Q, Q::LOW, 0>(from, k, planes.units, reinterpret_cast<unsigned*>(to + unit * 16 * Q::LOW));
    if constexpr (Q::HIGH != 0)
        pack_codes<B, Q, Q::HIGH, Q::LOW>(from, k, planes.units, reinterpret_cast<unsigned*>(to + planes.high + unit * 16 * Q::HIGH));
    const unsigned steps = planes.units / Q::PARTS;
    pack_scales<B, Q, Q::HEAD, B::HEAD.first, B::HEAD.count>(from, k, steps, to + planes.head + step * Q::HEAD);
    if constexpr (Q::TAIL != 0)
        pack_scales<B, Q, Q::TAIL, B::TAIL.first, B::TAIL.count>(from, k, steps, to + planes.tail + step * Q::TAIL);
}

#define RIDGE_PACK(name, Q)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        pack_##name(const unsigned char* from, unsigned first_row, unsigned n, unsigned k, unsigned char* to) {       \
        pack<blocks::Q, quant::Q>(from, first_row, n, k, to);                                                         \
    }
RIDGE_PACK(q4_0, Q4_0)
RIDGE_PACK(q4_1, Q4_1)
RIDGE_PACK(q5_0, Q5_0)
RIDGE_PACK(q5_1, Q5_1)
RIDGE_PACK(q8_0, Q8_0)
RIDGE_PACK(q2_k, Q2_K)
RIDGE_PACK(q3_k, Q3_K)
RIDGE_PACK(q4_k, Q4_K)
RIDGE_PACK(q5_k, Q5_K)
RIDGE_PACK(q6_k, Q6_K)
RIDGE_PACK(iq4_nl, IQ4_NL)
RIDGE_PACK(mxfp4, MXFP4)
RIDGE_PACK(nvfp4, NVFP4)
