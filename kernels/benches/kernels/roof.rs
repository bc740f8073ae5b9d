//! The machine's limits around a measurement, and the fraction of them that a kernel reached.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Throughput};
use ridge_kernels::Cpu;
use ridge_kernels::machine::{Gauge, Limits};
use std::time::{Duration, Instant};

/// Which operations a kernel consists of.
#[derive(Clone, Copy)]
pub enum Operations {
    /// Multiply-adds of floats; bf16's own where that is faster.
    Floats,
    /// Multiply-adds of bytes.
    Bytes,
}

/// What one call must do.
#[derive(Clone, Copy)]
pub struct Work {
    /// Multiplications and additions.
    pub operations: f64,
    /// Of which kind.
    pub kind: Operations,
    /// Bytes that come from memory and not from a cache.
    pub bytes: f64,
}

/// The kernels and the gauge of their threads.
pub struct Roof {
    /// What computes.
    pub cpu: Cpu,
    gauge: Gauge,
}

impl Roof {
    /// On `RIDGE_BENCH_THREADS` threads, or one per core.
    pub fn new() -> Roof {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let wish = std::env::var("RIDGE_BENCH_THREADS").ok().and_then(|text| text.parse().ok());
        let cpu = Cpu::new(wish.unwrap_or(cores), None);
        let gauge = Gauge::new(&cpu, Gauge::BYTES_PER_THREAD);
        println!("{} on {} threads", cpu.isa().name(), cpu.threads());
        Roof { cpu, gauge }
    }

    /// Times `call` and prints its fraction of the roof.
    pub fn bench(&self, group: &mut BenchmarkGroup<'_, WallTime>, name: &str, work: Work, mut call: impl FnMut()) {
        group.throughput(Throughput::Bytes(work.bytes as u64));
        let mut times = Vec::new();
        let mut before = None;
        group.bench_function(name, |bencher| {
            // Only here is it known that the name was not filtered out.
            before.get_or_insert_with(|| self.limits());
            bencher.iter_custom(|calls| {
                let begin = Instant::now();
                (0..calls).for_each(|_| call());
                let time = begin.elapsed();
                times.push(time.as_secs_f64() / calls as f64);
                time
            });
        });
        let Some(before) = before else { return };
        times.sort_by(f64::total_cmp);
        let needed = [before, self.limits()].map(|limits| seconds(work, &limits));
        let fraction = (needed[0] + needed[1]) / 2.0 / times[times.len() / 2];
        println!("{:24}{:.0} % of the roof", "", 100.0 * fraction);
    }

    fn limits(&self) -> Limits {
        self.gauge.measure(&self.cpu, Duration::from_millis(120))
    }
}

/// What the work takes at least.
fn seconds(work: Work, limits: &Limits) -> f64 {
    let floats = limits.f32_flops_per_s.max(limits.bf16_flops_per_s);
    let rate = match work.kind {
        Operations::Floats => floats,
        Operations::Bytes => floats.max(limits.int8_ops_per_s),
    };
    (work.operations / rate).max(work.bytes / limits.read_bytes_per_s)
}

/// Pseudo-random numbers in -1..1.
pub fn random(seed: &mut u32) -> f32 {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
}
