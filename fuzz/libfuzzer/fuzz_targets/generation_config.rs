//! Under libFuzzer: generation_config.json.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("generation_config", bytes));
