//! Products in the emulator, in every order of threads, against the f64 reference.

use super::*;
use crate::cuda::ops::gemm::Operands;
use crate::cuda::ops::measure::Matrix as Measurable;
use crate::cuda::ops::pack::on_device;
use crate::cuda::ops::testing::{encode, in_every_order, on, poisoned, precision, read};
use crate::testing::Random;
use crate::{Matrix, dequantize_row, quantize_row, reference};

/// Operands on the host, as the kernels see them, and on the device.
struct Case {
    shape: Shape,
    /// Rounded to the compute type.
    x: Vec<f32>,
    /// Stored, of one matrix or two.
    weights: Vec<Vec<u8>>,
    dtype: DType,
    device: Arc<dyn Device>,
    products: Products,
    x_on: Buffer,
    weights_on: Vec<Buffer>,
}

fn rounded(dtype: DType, values: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    dequantize_row(dtype, &encode(dtype, values), &mut out);
    out
}

impl Case {
    fn new(device: &Arc<dyn Device>, random: &mut Random, dtype: DType, shape: Shape, matrices: usize) -> Self {
        let compute = compute_type(dtype);
        let x = rounded(compute, &random.vector(shape.m * shape.k));
        let weights: Vec<Vec<u8>> = (0..matrices)
            .map(|_| {
                let mut bytes = Vec::new();
                for _ in 0..shape.n {
                    quantize_row(dtype, &random.vector(shape.k), &mut bytes).unwrap();
                }
                bytes
            })
            .collect();
        let scratch = Products::scratch_bytes([(dtype, shape.n, shape.k)]);
        Self {
            products: Products::new(device, scratch).unwrap(),
            x_on: Buffer::of(device, &encode(compute, &x)).unwrap(),
            weights_on: weights.iter().map(|w| on_device(device, dtype, (shape.n, shape.k), w).unwrap()).collect(),
            device: device.clone(),
            shape,
            x,
            weights,
            dtype,
        }
    }

    fn x(&self) -> X {
        X { address: self.x_on.address(), dtype: compute_type(self.dtype), rows: self.shape.m }
    }

    fn weight(&self, i: usize) -> Weight {
        Weight { dtype: self.dtype, n: self.shape.n, k: self.shape.k, address: self.weights_on[i].address() }
    }

    /// The product with matrix `i`, and the sum of the magnitudes of its terms, which bounds what rounding can do.
    fn reference(&self, i: usize) -> (Vec<f32>, Vec<f32>) {
        let Shape { m, n, k } = self.shape;
        let matrix = Matrix::new(self.dtype, n, k, &self.weights[i]).unwrap();
        let mut product = vec![0.0; m * n];
        reference::matmul(&self.x, &matrix, None, &mut product);
        let mut plain = vec![0.0; n * k];
        for r in 0..n {
            dequantize_row(self.dtype, matrix.row(r), &mut plain[r * k..][..k]);
        }
        let plain: Vec<u8> = plain.iter().flat_map(|v| v.abs().to_le_bytes()).collect();
        let magnitudes: Vec<f32> = self.x.iter().map(|v| v.abs()).collect();
        let mut bound = vec![0.0; m * n];
        let matrix = Matrix::new(DType::F32, n, k, &plain).unwrap();
        reference::matmul(&magnitudes, &matrix, None, &mut bound);
        (product, bound)
    }

    /// What a path may lose, of the sum of magnitudes: f32 sums, and bf16 copies of quantised weights.
    fn loss(&self, path: Path) -> f32 {
        if path == Path::Gemm && self.dtype.block_len() > 1 { 1.0 / 512.0 } else { 3e-6 }
    }

    /// `matmul` into poisoned memory, or over `y` if the finish adds.
    fn run(&self, path: Path, finish: Finish, y: Option<&[f32]>) -> Vec<f32> {
        let to = match finish {
            Finish::Store { to, .. } => to,
            Finish::Add { .. } => DType::F32,
        };
        let out = y.map_or_else(|| poisoned(&self.device, to, self.shape.m * self.shape.n), |y| on(&self.device, y));
        // SAFETY: every buffer has the size of the shape.
        unsafe { self.products.matmul(path, self.x(), &self.weight(0), finish, out.address()).unwrap() };
        self.device.synchronize().unwrap();
        read(&out, to)
    }

    fn gated(&self, path: Path, activation: Gate, to: DType) -> Vec<f32> {
        let out = poisoned(&self.device, to, self.shape.m * self.shape.n);
        let (gate, up) = (self.weight(0), self.weight(1));
        // SAFETY: every buffer has the size of the shape.
        unsafe { self.products.gated(path, self.x(), &gate, &up, activation, to, out.address()).unwrap() };
        self.device.synchronize().unwrap();
        read(&out, to)
    }
}

/// Asserts that every element is within what rounding explains.
#[track_caller]
fn assert_explained(got: &[f32], want: &[f32], bound: &[f32], loss: f32, to: DType, what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, ((got, want), bound)) in got.iter().zip(want).zip(bound).enumerate() {
        let allowed = loss * bound + precision(to) * want.abs() + 1e-6;
        assert!((got - want).abs() <= allowed, "{what}: element {i} is {got}, expected {want} within {allowed:e}");
    }
}

/// Stores, adds and gates of one random shape on one path.
fn check(device: &Arc<dyn Device>, random: &mut Random, dtype: DType, path: Path, shape: Shape) {
    let what = format!("{} {path:?} {shape:?}", dtype.name());
    let case = Case::new(device, random, dtype, shape, 2);
    let (product, bound) = case.reference(0);
    let loss = case.loss(path);
    let bias = random.vector(shape.n);
    let bias_on = on(device, &bias);
    let biased: Vec<f32> = product.iter().enumerate().map(|(i, v)| v + bias[i % shape.n]).collect();
    let compute = compute_type(dtype);

    let stored = case.run(path, Finish::Store { bias: 0, to: DType::F32 }, None);
    assert_explained(&stored, &product, &bound, loss, DType::F32, &what);
    let narrow = case.run(path, Finish::Store { bias: bias_on.address(), to: compute }, None);
    assert_explained(&narrow, &biased, &bound, loss, compute, &format!("{what}, bias, narrow"));
    let residual = random.vector(shape.m * shape.n);
    let added = case.run(path, Finish::Add { bias: bias_on.address() }, Some(&residual));
    let sums: Vec<f32> = biased.iter().zip(&residual).map(|(a, b)| a + b).collect();
    assert_explained(&added, &sums, &bound, loss, DType::F32, &format!("{what}, bias, added"));

    let (up, up_bound) = case.reference(1);
    for (activation, to) in [(Gate::Silu, compute), (Gate::GeluTanh, DType::F32)] {
        let mut want = product.clone();
        match activation {
            Gate::Silu => reference::silu_mul(&mut want, &up),
            Gate::GeluTanh => reference::gelu_tanh_mul(&mut want, &up),
        }
        // Neither activation is steeper than 1.13 or larger than its argument.
        let both =
            |i: usize| 1.13 * (bound[i] * up[i].abs() + up_bound[i] * product[i].abs()) + loss * bound[i] * up_bound[i];
        let bounds: Vec<f32> = (0..want.len()).map(both).collect();
        let got = case.gated(path, activation, to);
        assert_explained(&got, &want, &bounds, loss, to, &format!("{what}, {activation:?}"));
    }
}

#[test]
fn dequantised_weights_are_those_of_the_reference() {
    in_every_order(|device, _| {
        let mut random = Random::new(21);
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.block_len() > 1) {
            // Not always whole steps.
            let (n, k) = (random.within(1, 4), dtype.block_len().max(64) * random.within(1, 9));
            let elements = n * k;
            let mut bytes = Vec::new();
            quantize_row(dtype, &random.vector(elements), &mut bytes).unwrap();
            // Any bits are a block, but those whose scale is an infinity or NaN: an encoder does not use them all.
            let block = dtype.block_bytes();
            for (i, byte) in bytes.iter_mut().enumerate() {
                let scale_at: &[usize] = match dtype {
                    DType::Q2K => &[80, 81, 82, 83],
                    DType::Q3K => &[108, 109],
                    DType::Q6K => &[208, 209],
                    DType::MXFP4 => &[0],
                    _ => &[0, 1, 2, 3],
                };
                if i / block % 2 == 1 && !scale_at.contains(&(i % block)) {
                    *byte = random.bits() as u8;
                }
            }
            let mut want = vec![0.0; elements];
            dequantize_row(dtype, &bytes, &mut want);
            let from = on_device(device, dtype, (n, k), &bytes).unwrap();
            for to in [DType::F32, DType::BF16] {
                let out = poisoned(device, to, elements);
                // SAFETY: both buffers have the size of the elements.
                unsafe { dequantize(&**device, dtype, (n, k), from.address(), to, out.address()).unwrap() };
                let got = read(&out, to);
                crate::testing::assert_same(&got, &rounded(to, &want), dtype.name());
            }
        }
    });
}

#[test]
fn many_rows_are_multiplied() {
    in_every_order(|device, _| {
        let mut random = Random::new(31);
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for _ in 0..2 {
                let shape = Shape { m: random.within(1, 150), n: random.within(1, 150), k: 8 * random.within(1, 40) };
                check(device, &mut random, dtype, Path::Gemm, shape);
            }
            // Not whole numbers of 16 bytes.
            check(device, &mut random, dtype, Path::Gemm, Shape { m: 9, n: 70, k: 35 });
        }
        let shape = Shape { m: random.within(1, 70), n: random.within(1, 70), k: 256 };
        for dtype in [DType::Q4_0, DType::Q6K] {
            check(device, &mut random, dtype, Path::Gemm, shape);
        }
    });
}

#[test]
fn few_rows_are_multiplied_with_every_type() {
    in_every_order(|device, _| {
        let mut random = Random::new(41);
        for dtype in DType::ALL {
            let unit = dtype.block_len().max(8);
            let most = 1200 / unit;
            for rows in [(1, 8), (9, 32), (33, 64)] {
                let shape = Shape {
                    m: random.within(rows.0, rows.1),
                    n: random.within(1, 70),
                    k: unit * random.within(1, most),
                };
                check(device, &mut random, dtype, Path::Skinny, shape);
            }
        }
        // Two groups of rows, and rows that are not whole numbers of 16 bytes.
        check(device, &mut random, DType::Q8_0, Path::Skinny, Shape { m: 70, n: 33, k: 64 });
        check(device, &mut random, DType::BF16, Path::Skinny, Shape { m: 11, n: 20, k: 77 });
    });
}

/// Row `row` of a case, alone or behind others, is the same to the bit.
#[test]
fn a_rows_product_is_the_same_in_any_company() {
    in_every_order(|device, _| {
        let mut random = Random::new(61);
        for (path, dtype, shape) in [
            (Path::Gemm, DType::BF16, Shape { m: 140, n: 72, k: 200 }),
            (Path::Gemm, DType::F32, Shape { m: 70, n: 10, k: 50 }),
            (Path::Gemm, DType::Q5_1, Shape { m: 66, n: 20, k: 96 }),
            (Path::Skinny, DType::F16, Shape { m: 64, n: 40, k: 1480 }),
            (Path::Skinny, DType::F32, Shape { m: 64, n: 40, k: 100 }),
            (Path::Skinny, DType::Q4K, Shape { m: 40, n: 35, k: 1024 }),
            (Path::Skinny, DType::MXFP4, Shape { m: 70, n: 33, k: 416 }),
        ] {
            let case = Case::new(device, &mut random, dtype, shape, 2);
            let finish = Finish::Store { bias: 0, to: DType::F32 };
            let (whole, gated) = (case.run(path, finish, None), case.gated(path, Gate::Silu, DType::F32));
            for _ in 0..3 {
                let first = random.within(0, shape.m - 1);
                let rows = random.within(1, shape.m - first);
                let x_row = shape.k * compute_type(dtype).block_bytes();
                // Addresses of x are multiples of 16, so the rows are copied to a buffer of their own.
                let bytes = case.x_on.to_vec::<u8>(case.x_on.bytes()).unwrap();
                let part = Case {
                    shape: Shape { m: rows, ..shape },
                    x: Vec::new(),
                    weights: Vec::new(),
                    dtype,
                    device: device.clone(),
                    products: Products::new(device, Products::scratch_bytes([(dtype, shape.n, shape.k)])).unwrap(),
                    x_on: Buffer::of(device, &bytes[first * x_row..][..rows * x_row]).unwrap(),
                    weights_on: case
                        .weights
                        .iter()
                        .map(|w| on_device(device, dtype, (shape.n, shape.k), w).unwrap())
                        .collect(),
                };
                let what = format!("{} {path:?} rows {first} and {rows} on of {shape:?}", dtype.name());
                let here = first * shape.n..(first + rows) * shape.n;
                crate::testing::assert_same(&part.run(path, finish, None), &whole[here.clone()], &what);
                crate::testing::assert_same(&part.gated(path, Gate::Silu, DType::F32), &gated[here], &what);
            }
        }
    });
}

/// Measured implementations are used where they were measured; the experimental one where the device can.
#[test]
fn implementations_are_chosen() {
    let Ok(emulated) = crate::cuda::emulated::Emulated::beside_the_program() else {
        return println!("skipped: no C++ compiler");
    };
    let hopper = |p: &mut crate::cuda::Properties| (p.sm, p.shared_per_block, p.multiprocessors) = (90, 227 << 10, 2);
    let device: Arc<dyn Device> = Arc::new(emulated.with_properties(hopper));
    let mut random = Random::new(91);
    let mut case = Case::new(&device, &mut random, DType::BF16, Shape { m: 4, n: 24, k: 64 }, 1);
    case.products = Products::new(&device, 0).unwrap().experimental();
    let (want, bound) = case.reference(0);
    let finish = Finish::Store { bias: 0, to: DType::F32 };
    let experimental = case.run(Path::Gemm, finish, None);
    assert_explained(&experimental, &want, &bound, 3e-6, DType::F32, "experimental");
    let matrices = [Measurable::Plain(case.weight(0), None)];
    // SAFETY: the weight is on the device.
    let times = unsafe { case.products.measure(&matrices, 4, None).unwrap() };
    let mut names: Vec<&str> = times.iter().map(|measured| measured.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["own", "wgmma"]);
    let key = Key { operands: Operands::Plain(DType::BF16), n: 24, k: 64, gated: false };
    assert!(matches!(case.products.fastest[&key], Way::Whole(_)), "{times:?}");
    assert_explained(&case.run(Path::Gemm, finish, None), &want, &bound, 3e-6, DType::F32, "measured");
}
