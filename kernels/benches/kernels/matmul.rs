//! Products of every storage type: decode steps of one and eight rows over more weights than caches hold, and a chunk of a prompt.

use crate::roof::{Operations, Roof, Work, random};
use criterion::Criterion;
use ridge_kernels::{DType, Finish, Matrix, Operand, Packed, Rows, quantize_row, reference};
use std::hint::black_box;

/// `[rows of x, rows of w, columns]`; a vocabulary of 128 256 is the largest matrix of Llama-3.2-1B.
const SHAPES: [[usize; 3]; 3] = [[1, 128_256, 2048], [8, 128_256, 2048], [512, 8192, 2048]];

/// One group per type.
pub fn all(criterion: &mut Criterion, roof: &Roof) {
    for dtype in DType::ALL {
        let mut group = criterion.benchmark_group(format!("matmul/{}", dtype.name()));
        for [m, n, k] in SHAPES {
            let mut seed = 7;
            // What bf16 can hold, so that rounding x to it changes nothing.
            let x: Vec<f32> = (0..m * k).map(|_| half::bf16::from_f32(random(&mut seed)).to_f32()).collect();
            let (mut y, mut operand) = (vec![0.0; m * n], Operand::default());
            let mut product = |packed: &Packed<'_>, y: &mut [f32]| {
                let mut rows = Rows::new(black_box(&x), k, &mut operand);
                roof.cpu.matmul(&mut rows, packed, Finish::Store(None), black_box(y));
            };
            // Decode steps take turns on copies that no cache holds together, as the layers of a pass do.
            let bytes = Packed::bytes(dtype, n, k, false).expect("a shape of whole blocks");
            let copies = if m < 64 { (512_usize << 20).div_ceil(bytes) } else { 1 };
            // Made and checked at the first call, during the warm-up: not for names that were filtered out.
            let mut weights = None;
            let mut turn = 0;
            let float = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
            let work = Work {
                operations: 2.0 * (m * n * k) as f64,
                kind: if float { Operations::Floats } else { Operations::Bytes },
                bytes: (n * dtype.row_bytes(k).expect("a shape of whole blocks")) as f64,
            };
            roof.bench(&mut group, &format!("{m}x{n}x{k}"), work, || {
                let weights = weights.get_or_insert_with(|| {
                    let weights = Weights::new(roof, dtype, n, k, copies);
                    product(&weights.copy(0), &mut y);
                    weights.check(&x, &y);
                    weights
                });
                turn = (turn + 1) % copies;
                product(&weights.copy(turn), &mut y);
            });
        }
        group.finish();
    }
}

/// Random weights of which few rows are distinct, because encoding is slow.
struct Weights {
    dtype: DType,
    n: usize,
    k: usize,
    distinct: Vec<u8>,
    /// The same again and again.
    packed: Vec<Vec<u8>>,
}

const DISTINCT: usize = 8;

impl Weights {
    fn new(roof: &Roof, dtype: DType, n: usize, k: usize, copies: usize) -> Weights {
        let mut seed = 1;
        let row: Vec<f32> = (0..k + 32 * DISTINCT).map(|_| random(&mut seed)).collect();
        let mut distinct = Vec::new();
        for i in 0..DISTINCT {
            quantize_row(dtype, &row[32 * i..][..k], &mut distinct).expect("whole blocks of finite values");
        }
        let stored = distinct.repeat(n / DISTINCT);
        let w = Matrix::new(dtype, n, k, &stored).expect("n is a multiple of the distinct rows");
        let mut packed = vec![0; Packed::bytes(dtype, n, k, false).expect("a shape that was just made")];
        roof.cpu.pack(&w, None, &mut packed);
        Weights { dtype, n, k, distinct, packed: vec![packed; copies] }
    }

    fn copy(&self, at: usize) -> Packed<'_> {
        Packed::new(self.dtype, self.n, self.k, false, &self.packed[at]).expect("packed for this shape")
    }

    /// The first and the last row of y against the reference.
    fn check(&self, x: &[f32], y: &[f32]) {
        let few = Matrix::new(self.dtype, DISTINCT, self.k, &self.distinct).expect("the distinct rows");
        let float = matches!(self.dtype, DType::F32 | DType::F16 | DType::BF16);
        for row in [0, x.len() / self.k - 1] {
            let x = &x[row * self.k..][..self.k];
            let seen = if float { x.to_vec() } else { reference::round_to_bytes(x) };
            let mut want = [0.0; DISTINCT];
            reference::matmul(&seen, &few, None, &mut want);
            for (i, got) in y[row * self.n..][..self.n].iter().enumerate() {
                let want = want[i % DISTINCT];
                assert!((got - want).abs() < 1e-2, "{:?}: {got} for {want}", self.dtype);
            }
        }
    }
}
