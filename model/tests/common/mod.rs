//! What the tests of this crate share.
#![allow(dead_code, reason = "each test file is a crate of its own and uses a part")]

pub mod tiny;

use ridge_model::checkpoint::{Checkpoint, LoadError, LoadOptions, ModelSource, load};
use std::path::{Path, PathBuf};

/// A place in the shared test data, or `None`, with a printed name, where this checkout has none.
pub fn shared(path: &str) -> Option<PathBuf> {
    let place = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data")).join(path);
    if place.exists() {
        return Some(place);
    }
    println!("skipped: {} is not here", place.display());
    None
}

/// Loads without progress reports.
pub fn load_path(path: &Path) -> Result<Checkpoint, LoadError> {
    let source = ModelSource::parse(&path.display().to_string())?;
    load(&source, &LoadOptions::default(), &mut |_| {})
}

/// Writes GGUF files: as much of the format as tests need.
#[derive(Default)]
pub struct GgufWriter {
    metadata: Vec<u8>,
    entries: u64,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufWriter {
    fn name(out: &mut Vec<u8>, name: &str) {
        out.extend((name.len() as u64).to_le_bytes());
        out.extend(name.as_bytes());
    }

    fn entry(&mut self, key: &str, kind: u32, value: &[u8]) {
        Self::name(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
        self.entries += 1;
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.entry(key, 4, &value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.entry(key, 6, &value.to_le_bytes());
    }

    pub fn string(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        Self::name(&mut bytes, value);
        self.entry(key, 8, &bytes);
    }

    /// An array of elements of type `kind`, each already encoded.
    pub fn array(&mut self, key: &str, kind: u32, elements: &[Vec<u8>]) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((elements.len() as u64).to_le_bytes());
        bytes.extend(elements.concat());
        self.entry(key, 9, &bytes);
    }

    pub fn strings(&mut self, key: &str, values: &[String]) {
        let encode = |value: &String| {
            let mut bytes = Vec::new();
            Self::name(&mut bytes, value);
            bytes
        };
        self.array(key, 8, &values.iter().map(encode).collect::<Vec<_>>());
    }

    /// A tensor with its dimensions outermost first.
    pub fn tensor(&mut self, name: &str, dims: &[usize], ggml_type: u32, bytes: Vec<u8>) {
        let innermost_first = dims.iter().rev().map(|&d| d as u64).collect();
        self.tensors.push((name.to_owned(), innermost_first, ggml_type, bytes));
    }

    pub fn finish(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend(self.entries.to_le_bytes());
        out.extend(&self.metadata);
        let mut offset = 0u64;
        for (name, dims, kind, bytes) in &self.tensors {
            Self::name(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += bytes.len().next_multiple_of(32) as u64;
        }
        for (_, _, _, bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }
}
