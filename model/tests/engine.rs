//! The engine's promises: a sequence's logits do not depend on its company, its chunks, its blocks or the threads,
//! nothing stale is read or left to be shipped, and impossible plans are refused.

mod common;

use common::tiny::{Random, checkpoint, item, memory, prompts, spec};
use ridge_kernels::{Cpu, DType, KvDtype, KvFormat};
use ridge_model::engine::{CpuEngine, Engine, EngineError, identity};
use ridge_model::forward::{Forward, Weights};
use ridge_model::generate::{Computes, GenerateError, Turn, generate, generate_handed_over, generate_in_turns};
use ridge_model::kv::KvMemory;
use ridge_model::memory::{PassLimits, activation_bytes};
use ridge_protocol::{BatchPlan, BlockId, ModelIdentity, SamplingParams, TokenId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Logits after every position, computed alone, one token at a time.
fn alone(weights: &Weights, kv_dtype: KvDtype, tokens: &[TokenId]) -> Vec<Vec<f32>> {
    let kv = memory(kv_dtype, 8, tokens.len().div_ceil(8));
    let table: Vec<BlockId> = (0..kv.blocks() as u32).map(BlockId).collect();
    let (cpu, mut forward) = (Cpu::new(1, None), Forward::default());
    let step = |position: usize| {
        let items = vec![item(0, &tokens[position..=position], position, &table)];
        forward.run(weights, &kv, &cpu, &BatchPlan { step: 0, items }, &mut |_| {}).to_vec()
    };
    (0..tokens.len()).map(step).collect()
}

/// The plan of a node's memory is only as good as this sum.
#[test]
fn buffers_grow_to_what_was_planned() {
    let weights = Weights::new(&checkpoint(DType::F32), &Cpu::new(1, None), None).expect("every tensor");
    let kv = memory(KvDtype::F32, 16, 8);
    let tokens: Vec<TokenId> = (0..61).collect();
    let table = |first: u32| (first..first + 4).map(BlockId).collect::<Vec<_>>();
    let items = vec![item(0, &tokens, 0, &table(0)), item(1, &tokens[..40], 0, &table(4))];
    let mut forward = Forward::default();
    forward.run(&weights, &kv, &Cpu::new(2, None), &BatchPlan { step: 0, items }, &mut |_| {});
    let planned = activation_bytes(&spec(), PassLimits { tokens: 101, sequences: 2 });
    // `up` has room of its own only where it is of another type than the gate, which the plan cannot know.
    let up = 101 * spec().ffn * size_of::<f32>();
    assert_eq!((forward.scratch_bytes() + up) as u64, planned);
}

/// Runs all prompts together, at random cut into chunks, batched and placed, and compares every row of logits.
fn check_schedule(weights: &Weights, kv_dtype: KvDtype, expected: &[Vec<Vec<f32>>], seed: u64) {
    let mut random = Random::new(seed);
    let prompts = prompts();
    let block_size = [1, 4, 16, 32][random.range(0, 4)];
    let needed: Vec<usize> = prompts.iter().map(|prompt| prompt.len().div_ceil(block_size)).collect();
    let kv = memory(kv_dtype, block_size, needed.iter().sum());
    let mut free: Vec<BlockId> = (0..kv.blocks() as u32).map(BlockId).collect();
    let mut take = || free.swap_remove(random.range(0, free.len()));
    let tables: Vec<Vec<BlockId>> = needed.iter().map(|count| (0..*count).map(|_| take()).collect()).collect();
    let (cpu, mut forward) = (Cpu::new(random.range(1, 4), None), Forward::default());
    let mut done = vec![0; prompts.len()];
    while done.iter().zip(&prompts).any(|(done, prompt)| *done < prompt.len()) {
        let mut items = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            if done[i] < prompt.len() && random.unit() < 0.7 {
                let end = random.range(done[i], prompt.len()) + 1;
                let mut item = item(i as u64, &prompt[done[i]..end], done[i], &tables[i]);
                // Some only fill the cache, so that rows of logits and items do not line up.
                if random.unit() < 0.3 {
                    item.sample = None;
                }
                items.push(item);
                done[i] = end;
            }
        }
        if items.is_empty() {
            continue;
        }
        let plan = BatchPlan { step: 0, items };
        let logits = forward.run(weights, &kv, &cpu, &plan, &mut |_| {});
        let sampled = plan.items.iter().filter(|item| item.sample.is_some());
        assert_eq!(logits.len(), sampled.clone().count() * 96);
        for (item, logits) in sampled.zip(logits.chunks_exact(96)) {
            let position = item.start as usize + item.tokens.len() - 1;
            let expected = &expected[item.request.0 as usize][position];
            assert!(logits.iter().all(|logit| logit.is_finite()), "seed {seed}: a stale byte was read");
            assert!(logits == expected, "seed {seed}: {} differs at position {position}", item.request);
        }
    }
}

fn check_invariance(dtype: DType, kv_dtype: KvDtype) {
    let weights = Weights::new(&checkpoint(dtype), &Cpu::new(1, None), None).expect("every tensor");
    let expected: Vec<_> = prompts().iter().map(|prompt| alone(&weights, kv_dtype, prompt)).collect();
    for seed in 0..24 {
        check_schedule(&weights, kv_dtype, &expected, seed);
    }
}

#[test]
fn logits_do_not_depend_on_the_batch_f32() {
    check_invariance(DType::F32, KvDtype::F32);
}

#[test]
fn logits_do_not_depend_on_the_batch_bf16() {
    check_invariance(DType::BF16, KvDtype::BF16);
}

#[test]
fn logits_do_not_depend_on_the_batch_fp8_cache() {
    check_invariance(DType::BF16, KvDtype::Fp8);
}

#[test]
fn logits_do_not_depend_on_the_batch_int8_cache() {
    check_invariance(DType::BF16, KvDtype::Int8);
}

#[test]
fn logits_do_not_depend_on_the_batch_q8_0() {
    check_invariance(DType::Q8_0, KvDtype::F16);
}

fn engine(block_size: usize, blocks: usize) -> CpuEngine {
    engine_in(KvDtype::BF16, block_size, blocks)
}

fn engine_in(dtype: KvDtype, block_size: usize, blocks: usize) -> CpuEngine {
    let kv = Arc::new(memory(dtype, block_size, blocks));
    CpuEngine::new(&checkpoint(DType::F32), kv, Cpu::new(1, None), None).expect("an engine")
}

#[test]
fn slots_after_the_end_of_a_sequence_are_zero() {
    let mut engine = engine(8, 4);
    let table: Vec<BlockId> = (0..4).map(BlockId).collect();
    let tokens = &prompts()[3][..20];
    for (start, end) in [(0, 3), (3, 4), (4, 17), (17, 20)] {
        engine.run(&BatchPlan { step: 0, items: vec![item(0, &tokens[start..end], start, &table)] }, &mut |_| {});
        let kv = engine.kv();
        for layer in 0..2 {
            for block in 0..end.div_ceil(8) {
                let (page, used) = (kv.read(layer, BlockId(block as u32)), (end - block * 8).min(8));
                let (keys, values) = page.split_at(page.len() / 2);
                // A key's slots are neighbours element by element, a value's vector by vector.
                for (half, slot_bytes) in [(keys, 2), (values, 16 * 2)] {
                    for slots in half.chunks_exact(8 * slot_bytes) {
                        let (filled, tail) = slots.split_at(used * slot_bytes);
                        assert!(tail.iter().all(|byte| *byte == 0), "layer {layer}, block {block}");
                        assert!(filled.iter().any(|byte| *byte != 0));
                    }
                }
            }
        }
    }
}

#[test]
fn a_layer_is_announced_when_its_pages_are_final_and_free() {
    let mut engine = engine(8, 3);
    let table: Vec<BlockId> = (0..3).map(BlockId).collect();
    let plan = BatchPlan { step: 0, items: vec![item(0, &prompts()[3][..24], 0, &table)] };
    let kv = engine.kv().clone();
    let mut seen: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let pages = |layer: u32| table.iter().flat_map(|b| kv.read(layer as usize, *b).to_vec()).collect::<Vec<u8>>();
    engine.run(&plan, &mut |layer| {
        assert_eq!(layer as usize, seen.len(), "layers are announced in order");
        seen.insert(layer, pages(layer));
    });
    assert_eq!(seen.len(), 2);
    for (layer, then) in seen {
        assert!(then == pages(layer), "layer {layer} changed after it was announced");
    }
}

#[test]
fn generation_does_not_depend_on_the_chunk() {
    let params = SamplingParams { temperature: 1.0, top_p: 0.9, seed: 3, ..SamplingParams::greedy(40) };
    let prompt = &prompts()[4];
    let run = |block_size: usize, chunk| {
        let mut engine = engine(block_size, 200usize.div_ceil(block_size));
        generate(&mut engine, prompt, &params, chunk, usize::MAX, &mut |_| true).expect("an answer")
    };
    let expected = run(16, 1000);
    assert_eq!(expected.len(), 40);
    for (block_size, chunk) in [(16, 0), (16, 40), (1, 1), (32, 64)] {
        assert_eq!(run(block_size, chunk), expected, "blocks of {block_size}, chunks of {chunk}");
    }
}

#[test]
fn generation_ends_at_stop_tokens_the_context_and_the_callers_word() {
    let mut engine = engine(16, 16);
    let prompt = prompts()[4].clone();
    let mut run = |params: &SamplingParams, most: usize| {
        let mut left = most;
        let mut on_token = |_: &_| {
            left -= 1;
            left > 0
        };
        generate(&mut engine, &prompt, params, 64, usize::MAX, &mut on_token).expect("an answer")
    };
    let all = run(&SamplingParams::greedy(1000), 1000);
    assert_eq!(all.len(), 256 - prompt.len(), "up to the context");
    let stop = SamplingParams { stop_tokens: vec![all[2].token], ..SamplingParams::greedy(1000) };
    let first = all.iter().position(|out| out.token == all[2].token).expect("it is there");
    assert_eq!(run(&stop, 1000), all[..=first]);
    assert_eq!(run(&SamplingParams { ignore_eos: true, ..stop }, 1000), all);
    assert_eq!(run(&SamplingParams::greedy(1000), 5), all[..5]);
}

#[test]
fn generation_refuses_what_it_cannot_do() {
    let mut engine = engine(16, 4);
    let mut run = |prompt: &[TokenId], max_tokens| {
        generate(&mut engine, prompt, &SamplingParams::greedy(max_tokens), 64, usize::MAX, &mut |_| true)
    };
    assert_eq!(run(&[], 1), Err(GenerateError::EmptyPrompt));
    assert_eq!(run(&[96], 1), Err(GenerateError::Token { token: 96, vocab: 96 }));
    assert_eq!(run(&[0; 256], 1), Err(GenerateError::Context { prompt: 256, context: 256 }));
    assert_eq!(run(&[0; 60], 6), Err(GenerateError::Blocks { needed: 5, blocks: 4 }));
    assert!(matches!(run(&[0], 0), Err(GenerateError::Params(_))));
    assert_eq!(run(&[0; 60], 5).map(|out| out.len()), Ok(5), "the last token needs no slot");
}

#[test]
#[should_panic(expected = "r0 has token Some(96) of 96")]
fn a_token_outside_the_vocabulary_panics() {
    let items = vec![item(0, &[1, 96], 0, &[BlockId(0)])];
    engine(16, 1).run(&BatchPlan { step: 0, items }, &mut |_| {});
}

#[test]
#[should_panic(expected = "r0 needs 17 positions, has 16")]
fn a_short_block_table_panics() {
    let items = vec![item(0, &[1], 16, &[BlockId(0)])];
    engine(16, 1).run(&BatchPlan { step: 0, items }, &mut |_| {});
}

#[test]
#[should_panic(expected = "a request occurs twice")]
fn a_request_in_a_plan_twice_panics() {
    let items = vec![item(7, &[1], 0, &[BlockId(0)]), item(7, &[1], 0, &[BlockId(1)])];
    engine(16, 2).run(&BatchPlan { step: 0, items }, &mut |_| {});
}

/// Whatever blocks a prompt was computed in: the sequence goes on in others as if it had always been there.
#[test]
fn a_hand_over_into_other_blocks_changes_no_token() {
    let params = SamplingParams::greedy(12);
    for dtype in KvDtype::ALL {
        for (from, to) in [(8, 16), (16, 4), (12, 5), (8, 8)] {
            let engines = [from, to].map(|size| engine_in(dtype, size, 80_usize.div_ceil(size)));
            let [mut prefill, mut decode] = engines;
            for prompt in prompts() {
                let want = generate(&mut decode, &prompt, &params, 24, 256, &mut |_| true);
                let got = generate_handed_over(&mut prefill, &mut decode, &prompt, &params, 24, 256, &mut |_| true);
                assert_eq!(got, want, "{dtype:?}, {} tokens in blocks of {from}, then of {to}", prompt.len());
            }
        }
    }
}

/// KV of one type may be lost and computed again at any token, by either engine.
#[test]
fn turns_change_no_token_of_one_type() {
    let params = SamplingParams { logprobs: Some(1), ..SamplingParams::greedy(12) };
    let [mut prefill, mut decode] = [8, 16].map(|size| engine_in(KvDtype::Int8, size, 10));
    let prompt = &prompts()[0];
    let want = generate(&mut decode, prompt, &params, 24, 256, &mut |_| true).expect("it fits");
    for first in [Computes::Prefill, Computes::Decode] {
        for (at, by) in [(0, first), (1, Computes::Prefill), (5, Computes::Decode), (12, Computes::Prefill)] {
            let turns = [Turn { at: 0, by: first }, Turn { at, by }];
            let got = generate_in_turns(&mut prefill, &mut decode, prompt, &params, 24, 256, &turns, &mut |_| true);
            assert_eq!(got.as_ref(), Ok(&want), "{turns:?}");
        }
    }
}

/// Where the types differ, a turn rounds what was generated once more: log-probabilities before it are the same, and not after it.
#[test]
fn a_turn_into_another_type_is_seen_from_there_on() {
    let params = SamplingParams { logprobs: Some(0), ..SamplingParams::greedy(12) };
    let (mut prefill, mut decode) = (engine_in(KvDtype::F32, 16, 10), engine_in(KvDtype::Int8, 16, 10));
    let prompt = &prompts()[0];
    let mut answer = |turns: &[Turn]| {
        generate_in_turns(&mut prefill, &mut decode, prompt, &params, 24, 256, turns, &mut |_| true).expect("it fits")
    };
    let begin = Turn { at: 0, by: Computes::Prefill };
    let whole = answer(&[begin]);
    let again = answer(&[begin, Turn { at: 5, by: Computes::Prefill }]);
    assert_eq!(again[..5], whole[..5]);
    assert_ne!(again[5..], whole[5..]);
}

#[test]
fn memory_of_another_model_is_refused() {
    let format = KvFormat { dtype: KvDtype::F32, kv_heads: 3, head_dim: 16, block_size: 16 };
    let kv = Arc::new(KvMemory::new(format, 2, 1).expect("a small mapping"));
    let error = CpuEngine::new(&checkpoint(DType::F32), kv, Cpu::new(1, None), None).err();
    assert_eq!(error, Some(EngineError::KvLayout { field: "kv heads", found: 3, wanted: 2 }));
}

#[test]
fn identity_names_what_differs() {
    let format = |dtype| KvFormat { dtype, kv_heads: 2, head_dim: 16, block_size: 16 };
    let checkpoint = checkpoint(DType::F32);
    let ours = identity(&checkpoint, &format(KvDtype::BF16));
    assert_eq!(ours.refusal(&ours), None);
    let theirs = identity(&checkpoint, &format(KvDtype::Fp8));
    let want = "kv_dtype differs: bf16 here, fp8 there, and fp8 is not converted into bf16";
    assert_eq!(ours.refusal(&theirs).as_deref(), Some(want));
    let older = ModelIdentity { kv_layout: "head-major".into(), ..ours.clone() };
    assert_eq!(ours.mismatch(&older).as_deref(), Some("kv_layout differs: k-transposed here, head-major there"));
    for dtype in KvDtype::ALL {
        // Asserts that both sides compute the same size of a page.
        assert_eq!(identity(&checkpoint, &format(dtype)).kv_dtype.name(), dtype.name());
    }
}
