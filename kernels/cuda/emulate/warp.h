// What the lanes of a warp do together: `exchange` gives every lane what all lanes came with, and shuffles, votes and
// (in ptx.cuh) matrix instructions are made of it.
#pragma once
#include <type_traits>

#include "block.h"

namespace emulate {

// Values of all lanes of an exchange, until this lane's next one. A lane outside the mask has none.
template <class T>
struct Lanes {
    const unsigned char (*values)[EXCHANGE_BYTES];
    const T& operator[](unsigned lane) const { return *reinterpret_cast<const T*>(values[lane]); }
};

// Says why a lane's exchange cannot be, as far as the other lanes show by now.
inline void check_exchange(const Thread& me) {
    const unsigned warp = me.number / 32, mine = me.number % 32;
    for (unsigned l = 0; l < 32; ++l) {
        if (!(me.mask >> l & 1) || l == mine) continue;
        const unsigned number = warp * 32 + l;
        if (number >= thread_count) fail("%s for lanes %08x of a warp of %u", me.what, me.mask, thread_count % 32);
        const Thread& other = threads[number];
        if (other.state == State::ended) fail("%s waits for lane %u, which has ended", me.what, l);
        if (other.state != State::in_exchange) continue;
        if (other.mask != me.mask) {
            if (other.mask >> mine & 1) fail("%s for lanes %08x; lane %u says %08x", me.what, me.mask, l, other.mask);
        } else if (strcmp(other.what, me.what) != 0) {
            fail("%s while lane %u is in %s", me.what, l, other.what);
        }
    }
}

// The last lane to come calls `finish` with all values, which it may change.
template <class Finish>
inline Results* gather(unsigned mask, const void* value, size_t bytes, const char* what, Finish finish) {
    Thread& me = *current;
    const unsigned warp = me.number / 32, mine = me.number % 32;
    if (!(mask >> mine & 1)) fail("%s for lanes %08x, and this is lane %u", what, mask, mine);
    if (me.results) me.results->readers--;
    me.mask = mask;
    me.what = what;
    me.state = State::in_exchange;
    // Usually the first of those who wait came for the same, and stands for all of them: they were compared when they came.
    const Thread* with = nullptr;
    for (unsigned waiting = exchanging[warp] & mask; waiting && !with; waiting &= waiting - 1) {
        const Thread& other = threads[warp * 32 + __builtin_ctz(waiting)];
        const bool alike = other.mask == mask && (other.what == what || strcmp(other.what, what) == 0);
        if (alike) with = &other;
        else check_exchange(me);
    }
    if (gone[warp] & mask || (warp + 1) * 32 > thread_count) check_exchange(me);
    if (with) {
        me.results = with->results;
    } else {
        me.results = results[warp];
        while (me.results->readers) ++me.results;
        me.results->readers = __builtin_popcount(mask);
        me.results->given = 0;
    }
    memcpy(me.results->values[mine], value, bytes);
    me.results->given |= 1u << mine;
    exchanging[warp] |= 1u << mine;
    if (me.results->given != mask) {
        wait_for_others();
        return me.results;
    }
    finish(me.results->values);
    exchanging[warp] &= ~mask;
    for (unsigned left = mask; left; left &= left - 1) threads[warp * 32 + __builtin_ctz(left)].state = State::ready;
    return me.results;
}
inline Results* gather(unsigned mask, const void* value, size_t bytes, const char* what) {
    return gather(mask, value, bytes, what, [](unsigned char (*)[EXCHANGE_BYTES]) {});
}

// Gives `value` and returns what every lane of `mask` gave; all of them must come with the same mask and name.
template <class T>
inline Lanes<T> exchange(unsigned mask, const T& value, const char* what) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= EXCHANGE_BYTES && alignof(T) <= 16);
    return Lanes<T>{gather(mask, &value, sizeof(T), what)->values};
}

// The same of a whole warp, whose values are `finish(T* (&lanes)[32])`ed once before anybody reads them.
template <class T, class Finish>
inline Lanes<T> exchange(const T& value, const char* what, Finish finish) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= EXCHANGE_BYTES && alignof(T) <= 16);
    const auto all = [&](unsigned char (*values)[EXCHANGE_BYTES]) {
        T* lanes[32];
        for (unsigned l = 0; l < 32; ++l) lanes[l] = reinterpret_cast<T*>(values[l]);
        finish(lanes);
    };
    return Lanes<T>{gather(0xffffffffu, &value, sizeof(T), what, all)->values};
}

template <class T>
inline T shuffle(unsigned mask, T value, unsigned from, bool inside, const char* what) {
    const Lanes<T> all = exchange(mask, value, what);
    if (!inside) return value;
    if (!(mask >> from & 1)) fail("%s reads lane %u, outside its mask %08x", what, from, mask);
    return all[from];
}

}  // namespace emulate

// Lanes are numbered within segments of `width`; a source outside the own segment gives the own value.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned lane = emulate::lane(), first = lane & ~(width - 1u);
    return emulate::shuffle(mask, value, first + (source & (width - 1u)), true, "__shfl_sync");
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const unsigned lane = emulate::lane(), from = lane ^ static_cast<unsigned>(bits);
    // Other than up and down, xor may read from an earlier segment.
    return emulate::shuffle(mask, value, from, from < (lane | (width - 1u)) + 1, "__shfl_xor_sync");
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulate::lane(), from = lane + delta;
    return emulate::shuffle(mask, value, from, from <= (lane | (width - 1u)), "__shfl_down_sync");
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulate::lane(), first = lane & ~(width - 1u);
    return emulate::shuffle(mask, value, lane - delta, lane >= first + delta, "__shfl_up_sync");
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulate::gather(mask, "", 0, "__syncwarp");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto all = emulate::exchange(mask, predicate, "__ballot_sync");
    unsigned votes = 0;
    for (unsigned l = 0; l < 32; ++l)
        if (mask >> l & 1 && all[l]) votes |= 1u << l;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask;
}
