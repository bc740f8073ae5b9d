//! Models for tests: tiny ones with random weights, written by `cluster synth` when a test starts. No download.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Writes a synthetic model into `folder` and returns its path.
pub fn synth(binary: &Path, folder: &Path, preset: &str, dtype: &str) -> PathBuf {
    let is_folder = matches!(dtype, "f32" | "f16" | "bf16");
    let path = folder.join(format!("{preset}-{dtype}{}", if is_folder { "" } else { ".gguf" }));
    let output = Command::new(binary)
        .args(["synth", "--preset", preset, "--dtype", dtype])
        .arg(&path)
        .output()
        .expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    path
}

/// What one process alone answers.
#[derive(Clone, PartialEq, Debug)]
pub struct Answer {
    /// Tokens of the answer.
    pub ids: Vec<u32>,
    /// Their text, special tokens left out.
    pub text: String,
}

/// Continues `prompt` with `cluster generate`, greedily and to the full length.
pub fn generate(binary: &Path, model: &Path, prompt: &[u32], max_tokens: u32, flags: &[&str]) -> Answer {
    let ids: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let output = Command::new(binary)
        .args(["generate", "--json", "--ignore-eos", "--threads", "1", "--prompt-ids", &ids.join(",")])
        .args(["--max-tokens", &max_tokens.to_string(), "--model"])
        .arg(model)
        .args(flags)
        .output()
        .expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).expect("is JSON");
    let ids = answer["ids"].as_array().expect("has ids").iter().filter_map(|id| id.as_u64()).map(|id| id as u32);
    Answer { ids: ids.collect(), text: answer["text"].as_str().expect("has text").to_owned() }
}

/// Tokens of a prompt that differs from every other `salt`'s in its first block, so that no prefix is shared. They
/// are letters of the synthetic vocabulary, never special tokens.
pub fn prompt(salt: u64, len: usize) -> Vec<u32> {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        256 + ((state >> 33) % 512) as u32
    };
    (0..len).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_differ_by_salt_and_stay_in_the_vocabulary() {
        assert_eq!(prompt(1, 40), prompt(1, 40));
        assert_ne!(prompt(1, 16), prompt(2, 16));
        assert!(prompt(3, 1000).iter().all(|id| (256..768).contains(id)));
    }
}
