//! Engines on a CUDA device: chosen by a flag, refused in words where there is none, and mixed with CPUs in one cluster. The device
//! is the emulated one, which runs the kernels on this machine.

mod support;

use ridge_tests::cluster::Cluster;
use ridge_tests::model::prompt;
use std::process::{Command, Output};
use support::{binary, complete, oracle, tiny_llama};

/// (prompt length, tokens to generate): chunks of several blocks, a single block, a single token.
const CASES: [(usize, u32); 3] = [(40, 8), (17, 6), (1, 4)];

fn generate(flags: &[&str]) -> Output {
    let model = tiny_llama();
    let mut command = Command::new(binary());
    command.args(["generate", "--json", "--prompt-ids", "300,301", "--max-tokens", "2", "--model"]).arg(model);
    command.args(flags).output().expect("the binary starts")
}

/// Whether kernels can be emulated here; says so if not. Compiles them too, which a cluster's first request need not wait for.
fn can_emulate() -> bool {
    let output = generate(&["--device", "emulated"]);
    let error = String::from_utf8_lossy(&output.stderr);
    if error.contains("needs a C++ compiler") {
        println!("skipped: {error}");
        return false;
    }
    assert!(output.status.success(), "{error}");
    true
}

#[test]
fn a_device_that_is_not_there_is_refused_in_words() {
    let output = generate(&["--device", "cuda:63"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("--device cuda:63: "), "{error}");
    assert!(error.contains("libcuda") || error.contains("there is no device cuda:63"), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    let output = Command::new(binary()).args(["up", "--local", "--device", "gpu"]).output().expect("the binary starts");
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not auto, cpu or cuda:N"));
}

#[test]
fn the_emulated_device_answers_as_the_cpu_does() {
    if !can_emulate() {
        return;
    }
    let model = tiny_llama();
    for (len, max_tokens) in CASES {
        let prompt = prompt(len as u64, len);
        let expected = oracle(&model, &prompt, max_tokens, &["--device", "cpu"]);
        for flags in
            [&["--device", "emulated"][..], &["--device", "emulated", "--chunk", "16", "--block-size", "8"][..]]
        {
            assert_eq!(oracle(&model, &prompt, max_tokens, flags), expected, "prompt of {len} tokens with {flags:?}");
        }
    }
}

/// What one kind of node computed, the other reads: prompts on the device and answers on the CPU, and the reverse.
#[test]
fn clusters_mix_devices() {
    if !can_emulate() {
        return;
    }
    let model = tiny_llama();
    for (prefill, decode) in [("emulated", "cpu"), ("cpu", "emulated")] {
        let flags = ["--prefill-device", prefill, "--decode-device", decode];
        let cluster = Cluster::start(binary(), &model, &flags);
        for (len, max_tokens) in CASES {
            let prompt = prompt(len as u64, len);
            let expected = oracle(&model, &prompt, max_tokens, &["--device", "cpu"]).text;
            assert_eq!(complete(&cluster, &prompt, max_tokens), expected, "prompt of {len} tokens with {flags:?}");
            assert_eq!(complete(&cluster, &prompt, max_tokens), expected, "again, with {flags:?}");
        }
        cluster.wait_idle();
    }
}

/// The checks that a real device gets, on the emulated one.
#[test]
fn the_emulated_device_passes_gpu_check() {
    if !can_emulate() {
        return;
    }
    let mut command = Command::new(binary());
    command
        .args(["gpu-check", "--json", "--device", "emulated", "--no-clusters", "--seed", "5", "--model"])
        .arg(tiny_llama());
    let output = command.output().expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let checks = report["checks"].as_array().expect("checks");
    assert!(checks.len() >= 20 && checks.iter().all(|check| check["failure"].is_null()), "{report}");
    assert!(report["engine"]["worst"].as_f64().expect("a number") < 1e-3, "{report}");
    assert_eq!(report["timings"].as_array().map(Vec::len), Some(0), "the emulator's times mean nothing");
}
