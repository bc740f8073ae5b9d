//! Under libFuzzer: a llama2.c model file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("llama2c", bytes));
