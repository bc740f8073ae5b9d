//! The plan of `gemm_wgmma.cu`, Hopper's product of many rows, and the tensor maps that it is given. Experimental.

use super::gemm::{Plan, Reason, Shape};
use crate::DType;
use crate::cuda::device::{Kernel, Launch, Properties};
use crate::cuda::{Element, TensorMap};

/// Rows of a box of x and of w: a tile has one of x and two of w.
const BOX_ROWS: u32 = 128;
const ROW_BYTES: usize = 128;
const BM: usize = 128;
const BN: usize = 256;
const STAGES: usize = 4;
/// Where the warps exchange sums before they store them, and the barriers.
const FINISH_BYTES: usize = 8 * 16 * 40 * 4;
const BARRIER_BYTES: usize = 2 * STAGES * 8;

/// The map of a matrix `[rows, cols]` that lies without gaps.
///
/// # Panics
///
/// If an address or row is not a whole number of 16 bytes.
pub fn tensor_map(element: Element, address: u64, rows: usize, cols: usize) -> TensorMap {
    let row_bytes = (element.bytes() * cols) as u64;
    assert!(address.is_multiple_of(16) && row_bytes.is_multiple_of(16), "{row_bytes} bytes at {address:#x}");
    let box_cols = (ROW_BYTES / element.bytes()) as u32;
    let (cols, rows) = (cols as u64, rows as u64);
    TensorMap { address, element, cols, rows, row_bytes, planes: 0, plane_bytes: 0, box_cols, box_rows: BOX_ROWS }
}

/// Plans a product of 16-bit x and w, or says why it cannot be.
///
/// # Errors
///
/// [`Reason::Architecture`], [`Reason::Precision`], [`Reason::Alignment`] or [`Reason::Shared`].
pub fn plan(device: &Properties, dtype: DType, shape: Shape, gated: bool) -> Result<Plan, Reason> {
    let name = match (dtype, gated) {
        (DType::BF16, false) => "gemm_wgmma_bf16",
        (DType::BF16, true) => "gemm_wgmma_bf16_gated",
        (DType::F16, false) => "gemm_wgmma_f16",
        (DType::F16, true) => "gemm_wgmma_f16_gated",
        _ => return Err(Reason::Precision),
    };
    tiled(device, name, 2 * shape.k, shape, gated)
}

/// Plans a product of fp8 rows by fp8 weights with a factor for each row, or says why it cannot be.
///
/// # Errors
///
/// As [`plan`].
pub fn plan_fp8(device: &Properties, shape: Shape, gated: bool) -> Result<Plan, Reason> {
    let name = if gated { "gemm_wgmma_e4m3_gated" } else { "gemm_wgmma_e4m3" };
    tiled(device, name, shape.k, shape, gated)
}

fn tiled(device: &Properties, name: &'static str, row_bytes: usize, shape: Shape, gated: bool) -> Result<Plan, Reason> {
    // wgmma is of 9.0 alone: later devices do not have it.
    if device.sm != 90 {
        return Err(Reason::Architecture { sm: device.sm });
    }
    if !row_bytes.is_multiple_of(16) {
        return Err(Reason::Alignment { row_bytes });
    }
    let (needed, available) = (shared_bytes(), device.shared_per_block as usize);
    if needed > available {
        return Err(Reason::Shared { needed, available });
    }
    let columns = if gated { BN / 2 } else { BN };
    let tiles = shape.m.div_ceil(BM) * shape.n.div_ceil(columns);
    Ok(Plan {
        kernel: Kernel { source: "gemm_wgmma.cu", name },
        launch: Launch {
            grid: [tiles.min(device.multiprocessors as usize) as u32, 1, 1],
            block: [384, 1, 1],
            shared_bytes: needed as u32,
        },
        rejected: Vec::new(),
    })
}

fn shared_bytes() -> usize {
    STAGES * (BM + BN) * ROW_BYTES + FINISH_BYTES + BARRIER_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::device::{Buffer, Device};
    use crate::cuda::emulated::{Emulated, Order};
    use crate::cuda::ops::gemm::{Gemm, Product, STORE_F32, Wgmma};
    use crate::cuda::ops::matmul::Finish;
    use crate::cuda::ops::scaled::{self, Fp8Rows, ScaledFinish, ScaledType, ScaledWeight};
    use crate::testing::{Random, assert_close};
    use crate::{Gate, Matrix, quantize_row, reference};
    use std::sync::Arc;

    fn hopper(properties: &mut Properties) {
        (properties.sm, properties.shared_per_block, properties.multiprocessors) = (90, 227 << 10, 3);
    }

    #[test]
    fn only_hopper_takes_it() {
        let mut device = Properties {
            name: "test".into(),
            sm: 100,
            multiprocessors: 148,
            shared_per_block: 227 << 10,
            memory_bytes: 1 << 34,
            l2_bytes: 1 << 25,
        };
        let shape = Shape { m: 300, n: 1000, k: 64 };
        assert_eq!(plan(&device, DType::BF16, shape, false), Err(Reason::Architecture { sm: 100 }));
        hopper(&mut device);
        let launch = plan(&device, DType::BF16, Shape { m: 100, ..shape }, false).unwrap().launch;
        assert_eq!((launch.grid, launch.shared_bytes), ([3, 1, 1], 217_152));
        assert_eq!(plan(&device, DType::F32, shape, false), Err(Reason::Precision));
        assert_eq!(
            plan(&device, DType::F16, Shape { k: 60, ..shape }, true),
            Err(Reason::Alignment { row_bytes: 120 })
        );
        device.shared_per_block = 99 << 10;
        let short = Reason::Shared { needed: 217_152, available: 101_376 };
        assert_eq!(plan(&device, DType::F16, shape, true), Err(short));
    }

    /// Values that bf16 and f16 hold exactly, and their bytes.
    fn exact(random: &mut Random, dtype: DType, n: usize) -> (Vec<f32>, Vec<u8>) {
        let values: Vec<f32> = (0..n).map(|_| (random.within(0, 64) as f32 - 32.0) / 16.0).collect();
        let mut bytes = Vec::new();
        quantize_row(dtype, &values, &mut bytes).unwrap();
        (values, bytes)
    }

    /// More tiles than blocks, edges in m, n and k, and more steps of k than stages.
    #[test]
    fn emulated_tiles_are_the_reference_in_every_order() {
        for (order, dtype, shape) in [
            (Order::Forward, DType::BF16, Shape { m: 150, n: 521, k: 136 }),
            (Order::Backward, DType::F16, Shape { m: 3, n: 300, k: 72 }),
            (Order::Shuffled(5), DType::BF16, Shape { m: 129, n: 40, k: 392 }),
        ] {
            let Ok(emulated) = Emulated::beside_the_program() else { return println!("skipped: no C++ compiler") };
            let emulated = Arc::new(emulated.with_properties(hopper));
            emulated.set_order(order);
            let device: Arc<dyn Device> = emulated;
            let mut random = Random::new(51);
            let Shape { m, n, k } = shape;
            let (x, x_bytes) = exact(&mut random, dtype, m * k);
            let x_on = Buffer::of(&device, &x_bytes).unwrap();
            let mut products = Vec::new();
            let mut weights = Vec::new();
            for _ in 0..2 {
                let (_, bytes) = exact(&mut random, dtype, n * k);
                let mut product = vec![0.0; m * n];
                reference::matmul(&x, &Matrix::new(dtype, n, k, &bytes).unwrap(), None, &mut product);
                products.push(product);
                weights.push(Buffer::of(&device, &bytes).unwrap());
            }
            let wgmma = Wgmma(device.clone());
            for gated in [false, true] {
                let y = Buffer::new(&device, m * n * 4).unwrap();
                let product = Product {
                    dtype,
                    shape,
                    x: x_on.address(),
                    w: weights[0].address(),
                    up: gated.then(|| weights[1].address()),
                    fp8: None,
                    bias: 0,
                    y: y.address(),
                    finish: STORE_F32,
                    activation: 0,
                };
                assert!(wgmma.takes(&product));
                // SAFETY: the buffers have the sizes of the shape.
                unsafe { wgmma.multiply(&product).unwrap() };
                device.synchronize().unwrap();
                let mut want = products[0].clone();
                if gated {
                    reference::silu_mul(&mut want, &products[1]);
                }
                assert_close(&y.to_vec(m * n).unwrap(), &want, 2e-6, 1e-5, &format!("{shape:?}, gated: {gated}"));
            }
        }
    }

    /// fp8 with a factor per row of x and of w.
    #[test]
    fn emulated_fp8_tiles_are_the_reference() {
        let Ok(emulated) = Emulated::beside_the_program() else { return println!("skipped: no C++ compiler") };
        let device: Arc<dyn Device> = Arc::new(emulated.with_properties(hopper));
        let mut random = Random::new(52);
        let (m, n, k) = (130, 270, 208);
        let mut matrix = |rows: usize| {
            // Without NaN, and small enough for exact sums.
            let codes: Vec<u8> = (0..rows * k).map(|_| random.bits() as u8 & 0xcf).collect();
            let factors: Vec<f32> = (0..rows).map(|_| random.within(1, 8) as f32 / 8.0).collect();
            let values = codes.iter().enumerate().map(|(i, code)| crate::kv::e4m3_to_f32(*code) * factors[i / k]);
            let values: Vec<f32> = values.collect();
            (Buffer::of(&device, &codes).unwrap(), Buffer::of(&device, &factors).unwrap(), values)
        };
        let (x, parts) = (matrix(m), [matrix(n), matrix(n)]);
        let y = Buffer::new(&device, m * n * 4).unwrap();
        let rows = Fp8Rows { address: x.0.address(), scales: x.1.address(), rows: m };
        let [w, up] = parts.each_ref().map(|(w, scales, _)| ScaledWeight {
            dtype: ScaledType::E4M3,
            n,
            k,
            address: w.address(),
            scales: scales.address(),
        });
        let wants = parts.each_ref().map(|(_, _, values)| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let mut want = vec![0.0; m * n];
            reference::matmul(&x.2, &Matrix::new(DType::F32, n, k, &bytes).unwrap(), None, &mut want);
            want
        });
        let plain = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
        let gated = ScaledFinish::Gated { up: &up, activation: Gate::Silu, to: DType::F32 };
        for (finish, is_gated) in [(plain, false), (gated, true)] {
            assert!(plan_fp8(device.properties(), Shape { m, n, k }, is_gated).is_ok());
            // SAFETY: the buffers have the sizes of the shape.
            unsafe { Wgmma(device.clone()).multiply(&scaled::product(&rows, &w, finish, y.address())).unwrap() };
            device.synchronize().unwrap();
            let (mut want, mut slack) = (wants[0].clone(), 1e-4);
            if is_gated {
                reference::silu_mul(&mut want, &wants[1]);
                slack *= wants[1].iter().fold(1.0f32, |most, v| most.max(v.abs()));
            }
            assert_close(&y.to_vec(m * n).unwrap(), &want, 2e-6, slack, "fp8");
        }
    }
}
