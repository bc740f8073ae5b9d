//! The CUDA engine, on the emulated device: it computes what the CPU does, whatever the batch, and shares its pages.

mod common;

use common::tiny::{Random, checkpoint, item, memory, prompts, spec};
use ridge_kernels::cuda::emulated::{Emulated, Order};
use ridge_kernels::cuda::{CudaError, Device};
use ridge_kernels::{Cpu, DType, KvDtype, KvFormat};
use ridge_model::checkpoint::{Checkpoint, LoadOptions, ModelSource, load};
use ridge_model::cuda::{CudaEngine, Footprint};
use ridge_model::device::{DeviceOptions, ProductSet};
use ridge_model::engine::{CpuEngine, Engine, EngineError};
use ridge_model::forward::{Forward, Weights};
use ridge_model::kv::KvMemory;
use ridge_model::memory::PassLimits;
use ridge_protocol::transfer::PageSource;
use ridge_protocol::{BatchPlan, BlockId, BlockShape, CacheDtype, TokenId};
use std::path::Path;
use std::sync::Arc;

const VOCAB: usize = 96;
/// What rounding rows of prompts to fp8 may cost in logits of a spread of about two.
const FP8_LOGITS: f32 = 1.0;

fn engine(device: &Arc<Emulated>, checkpoint: &Checkpoint, kv: KvMemory) -> CudaEngine {
    // Small on purpose: buffers must grow.
    let limits = PassLimits { tokens: 4, sequences: 1 };
    let device: Arc<dyn Device> = device.clone();
    CudaEngine::new(checkpoint, Arc::new(kv), Cpu::new(1, None), device, limits, &DeviceOptions::default())
        .expect("an engine")
}

fn table(blocks: usize) -> Vec<BlockId> {
    (0..blocks as u32).map(BlockId).collect()
}

/// Logits after every position, computed alone by the CPU, one token at a time.
fn by_the_cpu(checkpoint: &Checkpoint, kv_dtype: KvDtype, tokens: &[TokenId]) -> Vec<Vec<f32>> {
    let weights = Weights::new(checkpoint, &Cpu::new(1, None), None).expect("every tensor");
    let kv = memory(kv_dtype, 8, tokens.len().div_ceil(8));
    let (table, cpu, mut forward) = (table(kv.blocks()), Cpu::new(1, None), Forward::default());
    let step = |position: usize| {
        let items = vec![item(0, &tokens[position..=position], position, &table)];
        forward.run(&weights, &kv, &cpu, &BatchPlan { step: 0, items }, &mut |_| {}).to_vec()
    };
    (0..tokens.len()).map(step).collect()
}

/// Runs all prompts together, at random cut into chunks, batched and placed, and compares every row of logits with the CPU's.
fn check_schedule(
    device: &Arc<Emulated>,
    checkpoint: &Checkpoint,
    kv_dtype: KvDtype,
    expected: &[Vec<Vec<f32>>],
    tolerance: f32,
    seed: u64,
) {
    device.set_order([Order::Forward, Order::Backward, Order::Shuffled(seed)][seed as usize % 3]);
    let mut random = Random::new(seed);
    let prompts = prompts();
    let block_size = [1, 4, 16, 32][seed as usize % 4];
    let needed: Vec<usize> = prompts.iter().map(|prompt| prompt.len().div_ceil(block_size)).collect();
    let mut engine = engine(device, checkpoint, memory(kv_dtype, block_size, needed.iter().sum()));
    let mut free = table(needed.iter().sum());
    let mut take = || free.swap_remove(random.range(0, free.len()));
    let tables: Vec<Vec<BlockId>> = needed.iter().map(|count| (0..*count).map(|_| take()).collect()).collect();
    let mut done = vec![0; prompts.len()];
    let mut worst = 0f32;
    while done.iter().zip(&prompts).any(|(done, prompt)| *done < prompt.len()) {
        let mut items = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            if done[i] < prompt.len() && random.unit() < 0.7 {
                let end = random.range(done[i], prompt.len()) + 1;
                let mut item = item(i as u64, &prompt[done[i]..end], done[i], &tables[i]);
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
        let mut layers = Vec::new();
        let logits = engine.logits(&plan, &mut |layer| layers.push(layer)).expect("the device answers");
        assert_eq!(layers, [0, 1], "layers land in order");
        let sampled = plan.items.iter().filter(|item| item.sample.is_some());
        assert_eq!(logits.len(), sampled.clone().count() * VOCAB);
        for (item, logits) in sampled.zip(logits.chunks_exact(VOCAB)) {
            let position = item.start as usize + item.tokens.len() - 1;
            for (got, want) in logits.iter().zip(&expected[item.request.0 as usize][position]) {
                assert!(
                    (got - want).abs() <= tolerance,
                    "seed {seed}: {got} at position {position}, the CPU has {want}"
                );
                worst = worst.max((got - want).abs());
            }
        }
    }
    device.synchronize().expect("no kernel wrote where it should not");
    println!("seed {seed}: logits within {worst:.1e} of the CPU's");
}

fn check(dtype: DType, kv_dtype: KvDtype, tolerance: f32) {
    let Some(device) = Emulated::for_tests() else { return };
    let checkpoint = checkpoint(dtype);
    let expected: Vec<_> = prompts().iter().map(|prompt| by_the_cpu(&checkpoint, kv_dtype, prompt)).collect();
    for seed in 0..6 {
        check_schedule(&device, &checkpoint, kv_dtype, &expected, tolerance, seed);
    }
}

#[test]
fn logits_are_the_cpus_f32() {
    check(DType::F32, KvDtype::F32, 1e-4);
}

#[test]
fn logits_are_the_cpus_bf16() {
    check(DType::BF16, KvDtype::BF16, 0.15);
}

#[test]
fn logits_are_the_cpus_f16() {
    check(DType::F16, KvDtype::F16, 0.05);
}

#[test]
fn logits_are_the_cpus_int8_cache() {
    check(DType::F32, KvDtype::Int8, 0.05);
}

#[test]
fn logits_are_the_cpus_fp8_cache() {
    check(DType::F32, KvDtype::Fp8, 0.3);
}

#[test]
fn logits_are_the_cpus_q8_0() {
    check(DType::Q8_0, KvDtype::F16, 0.15);
}

/// A sequence's logits are the same bits alone and in company, as long as its own tokens are cut the same way.
#[test]
fn logits_do_not_depend_on_the_company() {
    let Some(device) = Emulated::for_tests() else { return };
    for (dtype, kv_dtype) in [(DType::F32, KvDtype::F32), (DType::BF16, KvDtype::BF16)] {
        let checkpoint = checkpoint(dtype);
        let prompts = prompts();
        // Each as a chunk, then three single tokens; alone, in blocks of 8, or all together in blocks of 16.
        let steps = |i: usize| {
            let prompt = &prompts[i];
            let chunk = prompt.len().saturating_sub(3).max(1);
            (chunk..=prompt.len()).map(move |end| if end == chunk { 0..end } else { end - 1..end })
        };
        let mut alone = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let mut engine = engine(&device, &checkpoint, memory(kv_dtype, 8, 8));
            let run = |tokens: std::ops::Range<usize>| {
                let items = vec![item(0, &prompt[tokens.clone()], tokens.start, &table(8))];
                engine.logits(&BatchPlan { step: 0, items }, &mut |_| {}).expect("logits")
            };
            alone.push(steps(i).map(run).collect::<Vec<_>>());
        }
        let mut engine = engine(&device, &checkpoint, memory(kv_dtype, 16, 4 * prompts.len()));
        let tables: Vec<_> =
            (0..prompts.len() as u32).map(|i| (4 * i..4 * i + 4).map(BlockId).collect::<Vec<_>>()).collect();
        #[allow(clippy::needless_range_loop, reason = "a round names its place in every prompt's steps and results")]
        for round in 0..4 {
            let mut items = Vec::new();
            for (i, prompt) in prompts.iter().enumerate() {
                items.extend(steps(i).nth(round).map(|t| item(i as u64, &prompt[t.clone()], t.start, &tables[i])));
            }
            let plan = BatchPlan { step: 0, items };
            let logits = engine.logits(&plan, &mut |_| {}).expect("logits");
            for (item, logits) in plan.items.iter().zip(logits.chunks_exact(VOCAB)) {
                assert!(
                    logits == &alone[item.request.0 as usize][round][..],
                    "{dtype:?}: {} in round {round}",
                    item.request
                );
            }
        }
    }
}

/// Steps that are replayed as graphs compute the bits of steps that are launched: while sequences come and go, grow beyond a split of
/// attention, and make buffers grow; pages too.
#[test]
fn graphs_compute_what_launches_do() {
    let Some(device) = Emulated::for_tests() else { return };
    for (dtype, kv_dtype) in [(DType::F32, KvDtype::F32), (DType::Q8_0, KvDtype::BF16)] {
        let mut checkpoint = Arc::into_inner(checkpoint(dtype)).expect("nobody else has it");
        checkpoint.spec.context = 1024;
        let run = |graphs: bool| {
            let options = DeviceOptions { graphs, ..DeviceOptions::default() };
            let limits = PassLimits { tokens: 4, sequences: 1 };
            let kv = Arc::new(memory(kv_dtype, 16, 120));
            let on: Arc<dyn Device> = device.clone();
            let cpu = Cpu::new(1, None);
            let mut engine = CudaEngine::new(&checkpoint, kv, cpu, on, limits, &options).expect("an engine");
            let tables: Vec<Vec<BlockId>> = (0..3).map(|i| (40 * i..40 * (i + 1)).map(BlockId).collect()).collect();
            let (mut lengths, mut all) = ([505, 30, 3], Vec::new());
            let mut random = Random::new(5);
            let mut token = || random.range(0, VOCAB) as TokenId;
            for (i, length) in lengths.iter().enumerate() {
                let tokens: Vec<TokenId> = (0..*length).map(|_| token()).collect();
                let items = vec![item(i as u64, &tokens, 0, &tables[i])];
                all.push(engine.logits(&BatchPlan { step: 0, items }, &mut |_| {}).expect("logits"));
            }
            // One leaves, comes back, and sometimes does not sample.
            for step in 0..16u64 {
                let mut items = Vec::new();
                for i in (0..3).filter(|i| *i != 1 || !(4..8).contains(&step)) {
                    let mut one = item(i as u64, &[token()], lengths[i], &tables[i]);
                    if i == 2 && step % 5 == 4 {
                        one.sample = None;
                    }
                    items.push(one);
                    lengths[i] += 1;
                }
                let mut layers = Vec::new();
                let logits = engine.logits(&BatchPlan { step, items }, &mut |layer| layers.push(layer));
                assert_eq!(layers, [0, 1]);
                all.push(logits.expect("logits"));
            }
            let kv = engine.kv();
            let pages = (0..2).flat_map(|layer| (0..120).map(move |block| (layer, BlockId(block))));
            let pages: Vec<Vec<u8>> = pages.map(|(layer, block)| kv.read(layer, block).to_vec()).collect();
            device.synchronize().expect("no kernel wrote where it should not");
            (all, pages, engine.graph_replays())
        };
        let (launched, launched_pages, none) = run(false);
        let (replayed, replayed_pages, replays) = run(true);
        assert!(none == 0 && replays >= 8, "{none} and {replays} replays");
        for (step, (a, b)) in launched.iter().zip(&replayed).enumerate() {
            assert!(a == b && a.iter().all(|logit| logit.is_finite()), "{dtype:?}: logits of pass {step}");
        }
        assert!(launched_pages == replayed_pages, "{dtype:?}: pages");
    }
}

/// Pages of prompts that are not shipped are fetched when they are read, and are the same; so they are when their reader wants them in
/// blocks of another size and type, which the device then makes of them.
#[test]
fn pages_that_are_not_shipped_are_fetched() {
    let Some(device) = Emulated::for_tests() else { return };
    let checkpoint = checkpoint(DType::F32);
    let run = |ship: bool| {
        let options = DeviceOptions { ship, ..DeviceOptions::default() };
        let (limits, on): (_, Arc<dyn Device>) = (PassLimits { tokens: 24, sequences: 1 }, device.clone());
        let kv = Arc::new(memory(KvDtype::BF16, 8, 3));
        let mut engine = CudaEngine::new(&checkpoint, kv, Cpu::new(1, None), on, limits, &options).expect("an engine");
        let plan = BatchPlan { step: 0, items: vec![item(0, &prompts()[3][..24], 0, &table(3))] };
        let mut layers = Vec::new();
        engine.run(&plan, &mut |layer| layers.push(layer));
        assert_eq!(layers, [0, 1]);
        let kv = engine.kv();
        let source = PageSource { blocks: table(3), skip: 5, tokens: 15 };
        let mut pages = Vec::new();
        for dtype in [CacheDtype::Bf16, CacheDtype::F32, CacheDtype::Fp8, CacheDtype::Int8] {
            let mut page = Vec::new();
            kv.page_in(BlockShape::new(20, dtype).expect("a shape"), 1, &source, &mut page);
            pages.push(page);
        }
        pages.extend((0..2).flat_map(|layer| table(3).into_iter().map(move |b| kv.read(layer, b).to_vec())));
        pages
    };
    assert!(run(true) == run(false));
}

/// Without NVIDIA's library nothing is measured and nothing kept, and products are our own: as on every emulated device.
#[test]
fn products_are_our_own_where_there_are_no_others() {
    let Some(device) = Emulated::for_tests() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let run = |products: ProductSet| {
        let options = DeviceOptions { products, cache: Some(folder.path().into()), ..DeviceOptions::default() };
        let (limits, on): (_, Arc<dyn Device>) = (PassLimits { tokens: 24, sequences: 1 }, device.clone());
        let kv = Arc::new(memory(KvDtype::BF16, 8, 3));
        let cpu = Cpu::new(1, None);
        let mut engine = CudaEngine::new(&checkpoint(DType::BF16), kv, cpu, on, limits, &options).expect("an engine");
        let plan = BatchPlan { step: 0, items: vec![item(0, &prompts()[3][..24], 0, &table(3))] };
        engine.logits(&plan, &mut |_| {}).expect("logits")
    };
    assert!(run(ProductSet::Own) == run(ProductSet::Measured));
    let kept: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").flatten().collect();
    assert!(kept.is_empty(), "{kept:?}");
}

/// How the matrices of a checkpoint are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Quantised {
    /// fp8 with a factor for each 128 rows and columns.
    Fp8Blocks,
    /// fp4 with a scale for each 16.
    NvFp4,
}

/// A folder of a small Llama with random matrices; no size is a multiple of 128.
fn random_llama(quantised: Quantised) -> tempfile::TempDir {
    const HIDDEN: usize = 192;
    const FFN: usize = 320;
    let quantisation = match quantised {
        Quantised::Fp8Blocks => serde_json::json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
        Quantised::NvFp4 => serde_json::json!({
            "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": true,
            }}},
        }),
    };
    let folder = tempfile::tempdir().expect("a folder");
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false,
        "rope_theta": 10000.0, "dtype": "bfloat16",
        "quantization_config": quantisation,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    let mut random = Random::new(77);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut put = |name: String, dtype: &str, shape: &[usize], bytes: &[u8]| {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name, serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    };
    let mut normal = |count: usize, scale: f32| -> Vec<f32> {
        (0..count).map(|_| scale * (0..6).map(|_| random.unit() as f32 - 0.5).sum::<f32>() * 1.41).collect()
    };
    let bf16 = |values: &[f32]| {
        let mut bytes = Vec::new();
        ridge_kernels::quantize_row(DType::BF16, values, &mut bytes).expect("a plain type");
        bytes
    };
    for name in ["model.embed_tokens", "lm_head"] {
        put(format!("{name}.weight"), "BF16", &[160, HIDDEN], &bf16(&normal(160 * HIDDEN, 0.15)));
    }
    put("model.norm.weight".into(), "BF16", &[HIDDEN], &bf16(&[1.0; HIDDEN]));
    for layer in 0..2 {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            put(format!("model.layers.{layer}.{norm}.weight"), "BF16", &[HIDDEN], &bf16(&[1.0; HIDDEN]));
        }
        for (name, n, k) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", 64, HIDDEN),
            ("self_attn.v_proj", 64, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", FFN, HIDDEN),
            ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ] {
            let name = format!("model.layers.{layer}.{name}.weight");
            if quantised == Quantised::NvFp4 {
                let codes: Vec<u8> = normal(n * k / 2, 1e5).into_iter().map(|v| v.abs() as u32 as u8).collect();
                let scales = normal(n * k / 16, 40.0);
                let scales: Vec<u8> = scales.into_iter().map(|v| ridge_kernels::f32_to_e4m3(v.abs() + 40.0)).collect();
                // Elements come to about 2.5 and scales to 75.
                let global = 2.5 * 75.0 * (k as f32).sqrt();
                put(format!("{name}_packed"), "U8", &[n, k / 2], &codes);
                put(format!("{name}_scale"), "F8_E4M3", &[n, k / 16], &scales);
                put(format!("{name}_global_scale"), "F32", &[1], &global.to_le_bytes());
                continue;
            }
            let codes: Vec<u8> = normal(n * k, 32.0).into_iter().map(ridge_kernels::f32_to_e4m3).collect();
            let blocks = [n.div_ceil(128), k.div_ceil(128)];
            // About 1 / sqrt(k) together, and different from block to block.
            let factors: Vec<u8> = normal(blocks[0] * blocks[1], 1.0)
                .into_iter()
                .flat_map(|v| ((1.0 + v.abs()) / 32.0 / 1.8 / (k as f32).sqrt()).to_le_bytes())
                .collect();
            put(format!("{name}_scale_inv"), "F32", &blocks, &factors);
            put(name, "F8_E4M3", &[n, k], &codes);
        }
    }
    let header = serde_json::Value::from(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(folder.path().join("model.safetensors"), file).expect("written");
    folder
}

#[test]
fn fp8_weights_are_multiplied_as_they_are() {
    let goldens = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/goldens"));
    // It did compute in fp8: nothing else is so far off.
    check_scaled(&goldens.join("llama-fp8-channel"), 0.01..FP8_LOGITS);
}

#[test]
fn fp8_weights_with_a_factor_per_block_are_too() {
    check_scaled(random_llama(Quantised::Fp8Blocks).path(), 0.01..FP8_LOGITS);
}

/// fp4 weights are decoded to bf16 for prompts and read as they are for steps.
#[test]
fn nvfp4_weights_are_read_as_they_are() {
    check_scaled(random_llama(Quantised::NvFp4).path(), 0.0..0.15);
}

/// An fp8 or fp4 checkpoint on a device that multiplies fp8: the matrices take less memory than in bf16, logits are the CPU's but for
/// what rounding a prompt's rows to fp8 costs, or weights to bf16 (`differences`), a sequence's bits do not depend on its company, and graphs change nothing.
fn check_scaled(model: &Path, differences: std::ops::Range<f32>) {
    let Ok(emulated) = Emulated::beside_the_program() else { return println!("skipped: no C++ compiler") };
    let device = Arc::new(emulated.with_properties(|properties| properties.sm = 89));
    let goldens = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/goldens"));
    let options = LoadOptions { tokenizer: Some(goldens.join("tokenizer.json")), chat_template: None, download: false };
    let source = ModelSource::Folder(model.to_owned());
    let checkpoint = load(&source, &options, &mut |_| {}).expect("a golden");
    let spec = &checkpoint.spec;
    let format = KvFormat { dtype: KvDtype::BF16, kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size: 16 };
    let pass = PassLimits { tokens: 4, sequences: 1 };
    let weights = Footprint::of(&checkpoint, &format, pass, &DeviceOptions::default(), 89).expect("sizes").weights;
    let names = ["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"];
    let matrices = (0..spec.layers).flat_map(|layer| names.map(|name| format!("layers.{layer}.{name}")));
    let in_bf16 = matrices.chain(["embed".to_owned(), "head".to_owned()]).map(|name| {
        let tensor = checkpoint.tensors.get(&name).expect("every matrix");
        2 * (tensor.rows * tensor.cols) as u64
    });
    let in_bf16: u64 = in_bf16.sum();
    assert!(weights < in_bf16, "{weights} bytes, {in_bf16} in bf16");

    let pages = || Arc::new(KvMemory::new(format, spec.layers, 12).expect("pages"));
    let on_device = |graphs| {
        let options = DeviceOptions { graphs, ..DeviceOptions::default() };
        let on: Arc<dyn Device> = device.clone();
        CudaEngine::new(&checkpoint, pages(), Cpu::new(1, None), on, pass, &options).expect("an engine")
    };
    let prompts: [Vec<TokenId>; 2] = [(0..37).map(|i| i * 11 % 160).collect(), (0..70).map(|i| i * 7 % 160).collect()];
    let tables: [Vec<BlockId>; 2] = [(0..6).map(BlockId).collect(), (6..12).map(BlockId).collect()];
    // A chunk, then single tokens: of the sequences `which`, together.
    let run = |engine: &mut CudaEngine, which: &[usize]| {
        let mut all = vec![Vec::new(); 2];
        for step in 0..6 {
            let items = which.iter().map(|i| {
                let chunk = prompts[*i].len() - 5;
                let range = if step == 0 { 0..chunk } else { chunk + step - 1..chunk + step };
                item(*i as u64, &prompts[*i][range.clone()], range.start, &tables[*i])
            });
            let plan = BatchPlan { step: step as u64, items: items.collect() };
            let logits = engine.logits(&plan, &mut |_| {}).expect("logits");
            for (i, logits) in which.iter().zip(logits.chunks_exact(spec.vocab)) {
                all[*i].push(logits.to_vec());
            }
        }
        device.synchronize().expect("no kernel wrote where it should not");
        all
    };
    let (together, launched) = (run(&mut on_device(true), &[0, 1]), run(&mut on_device(false), &[0, 1]));
    assert!(together == launched, "graphs");
    let weights = Weights::new(&checkpoint, &Cpu::new(1, None), None).expect("every tensor");
    let mut worst = 0f32;
    for i in 0..2 {
        let alone = run(&mut on_device(true), &[i]);
        assert!(alone[i] == together[i], "sequence {i} alone");
        let (kv, mut forward) = (pages(), Forward::default());
        for position in 0..prompts[i].len() {
            let items = vec![item(0, &prompts[i][position..=position], position, &tables[i])];
            let plan = BatchPlan { step: 0, items };
            let expected = forward.run(&weights, &kv, &Cpu::new(1, None), &plan, &mut |_| {}).to_vec();
            let step = (position + 6).checked_sub(prompts[i].len());
            for (got, want) in step.into_iter().flat_map(|step| together[i][step].iter().zip(&expected)) {
                worst = worst.max((got - want).abs());
            }
        }
    }
    println!("logits within {worst:.3} of the CPU's");
    assert!(differences.contains(&worst), "{worst}");
}

/// Pages that one engine wrote are read by the other, in both directions, and the tail of the last one is zero.
#[test]
fn pages_pass_between_cpu_and_device() {
    let Some(device) = Emulated::for_tests() else { return };
    let checkpoint = checkpoint(DType::F32);
    let prompt = prompts()[4].clone();
    for (kv_dtype, tolerance) in [(KvDtype::F32, 1e-4), (KvDtype::Int8, 0.05)] {
        let expected = by_the_cpu(&checkpoint, kv_dtype, &prompt);
        let whole = |tokens: &[TokenId], start, request| BatchPlan {
            step: 0,
            items: vec![item(request, tokens, start, &table(8))],
        };
        let cpu_kv = Arc::new(memory(kv_dtype, 8, 8));
        let mut on_cpu = CpuEngine::new(&checkpoint, cpu_kv.clone(), Cpu::new(1, None), None).expect("an engine");
        let mut on_device = engine(&device, &checkpoint, memory(kv_dtype, 8, 8));
        let device_kv = on_device.kv().clone();
        let copy = |from: &KvMemory, to: &KvMemory| {
            for layer in 0..spec().layers {
                for block in table(8) {
                    to.write(layer, block).copy_from_slice(&from.read(layer, block));
                }
            }
        };
        // Prefilled by the CPU, continued by the device.
        on_cpu.run(&whole(&prompt[..50], 0, 0), &mut |_| {});
        copy(&cpu_kv, &device_kv);
        for position in 50..55 {
            let plan = whole(&prompt[position..=position], position, 0);
            let logits = on_device.logits(&plan, &mut |_| {}).expect("logits");
            let differ = logits.iter().zip(&expected[position]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(differ <= tolerance, "{kv_dtype:?}: logits differ by {differ} at {position}");
        }
        // And back: what the device wrote is on the host, slots beyond it are zero as ever.
        copy(&device_kv, &cpu_kv);
        let weights = Weights::new(&checkpoint, &Cpu::new(1, None), None).expect("every tensor");
        let logits = Forward::default()
            .run(&weights, &cpu_kv, &Cpu::new(1, None), &whole(&prompt[55..60], 55, 1), &mut |_| {})
            .to_vec();
        let differ = logits.iter().zip(&expected[59]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(differ <= tolerance, "{kv_dtype:?}: logits differ by {differ} on the way back");
        let format = *device_kv.format();
        let page = device_kv.read(1, BlockId(6));
        let mut cleared = page.to_vec();
        format.zero_tail(&mut cleared, 55 % 8);
        assert!(cleared == *page && page.iter().any(|byte| *byte != 0), "{kv_dtype:?}: slots after the end are zero");
    }
}

/// What is in the host's pages when a layer is announced is what stays there.
#[test]
fn a_layer_is_announced_when_its_pages_are_final() {
    let Some(device) = Emulated::for_tests() else { return };
    let mut engine = engine(&device, &checkpoint(DType::F32), memory(KvDtype::BF16, 8, 3));
    let kv = engine.kv().clone();
    let pages = |layer: u32| table(3).iter().flat_map(|b| kv.read(layer as usize, *b).to_vec()).collect::<Vec<u8>>();
    let mut seen = Vec::new();
    let plan = BatchPlan { step: 0, items: vec![item(0, &prompts()[3][..24], 0, &table(3))] };
    engine.run(&plan, &mut |layer| seen.push(pages(layer)));
    assert_eq!(seen.len(), 2);
    assert!(seen[0] == pages(0) && seen[1] == pages(1) && seen[0] != seen[1]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(emulated) = Emulated::for_tests() else { return };
    let device: Arc<dyn Device> = emulated;
    let new = |kv: KvMemory, device: &Arc<dyn Device>| {
        let limits = PassLimits { tokens: 4, sequences: 1 };
        let cpu = Cpu::new(1, None);
        CudaEngine::new(&checkpoint(DType::F32), Arc::new(kv), cpu, device.clone(), limits, &DeviceOptions::default())
            .err()
    };
    let format = KvFormat { dtype: KvDtype::F32, kv_heads: 3, head_dim: 16, block_size: 16 };
    let other = KvMemory::new(format, 2, 1).expect("a small mapping");
    assert_eq!(new(other, &device), Some(EngineError::KvLayout { field: "kv heads", found: 3, wanted: 2 }));
    let small = Emulated::beside_the_program().expect("a device").with_properties(|p| p.memory_bytes = 200_000);
    let error = new(memory(KvDtype::F32, 16, 100), &(Arc::new(small) as Arc<dyn Device>));
    assert!(matches!(error, Some(EngineError::Device(CudaError::OutOfMemory { .. }))), "{error:?}");
}
