//! Loops that only multiply and add: many chains, each waiting for nothing but itself, all in registers.

/// A loop of chains.
#[derive(Clone, Copy)]
pub(super) struct Chains {
    /// Runs some ten microseconds and returns the operations done, two per product. The instructions it needs must be
    /// available.
    pub(super) run: unsafe fn() -> u64,
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{bf16, f32, int8};

#[cfg(not(target_arch = "x86_64"))]
pub(super) use portable::{bf16, f32, int8};

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Twenty-four chains of 64 bytes, or twelve of 32: more than latency times ports of any core so far, and they fit
    //! in the registers beside the factors.

    use super::{Chains, portable};
    use std::arch::is_x86_feature_detected as has;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    const ROUNDS: usize = 4096;
    const ZMM: usize = 24;
    const YMM: usize = 12;

    /// f32 multiply-adds.
    pub(in super::super) fn f32() -> Chains {
        if has!("avx512f") {
            return Chains { run: f32_zmm };
        }
        if has!("avx2") && has!("fma") {
            return Chains { run: f32_ymm };
        }
        portable::f32()
    }

    /// bf16 dot products, if the machine has them.
    pub(in super::super) fn bf16() -> Option<Chains> {
        (has!("avx512f") && has!("avx512bf16")).then_some(Chains { run: bf16_zmm })
    }

    /// Dot products of unsigned and signed bytes, if the machine has them.
    pub(in super::super) fn int8() -> Option<Chains> {
        if has!("avx512f") && has!("avx512vnni") {
            return Some(Chains { run: int8_zmm });
        }
        (has!("avx2") && has!("avxvnni")).then_some(Chains { run: int8_ymm })
    }

    #[target_feature(enable = "avx512f")]
    fn f32_zmm() -> u64 {
        let mut sums = black_box([_mm512_set1_ps(1.0); ZMM]);
        let half = black_box(_mm512_set1_ps(0.5));
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, half, half);
            }
        }
        black_box(sums);
        (ROUNDS * ZMM * 16 * 2) as u64
    }

    #[target_feature(enable = "avx2,fma")]
    fn f32_ymm() -> u64 {
        let mut sums = black_box([_mm256_set1_ps(1.0); YMM]);
        let half = black_box(_mm256_set1_ps(0.5));
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, half, half);
            }
        }
        black_box(sums);
        (ROUNDS * YMM * 8 * 2) as u64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16_zmm() -> u64 {
        let mut sums = black_box([_mm512_set1_ps(1.0); ZMM]);
        let factor = black_box(_mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.25)));
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        (ROUNDS * ZMM * 32 * 2) as u64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8_zmm() -> u64 {
        let mut sums = black_box([_mm512_set1_epi32(1); ZMM]);
        let factor = black_box(_mm512_set1_epi8(3));
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        black_box(sums);
        (ROUNDS * ZMM * 64 * 2) as u64
    }

    #[target_feature(enable = "avx2,avxvnni")]
    fn int8_ymm() -> u64 {
        let mut sums = black_box([_mm256_set1_epi32(1); YMM]);
        let factor = black_box(_mm256_set1_epi8(3));
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, factor, factor);
            }
        }
        black_box(sums);
        (ROUNDS * YMM * 32 * 2) as u64
    }
}

mod portable {
    //! What the compiler makes of it. Neither 16-bit nor 8-bit products are counted without instructions for them.

    use super::Chains;
    use std::hint::black_box;

    const ROUNDS: usize = 4096;
    const CHAINS: usize = 48;

    /// f32 multiplications and additions, rounded apart: a portable build may not assume that they fuse.
    pub(in super::super) fn f32() -> Chains {
        Chains { run: f32_array }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(in super::super) fn bf16() -> Option<Chains> {
        None
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(in super::super) fn int8() -> Option<Chains> {
        None
    }

    fn f32_array() -> u64 {
        let mut sums = black_box([1.0f32; CHAINS]);
        let half = black_box(0.5);
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = *sum * half + half;
            }
        }
        black_box(sums);
        (ROUNDS * CHAINS * 2) as u64
    }

    #[cfg(test)]
    mod tests {
        #[test]
        fn the_portable_loop_counts_its_operations() {
            // SAFETY: portable code needs no feature.
            assert_eq!(unsafe { (super::f32().run)() }, (super::ROUNDS * super::CHAINS * 2) as u64);
        }
    }
}
