//! The matrix product: what x is made into, how strips of w are shared out, and packing.
//!
//! Work is cut into strips of w (64 packed rows) and, for very many rows of x, into blocks of those: a thread streams a strip once
//! for up to [`ROWS`] rows. Every output is computed whole by one thread.

use super::generic::matmul::{Finish, Job, Scratch};
use super::operand::Rows;
use super::{Cpu, Shared};
use crate::dtype::Matrix;
use crate::packed::{Packed, STRIP, pack_strip};
use std::cell::RefCell;

/// Rows of x that pass over a strip while it is unpacked: their sums (128 KiB) and a chunk of x (512 KiB) stay in L2.
const ROWS: usize = 512;

/// Multiply-adds below which a product is not worth waking another thread for (about 10 us).
const SERIAL: usize = 1 << 18;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Cpu {
    /// The product of x `[m, k]` with packed w `[n, k]`, finished into y `[m, n]` as [`Finish`] says; f32 accumulation.
    ///
    /// Row `i` of y depends on row `i` of x (and, for [`Finish::Add`], of y) alone, bit for bit. What x is rounded to depends on
    /// the type of w and the ISA: quantised weights are multiplied with 8-bit x under a scale per 32 elements, bf16 weights with
    /// bf16 x on [`super::Isa::Avx512Bf16`], anything else with x as it is.
    pub fn matmul(&self, x: &mut Rows<'_>, w: &Packed<'_>, finish: Finish<'_>, y: &mut [f32]) {
        let (m, n) = (x.len(), w.rows());
        assert_eq!(y.len(), m * n);
        assert_eq!(w.is_gated(), matches!(finish, Finish::Gate(_)), "gated weights have their own finish");
        if let Finish::Store(Some(bias)) | Finish::Add(Some(bias)) = finish {
            assert_eq!(bias.len(), n);
        }
        if y.is_empty() {
            return;
        }
        let x = x.for_weights(w.dtype(), self);
        let tallest = m.div_ceil(x.tiles());
        let per_block = (ROWS / tallest).max(1);
        let (strips, blocks) = (w.strips(), x.tiles().div_ceil(per_block));
        let y = Shared(y.as_mut_ptr());
        let strip = |task: usize| {
            let (block, strip) = (task / strips, task % strips);
            let tiles = block * per_block..x.tiles().min((block + 1) * per_block);
            let job = Job { x, tiles, w, strip, finish, y: y.base(), y_stride: n };
            // SAFETY: this task alone has these rows and columns of y; the table proves the features, and operands are made
            // in pairs only where the table says that it multiplies them.
            SCRATCH.with_borrow_mut(|scratch| unsafe { (self.kernels.strip)(&job, scratch) });
        };
        match m * n * w.cols() < SERIAL {
            true => (0..strips * blocks).for_each(strip),
            false => self.pool.run(strips * blocks, &strip),
        }
    }

    /// Packs a matrix, or two of equal shape and type as a gated one, into `out`, which has [`Packed::bytes`] bytes (asserted).
    pub fn pack(&self, matrix: &Matrix<'_>, up: Option<&Matrix<'_>>, out: &mut [u8]) {
        let (dtype, rows, cols) = (matrix.dtype(), matrix.rows(), matrix.cols());
        if let Some(up) = up {
            assert_eq!((up.dtype(), up.rows(), up.cols()), (dtype, rows, cols), "gated matrices are alike");
        }
        assert_eq!(Some(out.len()), Packed::bytes(dtype, rows, cols, up.is_some()));
        let per_strip = if up.is_some() { STRIP / 2 } else { STRIP };
        let strips = rows.div_ceil(per_strip);
        let strip_bytes = out.len() / strips.max(1);
        let out = Shared(out.as_mut_ptr());
        self.pool.run(strips, &|strip| {
            let row = |lane: usize| {
                let of = if lane < per_strip { matrix } else { up? };
                let row = strip * per_strip + lane % per_strip;
                (row < rows).then(|| of.row(row))
            };
            // SAFETY: strips are apart, and only this task has this one.
            pack_strip(dtype, row, unsafe { out.part(strip * strip_bytes, strip_bytes) });
        });
    }
}
