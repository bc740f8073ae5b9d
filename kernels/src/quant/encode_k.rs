//! Encoders of the 256-element K blocks: one plain scale per sub-block, rounded to nearest, then the sub-block scales
//! themselves rounded against the super-block scale. ggml searches for better scales; synthetic weights do not need it.

use super::encode_32::{extreme, inverse, min_max};
use super::{f16_to_f32, f32_to_f16};

/// A super-block's scale as stored, and the value the decoder will see.
fn stored(d: f32) -> ([u8; 2], f32) {
    let bits = f32_to_f16(d);
    (bits.to_le_bytes(), f16_to_f32(bits))
}

fn level(v: f32, max: u8) -> u8 {
    v.round().clamp(0.0, f32::from(max)) as u8
}

/// Scales and minima of `N`-element sub-blocks, quantised to `0..=scale_max` against a shared pair of f16.
struct Affine<const SUBS: usize> {
    d: [u8; 2],
    dmin: [u8; 2],
    scale: [u8; SUBS],
    minimum: [u8; SUBS],
    quants: [u8; 256],
}

fn affine<const SUBS: usize>(x: &[f32; 256], scale_max: u8, quant_max: u8) -> Affine<SUBS> {
    let len = 256 / SUBS;
    let ranges: [(f32, f32); SUBS] = std::array::from_fn(|s| {
        let (min, max) = min_max(&x[s * len..][..len]);
        // The stored minimum is subtracted and cannot be negative.
        let min = min.min(0.0);
        ((max - min).max(0.0) / f32::from(quant_max), -min)
    });
    let largest = |of: fn(&(f32, f32)) -> f32| ranges.iter().map(of).fold(0.0f32, f32::max);
    let (d_bytes, d) = stored(largest(|r| r.0) / f32::from(scale_max));
    let (dmin_bytes, dmin) = stored(largest(|r| r.1) / f32::from(scale_max));
    let scale = ranges.map(|r| level(r.0 * inverse(d), scale_max));
    let minimum = ranges.map(|r| level(r.1 * inverse(dmin), scale_max));
    let quants = std::array::from_fn(|i| {
        let s = i / len;
        let offset = x[i] + dmin * f32::from(minimum[s]);
        level(offset * inverse(d * f32::from(scale[s])), quant_max)
    });
    Affine { d: d_bytes, dmin: dmin_bytes, scale, minimum, quants }
}

pub(super) fn q2_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let a = affine::<16>(x, 15, 3);
    out.extend((0..16).map(|s| a.scale[s] | a.minimum[s] << 4));
    push_two_bits(out, &a.quants);
    out.extend(a.d);
    out.extend(a.dmin);
}

pub(super) fn q4_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let a = affine::<8>(x, 63, 15);
    out.extend(a.d);
    out.extend(a.dmin);
    out.extend(pack_scales_and_minima(&a.scale, &a.minimum));
    push_pair_nibbles(out, &a.quants);
}

pub(super) fn q5_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let a = affine::<8>(x, 63, 31);
    out.extend(a.d);
    out.extend(a.dmin);
    out.extend(pack_scales_and_minima(&a.scale, &a.minimum));
    out.extend((0..32).map(|i| (0..8).fold(0u8, |bits, s| bits | (a.quants[32 * s + i] >> 4) << s)));
    push_pair_nibbles(out, &a.quants);
}

/// The inverse of `decode_k::scales_and_minima`.
fn pack_scales_and_minima(scale: &[u8; 8], minimum: &[u8; 8]) -> [u8; 12] {
    let mut s = [0; 12];
    for i in 0..4 {
        s[i] = scale[i] | (scale[4 + i] >> 4) << 6;
        s[4 + i] = minimum[i] | (minimum[4 + i] >> 4) << 6;
        s[8 + i] = (scale[4 + i] & 15) | minimum[4 + i] << 4;
    }
    s
}

/// Sub-blocks 2p and 2p+1 share 32 bytes: low and high nibbles.
fn push_pair_nibbles(out: &mut Vec<u8>, q: &[u8; 256]) {
    for pair in 0..4 {
        out.extend((0..32).map(|i| (q[64 * pair + i] & 15) | (q[64 * pair + 32 + i] & 15) << 4));
    }
}

/// Four runs of 32 elements share 32 bytes, two bits each.
fn push_two_bits(out: &mut Vec<u8>, q: &[u8; 256]) {
    for half in 0..2 {
        out.extend((0..32).map(|i| (0..4).fold(0u8, |b, s| b | (q[128 * half + 32 * s + i] & 3) << (2 * s))));
    }
}

/// Signed scales of 16-element sub-blocks, `-bound..bound`, and quants with `offset` added (`0..2 * offset`).
fn symmetric(x: &[f32; 256], bound: f32, offset: f32) -> ([u8; 2], [i8; 16], [u8; 256]) {
    let scales: [f32; 16] = std::array::from_fn(|s| extreme(&x[16 * s..][..16]) / -offset);
    let (d_bytes, d) = stored(extreme(&scales) / -bound);
    let scale = scales.map(|s| (s * inverse(d)).round().clamp(-bound, bound - 1.0) as i8);
    let quants = std::array::from_fn(|i| {
        let step = d * f32::from(scale[i / 16]);
        level(x[i] * inverse(step) + offset, (2.0 * offset) as u8 - 1)
    });
    (d_bytes, scale, quants)
}

pub(super) fn q3_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let (d, scale, q) = symmetric(x, 32.0, 4.0);
    out.extend((0..32).map(|i| (0..8).fold(0u8, |bits, s| bits | (q[32 * s + i] >> 2) << s)));
    push_two_bits(out, &q);
    let mut s = [0u8; 12];
    for (i, scale) in scale.into_iter().enumerate() {
        let six = (scale + 32) as u8;
        s[i % 8] |= (six & 15) << (4 * (i / 8));
        s[8 + i % 4] |= (six >> 4) << (2 * (i / 4));
    }
    out.extend(s);
    out.extend(d);
}

pub(super) fn q6_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let (d, scale, q) = symmetric(x, 128.0, 32.0);
    for half in 0..2 {
        let q = &q[128 * half..][..128];
        out.extend((0..64).map(|i| (q[i] & 15) | (q[64 + i] & 15) << 4));
    }
    for half in 0..2 {
        let q = &q[128 * half..][..128];
        out.extend((0..32).map(|i| (0..4).fold(0u8, |b, s| b | (q[32 * s + i] >> 4) << (2 * s))));
    }
    out.extend(scale.map(|s| s as u8));
    out.extend(d);
}
