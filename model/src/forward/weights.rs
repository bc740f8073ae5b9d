//! The weights of the forward pass, found once so that a pass looks nothing up by name.

use crate::checkpoint::{Checkpoint, LoadError, Tensor};
use crate::rope::Rope;
use crate::spec::{AttentionSpec, ModelSpec};
use ridge_kernels::Cpu;

/// A checkpoint's tensors where the pass needs them: matrices as stored (views, not copies), vectors as f32.
pub struct Weights {
    pub(super) spec: ModelSpec,
    pub(super) rope: Rope,
    pub(super) embed: Tensor,
    pub(super) norm: Vec<f32>,
    pub(super) head: Tensor,
    pub(super) layers: Vec<LayerWeights>,
}

/// One layer's weights.
pub(super) struct LayerWeights {
    pub(super) attention: AttentionSpec,
    pub(super) attn_norm: Vec<f32>,
    pub(super) query: Projection,
    pub(super) key: Projection,
    pub(super) value: Projection,
    pub(super) out: Projection,
    pub(super) ffn_norm: Vec<f32>,
    pub(super) gate: Tensor,
    pub(super) up: Tensor,
    pub(super) down: Tensor,
}

/// A matrix with what may follow it.
pub(super) struct Projection {
    weight: Tensor,
    bias: Option<Vec<f32>>,
    /// Weights of the RMS norm over each head of the result.
    head_norm: Option<Vec<f32>>,
}

impl Weights {
    /// Finds every tensor that the checkpoint's description asks for.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        let spec = checkpoint.spec.clone();
        let tensor = |name: &str| checkpoint.tensors.get(name).cloned();
        let layers = (0..spec.layers).map(|index| LayerWeights::new(checkpoint, index)).collect::<Result<_, _>>()?;
        Ok(Self {
            rope: Rope::new(&spec.rope),
            embed: tensor("embed")?,
            norm: tensor("norm")?.to_f32(),
            head: tensor(if spec.tied_head { "embed" } else { "head" })?,
            layers,
            spec,
        })
    }

    /// What is computed.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }
}

impl LayerWeights {
    fn new(checkpoint: &Checkpoint, index: usize) -> Result<Self, LoadError> {
        let tensor = |name: &str| checkpoint.tensors.get(&format!("layers.{index}.{name}")).cloned();
        let vector = |wanted: bool, name: &str| match wanted {
            true => Ok::<_, LoadError>(Some(tensor(name)?.to_f32())),
            false => Ok(None),
        };
        let attention = checkpoint.spec.layer_specs[index].attention.clone();
        let projection = |weight: &str, bias: Option<Vec<f32>>, head_norm: Option<Vec<f32>>| {
            Ok::<_, LoadError>(Projection { weight: tensor(weight)?, bias, head_norm })
        };
        Ok(Self {
            attn_norm: tensor("attn_norm")?.to_f32(),
            query: projection("wq", vector(attention.qkv_bias, "q_bias")?, vector(attention.qk_norm, "q_norm")?)?,
            key: projection("wk", vector(attention.qkv_bias, "k_bias")?, vector(attention.qk_norm, "k_norm")?)?,
            value: projection("wv", vector(attention.qkv_bias, "v_bias")?, None)?,
            out: projection("wo", vector(attention.out_bias, "o_bias")?, None)?,
            ffn_norm: tensor("ffn_norm")?.to_f32(),
            gate: tensor("w_gate")?,
            up: tensor("w_up")?,
            down: tensor("w_down")?,
            attention,
        })
    }
}

impl Projection {
    /// `y = x·Wᵀ + bias`, then the norm of each head.
    pub(super) fn apply(&self, cpu: &Cpu, norm_eps: f32, x: &[f32], y: &mut [f32]) {
        cpu.matmul(x, &self.weight.matrix(), self.bias.as_deref(), y);
        if let Some(head_norm) = &self.head_norm {
            cpu.rms_norm_inplace(y, head_norm, norm_eps);
        }
    }
}
