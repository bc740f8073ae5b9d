//! AVX-512 (F, BW, DQ, VL; x86-64-v4): sixteen lanes, and with AVX512-BF16 the pairwise bf16 dot product.

use super::avx2::{fold_ymm, largest_ymm, sum4_xmm};
use super::vector::Vector;
use std::arch::x86_64::*;

/// Sixteen lanes; a value is only made where AVX-512 F, BW, DQ and VL are enabled.
#[derive(Clone, Copy)]
pub(crate) struct Zmm(__m512);

/// Lanes i and i + 8 added.
///
/// # Safety
/// The CPU has AVX-512 F and DQ.
#[inline(always)]
unsafe fn fold_zmm(v: __m512) -> __m256 {
    // SAFETY: by contract.
    unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)) }
}

#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

impl Vector for Zmm {
    const LANES: usize = 16;
    // 6 x 4 accumulators, 6 rows of x and one of w: 31 of the 32 registers.
    const TILE_ROWS: usize = 6;
    const TILE_QUERIES: usize = 6;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: AVX-512, by contract.
        Zmm(unsafe { _mm512_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: AVX-512 and sixteen readable floats, by contract.
        Zmm(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: AVX-512, by contract; the mask leaves `n` floats to read.
        Zmm(unsafe { _mm512_maskz_loadu_ps(first(n), p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: sixteen writable floats, by contract.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: the mask leaves `n` floats to write, which the contract allows.
        unsafe { _mm512_mask_storeu_ps(p, first(n), self.0) }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe { _mm512_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe { _mm512_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn exp2_integral(self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe { _mm512_scalef_ps(_mm512_set1_ps(1.0), self.0) })
    }
    #[inline(always)]
    fn zero_below(self, probe: Self, limit: f32) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(probe.0, _mm512_set1_ps(limit));
            _mm512_maskz_mov_ps(keep, self.0)
        })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        Self::sum4([self; 4])[0]
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { largest_ymm(_mm256_max_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))) }
    }
    #[inline(always)]
    fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: the values prove AVX-512.
        unsafe {
            let [a, b, c, d] = v;
            let halves = [fold_zmm(a.0), fold_zmm(b.0), fold_zmm(c.0), fold_zmm(d.0)];
            sum4_xmm([fold_ymm(halves[0]), fold_ymm(halves[1]), fold_ymm(halves[2]), fold_ymm(halves[3])])
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: AVX-512 and sixteen readable elements, by contract.
        Zmm(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: AVX-512 and sixteen readable elements, by contract.
        Zmm(unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: AVX-512 BW and VL and sixteen readable elements, by contract.
        Zmm(unsafe {
            // The sign is extended, so that one shift brings it to its place; bit 14 must then be cleared, or set for NaN.
            let w = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
            let next = _mm256_add_epi16(w, _mm256_set1_epi16(0x80));
            let nan = _mm256_testn_epi16_mask(next, _mm256_set1_epi16(0x3f80));
            let finite = _mm256_and_si256(w, _mm256_set1_epi16(0xbfff_u16 as i16));
            _mm512_cvtph_ps(_mm256_mask_mov_epi16(finite, nan, _mm256_set1_epi16(0x7f80)))
        })
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: AVX-512 and sixteen readable elements, by contract.
        Zmm(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

super::instantiate!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2", super::Zmm);

/// The bf16 matrix product of AVX512-BF16.
pub(super) mod bf16 {
    use super::*;
    use crate::cpu::generic::matmul::{Dot, Product, product};

    /// 32 bf16 lanes multiplied pairwise into 16 f32 accumulators.
    struct PairDot;

    impl Dot for PairDot {
        type Element = u16;
        type Lanes = __m512i;
        type Sum = Zmm;
        const STEP: usize = 32;
        const TILE_ROWS: usize = 6;

        #[inline(always)]
        unsafe fn zero() -> Zmm {
            // SAFETY: AVX-512, by contract.
            unsafe { Zmm::splat(0.0) }
        }
        #[inline(always)]
        unsafe fn load(p: *const u16) -> __m512i {
            // SAFETY: AVX-512 and 32 readable elements, by contract.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn load_first(p: *const u16, n: usize) -> __m512i {
            // SAFETY: AVX-512 BW, by contract; the mask leaves `n` elements to read.
            unsafe { _mm512_maskz_loadu_epi16(((1u64 << n) - 1) as __mmask32, p.cast()) }
        }
        #[inline(always)]
        unsafe fn dot(sum: Zmm, a: __m512i, b: __m512i) -> Zmm {
            // SAFETY: `__m512bh` is the same 512 bits.
            let (a, b) =
                unsafe { (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b)) };
            // SAFETY: AVX512-BF16, by contract.
            Zmm(unsafe { _mm512_dpbf16_ps(sum.0, a, b) })
        }
        #[inline(always)]
        fn sum4(v: [Zmm; 4]) -> [f32; 4] {
            Vector::sum4(v)
        }
    }

    /// See [`product`].
    ///
    /// # Safety
    /// As [`product`], and the CPU has AVX512-BF16 besides AVX-512 F, BW, DQ and VL.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(in crate::cpu) unsafe fn matmul(p: &Product<u16>) {
        // SAFETY: passed on.
        unsafe { product::<PairDot>(p) }
    }
}
