//! What the keys and tensor names of a GGUF file mean for the architectures that Ridge computes.
//!
//! llama.cpp's converter reorders the rows of q and k for its interleaved RoPE where the architecture is `llama`
//! (Llama and Mistral). Rows are put back at load, so that the forward pass and the KV cache are the same whatever
//! the format.

use super::gguf::{Gguf, Value};
use super::tensors::{as_matrix, wanted};
use super::{Checkpoint, FileMap, GenerationConfig, LoadError, LoadOptions, LoadProgress, Parts, Tensor, TensorMap};
use crate::spec::{Activation, AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec, RopeScaling, RopeSpec};
use crate::tokenizer::Tokenizer;
use ridge_kernels::DType;
use std::path::{Path, PathBuf};

const ARCHITECTURES: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// A part of a model: its header and its bytes.
struct Part {
    gguf: Gguf,
    map: FileMap,
}

/// Loads a GGUF file, with its further parts if it is the first of several.
pub fn load_gguf(
    path: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Checkpoint, LoadError> {
    let mut parts = vec![open(path, progress)?];
    let count = parts[0].gguf.integer("split.count").unwrap_or(1);
    for index in 1..count {
        parts.push(open(&part_path(path, index, count)?, progress)?);
    }
    let gguf = &parts[0].gguf;
    let spec = spec_from_gguf(gguf, &|name| find(&parts, name).is_some(), rope_factors(&parts)?)?;
    let tensors = read_tensors(&spec, &parts)?;
    progress(LoadProgress::Checked { tensors: tensors.len() });
    let tokenizer = match &options.tokenizer {
        None => Tokenizer::from_gguf(gguf),
        Some(place) if place.is_dir() => Tokenizer::from_hf_folder(place),
        Some(file) => Tokenizer::from_hf_file(file, &file.with_file_name("tokenizer_config.json")),
    };
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned());
    let parts = Parts {
        tensors,
        tokenizer: tokenizer.map_err(|e| LoadError::Tokenizer(e.to_string()))?,
        template: gguf.string("tokenizer.chat_template").map(str::to_owned),
        generation: generation(gguf),
        name: stem.unwrap_or_else(|| "model".into()),
        spec,
    };
    parts.finish(options)
}

fn open(path: &Path, progress: &mut dyn FnMut(LoadProgress)) -> Result<Part, LoadError> {
    let map = FileMap::open(path)?;
    let file = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    let gguf = Gguf::parse(&file, map.bytes())?;
    map.will_need();
    progress(LoadProgress::Mapped { file, bytes: map.bytes().len() as u64 });
    Ok(Part { gguf, map })
}

/// `name-00001-of-00003.gguf` to the path of another part.
fn part_path(first: &Path, index: u64, count: u64) -> Result<PathBuf, LoadError> {
    let name = first.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let suffix = format!("-00001-of-{count:05}.gguf");
    match name.strip_suffix(&suffix) {
        Some(stem) if count <= 99_999 => {
            Ok(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", index + 1)))
        }
        _ => {
            Err(LoadError::config(&name, format!("it is one of {count} parts; name the first, which ends in {suffix}")))
        }
    }
}

fn find<'a>(parts: &'a [Part], name: &str) -> Option<(&'a Part, &'a super::gguf::TensorInfo)> {
    parts.iter().find_map(|part| part.gguf.tensor(name).map(|tensor| (part, tensor)))
}

/// Reads the model description; `has` tells which tensors exist, `factors` are those of `rope_freqs.weight`.
pub fn spec_from_gguf(
    gguf: &Gguf,
    has: &dyn Fn(&str) -> bool,
    factors: Option<Vec<f32>>,
) -> Result<ModelSpec, LoadError> {
    let found = gguf.string("general.architecture").unwrap_or("unnamed");
    let Some(arch) = ARCHITECTURES.into_iter().find(|arch| *arch == found) else {
        return Err(LoadError::Architecture { found: found.to_owned(), supported: ARCHITECTURES.join(", ") });
    };
    let keys = Keys { gguf, arch };
    if let Some(experts) = keys.optional_size("expert_count")?.filter(|n| *n > 0) {
        return Err(LoadError::Unsupported {
            file: gguf.file.clone(),
            what: format!("a mixture of {experts} experts"),
        });
    }
    let hidden = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let head_dim = keys.optional_size("attention.key_length")?.unwrap_or(hidden / heads.max(1));
    if keys.optional_size("attention.value_length")?.is_some_and(|v| v != head_dim) {
        return Err(LoadError::Unsupported { file: gguf.file.clone(), what: "values narrower than keys".into() });
    }
    let context = keys.size("context_length")?;
    let layers = keys.size("block_count")?;
    let vocab = match keys.optional_size("vocab_size")? {
        Some(n) => n,
        None => gguf.array("tokenizer.ggml.tokens").map_or(0, <[Value]>::len),
    };
    let layer = |index: usize| LayerSpec {
        attention: AttentionSpec {
            qkv_bias: has(&format!("blk.{index}.attn_q.bias")),
            out_bias: has(&format!("blk.{index}.attn_output.bias")),
            qk_norm: has(&format!("blk.{index}.attn_q_norm.weight")),
            window: None,
        },
        ffn: FfnSpec { kind: FfnKind::Gated, bias: has(&format!("blk.{index}.ffn_gate.bias")) },
    };
    if layers > 4096 {
        return Err(LoadError::config(&gguf.file, format!("{layers} layers")));
    }
    let rotary_dim = keys.optional_size("rope.dimension_count")?.unwrap_or(head_dim);
    let spec = ModelSpec {
        arch: arch.to_owned(),
        hidden,
        layers,
        heads,
        kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        ffn: keys.size("feed_forward_length")?,
        vocab,
        context,
        norm_eps: keys.number("attention.layer_norm_rms_epsilon").unwrap_or(1e-5) as f32,
        rope: RopeSpec {
            theta: keys.number("rope.freq_base").unwrap_or(10_000.0),
            rotary_dim,
            scaling: scaling(&keys, context, factors)?,
        },
        activation: Activation::Silu,
        sliding_window: None,
        layer_specs: (0..layers).map(layer).collect(),
        tied_head: !has("output.weight"),
    };
    if spec.layer_specs.iter().any(|l| l.ffn.bias) {
        return Err(LoadError::Unsupported {
            file: gguf.file.clone(),
            what: "biases in the feed-forward layer".into(),
        });
    }
    match spec.defect() {
        Some(defect) => Err(LoadError::config(&gguf.file, defect)),
        None => Ok(spec),
    }
}

fn scaling(keys: &Keys<'_>, context: usize, factors: Option<Vec<f32>>) -> Result<RopeScaling, LoadError> {
    if let Some(factors) = factors {
        return Ok(RopeScaling::Factors(factors));
    }
    // Old converters wrote `scale_linear` and no type.
    let factor = keys.number("rope.scaling.factor").or(keys.number("rope.scale_linear")).unwrap_or(1.0);
    let kind = keys.gguf.string(&keys.key("rope.scaling.type")).unwrap_or("linear");
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" if factor == 1.0 || factor == 0.0 => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor }),
        "yarn" => Ok(RopeScaling::Yarn {
            factor,
            original_context: keys.optional_size("rope.scaling.original_context_length")?.unwrap_or(context),
            beta_fast: keys.number("rope.scaling.yarn_beta_fast").unwrap_or(32.0),
            beta_slow: keys.number("rope.scaling.yarn_beta_slow").unwrap_or(1.0),
            // llama.cpp multiplies its own attention factor onto YaRN's.
            attention_factor: keys.number("rope.scaling.attn_factor").map(|f| f * (0.1 * factor.max(1.0).ln() + 1.0)),
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        }),
        other => Err(LoadError::Unsupported {
            file: keys.gguf.file.clone(),
            what: format!("rope scaling '{other}' (supported: none, linear, yarn)"),
        }),
    }
}

/// Llama 3's frequency factors, which its converter stores as a tensor.
fn rope_factors(parts: &[Part]) -> Result<Option<Vec<f32>>, LoadError> {
    let Some((part, info)) = find(parts, "rope_freqs.weight") else { return Ok(None) };
    // One value per pair of elements of a head; anything longer is not a head.
    let short = info.dims.len() == 1 && info.dims[0] <= 4096;
    match view(part, info).filter(|_| short) {
        Some(tensor) => Ok(Some(tensor.to_f32())),
        None => Err(LoadError::damaged(&part.gguf.file, "rope_freqs.weight is not a short vector")),
    }
}

fn view(part: &Part, info: &super::gguf::TensorInfo) -> Option<Tensor> {
    let [rows, cols] = as_matrix(&info.dims)?;
    Tensor::mapped(info.dtype()?, rows, cols, &part.map, info.range(part.map.bytes().len())?)
}

/// The name that GGUF gives to a canonical tensor.
fn source_name(canonical: &str) -> String {
    let Some((layer, field)) = canonical.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) else {
        return match canonical {
            "embed" => "token_embd.weight",
            "norm" => "output_norm.weight",
            _ => "output.weight",
        }
        .to_owned();
    };
    let field = match field {
        "attn_norm" => "attn_norm.weight",
        "ffn_norm" => "ffn_norm.weight",
        "wq" => "attn_q.weight",
        "wk" => "attn_k.weight",
        "wv" => "attn_v.weight",
        "wo" => "attn_output.weight",
        "q_bias" => "attn_q.bias",
        "k_bias" => "attn_k.bias",
        "v_bias" => "attn_v.bias",
        "o_bias" => "attn_output.bias",
        "q_norm" => "attn_q_norm.weight",
        "k_norm" => "attn_k_norm.weight",
        "w_gate" => "ffn_gate.weight",
        "w_up" => "ffn_up.weight",
        _ => "ffn_down.weight",
    };
    format!("blk.{layer}.{field}")
}

fn read_tensors(spec: &ModelSpec, parts: &[Part]) -> Result<TensorMap, LoadError> {
    let mut tensors = TensorMap::default();
    for (name, shape) in wanted(spec) {
        let source = source_name(&name);
        let Some((part, info)) = find(parts, &source) else {
            return Err(LoadError::TensorMissing { name, source_name: Some(source) });
        };
        if as_matrix(&info.dims) != Some(shape) {
            return Err(LoadError::TensorShape { name, wanted: shape, found: info.dims.clone() });
        }
        if info.dtype().is_none() {
            return Err(LoadError::TensorType {
                name: source,
                dtype: format!("ggml type {}", info.ggml_type),
                supported: DType::ALL.map(DType::name).join(", "),
            });
        }
        let tensor = view(part, info).ok_or_else(|| {
            let (dims, bytes) = (&info.dims, part.map.bytes().len());
            LoadError::damaged(&part.gguf.file, format!("tensor '{source}' {dims:?} does not fit in {bytes} bytes"))
        })?;
        tensors.insert(name.clone(), restore_order(spec, &name, tensor));
    }
    Ok(tensors)
}

/// Undoes the converter's reordering of q and k for architecture `llama`.
fn restore_order(spec: &ModelSpec, name: &str, tensor: Tensor) -> Tensor {
    if spec.arch != "llama" {
        return tensor;
    }
    match name.rsplit('.').next() {
        Some("wq" | "wk") => half_split_rows(&tensor, spec.head_dim),
        Some("q_bias" | "k_bias") => {
            let values = tensor.to_f32();
            let order = |i: usize| interleaved_row(i, spec.head_dim);
            let bytes = (0..values.len()).flat_map(|i| values[order(i)].to_le_bytes()).collect();
            Tensor::owned(DType::F32, 1, values.len(), bytes).expect("one f32 per value")
        }
        _ => tensor,
    }
}

/// Rows of each head from interleaved pairs to two halves.
pub(crate) fn half_split_rows(tensor: &Tensor, head_dim: usize) -> Tensor {
    tensor.with_rows(|row| interleaved_row(row, head_dim))
}

/// Where row `row` of the half-split layout is in the interleaved one.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (within % half) + within / half
}

fn generation(gguf: &Gguf) -> GenerationConfig {
    let id = |key: &str| gguf.integer(&format!("tokenizer.ggml.{key}_token_id")).and_then(|id| u32::try_from(id).ok());
    let mut eos: Vec<u32> = ["eos", "eot", "eom"].into_iter().filter_map(id).collect();
    eos.dedup();
    GenerationConfig { eos, bos: id("bos"), ..GenerationConfig::default() }
}

/// Keys that begin with the architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.gguf.number(&self.key(key))
    }

    fn size(&self, key: &str) -> Result<usize, LoadError> {
        let missing = || LoadError::config(&self.gguf.file, format!("'{}' is missing", self.key(key)));
        self.optional_size(key)?.ok_or_else(missing)
    }

    /// A size, or an array that holds the same size for every layer.
    fn optional_size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let key = self.key(key);
        let Some(value) = self.gguf.value(&key) else { return Ok(None) };
        let size = match value {
            Value::Array(items) => {
                let first = items.first().and_then(Value::integer);
                first.filter(|n| items.iter().all(|v| v.integer() == Some(*n)))
            }
            one => one.integer(),
        };
        match size.filter(|n| *n <= 1 << 40) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(LoadError::config(&self.gguf.file, format!("'{key}' is not one size for all layers"))),
        }
    }
}
