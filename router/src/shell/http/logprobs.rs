//! Log-probabilities in the two shapes OpenAI gave them.

use super::answer::Scored;
use super::text_model::TextModel;
use ridge_protocol::TokenId;
use serde::{Serialize, Serializer};

/// What a token that cannot be drawn gets: JSON has no infinity, and vLLM says this number.
const LOWEST: f32 = -9999.0;

/// Chat's shape: one object per token.
#[derive(Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<&'static str>,
}

#[derive(Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// The completions' shape: parallel arrays.
#[derive(Default, Serialize)]
pub(super) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Top>,
    text_offset: Vec<usize>,
}

/// Text to log-probability, likeliest first.
struct Top(Vec<(String, f32)>);

impl ChatLogprobs {
    /// The tokens of one part of an answer.
    pub(super) fn new(model: &dyn TextModel, scored: &[Scored]) -> Self {
        let alternative = |token: TokenId, logprob: f32| {
            let bytes = model.token_bytes(token);
            Alternative { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(logprob), bytes }
        };
        let content = scored.iter().map(|Scored { out, .. }| ChatToken {
            token: alternative(out.token, out.logprob.unwrap_or(LOWEST)),
            top_logprobs: out.top.iter().map(|(token, logprob)| alternative(*token, *logprob)).collect(),
        });
        Self { content: content.collect(), refusal: None }
    }
}

impl TextLogprobs {
    /// The tokens of one part of an answer.
    pub(super) fn new(model: &dyn TextModel, scored: &[Scored]) -> Self {
        let text = |token: TokenId| String::from_utf8_lossy(&model.token_bytes(token)).into_owned();
        let mut all = Self::default();
        for Scored { out, offset, .. } in scored {
            let logprob = finite(out.logprob.unwrap_or(LOWEST));
            let token = text(out.token);
            let mut top: Vec<(String, f32)> = Vec::with_capacity(out.top.len() + 1);
            let chosen = (token.clone(), logprob);
            let likeliest = out.top.iter().map(|(token, logprob)| (text(*token), finite(*logprob)));
            // The chosen token is always among them; tokens with the same text are one key.
            for entry in likeliest.chain([chosen]) {
                if top.iter().all(|(text, _)| *text != entry.0) {
                    top.push(entry);
                }
            }
            all.tokens.push(token);
            all.token_logprobs.push(logprob);
            all.top_logprobs.push(Top(top));
            all.text_offset.push(*offset);
        }
        all
    }
}

impl Serialize for Top {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(text, logprob)| (text, logprob)))
    }
}

fn finite(logprob: f32) -> f32 {
    // NaN becomes the lowest too.
    logprob.max(LOWEST)
}
