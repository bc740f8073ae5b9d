//! Matrix products: `y[m, n] = x[m, k] · w[n, k]ᵀ` with a fused finish, for every storage type of weights.
//!
//! There are two paths, which the caller chooses between: [`Path::Gemm`] for many rows (prompts), on which a quantised weight
//! is first decoded to bf16; and [`Path::Skinny`] for few (one per sequence), on which each weight is read once.
//! **Batch invariance.** On each path an output is summed over k in an order that depends on (n, k, dtype) alone: not on
//! the number of rows, the row's place, or the other rows. So a caller that takes the path by what a row *is* (prompt or
//! decode), never by how many there are, gets the same bits in any batch.

use super::blas::Blas;
use super::dequantize::dequantize;
use super::gemm::{ADD_F32, Gemm, Own, Plain, STORE_F32, STORE_NARROW, Wgmma};
use crate::cuda::device::{Arg, Buffer, CudaError, Device};
use crate::cuda::plan::gemm::Shape;
use crate::cuda::plan::gemv;
use crate::{DType, Gate};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// Whether weights of this type are multiplied as they are with rows of type `x`.
pub const fn supports(weights: DType, x: DType) -> bool {
    compute_type(weights) as u8 == x as u8
}

/// Products on one device, with the memory they need beside their operands.
#[derive(Debug)]
pub struct Products {
    device: Arc<dyn Device>,
    /// bf16 copies of quantised weights, made anew for each product.
    scratch: Buffer,
    /// For many rows, our own first.
    implementations: Vec<Box<dyn Gemm>>,
    /// Which of them, unless measurement says otherwise.
    preferred: usize,
    /// Which of them is fastest at type, n, k and a power of two of rows.
    fastest: HashMap<(DType, usize, usize, usize), usize>,
}

/// What an implementation took for a product of many rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measured {
    /// Whose time this is.
    pub name: &'static str,
    /// The product.
    pub shape: Shape,
    /// The shortest of a few runs.
    pub time: Duration,
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
        })
    }

    /// Takes the experimental kernels of [`Path::Gemm`] where the device has the instructions for them.
    #[must_use]
    pub fn experimental(mut self) -> Self {
        self.implementations.push(Box::new(Wgmma(self.device.clone())));
        self.preferred = self.implementations.len() - 1;
        self
    }

    /// Times every implementation, NVIDIA's library included where it is, on [`Path::Gemm`] at these numbers of rows, and takes
    /// the fastest for each shape from now on. Sums may then differ with the number of rows: **not batch-invariant**.
    ///
    /// # Safety
    ///
    /// The weights lie on this device.
    pub unsafe fn measure(&mut self, weights: &[Weight], rows: &[usize]) -> Result<Vec<Measured>, CudaError> {
        match Blas::open(&self.device) {
            Ok(blas) => self.implementations.push(Box::new(blas)),
            Err(error) => tracing::info!("products are not measured against cuBLASLt: {error}"),
        }
        let mut times = Vec::new();
        for w in weights {
            let dtype = compute_type(w.dtype);
            for m in rows.iter().map(|rows| rows.next_power_of_two()) {
                let key = (dtype, w.n, w.k, m);
                if self.fastest.contains_key(&key) {
                    continue;
                }
                // What the numbers are does not matter, but denormal or NaN ones might take another time: zeros.
                let x = Buffer::new(&self.device, m * w.k * dtype.block_bytes())?;
                let y = Buffer::new(&self.device, m * w.n * 4)?;
                x.fill(0)?;
                let x = X { address: x.at(0, x.bytes()), dtype, rows: m };
                let call = Call { x, w, up: None, code: STORE_F32, bias: 0, activation: 0, y: y.address() };
                // SAFETY: x and y were allocated for the shape, and the weight is the caller's promise.
                let plain = unsafe { self.plain(&call)? };
                let mut best = None;
                for (i, implementation) in self.implementations.iter().enumerate() {
                    if !implementation.takes(&plain) {
                        continue;
                    }
                    // SAFETY: as above, and it takes the product.
                    let time = unsafe { time(&*self.device, &**implementation, &plain)? };
                    times.push(Measured { name: implementation.name(), shape: plain.shape, time });
                    if best.is_none_or(|(least, _)| time < least) {
                        best = Some((time, i));
                    }
                }
                self.fastest.extend(best.map(|(_, i)| (key, i)));
            }
        }
        Ok(times)
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
        // SAFETY: passed on.
        let plain = unsafe { self.plain(call)? };
        let Shape { m, n, k } = plain.shape;
        let measured = self.fastest.get(&(plain.dtype, n, k, m.next_power_of_two()));
        let wanted = &self.implementations[*measured.unwrap_or(&self.preferred)];
        let implementation = if wanted.takes(&plain) { wanted } else { &self.implementations[0] };
        // SAFETY: the implementation takes the product; the operands are the caller's promise, or were just decoded.
        unsafe { implementation.multiply(&plain) }
    }

    /// The product with plain weights that a call comes down to; quantised ones are decoded.
    ///
    /// # Safety
    ///
    /// As [`Products::matmul`].
    unsafe fn plain(&self, call: &Call<'_>) -> Result<Plain, CudaError> {
        let Weight { dtype, n, k, address } = *call.w;
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
        Ok(Plain {
            dtype: compute_type(dtype),
            shape: call.shape(call.x.rows),
            x: call.x.address,
            w: weights[0],
            up: call.up.map(|_| weights[1]),
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

/// The shortest of three runs, after one that compiles and warms.
///
/// # Safety
///
/// As [`Gemm::multiply`].
unsafe fn time(device: &dyn Device, implementation: &dyn Gemm, plain: &Plain) -> Result<Duration, CudaError> {
    const REPEAT: u32 = 4;
    let mut least = Duration::MAX;
    for run in 0..4 {
        let started = Instant::now();
        for _ in 0..REPEAT {
            // SAFETY: passed on.
            unsafe { implementation.multiply(plain)? };
        }
        device.synchronize()?;
        if run > 0 {
            least = least.min(started.elapsed() / REPEAT);
        }
    }
    Ok(least)
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

#[cfg(test)]
#[path = "matmul_tests.rs"]
mod tests;
