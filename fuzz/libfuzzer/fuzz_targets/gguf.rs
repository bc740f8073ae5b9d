//! Under libFuzzer: a GGUF file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("gguf", bytes));
