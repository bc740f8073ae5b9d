//! The weights on the device: one allocation that every tensor has its place in, filled from the mapped file.
//!
//! Matrices lie as stored where the kernels read their type, quantised ones in planes; fp8 with its factors on devices that multiply
//! it; and in the compute type otherwise. Norms and biases are f32.
//! Read [`DeviceWeights`]; [`plan`] says how many bytes it will take, before anything is allocated.

use crate::checkpoint::{Checkpoint, LoadError, Tensor, TensorMap};
use crate::rope::Rope;
use crate::spec::ModelSpec;
use ridge_kernels::cuda::ops::matmul::{self, Products, Weight};
use ridge_kernels::cuda::ops::measure::Matrix;
use ridge_kernels::cuda::ops::pack::Packer;
use ridge_kernels::cuda::ops::scaled::{ScaledType, ScaledWeight};
use ridge_kernels::cuda::planes::{Blocks, matrix_bytes};
use ridge_kernels::cuda::{Buffer, CudaError, Device};
use ridge_kernels::{DType, quantize_row};
use std::sync::Arc;

/// Tensors begin at multiples of this.
const ALIGN: usize = 256;

/// Everything that a pass reads.
pub struct DeviceWeights {
    pub(super) spec: ModelSpec,
    pub(super) rope: Rope,
    /// What norms, attention and gates hand to the next product: bf16, or the weights' own f16 or f32.
    pub(super) compute: DType,
    pub(super) embed: Embed,
    pub(super) norm: u64,
    pub(super) head: Linear,
    pub(super) layers: Vec<Layer>,
    /// What all of the addresses above lead into.
    _arena: Buffer,
}

/// Where embeddings come from.
pub(super) enum Embed {
    /// A table on the device, of this plain type.
    Device(DType, u64),
    /// Rows of a quantised one are decoded on the host.
    Host(Tensor),
}

/// One layer's weights; an address of 0 stands for what the layer has not got.
pub(super) struct Layer {
    pub(super) window: Option<usize>,
    pub(super) attn_norm: u64,
    pub(super) ffn_norm: u64,
    pub(super) query: Projection,
    pub(super) key: Projection,
    pub(super) value: Projection,
    pub(super) out: Projection,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// A matrix that rows are multiplied by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Linear {
    /// As stored, or in the compute type.
    Plain(Weight),
    /// fp8 with a factor for each row or block, or fp4 with scales of its own and a factor for each row.
    Scaled(ScaledWeight),
}

impl Linear {
    /// Outputs.
    pub(super) fn n(&self) -> usize {
        match self {
            Self::Plain(weight) => weight.n,
            Self::Scaled(weight) => weight.n,
        }
    }

    /// Inputs.
    pub(super) fn k(&self) -> usize {
        match self {
            Self::Plain(weight) => weight.k,
            Self::Scaled(weight) => weight.k,
        }
    }

    /// Whether two matrices of one shape can be the halves of a gate.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Plain(a), Self::Plain(b)) => a.dtype == b.dtype,
            (Self::Scaled(a), Self::Scaled(b)) => a.dtype == b.dtype,
            _ => false,
        }
    }

    /// Whether many rows are rounded to fp8 before they are multiplied by it.
    pub(super) fn is_fp8(&self) -> bool {
        matches!(self, Self::Scaled(weight) if weight.dtype != ScaledType::NvFp4)
    }

    fn plain(&self) -> Option<Weight> {
        if let Self::Plain(weight) = self { Some(*weight) } else { None }
    }

    fn scaled(&self) -> Option<ScaledWeight> {
        if let Self::Scaled(weight) = self { Some(*weight) } else { None }
    }
}

/// Whether a device multiplies fp8 by fp8: compute capability 8.9 and later. Others get such weights in bf16.
pub(super) fn takes_fp8(sm: u32) -> bool {
    sm >= 89
}

/// How a tensor lies on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// f32.
    Vector,
    /// A matrix of this type.
    Matrix(DType),
    /// fp8 codes or planes of fp4, and behind them the factors in f32.
    Scaled(ScaledType),
}

/// A matrix with what may follow it.
pub(super) struct Projection {
    pub(super) weight: Linear,
    pub(super) bias: u64,
    /// Of the norm over each head.
    pub(super) head_norm: u64,
}

impl Projection {
    /// A matrix with nothing behind it.
    pub(super) fn plain(weight: Linear) -> Self {
        Self { weight, bias: 0, head_norm: 0 }
    }
}

/// Matrices that prompts are multiplied by.
pub(super) fn measurable(weights: &DeviceWeights) -> Vec<Matrix> {
    let of_layer = |layer: &Layer| {
        let heads = [&layer.query, &layer.key, &layer.value, &layer.out].map(|projection| (projection.weight, None));
        let gate = match layer.gate.is_like(&layer.up) {
            true => vec![(layer.gate, Some(layer.up))],
            false => vec![(layer.gate, None), (layer.up, None)],
        };
        heads.into_iter().chain(gate).chain([(layer.down, None)]).collect::<Vec<_>>()
    };
    let matrix = |(weight, up): (Linear, Option<Linear>)| match (weight, up) {
        (Linear::Plain(weight), up) => Matrix::Plain(weight, up.and_then(|up| up.plain())),
        (Linear::Scaled(weight), up) => Matrix::Scaled(weight, up.and_then(|up| up.scaled())),
    };
    weights.layers.iter().flat_map(of_layer).map(matrix).collect()
}

/// Bytes that products with these weights need beside their operands. The output head only ever meets few rows.
pub(super) fn scratch_of(weights: &DeviceWeights) -> usize {
    let matrices = |layer: &Layer| {
        let [q, k, v, o] = [&layer.query, &layer.key, &layer.value, &layer.out].map(|projection| projection.weight);
        let all = [q, k, v, o, layer.gate, layer.up, layer.down];
        all.into_iter()
            .filter_map(|weight| weight.plain())
            .map(|weight| (weight.dtype, weight.n, weight.k))
            .collect::<Vec<_>>()
    };
    let decoded = weights.layers.iter().flat_map(|layer| {
        let [q, k, v, o] = [&layer.query, &layer.key, &layer.value, &layer.out].map(|projection| projection.weight);
        [q, k, v, o, layer.gate, layer.up, layer.down]
    });
    let fp4 = decoded.filter_map(|linear| match linear {
        Linear::Scaled(weight) if weight.dtype == ScaledType::NvFp4 => Some(fp4_scratch(weight.n, weight.k)),
        _ => None,
    });
    Products::scratch_bytes(weights.layers.iter().flat_map(matrices)).max(fp4.max().unwrap_or(0))
}

/// Two matrices of fp4 in bf16, for a gated product.
fn fp4_scratch(n: usize, k: usize) -> usize {
    4 * n * k
}

/// The same, before the weights are on the device.
pub fn product_bytes(checkpoint: &Checkpoint, sm: u32) -> Result<u64, LoadError> {
    let tied = checkpoint.spec.tied_head;
    let (mut matrices, mut fp4) = (Vec::new(), 0);
    for (name, place) in placements(checkpoint, sm)? {
        let tensor = tensor(&checkpoint.tensors, &name, tied)?;
        match place {
            Place::Matrix(dtype) if name.starts_with("layers.") => matrices.push((dtype, tensor.rows, tensor.cols)),
            Place::Scaled(ScaledType::NvFp4) => fp4 = fp4.max(fp4_scratch(tensor.rows, tensor.cols)),
            _ => {}
        }
    }
    Ok(Products::scratch_bytes(matrices).max(fp4) as u64)
}

/// The type that activations are rounded to before a product with these weights.
pub fn compute_type(checkpoint: &Checkpoint) -> Result<DType, LoadError> {
    let matrices = ["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"];
    let mut types = Vec::new();
    for layer in 0..checkpoint.spec.layers {
        for name in matrices {
            types.push(checkpoint.tensors.get(&format!("layers.{layer}.{name}"))?.dtype);
        }
    }
    let only = |wanted| types.iter().all(|dtype| *dtype == wanted);
    Ok(match () {
        () if only(DType::F32) => DType::F32,
        () if only(DType::F16) => DType::F16,
        () => DType::BF16,
    })
}

/// How a matrix lies on the device.
fn device_type(stored: DType, compute: DType) -> DType {
    if matmul::compute_type(stored) == compute { stored } else { compute }
}

/// Whether the embedding has a table on the device.
fn table_type(stored: DType) -> bool {
    matches!(stored, DType::F32 | DType::F16 | DType::BF16)
}

/// Whether some matrix lies on the device in fp8.
pub(super) fn has_fp8(checkpoint: &Checkpoint, sm: u32) -> Result<bool, LoadError> {
    Ok(placements(checkpoint, sm)?
        .iter()
        .any(|(_, place)| matches!(place, Place::Scaled(dtype) if *dtype != ScaledType::NvFp4)))
}

/// The tensors that go to the device, in order, and how.
fn placements(checkpoint: &Checkpoint, sm: u32) -> Result<Vec<(String, Place)>, LoadError> {
    let compute = compute_type(checkpoint)?;
    let mut out = Vec::new();
    for (name, [rows, _]) in crate::checkpoint::wanted(&checkpoint.spec) {
        let source = checkpoint.tensors.get(&name)?;
        let stored = source.dtype;
        // Kernels read rows of fp8 in units of 16 bytes.
        let usable = takes_fp8(sm) && compute == DType::BF16 && source.cols.is_multiple_of(16);
        let fp8 = source.fp8().filter(|_| usable);
        if rows == 1 {
            out.push((name, Place::Vector));
        } else if name == "embed" {
            // A tied head is a product with the same matrix: if it lies as stored, once is enough.
            if table_type(stored) {
                out.push((name, Place::Matrix(stored)));
            }
        } else if source.nvfp4().is_some() && compute == DType::BF16 {
            out.push((name, Place::Scaled(ScaledType::NvFp4)));
        } else if let Some(fp8) = fp8 {
            out.push((name, Place::Scaled(if fp8.by_block { ScaledType::E4M3Blocks } else { ScaledType::E4M3 })));
        } else {
            out.push((name, Place::Matrix(device_type(stored, compute))));
        }
    }
    let embed = checkpoint.tensors.get("embed")?.dtype;
    if checkpoint.spec.tied_head && !(table_type(embed) && device_type(embed, compute) == embed) {
        out.push(("head".into(), Place::Matrix(device_type(embed, compute))));
    }
    Ok(out)
}

/// The tensor behind a placement's name.
fn tensor<'a>(tensors: &'a TensorMap, name: &str, tied: bool) -> Result<&'a Tensor, LoadError> {
    tensors.get(if name == "head" && tied { "embed" } else { name })
}

fn placed_bytes(tensor: &Tensor, place: Place) -> usize {
    let of = |dtype: DType| matrix_bytes(dtype, tensor.rows, tensor.cols);
    match place {
        Place::Vector => of(DType::F32).next_multiple_of(ALIGN),
        Place::Matrix(dtype) => of(dtype).next_multiple_of(ALIGN),
        Place::Scaled(dtype) => {
            factors_offset(tensor.rows, tensor.cols, dtype)
                + (4 * dtype.factors(tensor.rows, tensor.cols)).next_multiple_of(ALIGN)
        }
    }
}

/// Where the factors of a matrix `[n, k]` begin behind its codes.
fn factors_offset(n: usize, k: usize, dtype: ScaledType) -> usize {
    let codes = match dtype {
        ScaledType::NvFp4 => Blocks::NvFp4.device_bytes(n, k),
        ScaledType::E4M3 | ScaledType::E4M3Blocks => n * k,
    };
    codes.next_multiple_of(ALIGN)
}

/// Bytes that the weights will take on the device.
pub fn device_bytes(checkpoint: &Checkpoint, sm: u32) -> Result<u64, LoadError> {
    let mut bytes = 0;
    for (name, place) in placements(checkpoint, sm)? {
        bytes += placed_bytes(tensor(&checkpoint.tensors, &name, checkpoint.spec.tied_head)?, place) as u64;
    }
    Ok(bytes)
}

impl DeviceWeights {
    /// Uploads a checkpoint; `progress` hears of bytes done and of all bytes.
    pub fn new(
        device: &Arc<dyn Device>,
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, WeightsError> {
        let spec = checkpoint.spec.clone();
        let sm = device.properties().sm;
        let total = device_bytes(checkpoint, sm)?;
        let arena = Buffer::new(device, total as usize)?;
        let mut places = std::collections::BTreeMap::new();
        let mut at = 0;
        let placements = placements(checkpoint, sm)?;
        let mut largest = 0;
        for (name, place) in &placements {
            let source = tensor(&checkpoint.tensors, name, spec.tied_head)?;
            largest = largest.max(match place {
                Place::Matrix(dtype) if Blocks::of(*dtype).is_some() => source.bytes().len(),
                Place::Scaled(ScaledType::NvFp4) => source.nvfp4().map_or(0, |nvfp4| nvfp4.blocks.len()),
                _ => 0,
            });
        }
        let mut packer = Packer::new(device, largest)?;
        for (name, place) in placements {
            let source = tensor(&checkpoint.tensors, &name, spec.tied_head)?;
            upload(&arena, at, source, place, &mut packer)?;
            let address = arena.at(at, 0);
            places.insert(name, (place, source.rows, source.cols, address));
            at += placed_bytes(source, place);
            progress(at as u64, total);
        }
        device.synchronize()?;
        for file in checkpoint.tensors.files() {
            file.release();
        }
        let vector = |name: &str| places.get(name).map_or(0, |(_, _, _, address)| *address);
        let matrix = |name: &str| {
            let (place, n, k, address) = places[name];
            match place {
                Place::Vector => unreachable!("{name} is a matrix"),
                Place::Matrix(dtype) => Linear::Plain(Weight { dtype, n, k, address }),
                Place::Scaled(dtype) => {
                    let scales = address + factors_offset(n, k, dtype) as u64;
                    Linear::Scaled(ScaledWeight { dtype, n, k, address, scales })
                }
            }
        };
        let layer = |index: usize| {
            let name = |part: &str| format!("layers.{index}.{part}");
            let projection = |weight: &str, bias: &str, head_norm: &str| Projection {
                weight: matrix(&name(weight)),
                bias: vector(&name(bias)),
                head_norm: vector(&name(head_norm)),
            };
            Layer {
                window: spec.layer_specs[index].attention.window,
                attn_norm: vector(&name("attn_norm")),
                ffn_norm: vector(&name("ffn_norm")),
                query: projection("wq", "q_bias", "q_norm"),
                key: projection("wk", "k_bias", "k_norm"),
                value: projection("wv", "v_bias", ""),
                out: projection("wo", "o_bias", ""),
                gate: matrix(&name("w_gate")),
                up: matrix(&name("w_up")),
                down: matrix(&name("w_down")),
            }
        };
        let embed = match places.get("embed") {
            Some((Place::Matrix(dtype), _, _, address)) => Embed::Device(*dtype, *address),
            _ => Embed::Host(checkpoint.tensors.get("embed")?.clone()),
        };
        let head = matrix(if places.contains_key("head") { "head" } else { "embed" });
        Ok(Self {
            rope: Rope::new(&spec.rope),
            compute: compute_type(checkpoint)?,
            embed,
            norm: vector("norm"),
            head,
            layers: (0..spec.layers).map(layer).collect(),
            spec,
            _arena: arena,
        })
    }

    /// What is computed.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }
}

/// Copies a tensor to its place, converted where it has to be.
fn upload(arena: &Buffer, at: usize, source: &Tensor, place: Place, packer: &mut Packer) -> Result<(), CudaError> {
    match place {
        Place::Vector => arena.upload(at, &source.to_f32()),
        Place::Matrix(dtype) if dtype == source.dtype && Blocks::of(dtype).is_some() => {
            packer.upload(Blocks::Ggml(dtype), (source.rows, source.cols), source.bytes(), (arena, at))
        }
        Place::Matrix(dtype) if dtype == source.dtype => arena.upload(at, source.bytes()),
        Place::Matrix(dtype) => {
            let mut bytes = Vec::with_capacity(placed_bytes(source, place));
            for row in source.to_f32().chunks_exact(source.cols) {
                quantize_row(dtype, row, &mut bytes).expect("a plain type can be written");
            }
            arena.upload(at, &bytes)
        }
        Place::Scaled(dtype) => {
            let (n, k) = (source.rows, source.cols);
            let factors = at + factors_offset(n, k, dtype);
            if let (ScaledType::NvFp4, Some(nvfp4)) = (dtype, source.nvfp4()) {
                packer.upload(Blocks::NvFp4, (n, k), &nvfp4.blocks, (arena, at))?;
                return arena.upload(factors, &vec![nvfp4.factor; n]);
            }
            let fp8 = source.fp8().expect("placed by its codes");
            arena.upload(at, fp8.codes.bytes())?;
            arena.upload(factors, &fp8.factors)
        }
    }
}

/// Why weights could not be brought to the device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WeightsError {
    /// The checkpoint lacks something.
    #[error(transparent)]
    Checkpoint(#[from] LoadError),
    /// The device refused.
    #[error(transparent)]
    Device(#[from] CudaError),
}
