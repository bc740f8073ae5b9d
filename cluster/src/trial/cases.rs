//! Requests drawn from a seed, and what one process alone answers to them.
//!
//! Prompts end before, at and after block borders, half of them start like another one, and all of sampling takes part: greedy,
//! seeded, filters, penalties, biases, log-probabilities, stop strings, the end of text and grammars. Read [`Case`] and [`Oracle`].

use crate::cli::{EngineArgs, HugePagesArg, KernelsArg, KvCacheDtype, ProductsArg, Switch, WeightsCache};
use crate::roles;
use crate::up::{MODEL, Model};
use anyhow::Context;
use ridge_kernels::sync::pool::Placement;
use ridge_model::checkpoint::{LoadOptions, ModelSource, load};
use ridge_model::detokenize::StreamDecoder;
use ridge_model::device::DeviceChoice;
use ridge_model::generate::{Computes, Turn, generate, generate_in_turns};
use ridge_model::grammar::Grammars;
use ridge_model::memory::PassLimits;
use ridge_model::worker::{LoadedEngine, load_engine};
use ridge_protocol::{Grammar, GrammarKind, SamplingParams, TokenOut};
use ridge_sim::Random;
use serde_json::{Value, json};

/// Without `--max-model-len`, contexts are no longer: memory is for blocks, and time for many requests.
const CONTEXT_MAX: usize = 2048;
/// Prompt tokens that the oracle computes in one pass.
const CHUNK: usize = 512;
/// Block size of the oracle.
const BLOCK_SIZE: usize = 16;
/// Longest prompt and answer of an ordinary case.
const TOKENS_MAX: (usize, usize) = (300, 64);
/// Prompt and answer of a case that is to be interrupted.
const LONG: (usize, usize) = (120, 400);

/// What is known of the model before any engine is set up.
#[derive(Debug)]
pub struct Limits {
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: usize,
    vocab: u32,
    eos: Vec<u32>,
    special: Vec<u32>,
    /// Its tokenizer can follow grammars.
    grammars: bool,
}

/// A request without its oracle.
#[derive(Clone, Debug)]
pub struct Sketch {
    /// What is special about it.
    kind: Kind,
    prompt: Vec<u32>,
    max_tokens: u32,
    seed: u64,
}

/// How tokens are chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Greedy,
    Scored,
    Nucleus,
    TopK,
    Penalties,
    StopString,
    EndOfText,
    Schema,
    Pattern,
}

const KINDS: [Kind; 9] = [
    Kind::Greedy,
    Kind::Penalties,
    Kind::Schema,
    Kind::Nucleus,
    Kind::StopString,
    Kind::Pattern,
    Kind::Scored,
    Kind::TopK,
    Kind::EndOfText,
];
/// What [`Kind::Pattern`] answers with: it ends where the grammar does, unless `max_tokens` comes first.
const PATTERN: &str = "([a-f]{2}-){1,6}[0-9]{3}";

/// Types of the KV caches of a cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct KvTypes {
    /// Decode nodes'.
    pub decode: KvCacheDtype,
    /// Prefill nodes', if it is another.
    pub prefill: Option<KvCacheDtype>,
}

/// A request and its oracle.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is asked for, for reports.
    pub what: String,
    /// The body of `POST /v1/completions`.
    pub body: Value,
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// What must come.
    pub expected: Expected,
    /// What may come instead, where it is chance which node computes the prompt and the two round otherwise.
    pub instead: Option<Expected>,
}

/// What one process alone answers.
#[derive(Clone, PartialEq, Debug)]
pub struct Expected {
    /// Tokens of the answer, a stop token included.
    pub ids: Vec<u32>,
    /// The text that clients see.
    pub text: String,
    /// `stop` or `length`.
    pub finish: &'static str,
    /// Text and log-probability of each token, if they are asked for.
    pub scores: Option<Vec<(String, f32)>>,
}

impl Limits {
    /// Reads the model's description.
    pub fn read(model: &Model, asked: Option<usize>) -> anyhow::Result<Self> {
        let checkpoint = load(&ModelSource::parse(&model.path)?, &LoadOptions::default(), &mut |_| {})?;
        let vocab = checkpoint.spec.vocab.min(checkpoint.tokenizer.vocab_size()) as u32;
        Ok(Self {
            max_model_len: asked.unwrap_or(checkpoint.spec.context.min(CONTEXT_MAX)),
            vocab,
            eos: checkpoint.generation.eos.clone(),
            grammars: Grammars::new(checkpoint.tokenizer.clone(), checkpoint.spec.vocab).check(&pattern()).is_ok(),
            special: (0..vocab).filter(|id| checkpoint.tokenizer.is_special(*id)).collect(),
        })
    }

    /// Prompt and answer that fit, at most as long as wanted.
    fn fit(&self, (prompt, answer): (usize, usize)) -> (usize, usize) {
        (prompt.min(self.max_model_len / 3).max(1), answer.min(self.max_model_len / 2).max(1))
    }

    fn tokens(&self, random: &mut Random, len: usize) -> Vec<u32> {
        let mut one = || loop {
            let id = random.pick(self.vocab.into()) as u32;
            if !self.special.contains(&id) {
                return id;
            }
        };
        (0..len).map(|_| one()).collect()
    }

    /// A model whose tokens cannot be constrained is asked for something else instead.
    fn kind(&self, kind: Kind) -> Kind {
        match kind {
            Kind::Schema | Kind::Pattern if !self.grammars => Kind::Greedy,
            kind => kind,
        }
    }

    /// Requests of all kinds, `count` of them.
    pub fn draw(&self, seed: u64, count: usize) -> Vec<Sketch> {
        let mut random = Random::new(seed, 10);
        let (prompt_max, answer_max) = self.fit(TOKENS_MAX);
        let mut sketches: Vec<Sketch> = Vec::new();
        for index in 0..count {
            let len = match index % 4 {
                // Around the borders of blocks of any size.
                0 => (1 << random.range(0, 7)) + random.pick(3) as usize,
                _ => random.range(1, prompt_max as u64) as usize,
            };
            let mut prompt = self.tokens(&mut random, len.min(prompt_max));
            if index % 2 == 1 {
                let shared = sketches[random.pick(sketches.len() as u64) as usize].prompt.clone();
                let keep = random.range(1, shared.len().min(prompt.len()) as u64) as usize;
                prompt[..keep].copy_from_slice(&shared[..keep]);
            }
            let max_tokens = random.range(1, answer_max as u64) as u32;
            sketches.push(Sketch {
                kind: self.kind(KINDS[index % KINDS.len()]),
                prompt,
                max_tokens,
                seed: random.pick(1 << 53),
            });
        }
        sketches
    }

    /// Requests with answers long enough to be interrupted, `count` of them, greedy and drawn.
    pub fn draw_long(&self, seed: u64, count: usize) -> Vec<Sketch> {
        let mut random = Random::new(seed, 11);
        let (prompt, answer) = self.fit(LONG);
        let kinds = [Kind::Scored, Kind::Penalties, Kind::Nucleus, Kind::Schema];
        let mut one = |index: usize| {
            let len = random.range((prompt as u64).div_ceil(2), prompt as u64) as usize;
            let prompt = self.tokens(&mut random, len);
            Sketch {
                kind: self.kind(kinds[index % kinds.len()]),
                prompt,
                max_tokens: answer as u32,
                seed: random.pick(1 << 53),
            }
        };
        (0..count).map(&mut one).collect()
    }
}

/// One engine in this process, or one for prompts and one for the rest.
pub struct Oracle {
    loaded: LoadedEngine,
    /// Computes prompts; its KV is converted.
    prefill: Option<LoadedEngine>,
    eos: Vec<u32>,
}

impl Oracle {
    /// Loads the model with a KV cache of this type, and one of another for prompts.
    pub fn load(model: &Model, limits: &Limits, kv: KvTypes) -> anyhow::Result<Self> {
        let load = |dtype| {
            let engine = EngineArgs {
                max_model_len: Some(limits.max_model_len),
                block_size: BLOCK_SIZE,
                kv_cache_dtype: dtype,
                kv_memory: None,
                weights_cache: WeightsCache::Auto,
                huge_pages: HugePagesArg::Auto,
                device: DeviceChoice::Cpu,
                gpu_memory_utilization: 1.0,
                kernels: KernelsArg::Stable,
                products: ProductsArg::Own,
                cuda_graphs: Switch::On,
            };
            let options = roles::engine(model.path.clone(), Placement::threads(roles::default_threads()), &engine);
            load_engine(&options, PassLimits { tokens: CHUNK, sequences: 1 }, &mut |_| {})
        };
        let prefill = kv.prefill.map(load).transpose()?;
        Ok(Self { loaded: load(kv.decode)?, prefill, eos: limits.eos.clone() })
    }

    /// The request of a sketch, with its answer.
    pub fn answer(&mut self, sketch: &Sketch) -> anyhow::Result<Case> {
        let params = params(sketch, &self.eos);
        let both = self.prefill.is_some();
        let alone = [Turn { at: 0, by: Computes::Decode }];
        let usual = if both { [Turn { at: 0, by: Computes::Prefill }] } else { alone };
        let mut expected = self.run(&sketch.prompt, &params, None, &usual)?;
        let mut stop = None;
        if sketch.kind == Kind::StopString {
            stop = stop_in(&expected.text);
            if let Some(stop) = &stop {
                expected = self.run(&sketch.prompt, &params, Some(stop), &usual)?;
            }
        }
        let instead = both.then(|| self.run(&sketch.prompt, &params, stop.as_deref(), &alone)).transpose()?;
        let Sketch { kind, prompt, max_tokens, .. } = sketch;
        let what = format!("{kind:?}, prompt of {} tokens, at most {max_tokens} generated", prompt.len());
        Ok(Case { what, body: body(prompt, &params, stop.as_deref()), prompt: prompt.clone(), expected, instead })
    }

    /// What is answered if the sequence's KV is lost at these turns, and computed again.
    pub fn interrupted(&mut self, sketch: &Sketch, turns: &[Turn]) -> anyhow::Result<Expected> {
        self.run(&sketch.prompt, &params(sketch, &self.eos), None, turns)
    }

    /// What is answered; with one engine, turns change nothing.
    fn run(
        &mut self,
        prompt: &[u32],
        params: &SamplingParams,
        stop: Option<&str>,
        turns: &[Turn],
    ) -> anyhow::Result<Expected> {
        let tokenizer = self.loaded.checkpoint.tokenizer.clone();
        let mut decoder = StreamDecoder::after(&tokenizer, false, prompt);
        let mut text = String::new();
        let mut stopped = None;
        let mut on_token = |out: &TokenOut| {
            if !params.is_stop(out.token) {
                text.push_str(&decoder.push(out.token).unwrap_or_default());
            }
            stopped = stop.and_then(|stop| text.find(stop));
            stopped.is_none()
        };
        let (limit, decode) = (self.loaded.max_model_len, self.loaded.engine.as_mut());
        let out = match &mut self.prefill {
            Some(prefill) => {
                let prefill = prefill.engine.as_mut();
                generate_in_turns(prefill, decode, prompt, params, CHUNK, limit, turns, &mut on_token)?
            }
            None => generate(decode, prompt, params, CHUNK, limit, &mut on_token)?,
        };
        text.push_str(&decoder.flush().unwrap_or_default());
        // The last character may be the one that completes it.
        let stopped = stopped.or_else(|| text.find(stop?));
        text.truncate(stopped.unwrap_or(text.len()));
        let ended = out.last().is_some_and(|last| last.ends || params.is_stop(last.token));
        let score = |out: &TokenOut| {
            let token = String::from_utf8_lossy(&tokenizer.token_bytes(out.token)).into_owned();
            Some((token, out.logprob?))
        };
        Ok(Expected {
            ids: out.iter().map(|out| out.token).collect(),
            finish: if ended || stopped.is_some() { "stop" } else { "length" },
            scores: params.logprobs.map(|_| out.iter().filter_map(score).collect()),
            text,
        })
    }
}

fn params(sketch: &Sketch, eos: &[u32]) -> SamplingParams {
    let Sketch { kind, prompt, max_tokens, seed } = sketch;
    let greedy = SamplingParams { ignore_eos: true, seed: *seed, ..SamplingParams::greedy(*max_tokens) };
    let nucleus = SamplingParams { temperature: 0.8, top_p: 0.95, ..greedy.clone() };
    match kind {
        Kind::Greedy => greedy,
        Kind::Scored => SamplingParams { logprobs: Some(2), ..greedy },
        Kind::Nucleus | Kind::StopString => nucleus,
        Kind::TopK => SamplingParams { temperature: 1.25, top_k: 40, min_p: 0.02, ..greedy },
        Kind::Penalties => SamplingParams {
            temperature: 0.7,
            repetition_penalty: 1.25,
            presence_penalty: 0.75,
            frequency_penalty: 0.5,
            logit_bias: prompt.first().map(|id| (*id, 2.5)).into_iter().collect(),
            logprobs: Some(0),
            ..greedy
        },
        // Both have more than one way to go on at most places.
        Kind::Schema => SamplingParams { grammar: Some(Box::new(schema())), logprobs: Some(1), ..nucleus },
        Kind::Pattern => SamplingParams {
            grammar: Some(Box::new(pattern())),
            ignore_eos: false,
            stop_tokens: eos.to_vec(),
            ..greedy
        },
        Kind::EndOfText => SamplingParams { ignore_eos: false, stop_tokens: eos.to_vec(), ..greedy },
    }
}

fn pattern() -> Grammar {
    Grammar { kind: GrammarKind::Regex, text: PATTERN.into() }
}

/// A list too long for most answers, so that there is always something to interrupt.
fn schema() -> Grammar {
    let item = json!({
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 16}, "n": {"type": "integer"}},
        "required": ["name", "n"], "additionalProperties": false,
    });
    let text = json!({"type": "array", "minItems": 60, "items": item}).to_string();
    Grammar { kind: GrammarKind::JsonSchema, text }
}

/// The body that asks for `params`. Whatever the model's authors recommend is overruled.
fn body(prompt: &[u32], params: &SamplingParams, stop: Option<&str>) -> Value {
    let bias: serde_json::Map<String, Value> =
        params.logit_bias.iter().map(|(id, bias)| (id.to_string(), json!(bias))).collect();
    let outputs = params.grammar.as_deref().map(|Grammar { kind, text }| match kind {
        GrammarKind::JsonSchema => json!({"json": text}),
        GrammarKind::Regex => json!({"regex": text}),
        GrammarKind::Lark => json!({"grammar": text}),
    });
    // As text, a number keeps the value that it has here.
    let number = |value: f32| value.to_string().parse::<serde_json::Number>().expect("a finite number is one");
    json!({
        "model": MODEL, "prompt": prompt, "max_tokens": params.max_tokens, "ignore_eos": params.ignore_eos,
        "temperature": number(params.temperature), "top_p": number(params.top_p), "top_k": params.top_k,
        "min_p": number(params.min_p), "repetition_penalty": number(params.repetition_penalty),
        "presence_penalty": number(params.presence_penalty),
        "frequency_penalty": number(params.frequency_penalty), "logit_bias": bias, "seed": params.seed,
        "logprobs": params.logprobs, "stop": stop, "structured_outputs": outputs, "skip_special_tokens": false,
        "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    })
}

/// Up to four characters from the middle of an answer.
fn stop_in(text: &str) -> Option<String> {
    let chars: Vec<char> = text.chars().collect();
    // What a broken character is shown as may change while it is not whole.
    let middle = chars.get(chars.len() / 2..)?.iter().take_while(|c| **c != char::REPLACEMENT_CHARACTER);
    let stop: String = middle.take(4).collect();
    (!stop.is_empty()).then_some(stop)
}

/// All sketches, answered with KV caches of these types.
pub fn answer_all(model: &Model, limits: &Limits, kv: KvTypes, sketches: &[Sketch]) -> anyhow::Result<Vec<Case>> {
    let mut oracle = Oracle::load(model, limits, kv)?;
    sketches.iter().map(|sketch| oracle.answer(sketch)).collect::<Result<_, _>>().context("the oracle")
}
