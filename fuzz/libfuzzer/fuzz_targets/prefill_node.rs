//! Under libFuzzer: what the router and decode nodes say to a prefill node.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("prefill_node", bytes));
