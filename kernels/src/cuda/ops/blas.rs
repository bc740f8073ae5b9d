//! cuBLASLt as implementations of [`Gemm`], without bias or gate: [`Blas`] leaves everything to the library, [`BlasUnscaled`] applies
//! the factors of fp8 rows itself where the library has no way to. No device has run this.
//!
//! Left to itself the library chooses among its kernels by the number of rows too, and they sum in different orders. Here a matrix gets
//! one kernel, chosen at [`REFERENCE_ROWS`] rows and kept for every other number. NVIDIA does not promise that one kernel gives a
//! row the same bits in any company; so it is used only where [`super::matmul::Products::measure`] has seen that it does.

mod library;

pub use library::is_present;

use super::gemm::{Factors, Gemm, Operands, Product, STORE_F32, Variant};
use super::matmul::PART_ROWS;
use crate::DType;
use crate::cuda::device::{Arg, Buffer, CudaError, Device, Kernel, Launch};
use crate::cuda::lock;
use crate::cuda::plan::gemm::Shape;
use crate::cuda::plan::gemv::SCALED_BLOCK;
use library::{Library, Scaling, WORKSPACE_BYTES};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Rows for which a kernel is asked for: a usual chunk of prompts.
const REFERENCE_ROWS: usize = 2048;
/// Rows of products with factors per block are multiples of this.
const FOUR: usize = 4;

/// The two implementations, for matrices of up to `columns` rows or columns.
///
/// # Errors
///
/// [`CudaError::Unavailable`] if the library is not on this machine or the device is not CUDA's.
pub fn open(device: &Arc<dyn Device>, columns: usize) -> Result<(Blas, BlasUnscaled), CudaError> {
    let library = Arc::new(Library::open(device)?);
    let padding = Padding::new(device, columns)?;
    let sums = Arc::new(Buffer::new(device, sums_bytes(columns))?);
    let blas = Blas { library: library.clone(), kernels: Kernels::default(), padding };
    Ok((blas, BlasUnscaled { library, kernels: Kernels::default(), sums }))
}

/// Whether an error is the library's word that it cannot make a product, which may come as late as when it is asked for one.
pub fn refused(error: &CudaError) -> bool {
    matches!(error, CudaError::Call { call, .. } if *call == library::MULTIPLY)
}

/// Bytes that [`open`] takes for good.
pub const fn bytes(columns: usize) -> usize {
    WORKSPACE_BYTES + Padding::bytes(columns) + sums_bytes(columns)
}

/// Two results of some rows, for the halves of a gated product.
const fn sums_bytes(columns: usize) -> usize {
    2 * 4 * PART_ROWS * columns
}

/// The kernel of each matrix: by its operands, the type of results, n and k; not the rows.
#[derive(Debug, Default)]
struct Kernels(Mutex<HashMap<(Operands, DType, usize, usize), Variant>>);

impl Kernels {
    fn settle(&self, p: &Product, variant: Variant) {
        lock(&self.0).insert((p.operands(), p.result(), p.shape.n, p.shape.k), variant);
    }

    /// What was settled, or the first of the library's suggestions for [`REFERENCE_ROWS`].
    fn of(
        &self,
        p: &Product,
        suggestions: impl FnOnce(&Product) -> Result<Vec<Variant>, CudaError>,
    ) -> Result<Variant, CudaError> {
        let settled = lock(&self.0).get(&(p.operands(), p.result(), p.shape.n, p.shape.k)).copied();
        if let Some(kernel) = settled {
            return Ok(kernel);
        }
        let reference = Product { shape: Shape { m: REFERENCE_ROWS, ..p.shape }, ..*p };
        let first = suggestions(&reference)?.first().copied();
        let kernel = first.ok_or_else(|| CudaError::Unavailable(format!("no kernel for {:?}", p.shape)))?;
        self.settle(p, kernel);
        Ok(kernel)
    }
}

/// The library, factors and all: those of fp8 rows from CUDA 12.9 on, on compute capability 9.0. Elsewhere it has no variants of them.
#[derive(Debug)]
pub struct Blas {
    library: Arc<Library>,
    kernels: Kernels,
    padding: Padding,
}

impl Blas {
    /// The library's version, such as 120605.
    pub fn version(&self) -> usize {
        self.library.version()
    }
}

impl Gemm for Blas {
    fn name(&self) -> &'static str {
        "cublasLt"
    }

    fn takes(&self, p: &Product) -> bool {
        expressible(p)
    }

    fn variants(&self, p: &Product) -> Result<Vec<Variant>, CudaError> {
        // Multiples of four are what it will be asked for.
        let m = p.shape.m.next_multiple_of(if scaling(p) == Scaling::Blocks { FOUR } else { 1 });
        self.library.suggestions(&Product { shape: Shape { m, ..p.shape }, ..*p }, scaling(p))
    }

    fn settle(&self, p: &Product, variant: Variant) {
        self.kernels.settle(p, variant);
    }

    unsafe fn multiply(&self, p: &Product) -> Result<(), CudaError> {
        let scaling = scaling(p);
        let kernel = self.kernels.of(p, |reference| self.library.suggestions(reference, scaling))?;
        // SAFETY: passed on; the padding makes factors and rows as the library has them.
        unsafe {
            match scaling {
                Scaling::Blocks => {
                    self.padding.apply(&*self.library.device, p, &|p| self.library.compute(p, scaling, kernel))
                }
                Scaling::None | Scaling::Rows => self.library.compute(p, scaling, kernel),
            }
        }
    }
}

/// The library's products of fp8 rows in f32 without their factors, which a kernel of ours applies: for libraries and devices that
/// know only one factor per matrix.
#[derive(Debug)]
pub struct BlasUnscaled {
    library: Arc<Library>,
    kernels: Kernels,
    sums: Arc<Buffer>,
}

impl BlasUnscaled {
    /// Its memory, which others may use between products: two results of [`PART_ROWS`] rows.
    pub fn sums(&self) -> Arc<Buffer> {
        self.sums.clone()
    }
}

impl Gemm for BlasUnscaled {
    fn name(&self) -> &'static str {
        "cublasLt-unscaled"
    }

    fn takes(&self, p: &Product) -> bool {
        p.operands() == Operands::Fp8 && expressible(&Product { bias: 0, ..*p })
    }

    fn variants(&self, p: &Product) -> Result<Vec<Variant>, CudaError> {
        self.library.suggestions(&Product { finish: STORE_F32, ..*p }, Scaling::None)
    }

    fn settle(&self, p: &Product, variant: Variant) {
        self.kernels.settle(&Product { finish: STORE_F32, ..*p }, variant);
    }

    unsafe fn multiply(&self, p: &Product) -> Result<(), CudaError> {
        let alone = |p: &Product| {
            let kernel = self.kernels.of(p, |reference| self.library.suggestions(reference, Scaling::None))?;
            // SAFETY: passed on.
            unsafe { self.library.compute(p, Scaling::None, kernel) }
        };
        // SAFETY: passed on.
        unsafe { scaled_after(&*self.library.device, &self.sums, p, &alone) }
    }
}

/// What the library can express: f32 is left to the exact kernel; biases and gates to the fused ones. Rows of fp8 and of their
/// results are whole numbers of 16 elements, and of four blocks where these have factors.
fn expressible(p: &Product) -> bool {
    let Shape { n, k, .. } = p.shape;
    let shape = match p.operands() {
        Operands::Plain(dtype) => dtype != DType::F32 && k.is_multiple_of(8),
        Operands::Fp8 => n.is_multiple_of(16) && k.is_multiple_of(16),
        Operands::Fp8Blocks => {
            n.is_multiple_of(16) && k.is_multiple_of(16) && k.div_ceil(SCALED_BLOCK).is_multiple_of(4)
        }
    };
    shape && p.up.is_none() && p.bias == 0
}

fn scaling(p: &Product) -> Scaling {
    match p.operands() {
        Operands::Plain(_) => Scaling::None,
        Operands::Fp8 => Scaling::Rows,
        Operands::Fp8Blocks => Scaling::Blocks,
    }
}

/// A product of fp8 rows by `multiply`, which leaves factors out and stores f32: in place if y is f32, else through `sums`, some rows
/// at a time.
///
/// # Safety
///
/// As [`Gemm::multiply`]; `multiply` computes what it is given.
unsafe fn scaled_after(
    device: &dyn Device,
    sums: &Buffer,
    p: &Product,
    multiply: &dyn Fn(&Product) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    let Some(factors) = p.fp8 else { return Err(CudaError::Unavailable("a product without factors".into())) };
    let Shape { m, n, .. } = p.shape;
    let in_place = p.finish == STORE_F32;
    let most = if in_place { m.max(1) } else { PART_ROWS };
    for first in (0..m).step_by(most) {
        let part = p.of_rows(first, most.min(m - first));
        let rows = part.shape.m;
        let y = if in_place { part.y } else { sums.at(0, 4 * rows * n) };
        multiply(&Product { bias: 0, finish: STORE_F32, y, ..part })?;
        let launch = Launch { grid: [rows as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 };
        let of_rows = factors.x + 4 * first as u64;
        let mut args = [y, of_rows, factors.w, p.bias, part.y].map(Arg::Ptr).to_vec();
        args.extend([n as u32, p.finish].map(Arg::U32));
        // SAFETY: the operands are the caller's promise, or were just computed; a block per row, and the kernel's parameters.
        unsafe { device.launch(Kernel { source: "gemm_fp8.cu", name: "scale_product" }, &launch, &args)? };
    }
    Ok(())
}

/// Memory in which rows of fp8 become what the library takes where matrices have a factor per block: a multiple of four of them, with a
/// factor for each 128 columns.
#[derive(Debug)]
struct Padding {
    /// `[⌈columns / 128⌉, PART_ROWS]`.
    factors: Buffer,
    /// Four rows of x, their factors, and their results.
    x: Buffer,
    x_factors: Buffer,
    y: Buffer,
}

impl Padding {
    /// For matrices of up to `columns` rows or columns.
    fn new(device: &Arc<dyn Device>, columns: usize) -> Result<Self, CudaError> {
        Ok(Self {
            factors: Buffer::new(device, 4 * PART_ROWS * columns.div_ceil(SCALED_BLOCK))?,
            x: Buffer::new(device, FOUR * columns)?,
            x_factors: Buffer::new(device, 4 * FOUR)?,
            y: Buffer::new(device, 4 * FOUR * columns)?,
        })
    }

    /// Bytes of it.
    const fn bytes(columns: usize) -> usize {
        4 * PART_ROWS * columns.div_ceil(SCALED_BLOCK) + FOUR * columns + 4 * FOUR + 4 * FOUR * columns
    }

    /// A product by `multiply`, which gets parts of it: at most [`PART_ROWS`] rows, a multiple of four of them. What lies in the rows
    /// that are added is random, and so are their results, which nobody reads.
    ///
    /// # Safety
    ///
    /// As [`Gemm::multiply`]; `multiply` computes what it is given.
    unsafe fn apply(
        &self,
        device: &dyn Device,
        p: &Product,
        multiply: &dyn Fn(&Product) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let Some(factors) = p.fp8 else { return Err(CudaError::Unavailable("a product without factors".into())) };
        let units = p.shape.k.div_ceil(SCALED_BLOCK);
        let part = |part: &Product, of_rows: u64| {
            let rows = part.shape.m;
            let x = self.factors.at(0, 4 * rows * units);
            let launch =
                Launch { grid: [rows.div_ceil(256) as u32, units as u32, 1], block: [256, 1, 1], shared_bytes: 0 };
            let args = [Arg::Ptr(of_rows), Arg::Ptr(x), Arg::U32(rows as u32)];
            // SAFETY: as many factors as rows, and room for them times the blocks; the kernel's parameters.
            unsafe { device.launch(Kernel { source: "gemm_fp8.cu", name: "repeat_scales" }, &launch, &args)? };
            multiply(&Product { fp8: Some(Factors { x, ..factors }), ..*part })
        };
        let whole = p.shape.m / FOUR * FOUR;
        for first in (0..whole).step_by(PART_ROWS) {
            part(&p.of_rows(first, PART_ROWS.min(whole - first)), factors.x + 4 * first as u64)?;
        }
        let rest = p.of_rows(whole, p.shape.m - whole);
        if rest.shape.m == 0 {
            return Ok(());
        }
        let ((x_row, y_row), rows) = (p.row_bytes(), rest.shape.m);
        let (x, y) = (self.x.at(0, FOUR * x_row), self.y.at(0, FOUR * y_row));
        // SAFETY: the rows are the caller's promise, and the buffers have room for four; y is read by a product that adds to it.
        unsafe {
            device.copy(rest.x, x, rows * x_row)?;
            device.copy(factors.x + 4 * whole as u64, self.x_factors.address(), 4 * rows)?;
            device.copy(rest.y, y, rows * y_row)?;
            part(&Product { shape: Shape { m: FOUR, ..p.shape }, x, y, ..rest }, self.x_factors.address())?;
            device.copy(y, rest.y, rows * y_row)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::emulated::Emulated;
    use crate::cuda::ops::gemm::{ADD_F32, Own, STORE_NARROW};
    use crate::cuda::ops::testing::{encode, on, read};
    use crate::testing::{Random, assert_close, assert_same};

    const SHAPE: Shape = Shape { m: 71, n: 48, k: 64 };

    fn plain(shape: Shape) -> Product {
        let (dtype, up, fp8) = (DType::BF16, None, None);
        Product { dtype, shape, x: 0, w: 0, up, fp8, bias: 0, y: 0, finish: 0, activation: 0 }
    }

    #[test]
    fn cuda_blas_refusals_are_told_from_failures() {
        let call = |call| CudaError::Call { call, reason: "CUBLAS_STATUS_NOT_SUPPORTED".into() };
        assert!(refused(&call("cublasLtMatmul")));
        assert!(!refused(&call("cuStreamSynchronize")) && !refused(&CudaError::Unavailable(String::new())));
    }

    #[test]
    fn cuda_blas_is_given_what_it_can_express() {
        let p = plain(Shape { m: 1, n: 16, k: 64 });
        let fp8 = |by_block| Some(Factors { x: 0, w: 0, up: 0, by_block });
        let shape = |n, k| Shape { m: 1, n, k };
        let taken = [
            p,
            Product { shape: shape(1, 8), ..p },
            Product { fp8: fp8(false), ..p },
            Product { fp8: fp8(true), shape: shape(16, 4096), ..p },
            Product { fp8: fp8(true), shape: shape(16, 400), ..p },
        ];
        assert!(taken.iter().all(expressible), "{taken:?}");
        assert_eq!(taken.map(|p| scaling(&p))[1..4], [Scaling::None, Scaling::Rows, Scaling::Blocks]);
        for refused in [
            Product { dtype: DType::F32, ..p },
            Product { up: Some(0), ..p },
            Product { bias: 16, ..p },
            Product { shape: shape(1, 60), ..p },
            Product { fp8: fp8(false), shape: shape(24, 64), ..p },
            Product { fp8: fp8(false), shape: shape(16, 24), ..p },
            Product { fp8: fp8(false), bias: 16, ..p },
            // Five blocks in a row: the library's rows of factors are multiples of four.
            Product { fp8: fp8(true), shape: shape(16, 640), ..p },
        ] {
            assert!(!expressible(&refused), "{refused:?}");
        }
    }

    /// Random operands on a device with fp8, and outputs of every finish.
    struct Case {
        device: Arc<dyn Device>,
        buffers: [Buffer; 5],
        by_block: bool,
        random: Random,
    }

    impl Case {
        fn new(by_block: bool) -> Option<Self> {
            let Ok(emulated) = Emulated::beside_the_program() else {
                println!("skipped: no C++ compiler");
                return None;
            };
            let device: Arc<dyn Device> = Arc::new(emulated.with_properties(|p| p.sm = 89));
            let mut random = Random::new(91);
            let Shape { m, n, k } = SHAPE;
            // Without NaN, and no larger than 15.
            let mut codes = |count: usize| -> Vec<u8> { (0..count).map(|_| random.bits() as u8 & 0xd7).collect() };
            let (x, w) = (Buffer::of(&device, &codes(m * k)).unwrap(), Buffer::of(&device, &codes(n * k)).unwrap());
            let mut factors = |count: usize| -> Vec<f32> { (0..count).map(|_| 0.5 + random.normal().abs()).collect() };
            let [of_x, of_w, bias] =
                [factors(m), factors(if by_block { 1 } else { n }), factors(n)].map(|f| on(&device, &f));
            Some(Self { device, buffers: [x, w, of_x, of_w, bias], by_block, random })
        }

        /// The product with this finish, and what y holds before.
        fn product(&mut self, finish: u32, bias: bool) -> (Product, Buffer, Vec<f32>) {
            let before = self.random.vector(SHAPE.m * SHAPE.n);
            let dtype = if finish == STORE_NARROW { DType::BF16 } else { DType::F32 };
            let y = Buffer::of(&self.device, &encode(dtype, &before)).unwrap();
            let [x, w, of_x, of_w, at] = self.buffers.each_ref().map(Buffer::address);
            let factors = Factors { x: of_x, w: of_w, up: 0, by_block: self.by_block };
            let bias = if bias { at } else { 0 };
            let p = Product { x, w, fp8: Some(factors), bias, y: y.address(), finish, ..plain(SHAPE) };
            (p, y, before)
        }
    }

    /// The factors applied by the kernel for it make what the fused product makes, in place and through memory, with everything that
    /// may follow.
    #[test]
    fn cuda_factors_are_applied_to_sums() {
        let Some(mut case) = Case::new(false) else { return };
        let ones = on(&case.device, &[1.0; 71]);
        let sums = Buffer::new(&case.device, 4 * PART_ROWS * SHAPE.n).unwrap();
        let own = Own(case.device.clone());
        for (finish, bias) in [(STORE_F32, false), (STORE_F32, true), (ADD_F32, true), (STORE_NARROW, true)] {
            let (p, y, before) = case.product(finish, bias);
            let parts = Mutex::new(Vec::new());
            // Stands for the library: our own kernel with factors that are all one.
            let multiply = |p: &Product| {
                assert_eq!((p.finish, p.bias), (STORE_F32, 0));
                lock(&parts).push(p.shape.m);
                let fp8 = Some(Factors { x: ones.address(), w: ones.address(), up: 0, by_block: false });
                // SAFETY: passed on; there are 71 ones.
                unsafe { own.multiply(&Product { fp8, ..*p }) }
            };
            // SAFETY: the buffers have the sizes of the shape.
            unsafe { scaled_after(&*case.device, &sums, &p, &multiply).unwrap() };
            let wanted: &[usize] = if finish == STORE_F32 { &[71] } else { &[32, 32, 7] };
            assert_eq!(*lock(&parts), wanted);
            let got = read(&y, p.result());
            y.upload(0, &encode(p.result(), &before)).unwrap();
            // SAFETY: as above.
            unsafe { own.multiply(&p).unwrap() };
            case.device.synchronize().unwrap();
            let relative = if finish == STORE_NARROW { 8e-3 } else { 1e-5 };
            assert_close(&got, &read(&y, p.result()), relative, 1e-2, &format!("finish {finish}, bias {bias}"));
        }
    }

    /// Rows come in fours, and get their results wherever they were.
    #[test]
    fn cuda_rows_are_padded_for_blocks() {
        let Some(mut case) = Case::new(true) else { return };
        let padding = Padding::new(&case.device, 64).unwrap();
        let own = Own(case.device.clone());
        for (finish, m) in [(STORE_F32, 71), (ADD_F32, 70), (STORE_NARROW, 3), (STORE_F32, 32), (ADD_F32, 1)] {
            let (p, y, before) = case.product(finish, false);
            let p = p.of_rows(71 - m, m);
            // Stands for the library: it has a factor for each row and block of columns, of which there is one.
            let multiply = |p: &Product| {
                assert!(p.shape.m.is_multiple_of(FOUR) && p.shape.m <= PART_ROWS, "{:?}", p.shape);
                // SAFETY: passed on.
                unsafe { own.multiply(p) }
            };
            // SAFETY: the buffers have the sizes of the shape.
            unsafe { padding.apply(&*case.device, &p, &multiply).unwrap() };
            let got = read(&y, p.result());
            y.upload(0, &encode(p.result(), &before)).unwrap();
            // SAFETY: as above.
            unsafe { own.multiply(&p).unwrap() };
            case.device.synchronize().unwrap();
            assert_same(&got, &read(&y, p.result()), &format!("finish {finish}, {m} rows"));
        }
    }
}
