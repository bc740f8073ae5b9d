//! Answers as server-sent events.

use crate::client::{covers, events, stream, text_of};
use crate::fake::{Do, Server, config, hang_after, say, script, tokens};
use ridge_protocol::wire::FinishReason;
use ridge_router::machine::RouterError;
use ridge_router::shell::http::{Defaults, HttpConfig};
use serde_json::{Value, json};
use std::time::Duration;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn ask(extra: Value) -> Value {
    let mut body = json!({ "stream": true, "messages": [{ "role": "user", "content": "hi" }] });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[track_caller]
fn check(actual: &[Value], expected: &[Value]) {
    assert_eq!(actual.len(), expected.len(), "{actual:#?}");
    for (actual, expected) in actual.iter().zip(expected) {
        assert!(covers(actual, expected), "\n  actual {actual}\nexpected {expected}");
    }
}

#[tokio::test]
async fn a_chat_stream_opens_with_the_role_and_closes_with_the_reason() {
    let server = Server::start(say("Hé")).await;
    let answer = stream(&server, CHAT, &ask(json!({}))).await;
    let chunk = |delta: Value, finish: Value| {
        json!({
            "object": "chat.completion.chunk", "model": "org/fake", "system_fingerprint": "ridge-9.9",
            "choices": [{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish }]
        })
    };
    let expected = [
        chunk(json!({ "role": "assistant", "content": "" }), Value::Null),
        chunk(json!({ "content": "H" }), Value::Null),
        chunk(json!({ "content": "é" }), Value::Null),
        chunk(json!({}), json!("stop")),
        json!("[DONE]"),
    ];
    check(&answer, &expected);
    assert!(answer.iter().all(|event| event.get("usage").is_none()), "usage was not asked for");
    assert!(answer[..4].iter().all(|event| event["id"] == answer[0]["id"]));
}

#[tokio::test]
async fn usage_comes_last_on_request() {
    let server = Server::start(say("ab")).await;
    let answer = stream(&server, CHAT, &ask(json!({ "stream_options": { "include_usage": true } }))).await;
    let usage = json!({
        "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": { "cached_tokens": 2 }
    });
    let null = json!({ "usage": null });
    let last = json!({ "choices": [], "usage": usage });
    check(&answer, &[null.clone(), null.clone(), null.clone(), null, last, json!("[DONE]")]);

    let options = json!({ "stream_options": { "include_usage": true, "continuous_usage_stats": true } });
    let answer = stream(&server, CHAT, &ask(options)).await;
    let so_far: Vec<&Value> = answer.iter().map(|event| &event["usage"]["completion_tokens"]).collect();
    assert_eq!(so_far, [&json!(1), &json!(1), &json!(2), &json!(3), &json!(3), &Value::Null]);
}

#[tokio::test]
async fn a_completion_stream_has_text_and_reason() {
    let server = Server::start(say("abc")).await;
    let body = json!({ "prompt": "p", "stream": true, "max_tokens": 2, "echo": true });
    let choice = |text: &str, finish: Value| json!({ "object": "text_completion", "choices": [{ "index": 0, "text": text, "finish_reason": finish }] });
    let expected = [choice("pa", Value::Null), choice("b", Value::Null), choice("", json!("length")), json!("[DONE]")];
    check(&stream(&server, TEXT, &body).await, &expected);
}

#[tokio::test]
async fn answers_are_interleaved_by_index() {
    let slow = [tokens("a"), vec![Do::Sleep(30)], tokens("b"), vec![Do::Sleep(30), Do::Finish(FinishReason::Stop)]];
    let server = Server::start(script(slow.concat())).await;
    let answer = stream(&server, CHAT, &ask(json!({ "n": 3 }))).await;
    assert!((0..3).all(|index| text_of(&answer, index) == "ab"));
    let order: Vec<u64> = answer.iter().filter_map(|event| event["choices"][0]["index"].as_u64()).collect();
    assert_eq!(order.len(), 12);
    assert!(order[..6].contains(&2) && order[6..].contains(&0), "one after the other: {order:?}");
}

#[tokio::test]
async fn a_stream_never_shows_part_of_a_stop_string() {
    let server = Server::start(hang_after("a EN END b")).await;
    let answer = stream(&server, CHAT, &ask(json!({ "stop": "END", "n": 2 }))).await;
    assert_eq!(text_of(&answer, 0), "a EN ");
    assert_eq!(text_of(&answer, 1), "a EN ");
    server.wait_gone(2).await;
}

#[tokio::test]
async fn an_error_in_mid_stream_is_an_event_and_the_end() {
    let broken = [tokens("a"), vec![Do::Fail(RouterError::Failed("node lost".into()))]];
    let server = Server::start(script(broken.concat())).await;
    let answer = stream(&server, CHAT, &ask(json!({}))).await;
    let error = json!({ "error": { "message": "node lost", "type": "server_error", "code": "internal_error" } });
    check(&answer, &[json!({}), json!({ "choices": [{ "delta": { "content": "a" } }] }), error]);
}

#[tokio::test]
async fn silence_is_commented_on_before_the_first_token_only() {
    let config = HttpConfig { keep_alive: Duration::from_millis(40), ..config() };
    let slow = [vec![Do::Sleep(140)], tokens("a"), vec![Do::Sleep(140), Do::Finish(FinishReason::Stop)]];
    let server = Server::with(config, Defaults::default(), script(slow.concat())).await;
    let response = reqwest::Client::new().post(server.url(CHAT)).json(&ask(json!({}))).send().await.unwrap();
    let answer = events(&response.text().await.unwrap());
    let comments = answer.iter().filter(|event| *event == ": keep-alive").count();
    assert!((1..=3).contains(&comments), "{answer:?}");
    assert!(answer[..comments].iter().all(|event| *event == ": keep-alive"), "{answer:?}");
}

#[tokio::test]
async fn a_receipt_comes_at_the_end() {
    let server = Server::start(say("x")).await;
    let request = reqwest::Client::new().post(server.url(CHAT)).header("X-Ridge-Receipt", "1").json(&ask(json!({})));
    let answer = events(&request.send().await.unwrap().text().await.unwrap());
    let tail = &answer[answer.len() - 2];
    assert_eq!(tail["choices"], json!([]));
    assert_eq!(tail["ridge"]["receipt"]["transferred"], 3);
}

#[tokio::test]
async fn calls_stream_as_parts() {
    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    let calls = async |text: &str, choice: Value| {
        let server = Server::start(say(text)).await;
        let events = stream(&server, CHAT, &ask(json!({ "tools": tools, "tool_choice": choice }))).await;
        let chunks: Vec<Value> = events.iter().filter(|event| event.is_object()).cloned().collect();
        let content = chunks.iter().any(|chunk| chunk["choices"][0]["delta"].get("content").is_some());
        assert!(!content, "{chunks:?}");
        let part = |chunk: &Value| chunk["choices"][0]["delta"]["tool_calls"].as_array().cloned();
        let finish = chunks.last().unwrap()["choices"][0]["finish_reason"].clone();
        (chunks.iter().filter_map(part).flatten().collect::<Vec<_>>(), finish)
    };
    let (parts, finish) = calls(r#"[{"name": "f", "arguments": {}}]"#, json!("required")).await;
    check(&parts, &[json!({ "index": 0, "type": "function", "function": { "name": "f", "arguments": "{}" } })]);
    assert_eq!(finish, "tool_calls");

    let named = json!({ "type": "function", "function": { "name": "f" } });
    let (parts, finish) = calls("{é}", named).await;
    let next = |text: &str| json!({ "index": 0, "function": { "arguments": text } });
    check(&parts, &[json!({ "index": 0, "function": { "name": "f", "arguments": "{" } }), next("é"), next("}")]);
    assert!(parts[0]["id"].is_string() && parts[1].get("id").is_none(), "{parts:?}");
    assert_eq!(finish, "stop");
}
