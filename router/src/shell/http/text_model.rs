//! What the HTTP side needs to know of a model: text to tokens and back. No weights.
//!
//! Implemented by `shell::served` for checkpoints and by a byte-level model in the tests.

use ridge_protocol::{Grammar, TokenId};
use serde_json::{Map, Value};

/// Tokenizer, chat template and generation defaults of the served model.
///
/// Errors are sentences for the client: whatever fails here was caused by what it sent.
pub trait TextModel: Send + Sync + 'static {
    /// Text to tokens; `add_special` puts the model's BOS (and the like) where its tokenizer would.
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String>;
    /// Tokens to text, all at once.
    fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String;
    /// A decoder for the tokens that follow `prompt`, one by one.
    fn stream_decoder(&self, prompt: &[TokenId], skip_special: bool) -> Box<dyn TextStream>;
    /// The bytes one token stands for; they need not be whole characters.
    fn token_bytes(&self, token: TokenId) -> Vec<u8>;
    /// Tokens are below this.
    fn vocab_size(&self) -> u32;
    /// A conversation as the model wants to read it. `extra` are the template's own variables.
    fn render_chat(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, String>;
    /// Says what is wrong with a grammar, if anything. It may take a good part of a second.
    fn check_grammar(&self, grammar: &Grammar) -> Result<(), String>;
    /// What a request gets that does not say otherwise.
    fn defaults(&self) -> &Defaults;
}

/// Turns tokens into text as they come. What it returned stays as it is.
pub trait TextStream: Send {
    /// The text that is certain now; nothing while the token may be part of a character.
    fn push(&mut self, token: TokenId) -> Option<String>;
    /// The rest, with replacement characters for incomplete ones.
    fn flush(&mut self) -> Option<String>;
}

/// A model's own generation settings (`generation_config.json`).
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Defaults {
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
    /// 1 if absent.
    pub temperature: Option<f32>,
    /// Off if absent.
    pub top_p: Option<f32>,
    /// Off if absent.
    pub top_k: Option<u32>,
    /// Off if absent.
    pub repetition_penalty: Option<f32>,
}
