//! Which instructions to use: chosen once at run time, printable, and lowered with `RIDGE_ISA` for comparison.
//!
//! | [`Isa`] | needs | lanes | bf16 weights are |
//! |---|---|---|---|
//! | `Scalar` | nothing | 4 | widened to f32 |
//! | `Avx2` | AVX2, FMA, F16C | 8 | widened to f32 |
//! | `Avx512` | AVX-512 F, BW, DQ, VL | 16 | widened to f32 |
//! | `Avx512Bf16` | the same and AVX512-BF16 | 16 | multiplied as they are, x rounded to bf16 |

use super::generic::attention::{Piece, Run, Scratch};
use super::generic::matmul::Product;
use crate::dtype::DType;
use crate::kv::KvFormat;
use std::sync::OnceLock;

/// An instruction set with kernels of its own, in rising order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Isa {
    /// Portable code.
    Scalar,
    /// x86-64-v3.
    Avx2,
    /// x86-64-v4.
    Avx512,
    /// x86-64-v4 with bf16 dot products.
    Avx512Bf16,
}

impl Isa {
    /// Every ISA, in rising order.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// The name `RIDGE_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            match self {
                Isa::Scalar => true,
                Isa::Avx2 => has!("avx2") && has!("fma") && has!("f16c") && has!("bmi1") && has!("bmi2"),
                Isa::Avx512 => {
                    Isa::Avx2.is_available()
                        && has!("avx512f")
                        && has!("avx512bw")
                        && has!("avx512dq")
                        && has!("avx512vl")
                }
                Isa::Avx512Bf16 => Isa::Avx512.is_available() && has!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Scalar
        }
    }

    /// The best ISA of this machine, or a lower one if `RIDGE_ISA` asks for it. Decided and logged once per process.
    pub fn detect() -> Isa {
        static CHOICE: OnceLock<Isa> = OnceLock::new();
        *CHOICE.get_or_init(|| {
            let best = Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar);
            let wish = std::env::var("RIDGE_ISA").ok();
            let isa = Isa::lowered(best, wish.as_deref());
            tracing::info!(isa = isa.name(), best = best.name(), "compute kernels chosen");
            isa
        })
    }

    /// `best`, or the available ISA below it that `wish` names. An unknown or higher name changes nothing.
    fn lowered(best: Isa, wish: Option<&str>) -> Isa {
        let Some(wish) = wish else { return best };
        match Isa::ALL.into_iter().find(|isa| isa.name() == wish) {
            Some(isa) if isa <= best => isa,
            _ => {
                tracing::warn!(wish, best = best.name(), "RIDGE_ISA is not an instruction set of this machine");
                best
            }
        }
    }
}

/// One ISA's compiled kernels. Calling one needs, besides its own contract, the ISA's features; [`Kernels::of`] gives the
/// table only where they exist, so a caller that has a table meets that part.
pub(crate) struct Kernels {
    pub(crate) matmul_f32: unsafe fn(&Product<f32>),
    /// The product on bf16 as stored, where the ISA has one.
    pub(crate) matmul_bf16: Option<unsafe fn(&Product<u16>)>,
    pub(crate) to_bf16: unsafe fn(&[f32], &mut [u16]),
    pub(crate) dequantize: unsafe fn(DType, &[u8], &mut [f32]),
    pub(crate) rms_norm: unsafe fn(*const f32, *mut f32, usize, &[f32], f32),
    pub(crate) rope: unsafe fn(&mut [f32], usize, &[f32], &[f32]),
    pub(crate) silu_mul: unsafe fn(&mut [f32], &[f32]),
    pub(crate) gelu_tanh_mul: unsafe fn(&mut [f32], &[f32]),
    pub(crate) add: unsafe fn(&mut [f32], &[f32]),
    pub(crate) attention: unsafe fn(&Piece<'_>, &mut Scratch),
    pub(crate) join_splits: unsafe fn(&Run<'_>, *mut f32, &mut Scratch),
    pub(crate) write_kv: unsafe fn(&KvFormat, &mut [u8], usize, &[f32], &[f32]),
}

impl Kernels {
    /// The kernels of `isa`, or `None` if this machine cannot run them.
    pub(crate) fn of(isa: Isa) -> Option<&'static Kernels> {
        if !isa.is_available() {
            return None;
        }
        match isa {
            Isa::Scalar => Some(const { &super::scalar::KERNELS }),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Some(const { &super::avx2::KERNELS }),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Some(const { &super::avx512::KERNELS }),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                Some(const { &Kernels { matmul_bf16: Some(super::avx512::bf16::matmul), ..super::avx512::KERNELS } })
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_only_lowers() {
        assert_eq!(Isa::lowered(Isa::Avx512, None), Isa::Avx512);
        assert_eq!(Isa::lowered(Isa::Avx512, Some("avx2")), Isa::Avx2);
        assert_eq!(Isa::lowered(Isa::Avx2, Some("avx512bf16")), Isa::Avx2);
        assert_eq!(Isa::lowered(Isa::Avx2, Some("mmx")), Isa::Avx2);
        assert!(Kernels::of(Isa::Scalar).is_some());
    }
}
