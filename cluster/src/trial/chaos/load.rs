//! Who asks while the cluster is being broken: clients that stay and clients that hang up. Read [`Load`].

use super::super::STREAM_TIMEOUT;
use super::super::ask::{Stay, Verdict, ask};
use super::super::cases::Case;
use super::super::on_threads;
use crate::client::Client;
use crate::up::MODEL;
use ridge_sim::Random;
use serde_json::json;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// After so many wrong streams, the rest would say nothing new.
const WRONG_MAX: usize = 20;

/// Clients of a cluster.
#[derive(Clone, Copy)]
pub struct Load<'a> {
    /// Talks to it.
    pub client: &'a Client,
    /// What they ask for.
    pub cases: &'a [Case],
    /// Key of their choices.
    pub seed: u64,
    /// How many at a time.
    pub clients: usize,
}

/// What is enough.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Goal {
    /// Streams to the end.
    pub streams: u64,
    /// Clients that hang up.
    pub cancels: u64,
}

/// What came.
#[derive(Debug, Default)]
pub struct Tally {
    /// Streams that were the oracle's to the end.
    pub same: u64,
    /// Clients that hung up.
    pub left: u64,
    /// What was wrong.
    pub wrong: Vec<String>,
    /// When each stream's pieces came, and when it was asked for.
    pub trails: Vec<Trail>,
    /// The goal was reached in time.
    pub reached: bool,
    /// Requests that were begun: each has choices of its own.
    begun: u64,
}

/// The times of one stream.
#[derive(Clone, PartialEq, Debug)]
pub struct Trail {
    /// The request went out.
    pub asked: Instant,
    /// Pieces came.
    pub pieces: Vec<Instant>,
}

impl Load<'_> {
    /// Asks until the goal is reached and `enough` agrees, or `limit` is over.
    pub fn run(&self, goal: Goal, limit: Duration, enough: impl Fn() -> bool + Sync) -> anyhow::Result<Tally> {
        let started = Instant::now();
        let tally = Mutex::new(Tally::default());
        on_threads(self.clients, |_| {
            loop {
                let (number, leave) = {
                    let mut tally = tally.lock().expect("a client does not panic");
                    let reached = tally.same >= goal.streams && tally.left >= goal.cancels && enough();
                    tally.reached |= reached;
                    if reached || tally.wrong.len() >= WRONG_MAX || started.elapsed() > limit {
                        return Ok(());
                    }
                    tally.begun += 1;
                    // Both come to their end at about the same time.
                    let leave =
                        tally.left * goal.streams.max(1) < tally.same * goal.cancels || tally.same >= goal.streams;
                    (tally.begun, leave && tally.left < goal.cancels)
                };
                let (verdict, trail) = self.one(number, leave);
                let mut tally = tally.lock().expect("a client does not panic");
                match verdict {
                    Verdict::Same => tally.same += 1,
                    Verdict::Left => tally.left += 1,
                    Verdict::Different(why) => {
                        let at = trail.asked.duration_since(started).as_secs_f64();
                        tally.wrong.push(format!("stream {number}, asked for {at:.3} s after the start: {why}"));
                    }
                }
                tally.trails.push(trail);
            }
        })?;
        Ok(tally.into_inner().expect("a client does not panic"))
    }

    fn one(&self, number: u64, leave: bool) -> (Verdict, Trail) {
        let mut random = Random::new(self.seed, (1 << 32) + number);
        let case = &self.cases[random.pick(self.cases.len() as u64) as usize];
        let mut body = case.body.clone();
        if random.chance(700) {
            // A prefix cache of its own: blocks must travel.
            body["cache_salt"] = json!(format!("{}-{number}", random.pick(1 << 53)));
        }
        let stay = match (leave, random.chance(500)) {
            (false, _) => Stay::ToTheEnd,
            (true, true) => Stay::Pieces(random.range(1, 40)),
            (true, false) => Stay::Time(Duration::from_micros(random.range(200, 100_000))),
        };
        let mut trail = Trail { asked: Instant::now(), pieces: Vec::new() };
        let verdict = ask(self.client, case, &body, stay, &mut |_, now| trail.pieces.push(now));
        (verdict, trail)
    }
}

/// How long the first token of a prompt takes that no cache knows; `None` if it has no room for one.
pub fn first_token(client: &Client, prompt: &[u32], salt: usize) -> anyhow::Result<Option<Duration>> {
    let body = json!({
        "model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": true, "stream": true,
        "skip_special_tokens": false, "logprobs": 0, "cache_salt": format!("first-token-{salt}"),
    });
    let asked = Instant::now();
    let mut first = None;
    client.stream("/v1/completions", &body, STREAM_TIMEOUT, &mut |event, now| {
        if event["choices"][0]["logprobs"].is_object() {
            first.get_or_insert(now.duration_since(asked));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(first)
}
