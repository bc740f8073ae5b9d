//! Streams that outlive their connection.

use crate::client::{expect, text_of};
use crate::fake::{Do, Script, Server, config, hang_after, say, script, tokens};
use reqwest::{Method, RequestBuilder, Response};
use ridge_protocol::wire::FinishReason;
use ridge_router::shell::http::{Defaults, HttpConfig, ResumeConfig};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const CHAT: &str = "/v1/chat/completions";

/// An event as it came: its id, if it had one, and its data. A comment has neither.
#[derive(Clone, PartialEq, Debug)]
struct Event {
    id: Option<String>,
    data: Value,
}

fn parse(text: &str) -> Vec<Event> {
    let text = &text[..text.rfind("\n\n").map_or(0, |end| end + 2)];
    let parse = |event: &str| {
        let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
        let data = match field("data: ") {
            None => Value::String(event.to_owned()),
            Some("[DONE]") => Value::String("[DONE]".into()),
            Some(data) => serde_json::from_str(data).unwrap(),
        };
        Event { id: field("id: ").map(str::to_owned), data }
    };
    text.split_terminator("\n\n").map(parse).collect()
}

/// A stream that its client wants to be kept for so many seconds.
async fn ask(server: &Server, grace: &str) -> Response {
    request(server, Method::POST, CHAT, "").header("X-Ridge-Resumable", grace).send().await.unwrap()
}

fn request(server: &Server, method: Method, path: &str, key: &str) -> RequestBuilder {
    let body = json!({ "stream": true, "messages": [{ "role": "user", "content": "hi" }] });
    let request = reqwest::Client::new().request(method.clone(), server.url(path)).bearer_auth(key);
    if method == Method::POST { request.json(&body) } else { request }
}

/// Goes on after event `last` of stream `id`.
async fn resume(server: &Server, id: &str, last: Option<&str>) -> Response {
    let request = request(server, Method::GET, &format!("/v1/streams/{id}"), "");
    let request = if let Some(last) = last { request.header("Last-Event-ID", last) } else { request };
    request.send().await.unwrap()
}

/// Reads until `enough` says so, and leaves the connection open.
async fn read_until(response: &mut Response, enough: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let mut text = String::new();
    loop {
        let events = parse(&text);
        if enough(&events) {
            return events;
        }
        let chunk = response.chunk().await.unwrap().unwrap_or_else(|| panic!("the stream ended: {text}"));
        text.push_str(std::str::from_utf8(&chunk).unwrap());
    }
}

async fn read_all(response: Response) -> Vec<Event> {
    assert_eq!(response.status(), 200);
    parse(&response.text().await.unwrap())
}

fn shows(text: &str) -> impl Fn(&[Event]) -> bool {
    move |events| text_of(&data(events), 0) == text
}

fn data(events: &[Event]) -> Vec<Value> {
    events.iter().map(|event| event.data.clone()).collect()
}

fn stream_id(events: &[Event]) -> String {
    events[0].data["id"].as_str().unwrap().to_owned()
}

/// Events of one stream from number `first` on, none missing and none twice.
#[track_caller]
fn check_numbers(events: &[Event], id: &str, first: usize) {
    let expected: Vec<_> = (first..first + events.len()).map(|number| Some(format!("{id}:{number}"))).collect();
    assert_eq!(events.iter().map(|event| event.id.clone()).collect::<Vec<_>>(), expected);
}

async fn metric(server: &Server, name: &str) -> u64 {
    let text = reqwest::get(server.url("/metrics")).await.unwrap().text().await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.trim().parse().unwrap()
}

/// Waits until a metric has a value.
async fn wait_metric(server: &Server, name: &str, value: u64) {
    for _ in 0..500 {
        if metric(server, name).await == value {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{name} is {}, not {value}", metric(server, name).await);
}

async fn keeping(resume: ResumeConfig, script: Script) -> Server {
    Server::with(HttpConfig { resume, ..config() }, Defaults::default(), script).await
}

/// Says "abc" and, some time later, "def".
fn two_parts(pause_ms: u64) -> Script {
    script([tokens("abc"), vec![Do::Sleep(pause_ms)], tokens("def"), vec![Do::Finish(FinishReason::Stop)]].concat())
}

#[tokio::test]
async fn events_are_numbered_for_those_who_ask() {
    let server = Server::start(say("abc")).await;
    let plain = request(&server, Method::POST, CHAT, "").send().await.unwrap();
    assert!(!plain.headers().contains_key("x-ridge-resumable"));
    assert!(!plain.text().await.unwrap().contains("id: "));

    // As long as the router allows.
    for (asked, granted) in [("30", "30"), (" 0.5 ", "0.5"), ("1e9", "60"), ("0", "0")] {
        let response = ask(&server, asked).await;
        assert_eq!(response.headers()["x-ridge-resumable"], granted);
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        let events = read_all(response).await;
        assert_eq!(text_of(&data(&events), 0), "abc");
        assert_eq!(events.last().unwrap().data, "[DONE]");
        if granted == "0" {
            assert!(events.iter().all(|event| event.id.is_none()));
        } else {
            check_numbers(&events, &stream_id(&events), 0);
        }
    }
    // An answer in one piece has nothing to resume.
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let whole = request(&server, Method::POST, CHAT, "").header("X-Ridge-Resumable", "30").json(&body);
    let whole: Value = whole.send().await.unwrap().json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "abc");
}

#[tokio::test]
async fn a_client_that_comes_back_misses_nothing() {
    let server = Server::start(two_parts(300)).await;
    let mut connection = ask(&server, "30").await;
    let seen = read_until(&mut connection, shows("abc")).await;
    let id = stream_id(&seen);
    drop(connection);
    wait_metric(&server, "ridge_streams_detached ", 1).await;
    // While it goes on, and after its end; from any event; by header and by query.
    for wait_ms in [0, 500] {
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        for last in 0..seen.len() {
            let mut all = seen[..=last].to_vec();
            all.extend(read_all(resume(&server, &id, seen[last].id.as_deref()).await).await);
            check_numbers(&all, &id, 0);
            assert_eq!(text_of(&data(&all), 0), "abcdef");
            assert_eq!(all.last().unwrap().data, "[DONE]");
        }
        let query = format!("/v1/streams/{id}?last_event_id={}", seen[1].id.as_ref().unwrap().replace(':', "%3A"));
        let rest = request(&server, Method::GET, &query, "").send().await.unwrap();
        check_numbers(&read_all(rest).await, &id, 2);
        check_numbers(&read_all(resume(&server, &id, None).await).await, &id, 0);
    }
    // There is nothing after the end, which tells a browser not to come again.
    let all = read_all(resume(&server, &id, None).await).await;
    assert_eq!(resume(&server, &id, all.last().unwrap().id.as_deref()).await.status(), 204);

    assert_eq!(metric(&server, "ridge_streams_detached ").await, 0);
    assert_eq!(metric(&server, "ridge_streams_expired_total ").await, 0);
    assert_eq!(metric(&server, "ridge_streams_resumed_total ").await, 2 * (seen.len() as u64 + 2) + 2);
    let log = server.log.lock().unwrap();
    assert_eq!((log.submitted.len(), log.finished, log.gone), (1, 1, 0), "it was generated once");
}

#[tokio::test]
async fn nobody_works_for_a_client_that_stays_away() {
    let server = Server::start(hang_after("abc")).await;
    let mut connection = ask(&server, "0.4").await;
    let seen = read_until(&mut connection, shows("abc")).await;
    // As long as it reads, its time does not run.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(metric(&server, "ridge_streams_detached ").await, 0);
    assert_eq!(server.log.lock().unwrap().gone, 0);
    drop(connection);
    wait_metric(&server, "ridge_streams_detached ", 1).await;
    server.wait_gone(1).await;
    wait_metric(&server, "ridge_streams_expired_total ", 1).await;
    assert_eq!(metric(&server, "ridge_streams_detached ").await, 0);
    let response = resume(&server, &stream_id(&seen), None).await;
    let error = json!({ "error": { "type": "invalid_request_error", "code": "stream_not_found" } });
    expect((response.status().as_u16(), response.json().await.unwrap()), 404, error);
}

#[tokio::test]
async fn a_stream_is_kept_for_its_grace_after_the_end() {
    let server = Server::start(say("abc")).await;
    let id = stream_id(&read_all(ask(&server, "0.4").await).await);
    for _ in 0..100 {
        // Coming back starts the grace anew.
        let again = resume(&server, &id, None).await;
        if again.status() == 404 {
            // The client had everything: nothing was lost.
            return assert_eq!(metric(&server, "ridge_streams_expired_total ").await, 0);
        }
        assert_eq!(text_of(&data(&read_all(again).await), 0), "abc");
        tokio::time::sleep(Duration::from_millis(450)).await;
    }
    panic!("it is kept for ever");
}

#[tokio::test]
async fn the_later_of_two_readers_has_the_stream() {
    let server = Server::start(two_parts(300)).await;
    let mut first = ask(&server, "30").await;
    let seen = read_until(&mut first, shows("abc")).await;
    let second = resume(&server, &stream_id(&seen), seen[0].id.as_deref()).await;
    let rest = read_until(&mut first, |events| !events.is_empty()).await;
    assert_eq!((rest.len(), &rest[0].id), (1, &None), "{rest:?}");
    assert_eq!(rest[0].data["error"]["code"], "stream_taken_over");
    assert_eq!(first.chunk().await.unwrap(), None, "its connection is done");
    let all = [&seen[..1], &read_all(second).await].concat();
    check_numbers(&all, &stream_id(&seen), 0);
    assert_eq!(text_of(&data(&all), 0), "abcdef");
}

#[tokio::test]
async fn a_stream_is_its_tenants_alone() {
    let config = HttpConfig { api_keys: vec!["one".into(), "two".into()], ..config() };
    let server = Server::with(config, Defaults::default(), hang_after("abc")).await;
    let ask = async |key: &str, id: &str| {
        let request = request(&server, Method::POST, CHAT, key).header("X-Ridge-Resumable", "30");
        request.header("X-Request-Id", id).send().await.unwrap()
    };
    let status = async |method: Method, key: &str, id: &str| {
        request(&server, method, &format!("/v1/streams/chatcmpl-{id}"), key).send().await.unwrap().status().as_u16()
    };
    let mut theirs = ask("one", "x").await;
    read_until(&mut theirs, shows("abc")).await;
    for method in [Method::GET, Method::DELETE] {
        assert_eq!(status(method.clone(), "two", "x").await, 404, "another's stream looks like none");
        assert_eq!(status(method.clone(), "", "x").await, 401);
    }
    // Two tenants may use the same id, one may not use it twice.
    let mut other = ask("two", "x").await;
    read_until(&mut other, shows("abc")).await;
    let again = ask("one", "x").await;
    assert_eq!(again.status(), 409);
    let error = again.json::<Value>().await.unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("GET /v1/streams/chatcmpl-x"), "{error}");
    server.wait_gone(1).await;
    assert_eq!(status(Method::DELETE, "two", "x").await, 204);
    server.wait_gone(2).await;
    assert_eq!(status(Method::GET, "one", "x").await, 200, "the namesake is untouched");
}

#[tokio::test]
async fn a_client_can_say_that_it_has_enough() {
    let server = Server::start(hang_after("abc")).await;
    for attached in [true, false] {
        let gone = server.log.lock().unwrap().gone;
        let mut connection = ask(&server, "30").await;
        let id = stream_id(&read_until(&mut connection, shows("abc")).await);
        let reader = attached.then_some(connection);
        let path = format!("/v1/streams/{id}");
        let status = async |method| request(&server, method, &path, "").send().await.unwrap().status();
        assert_eq!(status(Method::DELETE).await, 204);
        server.wait_gone(gone + 1).await;
        assert_eq!(status(Method::GET).await, 404);
        if let Some(mut reader) = reader {
            assert_eq!(reader.chunk().await.unwrap(), None);
        }
    }
    wait_metric(&server, "ridge_streams_detached ", 0).await;
    assert_eq!(metric(&server, "ridge_streams_expired_total ").await, 0);
}

#[tokio::test]
async fn only_so_many_streams_are_kept() {
    let is_first = AtomicBool::new(true);
    let (endless, short) = (hang_after("abc"), two_parts(200));
    let both: Script =
        Arc::new(move |it| if is_first.swap(false, Ordering::Relaxed) { endless(it) } else { short(it) });
    let server = keeping(ResumeConfig { max_streams: 2, ..ResumeConfig::default() }, both).await;
    let mut endless = ask(&server, "30").await;
    let waits = stream_id(&read_until(&mut endless, shows("abc")).await);
    drop(endless);
    let short = ask(&server, "30").await;
    // One more is a stream like any other.
    let third = ask(&server, "30").await;
    assert_eq!(third.headers()["x-ridge-resumable"], "0");
    let events = read_all(third).await;
    assert_eq!((text_of(&data(&events), 0), &events[0].id), ("abcdef".into(), &None));
    // The one that was read to its end makes room.
    let done = stream_id(&read_all(short).await);
    assert_eq!(ask(&server, "30").await.headers()["x-ridge-resumable"], "30");
    assert_eq!(resume(&server, &done, None).await.status(), 404);
    assert_eq!(resume(&server, &waits, None).await.status(), 200);
}

#[tokio::test]
async fn one_tenant_leaves_room_for_another() {
    let resume = ResumeConfig { max_streams: 2, ..ResumeConfig::default() };
    let config = HttpConfig { resume, api_keys: vec!["one".into(), "two".into()], ..config() };
    let server = Server::with(config, Defaults::default(), hang_after("abc")).await;
    let mut open = Vec::new();
    for (key, granted) in [("one", "30"), ("one", "0"), ("two", "30"), ("two", "0")] {
        let request = request(&server, Method::POST, CHAT, key).header("X-Ridge-Resumable", "30");
        let response = request.send().await.unwrap();
        assert_eq!(response.headers()["x-ridge-resumable"], granted, "{key}");
        open.push(response);
    }
}

#[tokio::test]
async fn what_nobody_reads_is_bounded() {
    let resume_config = ResumeConfig { max_bytes: 3000, ..ResumeConfig::default() };
    let flood = "x".repeat(50);
    let endless = [tokens("abc"), vec![Do::Sleep(300)], tokens(&flood), vec![Do::Hang]];
    let server = keeping(resume_config, script(endless.concat())).await;
    let mut connection = ask(&server, "30").await;
    let seen = read_until(&mut connection, shows("abc")).await;
    drop(connection);
    server.wait_gone(1).await;
    let rest = read_all(resume(&server, &stream_id(&seen), seen.last().unwrap().id.as_deref()).await).await;
    // What there was, and then why there is no more.
    check_numbers(&rest, &stream_id(&seen), seen.len());
    let (last, before) = rest.split_last().unwrap();
    assert_eq!(last.data["error"]["code"], "stream_not_read");
    assert!(!before.is_empty() && flood.starts_with(&text_of(&data(before), 0)));
}

#[tokio::test]
async fn what_was_read_makes_room() {
    let resume_config = ResumeConfig { max_bytes: 6000, ..ResumeConfig::default() };
    // Slowly enough to be read as it comes.
    let steady = (0..60).flat_map(|_| [tokens("x"), vec![Do::Sleep(5)]]).flatten();
    let server = keeping(resume_config, script(steady.chain([Do::Finish(FinishReason::Stop)]).collect())).await;
    let events = read_all(ask(&server, "30").await).await;
    assert_eq!((text_of(&data(&events), 0), &events.last().unwrap().data), ("x".repeat(60), &json!("[DONE]")));
    let id = stream_id(&events);
    let from_start = resume(&server, &id, None).await;
    let error = json!({ "error": { "code": "event_gone" } });
    expect((from_start.status().as_u16(), from_start.json().await.unwrap()), 410, error);
    let rest = read_all(resume(&server, &id, events[events.len() - 4].id.as_deref()).await).await;
    assert_eq!(rest, events[events.len() - 3..]);
}

#[tokio::test]
async fn silence_before_the_first_token_is_commented_on() {
    let config = HttpConfig { keep_alive: Duration::from_millis(40), ..config() };
    let slow = [vec![Do::Sleep(200)], tokens("a"), vec![Do::Sleep(200), Do::Finish(FinishReason::Stop)]];
    let server = Server::with(config, Defaults::default(), script(slow.concat())).await;
    let events = read_all(ask(&server, "30").await).await;
    let comments = events.iter().filter(|event| event.data == ": keep-alive").count();
    assert!(comments > 0, "{events:?}");
    check_numbers(&events[comments..], &stream_id(&events[comments..]), 0);
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let server = Server::start(say("abc")).await;
    for bad in ["soon", "-1", "nan", ""] {
        let response = ask(&server, bad).await;
        let error = json!({ "error": { "param": "x-ridge-resumable" } });
        expect((response.status().as_u16(), response.json().await.unwrap()), 400, error);
    }
    assert!(server.log.lock().unwrap().submitted.is_empty(), "nothing was computed");
    let events = read_all(ask(&server, "30").await).await;
    let id = stream_id(&events);
    let beyond = format!("{id}:{}", events.len());
    for last in ["7", "other:1", &format!("{id}:"), &format!("{id}:x"), &beyond, &format!("{id}:{}", u64::MAX)] {
        let response = resume(&server, &id, Some(last)).await;
        let error = json!({ "error": { "param": "Last-Event-ID" } });
        expect((response.status().as_u16(), response.json().await.unwrap()), 400, error);
    }
}
