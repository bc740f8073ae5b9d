//! A synthetic model of an 8B shape, made on this machine, in the whole engine: prompts and decode steps.
//!
//! Read [`run`] and [`made`].

use super::child::{Job, say};
use super::line::Line;
use crate::bench::session::{Phase, Session};
use crate::cli::SynthArgs;
use crate::synth::{self, SynthDType};
use anyhow::Context;
use clap::Parser;
use ridge_model::device::{DeviceOptions, KernelSet};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// Tokens that sequences have before they decode.
const CONTEXT: usize = 1024;
/// Repetitions of which the median counts.
const REPETITIONS: usize = 5;

/// Tokens of a long prompt.
pub fn prompt_tokens(job: &Job<'_>) -> usize {
    if job.is_small() { 40 } else { 4096 }
}

/// Times the engine: as it is meant to run, then without what graphs and shipping do, then with 4-bit weights.
pub fn run(job: &Job<'_>) -> anyhow::Result<()> {
    let (prompt, context) = (prompt_tokens(job), if job.is_small() { 20 } else { CONTEXT });
    let (batch, steps) = if job.is_small() { (2, 2) } else { (32, 16) };
    let prefill = Phase::Prefill { tokens: prompt, chunk: prompt };
    let decode = |batch| Phase::Decode { batch, context, steps };
    let bf16 = made(job, SynthDType::Bf16)?;
    let whole = [
        (format!("model bf16 prefill {prompt}"), prefill),
        ("model bf16 decode b=1".into(), decode(1)),
        (format!("model bf16 decode b={batch}"), decode(batch)),
    ];
    time(job, &bf16, &whole, |_| {}).context("bf16")?;
    let bare = [
        (format!("model bf16 prefill {prompt}, pages not shipped"), prefill),
        ("model bf16 decode b=1, without graphs".into(), decode(1)),
    ];
    let without = |options: &mut DeviceOptions| (options.graphs, options.ship) = (false, false);
    time(job, &bf16, &bare, without).context("bf16, bare")?;
    if job.is_late() {
        say(&Line::Skipped { name: "model q4_k".into(), why: "the time is used up".into() });
        return Ok(());
    }
    let q4 = made(job, SynthDType::Q4K)?;
    time(job, &q4, &[("model q4_k decode b=1".into(), decode(1))], |_| {}).context("q4_k")?;
    // Serving needs the other one, and the room.
    let _ = std::fs::remove_file(q4);
    // Kernels that are off by default, where there are any: whether they should be.
    if job.device()?.properties().sm == 90 {
        let name = format!("model bf16 prefill {prompt}, experimental kernels");
        let experimental = |options: &mut DeviceOptions| options.kernels = KernelSet::Experimental;
        time(job, &bf16, &[(name, prefill)], experimental).context("bf16, experimental kernels")?;
    }
    Ok(())
}

/// Times phases of one engine.
fn time(
    job: &Job<'_>,
    model: &std::path::Path,
    phases: &[(String, Phase)],
    adjust: impl FnOnce(&mut DeviceOptions),
) -> anyhow::Result<()> {
    /// Flags as the benchmarks have them.
    #[derive(Parser)]
    struct Setup {
        #[command(flatten)]
        setup: crate::bench::SetupArgs,
    }
    if job.is_late() {
        for (name, _) in phases {
            say(&Line::Skipped { name: name.clone(), why: "the time is used up".into() });
        }
        return Ok(());
    }
    let chunk = format!("--chunk={}", prompt_tokens(job));
    let device = format!("--device={}", job.args.device);
    let model = model.to_str().context("a path that is text")?;
    let setup = Setup::try_parse_from(["bench", "--model", model, &chunk, &device])?.setup;
    let begun = Instant::now();
    let mut session = Session::adjusted(&setup, |_| phases.iter().map(|(_, phase)| *phase).collect(), adjust)?;
    if let Some((name, _)) = phases.first() {
        say(&Line::seconds(format!("engine ready for {name}"), begun.elapsed().as_secs_f64()));
    }
    for (name, phase) in phases {
        if job.is_late() {
            say(&Line::Skipped { name: name.clone(), why: "the time is used up".into() });
            continue;
        }
        let repetitions = if job.is_small() { 1 } else { REPETITIONS };
        for _ in 0..if job.is_small() { 1 } else { 3 } {
            session.warm_up(*phase);
        }
        let mut times: Vec<f64> = (0..repetitions).map(|_| session.repetition(*phase).as_secs_f64()).collect();
        times.sort_by(f64::total_cmp);
        let steps = if let Phase::Decode { steps, .. } = phase { *steps as f64 } else { 1.0 };
        let cost = phase.cost(&session.cost);
        say(&Line::Time {
            name: name.clone(),
            seconds: times[times.len() / 2] / steps,
            operations: cost.flops() as f64 / steps,
            bytes: cost.bytes() as f64 / steps,
        });
    }
    Ok(())
}

/// The synthetic model of this type in the folder to work in, made if it is not there.
pub fn made(job: &Job<'_>, dtype: SynthDType) -> anyhow::Result<PathBuf> {
    let preset = job.args.preset();
    let name = match dtype {
        SynthDType::Bf16 => format!("{}-bf16", preset.name()),
        _ => format!("{}-q4_k.gguf", preset.name()),
    };
    let out = job.work.join(name);
    // A folder is complete when its last file is there; a file when it is.
    let complete = if dtype == SynthDType::Bf16 { out.join("tokenizer_config.json") } else { out.clone() };
    if !complete.exists() {
        let begun = Instant::now();
        synth::write(&SynthArgs {
            out: out.clone(),
            preset,
            dtype,
            seed: 1,
            layers: None,
            context: None,
            force: true,
        })?;
        say(&Line::seconds(format!("making {} {dtype:?}", preset.name()), begun.elapsed().as_secs_f64()));
        say(&Line::Fact { name: "synthetic model".into(), value: json!(preset.name()) });
    }
    Ok(out)
}
