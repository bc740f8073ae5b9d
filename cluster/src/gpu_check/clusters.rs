//! Clusters of processes: everything on the device, and mixed with the CPU. A small model shows that answers are right, the large one
//! how long a first token takes.

use super::child::{Job, say};
use super::engine::{self, ANSWER, Found};
use super::line::Line;
use super::model;
use crate::client::Client;
use crate::synth::SynthDType;
use crate::up::{Embedded, Embedding, MODEL};
use anyhow::{Context, ensure};
use ridge_model::device::DeviceChoice;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Answers of which the median first token counts.
const ANSWERS: usize = 3;

/// Answers of the engine, from clusters.
pub fn small(job: &Job<'_>) -> anyhow::Result<()> {
    let found = engine::find(job)?;
    let verdict = |what, devices, blocks| {
        let failure = check(job, devices, blocks, &found).err().map(|error| format!("{error:#}"));
        say(&Line::verdict(format!("cluster, {what}"), failure));
    };
    for (what, prefill, decode) in kinds(job) {
        verdict(what, (prefill, decode), &[]);
    }
    // The device makes each page of several; as the type is the same, no token changes.
    let device = job.args.device;
    verdict("device, other blocks", (device, device), &["--prefill-block-size=16", "--block-size=64"]);
    Ok(())
}

fn kinds(job: &Job<'_>) -> [(&'static str, DeviceChoice, DeviceChoice); 2] {
    let device = job.args.device;
    [("device", device, device), ("mixed", device, DeviceChoice::Cpu)]
}

fn start(job: &Job<'_>, model: &str, devices: (DeviceChoice, DeviceChoice), more: &[&str]) -> anyhow::Result<Embedded> {
    let mut flags = vec!["--model".to_owned(), model.into()];
    flags.extend([format!("--prefill-device={}", devices.0), format!("--decode-device={}", devices.1)]);
    flags.extend(more.iter().map(|flag| (*flag).to_owned()));
    let left = job.deadline.saturating_duration_since(Instant::now());
    Embedded::start(&flags, Embedding { relays: None, restart_after: Duration::from_millis(100), start_timeout: left })
}

/// Starts a cluster with these flags for blocks and asks it for the continuation that the engine found: the same on the device, of the
/// same length where another computes the answer.
fn check(
    job: &Job<'_>,
    (prefill, decode): (DeviceChoice, DeviceChoice),
    blocks: &[&str],
    found: &Found,
) -> anyhow::Result<()> {
    let flags = [&["--max-model-len=256"], blocks].concat();
    let cluster = start(job, &found.model.path, (prefill, decode), &flags)?;
    let client = Client::new(&cluster.url(), None, ANSWER_TIMEOUT)?;
    let body = json!({
        "model": MODEL, "prompt": found.prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": true,
    });
    let answer = client.post_json("/v1/completions", &body)?;
    let tokens = answer["usage"]["completion_tokens"].as_u64();
    ensure!(tokens == Some(u64::from(ANSWER)), "{tokens:?} tokens came instead of {ANSWER}");
    let text = answer["choices"][0]["text"].as_str().context("an answer without text")?;
    ensure!(prefill != decode || text == found.text, "answered {text:?} where the engine alone says {:?}", found.text);
    Ok(())
}

/// The synthetic model in clusters.
pub fn serving(job: &Job<'_>) -> anyhow::Result<()> {
    let model = model::made(job, SynthDType::Bf16)?;
    let model = model.to_str().context("a folder whose name is text")?;
    let prompt = model::prompt_tokens(job);
    for (what, prefill, decode) in kinds(job) {
        if job.is_late() {
            say(&Line::Skipped { name: format!("serving, {what}"), why: "the time is used up".into() });
            continue;
        }
        let served = serve(job, (model, what), (prefill, decode), prompt);
        say(&Line::verdict(format!("serving, {what}"), served.err().map(|error| format!("{error:#}"))));
    }
    Ok(())
}

fn serve(
    job: &Job<'_>,
    (model, what): (&str, &str),
    devices: (DeviceChoice, DeviceChoice),
    prompt: usize,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    // A prompt in one pass, as the engine alone is timed.
    let (context, pass) = (format!("--max-model-len={}", 2 * prompt), format!("--max-num-batched-tokens={prompt}"));
    let cluster = start(job, model, devices, &[&context, &pass])?;
    say(&Line::seconds(format!("serving {what} start"), begun.elapsed().as_secs_f64()));
    let client = Client::new(&cluster.url(), None, ANSWER_TIMEOUT)?;
    let (mut firsts, mut gaps) = (Vec::new(), Vec::new());
    // One that is not counted, and others none of which begins as another did.
    for round in 0..=ANSWERS {
        let tokens: Value = (0..prompt).map(|i| json!(10 + (i * 7 + round * 31) % 200)).collect();
        let (asked, mut arrivals) = (Instant::now(), Vec::new());
        let answer = client.complete(MODEL, &tokens, ANSWER as usize, &mut |at| {
            arrivals.push(at);
            ControlFlow::Continue(())
        })?;
        ensure!(answer.tokens == u64::from(ANSWER), "{} tokens came instead of {ANSWER}", answer.tokens);
        if round > 0 {
            firsts.extend(arrivals.first().map(|first| first.duration_since(asked).as_secs_f64()));
            gaps.extend(arrivals.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_secs_f64().max(1e-9)));
        }
    }
    for (name, mut times) in [(format!("first token {prompt}"), firsts), ("token after token".into(), gaps)] {
        times.sort_by(f64::total_cmp);
        if let Some(median) = times.get(times.len() / 2) {
            say(&Line::seconds(format!("serving {what} {name}"), *median));
        }
    }
    Ok(())
}
