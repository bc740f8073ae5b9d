//! Nodes die while answers stream: the client sees one stream with the oracle's tokens.

mod support;

use ridge_tests::cluster::{Cluster, within};
use ridge_tests::model::prompt;
use ridge_tests::process::{Kill, signal};
use std::time::Duration;
use support::{binary, completion, oracle, tiny_llama};

/// The router looks at its nodes ten times a second.
const SETTLE: Duration = Duration::from_secs(30);

/// Streams a completion and sends a signal to a node when `after` pieces have come.
fn stream_and_signal(
    cluster: &Cluster,
    prompt: &[u32],
    max_tokens: u32,
    node: &str,
    after: usize,
    kill: Kill,
) -> String {
    let (mut text, mut pieces) = (String::new(), 0);
    cluster.client.stream_completion(&completion(prompt, max_tokens), |_, piece| {
        text.push_str(piece);
        pieces += 1;
        if pieces == after {
            signal(cluster.process(node).pid, kill);
        }
    });
    assert!(pieces > after, "the answer was over before {node} got its signal");
    text
}

#[test]
fn a_stream_survives_the_death_of_its_decode_node() {
    let model = tiny_llama();
    let prompt = prompt(11, 40);
    let expected = oracle(&model, &prompt, 400, &[]).text;
    // With a second decode node it continues there; alone, when the node is back.
    for flags in [&["--decode", "2"][..], &[][..]] {
        let cluster = Cluster::start(binary(), &model, flags);
        let got = stream_and_signal(&cluster, &prompt, 400, "decode-0", 3, Kill::Kill);
        assert_eq!(got, expected, "with {flags:?}");
        cluster.wait_healthy();
        cluster.wait_idle();
    }
}

#[test]
fn a_stream_survives_the_death_of_its_prefill_node() {
    let model = tiny_llama();
    let prompt = prompt(12, 40);
    let expected = oracle(&model, &prompt, 300, &[]).text;
    let cluster = Cluster::start(binary(), &model, &[]);
    let got = stream_and_signal(&cluster, &prompt, 300, "prefill-0", 3, Kill::Kill);
    assert_eq!(got, expected);
    cluster.wait_healthy();
    cluster.wait_idle();
}

#[test]
fn a_stalled_node_is_noticed_and_its_streams_go_on_elsewhere() {
    let model = tiny_llama();
    let prompt = prompt(13, 40);
    let expected = oracle(&model, &prompt, 300, &[]).text;
    let cluster = Cluster::start(binary(), &model, &["--decode", "2", "--peer-timeout", "500ms"]);
    for node in ["decode-0", "prefill-0", "decode-1"] {
        let stalled = cluster.process(node).pid;
        let text = stream_and_signal(&cluster, &prompt, 300, node, 3, Kill::Stop);
        assert_eq!(text, expected, "{node} stalled");
        // A new request does not wait for it either.
        let answer = cluster.client.post("/v1/completions", &completion(&prompt, 20)).expect("an answer");
        assert_eq!(answer.status, 200, "{node} stalled: {answer:?}");
        if node == "prefill-0" {
            let health = || cluster.client.get("/health").expect("the router answers");
            assert!(within(SETTLE, || health().ok()["status"] == "degraded"), "{:?}", health());
        }
        signal(stalled, Kill::Continue);
        cluster.wait_healthy();
        cluster.wait_idle();
        assert_eq!(cluster.process(node).pid, stalled, "{node} took part again, and was not started anew");
    }
}
