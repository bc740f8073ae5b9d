//! Text to token ids and back, for both kinds of checkpoint.
//!
//! `tokenizer.json` and the byte-level BPE of GGUF run in the `tokenizers` library; the SentencePiece vocabulary of
//! GGUF runs in [`spm`]. Decoding is ours for both: nearly every vocabulary is a table from id to bytes, and a
//! table can be streamed. Read [`Tokenizer`] first.

mod hf;
pub(crate) mod pieces;
pub(crate) mod spm;

use crate::detokenize::Lossy;
use pieces::Pieces;
use spm::Spm;
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

/// Why text could not be turned into ids, or a tokenizer not be built.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct TokenizerError(pub String);

/// A vocabulary with its rules for splitting and joining.
pub struct Tokenizer {
    backend: Backend,
    /// Bytes of every token; `None` where the library's decoder looks at neighbours (WordPiece and the like).
    pieces: Option<Pieces>,
    /// Texts that are one token wherever they stand: control tokens and user-defined ones.
    special: HashMap<u32, Special>,
    /// Decoded text loses one leading space, which encoding had put there.
    strip_leading_space: bool,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
}

/// A token that is matched as a whole.
#[derive(Clone, Debug)]
pub(crate) struct Special {
    /// The text that is matched.
    pub(crate) text: String,
    /// Left out of decoded text, and matched only when special tokens are parsed.
    pub(crate) control: bool,
}

enum Backend {
    /// `tokenizer.json`, or a vocabulary of GGUF given to the library.
    Library {
        parsing: Box<tokenizers::Tokenizer>,
        /// The same with special tokens taken as plain text; built when first asked for.
        literal: OnceLock<Box<tokenizers::Tokenizer>>,
        /// Ids to add around a text, where the library's post-processor does not.
        ends: Ends,
    },
    Spm {
        spm: Box<Spm>,
        /// Special tokens by their first byte, longest first.
        openings: HashMap<u8, Vec<u32>>,
        ends: Ends,
    },
}

/// Ids that encoding adds around a text.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Ends {
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
}

/// What encoding does with special tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EncodeOptions {
    /// Add the ids that the model expects around a text, such as BOS.
    pub add_special: bool,
    /// Texts of special tokens become those tokens; otherwise they are text like any other.
    pub parse_special: bool,
}

/// What a checkpoint reader knows about a vocabulary, beyond its encoder.
pub(crate) struct Facts {
    pub(crate) pieces: Option<Pieces>,
    pub(crate) special: HashMap<u32, Special>,
    pub(crate) strip_leading_space: bool,
    pub(crate) vocab_size: usize,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
}

/// Calls the library, which panics on some files that no tool writes: such a file is refused like any other bad one. All
/// that a panic can leave half done there is a cache, which the library drops then.
pub(crate) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => outcome.map_err(|e| TokenizerError(e.to_string())),
        Err(_) => Err(TokenizerError("its rules cannot be applied: the tokenizers library failed".into())),
    }
}

impl Tokenizer {
    pub(crate) fn from_library(library: tokenizers::Tokenizer, ends: Ends, facts: Facts) -> Self {
        Self::assemble(Backend::Library { parsing: Box::new(library), literal: OnceLock::new(), ends }, facts)
    }

    pub(crate) fn from_spm(spm: Spm, ends: Ends, facts: Facts) -> Self {
        let mut openings: HashMap<u8, Vec<u32>> = HashMap::new();
        for (&id, special) in &facts.special {
            if let Some(&first) = special.text.as_bytes().first() {
                openings.entry(first).or_default().push(id);
            }
        }
        for ids in openings.values_mut() {
            ids.sort_by_key(|id| (std::cmp::Reverse(facts.special[id].text.len()), *id));
        }
        Self::assemble(Backend::Spm { spm: Box::new(spm), openings, ends }, facts)
    }

    fn assemble(backend: Backend, facts: Facts) -> Self {
        let Facts { pieces, special, strip_leading_space, vocab_size, bos, eos } = facts;
        Self { backend, pieces, special, strip_leading_space, vocab_size, bos, eos }
    }

    /// The ids of `text`; special tokens in it are parsed.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, EncodeOptions { add_special, parse_special: true })
    }

    /// The ids of `text`.
    pub fn encode_with(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TokenizerError> {
        let mut out = Vec::new();
        match &self.backend {
            Backend::Library { parsing, literal, ends } => {
                let library = if options.parse_special {
                    parsing
                } else {
                    literal.get_or_init(|| {
                        let mut copy = parsing.clone();
                        copy.set_encode_special_tokens(true);
                        copy
                    })
                };
                let encoding = guarded(|| library.encode_fast(text, options.add_special))?;
                out.extend(ends.bos.filter(|_| options.add_special));
                out.extend_from_slice(encoding.get_ids());
                out.extend(ends.eos.filter(|_| options.add_special));
            }
            Backend::Spm { spm, openings, ends } => {
                out.extend(ends.bos.filter(|_| options.add_special));
                self.encode_spm(spm, openings, text, options.parse_special, &mut out);
                out.extend(ends.eos.filter(|_| options.add_special));
            }
        }
        Ok(out)
    }

    /// Cuts `text` at special tokens and encodes what lies between.
    fn encode_spm(&self, spm: &Spm, openings: &HashMap<u8, Vec<u32>>, text: &str, parse: bool, out: &mut Vec<u32>) {
        let (mut start, mut at, mut after_special) = (0, 0, true);
        while at < text.len() {
            let candidates = openings.get(&text.as_bytes()[at]).map_or(&[][..], Vec::as_slice);
            let found = candidates.iter().find(|id| {
                let special = &self.special[id];
                (parse || !special.control) && text.as_bytes()[at..].starts_with(special.text.as_bytes())
            });
            let Some(&id) = found else {
                at += 1;
                continue;
            };
            // A special token's text is whole characters, so both cuts are character boundaries.
            spm.encode(&text[start..at], after_special, out);
            out.push(id);
            at += self.special[&id].text.len();
            (start, after_special) = (at, true);
        }
        spm.encode(&text[start..], after_special, out);
    }

    /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let Some(pieces) = &self.pieces else { return self.decode_by_library(ids, skip_special) };
        let mut lossy = Lossy::new(self.strip_leading_space);
        let mut out = String::new();
        for &id in ids.iter().filter(|id| !(skip_special && self.is_special(**id))) {
            lossy.push(pieces.piece(id), &mut out);
        }
        lossy.finish(&mut out);
        out
    }

    /// The library's own decoder, for vocabularies whose tokens are not simply bytes.
    pub(crate) fn decode_by_library(&self, ids: &[u32], skip_special: bool) -> String {
        match &self.backend {
            Backend::Library { parsing, .. } => guarded(|| parsing.decode(ids, skip_special)).unwrap_or_default(),
            Backend::Spm { .. } => String::new(),
        }
    }

    /// The table of bytes and whether a leading space is dropped, if decoding is context-free.
    pub(crate) fn pieces(&self) -> Option<(&Pieces, bool)> {
        self.pieces.as_ref().map(|p| (p, self.strip_leading_space))
    }

    /// The bytes that a token stands for; part of a character where the vocabulary splits characters.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.pieces {
            Some(pieces) => pieces.piece(id).to_vec(),
            None => self.token_text(id).into_bytes(),
        }
    }

    /// A token as text, with U+FFFD where it is part of a character; empty for an unknown id.
    pub fn token_text(&self, id: u32) -> String {
        match (&self.pieces, &self.backend) {
            (Some(pieces), _) => String::from_utf8_lossy(pieces.piece(id)).into_owned(),
            (None, Backend::Library { parsing, .. }) => parsing.id_to_token(id).unwrap_or_default(),
            (None, Backend::Spm { .. }) => String::new(),
        }
    }

    /// The id of a token that is matched as a whole, such as `<|im_end|>`.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.special.iter().filter(|(_, s)| s.text == text).map(|(&id, _)| id).min()
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a sequence, if the vocabulary has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a sequence, if the vocabulary has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether `id` is a control token, which `skip_special` leaves out of text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(&id).is_some_and(|s| s.control)
    }

    /// BLAKE3 over the bytes and kind of every token: equal for one vocabulary in two formats.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for id in 0..self.vocab_size as u32 {
            let bytes = self.token_bytes(id);
            hasher.update(&(bytes.len() as u32).to_le_bytes());
            hasher.update(&bytes);
            hasher.update(&[u8::from(self.is_special(id))]);
        }
        *hasher.finalize().as_bytes()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.backend {
            Backend::Library { .. } => "library",
            Backend::Spm { .. } => "spm",
        };
        write!(f, "Tokenizer({kind}, {} tokens, bos {:?}, eos {:?})", self.vocab_size, self.bos, self.eos)
    }
}
