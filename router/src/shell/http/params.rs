//! Request parameters to [`SamplingParams`], with errors that name the parameter.

use super::error::ApiError;
use super::fields::Fields;
use super::grammar::Constraint;
use super::text_model::TextModel;
use ridge_protocol::{SamplingParams, TokenId, limits};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::sync::Arc;

/// Most answers to one prompt.
const MAX_N: u32 = 8;

/// How every answer to a request is to be generated and shown.
#[derive(Clone, Debug)]
pub(super) struct GenerateOptions {
    /// `max_tokens` is still 0 where the client left it to us: [`fit`](Self::fit) fills it in.
    pub(super) params: SamplingParams,
    /// Stop strings.
    pub(super) stop: Arc<[String]>,
    /// Answers per prompt.
    pub(super) n: u32,
    /// Leave special tokens out of the text.
    pub(super) skip_special: bool,
    /// What every answer must match, and who says so; the grammar is in `params` too.
    pub(super) constraint: Option<Constraint>,
    /// Told apart from other salts in the prefix cache.
    pub(super) cache_salt: Option<String>,
}

/// A string or a list of strings.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
enum StringOrList {
    One(String),
    Many(Vec<String>),
}

impl GenerateOptions {
    /// Reads what chat and completions have in common. `logprobs` is spelled differently by the two.
    pub(super) fn take(
        fields: &mut Fields,
        model: &dyn TextModel,
        logprobs: Option<u8>,
        max_tokens: Option<u32>,
    ) -> Result<Self, ApiError> {
        if fields.take("use_beam_search")?.unwrap_or(false) {
            return Err(ApiError::invalid("use_beam_search", "'use_beam_search' is not supported"));
        }
        let constraint = Constraint::take(fields)?;
        let defaults = model.defaults();
        let stop = take_stop(fields)?;
        let stop_token_ids = take_stop_tokens(fields, model)?;
        let ignore_eos = fields.take("ignore_eos")?.unwrap_or(false);
        let mut stop_tokens = stop_token_ids;
        if !ignore_eos {
            stop_tokens
                .extend(defaults.eos.iter().copied().filter(|eos| !stop_tokens.contains(eos)).collect::<Vec<_>>());
        }
        let params = SamplingParams {
            temperature: fields.take("temperature")?.or(defaults.temperature).unwrap_or(1.0),
            top_p: fields.take("top_p")?.or(defaults.top_p).unwrap_or(1.0),
            top_k: take_top_k(fields)?.or(defaults.top_k).unwrap_or(0),
            min_p: fields.take("min_p")?.unwrap_or(0.0),
            repetition_penalty: fields.take("repetition_penalty")?.or(defaults.repetition_penalty).unwrap_or(1.0),
            presence_penalty: fields.take("presence_penalty")?.unwrap_or(0.0),
            frequency_penalty: fields.take("frequency_penalty")?.unwrap_or(0.0),
            logit_bias: take_logit_bias(fields, model)?,
            seed: take_seed(fields)?,
            logprobs,
            // The client's own stop tokens hold whatever it says about the model's.
            ignore_eos: ignore_eos && stop_tokens.is_empty(),
            stop_tokens,
            max_tokens: max_tokens.unwrap_or(0),
            grammar: constraint.as_ref().map(|constraint| Box::new(constraint.grammar.clone())),
        };
        if max_tokens == Some(0) {
            return Err(ApiError::invalid("max_tokens", "'max_tokens' must be at least 1"));
        }
        check(&params)?;
        let n = fields.take("n")?.unwrap_or(1);
        if n == 0 || n > MAX_N {
            return Err(ApiError::invalid("n", format!("'n' must be between 1 and {MAX_N}, got {n}")));
        }
        if fields.take::<u32>("best_of")?.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::invalid("best_of", "'best_of' other than 'n' is not supported"));
        }
        Ok(Self {
            params,
            stop,
            n,
            constraint,
            skip_special: fields.take("skip_special_tokens")?.unwrap_or(true),
            cache_salt: fields.take("cache_salt")?,
        })
    }

    /// Makes every answer match `forced`, which nothing else may constrain or cut.
    pub(super) fn force(&mut self, forced: Constraint) -> Result<(), ApiError> {
        if let Some(Constraint { param, .. }) = self.constraint {
            let message = format!("'{param}' cannot be combined with a 'tool_choice' that asks for a call");
            return Err(ApiError::invalid(param, message));
        }
        if !self.stop.is_empty() {
            let message = "'stop' cannot be combined with a 'tool_choice' that asks for a call: it might cut it";
            return Err(ApiError::invalid("stop", message));
        }
        self.params.grammar = Some(Box::new(forced.grammar.clone()));
        self.constraint = Some(forced);
        Ok(())
    }

    /// The parameters of answer `choice` to a prompt: what is left of the context bounds the answer, and each choice
    /// draws its own random numbers.
    pub(super) fn fit(&self, choice: u32, prompt_tokens: usize, max_model_len: u32) -> SamplingParams {
        // A node with a shorter context may have joined since the prompt was checked: then the router refuses.
        let room = (max_model_len as usize).saturating_sub(prompt_tokens).max(1) as u32;
        let max_tokens = if self.params.max_tokens == 0 { room } else { self.params.max_tokens.min(room) };
        let seed = self.params.seed.wrapping_add(u64::from(choice));
        SamplingParams { max_tokens, seed, ..self.params.clone() }
    }
}

fn take_stop(fields: &mut Fields) -> Result<Arc<[String]>, ApiError> {
    let stop = match fields.take("stop")? {
        None => Vec::new(),
        Some(StringOrList::One(stop)) => vec![stop],
        Some(StringOrList::Many(stops)) => stops,
    };
    if stop.len() > limits::MAX_STOP_STRINGS {
        let message = format!("'stop' has {} entries, the limit is {}", stop.len(), limits::MAX_STOP_STRINGS);
        return Err(ApiError::invalid("stop", message));
    }
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop", "'stop' cannot contain an empty string"));
    }
    if stop.iter().any(|stop| stop.len() > limits::MAX_STOP_BYTES) {
        let message = format!("an entry of 'stop' is longer than {} bytes", limits::MAX_STOP_BYTES);
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stop.into())
}

fn take_stop_tokens(fields: &mut Fields, model: &dyn TextModel) -> Result<Vec<TokenId>, ApiError> {
    let name = "stop_token_ids";
    let tokens: Vec<TokenId> = fields.take(name)?.unwrap_or_default();
    let most = limits::MAX_STOP_TOKENS.saturating_sub(model.defaults().eos.len());
    if tokens.len() > most {
        return Err(ApiError::invalid(name, format!("'{name}' has {} entries, the limit is {most}", tokens.len())));
    }
    check_vocabulary(&tokens, model, name)?;
    Ok(tokens)
}

/// Clients switch `top_k` off with 0 or, as in vLLM, with -1.
fn take_top_k(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    match fields.take::<i64>("top_k")? {
        None => Ok(None),
        Some(-1) => Ok(Some(0)),
        Some(k) => u32::try_from(k)
            .map(Some)
            .map_err(|_| ApiError::invalid("top_k", format!("'top_k' must be -1, 0 or positive, got {k}"))),
    }
}

fn take_seed(fields: &mut Fields) -> Result<u64, ApiError> {
    let Some(number) = fields.take::<serde_json::Number>("seed")? else { return Ok(random_u64()) };
    // Negative seeds are seeds too.
    number
        .as_u64()
        .or_else(|| number.as_i64().map(|seed| seed as u64))
        .ok_or_else(|| ApiError::invalid("seed", format!("'seed' must be a 64-bit integer, got {number}")))
}

fn take_logit_bias(fields: &mut Fields, model: &dyn TextModel) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let name = "logit_bias";
    let map: Map<String, Value> = fields.take(name)?.unwrap_or_default();
    if map.len() > limits::MAX_LOGIT_BIAS {
        let message = format!("'{name}' has {} entries, the limit is {}", map.len(), limits::MAX_LOGIT_BIAS);
        return Err(ApiError::invalid(name, message));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (token, bias) in map {
        let id: TokenId = token
            .parse()
            .map_err(|_| ApiError::invalid(name, format!("'{name}' has a key that is not a token id: '{token}'")))?;
        check_vocabulary(&[id], model, name)?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| {
            ApiError::invalid(name, format!("'{name}' of token {id} must be a number between -100 and 100"))
        })?;
        biases.push((id, bias as f32));
    }
    biases.sort_by_key(|(token, _)| *token);
    // "7" and "07" are two keys and one token.
    biases.dedup_by_key(|(token, _)| *token);
    Ok(biases)
}

/// Refuses token ids that the model does not have: they would index past its embedding.
pub(super) fn check_vocabulary(tokens: &[TokenId], model: &dyn TextModel, param: &str) -> Result<(), ApiError> {
    match tokens.iter().find(|token| **token >= model.vocab_size()) {
        None => Ok(()),
        Some(token) => Err(ApiError::invalid(
            param,
            format!("'{param}' contains token id {token}, but the vocabulary ends at {}", model.vocab_size() - 1),
        )),
    }
}

/// The checks every node makes again. OpenAI's ranges are narrower for the penalties and the temperature.
fn check(params: &SamplingParams) -> Result<(), ApiError> {
    let ranges = [
        ("temperature", params.temperature, 0.0, 2.0),
        ("presence_penalty", params.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", params.frequency_penalty, -2.0, 2.0),
    ];
    for (name, value, low, high) in ranges {
        if !(low..=high).contains(&value) {
            let message = format!("'{name}' must be between {low} and {high}, got {value}");
            return Err(ApiError::invalid(name, message));
        }
    }
    // `max_tokens` may still be open.
    SamplingParams { max_tokens: params.max_tokens.max(1), ..params.clone() }.check().map_err(|message| {
        let param = message.split(' ').next().unwrap_or_default().to_owned();
        ApiError { param: Some(param), ..ApiError::bad_request(message) }
    })
}

/// 64 bits from the operating system.
pub(super) fn random_u64() -> u64 {
    getrandom::u64().expect("the operating system provides random numbers")
}
