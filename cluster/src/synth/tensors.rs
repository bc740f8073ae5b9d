//! The tensors of a shape, in the order in which files hold them, and the random rows that fill them.
//!
//! A row is a function of (seed, tensor, row), so that rows can be made in any order, on any thread, and the same
//! seed gives the same model in every format. Read [`Tensor`] and [`Tensor::fill_row`].

use super::presets::{Family, Shape};

/// What fills a tensor.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fill {
    /// Roughly normal with this standard deviation.
    Normal(f32),
    /// All ones: the weights of a norm.
    Ones,
}

/// One tensor of the model.
#[derive(Clone, PartialEq, Debug)]
pub struct Tensor {
    /// Name in a Hugging Face checkpoint.
    pub hf_name: String,
    /// Name in a GGUF file.
    pub gguf_name: String,
    /// Output features; 1 for vectors.
    pub rows: usize,
    /// Input features, or the length of a vector.
    pub cols: usize,
    /// One-dimensional: a norm or a bias, always stored in full precision in GGUF.
    pub vector: bool,
    /// What its values are.
    pub fill: Fill,
    /// Heads whose halves GGUF's `llama` architecture interleaves: `Some` for q and k.
    pub rotary_heads: Option<usize>,
}

/// All tensors of a shape.
pub fn tensors(shape: &Shape) -> Vec<Tensor> {
    let hidden = shape.hidden;
    let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut all = vec![matrix("model.embed_tokens", "token_embd", shape.vocab, hidden)];
    for layer in 0..shape.layers {
        let hf = |part: &str| format!("model.layers.{layer}.{part}");
        let gguf = |part: &str| format!("blk.{layer}.{part}");
        let heads = [
            ("q_proj", "attn_q", q, Some(shape.heads)),
            ("k_proj", "attn_k", kv, Some(shape.kv_heads)),
            ("v_proj", "attn_v", kv, None),
        ];
        all.push(norm(&hf("input_layernorm"), &gguf("attn_norm"), hidden));
        for (hf_part, gguf_part, rows, rotary_heads) in heads {
            let (hf_name, gguf_name) = (hf(&format!("self_attn.{hf_part}")), gguf(gguf_part));
            all.push(Tensor { rotary_heads, ..matrix(&hf_name, &gguf_name, rows, hidden) });
            if shape.family == Family::Qwen2 {
                all.push(bias(&hf_name, &gguf_name, rows));
            }
        }
        if shape.family == Family::Qwen3 {
            all.push(norm(&hf("self_attn.q_norm"), &gguf("attn_q_norm"), shape.head_dim));
            all.push(norm(&hf("self_attn.k_norm"), &gguf("attn_k_norm"), shape.head_dim));
        }
        all.push(matrix(&hf("self_attn.o_proj"), &gguf("attn_output"), hidden, q));
        all.push(norm(&hf("post_attention_layernorm"), &gguf("ffn_norm"), hidden));
        all.push(matrix(&hf("mlp.gate_proj"), &gguf("ffn_gate"), shape.ffn, hidden));
        all.push(matrix(&hf("mlp.up_proj"), &gguf("ffn_up"), shape.ffn, hidden));
        all.push(matrix(&hf("mlp.down_proj"), &gguf("ffn_down"), hidden, shape.ffn));
    }
    all.push(norm("model.norm", "output_norm", hidden));
    if !shape.tied {
        all.push(matrix("lm_head", "output", shape.vocab, hidden));
    }
    all
}

fn matrix(hf: &str, gguf: &str, rows: usize, cols: usize) -> Tensor {
    // 0.02 is what real checkpoints start from. Narrow models need more, or every layer's contribution drowns in
    // the residual stream and the model repeats its input.
    let std = (1.0 / (cols as f32).sqrt()).max(0.02);
    Tensor {
        hf_name: format!("{hf}.weight"),
        gguf_name: format!("{gguf}.weight"),
        rows,
        cols,
        vector: false,
        fill: Fill::Normal(std),
        rotary_heads: None,
    }
}

fn norm(hf: &str, gguf: &str, len: usize) -> Tensor {
    Tensor { vector: true, fill: Fill::Ones, ..matrix(hf, gguf, 1, len) }
}

fn bias(hf: &str, gguf: &str, len: usize) -> Tensor {
    Tensor {
        hf_name: format!("{hf}.bias"),
        gguf_name: format!("{gguf}.bias"),
        vector: true,
        fill: Fill::Normal(0.02),
        ..matrix(hf, gguf, 1, len)
    }
}

impl Tensor {
    /// Writes row `row` of the tensor, in Hugging Face order, over `out`.
    pub fn fill_row(&self, seed: u64, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row of {}", self.hf_name);
        assert!(row < self.rows, "row {row} of {}", self.hf_name);
        match self.fill {
            Fill::Ones => out.fill(1.0),
            Fill::Normal(std) => {
                let key = mix(seed ^ name_hash(&self.hf_name)).wrapping_add(mix(row as u64));
                for (i, value) in out.iter_mut().enumerate() {
                    *value = std * normal(mix(key.wrapping_add((i as u64).wrapping_mul(GOLDEN))));
                }
            }
        }
    }

    /// The Hugging Face row that stands at `row` of the GGUF tensor. `convert_hf_to_gguf.py` interleaves the two
    /// halves of each rotary head for architecture `llama`, because ggml rotates neighbours there.
    pub fn gguf_source_row(&self, row: usize, permuted: bool) -> usize {
        match self.rotary_heads {
            Some(heads) if permuted => {
                let head_dim = self.rows / heads;
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + (within % 2) * (head_dim / 2) + within / 2
            }
            _ => row,
        }
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64: a bijection that turns a counter into 64 well-mixed bits.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The sum of four uniform 16-bit numbers, centred and scaled to variance 1: near enough to normal for weights,
/// and six times as fast as Box-Muller.
fn normal(bits: u64) -> f32 {
    let sum = (bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48);
    (sum as f32 / 65_535.0 - 2.0) * 1.732_050_8
}

/// FNV-1a.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::presets::Preset;

    #[test]
    fn values_are_normal_enough() {
        let tensor = matrix("t", "t", 4, 50_000);
        let Fill::Normal(std) = tensor.fill else { panic!("a matrix is random") };
        let mut row = vec![0.0; 50_000];
        tensor.fill_row(1, 2, &mut row);
        let mean = row.iter().sum::<f32>() / row.len() as f32;
        let variance = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
        assert!(mean.abs() < std / 50.0, "mean {mean}");
        assert!((variance.sqrt() / std - 1.0).abs() < 0.02, "std {}", variance.sqrt());
    }

    #[test]
    fn rows_depend_on_seed_tensor_and_row_only() {
        let row = |seed, name, row| {
            let mut out = [0.0; 32];
            matrix(name, "", 8, 32).fill_row(seed, row, &mut out);
            out
        };
        assert_eq!(row(1, "a", 2), row(1, "a", 2));
        assert_ne!(row(1, "a", 2), row(2, "a", 2));
        assert_ne!(row(1, "a", 2), row(1, "b", 2));
        assert_ne!(row(1, "a", 2), row(1, "a", 3));
    }

    #[test]
    fn rotary_rows_are_interleaved() {
        let shape = Preset::TinyLlama.shape();
        let q = tensors(&shape).into_iter().find(|t| t.gguf_name == "blk.0.attn_q.weight").expect("has a q");
        let rows: Vec<usize> = (0..4).map(|r| q.gguf_source_row(r, true)).collect();
        assert_eq!(rows, [0, 32, 1, 33]);
        assert_eq!(q.gguf_source_row(64, true), 64);
        let mut all: Vec<usize> = (0..q.rows).map(|r| q.gguf_source_row(r, true)).collect();
        all.sort_unstable();
        assert_eq!(all, (0..q.rows).collect::<Vec<_>>());
        assert_eq!(q.gguf_source_row(1, false), 1);
    }
}
