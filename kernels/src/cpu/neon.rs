//! NEON (every aarch64): four lanes and 32 registers.

use super::vector::{BytesDot, Vector};
use crate::kv::e4m3_to_f32;
use crate::quant::{bf16_to_f32, f16_to_f32};
use std::arch::aarch64::*;

/// Four lanes. NEON is part of aarch64, so there is nothing to prove.
#[derive(Clone, Copy)]
pub(crate) struct Quad(float32x4_t);

impl Quad {
    #[inline(always)]
    fn from(lanes: [f32; 4]) -> Quad {
        // SAFETY: the array has four floats.
        Quad(unsafe { vld1q_f32(lanes.as_ptr()) })
    }

    #[inline(always)]
    fn lanes(self) -> [f32; 4] {
        let mut lanes = [0.0; 4];
        // SAFETY: the array has room for four floats.
        unsafe { vst1q_f32(lanes.as_mut_ptr(), self.0) };
        lanes
    }
}

impl Vector for Quad {
    const LANES: usize = 4;
    // As with AVX-512, which has as many registers.
    const FLOAT_ROWS: usize = 6;
    const BYTE_ROWS: usize = 6;
    const FOUR: bool = true;
    const TILE_QUERIES: usize = 6;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: NEON.
        Quad(unsafe { vdupq_n_f32(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: four readable floats, by contract.
        Quad(unsafe { vld1q_f32(p) })
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        let mut lanes = [0.0; 4];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: `n` readable floats, by contract.
            *lane = unsafe { p.add(i).read_unaligned() };
        }
        Quad::from(lanes)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: four writable floats, by contract.
        unsafe { vst1q_f32(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        for (i, lane) in self.lanes().into_iter().enumerate().take(n) {
            // SAFETY: `n` writable floats, by contract.
            unsafe { p.add(i).write_unaligned(lane) };
        }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: NEON.
        Quad(unsafe { vaddq_f32(self.0, b.0) })
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        // SAFETY: NEON.
        Quad(unsafe { vsubq_f32(self.0, b.0) })
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: NEON.
        Quad(unsafe { vmulq_f32(self.0, b.0) })
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        // SAFETY: NEON.
        Quad(unsafe { vdivq_f32(self.0, b.0) })
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // NEON's own maximum would answer NaN if either is; here it is `b` then.
        // SAFETY: NEON.
        Quad(unsafe { vbslq_f32(vcgtq_f32(self.0, b.0), self.0, b.0) })
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: NEON.
        Quad(unsafe { vfmaq_f32(c.0, self.0, b.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: NEON.
        Quad(unsafe { vrndnq_f32(self.0) })
    }
    #[inline(always)]
    fn exp2_integral(self) -> Self {
        // SAFETY: NEON.
        Quad(unsafe {
            let exponent = vaddq_s32(vcvtq_s32_f32(self.0), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
        })
    }
    #[inline(always)]
    fn zero_below(self, probe: Self, limit: f32) -> Self {
        // SAFETY: NEON.
        Quad(unsafe { vbslq_f32(vcltq_f32(probe.0, vdupq_n_f32(limit)), vdupq_n_f32(0.0), self.0) })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let v = self.lanes();
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        self.lanes().into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: four readable elements, by contract.
        let h = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        Quad::from([f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])])
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: four readable elements, by contract.
        let h = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        Quad::from([bf16_to_f32(h[0]), bf16_to_f32(h[1]), bf16_to_f32(h[2]), bf16_to_f32(h[3])])
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        const UNIT: f32 = 1.0 / 256.0;
        // SAFETY: four readable elements, by contract.
        let b = unsafe { p.cast::<[u8; 4]>().read_unaligned() };
        let v = [e4m3_to_f32(b[0]), e4m3_to_f32(b[1]), e4m3_to_f32(b[2]), e4m3_to_f32(b[3])];
        Quad::from(v).mul(Quad::from([UNIT; 4]))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: four readable elements, by contract.
        let b = unsafe { p.cast::<[i8; 4]>().read_unaligned() };
        Quad::from([f32::from(b[0]), f32::from(b[1]), f32::from(b[2]), f32::from(b[3])])
    }
    #[inline(always)]
    unsafe fn load_half_of_pairs(p: *const u32, which: usize) -> Self {
        // SAFETY: four readable words, by contract.
        Quad(unsafe {
            let words = vld1q_u32(p);
            vreinterpretq_f32_u32(match which {
                0 => vshlq_n_u32::<16>(words),
                _ => vandq_u32(words, vdupq_n_u32(0xffff_0000)),
            })
        })
    }
    #[inline(always)]
    unsafe fn look_up(levels: &[u8; 16], bytes: &mut [u8; 2048]) {
        // SAFETY: 2048 bytes are 128 registers, and the table is one.
        unsafe {
            let table = vld1q_u8(levels.as_ptr());
            for i in 0..128 {
                let p = bytes.as_mut_ptr().add(16 * i);
                vst1q_u8(p, vqtbl1q_u8(table, vld1q_u8(p)));
            }
        }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a prefetch has no architectural effect and may point anywhere.
        unsafe { std::arch::asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, readonly, preserves_flags)) }
    }
}

/// Bytes widened to 16 bits, multiplied to 32 and added in pairs. (The dot products of later extensions multiply bytes of equal
/// sign only, or are younger than what most machines have.)
pub(crate) struct Widening;

impl BytesDot<Quad> for Widening {
    type Ints = int32x4_t;

    #[inline(always)]
    unsafe fn splat(v: i32) -> int32x4_t {
        // SAFETY: NEON.
        unsafe { vdupq_n_s32(v) }
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> int32x4_t {
        // SAFETY: four readable words, by contract.
        unsafe { vreinterpretq_s32_u8(vld1q_u8(p.cast())) }
    }
    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> int32x4_t {
        // SAFETY: a readable word, by contract.
        unsafe { vdupq_n_s32(*p as i32) }
    }
    #[inline(always)]
    fn dot(sum: int32x4_t, unsigned: int32x4_t, signed: int32x4_t) -> int32x4_t {
        // SAFETY: NEON.
        unsafe {
            let (u, s) = (vreinterpretq_u8_s32(unsigned), vreinterpretq_s8_s32(signed));
            let low = (vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u))), vmovl_s8(vget_low_s8(s)));
            let high = (vreinterpretq_s16_u16(vmovl_high_u8(u)), vmovl_high_s8(s));
            // Four products of each lane in each.
            let products = [
                vmull_s16(vget_low_s16(low.0), vget_low_s16(low.1)),
                vmull_high_s16(low.0, low.1),
                vmull_s16(vget_low_s16(high.0), vget_low_s16(high.1)),
                vmull_high_s16(high.0, high.1),
            ];
            let pairs = vpaddq_s32(products[0], products[1]);
            let sums = vpaddq_s32(pairs, vpaddq_s32(products[2], products[3]));
            vaddq_s32(sum, sums)
        }
    }
    #[inline(always)]
    fn floats(v: int32x4_t) -> Quad {
        // SAFETY: NEON.
        Quad(unsafe { vcvtq_f32_s32(v) })
    }
    #[inline(always)]
    fn bits(v: int32x4_t, from: u32, width: u32) -> int32x4_t {
        // SAFETY: NEON; a negative shift is to the right.
        unsafe {
            let shifted = vshlq_u8(vreinterpretq_u8_s32(v), vdupq_n_s8(-(from as i8)));
            vreinterpretq_s32_u8(vandq_u8(shifted, vdupq_n_u8((1u8 << width) - 1)))
        }
    }
    #[inline(always)]
    fn top(low: int32x4_t, v: int32x4_t, from: u32, width: u32, at: u32) -> int32x4_t {
        // SAFETY: NEON.
        unsafe {
            let bits = vshlq_u8(vreinterpretq_u8_s32(Self::bits(v, from, width)), vdupq_n_s8(at as i8));
            vorrq_s32(low, vreinterpretq_s32_u8(bits))
        }
    }
    #[inline(always)]
    unsafe fn levels(levels: &[u8; 16]) -> int32x4_t {
        // SAFETY: sixteen readable bytes.
        unsafe { vreinterpretq_s32_u8(vld1q_u8(levels.as_ptr())) }
    }
    #[inline(always)]
    fn look_up(levels: int32x4_t, v: int32x4_t) -> int32x4_t {
        // SAFETY: NEON.
        unsafe { vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(levels), vreinterpretq_u8_s32(v))) }
    }
}

super::instantiate!("neon", super::Quad, super::Widening);
