//! How long operations take on a device, at the shapes of Llama-3.1-8B: what its memory copies, products of many rows by every
//! implementation there is, products of few, and attention. Wall-clock time around many launches, after warming up, on random values.
//! On the emulator, with small shapes, this only shows that the timing itself works: its times mean nothing.
//!
//! Read [`Timing`] and [`run`].

use super::{Draw, Effort, poisoned};
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::ops::attention::{self, Layer, Lists};
use crate::cuda::ops::blas;
use crate::cuda::ops::gemm::{Gemm, Own, Product, STORE_F32, Wgmma};
use crate::cuda::ops::matmul::{Finish, Path, Products, Weight, X};
use crate::cuda::ops::measure::{MEASURED_ROWS, Matrix, repeat};
use crate::cuda::ops::pack::pack;
use crate::cuda::ops::pages::Pages;
use crate::cuda::ops::scaled::{self, Fp8Rows, ScaledFinish, ScaledType, ScaledWeight};
use crate::cuda::plan::attention::{
    Decode, ITEM_WORDS, Prefill, PrefillKernel, Span, experimental_prefill_kernel, prefill_kernel,
};
use crate::cuda::plan::gemm::Shape;
use crate::cuda::planes::Blocks;
use crate::kv::f32_to_e4m3;
use crate::quant::quantize_row;
use crate::{DType, KvDtype, KvFormat};
use std::sync::Arc;
use std::time::Instant;

/// One operation's time.
#[derive(Clone, PartialEq, Debug)]
pub struct Timing {
    /// What was run, such as `gemm bf16 qkv m=2048 own`.
    pub name: String,
    /// Seconds of one launch: the median of several series.
    pub seconds: f64,
    /// Its operations, two per multiply-add; 0 for a copy.
    pub operations: f64,
    /// Bytes that it cannot avoid to move: weights and activations read, results written.
    pub bytes: f64,
}

/// What is timed together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    /// A copy within the device's memory: what is read and what is written counts.
    Copy,
    /// Products of many rows, bf16 and fp8 with factors per row and per block: our own, Hopper's experiment, cuBLASLt at its best for
    /// each shape, and what [`Products::measure`] chooses.
    Gemm,
    /// Products of few rows with weights as stored.
    Gemv,
    /// Attention of a long prompt and of decode steps, over pages.
    Attention,
}

/// Matrices of a layer: name, n, k.
const FULL: [(&str, usize, usize); 4] =
    [("qkv", 6144, 4096), ("out", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)];
/// One for the emulator.
const SMALL: [(&str, usize, usize); 1] = [("out", 48, 256)];

/// Times a subject; `report` hears of each operation as it is done, and what the deadline cuts off is left out.
///
/// # Errors
///
/// What the device refused. What an implementation does not offer is left out.
pub fn run(
    device: &Arc<dyn Device>,
    subject: Subject,
    effort: Effort,
    seed: u64,
    deadline: Option<Instant>,
    report: &mut dyn FnMut(Timing),
) -> Result<(), CudaError> {
    let mut clock = Clock { device, effort, deadline, draw: Draw::new(seed), report };
    match subject {
        Subject::Copy => clock.copy(),
        Subject::Gemm => clock.gemm(),
        Subject::Gemv => clock.gemv(),
        Subject::Attention => clock.attention(),
    }
}

struct Clock<'a> {
    device: &'a Arc<dyn Device>,
    effort: Effort,
    deadline: Option<Instant>,
    draw: Draw,
    report: &'a mut dyn FnMut(Timing),
}

impl Clock<'_> {
    fn full(&self) -> bool {
        self.effort == Effort::Full
    }

    fn late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() > deadline)
    }

    fn shapes(&self) -> &'static [(&'static str, usize, usize)] {
        if self.full() { &FULL } else { &SMALL }
    }

    /// Times a call, unless it is late.
    fn time(
        &mut self,
        name: String,
        (operations, bytes): (f64, f64),
        call: impl FnMut() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        if !self.late() {
            let seconds = median(self.device, self.full(), call)?;
            (self.report)(Timing { name, seconds, operations, bytes });
        }
        Ok(())
    }

    /// Random elements in memory, a pattern over and over: a device draws more power for them than for zeros.
    fn random(&mut self, dtype: DType, elements: usize) -> Result<Buffer, CudaError> {
        let mut pattern = Vec::new();
        // Whole blocks, and no power of two of them.
        quantize_row(dtype, &self.draw.vector(256 * 509), &mut pattern).expect("a type that can be written");
        let bytes = dtype.row_bytes(elements).expect("whole blocks");
        let buffer = Buffer::new(self.device, bytes)?;
        repeat(&buffer, &pattern)?;
        Ok(buffer)
    }

    /// A random matrix as products take it.
    fn random_matrix(&mut self, dtype: DType, n: usize, k: usize) -> Result<Buffer, CudaError> {
        let stored = self.random(dtype, n * k)?;
        let Some(blocks) = Blocks::of(dtype) else { return Ok(stored) };
        let planes = Buffer::new(self.device, blocks.device_bytes(n, k))?;
        // SAFETY: both buffers hold the whole matrix; freeing one waits for what uses it.
        unsafe { pack(&**self.device, blocks, (n, k), (0, n), stored.address(), planes.address())? };
        self.device.synchronize()?;
        Ok(planes)
    }

    fn random_fp8(&mut self, elements: usize) -> Result<Buffer, CudaError> {
        let pattern: Vec<u8> = self.draw.vector(256 * 509).into_iter().map(f32_to_e4m3).collect();
        let buffer = Buffer::new(self.device, elements)?;
        repeat(&buffer, &pattern)?;
        Ok(buffer)
    }

    fn copy(&mut self) -> Result<(), CudaError> {
        let bytes = if self.full() { 1 << 30 } else { 1 << 20 };
        let from = self.random(DType::F32, bytes / 4)?;
        let to = Buffer::new(self.device, bytes)?;
        let device = self.device.clone();
        self.time("copy".into(), (0.0, 2.0 * bytes as f64), || {
            // SAFETY: two buffers of this length.
            unsafe { device.copy(from.address(), to.address(), bytes) }
        })
    }

    fn gemm(&mut self) -> Result<(), CudaError> {
        let rows: &[usize] = if self.full() { &[512, 1024, 2048, 4096, 8192] } else { &[40] };
        let most = rows.iter().copied().max().unwrap_or(1);
        let columns = self.shapes().iter().map(|(_, n, k)| *n.max(k)).max().unwrap_or(1);
        let library = blas::open(self.device, columns);
        if let Err(error) = &library {
            tracing::warn!("products are not timed against cuBLASLt: {error}");
        }
        let (own, wgmma) = (Own(self.device.clone()), Wgmma(self.device.clone()));
        let mut all: Vec<&dyn Gemm> = vec![&own, &wgmma];
        if let Ok((blas, unscaled)) = &library {
            all.extend([blas as &dyn Gemm, unscaled]);
        }
        for &(what, n, k) in self.shapes() {
            if self.late() {
                break;
            }
            let (weights, x) = (self.random(DType::BF16, n * k)?, self.random(DType::BF16, most * k)?);
            let y = poisoned(self.device, DType::F32, most * n)?;
            let weight = Weight { dtype: DType::BF16, n, k, address: weights.address() };
            // SAFETY: the matrix is on the device.
            let products = unsafe { self.measured(&Matrix::Plain(weight, None), most)? };
            for &m in rows {
                let shape = Shape { m, n, k };
                let cost = (2.0 * (m * n * k) as f64, (2 * n * k + 2 * m * k + 4 * m * n) as f64);
                let (x, y) = (x.address(), y.address());
                let product = Product {
                    dtype: DType::BF16,
                    shape,
                    x,
                    w: weight.address,
                    up: None,
                    fp8: None,
                    bias: 0,
                    y,
                    finish: STORE_F32,
                    activation: 0,
                };
                let name = |by: &str| format!("gemm bf16 {what} m={m} {by}");
                // SAFETY: every operand has room for this many rows.
                unsafe { self.by_each(&all, &product, &name, cost)? };
                let operand = X { address: x, dtype: DType::BF16, rows: m };
                let finish = Finish::Store { bias: 0, to: DType::F32 };
                self.time(name("chosen"), cost, || {
                    // SAFETY: as above.
                    unsafe { products.matmul(Path::Gemm, operand, &weight, finish, y) }
                })?;
            }
            drop(weights);
            self.gemm_fp8((what, n, k), (&x, &y), rows, &all)?;
        }
        Ok(())
    }

    /// What would be chosen for a matrix on a machine with nothing kept.
    ///
    /// # Safety
    ///
    /// The matrix lies on the device.
    unsafe fn measured(&self, matrix: &Matrix, rows: usize) -> Result<Products, CudaError> {
        let mut products = Products::new(self.device, 0)?;
        // Without the library there is only our own kernel, which was said.
        let _ = products.add_library(&[*matrix]);
        // SAFETY: passed on.
        unsafe { products.measure(&[*matrix], rows.min(MEASURED_ROWS), None)? };
        Ok(products)
    }

    /// Times every implementation that takes a product and has a way to make it: NVIDIA's library at its own choice for this number of
    /// rows, which our engine does not let it make.
    ///
    /// # Safety
    ///
    /// The operands are as large as the shape says.
    unsafe fn by_each(
        &mut self,
        all: &[&dyn Gemm],
        product: &Product,
        name: &impl Fn(&str) -> String,
        cost: (f64, f64),
    ) -> Result<(), CudaError> {
        for implementation in all.iter().filter(|implementation| implementation.takes(product)) {
            // What a library lacks is left out.
            let Some(best) = implementation.variants(product).ok().and_then(|all| all.first().copied()) else {
                continue;
            };
            implementation.settle(product, best);
            // SAFETY: passed on.
            match self.time(name(implementation.name()), cost, || unsafe { implementation.multiply(product) }) {
                Err(error) if blas::refused(&error) => {
                    tracing::warn!("{} has nothing for {:?} after all: {error}", implementation.name(), product.shape);
                }
                timed => timed?,
            }
        }
        Ok(())
    }

    /// The same products in fp8, where the device has it: rounding the rows, and multiplying.
    fn gemm_fp8(
        &mut self,
        (what, n, k): (&str, usize, usize),
        (x, y): (&Buffer, &Buffer),
        rows: &[usize],
        all: &[&dyn Gemm],
    ) -> Result<(), CudaError> {
        if self.device.properties().sm < 89 {
            return Ok(());
        }
        let most = rows.iter().copied().max().unwrap_or(1);
        let factors = self.random(DType::F32, n.max(ScaledType::E4M3Blocks.factors(n, k)))?;
        let weights = self.random_fp8(n * k)?;
        let (codes, scales) = (self.random_fp8(most * k)?, self.random(DType::F32, most)?);
        let w = ScaledWeight { dtype: ScaledType::E4M3, n, k, address: weights.address(), scales: factors.address() };
        let blocks = ScaledWeight { dtype: ScaledType::E4M3Blocks, ..w };
        // SAFETY: the matrices are on the device, with as many factors as either has.
        let products = unsafe { [w, blocks].map(|w| self.measured(&Matrix::Scaled(w, None), most)) };
        let [by_row, by_block] = products;
        let (by_row, by_block) = (by_row?, by_block?);
        for &m in rows {
            let rows = X { address: x.address(), dtype: DType::BF16, rows: m };
            let to = Fp8Rows { address: codes.address(), scales: scales.address(), rows: m };
            let cost = (2.0 * (m * n * k) as f64, (n * k + m * k + 4 * m * n) as f64);
            let device = self.device.clone();
            self.time(format!("gemm fp8 {what} m={m} rounding"), (0.0, (3 * m * k) as f64), || {
                // SAFETY: every operand has room for this many rows.
                unsafe { scaled::quantize_rows(&*device, rows, k, &to) }
            })?;
            for (w, kind, products) in [(w, "fp8", &by_row), (blocks, "fp8_blocks", &by_block)] {
                // A mark is about factors per row; of blocks one number of rows must do.
                if kind == "fp8_blocks" && self.full() && m != MEASURED_ROWS {
                    continue;
                }
                let name = |by: &str| format!("gemm {kind} {what} m={m} {by}");
                let finish = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
                // SAFETY: as above.
                unsafe { self.by_each(all, &scaled::product(&to, &w, finish, y.address()), &name, cost)? };
                self.time(name("chosen"), cost, || {
                    // SAFETY: as above.
                    unsafe { products.fp8(&to, &w, finish, y.address()) }
                })?;
            }
        }
        Ok(())
    }

    fn gemv(&mut self) -> Result<(), CudaError> {
        let rows: &[usize] = if self.full() { &[1, 8, 32] } else { &[1] };
        for &(what, n, k) in self.shapes() {
            if self.late() {
                break;
            }
            for dtype in [DType::BF16, DType::Q8_0, DType::Q6K, DType::Q4K, DType::Q4_0, DType::MXFP4] {
                let weights = self.random_matrix(dtype, n, k)?;
                let weight = Weight { dtype, n, k, address: weights.address() };
                let (x, y) = (self.random(DType::BF16, 32 * k)?, poisoned(self.device, DType::F32, 32 * n)?);
                let products = Products::new(self.device, 0)?;
                for &m in rows {
                    let operand = X { address: x.address(), dtype: DType::BF16, rows: m };
                    let finish = Finish::Store { bias: 0, to: DType::F32 };
                    let bytes = (weights.bytes() + 2 * m * k + 4 * m * n) as f64;
                    let name = format!("gemv {} {what} m={m}", dtype.name());
                    self.time(name, (2.0 * (m * n * k) as f64, bytes), || {
                        // SAFETY: every operand has the size that its shape says.
                        unsafe { products.matmul(Path::Skinny, operand, &weight, finish, y.address()) }
                    })?;
                }
            }
            let (weights, factors) = (self.random_fp8(n * k)?, self.random(DType::F32, n)?);
            let (x, y) = (self.random(DType::BF16, 32 * k)?, poisoned(self.device, DType::F32, 32 * n)?);
            let w =
                ScaledWeight { dtype: ScaledType::E4M3, n, k, address: weights.address(), scales: factors.address() };
            let device = self.device.clone();
            for &m in rows {
                let operand = X { address: x.address(), dtype: DType::BF16, rows: m };
                let finish = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
                let bytes = (n * k + 2 * m * k + 4 * m * n) as f64;
                self.time(format!("gemv fp8 {what} m={m}"), (2.0 * (m * n * k) as f64, bytes), || {
                    // SAFETY: as above.
                    unsafe { scaled::skinny(&*device, operand, &w, finish, y.address()) }
                })?;
            }
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<(), CudaError> {
        let (heads, kv_heads, head_dim) = if self.full() { (32, 8, 128) } else { (4, 2, 64) };
        let format = KvFormat { dtype: KvDtype::BF16, kv_heads, head_dim, block_size: 16 };
        let stride = format.page_bytes();
        let (shared, sm) = (self.device.properties().shared_per_block as usize, self.device.properties().sm);
        let prompt = if self.full() { 8192 } else { 48 };
        let (batch, context) = if self.full() { (32, 4096) } else { (2, 40) };
        let blocks = prompt.max(batch * context) / 16 + batch;
        let memory = self.random(DType::BF16, blocks * stride / 2)?;
        let tables: Vec<u32> = (0..blocks as u32).collect();
        let tables = Buffer::of(self.device, &tables)?;
        let pages = Pages { format, base: memory.address(), block_stride: stride as u64 };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let layer = Layer { pages, tables: tables.address(), heads, scale };
        let rows = prompt.max(batch);
        let q = self.random(DType::BF16, rows * heads * head_dim)?;
        let out = poisoned(self.device, DType::BF16, rows * heads * head_dim)?;
        let (device, target) = (self.device.clone(), (DType::BF16, out.address()));

        let stable = prefill_kernel(&format, shared).chosen;
        let experimental = experimental_prefill_kernel(&format, shared, sm).chosen;
        let mut kernels = vec![stable];
        kernels.extend((experimental != stable).then_some(experimental));
        for kernel in kernels {
            let plan = Prefill::new(&[Span { first_row: 0, rows: prompt, start: 0, table: 0 }], None, kernel.tile());
            let (items, work) = (Buffer::of(self.device, &plan.items)?, Buffer::of(self.device, &plan.work)?);
            let lists = lists((&items, plan.items.len()), (&work, plan.work.len()));
            // Two products of `head_dim` for each query and each key that it sees.
            let pairs = prompt as f64 * (prompt as f64 + 1.0) / 2.0;
            let operations = 4.0 * (heads * head_dim) as f64 * pairs;
            let bytes = (2 * 2 * prompt * heads * head_dim + 2 * 2 * prompt * kv_heads * head_dim) as f64;
            let name = format!("attention prefill {prompt} {}", kernel_name(kernel));
            self.time(name, (operations, bytes), || {
                // SAFETY: the lists are of the plan, tables name pages of `memory`, and `q` and `out` have all rows.
                unsafe { attention::prefill(&*device, &layer, &lists, kernel, q.address(), target) }
            })?;
        }

        let each = context / 16 + 1;
        let span = |i: usize| Span { first_row: i, rows: 1, start: context, table: i * each };
        let spans: Vec<Span> = (0..batch).map(span).collect();
        let plan = Decode::new(&spans, None);
        let (items, work) = (Buffer::of(self.device, &plan.items)?, Buffer::of(self.device, &plan.work)?);
        let lists = lists((&items, plan.items.len()), (&work, plan.work.len()));
        let parts = Buffer::new(self.device, plan.workspace_bytes(heads, head_dim))?;
        let place = (parts.address(), plan.is_direct());
        let keys = (batch * (context + 1)) as f64;
        let cost = (4.0 * (heads * head_dim) as f64 * keys, 2.0 * 2.0 * keys * (kv_heads * head_dim) as f64);
        self.time(format!("attention decode b={batch} context={context}"), cost, || {
            // SAFETY: as above; the workspace is the plan's.
            unsafe { attention::decode(&*device, &layer, &lists, place, q.address(), target) }
        })
    }
}

fn lists((items, item_words): (&Buffer, usize), (work, work_words): (&Buffer, usize)) -> Lists {
    Lists {
        items: items.address(),
        item_count: item_words / ITEM_WORDS,
        work: work.address(),
        work_count: work_words / 2,
    }
}

fn kernel_name(kernel: PrefillKernel) -> &'static str {
    match kernel {
        PrefillKernel::Mma { .. } => "mma",
        PrefillKernel::Wgmma => "wgmma",
        PrefillKernel::Simt => "simt",
    }
}

/// Seconds of one call: the median of five series that take about 20 ms each, after one that warms; a single call where times mean
/// nothing.
fn median(
    device: &Arc<dyn Device>,
    full: bool,
    mut call: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    const SERIES_S: f64 = 0.02;
    let mut series = |count: usize| -> Result<f64, CudaError> {
        device.synchronize()?;
        let started = Instant::now();
        for _ in 0..count {
            call()?;
        }
        device.synchronize()?;
        Ok(started.elapsed().as_secs_f64() / count as f64)
    };
    let first = series(1)?;
    if !full {
        return Ok(first);
    }
    let about = series(3)?;
    let count = (SERIES_S / about.max(1e-7)).ceil().clamp(3.0, 1000.0) as usize;
    let mut all = (0..5).map(|_| series(count)).collect::<Result<Vec<f64>, _>>()?;
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::emulated::Emulated;

    #[test]
    fn every_subject_is_timed_where_times_mean_nothing() {
        let Ok(emulated) = Emulated::beside_the_program() else { return println!("skipped: no C++ compiler") };
        let ada = |p: &mut crate::cuda::Properties| p.sm = 89;
        let device: Arc<dyn Device> = Arc::new(emulated.with_properties(ada));
        for (subject, wanted) in [
            (Subject::Copy, &["copy"][..]),
            (
                Subject::Gemm,
                &[
                    "gemm bf16 out m=40 own",
                    "gemm bf16 out m=40 chosen",
                    "gemm fp8 out m=40 rounding",
                    "gemm fp8 out m=40 own",
                    "gemm fp8 out m=40 chosen",
                    "gemm fp8_blocks out m=40 own",
                    "gemm fp8_blocks out m=40 chosen",
                ],
            ),
            (Subject::Attention, &["attention prefill 48 mma", "attention decode b=2 context=40"]),
        ] {
            let mut names = Vec::new();
            run(&device, subject, Effort::Small, 4, None, &mut |timing| {
                assert!(timing.seconds > 0.0 && timing.bytes > 0.0, "{timing:?}");
                names.push(timing.name);
            })
            .expect("the device works");
            assert_eq!(names, wanted);
        }
        let mut names = Vec::new();
        run(&device, Subject::Gemv, Effort::Small, 4, None, &mut |timing| names.push(timing.name)).expect("it works");
        assert!(names.contains(&"gemv Q4_K out m=1".into()) && names.contains(&"gemv fp8 out m=1".into()), "{names:?}");
        // Late from the start: nothing is timed.
        let late = &mut |timing: Timing| panic!("{timing:?}");
        run(&device, Subject::Gemv, Effort::Small, 4, Some(Instant::now()), late).expect("it works");
        device.synchronize().expect("no kernel wrote where it should not");
    }
}
