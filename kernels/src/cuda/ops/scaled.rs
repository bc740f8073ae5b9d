//! Products with fp8 and fp4 weights that have f32 factors: read as they are for few rows, by bf16 rows of x; and for
//! many rows fp8 by fp8 on tensor cores (compute capability 8.9 and later), with rows of x rounded to fp8 first.
//!
//! fp8 weights are Hugging Face's (`compressed-tensors`, `fp8`) with a factor per row, or per block of 128 rows and columns; fp4
//! weights are those of `nvfp4-pack-quantized`. Batch invariance is that of [`super::matmul`]; a row's fp8 scale comes from that row alone.
//!
//! fp4 weights (`NVFP4`'s values, with an e4m3 scale for each 16) lie in planes ([`crate::cuda::planes`]). A tensor-wide factor goes
//! into the factors of the rows.

use super::gemm::{Factors, Product};
use super::matmul::{Finish, X, activation_code, code};
use crate::cuda::device::{Arg, CudaError, Device, Kernel, Launch};
use crate::cuda::plan::gemm::Shape;
use crate::cuda::plan::gemv;
pub use crate::cuda::plan::gemv::{SCALED_BLOCK, ScaledType};
use crate::{DType, Gate};

/// A weight `[n, k]` on the device: row-major, or in planes if it is fp4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScaledWeight {
    /// How elements are stored.
    pub dtype: ScaledType,
    /// Rows: outputs.
    pub n: usize,
    /// Columns: inputs.
    pub k: usize,
    /// Where it is; a multiple of 16.
    pub address: u64,
    /// f32, [`ScaledType::factors`] of them: what each row or block is multiplied by.
    pub scales: u64,
}

/// What becomes of the product with a [`ScaledWeight`], and perhaps with a second one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScaledFinish<'a> {
    /// As for other weights; narrow results are bf16.
    Plain(Finish),
    /// `act(x·wᵀ) * (x·upᵀ)`, stored as F32 or BF16.
    Gated {
        /// The second matrix, of the same type and shape.
        up: &'a ScaledWeight,
        /// What is done to the first product.
        activation: Gate,
        /// Type of y.
        to: DType,
    },
}

impl ScaledFinish<'_> {
    /// Code, address of the bias, the second matrix and the activation.
    fn parts(&self, w: &ScaledWeight) -> (u32, u64, Option<&ScaledWeight>, u32) {
        match self {
            Self::Plain(finish) => {
                let (code, bias) = code(DType::BF16, *finish);
                (code, bias, None, 0)
            }
            Self::Gated { up, activation, to } => {
                assert_eq!((up.dtype, up.n, up.k), (w.dtype, w.n, w.k), "the two weights of a gate are alike");
                let (code, _) = code(DType::BF16, Finish::Store { bias: 0, to: *to });
                (code, 0, Some(*up), activation_code(*activation))
            }
        }
    }
}

/// `y = finish(x · wᵀ)` for at most 64 rows of bf16 x.
///
/// # Safety
///
/// The operands lie on this device and are as large as their shapes say, y too; y overlaps none of them.
///
/// # Panics
///
/// If x is not bf16 or has no row or more than 64, or k is not whole units of the type.
pub unsafe fn skinny(
    device: &dyn Device,
    x: X,
    w: &ScaledWeight,
    finish: ScaledFinish<'_>,
    y: u64,
) -> Result<(), CudaError> {
    assert_eq!(x.dtype, DType::BF16, "rows of x for scaled weights");
    let (code, bias, up, activation) = finish.parts(w);
    let plan = gemv::plan_scaled(w.dtype, Shape { m: x.rows, n: w.n, k: w.k }, up.is_some());
    let second = up.unwrap_or(w);
    let args = [
        Arg::Ptr(x.address),
        Arg::Ptr(w.address),
        Arg::Ptr(second.address),
        Arg::Ptr(bias),
        Arg::Ptr(y),
        Arg::U32(x.rows as u32),
        Arg::U32(w.n as u32),
        Arg::U32(w.k as u32),
        Arg::U32(code),
        Arg::U32(u32::from(up.is_some())),
        Arg::U32(activation),
        Arg::Ptr(w.scales),
        Arg::Ptr(second.scales),
    ];
    // SAFETY: passed on; these are the parameters of the kernels of `gemv_scaled.cu`.
    unsafe { device.launch(plan.kernel, &plan.launch, &args) }
}

/// Rows of x in fp8: `[rows, k]` bytes, and f32 `[rows]` of scales.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fp8Rows {
    /// The elements; a multiple of 16.
    pub address: u64,
    /// What each row is multiplied by.
    pub scales: u64,
    /// Number of rows.
    pub rows: usize,
}

/// Rounds bf16 rows of `k` elements to fp8: each is divided by its scale, its largest magnitude over 448.
///
/// # Safety
///
/// As [`skinny`]: `to` has room for the rows and their scales.
pub unsafe fn quantize_rows(device: &dyn Device, x: X, k: usize, to: &Fp8Rows) -> Result<(), CudaError> {
    assert_eq!((x.dtype, x.rows), (DType::BF16, to.rows), "as many rows of bf16");
    if x.rows == 0 {
        return Ok(());
    }
    let launch = Launch { grid: [x.rows as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 };
    let args = [Arg::Ptr(x.address), Arg::Ptr(to.address), Arg::Ptr(to.scales), Arg::U32(k as u32)];
    // SAFETY: passed on; a block per row, and the kernel's parameters.
    unsafe { device.launch(Kernel { source: "gemm_fp8.cu", name: "quantize_rows_e4m3" }, &launch, &args) }
}

/// Norms f32 rows of `k` elements as [`super::rows::rms_norm`] does and rounds them as [`quantize_rows`] does, to the same bits without
/// the way through memory. `normed` is where the bf16 rows go, or 0 if nobody reads them.
///
/// # Safety
///
/// As [`quantize_rows`]; `x` has the rows, `weight` an element for each column, `normed` room for the rows.
pub unsafe fn norm_rows(
    device: &dyn Device,
    k: usize,
    eps: f32,
    (x, weight): (u64, u64),
    to: &Fp8Rows,
    normed: u64,
) -> Result<(), CudaError> {
    if to.rows == 0 {
        return Ok(());
    }
    let launch = Launch { grid: [to.rows as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 };
    let [x, weight, codes, scales, normed] = [x, weight, to.address, to.scales, normed].map(Arg::Ptr);
    let args = [Arg::U32(k as u32), Arg::F32(eps), x, weight, codes, scales, normed];
    // SAFETY: passed on; a block per row, and the kernel's parameters.
    unsafe { device.launch(Kernel { source: "gemm_fp8.cu", name: "rms_norm_e4m3" }, &launch, &args) }
}

/// Decodes an fp4 matrix to bf16, factors and all.
///
/// # Safety
///
/// `to` is memory of the device with room for the matrix.
pub unsafe fn decode_fp4(device: &dyn Device, w: &ScaledWeight, to: u64) -> Result<(), CudaError> {
    assert_eq!(w.dtype, ScaledType::NvFp4, "fp4 weights");
    let launch = Launch { grid: [w.n as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 };
    let args = [Arg::Ptr(w.address), Arg::Ptr(w.scales), Arg::Ptr(to), Arg::U32(w.n as u32), Arg::U32(w.k as u32)];
    // SAFETY: passed on; a block per row, and the kernel's parameters.
    unsafe { device.launch(Kernel { source: "dequant.cu", name: "dequant_nvfp4_bf16" }, &launch, &args) }
}

/// `y = finish(x · wᵀ)` of fp8 rows and fp8 weights, as implementations of [`super::gemm::Gemm`] take it. Devices of compute capability
/// 8.9 and later can; k is a multiple of 16.
///
/// # Panics
///
/// If the weights are not fp8.
pub fn product(x: &Fp8Rows, w: &ScaledWeight, finish: ScaledFinish<'_>, y: u64) -> Product {
    assert_ne!(w.dtype, ScaledType::NvFp4, "fp8 weights");
    let (code, bias, up, activation) = finish.parts(w);
    let by_block = w.dtype == ScaledType::E4M3Blocks;
    Product {
        dtype: DType::BF16,
        shape: Shape { m: x.rows, n: w.n, k: w.k },
        x: x.address,
        w: w.address,
        up: up.map(|up| up.address),
        fp8: Some(Factors { x: x.scales, w: w.scales, up: up.map_or(0, |up| up.scales), by_block }),
        bias,
        y,
        finish: code,
        activation,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Buffer;
    use crate::cuda::emulated::{Emulated, Order};
    use crate::cuda::ops::pack::blocks_on_device;
    use crate::cuda::ops::testing::{encode, on, poisoned, read};
    use crate::cuda::planes::Blocks;
    use crate::kv::e4m3_to_f32;
    use crate::quant::e2m1_to_f32;
    use crate::testing::{Random, assert_close};
    use crate::{Matrix, reference};
    use std::sync::Arc;

    /// The device with fp8 instructions, in each order of threads.
    fn in_every_order(test: impl Fn(&Arc<dyn Device>)) {
        for order in Order::ALL {
            let Ok(emulated) = Emulated::beside_the_program() else { return println!("skipped: no C++ compiler") };
            let emulated = Arc::new(emulated.with_properties(|properties| properties.sm = 89));
            emulated.set_order(order);
            let device: Arc<dyn Device> = emulated;
            test(&device);
            device.synchronize().unwrap();
        }
    }

    /// A code that is not NaN.
    fn fp8(random: &mut Random) -> u8 {
        let code = random.bits() as u8;
        if code & 0x7f == 0x7f { code & 0x80 } else { code }
    }

    /// Random bytes of a weight, what they mean without their factors, and the factors.
    fn weight(random: &mut Random, dtype: ScaledType, n: usize, k: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        match dtype {
            ScaledType::E4M3 | ScaledType::E4M3Blocks => {
                bytes.extend((0..n * k).map(|_| fp8(random)));
                values.extend(bytes.iter().map(|code| e4m3_to_f32(*code)));
            }
            ScaledType::NvFp4 => {
                for _ in 0..n * k / 64 {
                    let scales: [u8; 4] = std::array::from_fn(|_| fp8(random));
                    let pairs: [u8; 32] = std::array::from_fn(|_| random.bits() as u8);
                    for e in 0..64 {
                        let value = e2m1_to_f32(pairs[e / 2] >> (4 * (e % 2)));
                        values.push(value * e4m3_to_f32(scales[e / 16]));
                    }
                    bytes.extend(scales.iter().chain(&pairs));
                }
            }
        }
        (bytes, values, (0..dtype.factors(n, k)).map(|_| random.normal().abs() / 100.0).collect())
    }

    /// A weight on the device.
    fn stored(device: &Arc<dyn Device>, dtype: ScaledType, shape: (usize, usize), bytes: &[u8]) -> Buffer {
        match dtype {
            ScaledType::E4M3 | ScaledType::E4M3Blocks => Buffer::of(device, bytes).unwrap(),
            ScaledType::NvFp4 => blocks_on_device(device, Blocks::NvFp4, shape, bytes).unwrap(),
        }
    }

    /// `x · wᵀ` with the factors applied to w: one per row, or per block.
    fn product(x: &[f32], w: &[f32], factors: &[f32], n: usize, k: usize) -> Vec<f32> {
        let across = k.div_ceil(SCALED_BLOCK);
        let factor = |row: usize, col: usize| match factors.len() == n {
            true => factors[row],
            false => factors[row / SCALED_BLOCK * across + col / SCALED_BLOCK],
        };
        let scaled: Vec<f32> = w.iter().enumerate().map(|(i, v)| v * factor(i / k, i % k)).collect();
        let bytes = encode(DType::F32, &scaled);
        let mut y = vec![0.0; x.len() / k * n];
        reference::matmul(x, &Matrix::new(DType::F32, n, k, &bytes).unwrap(), None, &mut y);
        y
    }

    /// Many rows by fp4 weights, plain and gated.
    #[test]
    fn cuda_fp4_products_of_many_rows_are_the_reference() {
        in_every_order(|device| {
            let mut random = Random::new(73);
            let (m, n, k) = (random.within(20, 90), random.within(1, 90), 64 * random.within(1, 5));
            let x = read(&Buffer::of(device, &encode(DType::BF16, &random.vector(m * k))).unwrap(), DType::BF16);
            let x_on = Buffer::of(device, &encode(DType::BF16, &x)).unwrap();
            let parts = [(); 2].map(|()| weight(&mut random, ScaledType::NvFp4, n, k));
            let on_device =
                parts.each_ref().map(|p| (stored(device, ScaledType::NvFp4, (n, k), &p.0), on(device, &p.2)));
            let [gate, up] = on_device.each_ref().map(|(w, scales)| ScaledWeight {
                dtype: ScaledType::NvFp4,
                n,
                k,
                address: w.address(),
                scales: scales.address(),
            });
            let products = parts.each_ref().map(|p| product(&x, &p.1, &p.2, n, k));
            let largest = products.each_ref().map(|p| p.iter().fold(1.0f32, |most, v| most.max(v.abs())));
            let ours = crate::cuda::ops::matmul::Products::new(device, 4 * n * k).unwrap();
            let rows = X { address: x_on.address(), dtype: DType::BF16, rows: m };
            let y = poisoned(device, DType::F32, m * n);
            let plain = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
            let gated = ScaledFinish::Gated { up: &up, activation: Gate::Silu, to: DType::F32 };
            // Weights are rounded to bf16.
            for (finish, slack) in [(plain, largest[0]), (gated, largest[0] * largest[1])] {
                // SAFETY: the buffers have the sizes of the shape.
                unsafe { ours.fp4(rows, &gate, finish, y.address()).unwrap() };
                let mut want = products[0].clone();
                if matches!(finish, ScaledFinish::Gated { .. }) {
                    reference::silu_mul(&mut want, &products[1]);
                }
                assert_close(&read(&y, DType::F32), &want, 1e-2, 1e-2 * slack, &format!("{m} {n} {k}"));
            }
        });
    }

    #[test]
    fn cuda_skinny_products_are_the_reference() {
        in_every_order(|device| {
            let mut random = Random::new(71);
            for dtype in [ScaledType::E4M3, ScaledType::E4M3Blocks, ScaledType::NvFp4] {
                for (low, high) in [(1, 8), (9, 32), (33, 64)] {
                    let rows = if dtype == ScaledType::E4M3Blocks { 150 } else { 1 };
                    let (m, n) = (random.within(low, high), random.within(rows, rows + 60));
                    let k = dtype.unit() * random.within(1, 600 / dtype.unit());
                    let x =
                        read(&Buffer::of(device, &encode(DType::BF16, &random.vector(m * k))).unwrap(), DType::BF16);
                    let x_on = Buffer::of(device, &encode(DType::BF16, &x)).unwrap();
                    let parts = [weight(&mut random, dtype, n, k), weight(&mut random, dtype, n, k)];
                    let on_device: Vec<(Buffer, Buffer)> =
                        parts.iter().map(|p| (stored(device, dtype, (n, k), &p.0), on(device, &p.2))).collect();
                    let at = |i: usize| {
                        let (w, scales) = &on_device[i];
                        ScaledWeight { dtype, n, k, address: w.address(), scales: scales.address() }
                    };
                    let products = [0, 1].map(|i: usize| product(&x, &parts[i].1, &parts[i].2, n, k));
                    let largest = products[0].iter().fold(1.0f32, |most, v| most.max(v.abs()));
                    let rows = X { address: x_on.address(), dtype: DType::BF16, rows: m };
                    let y = poisoned(device, DType::F32, m * n);
                    let up = at(1);
                    let finishes = [
                        ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 }),
                        ScaledFinish::Gated { up: &up, activation: Gate::Silu, to: DType::F32 },
                    ];
                    for (finish, gated) in finishes.into_iter().zip([false, true]) {
                        // SAFETY: the buffers have the sizes of the shape.
                        unsafe { skinny(&**device, rows, &at(0), finish, y.address()).unwrap() };
                        let (mut want, mut slack) = (products[0].clone(), 1e-5 * largest);
                        if gated {
                            reference::silu_mul(&mut want, &products[1]);
                            slack *= products[1].iter().fold(1.0f32, |most, v| most.max(v.abs()));
                        }
                        assert_close(&read(&y, DType::F32), &want, 1e-5, slack, &format!("{dtype:?} {m} {n} {k}"));
                    }
                }
            }
        });
    }

    /// One pass gives the bits of two, in any company, and the normed rows only where they are asked for.
    #[test]
    fn cuda_rows_are_normed_and_rounded_at_once() {
        in_every_order(|device| {
            let mut random = Random::new(82);
            for (rows, k) in [(random.within(2, 9), 8 * random.within(1, 90)), (3, random.within(1, 700))] {
                let mut x = random.vector(rows * k);
                x[..k].fill(0.0);
                let (x_on, weight) = (on(device, &x), on(device, &random.vector(k)));
                let normed = poisoned(device, DType::BF16, rows * k);
                let fresh = || (Buffer::new(device, rows * k).unwrap(), poisoned(device, DType::F32, rows));
                let to = |(codes, scales): &(Buffer, Buffer), rows| Fp8Rows {
                    address: codes.address(),
                    scales: scales.address(),
                    rows,
                };
                let read = |(codes, scales): &(Buffer, Buffer), rows: usize| {
                    (codes.to_vec::<u8>(rows * k).unwrap(), scales.to_vec::<u32>(rows).unwrap())
                };
                let operand = X { address: normed.address(), dtype: DType::BF16, rows };
                let (two, one, alone, also) = (fresh(), fresh(), fresh(), poisoned(device, DType::BF16, rows * k));
                let place = (x_on.address(), weight.address());
                // SAFETY: the buffers have the sizes of the rows.
                unsafe {
                    let (shape, bf16) = ((rows, k), DType::BF16);
                    crate::cuda::ops::rows::rms_norm(&**device, shape, 1e-5, place.0, place.1, bf16, normed.address())
                        .unwrap();
                    quantize_rows(&**device, operand, k, &to(&two, rows)).unwrap();
                    norm_rows(&**device, k, 1e-5, place, &to(&one, rows), also.address()).unwrap();
                    let last = (place.0 + ((rows - 1) * k * 4) as u64, place.1);
                    norm_rows(&**device, k, 1e-5, last, &to(&alone, 1), 0).unwrap();
                }
                let (codes, scales) = read(&one, rows);
                assert_eq!((&codes, &scales), (&read(&two, rows).0, &read(&two, rows).1), "{rows} x {k}");
                assert_eq!(also.to_vec::<u8>(2 * rows * k), normed.to_vec::<u8>(2 * rows * k));
                assert_eq!(read(&alone, 1), (codes[(rows - 1) * k..].to_vec(), scales[rows - 1..].to_vec()));
            }
        });
    }

    #[test]
    fn cuda_rows_are_rounded_to_the_nearest_fp8_and_multiplied() {
        in_every_order(|device| {
            let mut random = Random::new(81);
            let (m, n, k) = (random.within(60, 140), random.within(30, 150), 16 * random.within(1, 20));
            let mut x = random.vector(m * k);
            x[..k].fill(0.0);
            let x_on = Buffer::of(device, &encode(DType::BF16, &x)).unwrap();
            let x = read(&x_on, DType::BF16);
            let (codes, scales) = (Buffer::new(device, m * k).unwrap(), poisoned(device, DType::F32, m));
            let to = Fp8Rows { address: codes.address(), scales: scales.address(), rows: m };
            let rows = X { address: x_on.address(), dtype: DType::BF16, rows: m };
            // SAFETY: the buffers have the sizes of the rows.
            unsafe { quantize_rows(&**device, rows, k, &to).unwrap() };
            let (rounded, scale) = (codes.to_vec::<u8>(m * k).unwrap(), read(&scales, DType::F32));
            let magnitudes: Vec<f32> = (0..0x7f).map(e4m3_to_f32).collect();
            let mut seen = Vec::new();
            for (i, code) in rounded.iter().enumerate() {
                let largest = x[i / k * k..][..k].iter().fold(0.0f32, |most, v| most.max(v.abs()));
                assert_eq!(scale[i / k], largest / 448.0);
                let value = if scale[i / k] > 0.0 { x[i] * (1.0 / scale[i / k]) } else { 0.0 };
                let nearest = magnitudes.iter().fold(f32::MAX, |best, v| best.min((v - value.abs()).abs()));
                assert_eq!((e4m3_to_f32(*code) - value).abs(), nearest, "{value} became {code:#x}");
                seen.push(e4m3_to_f32(*code) * scale[i / k]);
            }
            for dtype in [ScaledType::E4M3, ScaledType::E4M3Blocks] {
                let n = if dtype == ScaledType::E4M3 { n } else { n + 100 };
                let parts = [(); 2].map(|()| weight(&mut random, dtype, n, k));
                let buffers = parts.each_ref().map(|p| (Buffer::of(device, &p.0).unwrap(), on(device, &p.2)));
                let [gate, up] = buffers.each_ref().map(|(w, scales)| ScaledWeight {
                    dtype,
                    n,
                    k,
                    address: w.address(),
                    scales: scales.address(),
                });
                let products = parts.each_ref().map(|p| product(&seen, &p.1, &p.2, n, k));
                let largest = products.each_ref().map(|p| p.iter().fold(1.0f32, |most, v| most.max(v.abs())));
                let y = poisoned(device, DType::F32, m * n);
                let plain = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
                let ours = crate::cuda::ops::matmul::Products::new(device, 0).unwrap();
                // SAFETY: the buffers have the sizes of the shape.
                unsafe { ours.fp8(&to, &gate, plain, y.address()).unwrap() };
                assert_close(&read(&y, DType::F32), &products[0], 1e-5, 1e-5 * largest[0], "fp8");
                let gated = ScaledFinish::Gated { up: &up, activation: Gate::GeluTanh, to: DType::F32 };
                // SAFETY: as above.
                unsafe { ours.fp8(&to, &gate, gated, y.address()).unwrap() };
                let mut want = products[0].clone();
                reference::gelu_tanh_mul(&mut want, &products[1]);
                assert_close(&read(&y, DType::F32), &want, 1e-5, 1e-5 * largest[0] * largest[1], "fp8, gated");
                // A row alone is what it is among others.
                let (row, y_row) = (random.within(0, m - 1), poisoned(device, DType::F32, n));
                let one = Buffer::of(device, &rounded[row * k..(row + 1) * k]).unwrap();
                let alone = Fp8Rows { address: one.address(), scales: to.scales + 4 * row as u64, rows: 1 };
                // SAFETY: as above, of one row and of all.
                unsafe {
                    ours.fp8(&alone, &gate, plain, y_row.address()).unwrap();
                    ours.fp8(&to, &gate, plain, y.address()).unwrap();
                }
                assert_eq!(read(&y_row, DType::F32), read(&y, DType::F32)[row * n..(row + 1) * n]);
            }
        });
    }
}
