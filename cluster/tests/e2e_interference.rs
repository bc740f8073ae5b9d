//! `cluster bench interference` from outside: what it prints and what it refuses, never how fast anything was.

mod support;

use ridge_tests::cluster::{Cluster, fails, within};
use ridge_tests::process::Process;
use serde_json::Value;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use support::{binary, tiny_llama};

/// The command with sizes that take a few seconds, unless `flags` give others.
fn command(flags: &[&str]) -> Command {
    const SMALL: [(&str, &str); 7] = [
        ("--clients", "2"),
        ("--prompt-tokens", "20"),
        ("--gen-tokens", "12"),
        ("--long-prompt-tokens", "200"),
        ("--every", "0.5"),
        ("--seconds", "1.2"),
        ("--timeout", "60"),
    ];
    let mut command = Command::new(binary());
    command.args(["bench", "interference"]).env_remove("RIDGE_API_KEY");
    for (flag, value) in SMALL.into_iter().filter(|(flag, _)| !flags.contains(flag)) {
        command.args([flag, value]);
    }
    command.args(flags);
    command
}

fn run(mut command: Command) -> String {
    let output = command.output().expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("prints UTF-8")
}

fn built_in(flags: &[&str]) -> Cluster {
    let data = Arc::new(tempfile::tempdir().expect("a temp dir"));
    let mut command = Command::new(binary());
    command.args(["up", "--local", "--port", "0", "--data-dir"]).arg(data.path()).args(flags);
    Cluster::spawn(command, data)
}

/// A number that is above zero.
#[track_caller]
fn positive(value: &Value, name: &str) -> f64 {
    let number = value[name].as_f64().unwrap_or_else(|| panic!("no number {name} in {value}"));
    assert!(number > 0.0 && number.is_finite(), "{name} is {number}");
    number
}

#[track_caller]
fn check_report(out: &Value, names: &[&str], prompts: &str) {
    assert_eq!(out["benchmark"], "interference");
    assert_eq!((out["settings"]["clients"].as_u64(), out["settings"]["every_s"].as_f64()), (Some(2), Some(0.5)));
    for name in ["date", "command", "version"] {
        assert!(out[name].as_str().is_some_and(|text| !text.is_empty()), "{name}: {out}");
    }
    let servers = out["servers"].as_array().expect("a list");
    let found: Vec<&str> = servers.iter().filter_map(|server| server["name"].as_str()).collect();
    assert_eq!(found, names);
    for server in servers {
        assert_eq!(server["prompts"], prompts);
        assert!(server["url"].as_str().is_some_and(|url| url.starts_with("http://127.0.0.1:")), "{server}");
        for (phase, longs) in [("quiet", 0), ("loaded", 2)] {
            let phase = &server[phase];
            let itl = ["p50", "p99", "max"].map(|name| positive(&phase["itl_ms"], name));
            assert!(itl.is_sorted(), "{itl:?}");
            // Tokens that come together make one latency; the first of an answer makes none.
            assert!(positive(phase, "tokens") > positive(&phase["itl_ms"], "samples"), "{phase}");
            assert!(positive(phase, "seconds") >= 1.2, "{phase}");
            for name in ["requests", "tokens_per_s"] {
                positive(phase, name);
            }
            assert!(positive(&phase["ttft_ms"], "p50") <= positive(&phase["ttft_ms"], "max"), "{phase}");
            assert_eq!(phase["long_ttft_ms"]["samples"].as_u64(), Some(longs), "{phase}");
            if longs > 0 {
                assert!(positive(&phase["long_ttft_ms"], "p50") <= positive(&phase["long_ttft_ms"], "max"));
            }
            if prompts == "tokens" {
                assert_eq!(phase["prompt_tokens"].as_u64(), Some(20), "{phase}");
                assert_eq!(phase["long_prompt_tokens"].as_u64(), (longs > 0).then_some(200), "{phase}");
            }
        }
        for name in ["itl_p50", "itl_p99", "itl_max", "tokens_per_s"] {
            positive(&server["loaded_over_quiet"], name);
        }
    }
}

#[test]
fn servers_are_measured_by_their_urls() {
    let cluster = built_in(&[]);
    let url = format!("http://{}", cluster.addr);
    let out = run(command(&["--json", "--seed", "7", "--url", &url, &format!("{url}/v1/")]));
    let out: Value = serde_json::from_str(&out).expect("is JSON");
    check_report(&out, &[&url, &url], "tokens");
    assert_eq!((&out["servers"][0]["model"], &out["settings"]["seed"]), (&"ridge-demo".into(), &7.into()));
    assert!(out["servers"][0]["up_flags"].is_null(), "{out}");

    let text = run(command(&["--prompts", "text", "--url", &url]));
    for wanted in ["2 clients decode 12 tokens", "p99", "loaded / quiet", "long prompts' first token", "tokens/s", &url]
    {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    // Everybody hung up, and nothing is left behind.
    cluster.wait_idle();

    let error = fails(&mut command(&["--url", &url, "--model", "other"]));
    assert!(error.contains(&url) && error.contains("404") && error.contains("other"), "{error}");
    let error = fails(&mut command(&["--url", &url, "--long-prompt-tokens", "5000"]));
    assert!(error.contains("--long-prompt-tokens 5000") && error.contains("2048"), "{error}");
}

#[test]
fn both_modes_are_started_and_measured() {
    let data = tempfile::tempdir().expect("a temp dir");
    let mut command =
        command(&["--local", "--json", "--threads", "1", "--api-key", "secret", "--", "--max-model-len", "512"]);
    command.env("RIDGE_DATA_DIR", data.path());
    let out = run(command);
    assert!(!out.contains("secret"), "{out}");
    let out: Value = serde_json::from_str(&out).expect("is JSON");
    check_report(&out, &["disaggregated", "co-located"], "tokens");
    let flags = |server: usize| {
        let flags = out["servers"][server]["up_flags"].as_array().expect("a list").iter();
        flags.map(|flag| flag.as_str().expect("text")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(flags(0), "--prefill 1 --decode 1 --threads 1 --max-model-len 512");
    assert_eq!(flags(1), "--prefill 0 --decode 1 --threads 2 --max-model-len 512");
    let left = std::fs::read_dir(data.path().join("run")).expect("is there").count();
    assert_eq!(left, 0, "a cluster did not clean up");
}

#[test]
fn no_cluster_outlives_a_killed_measurement() {
    let data = tempfile::tempdir().expect("a temp dir");
    let mut command = command(&["--local", "--seconds", "600", "--every", "300", "--model"]);
    command.arg(tiny_llama()).env("RIDGE_DATA_DIR", data.path());
    let mut bench = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary starts");
    let supervisors = || Process::children_of(bench.id());
    let roles = || supervisors().iter().flat_map(|up| Process::children_of(up.pid)).collect::<Vec<_>>();
    let started = within(Duration::from_secs(120), || roles().len() == 3);
    let processes = [supervisors(), roles()].concat();
    bench.kill().expect("it runs");
    bench.wait().expect("it was killed");
    assert!(started, "the cluster did not start: {processes:?}");
    let ended = || processes.iter().all(|process| !Process::is_alive(process.pid));
    assert!(within(Duration::from_secs(30), ended), "{processes:?}");
}

#[test]
fn mistakes_are_explained() {
    let check = |flags: &[&str], wanted: &[&str]| {
        let error = fails(&mut command(flags));
        for wanted in wanted {
            assert!(error.contains(wanted), "{flags:?}: {error}");
        }
    };
    check(&[], &["--url"]);
    check(&["--url", "http://a", "--local"], &["--local", "cannot be used with"]);
    check(&["--url", "http://a", "--threads", "2"], &["--threads <N>", "cannot be used with"]);
    check(&["--url", "http://a", "--", "--decode", "2"], &["UP_FLAGS", "cannot be used with"]);
    check(&["--url", "127.0.0.1:8000"], &["--url 127.0.0.1:8000", "http://"]);
    check(&["--url", "ftp://127.0.0.1/"], &["ftp is not supported"]);
    check(&["--url", "http://a", "--every", "2"], &["--every 2 leaves no long prompt within --seconds 1.2"]);
    check(&["--url", "http://a", "--gen-tokens", "1"], &["--gen-tokens 1"]);
    check(&["--url", "http://a", "--seconds", "soon"], &["--seconds"]);
    check(&["--local", "--model", "/no/such/folder"], &["/no/such/folder", "cluster up --local", "ended with"]);

    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("is bound"));
    // Somebody accepts and says nothing.
    check(&["--url", &url, "--timeout", "0.3"], &[&url, "within 0.3 s (--timeout)"]);
    drop(listener);
    check(&["--url", &url], &[&url, "nothing listens there"]);

    let cluster = built_in(&["--api-key", "right"]);
    let url = format!("http://{}", cluster.addr);
    check(&["--url", &url, "--api-key", "wrong"], &[&url, "HTTP 401", "--api-key"]);
}
