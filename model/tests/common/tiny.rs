//! A tiny random model with every feature, and what tests of engines run on it.

use ridge_kernels::{DType, KvDtype, KvFormat, quantize_row};
use ridge_model::checkpoint::{Checkpoint, LoadOptions, ModelSource, Tensor, TensorMap, load, wanted};
use ridge_model::kv::KvMemory;
use ridge_model::sampling::uniform;
use ridge_model::spec::{Activation, AttentionSpec, FfnKind, FfnSpec, LayerSpec, ModelSpec, RopeScaling, RopeSpec};
use ridge_protocol::{BlockId, PlanItem, RequestId, SampleSpec, SamplingParams, TokenId};
use std::path::Path;
use std::sync::Arc;

/// Random numbers of a test: the sampler's own generator, counted up.
pub struct Random {
    seed: u64,
    count: u32,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    pub fn unit(&mut self) -> f64 {
        self.count += 1;
        uniform(self.seed, self.count)
    }

    /// A number in `low..high`.
    pub fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.unit() * (high - low) as f64) as usize
    }
}

/// Two layers with every feature: one with biases and a window, one with QK norm.
pub fn spec() -> ModelSpec {
    let layer = |attention| LayerSpec { attention, ffn: FfnSpec { kind: FfnKind::Gated, bias: false } };
    ModelSpec {
        arch: "llama".into(),
        hidden: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        ffn: 96,
        vocab: 96,
        context: 256,
        norm_eps: 1e-5,
        rope: RopeSpec {
            theta: 10_000.0,
            rotary_dim: 16,
            scaling: RopeScaling::Dynamic { factor: 2.0, original_context: 24 },
        },
        activation: Activation::Silu,
        sliding_window: Some(20),
        layer_specs: vec![
            layer(AttentionSpec { qkv_bias: true, out_bias: true, window: Some(20), ..AttentionSpec::default() }),
            layer(AttentionSpec { qk_norm: true, ..AttentionSpec::default() }),
        ],
        tied_head: false,
    }
}

/// A random model of [`spec`]; matrices in `dtype`, vectors in f32.
pub fn checkpoint(dtype: DType) -> Arc<Checkpoint> {
    let goldens = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/goldens"));
    let options = LoadOptions { tokenizer: Some(goldens.join("tokenizer.json")), chat_template: None, download: false };
    let mut checkpoint = load(&ModelSource::Folder(goldens.join("llama-gqa")), &options, &mut |_| {}).expect("golden");
    checkpoint.spec = spec();
    checkpoint.tensors = TensorMap::default();
    let mut random = Random::new(1);
    for (name, [rows, cols]) in wanted(&checkpoint.spec) {
        let center = if name.ends_with("norm") { 1.0 } else { 0.0 };
        let stored = if rows == 1 { DType::F32 } else { dtype };
        let mut bytes = Vec::new();
        for _ in 0..rows {
            let row: Vec<f32> = (0..cols).map(|_| center + (random.unit() as f32 - 0.5) * 0.5).collect();
            quantize_row(stored, &row, &mut bytes).expect("a type that can be written");
        }
        checkpoint.tensors.insert(name, Tensor::owned(stored, rows, cols, bytes).expect("a matrix"));
    }
    Arc::new(checkpoint)
}

pub fn memory(dtype: KvDtype, block_size: usize, blocks: usize) -> KvMemory {
    let spec = spec();
    let format = KvFormat { dtype, kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size };
    let memory = KvMemory::new(format, spec.layers, blocks).expect("a small mapping");
    // What an earlier tenant left: every float of it is NaN.
    for layer in 0..spec.layers {
        for block in 0..blocks {
            memory.write(layer, BlockId(block as u32)).fill(0xff);
        }
    }
    memory
}

pub fn item(request: u64, tokens: &[TokenId], start: usize, table: &[BlockId]) -> PlanItem {
    let params = Arc::new(SamplingParams::greedy(1));
    let position = (start + tokens.len()) as u32;
    PlanItem {
        request: RequestId(request),
        tokens: tokens.to_vec(),
        start: start as u32,
        block_table: table.to_vec(),
        sample: Some(SampleSpec { params, history: Vec::new(), prompt_len: 0, position }),
        reader: None,
    }
}

pub fn prompts() -> Vec<Vec<TokenId>> {
    let mut random = Random::new(2);
    [1, 5, 16, 33, 61].map(|len| (0..len).map(|_| random.range(0, 96) as TokenId).collect()).to_vec()
}
