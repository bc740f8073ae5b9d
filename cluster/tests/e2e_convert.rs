//! Prefill and decode nodes whose blocks are not alike: KV is converted on its way, the receipt says so, and what comes out
//! is what one process answers.

mod support;

use ridge_tests::cluster::{Cluster, fails};
use ridge_tests::model::prompt;
use serde_json::{Value, json};
use std::process::Command;
use support::{binary, completion, oracle, tiny_llama};

const TOKENS: u32 = 24;
/// Before, at and after the borders of blocks of 16, 32 and 64 tokens.
const LENS: [usize; 10] = [1, 15, 16, 17, 32, 33, 64, 65, 100, 257];

/// Text and receipt of an answer.
fn ask(cluster: &Cluster, prompt: &[u32]) -> (String, Value) {
    let client = cluster.client.with_header("X-Ridge-Receipt", "1");
    let answer = client.post("/v1/completions", &completion(prompt, TOKENS)).expect("an answer").ok();
    let text = answer["choices"][0]["text"].as_str().expect("has text").to_owned();
    (text, answer["ridge"]["receipt"].clone())
}

/// Asks a cluster of these flags and compares with one process of the same; says how many answers' KV was converted.
fn check(flags: &[&str], from: Value, to: Value) -> usize {
    let model = tiny_llama();
    let cluster = Cluster::start(binary(), &model, flags);
    let mut converted = 0;
    for len in LENS {
        let prompt = prompt(3000 + len as u64, len);
        let (text, receipt) = ask(&cluster, &prompt);
        if receipt["transferred"] == len {
            assert_eq!(receipt["converted"], json!({ "from": from, "to": to }), "{receipt}");
            assert_eq!(text, oracle(&model, &prompt, TOKENS, flags).text, "{flags:?}, {len} tokens");
            converted += 1;
        } else {
            // A stalled test machine: computed where it is decoded, and said so.
            assert_eq!((receipt["transferred"].as_u64(), &receipt["converted"]), (Some(0), &Value::Null), "{receipt}");
        }
    }
    let metrics = cluster.wait_idle();
    assert!(metrics.sum("ridge_kv_converted_pages_total") >= 3.0 * converted as f64, "three layers each");
    assert_eq!(metrics.sum("ridge_kv_digest_failures_total"), 0.0);
    assert_eq!(metrics.sum_where("ridge_protocol_errors_total", "kind", "page"), 0.0);
    converted
}

fn shape(dtype: &str, block_size: u32) -> Value {
    json!({ "dtype": dtype, "block_size": block_size })
}

#[test]
fn blocks_of_other_sizes_change_no_token() {
    for (from, to) in [(16, 32), (64, 8)] {
        let sizes = [format!("--prefill-block-size={from}"), format!("--block-size={to}")];
        let flags = [sizes[0].as_str(), &sizes[1], "--kv-cache-dtype=bf16"];
        assert!(check(&flags, shape("bf16", from), shape("bf16", to)) > 0, "no prompt went by transfer");
        // What a process without conversion answers: block sizes alone are nobody's business.
        let (model, prompt) = (tiny_llama(), prompt(9, 77));
        let plain = oracle(&model, &prompt, TOKENS, &["--kv-cache-dtype=bf16"]);
        assert_eq!(oracle(&model, &prompt, TOKENS, &flags), plain);
    }
}

#[test]
fn kv_is_rounded_on_its_way_as_in_one_process() {
    for (from, to) in [("bf16", "int8"), ("bf16", "fp8"), ("f16", "f32")] {
        let types = [format!("--prefill-kv-cache-dtype={from}"), format!("--kv-cache-dtype={to}")];
        let flags = [types[0].as_str(), &types[1], "--prefill-block-size=16", "--block-size=32"];
        assert!(check(&flags, shape(from, 16), shape(to, 32)) > 0, "no prompt went by transfer");
    }
}

#[test]
fn what_cannot_be_converted_is_said_before_anything_starts() {
    let model = tiny_llama();
    let model = model.to_str().expect("UTF-8");
    for to in ["bf16", "fp8", "auto"] {
        let mut command = Command::new(binary());
        command.args(["up", "--local", "--port", "0", "--model", model, "--prefill-kv-cache-dtype", "int8"]);
        let error = fails(command.args(["--kv-cache-dtype", to]));
        assert!(error.contains("int8 is not converted into"), "{to}: {error}");
    }
    let mut command = Command::new(binary());
    command.args(["generate", "--model", model, "--prompt-ids", "300", "--kv-cache-dtype=f32"]);
    let error = fails(command.arg("--prefill-kv-cache-dtype=fp8"));
    assert!(error.contains("kv_dtype differs: f32 here, fp8 there, and fp8 is not converted into f32"), "{error}");
}
