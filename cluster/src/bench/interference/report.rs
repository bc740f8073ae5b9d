//! The experiment's figures as a table for people, servers side by side, and as JSON for `bench/results`.
//!
//! The JSON object holds `benchmark`, `date`, `command`, `version`, `machine` (of the client; with `--local`, of all),
//! `settings` (every number of the plan) and `servers`, a list. Each server has
//!
//! - `name` (`disaggregated`, `co-located`, or its URL), `url`, `model`, `up_flags` (with `--local`, else null) and
//!   `prompts` (`tokens` or `text`);
//! - `quiet` and `loaded`: `seconds` (how long the phase was), `requests` (of the decoding clients), `tokens` and
//!   `tokens_per_s` (generated, of all requests), `itl_ms` (inter-token latency of the decoding clients: `p50`, `p99`, `max`,
//!   `samples`), `ttft_ms` (their time to first token: `p50`, `max`, `samples`), `long_ttft_ms` (the same of the long
//!   prompts), `prompt_tokens` and `long_prompt_tokens` (the longest, as the server counted them);
//! - `loaded_over_quiet`: ratios of `itl_p50`, `itl_p99`, `itl_max` and `tokens_per_s`.
//!
//! What was not seen is null. A percentile is the least sample that so many percent do not exceed.
//! Read [`Measured`].

use super::load::{Plan, Seen};
use crate::bench::host;
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::Duration;

/// A server and what was seen of it.
#[derive(Clone, PartialEq, Debug)]
pub struct Measured {
    /// What reports call it.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// What it serves.
    pub model: String,
    /// How it was started, if we did that.
    pub up_flags: Option<Vec<String>>,
    /// What its prompts were made of.
    pub prompts: &'static str,
    /// Without long prompts.
    pub quiet: Seen,
    /// With them.
    pub loaded: Seen,
}

/// The middle and the end of some samples.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Summary {
    p50: f64,
    p99: f64,
    max: f64,
    samples: usize,
}

impl Summary {
    /// `None` if nothing was seen.
    fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let &max = sorted.last()?;
        let rank = |share: f64| sorted[((share * sorted.len() as f64).ceil() as usize).max(1) - 1];
        Some(Self { p50: rank(0.5), p99: rank(0.99), max, samples: sorted.len() })
    }
}

fn tokens_per_s(seen: &Seen) -> f64 {
    seen.tokens as f64 / seen.seconds
}

/// A figure of both phases, and how to take it from one.
type Figure = fn(&Seen) -> Option<f64>;

const ITL_P50: Figure = |seen| Some(Summary::of(&seen.itl_ms)?.p50);
const ITL_P99: Figure = |seen| Some(Summary::of(&seen.itl_ms)?.p99);
const ITL_MAX: Figure = |seen| Some(Summary::of(&seen.itl_ms)?.max);
const RATE: Figure = |seen| Some(tokens_per_s(seen));

fn loaded_over_quiet(server: &Measured, figure: Figure) -> Option<f64> {
    Some(figure(&server.loaded)? / figure(&server.quiet)?)
}

/// Everything as one JSON object.
pub fn json(plan: &Plan, timeout: Duration, servers: &[Measured]) -> Value {
    json!({
        "benchmark": "interference",
        "date": host::date(),
        "command": host::command(),
        "version": env!("CARGO_PKG_VERSION"),
        "machine": {"cpu": host::cpu_name(), "cores": host::cores(), "system": std::env::consts::OS},
        "settings": {
            "clients": plan.clients,
            "prompt_tokens": plan.prompt_tokens,
            "gen_tokens": plan.gen_tokens,
            "long_prompt_tokens": plan.long_prompt_tokens,
            "long_gen_tokens": plan.long_gen_tokens,
            "every_s": plan.every.as_secs_f64(),
            "seconds": plan.seconds.as_secs_f64(),
            "timeout_s": timeout.as_secs_f64(),
            "seed": plan.seed,
        },
        "servers": servers.iter().map(server_json).collect::<Vec<_>>(),
    })
}

fn server_json(server: &Measured) -> Value {
    let ratio = |figure| number(loaded_over_quiet(server, figure));
    json!({
        "name": server.name,
        "url": server.url,
        "model": server.model,
        "up_flags": server.up_flags.as_ref().map(|flags| host::without_secrets(flags.iter().cloned())),
        "prompts": server.prompts,
        "quiet": phase_json(&server.quiet),
        "loaded": phase_json(&server.loaded),
        "loaded_over_quiet": {
            "itl_p50": ratio(ITL_P50),
            "itl_p99": ratio(ITL_P99),
            "itl_max": ratio(ITL_MAX),
            "tokens_per_s": ratio(RATE),
        },
    })
}

fn phase_json(seen: &Seen) -> Value {
    let itl = Summary::of(&seen.itl_ms);
    let ttft = |samples: &[f64]| {
        let summary = Summary::of(samples);
        json!({"p50": number(summary.map(|s| s.p50)), "max": number(summary.map(|s| s.max)), "samples": samples.len()})
    };
    json!({
        "seconds": number(Some(seen.seconds)),
        "requests": seen.requests,
        "tokens": seen.tokens,
        "tokens_per_s": number(Some(tokens_per_s(seen))),
        "itl_ms": {
            "p50": number(itl.map(|s| s.p50)),
            "p99": number(itl.map(|s| s.p99)),
            "max": number(itl.map(|s| s.max)),
            "samples": seen.itl_ms.len(),
        },
        "ttft_ms": ttft(&seen.ttft_ms),
        "long_ttft_ms": ttft(&seen.long_ttft_ms),
        "prompt_tokens": seen.prompt_tokens,
        "long_prompt_tokens": seen.long_prompt_tokens,
    })
}

/// Five digits: more would be noise.
fn number(value: Option<f64>) -> Value {
    let rounded = value.and_then(|value| format!("{value:.4e}").parse::<f64>().ok());
    rounded.filter(|value| value.is_finite()).map_or(Value::Null, Value::from)
}

/// Everything as lines of text.
pub fn table(plan: &Plan, servers: &[Measured]) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} clients decode {} tokens from {}-token prompts; long prompts of {} tokens every {} s; {} s a phase; seed {}",
        plan.clients,
        plan.gen_tokens,
        plan.prompt_tokens,
        plan.long_prompt_tokens,
        plan.every.as_secs_f64(),
        plan.seconds.as_secs_f64(),
        plan.seed
    );
    let _ = writeln!(out, "{}, {} cores\n", host::cpu_name(), host::cores());
    let itl = |name: &'static str, which: fn(&Measured) -> &Seen| {
        [("p50", ITL_P50), ("p99", ITL_P99), ("max", ITL_MAX)]
            .map(|(part, figure)| row(servers, name, part, |server| figure(which(server)).map(milliseconds)))
    };
    let mut rows = vec![row(servers, "", "", |server| Some(server.name.clone()))];
    rows.extend(itl("inter-token latency, ms, quiet", |server| &server.quiet));
    rows.extend(itl("inter-token latency, ms, loaded", |server| &server.loaded));
    for (part, figure) in [("p99", ITL_P99), ("max", ITL_MAX)] {
        let ratio = |server: &Measured| Some(format!("{:.2} x", loaded_over_quiet(server, figure)?));
        rows.push(row(servers, "loaded / quiet", part, ratio));
    }
    let ttft = |name: &'static str, samples: fn(&Measured) -> &[f64]| {
        let summary = move |server: &Measured| Summary::of(samples(server));
        let median = row(servers, name, "median", |server| Some(milliseconds(summary(server)?.p50)));
        let max = row(servers, name, "max", |server| Some(milliseconds(summary(server)?.max)));
        [median, max]
    };
    rows.extend(ttft("long prompts' first token, ms", |server| &server.loaded.long_ttft_ms));
    rows.extend(ttft("clients' first token, ms, loaded", |server| &server.loaded.ttft_ms));
    rows.push(row(servers, "tokens/s", "quiet", |server| Some(format!("{:.1}", tokens_per_s(&server.quiet)))));
    rows.push(row(servers, "tokens/s", "loaded", |server| Some(format!("{:.1}", tokens_per_s(&server.loaded)))));
    let columns = rows[0].len();
    let widths: Vec<usize> =
        (0..columns).map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect();
    let mut named = String::new();
    for row in rows {
        // A group's name stands beside its first row only.
        let name = if row[0] == named { "" } else { &row[0] };
        let mut line = format!("{name:<w$}  {:<v$}", row[1], w = widths[0], v = widths[1]);
        for (cell, width) in row.iter().zip(&widths).skip(2) {
            let _ = write!(line, "  {cell:>width$}");
        }
        let _ = writeln!(out, "{}", line.trim_end());
        named.clone_from(&row[0]);
    }
    out
}

fn row(servers: &[Measured], name: &str, part: &str, cell: impl Fn(&Measured) -> Option<String>) -> Vec<String> {
    let cells = servers.iter().map(|server| cell(server).unwrap_or_else(|| "-".into()));
    [name.to_owned(), part.to_owned()].into_iter().chain(cells).collect()
}

fn milliseconds(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(itl_ms: &[f64], long_ttft_ms: &[f64]) -> Seen {
        Seen {
            seconds: 2.0,
            requests: 3,
            tokens: 50,
            itl_ms: itl_ms.into(),
            ttft_ms: vec![7.0],
            long_ttft_ms: long_ttft_ms.into(),
            prompt_tokens: Some(32),
            long_prompt_tokens: None,
        }
    }

    fn plan() -> Plan {
        Plan {
            clients: 4,
            prompt_tokens: 32,
            gen_tokens: 128,
            long_prompt_tokens: 1024,
            long_gen_tokens: 1,
            every: Duration::from_secs(8),
            seconds: Duration::from_secs(60),
            seed: 5,
        }
    }

    fn measured(name: &str) -> Measured {
        Measured {
            name: name.into(),
            url: "http://127.0.0.1:8000".into(),
            model: "m".into(),
            up_flags: None,
            prompts: "tokens",
            quiet: seen(&[10.0, 10.0, 12.0], &[]),
            loaded: seen(&[10.0, 15.0, 120.0], &[900.0, 1000.0]),
        }
    }

    #[test]
    fn percentiles_are_samples() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(Summary::of(&hundred), Some(Summary { p50: 50.0, p99: 99.0, max: 100.0, samples: 100 }));
        assert_eq!(Summary::of(&[3.0]), Some(Summary { p50: 3.0, p99: 3.0, max: 3.0, samples: 1 }));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn json_has_every_figure_or_null() {
        let out = json(&plan(), Duration::from_secs(300), &[measured("a")]);
        let server = &out["servers"][0];
        assert_eq!(server["quiet"]["itl_ms"], json!({"p50": 10.0, "p99": 12.0, "max": 12.0, "samples": 3}));
        assert_eq!(server["quiet"]["long_ttft_ms"], json!({"p50": null, "max": null, "samples": 0}));
        assert_eq!(server["loaded"]["long_ttft_ms"], json!({"p50": 900.0, "max": 1000.0, "samples": 2}));
        assert_eq!(server["loaded_over_quiet"]["itl_p99"], 10.0);
        assert_eq!(server["loaded"]["tokens_per_s"], 25.0);
        assert_eq!((&out["settings"]["every_s"], &out["settings"]["seed"]), (&json!(8.0), &json!(5)));
    }

    #[test]
    fn servers_stand_side_by_side() {
        let text = table(&plan(), &[measured("disaggregated"), measured("b")]);
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).expect("is there").to_owned();
        let cells = |start: &str| line(start).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(cells("    "), ["disaggregated", "b"]);
        assert_eq!(cells("inter-token latency, ms, loaded")[4..], ["p50", "15.0", "15.0"]);
        assert_eq!(cells("loaded / quiet")[3..], ["p99", "10.00", "x", "10.00", "x"]);
        assert_eq!(cells("long prompts'")[5..], ["median", "900", "900"]);
        assert_eq!(text.matches("loaded / quiet").count(), 1, "{text}");
        let ends: Vec<usize> = text.lines().skip(3).map(|line| line.chars().count()).collect();
        assert!(ends.iter().all(|end| *end == ends[0]), "columns do not line up:\n{text}");
    }
}
