//! Tensors under canonical names, as views of mapped files.
//!
//! Whatever the format, the forward pass asks for `embed`, `norm`, `head` and
//! `layers.{i}.{attn_norm,ffn_norm,wq,wk,wv,wo,q_bias,k_bias,v_bias,o_bias,q_norm,k_norm,w_gate,w_up,w_down}`.

use super::fp8::Fp8;
use super::nvfp4::NvFp4;
use super::{FileMap, LoadError};
use crate::spec::ModelSpec;
use ridge_kernels::{DType, Matrix, quantize_row};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A matrix in bf16, row by row as `fill` computes each from its number: on all cores, because an 8B model takes seconds on one.
pub(super) fn bf16_rows(rows: usize, cols: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<u8> {
    let mut bytes = vec![0; 2 * rows * cols];
    if bytes.is_empty() {
        return bytes;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let each = rows.div_ceil(cores);
    std::thread::scope(|scope| {
        for (part, bytes) in bytes.chunks_mut(2 * each * cols).enumerate() {
            let fill = &fill;
            scope.spawn(move || {
                let (mut row, mut narrow) = (vec![0.0; cols], Vec::with_capacity(2 * cols));
                for (i, bytes) in bytes.chunks_mut(2 * cols).enumerate() {
                    fill(part * each + i, &mut row);
                    narrow.clear();
                    quantize_row(DType::BF16, &row, &mut narrow).expect("a plain type can be written");
                    bytes.copy_from_slice(&narrow);
                }
            });
        }
    });
    bytes
}

/// A row-major matrix in its stored type; a vector is a matrix of one row.
#[derive(Clone)]
pub struct Tensor {
    /// How elements are stored.
    pub dtype: DType,
    /// Output features, or 1 for a vector.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    data: Storage,
    /// What it was made of, if it was fp8 with a factor for each row.
    fp8: Option<Arc<Fp8>>,
    nvfp4: Option<Arc<NvFp4>>,
}

/// Bytes of a mapped file, or in memory.
#[derive(Clone)]
pub enum Storage {
    /// A part of a file, which lies within it.
    Mapped {
        /// The file.
        file: FileMap,
        /// Where.
        range: Range<usize>,
    },
    /// Bytes of their own.
    Owned(Arc<Vec<u8>>),
}

impl Storage {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Storage::Mapped { file, range } => &file.bytes()[range.clone()],
            Storage::Owned(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes().len())
    }
}

impl Tensor {
    /// A view of `range` of a mapped file; `None` unless the range lies in the file and is exactly the matrix.
    pub fn mapped(dtype: DType, rows: usize, cols: usize, file: &FileMap, range: Range<usize>) -> Option<Self> {
        let bytes = file.bytes().get(range.clone())?;
        Matrix::new(dtype, rows, cols, bytes).ok()?;
        Some(Self { dtype, rows, cols, data: Storage::Mapped { file: file.clone(), range }, fp8: None, nvfp4: None })
    }

    /// A tensor with bytes of its own; `None` unless they are exactly the matrix.
    pub fn owned(dtype: DType, rows: usize, cols: usize, bytes: Vec<u8>) -> Option<Self> {
        Matrix::new(dtype, rows, cols, &bytes).ok()?;
        Some(Self { dtype, rows, cols, data: Storage::Owned(Arc::new(bytes)), fp8: None, nvfp4: None })
    }

    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        self.data.bytes()
    }

    /// Notes what the tensor was made of.
    pub(super) fn with_fp8(self, fp8: Fp8) -> Self {
        Self { fp8: Some(Arc::new(fp8)), ..self }
    }

    /// Notes what the tensor was made of.
    pub(super) fn with_nvfp4(self, nvfp4: NvFp4) -> Self {
        Self { nvfp4: Some(Arc::new(nvfp4)), ..self }
    }

    /// The codes and scales that it was made of, if it was NVFP4 in rows of whole 64 elements.
    pub fn nvfp4(&self) -> Option<&NvFp4> {
        self.nvfp4.as_deref()
    }

    /// The codes and factors that it was made of, if it was fp8 with a factor for each row, or for each 128 rows and columns.
    pub fn fp8(&self) -> Option<&Fp8> {
        self.fp8.as_deref()
    }

    /// Copies the stored bytes of a row, leaving the rest of a mapped file where it is.
    pub fn read_row(&self, row: usize, bytes: &mut [u8]) -> std::io::Result<()> {
        let start = row * bytes.len();
        match &self.data {
            Storage::Mapped { file, range } => file.read(range.start + start, bytes),
            Storage::Owned(all) => {
                bytes.copy_from_slice(&all[start..start + bytes.len()]);
                Ok(())
            }
        }
    }

    /// The tensor as the kernels take it.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.dtype, self.rows, self.cols, self.bytes()).expect("shape was checked on construction")
    }

    /// All elements, dequantised.
    pub fn to_f32(&self) -> Vec<f32> {
        let matrix = self.matrix();
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            ridge_kernels::quant::dequantize_row(self.dtype, matrix.row(row), out);
        }
        out
    }

    /// The same values with row `i` taken from row `source(i)`; quantised rows too, as their blocks run along columns.
    pub fn with_rows(&self, source: impl Fn(usize) -> usize) -> Self {
        let matrix = self.matrix();
        let mut bytes = Vec::with_capacity(self.bytes().len());
        for row in 0..self.rows {
            bytes.extend_from_slice(matrix.row(source(row)));
        }
        Self::owned(self.dtype, self.rows, self.cols, bytes).expect("a permutation keeps the shape")
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}, {}]", self.dtype.name(), self.rows, self.cols)
    }
}

/// All tensors of a checkpoint by canonical name.
#[derive(Clone, Debug, Default)]
pub struct TensorMap {
    tensors: BTreeMap<String, Tensor>,
}

impl TensorMap {
    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// The tensor called `name`, or an error that says so.
    pub fn get(&self, name: &str) -> Result<&Tensor, LoadError> {
        self.tensors.get(name).ok_or_else(|| LoadError::TensorMissing { name: name.to_owned(), source_name: None })
    }

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names and tensors in the order of names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The mapped files that tensors lie in, each once.
    pub fn files(&self) -> Vec<&FileMap> {
        let mut files: Vec<&FileMap> = Vec::new();
        let data = self.tensors.values().map(|tensor| &tensor.data);
        let codes = self.tensors.values().filter_map(|tensor| Some(&tensor.fp8()?.codes));
        for storage in data.chain(codes) {
            if let Storage::Mapped { file, .. } = storage
                && !files.iter().any(|known| known.path() == file.path())
            {
                files.push(file);
            }
        }
        files
    }

    /// Stored bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.bytes().len()).sum()
    }

    /// BLAKE3 over names, types, shapes and sampled contents.
    ///
    /// Sampled, because a digest of all of a 140 GB checkpoint would cost minutes at every start: 16 windows of
    /// 4 KiB spread over each tensor catch another checkpoint, another quantisation and a truncated download.
    pub fn digest(&self) -> [u8; 32] {
        const WINDOWS: usize = 16;
        const WINDOW_BYTES: usize = 4096;
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in self.iter() {
            let bytes = tensor.bytes();
            let head = format!("{name} {} {} {}\n", tensor.dtype.name(), tensor.rows, tensor.cols);
            hasher.update(head.as_bytes());
            if bytes.len() <= WINDOWS * WINDOW_BYTES {
                hasher.update(bytes);
                continue;
            }
            for window in 0..WINDOWS {
                let at = (bytes.len() - WINDOW_BYTES) / (WINDOWS - 1) * window;
                hasher.update(&bytes[at..at + WINDOW_BYTES]);
            }
        }
        *hasher.finalize().as_bytes()
    }
}

/// Canonical name, rows and columns of every tensor that `spec` asks for; a vector has one row.
pub fn wanted(spec: &ModelSpec) -> Vec<(String, [usize; 2])> {
    let (h, q, kv, f) = (spec.hidden, spec.q_width(), spec.kv_width(), spec.ffn);
    let mut out = vec![("embed".to_owned(), [spec.vocab, h]), ("norm".to_owned(), [1, h])];
    if !spec.tied_head {
        out.push(("head".to_owned(), [spec.vocab, h]));
    }
    for (i, layer) in spec.layer_specs.iter().enumerate() {
        let mut push = |name: &str, shape| out.push((format!("layers.{i}.{name}"), shape));
        push("attn_norm", [1, h]);
        push("ffn_norm", [1, h]);
        push("wq", [q, h]);
        push("wk", [kv, h]);
        push("wv", [kv, h]);
        push("wo", [h, q]);
        if layer.attention.qkv_bias {
            push("q_bias", [1, q]);
            push("k_bias", [1, kv]);
            push("v_bias", [1, kv]);
        }
        if layer.attention.out_bias {
            push("o_bias", [1, h]);
        }
        if layer.attention.qk_norm {
            push("q_norm", [1, spec.head_dim]);
            push("k_norm", [1, spec.head_dim]);
        }
        push("w_gate", [f, h]);
        push("w_up", [f, h]);
        push("w_down", [h, f]);
    }
    out
}

/// Rows and columns that stored dimensions, outermost first, amount to, if they are a vector or a matrix.
pub(crate) fn as_matrix(dims: &[usize]) -> Option<[usize; 2]> {
    match *dims {
        [cols] => Some([1, cols]),
        [rows, cols] => Some([rows, cols]),
        _ => None,
    }
}
