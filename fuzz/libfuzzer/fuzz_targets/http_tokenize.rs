//! Under libFuzzer: bodies of /tokenize and /detokenize.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("http_tokenize", bytes));
