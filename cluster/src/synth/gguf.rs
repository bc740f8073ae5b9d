//! One GGUF v3 file that llama.cpp loads: metadata, vocabulary, tensors.
//!
//! Names, the interleaving of q and k, the rope divisors and the choice of types follow `convert_hf_to_gguf.py` and
//! `llama-quantize`. Read [`write`] first.

use super::SynthDType;
use super::presets::{Family, Shape};
use super::tensors::{Fill, Tensor, tensors};
use super::vocab::Vocabulary;
use ridge_kernels::DType;
use std::io::Write;
use std::path::Path;

/// Tensors begin at multiples of this.
const ALIGNMENT: u64 = 32;

/// A tensor with its place in the file.
struct Placed {
    tensor: Tensor,
    dtype: DType,
    offset: u64,
    bytes: u64,
}

/// Writes the file and returns its length.
pub fn write(shape: &Shape, dtype: SynthDType, seed: u64, path: &Path) -> anyhow::Result<u64> {
    let vocab = Vocabulary::new(shape);
    let rope_factors = shape.rope.map(|rope| rope.factors(shape.rope_theta, shape.head_dim));
    let placed = place(shape, dtype);
    // ggml rotates neighbouring elements in architecture llama and halves in the Qwens.
    let permuted = arch(shape.family) == "llama";

    let mut header = Header::default();
    metadata(&mut header, shape, &vocab, dtype);
    let head = header.finish(&placed, rope_factors.as_deref());
    let data_start = (head.len() as u64).next_multiple_of(ALIGNMENT);
    let mut at = 0;
    super::create(path, |out| {
        out.write_all(&head)?;
        pad(out, data_start - head.len() as u64)?;
        if let Some(factors) = &rope_factors {
            for factor in factors {
                out.write_all(&factor.to_le_bytes())?;
            }
            at = factors.len() as u64 * 4;
        }
        for place in &placed {
            pad(out, place.offset - at)?;
            let source = |row| place.tensor.gguf_source_row(row, permuted);
            at = place.offset + super::write_tensor(&place.tensor, place.dtype, (seed, super::cores()), &source, out)?;
        }
        // The file's end is aligned too, as ggml writes it.
        pad(out, at.next_multiple_of(ALIGNMENT) - at)
    })?;
    Ok(data_start + at.next_multiple_of(ALIGNMENT))
}

fn pad(out: &mut impl Write, bytes: u64) -> anyhow::Result<()> {
    assert!(bytes < ALIGNMENT, "tensors follow one another");
    Ok(out.write_all(&[0; ALIGNMENT as usize][..bytes as usize])?)
}

fn arch(family: Family) -> &'static str {
    match family {
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    }
}

/// Chooses types and places. The rope divisors, if any, stand before the first tensor.
fn place(shape: &Shape, dtype: SynthDType) -> Vec<Placed> {
    let mut offset = if shape.rope.is_some() { (shape.head_dim as u64 / 2 * 4).next_multiple_of(ALIGNMENT) } else { 0 };
    let mut placed = Vec::new();
    for tensor in tensors(shape) {
        let dtype = tensor_type(&tensor, shape, dtype);
        let row_bytes = dtype.row_bytes(tensor.cols).expect("tensor_type chooses what fits");
        let bytes = (row_bytes * tensor.rows) as u64;
        placed.push(Placed { tensor, dtype, offset, bytes });
        offset = (offset + bytes).next_multiple_of(ALIGNMENT);
    }
    placed
}

/// `llama-quantize`'s choice: vectors stay f32, the head is Q6_K in every 4-bit mix, rows that are not whole blocks
/// fall back to a 32-element type.
fn tensor_type(tensor: &Tensor, shape: &Shape, dtype: SynthDType) -> DType {
    if tensor.vector {
        return DType::F32;
    }
    let four_bit = matches!(dtype, SynthDType::Q4_0 | SynthDType::Q4K | SynthDType::Q4KM);
    let head = if shape.tied { "token_embd.weight" } else { "output.weight" };
    let sensitive = dtype == SynthDType::Q4KM && is_sensitive(&tensor.gguf_name, shape.layers);
    let wanted = if (four_bit && tensor.gguf_name == head) || sensitive { DType::Q6K } else { dtype.main_type() };
    let fallback = match wanted {
        DType::Q4K => DType::Q5_0,
        DType::Q6K => DType::Q8_0,
        other => other,
    };
    [wanted, fallback, DType::F16].into_iter().find(|t| t.row_bytes(tensor.cols).is_some()).expect("any row can be f16")
}

/// The first and last eighth of the layers and every third between: `use_more_bits` in llama.cpp.
fn is_sensitive(name: &str, layers: usize) -> bool {
    let mut parts = name.split('.').skip(1);
    let (Some(layer), Some(part)) = (parts.next().and_then(|l| l.parse::<usize>().ok()), parts.next()) else {
        return false;
    };
    let more_bits = layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
    more_bits && matches!(part, "attn_v" | "ffn_down")
}

fn metadata(header: &mut Header, shape: &Shape, vocab: &Vocabulary, dtype: SynthDType) {
    let arch = arch(shape.family);
    let key = |suffix: &str| format!("{arch}.{suffix}");
    let file_type: u32 = match dtype {
        SynthDType::F32 => 0,
        SynthDType::F16 => 1,
        SynthDType::Q4_0 => 2,
        SynthDType::Q8_0 => 7,
        SynthDType::Q4K => 14,
        SynthDType::Q4KM => 15,
        SynthDType::Q6K => 18,
        SynthDType::Bf16 => 32,
    };
    header.string("general.architecture", arch);
    header.string("general.type", "model");
    header.string("general.name", &format!("synthetic {}", shape.name));
    header.u32("general.file_type", file_type);
    header.u32("general.quantization_version", 2);
    header.u32(&key("block_count"), shape.layers as u32);
    header.u32(&key("context_length"), shape.context as u32);
    header.u32(&key("embedding_length"), shape.hidden as u32);
    header.u32(&key("feed_forward_length"), shape.ffn as u32);
    header.u32(&key("attention.head_count"), shape.heads as u32);
    header.u32(&key("attention.head_count_kv"), shape.kv_heads as u32);
    header.u32(&key("attention.key_length"), shape.head_dim as u32);
    header.u32(&key("attention.value_length"), shape.head_dim as u32);
    header.f32(&key("attention.layer_norm_rms_epsilon"), shape.norm_eps as f32);
    header.u32(&key("rope.dimension_count"), shape.head_dim as u32);
    header.f32(&key("rope.freq_base"), shape.rope_theta as f32);
    header.u32(&key("vocab_size"), shape.vocab as u32);
    if let Some(window) = shape.window {
        header.u32(&key("attention.sliding_window"), window as u32);
    }
    tokenizer(header, vocab);
}

fn tokenizer(header: &mut Header, vocab: &Vocabulary) {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    let first_pad = vocab.base.len() + vocab.special.len();
    let padding: Vec<String> = (first_pad..vocab.len()).map(|id| format!("[PAD{id}]")).collect();
    let tokens: Vec<&String> = vocab.base.iter().chain(&vocab.special).chain(&padding).collect();
    let types = [(NORMAL, vocab.base.len()), (CONTROL, vocab.special.len()), (UNUSED, padding.len())];
    let types: Vec<i32> = types.into_iter().flat_map(|(t, n)| std::iter::repeat_n(t, n)).collect();
    let merges: Vec<String> = vocab.merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
    header.string("tokenizer.ggml.model", "gpt2");
    header.string("tokenizer.ggml.pre", vocab.split.ggml);
    header.strings("tokenizer.ggml.tokens", &tokens);
    header.i32s("tokenizer.ggml.token_type", &types);
    header.strings("tokenizer.ggml.merges", &merges.iter().collect::<Vec<_>>());
    header.u32("tokenizer.ggml.bos_token_id", vocab.bos);
    header.u32("tokenizer.ggml.eos_token_id", vocab.eos[0]);
    header.bool("tokenizer.ggml.add_bos_token", vocab.add_bos);
    header.string("tokenizer.chat_template", vocab.chat_template);
}

/// The part of the file before the data, as it grows.
#[derive(Default)]
struct Header {
    entries: u64,
    bytes: Vec<u8>,
}

impl Header {
    fn key(&mut self, key: &str, value_type: u32) {
        self.entries += 1;
        put_string(&mut self.bytes, key);
        self.bytes.extend(value_type.to_le_bytes());
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(value.into());
    }

    fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        put_string(&mut self.bytes, value);
    }

    fn strings(&mut self, key: &str, values: &[&String]) {
        self.key(key, 9);
        self.bytes.extend(8u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|v| put_string(&mut self.bytes, v));
    }

    fn i32s(&mut self, key: &str, values: &[i32]) {
        self.key(key, 9);
        self.bytes.extend(5u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|v| self.bytes.extend(v.to_le_bytes()));
    }

    /// Magic, version, counts, the entries, then one line per tensor.
    fn finish(self, placed: &[Placed], rope_factors: Option<&[f32]>) -> Vec<u8> {
        let tensors = placed.len() as u64 + u64::from(rope_factors.is_some());
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(tensors.to_le_bytes());
        out.extend(self.entries.to_le_bytes());
        out.extend(self.bytes);
        if let Some(factors) = rope_factors {
            put_tensor(&mut out, "rope_freqs.weight", &[factors.len()], DType::F32, 0);
        }
        for Placed { tensor, dtype, offset, bytes } in placed {
            assert!(*bytes > 0, "{} is empty", tensor.gguf_name);
            assert!(tensor.fill != Fill::Ones || tensor.vector, "norms are vectors");
            // GGUF lists the fastest dimension first.
            let dims = if tensor.vector { vec![tensor.cols] } else { vec![tensor.cols, tensor.rows] };
            put_tensor(&mut out, &tensor.gguf_name, &dims, *dtype, *offset);
        }
        out
    }
}

fn put_string(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

fn put_tensor(out: &mut Vec<u8>, name: &str, dims: &[usize], dtype: DType, offset: u64) {
    put_string(out, name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| out.extend((*d as u64).to_le_bytes()));
    out.extend(dtype.to_ggml().to_le_bytes());
    out.extend(offset.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::presets::Preset;

    fn types(preset: Preset, dtype: SynthDType, name: &str) -> DType {
        place(&preset.shape(), dtype).into_iter().find(|p| p.tensor.gguf_name == name).expect("is there").dtype
    }

    #[test]
    fn types_follow_llama_quantize() {
        use Preset::{Llama31_8b, Llama32_1b, Qwen25_05b};
        let check = |preset, dtype, name, want| assert_eq!(types(preset, dtype, name), want, "{preset:?} {name}");
        check(Llama32_1b, SynthDType::Q4KM, "token_embd.weight", DType::Q6K);
        check(Llama31_8b, SynthDType::Q4KM, "token_embd.weight", DType::Q4K);
        check(Llama31_8b, SynthDType::Q4KM, "output.weight", DType::Q6K);
        check(Llama31_8b, SynthDType::Q4KM, "blk.0.ffn_down.weight", DType::Q6K);
        check(Llama31_8b, SynthDType::Q4KM, "blk.4.ffn_down.weight", DType::Q4K);
        check(Llama31_8b, SynthDType::Q4K, "blk.0.ffn_down.weight", DType::Q4K);
        check(Llama31_8b, SynthDType::Q8_0, "output.weight", DType::Q8_0);
        check(Llama31_8b, SynthDType::Q8_0, "blk.0.attn_norm.weight", DType::F32);
        // 896 columns are not whole blocks of 256.
        check(Qwen25_05b, SynthDType::Q4K, "blk.0.attn_q.weight", DType::Q5_0);
    }

    #[test]
    fn the_file_has_the_length_its_header_implies() {
        let folder = tempfile::tempdir().expect("a temp dir");
        for dtype in [SynthDType::F32, SynthDType::Q8_0, SynthDType::Q4KM] {
            let path = folder.path().join("model.gguf");
            let length = write(&Preset::TinyLlama.shape(), dtype, 1, &path).expect("writes");
            let file = std::fs::read(&path).expect("is there");
            assert_eq!(file.len() as u64, length);
            assert_eq!(&file[..8], b"GGUF\x03\0\0\0");
        }
    }
}
