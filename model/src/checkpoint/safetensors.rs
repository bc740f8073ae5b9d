//! A Hugging Face folder: `config.json`, safetensors in one file or in shards, `tokenizer.json` and friends.

use super::tensors::{Storage, as_matrix, wanted};
use super::{Checkpoint, FileMap, LoadError, LoadOptions, LoadProgress, Parts, Tensor, TensorMap};
use super::{fp8, nvfp4};
use crate::config::{generation_from_config, spec_from_config};
use crate::spec::ModelSpec;
use crate::tokenizer::Tokenizer;
use ::safetensors::{Dtype, SafeTensors};
use ridge_kernels::DType;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Largest JSON file that is read: tokenizers reach 35 MB.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// Loads the folder at `folder`.
pub fn load_folder(
    folder: &Path,
    name: String,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Checkpoint, LoadError> {
    let config = read_json(&folder.join("config.json"))?.ok_or_else(|| LoadError::Missing {
        folder: folder.to_owned(),
        file: "config.json".into(),
        hint: "it is not a model in Hugging Face layout".into(),
    })?;
    let mut spec = spec_from_config(&config)?;
    let tensors = read_tensors(folder, &config, &mut spec, progress)?;
    progress(LoadProgress::Checked { tensors: tensors.len() });
    let generation = read_json(&folder.join("generation_config.json"))?.unwrap_or(Value::Null);
    let parts = Parts {
        tensors,
        tokenizer: read_tokenizer(folder, options)?,
        template: read_template(folder)?,
        generation: generation_from_config(&generation, &config),
        name,
        spec,
    };
    parts.finish(options)
}

/// The name that safetensors of Llama, Mistral and Qwen give to a canonical tensor.
fn source_name(canonical: &str) -> String {
    let Some((layer, field)) = canonical.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) else {
        return match canonical {
            "embed" => "model.embed_tokens.weight",
            "norm" => "model.norm.weight",
            _ => "lm_head.weight",
        }
        .to_owned();
    };
    let field = match field {
        "attn_norm" => "input_layernorm.weight",
        "ffn_norm" => "post_attention_layernorm.weight",
        "wq" => "self_attn.q_proj.weight",
        "wk" => "self_attn.k_proj.weight",
        "wv" => "self_attn.v_proj.weight",
        "wo" => "self_attn.o_proj.weight",
        "q_bias" => "self_attn.q_proj.bias",
        "k_bias" => "self_attn.k_proj.bias",
        "v_bias" => "self_attn.v_proj.bias",
        "o_bias" => "self_attn.o_proj.bias",
        "q_norm" => "self_attn.q_norm.weight",
        "k_norm" => "self_attn.k_norm.weight",
        "w_gate" => "mlp.gate_proj.weight",
        "w_up" => "mlp.up_proj.weight",
        _ => "mlp.down_proj.weight",
    };
    format!("model.layers.{layer}.{field}")
}

fn read_tensors(
    folder: &Path,
    config: &Value,
    spec: &mut ModelSpec,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<TensorMap, LoadError> {
    let mut found: BTreeMap<String, Located> = BTreeMap::new();
    for file in weight_files(folder)? {
        let path = folder.join(&file);
        let map = FileMap::open(&path)?;
        progress(LoadProgress::Mapped { file: file.clone(), bytes: map.bytes().len() as u64 });
        map.will_need();
        locate(&file, &map, &mut found)?;
    }
    // A checkpoint that stores no head has a tied one, whatever its config forgot to say.
    spec.tied_head |= !found.contains_key("lm_head.weight");
    let mut tensors = TensorMap::default();
    for (name, shape) in wanted(spec) {
        let source = source_name(&name);
        if let Some(packed) = found.get(&nvfp4::packed_name(&source)) {
            tensors.insert(name, nvfp4::read(&source, packed, shape, &found)?);
            continue;
        }
        let Some(located) = found.get(&source) else {
            return Err(LoadError::TensorMissing { name, source_name: Some(source) });
        };
        if as_matrix(&located.dims) != Some(shape) {
            return Err(LoadError::TensorShape { name, wanted: shape, found: located.dims.clone() });
        }
        let dtype = match located.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F8_E4M3 => {
                tensors.insert(name, fp8::read(config, &source, located, shape, &found)?);
                continue;
            }
            other => {
                return Err(LoadError::TensorType {
                    name: source,
                    dtype: format!("{other:?}"),
                    supported: "F32, F16, BF16, F8_E4M3".into(),
                });
            }
        };
        let [rows, cols] = shape;
        let tensor = Tensor::mapped(dtype, rows, cols, &located.map, located.range.clone())
            .ok_or_else(|| LoadError::damaged(&source, "its bytes are not where its shape says"))?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// Where a stored tensor lies.
pub(super) struct Located {
    pub(super) dtype: Dtype,
    pub(super) dims: Vec<usize>,
    map: FileMap,
    range: std::ops::Range<usize>,
}

impl Located {
    /// Its bytes; none if they are not in the file.
    pub(super) fn storage(&self) -> Storage {
        let len = self.map.bytes().len();
        let inside = self.range.start <= self.range.end && self.range.end <= len;
        Storage::Mapped { file: self.map.clone(), range: if inside { self.range.clone() } else { 0..0 } }
    }
}

fn locate(file: &str, map: &FileMap, found: &mut BTreeMap<String, Located>) -> Result<(), LoadError> {
    let (header, metadata) =
        SafeTensors::read_metadata(map.bytes()).map_err(|e| LoadError::damaged(file, e.to_string()))?;
    // The header is preceded by its length, a u64.
    let data_start = header + 8;
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let located = Located {
            dtype: info.dtype,
            dims: info.shape.clone(),
            map: map.clone(),
            range: data_start.saturating_add(start)..data_start.saturating_add(end),
        };
        if found.insert(name.clone(), located).is_some() {
            return Err(LoadError::damaged(file, format!("tensor '{name}' is in two files")));
        }
    }
    Ok(())
}

/// File names of the weights, from the index where there is one.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<String>, LoadError> {
    if folder.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let Some(index) = read_json(&folder.join(INDEX))? else {
        return Err(LoadError::Missing {
            folder: folder.to_owned(),
            file: SINGLE.into(),
            hint: format!("nor {INDEX}; Ridge reads safetensors and GGUF, not pytorch_model.bin"),
        });
    };
    shard_names(&index)
}

/// The shards that an index names; refuses names that lead out of the folder.
pub(crate) fn shard_names(index: &Value) -> Result<Vec<String>, LoadError> {
    let Some(map) = index["weight_map"].as_object() else {
        return Err(LoadError::damaged(INDEX, "there is no weight_map"));
    };
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        let Some(file) = file.as_str() else {
            return Err(LoadError::damaged(INDEX, format!("the file of '{tensor}' is {file}")));
        };
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || file.contains('\\') || !file.ends_with(".safetensors") {
            return Err(LoadError::damaged(INDEX, format!("'{file}' is not the name of a shard in this folder")));
        }
        files.insert(file.to_owned());
    }
    Ok(files.into_iter().collect())
}

fn read_tokenizer(folder: &Path, options: &LoadOptions) -> Result<Tokenizer, LoadError> {
    let place = options.tokenizer.as_deref().unwrap_or(folder);
    let (file, beside) = if place.is_dir() {
        (place.join("tokenizer.json"), place)
    } else {
        (place.to_owned(), place.parent().unwrap_or(folder))
    };
    if !file.is_file() {
        return Err(LoadError::Missing {
            folder: beside.to_owned(),
            file: "tokenizer.json".into(),
            hint: "name one with --tokenizer, or convert it with transformers' save_pretrained".into(),
        });
    }
    Tokenizer::from_hf_file(&file, &beside.join("tokenizer_config.json"))
        .map_err(|e| LoadError::Tokenizer(e.to_string()))
}

/// The chat template: a file of its own, or a string or a list of named templates in `tokenizer_config.json`.
fn read_template(folder: &Path) -> Result<Option<String>, LoadError> {
    let file = folder.join("chat_template.jinja");
    if file.is_file() {
        return std::fs::read_to_string(&file).map(Some).map_err(|e| LoadError::io(&file, &e));
    }
    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let named = |list: &[Value], name: &str| {
        list.iter().find(|t| t["name"] == name).and_then(|t| t["template"].as_str()).map(str::to_owned)
    };
    Ok(match &config["chat_template"] {
        Value::String(source) => Some(source.clone()),
        Value::Array(list) => named(list, "default").or_else(|| named(list, "tool_use")),
        _ => None,
    })
}

/// Parses a JSON file; `None` if it does not exist.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, LoadError> {
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(LoadError::io(path, &e)),
    };
    let file = path.display().to_string();
    if length > MAX_JSON_BYTES {
        return Err(LoadError::damaged(&file, format!("{length} bytes of JSON")));
    }
    let bytes = std::fs::read(path).map_err(|e| LoadError::io(path, &e))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| LoadError::damaged(&file, e.to_string()))
}
