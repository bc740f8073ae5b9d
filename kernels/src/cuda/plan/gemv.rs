//! The plan of a product of 1 to 64 rows: the kernel by the weights' type and the number of rows, its blocks and shared memory.
//!
//! A block takes 32 columns of y for all rows, so that each weight is read once. The three row counts that kernels were compiled
//! for differ in registers and shared memory, not in the order in which a sum is made.

use super::gemm::{Plan, Reason, Shape};
use crate::DType;
use crate::cuda::device::{Kernel, Launch};

/// Most rows of one launch.
pub const ROWS_MAX: usize = 64;
const WARPS: usize = 8;
const COLUMNS: usize = 32;

macro_rules! names {
    ($($name:literal),*) => { [$(concat!("gemv_", $name)),*] };
}

/// For a type: the source, and the kernels for 8, 32 and 64 rows.
fn kernels(dtype: DType) -> Option<(&'static str, [&'static str; 3])> {
    const PLAIN: &str = "gemv_float.cu";
    const SMALL: &str = "gemv_quant.cu";
    const LARGE: &str = "gemv_quant_k.cu";
    Some(match dtype {
        DType::F32 => return None,
        DType::F16 => (PLAIN, names!("f16_8", "f16_32", "f16_64")),
        DType::BF16 => (PLAIN, names!("bf16_8", "bf16_32", "bf16_64")),
        DType::Q4_0 => (SMALL, names!("q4_0_8", "q4_0_32", "q4_0_64")),
        DType::Q4_1 => (SMALL, names!("q4_1_8", "q4_1_32", "q4_1_64")),
        DType::Q5_0 => (SMALL, names!("q5_0_8", "q5_0_32", "q5_0_64")),
        DType::Q5_1 => (SMALL, names!("q5_1_8", "q5_1_32", "q5_1_64")),
        DType::Q8_0 => (SMALL, names!("q8_0_8", "q8_0_32", "q8_0_64")),
        DType::IQ4NL => (SMALL, names!("iq4_nl_8", "iq4_nl_32", "iq4_nl_64")),
        DType::MXFP4 => (SMALL, names!("mxfp4_8", "mxfp4_32", "mxfp4_64")),
        DType::Q2K => (LARGE, names!("q2_k_8", "q2_k_32", "q2_k_64")),
        DType::Q3K => (LARGE, names!("q3_k_8", "q3_k_32", "q3_k_64")),
        DType::Q4K => (LARGE, names!("q4_k_8", "q4_k_32", "q4_k_64")),
        DType::Q5K => (LARGE, names!("q5_k_8", "q5_k_32", "q5_k_64")),
        DType::Q6K => (LARGE, names!("q6_k_8", "q6_k_32", "q6_k_64")),
    })
}

/// Plans a product with at most [`ROWS_MAX`] rows of x. All kernels take the same arguments.
///
/// # Panics
///
/// For an empty shape or more rows.
pub fn plan(dtype: DType, shape: Shape, gated: bool) -> Plan {
    let Shape { m, n, k } = shape;
    assert!(n > 0 && k > 0 && (1..=ROWS_MAX).contains(&m), "{shape:?} is no skinny product");
    // Blocks of quants are whole; plain rows must be whole numbers of 16 bytes.
    let aligned = dtype.block_len() > 1 || k.is_multiple_of(8);
    let Some((source, names)) = kernels(dtype).filter(|_| aligned) else {
        let (name, reason) = match dtype {
            DType::F32 => ("gemv_simt_f32", Reason::Precision),
            DType::F16 => ("gemv_simt_f16", Reason::Alignment { row_bytes: 2 * k }),
            _ => ("gemv_simt_bf16", Reason::Alignment { row_bytes: 2 * k }),
        };
        return Plan {
            kernel: Kernel { source: "gemv_float.cu", name },
            launch: Launch {
                grid: [n.div_ceil(8) as u32, m.div_ceil(8) as u32, 1],
                block: [256, 1, 1],
                shared_bytes: 0,
            },
            rejected: vec![("gemv", reason)],
        };
    };
    few(source, names, shape, gated)
}

/// Weights with factors in f32; see [`crate::cuda::ops::scaled`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ScaledType {
    /// fp8 with a factor per row.
    E4M3,
    /// fp8 with a factor for each 128 rows and 128 columns.
    E4M3Blocks,
    /// fp4 (e2m1) with an fp8 scale for each 16 elements, and a factor per row.
    NvFp4,
}

/// Rows and columns that a factor of [`ScaledType::E4M3Blocks`] covers.
pub const SCALED_BLOCK: usize = 128;

impl ScaledType {
    /// How many factors a matrix `[n, k]` has.
    pub const fn factors(self, n: usize, k: usize) -> usize {
        match self {
            Self::E4M3 | Self::NvFp4 => n,
            Self::E4M3Blocks => n.div_ceil(SCALED_BLOCK) * k.div_ceil(SCALED_BLOCK),
        }
    }

    /// Elements that rows are whole numbers of.
    pub const fn unit(self) -> usize {
        match self {
            Self::E4M3 | Self::E4M3Blocks => 8,
            Self::NvFp4 => 64,
        }
    }
}

/// As [`plan`], for weights with factors. Their kernels take the factors behind the other arguments.
///
/// # Panics
///
/// As [`plan`], and if k is not a whole number of units.
pub fn plan_scaled(weights: ScaledType, shape: Shape, gated: bool) -> Plan {
    let Shape { m, n, k } = shape;
    assert!(n > 0 && k > 0 && (1..=ROWS_MAX).contains(&m), "{shape:?} is no skinny product");
    assert!(k.is_multiple_of(weights.unit()), "rows of {k} elements");
    let names = match weights {
        ScaledType::E4M3 => names!("e4m3_8", "e4m3_32", "e4m3_64"),
        ScaledType::E4M3Blocks => names!("e4m3_blocks_8", "e4m3_blocks_32", "e4m3_blocks_64"),
        ScaledType::NvFp4 => names!("nvfp4_8", "nvfp4_32", "nvfp4_64"),
    };
    few("gemv_scaled.cu", names, shape, gated)
}

/// The kernel for so many rows, of those for 8, 32 and 64.
fn few(source: &'static str, names: [&'static str; 3], shape: Shape, gated: bool) -> Plan {
    const ROWS: [usize; 3] = [8, 32, 64];
    let m = shape.m;
    let variant = ROWS.iter().position(|rows| m <= *rows).expect("at most 64 rows");
    let columns = if gated { COLUMNS / 2 } else { COLUMNS };
    Plan {
        kernel: Kernel { source, name: names[variant] },
        launch: Launch {
            grid: [shape.n.div_ceil(columns) as u32, 1, 1],
            block: [WARPS as u32 * 32, 1, 1],
            shared_bytes: (WARPS * COLUMNS * (ROWS[variant] + 1) * 4) as u32,
        },
        rejected: (0..variant).map(|i| (names[i], Reason::Rows { rows: m, most: ROWS[i] })).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_choose_the_kernel() {
        let of = |m, gated| plan(DType::Q4K, Shape { m, n: 4096, k: 4096 }, gated);
        let one = of(1, false);
        assert_eq!((one.kernel.name, one.launch.grid, one.launch.shared_bytes), ("gemv_q4_k_8", [128, 1, 1], 9216));
        let some = of(9, true);
        assert_eq!((some.kernel.name, some.launch.grid), ("gemv_q4_k_32", [256, 1, 1]));
        assert_eq!(some.rejected, [("gemv_q4_k_8", Reason::Rows { rows: 9, most: 8 })]);
        let most = of(64, false);
        assert_eq!((most.kernel.name, most.launch.shared_bytes), ("gemv_q4_k_64", 66_560));
    }

    #[test]
    fn odd_rows_and_f32_go_without_tensor_cores() {
        let odd = plan(DType::BF16, Shape { m: 9, n: 17, k: 20 }, false);
        assert_eq!((odd.kernel.name, odd.launch.grid), ("gemv_simt_bf16", [3, 2, 1]));
        assert_eq!(plan(DType::F32, Shape { m: 1, n: 8, k: 64 }, false).rejected, [("gemv", Reason::Precision)]);
    }

    /// A block's shared memory fits every device since 8.0, and every type has kernels in the source it is said to be in.
    #[test]
    fn every_type_has_its_kernels() {
        for dtype in DType::ALL {
            for m in [1, 8, 9, 32, 33, 64] {
                let plan = plan(dtype, Shape { m, n: 100, k: 256 }, false);
                assert!(plan.launch.shared_bytes <= 99 << 10);
                let source = crate::cuda::source::Source::find(plan.kernel.source).expect("listed").text();
                let made = plan.kernel.name.trim_start_matches("gemv_simt_").trim_start_matches("gemv_");
                let made =
                    made.rsplit_once('_').filter(|_| !plan.kernel.name.contains("simt")).map_or(made, |(t, _)| t);
                assert!(
                    source.contains(&format!("({made}, ")),
                    "{} is not in {}",
                    plan.kernel.name,
                    plan.kernel.source
                );
            }
        }
    }
}
