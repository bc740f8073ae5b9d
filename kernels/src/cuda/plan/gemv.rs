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
    let variant = [8, 32, 64].iter().position(|rows| m <= *rows).expect("at most 64 rows");
    let rows = [8, 32, 64][variant];
    let columns = if gated { COLUMNS / 2 } else { COLUMNS };
    let too_many = |i: &usize| (names[*i], Reason::Rows { rows: m, most: [8, 32, 64][*i] });
    Plan {
        kernel: Kernel { source, name: names[variant] },
        launch: Launch {
            grid: [n.div_ceil(columns) as u32, 1, 1],
            block: [WARPS as u32 * 32, 1, 1],
            shared_bytes: (WARPS * COLUMNS * (rows + 1) * 4) as u32,
        },
        rejected: (0..variant).map(|i| too_many(&i)).collect(),
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
