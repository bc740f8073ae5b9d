//! `tokenizer.json` decoders: ours against the library's, and streams against whole texts.

use ridge_model::detokenize::StreamDecoder;
use ridge_model::tokenizer::{EncodeOptions, Tokenizer};
use serde_json::{Value, json};
use std::sync::Arc;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// A byte-level vocabulary: 256 bytes, a merge, a control token, a user-defined token outside the byte alphabet.
fn vocabulary(decoder: Value) -> Value {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocab: serde_json::Map<String, Value> =
        alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    vocab.insert("ab".into(), json!(256));
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special})
    };
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [added(257, "<|end|>", true), added(258, "｜工具｜", false)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
            "merges": [["a", "b"]]},
    })
}

fn build(json: &Value) -> (Arc<Tokenizer>, tokenizers::Tokenizer) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).expect("writes");
    let config = json!({"eos_token": {"content": "<|end|>"}, "bos_token": null});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).expect("writes");
    let library = tokenizers::Tokenizer::from_bytes(json.to_string()).expect("the library reads it");
    (Arc::new(Tokenizer::from_hf_folder(folder.path()).expect("reads")), library)
}

fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip: bool) -> String {
    let mut decoder = StreamDecoder::new(tokenizer, skip);
    let mut text = String::new();
    for &id in ids {
        text.extend(decoder.push(id));
    }
    text.extend(decoder.flush());
    text
}

#[test]
fn byte_level_equals_the_library() {
    let (tokenizer, library) = build(&vocabulary(json!({"type": "ByteLevel", "add_prefix_space": true,
        "trim_offsets": true, "use_regex": true})));
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()), (259, None, Some(257)));
    assert_eq!(tokenizer.token_bytes(256), b"ab");
    assert!(tokenizer.is_special(257) && !tokenizer.is_special(258));
    // Any ids at all, valid UTF-8 or not: the same text.
    let mut state = 7u32;
    for _ in 0..2000 {
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 16) % 259
        };
        let ids: Vec<u32> = (0..next() % 12).map(|_| next()).collect();
        for skip in [false, true] {
            let expected = library.decode(&ids, skip).expect("decodes");
            assert_eq!(tokenizer.decode(&ids, skip), expected, "{ids:?}");
            assert_eq!(streamed(&tokenizer, &ids, skip), expected, "{ids:?}");
        }
    }
}

#[test]
fn special_tokens_are_parsed_when_asked_and_nothing_is_truncated() {
    let (tokenizer, _) = build(&vocabulary(json!({"type": "ByteLevel", "add_prefix_space": true,
        "trim_offsets": true, "use_regex": true})));
    assert_eq!(tokenizer.encode("ab<|end|>｜工具｜", true).expect("encodes"), [256, 257, 258]);
    let plain = EncodeOptions { add_special: false, parse_special: false };
    let ids = tokenizer.encode_with("<|end|>abababab", plain).expect("encodes");
    assert!(!ids.contains(&257));
    assert_eq!(tokenizer.decode(&ids, true), "<|end|>abababab");
}

#[test]
fn decoders_that_look_at_neighbours_are_streamed_by_windows() {
    let (tokenizer, library) = build(&vocabulary(json!({"type": "WordPiece", "prefix": "##", "cleanup": true})));
    let ids: Vec<u32> = (60..90).chain([256, 257, 258, 11]).collect();
    for skip in [false, true] {
        let expected = library.decode(&ids, skip).expect("decodes");
        assert_eq!(tokenizer.decode(&ids, skip), expected);
        assert_eq!(streamed(&tokenizer, &ids, skip), expected);
    }
}

#[test]
fn an_absurd_id_is_refused() {
    let mut json =
        vocabulary(json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}));
    json["model"]["vocab"]["zz"] = json!(u32::MAX - 1);
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).expect("writes");
    let error = Tokenizer::from_hf_folder(folder.path()).expect_err("is refused").to_string();
    assert!(error.contains("4294967294"), "{error}");
}

/// Found by fuzzing: the library panics on these.
#[test]
fn rules_that_the_library_cannot_apply_are_errors_and_no_panics() {
    let byte_level = || json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let reading = |json: &Value| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).expect("writes");
        Tokenizer::from_hf_folder(folder.path())
    };
    let mut prefix = vocabulary(byte_level());
    prefix["model"]["continuing_subword_prefix"] = json!("longer than b");
    let error = reading(&prefix).expect_err("is refused").to_string();
    assert!(error.contains("the tokenizers library failed"), "{error}");

    let mut pieces = vocabulary(byte_level());
    pieces["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0});
    let error = reading(&pieces).expect("reads").encode("ab", true).expect_err("cannot be cut").to_string();
    assert!(error.contains("the tokenizers library failed"), "{error}");

    let tokenizer = reading(&vocabulary(json!({"type": "BPEDecoder", "suffix": "</w>"}))).expect("reads");
    assert_eq!(tokenizer.decode(&[], false), "");
}
