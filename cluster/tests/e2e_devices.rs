//! Engines on a CUDA device: chosen by a flag, refused in words where there is none, and mixed with CPUs in one cluster. The device
//! is the emulated one, which runs the kernels on this machine.

mod support;

use ridge_tests::cluster::Cluster;
use ridge_tests::model::prompt;
use std::process::{Command, Output};
use std::sync::OnceLock;
use support::{binary, complete, completion, oracle, tiny_llama};

/// (prompt length, tokens to generate): chunks of several blocks, a single block, a single token.
const CASES: [(usize, u32); 3] = [(40, 8), (17, 6), (1, 4)];

fn generate(flags: &[&str]) -> Output {
    let model = tiny_llama();
    let mut command = Command::new(binary());
    command.args(["generate", "--json", "--prompt-ids", "300,301", "--max-tokens", "2", "--model"]).arg(model);
    command.args(flags).output().expect("the binary starts")
}

/// Whether kernels can be emulated here; says so if not. Compiles them too, once for all tests, which a cluster's first request need
/// not wait for.
fn can_emulate() -> bool {
    static WITHOUT: OnceLock<Option<String>> = OnceLock::new();
    let without = WITHOUT.get_or_init(|| {
        let output = generate(&["--device", "emulated"]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let missing = error.contains("needs a C++ compiler");
        assert!(missing || output.status.success(), "{error}");
        missing.then_some(error)
    });
    if let Some(error) = without {
        println!("skipped: {error}");
    }
    without.is_none()
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

/// Prompts on the device, answers on a CPU whose blocks are of another size and type: what the CPU alone answers with the same two
/// caches, from pages that the device made, all of them.
#[test]
fn the_device_makes_pages_in_their_readers_blocks() {
    if !can_emulate() {
        return;
    }
    let model = tiny_llama();
    for (from, to) in [(("bf16", 16), ("int8", 32)), (("f32", 64), ("bf16", 8)), (("f16", 16), ("f16", 64))] {
        let types = [format!("--prefill-kv-cache-dtype={}", from.0), format!("--kv-cache-dtype={}", to.0)];
        let sizes = [format!("--prefill-block-size={}", from.1), format!("--block-size={}", to.1)];
        let shapes = [types[0].as_str(), &types[1], &sizes[0], &sizes[1]];
        let devices = ["--prefill-device=emulated", "--decode-device=cpu", "--max-num-batched-tokens=64"];
        let cluster = Cluster::start(binary(), &model, &[&devices[..], &shapes].concat());
        let client = cluster.client.with_header("X-Ridge-Receipt", "1");
        for len in [130, 64, 33] {
            let (prompt, max_tokens) = (prompt(900 + len as u64, len), 8);
            let answer = client.post("/v1/completions", &completion(&prompt, max_tokens)).expect("an answer").ok();
            // On a stalled test machine the decode node computes the prompt itself, and rounds elsewhere.
            if answer["ridge"]["receipt"]["transferred"] == len {
                let expected = oracle(&model, &prompt, max_tokens, &[&["--device=cpu"], &shapes[..]].concat()).text;
                assert_eq!(answer["choices"][0]["text"], expected, "prompt of {len} tokens with {shapes:?}");
            }
        }
        let metrics = cluster.wait_idle();
        let [all, made] =
            ["ridge_kv_converted_pages_total", "ridge_kv_device_converted_pages_total"].map(|name| metrics.sum(name));
        assert!(all >= 3.0 && made == all, "the device made {made} of {all} pages, {shapes:?}");
    }
}

/// The report of `cluster gpu-check`, and what it said on the way.
fn gpu_check(flags: &[&str], out: &std::path::Path) -> (serde_json::Value, String) {
    let mut command = Command::new(binary());
    command.args(["gpu-check", "--json", "--device", "emulated", "--seed", "5", "--model"]).arg(tiny_llama());
    command.args(flags).arg("--out").arg(out);
    let output = command.output().expect("the binary starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let kept = std::fs::read_to_string(out).expect("a report");
    let kept: serde_json::Value = serde_json::from_str(&kept).expect("JSON");
    assert_eq!(kept["times"], report["times"], "the file has what was found");
    (report, said)
}

/// Everything that a real device gets, on the emulated one: each phase runs and finds nothing wrong, or says why it cannot.
#[test]
fn the_emulated_device_passes_gpu_check() {
    if !can_emulate() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (report, said) = gpu_check(&["--budget-s", "1200"], &folder.path().join("report.json"));
    let list = |key: &str| report[key].as_array().unwrap_or_else(|| panic!("no {key} in {report}")).clone();
    let outcome = |name: &str| {
        let phase = list("phases").into_iter().find(|phase| phase["phase"] == name);
        phase.unwrap_or_else(|| panic!("no phase {name}"))["outcome"].as_str().expect("a word").to_owned()
    };
    for phase in ["rows", "attention", "products", "scaled", "engine", "clusters", "timings", "model", "serving"] {
        assert_eq!(outcome(phase), "done", "{phase}: {said}");
    }
    assert!(outcome("sanitizer").starts_with("skipped: compute-sanitizer watches CUDA devices"), "{said}");
    // With PyTorch it is done, without Python or without PyTorch it says so.
    let torch = list("skipped").iter().any(|skipped| skipped["skipped"] == "torch");
    assert!(torch || outcome("torch") != "FAILED", "{said}");
    let checks = list("checks");
    assert!(checks.len() >= 30 && checks.iter().all(|check| check["failure"].is_null()), "{report}");
    for name in [
        "engine, graphs",
        "sampling",
        "cluster, device",
        "cluster, mixed",
        "cluster, device, other blocks",
        "serving, device",
        "serving, mixed",
        "matmul fp8 gemm",
        "matmul fp8 by blocks gemm",
    ] {
        assert!(checks.iter().any(|check| check["check"] == name), "{name} is not in {checks:?}");
    }
    let times = list("times");
    for name in [
        "copy",
        "gemm bf16 out m=40 own",
        "gemm bf16 out m=40 chosen",
        "gemm fp8 out m=40 own",
        "gemm fp8 out m=40 chosen",
        "gemm fp8_blocks out m=40 chosen",
        "attention prefill 48 mma",
        "gemv Q4_K out m=1",
        "model bf16 prefill 40",
        "model bf16 prefill 40, pages not shipped",
        "model bf16 decode b=1",
        "model bf16 decode b=1, without graphs",
        "model bf16 decode b=2",
        "model q4_k decode b=1",
        "serving device first token 40",
        "serving mixed token after token",
    ] {
        assert!(times.iter().any(|time| time["name"] == name), "{name} is not in {times:?}");
    }
    // The marks are there, and none is judged by times that mean nothing.
    let marks = list("marks");
    for what in ["bf16 products: cuBLASLt's time / chosen path's", "fp8 products: cuBLASLt's time / chosen path's"] {
        assert!(marks.iter().any(|mark| mark["what"] == what), "{what} is not in {marks:?}");
    }
    assert!(list("skipped").iter().any(|skipped| skipped["skipped"] == "cuBLASLt"), "{report}");
    assert!(marks.len() >= 12 && marks.iter().all(|mark| mark["met"].is_null()), "{marks:?}");
    assert!(said.contains("these times mean nothing"), "{said}");
    assert_eq!(report["device"]["name"], "emulated on the host");
}

/// A budget that is too small leaves phases out by name, and the report says so.
#[test]
fn gpu_check_keeps_to_its_time() {
    if !can_emulate() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let begun = std::time::Instant::now();
    let (report, said) =
        gpu_check(&["--budget-s", "5", "--only", "products,timings,model"], &folder.path().join("report.json"));
    assert!(begun.elapsed() < std::time::Duration::from_secs(60), "it takes about its budget");
    let outcomes: Vec<&str> = report["phases"]
        .as_array()
        .expect("phases")
        .iter()
        .map(|phase| phase["outcome"].as_str().expect("a word"))
        .collect();
    assert_eq!(outcomes.len(), 3);
    assert!(outcomes.contains(&"skipped: the time is used up"), "{outcomes:?}: {said}");
}
