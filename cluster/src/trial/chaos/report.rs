//! What `cluster chaos` prints. Read [`text`] and [`json`].

use super::load::{Tally, Trail};
use super::{ChaosArgs, Failover, Outcome, Pages};
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Faults that are shown with what was wrong: the last ones.
const LOG_LINES: usize = 60;

/// Some times, in milliseconds.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Spread {
    count: usize,
    p50: f64,
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(mut ms: Vec<f64>) -> Option<Self> {
        ms.sort_by(f64::total_cmp);
        let rank = |share: f64| ms[((ms.len() as f64 * share).ceil() as usize).clamp(1, ms.len()) - 1];
        (!ms.is_empty()).then(|| Self { count: ms.len(), p50: rank(0.5), p99: rank(0.99), max: rank(1.0) })
    }

    fn json(this: Option<Self>) -> Value {
        this.map_or(Value::Null, |s| json!({"count": s.count, "p50": s.p50, "p99": s.p99, "max": s.max}))
    }

    fn text(this: Option<Self>) -> String {
        this.map_or("none".to_owned(), |s| {
            format!("p50 {:.0}, p99 {:.0}, max {:.0} ms (of {})", s.p50, s.p99, s.max, s.count)
        })
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Of each decode node that was killed with streams on it: the longest that any stream paused from that moment on.
fn pauses(outcome: &Outcome) -> Option<Spread> {
    let kills = outcome.faults.kills.iter().filter(|kill| kill.streams);
    let longest = |at: Instant| outcome.load.trails.iter().filter_map(|trail| pause(trail, at)).max();
    Spread::of(kills.filter_map(|kill| longest(kill.at)).map(ms).collect())
}

/// From `at` to the next piece of a stream that had begun and was not over.
fn pause(trail: &Trail, at: Instant) -> Option<Duration> {
    let next = trail.pieces.partition_point(|piece| *piece <= at);
    (next > 0).then(|| trail.pieces.get(next).map(|piece| piece.duration_since(at)))?
}

fn first_tokens(tally: &Tally) -> Option<Spread> {
    let first = |trail: &Trail| Some(ms(trail.pieces.first()?.duration_since(trail.asked)));
    Spread::of(tally.trails.iter().filter_map(first).collect())
}

fn beyond(failovers: &[Failover]) -> Option<Spread> {
    Spread::of(failovers.iter().map(|f| f.gap_ms - f.recompute_ms).collect())
}

/// For people.
pub fn text(args: &ChaosArgs, model: &str, outcome: &Outcome) -> String {
    let Outcome { calm, load, faults, redispatched, damage, damaged_before, failovers, took, wrong } = outcome;
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes everything");
    let (prefill, decode, seed) = (args.prefill, args.decode, args.trial.seed);
    line(format!("{model}, {prefill} prefill and {decode} decode nodes, seed {seed}, {:.1} s", took.as_secs_f64()));
    line(format!("  streams        {} the same, {} hang-ups, {redispatched} moved", load.same, load.left));
    let (kills, stalls, cuts, losses, dropped) =
        (faults.kills.len(), faults.stalls, faults.cuts, faults.losses, faults.dropped);
    line(format!(
        "  faults         {kills} kills, {stalls} stalls, {cuts} cut cables, {losses} spells of loss ({dropped} datagrams)"
    ));
    let Pages { damaged, found } = damage;
    line(format!("  damaged pages  {damaged} sent and {found} found; {damaged_before} sent among the other faults"));
    line(format!("  first token    {} without faults, {} with", of(first_tokens(calm)), of(first_tokens(load))));
    line(format!("  kill to token  {} among the other faults", of(pauses(outcome))));
    let gap = Spread::of(failovers.iter().map(|f| f.gap_ms).collect());
    let recompute = Spread::of(failovers.iter().map(|f| f.recompute_ms).collect());
    line(format!("  a lone kill    {} to the next token", of(gap)));
    line(format!("                 {} to compute it afresh, {} beyond", of(recompute), of(beyond(failovers))));
    if wrong.is_empty() {
        line(
            "every stream was the oracle's, every damaged page was found, every block is accounted for, none orphaned"
                .into(),
        );
    } else {
        let log = &faults.log[faults.log.len().saturating_sub(LOG_LINES)..];
        log.iter().for_each(|fault| line(format!("  {fault}")));
        wrong.iter().for_each(|wrong| line(format!("WRONG: {wrong}")));
    }
    out
}

fn of(spread: Option<Spread>) -> String {
    Spread::text(spread)
}

/// For programs.
pub fn json(args: &ChaosArgs, model: &str, outcome: &Outcome) -> Value {
    let Outcome { calm, load, faults, redispatched, damage, damaged_before, failovers, took, wrong } = outcome;
    let spread = Spread::json;
    let lone: Vec<Value> =
        failovers.iter().map(|f| json!({"kill_to_token_ms": f.gap_ms, "recompute_ms": f.recompute_ms})).collect();
    json!({
        "command": "chaos",
        "version": env!("CARGO_PKG_VERSION"),
        "model": model,
        "seed": args.trial.seed,
        "clients": args.trial.clients,
        "prefill": args.prefill,
        "decode": args.decode,
        "restart_after_ms": ms(args.restart_after),
        "seconds": took.as_secs_f64(),
        "streams": {"same": load.same, "hang_ups": load.left, "moved": redispatched},
        "faults": {
            "kills": faults.kills.len(), "stalls": faults.stalls, "cuts": faults.cuts, "losses": faults.losses,
            "datagrams_dropped": faults.dropped,
        },
        "damaged_pages": {"sent": damage.damaged, "found": damage.found, "sent_among_other_faults": damaged_before},
        "first_token_ms": {"calm": spread(first_tokens(calm)), "faults": spread(first_tokens(load))},
        "kill_to_token_ms": {"among_other_faults": spread(pauses(outcome)), "beyond_recompute": spread(beyond(failovers))},
        "lone_kills": lone,
        "fault_log": if wrong.is_empty() { &[][..] } else { &faults.log[..] },
        "wrong": wrong,
        "right": wrong.is_empty(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_those_of_streams_that_were_running() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let trail = Trail { asked: at(0), pieces: vec![at(10), at(20), at(70)] };
        assert_eq!(pause(&trail, at(5)), None, "it had not begun");
        assert_eq!(pause(&trail, at(20)), Some(Duration::from_millis(50)));
        assert_eq!(pause(&trail, at(70)), None, "it was over");
    }

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(Vec::new()), None);
        let spread = Spread::of((1..=200).rev().map(f64::from).collect()).expect("has values");
        assert_eq!((spread.count, spread.p50, spread.p99, spread.max), (200, 100.0, 198.0, 200.0));
    }
}
