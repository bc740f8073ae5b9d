//! `cluster verify`: clusters of many settings answer, token for token, what one engine in this process answers.
//!
//! ```text
//! for every KV type, or pair of them:  the engine in this process answers all requests
//! for every cluster:  every request twice, in a random order, many at a time; others hang up at random moments
//!                     a stream each while a decode node is killed, and a prefill node, after and before the first token
//!                     at rest, every node has all of its blocks, and none is orphaned
//! ```
//!
//! Read [`SHAPES`] and [`try_out`].

use super::ask::{Heard, Stay, Verdict, ask, hear};
use super::cases::{Case, KvTypes, Limits, Oracle, Sketch, answer_all};
use super::state::{State, settle};
use super::{Logs, START_TIMEOUT, STREAM_TIMEOUT, TrialArgs, kill, on_threads, wait_back};
use crate::cli::KvCacheDtype;
use crate::client::Client;
use crate::up::{Embedded, Embedding, Model, find_model};
use anyhow::bail;
use clap::{Args, ValueEnum};
use ridge_model::generate::{Computes, Turn};
use ridge_protocol::Role;
use ridge_sim::Random;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Flags of `cluster verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// What is tried, and on what.
    #[command(flatten)]
    pub trial: TrialArgs,
    /// Four clusters instead of fifteen, and fewer requests: for CI.
    #[arg(long)]
    pub short: bool,
    /// Different requests that each cluster is asked. Default: 36, or 18 with --short.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub requests: Option<u16>,
}

/// Settings of one cluster.
#[derive(Clone, Copy, Debug)]
struct Shape {
    prefill: u16,
    decode: u16,
    kv: KvCacheDtype,
    /// The prefill nodes' if it is another: then KV is rounded on its way, as the oracle's is.
    prefill_kv: Option<KvCacheDtype>,
    block_size: u16,
    /// The prefill nodes' if it is another: then pages are made anew on their way, and no token may change.
    prefill_block_size: Option<u16>,
    /// Prompt tokens of one pass; `None` is the default.
    chunk: Option<u16>,
}

const fn shape(prefill: u16, decode: u16, kv: KvCacheDtype, block_size: u16, chunk: Option<u16>) -> Shape {
    Shape { prefill, decode, kv, prefill_kv: None, block_size, prefill_block_size: None, chunk }
}

/// Every setting meets every other kind of setting at least once.
const SHAPES: [Shape; 15] = [
    shape(1, 1, KvCacheDtype::Auto, 16, None),
    shape(2, 2, KvCacheDtype::Fp8, 8, Some(24)).with_prefill_blocks(32),
    shape(0, 1, KvCacheDtype::Int8, 32, None),
    shape(1, 1, KvCacheDtype::Int8, 32, None).with_prefill_kv(KvCacheDtype::Bf16),
    shape(1, 1, KvCacheDtype::F32, 1, Some(24)),
    shape(1, 1, KvCacheDtype::Bf16, 8, Some(100)),
    shape(2, 2, KvCacheDtype::Auto, 16, Some(64)),
    shape(1, 2, KvCacheDtype::Int8, 16, Some(40)).with_prefill_blocks(8),
    shape(2, 1, KvCacheDtype::F32, 128, None),
    shape(2, 2, KvCacheDtype::F16, 32, None),
    shape(0, 2, KvCacheDtype::Fp8, 8, None),
    shape(0, 1, KvCacheDtype::Auto, 16, None),
    shape(1, 1, KvCacheDtype::Fp8, 64, Some(200)).with_prefill_blocks(16),
    shape(2, 2, KvCacheDtype::Fp8, 16, Some(40)).with_prefill_kv(KvCacheDtype::F16).with_prefill_blocks(8),
    shape(1, 2, KvCacheDtype::F32, 16, None).with_prefill_kv(KvCacheDtype::Bf16),
];
/// As `up` pauses before a first restart.
const RESTART_AFTER: Duration = Duration::from_millis(100);
/// How many of them are enough for CI.
const SHORT: usize = 4;

impl Shape {
    const fn with_prefill_blocks(self, tokens: u16) -> Self {
        Self { prefill_block_size: Some(tokens), ..self }
    }

    const fn with_prefill_kv(self, kv: KvCacheDtype) -> Self {
        Self { prefill_kv: Some(kv), ..self }
    }

    fn types(&self) -> KvTypes {
        KvTypes { decode: self.kv, prefill: self.prefill_kv }
    }

    fn name(&self) -> String {
        let chunk = self.chunk.map_or("-".to_owned(), |chunk| chunk.to_string());
        let nodes = format!("{}P{}D", self.prefill, self.decode);
        let blocks = match self.prefill_block_size {
            Some(from) => format!("{from}>{}", self.block_size),
            None => self.block_size.to_string(),
        };
        format!("{nodes}  kv {:<9}  block {blocks:>5}  chunk {chunk:>3}", self.kv())
    }

    /// The types of its caches, in words.
    fn kv(&self) -> String {
        match self.prefill_kv {
            Some(from) => format!("{}>{}", name_of(from), name_of(self.kv)),
            None => name_of(self.kv),
        }
    }

    fn flags(&self, limits: &Limits, threads: Option<u16>) -> Vec<String> {
        let mut flags = vec![
            format!("--prefill={}", self.prefill),
            format!("--decode={}", self.decode),
            format!("--kv-cache-dtype={}", name_of(self.kv)),
            format!("--block-size={}", self.block_size),
            format!("--max-model-len={}", limits.max_model_len),
        ];
        flags.extend(self.prefill_kv.map(|kv| format!("--prefill-kv-cache-dtype={}", name_of(kv))));
        flags.extend(self.prefill_block_size.map(|size| format!("--prefill-block-size={size}")));
        flags.extend(self.chunk.map(|chunk| format!("--max-num-batched-tokens={chunk}")));
        flags.extend(threads.map(|threads| format!("--threads={threads}")));
        flags
    }
}

fn name_of(kv: KvCacheDtype) -> String {
    kv.to_possible_value().expect("no type is skipped").get_name().to_owned()
}

/// What came of one cluster.
#[derive(Debug, Default)]
struct Outcome {
    /// Streams that were compared to the end.
    same: usize,
    /// Streams whose clients hung up.
    left: usize,
    /// Nodes that were killed under a stream.
    killed: usize,
    /// Interrupted streams that rounded otherwise from the interruption on, as the oracle does when its KV is lost there.
    rounded: usize,
    /// Interrupted streams of a converting cluster, to be judged when it is gone.
    unjudged: Vec<Interrupted>,
    /// Dispatches after the first of a sequence.
    redispatched: u64,
    took: Duration,
    /// Everything that was wrong.
    wrong: Vec<String>,
}

/// An answer whose node died where KV is rounded on its way.
#[derive(Debug)]
struct Interrupted {
    /// Which of the long cases.
    case: usize,
    /// Tokens that had come by then, at least.
    at: u64,
    heard: Heard,
}

/// What came of a stream whose node was killed.
enum Answer {
    Judged(Verdict),
    Open(Interrupted),
}

/// Tokens that the router may have had of an answer, and its client not yet, when a node died.
const AHEAD: usize = 24;

/// Runs the command.
pub fn run(args: &VerifyArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let trial = &args.trial;
    let model = find_model(trial.model.as_deref())?;
    let limits = Limits::read(&model, trial.max_model_len)?;
    let requests = args.requests.map_or(if args.short { 18 } else { 36 }, usize::from);
    let shapes = if args.short { &SHAPES[..SHORT] } else { &SHAPES[..] };
    // What a cluster is asked, and then what it is asked while nodes die.
    let sketches = limits.draw(trial.seed, requests);
    let long_sketches = limits.draw_long(trial.seed, 4);
    let mut oracles: BTreeMap<KvTypes, (Vec<Case>, Vec<Case>)> = BTreeMap::new();
    for shape in shapes {
        if let Entry::Vacant(entry) = oracles.entry(shape.types()) {
            eprintln!("the oracle answers, kv {}", shape.kv());
            let all = [&sketches[..], &long_sketches].concat();
            let mut cases = answer_all(&model, &limits, shape.types(), &all)?;
            let long = cases.split_off(sketches.len());
            entry.insert((cases, long));
        }
    }
    let logs = Logs::new(trial);
    let mut outcomes = Vec::new();
    for (index, shape) in shapes.iter().enumerate() {
        eprintln!("{}", shape.name());
        let (cases, long) = &oracles[&shape.types()];
        let mut flags = shape.flags(&limits, trial.threads);
        flags.extend(["--model".to_owned(), model.path.clone()]);
        flags.extend(logs.flags(&format!("cluster-{index}")));
        let begun = Instant::now();
        let mut outcome = Outcome::default();
        if let Err(error) = try_out(trial, shape, &flags, cases, long, &mut outcome) {
            outcome.wrong.push(format!("{error:#}"));
        }
        judge(&model, &limits, shape.types(), &long_sketches, long, &mut outcome)?;
        outcome.took = begun.elapsed();
        outcomes.push((shape, outcome));
    }
    let wrong: usize = outcomes.iter().map(|(_, outcome)| outcome.wrong.len()).sum();
    logs.settle(wrong == 0);
    if trial.json {
        println!("{:#}", report_json(args, &model.name, &outcomes, started.elapsed()));
    } else {
        print!("{}", report(args, &model.name, requests, &outcomes, started.elapsed()));
    }
    if wrong > 0 {
        bail!("{wrong} things differ; repeat with --seed {}", trial.seed);
    }
    Ok(())
}

/// Does everything to one cluster.
fn try_out(
    args: &TrialArgs,
    shape: &Shape,
    flags: &[String],
    cases: &[Case],
    long: &[Case],
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let embedding = Embedding { relays: None, restart_after: RESTART_AFTER, start_timeout: START_TIMEOUT };
    let cluster = Embedded::start(flags, embedding)?;
    let client = Client::new(&cluster.url(), None, STREAM_TIMEOUT)?;
    crowd(args, &client, cases, outcome)?;
    let nodes = [cluster.names(Role::Prefill), cluster.names(Role::Decode)].concat();
    settle(&client, &nodes)?;
    let converts = shape.prefill_kv.is_some();
    interrupt(&cluster, &client, long, converts, outcome)?;
    if converts {
        // That a prompt was converted at all must be seen, or the comparison said nothing.
        let converted = settle(&client, &nodes)?.sum("ridge_kv_converted_pages_total", &nodes);
        if converted == 0.0 {
            outcome.wrong.push("no page was converted".into());
        }
    }
    let state = settle(&client, &nodes)?;
    let damaged = state.sum("ridge_kv_digest_failures_total", &nodes);
    if damaged > 0.0 {
        outcome.wrong.push(format!("{damaged} pages arrived damaged, and nobody damages pages here"));
    }
    outcome.redispatched = state.router("ridge_router_redispatched_total").unwrap_or(0.0) as u64;
    Ok(())
}

/// Every request twice, in a random order, beside clients that hang up.
fn crowd(args: &TrialArgs, client: &Client, cases: &[Case], outcome: &mut Outcome) -> anyhow::Result<()> {
    let mut random = Random::new(args.seed, 20);
    let mut jobs: Vec<(usize, Stay)> = (0..2 * cases.len()).map(|job| (job % cases.len(), Stay::ToTheEnd)).collect();
    for case in 0..cases.len() {
        let stay = match random.chance(500) {
            true => Stay::Pieces(random.range(1, 20)),
            false => Stay::Time(Duration::from_micros(random.range(200, 50_000))),
        };
        jobs.push((case, stay));
    }
    for last in (1..jobs.len()).rev() {
        jobs.swap(last, random.pick(last as u64 + 1) as usize);
    }
    let next = AtomicUsize::new(0);
    let outcome = Mutex::new(outcome);
    on_threads(args.clients.into(), |_| {
        loop {
            let job = next.fetch_add(1, Ordering::Relaxed);
            let Some((case, stay)) = jobs.get(job) else { break };
            let case = &cases[*case];
            let mut body = case.body.clone();
            if case.instead.is_some() {
                // Nobody finds what another request has left: which of two engines had computed it would be chance.
                body["cache_salt"] = json!(format!("job {job}"));
            }
            let verdict = ask(client, case, &body, *stay, &mut |_, _| {});
            outcome.lock().expect("a client does not panic").count(verdict);
        }
        Ok(())
    })?;
    Ok(())
}

/// A stream each while a decode node dies, a prefill node after it sent the first token, one before, and a decode node again,
/// under a constrained answer. Where KV is rounded on its way, what came after that is judged later.
fn interrupt(
    cluster: &Embedded,
    client: &Client,
    long: &[Case],
    converts: bool,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let plans = [(Role::Decode, 3), (Role::Prefill, 1), (Role::Prefill, 0), (Role::Decode, 5)];
    for (index, ((role, after), case)) in plans.into_iter().zip(long).enumerate() {
        let names = cluster.names(role);
        if names.is_empty() {
            continue;
        }
        let restarts = |name: &str| cluster.member(name).map_or(0, |member| member.restarts);
        let before: Vec<(String, u32)> = names.iter().map(|name| (name.clone(), restarts(name))).collect();
        let mut killed = Vec::new();
        let mut strike = |name: &str| killed.extend(kill(cluster, name).map(|_| name.to_owned()));
        // `on_piece` says of so many tokens whether a node may be dead by now.
        let follow = |on_piece: &mut dyn FnMut(u64) -> bool| -> Answer {
            if converts {
                return match hear(client, case, after > 0, on_piece) {
                    Ok(heard) => Answer::Open(Interrupted { case: index, at: after, heard }),
                    Err(why) => Answer::Judged(Verdict::Different(why)),
                };
            }
            let mut on_piece = |tokens, _| {
                on_piece(tokens);
            };
            Answer::Judged(ask(client, case, &case.body, Stay::ToTheEnd, &mut on_piece))
        };
        let answer = if after == 0 {
            std::thread::scope(|scope| {
                let stream = scope.spawn(|| follow(&mut |_| false));
                // All of them: one has the prompt, and none is left to take it over before it is back.
                std::thread::sleep(Duration::from_millis(4));
                names.iter().for_each(|name| strike(name));
                stream.join().expect("a client does not panic")
            })
        } else {
            follow(&mut |tokens| {
                if tokens == after
                    && let Some(name) = busiest(client, &names)
                {
                    strike(&name);
                }
                tokens >= after
            })
        };
        outcome.killed += killed.len();
        match answer {
            Answer::Judged(verdict) => outcome.count(verdict),
            Answer::Open(interrupted) => outcome.unjudged.push(interrupted),
        }
        for name in &killed {
            let restarts = before.iter().find(|(other, _)| other == name).map_or(0, |(_, restarts)| *restarts);
            wait_back(cluster, name, restarts)?;
        }
    }
    Ok(())
}

/// Compares interrupted answers with what the oracle answers if its KV is lost somewhere after the tokens that had come, and computed
/// again by either of its engines.
fn judge(
    model: &Model,
    limits: &Limits,
    types: KvTypes,
    sketches: &[Sketch],
    cases: &[Case],
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let mut oracle = None;
    for Interrupted { case: index, at, heard } in std::mem::take(&mut outcome.unjudged) {
        let (case, sketch) = (&cases[index], &sketches[index]);
        if heard.is(&case.expected) || case.instead.as_ref().is_some_and(|instead| heard.is(instead)) {
            outcome.same += 1;
            continue;
        }
        let oracle = match &mut oracle {
            Some(oracle) => oracle,
            empty => empty.insert(Oracle::load(model, limits, types)?),
        };
        if rounds_so(oracle, sketch, at as usize, &heard)? {
            outcome.same += 1;
            outcome.rounded += 1;
        } else {
            let what = &case.what;
            outcome
                .wrong
                .push(format!("{what}: no loss of its KV after {at} to {} tokens explains it", at as usize + AHEAD));
        }
    }
    Ok(())
}

/// Whether some loss of its KV gives this answer.
fn rounds_so(oracle: &mut Oracle, sketch: &Sketch, at: usize, heard: &Heard) -> anyhow::Result<bool> {
    let engines = [Computes::Prefill, Computes::Decode];
    for lost in at..=at + AHEAD {
        for (first, then) in engines.into_iter().flat_map(|first| engines.map(|then| (first, then))) {
            let turns = [Turn { at: 0, by: first }, Turn { at: lost, by: then }];
            if heard.is(&oracle.interrupted(sketch, &turns)?) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The node with the most sequences, as the router counts them; the first one if none has any.
pub(super) fn busiest(client: &Client, names: &[String]) -> Option<String> {
    let state = State::read(client).ok()?;
    let load = |name: &&String| state.of("ridge_requests_in_flight", name).unwrap_or(0.0) as u64;
    names.iter().rev().max_by_key(load).cloned()
}

impl Outcome {
    fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Same => self.same += 1,
            Verdict::Left => self.left += 1,
            Verdict::Different(why) => self.wrong.push(why),
        }
    }
}

fn report(args: &VerifyArgs, model: &str, requests: usize, outcomes: &[(&Shape, Outcome)], took: Duration) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes everything");
    line(format!("{model}: {requests} different requests per cluster, seed {}", args.trial.seed));
    for (shape, outcome) in outcomes {
        let Outcome { same, left, killed, rounded, redispatched, took, wrong, unjudged: _ } = outcome;
        line(format!(
            "  {}  {same:>4} streams the same, {left:>3} hang-ups, {killed} kills, {redispatched} moved{}: {} ({:.1} s)",
            shape.name(),
            if *rounded > 0 { format!(", {rounded} rounded once more") } else { String::new() },
            if wrong.is_empty() { "right, no block lost" } else { "WRONG" },
            took.as_secs_f64()
        ));
        wrong.iter().for_each(|wrong| line(format!("      {wrong}")));
    }
    let right = outcomes.iter().all(|(_, outcome)| outcome.wrong.is_empty());
    let verdict = if right { "every stream was the oracle's, token for token" } else { "there are differences" };
    line(format!("{verdict}; {:.1} s", took.as_secs_f64()));
    out
}

fn report_json(args: &VerifyArgs, model: &str, outcomes: &[(&Shape, Outcome)], took: Duration) -> Value {
    let one = |(shape, outcome): &(&Shape, Outcome)| {
        json!({
            "prefill": shape.prefill, "decode": shape.decode, "kv_cache_dtype": name_of(shape.kv), "prefill_kv_cache_dtype": shape.prefill_kv.map(name_of),
            "block_size": shape.block_size, "prefill_block_size": shape.prefill_block_size, "chunk": shape.chunk, "streams": outcome.same, "hang_ups": outcome.left,
            "kills": outcome.killed, "rounded_once_more": outcome.rounded, "redispatched": outcome.redispatched, "seconds": outcome.took.as_secs_f64(),
            "wrong": outcome.wrong,
        })
    };
    json!({
        "command": "verify", "version": env!("CARGO_PKG_VERSION"), "model": model, "seed": args.trial.seed,
        "clusters": outcomes.iter().map(one).collect::<Vec<_>>(), "seconds": took.as_secs_f64(),
        "right": outcomes.iter().all(|(_, outcome)| outcome.wrong.is_empty()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_tried() {
        let tried = |value: &dyn Fn(&Shape) -> bool| SHAPES.iter().any(value);
        for kv in KvCacheDtype::value_variants() {
            assert!(tried(&|shape| shape.kv == *kv), "{kv:?}");
        }
        for (prefill, decode) in [(1, 1), (2, 2), (0, 1)] {
            assert!(SHAPES[..SHORT].iter().any(|shape| (shape.prefill, shape.decode) == (prefill, decode)));
        }
        let other = |shape: &Shape| shape.prefill_block_size.map(|from| from > shape.block_size);
        assert!(tried(&|shape| other(shape) == Some(true)) && tried(&|shape| other(shape) == Some(false)));
        assert!(SHAPES[..SHORT].iter().any(|shape| other(shape).is_some()));
        let converts = |shape: &Shape| shape.prefill_kv.is_some();
        assert!(SHAPES[..SHORT].iter().any(converts) && SHAPES.iter().filter(|shape| converts(shape)).count() >= 3);
        for block_size in [1, 8, 16, 32, 64, 128] {
            assert!(tried(&|shape| shape.block_size == block_size), "{block_size}");
        }
    }
}
