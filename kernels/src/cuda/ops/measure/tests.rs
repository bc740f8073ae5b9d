//! The choice between implementations, on the emulated device, with a stand-in for the library.

use super::*;
use crate::cuda::emulated::Emulated;
use crate::cuda::ops::gemm::{Gemm, Own};
use crate::cuda::ops::matmul::Path as Kernels;
use crate::cuda::ops::testing::{encode, on, poisoned, read as values};
use crate::testing::{Random, assert_same};
use std::sync::Mutex;

/// Sums otherwise in small products.
const VARYING: Variant = Variant([3; 8]);
/// Gives rows the results of others.
const WRONG: Variant = Variant([9; 8]);
const RIGHT: Variant = Variant([7; 8]);
const EVERY: [Operands; 3] = [Operands::Plain(DType::BF16), Operands::Fp8, Operands::Fp8Blocks];
/// Of the bench.
const ROWS: usize = 32;

/// Stands for a library: our own kernel with three settings, only one of which is of use.
#[derive(Debug)]
struct Library {
    own: Own,
    settled: Mutex<Variant>,
}

impl Gemm for Library {
    fn name(&self) -> &'static str {
        "library"
    }

    fn takes(&self, p: &Product) -> bool {
        p.up.is_none() && p.bias == 0
    }

    fn variants(&self, _: &Product) -> Result<Vec<Variant>, CudaError> {
        Ok(vec![VARYING, WRONG, RIGHT])
    }

    fn settle(&self, _: &Product, variant: Variant) {
        *self.settled.lock().unwrap() = variant;
    }

    unsafe fn multiply(&self, p: &Product) -> Result<(), CudaError> {
        let p = match *self.settled.lock().unwrap() {
            // Another row's product is a result that depends on the company; there are more rows than 20.
            VARYING if p.shape.m < 20 => Product { y: p.y, ..p.of_rows(1, p.shape.m) },
            WRONG if p.shape.m > 1 => Product { y: p.y, ..p.of_rows(1, p.shape.m - 1) },
            _ => *p,
        };
        // SAFETY: passed on.
        unsafe { self.own.multiply(&p) }
    }
}

/// Two matrices and 40 rows for them.
struct Case {
    device: Arc<dyn Device>,
    operands: Operands,
    x: Buffer,
    scales: Buffer,
    weights: [Buffer; 2],
    factors: [Buffer; 2],
    n: usize,
    k: usize,
}

impl Case {
    fn new(device: &Arc<dyn Device>, operands: Operands, n: usize, k: usize) -> Self {
        let mut random = Random::new(17);
        let mut matrix = |rows: usize| match operands {
            Operands::Plain(dtype) => Buffer::of(device, &encode(dtype, &random.vector(rows * k))).unwrap(),
            // Without NaN, and no larger than 15.
            _ => Buffer::of(device, &(0..rows * k).map(|_| random.bits() as u8 & 0xd7).collect::<Vec<_>>()).unwrap(),
        };
        let (x, weights) = (matrix(40), [matrix(n), matrix(n)]);
        let mut factors = |count| on(device, &(0..count).map(|_| 0.1 + random.normal().abs()).collect::<Vec<_>>());
        let (scales, factors) = (factors(40), [factors(n), factors(n)]);
        Self { device: device.clone(), operands, x, scales, weights, factors, n, k }
    }

    fn plain(&self, i: usize) -> Weight {
        Weight { dtype: DType::BF16, n: self.n, k: self.k, address: self.weights[i].address() }
    }

    fn scaled(&self, i: usize) -> ScaledWeight {
        let dtype = if self.operands == Operands::Fp8 { ScaledType::E4M3 } else { ScaledType::E4M3Blocks };
        let (address, scales) = (self.weights[i].address(), self.factors[i].address());
        ScaledWeight { dtype, n: self.n, k: self.k, address, scales }
    }

    fn matrix(&self, gated: bool) -> Matrix {
        match self.operands {
            Operands::Plain(_) => Matrix::Plain(self.plain(0), gated.then(|| self.plain(1))),
            _ => Matrix::Scaled(self.scaled(0), gated.then(|| self.scaled(1))),
        }
    }

    fn products(&self, library: bool) -> Products {
        let mut products = Products::new(&self.device, 0).unwrap();
        if library {
            let library = Library { own: Own(self.device.clone()), settled: Mutex::new(RIGHT) };
            products.implementations.push(Box::new(library));
            products.halves = Some(Arc::new(Buffer::new(&self.device, 8 * ROWS * self.n).unwrap()));
        }
        products
    }

    /// The first rows of the product, gated or not.
    fn compute(&self, products: &Products, gated: bool, rows: usize) -> Vec<f32> {
        let to = if gated { DType::BF16 } else { DType::F32 };
        let y = poisoned(&self.device, to, rows * self.n);
        let store = Finish::Store { bias: 0, to };
        let silu = Gate::Silu;
        // SAFETY: the buffers have these rows.
        unsafe {
            if let Operands::Plain(dtype) = self.operands {
                let (x, w) = (X { address: self.x.address(), dtype, rows }, self.plain(0));
                match gated {
                    true => products.gated(Kernels::Gemm, x, &w, &self.plain(1), silu, to, y.address()),
                    false => products.matmul(Kernels::Gemm, x, &w, store, y.address()),
                }
            } else {
                let x = Fp8Rows { address: self.x.address(), scales: self.scales.address(), rows };
                let up = self.scaled(1);
                let finish = match gated {
                    true => ScaledFinish::Gated { up: &up, activation: silu, to },
                    false => ScaledFinish::Plain(store),
                };
                products.fp8(&x, &self.scaled(0), finish, y.address())
            }
            .unwrap();
        }
        values(&y, to)
    }
}

/// The device with fp8, if there can be one.
fn device() -> Option<Arc<dyn Device>> {
    let Ok(emulated) = Emulated::beside_the_program() else {
        println!("skipped: no C++ compiler");
        return None;
    };
    Some(Arc::new(emulated.with_properties(|p| p.sm = 89)))
}

fn folder(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("ridge-measure-{name}-{}", std::process::id()))
}

#[test]
fn cuda_measured_products_keep_their_bits_and_are_remembered() {
    let Some(device) = device() else { return };
    let folder = folder("kept");
    for operands in EVERY {
        let case = Case::new(&device, operands, 24, 64);
        let matrices = [case.matrix(false), case.matrix(true)];
        let mut products = case.products(true);
        // SAFETY: the matrices are on the device.
        let all = unsafe { products.measure(&matrices, ROWS, Some(&folder)).unwrap() };
        assert_eq!(all.len(), 8, "{all:?}");
        for gated in [false, true] {
            let of: Vec<&Measured> = all.iter().filter(|m| m.key.gated == gated).collect();
            assert_eq!(of.iter().filter(|m| m.verdict == Verdict::Chosen).count(), 1, "{of:?}");
            assert!(of.iter().all(|m| m.key.operands == operands), "{of:?}");
            // Whatever the times were, what varies is never chosen: with it settled, few rows would differ from the whole.
            let way = products.fastest[&of[0].key];
            assert!(matches!((gated, way), (_, Way::Whole(0)) | (false, Way::Whole(1)) | (true, Way::Halves(1))));
            let whole = case.compute(&products, gated, 40);
            assert_same(&case.compute(&products, gated, 3), &whole[..3 * 24], "rows in front");
        }
        let mut again = case.products(true);
        // SAFETY: as above.
        assert_eq!(unsafe { again.measure(&matrices, ROWS, Some(&folder)).unwrap() }, []);
        assert_eq!(again.fastest, products.fastest);
        // Another number of rows is another file; so is no file at all; and one implementation is no choice.
        // SAFETY: as above.
        unsafe {
            assert!(!case.products(true).measure(&matrices, 16, None).unwrap().is_empty());
            assert!(case.products(false).measure(&matrices, ROWS, None).unwrap().is_empty());
        }
    }
    device.synchronize().unwrap();
    std::fs::remove_dir_all(folder).unwrap();
}

/// What varies and what computes something else is found out, and the rest passes.
#[test]
fn cuda_what_is_no_good_is_found_out() {
    let Some(device) = device() else { return };
    for operands in EVERY {
        let case = Case::new(&device, operands, 24, 64);
        let mut products = case.products(true);
        for gated in [false, true] {
            let matrix = case.matrix(gated);
            // SAFETY: the matrix is on the device.
            let bench = unsafe { Bench::new(&products, &matrix, 64).unwrap() };
            let mut judge = |variant| {
                products.settle(matrix.key(), 1, gated, variant);
                // SAFETY: as above.
                unsafe { bench.judge(&products, products.fastest[&matrix.key()]) }
            };
            assert_eq!(judge(VARYING), Verdict::Varies { rows: 1 });
            assert!(matches!(judge(WRONG), Verdict::Failed(why) if why.contains("it differs by")));
            assert_eq!(judge(RIGHT), Verdict::Chosen);
        }
    }
}

/// Two halves are the fused product, and chunks of their rows join.
#[test]
fn cuda_halves_make_the_whole() {
    let Some(device) = device() else { return };
    for operands in EVERY {
        let case = Case::new(&device, operands, 40, 32);
        let mut products = case.products(true);
        let fused = case.compute(&products, true, 40);
        products.settle(case.matrix(true).key(), 1, true, RIGHT);
        assert_same(&case.compute(&products, true, 40), &fused, "halves");
    }
}

/// Of processes that start together one measures, and the others do as it found. Threads stand for processes: a lock is a handle's.
#[test]
fn cuda_who_starts_together_measures_once() {
    let Some(device) = device() else { return };
    let folder = folder("together");
    let case = Case::new(&device, Operands::Fp8, 24, 64);
    let matrices = [case.matrix(false), case.matrix(true)];
    let start = || {
        let mut products = case.products(true);
        // SAFETY: the matrices are on the device.
        let measured = unsafe { products.measure(&matrices, ROWS, Some(&folder)).unwrap() };
        (measured.len(), products.fastest)
    };
    let found = std::thread::scope(|scope| [(); 3].map(|()| scope.spawn(start)).map(|thread| thread.join().unwrap()));
    let mut counts = found.each_ref().map(|(measured, _)| *measured);
    counts.sort_unstable();
    assert_eq!(counts, [0, 0, 8]);
    assert!(found.iter().all(|(_, fastest)| *fastest == found[0].1 && fastest.len() == 2), "{found:?}");
    std::fs::remove_dir_all(folder).unwrap();
}

/// Without a place that others can read there is no choice: another process might choose otherwise.
#[test]
fn cuda_what_cannot_be_shared_is_not_settled() {
    let Some(device) = device() else { return };
    let file = folder("no-folder");
    std::fs::write(&file, b"a file where a folder should be").unwrap();
    let case = Case::new(&device, Operands::Fp8, 24, 64);
    let mut products = case.products(true);
    // SAFETY: the matrix is on the device.
    assert_eq!(unsafe { products.measure(&[case.matrix(false)], ROWS, Some(&file)).unwrap() }, []);
    assert!(products.fastest.is_empty());
    std::fs::remove_file(file).unwrap();

    // Nor without room for the operands, of which there are more here than the device has bytes.
    let folder = folder("no-room");
    let small = Emulated::beside_the_program().unwrap().with_properties(|p| (p.sm, p.memory_bytes) = (89, 200_000));
    let case = Case::new(&(Arc::new(small) as Arc<dyn Device>), Operands::Fp8, 24, 64);
    let mut products = case.products(true);
    // SAFETY: as above.
    assert_eq!(unsafe { products.measure(&[case.matrix(false)], 4096, Some(&folder)).unwrap() }, []);
    assert!(products.fastest.is_empty());
    std::fs::remove_dir_all(folder).unwrap();
}

/// When the time is used up, what is left gets our own kernel, and is written down as if it had been measured.
#[test]
fn cuda_measuring_ends() {
    let Some(device) = device() else { return };
    let case = Case::new(&device, Operands::Fp8Blocks, 24, 64);
    let mut products = case.products(true);
    // SAFETY: the matrices are on the device.
    let (choices, measured) =
        unsafe { products.choose_all(&[case.matrix(false), case.matrix(true)], &[], (ROWS, Instant::now())).unwrap() };
    assert!(choices.iter().all(|choice| choice.name == "own"), "{choices:?}");
    assert_eq!((choices.len(), measured.len()), (2, 2));
}
