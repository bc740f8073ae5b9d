//! Prints what one parallel region of the thread pool costs: empty tasks, and tasks of some microseconds.
//!
//! ```text
//! cargo run --release -p ridge-kernels --example region_speed [THREADS]
//! ```

use ridge_kernels::sync::pool::{Placement, ThreadPool, pin_to};
use std::error::Error;
use std::hint::black_box;
use std::time::{Duration, Instant};

const ROUNDS: usize = 20_000;

fn main() -> Result<(), Box<dyn Error>> {
    let available = std::thread::available_parallelism()?.get();
    let threads = std::env::args().nth(1).map_or(Ok(available), |text| text.parse())?;
    let cores = (threads <= available).then(|| (0..threads).collect::<Vec<_>>());
    if cores.is_some() {
        pin_to(0);
    }
    println!(
        "{threads} threads; best tenth / median of regions in direct succession, then 1 ms apart (workers asleep)"
    );
    for shared in [false, true] {
        let pool = ThreadPool::new(&Placement { cores: cores.clone(), shared, ..Placement::threads(threads) });
        for (name, tasks, work) in [("empty", threads, 0), ("4 per thread", 4 * threads, 0), ("20 us", threads, 20)] {
            let close = times(&pool, tasks, work, ROUNDS, Duration::ZERO);
            let apart = times(&pool, tasks, work, ROUNDS / 50, Duration::from_millis(1));
            println!(
                "shared={shared:5} {name:13} {:6.2} / {:6.2} us, apart {:6.2} / {:6.2} us",
                close.0, close.1, apart.0, apart.1
            );
        }
    }
    Ok(())
}

/// Best tenth and median of a region's time in microseconds; on a machine with other work the first is the pool's own.
fn times(pool: &ThreadPool, tasks: usize, work_us: u64, rounds: usize, pause: Duration) -> (f64, f64) {
    let region = |_| {
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        let begin = Instant::now();
        pool.run(tasks, &|task| {
            black_box(task);
            let begin = Instant::now();
            while work_us > 0 && begin.elapsed() < Duration::from_micros(work_us) {}
        });
        begin.elapsed()
    };
    let mut times: Vec<Duration> = (0..rounds).map(region).collect();
    times.sort_unstable();
    let us = |place: usize| times[place].as_secs_f64() * 1e6;
    (us(rounds / 10), us(rounds / 2))
}
