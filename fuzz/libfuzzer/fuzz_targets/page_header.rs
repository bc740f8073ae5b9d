//! Under libFuzzer: the header of a KV page.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("page_header", bytes));
