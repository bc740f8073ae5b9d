//! `config.json` in the spellings of transformers 4 and 5.

use ridge_model::config::{generation_from_config, spec_from_config};
use ridge_model::spec::{ModelSpec, RopeScaling};
use serde_json::{Value, json};

fn spec(architecture: &str, fields: Value) -> Result<ModelSpec, String> {
    let mut config = json!({
        "architectures": [architecture],
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
        "vocab_size": 100, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    });
    for (key, value) in fields.as_object().expect("an object") {
        config[key] = value.clone();
    }
    spec_from_config(&config).map_err(|e| e.to_string())
}

#[test]
fn defaults_of_missing_fields() {
    let llama = spec("LlamaForCausalLM", json!({})).expect("valid");
    assert_eq!((llama.kv_heads, llama.head_dim, llama.tied_head, llama.rope.theta), (8, 8, false, 10_000.0));
    assert_eq!(llama.layer_specs.len(), 4);
    let wide = spec("Qwen3ForCausalLM", json!({"head_dim": 16, "num_key_value_heads": 2})).expect("valid");
    assert_eq!((wide.q_width(), wide.kv_width(), wide.rope.rotary_dim), (128, 32, 16));
    assert!(wide.layer_specs[0].attention.qk_norm);
}

#[test]
fn one_rope_in_two_spellings() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024});
    let v4 = spec("LlamaForCausalLM", json!({"rope_theta": 5e5, "rope_scaling": scaling})).expect("valid");
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(5e5);
    let v5 = spec("LlamaForCausalLM", json!({"rope_parameters": parameters})).expect("valid");
    assert_eq!(v4, v5);
    assert!(matches!(v4.rope.scaling, RopeScaling::Llama3 { original_context: 1024, .. }));
    let plain = spec("LlamaForCausalLM", json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}));
    assert_eq!(plain.expect("valid").rope.theta, 1e6);
    let old = spec("LlamaForCausalLM", json!({"rope_scaling": {"type": "linear", "factor": 4.0}})).expect("valid");
    assert_eq!((old.rope.scaling, old.context), (RopeScaling::Linear { factor: 4.0 }, 16384));
    let yarn = json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}});
    assert_eq!(spec("Qwen2ForCausalLM", yarn).expect("valid").context, 16384);
}

#[test]
fn windows_by_layer() {
    let windows = |architecture: &str, fields: Value| -> Vec<Option<usize>> {
        let spec = spec(architecture, fields).expect("valid");
        spec.layer_specs.iter().map(|l| l.attention.window).collect()
    };
    assert_eq!(windows("MistralForCausalLM", json!({"sliding_window": 32})), [Some(32); 4]);
    assert_eq!(windows("MistralForCausalLM", json!({"sliding_window": null})), [None; 4]);
    assert_eq!(windows("Qwen2ForCausalLM", json!({"sliding_window": 32, "use_sliding_window": false})), [None; 4]);
    let upper = json!({"sliding_window": 32, "use_sliding_window": true, "max_window_layers": 3});
    assert_eq!(windows("Qwen2ForCausalLM", upper), [None, None, None, Some(32)]);
    let kinds = json!({"sliding_window": 32, "use_sliding_window": true,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]});
    assert_eq!(windows("Qwen3ForCausalLM", kinds), [None, Some(32), None, Some(32)]);
}

#[test]
fn biases_by_architecture() {
    let biases = |architecture: &str, fields: Value| {
        let attention = spec(architecture, fields).expect("valid").layer_specs[0].attention.clone();
        (attention.qkv_bias, attention.out_bias)
    };
    assert_eq!(biases("LlamaForCausalLM", json!({})), (false, false));
    assert_eq!(biases("LlamaForCausalLM", json!({"attention_bias": true})), (true, true));
    assert_eq!(biases("Qwen2ForCausalLM", json!({})), (true, false));
    assert_eq!(biases("Qwen3ForCausalLM", json!({"attention_bias": false})), (false, false));
}

#[test]
fn what_is_refused_is_named() {
    let refused = |architecture: &str, fields: Value, part: &str| {
        let error = spec(architecture, fields).expect_err("is refused");
        assert!(error.contains(part), "{error} lacks {part}");
    };
    refused("MixtralForCausalLM", json!({}), "MixtralForCausalLM");
    refused("LlamaForCausalLM", json!({"mlp_bias": true}), "mlp_bias");
    refused("LlamaForCausalLM", json!({"quantization_config": {"quant_method": "awq"}}), "awq");
    refused("LlamaForCausalLM", json!({"hidden_act": "relu2"}), "relu2");
    refused("LlamaForCausalLM", json!({"num_key_value_heads": 3}), "share");
    refused("LlamaForCausalLM", json!({"hidden_size": -1}), "hidden_size");
    refused("LlamaForCausalLM", json!({"hidden_size": null}), "'hidden_size' is missing");
    refused("LlamaForCausalLM", json!({"num_hidden_layers": 1u64 << 60}), "num_hidden_layers");
    refused("LlamaForCausalLM", json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "low_freq_factor");
    refused("Qwen3ForCausalLM", json!({"layer_types": ["full_attention"]}), "layer_types");
}

#[test]
fn generation_defaults() {
    let config = json!({"eos_token_id": 7, "bos_token_id": 1});
    assert_eq!(generation_from_config(&Value::Null, &config).eos, [7]);
    let generation = json!({"eos_token_id": [8, 9], "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05});
    let both = generation_from_config(&generation, &config);
    assert_eq!((both.eos.as_slice(), both.bos, both.top_k), (&[8, 9][..], Some(1), Some(20)));
    assert_eq!((both.temperature, both.top_p), (Some(0.6), None));
}
