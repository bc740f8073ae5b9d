//! The small vocabulary in which the vector algorithms of `generic` are written once. Each ISA implements it; a wider
//! ISA gives another (equally valid) rounding, the same ISA always the same one.

/// A register of f32 lanes.
///
/// A value proves that the CPU has the ISA's features, because only the unsafe constructors make one; so the operations on
/// values are safe. Everything is `#[inline(always)]`: the body is compiled inside a `#[target_feature]` function. For the same
/// reason inner loops pass no closures to std's functions: such a closure may be compiled by itself, without the features,
/// and then calls every intrinsic as a function (more than tenfold slower, seen with `array::map`).
pub(crate) trait Vector: Copy {
    /// Lanes per register.
    const LANES: usize;
    /// Most rows of x in the register tile of a product of floats, at most 6; its columns are four registers or two.
    const FLOAT_ROWS: usize;
    /// The same for a product of bytes, whose tile has two registers of columns, or four for half as many rows.
    const BYTE_ROWS: usize;
    /// Whether tiles have four registers of columns, if their sums fit, or never more than two.
    const FOUR: bool;
    /// Queries in the register tiles of attention (against four registers of keys, or of a value): at most 6.
    const TILE_QUERIES: usize;

    /// All lanes `v`.
    ///
    /// # Safety
    /// The CPU has this ISA's features; the same holds for every constructor below.
    unsafe fn splat(v: f32) -> Self;
    /// Reads `LANES` floats.
    ///
    /// # Safety
    /// `p` is valid for reads of `LANES` floats; it need not be aligned.
    unsafe fn load(p: *const f32) -> Self;
    /// Reads `n < LANES` floats; the other lanes are zero.
    ///
    /// # Safety
    /// `p` is valid for reads of `n` floats; it need not be aligned.
    unsafe fn load_first(p: *const f32, n: usize) -> Self;
    /// Reads `LANES` pairs of bfloat16 and takes the first (`which` 0) or the second (1) of each.
    ///
    /// # Safety
    /// `p` is valid for reads of `LANES` words; it need not be aligned.
    #[inline(always)]
    unsafe fn load_half_of_pairs(p: *const u32, which: usize) -> Self {
        let mut lanes = [0; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
            // SAFETY: by contract.
            let word = unsafe { p.add(i).read_unaligned() };
            *lane = if which == 0 { word << 16 } else { word & 0xffff_0000 };
        }
        // SAFETY: sixteen floats are at least `LANES`.
        unsafe { Self::load(lanes.as_ptr().cast()) }
    }
    /// Replaces each byte (below 16) by the level it stands for.
    ///
    /// # Safety
    /// The CPU has this ISA's features.
    #[inline(always)]
    unsafe fn look_up(levels: &[u8; 16], bytes: &mut [u8; 2048]) {
        for byte in bytes {
            *byte = levels[usize::from(*byte & 15)];
        }
    }
    /// Writes all lanes.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` floats; it need not be aligned.
    unsafe fn store(self, p: *mut f32);
    /// Writes the first `n < LANES` lanes.
    ///
    /// # Safety
    /// `p` is valid for writes of `n` floats; it need not be aligned.
    unsafe fn store_first(self, p: *mut f32, n: usize);

    /// `self + b`.
    fn add(self, b: Self) -> Self;
    /// `self - b`.
    fn sub(self, b: Self) -> Self;
    /// `self * b`.
    fn mul(self, b: Self) -> Self;
    /// `self / b`.
    fn div(self, b: Self) -> Self;
    /// The larger; `b` if either is NaN.
    fn max(self, b: Self) -> Self;
    /// `self * b + c`, fused where the ISA has it.
    fn fma(self, b: Self, c: Self) -> Self;
    /// To the nearest integer.
    fn round(self) -> Self;
    /// `2^self` for integral lanes in -126..=127.
    fn exp2_integral(self) -> Self;
    /// Lanes where `probe < limit` become +0.
    fn zero_below(self, probe: Self, limit: f32) -> Self;
    /// `self * 2^n` for integral lanes of `n` up to 127; +0 where `n < -126`, whatever `self` is there.
    #[inline(always)]
    fn times_exp2(self, n: Self) -> Self {
        self.mul(n.exp2_integral()).zero_below(n, -126.0)
    }
    /// Sum of the lanes, in a fixed tree.
    fn sum(self) -> f32;
    /// Largest lane.
    fn largest(self) -> f32;

    /// Reads `LANES` binary16 elements; this and the three after it are exact.
    ///
    /// # Safety
    /// `p` is valid for reads of the elements; it need not be aligned.
    unsafe fn load_f16(p: *const u8) -> Self;
    /// Reads `LANES` bfloat16 elements.
    ///
    /// # Safety
    /// As [`Self::load_f16`].
    unsafe fn load_bf16(p: *const u8) -> Self;
    /// Reads `LANES` bfloat16 elements at `a` and as many at `b`, in whatever order costs least; [`Self::undeal`] makes the
    /// registers of `a` and of `b` of it.
    ///
    /// # Safety
    /// As [`Self::load_f16`], for both.
    #[inline(always)]
    unsafe fn load_bf16_dealt(a: *const u8, b: *const u8) -> [Self; 2] {
        // SAFETY: passed on.
        unsafe { [Self::load_bf16(a), Self::load_bf16(b)] }
    }
    /// [`Self::load_bf16_dealt`] of `2 * LANES` neighbours.
    ///
    /// # Safety
    /// As [`Self::load_f16`], for twice as many.
    #[inline(always)]
    unsafe fn load_bf16_dealt_neighbours(p: *const u8) -> [Self; 2] {
        // SAFETY: passed on.
        unsafe { Self::load_bf16_dealt(p, p.add(2 * Self::LANES)) }
    }
    /// Two registers in the order of [`Self::load_bf16_dealt`].
    #[inline(always)]
    fn deal(pair: [Self; 2]) -> [Self; 2] {
        pair
    }
    /// Undoes [`Self::deal`].
    #[inline(always)]
    fn undeal(pair: [Self; 2]) -> [Self; 2] {
        pair
    }
    /// Reads `LANES` E4M3 elements, each times 2^-8: what a shift makes of them as binary16. NaN stays NaN.
    ///
    /// # Safety
    /// As [`Self::load_f16`].
    unsafe fn load_e4m3(p: *const u8) -> Self;
    /// Reads `LANES` 8-bit integers.
    ///
    /// # Safety
    /// As [`Self::load_f16`].
    unsafe fn load_i8(p: *const u8) -> Self;
    /// Writes 64 bytes around the caches, if this ISA can; a fence comes before anybody else looks at them.
    ///
    /// # Safety
    /// `p` is valid for writes and aligned to 64 bytes.
    #[inline(always)]
    unsafe fn stream(p: *mut [u64; 8], stripe: &[u64; 8]) {
        // SAFETY: by contract.
        unsafe { p.write(*stripe) }
    }
    /// Asks for the cache line at `p`, which may be any address, to be near.
    #[inline(always)]
    fn prefetch(_p: *const u8) {}
    /// The same for a line that is not needed at once: the second-level cache takes more requests than the first.
    #[inline(always)]
    fn prefetch_far(p: *const u8) {
        Self::prefetch(p);
    }
}

/// How weights are loaded into lanes and multiplied with words of x: an f32 each, or a pair of bf16 each.
pub(crate) trait WordsDot<V: Vector> {
    /// A register of factors.
    type Words: Copy;
    /// Bytes of weights in a lane.
    const BYTES: usize;
    /// Words of x that a lane's weights are multiplied with, one after the other.
    const STEPS: usize;

    /// Reads the factors for step `step` of a register's lanes.
    ///
    /// # Safety
    /// The CPU has the features; `p` is valid for reads of `LANES * BYTES` bytes; it need not be aligned.
    unsafe fn load(p: *const u8, step: usize) -> Self::Words;
    /// One word of x in every lane.
    ///
    /// # Safety
    /// The CPU has the features; `p` is valid for reads of a word.
    unsafe fn broadcast(p: *const u32) -> Self::Words;
    /// Adds the products to the sums.
    fn dot(sum: V, a: Self::Words, b: Self::Words) -> V;
}

/// How lanes of four bytes are multiplied and summed exactly.
pub(crate) trait BytesDot<V: Vector> {
    /// A register of 32-bit integers, or of four bytes each.
    type Ints: Copy;

    /// All lanes `v`.
    ///
    /// # Safety
    /// The CPU has the features; the same holds for the other constructors.
    unsafe fn splat(v: i32) -> Self::Ints;
    /// Reads four bytes per lane.
    ///
    /// # Safety
    /// `p` is valid for reads of a word per lane; it need not be aligned.
    unsafe fn load(p: *const u32) -> Self::Ints;
    /// The same four bytes in every lane.
    ///
    /// # Safety
    /// `p` is valid for reads of a word.
    unsafe fn broadcast(p: *const u32) -> Self::Ints;
    /// Adds the four products of unsigned and signed bytes to each lane.
    fn dot(sum: Self::Ints, unsigned: Self::Ints, signed: Self::Ints) -> Self::Ints;
    /// Each lane as a float.
    fn floats(v: Self::Ints) -> V;
    /// `width` bits of each byte, from bit `from` on.
    fn bits(v: Self::Ints, from: u32, width: u32) -> Self::Ints;
    /// `low` and, from bit `at` of each byte on, `width` bits of `v` from bit `from` on.
    fn top(low: Self::Ints, v: Self::Ints, from: u32, width: u32, at: u32) -> Self::Ints;
    /// A table for [`Self::look_up`].
    ///
    /// # Safety
    /// The CPU has the features.
    unsafe fn levels(levels: &[u8; 16]) -> Self::Ints;
    /// Each byte (below 16) replaced by its level.
    fn look_up(levels: Self::Ints, v: Self::Ints) -> Self::Ints;
}

/// All lanes `v`; `proof` shows that the CPU has the features.
#[inline(always)]
pub(crate) fn constant<V: Vector>(_proof: V, v: f32) -> V {
    // SAFETY: a value of V exists.
    unsafe { V::splat(v) }
}

/// 2^x for x up to 127, to 2 ulp: a minimax polynomial on -1/2..=1/2 that is 1 at 0. Exactly 0 where x rounds to less than -126,
/// -inf included. It takes half the instructions of [`exp`].
#[inline(always)]
pub(crate) fn exp2<V: Vector>(x: V) -> V {
    let n = x.round();
    let r = x.sub(n);
    let p = constant(x, 1.330_060_5e-3).fma(r, constant(x, 9.669_691e-3));
    let p = p.fma(r, constant(x, 5.550_558_5e-2));
    let p = p.fma(r, constant(x, 0.240_222_83));
    let p = p.fma(r, constant(x, std::f32::consts::LN_2));
    p.fma(r, constant(x, 1.0)).times_exp2(n)
}

/// e^x to about 1 ulp (Cephes' polynomial on |r| <= ln2 / 2); exactly 0 below -87, so that a masked score weighs nothing.
#[inline(always)]
pub(crate) fn exp<V: Vector>(x: V) -> V {
    // 88 keeps 2^n below infinity; e^-87 is still normal.
    // `max` answers its second operand for NaN, so NaN goes through.
    let clamped = constant(x, -87.0).max(x);
    let clamped = constant(x, 0.0).sub(constant(x, -88.0).max(constant(x, 0.0).sub(clamped)));
    let n = clamped.mul(constant(x, std::f32::consts::LOG2_E)).round();
    // ln 2 in two parts, so that n * ln 2 is subtracted almost exactly.
    let r = n.fma(constant(x, -0.693_359_4), clamped);
    let r = n.fma(constant(x, 2.121_944_4e-4), r);
    let p = constant(x, 1.987_569_2e-4).fma(r, constant(x, 1.398_199_9e-3));
    let p = p.fma(r, constant(x, 8.333_452e-3));
    let p = p.fma(r, constant(x, 4.166_579_6e-2));
    let p = p.fma(r, constant(x, 1.666_666_5e-1));
    let p = p.fma(r, constant(x, 0.5));
    let e = p.fma(r.mul(r), r).add(constant(x, 1.0));
    e.mul(n.exp2_integral()).zero_below(x, -87.0)
}

#[cfg(test)]
mod tests {
    use super::{Vector, exp2};

    fn one<V: Vector>(x: f32) -> f32 {
        let mut lanes = [0.0; 16];
        // SAFETY: the callers know that the CPU has the features; there is room for the widest register.
        unsafe { exp2(V::splat(x)).store(lanes.as_mut_ptr()) };
        lanes[0]
    }

    fn powers_of_two<V: Vector>() {
        assert_eq!(one::<V>(0.0), 1.0);
        for n in [-126, -60, -1, 1, 60, 127] {
            assert_eq!(one::<V>(n as f32), 2f32.powi(n));
        }
        assert_eq!(one::<V>(-126.6), 0.0);
        assert_eq!(one::<V>(-1e30), 0.0);
        assert_eq!(one::<V>(f32::NEG_INFINITY), 0.0);
        assert!(one::<V>(f32::NAN).is_nan());
        for i in -12_500..1270 {
            let x = i as f32 / 100.0 + 0.001_7;
            let want = f64::from(x).exp2();
            let off = (f64::from(one::<V>(x)) / want - 1.0).abs();
            assert!(off < 2.0 / f64::from(1 << 23), "2^{x} is off by {off:e}");
        }
    }

    #[test]
    fn powers_of_two_are_those_of_f64() {
        powers_of_two::<crate::cpu::scalar::Lanes>();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                powers_of_two::<crate::cpu::avx2::Ymm>();
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                powers_of_two::<crate::cpu::avx512::Zmm>();
            }
        }
        #[cfg(target_arch = "aarch64")]
        powers_of_two::<crate::cpu::neon::Quad>();
    }
}
