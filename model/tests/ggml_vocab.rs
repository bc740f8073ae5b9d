//! llama.cpp's own tokenizer cases: texts and ids for each vocabulary, read in place.

mod common;

use common::shared;
use ridge_model::checkpoint::gguf::Gguf;
use ridge_model::detokenize::StreamDecoder;
use ridge_model::tokenizer::{EncodeOptions, Tokenizer};
use std::path::Path;
use std::sync::Arc;

/// Vocabularies of kinds that Ridge does not read, by name.
const UNSUPPORTED: [&str; 1] = ["bert-bge"];

fn open(path: &Path) -> Result<Tokenizer, String> {
    let bytes = std::fs::read(path).expect("a vocabulary file is readable");
    let gguf = Gguf::parse(&path.display().to_string(), &bytes).map_err(|e| e.to_string())?;
    Tokenizer::from_gguf(&gguf).map_err(|e| e.to_string())
}

/// Texts with their ids: texts are separated by a marker line, ids stand one line per text.
fn cases(path: &Path) -> Option<Vec<(String, Vec<u32>)>> {
    let beside = |suffix: &str| std::fs::read_to_string(format!("{}{suffix}", path.display())).ok();
    let (texts, ids) = (beside(".inp")?, beside(".out")?);
    let texts = texts.split("\n__ggml_vocab_test__\n").map(str::to_owned);
    let ids = ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().expect("an id")).collect());
    // The last marker has nothing behind it.
    Some(texts.zip(ids).collect())
}

#[test]
fn ids_equal_llama_cpp() {
    let Some(folder) = shared("tokenizers/ggml-vocab") else { return };
    let mut files: Vec<_> = std::fs::read_dir(folder).expect("readable").map(|e| e.expect("entry").path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "gguf"));
    files.sort();
    let mut failures = Vec::new();
    for path in files {
        let name = path.file_stem().expect("stem").to_string_lossy().replace("ggml-vocab-", "");
        let Some(cases) = cases(&path) else {
            println!("{name}: skipped, it has no cases");
            continue;
        };
        let tokenizer = match open(&path) {
            Ok(tokenizer) => Arc::new(tokenizer),
            Err(error) => {
                println!("{name}: skipped, {error}");
                assert!(UNSUPPORTED.contains(&name.as_str()), "{name}: {error}");
                continue;
            }
        };
        let mut passed = 0;
        for (text, expected) in &cases {
            let options = EncodeOptions { add_special: false, parse_special: false };
            let ids = tokenizer.encode_with(text, options).expect("encodes");
            if &ids == expected {
                passed += 1;
            } else {
                failures.push(format!("{name}: {text:?}\n  got  {ids:?}\n  want {expected:?}"));
            }
            // Decoding gives the text back: SentencePiece's prefix space goes, byte-level loses nothing.
            let decoded = tokenizer.decode(&ids, false);
            if decoded != *text {
                failures.push(format!("{name}: {text:?} decodes to {decoded:?}"));
            }
            let mut stream = StreamDecoder::new(&tokenizer, false);
            let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
            streamed.extend(stream.flush());
            assert_eq!(streamed, decoded, "{name}: stream of {text:?}");
        }
        println!("{name}: {passed} of {} texts, {} tokens", cases.len(), tokenizer.vocab_size());
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
