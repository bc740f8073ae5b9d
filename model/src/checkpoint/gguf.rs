//! The GGUF container, versions 2 and 3: metadata and the table of tensors.
//!
//! The file is untrusted. Every count is capped, every offset is computed with checks, and memory grows only as bytes
//! of the file are consumed, so no byte string panics or allocates more than a few times its own length and 1 GiB.
//! This module knows the container; what the keys mean is in [`gguf_model`](super::gguf_model) and
//! [`gguf_tokenizer`](super::gguf_tokenizer). Read [`Gguf::parse`] first.

use super::LoadError;
use ridge_kernels::DType;
use std::collections::BTreeMap;
use std::ops::Range;

/// Most metadata entries; real files have about 40.
const MAX_ENTRIES: u64 = 1 << 16;
/// Most tensors; the largest published models have a few thousand.
const MAX_TENSORS: u64 = 1 << 18;
/// Longest key or tensor name, in bytes (the format's own limit on keys).
const MAX_NAME_BYTES: u64 = 65_535;
/// Most elements of all arrays together: a vocabulary of the largest size with its scores, types and merges. Each takes 32
/// bytes of memory, and may take one of the file.
const MAX_ELEMENTS: u64 = 1 << 24;
/// Arrays within arrays; no known key goes beyond one level.
const MAX_NESTING: usize = 2;
/// Where tensor data starts a new alignment unit unless the file says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A parsed header.
#[derive(Clone, PartialEq, Debug)]
pub struct Gguf {
    /// Name for error messages.
    pub file: String,
    /// Container version, 2 or 3.
    pub version: u32,
    /// Metadata in the order of keys.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the order of names.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// A metadata value; integers and floats of all widths are widened.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Any float.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string; bytes that are not UTF-8 were replaced.
    String(String),
    /// An array of one type.
    Array(Vec<Value>),
}

/// A row of the tensor table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo {
    /// As the file spells it.
    pub name: String,
    /// Dimensions, outermost first (the file has them innermost first).
    pub dims: Vec<usize>,
    /// `enum ggml_type`.
    pub ggml_type: u32,
    /// Absolute offset of its first byte.
    pub offset: u64,
}

/// A cursor that never reads past the end.
struct Reader<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
    /// Of arrays, so far.
    elements: u64,
}

impl Gguf {
    /// Parses the header of a file whose bytes are `bytes`; `file` names it in errors.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self, LoadError> {
        let mut reader = Reader { file, bytes, at: 0, elements: 0 };
        if reader.take(4)? != b"GGUF" {
            return Err(reader.damaged("does not start with GGUF"));
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            let what = if version.swap_bytes() <= 3 {
                "big-endian GGUF".to_owned()
            } else {
                format!("GGUF version {version} (supported: 2, 3)")
            };
            return Err(LoadError::Unsupported { file: file.to_owned(), what });
        }
        let tensor_count = reader.count("tensors", MAX_TENSORS)?;
        let entry_count = reader.count("metadata entries", MAX_ENTRIES)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entry_count {
            let key = reader.name()?;
            let kind = reader.u32()?;
            let value = reader.value(kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(reader.damaged(&format!("metadata key '{key}' occurs twice")));
            }
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let tensor = reader.tensor()?;
            if let Some(twin) = tensors.insert(tensor.name.clone(), tensor) {
                return Err(reader.damaged(&format!("tensor '{}' occurs twice", twin.name)));
            }
        }
        let mut gguf = Self { file: file.to_owned(), version, metadata, tensors };
        gguf.locate_data(reader.at as u64)?;
        Ok(gguf)
    }

    /// Turns offsets relative to the data section into absolute ones.
    fn locate_data(&mut self, header_end: u64) -> Result<(), LoadError> {
        let alignment = match self.metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(other) => {
                return Err(LoadError::damaged(&self.file, format!("general.alignment is {other:?}")));
            }
        };
        let start = header_end.next_multiple_of(alignment);
        for tensor in self.tensors.values_mut() {
            let absolute = tensor.offset.checked_add(start).filter(|_| tensor.offset.is_multiple_of(alignment));
            tensor.offset = absolute.ok_or_else(|| {
                LoadError::damaged(&self.file, format!("tensor '{}' has offset {}", tensor.name, tensor.offset))
            })?;
        }
        Ok(())
    }

    /// The value of `key`, if there is one.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A string, if `key` is one.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// A non-negative integer, if `key` is one.
    pub fn integer(&self, key: &str) -> Option<u64> {
        self.value(key)?.integer()
    }

    /// A number, if `key` is one.
    pub fn number(&self, key: &str) -> Option<f64> {
        match *self.value(key)? {
            Value::Float(x) => Some(x),
            Value::Unsigned(x) => Some(x as f64),
            Value::Signed(x) => Some(x as f64),
            _ => None,
        }
    }

    /// A boolean, if `key` is one.
    pub fn boolean(&self, key: &str) -> Option<bool> {
        match *self.value(key)? {
            Value::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// An array, if `key` is one.
    pub fn array(&self, key: &str) -> Option<&[Value]> {
        match self.value(key)? {
            Value::Array(items) => Some(items),
            _ => None,
        }
    }

    /// An array of strings, if `key` is one.
    pub fn strings(&self, key: &str) -> Option<Vec<String>> {
        self.array(key)?.iter().map(|v| if let Value::String(s) = v { Some(s.clone()) } else { None }).collect()
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }
}

impl Value {
    /// The value as a non-negative integer.
    pub fn integer(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(n) => Some(n),
            Value::Signed(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }
}

impl TensorInfo {
    /// Storage type, if the kernels read it.
    pub fn dtype(&self) -> Option<DType> {
        DType::from_ggml(self.ggml_type)
    }

    /// Bytes that the tensor occupies in its file; `None` if they cannot be computed or lie beyond `file_bytes`.
    pub fn range(&self, file_bytes: usize) -> Option<Range<usize>> {
        let (&cols, outer) = self.dims.split_last()?;
        let rows = outer.iter().try_fold(1usize, |rows, &n| rows.checked_mul(n))?;
        let len = self.dtype()?.row_bytes(cols)?.checked_mul(rows)?;
        let start = usize::try_from(self.offset).ok()?;
        let end = start.checked_add(len)?;
        (end <= file_bytes).then_some(start..end)
    }
}

impl<'a> Reader<'a> {
    fn damaged(&self, message: &str) -> LoadError {
        LoadError::damaged(self.file, format!("at byte {}: {message}", self.at))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], LoadError> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(self.damaged(&format!("{len} more bytes announced, {} left", self.bytes.len() - self.at)));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LoadError> {
        let taken = self.take(N)?;
        Ok(taken.try_into().expect("take yields exactly N bytes"))
    }

    fn u32(&mut self) -> Result<u32, LoadError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, LoadError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn count(&mut self, what: &str, max: u64) -> Result<u64, LoadError> {
        let count = self.u64()?;
        if count > max {
            return Err(self.damaged(&format!("{count} {what}, more than {max}")));
        }
        Ok(count)
    }

    fn name(&mut self) -> Result<String, LoadError> {
        let len = self.count("bytes of a name", MAX_NAME_BYTES)?;
        let bytes = self.take(len as usize)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.damaged("a name is not UTF-8"))
    }

    fn string(&mut self) -> Result<String, LoadError> {
        let left = (self.bytes.len() - self.at) as u64;
        let len = self.count("bytes of a string", left)?;
        Ok(String::from_utf8_lossy(self.take(len as usize)?).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, LoadError> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array::<1>()?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.damaged(&format!("a boolean is {other}"))),
            },
            8 => Value::String(self.string()?),
            9 if depth < MAX_NESTING => {
                let kind = self.u32()?;
                // An element takes at least one byte, so the rest of the file bounds the count.
                let left = (self.bytes.len() - self.at) as u64;
                let count = self.count("elements of an array", left)?;
                self.elements += count;
                if self.elements > MAX_ELEMENTS {
                    return Err(self.damaged(&format!("arrays have more than {MAX_ELEMENTS} elements")));
                }
                let mut items = Vec::new();
                for _ in 0..count {
                    items.push(self.value(kind, depth + 1)?);
                }
                Value::Array(items)
            }
            9 => return Err(self.damaged("arrays are nested too deeply")),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.damaged(&format!("metadata type {other} is unknown"))),
        })
    }

    fn tensor(&mut self) -> Result<TensorInfo, LoadError> {
        let name = self.name()?;
        let dim_count = self.u32()?;
        if !(1..=4).contains(&dim_count) {
            return Err(self.damaged(&format!("tensor '{name}' has {dim_count} dimensions")));
        }
        let mut dims = Vec::new();
        for _ in 0..dim_count {
            let dim = self.u64()?;
            dims.push(usize::try_from(dim).map_err(|_| self.damaged(&format!("a dimension is {dim}")))?);
        }
        dims.reverse();
        Ok(TensorInfo { name, dims, ggml_type: self.u32()?, offset: self.u64()? })
    }
}
