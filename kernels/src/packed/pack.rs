//! Packing: blocks of GGML's layout taken apart and laid out 64 rows wide. Written to be simple: it runs once per model.

use super::{Layout, QUANT_BLOCK, Quants, STRIP};
use crate::dtype::DType;
use crate::quant::{q3_scales, scales_and_minima};

/// Writes one strip: row `i` of the strip is `row(i)`, stored bytes of `cols` elements, or zeros if that is `None`.
pub(crate) fn pack_strip<'a>(dtype: DType, row: impl Fn(usize) -> Option<&'a [u8]>, out: &mut [u8]) {
    out.fill(0);
    for lane in 0..STRIP {
        let Some(row) = row(lane) else { continue };
        match Layout::of(dtype) {
            Layout::F32 => spread::<4>(row, lane, out),
            Layout::F16 => spread::<2>(row, lane, out),
            Layout::Bf16 => {
                spread::<4>(row, lane, out);
                // An odd last element is a pair with zero.
                let rest = row.len() % 4;
                if rest != 0 {
                    let at = (row.len() / 4 * STRIP + lane) * 4;
                    out[at..at + rest].copy_from_slice(&row[row.len() - rest..]);
                }
            }
            Layout::Quants(layout) => {
                let blocks = row.chunks_exact(dtype.block_bytes());
                for (block, out) in blocks.zip(out.chunks_exact_mut(layout.block_bytes())) {
                    Parts::of(dtype, block).write(dtype, &layout, lane, out);
                }
            }
        }
    }
}

/// Element `u` of `N` bytes to `[u][lane]`.
fn spread<const N: usize>(row: &[u8], lane: usize, out: &mut [u8]) {
    let places = out[lane * N..].chunks_mut(STRIP * N);
    for (element, place) in row.as_chunks::<N>().0.iter().zip(places) {
        place[..N].copy_from_slice(element);
    }
}

/// A block taken apart.
struct Parts {
    /// Scale (and minimum) of the block, as f16.
    halves: [u16; 2],
    /// Per 32 elements: the scale and the minimum, or the scales of both halves.
    bytes: [[u8; 2]; 8],
    /// Quants in order, or indices of levels.
    quants: [u8; 256],
}

impl Parts {
    fn of(dtype: DType, b: &[u8]) -> Parts {
        let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        let mut parts = Parts { halves: [0; 2], bytes: [[0; 2]; 8], quants: [0; 256] };
        let Parts { halves, bytes, quants } = &mut parts;
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 => unreachable!("not stored in blocks"),
            DType::Q4_0 | DType::IQ4NL => {
                halves[0] = half(0);
                nibbles(&b[2..18], quants);
            }
            DType::Q4_1 => {
                *halves = [half(0), half(2)];
                nibbles(&b[4..20], quants);
            }
            DType::Q5_0 => {
                halves[0] = half(0);
                nibbles(&b[6..22], quants);
                fifth_bits(&b[2..6], quants);
            }
            DType::Q5_1 => {
                *halves = [half(0), half(2)];
                nibbles(&b[8..24], quants);
                fifth_bits(&b[4..8], quants);
            }
            DType::Q8_0 => {
                halves[0] = half(0);
                for (q, b) in quants.iter_mut().zip(&b[2..34]) {
                    *q = b ^ 0x80;
                }
            }
            DType::MXFP4 => {
                bytes[0][0] = b[0];
                nibbles(&b[1..17], quants);
            }
            DType::Q2K => {
                *halves = [half(80), half(82)];
                pairs(&b[..16], bytes);
                two_bits(&b[16..80], quants);
            }
            DType::Q3K => {
                halves[0] = half(108);
                pairs(&q3_scales(&b[96..108]).map(|s| s as u8), bytes);
                two_bits(&b[32..96], quants);
                for (i, q) in quants.iter_mut().enumerate() {
                    *q |= ((b[i % 32] >> (i / 32)) & 1) << 2;
                }
            }
            DType::Q4K | DType::Q5K => {
                *halves = [half(0), half(2)];
                let (scales, minima) = scales_and_minima(&b[4..16]);
                for (i, bytes) in bytes.iter_mut().enumerate() {
                    *bytes = [scales[i], minima[i]];
                }
                let low = if dtype == DType::Q4K { &b[16..144] } else { &b[48..176] };
                for (i, q) in quants.iter_mut().enumerate() {
                    *q = (low[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4)) & 15;
                    if dtype == DType::Q5K {
                        *q |= ((b[16 + i % 32] >> (i / 32)) & 1) << 4;
                    }
                }
            }
            DType::Q6K => {
                halves[0] = half(208);
                pairs(&b[192..208], bytes);
                for (i, q) in quants.iter_mut().enumerate() {
                    let (upper, quarter) = (i / 128, i / 32 % 4);
                    let low = b[64 * upper + 32 * (quarter % 2) + i % 32] >> (quarter / 2 * 4);
                    let high = b[128 + 32 * upper + i % 32] >> (2 * quarter);
                    *q = (low & 15) | (high & 3) << 4;
                }
            }
        }
        parts
    }

    /// Writes the parts into lane `lane` of a packed block.
    fn write(&self, dtype: DType, layout: &Quants, lane: usize, out: &mut [u8]) {
        let head = if layout.block == QUANT_BLOCK { layout.sub_head } else { layout.head };
        if dtype == DType::MXFP4 {
            out[lane] = self.bytes[0][0];
        } else {
            for (i, half) in self.halves.iter().enumerate().take(head / (2 * STRIP)) {
                let at = (i * STRIP + lane) * 2;
                out[at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
        }
        let subs = out[layout.head..].chunks_exact_mut(layout.sub_bytes());
        for ((sub, bytes), quants) in subs.zip(self.bytes).zip(self.quants.as_chunks::<QUANT_BLOCK>().0) {
            if layout.block != QUANT_BLOCK {
                sub[lane] = bytes[0];
                sub[STRIP + lane] = bytes[1];
            }
            let words = quants.as_chunks::<4>().0;
            let words: [u32; 8] = std::array::from_fn(|u| u32::from_le_bytes(words[u]));
            planes(layout.bits, &words, lane, &mut sub[layout.sub_head..]);
        }
    }
}

/// Writes 32 quants of a lane, four to a word, into bit planes (see [`super`]).
fn planes(bits: usize, words: &[u32; 8], lane: usize, out: &mut [u8]) {
    // A plane of `width` bits, taken from bit `from` of each quant, holds `8 / width` words over each other.
    let mut plane = |from: usize, width: usize, start: usize| {
        let stacked = 8 / width;
        let mask = 0x0101_0101 * ((1u32 << width) - 1);
        for row in 0..8 / stacked {
            let mut word = 0;
            for j in 0..stacked {
                word |= ((words[row + 8 / stacked * j] >> from) & mask) << (width * j);
            }
            let at = start + (row * STRIP + lane) * 4;
            out[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
    };
    let (nibbles, pairs) = (STRIP * 16, STRIP * 8);
    match bits {
        2 => plane(0, 2, 0),
        3 => {
            plane(0, 2, 0);
            plane(2, 1, pairs);
        }
        4 => plane(0, 4, 0),
        5 => {
            plane(0, 4, 0);
            plane(4, 1, nibbles);
        }
        6 => {
            plane(0, 4, 0);
            plane(4, 2, nibbles);
        }
        8 => {
            for (u, word) in words.iter().enumerate() {
                let at = (u * STRIP + lane) * 4;
                out[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
        }
        _ => unreachable!("no layout has {bits} bits"),
    }
}

/// Low nibbles of 16 bytes, then their high nibbles.
fn nibbles(bytes: &[u8], quants: &mut [u8; 256]) {
    for (i, b) in bytes.iter().enumerate() {
        quants[i] = b & 15;
        quants[16 + i] = b >> 4;
    }
}

/// Bit `i` of the little-endian word tops quant `i`.
fn fifth_bits(word: &[u8], quants: &mut [u8; 256]) {
    for (i, q) in quants.iter_mut().enumerate().take(QUANT_BLOCK) {
        *q |= ((word[i / 8] >> (i % 8)) & 1) << 4;
    }
}

/// Two bits each, four quants 32 apart to a byte.
fn two_bits(bytes: &[u8], quants: &mut [u8; 256]) {
    for (i, q) in quants.iter_mut().enumerate() {
        *q = (bytes[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3;
    }
}

/// Sixteen sub-blocks' bytes, two to each 32 elements.
fn pairs(from: &[u8], bytes: &mut [[u8; 2]; 8]) {
    bytes.copy_from_slice(from.as_chunks::<2>().0);
}
