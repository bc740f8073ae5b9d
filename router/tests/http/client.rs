//! Asking, and comparing answers with what was expected.

use crate::fake::Server;
use serde_json::Value;

/// Posts and returns status and JSON.
pub async fn post(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let response = reqwest::Client::new().post(server.url(path)).json(body).send().await.unwrap();
    let status = response.status().as_u16();
    (status, response.json().await.unwrap())
}

pub async fn get(server: &Server, path: &str) -> (u16, Value) {
    let response = reqwest::get(server.url(path)).await.unwrap();
    let status = response.status().as_u16();
    (status, response.json().await.unwrap())
}

/// Posts `body` and expects status and JSON; keys that `expected` does not mention may have any value.
#[track_caller]
pub fn expect(actual: (u16, Value), status: u16, expected: Value) {
    assert_eq!(actual.0, status, "{}", actual.1);
    assert!(covers(&actual.1, &expected), "\n  actual {}\nexpected {expected}", actual.1);
}

/// Whether `actual` has everything that `expected` has.
pub fn covers(actual: &Value, expected: &Value) -> bool {
    match (actual, expected) {
        (Value::Object(actual), Value::Object(expected)) => {
            expected.iter().all(|(key, value)| actual.get(key).is_some_and(|actual| covers(actual, value)))
        }
        (Value::Array(actual), Value::Array(expected)) => {
            actual.len() == expected.len() && actual.iter().zip(expected).all(|(actual, value)| covers(actual, value))
        }
        _ => actual == expected,
    }
}

/// Posts and returns the events of the stream; comments are returned as strings.
pub async fn stream(server: &Server, path: &str, body: &Value) -> Vec<Value> {
    let response = reqwest::Client::new().post(server.url(path)).json(body).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    events(&response.text().await.unwrap())
}

pub fn events(text: &str) -> Vec<Value> {
    let events = text.strip_suffix("\n\n").expect("the last event is complete").split("\n\n");
    let parse = |event: &str| match event.strip_prefix("data: ") {
        Some("[DONE]") => Value::String("[DONE]".into()),
        Some(data) => serde_json::from_str(data).unwrap(),
        None => Value::String(event.to_owned()),
    };
    events.map(parse).collect()
}

/// The text of one choice of a stream.
pub fn text_of(events: &[Value], index: u64) -> String {
    let choices = events.iter().filter_map(|event| event["choices"].as_array()).flatten();
    let mine = choices.filter(|choice| choice["index"] == index);
    mine.filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str())).collect()
}
