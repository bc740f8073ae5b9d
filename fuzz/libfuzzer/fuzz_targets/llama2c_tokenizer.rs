//! Under libFuzzer: a llama2.c tokenizer file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("llama2c_tokenizer", bytes));
