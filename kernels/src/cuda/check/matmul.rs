//! Checks of products with weights of every type, in the kernels for many rows and in those for few.

use super::{Checks, Draw, error, poisoned, precision, product_of, read, rounded};
use crate::DType;
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::ops::matmul::{Finish, Path, Products, Weight, X, compute_type};
use crate::cuda::ops::pack::on_device;
use crate::quant::quantize_row;
use std::sync::Arc;

pub(super) fn run(checks: &mut Checks<'_>) {
    let (rows_max, size_max) = (checks.size(20, 700), checks.size(2, 12));
    for dtype in DType::ALL {
        // Types that cannot be written have no random matrices; the units' tests decode their blocks.
        if quantize_row(dtype, &vec![0.5; 256], &mut Vec::new()).is_err() {
            continue;
        }
        for (path, what) in [(Path::Gemm, "gemm"), (Path::Skinny, "skinny")] {
            let cases = checks.size(2, 5);
            checks.check(format!("matmul {} {what}", dtype.name()), cases, |device, draw| {
                product(device, draw, (dtype, path, false), rows_max, size_max)
            });
        }
    }
}

/// Hopper's kernels, where they are.
pub(super) fn run_experimental(checks: &mut Checks<'_>) {
    if checks.device.properties().sm != 90 {
        return;
    }
    let (rows_max, size_max) = (checks.size(20, 700), checks.size(2, 12));
    let cases = checks.size(2, 8);
    for dtype in [DType::BF16, DType::F16] {
        checks.check(format!("wgmma matmul {}", dtype.name()), cases, |device, draw| {
            product(device, draw, (dtype, Path::Gemm, true), rows_max, size_max)
        });
    }
}

fn product(
    device: &Arc<dyn Device>,
    draw: &mut Draw,
    (dtype, path, experimental): (DType, Path, bool),
    rows_max: usize,
    size_max: usize,
) -> Result<f64, CudaError> {
    let compute = compute_type(dtype);
    // Whole blocks, and rows of whole 16 bytes.
    let k = draw.within(1, size_max) * dtype.block_len().max(16);
    let (m, n) = (draw.within(1, rows_max), draw.within(1, 150 * size_max));
    let mut weights = Vec::new();
    for _ in 0..n {
        quantize_row(dtype, &draw.vector(k), &mut weights).expect("this type can be written");
    }
    let (x_bytes, x) = rounded(compute, &draw.vector(m * k));
    let (bias, before) = (draw.vector(n), draw.vector(m * n));
    let want = product_of(&x, (dtype, n, k), &weights, Some(&bias));

    let (dx, dw) = (Buffer::of(device, &x_bytes)?, on_device(device, dtype, (n, k), &weights)?);
    let bias = Buffer::of(device, &bias)?;
    let products = Products::new(device, Products::scratch_bytes([(dtype, n, k)]))?;
    let products = if experimental { products.experimental() } else { products };
    let weight = Weight { dtype, n, k, address: dw.address() };
    let operand = X { address: dx.address(), dtype: compute, rows: m };
    // A quantised weight is rounded to bf16 for the tensor cores.
    let loss = precision(compute) * (k as f64).sqrt();
    let (out, y) = (poisoned(device, DType::F32, m * n)?, Buffer::of(device, &before)?);
    // SAFETY: every operand has the size that its shape says.
    unsafe {
        let store = Finish::Store { bias: bias.address(), to: DType::F32 };
        products.matmul(path, operand, &weight, store, out.address())?;
        products.matmul(path, operand, &weight, Finish::Add { bias: bias.address() }, y.address())?;
    }
    let stored = error(&read(&out, DType::F32)?, &want, precision(compute), loss);
    let sums: Vec<f32> = want.iter().zip(&before).map(|(product, before)| product + before).collect();
    Ok(stored.max(error(&read(&y, DType::F32)?, &sums, precision(compute), loss)))
}
