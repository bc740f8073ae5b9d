//! The portable ISA: four f32 lanes as an array, multiply and add rounded separately. Any compiler turns it into what the
//! machine has; it is the fallback and the check on the others, not a fast path.

use super::vector::{BytesDot, Vector};
use crate::kv::e4m3_to_f32;
use crate::quant::{bf16_to_f32, f16_to_f32};

/// Four lanes.
#[derive(Clone, Copy)]
pub(crate) struct Lanes([f32; 4]);

impl Lanes {
    #[inline(always)]
    fn zip(self, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
        Lanes([f(self.0[0], b.0[0]), f(self.0[1], b.0[1]), f(self.0[2], b.0[2]), f(self.0[3], b.0[3])])
    }
}

impl Vector for Lanes {
    const LANES: usize = 4;
    const FLOAT_ROWS: usize = 4;
    const BYTE_ROWS: usize = 2;
    const FOUR: bool = false;
    const TILE_QUERIES: usize = 2;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        Lanes([v; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: four readable floats, by contract.
        Lanes(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        let mut v = [0.0; 4];
        for (i, v) in v.iter_mut().enumerate().take(n) {
            // SAFETY: `n` readable floats, by contract.
            *v = unsafe { p.add(i).read_unaligned() };
        }
        Lanes(v)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: four writable floats, by contract.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        for (i, v) in self.0.iter().enumerate().take(n) {
            // SAFETY: `n` writable floats, by contract.
            unsafe { p.add(i).write_unaligned(*v) }
        }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // A fused multiply-add without hardware is a slow library call, so this ISA rounds twice.
        self.mul(b).add(c)
    }
    #[inline(always)]
    fn round(self) -> Self {
        // Adding and subtracting 1.5 * 2^23 rounds to nearest even for |x| < 2^22; `f32::round_ties_even` is a library call here.
        self.zip(self, |a, _| (a + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn exp2_integral(self) -> Self {
        self.zip(self, |a, _| f32::from_bits(((a as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn zero_below(self, probe: Self, limit: f32) -> Self {
        self.zip(probe, |a, p| if p < limit { 0.0 } else { a })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let v = self.0;
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: four readable elements, by contract.
        let h = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        Lanes([f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])])
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: four readable elements, by contract.
        let h = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        Lanes([bf16_to_f32(h[0]), bf16_to_f32(h[1]), bf16_to_f32(h[2]), bf16_to_f32(h[3])])
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: four readable elements, by contract.
        let b = unsafe { p.cast::<[u8; 4]>().read_unaligned() };
        Lanes([e4m3_to_f32(b[0]), e4m3_to_f32(b[1]), e4m3_to_f32(b[2]), e4m3_to_f32(b[3])])
            .zip(Lanes([256.0; 4]), |v, unit| v / unit)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: four readable elements, by contract.
        let b = unsafe { p.cast::<[i8; 4]>().read_unaligned() };
        Lanes([f32::from(b[0]), f32::from(b[1]), f32::from(b[2]), f32::from(b[3])])
    }
}

/// Integers as an array.
pub(crate) struct Integers;

impl BytesDot<Lanes> for Integers {
    type Ints = [u32; 4];

    #[inline(always)]
    unsafe fn splat(v: i32) -> [u32; 4] {
        [v as u32; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> [u32; 4] {
        // SAFETY: four readable words, by contract.
        unsafe { p.cast::<[u32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> [u32; 4] {
        // SAFETY: a readable word, by contract.
        [unsafe { *p }; 4]
    }
    #[inline(always)]
    fn dot(sum: [u32; 4], unsigned: [u32; 4], signed: [u32; 4]) -> [u32; 4] {
        let mut out = sum;
        for (out, (u, s)) in out.iter_mut().zip(unsigned.into_iter().zip(signed)) {
            for (u, s) in u.to_ne_bytes().into_iter().zip(s.to_ne_bytes()) {
                *out = out.wrapping_add((i32::from(u) * i32::from(s as i8)) as u32);
            }
        }
        out
    }
    #[inline(always)]
    fn floats(v: [u32; 4]) -> Lanes {
        Lanes([v[0] as i32 as f32, v[1] as i32 as f32, v[2] as i32 as f32, v[3] as i32 as f32])
    }
    #[inline(always)]
    fn bits(v: [u32; 4], from: u32, width: u32) -> [u32; 4] {
        v.map(|v| (v >> from) & (0x0101_0101 * ((1 << width) - 1)))
    }
    #[inline(always)]
    fn top(low: [u32; 4], v: [u32; 4], from: u32, width: u32, at: u32) -> [u32; 4] {
        let high = Self::bits(v, from, width);
        [low[0] | high[0] << at, low[1] | high[1] << at, low[2] | high[2] << at, low[3] | high[3] << at]
    }
    #[inline(always)]
    unsafe fn levels(levels: &[u8; 16]) -> [u32; 4] {
        // SAFETY: both are sixteen bytes.
        unsafe { std::mem::transmute(*levels) }
    }
    #[inline(always)]
    fn look_up(levels: [u32; 4], v: [u32; 4]) -> [u32; 4] {
        // SAFETY: both are sixteen bytes.
        let levels: [u8; 16] = unsafe { std::mem::transmute(levels) };
        v.map(|v| u32::from_ne_bytes(v.to_ne_bytes().map(|b| levels[usize::from(b & 15)])))
    }
}

super::instantiate!(super::Lanes, super::Integers);
