//! Constrained answers: they match what they are constrained by, they are the single process's token for token, and they stay
//! so when the node that decodes them dies or drains in the middle.

mod support;

use ridge_tests::cluster::{Cluster, fails};
use ridge_tests::http::Client;
use ridge_tests::model::prompt;
use ridge_tests::process::{Kill, signal};
use ridge_tests::roles::Roles;
use serde_json::{Value, json};
use std::io::Write;
use std::process::Command;
use support::{binary, completion, oracle, tiny_llama};
use tempfile::NamedTempFile;

/// Any model ends it, because nothing in it can go on for ever.
fn short_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog", null]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    })
}

/// A list that no answer of these tests comes to the end of.
fn long_schema() -> Value {
    let item = json!({
        "type": "object", "properties": {"word": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
        "required": ["word", "n"], "additionalProperties": false,
    });
    json!({"type": "array", "items": item, "minItems": 500})
}

fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("takes a few bytes");
    file
}

/// `extra` over a greedy completion.
fn request(prompt: &[u32], max_tokens: u32, extra: &Value) -> Value {
    let mut request = completion(prompt, max_tokens);
    request.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    request
}

#[test]
fn answers_match_and_are_the_oracles() {
    let model = tiny_llama();
    let schema = file(&short_schema().to_string());
    let schema = schema.path().to_str().expect("UTF-8");
    let pattern = "[a-z]{3,9}( [0-9]{2}){2}";
    let rules = file("start: \"yes\" | \"no\" | \"é\\n\"");
    let rules = rules.path().to_str().expect("UTF-8");
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "pet", "schema": short_schema(), "strict": true}});
    let cases = [
        (json!({"response_format": format}), vec!["--json-schema", schema]),
        (
            json!({"structured_outputs": {"json": short_schema()}, "temperature": 1.5, "seed": 9}),
            vec!["--json-schema", schema, "--temperature", "1.5", "--seed", "9"],
        ),
        (json!({"structured_outputs": {"regex": pattern}}), vec!["--regex", pattern]),
        (json!({"structured_outputs": {"choice": ["yes", "no", "é\n"]}}), vec!["--grammar", rules]),
        // As long as JSON may be: the context of this model ends it.
        (json!({"response_format": {"type": "json_object"}}), vec![]),
    ];
    for flags in [&["--decode", "1"][..], &["--prefill", "0"]] {
        let cluster = Cluster::start(binary(), &model, flags);
        for (salt, (extra, oracle_flags)) in cases.iter().enumerate() {
            for len in [5, 40] {
                let prompt = prompt(5000 + salt as u64, len);
                let answer =
                    cluster.client.post("/v1/completions", &request(&prompt, 400, extra)).expect("an answer").ok();
                let choice = &answer["choices"][0];
                let text = choice["text"].as_str().expect("has text");
                if oracle_flags.is_empty() {
                    assert!(text.starts_with('{'), "{extra}: {text:?}");
                    continue;
                }
                let expected = oracle(&model, &prompt, 400, oracle_flags);
                assert_eq!(text, expected.text, "{flags:?} {extra}");
                assert_eq!(answer["usage"]["completion_tokens"], expected.ids.len(), "{extra}");
                assert_eq!(choice["finish_reason"], "stop", "{extra}: {text:?}");
                if oracle_flags[0] == "--json-schema" {
                    check_pet(text);
                }
            }
        }
        cluster.wait_idle();
    }
}

fn check_pet(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    assert_eq!(value.as_object().map(|object| object.len()), Some(3), "{value}");
    assert!(value["name"].as_str().is_some_and(|name| name.chars().count() <= 8), "{value}");
    assert!(value["age"].as_u64().is_some_and(|age| age <= 150), "{value}");
    assert!(value["kind"].is_null() || value["kind"] == "cat" || value["kind"] == "dog", "{value}");
}

/// Streams an answer, and does something when `after` pieces have come.
fn stream(client: &Client, request: &Value, after: usize, act: impl FnOnce()) -> String {
    let (mut text, mut pieces, mut act) = (String::new(), 0, Some(act));
    client.stream_completion(request, |_, piece| {
        text.push_str(piece);
        pieces += 1;
        if pieces >= after
            && let Some(act) = act.take()
        {
            act();
        }
    });
    assert!(act.is_none(), "the answer was over too soon: {text:?}");
    text
}

#[test]
fn a_constrained_stream_survives_its_decode_node() {
    let model = tiny_llama();
    let schema = file(&long_schema().to_string());
    let prompt = prompt(5100, 40);
    let extra = json!({"structured_outputs": {"json": long_schema()}, "temperature": 1.0, "seed": 4});
    let flags = ["--json-schema", schema.path().to_str().expect("UTF-8"), "--temperature", "1", "--seed", "4"];
    let expected = oracle(&model, &prompt, 400, &flags);
    assert_eq!(expected.ids.len(), 400, "long enough to be interrupted");
    let request = request(&prompt, 400, &extra);
    let cluster = Cluster::start(binary(), &model, &["--decode", "2"]);
    let killed = stream(&cluster.client, &request, 3, || signal(cluster.process("decode-0").pid, Kill::Kill));
    assert_eq!(killed, expected.text, "after kill -9");
    drop(cluster);
    // Nodes that join one after the other: the first decode node takes the sequence.
    let mut roles = Roles::start(binary(), &model, &[]);
    for (name, role) in [("p", "prefill"), ("a", "decode"), ("b", "decode")] {
        roles.join(name, role, &[]);
    }
    let drained = stream(&roles.client, &request, 3, || {
        let asked = roles.client.post("/v1/nodes/a/drain", &json!({})).expect("an answer");
        assert_eq!(asked.status, 202, "{asked:?}");
    });
    assert_eq!(drained, expected.text, "moved with its KV");
    assert!(roles.wait_idle().sum("ridge_router_moved_total") >= 1.0, "it moved");
    // It dies under the next one, and nobody else is left than the node that drains.
    let killed = stream(&roles.client, &request, 3, || roles.signal("b", Kill::Kill));
    assert_eq!(killed, expected.text, "where it drains");
}

#[test]
fn bad_grammars_are_refused_by_name() {
    let model = tiny_llama();
    let cluster = Cluster::start(binary(), &model, &[]);
    for (extra, param, says) in [
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}}),
            "response_format",
            "strin",
        ),
        (json!({"structured_outputs": {"regex": "(a"}}), "structured_outputs", ""),
        (json!({"structured_outputs": {"grammar": "start: nothing"}}), "structured_outputs", "nothing"),
    ] {
        let answer = cluster.client.post("/v1/completions", &request(&[300], 4, &extra)).expect("an answer");
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{extra}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(says)), "{extra}: {error}");
    }
    let mut command = Command::new(binary());
    command.args(["generate", "--prompt-ids", "300", "--regex", "(a", "--model"]).arg(&model);
    let error = fails(&mut command);
    assert!(error.contains("--regex"), "{error}");
}

#[test]
fn calls_that_are_asked_for_match_their_schemas() {
    let cluster = Cluster::start(binary(), &tiny_llama(), &[]);
    // A schema with a definition of its own, which must be found wherever the schema ends up.
    let pet = json!({"type": "object", "properties": {"pet": {"$ref": "#/$defs/pet"}}, "required": ["pet"],
        "additionalProperties": false, "$defs": {"pet": short_schema()}});
    let tools = json!([
        {"type": "function", "function": {"name": "now"}},
        {"type": "function", "function": {"name": "buy", "parameters": pet}},
    ]);
    let ask = |choice: &Value, stream: bool| {
        json!({"messages": [{"role": "user", "content": "Buy a pet."}], "tools": tools, "tool_choice": choice,
            "parallel_tool_calls": false, "temperature": 1.0, "seed": 4, "stream": stream})
    };
    let check = |call: &Value| {
        let function = &call["function"];
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().expect("text")).expect("JSON");
        match function["name"].as_str() {
            Some("now") => assert_eq!(arguments, json!({})),
            Some("buy") => check_pet(&arguments["pet"].to_string()),
            _ => panic!("{call}"),
        }
    };
    let named = json!({"type": "function", "function": {"name": "buy"}});
    for (choice, reason) in [(json!("required"), "tool_calls"), (named, "stop")] {
        let answer = cluster.client.post("/v1/chat/completions", &ask(&choice, false)).expect("an answer").ok();
        let answer = &answer["choices"][0];
        assert_eq!((&answer["finish_reason"], &answer["message"]["content"]), (&json!(reason), &Value::Null));
        let call = &answer["message"]["tool_calls"][0];
        check(call);

        let mut streamed = json!({"name": "", "arguments": ""});
        let events = cluster.client.stream("/v1/chat/completions", &ask(&choice, true)).expect("a stream");
        let add = |data: &str| {
            let event: Value = serde_json::from_str(data).unwrap_or_default();
            let part = &event["choices"][0]["delta"]["tool_calls"][0]["function"];
            for key in ["name", "arguments"] {
                let text = [&streamed[key], &part[key]].map(|text| text.as_str().unwrap_or_default()).concat();
                streamed[key] = json!(text);
            }
            true
        };
        events.for_each(add).expect("the stream ends well");
        for key in ["name", "arguments"] {
            assert_eq!(streamed[key], call["function"][key]);
        }
    }
}
