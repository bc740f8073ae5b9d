//! Storage types of weights and the borrowed matrix the kernels read. Knows sizes, not values: decoding is in `quant`.
//!
//! Read first: [`DType`], [`Matrix`].

/// How a tensor's elements are stored. The quantised types are GGML's; their byte layouts are those of `ggml-quants.h`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// 32 four-bit values, one f16 scale, offset 8.
    Q4_0,
    /// 32 four-bit values, f16 scale and minimum.
    Q4_1,
    /// 32 five-bit values, one f16 scale, offset 16.
    Q5_0,
    /// 32 five-bit values, f16 scale and minimum.
    Q5_1,
    /// 32 signed bytes, one f16 scale.
    Q8_0,
    /// 256 two-bit values in 16 sub-blocks of four-bit scales and minima.
    Q2K,
    /// 256 three-bit values in 16 sub-blocks of six-bit scales.
    Q3K,
    /// 256 four-bit values in 8 sub-blocks of six-bit scales and minima.
    Q4K,
    /// 256 five-bit values in 8 sub-blocks of six-bit scales and minima.
    Q5K,
    /// 256 six-bit values in 16 sub-blocks of eight-bit scales.
    Q6K,
    /// 32 four-bit indices into a fixed non-linear table, one f16 scale.
    IQ4NL,
    /// 32 four-bit e2m1 floats, one power-of-two scale (OCP microscaling).
    MXFP4,
}

impl DType {
    /// Every storage type, in GGML order of introduction.
    pub const ALL: [DType; 15] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2K,
        DType::Q3K,
        DType::Q4K,
        DType::Q5K,
        DType::Q6K,
        DType::IQ4NL,
        DType::MXFP4,
    ];

    /// Elements per block; 1 for the unquantised types.
    pub const fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Q8_0 => 32,
            DType::IQ4NL | DType::MXFP4 => 32,
            DType::Q2K | DType::Q3K | DType::Q4K | DType::Q5K | DType::Q6K => 256,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q4_0 | DType::IQ4NL => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q8_0 => 34,
            DType::Q2K => 84,
            DType::Q3K => 110,
            DType::Q4K => 144,
            DType::Q5K => 176,
            DType::Q6K => 210,
            DType::MXFP4 => 17,
        }
    }

    /// Bytes of a row of `cols` elements, or `None` if `cols` is not a whole number of blocks or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// GGUF's spelling, such as `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::Q4_0 => "Q4_0",
            DType::Q4_1 => "Q4_1",
            DType::Q5_0 => "Q5_0",
            DType::Q5_1 => "Q5_1",
            DType::Q8_0 => "Q8_0",
            DType::Q2K => "Q2_K",
            DType::Q3K => "Q3_K",
            DType::Q4K => "Q4_K",
            DType::Q5K => "Q5_K",
            DType::Q6K => "Q6_K",
            DType::IQ4NL => "IQ4_NL",
            DType::MXFP4 => "MXFP4",
        }
    }

    /// The type with this number in `enum ggml_type`, or `None` if it is not one that Ridge reads.
    pub fn from_ggml(number: u32) -> Option<DType> {
        DType::ALL.into_iter().find(|t| t.to_ggml() == number)
    }

    /// The type's number in `enum ggml_type`, as written in GGUF tensor headers.
    pub const fn to_ggml(self) -> u32 {
        match self {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::Q4_0 => 2,
            DType::Q4_1 => 3,
            DType::Q5_0 => 6,
            DType::Q5_1 => 7,
            DType::Q8_0 => 8,
            DType::Q2K => 10,
            DType::Q3K => 11,
            DType::Q4K => 12,
            DType::Q5K => 13,
            DType::Q6K => 14,
            DType::IQ4NL => 20,
            DType::BF16 => 30,
            DType::MXFP4 => 39,
        }
    }
}

/// Why bytes are not a matrix of the shape claimed for them.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShapeError {
    /// The row length is not a whole number of blocks, or a size overflows.
    #[error("{rows} rows of {cols} columns cannot be stored as {}", .dtype.name())]
    Unrepresentable {
        /// Storage type asked for.
        dtype: DType,
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// The data has another length than the shape needs.
    #[error("expected {expected} bytes, found {found}")]
    Length {
        /// Bytes the shape needs.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}

/// A borrowed row-major matrix `[rows, cols]` in its stored type. The bytes need no alignment.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    dtype: DType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    data: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// Wraps `data`; fails unless it is exactly `rows` rows of `cols` elements.
    pub fn new(dtype: DType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self, ShapeError> {
        let unrepresentable = ShapeError::Unrepresentable { dtype, rows, cols };
        let row_bytes = dtype.row_bytes(cols).ok_or(unrepresentable.clone())?;
        let expected = row_bytes.checked_mul(rows).ok_or(unrepresentable)?;
        if data.len() != expected {
            return Err(ShapeError::Length { expected, found: data.len() });
        }
        Ok(Matrix { dtype, rows, cols, row_bytes, data })
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (elements per row).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes per row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// All bytes, `rows * row_bytes` of them.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// The bytes of row `r`; panics if `r >= rows`.
    pub fn row(&self, r: usize) -> &'a [u8] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        &self.data[r * self.row_bytes..][..self.row_bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ggml_numbers_round_trip() {
        for t in DType::ALL {
            assert_eq!(DType::from_ggml(t.to_ggml()), Some(t));
        }
        assert_eq!(DType::from_ggml(4), None);
    }

    #[test]
    fn shapes_are_checked() {
        assert_eq!(DType::Q4K.row_bytes(512), Some(288));
        assert_eq!(DType::Q4K.row_bytes(100), None);
        assert_eq!(DType::F32.row_bytes(usize::MAX), None);
        assert!(Matrix::new(DType::F16, 2, 3, &[0; 12]).is_ok());
        let wrong = Matrix::new(DType::F16, 2, 3, &[0; 11]).unwrap_err();
        assert_eq!(wrong, ShapeError::Length { expected: 12, found: 11 });
        assert!(Matrix::new(DType::F32, usize::MAX, 4, &[]).is_err());
    }
}
