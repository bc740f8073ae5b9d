//! `cluster synth` and `cluster generate` from outside: files that load, models that are one model in every format.

mod support;

use ridge_tests::cluster::fails;
use ridge_tests::model::{prompt, synth};
use std::process::Command;
use support::{binary, oracle};

/// The same seed in a folder and in a GGUF file is the same model: q and k are interleaved there and back.
#[test]
fn a_folder_and_a_gguf_file_of_one_seed_answer_alike() {
    let folder = tempfile::tempdir().expect("a temp dir");
    for preset in ["tiny-llama", "tiny-qwen2", "tiny-qwen3"] {
        let hf = synth(binary(), folder.path(), preset, "f32");
        let gguf = folder.path().join(format!("{preset}-f32.gguf"));
        let output = Command::new(binary())
            .args(["synth", "--preset", preset, "--dtype", "f32"])
            .arg(&gguf)
            .output()
            .expect("the binary starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let prompt = prompt(11, 70);
        assert_eq!(oracle(&hf, &prompt, 24, &[]), oracle(&gguf, &prompt, 24, &[]), "{preset}");
    }
}

#[test]
fn every_type_can_be_read_back() {
    let folder = tempfile::tempdir().expect("a temp dir");
    for dtype in ["bf16", "f16", "q8_0", "q4_0", "q4_k", "q6_k", "q4_k_m"] {
        let model = synth(binary(), folder.path(), "tiny-llama", dtype);
        assert_eq!(oracle(&model, &prompt(1, 20), 8, &[]).ids.len(), 8, "{dtype}");
    }
}

#[test]
fn mistakes_are_explained() {
    let folder = tempfile::tempdir().expect("a temp dir");
    let run = |out: &str, dtype: &str| {
        let mut command = Command::new(binary());
        command.args(["synth", "--preset", "tiny-llama", "--dtype", dtype]).arg(folder.path().join(out));
        fails(&mut command)
    };
    assert!(run("quantised-folder", "q8_0").contains(".gguf"));
    synth(binary(), folder.path(), "tiny-llama", "f32");
    assert!(run("tiny-llama-f32", "f32").contains("exists already"));
}
