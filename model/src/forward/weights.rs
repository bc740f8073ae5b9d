//! The weights of the forward pass, found once so that a pass looks nothing up by name.

use crate::checkpoint::{Checkpoint, LoadError, Tensor};
use crate::packed::{Builder, Slot, Store};
use crate::rope::Rope;
use crate::spec::{AttentionSpec, ModelSpec};
use ridge_kernels::{Cpu, Finish, Rows};
use std::path::Path;

/// A checkpoint's tensors where the pass needs them: matrices packed, the embedding as stored, vectors as f32.
pub struct Weights {
    pub(super) spec: ModelSpec,
    pub(super) rope: Rope,
    pub(super) embed: Tensor,
    pub(super) norm: Vec<f32>,
    pub(super) head: Slot,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) store: Store,
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
    pub(super) gate_up: GateUp,
    pub(super) down: Slot,
}

/// The two matrices whose products are combined by the activation.
pub(super) enum GateUp {
    /// In one pass.
    Fused(Slot),
    /// Of different types, as some quantisations make them.
    Apart {
        /// Through the activation.
        gate: Slot,
        /// Multiplied with it.
        up: Slot,
    },
}

/// A matrix with what may follow it.
pub(super) struct Projection {
    weight: Slot,
    bias: Option<Vec<f32>>,
    /// Weights of the RMS norm over each head of the result.
    head_norm: Option<Vec<f32>>,
}

impl Weights {
    /// Finds every tensor that the checkpoint's description asks for and packs the matrices, in a file in the folder `cache` if
    /// there is one and the model is large.
    pub fn new(checkpoint: &Checkpoint, cpu: &Cpu, cache: Option<&Path>) -> Result<Self, LoadError> {
        let spec = checkpoint.spec.clone();
        let tensor = |name: &str| checkpoint.tensors.get(name).cloned();
        let mut builder = Builder::default();
        let (layers, head) = plan(checkpoint, &mut builder)?;
        let norm = tensor("norm")?.to_f32();
        let bytes = builder.bytes();
        let store = builder
            .build(checkpoint, cpu, cache)
            .map_err(|error| LoadError::Packing { bytes, reason: error.to_string() })?;
        for file in checkpoint.tensors.files() {
            file.release();
        }
        Ok(Self { rope: Rope::new(&spec.rope), embed: tensor("embed")?, norm, head, layers, spec, store })
    }

    /// Bytes that [`Weights::new`] will pack. Of the checkpoint's contents only vectors (norms, biases) are read.
    pub fn packed_bytes(checkpoint: &Checkpoint) -> Result<usize, LoadError> {
        let mut builder = Builder::default();
        plan(checkpoint, &mut builder)?;
        Ok(builder.bytes())
    }

    /// What is computed.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }
}

/// Finds every layer and the output head, and gives their matrices places.
fn plan(checkpoint: &Checkpoint, builder: &mut Builder) -> Result<(Vec<LayerWeights>, Slot), LoadError> {
    let layers = (0..checkpoint.spec.layers).map(|index| LayerWeights::new(checkpoint, index, builder));
    let layers = layers.collect::<Result<_, _>>()?;
    let head = checkpoint.tensors.get(if checkpoint.spec.tied_head { "embed" } else { "head" })?;
    Ok((layers, builder.matrix(head.clone())))
}

impl LayerWeights {
    fn new(checkpoint: &Checkpoint, index: usize, builder: &mut Builder) -> Result<Self, LoadError> {
        let tensor = |name: &str| checkpoint.tensors.get(&format!("layers.{index}.{name}"));
        let vector = |wanted: bool, name: &str| match wanted {
            true => Ok::<_, LoadError>(Some(tensor(name)?.to_f32())),
            false => Ok(None),
        };
        let attention = checkpoint.spec.layer_specs[index].attention.clone();
        let mut projection = |weight: &str, bias: Option<Vec<f32>>, head_norm: Option<Vec<f32>>| {
            let weight = builder.matrix(tensor(weight)?.clone());
            Ok::<_, LoadError>(Projection { weight, bias, head_norm })
        };
        let query = projection("wq", vector(attention.qkv_bias, "q_bias")?, vector(attention.qk_norm, "q_norm")?)?;
        let key = projection("wk", vector(attention.qkv_bias, "k_bias")?, vector(attention.qk_norm, "k_norm")?)?;
        let value = projection("wv", vector(attention.qkv_bias, "v_bias")?, None)?;
        let out = projection("wo", vector(attention.out_bias, "o_bias")?, None)?;
        let (gate, up) = (tensor("w_gate")?, tensor("w_up")?);
        let gate_up = match builder.gated(gate, up) {
            Some(both) => GateUp::Fused(both),
            None => GateUp::Apart { gate: builder.matrix(gate.clone()), up: builder.matrix(up.clone()) },
        };
        let down = builder.matrix(tensor("w_down")?.clone());
        let (attn_norm, ffn_norm) = (tensor("attn_norm")?.to_f32(), tensor("ffn_norm")?.to_f32());
        Ok(Self { attention, attn_norm, query, key, value, out, ffn_norm, gate_up, down })
    }
}

impl Projection {
    /// `y = x·Wᵀ + bias`, then the norm of each head.
    pub(super) fn apply(&self, cpu: &Cpu, store: &Store, norm_eps: f32, x: &mut Rows<'_>, y: &mut [f32]) {
        cpu.matmul(x, &store.get(&self.weight), Finish::Store(self.bias.as_deref()), y);
        if let Some(head_norm) = &self.head_norm {
            cpu.rms_norm_inplace(y, head_norm, norm_eps);
        }
    }

    /// `y = y + x·Wᵀ + bias`. For projections without a norm.
    pub(super) fn add_to(&self, cpu: &Cpu, store: &Store, x: &mut Rows<'_>, y: &mut [f32]) {
        assert!(self.head_norm.is_none(), "a norm cannot be taken of a residual stream");
        cpu.matmul(x, &store.get(&self.weight), Finish::Add(self.bias.as_deref()), y);
    }
}
