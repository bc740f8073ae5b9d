//! Operations on rows of activations: normalisation, rotary embedding, gated activations, sums.

use crate::cpu::vector::{Vector, constant, exp};

/// Normalises `rows` rows of `weight.len()` floats from `x` to `out`, which may be the same memory.
///
/// # Safety
/// The CPU has `V`'s features; `x` is readable and `out` writable for all rows; they are equal or do not overlap.
#[inline(always)]
pub(crate) unsafe fn rms_norm<V: Vector>(x: *const f32, out: *mut f32, rows: usize, weight: &[f32], eps: f32) {
    let n = weight.len();
    let whole = n - n % V::LANES;
    for row in 0..rows {
        // SAFETY: offsets stay inside the row; each element is read before it is overwritten.
        unsafe {
            let (x, out) = (x.add(row * n), out.add(row * n));
            let mut sum = V::splat(0.0);
            for i in (0..whole).step_by(V::LANES) {
                let v = V::load(x.add(i));
                sum = v.fma(v, sum);
            }
            if whole < n {
                let v = V::load_first(x.add(whole), n - whole);
                sum = v.fma(v, sum);
            }
            let scale = V::splat(1.0 / (sum.sum() / n as f32 + eps).sqrt());
            let w = weight.as_ptr();
            for i in (0..whole).step_by(V::LANES) {
                V::load(x.add(i)).mul(scale).mul(V::load(w.add(i))).store(out.add(i));
            }
            if whole < n {
                let v = V::load_first(x.add(whole), n - whole).mul(scale);
                v.mul(V::load_first(w.add(whole), n - whole)).store_first(out.add(whole), n - whole);
            }
        }
    }
}

/// Rotates the first `2 * cos.len()` elements of each of one token's heads.
///
/// # Safety
/// The CPU has `V`'s features. (`cos` and `sin` are equally long and no longer than half a head: asserted.)
#[inline(always)]
pub(crate) unsafe fn rope<V: Vector>(token: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    assert_eq!(sin.len(), half);
    assert!(2 * half <= head_dim);
    for head in token.chunks_exact_mut(head_dim) {
        let (a, b) = head[..2 * half].split_at_mut(half);
        // SAFETY: all four slices have `half` elements.
        unsafe {
            map4::<V>(half, a.as_mut_ptr(), b.as_mut_ptr(), cos.as_ptr(), sin.as_ptr());
        }
    }
}

/// `(a, b) = (a c - b s, b c + a s)` over `n` elements.
///
/// # Safety
/// The CPU has `V`'s features; all pointers are valid for `n` elements and none overlaps.
#[inline(always)]
unsafe fn map4<V: Vector>(n: usize, a: *mut f32, b: *mut f32, cos: *const f32, sin: *const f32) {
    let whole = n - n % V::LANES;
    // SAFETY: offsets stay below `n`.
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            let (x, y) = (V::load(a.add(i)), V::load(b.add(i)));
            let (c, s) = (V::load(cos.add(i)), V::load(sin.add(i)));
            x.mul(c).sub(y.mul(s)).store(a.add(i));
            y.mul(c).add(x.mul(s)).store(b.add(i));
        }
        if whole < n {
            let rest = n - whole;
            let (x, y) = (V::load_first(a.add(whole), rest), V::load_first(b.add(whole), rest));
            let (c, s) = (V::load_first(cos.add(whole), rest), V::load_first(sin.add(whole), rest));
            x.mul(c).sub(y.mul(s)).store_first(a.add(whole), rest);
            y.mul(c).add(x.mul(s)).store_first(b.add(whole), rest);
        }
    }
}

/// A function of two elements, as a type because a closure could be compiled without the ISA's features.
pub(crate) trait Combine {
    /// The new value of `a`.
    fn apply<V: Vector>(a: V, b: V) -> V;
}

/// `a = F(a, b)` element by element.
///
/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
pub(crate) unsafe fn combine<V: Vector, F: Combine>(a: &mut [f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let n = a.len();
    let whole = n - n % V::LANES;
    let (a, b) = (a.as_mut_ptr(), b.as_ptr());
    // SAFETY: offsets stay below both lengths.
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            F::apply(V::load(a.add(i)), V::load(b.add(i))).store(a.add(i));
        }
        if whole < n {
            let rest = n - whole;
            F::apply(V::load_first(a.add(whole), rest), V::load_first(b.add(whole), rest))
                .store_first(a.add(whole), rest);
        }
    }
}

/// `x / (1 + e^-z)`.
#[inline(always)]
fn times_sigmoid<V: Vector>(x: V, z: V) -> V {
    x.div(constant(x, 1.0).add(exp(constant(x, 0.0).sub(z))))
}

/// `silu(a) * b`.
pub(crate) struct SiluMul;

impl Combine for SiluMul {
    #[inline(always)]
    fn apply<V: Vector>(gate: V, up: V) -> V {
        times_sigmoid(gate, gate).mul(up)
    }
}

/// `gelu(a) * b`, gelu by tanh: `x (1 + tanh z) / 2 = x / (1 + e^-2z)`, `z = sqrt(2 / pi) (x + 0.044715 x^3)`.
pub(crate) struct GeluTanhMul;

impl Combine for GeluTanhMul {
    #[inline(always)]
    fn apply<V: Vector>(gate: V, up: V) -> V {
        let inner = gate.mul(gate).mul(gate).fma(constant(gate, 0.044_715), gate);
        times_sigmoid(gate, inner.mul(constant(gate, 1.595_769))).mul(up)
    }
}

/// `a + b`.
pub(crate) struct Add;

impl Combine for Add {
    #[inline(always)]
    fn apply<V: Vector>(x: V, y: V) -> V {
        x.add(y)
    }
}
