//! Timings on a real device: how near kernels come to what the device's memory can copy. Wall-clock time around many launches, after
//! warming up; figures of the emulator would mean nothing.

use super::{Draw, poisoned, rounded};
use crate::DType;
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::ops::matmul::{Finish, Path, Products, Weight, X};
use std::sync::Arc;
use std::time::Instant;

/// One operation's speed.
#[derive(Clone, PartialEq, Debug)]
pub struct Timing {
    /// What was run.
    pub name: String,
    /// Microseconds of one launch: the median of several series.
    pub microseconds: f64,
    /// Operations per second, two per multiply-add; 0 for a copy.
    pub flops: f64,
    /// Bytes per second of what cannot be avoided: weights and activations read, results written.
    pub bytes: f64,
    /// `bytes` as a part of what copying reached in the same run.
    pub of_copy: f64,
}

/// Copies, and products with matrices of the shapes of Llama-3.1-8B: 1 to 32 rows in the kernels for few rows, 512 to 8192 in
/// those for many.
pub fn all(device: &Arc<dyn Device>, seed: u64) -> Result<Vec<Timing>, CudaError> {
    const COPY_BYTES: usize = 1 << 30;
    let (from, to) = (Buffer::new(device, COPY_BYTES)?, Buffer::new(device, COPY_BYTES)?);
    from.fill(1)?;
    // SAFETY: two buffers of this length.
    let seconds = median(device, 10, || unsafe { device.copy(from.address(), to.address(), COPY_BYTES) })?;
    let copied = 2.0 * COPY_BYTES as f64 / seconds;
    let copy =
        Timing { name: "copy of 1 GiB".into(), microseconds: seconds * 1e6, flops: 0.0, bytes: copied, of_copy: 1.0 };
    drop((from, to));
    let mut timings = vec![copy];
    let mut draw = Draw::new(seed);
    for (what, n, k) in [("qkv", 6144, 4096), ("out", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)] {
        let (weights, _) = rounded(DType::BF16, &draw.vector(n * k));
        let weights = Buffer::of(device, &weights)?;
        let weight = Weight { dtype: DType::BF16, n, k, address: weights.address() };
        let products = Products::new(device, 0)?;
        let rows = [1, 8, 32].map(|m| (Path::Skinny, m)).into_iter().chain([512, 2048, 8192].map(|m| (Path::Gemm, m)));
        for (path, m) in rows {
            let (x, _) = rounded(DType::BF16, &draw.vector(m * k));
            let (x, y) = (Buffer::of(device, &x)?, poisoned(device, DType::F32, m * n)?);
            let operand = X { address: x.address(), dtype: DType::BF16, rows: m };
            let finish = Finish::Store { bias: 0, to: DType::F32 };
            // SAFETY: every operand has the size that its shape says.
            let run = || unsafe { products.matmul(path, operand, &weight, finish, y.address()) };
            let seconds = median(device, if path == Path::Gemm { 5 } else { 50 }, run)?;
            let bytes = (2 * n * k + 2 * m * k + 4 * m * n) as f64 / seconds;
            timings.push(Timing {
                name: format!("bf16 {what} {path:?} m={m} n={n} k={k}"),
                microseconds: seconds * 1e6,
                flops: 2.0 * (m * n * k) as f64 / seconds,
                bytes,
                of_copy: bytes / copied,
            });
        }
    }
    Ok(timings)
}

/// Seconds of one call: the median of five series of `count`, after one that is not counted.
fn median(
    device: &Arc<dyn Device>,
    count: usize,
    mut call: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let mut series = Vec::new();
    for _ in 0..6 {
        device.synchronize()?;
        let started = Instant::now();
        for _ in 0..count {
            call()?;
        }
        device.synchronize()?;
        series.push(started.elapsed().as_secs_f64() / count as f64);
    }
    series.remove(0);
    series.sort_by(f64::total_cmp);
    Ok(series[series.len() / 2])
}
