//! Which instructions to use: chosen once at run time, printable, and lowered with `RIDGE_ISA` for comparison.
//!
//! | [`Isa`] | needs | lanes | bf16 weights are | bytes are multiplied |
//! |---|---|---|---|---|
//! | `Scalar` | nothing | 4 | widened to f32 | one by one |
//! | `Neon` | aarch64 | 4 | widened to f32 | as 16 bits |
//! | `Avx2` | AVX2, FMA, F16C | 8 | widened to f32 | as 16 bits |
//! | `Avx512` | AVX-512 F, BW, DQ, VL | 16 | widened to f32 | as 16 bits |
//! | `Avx512Vnni` | the same and VNNI | 16 | widened to f32 | four at a time |
//! | `Avx512Bf16` | the same and BF16 | 16 | multiplied as they are, x rounded to bf16 | four at a time |
//!
//! Having `vdpbf16ps` does not mean that it is worth using. Measured per core: 90 GFLOP/s against 184 of f32 on an Intel Xeon of
//! model 207, 518 against 258 on an AMD EPYC of Zen 5. So the default takes it on AMD only. The choice is made by vendor and
//! not by a timing at start, because every process of a machine must choose alike to compute the same tokens.

use super::generic::attention::{Piece, Run, Scratch};
use super::generic::digest::Lanes;
use super::generic::matmul::{Job, Scratch as MatmulScratch};
use super::operand::Part;
use crate::dtype::DType;
use crate::kv::{KvFormat, KvMove};
use std::sync::OnceLock;

/// An instruction set with kernels of its own, in rising order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Isa {
    /// Portable code.
    Scalar,
    /// Every aarch64.
    Neon,
    /// x86-64-v3.
    Avx2,
    /// x86-64-v4.
    Avx512,
    /// x86-64-v4 with byte dot products.
    Avx512Vnni,
    /// The same with bf16 dot products.
    Avx512Bf16,
}

impl Isa {
    /// Every ISA, in rising order.
    pub const ALL: [Isa; 6] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Avx512Bf16];

    /// The name `RIDGE_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
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
                Isa::Neon => false,
                Isa::Avx2 => has!("avx2") && has!("fma") && has!("f16c") && has!("bmi1") && has!("bmi2"),
                Isa::Avx512 => {
                    Isa::Avx2.is_available()
                        && has!("avx512f")
                        && has!("avx512bw")
                        && has!("avx512dq")
                        && has!("avx512vl")
                }
                Isa::Avx512Vnni => Isa::Avx512.is_available() && has!("avx512vnni"),
                Isa::Avx512Bf16 => Isa::Avx512Vnni.is_available() && has!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Scalar || self == Isa::Neon && cfg!(target_arch = "aarch64")
        }
    }

    /// Whether the default may choose it here: see the module's text.
    fn pays(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Isa::Avx512Bf16 {
            let id = std::arch::x86_64::__cpuid(0);
            let vendor = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes);
            return vendor.as_flattened() == b"AuthenticAMD";
        }
        true
    }

    /// The best ISA of this machine, or the one that `RIDGE_ISA` asks for. Decided and logged once per process.
    pub fn detect() -> Isa {
        static CHOICE: OnceLock<Isa> = OnceLock::new();
        *CHOICE.get_or_init(|| {
            let usable = |isa: &Isa| isa.is_available() && isa.pays();
            let best = Isa::ALL.into_iter().rev().find(usable).unwrap_or(Isa::Scalar);
            let wish = std::env::var("RIDGE_ISA").ok();
            let isa = Isa::wished(best, wish.as_deref());
            tracing::info!(isa = isa.name(), best = best.name(), "compute kernels chosen");
            isa
        })
    }

    /// The available ISA that `wish` names, or `best`.
    fn wished(best: Isa, wish: Option<&str>) -> Isa {
        let Some(wish) = wish else { return best };
        match Isa::ALL.into_iter().find(|isa| isa.name() == wish) {
            Some(isa) if isa.is_available() => isa,
            _ => {
                let have = Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name);
                let have = have.collect::<Vec<_>>().join(", ");
                tracing::warn!(
                    wish,
                    have,
                    "RIDGE_ISA is not an instruction set of this machine; using {}",
                    best.name()
                );
                best
            }
        }
    }
}

/// One ISA's compiled kernels. Calling one needs, besides its own contract, the ISA's features; [`Kernels::of`] gives the
/// table only where they exist, so a caller that has a table meets that part.
pub(crate) struct Kernels {
    pub(crate) strip: unsafe fn(&Job<'_>, &mut MatmulScratch),
    /// Makes rows of x ready for `strip`.
    pub(crate) prepare: unsafe fn(&mut Part<'_>),
    /// Whether `strip` multiplies pairs of bf16.
    pub(crate) pairs: bool,
    /// Rows in the register tile of floats (or pairs), and of bytes.
    pub(crate) float_rows: usize,
    pub(crate) byte_rows: usize,
    pub(crate) dequantize: unsafe fn(DType, &[u8], &mut [f32]),
    pub(crate) rms_norm: unsafe fn(*const f32, *mut f32, usize, &[f32], f32),
    pub(crate) rope: unsafe fn(&mut [f32], usize, &[f32], &[f32]),
    pub(crate) silu_mul: unsafe fn(&mut [f32], &[f32]),
    pub(crate) gelu_tanh_mul: unsafe fn(&mut [f32], &[f32]),
    pub(crate) add: unsafe fn(&mut [f32], &[f32]),
    pub(crate) attention: unsafe fn(&Piece<'_>, &mut Scratch),
    pub(crate) join_splits: unsafe fn(&Run<'_>, *mut f32, &mut Scratch),
    pub(crate) write_kv: unsafe fn(&KvFormat, &mut [u8], usize, &[f32], &[f32]),
    pub(crate) convert_kv: unsafe fn(&KvFormat, &[u8], &KvFormat, &mut [u8], KvMove),
    pub(crate) copy_digested: unsafe fn(&mut Lanes, *const u8, *mut u8, usize, bool),
}

impl Kernels {
    /// The kernels of `isa`, or `None` if this machine cannot run them.
    pub(crate) fn of(isa: Isa) -> Option<&'static Kernels> {
        if !isa.is_available() {
            return None;
        }
        match isa {
            Isa::Scalar => Some(const { &super::scalar::KERNELS }),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Some(const { &super::neon::KERNELS }),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Some(const { &super::avx2::KERNELS }),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Some(const { &super::avx512::KERNELS }),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                Some(const { &Kernels { strip: super::avx512::extended::strip_vnni, ..super::avx512::KERNELS } })
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                const BF16: Kernels =
                    Kernels { strip: super::avx512::extended::strip_bf16, pairs: true, ..super::avx512::KERNELS };
                Some(&BF16)
            }
            // Of other machines.
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_chooses_what_is_there() {
        assert_eq!(Isa::wished(Isa::Avx512, None), Isa::Avx512);
        assert_eq!(Isa::wished(Isa::Avx512, Some("scalar")), Isa::Scalar);
        assert_eq!(Isa::wished(Isa::Avx2, Some("mmx")), Isa::Avx2);
        let bf16 = Isa::wished(Isa::Scalar, Some("avx512bf16"));
        assert_eq!(bf16 == Isa::Avx512Bf16, Isa::Avx512Bf16.is_available());
        assert!(Kernels::of(Isa::Scalar).is_some());
    }
}
