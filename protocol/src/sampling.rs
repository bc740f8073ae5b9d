//! How the next token is chosen. Plain data: the arithmetic is in `ridge-model`.

use crate::ids::TokenId;
use crate::limits;
use serde::{Deserialize, Serialize};

/// What an answer must match. Plain data: it is compiled where it is sampled, in `ridge-model`.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Grammar {
    /// What `text` is written in.
    pub kind: GrammarKind,
    /// At most [`limits::MAX_GRAMMAR_BYTES`].
    pub text: String,
}

/// What a grammar is written in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum GrammarKind {
    /// A JSON schema: the answer is a JSON value that it allows.
    JsonSchema,
    /// A regular expression in the syntax of Rust's `regex`: it matches the whole answer.
    Regex,
    /// A context-free grammar in llguidance's variant of Lark, from the rule `start`.
    Lark,
}

/// Sampling parameters of one sequence, already validated at the HTTP edge.
///
/// Random numbers are a function of `(seed, position)` alone, so whichever node continues a sequence draws the
/// same token.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 means greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 switches it off.
    pub top_p: f32,
    /// Keep the k most likely tokens; 0 switches it off.
    pub top_k: u32,
    /// Drop tokens below `min_p` times the likeliest one's probability; 0 switches it off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer (Hugging Face); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token already generated (OpenAI); 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence among the generated tokens (OpenAI); 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, in ascending token order.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// The key of the counter-based generator.
    pub seed: u64,
    /// Alternatives to report per token: `None` reports nothing, `Some(0)` the chosen token's log-probability only.
    pub logprobs: Option<u8>,
    /// Tokens that end the sequence (the model's EOS tokens and the request's `stop_token_ids`).
    pub stop_tokens: Vec<TokenId>,
    /// Generate until `max_tokens` whatever the model says.
    pub ignore_eos: bool,
    /// Most tokens to generate; at least 1.
    pub max_tokens: u32,
    /// What the answer must match, if anything. It may end where the grammar may, and must where the grammar does.
    /// Boxed, because few have one and messages are moved about.
    pub grammar: Option<Box<Grammar>>,
}

impl SamplingParams {
    /// Greedy decoding of up to `max_tokens`.
    pub fn greedy(max_tokens: u32) -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            stop_tokens: Vec::new(),
            ignore_eos: false,
            max_tokens,
            grammar: None,
        }
    }

    /// Whether choosing a token needs the tokens before it.
    pub fn needs_history(&self) -> bool {
        self.has_penalties() || self.grammar.is_some()
    }

    /// Whether tokens that were seen before are made more or less likely.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether `token` ends the sequence.
    pub fn is_stop(&self, token: TokenId) -> bool {
        !self.ignore_eos && self.stop_tokens.contains(&token)
    }

    /// Names the first parameter out of range. Nodes check it again: a peer's message is input like any other.
    pub fn check(&self) -> Result<(), String> {
        let range = |name: &str, value: f32, low: f32, high: f32| {
            if value.is_finite() && value >= low && value <= high {
                Ok(())
            } else {
                Err(format!("{name} must be between {low} and {high}, got {value}"))
            }
        };
        range("temperature", self.temperature, 0.0, 100.0)?;
        range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)?;
        range("presence_penalty", self.presence_penalty, -100.0, 100.0)?;
        range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)?;
        if self.max_tokens == 0 {
            return Err("max_tokens must be at least 1".into());
        }
        if self.logit_bias.len() > limits::MAX_LOGIT_BIAS {
            return Err(format!("logit_bias has more than {} entries", limits::MAX_LOGIT_BIAS));
        }
        if self.logit_bias.iter().any(|(_, bias)| !bias.is_finite()) {
            return Err("logit_bias must be finite".into());
        }
        if self.stop_tokens.len() > limits::MAX_STOP_TOKENS {
            return Err(format!("more than {} stop tokens", limits::MAX_STOP_TOKENS));
        }
        if self.logprobs.is_some_and(|n| usize::from(n) > limits::MAX_TOP_LOGPROBS) {
            return Err(format!("top_logprobs must be at most {}", limits::MAX_TOP_LOGPROBS));
        }
        if self.grammar.as_ref().is_some_and(|grammar| grammar.text.len() > limits::MAX_GRAMMAR_BYTES) {
            return Err(format!("grammar has more than {} bytes", limits::MAX_GRAMMAR_BYTES));
        }
        Ok(())
    }
}
