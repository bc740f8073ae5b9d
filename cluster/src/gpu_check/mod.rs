//! `cluster gpu-check`: what a device must show before anybody leans on it.
//!
//! ```text
//! kernels   every operation on random shapes and fresh values, outputs poisoned, against f64 references or the CPU's bits
//! timings   copies and products, beside what copying reaches (a real device only)
//! engine    a model's continuations and log-probabilities beside the CPU's
//! clusters  up --local with both nodes on the device, and with prompts there and answers on the CPU
//! ```
//!
//! With `--device emulated` it runs on any machine with a C++ compiler, which is how it is tested. Read [`run`].

use crate::client::Client;
use crate::roles;
use crate::up::{Embedded, Embedding, MODEL, Model, find_model};
use anyhow::{Context, bail, ensure};
use clap::Args;
use ridge_kernels::Cpu;
use ridge_kernels::cuda::check::{self, Check, Effort, timing};
use ridge_kernels::cuda::{Device, Properties};
use ridge_kernels::{DType, KvDtype, KvFormat};
use ridge_model::checkpoint::{Checkpoint, LoadOptions, ModelSource, load};
use ridge_model::cuda::CudaEngine;
use ridge_model::detokenize::StreamDecoder;
use ridge_model::device::{self, DeviceChoice, KernelSet};
use ridge_model::engine::{CpuEngine, Engine};
use ridge_model::generate::generate;
use ridge_model::kv::KvMemory;
use ridge_model::memory::PassLimits;
use ridge_model::worker::default_kv_dtype;
use ridge_protocol::{SamplingParams, TokenOut};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Flags of `cluster gpu-check`.
#[derive(Args, Debug)]
pub struct GpuCheckArgs {
    /// The device: cuda:N, or emulated.
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub device: DeviceChoice,
    /// Hugging Face folder, .gguf file or Hugging Face repository id. Without it, the built-in ridge-demo.
    #[arg(long)]
    pub model: Option<String>,
    /// Key of the random values. Default: another one each time.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Check kernels and engine only, and start no clusters.
    #[arg(long)]
    pub no_clusters: bool,
    /// Print one JSON object instead of lines.
    #[arg(long)]
    pub json: bool,
}

/// Tokens of a continuation.
const ANSWER: u32 = 8;
/// The whole prompt in one pass, as a prefill node runs it.
const LONG_CHUNK: usize = 1 << 16;
const START_TIMEOUT: Duration = Duration::from_secs(300);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs the command; fails if a check does.
pub fn run(args: &GpuCheckArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let seed = args.seed.unwrap_or_else(fresh_seed);
    let cache = crate::dirs::cache().ok().map(|cache| cache.join("kernels"));
    let opened = device::open(args.device, cache.as_deref()).with_context(|| format!("--device {}", args.device))?;
    let Some(device) = opened else { bail!("--device {} is no CUDA device", args.device) };
    let real = args.device != DeviceChoice::Emulated;
    let say = |line: String| match args.json {
        true => eprintln!("{line}"),
        false => println!("{line}"),
    };
    say(describe(device.properties()));
    say(format!("seed {seed}"));
    let effort = if real { Effort::Full } else { Effort::Small };
    let mut failures: Vec<String> = Vec::new();
    let checks = check::all(&device, seed, effort, &mut |check| say(line(check)))?;
    failures.extend(checks.iter().filter_map(|check| Some(format!("{}: {}", check.name, check.failure.as_ref()?))));

    let timings = if real { timing::all(&device, seed)? } else { Vec::new() };
    for timing in &timings {
        let (tera, giga) = (timing.flops / 1e12, timing.bytes / 1e9);
        let part = 100.0 * timing.of_copy;
        say(format!(
            "{:48} {:10.1} us {tera:8.1} TFLOP/s {giga:8.1} GB/s {part:5.1} %",
            timing.name, timing.microseconds
        ));
    }

    let model = find_model(args.model.as_deref())?;
    let properties = device.properties().clone();
    let engine = check_engine(&model, device);
    let mut report = json!({
        "device": properties_json(args.device, &properties),
        "seed": seed,
        "checks": checks.iter().map(check_json).collect::<Vec<_>>(),
        "timings": timings.iter().map(timing_json).collect::<Vec<_>>(),
    });
    match engine {
        Ok(found) => {
            say(format!(
                "engine: log-probabilities within {:.3} of the CPU's (allowed: {})",
                found.worst, found.allowed
            ));
            if found.worst > found.allowed {
                failures.push(format!("engine: log-probabilities differ by {:.3}", found.worst));
            }
            report["engine"] = json!({"model": model.name, "worst": found.worst, "allowed": found.allowed});
            if !args.no_clusters {
                let kinds = [("device", args.device, args.device), ("mixed", args.device, DeviceChoice::Cpu)];
                for (what, prefill, decode) in kinds {
                    let failed = check_cluster(&model, prefill, decode, &found).err().map(|error| format!("{error:#}"));
                    say(format!("cluster, {what}: {}", failed.as_deref().unwrap_or("ok")));
                    report["clusters"][what] = json!(failed.is_none());
                    failures.extend(failed.map(|failed| format!("cluster, {what}: {failed}")));
                }
            }
        }
        Err(error) => failures.push(format!("engine: {error:#}")),
    }
    report["seconds"] = json!(started.elapsed().as_secs());
    report["failures"] = json!(failures);
    if args.json {
        println!("{report:#}");
    }
    ensure!(failures.is_empty(), "{} of the checks failed: {}", failures.len(), failures.join("; "));
    say(format!("all checks passed in {} s", started.elapsed().as_secs()));
    Ok(())
}

/// Nanoseconds of the clock: a seed that nobody chose.
fn fresh_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(1, |since| since.as_nanos() as u64)
}

fn describe(device: &Properties) -> String {
    let Properties { name, sm, multiprocessors, .. } = device;
    format!("{name}: sm_{sm}, {multiprocessors} multiprocessors, {} MiB", device.memory_bytes >> 20)
}

fn line(check: &Check) -> String {
    let verdict = check.failure.as_deref().unwrap_or("ok");
    format!("{:32} {:3} cases, error {:9.2e} of what is allowed: {verdict}", check.name, check.cases, check.worst)
}

fn properties_json(choice: DeviceChoice, device: &Properties) -> Value {
    json!({
        "choice": choice.to_string(),
        "name": device.name,
        "sm": device.sm,
        "multiprocessors": device.multiprocessors,
        "memory_bytes": device.memory_bytes,
    })
}

fn check_json(check: &Check) -> Value {
    // JSON has no infinity.
    let worst = check.worst.is_finite().then_some(check.worst);
    json!({"name": check.name, "cases": check.cases, "error": worst, "failure": check.failure})
}

fn timing_json(timing: &timing::Timing) -> Value {
    json!({
        "name": timing.name,
        "microseconds": timing.microseconds,
        "flops": timing.flops,
        "bytes_per_second": timing.bytes,
        "of_copy": timing.of_copy,
    })
}

/// What a model's engine on the device answered.
struct Found {
    /// Largest difference of a log-probability from the CPU's, where the two had said the same so far.
    worst: f32,
    /// What it may be: little for float32, what rounding to 16 bits costs otherwise.
    allowed: f32,
    prompt: Vec<u32>,
    text: String,
}

/// Continues a prompt on the CPU and on the device.
fn check_engine(model: &Model, device: Arc<dyn Device>) -> anyhow::Result<Found> {
    let checkpoint = load(&ModelSource::parse(&model.path)?, &LoadOptions::default(), &mut |_| {})?;
    let prompt = checkpoint.tokenizer.encode("Question: What does a prefill node do? Answer:", true)?;
    let pass = PassLimits { tokens: prompt.len(), sequences: 1 };
    let threads = roles::default_threads();
    let mut on_cpu = CpuEngine::new(&checkpoint, memory(&checkpoint, &prompt)?, Cpu::new(threads, None), None)?;
    let expected = answer(&mut on_cpu, &prompt)?;
    let kv = memory(&checkpoint, &prompt)?;
    let mut on_device = CudaEngine::new(&checkpoint, kv, Cpu::new(threads, None), device, pass, KernelSet::Stable)?;
    let answered = answer(&mut on_device, &prompt)?;
    let mut worst = 0.0f32;
    for (ours, cpu) in answered.iter().zip(&expected) {
        // The likeliest token's is compared whichever it was: near ties may fall either way.
        let likeliest = |out: &TokenOut| out.top.first().map_or(f32::NAN, |(_, logprob)| *logprob);
        let difference = (likeliest(ours) - likeliest(cpu)).abs();
        worst = if difference.is_nan() { f32::INFINITY } else { worst.max(difference) };
        if ours.token != cpu.token {
            break;
        }
    }
    let exact = checkpoint.tensors.get("layers.0.wq")?.dtype == DType::F32;
    // As a cluster makes text of tokens.
    let mut decoder = StreamDecoder::new(&checkpoint.tokenizer, true);
    let mut text: String = answered.iter().filter_map(|out| decoder.push(out.token)).collect();
    text.extend(decoder.flush());
    Ok(Found { worst, allowed: if exact { 1e-3 } else { 0.2 }, prompt, text })
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

/// Starts a cluster and asks it for the continuation that the engine found: the same on the device, of the same length where
/// another computes the answer.
fn check_cluster(model: &Model, prefill: DeviceChoice, decode: DeviceChoice, found: &Found) -> anyhow::Result<()> {
    let mut flags = vec!["--model".to_owned(), model.path.clone(), "--max-model-len=256".into()];
    flags.extend([format!("--prefill-device={prefill}"), format!("--decode-device={decode}")]);
    let embedding = Embedding { relays: None, restart_after: Duration::from_millis(100), start_timeout: START_TIMEOUT };
    let cluster = Embedded::start(&flags, embedding)?;
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
