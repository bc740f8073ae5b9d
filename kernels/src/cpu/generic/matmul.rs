//! The matrix product's inner loops: `y[m, n] = x[m, k] · w[n, k]ᵀ`.
//!
//! Each output has one register of partial sums, lane `l` of which sums the products of columns `l`, `l + STEP`, ... in that
//! order; at the end the lanes are added in a fixed tree. A register tile computes TILE_ROWS by 4 outputs together to reuse what
//! it loads, but never mixes them. So an output's bits depend on its row, its column and k, not on the tile it fell into.

use crate::cpu::vector::Vector;
use std::marker::PhantomData;

/// Outputs of w in a register tile.
pub(crate) const TILE_COLS: usize = 4;

/// One way to multiply and accumulate a register of elements.
pub(crate) trait Dot {
    /// Element of x and w in memory.
    type Element: Copy;
    /// A register of `STEP` elements.
    type Lanes: Copy;
    /// A register of partial sums.
    type Sum: Copy;
    /// Elements per register.
    const STEP: usize;
    /// Rows of x in a register tile, at most 6.
    const TILE_ROWS: usize;

    /// No products yet.
    ///
    /// # Safety
    /// The CPU has the features of this implementation; the same holds for each function below.
    unsafe fn zero() -> Self::Sum;
    /// Reads `STEP` elements.
    ///
    /// # Safety
    /// `p` is valid for reads of `STEP` elements; it need not be aligned.
    unsafe fn load(p: *const Self::Element) -> Self::Lanes;
    /// Reads `n < STEP` elements; the others are zero.
    ///
    /// # Safety
    /// `p` is valid for reads of `n` elements; it need not be aligned.
    unsafe fn load_first(p: *const Self::Element, n: usize) -> Self::Lanes;
    /// Adds the products of `a` and `b`.
    ///
    /// # Safety
    /// The features only.
    unsafe fn dot(sum: Self::Sum, a: Self::Lanes, b: Self::Lanes) -> Self::Sum;
    /// The four sums' lanes added up, each in the fixed tree.
    fn sum4(v: [Self::Sum; 4]) -> [f32; 4];
}

/// f32 elements in `V`'s lanes.
pub(crate) struct F32Dot<V>(PhantomData<V>);

impl<V: Vector> Dot for F32Dot<V> {
    type Element = f32;
    type Lanes = V;
    type Sum = V;
    const STEP: usize = V::LANES;
    const TILE_ROWS: usize = V::TILE_ROWS;

    #[inline(always)]
    unsafe fn zero() -> V {
        // SAFETY: passed on.
        unsafe { V::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        // SAFETY: passed on.
        unsafe { V::load(p) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load_first(p, n) }
    }
    #[inline(always)]
    unsafe fn dot(sum: V, a: V, b: V) -> V {
        a.fma(b, sum)
    }
    #[inline(always)]
    fn sum4(v: [V; 4]) -> [f32; 4] {
        V::sum4(v)
    }
}

/// A product of a block of x with a block of w, by pointers because neighbouring blocks of y are written by other threads.
pub(crate) struct Product<E> {
    /// `m` rows of `k` elements, `x_stride` apart.
    pub(crate) x: *const E,
    pub(crate) x_stride: usize,
    pub(crate) m: usize,
    /// `n` rows of `k` elements, `w_stride` apart; may be unaligned.
    pub(crate) w: *const E,
    pub(crate) w_stride: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// `m` rows of `n` outputs, `y_stride` apart.
    pub(crate) y: *mut f32,
    pub(crate) y_stride: usize,
}

/// Computes a [`Product`].
///
/// The x tile stays in L1 while the block's rows of w pass by from L2; the caller sizes the block for that.
///
/// # Safety
/// The CPU has `D`'s features; x and w are readable and y writable as [`Product`] says, and nobody else touches those outputs.
#[inline(always)]
pub(crate) unsafe fn product<D: Dot>(p: &Product<D::Element>) {
    let mut row = 0;
    while row < p.m {
        let rows = (p.m - row).min(D::TILE_ROWS);
        // SAFETY: rows `row..row + rows` exist.
        unsafe {
            match rows {
                1 => strip::<D, 1>(p, row),
                2 => strip::<D, 2>(p, row),
                3 => strip::<D, 3>(p, row),
                4 => strip::<D, 4>(p, row),
                5 => strip::<D, 5>(p, row),
                _ => strip::<D, 6>(p, row),
            }
        }
        row += rows;
    }
}

/// `M` rows of x from `row` on, against every row of w.
///
/// # Safety
/// As [`product`], and the rows exist.
#[inline(always)]
unsafe fn strip<D: Dot, const M: usize>(p: &Product<D::Element>, row: usize) {
    let whole = p.n - p.n % TILE_COLS;
    let mut col = 0;
    while col < whole {
        // SAFETY: columns `col..col + 4` exist.
        unsafe { tile::<D, M, TILE_COLS>(p, row, col) };
        col += TILE_COLS;
    }
    while col < p.n {
        // SAFETY: column `col` exists.
        unsafe { tile::<D, M, 1>(p, row, col) };
        col += 1;
    }
}

/// `M` by `N` outputs (`N` is 4 or 1) at `[row, col]`.
///
/// # Safety
/// As [`product`], and the outputs exist.
#[inline(always)]
unsafe fn tile<D: Dot, const M: usize, const N: usize>(p: &Product<D::Element>, row: usize, col: usize) {
    // SAFETY: every offset stays inside the rows of x, w and y that the caller vouches for; prefetching may point anywhere.
    unsafe {
        let x = p.x.add(row * p.x_stride);
        let w = p.w.add(col * p.w_stride);
        let mut sums = [[D::zero(); N]; M];
        let whole = p.k - p.k % D::STEP;
        let mut at = 0;
        while at < whole {
            let mut a = [D::load(x.add(at)); M];
            for i in 1..M {
                a[i] = D::load(x.add(i * p.x_stride + at));
            }
            for j in 0..N {
                let from = w.add(j * p.w_stride + at);
                if M <= 2 {
                    // With so few rows the product waits for w: ask for the next tile's rows, which the hardware cannot guess.
                    prefetch(from.wrapping_add(N * p.w_stride));
                }
                let b = D::load(from);
                for i in 0..M {
                    sums[i][j] = D::dot(sums[i][j], a[i], b);
                }
            }
            at += D::STEP;
        }
        if whole < p.k {
            let rest = p.k - whole;
            let mut a = [D::load_first(x.add(whole), rest); M];
            for i in 1..M {
                a[i] = D::load_first(x.add(i * p.x_stride + whole), rest);
            }
            for j in 0..N {
                let b = D::load_first(w.add(j * p.w_stride + whole), rest);
                for i in 0..M {
                    sums[i][j] = D::dot(sums[i][j], a[i], b);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            let y = p.y.add((row + i) * p.y_stride + col);
            // A single column is padded by itself, so that it goes through the same tree.
            let four = D::sum4([sums[0], sums[1 % N], sums[2 % N], sums[3 % N]]);
            for (j, v) in four.iter().enumerate().take(N) {
                *y.add(j) = *v;
            }
        }
    }
}

#[inline(always)]
fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no architectural effect and may point anywhere; SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
