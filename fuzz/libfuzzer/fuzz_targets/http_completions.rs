//! Under libFuzzer: bodies of /v1/completions.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("http_completions", bytes));
