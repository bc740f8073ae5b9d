//! Decoders of the 32-element blocks. Each is the expression of gguf-py's `dequantize_blocks` of that type, in the same order.

use super::f16_to_f32;

/// The non-linear levels of IQ4_NL (`kvalues_iq4nl`).
pub(crate) const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// The e2m1 values, doubled (`kvalues_mxfp4`).
pub(crate) const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// OCP E2M1 to f32, exact, of the four low bits. As floats have it, the code 8 is -0.
pub fn e2m1_to_f32(code: u8) -> f32 {
    let magnitude = f32::from(MXFP4[usize::from(code & 7)]) / 2.0;
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The f16 at byte `at` of a block.
#[inline(always)]
pub(super) fn f16_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Low nibbles of 16 bytes, then their high nibbles: elements 0..16 and 16..32 of a four-bit block.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    let mut q = [0; 32];
    for i in 0..16 {
        q[i] = bytes[i] & 15;
        q[16 + i] = bytes[i] >> 4;
    }
    q
}

#[inline(always)]
pub(super) fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    let q = nibbles(&b[2..]);
    for i in 0..32 {
        out[i] = d * f32::from(q[i] as i8 - 8);
    }
}

#[inline(always)]
pub(super) fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    let q = nibbles(&b[4..]);
    for i in 0..32 {
        out[i] = d * f32::from(q[i]) + m;
    }
}

#[inline(always)]
pub(super) fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    let qh = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for i in 0..16 {
        let (low, high) = fifth_bits(b[6 + i], qh, i);
        out[i] = d * (low - 16) as f32;
        out[16 + i] = d * (high - 16) as f32;
    }
}

#[inline(always)]
pub(super) fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    let qh = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for i in 0..16 {
        let (low, high) = fifth_bits(b[8 + i], qh, i);
        out[i] = d * low as f32 + m;
        out[16 + i] = d * high as f32 + m;
    }
}

/// Elements `i` and `16 + i` of a five-bit block: nibbles of `q` topped by bits `i` and `16 + i` of `qh`.
#[inline(always)]
fn fifth_bits(q: u8, qh: u32, i: usize) -> (i32, i32) {
    let low = u32::from(q & 15) | ((qh >> i) & 1) << 4;
    let high = u32::from(q >> 4) | ((qh >> (16 + i)) & 1) << 4;
    (low as i32, high as i32)
}

#[inline(always)]
pub(super) fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for i in 0..32 {
        out[i] = f32::from(b[2 + i] as i8) * d;
    }
}

#[inline(always)]
pub(super) fn iq4_nl(b: &[u8; 18], out: &mut [f32; 32]) {
    table(f16_at(b, 0), &IQ4_NL, &b[2..], out);
}

#[inline(always)]
pub(super) fn mxfp4(b: &[u8; 17], out: &mut [f32; 32]) {
    table(e8m0_half(b[0]), &MXFP4, &b[1..], out);
}

/// Half of 2^(e - 127), because the value table is doubled (`ggml_e8m0_to_fp32_half`).
#[inline(always)]
pub(crate) fn e8m0_half(e: u8) -> f32 {
    let bits = if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 };
    f32::from_bits(bits)
}

#[inline(always)]
fn table(d: f32, values: &[i8; 16], bytes: &[u8], out: &mut [f32; 32]) {
    let q = nibbles(bytes);
    for i in 0..32 {
        out[i] = d * f32::from(values[usize::from(q[i])]);
    }
}
