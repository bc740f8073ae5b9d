//! A client's connection breaks in mid-stream, a decode node dies before it comes back: it sees one stream with the
//! oracle's tokens.

mod support;

use ridge_tests::cluster::{Cluster, within};
use ridge_tests::model::prompt;
use ridge_tests::process::{Kill, signal};
use serde_json::{Value, json};
use std::time::Duration;
use support::{binary, completion, oracle, tiny_llama};

/// Nothing that these tests wait for takes as long.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The chunks of a stream, read over two connections with the death of its decode node between them.
fn broken_and_resumed(cluster: &Cluster, mut request: Value) -> Vec<Value> {
    request["stream"] = json!(true);
    let client = cluster.client.with_header("X-Ridge-Resumable", "60");
    let mut events: Vec<(String, String)> = Vec::new();
    let first = client.stream("/v1/completions", &request).expect("a stream");
    let hang_up_after = 3;
    let read = first.for_each_event(|id, data| {
        events.push((id.to_owned(), data.to_owned()));
        events.len() < hang_up_after
    });
    read.expect("the stream has begun");
    let before = cluster.metrics();
    let mut decoding = None;
    let detached = within(TIMEOUT, || {
        let metrics = cluster.metrics();
        let busy = metrics
            .all("ridge_requests_in_flight")
            .find(|sample| sample.value > 0.0 && sample.label("role") == Some("decode"));
        decoding = busy.and_then(|sample| sample.label("node")).map(str::to_owned);
        metrics.sum("ridge_streams_detached") == 1.0 && decoding.is_some()
    });
    assert!(detached, "nobody decodes for a client that is away");
    signal(cluster.process(&decoding.expect("was found")).pid, Kill::Kill);
    let again = |metrics: &ridge_tests::metrics::Metrics| metrics.sum("ridge_router_redispatched_total");
    let failed_over = within(TIMEOUT, || again(&cluster.metrics()) > again(&before));
    assert!(failed_over, "the answer was over before its node died");

    let (last, _) = events.last().expect("it has begun").clone();
    let (id, number) = last.rsplit_once(':').expect("an event has an id and a number");
    assert_eq!(number, (hang_up_after - 1).to_string());
    let client = cluster.client.with_header("Last-Event-ID", &last);
    let rest = client.get_stream(&format!("/v1/streams/{id}")).expect("the stream goes on");
    rest.for_each_event(|id, data| {
        events.push((id.to_owned(), data.to_owned()));
        true
    })
    .expect("the stream ends well");
    for (number, (event, data)) in events.iter().enumerate() {
        assert_eq!(*event, format!("{id}:{number}"), "{data}");
    }
    let metrics = cluster.metrics();
    assert_eq!(metrics.sum("ridge_streams_detached"), 0.0);
    assert_eq!(metrics.sum("ridge_streams_resumed_total"), before.sum("ridge_streams_resumed_total") + 1.0);
    let (_, done) = events.pop().expect("it has begun");
    assert_eq!(done, "[DONE]");
    chunks(events.into_iter().map(|(_, data)| data))
}

fn chunks(events: impl Iterator<Item = String>) -> Vec<Value> {
    let chunks: Vec<Value> = events.map(|data| serde_json::from_str(&data).expect("an event is JSON")).collect();
    for chunk in &chunks {
        assert!(chunk["error"].is_null(), "{chunk}");
    }
    chunks
}

fn text(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect()
}

#[test]
fn a_stream_is_resumed_past_the_death_of_its_decode_node() {
    let model = tiny_llama();
    let prompt = prompt(21, 40);
    let expected = oracle(&model, &prompt, 450, &[]).text;
    // With a second decode node it continues there; alone, when the node is back.
    for flags in [&["--decode", "2"][..], &[][..]] {
        let cluster = Cluster::start(binary(), &model, flags);
        let chunks = broken_and_resumed(&cluster, completion(&prompt, 450));
        assert_eq!(text(&chunks), expected, "with {flags:?}");
        cluster.wait_healthy();
        cluster.wait_idle();
    }
}

/// The piece of an answer that appears latest for the first time.
fn late_piece(text: &str) -> &str {
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let pieces = starts.windows(6).map(|window| &text[window[0]..window[5]]);
    pieces.max_by_key(|piece| text.find(piece)).expect("an answer has some characters")
}

#[test]
fn log_probabilities_and_a_stop_string_survive_it_too() {
    let model = tiny_llama();
    let prompt = prompt(22, 40);
    let whole = oracle(&model, &prompt, 450, &["--temperature", "1", "--seed", "5"]).text;
    let stop = late_piece(&whole);
    let expected = whole.split(stop).next().expect("a part before it");
    let cluster = Cluster::start(binary(), &model, &["--decode", "2"]);
    let mut request = completion(&prompt, 450);
    for (key, value) in [("temperature", json!(1)), ("seed", json!(5)), ("logprobs", json!(2)), ("stop", json!(stop))] {
        request[key] = value;
    }
    let resumed = broken_and_resumed(&cluster, request.clone());
    assert_eq!(text(&resumed), expected);
    let last = &resumed.last().expect("it has begun")["choices"][0];
    assert_eq!((&last["finish_reason"], &last["stop_reason"]), (&json!("stop"), &json!(stop)));

    // The same request, undisturbed: token by token with the same log-probabilities.
    cluster.wait_healthy();
    request["stream"] = json!(true);
    let stream = cluster.client.stream("/v1/completions", &request).expect("a stream");
    let mut undisturbed = stream.collect_data().expect("the stream ends well");
    assert_eq!(undisturbed.pop().as_deref(), Some("[DONE]"));
    let undisturbed = chunks(undisturbed.into_iter());
    for list in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
        let all = |chunks: &[Value]| -> Vec<Value> {
            let lists = chunks.iter().map(|chunk| chunk["choices"][0]["logprobs"][list].as_array().expect("a list"));
            lists.flatten().cloned().collect()
        };
        assert!(!all(&resumed).is_empty());
        assert_eq!(all(&resumed), all(&undisturbed), "{list}");
    }
    cluster.wait_idle();
}

#[test]
fn a_stream_that_nobody_comes_back_for_leaves_nothing_behind() {
    let model = tiny_llama();
    let cluster = Cluster::start(binary(), &model, &[]);
    let mut request = completion(&prompt(23, 40), 450);
    request["stream"] = json!(true);
    let client = cluster.client.with_header("X-Ridge-Resumable", "0.1");
    let stream = client.stream("/v1/completions", &request).expect("a stream");
    stream.for_each(|_| false).expect("the stream has begun");
    let expired = || cluster.metrics().sum("ridge_streams_expired_total") == 1.0;
    assert!(within(TIMEOUT, expired), "it is kept for ever");
    cluster.wait_idle();
}
