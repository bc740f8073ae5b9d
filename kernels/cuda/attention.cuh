// What the attention kernels share: how a ragged batch and its paged cache are described.
//
// Queries of an item are consecutive rows and consecutive positions of one sequence. The query at position p sees keys
// 0..=p, or with a window w only the last w of them. Position p lies in slot p % block_size of the page of block
// tables[item.table + p / block_size]; pages are laid out as in kernels/src/kv/mod.rs.
#pragma once
#include "elements.cuh"

namespace attention {

// As plan/attention.rs writes it.
struct Item {
    unsigned first_row, rows, start;
    // Where its block table begins, and its window; 0 is none.
    unsigned table, window;
    // Decoding: the place of its first split's partial result.
    unsigned parts;
    unsigned unused[2];

    // The first key that the query at `position` sees.
    RIDGE_INLINE unsigned first_key(unsigned position) const {
        return window && position + 1 > window ? position + 1 - window : 0;
    }
};

// A list of work may be padded with this item: nothing is to be done.
constexpr unsigned NO_ITEM = 0xffffffffu;

// One key/value head of a cache of elements C.
template <class C>
struct Cache {
    typedef typename C::Stored Stored;
    const unsigned char* pages;
    unsigned long long block_stride;
    unsigned head_dim, block_size;
    // Bytes from a page's begin to this head's keys, its values, and the scales of both.
    unsigned long long keys, values, key_scales, value_scales;

    __device__ Cache(const unsigned char* pages, unsigned long long block_stride, unsigned kv_heads, unsigned head_dim,
                     unsigned block_size, unsigned head)
        : pages(pages), block_stride(block_stride), head_dim(head_dim), block_size(block_size) {
        const unsigned long long each = static_cast<unsigned long long>(head_dim) * block_size * sizeof(Stored);
        keys = head * each;
        values = (kv_heads + head) * each;
        key_scales = 2 * kv_heads * each + head * block_size * 4ull;
        value_scales = key_scales + kv_heads * block_size * 4ull;
    }
    // Element 0 of the key in a slot; element d lies d * block_size further.
    RIDGE_INLINE const Stored* key(unsigned block, unsigned slot) const {
        return reinterpret_cast<const Stored*>(pages + block * block_stride + keys) + slot;
    }
    RIDGE_INLINE const Stored* value(unsigned block, unsigned slot) const {
        return reinterpret_cast<const Stored*>(pages + block * block_stride + values) + slot * head_dim;
    }
    RIDGE_INLINE float key_scale(unsigned block, unsigned slot) const {
        if constexpr (C::SCALED) return reinterpret_cast<const float*>(pages + block * block_stride + key_scales)[slot];
        else return 1.0f;
    }
    RIDGE_INLINE float value_scale(unsigned block, unsigned slot) const {
        if constexpr (C::SCALED) return reinterpret_cast<const float*>(pages + block * block_stride + value_scales)[slot];
        else return 1.0f;
    }
};

// N neighbouring elements as they lie in memory, aligned to their size (at most 16 bytes of it), in as few loads as there can
// be. Loading and decoding are apart, so that several loads can be under way before the first is used.
template <class C, int N>
struct Pack {
    static constexpr int BYTES = sizeof(typename C::Stored), WORDS = N * BYTES / 4;
    static_assert(N * BYTES % 4 == 0 && (WORDS == 1 || WORDS == 2 || WORDS % 4 == 0), "whole words");
    unsigned words[WORDS];

    RIDGE_INLINE void load(const typename C::Stored* at) {
        if constexpr (WORDS == 1) {
            words[0] = *reinterpret_cast<const unsigned*>(at);
        } else if constexpr (WORDS == 2) {
            const uint2 both = *reinterpret_cast<const uint2*>(at);
            words[0] = both.x, words[1] = both.y;
        } else {
#pragma unroll
            for (int i = 0; i < WORDS / 4; ++i) {
                const uint4 four = reinterpret_cast<const uint4*>(at)[i];
                words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
            }
        }
    }
    RIDGE_INLINE float operator[](int i) const {
        if constexpr (BYTES == 4) return __uint_as_float(words[i]);
        else if constexpr (BYTES == 2) return C::load(static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2))));
        else return C::load(static_cast<typename C::Stored>(words[i / 4] >> (8 * (i % 4)) & 0xffu));
    }
};

// The type that queries come in: the cache's, where tensor cores can multiply it, otherwise f32.
template <class C> struct Query { using Type = F32; };
template <> struct Query<KvF16> { using Type = F16; };
template <> struct Query<KvBF16> { using Type = BF16; };

}  // namespace attention
