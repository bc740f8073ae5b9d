//! Prints how fast the engine runs a model: prefill of 512 tokens, decode of one and of eight sequences.
//!
//! ```text
//! cargo run --release -p ridge-model --example engine_speed -- PATH [THREADS]
//! ```

use ridge_kernels::{Cpu, KvDtype, KvFormat};
use ridge_model::checkpoint::{LoadOptions, ModelSource, load};
use ridge_model::engine::{CpuEngine, Engine};
use ridge_model::kv::KvMemory;
use ridge_protocol::{BatchPlan, BlockId, PlanItem, RequestId, SampleSpec, SamplingParams};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BLOCK_SIZE: usize = 16;
const SEQUENCES: usize = 8;
const DECODE_STEPS: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: engine_speed PATH [THREADS]")?;
    let available = std::thread::available_parallelism()?.get();
    let threads = arguments.next().map_or(Ok(available), |text| text.parse())?;

    let checkpoint = load(&ModelSource::parse(&path)?, &LoadOptions::default(), &mut |_| {})?;
    let spec = checkpoint.spec.clone();
    let weight_bytes = checkpoint.tensors.bytes();
    let format =
        KvFormat { dtype: KvDtype::BF16, kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size: BLOCK_SIZE };
    let prompt_len = 512.min(spec.context - DECODE_STEPS - 1);
    let blocks_each = (prompt_len + DECODE_STEPS + 1).div_ceil(BLOCK_SIZE);
    let kv = Arc::new(KvMemory::new(format, spec.layers, SEQUENCES * blocks_each)?);
    let cpu = Cpu::new(threads, None);
    println!("{path}: {:.1} MB of weights, {threads} threads, {:?}", weight_bytes as f64 / 1e6, cpu.isa());
    let mut engine = CpuEngine::new(&checkpoint, kv, cpu, None)?;

    let params = Arc::new(SamplingParams::greedy(1));
    let item = |sequence: usize, start: usize, tokens: usize| PlanItem {
        request: RequestId(sequence as u64),
        tokens: (start..start + tokens).map(|i| ((i * 7 + sequence) % spec.vocab) as u32).collect(),
        start: start as u32,
        block_table: (0..blocks_each).map(|block| BlockId((sequence * blocks_each + block) as u32)).collect(),
        sample: Some(SampleSpec {
            params: params.clone(),
            history: Vec::new(),
            prompt_len: prompt_len as u32,
            position: (start + tokens) as u32,
        }),
    };
    let mut pass = |items: Vec<PlanItem>| -> Duration {
        let begin = Instant::now();
        engine.run(&BatchPlan { step: 0, items }, &mut |_| {});
        begin.elapsed()
    };

    // The first pass grows the buffers and pages the weights in; the best of the rest is reported.
    let prefill = (0..SEQUENCES).map(|sequence| pass(vec![item(sequence, 0, prompt_len)])).skip(1).min();
    let prefill = prefill.expect("more than one sequence");
    println!("prefill {prompt_len}: {:.0} tokens/s", prompt_len as f64 / prefill.as_secs_f64());
    for batch in [1, SEQUENCES] {
        let step = (0..DECODE_STEPS)
            .map(|step| pass((0..batch).map(|sequence| item(sequence, prompt_len + step, 1)).collect()))
            .min()
            .expect("at least one step");
        let (rate, bandwidth) = (batch as f64 / step.as_secs_f64(), weight_bytes as f64 / step.as_secs_f64() / 1e9);
        println!("decode b={batch}: {rate:.0} tokens/s, {bandwidth:.1} GB/s of weights");
    }
    Ok(())
}
