//! A decode node is taken out of service while it streams: its sequences move on with their KV, and nothing of them is
//! computed a second time.

mod support;

use ridge_tests::cluster::{Cluster, fails, within};
use ridge_tests::model::prompt;
use ridge_tests::process::{Kill, signal};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::{binary, completion, oracle, tiny_llama};

const STREAMS: u64 = 4;
const TOKENS: u32 = 400;
/// Far beyond what a drain takes: test machines are busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Streams answers, does something when all of them have begun, and compares them with the oracle's.
fn check_streams(cluster: &Cluster, model: &Path, act: impl FnOnce()) {
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let streams: Vec<_> = (0..STREAMS)
            .map(|seed| {
                let prompt = prompt(100 + seed, 40);
                let begun = &begun;
                let streaming = scope.spawn({
                    let prompt = prompt.clone();
                    move || stream(cluster, &prompt, begun)
                });
                (prompt, streaming)
            })
            .collect();
        assert!(within(PATIENCE, || begun.load(Ordering::Relaxed) == STREAMS as usize), "not all streams began");
        act();
        for (prompt, streaming) in streams {
            let (text, receipt) = streaming.join().expect("a stream ends well");
            assert_eq!(text, oracle(model, &prompt, TOKENS, &[]).text);
            assert_eq!(receipt["recomputed"], 0, "{receipt}");
        }
    });
}

/// An answer's text, and the receipt at its end.
fn stream(cluster: &Cluster, prompt: &[u32], begun: &AtomicUsize) -> (String, Value) {
    let (mut text, mut pieces, mut receipt) = (String::new(), 0, Value::Null);
    let client = cluster.client.with_header("X-Ridge-Receipt", "1");
    client.stream_completion(&completion(prompt, TOKENS), |event, piece| {
        text.push_str(piece);
        if !event["ridge"].is_null() {
            receipt = event["ridge"]["receipt"].clone();
        }
        pieces += 1;
        if pieces == 3 {
            begun.fetch_add(1, Ordering::Relaxed);
        }
    });
    (text, receipt)
}

fn drain(cluster: &Cluster, node: &str) -> Command {
    let mut command = Command::new(binary());
    command.args(["drain", node, "--url", &format!("http://{}", cluster.addr)]);
    command
}

/// Nothing was dispatched anew, nothing was computed twice, and something moved.
fn check_moved(cluster: &Cluster) {
    let metrics = cluster.wait_idle();
    assert!(metrics.sum("ridge_router_moved_total") >= 1.0, "nothing moved");
    assert_eq!(metrics.sum("ridge_router_redispatched_total"), 0.0);
    assert_eq!(metrics.sum("ridge_recomputed_tokens_total"), 0.0);
    assert_eq!(metrics.sum("ridge_kv_aborts_unacknowledged_total"), 0.0);
}

#[test]
fn a_drained_nodes_streams_move_on() {
    let model = tiny_llama();
    let cluster = Cluster::start(binary(), &model, &["--decode", "2"]);
    check_streams(&cluster, &model, || {
        // Asked for at once: before the command has started, the answers of so small a model may be over.
        let asked = cluster.client.post("/v1/nodes/decode-0/drain", &json!({})).expect("an answer");
        assert_eq!(asked.status, 202, "{asked:?}");
        let output = drain(&cluster, "decode-0").output().expect("runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("decode-0 is drained"), "{said}");
    });
    check_moved(&cluster);
    let listed = cluster.client.get("/v1/nodes").expect("an answer").ok();
    let nodes = listed["data"].as_array().expect("a list");
    let draining: Vec<_> = nodes.iter().filter(|node| node["draining"] == true).map(|node| &node["name"]).collect();
    assert_eq!(draining, ["decode-0"]);
}

#[test]
fn a_node_that_is_asked_to_stop_moves_its_streams_first() {
    let model = tiny_llama();
    let cluster = Cluster::start(binary(), &model, &["--decode", "2"]);
    let stopped = cluster.process("decode-0").pid;
    check_streams(&cluster, &model, || signal(stopped, Kill::Terminate));
    assert!(within(PATIENCE, || cluster.processes().iter().all(|process| process.pid != stopped)), "it did not stop");
    cluster.wait_healthy();
    check_moved(&cluster);
}

#[test]
fn who_may_not_drain_is_told_why() {
    let model = tiny_llama();
    let keys = ["--api-key", "client", "--admin-key", "admin"];
    let cluster = Cluster::start(binary(), &model, &keys);
    assert!(fails(&mut drain(&cluster, "decode-0")).contains("401"));
    assert!(fails(drain(&cluster, "decode-0").args(["--admin-key", "client"])).contains("401"));
    let error = fails(drain(&cluster, "decode-7").args(["--admin-key", "admin"]));
    assert!(error.contains("No node `decode-7`"), "{error}");
    drop(cluster);
    let cluster = Cluster::start(binary(), &model, &["--api-key", "client"]);
    let error = fails(drain(&cluster, "decode-0").args(["--admin-key", "client"]));
    assert!(error.contains("--admin-key"), "{error}");
}
