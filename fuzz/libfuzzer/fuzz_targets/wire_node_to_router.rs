//! Under libFuzzer: frames that a node sends to the router.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("wire_node_to_router", bytes));
