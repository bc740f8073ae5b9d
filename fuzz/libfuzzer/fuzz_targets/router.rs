//! Under libFuzzer: what nodes say to the router.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("router", bytes));
