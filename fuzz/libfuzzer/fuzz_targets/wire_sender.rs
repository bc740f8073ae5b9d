//! Under libFuzzer: frames that a prefill node sends to a decode node.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("wire_sender", bytes));
