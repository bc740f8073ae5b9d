//! `--record` and `cluster replay`: what processes decided under load, a cancel and a kill -9, decided again.

mod support;

use ridge_decode_node::machine::{DecodeConfig, DecodeInput};
use ridge_protocol::record::{Frames, Record, preamble, push_frame};
use ridge_tests::cluster::{Cluster, within};
use ridge_tests::model::prompt;
use ridge_tests::process::{Kill, signal};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::{binary, complete, tiny_llama};

const STREAMS: usize = 5;
const TOKENS: usize = 300;
/// The stream whose reader hangs up.
const LEAVES: usize = 2;

/// `cluster up --local --record folder`, built-in model, two decode nodes.
fn record_demo(folder: &Path) -> Cluster {
    let data = Arc::new(tempfile::tempdir().expect("a temp dir"));
    let mut command = Command::new(binary());
    command.args(["up", "--local", "--port", "0", "--drain-timeout", "5", "--decode", "2", "--data-dir"]);
    command.arg(data.path()).arg("--record").arg(folder);
    command.env("XDG_CACHE_HOME", data.path().join("cache"));
    Cluster::spawn(command, data)
}

fn replay(args: &[&str], paths: &[&Path]) -> Output {
    Command::new(binary()).arg("replay").args(args).args(paths).output().expect("the binary starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The one recording whose name begins like this.
fn recording(folder: &Path, name: &str) -> PathBuf {
    let entries = std::fs::read_dir(folder).expect("is there").map(|entry| entry.expect("reads").path());
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name))).collect();
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found.remove(0)
}

/// Streams several answers at once. One reader leaves; when all others have had some pieces, decode-0 is killed.
fn busy_and_deadly(cluster: &Cluster) {
    let pid = cluster.process("decode-0").pid;
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for number in 0..STREAMS {
            let begun = &begun;
            scope.spawn(move || {
                let request = json!({
                    "prompt": format!("Question {number}: what is a block of the KV cache?"),
                    "max_tokens": TOKENS, "temperature": 0.8, "seed": number, "ignore_eos": true, "stream": true,
                });
                let mut pieces = 0;
                let events = cluster.client.stream("/v1/completions", &request).expect("a stream");
                let read = events.for_each(|data| {
                    let event: Value = serde_json::from_str(data).unwrap_or_default();
                    assert!(event["error"].is_null(), "{event}");
                    pieces += 1;
                    if pieces == 3 && begun.fetch_add(1, Ordering::SeqCst) + 1 == STREAMS {
                        signal(pid, Kill::Kill);
                    }
                    number != LEAVES || pieces < 10
                });
                read.expect("the stream ends well");
                assert!(number == LEAVES || pieces > 10, "only {pieces} pieces came");
            });
        }
    });
}

#[test]
fn every_decision_of_a_busy_cluster_is_made_again() {
    let folder = tempfile::tempdir().expect("a temp dir");
    let recordings = folder.path().join("recordings");
    let cluster = record_demo(&recordings);
    busy_and_deadly(&cluster);
    let restarted = || cluster.output().contains("decode-0 is back");
    assert!(within(Duration::from_secs(60), restarted), "{}", cluster.output());
    cluster.wait_healthy();
    let metrics = cluster.wait_idle();
    assert_eq!(metrics.sum("ridge_recordings_stopped") + metrics.sum("ridge_router_recordings_stopped"), 0.0);
    cluster.stop();

    let output = replay(&[], &[&recordings]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    // Router; prefill node and sender; two decode nodes, receivers and senders, one of them with two lives.
    assert!(text.contains("12 recordings, "), "{text}");
    let ends = |how: &str| text.matches(&format!("every answer is as recorded; {how}")).count();
    assert_eq!((ends("it breaks off"), ends("the process stopped in order")), (3, 9), "{text}");
    for input in ["Submit", "ClientGone", "NodeUp", "Node Token", "Router Prefill", "Message Offer", "PageLanded"] {
        assert!(text.contains(&format!("  {input}\n")), "{input} is missing: {text}");
    }

    // One request, followed through the router's decisions.
    let router = recording(&recordings, "router-");
    let trace = stdout(&replay(&["--trace"], &[&router]));
    let (_, id) = trace.split_once("RequestId(").expect("a request");
    let (id, _) = id.split_once(')').expect("a number");
    let of_one = stdout(&replay(&["--request", &format!("r{id}")], &[&router]));
    let calls = |text: &str| text.lines().filter(|line| line.contains(id)).count();
    assert_eq!(calls(&of_one), calls(&trace));
    assert!(of_one.lines().count() < trace.lines().count());
    let some = stdout(&replay(&["--until", "5", "--state"], &[&router]));
    assert!(some.contains("  5 calls from") && some.contains("max_in_flight: 4096"), "{some}");

    let sabotaged = folder.path().join("sabotaged.rec");
    let call = sabotage(&recording(&recordings, "decode-1-decode-"), &sabotaged);
    let output = replay(&[], &[&sabotaged]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains(&format!("DIVERGES at call {call}, ")), "call {call}: {text}");
    assert!(text.contains("-> ToRouter(Token {"), "{text}");
}

/// Copies a decode node's recording with another token sampled somewhere in the middle. Says in which call.
fn sabotage(from: &Path, to: &Path) -> u64 {
    let bytes = std::fs::read(from).expect("reads");
    let (header, mut frames) = Frames::open(&bytes[..]).expect("opens");
    let config: DecodeConfig = frames.read().expect("reads").expect("a configuration");
    let mut out = preamble();
    push_frame(&header, &mut out);
    push_frame(&config, &mut out);
    let (mut calls, mut changed) = (0, None);
    while let Some(mut record) = frames.read::<Record<DecodeInput>>().expect("reads") {
        calls += u64::from(matches!(record, Record::Input { .. } | Record::Timeout { .. }));
        if let Record::Input { input: DecodeInput::StepDone { step: 20.., outputs, .. }, .. } = &mut record
            && changed.is_none()
            && let Some((_, out)) = outputs.first_mut()
        {
            out.as_mut().expect("nothing constrains it").token ^= 1;
            changed = Some(calls);
        }
        push_frame(&record, &mut out);
    }
    std::fs::write(to, out).expect("writes");
    changed.expect("it sampled something")
}

#[test]
fn a_recording_at_its_limit_ends_and_serving_goes_on() {
    let folder = tempfile::tempdir().expect("a temp dir");
    let path = folder.path().display().to_string();
    let cluster = Cluster::start(binary(), &tiny_llama(), &["--record", &path, "--record-limit", "6KiB"]);
    complete(&cluster, &prompt(1, 300), 150);
    let stopped = || {
        let metrics = cluster.metrics();
        metrics.sum("ridge_recordings_stopped") >= 1.0 && metrics.sum("ridge_router_recordings_stopped") == 1.0
    };
    assert!(within(Duration::from_secs(30), stopped), "no recording has reached its limit");
    assert!(cluster.output().contains("recording stopped; serving goes on"), "{}", cluster.output());
    complete(&cluster, &prompt(2, 100), 20);
    cluster.wait_idle();
    cluster.stop();
    let output = replay(&[], &[folder.path()]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("recording was given up: its limit of 6144 bytes (--record-limit) is reached"), "{text}");
}
