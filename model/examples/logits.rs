//! Writes the logits after every token of a list, for `bench/peers/accuracy.py` to compare with exact ones.
//!
//! ```text
//! cargo run --release -p ridge-model --example logits MODEL TOKENS OUT STEP KV_DTYPE THREADS
//! ```
//!
//! TOKENS is a file of token ids between blanks; OUT becomes `[tokens, vocab]` in little-endian f32. STEP tokens are computed
//! in a pass: 1 is how answers are decoded, many are a prompt's matrix products. KV_DTYPE is `auto` or a type's name.
//!
//! A pass has logits for the last token of each item only. So here every token is an item of its own, and a block holds
//! one token: an item writes its own block and reads those of all tokens before it, written by the same pass or earlier.
//! That is not how a prompt is served, so the last logits are compared with those of one chunk of all tokens.

use ridge_kernels::{Cpu, KvDtype, KvFormat};
use ridge_model::checkpoint::{LoadOptions, ModelSource, load};
use ridge_model::forward::{Forward, Weights};
use ridge_model::kv::KvMemory;
use ridge_model::worker::default_kv_dtype;
use ridge_protocol::{BatchPlan, BlockId, PlanItem, RequestId, SampleSpec, SamplingParams, TokenId};
use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, tokens, out, step, kv_dtype, threads] = args.as_slice() else {
        return Err("usage: logits MODEL TOKENS OUT STEP KV_DTYPE THREADS".into());
    };
    let tokens = std::fs::read_to_string(tokens)?;
    let tokens = tokens.split_whitespace().map(str::parse).collect::<Result<Vec<TokenId>, _>>()?;
    let cpu = Cpu::new(threads.parse()?, None);
    let checkpoint = load(&ModelSource::parse(model)?, &LoadOptions::default(), &mut |_| {})?;
    let dtype = match KvDtype::ALL.into_iter().find(|dtype| dtype.name() == kv_dtype) {
        Some(dtype) => dtype,
        None if kv_dtype == "auto" => default_kv_dtype(&checkpoint),
        None => return Err(format!("{kv_dtype} is not a type of the KV cache").into()),
    };
    let spec = &checkpoint.spec;
    let format = KvFormat { dtype, kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size: 1 };
    let kv = KvMemory::new(format, spec.layers, tokens.len())?;
    let weights = Weights::new(&checkpoint, &cpu, None)?;

    let mut forward = Forward::default();
    let mut file = File::create(out)?;
    let mut last = Vec::new();
    let starts: Vec<usize> = (0..tokens.len()).collect();
    for starts in starts.chunks(step.parse()?) {
        let items = starts.iter().map(|&start| item(&tokens, start, start + 1)).collect();
        let logits = forward.run(&weights, &kv, &cpu, &BatchPlan { step: 0, items }, &mut |_| {});
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        file.write_all(&bytes)?;
        last = logits[logits.len() - spec.vocab..].to_vec();
    }
    let chunk = BatchPlan { step: 0, items: vec![item(&tokens, 0, tokens.len())] };
    let logits = forward.run(&weights, &kv, &cpu, &chunk, &mut |_| {});
    assert!(last == logits, "a prompt's logits depend on how it is cut");
    println!(r#"{{"isa": "{}", "kv": "{}"}}"#, cpu.isa().name(), dtype.name());
    Ok(())
}

/// The part of a pass that computes these tokens of the sequence and the logits after the last of them.
fn item(tokens: &[TokenId], start: usize, end: usize) -> PlanItem {
    let params = Arc::new(SamplingParams::greedy(1));
    PlanItem {
        request: RequestId(start as u64),
        tokens: tokens[start..end].to_vec(),
        start: start as u32,
        block_table: (0..end as u32).map(BlockId).collect(),
        sample: Some(SampleSpec { params, history: Vec::new(), prompt_len: 0, position: end as u32 }),
        reader: None,
    }
}
