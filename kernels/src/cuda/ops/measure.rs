//! Which implementation multiplies by which matrix, found out by measurement: our own kernels, and NVIDIA's library where it is.
//!
//! A choice is made once per matrix, by what its operands are, its shape (n, k) and whether it is gated, when a model is loaded; how
//! many rows a product has never enters. So products stay batch-invariant if each implementation is: our own kernels are by the order
//! of their sums, and any other is taken only if it shows it here, with random rows that are multiplied alone, in front of others and
//! behind them, and must come out the same to the bit; and if what it computes is what ours does.
//!
//! All processes of a machine must choose the same, because a prompt may be computed by one and again by another. So what was found
//! is kept in a file, and whoever measures holds its lock: others wait, and read.
//!
//! Read [`Products::measure`] and [`Measured`].

mod kept;

use super::blas;
use super::gemm::{Factors, Operands, Product, STORE_F32, STORE_NARROW, Variant};
use super::matmul::{Call, Finish, Products, Weight, X, compute_type};
use super::scaled::{self, Fp8Rows, ScaledFinish, ScaledType, ScaledWeight};
use crate::cuda::check::Draw;
use crate::cuda::compile::keep;
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::kv::f32_to_e4m3;
use crate::quant::{dequantize_row, quantize_row};
use crate::{DType, Gate};
use kept::{Choice, file_name, line, lock, read};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rows of the products that are measured, whatever passes a process makes, so that all choose by the same: times of more are those of
/// several times as many tiles.
pub const MEASURED_ROWS: usize = 2048;
/// Numbers of rows of which a product must be part of the largest one, to the bit: one, a part of a tile, about a tile, several.
const PROBES: [usize; 5] = [1, 17, 64, 129, 500];
/// Rows that stand in front of the probe in a second try: rows begin at multiples of 16 bytes whatever k is.
const PROBE_BEHIND: usize = 24;
/// How far the results of another implementation may be from ours, root mean squares compared. Rounding to 16 bits costs 2^-9 at most;
/// tensor cores that keep few bits of fp8's sums cost more, and not the same in every kernel; a row or factor in the wrong place costs
/// about all there is.
const DIFFERENCE_MAX: f64 = 0.05;
/// When this has passed, matrices get the best of what was tried, which is at least our own kernel.
const BUDGET: Duration = Duration::from_secs(20);
/// How long others wait for who measures: the budget, and compiling kernels on a machine's first start.
const PATIENCE: Duration = Duration::from_secs(120);
/// Key of the random rows.
const SEED: u64 = 5;

/// What a choice is made for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// Both operands when they are multiplied.
    pub operands: Operands,
    /// Rows of the matrix: outputs.
    pub n: usize,
    /// Its columns: inputs.
    pub k: usize,
    /// Whether there is a second matrix beside it.
    pub gated: bool,
}

impl Key {
    pub(super) fn of(p: &Product) -> Self {
        Self { operands: p.operands(), n: p.shape.n, k: p.shape.k, gated: p.up.is_some() }
    }
}

/// How to multiply: by an implementation, named by its place in the list of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// It computes all of it.
    Whole(usize),
    /// It computes the two halves of a gated product, and a kernel of ours combines them.
    Halves(usize),
}

/// A matrix whose products are to be measured, and the second one of a gated product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Matrix {
    /// As stored, or decoded when it is multiplied.
    Plain(Weight, Option<Weight>),
    /// fp8, or fp4 that is decoded.
    Scaled(ScaledWeight, Option<ScaledWeight>),
}

impl Matrix {
    fn key(&self) -> Key {
        match *self {
            Self::Plain(Weight { dtype, n, k, .. }, up) => {
                Key { operands: Operands::Plain(compute_type(dtype)), n, k, gated: up.is_some() }
            }
            Self::Scaled(ScaledWeight { dtype, n, k, .. }, up) => {
                let operands = match dtype {
                    ScaledType::E4M3 => Operands::Fp8,
                    ScaledType::E4M3Blocks => Operands::Fp8Blocks,
                    ScaledType::NvFp4 => Operands::Plain(DType::BF16),
                };
                Key { operands, n, k, gated: up.is_some() }
            }
        }
    }
}

/// What became of a way to multiply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is the fastest.
    Chosen,
    /// Another is faster.
    Slower,
    /// Rows come out otherwise in other company.
    Varies {
        /// Rows of the product that showed it.
        rows: usize,
    },
    /// It does not work, or computes something else.
    Failed(String),
}

/// A way to multiply by a matrix, and what it took.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Measured {
    /// Whose.
    pub name: String,
    /// At what.
    pub key: Key,
    /// Of the product with most rows, the shortest of a few runs.
    pub time: Duration,
    /// What became of it.
    pub verdict: Verdict,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { operands, n, k, gated } = self.key;
        let gated = if gated { " gated" } else { "" };
        let micros = self.time.as_secs_f64() * 1e6;
        write!(f, "{} n={n} k={k}{gated} by {}: {micros:.1} us, {:?}", operands.name(), self.name, self.verdict)
    }
}

/// Why measurement settled nothing.
#[derive(Debug, thiserror::Error)]
enum MeasureError {
    /// What is found cannot be shared.
    #[error("what is measured cannot be shared in {}: {}", .0.display(), .1)]
    Folder(PathBuf, std::io::Error),
    /// The device refused.
    #[error("{0}")]
    Device(#[from] CudaError),
}

impl Products {
    /// Bytes that [`Products::add_library`] takes for good for matrices of at most `columns` rows or columns.
    pub const fn library_bytes(columns: usize) -> usize {
        blas::bytes(columns)
    }

    /// Adds NVIDIA's library to what [`Products::measure`] chooses from for these matrices.
    ///
    /// # Errors
    ///
    /// [`CudaError::Unavailable`] if it is not on this machine or the device is not CUDA's.
    pub fn add_library(&mut self, matrices: &[Matrix]) -> Result<(), CudaError> {
        let columns = matrices.iter().map(Matrix::key).map(|key| key.n.max(key.k)).max().unwrap_or(1);
        let (blas, unscaled) = blas::open(&self.device, columns)?;
        self.library = blas.version();
        self.halves = Some(unscaled.sums());
        self.implementations.push(Box::new(blas));
        self.implementations.push(Box::new(unscaled));
        Ok(())
    }

    /// Measures every implementation for each of these matrices, with `rows` random rows and parts of them, and settles on the
    /// fastest of those whose rows do not depend on their company and that compute what our own does; for at most [`BUDGET`] and what
    /// our own kernel then takes for the matrices that are left. `folder` keeps what was found for all processes of this machine; what
    /// it has is taken, and what another process measures is waited for. Takes memory for the operands meanwhile. Returns what was
    /// measured: nothing if the file had it, or if there is nothing to choose from.
    ///
    /// # Errors
    ///
    /// What the device refused our own kernels. If the folder cannot keep what was found, or the device has no room for the operands,
    /// nothing is settled, and the log says so: another process might find something else.
    ///
    /// # Safety
    ///
    /// The matrices lie on this device.
    pub unsafe fn measure(
        &mut self,
        matrices: &[Matrix],
        rows: usize,
        folder: Option<&Path>,
    ) -> Result<Vec<Measured>, CudaError> {
        if self.implementations.len() < 2 {
            return Ok(Vec::new());
        }
        let Some(folder) = folder else {
            // SAFETY: passed on.
            return Ok(unsafe { self.choose_all(matrices, &[], (rows, Instant::now() + BUDGET))? }.1);
        };
        // SAFETY: passed on.
        let refused = match unsafe { self.measure_shared(matrices, rows, folder) } {
            Err(error @ (MeasureError::Folder(..) | MeasureError::Device(CudaError::OutOfMemory { .. }))) => error,
            Err(MeasureError::Device(error)) => return Err(error),
            Ok(measured) => return Ok(measured),
        };
        self.fastest.clear();
        tracing::warn!("products of prompts are Ridge's own, perhaps not so in other processes: {refused}");
        Ok(Vec::new())
    }

    /// [`Products::measure`] with a folder, or why not.
    ///
    /// # Safety
    ///
    /// The matrices lie on this device.
    unsafe fn measure_shared(
        &mut self,
        matrices: &[Matrix],
        rows: usize,
        folder: &Path,
    ) -> Result<Vec<Measured>, MeasureError> {
        let names: Vec<&str> = self.implementations.iter().map(|known| known.name()).collect();
        let file = folder.join(file_name(self.device.properties(), (&names, self.library), rows));
        let known = read(&file);
        if matrices.iter().all(|matrix| known.iter().any(|choice| choice.key == matrix.key())) {
            // SAFETY: passed on; the file has them all.
            return Ok(unsafe { self.choose_all(matrices, &known, (rows, Instant::now() + BUDGET))? }.1);
        }
        let cannot = |error| MeasureError::Folder(file.clone(), error);
        let right = lock(&file.with_extension("lock"), PATIENCE).map_err(cannot)?;
        // Somebody else may have measured while this waited.
        let known = read(&file);
        // SAFETY: passed on.
        let (choices, measured) = unsafe { self.choose_all(matrices, &known, (rows, Instant::now() + BUDGET))? };
        let others = known.iter().filter(|known| choices.iter().all(|choice| choice.key != known.key));
        let lines: String = choices.iter().chain(others).map(|choice| line(choice) + "\n").collect();
        keep(&file, lines.as_bytes()).map_err(cannot)?;
        drop(right);
        Ok(measured)
    }

    /// Settles on what is known, and measures the rest with that many rows, until then. Returns all choices, and what was measured.
    ///
    /// # Safety
    ///
    /// The matrices lie on this device.
    unsafe fn choose_all(
        &mut self,
        matrices: &[Matrix],
        known: &[Choice],
        (rows, until): (usize, Instant),
    ) -> Result<(Vec<Choice>, Vec<Measured>), CudaError> {
        let (mut choices, mut measured): (Vec<Choice>, Vec<Measured>) = (Vec::new(), Vec::new());
        for matrix in matrices {
            let key = matrix.key();
            if choices.iter().any(|choice| choice.key == key) {
                continue;
            }
            let choice = match known.iter().find(|choice| choice.key == key && self.recall(choice)) {
                Some(choice) => choice.clone(),
                None => {
                    // SAFETY: passed on.
                    let (choice, all) = unsafe { self.choose(matrix, rows, until)? };
                    all.iter().for_each(|measured| tracing::info!("{measured}"));
                    measured.extend(all);
                    choice
                }
            };
            choices.push(choice);
        }
        if !measured.is_empty() && Instant::now() >= until {
            tracing::info!(
                "measuring products took its {} s: what is left keeps the best that was tried",
                BUDGET.as_secs()
            );
        }
        Ok((choices, measured))
    }

    /// Takes a kept choice, if its implementation is still there.
    fn recall(&mut self, choice: &Choice) -> bool {
        let Some(index) = self.implementations.iter().position(|known| known.name() == choice.name) else {
            return false;
        };
        self.settle(choice.key, index, choice.halves, choice.variant);
        true
    }

    fn settle(&mut self, key: Key, index: usize, halves: bool, variant: Variant) {
        let (finish, up) = if key.gated && !halves { (STORE_NARROW, Some(0)) } else { (STORE_F32, None) };
        self.implementations[index].settle(&Product { finish, up, ..nothing(key) }, variant);
        self.fastest.insert(key, if halves { Way::Halves(index) } else { Way::Whole(index) });
    }

    /// Tries the ways to multiply by a matrix, until the budget is used up.
    ///
    /// # Safety
    ///
    /// The matrix lies on this device.
    unsafe fn choose(
        &mut self,
        matrix: &Matrix,
        rows: usize,
        until: Instant,
    ) -> Result<(Choice, Vec<Measured>), CudaError> {
        let key = matrix.key();
        // SAFETY: passed on.
        let bench = unsafe { Bench::new(self, matrix, rows)? };
        let mut tried: Vec<(Choice, Measured)> = Vec::new();
        for index in 0..self.implementations.len() {
            let halves = key.gated && !self.implementations[index].takes(&bench.product);
            let asked = if halves { Product { up: None, finish: STORE_F32, ..bench.product } } else { bench.product };
            let able = self.implementations[index].takes(&asked) && (!halves || self.halves.is_some());
            let name = self.implementations[index].name();
            if !able {
                continue;
            }
            let variants = self.implementations[index].variants(&asked).unwrap_or_else(|error| {
                tracing::debug!("{name} has nothing for {asked:?}: {error}");
                Vec::new()
            });
            for variant in variants {
                // Our own kernel is the first, and always tried.
                if !tried.is_empty() && Instant::now() >= until {
                    break;
                }
                self.settle(key, index, halves, variant);
                // SAFETY: the bench's operands are as large as its product says.
                let timed = unsafe { bench.time(self, self.fastest[&key]) };
                let (time, verdict) = match timed {
                    Ok(time) => (time, Verdict::Slower),
                    Err(error) => (Duration::MAX, Verdict::Failed(error.to_string())),
                };
                let choice = Choice { key, name: name.into(), halves, variant };
                tried.push((choice, Measured { name: name.into(), key, time, verdict }));
            }
        }
        // The fastest first; of those that work, the first that computes the right thing and whose rows keep their bits.
        tried.sort_by_key(|(_, measured)| measured.time);
        let mut chosen = None;
        for (at, (choice, measured)) in tried.iter_mut().enumerate() {
            if chosen.is_some() || measured.verdict != Verdict::Slower || !self.recall(choice) {
                continue;
            }
            // SAFETY: as above.
            measured.verdict = unsafe { bench.judge(self, self.fastest[&key]) };
            if measured.verdict == Verdict::Chosen {
                chosen = Some(at);
            }
        }
        let Some(chosen) = chosen else {
            self.fastest.remove(&key);
            let all: Vec<String> = tried.iter().map(|(_, measured)| measured.to_string()).collect();
            return Err(CudaError::Unavailable(format!("no implementation multiplies rightly: {}", all.join("; "))));
        };
        let choice = tried[chosen].0.clone();
        Ok((choice, tried.into_iter().map(|(_, measured)| measured).collect()))
    }
}

/// A product without operands.
fn nothing(key: Key) -> Product {
    let shape = crate::cuda::plan::gemm::Shape { m: 1, n: key.n, k: key.k };
    let factors = |by_block| Some(Factors { x: 0, w: 0, up: 0, by_block });
    let (dtype, fp8) = match key.operands {
        Operands::Plain(dtype) => (dtype, None),
        Operands::Fp8 => (DType::BF16, factors(false)),
        Operands::Fp8Blocks => (DType::BF16, factors(true)),
    };
    Product { dtype, shape, x: 0, w: 0, up: None, fp8, bias: 0, y: 0, finish: STORE_F32, activation: 0 }
}

/// Operands of the products that are timed and compared.
struct Bench {
    device: Arc<dyn Device>,
    product: Product,
    _x: Buffer,
    _factors: Option<Buffer>,
    y: Buffer,
    part: Buffer,
}

impl Bench {
    /// # Safety
    ///
    /// The matrix lies on this device.
    unsafe fn new(products: &Products, matrix: &Matrix, rows: usize) -> Result<Self, CudaError> {
        let device = products.device.clone();
        let Key { operands, n, k, gated } = matrix.key();
        let compute = if let Operands::Plain(dtype) = operands { dtype } else { DType::BF16 };
        // A gated product goes on in the compute type, others in f32.
        let to = if gated { compute } else { DType::F32 };
        let y_bytes = rows * n * to.block_bytes();
        let (y, part) = (Buffer::new(&device, y_bytes)?, Buffer::new(&device, y_bytes)?);
        let x = random(&device, operands, rows * k)?;
        let mut factors = None;
        let plain = |w: &Weight, up: Option<&Weight>| {
            let operand = X { address: x.address(), dtype: compute, rows };
            let code = if gated { STORE_NARROW } else { STORE_F32 };
            let call = Call { x: operand, w, up, code, bias: 0, activation: 0, y: y.address() };
            // SAFETY: the operands were allocated for the shape, and the matrix is the caller's promise.
            unsafe { products.product(&call) }
        };
        let product = match matrix {
            Matrix::Plain(w, up) => plain(w, up.as_ref())?,
            Matrix::Scaled(w, up) if w.dtype == ScaledType::NvFp4 => {
                // SAFETY: the matrices are the caller's promise.
                let decoded = |w: &ScaledWeight, index| unsafe { products.decoded_fp4(w, index) };
                let second = up.as_ref().map(|up| decoded(up, 1)).transpose()?;
                plain(&decoded(w, 0)?, second.as_ref())?
            }
            Matrix::Scaled(w, up) => {
                let scales: Vec<f32> = Draw::new(SEED).vector(rows).into_iter().map(|v| 0.1 + v.abs()).collect();
                let scales = factors.insert(Buffer::of(&device, &scales)?).address();
                let finish = match up {
                    Some(up) => ScaledFinish::Gated { up, activation: Gate::Silu, to },
                    None => ScaledFinish::Plain(Finish::Store { bias: 0, to }),
                };
                scaled::product(&Fp8Rows { address: x.address(), scales, rows }, w, finish, y.address())
            }
        };
        Ok(Self { device, product, _x: x, _factors: factors, y, part })
    }

    /// The shortest of three runs of the whole product, after one that compiles and warms.
    ///
    /// # Safety
    ///
    /// The matrix that this was made for is still there.
    unsafe fn time(&self, products: &Products, way: Way) -> Result<Duration, CudaError> {
        const REPEAT: u32 = 4;
        let mut least = Duration::MAX;
        for run in 0..4 {
            self.device.synchronize()?;
            let started = Instant::now();
            for _ in 0..REPEAT {
                // SAFETY: passed on.
                unsafe { products.multiply(way, &self.product)? };
            }
            self.device.synchronize()?;
            if run > 0 {
                least = least.min(started.elapsed() / REPEAT);
            }
        }
        Ok(least)
    }

    /// What becomes of the fastest way.
    ///
    /// # Safety
    ///
    /// As [`Bench::time`].
    unsafe fn judge(&self, products: &Products, way: Way) -> Verdict {
        // SAFETY: passed on.
        let judged = unsafe { self.differs(products, way).and_then(|by| Ok((by, self.varies(products, way)?))) };
        match judged {
            Ok((by, None)) if by <= DIFFERENCE_MAX => Verdict::Chosen,
            Ok((by, Some(rows))) if by <= DIFFERENCE_MAX => Verdict::Varies { rows },
            Ok((by, _)) => Verdict::Failed(format!("it differs by {by:.3} of what our own kernel computes")),
            Err(error) => Verdict::Failed(error.to_string()),
        }
    }

    /// By which part of its own size a product differs from what our own kernel computes, root mean squares compared.
    ///
    /// # Safety
    ///
    /// As [`Bench::time`].
    unsafe fn differs(&self, products: &Products, way: Way) -> Result<f64, CudaError> {
        if way == Way::Whole(0) {
            return Ok(0.0);
        }
        let computed = |way| -> Result<Vec<f32>, CudaError> {
            self.y.fill(0xff)?;
            // SAFETY: passed on.
            unsafe { products.multiply(way, &self.product)? };
            let bytes: Vec<u8> = self.y.to_vec(self.y.bytes())?;
            let mut values = vec![0.0; bytes.len() / self.product.result().block_bytes()];
            dequantize_row(self.product.result(), &bytes, &mut values);
            Ok(values)
        };
        let (ours, theirs) = (computed(Way::Whole(0))?, computed(way)?);
        let square = |v: f64| v * v;
        let size: f64 = ours.iter().map(|v| square(f64::from(*v))).sum();
        let apart: f64 = ours.iter().zip(&theirs).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
        // Not a number is as wrong as can be.
        let by = (apart / size.max(f64::MIN_POSITIVE)).sqrt();
        Ok(if by.is_nan() { f64::INFINITY } else { by })
    }

    /// The number of rows whose product differs from what it is in the whole, if there is one.
    ///
    /// # Safety
    ///
    /// As [`Bench::time`].
    unsafe fn varies(&self, products: &Products, way: Way) -> Result<Option<usize>, CudaError> {
        let (x_row, y_row) = self.product.row_bytes();
        self.y.fill(0xff)?;
        // SAFETY: passed on.
        unsafe { products.multiply(way, &self.product)? };
        let whole: Vec<u8> = self.y.to_vec(self.y.bytes())?;
        let all = self.product.shape.m;
        for (rows, first) in PROBES.into_iter().flat_map(|rows| [(rows, 0), (rows, PROBE_BEHIND)]) {
            if first + rows > all || !(first * x_row).is_multiple_of(16) {
                continue;
            }
            self.part.fill(0xff)?;
            let part = Product { y: self.part.address(), ..self.product.of_rows(first, rows) };
            // SAFETY: rows of x, and as many of the second result.
            unsafe { products.multiply(way, &part)? };
            let got: Vec<u8> = self.part.to_vec(rows * y_row)?;
            if got != whole[first * y_row..][..rows * y_row] {
                return Ok(Some(rows));
            }
        }
        Ok(None)
    }
}

/// Random elements: a device draws more power for them than for zeros, and is slower.
fn random(device: &Arc<dyn Device>, operands: Operands, elements: usize) -> Result<Buffer, CudaError> {
    // No multiple of a power of two, so that rows differ.
    const PERIOD: usize = 65_521 * 8;
    let values = Draw::new(SEED).vector(PERIOD.min(elements));
    let mut bytes = Vec::new();
    match operands {
        Operands::Plain(dtype) => quantize_row(dtype, &values, &mut bytes).expect("a plain type can be written"),
        Operands::Fp8 | Operands::Fp8Blocks => bytes.extend(values.into_iter().map(f32_to_e4m3)),
    }
    let buffer = Buffer::new(device, elements * operands.bytes())?;
    repeat(&buffer, &bytes)?;
    Ok(buffer)
}

/// Fills a buffer with a pattern, over and over.
pub(crate) fn repeat(buffer: &Buffer, pattern: &[u8]) -> Result<(), CudaError> {
    let all = buffer.bytes();
    let mut done = pattern.len().min(all);
    buffer.upload(0, &pattern[..done])?;
    while done > 0 && done < all {
        let more = done.min(all - done);
        // SAFETY: both ranges lie in this buffer, the second behind the first.
        unsafe { buffer.device().copy(buffer.at(0, more), buffer.at(done, more), more)? };
        done += more;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
