//! `cluster synth`: models of real shapes with seeded random weights, so that benchmarks need no download.
//!
//! The text such a model writes is noise, but every byte of it costs what the real model's would. Weights are made
//! row by row and written as they are made: an 8B model needs a few megabytes of memory. Read [`write`] first.

mod gguf;
mod presets;
mod safetensors;
mod tensors;
mod vocab;

use crate::cli::SynthArgs;
use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
pub use presets::Preset;
use ridge_kernels::{DType, quantize_row};
use std::io::Write;
use std::path::Path;
use tensors::Tensor;

/// How weights are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum SynthDType {
    Bf16,
    F16,
    F32,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    /// Q4_K everywhere but the output head.
    #[value(name = "q4_k")]
    Q4K,
    #[value(name = "q6_k")]
    Q6K,
    /// llama.cpp's mix: the sensitive half of attn_v and ffn_down in Q6_K.
    #[value(name = "q4_k_m")]
    Q4KM,
}

impl SynthDType {
    /// The type that most matrices get.
    fn main_type(self) -> DType {
        match self {
            SynthDType::Bf16 => DType::BF16,
            SynthDType::F16 => DType::F16,
            SynthDType::F32 => DType::F32,
            SynthDType::Q8_0 => DType::Q8_0,
            SynthDType::Q4_0 => DType::Q4_0,
            SynthDType::Q4K | SynthDType::Q4KM => DType::Q4K,
            SynthDType::Q6K => DType::Q6K,
        }
    }
}

/// Writes the model that `args` describe and says on stderr what it wrote.
pub fn write(args: &SynthArgs) -> anyhow::Result<()> {
    let mut shape = args.preset.shape();
    if let Some(layers) = args.layers {
        ensure!(layers > 0, "--layers must be at least 1");
        shape.name = format!("{}-{layers}-layers", shape.name);
        shape.layers = layers;
    }
    if let Some(context) = args.context {
        ensure!(context > 0, "--context must be at least 1");
        shape.context = context;
    }
    ensure!(
        args.force || !args.out.exists(),
        "{} exists already; remove it or pass --force to write over it",
        args.out.display()
    );
    let bytes = if args.out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        gguf::write(&shape, args.dtype, args.seed, &args.out)?
    } else {
        let dtype = match args.dtype {
            SynthDType::Bf16 | SynthDType::F16 | SynthDType::F32 => args.dtype.main_type(),
            quantised => {
                let name = quantised.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default();
                bail!("a safetensors folder holds bf16, f16 or f32; for {name} name a file that ends in .gguf")
            }
        };
        safetensors::write(&shape, dtype, args.seed, &args.out)?
    };
    eprintln!("wrote {} ({}, {:.1} MB)", args.out.display(), shape.name, bytes as f64 / 1e6);
    Ok(())
}

/// Rows encoded per piece of work: large enough to keep a thread busy, small enough to hold one per thread.
const PIECE_BYTES: usize = 4 << 20;

/// Cores to encode with.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Encodes a whole tensor into `out`. So many threads make pieces of rows side by side; pieces are written in order.
/// `source_row` maps the row of the file to the row of the Hugging Face tensor.
fn write_tensor(
    tensor: &Tensor,
    dtype: DType,
    (seed, threads): (u64, usize),
    source_row: &(dyn Fn(usize) -> usize + Sync),
    out: &mut impl Write,
) -> anyhow::Result<u64> {
    let row_bytes = dtype.row_bytes(tensor.cols).context("the type was chosen to fit the row")?;
    let piece_rows = (PIECE_BYTES / row_bytes).clamp(1, tensor.rows);
    let encode = |first: usize| -> anyhow::Result<Vec<u8>> {
        let rows = first..(first + piece_rows).min(tensor.rows);
        let mut bytes = Vec::with_capacity(rows.len() * row_bytes);
        let mut values = vec![0.0; tensor.cols];
        for row in rows {
            tensor.fill_row(seed, source_row(row), &mut values);
            quantize_row(dtype, &values, &mut bytes)?;
        }
        Ok(bytes)
    };
    let starts: Vec<usize> = (0..tensor.rows).step_by(piece_rows).collect();
    let mut written = 0;
    for group in starts.chunks(threads) {
        let pieces: Vec<anyhow::Result<Vec<u8>>> = std::thread::scope(|scope| {
            let workers: Vec<_> = group.iter().map(|&first| scope.spawn(move || encode(first))).collect();
            workers.into_iter().map(|w| w.join().expect("a row encoder does not panic")).collect()
        });
        for piece in pieces {
            let piece = piece?;
            out.write_all(&piece)?;
            written += piece.len() as u64;
        }
    }
    assert_eq!(written, (row_bytes * tensor.rows) as u64, "{} has the announced size", tensor.hf_name);
    Ok(written)
}

/// Creates a file that appears under its name only when `fill` succeeded.
fn create(
    path: &Path,
    fill: impl FnOnce(&mut std::io::BufWriter<std::fs::File>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    let file = std::fs::File::create(&part).with_context(|| format!("cannot create {}", part.display()))?;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, file);
    let filled = fill(&mut out).and_then(|()| Ok(out.flush()?));
    if let Err(error) = filled {
        let _ = std::fs::remove_file(&part);
        return Err(error.context(format!("cannot write {}", path.display())));
    }
    std::fs::rename(&part, path).with_context(|| format!("cannot rename {}", part.display()))
}
