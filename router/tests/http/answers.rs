//! Whole answers.

use crate::client::{expect, post};
use crate::fake::{Do, EOS, Server, fail, hang_after, say, script, token, tokens};
use ridge_protocol::TokenOut;
use ridge_protocol::wire::FinishReason;
use ridge_router::machine::RouterError;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn ask(extra: Value) -> Value {
    let mut body = json!({ "model": "alias", "messages": [{ "role": "user", "content": "hi" }] });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_chat_answer_has_openais_shape() {
    let server = Server::start(say("Hé")).await;
    let (status, answer) = post(&server, CHAT, &ask(json!({}))).await;
    assert_eq!(status, 200);
    let mut keys: Vec<&str> = answer.as_object().unwrap().keys().map(String::as_str).collect();
    keys.retain(|key| *key != "created");
    assert_eq!(keys, ["id", "object", "model", "system_fingerprint", "choices", "usage"]);
    let expected = json!({
        "object": "chat.completion", "model": "alias", "system_fingerprint": "ridge-9.9",
        "choices": [{
            "index": 0, "message": { "role": "assistant", "content": "Hé", "refusal": null },
            "logprobs": null, "finish_reason": "stop"
        }],
        "usage": {
            "prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11,
            "prompt_tokens_details": { "cached_tokens": 2 }
        }
    });
    expect((status, answer.clone()), 200, expected);
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    // The template wrote the prompt, no BOS was added, and the answer may fill the context.
    let log = server.log.lock().unwrap();
    assert_eq!(log.submitted[0].tokens, "u:hi|a:".bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(log.submitted[0].params.max_tokens, 64 - 7);
    assert_eq!(log.gone, 0);
}

#[tokio::test]
async fn completions_take_every_kind_of_prompt() {
    let server = Server::start(say("Hello, this is long")).await;
    let check = async |prompt: Value, prompts: &[&[u32]]| {
        server.log.lock().unwrap().submitted.clear();
        let (status, answer) = post(&server, TEXT, &json!({ "prompt": prompt })).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["object"], "text_completion");
        let submitted: Vec<_> = server.log.lock().unwrap().submitted.iter().map(|s| s.tokens.clone()).collect();
        assert_eq!(submitted, prompts);
        for (index, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
            let expected =
                json!({ "index": index, "text": "Hello, this is l", "logprobs": null, "finish_reason": "length" });
            assert_eq!(*choice, expected, "16 tokens unless asked otherwise");
        }
        let usage = json!({
            "prompt_tokens": prompts.concat().len(), "completion_tokens": 16 * prompts.len(),
            "prompt_tokens_details": { "cached_tokens": 2 * prompts.len() }
        });
        expect((status, answer), 200, json!({ "usage": usage }));
    };
    check(json!("ab"), &[&[257, 97, 98]]).await;
    check(json!(["ab", "c"]), &[&[257, 97, 98], &[257, 99]]).await;
    check(json!([1, 2, 258]), &[&[1, 2, 258]]).await;
    check(json!([[1], [2, 3]]), &[&[1], &[2, 3]]).await;
}

#[tokio::test]
async fn echo_puts_the_prompt_before_every_answer() {
    let server = Server::start(say("!")).await;
    let body = json!({ "prompt": ["ab", "c"], "echo": true, "n": 2 });
    let texts = ["ab!", "ab!", "c!", "c!"].map(|text| json!({ "text": text }));
    expect(post(&server, TEXT, &body).await, 200, json!({ "choices": texts }));
    let body = json!({ "prompt": [257, 97], "echo": true });
    expect(post(&server, TEXT, &body).await, 200, json!({ "choices": [{ "text": "a!" }] }));
}

#[tokio::test]
async fn n_answers_draw_different_numbers() {
    let server = Server::start(say("x")).await;
    let (status, answer) = post(&server, CHAT, &ask(json!({ "n": 3, "seed": -1 }))).await;
    let choices = [0, 1, 2].map(|index| json!({ "index": index, "message": { "content": "x" } }));
    let usage = json!({ "prompt_tokens": 7, "completion_tokens": 6, "prompt_tokens_details": { "cached_tokens": 2 } });
    expect((status, answer), 200, json!({ "choices": choices, "usage": usage }));
    let mut seeds: Vec<u64> = (0..3).map(|index| server.params(index).seed).collect();
    seeds.sort_unstable();
    assert_eq!(seeds, [0, 1, u64::MAX]);
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_at_once() {
    let server = Server::start(hang_after("one END two")).await;
    let body = ask(json!({ "stop": ["END", "zzz"] }));
    let expected = json!({
        "choices": [{ "message": { "content": "one " }, "finish_reason": "stop", "stop_reason": "END" }],
        "usage": { "completion_tokens": 7, "prompt_tokens_details": { "cached_tokens": 2 } }
    });
    expect(post(&server, CHAT, &body).await, 200, expected);
    server.wait_gone(1).await;

    // Half a stop string at the end is text after all.
    let server = Server::start(say("one EN")).await;
    expect(post(&server, CHAT, &body).await, 200, json!({ "choices": [{ "message": { "content": "one EN" } }] }));
}

#[tokio::test]
async fn stop_tokens_are_not_shown() {
    let stopped = script([tokens("ab"), vec![token(258), Do::Finish(FinishReason::Stop)]].concat());
    let server = Server::start(stopped).await;
    let body = json!({ "prompt": "p", "stop_token_ids": [258] });
    let choice = json!({ "text": "ab", "finish_reason": "stop", "stop_reason": 258 });
    expect(post(&server, TEXT, &body).await, 200, json!({ "choices": [choice], "usage": { "completion_tokens": 3 } }));
    assert_eq!(server.params(0).stop_tokens, [258, EOS]);

    // With ignore_eos an EOS is a token like any other, and special tokens are shown on request.
    let goes_on = script([vec![token(EOS)], tokens("ab"), vec![Do::Finish(FinishReason::Length)]].concat());
    let server = Server::start(goes_on).await;
    let body = json!({ "prompt": "p", "ignore_eos": true, "skip_special_tokens": false });
    expect(post(&server, TEXT, &body).await, 200, json!({ "choices": [{ "text": "<eos>ab" }] }));
    assert!(server.params(0).ignore_eos && server.params(0).stop_tokens.is_empty());
}

#[tokio::test]
async fn characters_are_whole_or_replaced() {
    let cut = script(vec![token(0xC3), token(0xA9), token(0xC3), Do::Finish(FinishReason::Length)]);
    let server = Server::start(cut).await;
    let expected = json!({ "choices": [{ "text": "é\u{FFFD}" }] });
    expect(post(&server, TEXT, &json!({ "prompt": "p" })).await, 200, expected);
}

#[tokio::test]
async fn logprobs_come_in_both_shapes() {
    let out = |token: u32| {
        Do::Token(TokenOut {
            token,
            logprob: Some(-0.5),
            top: vec![(97, -0.25), (0xC3, f32::NEG_INFINITY)],
            ends: false,
        })
    };
    let server = Server::start(script(vec![out(98), out(97), out(EOS), Do::Finish(FinishReason::Stop)])).await;
    let top = json!([
        { "token": "a", "logprob": -0.25, "bytes": [97] },
        { "token": "\u{FFFD}", "logprob": -9999.0, "bytes": [0xC3] }
    ]);
    let content = json!([
        { "token": "b", "logprob": -0.5, "bytes": [98], "top_logprobs": top },
        { "token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top }
    ]);
    let body = ask(json!({ "logprobs": true, "top_logprobs": 2 }));
    expect(post(&server, CHAT, &body).await, 200, json!({ "choices": [{ "logprobs": { "content": content } }] }));
    assert_eq!(server.params(0).logprobs, Some(2));

    let logprobs = json!({
        "tokens": ["b", "a"], "token_logprobs": [-0.5, -0.5], "text_offset": [0, 1],
        "top_logprobs": [{ "a": -0.25, "\u{FFFD}": -9999.0, "b": -0.5 }, { "a": -0.25, "\u{FFFD}": -9999.0 }]
    });
    let body = json!({ "prompt": "p", "logprobs": 2 });
    expect(post(&server, TEXT, &body).await, 200, json!({ "choices": [{ "logprobs": logprobs }] }));
}

#[tokio::test]
async fn logprobs_end_where_the_text_ends() {
    let out = |byte: u8| Do::Token(TokenOut { token: byte.into(), logprob: Some(-1.0), top: Vec::new(), ends: false });
    let server = Server::start(script(b"aEND".iter().map(|byte| out(*byte)).chain([Do::Hang]).collect())).await;
    let body = json!({ "prompt": "p", "logprobs": 0, "stop": "END" });
    let expected = json!({ "choices": [{ "text": "a", "logprobs": { "tokens": ["a"] } }] });
    expect(post(&server, TEXT, &body).await, 200, expected);
}

#[tokio::test]
async fn a_receipt_comes_on_request() {
    let server = Server::start(say("x")).await;
    let request = reqwest::Client::new().post(server.url(CHAT)).header("X-Ridge-Receipt", "1").json(&ask(json!({})));
    let answer: Value = request.send().await.unwrap().json().await.unwrap();
    let receipt = json!({
        "cached": 2, "computed": 1, "transferred": 3, "recomputed": 0, "transfer_bytes": 4096,
        "times": { "hidden_us": 70, "exposed_us": 5 },
        "converted": {
            "from": { "block_size": 16, "dtype": "bf16" }, "to": { "block_size": 32, "dtype": "int8" },
        },
    });
    assert_eq!(answer["ridge"], json!({ "receipt": receipt }));
}

#[tokio::test]
async fn failures_of_the_cluster_have_their_own_status() {
    let check = async |error: RouterError, status: u16, kind: &str, retry_after: Option<&str>| {
        let server = Server::start(fail(error)).await;
        for stream in [false, true] {
            let request = reqwest::Client::new().post(server.url(CHAT)).json(&ask(json!({ "stream": stream })));
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), status);
            assert_eq!(response.headers().get("retry-after").map(|value| value.to_str().unwrap()), retry_after);
            let body: Value = response.json().await.unwrap();
            assert_eq!(body["error"]["type"], kind);
        }
    };
    check(RouterError::Invalid("no".into()), 400, "invalid_request_error", None).await;
    check(RouterError::Overloaded("full".into()), 429, "rate_limit_error", Some("1")).await;
    check(RouterError::Unavailable("none".into()), 503, "server_error", Some("1")).await;
    check(RouterError::Failed("oops".into()), 500, "server_error", None).await;
}

#[tokio::test]
async fn one_failed_answer_fails_the_request_and_frees_the_others() {
    let first = std::sync::atomic::AtomicBool::new(true);
    let server = Server::start(std::sync::Arc::new(move |_| {
        if first.swap(false, std::sync::atomic::Ordering::Relaxed) {
            return vec![Do::Sleep(50), Do::Fail(RouterError::Failed("oops".into()))];
        }
        vec![Do::Hang]
    }))
    .await;
    expect(post(&server, CHAT, &ask(json!({ "n": 3 }))).await, 500, json!({ "error": { "message": "oops" } }));
    server.wait_gone(2).await;
}

#[tokio::test]
async fn calls_that_were_asked_for_are_taken_apart() {
    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    let server = Server::start(say(r#"[{"name": "f", "arguments": {"a":1}}]"#)).await;
    let (status, answer) = post(&server, CHAT, &ask(json!({ "tools": tools, "tool_choice": "required" }))).await;
    let id = format!("call-{}-0-0", answer["id"].as_str().unwrap());
    let call = json!({ "id": id, "type": "function", "function": { "name": "f", "arguments": "{\"a\":1}" } });
    let message = json!({ "role": "assistant", "content": null, "tool_calls": [call] });
    expect((status, answer), 200, json!({ "choices": [{ "message": message, "finish_reason": "tool_calls" }] }));

    let server = Server::start(say(r#"{"a": [1]}"#)).await;
    let named = json!({ "type": "function", "function": { "name": "f" } });
    let answer = post(&server, CHAT, &ask(json!({ "tools": tools, "tool_choice": named }))).await;
    let call = json!({ "type": "function", "function": { "name": "f", "arguments": "{\"a\": [1]}" } });
    let message = json!({ "content": null, "tool_calls": [call] });
    expect(answer, 200, json!({ "choices": [{ "message": message, "finish_reason": "stop" }] }));
}
