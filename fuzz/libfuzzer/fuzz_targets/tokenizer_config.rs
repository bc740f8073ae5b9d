//! Under libFuzzer: tokenizer_config.json.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("tokenizer_config", bytes));
