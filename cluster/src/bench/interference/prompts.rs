//! Prompts that no server has seen before: random token ids, or random words where a server has no `/tokenize`.
//!
//! Ids are drawn from those that the server gives for [`WORDS`], so they are in the vocabulary and none is special.
//! Every prompt has a random stream of its own, so no two share a first block and no prefix cache helps. Read
//! [`Prompts`].

use super::args::PromptKind;
use crate::client::Client;
use anyhow::{Context, ensure};
use serde_json::Value;
use std::ops::ControlFlow;

/// What prompts are made of.
const WORDS: &str = "time year people way day man thing woman life child world school state family student group country \
    problem hand part place case week company system program question work government number night point home water \
    room mother area money story fact month lot right study book eye job word business issue side kind head house \
    service friend father power hour game line end member law car city community name president team minute idea kid \
    body information back parent face others level office door health person art war history party result change \
    morning reason research girl guy moment air teacher force education";
/// Fewer different ids would make prompts alike.
const IDS_MIN: usize = 16;

/// Makes prompts for one server.
#[derive(Clone, PartialEq, Debug)]
pub enum Prompts {
    /// Of these token ids.
    Tokens(Vec<u32>),
    /// Of words, so many tokens of which make a word.
    Text {
        /// As the server counted them in a trial.
        tokens_per_word: f64,
    },
}

impl Prompts {
    /// Asks the server what it can take.
    pub fn prepare(client: &Client, model: &str, kind: PromptKind, seed: u64) -> anyhow::Result<Self> {
        let ids = match kind {
            PromptKind::Text => None,
            PromptKind::Tokens => {
                Some(ids(client, model).context("--prompts tokens needs token ids; --prompts text does without")?)
            }
            PromptKind::Auto => match ids(client, model) {
                Ok(ids) => Some(ids),
                Err(error) => {
                    eprintln!("note: prompts are words, and their lengths approximate, because {error:#}");
                    None
                }
            },
        };
        Ok(match ids {
            Some(ids) => Self::Tokens(ids),
            None => Self::Text { tokens_per_word: tokens_per_word(client, model, seed)? },
        })
    }

    /// What they are made of, as `--prompts` spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tokens(_) => "tokens",
            Self::Text { .. } => "text",
        }
    }

    /// A prompt of `tokens` tokens.
    pub fn draw(&self, random: &mut Random, tokens: usize) -> Value {
        match self {
            Self::Tokens(ids) => (0..tokens).map(|_| *random.pick(ids)).collect(),
            Self::Text { tokens_per_word } => {
                text(random, ((tokens as f64 / tokens_per_word).round() as usize).max(1)).into()
            }
        }
    }
}

/// Different token ids of a server.
fn ids(client: &Client, model: &str) -> anyhow::Result<Vec<u32>> {
    let mut ids = client.tokenize(model, WORDS)?;
    ids.sort_unstable();
    ids.dedup();
    ensure!(ids.len() >= IDS_MIN, "{}: POST /tokenize knows {} different tokens", client.base(), ids.len());
    Ok(ids)
}

/// How long words are, by the server's own count of a prompt. One token each if it does not count.
fn tokens_per_word(client: &Client, model: &str, seed: u64) -> anyhow::Result<f64> {
    const TRIAL_WORDS: usize = 100;
    let trial = text(&mut Random::new(seed, Stream::Trial), TRIAL_WORDS).into();
    let answer = client.complete(model, &trial, 1, &mut |_| ControlFlow::Continue(()))?;
    match answer.prompt_tokens.filter(|tokens| *tokens > 0) {
        Some(tokens) => Ok(tokens as f64 / TRIAL_WORDS as f64),
        None => {
            eprintln!("note: {} does not count prompts; each word is taken for a token", client.base());
            Ok(1.0)
        }
    }
}

fn text(random: &mut Random, words: usize) -> String {
    let all: Vec<&str> = WORDS.split_whitespace().collect();
    let words: Vec<&str> = (0..words).map(|_| *random.pick(&all)).collect();
    words.join(" ")
}

/// Whose prompts a random stream makes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    /// The prompt that tells how long words are.
    Trial,
    /// The requests before the measured ones.
    WarmUp,
    /// A decoding client's, in the phase with or without long prompts.
    Client {
        /// Which client.
        index: usize,
        /// With long prompts.
        loaded: bool,
    },
    /// A long prompt.
    Long(usize),
}

/// SplitMix64: small, seeded, the same everywhere.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    pub fn new(seed: u64, stream: Stream) -> Self {
        let (kind, index) = match stream {
            Stream::Trial => (0, 0),
            Stream::WarmUp => (1, 0),
            Stream::Client { index, loaded: false } => (2, index),
            Stream::Client { index, loaded: true } => (3, index),
            Stream::Long(index) => (4, index),
        };
        Self(mix(mix(seed) ^ (kind << 56 | index as u64)))
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // A remainder prefers the first few by one part in 2^50: too little to matter here.
        &from[(mix(self.0) % from.len() as u64) as usize]
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_the_length_asked_for_and_differ() {
        let prompts = Prompts::Tokens((100..164).collect());
        let draw = |seed, stream| prompts.draw(&mut Random::new(seed, stream), 32);
        let client = |index, loaded| Stream::Client { index, loaded };
        let all = [
            draw(1, Stream::WarmUp),
            draw(1, client(0, false)),
            draw(1, client(0, true)),
            draw(1, client(1, false)),
            draw(1, Stream::Long(0)),
            draw(1, Stream::Long(1)),
            draw(2, Stream::Long(1)),
        ];
        for (i, prompt) in all.iter().enumerate() {
            let ids = prompt.as_array().expect("a list");
            assert_eq!(ids.len(), 32);
            assert!(ids.iter().all(|id| id.as_u64().is_some_and(|id| (100..164).contains(&id))), "{prompt}");
            assert!(!all[..i].contains(prompt), "{i}");
        }
        assert_eq!(draw(1, Stream::Long(1)), all[5], "a seed says it all");
    }

    #[test]
    fn words_are_counted_as_the_server_counts_them() {
        let prompts = Prompts::Text { tokens_per_word: 1.25 };
        let words = |tokens| {
            let prompt = prompts.draw(&mut Random::new(1, Stream::WarmUp), tokens);
            prompt.as_str().expect("text").split(' ').count()
        };
        assert_eq!((words(100), words(1)), (80, 1));
    }
}
