//! Under libFuzzer: a file of packed weights.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("packed", bytes));
