//! Nodes die while answers stream: the client sees one stream with the oracle's tokens.

mod support;

use ridge_tests::cluster::Cluster;
use ridge_tests::model::prompt;
use ridge_tests::process::{Kill, signal};
use serde_json::{Value, json};
use support::{binary, completion, oracle, tiny_llama};

/// Streams a completion and kills a node when `after` pieces have come.
fn stream_and_kill(cluster: &Cluster, prompt: &[u32], max_tokens: u32, node: &str, after: usize) -> String {
    let mut request = completion(prompt, max_tokens);
    request["stream"] = json!(true);
    let (mut text, mut pieces) = (String::new(), 0);
    let events = cluster.client.stream("/v1/completions", &request).expect("a stream");
    events
        .for_each(|data| {
            if data == "[DONE]" {
                return true;
            }
            let event: Value = serde_json::from_str(data).expect("an event is JSON");
            assert!(event["error"].is_null(), "{event}");
            text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
            pieces += 1;
            if pieces == after {
                signal(cluster.process(node).pid, Kill::Kill);
            }
            true
        })
        .expect("the stream ends well");
    assert!(pieces > after, "the answer was over before {node} could be killed");
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
        let got = stream_and_kill(&cluster, &prompt, 400, "decode-0", 3);
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
    let got = stream_and_kill(&cluster, &prompt, 300, "prefill-0", 3);
    assert_eq!(got, expected);
    cluster.wait_healthy();
    cluster.wait_idle();
}
