//! From JSON to sampling parameters, and every way to get them wrong.

use crate::client::{expect, get, post};
use crate::fake::{EOS, Server, config, say};
use ridge_protocol::{GrammarKind, SamplingParams};
use ridge_router::shell::http::{Defaults, HttpConfig};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn parameters_reach_the_cluster() {
    let server = Server::start(say("x")).await;
    let body = json!({
        "messages": [{ "role": "user", "content": "hi" }], "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125,
        "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 42,
        "logit_bias": { "98": -100, "97": 1.5 }, "max_tokens": 3, "max_completion_tokens": 5, "user": "me", "n": null
    });
    expect(post(&server, CHAT, &body).await, 200, json!({}));
    let expected = SamplingParams {
        temperature: 0.5,
        top_p: 0.25,
        top_k: 7,
        min_p: 0.125,
        repetition_penalty: 1.5,
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logit_bias: vec![(97, 1.5), (98, -100.0)],
        seed: 42,
        logprobs: None,
        stop_tokens: vec![EOS],
        ignore_eos: false,
        max_tokens: 5,
        grammar: None,
    };
    assert_eq!(server.params(0), expected);
}

#[tokio::test]
async fn what_is_absent_comes_from_the_model() {
    let defaults = Defaults {
        eos: vec![EOS],
        temperature: Some(0.6),
        top_p: Some(0.95),
        top_k: Some(20),
        repetition_penalty: Some(1.05),
    };
    let server = Server::with(config(), defaults, say("x")).await;
    post(&server, TEXT, &json!({ "prompt": "p" })).await;
    post(&server, TEXT, &json!({ "prompt": "p", "top_k": -1, "temperature": 0 })).await;
    let (first, second) = (server.params(0), server.params(1));
    assert_eq!((first.temperature, first.top_p, first.top_k, first.repetition_penalty), (0.6, 0.95, 20, 1.05));
    assert_eq!((second.temperature, second.top_k), (0.0, 0));
    assert_ne!(first.seed, second.seed, "seeds are drawn");
    let server = Server::start(say("x")).await;
    post(&server, TEXT, &json!({ "prompt": "p" })).await;
    assert_eq!((server.params(0).temperature, server.params(0).top_p), (1.0, 1.0));
}

#[tokio::test]
async fn constraints_reach_the_cluster() {
    let server = Server::start(say("x")).await;
    let check = async |extra: Value, expected: Option<(GrammarKind, &str)>| {
        server.log.lock().unwrap().submitted.clear();
        let mut body = json!({ "prompt": "p" });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        expect(post(&server, TEXT, &body).await, 200, json!({}));
        let grammar = server.params(0).grammar;
        assert_eq!(grammar.as_ref().map(|grammar| (grammar.kind, grammar.text.as_str())), expected, "{extra}");
    };
    use GrammarKind::*;
    check(json!({ "response_format": { "type": "text" }, "structured_outputs": null }), None).await;
    let object = Some((JsonSchema, r#"{"type":"object"}"#));
    check(json!({ "response_format": { "type": "json_object" } }), object).await;
    check(json!({ "structured_outputs": { "json_object": true, "regex": null } }), object).await;
    // Keys keep their order: it is the order in which they are generated.
    let schema = json!({ "type": "object", "properties": { "b": {}, "a": {} } });
    let text = r#"{"type":"object","properties":{"b":{},"a":{}}}"#;
    let format = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema, "strict": true } });
    check(json!({ "response_format": format }), Some((JsonSchema, text))).await;
    check(json!({ "structured_outputs": { "json": schema } }), Some((JsonSchema, text))).await;
    check(json!({ "structured_outputs": { "json": text } }), Some((JsonSchema, text))).await;
    check(json!({ "structured_outputs": { "regex": "a+", "json_object": false } }), Some((Regex, "a+"))).await;
    check(json!({ "structured_outputs": { "grammar": "start: A" } }), Some((Lark, "start: A"))).await;
    let choice = json!({ "structured_outputs": { "choice": ["a \"b\"", "é|\n"] } });
    check(choice, Some((Lark, r#"start: "a \"b\"" | "é|\n""#))).await;
}

#[tokio::test]
async fn calls_that_are_asked_for_are_constrained() {
    let server = Server::start(say("x")).await;
    let function = |name: &str, parameters: Value| json!({ "type": "function", "function": { "name": name, "parameters": parameters } });
    let schema = json!({ "type": "object", "properties": { "b": {}, "a": {} } });
    let tools = json!([function("f", schema), function("g", json!(null)), function("not a name", json!({}))]);
    let check = async |choice: Value, tools: &Value, several: Value, kind: GrammarKind, text: &str| {
        server.log.lock().unwrap().submitted.clear();
        let body = json!({
            "messages": [{ "role": "user", "content": "q" }], "tools": tools, "tool_choice": choice,
            "parallel_tool_calls": several,
        });
        expect(post(&server, CHAT, &body).await, 200, json!({}));
        let grammar = server.params(0).grammar.expect("a constraint");
        assert_eq!((grammar.kind, grammar.text.as_str()), (kind, text));
    };
    let named = json!({ "type": "function", "function": { "name": "f" } });
    let text = r#"{"type":"object","properties":{"b":{},"a":{}}}"#;
    check(named, &tools, json!(null), GrammarKind::JsonSchema, text).await;
    let rules = |more: &str| {
        let lines = [
            &format!(r#"start: "[" call{more} "]""#),
            "call: call_0 | call_1",
            r#"call_0: "{\"name\": \"f\", \"arguments\": " arguments_call_0 "}""#,
            r#"arguments_call_0: %json {"type":"object","properties":{"b":{},"a":{}},"x-guidance":{"whitespace_flexible":false}}"#,
            r#"call_1: "{\"name\": \"g\", \"arguments\": " arguments_call_1 "}""#,
            r#"arguments_call_1: %json {"type":"object","properties":{},"additionalProperties":false,"x-guidance":{"whitespace_flexible":false}}"#,
            "",
        ];
        lines.join("\n")
    };
    let two = json!(tools.as_array().unwrap()[..2]);
    check(json!("required"), &two, json!(true), GrammarKind::Lark, &rules(r#" (", " call)*"#)).await;
    check(json!("required"), &two, json!(false), GrammarKind::Lark, &rules("")).await;
}

#[tokio::test]
async fn a_grammar_that_is_too_large_is_refused() {
    let config = HttpConfig { max_body_bytes: 1 << 20, ..config() };
    let server = Server::with(config, Defaults::default(), say("x")).await;
    let body = json!({ "prompt": "p", "structured_outputs": { "regex": "a".repeat((256 << 10) + 1) } });
    let (status, answer) = post(&server, TEXT, &body).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("structured_outputs")));
    assert!(answer["error"]["message"].as_str().unwrap().contains("262144"), "{answer}");
}

#[tokio::test]
async fn the_template_sees_the_conversation() {
    let server = Server::start(say("x")).await;
    let check = async |body: Value, prompt: &str| {
        server.log.lock().unwrap().submitted.clear();
        expect(post(&server, CHAT, &body).await, 200, json!({}));
        let tokens: Vec<u8> = server.log.lock().unwrap().submitted[0].tokens.iter().map(|t| *t as u8).collect();
        assert_eq!(String::from_utf8(tokens).unwrap(), prompt);
    };
    let parts = json!([{ "type": "text", "text": "one" }, { "type": "text", "text": "two" }]);
    check(json!({ "messages": [{ "role": "user", "content": parts }] }), "u:one\ntwo|a:").await;
    let user = json!({ "role": "user", "content": "q" });
    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    check(json!({ "messages": [user], "tools": tools }), "[1 tools]u:q|a:").await;
    check(json!({ "messages": [user], "tools": tools, "tool_choice": "none" }), "u:q|a:").await;
    check(json!({ "messages": [user], "tools": [], "tool_choice": "auto" }), "u:q|a:").await;
    check(json!({ "messages": [user], "chat_template_kwargs": { "suffix": "+" } }), "u:q|+a:").await;
    check(json!({ "messages": [user], "add_generation_prompt": false }), "u:q|").await;
    let begun = json!({ "role": "assistant", "content": "So " });
    check(json!({ "messages": [user, begun], "continue_final_message": true }), "u:q|a:So").await;
    let call = json!([{ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 5}" } }]);
    let called = json!({ "role": "assistant", "content": null, "tool_calls": call });
    check(json!({ "messages": [user, called] }), "u:q|a:|5a:").await;
}

#[tokio::test]
async fn mistakes_in_a_chat_name_the_parameter() {
    let server = Server::start(say("x")).await;
    let check = async |extra: Value, param: &str| {
        let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let (status, answer) = post(&server, CHAT, &body).await;
        assert_eq!(status, 400, "{extra} gave {answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
        assert_eq!(answer["error"]["param"], param, "{extra} gave {answer}");
        assert!(!answer["error"]["message"].as_str().unwrap().is_empty());
    };
    for (name, value) in [
        ("temperature", json!("hot")),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.5)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("ten")),
        ("max_completion_tokens", json!([1])),
        ("n", json!(0)),
        ("n", json!(9)),
        ("n", json!(true)),
        ("best_of", json!(2)),
        ("seed", json!(1.5)),
        ("seed", json!("x")),
        ("stop", json!(5)),
        ("stop", json!("")),
        ("stop", json!(["a", ""])),
        ("stop", json!(vec!["a"; 17])),
        ("stop", json!("a".repeat(1025))),
        ("stop_token_ids", json!([259])),
        ("stop_token_ids", json!(vec![1; 64])),
        ("logit_bias", json!({ "x": 1 })),
        ("logit_bias", json!({ "259": 1 })),
        ("logit_bias", json!({ "5": 101 })),
        ("logit_bias", json!({ "5": "1" })),
        ("logit_bias", json!([])),
        ("logprobs", json!(3)),
        ("top_logprobs", json!(2)),
        ("stream", json!("yes")),
        ("stream_options", json!({ "include_usage": true })),
        ("ignore_eos", json!(1)),
        ("response_format", json!({ "type": "json_schema", "json_schema": {} })),
        ("response_format", json!({ "type": "json_schema", "json_schema": { "schema": 5 } })),
        ("response_format", json!({ "type": "json_schema", "json_schema": { "schema": { "type": "bad" } } })),
        ("response_format", json!({ "type": "structural_tag" })),
        ("response_format", json!("json_object")),
        ("guided_json", json!({})),
        ("guided_choice", json!(["a"])),
        ("grammar", json!("start: \"a\"")),
        ("structured_outputs", json!({})),
        ("structured_outputs", json!("a")),
        ("structured_outputs", json!({ "regex": "bad" })),
        ("structured_outputs", json!({ "regex": "" })),
        ("structured_outputs", json!({ "regex": 5 })),
        ("structured_outputs", json!({ "json": "{" })),
        ("structured_outputs", json!({ "json": [] })),
        ("structured_outputs", json!({ "choice": [] })),
        ("structured_outputs", json!({ "choice": ["a", ""] })),
        ("structured_outputs", json!({ "choice": ["a", 5] })),
        ("structured_outputs", json!({ "grammar": null })),
        ("structured_outputs", json!({ "regex": "a", "choice": ["a"] })),
        ("structured_outputs", json!({ "regex": "a", "whitespace_pattern": " " })),
        ("use_beam_search", json!(true)),
        ("tools", json!("f")),
        ("tools[0]", json!([{ "type": "function" }])),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({ "type": "function", "function": { "name": "f" } })),
        ("functions", json!([])),
        ("chat_template", json!("{{ x }}")),
        ("chat_template_kwargs", json!([])),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("messages", json!(null)),
        ("messages", json!([{ "role": "alien", "content": "x" }])),
        ("messages", json!([{ "role": "user", "content": "\0" }])),
        ("messages[0]", json!(["hi"])),
        ("messages[0].role", json!([{ "content": "x" }])),
        ("messages[0].content", json!([{ "role": "user" }])),
        ("messages[0].content", json!([{ "role": "user", "content": 5 }])),
        ("messages[0].content[0]", json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }])),
        ("messages[0].content[1]", json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }, 5] }])),
    ] {
        let key = name.split('[').next().unwrap();
        check(json!({ key: value }), name).await;
    }
    let both = json!({ "response_format": { "type": "json_object" }, "structured_outputs": { "regex": "a" } });
    check(both, "structured_outputs").await;
    check(json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs").await;
    check(json!({ "continue_final_message": true, "add_generation_prompt": true }), "continue_final_message").await;
    let tools = json!([{ "type": "function", "function": { "name": "a b", "parameters": {} } }]);
    check(json!({ "tools": tools, "tool_choice": "required" }), "tools[0].function.name").await;
    let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": 5 } }]);
    check(json!({ "tools": tools, "tool_choice": "required" }), "tools[0].function.parameters").await;
    let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": { "bad": 1 } } }]);
    check(json!({ "tools": tools, "tool_choice": "required" }), "tools").await;
    check(json!({ "tools": tools, "tool_choice": { "type": "allowed_tools" } }), "tool_choice").await;
    let named = json!({ "type": "function", "function": { "name": "g" } });
    check(json!({ "tools": tools, "tool_choice": named }), "tool_choice").await;
    check(json!({ "tools": tools, "tool_choice": "required", "stop": "a" }), "stop").await;
    let object = json!({ "type": "json_object" });
    check(json!({ "tools": tools, "tool_choice": "required", "response_format": object }), "response_format").await;
    let call = json!([{ "function": { "arguments": "{" } }]);
    let called = json!([{ "role": "assistant", "tool_calls": call }]);
    check(json!({ "messages": called }), "messages[0].tool_calls[0].function.arguments").await;
    assert!(server.log.lock().unwrap().submitted.is_empty());
}

#[tokio::test]
async fn mistakes_in_a_completion_name_the_parameter() {
    let server = Server::start(say("x")).await;
    let check = async |body: Value, param: &str| {
        let (status, answer) = post(&server, TEXT, &body).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{body} gave {answer}");
    };
    check(json!({}), "prompt").await;
    check(json!({ "prompt": [] }), "prompt").await;
    check(json!({ "prompt": [[]] }), "prompt").await;
    check(json!({ "prompt": 5 }), "prompt").await;
    check(json!({ "prompt": ["a", 5] }), "prompt").await;
    check(json!({ "prompt": [259] }), "prompt").await;
    check(json!({ "prompt": [-1] }), "prompt").await;
    check(json!({ "prompt": vec!["a"; 257] }), "prompt").await;
    check(json!({ "prompt": "a", "suffix": "b" }), "suffix").await;
    check(json!({ "prompt": "a", "logprobs": 21 }), "logprobs").await;
    check(json!({ "prompt": "a", "logprobs": true }), "logprobs").await;
    check(json!({ "prompt": "a", "echo": true, "logprobs": 1 }), "echo").await;
}

#[tokio::test]
async fn a_prompt_must_leave_room_for_an_answer() {
    let server = Server::start(say("abcdef")).await;
    let (status, answer) = post(&server, TEXT, &json!({ "prompt": vec![1; 64] })).await;
    let error = json!({ "type": "invalid_request_error", "param": "prompt", "code": "context_length_exceeded" });
    assert!(answer["error"]["message"].as_str().unwrap().contains("64 tokens"), "{answer}");
    expect((status, answer), 400, json!({ "error": error }));
    let (status, answer) =
        post(&server, CHAT, &json!({ "messages": [{ "role": "user", "content": "x".repeat(75) }] })).await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("64 tokens") && message.contains("80 tokens"), "{message}");
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("messages")));
    // One token of room is enough, and all there is.
    let expected = json!({ "choices": [{ "text": "a", "finish_reason": "length" }] });
    expect(post(&server, TEXT, &json!({ "prompt": vec![1; 63], "max_tokens": 9 })).await, 200, expected);
    assert_eq!(server.params(0).max_tokens, 1);
}

#[tokio::test]
async fn long_prompts_are_read_on_other_threads() {
    let config = HttpConfig { max_model_len: 50_000, ..config() };
    let server = Server::with(config, Defaults::default(), say("x")).await;
    let body = json!({ "prompt": "y".repeat(40_000) });
    expect(post(&server, TEXT, &body).await, 200, json!({ "usage": { "prompt_tokens": 40_001 } }));
}

/// A node whose memory holds less than the model's context bounds everybody.
#[tokio::test]
async fn the_shortest_node_bounds_the_context() {
    let config = HttpConfig { max_model_len: 1 << 21, ..config() };
    let server = Server::with(config, Defaults::default(), say("x")).await;
    let (_, models) = get(&server, "/v1/models").await;
    assert_eq!(models["data"][0]["max_model_len"], json!(1 << 20), "{models}");
}
