//! Nodes that are not alike, and nodes that do not come back: sequences move between decode nodes of other blocks, go on where they
//! drain when nobody else is left, and are not kept waiting by a process that is gone.

mod support;

use ridge_tests::cluster::within;
use ridge_tests::model::prompt;
use ridge_tests::process::Kill;
use ridge_tests::roles::Roles;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use support::{binary, completion, oracle, tiny_llama};

const TOKENS: u32 = 400;
/// Far beyond what anything here takes: test machines are busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a client of a stream saw.
struct Seen {
    text: String,
    receipt: Value,
    /// When each piece came.
    at: Vec<Instant>,
}

/// Streams an answer and does something when three pieces have come.
fn stream(roles: &Roles, prompt: &[u32], act: impl FnOnce()) -> Seen {
    let mut request = completion(prompt, TOKENS);
    request["stream"] = json!(true);
    let mut seen = Seen { text: String::new(), receipt: Value::Null, at: Vec::new() };
    let mut act = Some(act);
    let client = roles.client.with_header("X-Ridge-Receipt", "1");
    let events = client.stream("/v1/completions", &request).expect("a stream");
    events
        .for_each(|data| {
            if data == "[DONE]" {
                return true;
            }
            let event: Value = serde_json::from_str(data).expect("an event is JSON");
            assert!(event["error"].is_null(), "{event}\n{}", roles.output());
            seen.text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
            seen.at.push(Instant::now());
            if !event["ridge"].is_null() {
                seen.receipt = event["ridge"]["receipt"].clone();
            }
            if seen.at.len() == 3 {
                act.take().expect("once")();
            }
            true
        })
        .expect("the stream ends well");
    assert!(act.is_none(), "the answer was over too soon");
    seen
}

fn drain(roles: &Roles, node: &str) {
    let asked = roles.client.post(&format!("/v1/nodes/{node}/drain"), &json!({})).expect("an answer");
    assert_eq!(asked.status, 202, "{asked:?}");
}

fn moved(roles: &Roles) -> (f64, f64) {
    let metrics = roles.wait_idle();
    (metrics.sum("ridge_router_moved_total"), metrics.sum("ridge_router_redispatched_total"))
}

#[test]
fn a_sequence_moves_into_blocks_of_another_size() {
    let (model, prompt) = (tiny_llama(), prompt(6000, 50));
    let mut roles = Roles::start(binary(), &model, &[]);
    roles.join("p", "prefill", &["--block-size", "16"]);
    roles.join("a", "decode", &["--block-size", "16"]);
    roles.join("b", "decode", &["--block-size", "32"]);
    // The first by number takes the sequence: the one that joined first.
    let seen = stream(&roles, &prompt, || drain(&roles, "a"));
    assert_eq!(seen.text, oracle(&model, &prompt, TOKENS, &[]).text);
    assert_eq!(seen.receipt["recomputed"], 0, "{}", seen.receipt);
    assert_eq!(moved(&roles), (1.0, 0.0), "{}", roles.output());
}

/// From then on its KV is rounded: the answer may go on otherwise, but what the client has stands and nothing is lost.
#[test]
fn a_sequence_moves_into_a_narrower_type() {
    let (model, prompt) = (tiny_llama(), prompt(6001, 50));
    let mut roles = Roles::start(binary(), &model, &[]);
    roles.join("p", "prefill", &["--kv-cache-dtype", "bf16"]);
    roles.join("a", "decode", &["--kv-cache-dtype", "bf16"]);
    roles.join("b", "decode", &["--kv-cache-dtype", "int8", "--block-size", "32"]);
    let seen = stream(&roles, &prompt, || drain(&roles, "a"));
    let wide = oracle(&model, &prompt, TOKENS, &["--kv-cache-dtype", "bf16"]);
    let begins = wide.text.chars().zip(seen.text.chars()).take_while(|(a, b)| a == b).count();
    assert!(begins >= 3, "{:?} is not how {:?} begins", seen.text, wide.text);
    let converted = json!({"from": {"dtype": "bf16", "block_size": 16}, "to": {"dtype": "int8", "block_size": 32}});
    assert_eq!(seen.receipt["converted"], converted, "{}", seen.receipt);
    assert_eq!(moved(&roles), (1.0, 0.0), "{}", roles.output());
}

/// What has been rounded is passed off as nothing better: without a node that takes it, a sequence ends where it is.
#[test]
fn a_sequence_stays_where_its_kv_is_not_converted() {
    let (model, prompt) = (tiny_llama(), prompt(6002, 50));
    let mut roles = Roles::start(binary(), &model, &[]);
    roles.join("p", "prefill", &["--kv-cache-dtype", "bf16"]);
    roles.join("a", "decode", &["--kv-cache-dtype", "int8"]);
    roles.join("b", "decode", &["--kv-cache-dtype", "bf16"]);
    let seen = stream(&roles, &prompt, || drain(&roles, "a"));
    if seen.receipt["transferred"] == 50 {
        let flags = ["--prefill-kv-cache-dtype", "bf16", "--kv-cache-dtype", "int8"];
        assert_eq!(seen.text, oracle(&model, &prompt, TOKENS, &flags).text);
    }
    assert_eq!(moved(&roles), (0.0, 0.0), "{}", roles.output());
}

/// The only other node stands still, so that nothing arrives there, and dies: the sequence goes on where it drains.
#[test]
fn a_drain_into_a_dying_node_loses_nothing() {
    let (model, prompt) = (tiny_llama(), prompt(6003, 50));
    let mut roles = Roles::start(binary(), &model, &["--peer-timeout", "20s"]);
    roles.join("p", "prefill", &["--peer-timeout", "20s"]);
    roles.join("a", "decode", &["--peer-timeout", "20s"]);
    roles.join("b", "decode", &["--peer-timeout", "20s"]);
    let started = Instant::now();
    let seen = std::thread::scope(|scope| {
        let streaming = scope.spawn(|| {
            stream(&roles, &prompt, || {
                roles.signal("b", Kill::Stop);
                drain(&roles, "a");
            })
        });
        let moving = || roles.metrics().sum("ridge_router_moved_total") >= 1.0;
        assert!(within(PATIENCE, moving), "nothing moves\n{}", roles.output());
        roles.signal("b", Kill::Kill);
        streaming.join().expect("the stream ends well")
    });
    assert_eq!(seen.text, oracle(&model, &prompt, TOKENS, &[]).text);
    // Neither the patience for another node (30 s) nor the peers' (20 s) was waited for.
    assert!(started.elapsed() < Duration::from_secs(20), "it took {:?}\n{}", started.elapsed(), roles.output());
    assert!(roles.metrics().sum("ridge_router_redispatched_total") >= 1.0);
}

/// Nobody starts it again, and its peers' patience is long: its host says that it is gone.
#[test]
fn a_dead_node_that_does_not_come_back_is_missed_at_once() {
    let (model, prompt) = (tiny_llama(), prompt(6004, 50));
    let expected = oracle(&model, &prompt, TOKENS, &[]).text;
    let patience = ["--peer-timeout", "20s"];
    let mut roles = Roles::start(binary(), &model, &patience);
    roles.join("p", "prefill", &patience);
    roles.join("a", "decode", &patience);
    roles.join("b", "decode", &patience);
    let seen = stream(&roles, &prompt, || roles.signal("a", Kill::Kill));
    assert_eq!(seen.text, expected);
    let pause = seen.at.windows(2).map(|pair| pair[1] - pair[0]).max().expect("pieces");
    println!("the longest pause of a stream whose decode node was killed and stayed away: {pause:?}");
    assert!(pause < Duration::from_secs(8), "it was missed by silence alone: {pause:?}\n{}", roles.output());
    assert!(roles.metrics().sum("ridge_router_redispatched_total") >= 1.0);
}
