//! Checks of products with fp8 and fp4 weights: ours, and with fp8 those of NVIDIA's library.

use super::{Checks, Draw, error, poisoned, precision, product_of, read, rounded};
use crate::DType;
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::ops::blas;
use crate::cuda::ops::gemm::{Gemm, Own, Product, Wgmma};
use crate::cuda::ops::matmul::{Finish, Products, X};
use crate::cuda::ops::pack::blocks_on_device;
use crate::cuda::ops::rows;
use crate::cuda::ops::scaled::{
    Fp8Rows, SCALED_BLOCK, ScaledFinish, ScaledType, ScaledWeight, norm_rows, product, quantize_rows, skinny,
};
use crate::cuda::planes::Blocks;
use crate::kv::{e4m3_to_f32, f32_to_e4m3};
use crate::quant::e2m1_to_f32;
use std::sync::Arc;

pub(super) fn run(checks: &mut Checks<'_>) {
    let (rows_max, size_max) = (checks.size(20, 700), checks.size(2, 40));
    let cases = checks.size(2, 5);
    let types = [(ScaledType::E4M3, "fp8"), (ScaledType::E4M3Blocks, "fp8 by blocks"), (ScaledType::NvFp4, "nvfp4")];
    for (dtype, name) in types {
        checks.check(format!("matmul {name} skinny"), cases, |device, draw| few(device, draw, dtype, size_max));
    }
    checks.check("matmul nvfp4 gemm".into(), cases, |device, draw| decoded(device, draw, rows_max, size_max));
    if checks.device.properties().sm >= 89 {
        for (dtype, name) in &types[..2] {
            let name = format!("matmul {name} gemm");
            let own = Own(checks.device.clone());
            checks.check(name, cases, |device, draw| many(device, draw, (*dtype, &own), rows_max, size_max));
        }
        library(checks, rows_max, size_max);
        checks.check("rms_norm to fp8".into(), cases, |device, draw| norm(device, draw, rows_max, size_max));
    }
}

/// NVIDIA's library where it is, and what it has for the device.
fn library(checks: &mut Checks<'_>, rows_max: usize, size_max: usize) {
    // Four blocks in a row are the least that it takes.
    let size_max = size_max.max(10);
    let opened = blas::open(checks.device, 100 * size_max);
    let Ok((blas, unscaled)) = opened else { return };
    for implementation in [&blas as &dyn Gemm, &unscaled] {
        for (dtype, name) in [(ScaledType::E4M3, "fp8"), (ScaledType::E4M3Blocks, "fp8 by blocks")] {
            let asked = without_operands(dtype, (2048, 512, 512));
            let offers = implementation.takes(&asked) && implementation.variants(&asked).is_ok_and(|v| !v.is_empty());
            if !offers {
                tracing::info!("{} has no products of {name} here", implementation.name());
                continue;
            }
            let name = format!("{} matmul {name}", implementation.name());
            let cases = checks.size(2, 5);
            checks.check(name, cases, |device, draw| {
                // What it refuses after all is not chosen, and no failure.
                match many(device, draw, (dtype, implementation), rows_max, size_max) {
                    Err(error) if blas::refused(&error) => Ok(0.0),
                    found => found,
                }
            });
        }
    }
}

/// Hopper's kernel, where it is.
pub(super) fn run_experimental(checks: &mut Checks<'_>) {
    if checks.device.properties().sm != 90 {
        return;
    }
    let (rows_max, size_max) = (checks.size(20, 700), checks.size(2, 40));
    let wgmma = Wgmma(checks.device.clone());
    checks.check("wgmma matmul fp8".into(), checks.size(2, 5), |device, draw| {
        many(device, draw, (ScaledType::E4M3, &wgmma), rows_max, size_max)
    });
}

/// A random weight `[n, k]`: its bytes, its values without the factors, and the factors.
fn weight(draw: &mut Draw, dtype: ScaledType, n: usize, k: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let mut fp8 = |count: usize| -> Vec<u8> { draw.vector(count).into_iter().map(f32_to_e4m3).collect() };
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    match dtype {
        ScaledType::E4M3 | ScaledType::E4M3Blocks => {
            bytes = fp8(n * k);
            values.extend(bytes.iter().map(|code| e4m3_to_f32(*code)));
        }
        ScaledType::NvFp4 => {
            for _ in 0..n * k / 64 {
                let (scales, pairs) = (fp8(4), fp8(32));
                for e in 0..64 {
                    let value = e2m1_to_f32(pairs[e / 2] >> (4 * (e % 2)));
                    values.push(value * e4m3_to_f32(scales[e / 16]));
                }
                bytes.extend(scales.into_iter().chain(pairs));
            }
        }
    }
    let factors = draw.vector(dtype.factors(n, k)).into_iter().map(|v| v.abs() / 50.0).collect();
    (bytes, values, factors)
}

/// `x · wᵀ` with each row or block of w multiplied by its factor.
fn reference(x: &[f32], dtype: ScaledType, (values, factors): (&[f32], &[f32]), k: usize) -> Vec<f32> {
    let across = k.div_ceil(SCALED_BLOCK);
    let factor = |row: usize, col: usize| match dtype {
        ScaledType::E4M3Blocks => factors[row / SCALED_BLOCK * across + col / SCALED_BLOCK],
        ScaledType::E4M3 | ScaledType::NvFp4 => factors[row],
    };
    let scaled = values.iter().enumerate().map(|(i, v)| v * factor(i / k, i % k));
    let bytes: Vec<u8> = scaled.flat_map(f32::to_le_bytes).collect();
    product_of(x, (DType::F32, values.len() / k, k), &bytes, None)
}

fn few(device: &Arc<dyn Device>, draw: &mut Draw, dtype: ScaledType, size_max: usize) -> Result<f64, CudaError> {
    let k = dtype.unit() * draw.within(1, size_max * 64 / dtype.unit());
    let (m, n) = (draw.within(1, 64), draw.within(1, 100 * size_max));
    let (x_bytes, x) = rounded(DType::BF16, &draw.vector(m * k));
    let (bytes, values, factors) = weight(draw, dtype, n, k);
    let want = reference(&x, dtype, (&values, &factors), k);
    let w_on = match dtype {
        ScaledType::E4M3 | ScaledType::E4M3Blocks => Buffer::of(device, &bytes)?,
        ScaledType::NvFp4 => blocks_on_device(device, Blocks::NvFp4, (n, k), &bytes)?,
    };
    let (x_on, factors_on) = (Buffer::of(device, &x_bytes)?, Buffer::of(device, &factors)?);
    let y = poisoned(device, DType::F32, m * n)?;
    let operand = X { address: x_on.address(), dtype: DType::BF16, rows: m };
    let w = ScaledWeight { dtype, n, k, address: w_on.address(), scales: factors_on.address() };
    let finish = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
    // SAFETY: every operand has the size that its shape says.
    unsafe { skinny(&**device, operand, &w, finish, y.address())? };
    let loss = 1e-5 * (k as f64).sqrt();
    Ok(error(&read(&y, DType::F32)?, &want, precision(DType::F32), loss))
}

/// Many rows by fp4 weights, which are decoded first.
fn decoded(device: &Arc<dyn Device>, draw: &mut Draw, rows_max: usize, size_max: usize) -> Result<f64, CudaError> {
    let (m, n, k) = (draw.within(1, rows_max), draw.within(1, 100 * size_max), 64 * draw.within(1, size_max));
    let (x_bytes, x) = rounded(DType::BF16, &draw.vector(m * k));
    let (bytes, values, factors) = weight(draw, ScaledType::NvFp4, n, k);
    let want = reference(&x, ScaledType::NvFp4, (&values, &factors), k);
    let w_on = blocks_on_device(device, Blocks::NvFp4, (n, k), &bytes)?;
    let (x_on, factors_on) = (Buffer::of(device, &x_bytes)?, Buffer::of(device, &factors)?);
    let y = poisoned(device, DType::F32, m * n)?;
    let operand = X { address: x_on.address(), dtype: DType::BF16, rows: m };
    let w = ScaledWeight { dtype: ScaledType::NvFp4, n, k, address: w_on.address(), scales: factors_on.address() };
    let finish = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
    // SAFETY: every operand has the size that its shape says.
    unsafe { Products::new(device, 4 * n * k)?.fp4(operand, &w, finish, y.address())? };
    let got = read(&y, DType::F32)?;
    // Weights are rounded to bf16.
    let loss = precision(DType::BF16) * (k as f64).sqrt();
    Ok(error(&got, &want, precision(DType::BF16), loss))
}

/// A product to ask an implementation about.
fn without_operands(dtype: ScaledType, (m, n, k): (usize, usize, usize)) -> Product {
    let rows = Fp8Rows { address: 0, scales: 0, rows: m };
    let w = ScaledWeight { dtype, n, k, address: 0, scales: 0 };
    product(&rows, &w, ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 }), 0)
}

/// Many rows, rounded here, by an implementation; in shapes that it takes.
fn many(
    device: &Arc<dyn Device>,
    draw: &mut Draw,
    (dtype, implementation): (ScaledType, &dyn Gemm),
    rows_max: usize,
    size_max: usize,
) -> Result<f64, CudaError> {
    let (mut m, mut n, mut k);
    loop {
        k = 16 * draw.within(1, size_max * 4);
        (m, n) = (draw.within(1, rows_max), draw.within(1, 100 * size_max));
        // One in a hundred shapes at least.
        if implementation.takes(&without_operands(dtype, (m, n, k))) {
            break;
        }
    }
    let (x_bytes, x) = rounded(DType::BF16, &draw.vector(m * k));
    let (bytes, values, factors) = weight(draw, dtype, n, k);
    let (x_on, w_on, factors_on) =
        (Buffer::of(device, &x_bytes)?, Buffer::of(device, &bytes)?, Buffer::of(device, &factors)?);
    let (codes, scales) = (Buffer::new(device, m * k)?, poisoned(device, DType::F32, m)?);
    codes.fill(0xff)?;
    let to = Fp8Rows { address: codes.address(), scales: scales.address(), rows: m };
    let y = poisoned(device, DType::F32, m * n)?;
    let w = ScaledWeight { dtype, n, k, address: w_on.address(), scales: factors_on.address() };
    let finish = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
    // SAFETY: every operand has the size that its shape says.
    unsafe {
        let rows = X { address: x_on.address(), dtype: DType::BF16, rows: m };
        quantize_rows(&**device, rows, k, &to)?;
        implementation.multiply(&product(&to, &w, finish, y.address()))?;
    }
    // Rounding is judged by itself, and the product by what was rounded.
    let (codes, scales) = (codes.to_vec::<u8>(m * k)?, scales.to_vec::<f32>(m)?);
    let seen: Vec<f32> = codes.iter().enumerate().map(|(i, code)| e4m3_to_f32(*code) * scales[i / k]).collect();
    let want = reference(&seen, dtype, (&values, &factors), k);
    // Half a step of three bits of mantissa; what is tiny beside its row's largest is a multiple of 2^-9 of the scale.
    let steps = x.iter().zip(&seen).enumerate().map(|(i, (x, seen))| {
        let allowed = f64::from(x.abs()) / 16.0 * 1.001 + f64::from(scales[i / k]) * 2f64.powi(-10);
        let part = f64::from((x - seen).abs()) / allowed.max(1e-30);
        if part.is_nan() { f64::INFINITY } else { part }
    });
    let rounding = steps.fold(0.0, f64::max);
    let loss = 1e-4 * (k as f64).sqrt();
    Ok(rounding.max(error(&read(&y, DType::F32)?, &want, precision(DType::F32), loss)))
}

/// Norming and rounding at once gives the bits of one after the other.
fn norm(device: &Arc<dyn Device>, draw: &mut Draw, rows_max: usize, size_max: usize) -> Result<f64, CudaError> {
    let (rows, k) = (draw.within(1, rows_max), draw.within(1, size_max * 200));
    let (x, weight) = (Buffer::of(device, &draw.vector(rows * k))?, Buffer::of(device, &draw.vector(k))?);
    let (h, bf16) = (poisoned(device, DType::BF16, rows * k)?, DType::BF16);
    let mut found = Vec::new();
    for at_once in [false, true] {
        let (codes, scales) = (Buffer::new(device, rows * k)?, poisoned(device, DType::F32, rows)?);
        codes.fill(0xff)?;
        let to = Fp8Rows { address: codes.address(), scales: scales.address(), rows };
        // SAFETY: every operand has these rows.
        unsafe {
            if at_once {
                norm_rows(&**device, k, 1e-5, (x.address(), weight.address()), &to, 0)?;
            } else {
                rows::rms_norm(&**device, (rows, k), 1e-5, x.address(), weight.address(), bf16, h.address())?;
                quantize_rows(&**device, X { address: h.address(), dtype: bf16, rows }, k, &to)?;
            }
        }
        found.push((codes.to_vec::<u8>(rows * k)?, scales.to_vec::<u32>(rows)?));
    }
    Ok(if found[0] == found[1] { 0.0 } else { f64::INFINITY })
}
