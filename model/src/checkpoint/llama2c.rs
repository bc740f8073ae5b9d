//! llama2.c files: the legacy header and version 1, both of float32, with the tokenizer in a file beside.
//!
//! The format is small and has good test models. Rows of q and k are in Meta's interleaved order, as in GGUF.

use super::gguf_model::half_split_rows;
use super::tensors::wanted;
use super::{Checkpoint, FileMap, GenerationConfig, LoadError, LoadOptions, LoadProgress, Parts, Tensor, TensorMap};
use crate::spec::{Activation, AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec, RopeScaling, RopeSpec};
use crate::tokenizer::pieces::{Pieces, byte_of_fallback};
use crate::tokenizer::spm::{SPACE, Spm};
use crate::tokenizer::{Ends, Facts, Special, Tokenizer, TokenizerError};
use ridge_kernels::DType;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// `ak42`, which starts every version but the first.
const MAGIC: u32 = 0x616b_3432;
/// Where the weights of version 1 start.
const V1_HEADER_BYTES: usize = 256;
const LEGACY_HEADER_BYTES: usize = 28;
/// The Llama 2 vocabulary's fixed ids.
const UNKNOWN: u32 = 0;
const BOS: u32 = 1;
const EOS: u32 = 2;

/// What the header says.
struct Header {
    spec: ModelSpec,
    legacy: bool,
    weights_at: usize,
}

/// Loads a llama2.c model file.
pub fn load_llama2c(
    path: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Checkpoint, LoadError> {
    let map = FileMap::open(path)?;
    let file = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    progress(LoadProgress::Mapped { file: file.clone(), bytes: map.bytes().len() as u64 });
    let header = read_header(&file, map.bytes())?;
    let tensors = read_tensors(&file, &header, &map)?;
    progress(LoadProgress::Checked { tensors: tensors.len() });
    let tokenizer = tokenizer_path(path, header.spec.vocab, options)?;
    let bytes = std::fs::read(&tokenizer).map_err(|e| LoadError::io(&tokenizer, &e))?;
    let parts = Parts {
        tensors,
        tokenizer: Tokenizer::from_llama2c(&bytes, header.spec.vocab)
            .map_err(|e| LoadError::Tokenizer(format!("{}: {e}", tokenizer.display())))?,
        template: None,
        // llama2.c's training separates stories by BOS, so that ends one too.
        generation: GenerationConfig { eos: vec![EOS, BOS], bos: Some(BOS), ..GenerationConfig::default() },
        name: path.file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy().into_owned()),
        spec: header.spec,
    };
    parts.finish(options)
}

fn read_header(file: &str, bytes: &[u8]) -> Result<Header, LoadError> {
    let int = |index: usize| -> Result<i32, LoadError> {
        let word = bytes.get(index * 4..index * 4 + 4).and_then(|b| b.try_into().ok());
        word.map(i32::from_le_bytes).ok_or_else(|| LoadError::damaged(file, "the header is cut off"))
    };
    let legacy = int(0)? as u32 != MAGIC;
    if !legacy && int(1)? != 1 {
        let what = format!("llama2.c version {} (supported: legacy and 1)", int(1)?);
        return Err(LoadError::Unsupported { file: file.to_owned(), what });
    }
    let first = if legacy { 0 } else { 2 };
    let mut sizes = [0usize; 7];
    for (index, size) in sizes.iter_mut().enumerate() {
        let value = int(first + index)?;
        // The legacy header makes the vocabulary negative to say that the head is not tied.
        let value = if legacy && index == 5 { value.unsigned_abs() as i64 } else { value.into() };
        *size = usize::try_from(value).map_err(|_| LoadError::damaged(file, format!("a size is {value}")))?;
    }
    let tied_head = if legacy { int(5)? > 0 } else { bytes.get(36) == Some(&1) };
    let [hidden, ffn, layers, heads, kv_heads, vocab, context] = sizes;
    if layers > 4096 || heads == 0 {
        return Err(LoadError::damaged(file, format!("{layers} layers of {heads} heads: not a llama2.c model")));
    }
    let head_dim = hidden / heads;
    let layer = LayerSpec { attention: AttentionSpec::default(), ffn: FfnSpec { kind: FfnKind::Gated, bias: false } };
    let spec = ModelSpec {
        arch: "llama".into(),
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
        context,
        norm_eps: 1e-5,
        rope: RopeSpec { theta: 10_000.0, rotary_dim: head_dim, scaling: RopeScaling::None },
        activation: Activation::Silu,
        sliding_window: None,
        layer_specs: vec![layer; layers],
        tied_head,
    };
    if let Some(defect) = spec.defect() {
        return Err(LoadError::damaged(file, format!("{defect}: not a llama2.c model")));
    }
    Ok(Header { spec, legacy, weights_at: if legacy { LEGACY_HEADER_BYTES } else { V1_HEADER_BYTES } })
}

/// Tensors follow one another without names, all layers of a kind together.
fn read_tensors(file: &str, header: &Header, map: &FileMap) -> Result<TensorMap, LoadError> {
    let spec = &header.spec;
    let shapes: HashMap<String, [usize; 2]> = wanted(spec).into_iter().collect();
    let kinds: &[&str] = if header.legacy {
        &["embed", "attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w_gate", "w_down", "w_up", "norm", "head"]
    } else {
        &["attn_norm", "ffn_norm", "norm", "embed", "wq", "wk", "wv", "wo", "w_gate", "w_down", "w_up", "head"]
    };
    let mut tensors = TensorMap::default();
    let mut at = header.weights_at;
    for kind in kinds {
        if *kind == "head" {
            if spec.tied_head {
                continue;
            }
            // The legacy file has cosines and sines before the head.
            at += if header.legacy { spec.context * spec.head_dim * 4 } else { 0 };
        }
        let whole = matches!(*kind, "embed" | "norm" | "head");
        for layer in 0..if whole { 1 } else { spec.layers } {
            let name = if whole { (*kind).to_owned() } else { format!("layers.{layer}.{kind}") };
            let [rows, cols] = shapes[&name];
            let end = at + rows * cols * 4;
            let tensor = Tensor::mapped(DType::F32, rows, cols, map, at..end).ok_or_else(|| {
                LoadError::damaged(file, format!("'{name}' would end at byte {end} of {}", map.bytes().len()))
            })?;
            at = end;
            let reorder = matches!(*kind, "wq" | "wk");
            tensors.insert(name, if reorder { half_split_rows(&tensor, spec.head_dim) } else { tensor });
        }
    }
    Ok(tensors)
}

fn tokenizer_path(model: &Path, vocab: usize, options: &LoadOptions) -> Result<PathBuf, LoadError> {
    if let Some(path) = &options.tokenizer {
        return Ok(path.clone());
    }
    let candidates = [format!("tok{vocab}.bin"), "tokenizer.bin".to_owned()];
    let found = candidates.iter().map(|name| model.with_file_name(name)).find(|p| p.is_file());
    found.ok_or_else(|| LoadError::Missing {
        folder: model.parent().unwrap_or(Path::new(".")).to_owned(),
        file: candidates.join(" or "),
        hint: "name llama2.c's tokenizer file with --tokenizer".into(),
    })
}

impl Tokenizer {
    /// Reads llama2.c's `tokenizer.bin`: a score and a text per token, in the order of ids.
    pub fn from_llama2c(bytes: &[u8], vocab: usize) -> Result<Self, TokenizerError> {
        let mut at = 4usize; // The longest token's length comes first.
        let mut take = |len: usize| -> Result<&[u8], TokenizerError> {
            let taken = bytes.get(at..at.saturating_add(len));
            at = at.saturating_add(len);
            taken.ok_or_else(|| TokenizerError(format!("it ends before token {vocab}")))
        };
        let (mut tokens, mut scores) = (Vec::new(), Vec::new());
        for id in 0..vocab as u32 {
            let score: [u8; 4] = take(4)?.try_into().expect("four bytes");
            let len: [u8; 4] = take(4)?.try_into().expect("four bytes");
            let text = String::from_utf8_lossy(take(u32::from_le_bytes(len) as usize)?).into_owned();
            scores.push(f32::from_le_bytes(score));
            // The export wrote control tokens with line breaks around them, and spaces for SentencePiece's mark.
            tokens.push(match id {
                UNKNOWN => "<unk>".to_owned(),
                BOS => "<s>".to_owned(),
                EOS => "</s>".to_owned(),
                _ => text.replace(' ', &SPACE.to_string()),
            });
        }
        let mut pieces = Pieces::default();
        for token in &tokens {
            match byte_of_fallback(token) {
                Some(byte) => pieces.push(&[byte]),
                None => pieces.push(token.replace(SPACE, " ").as_bytes()),
            }
        }
        let special = (0..vocab.min(3)).map(|id| (id as u32, Special { text: tokens[id].clone(), control: true }));
        let special = special.collect();
        let spm = Spm::new(&tokens, scores, Some(UNKNOWN), true).ok_or_else(|| TokenizerError("no tokens".into()))?;
        let facts = Facts {
            pieces: Some(pieces),
            special,
            strip_leading_space: true,
            vocab_size: vocab,
            bos: Some(BOS),
            eos: Some(EOS),
        };
        Ok(Self::from_spm(spm, Ends { bos: Some(BOS), eos: None }, facts))
    }
}
