//! `cluster bench engine` and `cluster roofline` from outside: what they print and write, never how fast anything was.

mod support;

use ridge_tests::cluster::fails;
use serde_json::Value;
use std::process::Command;
use support::{binary, tiny_llama};

/// A command on the tiny model with sizes that take a moment.
fn command(name: &[&str], flags: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(name).arg("--model").arg(tiny_llama());
    command.args(["--threads", "1", "--context", "24", "--gen-tokens", "2", "--repeat", "2"]).args(flags);
    command
}

fn run(mut command: Command) -> String {
    let output = command.output().expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("prints UTF-8")
}

/// A number that is above zero.
#[track_caller]
fn positive(value: &Value, name: &str) -> f64 {
    let number = value[name].as_f64().unwrap_or_else(|| panic!("no number {name} in {value}"));
    assert!(number > 0.0 && number.is_finite(), "{name} is {number}");
    number
}

#[test]
fn bench_engine_reports_every_phase() {
    let flags = ["--prompt-tokens", "40", "--chunk", "16", "--batch", "1,3", "--kv-cache-dtype", "f16", "--json"];
    let out: Value = serde_json::from_str(&run(command(&["bench", "engine"], &flags))).expect("is JSON");
    for name in ["read_gb_s", "f32_gflops", "threads", "cores"] {
        positive(&out["machine"], name);
    }
    for name in ["bf16_gflops", "int8_gops"] {
        // A machine may lack these instructions.
        assert!(out["machine"][name].as_f64().is_some_and(|n| n >= 0.0), "{name}: {out}");
    }
    for name in ["date", "command", "version"] {
        assert!(out[name].as_str().is_some_and(|text| !text.is_empty()), "{name}: {out}");
    }
    assert!(!out["command"].as_str().expect("text").contains('/'), "folders are left out: {out}");
    assert_eq!((out["model"]["dtype"].as_str(), out["model"]["kv_cache_dtype"].as_str()), (Some("F32"), Some("f16")));
    assert_eq!((out["repetitions"].as_u64(), out["warm_ups"].as_u64()), (Some(2), Some(3)));

    assert_eq!((out["prefill"]["prompt_tokens"].as_u64(), out["prefill"]["chunk"].as_u64()), (Some(40), Some(16)));
    let decode = out["decode"].as_array().expect("a list");
    let batches: Vec<Option<u64>> = decode.iter().map(|phase| phase["batch"].as_u64()).collect();
    assert_eq!(batches, [Some(1), Some(3)]);
    for phase in decode.iter().chain([&out["prefill"]]) {
        for name in ["gflops", "gb_s", "intensity", "roofline_fraction", "predicted_s", "seconds"] {
            positive(phase, name);
        }
        let rates = ["tokens_per_s_min", "tokens_per_s", "tokens_per_s_max"].map(|name| positive(phase, name));
        assert!(rates.is_sorted(), "{rates:?}");
        assert!(["memory", "compute"].contains(&phase["bound"].as_str().expect("text")), "{phase}");
        positive(&phase["counted"], "matmul_flops");
    }
}

#[test]
fn without_json_there_is_a_table() {
    let out = run(command(&["bench", "engine"], &["--prompt-tokens", "20", "--batch", "2"]));
    for wanted in ["limits: read", "prefill 20", "decode b=2 at 24", "of roof"] {
        assert!(out.contains(wanted), "{wanted}: {out}");
    }
}

#[test]
fn roofline_prints_and_draws() {
    let folder = tempfile::tempdir().expect("a temp dir");
    let svg = folder.path().join("roofline.svg");
    let mut roofline = command(&["roofline"], &["--prompt-tokens", "16,64", "--batch", "1,4", "--svg"]);
    roofline.arg(&svg);
    let out = run(roofline);
    for wanted in ["prefill 64", "decode b=4 at 24", "FLOP/byte", "●", "○"] {
        assert!(out.contains(wanted), "{wanted}: {out}");
    }
    let picture = std::fs::read_to_string(&svg).expect("the picture was written");
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"), "{picture}");
    assert_eq!(picture.matches("<title>prefill ").count(), 2, "{picture}");
    assert_eq!(picture.matches("<title>decode ").count(), 2, "{picture}");

    let out = run(command(&["roofline"], &["--prompt-tokens", "16", "--batch", "1", "--json"]));
    let out: Value = serde_json::from_str(&out).expect("is JSON");
    positive(&out["prefill"][0], "roofline_fraction");
    positive(&out["decode"][0], "roofline_fraction");
}

/// The tiny model's context is 512 tokens.
#[test]
fn impossible_sizes_are_explained() {
    let check = |name: &[&str], flags: &[&str], wanted: &str| {
        let error = fails(&mut command(name, flags));
        assert!(error.contains(wanted), "{flags:?}: {error}");
    };
    let engine = ["bench", "engine"];
    check(&engine, &["--batch", ""], "--batch");
    check(&engine, &["--batch", "1,0"], "at least 1");
    check(&engine, &["--prompt-tokens", "513"], "--prompt-tokens 513 is more than the 512 tokens");
    check(&engine, &["--batch", "1", "--prompt-tokens", "16", "--max-model-len", "25"], "more than --max-model-len 25");
    check(&engine, &["--max-model-len", "600"], "--max-model-len 600 is more than the 512 tokens");
    check(&engine, &["--prompt-tokens", "16", "--batch", "1000000000"], "KV cache");
    check(&engine, &["--prompt-tokens", "16", "--kv-memory", "1KiB"], "--kv-memory");
    check(&["roofline"], &["--prompt-tokens", "16,1000"], "--prompt-tokens 1000");
    check(&["roofline"], &["--svg", "no/such/folder/x.svg"], "--svg");
}
