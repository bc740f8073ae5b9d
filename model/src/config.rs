//! `config.json` and `generation_config.json` of a Hugging Face folder, in the spellings of transformers 4 and 5.
//!
//! Knows names of fields, not files: it takes parsed JSON. Read [`spec_from_config`] first.

use crate::checkpoint::{GenerationConfig, LoadError};
use crate::spec::{Activation, AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec, RopeScaling, RopeSpec};
use serde_json::Value;

const FILE: &str = "config.json";
/// Architectures, as `config.json` spells them, and our short names.
const ARCHITECTURES: [(&str, &str); 4] = [
    ("LlamaForCausalLM", "llama"),
    ("MistralForCausalLM", "mistral"),
    ("Qwen2ForCausalLM", "qwen2"),
    ("Qwen3ForCausalLM", "qwen3"),
];

/// The architectures that can be loaded, for error messages.
pub fn supported_architectures() -> String {
    ARCHITECTURES.map(|(name, _)| name).join(", ")
}

/// Reads a model description out of a parsed `config.json`.
pub fn spec_from_config(config: &Value) -> Result<ModelSpec, LoadError> {
    let found = config["architectures"][0].as_str();
    let by_name = ARCHITECTURES.iter().find(|(name, _)| found == Some(name));
    // Some exports have no `architectures`; the model type says the same.
    let by_type = ARCHITECTURES.iter().find(|(_, short)| found.is_none() && config["model_type"] == *short);
    let Some((_, arch)) = by_name.or(by_type) else {
        return Err(LoadError::Architecture {
            found: found.or(config["model_type"].as_str()).unwrap_or("unnamed").to_owned(),
            supported: supported_architectures(),
        });
    };
    refuse_what_would_be_ignored(config)?;
    let fields = Fields(config);
    let hidden = fields.size("hidden_size")?;
    let heads = fields.size("num_attention_heads")?;
    let layers = fields.size("num_hidden_layers")?;
    let kv_heads = fields.optional_size("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = fields.optional_size("head_dim")?.unwrap_or(hidden / heads.max(1));
    let context = fields.size("max_position_embeddings")?;
    let rope = rope(config, head_dim, context)?;
    let windows = windows(config, arch, layers)?;
    let attention_bias = config["attention_bias"].as_bool().unwrap_or(false);
    let layer = |window: Option<usize>| LayerSpec {
        attention: AttentionSpec {
            // Qwen2 has biases on q, k and v, always and without a field that says so.
            qkv_bias: *arch == "qwen2" || attention_bias,
            out_bias: *arch != "qwen2" && attention_bias,
            qk_norm: *arch == "qwen3",
            window,
        },
        ffn: FfnSpec { kind: FfnKind::Gated, bias: config["mlp_bias"].as_bool().unwrap_or(false) },
    };
    let spec = ModelSpec {
        arch: (*arch).to_owned(),
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn: fields.size("intermediate_size")?,
        vocab: fields.size("vocab_size")?,
        context: longest(context, &rope.scaling),
        norm_eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32,
        rope,
        activation: activation(config)?,
        sliding_window: windows.iter().flatten().next().copied(),
        layer_specs: windows.into_iter().map(layer).collect(),
        tied_head: config["tie_word_embeddings"].as_bool().unwrap_or(false),
    };
    match spec.defect() {
        Some(defect) => Err(LoadError::config(FILE, defect)),
        None => Ok(spec),
    }
}

/// Fields that change the arithmetic in a way that no supported architecture has.
fn refuse_what_would_be_ignored(config: &Value) -> Result<(), LoadError> {
    let refuse = |what: String| Err(LoadError::Unsupported { file: FILE.into(), what });
    if config["mlp_bias"] == true {
        return refuse("mlp_bias: true".into());
    }
    crate::checkpoint::fp8::check(config)?;
    Ok(())
}

/// Positions that the scaling was made to reach.
fn longest(context: usize, scaling: &RopeScaling) -> usize {
    let reach = match scaling {
        RopeScaling::Yarn { factor, original_context, .. } => *original_context as f64 * factor,
        RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => context as f64 * factor,
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => 0.0,
    };
    context.max(reach as usize)
}

fn activation(config: &Value) -> Result<Activation, LoadError> {
    match config["hidden_act"].as_str().or(config["hidden_activation"].as_str()).unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        other => Err(LoadError::Unsupported { file: FILE.into(), what: format!("hidden_act '{other}'") }),
    }
}

/// The attention window of every layer.
fn windows(config: &Value, arch: &str, layers: usize) -> Result<Vec<Option<usize>>, LoadError> {
    if layers > 4096 {
        return Err(LoadError::config(FILE, format!("num_hidden_layers is {layers}")));
    }
    let window = Fields(config).optional_size("sliding_window")?;
    let qwen = arch.starts_with("qwen");
    // Qwen ships a window with every checkpoint and a switch that is nearly always off.
    let window = window.filter(|_| !qwen || config["use_sliding_window"] == true);
    if let Some(types) = config["layer_types"].as_array() {
        if types.len() != layers {
            return Err(LoadError::config(FILE, format!("{} layer_types for {layers} layers", types.len())));
        }
        let one = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => match window {
                Some(window) => Ok(Some(window)),
                None => {
                    Err(LoadError::config(FILE, "layer_types has sliding_attention but there is no sliding_window"))
                }
            },
            _ => Err(LoadError::Unsupported { file: FILE.into(), what: format!("layer type {kind}") }),
        };
        return types.iter().map(one).collect();
    }
    let first = if qwen { Fields(config).optional_size("max_window_layers")?.unwrap_or(0) } else { 0 };
    // Llama has no windows; a stray field in its config is ignored by transformers too.
    let has_windows = arch != "llama";
    Ok((0..layers).map(|i| window.filter(|_| has_windows && i >= first)).collect())
}

fn rope(config: &Value, head_dim: usize, context: usize) -> Result<RopeSpec, LoadError> {
    // transformers 5 puts everything under rope_parameters; 4 has rope_theta beside rope_scaling.
    let parameters = &config["rope_parameters"];
    let scaling = if parameters.is_object() { parameters } else { &config["rope_scaling"] };
    let theta = parameters["rope_theta"].as_f64().or(config["rope_theta"].as_f64()).unwrap_or(10_000.0);
    let partial = scaling["partial_rotary_factor"].as_f64().or(config["partial_rotary_factor"].as_f64()).unwrap_or(1.0);
    let number = |key: &str| scaling[key].as_f64();
    let required =
        |key: &str| number(key).ok_or_else(|| LoadError::config(FILE, format!("rope scaling has no number '{key}'")));
    let original = || match &scaling["original_max_position_embeddings"] {
        Value::Null => Fields(config).optional_size("original_max_position_embeddings").map(|n| n.unwrap_or(context)),
        _ => Fields(scaling).size("original_max_position_embeddings"),
    };
    let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: required("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: required("factor")?, original_context: original()? },
        "yarn" => RopeScaling::Yarn {
            factor: required("factor")?,
            original_context: original()?,
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            attention_factor: number("attention_factor"),
            mscale: number("mscale"),
            mscale_all_dim: number("mscale_all_dim"),
            truncate: scaling["truncate"].as_bool().unwrap_or(true),
        },
        "llama3" => RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_context: original()?,
        },
        other => {
            return Err(LoadError::Unsupported {
                file: FILE.into(),
                what: format!("rope type '{other}' (supported: default, linear, dynamic, yarn, llama3)"),
            });
        }
    };
    Ok(RopeSpec { theta, rotary_dim: (head_dim as f64 * partial) as usize, scaling })
}

/// Reads `generation_config.json`, falling back to `config.json` field by field; either may be absent (`Null`).
pub fn generation_from_config(generation: &Value, config: &Value) -> GenerationConfig {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = |v: &Value| match v {
        Value::Array(items) => items.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect::<Vec<u32>>(),
    };
    let mut eos = ids(&generation["eos_token_id"]);
    if eos.is_empty() {
        eos = ids(&config["eos_token_id"]);
    }
    let number = |key: &str| generation[key].as_f64().map(|x| x as f32);
    GenerationConfig {
        eos,
        bos: id(&generation["bos_token_id"]).or(id(&config["bos_token_id"])),
        temperature: number("temperature"),
        top_p: number("top_p"),
        top_k: id(&generation["top_k"]),
        repetition_penalty: number("repetition_penalty"),
    }
}

/// Access to fields with errors that name them.
struct Fields<'a>(&'a Value);

impl Fields<'_> {
    fn size(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_size(key)?.ok_or_else(|| LoadError::config(FILE, format!("'{key}' is missing")))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        match &self.0[key] {
            Value::Null => Ok(None),
            // A few exporters write sizes as 32768.0.
            value => {
                match value.as_u64().or(value.as_f64().filter(|x| x.fract() == 0.0 && *x >= 0.0).map(|x| x as u64)) {
                    Some(n) if n <= 1 << 40 => Ok(Some(n as usize)),
                    _ => Err(LoadError::config(FILE, format!("'{key}' is {value}, not a size"))),
                }
            }
        }
    }
}
