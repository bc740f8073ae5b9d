//! AVX-512 (F, BW, DQ, VL; x86-64-v4): sixteen lanes, and with AVX512-BF16 the pairwise bf16 dot product.

use super::avx2::{fold_ymm, largest_ymm, sum_xmm};
use super::vector::{BytesDot, Vector, WordsDot};
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

/// The bfloat16 elements with even and with odd indices, as floats: one instruction each, where widening neighbours takes two.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn deal_words(words: __m512i) -> [Zmm; 2] {
    // SAFETY: by contract.
    unsafe {
        let odd = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000u32 as i32));
        [Zmm(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))), Zmm(_mm512_castsi512_ps(odd))]
    }
}

#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

impl Vector for Zmm {
    const LANES: usize = 16;
    // 6 x 4 sums, four registers of w and one of x: 29 of the 32. With 12 x 2 it would be 14 loads for 24 products, not 10.
    const FLOAT_ROWS: usize = 6;
    // 6 x 2 (or 3 x 4) sums and as many dots.
    const BYTE_ROWS: usize = 6;
    const FOUR: bool = true;
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
    unsafe fn load_half_of_pairs(p: *const u32, which: usize) -> Self {
        // SAFETY: AVX-512 and sixteen readable words, by contract.
        Zmm(unsafe {
            let words = _mm512_loadu_si512(p.cast());
            _mm512_castsi512_ps(match which {
                0 => _mm512_slli_epi32::<16>(words),
                _ => _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000u32 as i32)),
            })
        })
    }
    #[inline(always)]
    unsafe fn look_up(levels: &[u8; 16], bytes: &mut [u8; 2048]) {
        // SAFETY: AVX-512 BW, by contract; 2048 bytes are 32 registers.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(levels.as_ptr().cast()));
            for i in 0..32 {
                let p = bytes.as_mut_ptr().add(64 * i);
                let indices = _mm512_loadu_si512(p.cast());
                _mm512_storeu_si512(p.cast(), _mm512_shuffle_epi8(table, indices));
            }
        }
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
    fn times_exp2(self, n: Self) -> Self {
        // SAFETY: `self` proves AVX-512.
        Zmm(unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(n.0, _mm512_set1_ps(-126.0));
            _mm512_maskz_scalef_ps(keep, self.0, n.0)
        })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { sum_xmm(fold_ymm(fold_zmm(self.0))) }
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { largest_ymm(_mm256_max_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))) }
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
    unsafe fn load_bf16_dealt(a: *const u8, b: *const u8) -> [Self; 2] {
        // SAFETY: AVX-512 and sixteen readable elements each, by contract.
        unsafe {
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(a.cast()));
            deal_words(_mm512_inserti64x4::<1>(low, _mm256_loadu_si256(b.cast())))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_dealt_neighbours(p: *const u8) -> [Self; 2] {
        // SAFETY: AVX-512 and thirty-two readable elements, by contract.
        unsafe { deal_words(_mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    fn deal([a, b]: [Self; 2]) -> [Self; 2] {
        // SAFETY: `a` proves AVX-512.
        unsafe {
            let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
            let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
            [Zmm(_mm512_permutex2var_ps(a.0, even, b.0)), Zmm(_mm512_permutex2var_ps(a.0, odd, b.0))]
        }
    }
    #[inline(always)]
    fn undeal([even, odd]: [Self; 2]) -> [Self; 2] {
        // SAFETY: `even` proves AVX-512.
        unsafe {
            let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            let high = _mm512_or_si512(low, _mm512_set1_epi32(8));
            [Zmm(_mm512_permutex2var_ps(even.0, low, odd.0)), Zmm(_mm512_permutex2var_ps(even.0, high, odd.0))]
        }
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
    unsafe fn stream(p: *mut [u64; 8], stripe: &[u64; 8]) {
        // SAFETY: this ISA, and 64 writable, aligned bytes, by contract.
        unsafe {
            _mm512_stream_si512(p.cast(), _mm512_loadu_si512(stripe.as_ptr().cast()));
        }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(p: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

/// Bytes widened to 16 bits and multiplied pairwise: without VNNI, the instruction for bytes saturates.
pub(crate) struct Widening;

/// The four-byte dot product of AVX512-VNNI.
pub(crate) struct Vnni;

/// What both kinds of byte products have in common.
macro_rules! ints {
    () => {
        type Ints = __m512i;

        #[inline(always)]
        unsafe fn splat(v: i32) -> __m512i {
            // SAFETY: AVX-512, by contract.
            unsafe { _mm512_set1_epi32(v) }
        }
        #[inline(always)]
        unsafe fn load(p: *const u32) -> __m512i {
            // SAFETY: AVX-512 and sixteen readable words, by contract.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn broadcast(p: *const u32) -> __m512i {
            // SAFETY: AVX-512 and a readable word, by contract.
            unsafe { _mm512_set1_epi32(*p as i32) }
        }
        #[inline(always)]
        fn floats(v: __m512i) -> Zmm {
            // SAFETY: the value proves AVX-512.
            Zmm(unsafe { _mm512_cvtepi32_ps(v) })
        }
        #[inline(always)]
        fn bits(v: __m512i, from: u32, width: u32) -> __m512i {
            // SAFETY: the value proves AVX-512.
            unsafe {
                let mask = _mm512_set1_epi8((1i8 << width) - 1);
                _mm512_and_si512(_mm512_srl_epi32(v, _mm_cvtsi32_si128(from as i32)), mask)
            }
        }
        #[inline(always)]
        fn top(low: __m512i, v: __m512i, from: u32, width: u32, at: u32) -> __m512i {
            // SAFETY: the values prove AVX-512.
            unsafe {
                let shifted = if from > at {
                    _mm512_srl_epi32(v, _mm_cvtsi32_si128((from - at) as i32))
                } else {
                    _mm512_sll_epi32(v, _mm_cvtsi32_si128((at - from) as i32))
                };
                let mask = _mm512_set1_epi8((((1u32 << width) - 1) << at) as i8);
                // (shifted & mask) | low
                _mm512_ternarylogic_epi32::<0xea>(shifted, mask, low)
            }
        }
        #[inline(always)]
        unsafe fn levels(levels: &[u8; 16]) -> __m512i {
            // SAFETY: AVX-512 and sixteen readable bytes.
            unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(levels.as_ptr().cast())) }
        }
        #[inline(always)]
        fn look_up(levels: __m512i, v: __m512i) -> __m512i {
            // SAFETY: the values prove AVX-512 BW.
            unsafe { _mm512_shuffle_epi8(levels, v) }
        }
    };
}

impl BytesDot<Zmm> for Widening {
    ints!();

    #[inline(always)]
    fn dot(sum: __m512i, unsigned: __m512i, signed: __m512i) -> __m512i {
        // SAFETY: the values prove AVX-512 BW.
        unsafe {
            // Even bytes, then odd bytes, each as 16 bits.
            let even = _mm512_and_si512(unsigned, _mm512_set1_epi16(255));
            let even = _mm512_madd_epi16(even, _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(signed)));
            let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(unsigned), _mm512_srai_epi16::<8>(signed));
            _mm512_add_epi32(sum, _mm512_add_epi32(even, odd))
        }
    }
}

impl BytesDot<Zmm> for Vnni {
    ints!();

    #[inline(always)]
    fn dot(sum: __m512i, unsigned: __m512i, signed: __m512i) -> __m512i {
        // SAFETY: AVX512-VNNI: this type is only named in functions compiled and called with it.
        unsafe { _mm512_dpbusd_epi32(sum, unsigned, signed) }
    }
}

/// Pairs of bf16, by the dot product of AVX512-BF16.
pub(crate) struct Bf16Pairs;

impl WordsDot<Zmm> for Bf16Pairs {
    type Words = __m512i;
    const BYTES: usize = 4;
    const STEPS: usize = 1;

    #[inline(always)]
    unsafe fn load(p: *const u8, _: usize) -> __m512i {
        // SAFETY: AVX-512 and sixteen readable words, by contract.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> __m512i {
        // SAFETY: AVX-512 and a readable word, by contract.
        unsafe { _mm512_set1_epi32(*p as i32) }
    }
    #[inline(always)]
    fn dot(sum: Zmm, a: __m512i, b: __m512i) -> Zmm {
        // SAFETY: `__m512bh` is the same 512 bits; AVX512-BF16, because this type is only named in functions compiled and
        // called with it.
        unsafe {
            let (a, b) = (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b));
            Zmm(_mm512_dpbf16_ps(sum.0, a, b))
        }
    }
}

super::instantiate!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2", super::Zmm, super::Widening);

/// The products that newer extensions compute otherwise.
pub(super) mod extended {
    use super::{Bf16Pairs, Vnni, Zmm};
    use crate::cpu::generic::bytes;
    use crate::cpu::generic::matmul::{Job, NoPairs, Scratch, strip};

    impl bytes::ByteTiles<Zmm> for Vnni {
        #[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2")]
        unsafe fn tile<Q: bytes::Kind, const M: usize, const R: usize>(t: &bytes::ByteTile<'_>) {
            // SAFETY: passed on.
            unsafe { bytes::byte_tile::<Zmm, Vnni, Q, M, R>(t) }
        }
    }

    /// See [`strip`].
    ///
    /// # Safety
    /// As [`strip`], and the CPU has AVX512-VNNI.
    #[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2")]
    pub(in crate::cpu) unsafe fn strip_vnni(job: &Job<'_>, scratch: &mut Scratch) {
        // SAFETY: passed on.
        unsafe { strip::<Zmm, NoPairs, Vnni>(job, scratch) }
    }

    /// See [`strip`].
    ///
    /// # Safety
    /// As [`strip`], and the CPU has AVX512-VNNI and AVX512-BF16.
    #[target_feature(enable = "avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2")]
    pub(in crate::cpu) unsafe fn strip_bf16(job: &Job<'_>, scratch: &mut Scratch) {
        // SAFETY: passed on.
        unsafe { strip::<Zmm, Bf16Pairs, Vnni>(job, scratch) }
    }
}
