//! `tokenizer.json` and `tokenizer_config.json`.

use super::pieces::{Pieces, byte_of_fallback, bytes_of_byte_level};
use super::{Ends, Facts, Special, Tokenizer, TokenizerError, guarded};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

/// Most tokens in a vocabulary; the largest published one has 262,144.
const MAX_TOKENS: usize = 1 << 22;

/// How a `tokenizer.json` joins tokens, as far as a table of bytes can say it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Joining {
    /// GPT-2's byte alphabet.
    ByteLevel,
    /// SentencePiece: U+2581 is a space, `<0x..>` a byte; perhaps one leading space is dropped.
    Spaces { fallback: bool, strip: bool },
    /// Something that looks at neighbours.
    Contextual,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder, with the names of BOS and EOS from `tokenizer_config.json`.
    pub fn from_hf_folder(folder: &Path) -> Result<Self, TokenizerError> {
        Self::from_hf_file(&folder.join("tokenizer.json"), &folder.join("tokenizer_config.json"))
    }

    /// Reads a `tokenizer.json` and, where it exists, a `tokenizer_config.json`.
    pub fn from_hf_file(tokenizer: &Path, config: &Path) -> Result<Self, TokenizerError> {
        let say = |path: &Path, e: &dyn std::fmt::Display| TokenizerError(format!("{}: {e}", path.display()));
        let bytes = std::fs::read(tokenizer).map_err(|e| say(tokenizer, &e))?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|e| say(tokenizer, &e))?;
        let config_json = match std::fs::read(config) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| say(config, &e))?,
            Err(_) => Value::Null,
        };
        let library = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(|e| say(tokenizer, &e))?;
        Self::from_hf(library, &json, &config_json).map_err(|e| say(tokenizer, &e))
    }

    fn from_hf(mut library: tokenizers::Tokenizer, json: &Value, config: &Value) -> Result<Self, TokenizerError> {
        // A server never wants a prompt cut or padded, whatever a file says.
        let _ = library.with_truncation(None);
        library.with_padding(None);
        let special: HashMap<u32, Special> = library
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| (id, Special { text: token.content, control: token.special }))
            .collect();
        let vocab = library.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size > MAX_TOKENS {
            return Err(TokenizerError(format!("a token has the id {}, above {MAX_TOKENS}", vocab_size - 1)));
        }
        let joining = joining(&json["decoder"]);
        let named = |key: &str| {
            let text = config[key].as_str().or(config[key]["content"].as_str())?;
            vocab.get(text).copied()
        };
        let facts = Facts {
            pieces: table(joining, &vocab, vocab_size, &special),
            special,
            strip_leading_space: matches!(joining, Joining::Spaces { strip: true, .. }),
            vocab_size,
            bos: named("bos_token"),
            eos: named("eos_token"),
        };
        Ok(Self::from_library(library, Ends::default(), facts))
    }
}

/// Recognises the decoders that are a table of bytes.
fn joining(decoder: &Value) -> Joining {
    let kind = |d: &Value| d["type"].as_str().unwrap_or("").to_owned();
    match kind(decoder).as_str() {
        "ByteLevel" => return Joining::ByteLevel,
        "Sequence" => {}
        _ => return Joining::Contextual,
    }
    let Some(steps) = decoder["decoders"].as_array() else { return Joining::Contextual };
    if let [only] = steps.as_slice() {
        return joining(only);
    }
    let (mut spaces, mut fallback, mut strip) = (false, false, false);
    for step in steps {
        match kind(step).as_str() {
            "Replace" if step["pattern"]["String"] == "\u{2581}" && step["content"] == " " => spaces = true,
            "ByteFallback" => fallback = true,
            "Fuse" => {}
            "Strip" if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => strip = true,
            _ => return Joining::Contextual,
        }
    }
    // Strip before Fuse would strip every token; no known file says so.
    if spaces { Joining::Spaces { fallback, strip } } else { Joining::Contextual }
}

fn table(
    joining: Joining,
    vocab: &HashMap<String, u32>,
    vocab_size: usize,
    special: &HashMap<u32, Special>,
) -> Option<Pieces> {
    if joining == Joining::Contextual {
        return None;
    }
    let mut texts: Vec<&str> = vec![""; vocab_size];
    for (text, &id) in vocab {
        texts[id as usize] = text;
    }
    for (&id, token) in special {
        if let Some(text) = texts.get_mut(id as usize) {
            *text = &token.text;
        }
    }
    let mut pieces = Pieces::default();
    for text in texts {
        match joining {
            Joining::ByteLevel => pieces.push(&bytes_of_byte_level(text)),
            Joining::Spaces { fallback, .. } => match byte_of_fallback(text).filter(|_| fallback) {
                Some(byte) => pieces.push(&[byte]),
                None => pieces.push(text.replace('\u{2581}', " ").as_bytes()),
            },
            Joining::Contextual => unreachable!("returned above"),
        }
    }
    Some(pieces)
}
