//! Prints how fast KV pages are made from pages of other blocks, on one thread as the one that ships them: gigabytes of the
//! sender's pages per second, and of the receiver's, beside a plain copy.
//!
//! ```text
//! cargo run --release -p ridge-kernels --example convert_speed
//! ```

use ridge_kernels::{KvDtype, KvFormat, KvMove, convert_kv};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Llama-3.2-1B: eight heads of 64 elements.
const HEADS: (usize, usize) = (8, 64);
/// Tokens converted in one go, and how many different ones there are: more bytes than a core's own caches hold.
const TOKENS: usize = 512;
const ROUND: Duration = Duration::from_millis(300);

fn main() {
    let format = |dtype, block_size| KvFormat { dtype, kv_heads: HEADS.0, head_dim: HEADS.1, block_size };
    let sizes = [(16, 16), (16, 32), (64, 16)];
    println!("sender's blocks   receiver's        read      write   GB/s");
    for from in [KvDtype::F32, KvDtype::F16, KvDtype::BF16] {
        for to in KvDtype::ALL {
            for (own, other) in sizes {
                measure(format(from, own), format(to, other));
            }
        }
    }
    for dtype in [KvDtype::Fp8, KvDtype::Int8] {
        sizes.iter().for_each(|(own, other)| measure(format(dtype, *own), format(dtype, *other)));
    }
}

fn measure(from: KvFormat, to: KvFormat) {
    let values: Vec<f32> = (0..from.block_size * HEADS.0 * HEADS.1).map(|i| (i % 997) as f32 / 311.0 - 1.6).collect();
    let mut pages = vec![vec![0; from.page_bytes()]; TOKENS / from.block_size];
    pages.iter_mut().for_each(|page| from.write(page, 0, &values, &values));
    let mut out = vec![vec![0; to.page_bytes()]; TOKENS / to.block_size];
    let step = from.block_size.min(to.block_size);
    let mut rounds = 0u32;
    let begun = Instant::now();
    while begun.elapsed() < ROUND {
        for token in (0..TOKENS).step_by(step) {
            let moved = KvMove { from: token % from.block_size, to: token % to.block_size, tokens: step };
            let page = black_box(&pages[token / from.block_size]);
            if from == to {
                out[token / to.block_size].copy_from_slice(page);
            } else {
                convert_kv(&from, page, &to, &mut out[token / to.block_size], moved);
            }
        }
        black_box(&out);
        rounds += 1;
    }
    let seconds = begun.elapsed().as_secs_f64() / f64::from(rounds);
    let rate = |format: KvFormat| (TOKENS / format.block_size * format.page_bytes()) as f64 / seconds / 1e9;
    let name = |format: KvFormat| format!("{} x {}", format.block_size, format.dtype.name());
    let plain = if from == to { "  (a copy)" } else { "" };
    println!("{:<17} {:<14} {:>7.2}   {:>8.2}{plain}", name(from), name(to), rate(from), rate(to));
}
