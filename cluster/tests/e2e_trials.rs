//! `cluster verify` and `cluster chaos` as users run them, in short form.

mod support;

use serde_json::Value;
use std::process::Command;
use support::binary;

/// Runs a command that must find nothing wrong, and returns what it reports.
fn report(line: &[&str]) -> Value {
    let data = tempfile::tempdir().expect("a temp dir");
    let output = Command::new(binary())
        .args(line)
        .args(["--json", "--threads", "1"])
        .env("RIDGE_DATA_DIR", data.path())
        .output()
        .expect("the binary starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{line:?}: {}\n{err}\n{out}", output.status);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
    assert_eq!(report["right"], true, "{report:#}");
    report
}

#[test]
fn clusters_answer_what_one_process_answers() {
    let report = report(&["verify", "--short"]);
    let clusters = report["clusters"].as_array().expect("a list");
    assert_eq!(clusters.len(), 4, "{report:#}");
    for cluster in clusters {
        // Each request twice, and the streams under which nodes were killed.
        assert!(cluster["streams"].as_u64() > Some(28), "{cluster:#}");
        assert!(cluster["hang_ups"].as_u64() > Some(0), "{cluster:#}");
        assert!(cluster["kills"].as_u64() > Some(0), "{cluster:#}");
        assert!(cluster["redispatched"].as_u64() > Some(0), "{cluster:#}");
    }
}

#[test]
fn streams_survive_chaos() {
    let goals = ["--streams", "40", "--cancels", "40", "--kills", "4", "--failovers", "2", "--seconds", "240"];
    let report =
        report(&[&["chaos", "--prefill", "1", "--decode", "2", "--corrupt-pages", "150"], &goals[..]].concat());
    assert!(report["streams"]["same"].as_u64() >= Some(40), "{report:#}");
    assert!(report["streams"]["hang_ups"].as_u64() >= Some(40), "{report:#}");
    assert!(report["faults"]["kills"].as_u64() >= Some(4), "{report:#}");
    assert_eq!(report["damaged_pages"]["sent"], report["damaged_pages"]["found"], "{report:#}");
    assert!(report["damaged_pages"]["found"].as_u64() > Some(0), "{report:#}");
    assert_eq!(report["lone_kills"].as_array().map(Vec::len), Some(2), "{report:#}");
}
