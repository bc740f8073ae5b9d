//! The tokenizer that a GGUF file carries, as the `tokenizer.ggml.*` keys describe it.
//!
//! `gpt2` vocabularies are byte-level BPE with one of a list of splitting rules named by `tokenizer.ggml.pre`; `llama`
//! vocabularies are SentencePiece's. Others are refused by name.

use super::gguf::{Gguf, Value};
use crate::tokenizer::pieces::{Pieces, byte_of_fallback, bytes_of_byte_level};
use crate::tokenizer::spm::{SPACE, Spm};
use crate::tokenizer::{Ends, Facts, Special, Tokenizer, TokenizerError};
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

/// Most tokens in a vocabulary; the largest published one has 262,144.
const MAX_TOKENS: usize = 1 << 22;

/// `tokenizer.ggml.token_type`: what a token is for.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

/// What the file says, checked for consistency.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<u64>,
    scores: Vec<f32>,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    ends: Ends,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file carries.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TokenizerError> {
        match gguf.string("tokenizer.ggml.model") {
            Some("gpt2") => byte_level(gguf),
            Some("llama") => sentence_piece(gguf),
            Some(other) => Err(TokenizerError(format!(
                "{}: tokenizer '{other}' is not supported (supported: gpt2, llama)",
                gguf.file
            ))),
            None => Err(TokenizerError(format!("{}: the file carries no tokenizer", gguf.file))),
        }
    }
}

impl Vocabulary {
    fn read(gguf: &Gguf, default_bos: bool) -> Result<Self, TokenizerError> {
        let say = |message: String| TokenizerError(format!("{}: {message}", gguf.file));
        let tokens = gguf
            .strings("tokenizer.ggml.tokens")
            .ok_or_else(|| say("tokenizer.ggml.tokens is not an array of strings".into()))?;
        if tokens.is_empty() || tokens.len() > MAX_TOKENS {
            return Err(say(format!("a vocabulary of {} tokens", tokens.len())));
        }
        let same_length = |key: &str, len: usize| {
            if len == tokens.len() {
                Ok(())
            } else {
                Err(say(format!("{key}: {len} entries for {} tokens", tokens.len())))
            }
        };
        let kinds: Vec<u64> = match gguf.array("tokenizer.ggml.token_type") {
            Some(items) => items.iter().map(|v| v.integer().unwrap_or(1)).collect(),
            None => vec![1; tokens.len()],
        };
        same_length("tokenizer.ggml.token_type", kinds.len())?;
        let scores: Vec<f32> = match gguf.array("tokenizer.ggml.scores") {
            Some(items) => items.iter().map(|v| if let Value::Float(x) = v { *x as f32 } else { 0.0 }).collect(),
            None => vec![0.0; tokens.len()],
        };
        same_length("tokenizer.ggml.scores", scores.len())?;
        let id = |key: &str| {
            let id = gguf.integer(&format!("tokenizer.ggml.{key}_token_id"))?;
            u32::try_from(id).ok().filter(|id| (*id as usize) < tokens.len())
        };
        let (bos, eos, unknown) = (id("bos"), id("eos"), id("unknown"));
        let add =
            |key: &str, default: bool| gguf.boolean(&format!("tokenizer.ggml.add_{key}_token")).unwrap_or(default);
        let ends = Ends { bos: bos.filter(|_| add("bos", default_bos)), eos: eos.filter(|_| add("eos", false)) };
        Ok(Self { kinds, scores, bos, eos, unknown, ends, tokens })
    }

    /// Tokens that are matched as a whole. The unknown token is one that text never spells.
    fn special(&self) -> HashMap<u32, Special> {
        let kinds = self.kinds.iter().zip(&self.tokens).enumerate();
        kinds
            .filter(|(_, (kind, text))| matches!(**kind, CONTROL | USER_DEFINED | UNKNOWN) && !text.is_empty())
            .map(|(id, (kind, text))| (id as u32, Special { text: text.clone(), control: *kind != USER_DEFINED }))
            .collect()
    }

    fn facts(&self, special: HashMap<u32, Special>, pieces: Pieces, strip_leading_space: bool) -> Facts {
        Facts {
            vocab_size: pieces.len(),
            pieces: Some(pieces),
            special,
            strip_leading_space,
            bos: self.bos,
            eos: self.eos,
        }
    }
}

fn sentence_piece(gguf: &Gguf) -> Result<Tokenizer, TokenizerError> {
    let vocabulary = Vocabulary::read(gguf, true)?;
    let special = vocabulary.special();
    let mut pieces = Pieces::default();
    for (id, (token, kind)) in vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate() {
        match byte_of_fallback(token).filter(|_| *kind == BYTE) {
            Some(byte) => pieces.push(&[byte]),
            None if special.contains_key(&(id as u32)) => pieces.push(token.as_bytes()),
            None => pieces.push(token.replace(SPACE, " ").as_bytes()),
        }
    }
    let prefix = gguf.boolean("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let spm = Spm::new(&vocabulary.tokens, vocabulary.scores.clone(), vocabulary.unknown.or(Some(0)), prefix)
        .ok_or_else(|| TokenizerError(format!("{}: some bytes cannot be spelled", gguf.file)))?;
    Ok(Tokenizer::from_spm(spm, vocabulary.ends, vocabulary.facts(special, pieces, prefix)))
}

fn byte_level(gguf: &Gguf) -> Result<Tokenizer, TokenizerError> {
    let say = |message: String| TokenizerError(format!("{}: {message}", gguf.file));
    let pre = gguf.string("tokenizer.ggml.pre").unwrap_or("default");
    let rules = split_rules(pre).ok_or_else(|| {
        say(format!("tokenizer.ggml.pre is '{pre}', a splitting rule that is not supported (supported: {SUPPORTED})"))
    })?;
    // Llama 3's converters leave the flag out and its users expect BOS.
    let vocabulary = Vocabulary::read(gguf, rules.whole_words_first && rules.adds_bos)?;
    let special = vocabulary.special();
    let vocab: Vocab = vocabulary.tokens.iter().enumerate().map(|(id, t)| (t.clone(), id as u32)).collect();
    let merges = gguf
        .strings("tokenizer.ggml.merges")
        .ok_or_else(|| say("tokenizer.ggml.merges is not an array of strings".into()))?
        .iter()
        .filter_map(|merge| split_merge(merge))
        // The library refuses a merge whose parts or result are not tokens; such a merge can never apply to text that
        // ends as tokens.
        .filter(|(a, b)| [a, b, &format!("{a}{b}")].iter().all(|t| vocab.contains_key(t.as_str())))
        .collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(rules.whole_words_first)
        .build()
        .map_err(|e| say(e.to_string()))?;
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for regex in rules.splits {
        let split = Split::new(SplitPattern::Regex((*regex).into()), SplitDelimiterBehavior::Isolated, false);
        steps.push(split.map_err(|e| say(e.to_string()))?.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    let mut library = tokenizers::Tokenizer::new(bpe);
    library.with_pre_tokenizer(Some(Sequence::new(steps)));
    library.with_decoder(Some(ByteLevel::default()));
    // In the order of ids, because the library numbers by first come.
    let mut ordered: Vec<(&u32, &Special)> = special.iter().collect();
    ordered.sort_by_key(|(id, _)| **id);
    for (_, token) in ordered {
        let added = AddedToken::from(token.text.clone(), token.control).normalized(false);
        let outcome = if token.control { library.add_special_tokens([added]) } else { library.add_tokens([added]) };
        outcome.map_err(|e| say(e.to_string()))?;
    }
    let mut pieces = Pieces::default();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        match special.contains_key(&(id as u32)) {
            true => pieces.push(token.as_bytes()),
            false => pieces.push(&bytes_of_byte_level(token)),
        }
    }
    Ok(Tokenizer::from_library(library, vocabulary.ends, vocabulary.facts(special, pieces, false)))
}

/// The two sides of a merge; the first side may itself begin with a space.
fn split_merge(merge: &str) -> Option<(String, String)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge[first..].find(' ')?;
    Some((merge[..at].to_owned(), merge[at + 1..].to_owned()))
}

/// How text is cut before merging.
struct SplitRules {
    /// Applied one after the other, each to the pieces that the one before left; what matches is a piece of its own.
    splits: &'static [&'static str],
    /// A word that is a token is that token, whatever the merges say.
    whole_words_first: bool,
    /// BOS is added unless the file says otherwise.
    adds_bos: bool,
}

const SUPPORTED: &str = "default, gpt-2, llama-bpe, qwen2, deepseek-llm, deepseek-coder, deepseek-v3, falcon, refact, \
                         starcoder, command-r, smollm, mpt, olmo, dbrx, smaug-bpe, stablelm2, chatglm-bpe, tekken, gpt-4o";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Letters that DeepSeek's first tokenizer joins into words: the cased ones.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[",
    r"\x{41}-\x{5A}\x{61}-\x{7A}\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}",
    r"\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}",
    r"\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}",
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}",
    r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}",
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}",
    r"\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}",
    r"\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}",
    r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}",
    r"\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}",
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}",
    r"\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}",
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}",
    r"\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}",
    r"]+",
);
const DEEPSEEK_PUNCTUATION: &str = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+";
const DEEPSEEK_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
const DEEPSEEK3_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+";
const DEEPSEEK3_WORDS: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The rules behind each name that converters write into `tokenizer.ggml.pre`.
fn split_rules(pre: &str) -> Option<SplitRules> {
    let splits: &[&str] = match pre {
        "default" => &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" | "lfm2" | "dbrx" | "smaug-bpe" | "chatglm-bpe" => {
            &[LLAMA3]
        }
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "hunyuan" => &[QWEN2],
        "gpt-2" | "phi-2" | "gigachat" | "mpt" | "olmo" | "jais" | "trillion" => &[GPT2],
        "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone" | "minerva-7b" => &[r"\p{N}", GPT2],
        "falcon" => &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
        "deepseek-llm" => &[r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_CJK, r"\p{N}+"],
        "deepseek-coder" => &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}"],
        "deepseek-v3" => &[r"\p{N}{1,3}", DEEPSEEK3_CJK, DEEPSEEK3_WORDS],
        "tekken" => &[TEKKEN],
        "gpt-4o" | "llama4" => &[GPT4O],
        _ => return None,
    };
    let llama3 = matches!(pre, "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" | "lfm2");
    Some(SplitRules { splits, whole_words_first: llama3 || pre == "tekken", adds_bos: llama3 || pre == "tekken" })
}
