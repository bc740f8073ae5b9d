//! The trained test model in three formats, and folders with something wrong.

mod common;

use common::{load_path, shared};
use ridge_model::checkpoint::{Checkpoint, LoadError, ModelSource, TensorMap};
use ridge_model::detokenize::StreamDecoder;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

const TEXTS: [&str; 8] =
    ["", " ", "Once upon a time", "  two  spaces ", "Füßchen 你好 🙂", "a\n\tb", "</s>x", "it's 3.14"];

fn same_tensors(a: &TensorMap, b: &TensorMap) {
    let names = |map: &TensorMap| map.iter().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
    assert_eq!(names(a), names(b));
    for (name, tensor) in a.iter() {
        let other = b.get(name).expect("same names");
        assert_eq!((tensor.rows, tensor.cols), (other.rows, other.cols), "{name}");
        assert_eq!(tensor.to_f32(), other.to_f32(), "{name}");
    }
}

#[test]
fn stories_is_one_model_in_three_formats() {
    let (Some(folder), Some(bins)) = (shared("models/stories260K-hf"), shared("models/stories260K")) else { return };
    let hf = load_path(&folder).expect("the folder loads");
    assert_eq!(hf.name, "stories260K-hf");
    assert_eq!((hf.spec.layers, hf.spec.kv_heads, hf.spec.vocab, hf.spec.tied_head), (5, 4, 512, true));
    assert_eq!((hf.generation.eos.as_slice(), hf.generation.bos), (&[2, 1][..], Some(1)));
    assert!(hf.template.is_none());
    for name in ["stories260K.bin", "stories260K_v1.bin"] {
        let bin = load_path(&bins.join(name)).expect("the file loads");
        same_tensors(&hf.tensors, &bin.tensors);
        assert_eq!(hf.spec.canonical(), bin.spec.canonical());
        assert_eq!(hf.config_digest, bin.config_digest);
        assert_eq!(hf.weights_digest, bin.weights_digest);
        assert_eq!(hf.tokenizer_digest, bin.tokenizer_digest);
        for text in TEXTS {
            let ids = hf.tokenizer.encode(text, true).expect("encodes");
            assert_eq!(ids, bin.tokenizer.encode(text, true).expect("encodes"), "{text:?}");
        }
    }
}

#[test]
fn stories_tokens_equal_the_published_ones() {
    let Some(folder) = shared("models/stories260K-hf") else { return };
    let Some(golden) = shared("models/stories260K/golden_greedy.json") else { return };
    let checkpoint = load_path(&folder).expect("loads");
    let golden: Value = serde_json::from_slice(&std::fs::read(golden).expect("readable")).expect("JSON");
    let cases = golden["cases"].as_array().or(golden.as_array()).expect("cases");
    let mut checked = 0;
    for case in cases {
        let (Some(prompt), Some(ids)) = (case["prompt"].as_str(), case["prompt_ids"].as_array()) else { continue };
        let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect();
        assert_eq!(checkpoint.tokenizer.encode(prompt, true).expect("encodes"), ids, "{prompt:?}");
        checked += 1;
    }
    println!("{checked} of {} prompts", cases.len());
}

/// Our table of bytes against the library's own decoder.
#[test]
fn decoding_equals_the_library() {
    let Some(folder) = shared("models/stories260K-hf") else { return };
    let checkpoint = load_path(&folder).expect("loads");
    let library = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).expect("the library reads it");
    for text in TEXTS {
        for add_special in [false, true] {
            let ids = checkpoint.tokenizer.encode(text, add_special).expect("encodes");
            assert_eq!(ids, library.encode(text, add_special).expect("encodes").get_ids(), "{text:?}");
            for skip in [false, true] {
                let ours = checkpoint.tokenizer.decode(&ids, skip);
                assert_eq!(ours, library.decode(&ids, skip).expect("decodes"), "{text:?}");
                assert_eq!(streamed(&checkpoint, &ids, skip), ours, "{text:?}");
            }
        }
    }
}

fn streamed(checkpoint: &Checkpoint, ids: &[u32], skip: bool) -> String {
    let mut decoder = StreamDecoder::new(&Arc::clone(&checkpoint.tokenizer), skip);
    let mut text: String = ids.iter().filter_map(|&id| decoder.push(id)).collect();
    text.extend(decoder.flush());
    text
}

#[test]
fn a_continuation_keeps_its_leading_space() {
    let Some(folder) = shared("models/stories260K-hf") else { return };
    let checkpoint = load_path(&folder).expect("loads");
    let prompt = checkpoint.tokenizer.encode("Once upon", true).expect("encodes");
    let whole = checkpoint.tokenizer.encode("Once upon a time", true).expect("encodes");
    let mut decoder = StreamDecoder::after(&checkpoint.tokenizer, true, &prompt);
    let text: String = whole[prompt.len()..].iter().filter_map(|&id| decoder.push(id)).collect();
    assert_eq!(text, " a time");
}

/// A folder with the stories model, to be broken.
fn copy() -> Option<tempfile::TempDir> {
    let from = shared("models/stories260K-hf")?;
    let folder = tempfile::tempdir().expect("a temporary folder");
    for file in std::fs::read_dir(from).expect("readable") {
        let file = file.expect("entry").path();
        let to = folder.path().join(file.file_name().expect("name"));
        std::fs::write(to, std::fs::read(&file).expect("readable")).expect("writes");
    }
    Some(folder)
}

fn edit_config(folder: &Path, edit: impl Fn(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("JSON");
    edit(&mut config);
    std::fs::write(path, config.to_string()).expect("writes");
}

#[track_caller]
fn check_refused(folder: &Path, parts: &[&str]) {
    let text = load_path(folder).expect_err("is refused").to_string();
    parts.iter().for_each(|part| assert!(text.contains(part), "{text:?} lacks {part:?}"));
}

#[test]
fn folders_with_something_wrong() {
    let Some(folder) = copy() else { return };
    let folder = folder.path();
    edit_config(folder, |c| c["architectures"] = json!(["GPT2LMHeadModel"]));
    check_refused(folder, &["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]);
    edit_config(folder, |c| {
        c["architectures"] = json!(["LlamaForCausalLM"]);
        c["intermediate_size"] = json!(176);
    });
    check_refused(folder, &["layers.0.w_gate", "[172, 64]", "[176, 64]"]);
    edit_config(folder, |c| {
        c["intermediate_size"] = json!(172);
        c["num_hidden_layers"] = json!(6);
    });
    check_refused(folder, &["layers.5.attn_norm", "model.layers.5.input_layernorm.weight"]);
    edit_config(folder, |c| {
        c["num_hidden_layers"] = json!(5);
        c["rope_scaling"] = json!({"rope_type": "longrope"});
    });
    check_refused(folder, &["longrope", "yarn"]);
    edit_config(folder, |c| c["rope_scaling"] = json!(null));
    std::fs::write(folder.join("chat_template.jinja"), "{% if %}").expect("writes");
    check_refused(folder, &["chat template"]);
    std::fs::write(folder.join("chat_template.jinja"), "{{ bos_token }}{{ messages[0].content }}").expect("writes");
    let checkpoint = load_path(folder).expect("loads");
    let template = checkpoint.template.expect("has a template");
    assert_eq!(template.render(&json!([{"content": "x"}]), &Default::default()).as_deref(), Ok("<s>x"));
    std::fs::remove_file(folder.join("tokenizer.json")).expect("removes");
    check_refused(folder, &["tokenizer.json"]);
    let weights = std::fs::read(folder.join("model.safetensors")).expect("readable");
    std::fs::write(folder.join("model.safetensors"), &weights[..weights.len() / 2]).expect("writes");
    check_refused(folder, &["model.safetensors"]);
    std::fs::remove_file(folder.join("model.safetensors")).expect("removes");
    check_refused(folder, &["model.safetensors", "pytorch_model.bin"]);
}

#[test]
fn shards_follow_an_index_that_stays_in_the_folder() {
    let Some(folder) = copy() else { return };
    let folder = folder.path();
    let single = load_path(folder).expect("loads");
    let bytes = std::fs::read(folder.join("model.safetensors")).expect("readable");
    std::fs::remove_file(folder.join("model.safetensors")).expect("removes");
    let whole = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
    let mut map = serde_json::Map::new();
    for (index, half) in [0, 1].iter().enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", index + 1);
        let part: Vec<_> =
            whole.tensors().into_iter().enumerate().filter(|(i, _)| i % 2 == *half).map(|(_, t)| t).collect();
        part.iter().for_each(|(name, _)| drop(map.insert(name.clone(), json!(file))));
        let metadata: Option<HashMap<String, String>> = None;
        safetensors::serialize_to_file(part, metadata, &folder.join(file)).expect("writes");
    }
    let write_index = |map: Value| {
        std::fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string())
            .expect("writes");
    };
    write_index(Value::Object(map.clone()));
    let sharded = load_path(folder).expect("loads");
    same_tensors(&single.tensors, &sharded.tensors);
    assert_eq!(single.weights_digest, sharded.weights_digest);
    for evil in ["../other/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin"] {
        let mut map = map.clone();
        map.insert("lm_head.weight".into(), json!(evil));
        write_index(Value::Object(map));
        check_refused(folder, &[evil, "not the name of a shard"]);
    }
    map.insert("lm_head.weight".into(), json!("model-00003-of-00003.safetensors"));
    write_index(Value::Object(map));
    check_refused(folder, &["model-00003-of-00003.safetensors"]);
}

#[test]
fn sources_are_recognised() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = |name: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, "").expect("writes");
        path.display().to_string()
    };
    assert!(matches!(ModelSource::parse(&folder.path().display().to_string()), Ok(ModelSource::Folder(_))));
    assert!(matches!(ModelSource::parse(&file("a.gguf")), Ok(ModelSource::Gguf(_))));
    assert!(matches!(ModelSource::parse(&file("a.bin")), Ok(ModelSource::Llama2c(_))));
    assert_eq!(ModelSource::parse("org/name@v1"), Ok(ModelSource::Hub("org/name@v1".into())));
    for (bad, part) in [
        (file("a.safetensors"), "name its folder"),
        ("/nowhere/at/all".into(), "repository id"),
        ("x".into(), "org/name"),
    ] {
        let Err(LoadError::NotFound { tried, .. }) = ModelSource::parse(&bad) else { panic!("{bad} is refused") };
        assert!(tried.contains(part), "{tried}");
    }
}
