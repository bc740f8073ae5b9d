//! The bodies of `/v1/chat/completions` and `/v1/completions`, read into what the rest of this folder works with.

use super::error::ApiError;
use super::fields::Fields;
use super::messages::Conversation;
use super::params::{GenerateOptions, check_vocabulary};
use super::text_model::TextModel;
use super::tools::Calls;
use ridge_protocol::{TokenId, limits};
use serde::Deserialize;

/// Most sequences one request may start: prompts times `n`.
const MAX_SEQUENCES: usize = 256;

/// How the answer is delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Delivery {
    /// As server-sent events.
    pub(super) stream: bool,
    /// A last chunk with the token counts.
    pub(super) include_usage: bool,
    /// The counts so far in every chunk.
    pub(super) continuous_usage: bool,
}

/// A chat request.
#[derive(Debug)]
pub(super) struct ChatRequest {
    /// Which model, if it says so.
    pub(super) model: Option<String>,
    /// What the template renders.
    pub(super) conversation: Conversation,
    /// How to generate.
    pub(super) options: GenerateOptions,
    /// What the answer must be, if it must be calls.
    pub(super) calls: Option<Calls>,
    /// How to answer.
    pub(super) delivery: Delivery,
}

/// A completion request.
#[derive(Debug)]
pub(super) struct CompletionRequest {
    /// Which model, if it says so.
    pub(super) model: Option<String>,
    /// One or more prompts.
    pub(super) prompts: Vec<Prompt>,
    /// Put the prompt before the answer.
    pub(super) echo: bool,
    /// Let the tokenizer put its BOS before a text.
    pub(super) add_special: bool,
    /// How to generate.
    pub(super) options: GenerateOptions,
    /// How to answer.
    pub(super) delivery: Delivery,
}

/// One prompt of a completion.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Prompt {
    /// To be tokenized.
    Text(String),
    /// Tokens already.
    Tokens(Vec<TokenId>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string, an array of strings, an array of token ids or an array of these")]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<TokenId>),
    TokenLists(Vec<Vec<TokenId>>),
}

impl ChatRequest {
    /// Reads a body.
    pub(super) fn parse(body: &[u8], model: &dyn TextModel) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let logprobs = fields.take::<bool>("logprobs")?.unwrap_or(false);
        let top_logprobs = fields.take("top_logprobs")?;
        let logprobs = match (logprobs, top_logprobs) {
            (false, Some(1..)) => {
                return Err(ApiError::invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true"));
            }
            (false, _) => None,
            (true, top) => Some(check_logprobs("top_logprobs", top.unwrap_or(0))?),
        };
        // The newer name wins, as it does at OpenAI.
        let old = fields.take("max_tokens")?;
        let max_tokens = fields.take("max_completion_tokens")?.or(old);
        let mut conversation = Conversation::take(&mut fields)?;
        let mut options = GenerateOptions::take(&mut fields, model, logprobs, max_tokens)?;
        let calls = match conversation.take_forced() {
            None => None,
            Some((calls, grammar)) => {
                options.force(Calls::constraint(grammar)?)?;
                Some(calls)
            }
        };
        let request =
            Self { model: fields.take("model")?, conversation, options, calls, delivery: Delivery::take(&mut fields)? };
        fields.ignore_rest();
        Ok(request)
    }
}

impl CompletionRequest {
    /// OpenAI's default for completions.
    const MAX_TOKENS: u32 = 16;

    /// Reads a body.
    pub(super) fn parse(body: &[u8], model: &dyn TextModel) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        if fields.take::<String>("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::invalid("suffix", "'suffix' is not supported"));
        }
        let logprobs = fields.take("logprobs")?.map(|top| check_logprobs("logprobs", top)).transpose()?;
        let max_tokens = fields.take("max_tokens")?.unwrap_or(Self::MAX_TOKENS);
        let request = Self {
            model: fields.take("model")?,
            prompts: take_prompts(&mut fields, model)?,
            echo: fields.take("echo")?.unwrap_or(false),
            add_special: fields.take("add_special_tokens")?.unwrap_or(true),
            options: GenerateOptions::take(&mut fields, model, logprobs, Some(max_tokens))?,
            delivery: Delivery::take(&mut fields)?,
        };
        if request.echo && logprobs.is_some() {
            return Err(ApiError::invalid("echo", "'echo' with 'logprobs' is not supported: prompts are not scored"));
        }
        if request.prompts.len() * request.options.n as usize > MAX_SEQUENCES {
            let message = format!("prompts times 'n' must be at most {MAX_SEQUENCES}");
            return Err(ApiError::invalid("prompt", message));
        }
        fields.ignore_rest();
        Ok(request)
    }
}

impl Delivery {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        #[derive(Deserialize)]
        struct StreamOptions {
            include_usage: Option<bool>,
            continuous_usage_stats: Option<bool>,
        }
        let stream = fields.take("stream")?.unwrap_or(false);
        let options: Option<StreamOptions> = fields.take("stream_options")?;
        if options.is_some() && !stream {
            return Err(ApiError::invalid("stream_options", "'stream_options' needs 'stream' to be true"));
        }
        let include_usage = options.as_ref().and_then(|options| options.include_usage).unwrap_or(false);
        let continuous = options.and_then(|options| options.continuous_usage_stats).unwrap_or(false);
        Ok(Self { stream, include_usage, continuous_usage: include_usage && continuous })
    }
}

fn check_logprobs(param: &str, top: i64) -> Result<u8, ApiError> {
    u8::try_from(top).ok().filter(|top| usize::from(*top) <= limits::MAX_TOP_LOGPROBS).ok_or_else(|| {
        let message = format!("'{param}' must be between 0 and {}, got {top}", limits::MAX_TOP_LOGPROBS);
        ApiError::invalid(param, message)
    })
}

fn take_prompts(fields: &mut Fields, model: &dyn TextModel) -> Result<Vec<Prompt>, ApiError> {
    let prompts = match fields.require("prompt")? {
        Prompts::Text(text) => vec![Prompt::Text(text)],
        Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
        Prompts::Tokens(tokens) => vec![Prompt::Tokens(tokens)],
        Prompts::TokenLists(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
    };
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "'prompt' must not be an empty array"));
    }
    for prompt in &prompts {
        if let Prompt::Tokens(tokens) = prompt {
            check_vocabulary(tokens, model, "prompt")?;
        }
    }
    Ok(prompts)
}
