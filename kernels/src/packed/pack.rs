//! Packing: blocks of GGML's layout taken apart and laid out 64 rows wide.
//!
//! A strip is written from front to back. Of each of the 64 rows, a few words (or one block) go to a tile that stays in L1; what
//! lies side by side in the strip is then read from the tile's columns. So every cache line of the rows is read once, and
//! every one of the strip written once.

use super::{Layout, STRIP};
use crate::dtype::DType;
use crate::quant::{q3_scales, scales_and_minima};

/// Writes one strip: row `i` of the strip is `row(i)`, stored bytes, or a row of zeros if that is `None`. There is a row 0.
pub(crate) fn pack_strip<'a>(dtype: DType, row: impl Fn(usize) -> Option<&'a [u8]>, out: &mut [u8]) {
    let absent = vec![0; row(0).expect("a strip has a row").len()];
    let rows: [&[u8]; STRIP] = std::array::from_fn(|lane| row(lane).unwrap_or(&absent));
    match dtype {
        DType::F32 | DType::BF16 => words(&rows, out),
        DType::F16 => halves(&rows, out),
        DType::Q4_0 | DType::IQ4NL => blocks::<4, _, _, _, _>(dtype, &rows, out, q4_0),
        DType::Q4_1 => blocks::<4, _, _, _, _>(dtype, &rows, out, q4_1),
        DType::Q5_0 => blocks::<5, _, _, _, _>(dtype, &rows, out, q5_0),
        DType::Q5_1 => blocks::<5, _, _, _, _>(dtype, &rows, out, q5_1),
        DType::Q8_0 => blocks::<8, _, _, _, _>(dtype, &rows, out, q8_0),
        DType::MXFP4 => blocks::<4, _, _, _, _>(dtype, &rows, out, mxfp4),
        DType::Q2K => blocks::<2, _, _, _, _>(dtype, &rows, out, q2_k),
        DType::Q3K => blocks::<3, _, _, _, _>(dtype, &rows, out, q3_k),
        DType::Q4K => blocks::<4, _, _, _, _>(dtype, &rows, out, q4_k),
        DType::Q5K => blocks::<5, _, _, _, _>(dtype, &rows, out, q5_k),
        DType::Q6K => blocks::<6, _, _, _, _>(dtype, &rows, out, q6_k),
    }
}

/// Words of a row that are taken at a time: a cache line.
const TILE: usize = 16;

/// The rows' words side by side; a last word that is cut short is filled up with zeros.
fn words(rows: &[&[u8]; STRIP], out: &mut [u8]) {
    for (index, out) in out.chunks_mut(TILE * STRIP * 4).enumerate() {
        let tile = tile(rows, index);
        for (column, out) in out.chunks_exact_mut(STRIP * 4).enumerate() {
            write_words(std::array::from_fn(|lane| tile[lane][column]), out);
        }
    }
}

/// The rows' half words side by side.
fn halves(rows: &[&[u8]; STRIP], out: &mut [u8]) {
    for (index, out) in out.chunks_mut(TILE * STRIP * 4).enumerate() {
        let tile = tile(rows, index);
        for (column, out) in out.chunks_exact_mut(STRIP * 2).enumerate() {
            for (lane, place) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *place = ((tile[lane][column / 2] >> (column % 2 * 16)) as u16).to_le_bytes();
            }
        }
    }
}

/// The `index`-th line of every row, with zeros behind its end.
fn tile(rows: &[&[u8]; STRIP], index: usize) -> [[u32; TILE]; STRIP] {
    let mut tile = [[0; TILE]; STRIP];
    for (row, words) in rows.iter().zip(&mut tile) {
        let rest = &row[index * TILE * 4..];
        let line = rest.first_chunk().copied().unwrap_or_else(|| {
            let mut line = [0; TILE * 4];
            line[..rest.len()].copy_from_slice(rest);
            line
        });
        *words = le_words(&line);
    }
    tile
}

fn write_words(words: [u32; STRIP], out: &mut [u8]) {
    for (place, word) in out.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *place = word.to_le_bytes();
    }
}

fn le_words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let words = bytes.as_chunks::<4>().0;
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}

/// A block taken apart, into `SUBS` times 32 elements.
struct Parts<const HALVES: usize, const BYTES: usize, const SUBS: usize> {
    /// Scale (and minimum) of the block, as f16.
    halves: [u16; HALVES],
    /// Per 32 elements: the scale and the minimum, or the scales of both halves.
    bytes: [[u8; BYTES]; SUBS],
    /// Quants in order, or indices of levels, four to a word.
    quants: [[u32; 8]; SUBS],
}

/// Blocks of `SIZE` bytes, one of each row at a time.
#[inline(never)]
fn blocks<const BITS: usize, const SIZE: usize, const HALVES: usize, const BYTES: usize, const SUBS: usize>(
    dtype: DType,
    rows: &[&[u8]; STRIP],
    out: &mut [u8],
    parts: impl Fn(&[u8; SIZE]) -> Parts<HALVES, BYTES, SUBS>,
) {
    let (head_bytes, sub_head, sub_bytes) = (HALVES * STRIP * 2, BYTES * STRIP, (BYTES + BITS * 4) * STRIP);
    let block_bytes = head_bytes + SUBS * sub_bytes;
    let Layout::Quants(layout) = Layout::of(dtype) else { unreachable!("stored in blocks") };
    assert_eq!((SIZE, BITS, block_bytes), (dtype.block_bytes(), layout.bits, layout.block_bytes()));
    for (index, out) in out.chunks_exact_mut(block_bytes).enumerate() {
        let mut halves = [[[0; 2]; STRIP]; HALVES];
        let mut bytes = [[[0; STRIP]; BYTES]; SUBS];
        let mut words = [[[0; BITS]; SUBS]; STRIP];
        for (lane, row) in rows.iter().enumerate() {
            let parts = parts(&row.as_chunks().0[index]);
            for i in 0..HALVES {
                halves[i][lane] = parts.halves[i].to_le_bytes();
            }
            for sub in 0..SUBS {
                for i in 0..BYTES {
                    bytes[sub][i][lane] = parts.bytes[sub][i];
                }
                words[lane][sub] = planes::<BITS>(&parts.quants[sub]);
            }
        }
        let (head, subs) = out.split_at_mut(head_bytes);
        head.copy_from_slice(halves.as_flattened().as_flattened());
        for (sub, out) in subs.chunks_exact_mut(sub_bytes).enumerate() {
            let (head, out) = out.split_at_mut(sub_head);
            head.copy_from_slice(bytes[sub].as_flattened());
            for (row, out) in out.chunks_exact_mut(STRIP * 4).enumerate() {
                write_words(std::array::from_fn(|lane| words[lane][sub][row]), out);
            }
        }
    }
}

/// 32 quants of a row, four to a word, as bit planes (see [`super`]).
#[inline(always)]
fn planes<const BITS: usize>(quants: &[u32; 8]) -> [u32; BITS] {
    // A plane of `width` bits, taken from bit `from` of each quant, holds `8 / width` words over each other.
    let plane = |from: usize, width: usize, row: usize| {
        let mask = 0x0101_0101 * ((1u32 << width) - 1);
        (0..8 / width).fold(0, |word, j| word | ((quants[row + width * j] >> from) & mask) << (width * j))
    };
    // The widest first: four bits are four words, and so on.
    let widest = if BITS == 8 {
        8
    } else if BITS < 4 {
        2
    } else {
        4
    };
    std::array::from_fn(|row| match row < widest {
        true => plane(0, widest, row),
        false => plane(widest, BITS - widest, row - widest),
    })
}

fn half(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

#[inline(always)]
fn q4_0(b: &[u8; 18]) -> Parts<1, 0, 1> {
    Parts { halves: [half(b, 0)], bytes: [[]], quants: [nibbles(&b[2..])] }
}

#[inline(always)]
fn q4_1(b: &[u8; 20]) -> Parts<2, 0, 1> {
    Parts { halves: [half(b, 0), half(b, 2)], bytes: [[]], quants: [nibbles(&b[4..])] }
}

#[inline(always)]
fn q5_0(b: &[u8; 22]) -> Parts<1, 0, 1> {
    Parts { halves: [half(b, 0)], bytes: [[]], quants: [with_fifth_bits(nibbles(&b[6..]), &b[2..6])] }
}

#[inline(always)]
fn q5_1(b: &[u8; 24]) -> Parts<2, 0, 1> {
    Parts { halves: [half(b, 0), half(b, 2)], bytes: [[]], quants: [with_fifth_bits(nibbles(&b[8..]), &b[4..8])] }
}

#[inline(always)]
fn q8_0(b: &[u8; 34]) -> Parts<1, 0, 1> {
    Parts { halves: [half(b, 0)], bytes: [[]], quants: [le_words(&b[2..]).map(|word| word ^ 0x8080_8080)] }
}

#[inline(always)]
fn mxfp4(b: &[u8; 17]) -> Parts<0, 1, 1> {
    Parts { halves: [], bytes: [[b[0]]], quants: [nibbles(&b[1..])] }
}

#[inline(always)]
fn q2_k(b: &[u8; 84]) -> Parts<2, 2, 8> {
    Parts { halves: [half(b, 80), half(b, 82)], bytes: pairs(&b[..16]), quants: two_bits(&b[16..80]) }
}

#[inline(always)]
fn q3_k(b: &[u8; 110]) -> Parts<1, 2, 8> {
    let quants = with_top_bits(two_bits(&b[32..96]), &b[..32], 2);
    Parts { halves: [half(b, 108)], bytes: pairs(&q3_scales(&b[96..108]).map(|s| s as u8)), quants }
}

#[inline(always)]
fn q4_k(b: &[u8; 144]) -> Parts<2, 2, 8> {
    let (scales, minima) = scales_and_minima(&b[4..16]);
    let bytes = std::array::from_fn(|sub| [scales[sub], minima[sub]]);
    Parts { halves: [half(b, 0), half(b, 2)], bytes, quants: four_bits(&b[16..]) }
}

#[inline(always)]
fn q5_k(b: &[u8; 176]) -> Parts<2, 2, 8> {
    let (scales, minima) = scales_and_minima(&b[4..16]);
    let bytes = std::array::from_fn(|sub| [scales[sub], minima[sub]]);
    let quants = with_top_bits(four_bits(&b[48..]), &b[16..48], 4);
    Parts { halves: [half(b, 0), half(b, 2)], bytes, quants }
}

#[inline(always)]
fn q6_k(b: &[u8; 210]) -> Parts<1, 2, 8> {
    let low: [[u32; 8]; 4] = std::array::from_fn(|i| le_words(&b[32 * i..]));
    let high: [[u32; 8]; 2] = std::array::from_fn(|i| le_words(&b[128 + 32 * i..]));
    let quants = std::array::from_fn(|sub| {
        let (upper, quarter) = (sub / 4, sub % 4);
        let (low, high) = (&low[2 * upper + quarter % 2], &high[upper]);
        std::array::from_fn(|u| {
            let low = low[u] >> (quarter / 2 * 4) & 0x0f0f_0f0f;
            let high = high[u] >> (2 * quarter) & 0x0303_0303;
            low | high << 4
        })
    });
    Parts { halves: [half(b, 208)], bytes: pairs(&b[192..208]), quants }
}

/// Low nibbles of 16 bytes, then their high nibbles.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u32; 8] {
    let words: [u32; 4] = le_words(bytes);
    std::array::from_fn(|u| words[u % 4] >> (u / 4 * 4) & 0x0f0f_0f0f)
}

/// Bit `i` of the little-endian word tops quant `i`.
#[inline(always)]
fn with_fifth_bits(quants: [u32; 8], word: &[u8]) -> [u32; 8] {
    let [word] = le_words(word);
    std::array::from_fn(|u| {
        // Bits 0 to 3 to the lowest bits of four bytes: the product has each at a distance of 7 from the one before.
        let bits = ((word >> (4 * u) & 15) * 0x0020_4081) & 0x0101_0101;
        quants[u] | bits << 4
    })
}

/// Two bits each, four quants 32 apart to a byte.
#[inline(always)]
fn two_bits(bytes: &[u8]) -> [[u32; 8]; 8] {
    let words: [[u32; 8]; 2] = std::array::from_fn(|i| le_words(&bytes[32 * i..]));
    std::array::from_fn(|sub| words[sub / 4].map(|word| word >> (sub % 4 * 2) & 0x0303_0303))
}

/// Four bits each, two quants 32 apart to a byte.
#[inline(always)]
fn four_bits(bytes: &[u8]) -> [[u32; 8]; 8] {
    let words: [[u32; 8]; 4] = std::array::from_fn(|i| le_words(&bytes[32 * i..]));
    std::array::from_fn(|sub| words[sub / 2].map(|word| word >> (sub % 2 * 4) & 0x0f0f_0f0f))
}

/// Bit `j` of byte `i` tops quant `i` of the `j`-th 32, as its bit `at`.
#[inline(always)]
fn with_top_bits(quants: [[u32; 8]; 8], bytes: &[u8], at: usize) -> [[u32; 8]; 8] {
    let words: [u32; 8] = le_words(bytes);
    std::array::from_fn(|sub| std::array::from_fn(|u| quants[sub][u] | (words[u] >> sub & 0x0101_0101) << at))
}

/// Sixteen sub-blocks' bytes, two to each 32 elements.
#[inline(always)]
fn pairs(bytes: &[u8]) -> [[u8; 2]; 8] {
    std::array::from_fn(|sub| [bytes[2 * sub], bytes[2 * sub + 1]])
}
