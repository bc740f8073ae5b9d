//! Every operation on every ISA of this machine, against the reference and against itself cut differently.
//!
//! Tolerances: a sum of k products differs from the f64 reference by at most about `k * 2^-24` times the sum of magnitudes,
//! in practice sqrt(k) of it; values here are of order 1, so `1e-5 * sqrt(k)` is a wide bound. With bf16 x the inputs
//! themselves are off by 2^-9, and the reference is then given the rounded x.

use super::Cpu;
use super::dispatch::Isa;
use crate::testing::{Random, assert_close, assert_same};
use crate::{
    AttentionItem, DType, Finish, Gate, KvDtype, KvFormat, KvMove, KvWrite, Matrix, Operand, Packed, Rows,
    quantize_row, reference,
};

/// A `Cpu` per ISA that this machine has.
fn each_isa(threads: usize) -> impl Iterator<Item = Cpu> {
    Isa::ALL.into_iter().filter_map(move |isa| Cpu::with_isa(isa, threads))
}

fn weights(random: &mut Random, dtype: DType, rows: usize, cols: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rows {
        quantize_row(dtype, &random.vector(cols), &mut bytes).unwrap();
    }
    bytes
}

/// Packed weights, and the memory they live in.
struct PackedWeights {
    dtype: DType,
    rows: usize,
    cols: usize,
    gated: bool,
    bytes: Vec<u8>,
}

impl PackedWeights {
    fn new(cpu: &Cpu, w: &Matrix<'_>, up: Option<&Matrix<'_>>) -> PackedWeights {
        let (dtype, rows, cols, gated) = (w.dtype(), w.rows(), w.cols(), up.is_some());
        let mut bytes = vec![0xff; Packed::bytes(dtype, rows, cols, gated).unwrap()];
        cpu.pack(w, up, &mut bytes);
        PackedWeights { dtype, rows, cols, gated, bytes }
    }

    fn get(&self) -> Packed<'_> {
        Packed::new(self.dtype, self.rows, self.cols, self.gated, &self.bytes).unwrap()
    }
}

fn product(cpu: &Cpu, x: &[f32], w: &PackedWeights, finish: Finish<'_>, y: &mut [f32]) {
    cpu.matmul(&mut Rows::new(x, w.cols, &mut Operand::default()), &w.get(), finish, y);
}

/// What the kernel of this ISA and type sees of x.
fn seen(isa: Isa, dtype: DType, x: &[f32]) -> Vec<f32> {
    match dtype {
        DType::BF16 if isa == Isa::Avx512Bf16 => x.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect(),
        DType::F32 | DType::F16 | DType::BF16 => x.to_vec(),
        _ => reference::round_to_bytes(x),
    }
}

#[test]
fn matmul_agrees_with_the_reference() {
    let mut random = Random::new(1);
    for cpu in each_isa(2) {
        for dtype in DType::ALL {
            for round in 0..8 {
                let cols = match dtype.block_len() {
                    1 => random.within(1, 700),
                    len => len * random.within(1, 600 / len),
                };
                // Every height of the register tile, and several tiles.
                let (m, n) = (random.within(1, 30), random.within(1, 150));
                let bytes = weights(&mut random, dtype, n, cols);
                let w = Matrix::new(dtype, n, cols, &bytes).unwrap();
                let packed = PackedWeights::new(&cpu, &w, None);
                let x = random.vector(m * cols);
                let bias = random.vector(n);
                let bias = random.within(0, 1).eq(&1).then_some(bias.as_slice());
                let mut want = vec![0.0; m * n];
                reference::matmul(&seen(cpu.isa(), dtype, &x), &w, bias, &mut want);
                let mut got = vec![f32::NAN; m * n];
                if round % 2 == 0 {
                    product(&cpu, &x, &packed, Finish::Store(bias), &mut got);
                } else {
                    got = random.vector(m * n);
                    want.iter_mut().zip(&got).for_each(|(want, got)| *want += got);
                    product(&cpu, &x, &packed, Finish::Add(bias), &mut got);
                }
                // Offsets of quants are subtracted in integers, but minima are not: their rounding adds up.
                let tolerance = 2e-5 * (cols as f32).sqrt() + 1e-5;
                assert_close(&got, &want, tolerance, tolerance, &format!("{:?} {dtype:?} {m}x{n}x{cols}", cpu.isa()));
            }
        }
    }
}

#[test]
fn gated_products_are_two_products_and_an_activation() {
    let mut random = Random::new(8);
    for cpu in each_isa(2) {
        for (dtype, gate) in [(DType::BF16, Gate::Silu), (DType::Q4K, Gate::GeluTanh), (DType::F32, Gate::Silu)] {
            let (m, n, cols) = (random.within(1, 20), random.within(1, 100), 512);
            let (bytes, up_bytes) = (weights(&mut random, dtype, n, cols), weights(&mut random, dtype, n, cols));
            let w = Matrix::new(dtype, n, cols, &bytes).unwrap();
            let up = Matrix::new(dtype, n, cols, &up_bytes).unwrap();
            let x = random.vector(m * cols);
            let (mut want, mut up_out) = (vec![0.0; m * n], vec![0.0; m * n]);
            product(&cpu, &x, &PackedWeights::new(&cpu, &w, None), Finish::Store(None), &mut want);
            product(&cpu, &x, &PackedWeights::new(&cpu, &up, None), Finish::Store(None), &mut up_out);
            match gate {
                Gate::Silu => cpu.silu_mul(&mut want, &up_out),
                Gate::GeluTanh => cpu.gelu_tanh_mul(&mut want, &up_out),
            }
            let mut got = vec![f32::NAN; m * n];
            product(&cpu, &x, &PackedWeights::new(&cpu, &w, Some(&up)), Finish::Gate(gate), &mut got);
            assert_same(&got, &want, &format!("{:?} {dtype:?} {m}x{n}", cpu.isa()));
        }
    }
}

/// Row `i` has the same bits alone, in any batch, and on any number of threads.
#[test]
fn matmul_rows_do_not_depend_on_the_batch() {
    let mut random = Random::new(2);
    for (alone, together) in each_isa(1).zip(each_isa(3)) {
        for dtype in DType::ALL {
            // Large enough that several chunks, tiles and tasks take part, with ragged edges.
            let (m, n, cols) = (37, 259, if dtype.block_len() == 1 { 517 } else { 768 });
            let bytes = weights(&mut random, dtype, n, cols);
            let w = Matrix::new(dtype, n, cols, &bytes).unwrap();
            let packed = PackedWeights::new(&together, &w, None);
            let x = random.vector(m * cols);
            let mut whole = vec![0.0; m * n];
            product(&together, &x, &packed, Finish::Store(None), &mut whole);
            let mut start = 0;
            while start < m {
                let rows = random.within(1, 13).min(m - start);
                let mut part = vec![0.0; rows * n];
                product(&alone, &x[start * cols..][..rows * cols], &packed, Finish::Store(None), &mut part);
                assert_same(
                    &part,
                    &whole[start * n..][..rows * n],
                    &format!("{:?} {dtype:?} row {start}", alone.isa()),
                );
                start += rows;
            }
            // An output does not depend on which rows of w are beside it, either.
            let (from, to) = (13, 14 + random.within(0, 30));
            let part = Matrix::new(dtype, to - from, cols, &bytes[from * w.row_bytes()..to * w.row_bytes()]).unwrap();
            let mut got = vec![0.0; m * (to - from)];
            product(&alone, &x, &PackedWeights::new(&alone, &part, None), Finish::Store(None), &mut got);
            for (got, whole) in got.chunks(to - from).zip(whole.chunks(n)) {
                assert_same(got, &whole[from..to], "a slice of w");
            }
        }
    }
}

/// Many rows are cut into blocks, each of which passes over w.
#[test]
fn very_many_rows_agree_with_few() {
    let mut random = Random::new(9);
    let cpu = Cpu::new(2, None);
    for dtype in [DType::BF16, DType::Q8_0] {
        let (m, n, cols) = (1100, 70, 64);
        let bytes = weights(&mut random, dtype, n, cols);
        let packed = PackedWeights::new(&cpu, &Matrix::new(dtype, n, cols, &bytes).unwrap(), None);
        let x = random.vector(m * cols);
        let (mut whole, mut last) = (vec![0.0; m * n], vec![0.0; n]);
        product(&cpu, &x, &packed, Finish::Store(None), &mut whole);
        for row in [0, 511, 512, 1099] {
            product(&cpu, &x[row * cols..][..cols], &packed, Finish::Store(None), &mut last);
            assert_same(&whole[row * n..][..n], &last, &format!("{dtype:?} row {row}"));
        }
    }
}

#[test]
fn odd_values_stay_where_they_are() {
    // A row with an infinity or a NaN spoils itself, not its neighbours in the register tile.
    let mut random = Random::new(10);
    for cpu in each_isa(1) {
        for dtype in [DType::F32, DType::BF16, DType::Q4_0, DType::Q6K] {
            let (n, cols) = (64, 512);
            let bytes = weights(&mut random, dtype, n, cols);
            let packed = PackedWeights::new(&cpu, &Matrix::new(dtype, n, cols, &bytes).unwrap(), None);
            let clean = random.vector(3 * cols);
            let mut x = clean.clone();
            x[cols + 5] = f32::NAN;
            x[2 * cols..].fill(1e-38);
            let (mut got, mut want) = (vec![0.0; 3 * n], vec![0.0; 3 * n]);
            product(&cpu, &x, &packed, Finish::Store(None), &mut got);
            product(&cpu, &clean, &packed, Finish::Store(None), &mut want);
            assert_same(&got[..n], &want[..n], "the row beside it");
            assert!(got[n..2 * n].iter().all(|v| v.is_nan()), "{:?} {dtype:?}", cpu.isa());
            assert!(got[2 * n..].iter().all(|v| v.abs() < 1e-30));
        }
    }
}

#[test]
fn rows_agree_with_the_reference() {
    let mut random = Random::new(3);
    for cpu in each_isa(2) {
        let isa = cpu.isa();
        for _ in 0..30 {
            let (rows, n) = (random.within(1, 9), random.within(1, 200));
            let (x, weight) = (random.vector(rows * n), random.vector(n));
            let (mut got, mut want) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            cpu.rms_norm(&x, &weight, 1e-5, &mut got);
            reference::rms_norm(&x, &weight, 1e-5, &mut want);
            assert_close(&got, &want, 1e-5, 1e-7, &format!("{isa:?} rms_norm {rows}x{n}"));
            let mut in_place = x.clone();
            cpu.rms_norm_inplace(&mut in_place, &weight, 1e-5);
            assert_same(&in_place, &got, "in place");

            let mut wide: Vec<f32> = x.iter().map(|v| v * 20.0).collect();
            let up = random.vector(wide.len());
            let mut want = wide.clone();
            cpu.silu_mul(&mut wide, &up);
            reference::silu_mul(&mut want, &up);
            assert_close(&wide, &want, 1e-6, 1e-30, &format!("{isa:?} silu"));

            let mut gate = x.clone();
            let mut want = gate.clone();
            cpu.gelu_tanh_mul(&mut gate, &up);
            reference::gelu_tanh_mul(&mut want, &up);
            assert_close(&gate, &want, 1e-5, 1e-7, &format!("{isa:?} gelu"));

            let (mut sum, mut want) = (x.clone(), x.clone());
            cpu.add(&mut sum, &up);
            reference::add(&mut want, &up);
            assert_same(&sum, &want, "add");

            let (heads, half, more) = (random.within(1, 4), random.within(1, 40), random.within(0, 5));
            let dim = 2 * half + more;
            let mut x = random.vector(rows * heads * dim);
            let angles = random.vector(rows * half);
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
            let mut want = x.clone();
            cpu.rope(&mut x, heads, dim, &cos, &sin);
            reference::rope(&mut want, heads, dim, &cos, &sin);
            assert_close(&x, &want, 1e-6, 1e-6, &format!("{isa:?} rope"));
        }
    }
}

/// Large inputs take the threaded path, whose cuts must not show.
#[test]
fn rows_do_not_depend_on_threads() {
    let mut random = Random::new(4);
    let x = random.vector(70 * 2048 + 12);
    let up = random.vector(x.len());
    for (one, three) in each_isa(1).zip(each_isa(3)) {
        let (mut a, mut b) = (x.clone(), x.clone());
        one.silu_mul(&mut a, &up);
        three.silu_mul(&mut b, &up);
        assert_same(&a, &b, "silu");
        let (mut a, mut b) = (x[12..].to_vec(), x[12..].to_vec());
        one.rms_norm_inplace(&mut a, &up[..2048], 1e-6);
        three.rms_norm_inplace(&mut b, &up[..2048], 1e-6);
        assert_same(&a, &b, "rms_norm");
    }
}

#[test]
fn embedding_decodes_rows() {
    let mut random = Random::new(5);
    for cpu in each_isa(2) {
        for dtype in DType::ALL {
            let bytes = weights(&mut random, dtype, 9, 256);
            let table = Matrix::new(dtype, 9, 256, &bytes).unwrap();
            let (mut got, mut want) = (vec![0.0; 4 * 256], vec![0.0; 4 * 256]);
            let ids = [8, 0, 3, 3];
            cpu.embed(dtype, 256, &|i, row| row.copy_from_slice(table.row(ids[i] as usize)), &mut got);
            reference::embed(&table, &ids, &mut want);
            assert_same(&got, &want, "every ISA decodes the same bits");
        }
    }
}

/// Sequences with cached keys, in pages of some size, and queries for their last positions.
struct Sequences {
    fmt: KvFormat,
    pages: Vec<Vec<Vec<u8>>>,
}

impl Sequences {
    /// `kv[s]` is `[len][2][kv_heads * head_dim]`. Bytes that no key fills are NaN patterns, so that reading them shows.
    fn new(fmt: KvFormat, kv: &[Vec<f32>]) -> Sequences {
        let width = fmt.kv_heads * fmt.head_dim;
        let pages = kv
            .iter()
            .map(|kv| {
                let tokens: Vec<_> = kv.chunks(2 * width).collect();
                let filled = tokens.chunks(fmt.block_size).map(|block| {
                    let mut page = vec![0xff; fmt.page_bytes()];
                    for (slot, token) in block.iter().enumerate() {
                        fmt.write(&mut page, slot, &token[..width], &token[width..]);
                    }
                    page
                });
                filled.collect()
            })
            .collect();
        Sequences { fmt, pages }
    }

    /// Attention of the queries `start[s]..len[s]` of each sequence, all in one call cut into items of at most `chunk` rows.
    fn run(
        &self,
        op: Attend<'_>,
        chunk: usize,
        starts: &[usize],
        lens: &[usize],
        q: &[f32],
        shape: &Shape,
    ) -> Vec<f32> {
        let pages: Vec<Vec<&[u8]>> =
            self.pages.iter().map(|p| p.iter().map(|page| page.as_slice()).collect()).collect();
        let mut items = Vec::new();
        let mut row = 0;
        for (s, pages) in pages.iter().enumerate() {
            for start in (starts[s]..lens[s]).step_by(chunk) {
                let rows = chunk.min(lens[s] - start);
                items.push(AttentionItem { pages, first_row: row, rows, start });
                row += rows;
            }
        }
        let mut out = vec![f32::NAN; q.len()];
        op(&self.fmt, &items, shape.heads, shape.scale, shape.window, q, &mut out);
        out
    }
}

struct Shape {
    heads: usize,
    scale: f32,
    window: Option<usize>,
}

type Attend<'a> = &'a dyn Fn(&KvFormat, &[AttentionItem<'_>], usize, f32, Option<usize>, &[f32], &mut [f32]);

#[test]
fn attention_agrees_with_the_reference_however_it_is_cut() {
    let mut random = Random::new(6);
    for round in 0..20 {
        let dtype = KvDtype::ALL[round % 5];
        let (kv_heads, group) = (random.within(1, 3), random.within(1, 7));
        let head_dim = [8, 20, 64, 80, 128][(round + round / 5) % 5];
        let heads = kv_heads * group;
        let window = (round % 4 == 3).then(|| random.within(1, 150));
        let shape = Shape { heads, scale: 1.0 / (head_dim as f32).sqrt(), window };
        let lens: Vec<usize> = (0..3).map(|_| random.within(1, 200)).collect();
        let starts: Vec<usize> = lens.iter().map(|&len| len - random.within(1, len.min(50))).collect();
        let kv: Vec<Vec<f32>> = lens.iter().map(|len| random.vector(len * 2 * kv_heads * head_dim)).collect();
        let rows: usize = lens.iter().zip(&starts).map(|(len, start)| len - start).sum();
        let q: Vec<f32> = random.vector(rows * heads * head_dim).iter().map(|v| v * 3.0).collect();

        let format = |block_size| KvFormat { dtype, kv_heads, head_dim, block_size };
        let sequences = Sequences::new(format(16), &kv);
        let want = sequences.run(&reference::attention, usize::MAX, &starts, &lens, &q, &shape);
        for (cpu, threaded) in each_isa(1).zip(each_isa(3)) {
            let what = format!("{:?} {dtype:?} heads {heads}/{kv_heads} dim {head_dim} window {window:?}", cpu.isa());
            let got = sequences.run(&attend(&cpu), usize::MAX, &starts, &lens, &q, &shape);
            assert_close(&got, &want, 1e-4, 2e-5, &what);
            for (block_size, chunk) in [(16, 1), (16, 13), (1, 7), (48, 33), (64, 64), (256, usize::MAX)] {
                let other = Sequences::new(format(block_size), &kv);
                let again = other.run(&attend(&threaded), chunk, &starts, &lens, &q, &shape);
                assert_same(&again, &got, &format!("{what}, blocks of {block_size}, chunks of {chunk}"));
            }
        }
    }
}

/// Contexts of several splits, which are computed apart or one after another depending on threads and company.
#[test]
fn long_contexts_do_not_depend_on_how_splits_are_shared_out() {
    let mut random = Random::new(8);
    for (round, dtype) in KvDtype::ALL.into_iter().enumerate() {
        let (kv_heads, group, head_dim) = (2, [1, 4, 8, 3, 4][round], [64, 32, 16, 64, 48][round]);
        let heads = kv_heads * group;
        let lens = [1025 + 300 * round, 512, 513, 40];
        let starts = [lens[0] - 70, 511, 500, 0];
        let kv: Vec<Vec<f32>> = lens.iter().map(|len| random.vector(len * 2 * kv_heads * head_dim)).collect();
        let rows: usize = lens.iter().zip(&starts).map(|(len, start)| len - start).sum();
        let q: Vec<f32> = random.vector(rows * heads * head_dim).iter().map(|v| v * 3.0).collect();
        let format = |block_size| KvFormat { dtype, kv_heads, head_dim, block_size };
        for window in [None, Some(530), Some(1)] {
            let shape = Shape { heads, scale: 1.0 / (head_dim as f32).sqrt(), window };
            let sequences = Sequences::new(format(16), &kv);
            let want = sequences.run(&reference::attention, usize::MAX, &starts, &lens, &q, &shape);
            for (cpu, threaded) in each_isa(1).zip(each_isa(3)) {
                let what = format!("{:?} {dtype:?} heads {heads}/{kv_heads} window {window:?}", cpu.isa());
                let got = sequences.run(&attend(&cpu), usize::MAX, &starts, &lens, &q, &shape);
                assert_close(&got, &want, 1e-4, 3e-5, &what);
                for (block_size, chunk) in [(16, 1), (16, usize::MAX), (24, 1), (64, 9)] {
                    let other = Sequences::new(format(block_size), &kv);
                    let again = other.run(&attend(&threaded), chunk, &starts, &lens, &q, &shape);
                    assert_same(&again, &got, &format!("{what}, blocks of {block_size}, chunks of {chunk}"));
                }
            }
            // A lone query is cut into splits for three threads; its bits are those it has in company.
            let (start, width) = (lens[0] - 1, heads * head_dim);
            let row = (start - starts[0]) * width..(start - starts[0] + 1) * width;
            for (cpu, threaded) in each_isa(1).zip(each_isa(3)) {
                let whole = sequences.run(&attend(&cpu), usize::MAX, &starts, &lens, &q, &shape);
                let lone = Sequences { fmt: sequences.fmt, pages: vec![sequences.pages[0].clone()] };
                let alone = lone.run(&attend(&threaded), 1, &[start], &lens[..1], &q[row.clone()], &shape);
                assert_same(&alone, &whole[row.clone()], "a lone query");
            }
        }
    }
}

/// Every fp8 code reads the same in every path: as a value that has all the weight, it is the output.
#[test]
fn every_fp8_code_is_decoded_exactly() {
    let fmt = KvFormat { dtype: KvDtype::Fp8, kv_heads: 1, head_dim: 256, block_size: 16 };
    let codes: Vec<u8> = (0..=255).collect();
    let mut page = vec![0; fmt.page_bytes()];
    page[fmt.value(0, 0)..][..256].copy_from_slice(&codes);
    let want: Vec<f32> = codes.iter().map(|code| crate::kv::e4m3_to_f32(*code)).collect();
    for cpu in each_isa(1) {
        for heads in [1, 40] {
            let (q, mut out) = (vec![1.0; heads * 256], vec![0.0; heads * 256]);
            let items = [AttentionItem { pages: &[&page], first_row: 0, rows: 1, start: 0 }];
            cpu.attention(&fmt, &items, heads, 1.0, None, &q, &mut out);
            for (i, (got, want)) in out.iter().zip(want.iter().cycle()).enumerate() {
                assert!(got == want || got.is_nan() && want.is_nan(), "{:?}: code {i} is {got}", cpu.isa());
            }
        }
    }
}

/// Pages filled with the machine's vectors and threads hold the bytes of the plain loop.
#[test]
fn write_kv_agrees_with_the_format() {
    let mut random = Random::new(10);
    for cpu in each_isa(3) {
        for dtype in KvDtype::ALL {
            let fmt = KvFormat { dtype, kv_heads: 8, head_dim: 72, block_size: 16 };
            let width = fmt.kv_heads * fmt.head_dim;
            let (k, v) = (random.vector(300 * width), random.vector(300 * width));
            let mut pages = vec![vec![0xff; fmt.page_bytes()]; 300usize.div_ceil(16)];
            let mut want = pages.clone();
            for (row, page) in (0..300).step_by(16).zip(&mut want) {
                let rows = row * width..(row + 16).min(300) * width;
                fmt.write(page, 0, &k[rows.clone()], &v[rows]);
                fmt.zero_tail(page, (300 - row).min(16));
            }
            let writes = pages.iter_mut().enumerate().map(|(i, page)| KvWrite {
                page,
                slot: 0,
                row: 16 * i,
                rows: (300 - 16 * i).min(16),
                clear_rest: true,
            });
            cpu.write_kv(&fmt, &mut writes.collect::<Vec<_>>(), &k, &v);
            assert!(pages == want, "{:?} {dtype:?}", cpu.isa());
        }
    }
}

/// Pages converted with the machine's vectors hold the bytes of the plain loop.
#[test]
fn convert_kv_agrees_with_the_format() {
    let mut random = Random::new(11);
    for cpu in each_isa(1) {
        for (source, target) in KvDtype::ALL.into_iter().flat_map(|source| KvDtype::ALL.map(|target| (source, target)))
        {
            if matches!(source, KvDtype::Fp8 | KvDtype::Int8) && source != target {
                continue; // These are not converted.
            }
            let format = |dtype, block_size| KvFormat { dtype, kv_heads: 2, head_dim: 72, block_size };
            let (from, to) = (format(source, 24), format(target, 40));
            let (k, v) = (random.vector(24 * 144), random.vector(24 * 144));
            let mut page = vec![0; from.page_bytes()];
            from.write(&mut page, 0, &k, &v);
            let moved = KvMove { from: 1, to: 17, tokens: 23 };
            let mut got = vec![0xff; to.page_bytes()];
            let mut want = got.clone();
            from.convert(&page, &to, &mut want, moved);
            // SAFETY: a `Cpu` has a table of features that are there.
            unsafe { (cpu.kernels.convert_kv)(&from, &page, &to, &mut got, moved) };
            assert!(got == want, "{:?}: {source:?} into {target:?}", cpu.isa());
        }
    }
}

#[allow(clippy::type_complexity, reason = "the type is `Attend`, unboxed")]
fn attend(cpu: &Cpu) -> impl Fn(&KvFormat, &[AttentionItem<'_>], usize, f32, Option<usize>, &[f32], &mut [f32]) + '_ {
    |fmt, items, heads, scale, window, q, out| cpu.attention(fmt, items, heads, scale, window, q, out)
}

#[test]
fn exp_is_close_and_vanishes() {
    use super::scalar::Lanes;
    use super::vector::{Vector, exp};
    let one = |x: f32| {
        // SAFETY: the scalar ISA needs no features.
        exp(unsafe { Lanes::splat(x) }).largest()
    };
    assert_eq!(one(0.0), 1.0);
    assert_eq!(one(f32::NEG_INFINITY).to_bits(), 0);
    assert_eq!(one(-87.5), 0.0);
    assert!(one(1000.0).is_finite());
    for i in -8600..8800 {
        let x = i as f32 / 100.0;
        let want = f64::from(x).exp();
        assert!((f64::from(one(x)) / want - 1.0).abs() < 2e-7, "e^{x}");
    }
}
