//! A model's engine on the device beside the CPU's: what it answers, and that graphs of launches change nothing.

use super::child::{Job, say};
use super::line::Line;
use crate::roles;
use crate::up::{Model, find_model};
use ridge_kernels::{Cpu, DType, KvDtype, KvFormat};
use ridge_model::checkpoint::{Checkpoint, LoadOptions, ModelSource, load};
use ridge_model::cuda::CudaEngine;
use ridge_model::detokenize::StreamDecoder;
use ridge_model::device::DeviceOptions;
use ridge_model::engine::{CpuEngine, Engine};
use ridge_model::generate::generate;
use ridge_model::kv::KvMemory;
use ridge_model::memory::PassLimits;
use ridge_model::worker::default_kv_dtype;
use ridge_protocol::{SamplingParams, TokenOut};
use std::sync::Arc;

/// Tokens of a continuation.
pub const ANSWER: u32 = 8;
/// The whole prompt in one pass, as a prefill node runs it.
const LONG_CHUNK: usize = 1 << 16;
const PROMPT: &str = "Question: What does a prefill node do? Answer:";

/// What a model's engine on the device answered.
pub struct Found {
    /// The model.
    pub model: Model,
    /// What was asked.
    pub prompt: Vec<u32>,
    /// What it answered.
    pub text: String,
}

/// Checks the engine.
pub fn run(job: &Job<'_>) -> anyhow::Result<()> {
    let model = find_model(job.args.model.as_deref())?;
    let checkpoint = load(&ModelSource::parse(&model.path)?, &LoadOptions::default(), &mut |_| {})?;
    let prompt = checkpoint.tokenizer.encode(PROMPT, true)?;
    let mut on_cpu = CpuEngine::new(&checkpoint, memory(&checkpoint, &prompt)?, cpu(), None)?;
    let expected = answer(&mut on_cpu, &prompt)?;
    let launched = on_device(job, &checkpoint, &prompt, false)?;
    let replayed = on_device(job, &checkpoint, &prompt, true)?;

    let (worst, allowed) = (difference(&launched, &expected), allowed(&checkpoint)?);
    let failure = (worst > allowed).then(|| format!("log-probabilities differ by {worst:.4}"));
    let error = worst.is_finite().then(|| f64::from(worst / allowed));
    say(&Line::Check { name: format!("engine {}", model.name), cases: u64::from(ANSWER), error, failure });
    let same = launched == replayed;
    say(&Line::verdict("engine, graphs", (!same).then(|| "graphs of launches compute other bits".into())));
    Ok(())
}

/// Answers the prompt on the device, as a cluster would.
pub fn find(job: &Job<'_>) -> anyhow::Result<Found> {
    let model = find_model(job.args.model.as_deref())?;
    let checkpoint = load(&ModelSource::parse(&model.path)?, &LoadOptions::default(), &mut |_| {})?;
    let prompt = checkpoint.tokenizer.encode(PROMPT, true)?;
    let answered = on_device(job, &checkpoint, &prompt, true)?;
    // As a cluster makes text of tokens.
    let mut decoder = StreamDecoder::new(&checkpoint.tokenizer, true);
    let mut text: String = answered.iter().filter_map(|out| decoder.push(out.token)).collect();
    text.extend(decoder.flush());
    Ok(Found { model, prompt, text })
}

fn cpu() -> Cpu {
    Cpu::new(roles::default_threads(), None)
}

fn on_device(job: &Job<'_>, checkpoint: &Checkpoint, prompt: &[u32], graphs: bool) -> anyhow::Result<Vec<TokenOut>> {
    let options = DeviceOptions { graphs, cache: roles::kernel_cache(), ..DeviceOptions::default() };
    let pass = PassLimits { tokens: prompt.len(), sequences: 1 };
    let kv = memory(checkpoint, prompt)?;
    let mut engine = CudaEngine::new(checkpoint, kv, cpu(), job.device()?, pass, &options)?;
    answer(&mut engine, prompt)
}

/// The largest difference of the likeliest token's log-probability, where the two had said the same so far.
fn difference(ours: &[TokenOut], cpu: &[TokenOut]) -> f32 {
    let mut worst = 0.0f32;
    for (ours, cpu) in ours.iter().zip(cpu) {
        // It is compared whichever token it was: near ties may fall either way.
        let likeliest = |out: &TokenOut| out.top.first().map_or(f32::NAN, |(_, logprob)| *logprob);
        let difference = (likeliest(ours) - likeliest(cpu)).abs();
        worst = if difference.is_nan() { f32::INFINITY } else { worst.max(difference) };
        if ours.token != cpu.token {
            break;
        }
    }
    worst
}

/// What it may be: little for float32, what rounding to 16 bits costs otherwise.
fn allowed(checkpoint: &Checkpoint) -> anyhow::Result<f32> {
    let exact = checkpoint.tensors.get("layers.0.wq")?.dtype == DType::F32;
    Ok(if exact { 1e-3 } else { 0.2 })
}

fn memory(checkpoint: &Checkpoint, prompt: &[u32]) -> anyhow::Result<Arc<KvMemory>> {
    let (spec, dtype): (_, KvDtype) = (&checkpoint.spec, default_kv_dtype(checkpoint));
    let format = KvFormat { dtype, kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size: 16 };
    let blocks = (prompt.len() + ANSWER as usize).div_ceil(16);
    Ok(Arc::new(KvMemory::new(format, spec.layers, blocks)?))
}

fn answer(engine: &mut dyn Engine, prompt: &[u32]) -> anyhow::Result<Vec<TokenOut>> {
    let params = SamplingParams { logprobs: Some(1), ignore_eos: true, ..SamplingParams::greedy(ANSWER) };
    Ok(generate(engine, prompt, &params, LONG_CHUNK, usize::MAX, &mut |_| true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_compared_as_far_as_they_agree() {
        let out = |token: u32, logprob: f32| TokenOut {
            token,
            logprob: Some(logprob),
            top: vec![(token, logprob)],
            ends: false,
        };
        let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(near(difference(&[out(1, -0.5), out(2, -1.0)], &[out(1, -0.4), out(2, -1.3)]), 0.3));
        assert!(near(difference(&[out(1, -0.5), out(2, -1.0)], &[out(3, -0.4), out(2, -9.0)]), 0.1));
        assert!(difference(&[out(1, f32::NAN)], &[out(1, -0.4)]).is_infinite());
    }
}
