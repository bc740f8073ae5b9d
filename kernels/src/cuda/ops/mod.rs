//! Operations on device memory: each checks its shapes, takes a launch from [`super::plan`] and launches it.

pub mod attention;
pub mod blas;
pub mod dequantize;
pub mod gemm;
pub mod matmul;
pub mod measure;
pub mod pack;
pub mod pages;
pub mod rows;
pub mod sampling;
pub mod scaled;

use crate::DType;

/// One of three names, by an element type that activations have: f32, f16 or bf16.
///
/// # Panics
///
/// For a type that activations do not have.
fn by_type<T: Copy>(dtype: DType, [f32, f16, bf16]: [T; 3]) -> T {
    match dtype {
        DType::F32 => f32,
        DType::F16 => f16,
        DType::BF16 => bf16,
        other => panic!("activations are not {}", other.name()),
    }
}

/// Asserts that addresses are multiples of 16, the widest access: the emulator would not mind, a device fails.
#[track_caller]
fn assert_aligned(addresses: &[u64]) {
    for address in addresses {
        assert!(address.is_multiple_of(16), "{address:#x} is not a multiple of 16");
    }
}

/// Blocks that cover `n` elements, `each` a block.
fn blocks_of(n: usize, each: usize) -> u32 {
    u32::try_from(n.div_ceil(each)).expect("a grid of less than 2^32 blocks")
}

#[cfg(test)]
mod testing;
