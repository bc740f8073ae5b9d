//! AVX2 with FMA and F16C (x86-64-v3): eight lanes.

use super::vector::{BytesDot, Vector};
use std::arch::x86_64::*;

/// Eight lanes; a value is only made where AVX2 and FMA are enabled.
#[derive(Clone, Copy)]
pub(crate) struct Ymm(__m256);

/// Mask of the first `n` of eight lanes.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn first(n: usize) -> __m256i {
    // SAFETY: AVX2, by contract.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

/// Sum of four lanes, `(l0 + l2) + (l1 + l3)`.
///
/// # Safety
/// The CPU has SSE (every x86-64 does).
#[inline(always)]
pub(super) unsafe fn sum_xmm(v: __m128) -> f32 {
    // SAFETY: SSE only.
    unsafe {
        let pairs = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps::<1>(pairs, pairs)))
    }
}

/// Lanes i and i + 4 added.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub(super) unsafe fn fold_ymm(v: __m256) -> __m128 {
    // SAFETY: AVX, by contract.
    unsafe { _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)) }
}

/// Largest of eight lanes.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub(super) unsafe fn largest_ymm(v: __m256) -> f32 {
    // SAFETY: AVX, by contract.
    unsafe {
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

/// The bfloat16 elements with even and with odd indices, as floats.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn deal_words(words: __m256i) -> [Ymm; 2] {
    // SAFETY: by contract.
    unsafe {
        let odd = _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000u32 as i32));
        [Ymm(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))), Ymm(_mm256_castsi256_ps(odd))]
    }
}

impl Vector for Ymm {
    const LANES: usize = 8;
    // 6 x 2 sums, two registers of w and one of x: 15 of the 16.
    const FLOAT_ROWS: usize = 6;
    // 2 x 2 sums and dots, and what the dot product needs itself.
    const BYTE_ROWS: usize = 2;
    const FOUR: bool = false;
    const TILE_QUERIES: usize = 2;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: AVX2, by contract.
        Ymm(unsafe { _mm256_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: AVX2 and eight readable floats, by contract.
        Ymm(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: AVX2, by contract; the mask leaves `n` floats to read.
        Ymm(unsafe { _mm256_maskload_ps(p, first(n)) })
    }
    #[inline(always)]
    unsafe fn look_up(levels: &[u8; 16], bytes: &mut [u8; 2048]) {
        // SAFETY: AVX2, by contract; 2048 bytes are 64 registers.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(levels.as_ptr().cast()));
            for i in 0..64 {
                let p = bytes.as_mut_ptr().add(32 * i).cast();
                _mm256_storeu_si256(p, _mm256_shuffle_epi8(table, _mm256_loadu_si256(p)));
            }
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: eight writable floats, by contract.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: the mask leaves `n` floats to write, which the contract allows.
        unsafe { _mm256_maskstore_ps(p, first(n), self.0) }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        Ymm(unsafe { _mm256_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        Ymm(unsafe { _mm256_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        Ymm(unsafe { _mm256_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        Ymm(unsafe { _mm256_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: `self` proves AVX2.
        Ymm(unsafe { _mm256_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: `self` proves FMA.
        Ymm(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: `self` proves AVX2.
        Ymm(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn exp2_integral(self) -> Self {
        // SAFETY: `self` proves AVX2.
        Ymm(unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        })
    }
    #[inline(always)]
    fn zero_below(self, probe: Self, limit: f32) -> Self {
        // SAFETY: `self` proves AVX2.
        Ymm(unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(probe.0, _mm256_set1_ps(limit)), self.0) })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: `self` proves AVX.
        unsafe { sum_xmm(fold_ymm(self.0)) }
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: `self` proves AVX.
        unsafe { largest_ymm(self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: F16C and eight readable elements, by contract.
        Ymm(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: AVX2 and eight readable elements, by contract.
        Ymm(unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    unsafe fn load_bf16_dealt(a: *const u8, b: *const u8) -> [Self; 2] {
        // SAFETY: AVX2 and eight readable elements each, by contract.
        unsafe {
            let low = _mm256_castsi128_si256(_mm_loadu_si128(a.cast()));
            deal_words(_mm256_inserti128_si256::<1>(low, _mm_loadu_si128(b.cast())))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_dealt_neighbours(p: *const u8) -> [Self; 2] {
        // SAFETY: AVX2 and sixteen readable elements, by contract.
        unsafe { deal_words(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    fn deal([a, b]: [Self; 2]) -> [Self; 2] {
        // SAFETY: `a` proves AVX2.
        unsafe {
            // [a0 a2 b0 b2 | a4 a6 b4 b6] to [a0 a2 a4 a6 | b0 b2 b4 b6], and the odd ones likewise.
            let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(a.0, b.0));
            let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(a.0, b.0));
            [
                Ymm(_mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(even))),
                Ymm(_mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(odd))),
            ]
        }
    }
    #[inline(always)]
    fn undeal([even, odd]: [Self; 2]) -> [Self; 2] {
        // SAFETY: `even` proves AVX2.
        unsafe {
            // [a0 a1 a2 a3 | b0 b1 b2 b3] and [a4 a5 a6 a7 | b4 b5 b6 b7].
            let (low, high) = (_mm256_unpacklo_ps(even.0, odd.0), _mm256_unpackhi_ps(even.0, odd.0));
            [Ymm(_mm256_permute2f128_ps::<0x20>(low, high)), Ymm(_mm256_permute2f128_ps::<0x31>(low, high))]
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: AVX2, F16C and eight readable elements, by contract.
        Ymm(unsafe {
            // The sign is extended, so that one shift brings it to its place; bit 14 must then be cleared, or set for NaN.
            let w = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(_mm_loadl_epi64(p.cast())));
            let magnitude = _mm_and_si128(w, _mm_set1_epi16(0x3f80));
            let nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x3f80));
            let finite = _mm_and_si128(w, _mm_set1_epi16(0xbfff_u16 as i16));
            _mm256_cvtph_ps(_mm_or_si128(finite, _mm_and_si128(nan, _mm_set1_epi16(0x4000))))
        })
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: AVX2 and eight readable elements, by contract.
        Ymm(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn stream(p: *mut [u64; 8], stripe: &[u64; 8]) {
        // SAFETY: this ISA, and 64 writable, aligned bytes, by contract.
        unsafe {
            let from = stripe.as_ptr().cast::<__m256i>();
            _mm256_stream_si256(p.cast(), _mm256_loadu_si256(from));
            _mm256_stream_si256(p.cast::<__m256i>().add(1), _mm256_loadu_si256(from.add(1)));
        }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// Bytes widened to 16 bits and multiplied pairwise: the instruction for bytes saturates.
pub(crate) struct Widening;

impl BytesDot<Ymm> for Widening {
    type Ints = __m256i;

    #[inline(always)]
    unsafe fn splat(v: i32) -> __m256i {
        // SAFETY: AVX2, by contract.
        unsafe { _mm256_set1_epi32(v) }
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> __m256i {
        // SAFETY: AVX2 and eight readable words, by contract.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> __m256i {
        // SAFETY: AVX2 and a readable word, by contract.
        unsafe { _mm256_set1_epi32(*p as i32) }
    }
    #[inline(always)]
    fn dot(sum: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        // SAFETY: the values prove AVX2.
        unsafe {
            // Even bytes, then odd bytes, each as 16 bits.
            let even = _mm256_and_si256(unsigned, _mm256_set1_epi16(255));
            let even = _mm256_madd_epi16(even, _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(signed)));
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(unsigned), _mm256_srai_epi16::<8>(signed));
            _mm256_add_epi32(sum, _mm256_add_epi32(even, odd))
        }
    }
    #[inline(always)]
    fn floats(v: __m256i) -> Ymm {
        // SAFETY: the value proves AVX2.
        Ymm(unsafe { _mm256_cvtepi32_ps(v) })
    }
    #[inline(always)]
    fn bits(v: __m256i, from: u32, width: u32) -> __m256i {
        // SAFETY: the value proves AVX2.
        unsafe {
            let mask = _mm256_set1_epi8((1i8 << width) - 1);
            _mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(from as i32)), mask)
        }
    }
    #[inline(always)]
    fn top(low: __m256i, v: __m256i, from: u32, width: u32, at: u32) -> __m256i {
        // SAFETY: the values prove AVX2.
        unsafe { _mm256_or_si256(low, _mm256_sll_epi32(Self::bits(v, from, width), _mm_cvtsi32_si128(at as i32))) }
    }
    #[inline(always)]
    unsafe fn levels(levels: &[u8; 16]) -> __m256i {
        // SAFETY: AVX2 and sixteen readable bytes.
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(levels.as_ptr().cast())) }
    }
    #[inline(always)]
    fn look_up(levels: __m256i, v: __m256i) -> __m256i {
        // SAFETY: the values prove AVX2.
        unsafe { _mm256_shuffle_epi8(levels, v) }
    }
}

super::instantiate!("avx2,fma,f16c,bmi1,bmi2", super::Ymm, super::Widening);
