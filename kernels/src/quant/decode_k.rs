//! Decoders of the 256-element K blocks. Each is the expression of gguf-py's `dequantize_blocks` of that type, in the same
//! order: the sub-block scale is multiplied out first, then applied to the quant.

use super::decode_32::f16_at;

/// Scales and minima of the 8 sub-blocks of Q4_K and Q5_K, six bits each, packed in 12 bytes.
#[inline(always)]
pub(crate) fn scales_and_minima(s: &[u8]) -> ([u8; 8], [u8; 8]) {
    let mut scale = [0; 8];
    let mut minimum = [0; 8];
    for i in 0..4 {
        scale[i] = s[i] & 63;
        minimum[i] = s[4 + i] & 63;
        scale[4 + i] = (s[8 + i] & 15) | ((s[i] >> 2) & 0x30);
        minimum[4 + i] = (s[8 + i] >> 4) | ((s[4 + i] >> 2) & 0x30);
    }
    (scale, minimum)
}

/// The 16 signed six-bit scales of Q3_K, packed in 12 bytes.
#[inline(always)]
pub(crate) fn q3_scales(s: &[u8]) -> [i8; 16] {
    let mut out = [0; 16];
    for (i, o) in out.iter_mut().enumerate() {
        let low = (s[i % 8] >> (4 * (i / 8))) & 15;
        let high = (s[8 + i % 4] >> (2 * (i / 4))) & 3;
        *o = (low | high << 4) as i8 - 32;
    }
    out
}

/// Layout: 16 scale/minimum nibble pairs, 64 bytes of 2-bit quants, d, dmin.
#[inline(always)]
pub(super) fn q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
    for half in 0..2 {
        let qs = &b[16 + 32 * half..][..32];
        for shift in 0..4 {
            for part in 0..2 {
                let at = 128 * half + 32 * shift + 16 * part;
                let s = b[at / 16];
                let (dl, ml) = (d * f32::from(s & 15), dmin * f32::from(s >> 4));
                for i in 0..16 {
                    let q = (qs[16 * part + i] >> (2 * shift)) & 3;
                    out[at + i] = dl * f32::from(q) - ml;
                }
            }
        }
    }
}

/// Layout: 32 bytes of high bits, 64 bytes of low 2-bit quants, 12 bytes of scales, d. A set high bit means *no* offset.
#[inline(always)]
pub(super) fn q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(b, 108);
    let scales = q3_scales(&b[96..108]);
    for half in 0..2 {
        let qs = &b[32 + 32 * half..][..32];
        for shift in 0..4 {
            for part in 0..2 {
                let at = 128 * half + 32 * shift + 16 * part;
                let dl = d * f32::from(scales[at / 16]);
                for i in 0..16 {
                    let low = (qs[16 * part + i] >> (2 * shift)) & 3;
                    let high = (b[16 * part + i] >> (4 * half + shift)) & 1;
                    out[at + i] = dl * f32::from(low as i8 - ((high ^ 1) << 2) as i8);
                }
            }
        }
    }
}

/// Layout: d, dmin, 12 bytes of scales and minima, 128 bytes of nibbles.
#[inline(always)]
pub(super) fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let (scale, minimum) = scales_and_minima(&b[4..16]);
    for sub in 0..8 {
        let qs = &b[16 + 32 * (sub / 2)..][..32];
        let (ds, ms) = (d * f32::from(scale[sub]), dmin * f32::from(minimum[sub]));
        let out = &mut out[32 * sub..][..32];
        for i in 0..32 {
            out[i] = ds * f32::from((qs[i] >> (4 * (sub % 2))) & 15) - ms;
        }
    }
}

/// Layout: d, dmin, 12 bytes of scales and minima, 32 bytes of fifth bits (bit = sub-block), 128 bytes of nibbles.
#[inline(always)]
pub(super) fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let (scale, minimum) = scales_and_minima(&b[4..16]);
    let qh = &b[16..48];
    for sub in 0..8 {
        let qs = &b[48 + 32 * (sub / 2)..][..32];
        let (ds, ms) = (d * f32::from(scale[sub]), dmin * f32::from(minimum[sub]));
        let out = &mut out[32 * sub..][..32];
        for i in 0..32 {
            let q = ((qs[i] >> (4 * (sub % 2))) & 15) | ((qh[i] >> sub) & 1) << 4;
            out[i] = ds * f32::from(q) - ms;
        }
    }
}

/// Layout: 128 bytes of low nibbles, 64 bytes of high 2-bit parts, 16 signed scales, d.
#[inline(always)]
pub(super) fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16_at(b, 208);
    for group in 0..8 {
        let (half, quarter) = (group / 4, group % 4);
        let ql = &b[64 * half + 32 * (quarter % 2)..][..32];
        let qh = &b[128 + 32 * half..][..32];
        for part in 0..2 {
            let ds = d * f32::from(b[192 + 2 * group + part] as i8);
            let out = &mut out[32 * group + 16 * part..][..16];
            for i in 0..16 {
                let at = 16 * part + i;
                let low = (ql[at] >> (4 * (quarter / 2))) & 15;
                let high = (qh[at] >> (2 * quarter)) & 3;
                out[i] = ds * f32::from((low | high << 4) as i8 - 32);
            }
        }
    }
}
