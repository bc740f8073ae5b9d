//! Under libFuzzer: a grammar that constrains an answer.
#![no_main]

// Without libFuzzer's own hook, a panic that the program catches is no finding; one that it does not catch still is.
libfuzzer_sys::fuzz_target!(
    init: drop(std::panic::take_hook()),
    |bytes: &[u8]| ridge_fuzz::targets::run("grammar", bytes)
);
