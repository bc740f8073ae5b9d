//! Under libFuzzer: frames that a decode node sends to a prefill node.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("wire_receiver", bytes));
