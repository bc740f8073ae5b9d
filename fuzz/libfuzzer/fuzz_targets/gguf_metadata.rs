//! Under libFuzzer: the metadata of a GGUF file, as JSON.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("gguf_metadata", bytes));
