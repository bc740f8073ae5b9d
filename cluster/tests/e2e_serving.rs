//! A cluster of real processes serves both endpoints, streamed and not, and answers what one process answers.

mod support;

use ridge_tests::cluster::Cluster;
use ridge_tests::http::Events;
use ridge_tests::model::{prompt, synth};
use serde_json::{Value, json};
use support::{binary, complete, completion, oracle, tiny_llama};

fn text_of(data: &[String], pick: impl Fn(&Value) -> Option<String>) -> String {
    let events = data.iter().filter(|data| *data != "[DONE]");
    events.filter_map(|data| pick(&serde_json::from_str(data).expect("an event is JSON"))).collect()
}

#[test]
fn both_endpoints_stream_what_they_answer_in_one_piece() {
    let cluster = Cluster::start(binary(), &tiny_llama(), &[]);
    let prompt = prompt(1, 50);
    let whole = complete(&cluster, &prompt, 24);

    let mut request = completion(&prompt, 24);
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    let data = cluster.client.stream("/v1/completions", &request).and_then(Events::collect_data).expect("a stream");
    assert_eq!(data.last().map(String::as_str), Some("[DONE]"));
    let streamed = text_of(&data, |event| Some(event["choices"].get(0)?["text"].as_str()?.to_owned()));
    assert_eq!(streamed, whole);
    let usage: Value = serde_json::from_str(&data[data.len() - 2]).expect("the usage is JSON");
    assert_eq!(usage["usage"]["completion_tokens"], 24, "{usage}");

    let chat = json!({
        "model": "test", "max_tokens": 16, "temperature": 0, "ignore_eos": true,
        "messages": [{"role": "user", "content": "what is a block table"}],
    });
    let answer = cluster.client.post("/v1/chat/completions", &chat).expect("an answer").ok();
    let whole = answer["choices"][0]["message"]["content"].as_str().expect("has content").to_owned();
    let mut request = chat;
    request["stream"] = json!(true);
    let data =
        cluster.client.stream("/v1/chat/completions", &request).and_then(Events::collect_data).expect("a stream");
    let streamed = text_of(&data, |event| Some(event["choices"].get(0)?["delta"]["content"].as_str()?.to_owned()));
    assert_eq!(streamed, whole);

    let models = cluster.client.get("/v1/models").expect("an answer").ok();
    assert_eq!(models["data"][0]["id"], "test");
    cluster.wait_idle();
}

/// Prompts of one token, around block and chunk borders, and up to the context; with every block and chunk size.
#[test]
fn a_cluster_answers_what_one_process_answers() {
    let model = tiny_llama();
    // (prompt length, tokens to generate); the model's context is 512.
    let cases = [(1, 20), (15, 20), (16, 20), (17, 20), (64, 40), (65, 8), (200, 30), (384, 128), (505, 7), (511, 1)];
    let expected: Vec<String> = cases
        .iter()
        .map(|(len, max_tokens)| oracle(&model, &prompt(*len as u64, *len), *max_tokens, &["--chunk", "512"]).text)
        .collect();
    for flags in [
        &["--block-size", "16"][..],
        &["--block-size", "8", "--max-num-batched-tokens", "24"][..],
        &["--block-size", "32", "--max-num-batched-tokens", "100", "--decode", "2"][..],
        &["--block-size", "1", "--prefill", "2"][..],
    ] {
        let cluster = Cluster::start(binary(), &model, flags);
        for ((len, max_tokens), expected) in cases.iter().zip(&expected) {
            let got = complete(&cluster, &prompt(*len as u64, *len), *max_tokens);
            assert_eq!(got, *expected, "prompt of {len} tokens with {flags:?}");
        }
        // Once more: now the prefixes are cached.
        for ((len, max_tokens), expected) in cases.iter().zip(&expected) {
            let got = complete(&cluster, &prompt(*len as u64, *len), *max_tokens);
            assert_eq!(got, *expected, "cached prompt of {len} tokens with {flags:?}");
        }
        let too_long = cluster.client.post("/v1/completions", &completion(&prompt(9, 512), 1)).expect("an answer");
        assert_eq!(too_long.status, 400, "{}", too_long.body);
        cluster.wait_idle();
    }
}

/// Every architecture, and quantised weights.
#[test]
fn every_family_is_served() {
    let folder = tempfile::tempdir().expect("a temp dir");
    let models = [("tiny-qwen2", "bf16"), ("tiny-qwen3", "f16"), ("tiny-mistral", "f32"), ("tiny-llama", "q4_k_m")];
    for (preset, dtype) in models {
        let model = synth(binary(), folder.path(), preset, dtype);
        let cluster = Cluster::start(binary(), &model, &[]);
        // Longer than tiny-mistral's window.
        let prompt = prompt(7, 150);
        assert_eq!(complete(&cluster, &prompt, 24), oracle(&model, &prompt, 24, &[]).text, "{preset} {dtype}");
    }
}

/// Each of 64 clients gets its own answer, whoever else is in the batch.
#[test]
fn sixty_four_clients_at_once() {
    let model = tiny_llama();
    let cluster = Cluster::start(binary(), &model, &[]);
    let len = |i: u64| 3 + (i as usize * 7) % 90;
    let answers: Vec<String> = std::thread::scope(|scope| {
        let ask = |i: u64| complete(&cluster, &prompt(100 + i, len(i)), 16 + (i % 16) as u32);
        let clients: Vec<_> = (0..64).map(|i| scope.spawn(move || ask(i))).collect();
        clients.into_iter().map(|client| client.join().expect("a client is served")).collect()
    });
    // The oracle starts a process per prompt: a sample is enough.
    for i in (0..64).step_by(8) {
        let expected = oracle(&model, &prompt(100 + i, len(i)), 16 + (i % 16) as u32, &[]).text;
        assert_eq!(answers[i as usize], expected, "client {i}");
    }
    cluster.wait_idle();
}

#[test]
fn keys_and_names_are_checked() {
    let cluster = Cluster::start(binary(), &tiny_llama(), &["--api-key", "one", "--served-model-name", "other"]);
    let request = completion(&prompt(1, 8), 2);
    let status = |client: &ridge_tests::http::Client, request: &Value| {
        client.post("/v1/completions", request).expect("an answer").status
    };
    assert_eq!(status(&cluster.client, &request), 401);
    assert_eq!(status(&cluster.client.with_key("two"), &request), 401);
    assert_eq!(status(&cluster.client.with_key("one"), &request), 200);
    let mut other = request.clone();
    other["model"] = json!("other");
    assert_eq!(status(&cluster.client.with_key("one"), &other), 200);
    other["model"] = json!("unknown");
    assert_eq!(status(&cluster.client.with_key("one"), &other), 404);
    for process in cluster.processes() {
        assert!(!process.args.iter().any(|arg| arg == "one"), "the key can be read by ps: {:?}", process.args);
    }
}
