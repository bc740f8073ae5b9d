//! Hostile input for everything that reads bytes from outside: no panic, no absurd allocation, no hang.
//!
//! [`targets::TARGETS`] lists them. Each is a function of bytes that uses a decoder through its public door, as the
//! program does. They run in two ways, and find the same defects:
//!
//! - `cargo test -p ridge-fuzz` on stable: inputs that [`mutate::Mutator`] makes of good ones, the same ones at every run.
//!   `RIDGE_FUZZ_SEED` chooses others, `RIDGE_FUZZ_TIMES` multiplies their number, `RIDGE_FUZZ_TARGET` takes one target.
//! - `cargo +nightly fuzz run --fuzz-dir fuzz/libfuzzer TARGET` under libFuzzer, guided by coverage; the folder is a
//!   workspace of its own, so that no ordinary build needs nightly. `cargo run -p ridge-fuzz -- corpus DIR` writes the good
//!   inputs for it to start from, and `cargo run -p ridge-fuzz -- run TARGET FILE` repeats an artifact without it.
//!
//! A defect that was found gets a test with its own name beside the decoder. Start at `targets/mod.rs`.

#![forbid(unsafe_code)]

pub mod draw;
pub mod mutate;
pub mod random;
pub mod targets;
