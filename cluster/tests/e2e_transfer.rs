//! `cluster bench transfer` from outside: two processes, every page verified, and what is printed; never how fast anything was.

mod support;

use ridge_tests::cluster::fails;
use serde_json::Value;
use std::process::Command;
use support::binary;

/// A few blocks of a tiny model: 3 layers in pages of 8 KiB.
fn command(flags: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(["bench", "transfer", "--preset", "tiny-llama", "--prompt-tokens", "40"]).args(flags);
    if !flags.contains(&"--prompts") {
        command.args(["--prompts", "3"]);
    }
    command
}

fn run(mut command: Command) -> String {
    let output = command.output().expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("prints UTF-8")
}

#[test]
fn every_page_arrives_whole_with_datagrams_of_every_size() {
    let out = run(command(&["--mtu", "65000,1472", "--repeat", "2", "--json"]));
    let out: Value = serde_json::from_str(&out).expect("is JSON");
    for name in ["date", "command", "version"] {
        assert!(out[name].as_str().is_some_and(|text| !text.is_empty()), "{name}: {out}");
    }
    assert_eq!((out["settings"]["page_bytes"].as_u64(), out["repetitions"].as_u64()), (Some(8192), Some(2)));
    let cells = out["cells"].as_array().expect("a list");
    let sizes: Vec<Option<u64>> = cells.iter().map(|cell| cell["mtu"].as_u64()).collect();
    assert_eq!(sizes, [Some(65000), Some(1472)]);
    for cell in cells {
        // 40 tokens are three blocks, of which the last is part-filled; the command itself compares what arrived.
        let (pages, bytes) = (3 * 3 * 3, 3 * 3 * 3 * 8192);
        assert_eq!((cell["pages"].as_u64(), cell["bytes"].as_u64()), (Some(pages), Some(bytes)), "{cell}");
        assert_eq!(cell["digest_failures"].as_u64(), Some(0), "{cell}");
        for name in ["bytes_per_s", "tcp_bytes_per_s", "over_tcp"] {
            let spread = ["_min", "", "_max"].map(|end| cell[format!("{name}{end}")].as_f64());
            let spread = spread.map(|rate| rate.unwrap_or_else(|| panic!("{name} is no number: {cell}")));
            assert!(spread[0] > 0.0 && spread.is_sorted(), "{name}: {cell}");
        }
        for side in ["sender", "receiver"] {
            assert!(cell[side]["cpu_s_per_gb"].as_f64().is_some_and(|cpu| cpu > 0.0), "{side}: {cell}");
        }
        assert!(cell["digest_share"].as_f64().is_some_and(|share| share > 0.0), "{cell}");
        assert!(cell["limit"].as_str().is_some_and(|limit| !limit.is_empty()), "{cell}");
    }
}

#[test]
fn without_json_there_is_a_table() {
    let out = run(command(&["--mtu", "8972", "--repeat", "1", "--kv-cache-dtype", "int8"]));
    for wanted in ["KV of tiny-llama, int8 in pages of 4352 bytes", "CPU s/GB", "digest", "limit"] {
        assert!(out.contains(wanted), "{wanted}: {out}");
    }
}

#[test]
fn impossible_loads_are_explained() {
    let check = |flags: &[&str], wanted: &str| {
        let error = fails(&mut command(flags));
        assert!(error.contains(wanted), "{flags:?}: {error}");
    };
    check(&["--mtu", "100"], "--mtu");
    check(&["--block-size", "1M"], "--block-size");
    check(&["--prompts", "100M"], "--prompts 104857600");
    check(&["--concurrent", "0"], "at least 1");
}
