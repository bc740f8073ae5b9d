//! What the end-to-end tests share: the binary, a tiny model made once per test program, and its oracle.

use ridge_tests::cluster::Cluster;
use ridge_tests::model::{Answer, generate, synth};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;

/// The `cluster` command under test.
pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_cluster"))
}

/// A Llama of three layers with random weights and a context of 512 tokens.
#[allow(dead_code, reason = "not every test program needs this model")]
pub fn tiny_llama() -> PathBuf {
    static FOLDER: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temp dir");
        let path = synth(binary(), folder.path(), "tiny-llama", "f32");
        (folder, path)
    });
    path.clone()
}

/// What one process alone answers to `prompt`.
#[allow(dead_code, reason = "not every test program compares with the oracle")]
pub fn oracle(model: &Path, prompt: &[u32], max_tokens: u32, flags: &[&str]) -> Answer {
    generate(binary(), model, prompt, max_tokens, flags)
}

/// A greedy completion request of exactly `max_tokens` tokens.
#[allow(dead_code, reason = "not every test program completes prompts of tokens")]
pub fn completion(prompt: &[u32], max_tokens: u32) -> Value {
    json!({
        "model": "test", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
    })
}

/// The text that the cluster answers to `prompt`; checks that it has the length that was asked for.
#[allow(dead_code, reason = "not every test program completes prompts of tokens")]
pub fn complete(cluster: &Cluster, prompt: &[u32], max_tokens: u32) -> String {
    let response = cluster.client.post("/v1/completions", &completion(prompt, max_tokens)).expect("an answer");
    let answer = response.ok();
    assert_eq!(answer["usage"]["prompt_tokens"].as_u64(), Some(prompt.len() as u64), "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"].as_u64(), Some(u64::from(max_tokens)), "{answer}");
    answer["choices"][0]["text"].as_str().expect("has text").to_owned()
}
