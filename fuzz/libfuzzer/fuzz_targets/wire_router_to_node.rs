//! Under libFuzzer: frames that the router sends to a node.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ridge_fuzz::targets::run("wire_router_to_node", bytes));
