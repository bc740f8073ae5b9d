//! Every kernel checked against the scalar reference, then timed beside what this machine can do at most.
//!
//! ```text
//! cargo bench -p ridge-kernels                      all of them (minutes)
//! cargo bench -p ridge-kernels -- matmul/Q4_K       those whose names contain it
//! RIDGE_BENCH_THREADS=1 RIDGE_ISA=avx2 cargo bench -p ridge-kernels
//! ```
//!
//! Below criterion's lines stands the fraction of the roof: the time that the kernel's bytes or operations need at the rates
//! measured just before and after it, over the median time it took.

mod attention;
mod matmul;
mod roof;
mod rows;

use criterion::{Criterion, criterion_group, criterion_main};
use roof::Roof;
use std::time::Duration;

fn kernels(criterion: &mut Criterion) {
    let roof = Roof::new();
    matmul::all(criterion, &roof);
    attention::all(criterion, &roof);
    rows::all(criterion, &roof);
}

fn settings() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = benches; config = settings(); targets = kernels }
criterion_main!(benches);
