//! What this machine can do at most, measured: how fast its threads read memory together, and how fast they multiply and
//! add when nothing has to be loaded. The two sides of a roofline. Knows no kernel of ours.
//!
//! Read first: [`Gauge`], [`Limits`]. The rates of a shared machine drift by a factor of two within minutes, so a
//! measurement is a slice of some tens of milliseconds, to be taken again beside whatever it is compared with.

mod peak;
mod stream;

use crate::cpu::Cpu;
use crate::sync::pool::ThreadPool;
use std::hint::black_box;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use stream::Line;

/// Rates of all threads of a pool together. An instruction that the machine lacks has a rate of 0.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Limits {
    /// Bytes per second read from memory in order.
    pub read_bytes_per_s: f64,
    /// f32 multiply-adds, two operations each.
    pub f32_flops_per_s: f64,
    /// bf16 products added to f32 sums (`vdpbf16ps`), two operations per product.
    pub bf16_flops_per_s: f64,
    /// 8-bit products added to 32-bit sums (`vpdpbusd`), two operations per product.
    pub int8_ops_per_s: f64,
}

/// Measures [`Limits`]. Keeps the memory that it reads from one measurement to the next.
///
/// The limits are the machine's own, whatever `RIDGE_ISA` has lowered the kernels to.
pub struct Gauge {
    /// One per thread.
    parts: Vec<Mutex<Part>>,
}

/// What one thread reads, and where it goes on.
#[derive(Default)]
struct Part {
    lines: Vec<Line>,
    next: usize,
}

/// Bytes between two looks at the clock: a quarter of a millisecond.
const PIECE_BYTES: usize = 4 << 20;

impl Gauge {
    /// Memory per thread that no cache of today hides: the largest have a few hundred MiB for dozens of threads.
    pub const BYTES_PER_THREAD: usize = 512 << 20;

    /// Takes and fills `bytes_per_thread` (at least 4 MiB) for each thread of `cpu`. A part that fits in a cache measures
    /// the cache.
    pub fn new(cpu: &Cpu, bytes_per_thread: usize) -> Gauge {
        let lines = bytes_per_thread.max(PIECE_BYTES) / size_of::<Line>();
        let parts: Vec<Mutex<Part>> = (0..cpu.threads()).map(|_| Mutex::default()).collect();
        // Each part is first touched by a thread of the pool, most likely the one that will read it.
        cpu.pool().run(parts.len(), &|index| *lock(&parts[index]) = Part { lines: stream::filled(lines), next: 0 });
        Gauge { parts }
    }

    /// Measures all limits, for about `time` in all: half of it reads, the rest computes.
    ///
    /// Panics if `cpu` has another number of threads than the one this gauge was made for.
    pub fn measure(&self, cpu: &Cpu, time: Duration) -> Limits {
        let pool = cpu.pool();
        let peak = |chains: Option<peak::Chains>| {
            // SAFETY: chains are handed out only when their instructions were detected.
            chains.map_or(0.0, |c| rate(pool, time / 6, &|_| unsafe { (c.run)() }))
        };
        Limits {
            read_bytes_per_s: self.read(cpu, time / 2),
            f32_flops_per_s: peak(Some(peak::f32())),
            bf16_flops_per_s: peak(peak::bf16()),
            int8_ops_per_s: peak(peak::int8()),
        }
    }

    /// Bytes per second that the threads read together, for about `time`.
    ///
    /// Panics if `cpu` has another number of threads than the one this gauge was made for.
    pub fn read(&self, cpu: &Cpu, time: Duration) -> f64 {
        assert_eq!(cpu.threads(), self.parts.len(), "a gauge belongs to one number of threads");
        rate(cpu.pool(), time, &|index| {
            let mut part = lock(&self.parts[index]);
            let piece = PIECE_BYTES / size_of::<Line>();
            let first = if part.next + piece <= part.lines.len() { part.next } else { 0 };
            part.next = first + piece;
            black_box(stream::sum(&part.lines[first..first + piece]));
            PIECE_BYTES as u64
        })
    }
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these locks hold is always whole: a panic while one was held changes nothing about it.
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Units per second of `step`, which returns the units it did, repeated for `time` in every thread of the pool. The clock
/// is looked at between steps. Each thread's rate is over its own time, from the common beginning to its own end: on a
/// busy machine, waiting for a thread that was put to sleep just before its end would count against the others.
fn rate(pool: &ThreadPool, time: Duration, step: &(dyn Fn(usize) -> u64 + Sync)) -> f64 {
    let total = Mutex::new(0.0);
    let begin = Instant::now();
    pool.run(pool.threads(), &|index| {
        let mut units = step(index);
        while begin.elapsed() < time {
            units += step(index);
        }
        *lock(&total) += units as f64 / begin.elapsed().as_secs_f64();
    });
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_of_this_machine_is_measured() {
        for threads in [1, 2] {
            let cpu = Cpu::new(threads, None);
            let gauge = Gauge::new(&cpu, 8 << 20);
            let limits = gauge.measure(&cpu, Duration::from_millis(12));
            assert!(limits.read_bytes_per_s > 1e6, "{limits:?}");
            assert!(limits.f32_flops_per_s > 1e6, "{limits:?}");
            assert_eq!(limits.bf16_flops_per_s > 0.0, peak::bf16().is_some(), "{limits:?}");
            assert_eq!(limits.int8_ops_per_s > 0.0, peak::int8().is_some(), "{limits:?}");
        }
    }

    #[test]
    #[should_panic(expected = "one number of threads")]
    fn a_gauge_of_another_pool_is_refused() {
        Gauge::new(&Cpu::new(1, None), 0).read(&Cpu::new(2, None), Duration::ZERO);
    }
}
