//! Encoders of the 32-element blocks, with gguf-py's rounding (IQ4_NL, which gguf-py cannot encode, takes the nearest level).

use super::decode_32::{IQ4_NL, MXFP4, e8m0_half};
use super::f32_to_f16;

/// The value of largest magnitude, with its sign; the first of equals, as numpy's argmax takes it.
pub(super) fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m })
}

pub(super) fn min_max(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &v| (lo.min(v), hi.max(v)))
}

pub(super) fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn push_f16(out: &mut Vec<u8>, v: f32) {
    out.extend(f32_to_f16(v).to_le_bytes());
}

/// Low nibbles are elements 0..16, high nibbles elements 16..32.
fn push_nibbles(out: &mut Vec<u8>, q: &[u8; 32]) {
    out.extend((0..16).map(|i| (q[i] & 15) | q[16 + i] << 4));
}

fn push_fifth_bits(out: &mut Vec<u8>, q: &[u8; 32]) {
    let bits = (0..32).fold(0u32, |bits, i| bits | u32::from(q[i] >> 4) << i);
    out.extend(bits.to_le_bytes());
}

pub(super) fn q4_0(x: &[f32; 32], out: &mut Vec<u8>) {
    let d = extreme(x) / -8.0;
    let id = inverse(d);
    push_f16(out, d);
    push_nibbles(out, &x.map(|v| ((v * id + 8.5) as u8).min(15)));
}

pub(super) fn q4_1(x: &[f32; 32], out: &mut Vec<u8>) {
    let (min, max) = min_max(x);
    let d = (max - min) / 15.0;
    let id = inverse(d);
    push_f16(out, d);
    push_f16(out, min);
    push_nibbles(out, &x.map(|v| (((v - min) * id + 0.5) as u8).min(15)));
}

pub(super) fn q5_0(x: &[f32; 32], out: &mut Vec<u8>) {
    let d = extreme(x) / -16.0;
    let id = inverse(d);
    let q = x.map(|v| ((v * id + 16.5) as u8).min(31));
    push_f16(out, d);
    push_fifth_bits(out, &q);
    push_nibbles(out, &q);
}

pub(super) fn q5_1(x: &[f32; 32], out: &mut Vec<u8>) {
    let (min, max) = min_max(x);
    let d = (max - min) / 31.0;
    let id = inverse(d);
    let q = x.map(|v| (((v - min) * id + 0.5) as u8).min(31));
    push_f16(out, d);
    push_f16(out, min);
    push_fifth_bits(out, &q);
    push_nibbles(out, &q);
}

pub(super) fn q8_0(x: &[f32; 32], out: &mut Vec<u8>) {
    let d = extreme(x).abs() / 127.0;
    let id = inverse(d);
    push_f16(out, d);
    out.extend(x.map(|v| (v * id).round() as i8 as u8));
}

pub(super) fn iq4_nl(x: &[f32; 32], out: &mut Vec<u8>) {
    // The most negative level is the farthest from zero, so the extreme value is put there.
    let d = extreme(x) / f32::from(IQ4_NL[0]);
    push_f16(out, d);
    push_nibbles(out, &x.map(|v| nearest(&IQ4_NL, d, v)));
}

pub(super) fn mxfp4(x: &[f32; 32], out: &mut Vec<u8>) {
    let largest = extreme(x).abs();
    let e = if largest > 0.0 { (f64::from(largest).log2().floor() + 125.0).clamp(0.0, 254.0) as u8 } else { 0 };
    let d = e8m0_half(e);
    out.push(e);
    push_nibbles(out, &x.map(|v| nearest(&MXFP4, d, v)));
}

/// The index whose level times `d` is nearest to `v`; the first of equals.
fn nearest(levels: &[i8; 16], d: f32, v: f32) -> u8 {
    let mut best = 0;
    let mut best_error = f32::INFINITY;
    for (i, &level) in levels.iter().enumerate() {
        let error = (d * f32::from(level) - v).abs();
        if error < best_error {
            best = i as u8;
            best_error = error;
        }
    }
    best
}
