//! Checks each kernel against the reference, then times it beside what this machine can do at most.
//!
//! `cargo run --release -p ridge-kernels --example kernel_speed [threads] [matmul | attention]`
//!
//! The limits (memory read bandwidth, register-only multiply-adds) are measured in the same run, because absolute figures
//! drift from hour to hour.

use ridge_kernels::machine::{Gauge, Limits};
use ridge_kernels::{
    AttentionItem, Cpu, DType, Finish, Isa, KvDtype, KvFormat, KvWrite, Matrix, Operand, Packed, Rows, quantize_row,
    reference,
};
use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::time::{Duration, Instant};

fn main() {
    let available = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(available);
    let cpu = Cpu::new(threads, Some(&(0..available).collect::<Vec<_>>()));
    ridge_kernels::sync::pool::pin_to(0);
    println!("{} on {} threads", cpu.isa().name(), cpu.threads());

    let limits = limits(&cpu);
    let (read, fma) = (limits.read_bytes_per_s / 1e9, limits.f32_flops_per_s / 1e9);
    let bf16 = if cpu.isa() == Isa::Avx512Bf16 { limits.bf16_flops_per_s / 1e9 } else { fma };
    println!("limits: read {read:.1} GB/s, f32 {fma:.0} GFLOP/s, bf16 {bf16:.0} GFLOP/s\n");

    let part = std::env::args().nth(2);
    if part.as_deref() != Some("attention") {
        matmuls(&cpu, fma, bf16, read);
    }
    if part.as_deref() != Some("matmul") {
        attentions(&cpu, fma, read);
    }
}

/// Products of every type and of several shapes.
fn matmuls(cpu: &Cpu, fma: f64, bf16: f64, read: f64) {
    println!(
        "{:8} {:>5} {:>6} {:>6} {:>10} {:>7} {:>8} {:>7}",
        "weights", "m", "n", "k", "GFLOP/s", "of max", "GB/s", "of max"
    );
    let only = std::env::args().nth(2);
    for dtype in DType::ALL.into_iter().filter(|d| only.as_deref().is_none_or(|o| o.split(',').any(|o| o == d.name())))
    {
        let max = if dtype == DType::BF16 { bf16 } else { fma };
        for (m, n, k) in
            [(1, 256, 2048), (8, 256, 2048), (16, 256, 2048), (1, 32768, 2048), (8, 32768, 2048), (512, 8192, 2048)]
        {
            if std::env::args().nth(3).is_some_and(|only| only != m.to_string()) {
                continue;
            }
            let (seconds, bytes) = matmul(cpu, dtype, m, n, k);
            let rate = 2.0 * (m * n * k) as f64 / seconds / 1e9;
            let stream = bytes as f64 / seconds / 1e9;
            println!(
                "{:8} {m:5} {n:6} {k:6} {rate:10.1} {:6.0}% {stream:8.1} {:6.0}%",
                dtype.name(),
                100.0 * rate / max,
                100.0 * stream / read
            );
        }
    }
    println!();
}

/// Llama-3.2-1B's heads (32 queries, 8 keys of 64) and Llama-3.1-8B's (of 128): decode steps, and chunks of prompts.
fn attentions(cpu: &Cpu, fma: f64, read: f64) {
    println!(
        "{:8} {:>4} {:>5} {:>6} {:>10} {:>8} {:>7} {:>6} {:>7}",
        "cache", "dim", "rows", "from", "us", "GFLOP/s", "of max", "GB/s", "of max"
    );
    let steps = [(64, 1, 4095), (64, 1, 8191), (128, 1, 8191)];
    let chunks = [(64, 512, 0), (64, 512, 3584), (128, 512, 0), (128, 512, 3584)];
    for dtype in KvDtype::ALL {
        for (head_dim, rows, start) in steps.into_iter().chain(chunks) {
            if rows == 1 || dtype == KvDtype::BF16 {
                attention(cpu, dtype, head_dim, rows, start, fma, read);
            }
        }
    }
}

/// Seconds per call, the best of several: other tenants of the machine only ever add time. On one thread it is the thread's own
/// CPU time, so that a busy machine can be measured too.
fn best(threads: usize, mut f: impl FnMut()) -> f64 {
    let clock = if threads == 1 { ClockId::ThreadCPUTime } else { ClockId::Monotonic };
    let now = || {
        let t = clock_gettime(clock);
        t.tv_sec as f64 + 1e-9 * t.tv_nsec as f64
    };
    f();
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    let mut calls = 0;
    while calls < 3 || (begin.elapsed() < Duration::from_millis(400) && calls < 1000) {
        let start = now();
        f();
        best = best.min(now() - start);
        calls += 1;
    }
    best
}

/// The best of several slices, as the kernels' times are the best of several calls.
fn limits(cpu: &Cpu) -> Limits {
    let gauge = Gauge::new(cpu, Gauge::BYTES_PER_THREAD);
    let slices = (0..5).map(|_| gauge.measure(cpu, Duration::from_millis(120)));
    slices.fold(Limits::default(), |best, slice| Limits {
        read_bytes_per_s: best.read_bytes_per_s.max(slice.read_bytes_per_s),
        f32_flops_per_s: best.f32_flops_per_s.max(slice.f32_flops_per_s),
        bf16_flops_per_s: best.bf16_flops_per_s.max(slice.bf16_flops_per_s),
        int8_ops_per_s: best.int8_ops_per_s.max(slice.int8_ops_per_s),
    })
}

fn random(seed: &mut u32) -> f32 {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Seconds per product and bytes of weights, after a check of some rows.
fn matmul(cpu: &Cpu, dtype: DType, m: usize, n: usize, k: usize) -> (f64, usize) {
    let mut seed = 1;
    let row: Vec<f32> = (0..k + 256).map(|_| random(&mut seed)).collect();
    let (mut data, mut distinct) = (Vec::new(), Vec::new());
    // Encoding is slow, so a few distinct rows repeat.
    for i in 0..8 {
        quantize_row(dtype, &row[32 * i..][..k], &mut distinct).expect("whole blocks of finite values");
    }
    while data.len() < n * distinct.len() / 8 {
        data.extend_from_slice(&distinct);
    }
    let w = Matrix::new(dtype, n, k, &data).expect("n rows");
    let mut bytes = vec![0; Packed::bytes(dtype, n, k, false).expect("a shape that was just made")];
    cpu.pack(&w, None, &mut bytes);
    let packed = Packed::new(dtype, n, k, false, &bytes).expect("packed just now");
    let x: Vec<f32> = (0..m * k).map(|_| half::bf16::from_f32(random(&mut seed)).to_f32()).collect();
    let (mut y, mut operand) = (vec![0.0; m * n], Operand::default());
    let mut product =
        |y: &mut [f32]| cpu.matmul(&mut Rows::new(black_box(&x), k, &mut operand), &packed, Finish::Store(None), y);
    product(&mut y);
    let few = Matrix::new(dtype, 8, k, &data[..distinct.len()]).expect("8 rows");
    let mut want = vec![0.0; m * 8];
    let bytes_of_x = !matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    let seen = if bytes_of_x { reference::round_to_bytes(&x) } else { x.clone() };
    reference::matmul(&seen, &few, None, &mut want);
    for (got, want) in y.chunks(n).zip(want.chunks(8)) {
        for (i, got) in got.iter().enumerate() {
            assert!((got - want[i % 8]).abs() < 1e-2, "{dtype:?}: {got} for {}", want[i % 8]);
        }
    }
    (best(cpu.threads(), || product(black_box(&mut y))), data.len())
}

/// One call over 32 query heads, 8 of keys and blocks of 16, after a check of its last row.
fn attention(cpu: &Cpu, dtype: KvDtype, head_dim: usize, rows: usize, start: usize, fma: f64, read: f64) {
    let fmt = KvFormat { dtype, kv_heads: 8, head_dim, block_size: 16 };
    let (heads, scale, mut seed) = (32, 1.0 / (head_dim as f32).sqrt(), 1);
    let width = fmt.kv_heads * fmt.head_dim;
    let keys = start + rows;
    let kv: Vec<f32> = (0..2 * keys * width).map(|_| random(&mut seed)).collect();
    let (k, v) = kv.split_at(keys * width);
    // Steps take turns on sequences that no cache holds together, as the layers of a pass do.
    let blocks = keys.div_ceil(fmt.block_size);
    let sequences = if rows == 1 { (512 << 20) / (blocks * fmt.page_bytes()) } else { 1 };
    // Pages start at cache lines, as those of KV memory do.
    let mut memory = vec![0u8; sequences * blocks * fmt.page_bytes() + 64];
    let aligned = memory.as_ptr().align_offset(64);
    let mut pages: Vec<&mut [u8]> = memory[aligned..].chunks_exact_mut(fmt.page_bytes()).collect();
    let mut writes: Vec<KvWrite<'_>> = pages
        .iter_mut()
        .enumerate()
        .map(|(i, page)| {
            let row = i % blocks * fmt.block_size;
            KvWrite { page, slot: 0, row, rows: fmt.block_size.min(keys - row), clear_rest: true }
        })
        .collect();
    cpu.write_kv(&fmt, &mut writes, k, v);
    if rows > 1 {
        let seconds = best(cpu.threads(), || cpu.write_kv(&fmt, &mut writes, k, v));
        println!("{:8} {head_dim:4} {keys:5} written {:9.0} us", dtype.name(), seconds * 1e6);
    }
    let pages: Vec<&[u8]> = pages.iter().map(|page| &**page).collect();
    let q: Vec<f32> = (0..rows * heads * fmt.head_dim).map(|_| random(&mut seed)).collect();
    let mut out = vec![0.0; q.len()];
    let mut sequence = pages.chunks_exact(blocks).cycle();
    let mut step = || {
        let pages = sequence.next().expect("a cycle has no end");
        let items = [AttentionItem { pages, first_row: 0, rows, start }];
        cpu.attention(&fmt, &items, heads, scale, None, black_box(&q), black_box(&mut out));
    };
    let seconds = best(cpu.threads(), &mut step);
    let (last, mut want) = ((rows - 1) * heads * fmt.head_dim, vec![0.0; heads * fmt.head_dim]);
    let item = [AttentionItem { pages: &pages[..blocks], first_row: 0, rows: 1, start: start + rows - 1 }];
    reference::attention(&fmt, &item, heads, scale, None, &q[last..], &mut want);
    assert!(out[last..].iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-4));

    let pairs: usize = (start + 1..=keys).sum();
    let rate = 4.0 * (pairs * heads * fmt.head_dim) as f64 / seconds / 1e9;
    let stream = (blocks * fmt.page_bytes()) as f64 / seconds / 1e9;
    println!(
        "{:8} {head_dim:4} {rows:5} {start:6} {:10.0} {rate:8.1} {:6.0}% {stream:6.1} {:6.0}%",
        dtype.name(),
        seconds * 1e6,
        100.0 * rate / fma,
        100.0 * stream / read
    );
}
