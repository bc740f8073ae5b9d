//! The matrix product: what is decoded or rounded first, how rows of w are shared out, and how large a block of them is.
//!
//! | weights | ISA | x | w |
//! |---|---|---|---|
//! | BF16 | Avx512Bf16 | rounded to bf16 once per call | as stored |
//! | F32 | any | as it is | as stored |
//! | anything else | any | as it is | a block of rows decoded to f32 scratch, used for every row of x |
//!
//! Work is cut along w's rows only: each thread streams consecutive rows, and every output is computed whole by one thread.

use super::generic::matmul::{Product, TILE_COLS};
use super::{Cpu, Shared};
use crate::dtype::{DType, Matrix};
use std::cell::RefCell;

/// A cache line of bf16, so that rounded rows of x are aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u16; 32]);

/// Bytes of w to keep in L2 while all of x passes: a quarter of the 1 MiB that current server cores have at least.
const BLOCK_BYTES: usize = 256 << 10;
/// The same when x has so few rows that w passes once: decoded rows should then not even leave L1.
const BLOCK_BYTES_ONCE: usize = 32 << 10;
/// Rows of x up to which w passes once.
const FEW_ROWS: usize = 6;

thread_local! {
    /// Decoded rows of w.
    static DECODED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// How a product is cut; depends on shapes only, and no choice here changes a bit of the result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Plan {
    /// Rows of w per block, a multiple of the register tile's columns.
    block: usize,
    /// Consecutive rows of w per task, a multiple of `block`.
    task: usize,
}

impl Plan {
    /// `element` is the size of w's elements as the inner loop sees them.
    fn new(m: usize, n: usize, k: usize, element: usize, threads: usize) -> Plan {
        let bytes = if m <= FEW_ROWS { BLOCK_BYTES_ONCE } else { BLOCK_BYTES };
        let rows = bytes / (k * element).max(1);
        let block = (rows - rows % TILE_COLS).clamp(TILE_COLS, 64);
        // Several tasks per thread, so that a thread delayed by the system does not hold up the others; but a lone thread
        // needs one, and a product of less than about 10 us none to share.
        let tasks = if threads == 1 || m * n * k < 1 << 19 { 1 } else { 4 * threads };
        Plan { block, task: n.div_ceil(tasks).next_multiple_of(block) }
    }
}

impl Cpu {
    /// `y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias[n])` with `m = x.len() / w.cols()`; f32 in and out, f32 accumulation.
    ///
    /// Row `i` of y depends on row `i` of x alone, bit for bit. With BF16 weights on [`super::Isa::Avx512Bf16`] x is
    /// rounded to bf16 first.
    pub fn matmul(&self, x: &[f32], w: &Matrix<'_>, bias: Option<&[f32]>, y: &mut [f32]) {
        let (n, k) = (w.rows(), w.cols());
        assert!(k > 0 && x.len().is_multiple_of(k), "{} floats are not rows of {k}", x.len());
        let m = x.len() / k;
        assert_eq!(y.len(), m * n);
        assert!(bias.is_none_or(|b| b.len() == n));
        if y.is_empty() {
            return;
        }
        let y = Output { y: Shared(y.as_mut_ptr()), bias, m };
        match (w.dtype(), self.kernels.matmul_bf16) {
            (DType::BF16, Some(kernel)) => self.matmul_bf16(kernel, x, w, y),
            (DType::F32, _) => self.matmul_stored_f32(x, w, y),
            _ => self.matmul_decoded(x, w, y),
        }
    }

    fn matmul_bf16(&self, kernel: unsafe fn(&Product<u16>), x: &[f32], w: &Matrix<'_>, y: Output<'_>) {
        let (n, k) = (w.rows(), w.cols());
        let lines = k.div_ceil(32);
        // A panic while the lock was held leaves only stale floats behind, which are overwritten.
        let mut rounded = self.rounded.lock().unwrap_or_else(|poison| poison.into_inner());
        if rounded.len() < y.m * lines {
            rounded.resize(y.m * lines, Line([0; 32]));
        }
        let rounded = &mut rounded[..y.m * lines];
        let to = Shared(rounded.as_mut_ptr().cast());
        self.split(y.m, k, &|rows| {
            for row in rows {
                // SAFETY: row `row` of the buffer has `lines * 32 >= k` elements (two to a float), and only this task has it.
                let to = unsafe { std::slice::from_raw_parts_mut(to.at(row * lines * 16).cast::<u16>(), k) };
                // SAFETY: the table proves the features.
                unsafe { (self.kernels.to_bf16)(&x[row * k..][..k], to) };
            }
        });
        let x = SharedRef(rounded.as_ptr().cast::<u16>());
        self.each_block(Plan::new(y.m, n, k, 2, self.threads()), n, &|start, rows| {
            let w = &w.data()[start * w.row_bytes()..][..rows * w.row_bytes()];
            let (x_stride, w) = (lines * 32, w.as_ptr().cast());
            let product =
                Product { x: x.get(), x_stride, m: y.m, w, w_stride: k, n: rows, k, y: y.at(start), y_stride: n };
            // SAFETY: x and w have the rows stated, y's columns `start..start + rows` belong to this task, and the table
            // gives this kernel only with the features.
            unsafe { kernel(&product) };
            y.add_bias(start, rows, n);
        });
    }

    fn matmul_stored_f32(&self, x: &[f32], w: &Matrix<'_>, y: Output<'_>) {
        let (n, k) = (w.rows(), w.cols());
        self.each_block(Plan::new(y.m, n, k, 4, self.threads()), n, &|start, rows| {
            let w = &w.data()[start * w.row_bytes()..][..rows * w.row_bytes()];
            self.block_f32(x, w.as_ptr().cast(), start, rows, n, k, y);
        });
    }

    fn matmul_decoded(&self, x: &[f32], w: &Matrix<'_>, y: Output<'_>) {
        let (n, k) = (w.rows(), w.cols());
        self.each_block(Plan::new(y.m, n, k, 4, self.threads()), n, &|start, rows| {
            DECODED.with_borrow_mut(|decoded| {
                if decoded.len() < rows * k {
                    decoded.resize(rows * k, 0.0);
                }
                for (i, to) in decoded.chunks_exact_mut(k).take(rows).enumerate() {
                    // SAFETY: the table proves the features.
                    unsafe { (self.kernels.dequantize)(w.dtype(), w.row(start + i), to) };
                }
                self.block_f32(x, decoded.as_ptr(), start, rows, n, k, y);
            });
        });
    }

    /// All of x against `rows` rows of f32 at `w`, which may be unaligned.
    #[allow(clippy::too_many_arguments, reason = "a block is just these numbers")]
    fn block_f32(&self, x: &[f32], w: *const f32, start: usize, rows: usize, n: usize, k: usize, y: Output<'_>) {
        let product =
            Product { x: x.as_ptr(), x_stride: k, m: y.m, w, w_stride: k, n: rows, k, y: y.at(start), y_stride: n };
        // SAFETY: x and w have the rows stated (both callers pass exactly that), y's columns `start..start + rows` belong to
        // this task, and the table proves the features.
        unsafe { (self.kernels.matmul_f32)(&product) };
        y.add_bias(start, rows, n);
    }

    /// Calls `f(first row, rows)` for blocks that cover w's `n` rows, each task a run of consecutive blocks.
    fn each_block(&self, plan: Plan, n: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        self.pool.run(n.div_ceil(plan.task), &|task| {
            let end = n.min((task + 1) * plan.task);
            let mut start = task * plan.task;
            while start < end {
                let rows = plan.block.min(end - start);
                f(start, rows);
                start += rows;
            }
        });
    }
}

/// y and what is added to it.
#[derive(Clone, Copy)]
struct Output<'a> {
    y: Shared,
    bias: Option<&'a [f32]>,
    m: usize,
}

impl Output<'_> {
    /// Column `col` of the first row.
    fn at(&self, col: usize) -> *mut f32 {
        self.y.base().wrapping_add(col)
    }

    /// Adds the bias to the columns of a finished block.
    fn add_bias(&self, start: usize, cols: usize, n: usize) {
        let Some(bias) = self.bias else { return };
        for row in 0..self.m {
            // SAFETY: the block's columns of each row are inside y and belong to the calling task.
            let y = unsafe { std::slice::from_raw_parts_mut(self.y.at(row * n + start), cols) };
            for (y, b) in y.iter_mut().zip(&bias[start..start + cols]) {
                *y += b;
            }
        }
    }
}

/// A buffer that tasks only read.
#[derive(Clone, Copy)]
struct SharedRef(*const u16);

// SAFETY: nobody writes the buffer while tasks read it: its owner is borrowed for the whole call.
unsafe impl Sync for SharedRef {}

impl SharedRef {
    fn get(&self) -> *const u16 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_and_fit() {
        // A decode step of one row: 4 rows of 2048 f32 stay in L1, eight tasks for two threads.
        assert_eq!(Plan::new(1, 8192, 2048, 4, 2), Plan { block: 4, task: 1024 });
        assert_eq!(Plan::new(512, 8192, 2048, 2, 2), Plan { block: 64, task: 1024 });
        assert_eq!(Plan::new(512, 100, 8192, 4, 2), Plan { block: 8, task: 16 });
        assert_eq!(Plan::new(1, 3, 1, 4, 1), Plan { block: 64, task: 64 });
        assert_eq!(Plan::new(1, 64, 1 << 20, 4, 4).block, 4);
    }
}
