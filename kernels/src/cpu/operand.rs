//! The rows of x as a product reads them: rounded or quantised as the weights' type asks, and interleaved by register tile.
//!
//! | [`Form`] | for weights | x becomes |
//! |---|---|---|
//! | `Floats` | F32, F16, BF16 | f32 as it is |
//! | `Pairs` | BF16, on an ISA that multiplies bf16 | bf16, rounded to nearest even |
//! | `Bytes` | quantised | per 32 elements: signed bytes and an f32 scale, the largest magnitude over 127 |
//!
//! Rows are cut evenly into tiles of as many as the register tile takes. A tile's words (one f32, two bf16 or four bytes) lie as
//! `[step][row of the tile]`, so that the product reads them from end to end. A row's own words depend on that row alone.

use super::dispatch::Kernels;
use super::{Cpu, Shared};
use crate::dtype::DType;
use crate::packed::{Layout, QUANT_BLOCK};
use crate::quant::f32_to_bf16;
use std::ops::Range;

/// What a row of x is made of; see the module's text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    Floats,
    Pairs,
    Bytes,
}

impl Form {
    /// What these kernels multiply weights of this type with.
    fn of(dtype: DType, kernels: &Kernels) -> Form {
        match Layout::of(dtype) {
            Layout::Quants(_) => Form::Bytes,
            Layout::Bf16 if kernels.pairs => Form::Pairs,
            _ => Form::Floats,
        }
    }

    /// Words of a row of `cols` elements.
    fn words(self, cols: usize) -> usize {
        match self {
            Form::Floats => cols,
            Form::Pairs => cols.div_ceil(2),
            Form::Bytes => cols / 4,
        }
    }
}

/// A cache line of words.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Rows of x made ready for products, and the memory for it, which is reused.
#[derive(Default)]
pub struct Operand {
    form: Option<Form>,
    rows: usize,
    cols: usize,
    tiles: usize,
    words: Vec<Line>,
    scales: Vec<f32>,
    sums_16: Vec<i32>,
    sums_32: Vec<i32>,
}

impl Operand {
    pub(crate) fn form(&self) -> Form {
        self.form.expect("an operand is filled before it is multiplied")
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Number of register tiles.
    pub(crate) fn tiles(&self) -> usize {
        self.tiles
    }

    /// Rows of one tile.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> Range<usize> {
        self.rows * tile / self.tiles..self.rows * (tile + 1) / self.tiles
    }

    /// Rows of consecutive tiles.
    pub(crate) fn rows_of(&self, tiles: Range<usize>) -> Range<usize> {
        self.tile(tiles.start).start..self.tile(tiles.end - 1).end
    }

    /// Words of the tile that starts at `row`: `[step][row of the tile]`.
    #[inline(always)]
    pub(crate) fn words(&self, row: usize) -> *const u32 {
        self.words.as_ptr().cast::<u32>().wrapping_add(row * self.form().words(self.cols))
    }

    /// Scales of the tile that starts at `row`: `[cols / 32][row of the tile]`.
    #[inline(always)]
    pub(crate) fn scales(&self, row: usize) -> *const f32 {
        self.scales[row * (self.cols / QUANT_BLOCK)..].as_ptr()
    }

    /// Sums of each 16 quantised elements, likewise.
    #[inline(always)]
    pub(crate) fn sums_16(&self, row: usize) -> *const i32 {
        self.sums_16[row * (self.cols / 16)..].as_ptr()
    }

    /// Sums of each 32 quantised elements, likewise.
    #[inline(always)]
    pub(crate) fn sums_32(&self, row: usize) -> *const i32 {
        self.sums_32[row * (self.cols / QUANT_BLOCK)..].as_ptr()
    }

    fn fill(&mut self, cpu: &Cpu, x: &[f32], cols: usize, form: Form) {
        let tallest = if form == Form::Bytes { cpu.kernels.byte_rows } else { cpu.kernels.float_rows };
        let rows = x.len() / cols;
        *self = Operand { form: Some(form), rows, cols, tiles: rows.div_ceil(tallest), ..std::mem::take(self) };
        let words = form.words(cols);
        grow(&mut self.words, (rows * words).div_ceil(16), Line([0; 16]));
        if form == Form::Bytes {
            grow(&mut self.scales, rows * cols / QUANT_BLOCK, 0.0);
            grow(&mut self.sums_16, rows * cols / 16, 0);
            grow(&mut self.sums_32, rows * cols / QUANT_BLOCK, 0);
        }
        let places = (
            Shared(self.words.as_mut_ptr().cast::<u32>()),
            Shared(self.scales.as_mut_ptr()),
            Shared(self.sums_16.as_mut_ptr()),
            Shared(self.sums_32.as_mut_ptr()),
        );
        let this = &*self;
        let tall = rows.div_ceil(this.tiles.max(1));
        cpu.split(this.tiles, tall * cols, &|tiles| {
            let (to_words, to_scales, to_16, to_32) = places;
            for tile in tiles {
                let rows = this.tile(tile);
                let x = &x[rows.start * cols..rows.end * cols];
                let blocks = if form == Form::Bytes { cols / QUANT_BLOCK } else { 0 };
                // SAFETY: each buffer was grown to the rows' elements; a tile's parts are apart from every other tile's.
                unsafe {
                    let mut part = Part {
                        form,
                        x,
                        rows: rows.len(),
                        words: to_words.part(rows.start * words, rows.len() * words),
                        scales: to_scales.part(rows.start * blocks, rows.len() * blocks),
                        sums_16: to_16.part(rows.start * 2 * blocks, rows.len() * 2 * blocks),
                        sums_32: to_32.part(rows.start * blocks, rows.len() * blocks),
                    };
                    (cpu.kernels.prepare)(&mut part);
                }
            }
        });
    }
}

fn grow<T: Copy>(buffer: &mut Vec<T>, len: usize, empty: T) {
    if buffer.len() < len {
        buffer.resize(len, empty);
    }
}

/// Rows of x `[rows, cols]`, about to be multiplied with one or several weights; made ready once per form.
pub struct Rows<'a> {
    x: &'a [f32],
    cols: usize,
    operand: &'a mut Operand,
    ready: Option<Form>,
}

impl<'a> Rows<'a> {
    /// Takes rows of `cols` elements each (asserted) and memory to make them ready in.
    pub fn new(x: &'a [f32], cols: usize, operand: &'a mut Operand) -> Self {
        assert!(cols > 0 && x.len().is_multiple_of(cols), "{} floats are not rows of {cols}", x.len());
        Rows { x, cols, operand, ready: None }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.x.len() / self.cols
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.x.is_empty()
    }

    pub(super) fn for_weights(&mut self, dtype: DType, cpu: &Cpu) -> &Operand {
        let form = Form::of(dtype, cpu.kernels);
        if self.ready != Some(form) {
            self.operand.fill(cpu, self.x, self.cols, form);
            self.ready = Some(form);
        }
        self.operand
    }
}

/// One tile's rows and where they go. The loops are plain, so that each ISA's compiler vectorises them.
pub(crate) struct Part<'a> {
    form: Form,
    x: &'a [f32],
    rows: usize,
    words: &'a mut [u32],
    scales: &'a mut [f32],
    sums_16: &'a mut [i32],
    sums_32: &'a mut [i32],
}

impl Part<'_> {
    #[inline(always)]
    pub(crate) fn fill(&mut self) {
        let cols = self.x.len() / self.rows;
        for (row, x) in self.x.chunks_exact(cols).enumerate() {
            match self.form {
                Form::Floats if self.rows == 1 => {
                    for (word, x) in self.words.iter_mut().zip(x) {
                        *word = x.to_bits();
                    }
                }
                Form::Floats => {
                    for (words, x) in self.words.chunks_exact_mut(self.rows).zip(x) {
                        words[row] = x.to_bits();
                    }
                }
                Form::Pairs => {
                    let pairs = x.chunks(2);
                    for (words, x) in self.words.chunks_exact_mut(self.rows).zip(pairs) {
                        let high = x.get(1).map_or(0, |x| f32_to_bf16(*x));
                        words[row] = u32::from(f32_to_bf16(x[0])) | u32::from(high) << 16;
                    }
                }
                Form::Bytes => {
                    for (block, x) in x.as_chunks::<QUANT_BLOCK>().0.iter().enumerate() {
                        let (bytes, scale) = to_bytes(x);
                        for (u, word) in bytes.as_chunks::<4>().0.iter().enumerate() {
                            let signed = word.map(|b| b as u8);
                            self.words[(block * QUANT_BLOCK / 4 + u) * self.rows + row] = u32::from_ne_bytes(signed);
                        }
                        let sum = |bytes: &[i8]| bytes.iter().map(|b| i32::from(*b)).sum::<i32>();
                        let (low, high) = (sum(&bytes[..16]), sum(&bytes[16..]));
                        self.scales[block * self.rows + row] = scale;
                        self.sums_16[2 * block * self.rows + row] = low;
                        self.sums_16[(2 * block + 1) * self.rows + row] = high;
                        self.sums_32[block * self.rows + row] = low + high;
                    }
                }
            }
        }
    }
}

/// 32 elements as signed bytes, to nearest even, and their scale. A NaN or an infinity makes the scale one.
#[inline(always)]
pub(crate) fn to_bytes(x: &[f32; QUANT_BLOCK]) -> ([i8; QUANT_BLOCK], f32) {
    // Magnitudes order like their bits, and integers have a vector maximum without rules for NaN.
    let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    // Below this the reciprocal would overflow; so small a block counts as zero.
    let (scale, inverse) = if largest < 1e-30 { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
    let mut bytes = [0; QUANT_BLOCK];
    for (byte, x) in bytes.iter_mut().zip(x) {
        // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
        *byte = (x * inverse + 12_582_912.0).to_bits() as i8;
    }
    (bytes, scale)
}
