//! Matrix products: `y[m, n] = x[m, k] · w[n, k]ᵀ` with a fused finish, for every storage type of weights.
//!
//! There are two paths, which the caller chooses between: [`Path::Gemm`] for many rows (prompts), on which a quantised weight
//! is first decoded to bf16; and [`Path::Skinny`] for few (one per sequence), on which each weight is read once.
//! **Batch invariance.** On each path an output is summed over k in an order that depends on (n, k, dtype) alone: not on
//! the number of rows, the row's place, or the other rows. So a caller that takes the path by what a row *is* (prompt or
//! decode), never by how many there are, gets the same bits in any batch. [`Products::measure`] may give a matrix another
//! implementation; it keeps to this: one for each matrix, whatever the rows.

use super::dequantize::dequantize;
use super::gemm::{ADD_F32, Factors, Gemm, Own, Product, STORE_F32, STORE_NARROW, Wgmma};
use super::measure::{Key, Way};
use super::rows;
use super::scaled::{self, Fp8Rows, ScaledFinish, ScaledType, ScaledWeight, decode_fp4};
use crate::cuda::device::{Arg, Buffer, CudaError, Device};
use crate::cuda::plan::gemm::Shape;
use crate::cuda::plan::gemv;
use crate::{DType, Gate};
use std::collections::HashMap;
use std::sync::Arc;

/// A weight `[n, k]` on the device: row-major if it is plain, in planes ([`crate::cuda::planes`]) if it is quantised.
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

/// Whether weights of this type are multiplied as they are with rows of type `x`.
pub const fn supports(weights: DType, x: DType) -> bool {
    compute_type(weights) as u8 == x as u8
}

/// Rows of a product through memory of ours, such as the two halves of a gated one, that are done at a time: so few in tests that there
/// are several parts.
pub(super) const PART_ROWS: usize = if cfg!(test) { 32 } else { 1024 };

/// Products on one device, with the memory they need beside their operands.
#[derive(Debug)]
pub struct Products {
    pub(super) device: Arc<dyn Device>,
    /// bf16 copies of quantised weights, made anew for each product.
    scratch: Buffer,
    /// For many rows, our own first.
    pub(super) implementations: Vec<Box<dyn Gemm>>,
    /// Which of them, unless measurement says otherwise.
    preferred: usize,
    /// How to multiply by matrices that were measured.
    pub(super) fastest: HashMap<Key, Way>,
    /// Where the two halves of a gated product lie, if they are computed apart.
    pub(super) halves: Option<Arc<Buffer>>,
    /// The version of NVIDIA's library among the implementations, or 0.
    pub(super) library: usize,
}

impl Products {
    /// Bytes that [`Products::new`] needs for products with these weights (type, n, k) on [`Path::Gemm`], gated ones included.
    pub fn scratch_bytes(weights: impl IntoIterator<Item = (DType, usize, usize)>) -> usize {
        let decoded = |(dtype, n, k): (DType, usize, usize)| if dtype.block_len() > 1 { 4 * n * k } else { 0 };
        weights.into_iter().map(decoded).max().unwrap_or(0)
    }

    /// Allocates `scratch_bytes`.
    pub fn new(device: &Arc<dyn Device>, scratch_bytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            device: device.clone(),
            scratch: Buffer::new(device, scratch_bytes.max(256))?,
            implementations: vec![Box::new(Own(device.clone()))],
            preferred: 0,
            fastest: HashMap::new(),
            halves: None,
            library: 0,
        })
    }

    /// Takes the experimental kernels of [`Path::Gemm`] where the device has the instructions for them.
    #[must_use]
    pub fn experimental(mut self) -> Self {
        self.implementations.push(Box::new(Wgmma(self.device.clone())));
        self.preferred = self.implementations.len() - 1;
        self
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
        let activation = activation_code(activation);
        let call = Call { x, w: gate, up: Some(up), code, bias, activation, y };
        // SAFETY: passed on.
        unsafe { self.run(path, &call) }
    }

    /// `y = finish(x · wᵀ)` of many bf16 rows by fp4 weights, which are decoded to bf16 first. The scratch must have 4 bytes for each of
    /// a matrix's elements.
    ///
    /// # Safety
    ///
    /// As [`Products::matmul`].
    ///
    /// # Panics
    ///
    /// As [`Products::matmul`], and if the weights are not fp4.
    pub unsafe fn fp4(&self, x: X, w: &ScaledWeight, finish: ScaledFinish<'_>, y: u64) -> Result<(), CudaError> {
        // SAFETY: passed on; the weights were just decoded.
        unsafe {
            let first = self.decoded_fp4(w, 0)?;
            match finish {
                ScaledFinish::Plain(finish) => self.matmul(Path::Gemm, x, &first, finish, y),
                ScaledFinish::Gated { up, activation, to } => {
                    let second = self.decoded_fp4(up, 1)?;
                    self.gated(Path::Gemm, x, &first, &second, activation, to, y)
                }
            }
        }
    }

    /// The first or second fp4 matrix of a product in bf16, until the next product.
    ///
    /// # Safety
    ///
    /// The matrix lies on this device.
    pub(super) unsafe fn decoded_fp4(&self, w: &ScaledWeight, index: usize) -> Result<Weight, CudaError> {
        let ScaledWeight { dtype, n, k, .. } = *w;
        assert_eq!(dtype, ScaledType::NvFp4, "fp4 weights");
        let address = self.scratch.at(index * 2 * n * k, 2 * n * k);
        // SAFETY: the matrix is the caller's promise; the scratch has room, and the stream's order keeps an earlier product that
        // reads it apart from this.
        unsafe { decode_fp4(&*self.device, w, address)? };
        Ok(Weight { dtype: DType::BF16, n, k, address })
    }

    /// `y = finish(x · wᵀ)` of many fp8 rows by fp8 weights.
    ///
    /// # Errors
    ///
    /// [`CudaError::Unavailable`] with the reasons if the device or the shape cannot.
    ///
    /// # Safety
    ///
    /// As [`Products::matmul`].
    ///
    /// # Panics
    ///
    /// If the weights are not fp8.
    pub unsafe fn fp8(&self, x: &Fp8Rows, w: &ScaledWeight, finish: ScaledFinish<'_>, y: u64) -> Result<(), CudaError> {
        if x.rows == 0 || w.n == 0 {
            return Ok(());
        }
        // SAFETY: passed on.
        unsafe { self.multiply_settled(&scaled::product(x, w, finish, y)) }
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
        // SAFETY: the operands are the caller's promise, or were just decoded.
        unsafe { self.multiply_settled(&self.product(call)?) }
    }

    /// Multiplies in the way that was settled for the matrix, if one was.
    ///
    /// # Safety
    ///
    /// The operands are on the device and as large as the shape says; y overlaps none.
    unsafe fn multiply_settled(&self, product: &Product) -> Result<(), CudaError> {
        let settled = self.fastest.get(&Key::of(product)).copied();
        let way = settled.unwrap_or(Way::Whole(self.preferred));
        // SAFETY: passed on.
        let done = unsafe { self.multiply(way, product) };
        match done {
            // A library that refuses a number of rows has computed nothing yet.
            Err(error) if settled.is_some() && way != Way::Whole(0) => {
                tracing::warn!(%error, shape = ?product.shape, "a measured product was refused: our own kernel computes it");
                // SAFETY: as above.
                unsafe { self.implementations[0].multiply(product) }
            }
            done => done,
        }
    }

    /// Multiplies in one way; by our own kernel if that does not take the product.
    ///
    /// # Safety
    ///
    /// The operands are on the device and as large as the shape says; y overlaps none.
    pub(super) unsafe fn multiply(&self, way: Way, p: &Product) -> Result<(), CudaError> {
        match way {
            Way::Whole(index) => {
                let wanted = &self.implementations[index];
                let implementation = if wanted.takes(p) { wanted } else { &self.implementations[0] };
                // SAFETY: the implementation takes the product; the rest is passed on.
                unsafe { implementation.multiply(p) }
            }
            // SAFETY: passed on.
            Way::Halves(index) => unsafe { self.multiply_halves(&*self.implementations[index], p) },
        }
    }

    /// A gated product as two plain ones in f32 and their combination, some rows at a time.
    ///
    /// # Safety
    ///
    /// As [`Products::multiply`].
    unsafe fn multiply_halves(&self, implementation: &dyn Gemm, p: &Product) -> Result<(), CudaError> {
        let (Some(up), Some(halves)) = (p.up, &self.halves) else {
            return Err(CudaError::Unavailable("no room for a gated product in two halves".into()));
        };
        let (m, n) = (p.shape.m, p.shape.n);
        for first in (0..m).step_by(PART_ROWS) {
            let rows = (m - first).min(PART_ROWS);
            let bytes = 4 * rows * n;
            let (gate_y, up_y) = (halves.at(0, bytes), halves.at(bytes, bytes));
            let part = p.of_rows(first, rows);
            let half = Product { up: None, y: gate_y, finish: STORE_F32, ..part };
            if !implementation.takes(&half) {
                return Err(CudaError::Unavailable(format!("{} takes no {:?}", implementation.name(), half.shape)));
            }
            let other = half.fp8.map(|factors| Factors { w: factors.up, ..factors });
            let combine = if p.activation == 0 { rows::silu_mul } else { rows::gelu_tanh_mul };
            // SAFETY: these rows of x and y are the caller's, and `halves` has room for two results of them.
            unsafe {
                implementation.multiply(&half)?;
                implementation.multiply(&Product { w: up, fp8: other, y: up_y, ..half })?;
                combine(&*self.device, rows * n, gate_y, up_y, p.result(), part.y)?;
            }
        }
        Ok(())
    }

    /// The product with plain weights that a call comes down to; quantised ones are decoded.
    ///
    /// # Safety
    ///
    /// As [`Products::matmul`].
    pub(super) unsafe fn product(&self, call: &Call<'_>) -> Result<Product, CudaError> {
        let Weight { dtype, n, k, address } = *call.w;
        let mut weights = [address, call.up.map_or(address, |up| up.address)];
        if dtype.block_len() > 1 {
            let each = 2 * n * k;
            for (i, from) in weights.iter_mut().enumerate().take(1 + usize::from(call.up.is_some())) {
                let to = self.scratch.at(i * each, each);
                // SAFETY: `from` is a whole matrix of this type; the scratch has room, and the stream's order keeps an
                // earlier product that reads it apart from this.
                unsafe { dequantize(&*self.device, dtype, (n, k), *from, DType::BF16, to)? };
                *from = to;
            }
        }
        Ok(Product {
            dtype: compute_type(dtype),
            shape: call.shape(call.x.rows),
            x: call.x.address,
            w: weights[0],
            up: call.up.map(|_| weights[1]),
            fp8: None,
            bias: call.bias,
            y: call.y,
            finish: call.code,
            activation: call.activation,
        })
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
            tracing::trace!(%plan);
            // SAFETY: rows `first..first + rows` of x and y exist, the plan covers the shape, and all kernels of a plan for
            // few rows take these arguments.
            unsafe { self.device.launch(plan.kernel, &plan.launch, &args)? };
        }
        Ok(())
    }
}

pub(super) fn code(weights: DType, finish: Finish) -> (u32, u64) {
    match finish {
        Finish::Store { bias, to: DType::F32 } => (STORE_F32, bias),
        Finish::Store { bias, to } if to == compute_type(weights) => (STORE_NARROW, bias),
        Finish::Store { to, .. } => panic!("{} weights do not give {}", weights.name(), to.name()),
        Finish::Add { bias } => (ADD_F32, bias),
    }
}

pub(super) fn activation_code(activation: Gate) -> u32 {
    match activation {
        Gate::Silu => 0,
        Gate::GeluTanh => 1,
    }
}

/// A product as the kernels take it.
pub(super) struct Call<'a> {
    pub(super) x: X,
    pub(super) w: &'a Weight,
    pub(super) up: Option<&'a Weight>,
    pub(super) code: u32,
    pub(super) bias: u64,
    pub(super) activation: u32,
    pub(super) y: u64,
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

#[cfg(test)]
#[path = "matmul_tests.rs"]
mod tests;
