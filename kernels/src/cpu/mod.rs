//! The entry point of the engine: [`Cpu`], which checks shapes, splits work over threads and calls the chosen ISA's kernels.

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod digest;
pub(crate) mod dispatch;
pub(crate) mod generic;
mod instantiate;
mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod operand;
mod scalar;
#[cfg(test)]
mod tests;
mod vector;

pub(crate) use instantiate::instantiate;

use crate::dtype::DType;
use crate::kv::{KvFormat, KvMove};
use crate::sync::pool::{Placement, ThreadPool};
use dispatch::{Isa, Kernels};
use std::sync::Mutex;

/// Floats below which an operation on rows is not worth waking another thread for (about 10 us of streaming).
const SERIAL_FLOATS: usize = 1 << 16;

/// Kernels and the threads that run them. Shapes are asserted: a mismatch is a bug of the caller.
///
/// Any thread may call any method. Results depend on the [`Isa`] and on nothing else about the
/// machine or the call (see the crate's text).
pub struct Cpu {
    isa: Isa,
    kernels: &'static Kernels,
    pool: ThreadPool,
    /// States of attention's splits, reused from call to call.
    states: Mutex<generic::attention::Floats>,
}

impl Cpu {
    /// Kernels for the best ISA of this machine on `threads` threads, the caller included. With `cores`, worker `i` is pinned to
    /// `cores[i]`; the calling thread counts as worker 0 and stays where it is (see [`crate::sync::pool::pin_to`]).
    pub fn new(threads: usize, cores: Option<&[usize]>) -> Cpu {
        Self::placed(&Placement { cores: cores.map(<[usize]>::to_vec), ..Placement::threads(threads) })
    }

    /// Kernels for the best ISA of this machine on the threads of `placement`, the calling thread being the first.
    pub fn placed(placement: &Placement) -> Cpu {
        Self::build(Isa::detect(), placement).expect("a detected ISA is available")
    }

    /// Kernels for a given ISA, or `None` if this machine cannot run it.
    pub fn with_isa(isa: Isa, threads: usize) -> Option<Cpu> {
        Self::build(isa, &Placement::threads(threads))
    }

    fn build(isa: Isa, placement: &Placement) -> Option<Cpu> {
        let kernels = Kernels::of(isa)?;
        Some(Cpu { isa, kernels, pool: ThreadPool::new(placement), states: Mutex::default() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that take part, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The pool, for loops of the caller's own between operations.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Normalises rows of `weight.len()` floats: `out = x / sqrt(mean(x²) + eps) * weight`.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(x.len(), out.len());
        self.rms_norm_at(x.as_ptr(), out.as_mut_ptr(), x.len(), weight, eps);
    }

    /// [`Self::rms_norm`] in place; per head, for example, with a weight of `head_dim`.
    pub fn rms_norm_inplace(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        let p = x.as_mut_ptr();
        self.rms_norm_at(p, p, x.len(), weight, eps);
    }

    /// `x` and `out` lead to `len` floats that the caller may read and write, equal or apart.
    fn rms_norm_at(&self, x: *const f32, out: *mut f32, len: usize, weight: &[f32], eps: f32) {
        let n = weight.len();
        assert!(n > 0 && len.is_multiple_of(n), "{len} floats are not rows of {n}");
        let (x, out) = (Shared(x.cast_mut()), Shared(out));
        self.split(len / n, n, &|rows| {
            // SAFETY: these rows are inside both buffers and no other task has them; the table proves the features.
            unsafe { (self.kernels.rms_norm)(x.at(rows.start * n), out.at(rows.start * n), rows.len(), weight, eps) }
        });
    }

    /// Rotates each head of `x` `[tokens, heads, head_dim]` in place, NeoX style: element `i` pairs with `i + rotary_dim / 2`.
    /// `cos` and `sin` are `[tokens, rotary_dim / 2]`, already selected by position; elements from `rotary_dim` on are left alone.
    pub fn rope(&self, x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
        let token = heads * head_dim;
        if x.is_empty() {
            return;
        }
        assert!(token > 0 && x.len().is_multiple_of(token), "{} floats are not tokens of {token}", x.len());
        let tokens = x.len() / token;
        assert!(cos.len().is_multiple_of(tokens) && cos.len() == sin.len());
        let half = cos.len() / tokens;
        assert!(2 * half <= head_dim);
        let x = Shared(x.as_mut_ptr());
        self.split(tokens, token, &|range| {
            for t in range {
                let angles = t * half..(t + 1) * half;
                // SAFETY: token `t` is inside x and only this task has it; the table proves the features.
                unsafe {
                    let token = std::slice::from_raw_parts_mut(x.at(t * token), token);
                    (self.kernels.rope)(token, head_dim, &cos[angles.clone()], &sin[angles]);
                }
            }
        });
    }

    /// `gate = silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        self.combine(self.kernels.silu_mul, gate, up);
    }

    /// `gate = gelu(gate) * up`, with the tanh approximation of gelu (HF's `gelu_pytorch_tanh`).
    pub fn gelu_tanh_mul(&self, gate: &mut [f32], up: &[f32]) {
        self.combine(self.kernels.gelu_tanh_mul, gate, up);
    }

    /// `x += y`.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        self.combine(self.kernels.add, x, y);
    }

    fn combine(&self, kernel: unsafe fn(&mut [f32], &[f32]), a: &mut [f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        // Cut at whole cache lines; the operations are element by element, so cuts cannot change a result.
        const CHUNK: usize = 4096;
        let len = a.len();
        let a = Shared(a.as_mut_ptr());
        self.split(len.div_ceil(CHUNK), CHUNK, &|chunks| {
            let range = chunks.start * CHUNK..(chunks.end * CHUNK).min(len);
            // SAFETY: the range is inside `a` and only this task has it; the table proves the features.
            unsafe { kernel(std::slice::from_raw_parts_mut(a.at(range.start), range.len()), &b[range]) }
        });
    }

    /// Decodes rows of `cols` elements, as many as `out` holds: `read(i, row)` fills in the stored bytes of row `i`, on any of the
    /// threads.
    pub fn embed(&self, dtype: DType, cols: usize, read: &(dyn Fn(usize, &mut [u8]) + Sync), out: &mut [f32]) {
        let stored = dtype.row_bytes(cols).expect("rows of a matrix");
        assert!(out.len().is_multiple_of(cols), "{} floats are not rows of {cols}", out.len());
        let rows = out.len() / cols;
        let out = Shared(out.as_mut_ptr());
        self.split(rows, cols, &|range| {
            let mut row = vec![0; stored];
            for i in range {
                read(i, &mut row);
                // SAFETY: row `i` is inside `out` and only this task has it; the table of kernels proves the features.
                unsafe {
                    (self.kernels.dequantize)(dtype, &row, std::slice::from_raw_parts_mut(out.at(i * cols), cols));
                }
            }
        });
    }

    /// Calls `f` on consecutive ranges that cover `0..rows`, on all threads if rows of `row_len` floats make that worth it.
    fn split(&self, rows: usize, row_len: usize, f: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        if rows == 0 {
            return;
        }
        let parts = if rows * row_len < SERIAL_FLOATS { 1 } else { (2 * self.threads()).min(rows) };
        self.pool.run(parts, &|part| {
            let range = rows * part / parts..rows * (part + 1) / parts;
            f(range);
        });
    }
}

/// As [`KvFormat::convert`], with this machine's vectors, on the calling thread: what ships pages has no threads to share.
pub fn convert_kv(from: &KvFormat, page: &[u8], to: &KvFormat, out: &mut [u8], moved: KvMove) {
    let kernels = Kernels::of(Isa::detect()).expect("a detected ISA is available");
    // SAFETY: the table proves the features.
    unsafe { (kernels.convert_kv)(from, page, to, out, moved) }
}

/// A buffer whose disjoint parts are written by different tasks.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: the pointer is only used by tasks that each stay in their own part; the buffer outlives the run.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// The start of the buffer. A method, so that closures capture the whole `Shared` and not its pointer.
    fn base(self) -> *mut T {
        self.0
    }

    /// The pointer moved by `offset` elements.
    ///
    /// # Safety
    /// The offset is inside the buffer.
    unsafe fn at(self, offset: usize) -> *mut T {
        // SAFETY: by contract.
        unsafe { self.0.add(offset) }
    }

    /// `len` elements from `offset` on.
    ///
    /// # Safety
    /// They are inside the buffer, and nobody else touches them during the lifetime that the caller chooses.
    unsafe fn part<'a>(self, offset: usize, len: usize) -> &'a mut [T] {
        // SAFETY: by contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), len) }
    }
}
