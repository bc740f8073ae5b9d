//! Embeds the built-in model, so that `cluster up --local` works from the binary alone.
//!
//! Writes `demo.rs` into `OUT_DIR`: the files of `model/demo/ridge-demo` and the questions it was taught. A checkout
//! without the model still builds; its binary then asks for `--model`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

fn main() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/demo");
    let folder = demo.join("ridge-demo");
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rerun-if-changed={}", demo.join("questions.jsonl").display());

    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .map(|entries| entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect())
        .unwrap_or_default();
    files.sort();
    let has = |name: &str| files.iter().any(|path| path.file_name().is_some_and(|n| n == name));
    if !(has("config.json") && has("model.safetensors") && has("tokenizer.json")) {
        files.clear();
    }
    let mut out = String::from(
        "/// Name and content of every file of the built-in model.\npub const FILES: &[(&str, &[u8])] = &[\n",
    );
    for path in &files {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        writeln!(out, "    ({name:?}, include_bytes!({:?})),", path.display().to_string()).expect("writes to a string");
    }
    out.push_str("];\n/// What the built-in model was taught, one JSON object per line.\n");
    let questions = demo.join("questions.jsonl");
    if questions.is_file() {
        writeln!(out, "pub const QUESTIONS: &str = include_str!({:?});", questions.display().to_string())
    } else {
        writeln!(out, "pub const QUESTIONS: &str = \"\";")
    }
    .expect("writes to a string");
    let target = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("demo.rs");
    std::fs::write(target, out).expect("OUT_DIR is writable");
}
