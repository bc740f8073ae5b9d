//! A checkpoint's tokenizer and template as the HTTP side sees them.

use super::http::{Defaults, TextModel, TextStream};
use ridge_model::checkpoint::Checkpoint;
use ridge_model::detokenize::StreamDecoder;
use ridge_model::grammar::Grammars;
use ridge_model::template::{ChatTemplate, RenderOptions};
use ridge_model::tokenizer::Tokenizer;
use ridge_protocol::{Grammar, TokenId};
use serde_json::{Map, Value};
use std::sync::Arc;

/// The served model, without its weights.
pub struct Served {
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    grammars: Grammars,
    defaults: Defaults,
}

impl Served {
    /// Takes what the HTTP side needs of a checkpoint.
    pub fn new(checkpoint: Checkpoint) -> Self {
        let generation = checkpoint.generation;
        Self {
            grammars: Grammars::new(checkpoint.tokenizer.clone(), checkpoint.spec.vocab),
            tokenizer: checkpoint.tokenizer,
            template: checkpoint.template,
            defaults: Defaults {
                eos: generation.eos,
                temperature: generation.temperature,
                top_p: generation.top_p,
                top_k: generation.top_k,
                repetition_penalty: generation.repetition_penalty,
            },
        }
    }
}

impl TextModel for Served {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        self.tokenizer.encode(text, add_special).map_err(|e| e.to_string())
    }

    fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        self.tokenizer.decode(tokens, skip_special)
    }

    fn stream_decoder(&self, prompt: &[TokenId], skip_special: bool) -> Box<dyn TextStream> {
        Box::new(Stream(StreamDecoder::after(&self.tokenizer, skip_special, prompt)))
    }

    fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        self.tokenizer.token_bytes(token)
    }

    fn vocab_size(&self) -> u32 {
        self.tokenizer.vocab_size() as u32
    }

    fn render_chat(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, String> {
        let template = self.template.as_ref().ok_or("this model has no chat template: use /v1/completions")?;
        let options = RenderOptions { add_generation_prompt, tools, extra: Some(extra), now: None };
        template.render(messages, &options).map_err(|e| e.to_string())
    }

    fn check_grammar(&self, grammar: &Grammar) -> Result<(), String> {
        self.grammars.check(grammar).map_err(|error| error.to_string())
    }

    fn defaults(&self) -> &Defaults {
        &self.defaults
    }
}

struct Stream(StreamDecoder);

impl TextStream for Stream {
    fn push(&mut self, token: TokenId) -> Option<String> {
        self.0.push(token)
    }

    fn flush(&mut self) -> Option<String> {
        self.0.flush()
    }
}
