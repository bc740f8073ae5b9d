//! Products with fp8 and fp4 weights that have an f32 factor per row: read as they are for few rows, by bf16 rows of x; and for
//! many rows fp8 by fp8 on tensor cores (compute capability 8.9 and later), with rows of x rounded to fp8 first.
//!
//! fp8 weights are Hugging Face's (`compressed-tensors`, `fp8`) with a factor per row; no format that Ridge reads has such fp4 weights
//! yet. Batch invariance is that of [`super::matmul`]; a row's fp8 scale comes from that row alone.
//!
//! fp4 weights (`NVFP4`'s values) lie in blocks of 64 elements: four e4m3 scales, then 32 bytes of two elements each, the first
//! in the low half. A tensor-wide factor goes into the factors of the rows.

use super::matmul::{Finish, X, activation_code, code};
use crate::cuda::device::{Arg, CudaError, Device, Kernel, Launch};
pub use crate::cuda::plan::gemv::ScaledType;
use crate::cuda::plan::{gemm, gemv};
use crate::{DType, Gate};
use gemm::Shape;

/// A weight `[n, k]` on the device, row-major.
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
    /// f32 `[n]`: what each row is multiplied by.
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

/// `y = finish(x · wᵀ)` of fp8 rows and fp8 weights.
///
/// # Errors
///
/// [`CudaError::Unavailable`] with the reasons if the device or the shape cannot.
///
/// # Safety
///
/// As [`skinny`].
///
/// # Panics
///
/// If the weights are not fp8, or there is nothing to multiply.
pub unsafe fn gemm(
    device: &dyn Device,
    x: &Fp8Rows,
    w: &ScaledWeight,
    finish: ScaledFinish<'_>,
    y: u64,
) -> Result<(), CudaError> {
    assert_eq!(w.dtype, ScaledType::E4M3, "fp8 weights");
    let (code, bias, up, activation) = finish.parts(w);
    let shape = Shape { m: x.rows, n: w.n, k: w.k };
    let plan = gemm::plan_fp8(device.properties(), shape, up.is_some()).map_err(|rejected| {
        let reasons: Vec<String> = rejected.iter().map(|(name, reason)| format!("{name}: {reason}")).collect();
        CudaError::Unavailable(reasons.join("; "))
    })?;
    let mut args = vec![Arg::Ptr(x.address), Arg::Ptr(w.address)];
    args.extend(up.map(|up| Arg::Ptr(up.address)));
    args.extend([Arg::Ptr(x.scales), Arg::Ptr(w.scales)]);
    args.push(Arg::Ptr(up.map_or(bias, |up| up.scales)));
    args.push(Arg::Ptr(y));
    args.extend([x.rows, w.n, w.k].map(|size| Arg::U32(size as u32)));
    args.push(Arg::U32(code));
    args.extend(up.map(|_| Arg::U32(activation)));
    // SAFETY: passed on; these are the parameters of the kernels of `gemm_fp8.cu`.
    unsafe { device.launch(plan.kernel, &plan.launch, &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Buffer;
    use crate::cuda::emulated::{Emulated, Order};
    use crate::cuda::ops::testing::{encode, on, poisoned, read};
    use crate::kv::e4m3_to_f32;
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
        const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        match dtype {
            ScaledType::E4M3 => {
                bytes.extend((0..n * k).map(|_| fp8(random)));
                values.extend(bytes.iter().map(|code| e4m3_to_f32(*code)));
            }
            ScaledType::NvFp4 => {
                for _ in 0..n * k / 64 {
                    let scales: [u8; 4] = std::array::from_fn(|_| fp8(random));
                    let pairs: [u8; 32] = std::array::from_fn(|_| random.bits() as u8);
                    for e in 0..64 {
                        let code = pairs[e / 2] >> (4 * (e % 2)) & 15;
                        let magnitude = E2M1[usize::from(code & 7)];
                        let value = if code & 8 == 0 { magnitude } else { -magnitude };
                        values.push(value * e4m3_to_f32(scales[e / 16]));
                    }
                    bytes.extend(scales.iter().chain(&pairs));
                }
            }
        }
        assert_eq!(bytes.len(), n * dtype.row_bytes(k));
        (bytes, values, (0..n).map(|_| random.normal().abs() / 100.0).collect())
    }

    /// `x · wᵀ` with the factors applied to the rows of w.
    fn product(x: &[f32], w: &[f32], factors: &[f32], n: usize, k: usize) -> Vec<f32> {
        let scaled: Vec<f32> = w.chunks(k).zip(factors).flat_map(|(row, f)| row.iter().map(move |v| v * f)).collect();
        let bytes = encode(DType::F32, &scaled);
        let mut y = vec![0.0; x.len() / k * n];
        reference::matmul(x, &Matrix::new(DType::F32, n, k, &bytes).unwrap(), None, &mut y);
        y
    }

    #[test]
    fn cuda_skinny_products_are_the_reference() {
        in_every_order(|device| {
            let mut random = Random::new(71);
            for dtype in [ScaledType::E4M3, ScaledType::NvFp4] {
                for (low, high) in [(1, 8), (9, 32), (33, 64)] {
                    let (m, n) = (random.within(low, high), random.within(1, 60));
                    let k = dtype.unit() * random.within(1, 600 / dtype.unit());
                    let x =
                        read(&Buffer::of(device, &encode(DType::BF16, &random.vector(m * k))).unwrap(), DType::BF16);
                    let x_on = Buffer::of(device, &encode(DType::BF16, &x)).unwrap();
                    let parts = [weight(&mut random, dtype, n, k), weight(&mut random, dtype, n, k)];
                    let on_device: Vec<(Buffer, Buffer)> =
                        parts.iter().map(|p| (Buffer::of(device, &p.0).unwrap(), on(device, &p.2))).collect();
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
            let parts = [(); 2].map(|()| weight(&mut random, ScaledType::E4M3, n, k));
            let buffers = parts.each_ref().map(|p| (Buffer::of(device, &p.0).unwrap(), on(device, &p.2)));
            let [gate, up] = buffers.each_ref().map(|(w, scales)| ScaledWeight {
                dtype: ScaledType::E4M3,
                n,
                k,
                address: w.address(),
                scales: scales.address(),
            });
            let products = parts.each_ref().map(|p| product(&seen, &p.1, &p.2, n, k));
            let largest = products.each_ref().map(|p| p.iter().fold(1.0f32, |most, v| most.max(v.abs())));
            let y = poisoned(device, DType::F32, m * n);
            let plain = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
            // SAFETY: the buffers have the sizes of the shape.
            unsafe { gemm(&**device, &to, &gate, plain, y.address()).unwrap() };
            assert_close(&read(&y, DType::F32), &products[0], 1e-5, 1e-5 * largest[0], "fp8");
            let gated = ScaledFinish::Gated { up: &up, activation: Gate::GeluTanh, to: DType::F32 };
            // SAFETY: as above.
            unsafe { gemm(&**device, &to, &gate, gated, y.address()).unwrap() };
            let mut want = products[0].clone();
            reference::gelu_tanh_mul(&mut want, &products[1]);
            assert_close(&read(&y, DType::F32), &want, 1e-5, 1e-5 * largest[0] * largest[1], "fp8, gated");
        });
    }
}
