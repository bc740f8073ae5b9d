//! Under libFuzzer: a chat template.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("template", bytes));
