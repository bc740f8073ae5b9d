//! What a device must show before it is trusted with more: `selftest.cu` with known answers.

use super::device::{Arg, Buffer, CudaError, Device, Kernel, Launch};
use std::sync::Arc;

/// Runs every kernel of `selftest.cu` over poisoned outputs.
///
/// # Errors
///
/// [`CudaError::Unavailable`] names the kernel whose answer was wrong; other errors are the device's own.
pub fn run(device: &Arc<dyn Device>) -> Result<(), CudaError> {
    // Whole numbers, so that sums are exact in any order.
    let x: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32).collect();
    let dx = Buffer::of(device, &x)?;
    let y = Buffer::of(device, &x)?;
    let args = [Arg::U32(1000), Arg::F32(2.0), Arg::Ptr(dx.address()), Arg::Ptr(y.address())];
    launch(device, "selftest_axpy", [4, 1], [256, 1], 0, &args)?;
    let tripled: Vec<f32> = x.iter().map(|x| 3.0 * x).collect();
    same("selftest_axpy", &y.to_vec(1000)?, &tripled)?;

    let sums = Buffer::new(device, 8 * 4)?;
    sums.fill(0xff)?;
    let args = [Arg::U32(1000), Arg::Ptr(dx.address()), Arg::Ptr(sums.address())];
    launch(device, "selftest_sum", [8, 1], [128, 1], 4 * 4, &args)?;
    let want: Vec<f32> = x.chunks(128).map(|part| part.iter().sum()).collect();
    same("selftest_sum", &sums.to_vec(8)?, &want)?;

    let (rows, cols) = (25, 40);
    y.fill(0xff)?;
    let args = [Arg::U32(rows), Arg::U32(cols), Arg::Ptr(dx.address()), Arg::Ptr(y.address())];
    launch(device, "selftest_transpose", [2, 1], [32, 8], 0, &args)?;
    let turned: Vec<f32> = (0..1000).map(|i| x[i % rows as usize * cols as usize + i / rows as usize]).collect();
    same("selftest_transpose", &y.to_vec(1000)?, &turned)
}

fn launch(
    device: &Arc<dyn Device>,
    name: &'static str,
    [gx, gy]: [u32; 2],
    [bx, by]: [u32; 2],
    shared_bytes: u32,
    args: &[Arg],
) -> Result<(), CudaError> {
    let shape = Launch { grid: [gx, gy, 1], block: [bx, by, 1], shared_bytes };
    // SAFETY: the buffers of `run` have the sizes that the kernels are told, and live until it has read the results.
    unsafe { device.launch(Kernel { source: "selftest.cu", name }, &shape, args) }
}

fn same(kernel: &str, got: &[f32], want: &[f32]) -> Result<(), CudaError> {
    if got == want {
        return Ok(());
    }
    Err(CudaError::Unavailable(format!("the device computes wrongly: {kernel} of its self-test has another result")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::emulated::{Emulated, Order};

    #[test]
    fn the_emulator_passes_in_every_order() {
        let Some(emulated) = Emulated::for_tests() else { return };
        for order in Order::ALL {
            emulated.set_order(order);
            let device: Arc<dyn Device> = emulated.clone();
            run(&device).unwrap();
        }
    }
}
