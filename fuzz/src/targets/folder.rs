//! A folder of one small model's files, of which a target damages one.

use ridge_kernels::{Cpu, KvDtype, KvFormat};
use ridge_model::checkpoint::{Checkpoint, LoadError, LoadOptions, ModelSource, load};
use ridge_model::detokenize::StreamDecoder;
use ridge_model::engine::CpuEngine;
use ridge_model::generate::generate;
use ridge_model::kv::KvMemory;
use ridge_model::template::{ChatTemplate, RenderOptions};
use ridge_model::tokenizer::{EncodeOptions, Tokenizer};
use ridge_protocol::{Grammar, GrammarKind, SamplingParams};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

/// Tokens of the model: bytes `a` to `z` and a few more.
pub(super) const VOCAB: usize = 40;
const BLOCK_SIZE: usize = 4;
/// Text that a damaged tokenizer is tried on.
const TEXTS: [&str; 4] = ["", " ab <s> 12\n\n3é😀\u{2581}x", "<|im_start|>aa bb", "\u{0}\u{301}\u{200d}"];

/// `config.json` of the model.
pub(super) fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3]
    })
}

/// Name, rows and columns of each stored tensor; a vector has no rows.
pub(super) const TENSORS: [(&str, &[usize]); 11] = [
    ("model.embed_tokens.weight", &[VOCAB, 8]),
    ("model.norm.weight", &[8]),
    ("model.layers.0.input_layernorm.weight", &[8]),
    ("model.layers.0.post_attention_layernorm.weight", &[8]),
    ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
    ("model.layers.0.self_attn.k_proj.weight", &[4, 8]),
    ("model.layers.0.self_attn.v_proj.weight", &[4, 8]),
    ("model.layers.0.self_attn.o_proj.weight", &[8, 8]),
    ("model.layers.0.mlp.gate_proj.weight", &[8, 8]),
    ("model.layers.0.mlp.up_proj.weight", &[8, 8]),
    ("model.layers.0.mlp.down_proj.weight", &[8, 8]),
];

/// The header of `model.safetensors`, and how many bytes follow it.
pub(super) fn safetensors_header() -> (Value, usize) {
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in TENSORS {
        let end = at + 4 * shape.iter().product::<usize>();
        header.insert(name.to_owned(), json!({"dtype": "F32", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    (Value::Object(header), at)
}

/// A safetensors file with this header.
pub(super) fn safetensors(header: &[u8], data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(file.len() + data, 0x3c);
    file
}

/// `tokenizer.json`: byte-level BPE, as Llama 3 and Qwen have it.
pub(super) fn byte_level() -> Value {
    let mut vocab: serde_json::Map<String, Value> = serde_json::Map::new();
    let letters = (b'a'..=b'z').map(|byte| char::from(byte).to_string());
    let special = ["<unk>", "<s>", "</s>", "<|im_end|>", "Ġ", "Ċ", "1", "ab", "Ġab"].map(String::from);
    for (id, text) in special.into_iter().chain(letters).enumerate() {
        vocab.insert(text, id.into());
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [
            {"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 3, "content": "<|im_end|>", "single_word": true, "lstrip": true, "rstrip": true, "normalized": true, "special": true}
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "'s|\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
        ]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocab, "merges": [["a", "b"], ["Ġ", "ab"]]}
    })
}

/// `tokenizer.json`: BPE with spaces as U+2581 and bytes as `<0x..>`, as Llama 2 and Mistral have it.
pub(super) fn spaces() -> Value {
    let texts = ["<unk>", "<s>", "</s>", "<0x0A>", "<0x20>", "<0xC3>", "\u{2581}", "a", "b", "ab", "\u{2581}ab"];
    let vocab: serde_json::Map<String, Value> =
        texts.iter().enumerate().map(|(id, text)| ((*text).to_owned(), id.into())).collect();
    json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}
        ]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": true},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        ]},
        "model": {"type": "BPE", "dropout": 0.0, "unk_token": "<unk>", "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": ["a b", "\u{2581} ab"]}
    })
}

/// `tokenizer.json`: kinds that are read through the library alone.
pub(super) fn other_tokenizers() -> [Value; 3] {
    let added = json!([{"id": 0, "content": "[UNK]", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": true, "special": true}]);
    [
        json!({"version": "1.0", "added_tokens": added,
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": true, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "b": 2, "##b": 3}}}),
        json!({"version": "1.0", "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Strip", "strip_left": true, "strip_right": true},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, {"type": "Nmt"}, {"type": "Lowercase"}]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": false},
                {"type": "FixedLength", "length": 5}, {"type": "Digits", "individual_digits": true},
                {"type": "Punctuation", "behavior": "Contiguous"}, {"type": "CharDelimiterSplit", "delimiter": "x"}]},
            "post_processor": {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2], "trim_offsets": true, "add_prefix_space": true},
            "decoder": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true},
            "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": true,
                "vocab": [["[UNK]", 0.0], ["a", -1.5], ["\u{2581}", -2.0], ["<0x41>", -3.0], ["\u{2581}ab", -1.0]]}}),
        json!({"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFKD"},
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": {"type": "ByteLevel", "trim_offsets": true, "add_prefix_space": true},
            "decoder": {"type": "Sequence", "decoders": [{"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": true},
                {"type": "BPEDecoder", "suffix": "</w>"}]},
            "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1, "b": 2}}}),
    ]
}

/// `tokenizer_config.json`.
pub(super) fn tokenizer_config() -> Value {
    json!({
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    })
}

/// A folder with all of the model's files.
pub(super) struct Folder(TempDir);

impl Folder {
    pub(super) fn new() -> Self {
        let folder = Self(tempfile::tempdir().expect("a temporary folder"));
        let (header, data) = safetensors_header();
        for (file, json) in [
            ("config.json", config()),
            ("tokenizer.json", byte_level()),
            ("tokenizer_config.json", tokenizer_config()),
            ("generation_config.json", json!({"eos_token_id": [2], "temperature": 0.6, "top_p": 0.9, "top_k": 50})),
        ] {
            folder.write(file, json.to_string().as_bytes());
        }
        folder.write("model.safetensors", &safetensors(header.to_string().as_bytes(), data));
        folder
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    pub(super) fn write(&self, file: &str, bytes: &[u8]) {
        // Another inode, because an earlier one may still be mapped.
        let fresh = self.path("fresh");
        std::fs::write(&fresh, bytes).expect("the temporary folder takes files");
        std::fs::rename(&fresh, self.path(file)).expect("and lets them be renamed");
    }

    /// Loads the model with `bytes` in place of `file`, and uses what comes of it.
    pub(super) fn try_with(&self, file: &str, bytes: &[u8]) {
        self.write(file, bytes);
        if let Ok(checkpoint) = self.load(ModelSource::Folder(self.0.path().to_owned())) {
            use_checkpoint(&checkpoint);
        }
    }

    pub(super) fn load(&self, source: ModelSource) -> Result<Checkpoint, LoadError> {
        load(&source, &LoadOptions { download: false, ..LoadOptions::default() }, &mut |_| {})
    }
}

/// What a router and a node do with a checkpoint before the first request, and with a request's text.
pub(super) fn use_checkpoint(checkpoint: &Checkpoint) {
    use_tokenizer(&checkpoint.tokenizer);
    use_engine(checkpoint);
    if let Some(template) = &checkpoint.template {
        use_template(template);
    }
}

/// Answers a prompt of a few tokens.
fn use_engine(checkpoint: &Checkpoint) {
    let spec = &checkpoint.spec;
    let format =
        KvFormat { dtype: KvDtype::F32, kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size: BLOCK_SIZE };
    let Ok(kv) = KvMemory::new(format, spec.layers, 4) else { return };
    let Ok(mut engine) = CpuEngine::new(checkpoint, Arc::new(kv), Cpu::new(1, None), None) else { return };
    // A context that is too short is refused.
    let greedy = SamplingParams::greedy(3);
    let _ = generate(&mut engine, &[1, 2, 3], &greedy, BLOCK_SIZE, 64, &mut |_| true);
    let grammar = Some(Box::new(Grammar { kind: GrammarKind::Regex, text: "[a-z ]+".into() }));
    let constrained = SamplingParams { grammar, ..greedy };
    let _ = generate(&mut engine, &[1, 2, 3], &constrained, BLOCK_SIZE, 64, &mut |_| true);
}

pub(super) fn use_tokenizer(tokenizer: &Arc<Tokenizer>) {
    for text in TEXTS {
        for (add_special, parse_special) in [(true, true), (false, false)] {
            let Ok(ids) = tokenizer.encode_with(text, EncodeOptions { add_special, parse_special }) else { continue };
            let whole = tokenizer.decode(&ids, false);
            let mut stream = StreamDecoder::new(tokenizer, false);
            let mut text: String = ids.iter().filter_map(|id| stream.push(*id)).collect();
            text.extend(stream.flush());
            drop((whole, text));
        }
    }
    for id in (0..VOCAB as u32 + 3).chain([u32::MAX]) {
        tokenizer.token_bytes(id);
    }
}

pub(super) fn use_template(template: &ChatTemplate) {
    let messages = json!([
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "a <b> é"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, null]}}}]},
        {"role": "tool", "content": "4"}
    ]);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    for tools in [None, Some(&tools)] {
        let options = RenderOptions { add_generation_prompt: true, tools, ..RenderOptions::default() };
        // A refusal is as good as a prompt.
        let _ = template.render(&messages, &options);
    }
}
