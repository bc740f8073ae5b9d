//! Matrix products: `y[m, n] = x[m, k] · w[n, k]ᵀ` with a fused finish, for every storage type of weights.
//!
//! There are two paths, which the caller chooses between: [`Path::Gemm`] for many rows (prompts), on which a quantised weight
//! is first decoded to bf16; and [`Path::Skinny`] for few (one per sequence), on which each weight is read once.
//! **Batch invariance.** On each path an output is summed over k in an order that depends on (n, k, dtype) alone: not on
//! the number of rows, the row's place, or the other rows. So a caller that takes the path by what a row *is* (prompt or
//! decode), never by how many there are, gets the same bits in any batch.

use crate::cuda::device::{Arg, Buffer, CudaError, Device, Kernel, Launch};
use crate::cuda::plan::{gemm, gemv};
use crate::{DType, Gate};
use gemm::{Plan, Shape};
use std::sync::Arc;

/// A weight `[n, k]` on the device, row-major, its bytes as stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Weight {
    /// Storage type.
    pub dtype: DType,
    /// Rows: outputs.
    pub n: usize,
    /// Columns: inputs.
    pub k: usize,
    /// Where it is; a multiple of 16.
    pub address: u64,
}

/// Rows `[rows, k]` on the device in the compute type of the weights they are multiplied with; see [`compute_type`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct X {
    /// Where they are; a multiple of 16.
    pub address: u64,
    /// F32, F16 or BF16.
    pub dtype: DType,
    /// Number of rows.
    pub rows: usize,
}

/// Which kernels multiply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// Tiles of many rows.
    Gemm,
    /// Up to 64 rows at once, more in groups of 64.
    Skinny,
}

/// What becomes of a product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finish {
    /// `y = x·wᵀ + bias`, stored as `to`.
    Store {
        /// f32 `[n]`, or 0 for none.
        bias: u64,
        /// F32, or the compute type.
        to: DType,
    },
    /// `y = y + (x·wᵀ + bias)`, y being f32: a residual connection.
    Add {
        /// f32 `[n]`, or 0 for none.
        bias: u64,
    },
}

/// The type that x must have for these weights, and that narrow results have: the weights' own if they are plain, else bf16.
pub const fn compute_type(weights: DType) -> DType {
    match weights {
        DType::F32 => DType::F32,
        DType::F16 => DType::F16,
        _ => DType::BF16,
    }
}

/// Products on one device, with the memory they need beside their operands.
#[derive(Debug)]
pub struct Products {
    device: Arc<dyn Device>,
    /// bf16 copies of quantised weights, made anew for each product.
    scratch: Buffer,
}

impl Products {
    /// Bytes that [`Products::new`] needs for products with these weights (type, n, k) on [`Path::Gemm`], gated ones included.
    pub fn scratch_bytes(weights: impl IntoIterator<Item = (DType, usize, usize)>) -> usize {
        let decoded = |(dtype, n, k): (DType, usize, usize)| if dtype.block_len() > 1 { 4 * n * k } else { 0 };
        weights.into_iter().map(decoded).max().unwrap_or(0)
    }

    /// Allocates `scratch_bytes`.
    pub fn new(device: &Arc<dyn Device>, scratch_bytes: usize) -> Result<Self, CudaError> {
        Ok(Self { device: device.clone(), scratch: Buffer::new(device, scratch_bytes.max(256))? })
    }

    /// `y = finish(x · wᵀ)`, `[rows, n]`.
    ///
    /// # Safety
    ///
    /// The operands lie on this device and are as large as their shapes say, y too; y overlaps none of them.
    ///
    /// # Panics
    ///
    /// If x is not in the compute type, y is asked for in a type that is neither f32 nor that, an address is not aligned, or
    /// the scratch is too small.
    pub unsafe fn matmul(&self, path: Path, x: X, w: &Weight, finish: Finish, y: u64) -> Result<(), CudaError> {
        let (code, bias) = code(w.dtype, finish);
        let call = Call { x, w, up: None, code, bias, activation: 0, y };
        // SAFETY: passed on.
        unsafe { self.run(path, &call) }
    }

    /// `y = act(x · gateᵀ) * (x · upᵀ)`, `[rows, n]`, stored as `to`.
    ///
    /// # Safety
    ///
    /// As [`Products::matmul`].
    ///
    /// # Panics
    ///
    /// As [`Products::matmul`], and if the two weights differ in type or shape.
    #[expect(clippy::too_many_arguments, reason = "each is one operand of the operation")]
    pub unsafe fn gated(
        &self,
        path: Path,
        x: X,
        gate: &Weight,
        up: &Weight,
        activation: Gate,
        to: DType,
        y: u64,
    ) -> Result<(), CudaError> {
        assert_eq!((gate.dtype, gate.n, gate.k), (up.dtype, up.n, up.k), "the two weights of a gate are alike");
        let (code, bias) = code(gate.dtype, Finish::Store { bias: 0, to });
        let activation = match activation {
            Gate::Silu => 0,
            Gate::GeluTanh => 1,
        };
        let call = Call { x, w: gate, up: Some(up), code, bias, activation, y };
        // SAFETY: passed on.
        unsafe { self.run(path, &call) }
    }

    /// # Safety
    ///
    /// As [`Products::matmul`].
    unsafe fn run(&self, path: Path, call: &Call<'_>) -> Result<(), CudaError> {
        call.check();
        if call.x.rows == 0 || call.w.n == 0 {
            return Ok(());
        }
        // SAFETY: passed on.
        unsafe {
            match path {
                Path::Gemm => self.gemm(call),
                Path::Skinny => self.skinny(call),
            }
        }
    }

    /// # Safety
    ///
    /// As [`Products::matmul`].
    unsafe fn gemm(&self, call: &Call<'_>) -> Result<(), CudaError> {
        let Weight { dtype, n, k, address } = *call.w;
        let compute = compute_type(dtype);
        let mut weights = [address, call.up.map_or(address, |up| up.address)];
        if dtype.block_len() > 1 {
            let each = 2 * n * k;
            for (i, from) in weights.iter_mut().enumerate().take(1 + usize::from(call.up.is_some())) {
                let to = self.scratch.at(i * each, each);
                // SAFETY: `from` is a whole matrix of this type; the scratch has room, and the stream's order keeps an
                // earlier product that reads it apart from this.
                unsafe { dequantize(&*self.device, dtype, n * k, *from, DType::BF16, to)? };
                *from = to;
            }
        }
        let plan = gemm::plan(self.device.properties(), compute, call.shape(call.x.rows), call.up.is_some());
        let mut args = vec![Arg::Ptr(call.x.address), Arg::Ptr(weights[0])];
        args.push(Arg::Ptr(if call.up.is_some() { weights[1] } else { call.bias }));
        args.push(Arg::Ptr(call.y));
        args.extend([call.x.rows, n, k].map(|size| Arg::U32(size as u32)));
        args.push(Arg::U32(call.code));
        args.extend(call.up.map(|_| Arg::U32(call.activation)));
        // SAFETY: the operands are as large as the shape says (the caller's promise), the plan covers it, and kernels of both
        // sources take these arguments.
        unsafe { self.launch(&plan, &args) }
    }

    /// # Safety
    ///
    /// As [`Products::matmul`].
    unsafe fn skinny(&self, call: &Call<'_>) -> Result<(), CudaError> {
        let Weight { dtype, n, k, address } = *call.w;
        let x_row = k * if dtype == DType::F32 { 4 } else { 2 };
        let y_row = n * if call.code == STORE_NARROW && dtype != DType::F32 { 2 } else { 4 };
        for first in (0..call.x.rows).step_by(gemv::ROWS_MAX) {
            let rows = (call.x.rows - first).min(gemv::ROWS_MAX);
            let plan = gemv::plan(dtype, call.shape(rows), call.up.is_some());
            let args = [
                Arg::Ptr(call.x.address + (first * x_row) as u64),
                Arg::Ptr(address),
                Arg::Ptr(call.up.map_or(address, |up| up.address)),
                Arg::Ptr(call.bias),
                Arg::Ptr(call.y + (first * y_row) as u64),
                Arg::U32(rows as u32),
                Arg::U32(n as u32),
                Arg::U32(k as u32),
                Arg::U32(call.code),
                Arg::U32(u32::from(call.up.is_some())),
                Arg::U32(call.activation),
            ];
            // SAFETY: rows `first..first + rows` of x and y exist, the plan covers the shape, and all kernels of a plan for
            // few rows take these arguments.
            unsafe { self.launch(&plan, &args)? };
        }
        Ok(())
    }

    /// # Safety
    ///
    /// The arguments are the kernel's, and what it touches exists.
    unsafe fn launch(&self, plan: &Plan, args: &[Arg]) -> Result<(), CudaError> {
        tracing::trace!(%plan);
        // SAFETY: passed on.
        unsafe { self.device.launch(plan.kernel, &plan.launch, args) }
    }
}

/// Numbers of `finish.cuh`.
const STORE_F32: u32 = 0;
const STORE_NARROW: u32 = 1;
const ADD_F32: u32 = 2;

fn code(weights: DType, finish: Finish) -> (u32, u64) {
    match finish {
        Finish::Store { bias, to: DType::F32 } => (STORE_F32, bias),
        Finish::Store { bias, to } if to == compute_type(weights) => (STORE_NARROW, bias),
        Finish::Store { to, .. } => panic!("{} weights do not give {}", weights.name(), to.name()),
        Finish::Add { bias } => (ADD_F32, bias),
    }
}

/// A product as the kernels take it.
struct Call<'a> {
    x: X,
    w: &'a Weight,
    up: Option<&'a Weight>,
    code: u32,
    bias: u64,
    activation: u32,
    y: u64,
}

impl Call<'_> {
    fn shape(&self, m: usize) -> Shape {
        Shape { m, n: self.w.n, k: self.w.k }
    }

    fn check(&self) {
        let compute = compute_type(self.w.dtype);
        assert_eq!(self.x.dtype, compute, "the type of x for {} weights", self.w.dtype.name());
        assert!(self.w.k > 0 && self.w.dtype.row_bytes(self.w.k).is_some(), "rows of {} elements", self.w.k);
        let most = u32::MAX as usize / 4;
        assert!(self.x.rows <= most && self.w.n <= most && self.w.k <= most, "a shape beyond what kernels count to");
        for address in [self.x.address, self.w.address, self.up.map_or(0, |up| up.address)] {
            assert!(address.is_multiple_of(16), "{address:#x} is not a multiple of 16");
        }
    }
}

/// Decodes `elements` of a quantised matrix to F32 (exactly what [`crate::dequantize_row`] gives) or BF16 (that, rounded).
///
/// # Safety
///
/// `from` and `to` are memory of the device, as large as `elements` take in the two types.
///
/// # Panics
///
/// If the type is not quantised, `as_type` is another, or `elements` are not whole blocks.
pub unsafe fn dequantize(
    device: &dyn Device,
    dtype: DType,
    elements: usize,
    from: u64,
    as_type: DType,
    to: u64,
) -> Result<(), CudaError> {
    assert!(elements.is_multiple_of(dtype.block_len()), "{elements} elements of {}", dtype.name());
    let [bf16, f32] = match dtype {
        DType::Q4_0 => ["dequant_q4_0_bf16", "dequant_q4_0_f32"],
        DType::Q4_1 => ["dequant_q4_1_bf16", "dequant_q4_1_f32"],
        DType::Q5_0 => ["dequant_q5_0_bf16", "dequant_q5_0_f32"],
        DType::Q5_1 => ["dequant_q5_1_bf16", "dequant_q5_1_f32"],
        DType::Q8_0 => ["dequant_q8_0_bf16", "dequant_q8_0_f32"],
        DType::Q2K => ["dequant_q2_k_bf16", "dequant_q2_k_f32"],
        DType::Q3K => ["dequant_q3_k_bf16", "dequant_q3_k_f32"],
        DType::Q4K => ["dequant_q4_k_bf16", "dequant_q4_k_f32"],
        DType::Q5K => ["dequant_q5_k_bf16", "dequant_q5_k_f32"],
        DType::Q6K => ["dequant_q6_k_bf16", "dequant_q6_k_f32"],
        DType::IQ4NL => ["dequant_iq4_nl_bf16", "dequant_iq4_nl_f32"],
        DType::MXFP4 => ["dequant_mxfp4_bf16", "dequant_mxfp4_f32"],
        DType::F32 | DType::F16 | DType::BF16 => panic!("{} is not quantised", dtype.name()),
    };
    let name = match as_type {
        DType::BF16 => bf16,
        DType::F32 => f32,
        other => panic!("quantised weights are not decoded to {}", other.name()),
    };
    let quads = elements / 4;
    if quads == 0 {
        return Ok(());
    }
    // Enough blocks for any device; each goes on by the whole grid.
    let blocks = quads.div_ceil(256).min(1 << 16);
    let launch = Launch { grid: [blocks as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 };
    let args = [Arg::Ptr(from), Arg::Ptr(to), Arg::U64(quads as u64)];
    // SAFETY: passed on; these are the kernel's parameters.
    unsafe { device.launch(Kernel { source: "dequant.cu", name }, &launch, &args) }
}

#[cfg(test)]
#[path = "matmul_tests.rs"]
mod tests;
