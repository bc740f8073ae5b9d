//! Under libFuzzer: what the router and prefill nodes say to a decode node.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("decode_node", bytes));
