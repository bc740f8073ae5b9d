//! A model's files: the folder's, GGUF, llama2.c, and the packed weights that Ridge keeps itself.

use super::folder::{self, Folder, TENSORS, VOCAB};
use ridge_kernels::{Cpu, DType};
use ridge_model::checkpoint::{ModelSource, Tensor};
use ridge_model::packed::Builder;
use ridge_model::template::ChatTemplate;
use serde_json::{Value, json};

/// A target that loads the folder with its input in place of one file.
macro_rules! file {
    ($target:ident, $file:literal) => {
        pub(super) fn $target(bytes: &[u8]) {
            thread_local!(static FOLDER: Folder = Folder::new());
            FOLDER.with(|folder| folder.try_with($file, bytes));
        }
    };
}

file!(config, "config.json");
file!(tokenizer, "tokenizer.json");
file!(tokenizer_config, "tokenizer_config.json");
file!(generation_config, "generation_config.json");
file!(safetensors, "model.safetensors");

/// The JSON header of a safetensors file, whose length before it is right.
pub(super) fn safetensors_header(bytes: &[u8]) {
    safetensors(&folder::safetensors(bytes, folder::safetensors_header().1));
}

/// The list of shards.
pub(super) fn shard_index(bytes: &[u8]) {
    thread_local!(static FOLDER: Folder = {
        let folder = Folder::new();
        let shard = "model-00001-of-00001.safetensors";
        std::fs::rename(folder.path("model.safetensors"), folder.path(shard)).expect("renames");
        folder
    });
    FOLDER.with(|folder| folder.try_with("model.safetensors.index.json", bytes));
}

pub(super) fn gguf(bytes: &[u8]) {
    thread_local!(static FOLDER: Folder = Folder::new());
    FOLDER.with(|folder| {
        folder.write("model.gguf", bytes);
        if let Ok(checkpoint) = folder.load(ModelSource::Gguf(folder.path("model.gguf"))) {
            folder::use_checkpoint(&checkpoint);
        }
    });
}

/// The metadata of a GGUF file as JSON, before the same tensors always.
pub(super) fn gguf_metadata(bytes: &[u8]) {
    if let Ok(Value::Object(metadata)) = serde_json::from_slice(bytes) {
        gguf(&gguf_file(&Value::Object(metadata)));
    }
}

pub(super) fn llama2c(bytes: &[u8]) {
    thread_local!(static FOLDER: Folder = {
        let folder = Folder::new();
        folder.write("tokenizer.bin", &llama2c_tokenizer_file());
        folder
    });
    FOLDER.with(|folder| {
        folder.write("model.bin", bytes);
        if let Ok(checkpoint) = folder.load(ModelSource::Llama2c(folder.path("model.bin"))) {
            folder::use_checkpoint(&checkpoint);
        }
    });
}

pub(super) fn llama2c_tokenizer(bytes: &[u8]) {
    thread_local!(static FOLDER: Folder = {
        let folder = Folder::new();
        folder.write("model.bin", &llama2c_file(true));
        folder
    });
    FOLDER.with(|folder| {
        folder.write("tokenizer.bin", bytes);
        if let Ok(checkpoint) = folder.load(ModelSource::Llama2c(folder.path("model.bin"))) {
            folder::use_checkpoint(&checkpoint);
        }
    });
}

/// The file of packed weights, which any process of the same user can have damaged.
pub(super) fn packed(bytes: &[u8]) {
    thread_local!(static STATE: (Cpu, Folder) = (Cpu::new(1, None), Folder::new()));
    STATE.with(|(cpu, folder)| {
        let builder = packed_builder();
        let file = builder.in_file(&[7; 32], &[], cpu, &folder.path("packed")).expect("there is space");
        let whole = file.bytes().len();
        folder.write("damaged", bytes);
        std::fs::rename(folder.path("damaged"), file.path()).expect("renames");
        // Found whole or packed again: in either case there is a file of the right size.
        let file = builder.in_file(&[7; 32], &[], cpu, &folder.path("packed")).expect("packs again");
        assert_eq!(file.bytes().len(), whole);
        std::fs::remove_file(file.path()).expect("removable");
    });
}

pub(super) fn template(bytes: &[u8]) {
    let source = String::from_utf8_lossy(bytes);
    if let Ok(template) = ChatTemplate::new(&source, "<s>", "</s>") {
        folder::use_template(&template);
    }
}

fn packed_builder() -> Builder {
    let mut builder = Builder::default();
    builder.matrix(Tensor::owned(DType::F32, 70, 32, vec![1; 70 * 32 * 4]).expect("four bytes each"));
    builder
}

fn bytes_of(json: &Value) -> Vec<u8> {
    json.to_string().into_bytes()
}

pub(super) fn config_seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![folder::config()];
    let scalings = [
        json!({"rope_type": "linear", "factor": 2.0}),
        json!({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}),
        json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}),
    ];
    for scaling in scalings {
        let mut config = folder::config();
        config["rope_scaling"] = scaling;
        seeds.push(config);
    }
    let mut windows = folder::config();
    windows["architectures"] = json!(["MistralForCausalLM"]);
    windows["sliding_window"] = json!(16);
    windows["layer_types"] = json!(["sliding_attention"]);
    seeds.push(windows);
    let mut qwen = folder::config();
    qwen["architectures"] = json!(["Qwen3ForCausalLM"]);
    qwen["use_sliding_window"] = json!(true);
    qwen["max_window_layers"] = json!(0);
    qwen["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5});
    seeds.push(qwen);
    seeds.iter().map(bytes_of).collect()
}

pub(super) fn tokenizer_seeds() -> Vec<Vec<u8>> {
    let seeds = [folder::byte_level(), folder::spaces()];
    seeds.iter().chain(&folder::other_tokenizers()).map(bytes_of).collect()
}

pub(super) fn tokenizer_config_seeds() -> Vec<Vec<u8>> {
    let mut named = folder::tokenizer_config();
    named["chat_template"] = json!([{"name": "default", "template": "{{ messages[0].content }}"}]);
    vec![bytes_of(&folder::tokenizer_config()), bytes_of(&named)]
}

pub(super) fn generation_config_seeds() -> Vec<Vec<u8>> {
    let config = json!({"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "top_k": 50,
        "repetition_penalty": 1.1});
    vec![bytes_of(&config)]
}

pub(super) fn safetensors_seeds() -> Vec<Vec<u8>> {
    let (header, data) = folder::safetensors_header();
    vec![folder::safetensors(&bytes_of(&header), data)]
}

pub(super) fn safetensors_header_seeds() -> Vec<Vec<u8>> {
    vec![bytes_of(&folder::safetensors_header().0)]
}

pub(super) fn shard_index_seeds() -> Vec<Vec<u8>> {
    let shard = "model-00001-of-00001.safetensors";
    let map: serde_json::Map<String, Value> =
        TENSORS.iter().map(|(name, _)| ((*name).to_owned(), shard.into())).collect();
    vec![bytes_of(&json!({"metadata": {"total_size": 1}, "weight_map": map}))]
}

pub(super) fn gguf_metadata_seeds() -> Vec<Vec<u8>> {
    let base = json!({
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.embedding_length": 8,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": [1],
        "llama.context_length": 64,
        "llama.block_count": 1,
        "llama.feed_forward_length": 8,
        "llama.rope.freq_base": 10000.5,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": true,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    });
    let mut spm = base.clone();
    spm["tokenizer.ggml.model"] = json!("llama");
    spm["tokenizer.ggml.tokens"] =
        json!(["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "\u{2581}", "a", "b", "ab", "\u{2581}ab"]);
    spm["tokenizer.ggml.scores"] = json!([0.5, 0.5, 0.5, -9.5, -9.5, -5.5, -3.5, -3.5, -2.5, -1.5]);
    spm["tokenizer.ggml.token_type"] = json!([2, 3, 3, 6, 6, 1, 1, 1, 1, 4]);
    spm["tokenizer.ggml.add_space_prefix"] = json!(true);
    let mut bpe = base;
    bpe["tokenizer.ggml.model"] = json!("gpt2");
    bpe["tokenizer.ggml.pre"] = json!("llama-bpe");
    bpe["tokenizer.ggml.tokens"] = json!(["<unk>", "<s>", "</s>", "Ġ", "Ċ", "a", "b", "ab", "Ġab", "1"]);
    bpe["tokenizer.ggml.token_type"] = json!([1, 3, 3, 1, 1, 1, 1, 1, 1, 4]);
    bpe["tokenizer.ggml.merges"] = json!(["a b", "Ġ ab"]);
    vec![bytes_of(&spm), bytes_of(&bpe)]
}

pub(super) fn gguf_seeds() -> Vec<Vec<u8>> {
    let metadata = gguf_metadata_seeds();
    metadata.iter().map(|json| gguf_file(&serde_json::from_slice(json).expect("just written"))).collect()
}

/// A GGUF file with this metadata and the model's tensors.
fn gguf_file(metadata: &Value) -> Vec<u8> {
    const NAMES: [&str; 11] = [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.attn_v.weight",
        "blk.0.attn_output.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.ffn_up.weight",
        "blk.0.ffn_down.weight",
    ];
    let tokens = metadata["tokenizer.ggml.tokens"].as_array().map_or(VOCAB, Vec::len);
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((TENSORS.len() as u64).to_le_bytes());
    let entries = metadata.as_object().into_iter().flatten();
    out.extend((entries.clone().count() as u64).to_le_bytes());
    for (key, value) in entries {
        gguf_string(&mut out, key);
        gguf_value(&mut out, value);
    }
    let mut offset = 0u64;
    for ((_, shape), name) in TENSORS.iter().zip(NAMES) {
        // The vocabulary is as long as the tokenizer says.
        let shape: Vec<usize> = shape.iter().map(|n| if *n == VOCAB { tokens } else { *n }).collect();
        gguf_string(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|n| out.extend((*n as u64).to_le_bytes()));
        out.extend(0u32.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (4 * shape.iter().product::<usize>()).next_multiple_of(32) as u64;
    }
    out.resize(out.len().next_multiple_of(32) + offset as usize, 0x3c);
    out
}

fn gguf_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Type and value. An array has the type of its first element, and whatever else is in it spoils it.
fn gguf_value(out: &mut Vec<u8>, value: &Value) {
    out.extend(gguf_type(value).to_le_bytes());
    gguf_bare_value(out, value);
}

fn gguf_type(value: &Value) -> u32 {
    match value {
        Value::Null => 99,
        Value::Bool(_) => 7,
        Value::Number(n) if n.is_u64() => 10,
        Value::Number(n) if n.is_i64() => 11,
        Value::Number(_) => 12,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::Object(_) => 13,
    }
}

fn gguf_bare_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Null | Value::Object(_) => {}
        Value::Bool(bit) => out.push(u8::from(*bit)),
        Value::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
            (Some(n), _, _) => out.extend(n.to_le_bytes()),
            (_, Some(n), _) => out.extend(n.to_le_bytes()),
            (_, _, x) => out.extend(x.unwrap_or_default().to_le_bytes()),
        },
        Value::String(text) => gguf_string(out, text),
        Value::Array(items) => {
            out.extend(items.first().map_or(0, gguf_type).to_le_bytes());
            out.extend((items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| gguf_bare_value(out, item));
        }
    }
}

/// A llama2.c file, with the legacy header or that of version 1.
fn llama2c_file(legacy: bool) -> Vec<u8> {
    let sizes = [8, 8, 1, 2, 1, VOCAB as i32, 64];
    let mut out = Vec::new();
    if legacy {
        sizes.iter().for_each(|n| out.extend(n.to_le_bytes()));
    } else {
        out.extend(0x616b_3432u32.to_le_bytes());
        out.extend(1i32.to_le_bytes());
        sizes.iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.push(1);
        out.resize(256, 0);
    }
    let values: usize = TENSORS.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    // The legacy layout has two tables of rotations before its end.
    out.resize(out.len() + 4 * (values + 64 * 4), 0x3c);
    out
}

fn llama2c_tokenizer_file() -> Vec<u8> {
    let mut out = 8u32.to_le_bytes().to_vec();
    for id in 0..VOCAB {
        let text = match id {
            0 => "<unk>".to_owned(),
            1 => "\n<s>\n".to_owned(),
            2 => "\n</s>\n".to_owned(),
            3 => "<0x0A>".to_owned(),
            4 => " a".to_owned(),
            other => char::from(b'a' + (other % 26) as u8).to_string().repeat(1 + other / 26),
        };
        out.extend((-(id as f32)).to_le_bytes());
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    }
    out
}

pub(super) fn llama2c_seeds() -> Vec<Vec<u8>> {
    vec![llama2c_file(true), llama2c_file(false)]
}

pub(super) fn llama2c_tokenizer_seeds() -> Vec<Vec<u8>> {
    vec![llama2c_tokenizer_file()]
}

pub(super) fn packed_seeds() -> Vec<Vec<u8>> {
    let (cpu, folder) = (Cpu::new(1, None), Folder::new());
    let file = packed_builder().in_file(&[7; 32], &[], &cpu, &folder.path("packed")).expect("there is space");
    vec![file.bytes().to_vec()]
}

/// Words of templates, and what is dear: loops, repetition, recursion, formatting.
pub(super) const TEMPLATE_WORDS: [&str; 44] = [
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "{%- ",
    " -%}",
    "{#",
    "#}",
    "for m in messages",
    "endfor",
    "if m.role == 'user'",
    "else",
    "endif",
    "set x = ",
    "messages",
    "tools",
    "loop.index0",
    "namespace(a='')",
    "ns.a",
    "macro f(n)",
    "endmacro",
    "f(n + 1)",
    "| tojson",
    "| tojson(indent=9999999)",
    "| indent(99999999)",
    "| trim",
    "| length",
    "range(99999999)",
    "* 99999999999",
    "~ x",
    "'%s' % x",
    "[::-1]",
    "[:1:0]",
    ".split('')",
    ".replace('', 'x')",
    "strftime_now('%Y%9999d')",
    "raise_exception('no')",
    "{% generation %}",
    "| join(x)",
    "9223372036854775807",
    "99999999999",
    "| format(m)",
    ".format(x)",
    "| list",
];

pub(super) fn template_seeds() -> Vec<Vec<u8>> {
    [
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim }}\n{% endfor %}",
        "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% set ns = namespace(a='') %}{% for m in messages[::-1] %}\
         {% set ns.a = ns.a ~ m.content %}{% endfor %}{{ ns.a | indent(4) }}",
        "{% macro f(n) %}{{ n }}{% endmacro %}{% for i in range(3) %}{{ f(i) }}{% endfor %}{{ strftime_now('%Y') }}",
        "{{ '%5d %s' | format(3, 'x') }}{{ '{:>5} {a}'.format(1, a=2) }}{{ ('ab' * 3) | upper }}{{ [1, 2] | join('-') }}",
        "{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}{{ c.function.arguments | items | list }}\
         {% endfor %}{% elif m.content is string %}{{ m.content.split('a')[-1].strip() }}{% endif %}{% endfor %}",
    ]
    .map(|source| source.as_bytes().to_vec())
    .to_vec()
}
