//! `cluster chaos`: streams run on a cluster of several processes while nodes are killed and stopped, cables cut, packets lost
//! and pages damaged; every stream must be the oracle's, and in the end every block must be where it belongs.
//!
//! ```text
//! calm:     streams without faults
//! faults:   streams and hang-ups, while faults drawn from the seed come and go, until there were enough of each
//! damage:   streams, while prefill nodes damage pages and nothing else is wrong: what was damaged must have been found
//! failover: one stream at a time, whose decode node is killed; then its prompt and tokens so far, computed afresh
//! rest:     nobody asks for anything
//! ```
//!
//! Read [`run`], [`faults`] (what is done to the cluster), [`load`] (who asks) and [`report`].

mod faults;
mod load;
mod report;

use super::ask::{Stay, Verdict, ask};
use super::cases::{Case, KvTypes, Limits, answer_all};
use super::state::{State, settle};
use super::verify::busiest;
use super::{Logs, START_TIMEOUT, STREAM_TIMEOUT, TrialArgs, kill, wait_back};
use crate::cli::KvCacheDtype;
use crate::client::Client;
use crate::size::parse_duration;
use crate::up::{Embedded, Embedding, Relays, find_model};
use anyhow::{Context, bail, ensure};
use clap::Args;
use faults::{Faults, inject};
use load::{Goal, Load, Tally};
use ridge_protocol::Role;
use ridge_sim::Random;
use serde_json::json;
use std::time::{Duration, Instant};

/// Datagrams between nodes: several fit into the relays' socket buffers, so that nothing is lost but what is meant to be.
const MTU: &str = "--mtu=8952";
/// Streams without faults, per client.
const CALM: usize = 2;
/// Damaged pages that are enough to believe that they are found, and streams after which there should have been so many.
const DAMAGE: (u64, u64) = (5, 300);
/// Different requests: ordinary ones and long ones.
const REQUESTS: (usize, usize) = (28, 12);

/// Flags of `cluster chaos`.
#[derive(Args, Debug)]
pub struct ChaosArgs {
    /// What is tried, and on what.
    #[command(flatten)]
    pub trial: TrialArgs,
    /// Prefill nodes.
    #[arg(long, value_name = "P", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub prefill: u16,
    /// Decode nodes.
    #[arg(long, value_name = "D", default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=16))]
    pub decode: u16,
    /// Streams that are compared to their end while faults come and go, at least.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub streams: u64,
    /// Clients that hang up at a random moment meanwhile, at least.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub cancels: u64,
    /// Nodes that are killed meanwhile, at least; other faults come beside.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub kills: u64,
    /// Seconds that all this may take; reaching them before the numbers above is a failure.
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub seconds: u64,
    /// After how long a node that died is started again. While it is away, its death is noticed by its silence alone; when
    /// it is back before that, by its return.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = parse_duration)]
    pub restart_after: Duration,
    /// Streams whose decode node is killed afterwards, one at a time, to measure how long they pause.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub failovers: u16,
    /// Prefill nodes damage one page in so many, in one of a transfer at most.
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    pub corrupt_pages: u32,
}

/// A page count at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Pages {
    /// Damaged by prefill nodes.
    damaged: u64,
    /// Found by decode nodes.
    found: u64,
}

/// One stream whose decode node was killed when nothing else went on. Milliseconds.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Failover {
    /// From the kill to the next token.
    gap_ms: f64,
    /// To the first token of the prompt and the tokens so far, as a new request.
    recompute_ms: f64,
}

/// Everything that came out.
#[derive(Debug, Default)]
struct Outcome {
    calm: Tally,
    load: Tally,
    faults: Faults,
    redispatched: u64,
    /// In the phase without other faults, and before it.
    damage: Pages,
    damaged_before: u64,
    failovers: Vec<Failover>,
    took: Duration,
    wrong: Vec<String>,
}

/// Runs the command.
pub fn run(args: &ChaosArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let trial = &args.trial;
    let model = find_model(trial.model.as_deref())?;
    let limits = Limits::read(&model, trial.max_model_len)?;
    let sketches = [limits.draw(trial.seed, REQUESTS.0), limits.draw_long(trial.seed, REQUESTS.1)].concat();
    eprintln!("the oracle answers");
    let kv = KvTypes { decode: KvCacheDtype::Auto, prefill: None };
    let cases = answer_all(&model, &limits, kv, &sketches)?;
    let logs = Logs::new(trial);
    let mut flags = vec![
        format!("--prefill={}", args.prefill),
        format!("--decode={}", args.decode),
        format!("--max-model-len={}", limits.max_model_len),
        format!("--chaos-corrupt-pages={}", args.corrupt_pages),
        format!("--model={}", model.path),
        MTU.to_owned(),
    ];
    flags.extend(trial.threads.map(|threads| format!("--threads={threads}")));
    flags.extend(logs.flags("cluster"));
    let mut outcome = Outcome::default();
    if let Err(error) = try_out(args, &flags, &cases, &mut outcome) {
        outcome.wrong.push(format!("{error:#}"));
    }
    outcome.took = started.elapsed();
    outcome.wrong.extend(outcome.calm.wrong.drain(..).chain(outcome.load.wrong.drain(..)));
    logs.settle(outcome.wrong.is_empty());
    if trial.json {
        println!("{:#}", report::json(args, &model.name, &outcome));
    } else {
        print!("{}", report::text(args, &model.name, &outcome));
    }
    match outcome.wrong.len() {
        0 => Ok(()),
        wrong => bail!("{wrong} things are wrong; the faults are drawn from --seed {}", trial.seed),
    }
}

fn try_out(args: &ChaosArgs, flags: &[String], cases: &[Case], outcome: &mut Outcome) -> anyhow::Result<()> {
    let seed = args.trial.seed;
    let decode: Vec<String> = (0..args.decode).map(|index| format!("decode-{index}")).collect();
    let fronts: Vec<String> = std::iter::once("router".to_owned()).chain(decode.iter().cloned()).collect();
    let relays = Relays::start(&fronts, seed).context("cannot start relays")?;
    let embedding =
        Embedding { relays: Some(relays.clone()), restart_after: args.restart_after, start_timeout: START_TIMEOUT };
    let cluster = Embedded::start(flags, embedding)?;
    let client = Client::new(&cluster.url(), None, STREAM_TIMEOUT)?;
    let nodes = [cluster.names(Role::Prefill), decode.clone()].concat();
    let load = Load { client: &client, cases, seed, clients: args.trial.clients.into() };

    eprintln!("{} streams without faults", CALM * usize::from(args.trial.clients));
    let goal = Goal { streams: (CALM * usize::from(args.trial.clients)) as u64, cancels: 0 };
    outcome.calm = load.run(goal, STREAM_TIMEOUT, || true)?;
    settle(&client, &nodes)?;

    eprintln!("{} streams, {} hang-ups and {} kills among other faults", args.streams, args.cancels, args.kills);
    let goal = Goal { streams: args.streams, cancels: args.cancels };
    let limit = Duration::from_secs(args.seconds);
    let (load_tally, faults) = inject(&cluster, &relays, &client, Random::new(seed, 30), |faults| {
        load.run(goal, limit, || faults.kills() >= args.kills)
    });
    outcome.faults = faults;
    outcome.load = load_tally?;
    outcome.damaged_before = damaged(&cluster);
    let state = settle(&client, &nodes)?;
    outcome.redispatched = state.router("ridge_router_redispatched_total").unwrap_or(0.0) as u64;
    let Tally { same, left, .. } = outcome.load;
    let kills = outcome.faults.kills.len() as u64;
    ensure!(
        outcome.load.reached,
        "only {same} streams, {left} hang-ups and {kills} kills in --seconds {}, which is too short for what was asked for",
        args.seconds
    );

    eprintln!("damaged pages alone");
    damage(&load, &cluster, &client, &nodes, outcome)?;
    eprintln!("{} failovers, one at a time", args.failovers);
    let long = &cases[REQUESTS.0..];
    for round in 0..3 * usize::from(args.failovers) {
        if outcome.failovers.len() < usize::from(args.failovers) {
            failover(&cluster, &client, &long[round % long.len()], round, outcome)?;
        }
    }
    let measured = outcome.failovers.len();
    ensure!(measured == usize::from(args.failovers), "only {measured} of the lone streams had to move");
    settle(&client, &nodes)?;
    Ok(())
}

fn damaged(cluster: &Embedded) -> u64 {
    cluster.members().iter().map(|member| member.corrupted).sum()
}

/// Streams until enough pages have been damaged: each one must have been found, and none have changed a token.
fn damage(
    load: &Load<'_>,
    cluster: &Embedded,
    client: &Client,
    nodes: &[String],
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let pages = || -> anyhow::Result<Pages> {
        let state = State::read(client)?;
        let found = state.sum("ridge_kv_digest_failures_total", nodes) as u64;
        Ok(Pages { damaged: damaged(cluster), found })
    };
    let before = pages()?;
    let (enough, streams_max) = DAMAGE;
    let mut streams = 0;
    while damaged(cluster) < before.damaged + enough && streams < streams_max {
        let goal = Goal { streams: load.clients as u64, cancels: 0 };
        let tally = load.run(goal, STREAM_TIMEOUT, || true)?;
        streams += tally.same;
        outcome.wrong.extend(tally.wrong);
        ensure!(outcome.wrong.is_empty(), "streams differ while pages are damaged");
    }
    settle(client, nodes)?;
    let after = pages()?;
    outcome.damage = Pages { damaged: after.damaged - before.damaged, found: after.found - before.found };
    let Pages { damaged, found } = outcome.damage;
    ensure!(damaged > 0, "no page was damaged in {streams} streams: --corrupt-pages is too large for this model");
    ensure!(damaged == found, "{damaged} pages were damaged, {found} were found");
    Ok(())
}

/// Kills the decode node of a lone stream and measures how long the stream pauses, beside what computing it afresh takes. What
/// is killed may turn out not to have had the stream, because the router tries nodes out itself: then nothing is measured.
fn failover(
    cluster: &Embedded,
    client: &Client,
    case: &Case,
    round: usize,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let decode = cluster.names(Role::Decode);
    let restarts: Vec<u32> = cluster.members().iter().map(|member| member.restarts).collect();
    // Different moments, all of them in the first half.
    let after = 4 + (case.expected.ids.len() * (round % 10) / 20) as u64;
    let moved =
        || -> anyhow::Result<Option<f64>> { Ok(State::read(client)?.router("ridge_router_redispatched_total")) };
    let moved_before = moved()?;
    let mut killed: Option<(String, Instant, u64)> = None;
    // The longest pause after the kill: what the node said before its death is read first.
    let mut gap = Duration::ZERO;
    let mut last = Instant::now();
    let mut body = case.body.clone();
    body["cache_salt"] = json!(format!("failover-{round}"));
    let verdict = ask(client, case, &body, Stay::ToTheEnd, &mut |tokens, now| {
        if let Some((_, at, _)) = &killed {
            gap = gap.max(now.saturating_duration_since(last.max(*at)));
        } else if tokens >= after {
            let name = busiest(client, &decode);
            killed = name.and_then(|name| kill(cluster, &name).map(|at| (name, at, tokens)));
        }
        last = now;
    });
    match verdict {
        Verdict::Same => {}
        Verdict::Left => unreachable!("the client stays to the end"),
        Verdict::Different(why) => outcome.wrong.push(format!("failover {round}: {why}")),
    }
    let Some((name, _, tokens)) = killed else { return Ok(()) };
    let has_moved = moved()? != moved_before;
    let index = cluster.members().iter().position(|member| member.name == name).context("it was just killed")?;
    wait_back(cluster, &name, restarts[index])?;
    settle(client, &decode)?;
    if !has_moved {
        return Ok(());
    }
    let tokens = [&case.prompt[..], &case.expected.ids[..tokens as usize]].concat();
    let Some(recompute) = load::first_token(client, &tokens, round)? else {
        bail!("failover {round}: {} tokens cannot be computed afresh", tokens.len())
    };
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    outcome.failovers.push(Failover { gap_ms: ms(gap), recompute_ms: ms(recompute) });
    Ok(())
}
