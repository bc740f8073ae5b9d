//! Memory: a process holds what its plan says, and one that would not fit is refused before it loads anything.

mod support;

use ridge_tests::cluster::fails;
use std::process::Command;
use support::{binary, tiny_llama};

/// The figure of a line such as `VmRSS:  1234 kB`, in bytes.
#[cfg(target_os = "linux")]
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel tells it");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") << 10
}

/// The bytes of an item in a logged plan.
#[cfg(target_os = "linux")]
fn planned(log: &str, item: &str) -> f64 {
    let line = log.lines().find_map(|line| line.trim_start().strip_prefix(item)).expect("the plan names it");
    let mut words = line.split_whitespace();
    let number: f64 = words.next().expect("a number").parse().expect("a number");
    number * if words.next() == Some("GiB") { f64::from(1 << 30) } else { f64::from(1 << 20) }
}

/// One layer of Llama 3.2 1B: 617 MB of bf16, most of it the embedding, which is also the head, so every byte is read.
#[cfg(target_os = "linux")]
fn one_layer_of_llama(folder: &std::path::Path) -> std::path::PathBuf {
    let path = folder.join("one-layer");
    let output = Command::new(binary())
        .args(["synth", "--preset", "llama-3.2-1b", "--dtype", "bf16", "--layers", "1", "--context", "2048"])
        .arg(&path)
        .output()
        .expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    path
}

/// Resident set within 10 % of weights, KV and activations. Elsewhere than on Linux the kernel does not tell.
#[cfg(target_os = "linux")]
#[test]
fn the_resident_set_is_weights_kv_and_activations() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;

    let folder = tempfile::tempdir().expect("a temp dir");
    let model = one_layer_of_llama(folder.path());
    let ids: Vec<String> = (0..512).map(|i| (5 + i % 20).to_string()).collect();
    // 544 tokens are all that the pool has room for, so it is written from end to end.
    let mut child = Command::new(binary())
        .args(["generate", "--prompt-ids", &ids.join(","), "--max-tokens", "32", "--ignore-eos", "--threads", "1"])
        .args(["--max-model-len", "544", "--kv-memory", &(34 * 32 * 1024).to_string(), "--kv-cache-dtype", "bf16"])
        .arg("--model")
        .arg(&model)
        .arg("--weights-cache")
        .arg(folder.path().join("packed"))
        .env("RUST_LOG", "info")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    // Text is written token by token. The first is there once the prompt has run, which is the largest pass.
    let status = format!("/proc/{}/status", child.id());
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let mut peak = 0;
    while let Ok([_, ..]) = stdout.fill_buf() {
        let length = stdout.buffer().len();
        stdout.consume(length);
        match std::fs::read_to_string(&status) {
            Ok(text) if text.contains("VmHWM:") => peak = field(&text, "VmHWM:"),
            _ => break,
        }
    }
    let mut log = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut log).expect("is text");
    assert!(child.wait().expect("ends").success(), "{log}");
    let items: f64 = ["weights", "KV cache", "activations"].iter().map(|item| planned(&log, item)).sum();
    let (peak, total) = (peak as f64, planned(&log, "total"));
    println!("{:.1} MB resident at most, {:.1} MB planned without workspace\n{log}", peak / 1e6, items / 1e6);
    assert!(peak > 0.9 * items, "the plan promises {items:.0} bytes, {peak:.0} were used\n{log}");
    assert!(peak < 1.1 * items, "the plan promises {items:.0} bytes, {peak:.0} were used\n{log}");
    assert!(peak < total, "more than planned in all\n{log}");
}

#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    let model = tiny_llama();
    let mut command = Command::new(binary());
    command.args(["generate", "--prompt", "a", "--kv-memory", "4096GiB", "--model"]).arg(&model);
    let words = fails(&mut command);
    for word in [
        "out of memory before the start",
        "weights",
        "KV cache",
        "activations",
        "workspace",
        "headroom",
        "what would fit: at most --kv-memory",
    ] {
        assert!(words.contains(word), "{word} is missing: {words}");
    }
}
