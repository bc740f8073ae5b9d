//! Clients that leave, and servers that do.

use crate::client::{events, text_of};
use crate::fake::{Do, Server, config, hang_after, script, tokens};
use ridge_protocol::wire::FinishReason;
use ridge_router::shell::http::{Defaults, HttpConfig};
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Sends a chat request over a connection of its own.
async fn ask(server: &Server, stream: bool, n: u32) -> TcpStream {
    let body = json!({ "stream": stream, "n": n, "messages": [{ "role": "user", "content": "hi" }] }).to_string();
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut connection = TcpStream::connect(server.addr).await.unwrap();
    connection.write_all((head + &body).as_bytes()).await.unwrap();
    connection
}

#[tokio::test]
async fn a_client_that_leaves_is_forgotten_before_the_first_token() {
    let server = Server::start(script(vec![Do::Hang])).await;
    for (count, stream) in [(2, false), (4, true)] {
        let connection = ask(&server, stream, 2).await;
        server.wait_submitted(count).await;
        assert_eq!(server.log.lock().unwrap().gone, count - 2);
        drop(connection);
        server.wait_gone(count).await;
    }
    let text = reqwest::get(server.url("/metrics")).await.unwrap().text().await.unwrap();
    assert!(text.contains("ridge_http_requests_total{path=\"/v1/chat/completions\",status=\"499\"} 2"), "{text}");
}

#[tokio::test]
async fn a_client_that_leaves_is_forgotten_in_mid_answer() {
    let server = Server::start(hang_after("abc")).await;
    let connection = ask(&server, false, 1).await;
    server.wait_submitted(1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(server.log.lock().unwrap().gone, 0);
    drop(connection);
    server.wait_gone(1).await;

    let mut connection = ask(&server, true, 1).await;
    let mut seen = Vec::new();
    while !seen.ends_with(b"}\n\n\r\n") {
        connection.read_buf(&mut seen).await.unwrap();
        if String::from_utf8_lossy(&seen).contains("\"content\":\"c\"") {
            break;
        }
    }
    assert_eq!(server.log.lock().unwrap().gone, 1);
    drop(connection);
    server.wait_gone(2).await;
}

#[tokio::test]
async fn shutdown_lets_answers_finish() {
    let slow = [tokens("a"), vec![Do::Sleep(300)], tokens("b"), vec![Do::Finish(FinishReason::Stop)]];
    let mut server = Server::start(script(slow.concat())).await;
    let url = server.url("/v1/chat/completions");
    let body = json!({ "stream": true, "messages": [{ "role": "user", "content": "hi" }] });
    let response = reqwest::Client::new().post(&url).json(&body).send().await.unwrap();
    server.stop.take().unwrap().send(()).unwrap();
    let answer = events(&response.text().await.unwrap());
    assert_eq!(text_of(&answer, 0), "ab");
    assert_eq!(*answer.last().unwrap(), "[DONE]");
    (&mut server.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(server.addr).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn shutdown_ends_what_outlives_the_deadline() {
    let config = HttpConfig { drain_deadline: Duration::from_millis(200), ..config() };
    let mut server = Server::with(config, Defaults::default(), hang_after("a")).await;
    let url = server.url("/v1/chat/completions");
    let body = |stream: bool| json!({ "stream": stream, "messages": [{ "role": "user", "content": "hi" }] });
    let whole = reqwest::Client::new().post(&url).json(&body(false)).send();
    let whole = tokio::spawn(whole);
    let streaming = reqwest::Client::new().post(&url).json(&body(true)).send().await.unwrap();
    server.wait_submitted(2).await;
    let idle = TcpStream::connect(server.addr).await.unwrap();
    server.stop.take().unwrap().send(()).unwrap();
    let answer = events(&streaming.text().await.unwrap());
    assert_eq!(text_of(&answer, 0), "a");
    assert_eq!(answer.last().unwrap()["error"]["code"], "shutting_down");
    assert_eq!(whole.await.unwrap().unwrap().status(), 503);
    tokio::time::timeout(Duration::from_secs(5), &mut server.task).await.expect("serve returns").unwrap().unwrap();
    server.wait_gone(2).await;
    drop(idle);
}
