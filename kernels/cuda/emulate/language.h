// CUDA's language for a host compiler: keywords, vector types, intrinsics and atomics, as far as the kernels use them.
//
// Blocks run one after the other on one CPU thread, so shared memory may be static and atomics plain.
#pragma once
#include <algorithm>
#include <cmath>

#include "numbers.h"
#include "warp.h"

#ifndef __global__
#define __global__
#endif
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static
#define RIDGE_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::emulate::dynamic_shared)

#define RIDGE_VECTORS(type, name, bytes)                                                      \
    struct alignas(2 * bytes) name##2 { type x, y; };                                         \
    struct name##3 { type x, y, z; };                                                         \
    struct alignas((4 * bytes > 16 ? 16 : 4 * bytes)) name##4 { type x, y, z, w; };           \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                          \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }               \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 emulated_uint3  // block.h has it already
RIDGE_VECTORS(float, float, 4)
RIDGE_VECTORS(int, int, 4)
RIDGE_VECTORS(unsigned, uint, 4)
#undef uint3
RIDGE_VECTORS(short, short, 2)
RIDGE_VECTORS(unsigned short, ushort, 2)
RIDGE_VECTORS(signed char, char, 1)
RIDGE_VECTORS(unsigned char, uchar, 1)
RIDGE_VECTORS(double, double, 8)
RIDGE_VECTORS(unsigned long long, ulonglong, 8)
#undef RIDGE_VECTORS

using std::max;
using std::min;
inline unsigned min(unsigned a, int b) { return std::min(a, static_cast<unsigned>(b)); }
inline unsigned min(int a, unsigned b) { return std::min(static_cast<unsigned>(a), b); }
inline unsigned max(unsigned a, int b) { return std::max(a, static_cast<unsigned>(b)); }
inline unsigned max(int a, unsigned b) { return std::max(static_cast<unsigned>(a), b); }

// ---- arithmetic
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(nearbyintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// ---- bits
inline unsigned __float_as_uint(float x) { return emulate::bits_of(x); }
inline int __float_as_int(float x) { return static_cast<int>(emulate::bits_of(x)); }
inline float __uint_as_float(unsigned x) { return emulate::float_of(x); }
inline float __int_as_float(int x) { return emulate::float_of(static_cast<unsigned>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned turned = 0;
    for (int i = 0; i < 32; ++i) turned |= (x >> i & 1u) << (31 - i);
    return turned;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
// Byte i of the result is the byte of {b, a} that nibble i of the selector names; its top bit spreads the byte's sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = static_cast<unsigned long long>(b) << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> (4 * i) & 15, byte = both >> (8 * (nibble & 7)) & 255;
        out |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
    return static_cast<unsigned>(both >> (shift & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
    return c;
}

// ---- memory
template <class T> inline T __ldg(const T* at) { return *at; }
template <class T> inline T __ldcg(const T* at) { return *at; }
template <class T> inline T __ldcs(const T* at) { return *at; }
template <class T> inline void __stcs(T* at, T value) { *at = value; }
template <class T> inline void __stcg(T* at, T value) { *at = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}
inline unsigned long long clock64() { return 0; }
inline void __trap() { emulate::fail("__trap()"); }

template <class T> inline T atomicAdd(T* at, std::type_identity_t<T> value) { T old = *at; *at = old + value; return old; }
template <class T> inline T atomicSub(T* at, std::type_identity_t<T> value) { T old = *at; *at = old - value; return old; }
template <class T> inline T atomicExch(T* at, std::type_identity_t<T> value) { T old = *at; *at = value; return old; }
template <class T> inline T atomicMax(T* at, std::type_identity_t<T> value) { T old = *at; *at = std::max(old, value); return old; }
template <class T> inline T atomicMin(T* at, std::type_identity_t<T> value) { T old = *at; *at = std::min(old, value); return old; }
template <class T> inline T atomicOr(T* at, std::type_identity_t<T> value) { T old = *at; *at = old | value; return old; }
template <class T> inline T atomicAnd(T* at, std::type_identity_t<T> value) { T old = *at; *at = old & value; return old; }
template <class T>
inline T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    T old = *at;
    if (old == expected) *at = value;
    return old;
}
