//! A model described by data: what the forward pass needs to know, whatever file it came from.
//!
//! A new architecture is a new way to fill in a [`ModelSpec`], not a second forward pass. Read [`ModelSpec`] and
//! [`RopeSpec`] first. This module reads no file and knows no format.

use std::fmt::Write;

/// Everything that shapes the computation, except the weights.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelSpec {
    /// The family's short name: `llama`, `mistral`, `qwen2`, `qwen3`.
    pub arch: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// Key and value heads per layer; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head; `heads * head_dim` need not be `hidden` (Qwen3).
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Rows of the embedding and of the output head.
    pub vocab: usize,
    /// Longest sequence the model was made for (`max_position_embeddings`).
    pub context: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// Non-linearity of the feed-forward layer.
    pub activation: Activation,
    /// Attention window of the layers that have one; which those are stands in `layer_specs`.
    pub sliding_window: Option<usize>,
    /// One entry per layer.
    pub layer_specs: Vec<LayerSpec>,
    /// The output head is the embedding matrix.
    pub tied_head: bool,
}

/// What one layer does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// Its feed-forward layer.
    pub ffn: FfnSpec,
}

/// How a layer attends.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AttentionSpec {
    /// Biases on the q, k and v projections (Qwen2).
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
    /// RMS norm over each head of q and k before RoPE (Qwen3).
    pub qk_norm: bool,
    /// A position sees itself and this many minus one before it; `None` sees everything.
    pub window: Option<usize>,
}

/// The feed-forward layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FfnSpec {
    /// Its shape.
    pub kind: FfnKind,
    /// Biases on its projections. No supported architecture uses them; a checkpoint that does is refused.
    pub bias: bool,
}

/// Shapes of a feed-forward layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FfnKind {
    /// `down(activation(gate(x)) * up(x))`.
    Gated,
}

/// Non-linearity of the feed-forward layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// Rotary position embedding, rotate-half layout.
#[derive(Clone, PartialEq, Debug)]
pub struct RopeSpec {
    /// The base of the frequencies.
    pub theta: f64,
    /// Leading elements of each head that rotate; even, at most `head_dim`.
    pub rotary_dim: usize,
    /// How frequencies change to reach a longer context.
    pub scaling: RopeScaling,
}

/// Changes to the rotary frequencies, as transformers defines them in `modeling_rope_utils`.
#[derive(Clone, PartialEq, Debug)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware base that grows with the sequence length.
    Dynamic {
        /// How much longer than the original context.
        factor: f64,
        /// The context that was trained.
        original_context: usize,
    },
    /// YaRN: high frequencies kept, low ones divided, a ramp between, and a factor on the attention logits.
    Yarn {
        /// How much longer than the original context.
        factor: f64,
        /// The context that was trained.
        original_context: usize,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Factor on cos and sin; derived from `factor` when absent.
        attention_factor: Option<f64>,
        /// DeepSeek's coefficient of the attention factor.
        mscale: Option<f64>,
        /// DeepSeek's second coefficient.
        mscale_all_dim: Option<f64>,
        /// Round the ends of the ramp to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1: by wavelength, with a smooth middle.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context that was trained.
        original_context: usize,
    },
    /// One divisor per frequency (GGUF `rope_freqs.weight`); `rotary_dim / 2` of them.
    Factors(Vec<f32>),
}

impl ModelSpec {
    /// Stable text of every field that changes the computation: equal texts mean equal arithmetic.
    ///
    /// It feeds digests that nodes compare, so its form is part of the protocol.
    pub fn canonical(&self) -> String {
        let mut out = format!(
            "hidden={} layers={} heads={} kv_heads={} head_dim={} ffn={} vocab={} context={} eps={:e} act={:?} tied={}\n",
            self.hidden,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.ffn,
            self.vocab,
            self.context,
            self.norm_eps,
            self.activation,
            self.tied_head,
        );
        let _ = writeln!(out, "rope {}", self.rope.canonical());
        for (index, layer) in self.layer_specs.iter().enumerate() {
            let a = &layer.attention;
            let _ = writeln!(
                out,
                "{index} qkv_bias={} out_bias={} qk_norm={} window={} ffn={:?} bias={}",
                a.qkv_bias,
                a.out_bias,
                a.qk_norm,
                a.window.map_or("none".into(), |w| w.to_string()),
                layer.ffn.kind,
                layer.ffn.bias,
            );
        }
        out
    }

    /// Width of the query projection.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the key and of the value projection.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The first number that no forward pass can work with, in words; `None` when all is well.
    ///
    /// Files are untrusted: the bounds also keep every product of two fields within `usize`.
    pub fn defect(&self) -> Option<String> {
        const LIMIT: usize = 1 << 24;
        let sizes = [
            ("hidden size", self.hidden),
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv heads", self.kv_heads),
            ("head dim", self.head_dim),
            ("ffn size", self.ffn),
            ("vocabulary", self.vocab),
            ("context", self.context),
        ];
        if let Some((name, value)) = sizes.into_iter().find(|(_, v)| *v == 0 || *v > LIMIT) {
            return Some(format!("{name} is {value}, outside 1..={LIMIT}"));
        }
        if self.layers > 4096 || self.head_dim > 4096 || self.heads > 65536 {
            return Some(format!(
                "{} layers, {} heads of {} elements: beyond 4096, 65536 and 4096",
                self.layers, self.heads, self.head_dim
            ));
        }
        if self.kv_heads > self.heads || !self.heads.is_multiple_of(self.kv_heads) {
            return Some(format!("{} heads cannot share {} kv heads evenly", self.heads, self.kv_heads));
        }
        if self.layer_specs.len() != self.layers {
            return Some(format!("{} layer descriptions for {} layers", self.layer_specs.len(), self.layers));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Some(format!("norm epsilon is {}", self.norm_eps));
        }
        if self.layer_specs.iter().any(|l| l.attention.window == Some(0)) {
            return Some("an attention window of 0 positions".into());
        }
        self.rope.defect(self.head_dim)
    }
}

impl RopeSpec {
    /// Stable text of the RoPE parameters; two nodes must agree on it before KV may pass.
    pub fn canonical(&self) -> String {
        let scaling = match &self.scaling {
            RopeScaling::None => "none".to_owned(),
            RopeScaling::Linear { factor } => format!("linear factor={factor:e}"),
            RopeScaling::Dynamic { factor, original_context } => {
                format!("dynamic factor={factor:e} original={original_context}")
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => format!(
                "yarn factor={factor:e} original={original_context} fast={beta_fast:e} slow={beta_slow:e} \
                 attention={attention_factor:?} mscale={mscale:?} all={mscale_all_dim:?} truncate={truncate}"
            ),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => format!(
                "llama3 factor={factor:e} low={low_freq_factor:e} high={high_freq_factor:e} original={original_context}"
            ),
            RopeScaling::Factors(factors) => {
                let mut hasher = blake3::Hasher::new();
                for factor in factors {
                    hasher.update(&factor.to_le_bytes());
                }
                format!("factors n={} blake3={}", factors.len(), &hasher.finalize().to_hex()[..16])
            }
        };
        format!("theta={:e} dim={} {scaling}", self.theta, self.rotary_dim)
    }

    fn defect(&self, head_dim: usize) -> Option<String> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Some(format!("rope theta is {}", self.theta));
        }
        if self.rotary_dim == 0 || self.rotary_dim > head_dim || !self.rotary_dim.is_multiple_of(2) {
            return Some(format!("{} rotary dimensions in heads of {head_dim}", self.rotary_dim));
        }
        let (factor, original) = match &self.scaling {
            RopeScaling::None => (1.0, 1),
            RopeScaling::Linear { factor } => (*factor, 1),
            RopeScaling::Dynamic { factor, original_context }
            | RopeScaling::Yarn { factor, original_context, .. }
            | RopeScaling::Llama3 { factor, original_context, .. } => (*factor, *original_context),
            RopeScaling::Factors(factors) => {
                if factors.len() * 2 != self.rotary_dim {
                    return Some(format!("{} rope factors for {} rotary dimensions", factors.len(), self.rotary_dim));
                }
                if factors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
                    return Some("a rope factor is not a positive number".into());
                }
                (1.0, 1)
            }
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Some(format!("rope scaling factor is {factor}"));
        }
        if original == 0 {
            return Some("rope scaling has an original context of 0".into());
        }
        None
    }
}
