//! What a pass must compute and move, counted from the model's shapes: the numbers that a measured time is compared with.
//!
//! Counted are
//!
//! - **operations** of the matrix products, two per multiply-add, and apart from them those of attention: two products of
//!   `head_dim` for each query head and each key that a query may see;
//! - **bytes** of weights as stored, once per pass however many rows use them; of the embedding only the rows looked up,
//!   unless the output head is the same matrix; of keys and values read, once per layer and sequence, however many rows
//!   of the pass attend to them; and of those written.
//!
//! Of the last layer only the sampled rows go beyond keys and values, and only they meet the output head, as in
//! [`crate::forward`]. Not counted: norms, rotations, non-linearities, softmax, sampling, and every activation. So a count is
//! what no implementation can do without, and a rate made from it never flatters.
//!
//! Read [`CostModel`] and [`Cost`] first. Nothing here measures anything.

use crate::checkpoint::{Checkpoint, LoadError, wanted};
use crate::spec::ModelSpec;
use ridge_kernels::{DType, KvFormat};
use std::collections::BTreeMap;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

/// Operations and bytes of one or several passes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cost {
    /// Operations of matrix products with weights, two per multiply-add.
    pub matmul_flops: u64,
    /// Operations of attention's two products, two per multiply-add.
    pub attention_flops: u64,
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Bytes of cached keys and values read.
    pub kv_read_bytes: u64,
    /// Bytes of keys and values written.
    pub kv_write_bytes: u64,
}

impl Cost {
    /// All operations.
    pub fn flops(&self) -> u64 {
        self.matmul_flops + self.attention_flops
    }

    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes
    }

    /// Arithmetic intensity: operations per byte.
    pub fn intensity(&self) -> f64 {
        self.flops() as f64 / self.bytes() as f64
    }
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost {
            matmul_flops: self.matmul_flops + other.matmul_flops,
            attention_flops: self.attention_flops + other.attention_flops,
            weight_bytes: self.weight_bytes + other.weight_bytes,
            kv_read_bytes: self.kv_read_bytes + other.kv_read_bytes,
            kv_write_bytes: self.kv_write_bytes + other.kv_write_bytes,
        }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        *self = *self + other;
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), Add::add)
    }
}

/// One sequence's part of a pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Tokens before it, whose keys and values are cached.
    pub start: usize,
    /// Tokens that it runs, at least one.
    pub tokens: usize,
    /// Whether its last row is sampled.
    pub sampled: bool,
}

/// A model's sizes where counting needs them.
#[derive(Clone, Debug)]
pub struct CostModel {
    spec: ModelSpec,
    /// Bytes of keys and values of one position in one layer.
    kv_position_bytes: u64,
    /// Stored bytes by canonical name.
    bytes: BTreeMap<String, u64>,
    parameters: u64,
}

impl CostModel {
    /// Sizes of a loaded checkpoint and a KV layout, or the error that a tensor is missing.
    pub fn of(checkpoint: &Checkpoint, format: &KvFormat) -> Result<Self, LoadError> {
        let mut types = BTreeMap::new();
        for (name, _) in wanted(&checkpoint.spec) {
            types.insert(name.clone(), checkpoint.tensors.get(&name)?.dtype);
        }
        Ok(Self::new(&checkpoint.spec, format, |name| types[name]))
    }

    /// Sizes of a shape whose tensors are stored as `dtype` says, by canonical name.
    ///
    /// # Panics
    ///
    /// If a row of a tensor is not a whole number of its type's blocks.
    pub fn new(spec: &ModelSpec, format: &KvFormat, dtype: impl Fn(&str) -> DType) -> Self {
        let (mut bytes, mut parameters) = (BTreeMap::new(), 0);
        for (name, [rows, cols]) in wanted(spec) {
            let row_bytes = dtype(&name).row_bytes(cols).expect("a stored row is whole blocks");
            bytes.insert(name, (rows * row_bytes) as u64);
            parameters += (rows * cols) as u64;
        }
        let kv_position_bytes = (format.page_bytes() / format.block_size) as u64;
        Self { spec: spec.clone(), kv_position_bytes, bytes, parameters }
    }

    /// Elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Stored bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.bytes.values().sum()
    }

    /// A prompt's `tokens` from position `start` on in one pass; `sampled` for the chunk that ends the prompt.
    pub fn prefill(&self, start: usize, tokens: usize, sampled: bool) -> Cost {
        self.pass(&[Part { start, tokens, sampled }])
    }

    /// A prompt of `tokens` in passes of at most `chunk`, sampled at its end.
    pub fn prompt(&self, tokens: usize, chunk: usize) -> Cost {
        let chunks = (0..tokens).step_by(chunk);
        chunks.map(|start| self.prefill(start, chunk.min(tokens - start), start + chunk >= tokens)).sum()
    }

    /// One more token for each of `batch` sequences that have `context` tokens cached.
    pub fn decode(&self, batch: usize, context: usize) -> Cost {
        self.pass(&vec![Part { start: context, tokens: 1, sampled: true }; batch])
    }

    /// One pass over `parts`.
    pub fn pass(&self, parts: &[Part]) -> Cost {
        let spec = &self.spec;
        let rows: usize = parts.iter().map(|part| part.tokens).sum();
        let sampled = parts.iter().filter(|part| part.sampled).count();
        let (hidden, q, kv) = (spec.hidden, spec.q_width(), spec.kv_width());
        let mut cost = Cost { weight_bytes: self.embedding_bytes(rows, sampled), ..Cost::default() };
        for (index, layer) in spec.layer_specs.iter().enumerate() {
            // What follows the keys and values of the last layer is computed for the sampled rows alone.
            let last = index + 1 == spec.layers;
            let beyond = if last { sampled } else { rows };
            let weights = 2 * rows * hidden * kv + beyond * (2 * hidden * q + 3 * hidden * spec.ffn);
            cost.matmul_flops += 2 * weights as u64;
            cost.weight_bytes += self.layer_bytes(index, &["attn_norm", "wk", "wv", "k_bias", "v_bias", "k_norm"]);
            if beyond > 0 {
                let names = ["wq", "q_bias", "q_norm", "wo", "o_bias", "ffn_norm", "w_gate", "w_up", "w_down"];
                cost.weight_bytes += self.layer_bytes(index, &names);
            }
            cost.kv_write_bytes += rows as u64 * self.kv_position_bytes;
            for part in parts.iter().filter(|part| part.sampled || !last) {
                let end = part.start + part.tokens;
                let first = if last { end - 1 } else { part.start };
                let (pairs, positions) = attended(first, end, layer.attention.window);
                cost.attention_flops += 4 * pairs * q as u64;
                cost.kv_read_bytes += positions * self.kv_position_bytes;
            }
        }
        if sampled > 0 {
            cost.matmul_flops += 2 * (sampled * hidden * spec.vocab) as u64;
            cost.weight_bytes += self.bytes["norm"];
        }
        cost
    }

    /// Bytes of the embedding's rows and of the output head, which may be one matrix.
    fn embedding_bytes(&self, rows: usize, sampled: usize) -> u64 {
        let looked_up = rows.min(self.spec.vocab) as u64 * (self.bytes["embed"] / self.spec.vocab as u64);
        match (sampled > 0, self.spec.tied_head) {
            (false, _) => looked_up,
            (true, true) => self.bytes["embed"],
            (true, false) => looked_up + self.bytes["head"],
        }
    }

    /// Bytes of those of a layer's tensors that it has.
    fn layer_bytes(&self, layer: usize, names: &[&str]) -> u64 {
        names.iter().filter_map(|name| self.bytes.get(&format!("layers.{layer}.{name}"))).sum()
    }
}

/// For queries at positions `first..end`: pairs of query and key, and positions that at least one of them sees.
fn attended(first: usize, end: usize, window: Option<usize>) -> (u64, u64) {
    let window = window.unwrap_or(usize::MAX).max(1);
    // A query at position `p` sees `min(p + 1, window)` keys: a ramp up to the window, then level.
    let ramp_end = end.min(window).max(first);
    let ramp: u64 = (first as u64 + 1 + ramp_end as u64) * (ramp_end - first) as u64 / 2;
    let level = (end - ramp_end) as u64 * window as u64;
    let oldest = (first + 1).saturating_sub(window);
    (ramp + level, (end - oldest) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Activation, AttentionSpec, FfnKind, FfnSpec, LayerSpec, RopeScaling, RopeSpec};
    use ridge_kernels::KvDtype;

    fn shape(hidden: usize, layers: usize, heads: [usize; 3], ffn: usize, vocab: usize) -> ModelSpec {
        let [heads, kv_heads, head_dim] = heads;
        let layer =
            LayerSpec { attention: AttentionSpec::default(), ffn: FfnSpec { kind: FfnKind::Gated, bias: false } };
        ModelSpec {
            arch: "llama".into(),
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn,
            vocab,
            context: 1 << 17,
            norm_eps: 1e-5,
            rope: RopeSpec { theta: 1e4, rotary_dim: head_dim, scaling: RopeScaling::None },
            activation: Activation::Silu,
            sliding_window: None,
            layer_specs: vec![layer; layers],
            tied_head: true,
        }
    }

    fn bf16(spec: &ModelSpec) -> CostModel {
        let format =
            KvFormat { dtype: KvDtype::BF16, kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size: 16 };
        CostModel::new(spec, &format, |name| if name.ends_with("norm") { DType::F32 } else { DType::BF16 })
    }

    /// Two layers, hidden 8, 2 query heads and 1 KV head of 4, ffn 16, vocabulary 32, tied.
    fn small() -> ModelSpec {
        shape(8, 2, [2, 1, 4], 16, 32)
    }

    #[test]
    fn a_small_prompt_by_hand() {
        let cost = bf16(&small()).prefill(0, 3, true);
        // Per row: wk and wv 2 * 8*4 = 64, wq and wo 2 * 8*8 = 128, feed-forward 3 * 8*16 = 384 multiply-adds.
        // Layer 0: 3 rows of everything. Layer 1: 3 rows of wk and wv, 1 of the rest. Head: 1 row of 8*32 = 256.
        assert_eq!(cost.matmul_flops, 2 * (3 * (64 + 512) + (3 * 64 + 512) + 256));
        // Layer 0: 1 + 2 + 3 pairs. Layer 1: the last query's 3. Each pair: 2 heads * 4 * 2 products * 2.
        assert_eq!(cost.attention_flops, (6 + 3) * 32);
        // Per layer 576 matrix elements of 2 bytes and 2 norms of 8 floats; embedding 256 elements; last norm.
        assert_eq!(cost.weight_bytes, 2 * (576 * 2 + 64) + 256 * 2 + 32);
        // A position: key and value of 4 elements of 2 bytes.
        assert_eq!((cost.kv_read_bytes, cost.kv_write_bytes), (2 * 3 * 16, 2 * 3 * 16));
        assert_eq!(cost.flops(), cost.matmul_flops + cost.attention_flops);
        assert_eq!(cost.intensity(), cost.flops() as f64 / cost.bytes() as f64);
    }

    #[test]
    fn a_chunk_that_is_not_the_last_stops_at_the_last_layers_keys() {
        let cost = bf16(&small()).prefill(4, 2, false);
        assert_eq!(cost.matmul_flops, 2 * (2 * (64 + 512) + 2 * 64));
        assert_eq!(cost.attention_flops, (5 + 6) * 32);
        // Layer 1: wk, wv and the norm before them. Embedding: two rows of 8 elements.
        assert_eq!(cost.weight_bytes, (576 * 2 + 64) + (64 * 2 + 32) + 2 * 16);
        assert_eq!((cost.kv_read_bytes, cost.kv_write_bytes), (6 * 16, 2 * 2 * 16));
    }

    #[test]
    fn a_decode_step_by_hand() {
        let model = bf16(&small());
        let one = model.decode(1, 10);
        assert_eq!(one.matmul_flops, 2 * (2 * 576 + 256));
        assert_eq!(one.attention_flops, 2 * 11 * 32);
        assert_eq!((one.kv_read_bytes, one.kv_write_bytes), (2 * 11 * 16, 2 * 16));
        assert_eq!(one.weight_bytes, model.weight_bytes());
        let four = model.decode(4, 10);
        assert_eq!(four.flops(), 4 * one.flops());
        assert_eq!(four.weight_bytes, one.weight_bytes, "weights are read once for the whole batch");
        assert_eq!(four.kv_read_bytes, 4 * one.kv_read_bytes);
    }

    #[test]
    fn an_untied_head_adds_the_rows_looked_up() {
        let mut spec = small();
        let tied = bf16(&spec).decode(3, 10);
        spec.tied_head = false;
        assert_eq!(bf16(&spec).decode(3, 10).weight_bytes, tied.weight_bytes + 3 * 16);
    }

    #[test]
    fn windows_bound_what_is_attended() {
        for (first, end, window) in [(0, 7, 3), (5, 9, 3), (0, 2, 3), (2, 4, 3), (0, 9, 100), (8, 9, 1)] {
            let seen = |p: usize| (p + 1).saturating_sub(window)..p + 1;
            let pairs: u64 = (first..end).map(|p| seen(p).len() as u64).sum();
            let positions = end - seen(first).start;
            assert_eq!(attended(first, end, Some(window)), (pairs, positions as u64), "{first}..{end} in {window}");
        }
        assert_eq!(attended(2, 5, None), (3 + 4 + 5, 5));
    }

    #[test]
    fn chunks_do_the_same_attention_and_read_more() {
        let model = bf16(&small());
        let (whole, chunked) = (model.prompt(100, 512), model.prompt(100, 32));
        assert_eq!(whole, model.prefill(0, 100, true));
        assert_eq!(whole.matmul_flops, chunked.matmul_flops);
        assert_eq!(whole.attention_flops, chunked.attention_flops);
        assert_eq!(whole.kv_write_bytes, chunked.kv_write_bytes);
        assert!(chunked.weight_bytes > 3 * model.layer_bytes(0, &["w_up"]) && chunked.bytes() > whole.bytes());
    }

    #[test]
    fn llama_3_2_1b_has_its_parameters() {
        let spec = shape(2048, 16, [32, 8, 64], 8192, 128_256);
        let model = bf16(&spec);
        assert_eq!(model.parameters(), 1_235_814_400);
        // A decode step reads every weight once: 2.47 GB, norms in f32.
        assert_eq!(model.decode(1, 0).weight_bytes, 2 * 1_235_814_400 + 2 * 33 * 2048);
        assert_eq!(model.decode(1, 0).matmul_flops, 2 * (1_235_814_400 - 33 * 2048));
    }

    #[test]
    fn quantised_weights_count_as_stored() {
        let spec = shape(256, 1, [4, 4, 64], 256, 512);
        let format = KvFormat { dtype: KvDtype::F16, kv_heads: 4, head_dim: 64, block_size: 16 };
        let model = CostModel::new(&spec, &format, |name| if name.contains("norm") { DType::F32 } else { DType::Q4K });
        // 7 matrices of 256 rows and an embedding of 512, one Q4_K block of 144 bytes per row; three norms.
        assert_eq!(model.weight_bytes(), (7 * 256 + 512) * 144 + 3 * 1024);
    }
}
