//! A model's vocabulary as llguidance wants it: the bytes of every token in a trie.

use super::{GrammarError, guarded};
use crate::tokenizer::Tokenizer;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use std::sync::Arc;

/// Longest token that a grammar may be answered with. No vocabulary has longer ones that mean something.
const MAX_TOKEN_BYTES: usize = 255;

/// The tokens of a model that chooses among `vocab`, and one more: it stands for the end of the answer, whichever stop
/// tokens a request has.
pub(super) fn environment(tokenizer: &Tokenizer, vocab: usize) -> Result<TokEnv, GrammarError> {
    if tokenizer.pieces().is_none() {
        let text = "this model's tokenizer decodes a token by its neighbours: answers cannot be constrained";
        return Err(GrammarError(text.into()));
    }
    let mut words: Vec<Vec<u8>> = (0..vocab as u32).map(|id| word(tokenizer, id)).collect();
    words.push(marked(b"<end of answer>"));
    let info = TokRxInfo::new(words.len() as u32, vocab as u32);
    guarded(|| {
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        Ok(env)
    })
}

/// What a token stands for; nothing if no grammar can be answered with it, such as rows that only pad the vocabulary.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if bytes.is_empty() || bytes.len() > MAX_TOKEN_BYTES {
        Vec::new()
    } else if tokenizer.is_special(id) {
        // Only a grammar that names it is answered with it, never one that wants its text.
        marked(&bytes)
    } else if bytes[0] == TokTrie::SPECIAL_TOKEN_MARKER {
        // A byte that no text has.
        Vec::new()
    } else {
        bytes
    }
}

fn marked(text: &[u8]) -> Vec<u8> {
    [&[TokTrie::SPECIAL_TOKEN_MARKER], text].concat()
}
