//! Weights in the order in which the matrix product reads them: made once, then streamed from end to end.
//!
//! The rows of w (the columns of the result) are taken [`STRIP`] at a time. A strip is contiguous; within it, the 64 rows'
//! elements for one step of k lie side by side, so that one register holds 16 (8, 4) rows and a product needs no horizontal
//! sum. `u` counts steps of k:
//!
//! | stored as | step | in a strip |
//! |---|---|---|
//! | F32, F16 | 1 | `[u][64]` |
//! | BF16 | 2 | `[u][64][2]` |
//! | 32-element blocks | 4 | per block: scales, then quants `[8][64][4]` as bit planes |
//! | 256-element blocks | 4 | per block: super-scales, then eight times: scales, quants `[8][64][4]` as bit planes |
//!
//! The order is the same on every instruction set, so packed weights can be kept in a file and shared by processes. Rows are
//! padded with zeros to whole strips, columns to whole steps.
//!
//! **Bit planes** of 32 x 64 quants, so that unpacking is the same shift and mask on every byte: with `q[i]` the i-th of the
//! 2048 quants in the order above, four bits are stored as `q[i] | q[i + 1024] << 4` (1024 bytes), two as bits `2 j..2 j + 2` of
//! byte i for `q[i + 512 j]`, one as bit j of byte i for `q[i + 256 j]`. Five-bit quants are four bits then one, six-bit four
//! then two, three-bit two then one.

mod pack;

pub(crate) use pack::pack_strip;

use crate::dtype::{DType, ShapeError};
use crate::quant::{IQ4_NL, MXFP4};

/// Rows of w that are packed side by side.
pub(crate) const STRIP: usize = 64;

/// Elements of k in the finest quantised unit: scales of x cover as many.
pub(crate) const QUANT_BLOCK: usize = 32;

/// What the product sees of a quantised weight: `scale * (q - offset)`, or with minima `scale * q - minimum`; one scale (and
/// minimum) per `group` elements. q is unsigned with `bits` bits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Quants {
    /// Stored bits per quant: 2, 3, 4, 5, 6 or 8.
    pub(crate) bits: usize,
    /// Elements under one scale: 16 or 32.
    pub(crate) group: usize,
    /// Subtracted from each quant.
    pub(crate) offset: i32,
    /// Whether groups have minima.
    pub(crate) minima: bool,
    /// Elements per stored block: 32 or 256.
    pub(crate) block: usize,
    /// Bytes of 64 rows' super-scales, before a block.
    pub(crate) head: usize,
    /// Bytes of 64 rows' scales, before each 32 elements.
    pub(crate) sub_head: usize,
    /// What stored indices stand for, if they are not the quants themselves.
    pub(crate) levels: Option<[u8; 16]>,
}

impl Quants {
    /// The same quants as bytes and without scales between them.
    pub(crate) const fn unpacked(&self) -> Quants {
        Quants { bits: 8, block: QUANT_BLOCK, head: 0, sub_head: 0, levels: None, ..*self }
    }

    /// Bytes of 64 rows' quants of 32 elements.
    pub(crate) const fn quant_bytes(&self) -> usize {
        STRIP * QUANT_BLOCK * self.bits / 8
    }

    /// Bytes of 64 rows' 32 elements with their scales.
    pub(crate) const fn sub_bytes(&self) -> usize {
        self.sub_head + self.quant_bytes()
    }

    /// Bytes of 64 rows of a block.
    pub(crate) const fn block_bytes(&self) -> usize {
        self.head + self.block / QUANT_BLOCK * self.sub_bytes()
    }
}

/// How a storage type is packed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Layout {
    F32,
    F16,
    Bf16,
    Quants(Quants),
}

impl Layout {
    pub(crate) const fn of(dtype: DType) -> Layout {
        const HALF: usize = 2 * STRIP;
        // A block of 32: its scales stand before its quants, as `sub_head`.
        let small = Quants {
            bits: 4,
            group: 32,
            offset: 0,
            minima: false,
            block: QUANT_BLOCK,
            head: 0,
            sub_head: HALF,
            levels: None,
        };
        let large = Quants { block: 256, head: HALF, ..small };
        Layout::Quants(match dtype {
            DType::F32 => return Layout::F32,
            DType::F16 => return Layout::F16,
            DType::BF16 => return Layout::Bf16,
            DType::Q4_0 => Quants { offset: 8, ..small },
            DType::Q4_1 => Quants { minima: true, sub_head: 2 * HALF, ..small },
            DType::Q5_0 => Quants { bits: 5, offset: 16, ..small },
            DType::Q5_1 => Quants { bits: 5, minima: true, sub_head: 2 * HALF, ..small },
            DType::Q8_0 => Quants { bits: 8, offset: 128, ..small },
            DType::IQ4NL => Quants { offset: 128, levels: Some(raised(&IQ4_NL, 128)), ..small },
            DType::MXFP4 => Quants { offset: 16, sub_head: STRIP, levels: Some(raised(&MXFP4, 16)), ..small },
            DType::Q2K => Quants { bits: 2, group: 16, minima: true, head: 2 * HALF, sub_head: 2 * STRIP, ..large },
            DType::Q3K => Quants { bits: 3, group: 16, offset: 4, sub_head: 2 * STRIP, ..large },
            DType::Q4K => Quants { minima: true, head: 2 * HALF, sub_head: 2 * STRIP, ..large },
            DType::Q5K => Quants { bits: 5, minima: true, head: 2 * HALF, sub_head: 2 * STRIP, ..large },
            DType::Q6K => Quants { bits: 6, group: 16, offset: 32, sub_head: 2 * STRIP, ..large },
        })
    }

    /// Bytes of a strip of `cols` columns; `None` if it overflows.
    fn strip_bytes(&self, cols: usize) -> Option<usize> {
        match self {
            Layout::F32 => cols.checked_mul(4 * STRIP),
            Layout::F16 => cols.checked_mul(2 * STRIP),
            Layout::Bf16 => cols.div_ceil(2).checked_mul(4 * STRIP),
            Layout::Quants(q) => (cols / q.block).checked_mul(q.block_bytes()),
        }
    }
}

/// Signed levels made unsigned.
const fn raised(levels: &[i8; 16], by: i16) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (levels[i] as i16 + by) as u8;
        i += 1;
    }
    out
}

/// A weight matrix in packed order, borrowed.
///
/// A **gated** one holds two matrices of equal shape, 32 rows of the first beside 32 rows of the second in each strip, so that
/// `act(x·gᵀ) * (x·uᵀ)` comes out of one pass.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    dtype: DType,
    rows: usize,
    cols: usize,
    gated: bool,
    strip_bytes: usize,
    data: &'a [u8],
}

impl<'a> Packed<'a> {
    /// Bytes of `rows` by `cols` elements in packed order, for both matrices together if `gated`. `None` if the type cannot store
    /// rows of that length, or the size overflows.
    pub fn bytes(dtype: DType, rows: usize, cols: usize, gated: bool) -> Option<usize> {
        dtype.row_bytes(cols)?;
        Layout::of(dtype).strip_bytes(cols)?.checked_mul(strips(rows, gated))
    }

    /// Wraps what [`crate::Cpu::pack`] wrote; fails unless `data` has exactly the length of that shape. For speed, `data` should
    /// start on a cache line.
    pub fn new(dtype: DType, rows: usize, cols: usize, gated: bool, data: &'a [u8]) -> Result<Self, ShapeError> {
        let unrepresentable = ShapeError::Unrepresentable { dtype, rows, cols };
        let expected = Self::bytes(dtype, rows, cols, gated).ok_or(unrepresentable.clone())?;
        if data.len() != expected {
            return Err(ShapeError::Length { expected, found: data.len() });
        }
        let strip_bytes = Layout::of(dtype).strip_bytes(cols).ok_or(unrepresentable)?;
        Ok(Packed { dtype, rows, cols, gated, strip_bytes, data })
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows, which are the outputs of a product; of each of the two matrices if gated.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether it holds two matrices.
    pub fn is_gated(&self) -> bool {
        self.gated
    }

    /// Strips of 64 packed rows.
    pub(crate) fn strips(&self) -> usize {
        strips(self.rows, self.gated)
    }

    /// The bytes of one strip.
    pub(crate) fn strip(&self, index: usize) -> &'a [u8] {
        &self.data[index * self.strip_bytes..][..self.strip_bytes]
    }
}

fn strips(rows: usize, gated: bool) -> usize {
    rows.div_ceil(if gated { STRIP / 2 } else { STRIP })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What packing may cost: never more than a twentieth over the stored size, when rows fill their strips.
    #[test]
    fn packed_sizes_are_about_the_stored_sizes() {
        for dtype in DType::ALL {
            let (stored, packed) =
                (dtype.row_bytes(2048).unwrap() * 128, Packed::bytes(dtype, 128, 2048, false).unwrap());
            assert!(packed * 20 <= stored * 21, "{dtype:?}: {packed} for {stored}");
            assert_eq!(Packed::bytes(dtype, 64, 2048, true), Some(packed));
        }
        assert_eq!(Packed::bytes(DType::Q4K, 1, 100, false), None);
        assert_eq!(Packed::bytes(DType::F32, usize::MAX, 1 << 40, false), None);
        assert!(Packed::new(DType::F16, 3, 2, false, &[0; 255]).is_err());
        assert!(Packed::new(DType::F16, 3, 2, false, &[0; 256]).is_ok());
    }
}
