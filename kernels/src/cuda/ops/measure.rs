//! Which implementation multiplies by which matrix, found out by measurement: our own kernels, and NVIDIA's library where it is.
//!
//! A choice is made once per matrix, by its type and shape (n, k) and by whether it is gated, when a model is loaded; how many rows
//! a product has never enters. So products stay batch-invariant if each implementation is: our own kernels are by the order of
//! their sums, and any other is taken only if it shows it here, with random rows that are multiplied alone, in front of others and
//! behind them, and must come out the same to the bit. What was found is kept in a file, so that the next start need not measure and
//! every process on this device chooses the same.
//!
//! Read [`Products::measure`] and [`Measured`].

use super::blas::{Blas, WORKSPACE_BYTES};
use super::gemm::{Plain, STORE_F32, STORE_NARROW, Variant};
use super::matmul::{Call, HALVES_ROWS, Products, Weight, X, compute_type};
use crate::DType;
use crate::cuda::check::Draw;
use crate::cuda::compile::keep;
use crate::cuda::device::{Buffer, CudaError, Device, Properties};
use crate::cuda::source::{HEADERS, SOURCES};
use crate::quant::quantize_row;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Numbers of rows of which a product must be part of the largest one, to the bit: one, a part of a tile, about a tile, several.
const PROBES: [usize; 5] = [1, 17, 64, 129, 500];
/// Rows that stand in front of the probe in a second try: rows begin at multiples of 16 bytes whatever k is.
const PROBE_BEHIND: usize = 24;
/// Key of the random rows.
const SEED: u64 = 5;

/// What a choice is made for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// Type of both operands when they are multiplied.
    pub dtype: DType,
    /// Rows of the matrix: outputs.
    pub n: usize,
    /// Its columns: inputs.
    pub k: usize,
    /// Whether there is a second matrix beside it.
    pub gated: bool,
}

impl Key {
    pub(super) fn of(p: &Plain) -> Self {
        Self { dtype: p.dtype, n: p.shape.n, k: p.shape.k, gated: p.up.is_some() }
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

/// A matrix whose products are to be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Matrix {
    /// The matrix.
    pub weight: Weight,
    /// The second one of a gated product.
    pub up: Option<Weight>,
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
    /// It does not work.
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
        let Key { dtype, n, k, gated } = self.key;
        let gated = if gated { " gated" } else { "" };
        let micros = self.time.as_secs_f64() * 1e6;
        write!(f, "{} n={n} k={k}{gated} by {}: {micros:.1} us, {:?}", dtype.name(), self.name, self.verdict)
    }
}

/// A choice as the file has it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Choice {
    key: Key,
    name: String,
    halves: bool,
    variant: Variant,
}

impl Products {
    /// Bytes that measured products need for good, besides [`Products::scratch_bytes`], where gates have at most `n` outputs.
    pub const fn measured_bytes(n: usize) -> usize {
        WORKSPACE_BYTES + 2 * 4 * HALVES_ROWS * n
    }

    /// Measures every implementation for each of these matrices, with `rows` random rows and parts of them, and settles on the
    /// fastest of those whose rows do not depend on their company. `folder` keeps what was found; what it has is taken. Takes
    /// memory for the operands meanwhile. Returns what was measured: nothing if the file had it.
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
        let version = match Blas::open(&self.device) {
            Ok(blas) => {
                let version = blas.version();
                self.implementations.push(Box::new(blas));
                version
            }
            Err(error) => {
                tracing::info!("products are not measured against cuBLASLt: {error}");
                0
            }
        };
        let gates = matrices.iter().filter(|matrix| matrix.up.is_some()).map(|matrix| matrix.weight.n).max();
        if let (Some(n), true) = (gates, self.implementations.len() > 1) {
            self.halves = Some(Buffer::new(&self.device, 2 * 4 * HALVES_ROWS * n)?);
        }
        let names: Vec<&str> = self.implementations.iter().map(|known| known.name()).collect();
        let file = folder.map(|folder| folder.join(file_name(self.device.properties(), (&names, version), rows)));
        let known = file.as_deref().map(read).unwrap_or_default();
        let mut measured = Vec::new();
        let mut choices: Vec<Choice> = Vec::new();
        for matrix in matrices {
            let key = Key {
                dtype: compute_type(matrix.weight.dtype),
                n: matrix.weight.n,
                k: matrix.weight.k,
                gated: matrix.up.is_some(),
            };
            if self.fastest.contains_key(&key) {
                continue;
            }
            let choice = match known.iter().find(|choice| choice.key == key && self.recall(choice)) {
                Some(choice) => choice.clone(),
                None => {
                    // SAFETY: passed on.
                    let (choice, all) = unsafe { self.choose(matrix, key, rows)? };
                    all.iter().for_each(|measured| tracing::info!("{measured}"));
                    measured.extend(all);
                    choice
                }
            };
            choices.push(choice);
        }
        if let (Some(file), false) = (file, measured.is_empty()) {
            // Another process may have measured meanwhile, and found something else: all of a device should choose the same.
            let known = read(&file);
            for choice in &mut choices {
                if let Some(theirs) = known.iter().find(|theirs| theirs.key == choice.key && self.recall(theirs)) {
                    *choice = theirs.clone();
                }
            }
            let others = known.iter().filter(|known| choices.iter().all(|choice| choice.key != known.key));
            let lines: String = choices.iter().chain(others).map(|choice| line(choice) + "\n").collect();
            if let Err(error) = keep(&file, lines.as_bytes()) {
                tracing::warn!("measured products are not kept: {}: {error}", file.display());
            }
        }
        Ok(measured)
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
        self.implementations[index].settle(&Plain { finish, up, ..nothing(key, 1) }, variant);
        self.fastest.insert(key, if halves { Way::Halves(index) } else { Way::Whole(index) });
    }

    /// # Safety
    ///
    /// The matrix lies on this device.
    unsafe fn choose(&mut self, matrix: &Matrix, key: Key, rows: usize) -> Result<(Choice, Vec<Measured>), CudaError> {
        // SAFETY: passed on.
        let bench = unsafe { Bench::new(self, matrix, key, rows)? };
        let mut tried: Vec<(Choice, Measured)> = Vec::new();
        for index in 0..self.implementations.len() {
            let halves = key.gated && !self.implementations[index].takes(&bench.product);
            let asked = if halves { Plain { up: None, finish: STORE_F32, ..bench.product } } else { bench.product };
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
        // The fastest first; of those that work, the first whose rows keep their bits.
        tried.sort_by_key(|(_, measured)| measured.time);
        let mut chosen = None;
        for (at, (choice, measured)) in tried.iter_mut().enumerate() {
            if chosen.is_some() || measured.verdict != Verdict::Slower || !self.recall(choice) {
                continue;
            }
            // SAFETY: as above.
            match unsafe { bench.varies(self, self.fastest[&key]) } {
                Ok(None) => {
                    measured.verdict = Verdict::Chosen;
                    chosen = Some(at);
                }
                Ok(Some(rows)) => measured.verdict = Verdict::Varies { rows },
                Err(error) => measured.verdict = Verdict::Failed(error.to_string()),
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
fn nothing(key: Key, m: usize) -> Plain {
    let shape = crate::cuda::plan::gemm::Shape { m, n: key.n, k: key.k };
    Plain { dtype: key.dtype, shape, x: 0, w: 0, up: None, bias: 0, y: 0, finish: STORE_F32, activation: 0 }
}

/// Operands of the products that are timed and compared.
struct Bench {
    device: Arc<dyn Device>,
    product: Plain,
    /// Bytes of a row of x, and of y.
    row_bytes: (usize, usize),
    _x: Buffer,
    y: Buffer,
    part: Buffer,
}

impl Bench {
    /// # Safety
    ///
    /// The matrix lies on this device.
    unsafe fn new(products: &Products, matrix: &Matrix, key: Key, rows: usize) -> Result<Self, CudaError> {
        let device = products.device.clone();
        let each = key.dtype.block_bytes();
        // A gated product goes on in the compute type, others in f32.
        let (code, y_each) = if key.gated { (STORE_NARROW, each) } else { (STORE_F32, 4) };
        let x = random(&device, key.dtype, rows * key.k)?;
        let (y, part) = (Buffer::new(&device, rows * key.n * y_each)?, Buffer::new(&device, rows * key.n * y_each)?);
        let operand = X { address: x.address(), dtype: key.dtype, rows };
        let (w, up) = (&matrix.weight, matrix.up.as_ref());
        let call = Call { x: operand, w, up, code, bias: 0, activation: 0, y: y.address() };
        // SAFETY: the operands were allocated for the shape, and the matrix is the caller's promise.
        let product = unsafe { products.plain(&call)? };
        Ok(Self { device, product, row_bytes: (key.k * each, key.n * y_each), _x: x, y, part })
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

    /// The number of rows whose product differs from what it is in the whole, if there is one.
    ///
    /// # Safety
    ///
    /// As [`Bench::time`].
    unsafe fn varies(&self, products: &Products, way: Way) -> Result<Option<usize>, CudaError> {
        let (x_row, y_row) = self.row_bytes;
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
            let shape = crate::cuda::plan::gemm::Shape { m: rows, ..self.product.shape };
            let x = self.product.x + (first * x_row) as u64;
            let part = Plain { shape, x, y: self.part.address(), ..self.product };
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
fn random(device: &Arc<dyn Device>, dtype: DType, elements: usize) -> Result<Buffer, CudaError> {
    // No multiple of a power of two, so that rows differ.
    const PERIOD: usize = 65_521 * 8;
    let mut bytes = Vec::new();
    quantize_row(dtype, &Draw::new(SEED).vector(PERIOD.min(elements)), &mut bytes)
        .expect("a plain type can be written");
    let buffer = Buffer::new(device, elements * dtype.block_bytes())?;
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

/// By everything that a choice depends on: the device, what there is to choose from, the library's version, our kernels, and how many
/// rows were measured.
fn file_name(device: &Properties, (names, version): (&[&str], usize), rows: usize) -> PathBuf {
    let mut hash = blake3::Hasher::new();
    let numbers = [device.sm as usize, device.multiprocessors as usize, version, rows].map(|n| n.to_string());
    let sources = SOURCES.iter().chain(HEADERS).map(|source| source.text());
    let parts = std::iter::once(device.name.as_str()).chain(names.iter().copied());
    for part in parts.chain(numbers.iter().map(String::as_str)) {
        hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    sources.for_each(|text| {
        hash.update(text.as_bytes());
    });
    format!("products-sm_{}-{}.txt", device.sm, &hash.finalize().to_hex()[..16]).into()
}

/// `bf16 4096 14336 plain cublasLt whole` and the eight words of the variant.
fn line(choice: &Choice) -> String {
    let Choice { key: Key { dtype, n, k, gated }, name, halves, variant } = choice;
    let (gated, halves) = (if *gated { "gated" } else { "plain" }, if *halves { "halves" } else { "whole" });
    let words: Vec<String> = variant.0.iter().map(|word| format!("{word:x}")).collect();
    format!("{} {n} {k} {gated} {name} {halves} {}", dtype.name(), words.join(" "))
}

/// The choices of a file; a line that is none is left out, and no file is none.
fn read(path: &Path) -> Vec<Choice> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Choice> {
    let words: Vec<&str> = line.split(' ').collect();
    let [dtype, n, k, gated, name, halves, rest @ ..] = words.as_slice() else { return None };
    let dtype = [DType::F32, DType::F16, DType::BF16].into_iter().find(|known| known.name() == *dtype)?;
    let one_of = |word: &str, [no, yes]: [&str; 2]| match word {
        _ if word == no => Some(false),
        _ if word == yes => Some(true),
        _ => None,
    };
    let key = Key { dtype, n: n.parse().ok()?, k: k.parse().ok()?, gated: one_of(gated, ["plain", "gated"])? };
    let variant: Vec<u64> = rest.iter().map(|word| u64::from_str_radix(word, 16).ok()).collect::<Option<_>>()?;
    let halves = one_of(halves, ["whole", "halves"])?;
    Some(Choice { key, name: (*name).into(), halves, variant: Variant(variant.try_into().ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::emulated::Emulated;
    use crate::cuda::ops::gemm::Gemm;
    use crate::cuda::ops::matmul::{Finish, Path as Kernels};
    use crate::cuda::ops::testing::{encode, poisoned, read as values};
    use crate::testing::{Random, assert_same};
    use std::sync::Mutex;

    /// Stands for a library: our own kernel with two settings, the second of which sums otherwise in small products. It
    /// takes no time at all, as far as anybody who asks first is told.
    #[derive(Debug)]
    struct Library {
        own: super::super::gemm::Own,
        varying: Variant,
        settled: Mutex<Variant>,
    }

    impl Gemm for Library {
        fn name(&self) -> &'static str {
            "library"
        }

        fn takes(&self, p: &Plain) -> bool {
            p.up.is_none() && p.bias == 0
        }

        fn variants(&self, _: &Plain) -> Result<Vec<Variant>, CudaError> {
            Ok(vec![self.varying, Variant([7; 8])])
        }

        fn settle(&self, _: &Plain, variant: Variant) {
            *self.settled.lock().unwrap() = variant;
        }

        unsafe fn multiply(&self, p: &Plain) -> Result<(), CudaError> {
            let varies = *self.settled.lock().unwrap() == self.varying && p.shape.m < 20;
            // Another row's product is a result that depends on the company.
            let x = if varies { p.x + (p.shape.k * p.dtype.block_bytes()) as u64 } else { p.x };
            // SAFETY: passed on; the bench has more rows than 20.
            unsafe { self.own.multiply(&Plain { x, ..*p }) }
        }
    }

    struct Case {
        device: Arc<dyn Device>,
        x: Buffer,
        weights: [Buffer; 2],
        n: usize,
        k: usize,
    }

    impl Case {
        fn new(device: &Arc<dyn Device>, n: usize, k: usize) -> Self {
            let mut random = Random::new(17);
            let mut of = |rows: usize| Buffer::of(device, &encode(DType::BF16, &random.vector(rows * k))).unwrap();
            Self { device: device.clone(), x: of(40), weights: [of(n), of(n)], n, k }
        }

        fn matrix(&self, gated: bool) -> Matrix {
            let weight =
                |i: usize| Weight { dtype: DType::BF16, n: self.n, k: self.k, address: self.weights[i].address() };
            Matrix { weight: weight(0), up: gated.then(|| weight(1)) }
        }

        fn products(&self, library: bool) -> Products {
            let mut products = Products::new(&self.device, 0).unwrap();
            if library {
                let own = super::super::gemm::Own(self.device.clone());
                let library = Library { own, varying: Variant([3; 8]), settled: Mutex::default() };
                products.implementations.push(Box::new(library));
            }
            products
        }

        fn gated(&self, products: &Products, rows: usize) -> Vec<f32> {
            let y = poisoned(&self.device, DType::BF16, rows * self.n);
            let x = X { address: self.x.address(), dtype: DType::BF16, rows };
            let Matrix { weight, up: Some(up) } = self.matrix(true) else { panic!("gated") };
            let silu = crate::Gate::Silu;
            // SAFETY: the buffers have these rows.
            unsafe { products.gated(Kernels::Gemm, x, &weight, &up, silu, DType::BF16, y.address()).unwrap() };
            values(&y, DType::BF16)
        }

        fn stored(&self, products: &Products, rows: usize) -> Vec<f32> {
            let y = poisoned(&self.device, DType::F32, rows * self.n);
            let x = X { address: self.x.address(), dtype: DType::BF16, rows };
            let finish = Finish::Store { bias: 0, to: DType::F32 };
            // SAFETY: the buffers have these rows.
            unsafe {
                products.matmul(Kernels::Gemm, x, &self.matrix(false).weight, finish, y.address()).unwrap();
            }
            values(&y, DType::F32)
        }
    }

    #[test]
    fn cuda_measured_products_keep_their_bits_and_are_remembered() {
        let Some(emulated) = Emulated::for_tests() else { return };
        let device: Arc<dyn Device> = emulated;
        let case = Case::new(&device, 24, 64);
        let folder = std::env::temp_dir().join(format!("ridge-measure-{}", std::process::id()));
        let matrices = [case.matrix(false), case.matrix(true)];
        let mut products = case.products(true);
        // SAFETY: the matrices are on the device.
        let all = unsafe { products.measure(&matrices, 32, Some(&folder)).unwrap() };
        assert_eq!(all.len(), 6, "{all:?}");
        for gated in [false, true] {
            let of: Vec<&Measured> = all.iter().filter(|m| m.key.gated == gated).collect();
            assert_eq!(of.iter().filter(|m| m.verdict == Verdict::Chosen).count(), 1, "{of:?}");
            // Whatever the times were, what varies is never chosen: with it settled, few rows would differ from the whole.
            let way = products.fastest[&of[0].key];
            assert!(matches!((gated, way), (_, Way::Whole(0)) | (false, Way::Whole(1)) | (true, Way::Halves(1))));
        }
        let whole = case.stored(&products, 40);
        assert_same(&case.stored(&products, 3), &whole[..3 * 24], "rows in front");
        let whole = case.gated(&products, 40);
        assert_same(&case.gated(&products, 3), &whole[..3 * 24], "gated rows in front");

        let mut again = case.products(true);
        // SAFETY: as above.
        assert_eq!(unsafe { again.measure(&matrices, 32, Some(&folder)).unwrap() }, []);
        assert_eq!(again.fastest, products.fastest);
        // Another number of rows is another file; so is no file at all.
        // SAFETY: as above.
        assert!(!unsafe { case.products(false).measure(&matrices, 16, None).unwrap() }.is_empty());
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn cuda_what_varies_is_found_out() {
        let Some(emulated) = Emulated::for_tests() else { return };
        let device: Arc<dyn Device> = emulated;
        let case = Case::new(&device, 24, 64);
        let mut products = case.products(true);
        for gated in [false, true] {
            let matrix = case.matrix(gated);
            products.halves = Some(Buffer::new(&device, 8 * HALVES_ROWS * 24).unwrap());
            let key = Key { dtype: DType::BF16, n: 24, k: 64, gated };
            // SAFETY: the matrix is on the device.
            let bench = unsafe { Bench::new(&products, &matrix, key, 48).unwrap() };
            for (variant, varies) in [([3; 8], Some(1)), ([7; 8], None)] {
                products.settle(key, 1, gated, Variant(variant));
                // SAFETY: as above.
                assert_eq!(unsafe { bench.varies(&products, products.fastest[&key]).unwrap() }, varies, "{gated}");
            }
        }
    }

    /// Two halves are the fused product, and chunks of their rows join.
    #[test]
    fn cuda_halves_make_the_whole() {
        let Some(emulated) = Emulated::for_tests() else { return };
        let device: Arc<dyn Device> = emulated;
        let case = Case::new(&device, 40, 32);
        let mut products = case.products(true);
        let fused = case.gated(&products, 40);
        products.halves = Some(Buffer::new(&device, 8 * HALVES_ROWS * 40).unwrap());
        products.settle(Key { dtype: DType::BF16, n: 40, k: 32, gated: true }, 1, true, Variant([7; 8]));
        assert_same(&case.gated(&products, 40), &fused, "halves");
    }

    #[test]
    fn choices_are_written_and_read() {
        let key = Key { dtype: DType::BF16, n: 4096, k: 14336, gated: false };
        let choice =
            Choice { key, name: "cublasLt".into(), halves: false, variant: Variant([0, 1, 2, 3, 4, 5, 6, 255]) };
        assert_eq!(line(&choice), "BF16 4096 14336 plain cublasLt whole 0 1 2 3 4 5 6 ff");
        assert_eq!(parse(&line(&choice)), Some(choice.clone()));
        let gated = Choice { key: Key { gated: true, ..key }, halves: true, ..choice };
        assert_eq!(parse(&line(&gated)), Some(gated));
        for bad in [
            "",
            "BF16 1 2 plain own whole",
            "Q4_K 1 2 plain own whole 0 0 0 0 0 0 0 0",
            "BF16 x 2 plain own whole 0 0 0 0 0 0 0 0",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
