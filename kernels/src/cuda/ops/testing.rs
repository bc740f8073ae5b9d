//! What the tests of the operations share: a device in every order of threads, and rows of every type.

use crate::DType;
use crate::cuda::emulated::{Emulated, Order};
use crate::cuda::{Buffer, Device};
use crate::quant::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use std::sync::Arc;

/// The types that activations have.
pub(crate) const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Calls `test` with the emulated device, its threads run in each order; says so and does nothing where there is no compiler.
pub(crate) fn in_every_order(test: impl Fn(&Arc<dyn Device>, Order)) {
    let Some(emulated) = Emulated::for_tests() else { return };
    let device: Arc<dyn Device> = emulated.clone();
    for order in Order::ALL {
        emulated.set_order(order);
        test(&device, order);
        device.synchronize().unwrap();
    }
}

/// `values` as bytes of the type.
pub(crate) fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|v| f32_to_f16(*v).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|v| f32_to_bf16(*v).to_le_bytes()).collect(),
        _ => unreachable!("not a type of activations"),
    }
}

/// Bytes of the type as numbers.
pub(crate) fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    match dtype {
        DType::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        DType::F16 => halves().map(f16_to_f32).collect(),
        DType::BF16 => halves().map(bf16_to_f32).collect(),
        _ => unreachable!("not a type of activations"),
    }
}

/// What rounding to the type may cost, relatively.
pub(crate) fn precision(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-6,
        DType::F16 => 6e-4,
        _ => 5e-3,
    }
}

/// Values on the device.
pub(crate) fn on(device: &Arc<dyn Device>, values: &[f32]) -> Buffer {
    Buffer::of(device, values).unwrap()
}

/// `n` poisoned elements of the type.
pub(crate) fn poisoned(device: &Arc<dyn Device>, dtype: DType, n: usize) -> Buffer {
    Buffer::new(device, n * dtype.block_bytes()).unwrap()
}

/// What a buffer holds, as numbers.
pub(crate) fn read(buffer: &Buffer, dtype: DType) -> Vec<f32> {
    decode(dtype, &buffer.to_vec::<u8>(buffer.bytes()).unwrap())
}
