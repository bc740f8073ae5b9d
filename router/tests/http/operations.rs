//! Everything around the answers: models, health, metrics, keys, errors, tokenizing.

use crate::client::{expect, get, post};
use crate::fake::{Server, config, say};
use ridge_router::shell::gateway::{ClusterView, Health};
use ridge_router::shell::http::{Defaults, HttpConfig};
use serde_json::{Value, json};
use std::sync::Arc;

#[tokio::test]
async fn models_are_listed_by_every_name() {
    let server = Server::start(say("x")).await;
    let model =
        |id: &str| json!({ "id": id, "object": "model", "owned_by": "ridge", "max_model_len": 64, "root": "org/fake" });
    let both = json!({ "object": "list", "data": [model("org/fake"), model("alias")] });
    expect(get(&server, "/v1/models").await, 200, both);
    expect(get(&server, "/v1/models/org/fake").await, 200, model("org/fake"));
    expect(get(&server, "/v1/models/org%2Ffake").await, 200, model("org/fake"));
    let error = json!({ "error": { "type": "invalid_request_error", "param": "model", "code": "model_not_found" } });
    expect(get(&server, "/v1/models/other").await, 404, error.clone());
    let body = json!({ "model": "other", "prompt": "p" });
    expect(post(&server, "/v1/completions", &body).await, 404, error);
}

#[tokio::test]
async fn health_follows_the_cluster() {
    let server = Server::start(say("x")).await;
    expect(get(&server, "/health").await, 200, json!({ "status": "ready" }));
    let becomes = |health| server.view.send_replace(Arc::new(ClusterView { health, ..ClusterView::default() }));
    let metrics = async || reqwest::get(server.url("/metrics")).await.unwrap().text().await.unwrap();
    becomes(Health::Degraded("no prefill node".into()));
    expect(get(&server, "/health").await, 200, json!({ "status": "degraded", "reason": "no prefill node" }));
    assert!(metrics().await.contains("\nridge_ready 1\n") && metrics().await.contains("\nridge_degraded 1\n"));
    becomes(Health::Unavailable("no decode node".into()));
    expect(get(&server, "/health").await, 503, json!({ "status": "unavailable", "reason": "no decode node" }));
    assert!(metrics().await.contains("\nridge_ready 0\n") && metrics().await.contains("\nridge_degraded 0\n"));
    expect(get(&server, "/live").await, 200, json!({ "status": "live" }));
    expect(get(&server, "/version").await, 200, json!({ "version": "9.9" }));
}

#[tokio::test]
async fn every_error_has_the_envelope() {
    let server = Server::start(say("x")).await;
    let client = reqwest::Client::new();
    let check = async |request: reqwest::RequestBuilder, status: u16, words: &str| {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status);
        let body: Value = response.json().await.unwrap();
        assert!(body["error"]["message"].as_str().unwrap().contains(words), "{body}");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert!(body["error"].get("param").is_some() && body["error"].get("code").is_some());
    };
    let chat = server.url("/v1/chat/completions");
    check(client.get(server.url("/v2/nothing")), 404, "/v2/nothing").await;
    check(client.get(&chat), 405, "GET").await;
    check(client.post(server.url("/health")), 405, "POST").await;
    check(client.post(&chat).body("{\n  \"messages\": [,]\n}"), 400, "line 2 column 16").await;
    check(client.post(&chat).body("[]"), 400, "JSON object").await;
    check(client.post(&chat).body(""), 400, "could not parse").await;
    check(client.post(&chat).body(vec![b' '; 100_001]), 413, "100000 bytes").await;
}

#[tokio::test]
async fn a_bug_of_ours_fails_one_request_only() {
    let server = Server::start(say("x")).await;
    let error = json!({ "error": { "type": "server_error", "code": "internal_error" } });
    for length in [1, 10_000] {
        let body = json!({ "prompt": "\u{1}".repeat(length) });
        expect(post(&server, "/v1/completions", &body).await, 500, error.clone());
    }
    expect(post(&server, "/v1/completions", &json!({ "prompt": "p" })).await, 200, json!({}));
}

#[tokio::test]
async fn keys_guard_everything_but_health() {
    let config = HttpConfig { api_keys: vec!["sk-one".into(), "sk-two".into()], ..config() };
    let server = Server::with(config.clone(), Defaults::default(), say("x")).await;
    let client = reqwest::Client::new();
    let status = async |server: &Server, path: &str, key: Option<&str>| {
        let request = client.get(server.url(path));
        let request = if let Some(key) = key { request.bearer_auth(key) } else { request };
        let response = request.send().await.unwrap();
        if response.status() == 401 {
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
        }
        response.status().as_u16()
    };
    for path in ["/v1/models", "/version", "/nothing", "/v1/chat/completions"] {
        assert_eq!(status(&server, path, None).await, 401, "{path}");
        assert_eq!(status(&server, path, Some("sk-three")).await, 401, "{path}");
        assert_ne!(status(&server, path, Some("sk-two")).await, 401, "{path}");
    }
    for path in ["/health", "/live", "/metrics"] {
        assert_eq!(status(&server, path, None).await, 200, "{path}");
    }
    let error = json!({ "error": { "type": "invalid_request_error", "param": null, "code": "invalid_api_key" } });
    expect(post(&server, "/v1/completions", &json!({})).await, 401, error);
    let guarded = HttpConfig { guard_metrics: true, ..config };
    let server = Server::with(guarded, Defaults::default(), say("x")).await;
    assert_eq!(status(&server, "/metrics", None).await, 401);
    assert_eq!(status(&server, "/metrics", Some("sk-one")).await, 200);
}

#[tokio::test]
async fn tenants_share_no_prefixes() {
    let config = HttpConfig { api_keys: vec!["one".into(), "two".into()], ..config() };
    let server = Server::with(config, Defaults::default(), say("x")).await;
    for (key, salt) in [("one", None), ("two", None), ("one", None), ("one", Some("s")), ("two", Some("s"))] {
        let body = json!({ "prompt": "p", "cache_salt": salt });
        let request = reqwest::Client::new().post(server.url("/v1/completions")).bearer_auth(key).json(&body);
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    let salts: Vec<u64> = server.log.lock().unwrap().submitted.iter().map(|submit| submit.salt).collect();
    assert_eq!(salts[0], salts[2]);
    let different: std::collections::BTreeSet<u64> = salts.into_iter().collect();
    assert_eq!(different.len(), 4);
}

#[tokio::test]
async fn request_ids_are_echoed_or_drawn() {
    let server = Server::start(say("x")).await;
    let check = async |given: Option<&str>, echoed: bool| {
        let request = reqwest::Client::new().post(server.url("/v1/completions")).json(&json!({ "prompt": "p" }));
        let request = if let Some(id) = given { request.header("X-Request-Id", id) } else { request };
        let response = request.send().await.unwrap();
        let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["id"], format!("cmpl-{id}"));
        assert_eq!(given == Some(id.as_str()), echoed);
    };
    check(Some("my-id.7"), true).await;
    check(None, false).await;
    check(Some("with space"), false).await;
    check(Some(&"x".repeat(129)), false).await;
}

#[tokio::test]
async fn other_sites_are_let_in_by_flag_only() {
    for allowed in [false, true] {
        let config = HttpConfig { cors_any_origin: allowed, api_keys: vec!["k".into()], ..config() };
        let server = Server::with(config, Defaults::default(), say("x")).await;
        let request = reqwest::Client::new()
            .request(reqwest::Method::OPTIONS, server.url("/v1/chat/completions"))
            .header("Origin", "https://example.org")
            .header("Access-Control-Request-Method", "POST");
        let response = request.send().await.unwrap();
        assert_eq!(response.headers().contains_key("access-control-allow-origin"), allowed);
        assert_eq!(response.status() == 200, allowed);
    }
}

#[tokio::test]
async fn text_is_tokenized_and_back() {
    let server = Server::start(say("x")).await;
    let path = "/tokenize";
    let body = json!({ "prompt": "hé" });
    let expected = json!({ "count": 4, "max_model_len": 64, "tokens": [257, 104, 195, 169], "token_strs": null });
    expect(post(&server, path, &body).await, 200, expected);
    let body = json!({ "prompt": "hi", "add_special_tokens": false, "return_token_strs": true });
    expect(post(&server, path, &body).await, 200, json!({ "tokens": [104, 105], "token_strs": ["h", "i"] }));
    let body = json!({ "messages": [{ "role": "user", "content": "" }] });
    expect(post(&server, path, &body).await, 200, json!({ "tokens": [117, 58, 124, 97, 58] }));
    expect(post(&server, path, &json!({})).await, 400, json!({ "error": { "param": "prompt" } }));
    let path = "/detokenize";
    expect(post(&server, path, &json!({ "tokens": [257, 104, 195, 169] })).await, 200, json!({ "prompt": "<bos>hé" }));
    expect(post(&server, path, &json!({ "tokens": [999] })).await, 400, json!({ "error": { "param": "tokens" } }));
}

#[tokio::test]
async fn metrics_show_nodes_router_and_latencies() {
    let server = Server::start(say("abc")).await;
    post(&server, "/v1/completions", &json!({ "prompt": "p", "n": 2 })).await;
    get(&server, "/made/up").await;
    let response = reqwest::get(server.url("/metrics")).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let text = response.text().await.unwrap();
    for line in [
        "# TYPE ridge_kv_blocks_free gauge",
        "ridge_kv_blocks_free{node=\"decode-0\",role=\"decode\"} 4",
        "ridge_kv_blocks_total{node=\"prefill-0\",role=\"prefill\"} 10",
        "ridge_kv_orphaned_blocks{node=\"decode-0\",role=\"decode\"} 0",
        "ridge_device_power_watts{node=\"prefill-0\",role=\"prefill\"} 321.5",
        "ridge_device_busy_ratio{node=\"prefill-0\",role=\"prefill\"} 0.97",
        "ridge_device_clock_hertz{node=\"prefill-0\",role=\"prefill\"} 1980000000",
        "ridge_kv_link_rtt_seconds{node=\"prefill-0\",peer=\"decode-0\"} 0.00025",
        "ridge_kv_link_bytes_per_second{node=\"prefill-0\",peer=\"decode-0\"} 1000000000",
        "ridge_kv_link_packets_lost_total{node=\"prefill-0\",peer=\"decode-0\"} 2",
        "# TYPE ridge_kv_transfer_bytes_total counter",
        "ridge_kv_transfer_bytes_total{node=\"decode-0\",role=\"decode\",direction=\"in\"} 77",
        "ridge_kv_transfer_bytes_total{node=\"prefill-0\",role=\"prefill\",direction=\"out\"} 77",
        "ridge_engine_busy_seconds_total{node=\"decode-0\",role=\"decode\"} 1.5",
        "ridge_router_requests_total{outcome=\"finished\"} 5",
        "ridge_protocol_errors_total{node=\"decode-0\",role=\"decode\",kind=\"page\"} 2",
        "ridge_protocol_errors_total{node=\"router\",role=\"router\",kind=\"control\"} 3",
        "ridge_http_requests_total{path=\"/v1/completions\",status=\"200\"} 1",
        "ridge_http_requests_total{path=\"unknown\",status=\"404\"} 1",
        "ridge_build_info{version=\"9.9\"} 1",
        "# TYPE ridge_time_to_first_token_seconds histogram",
        "ridge_time_to_first_token_seconds_count 2",
        "ridge_time_to_first_token_seconds_bucket{le=\"+Inf\"} 2",
        "ridge_inter_token_latency_seconds_count 6",
        "ridge_e2e_request_latency_seconds_count 1",
    ] {
        assert!(text.lines().any(|found| found == line), "no line {line} in\n{text}");
    }
    // Every sample belongs to a family that was announced.
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
        let announced = |name: &str| text.contains(&format!("# TYPE {name} "));
        assert!(announced(family) || announced(name), "{line}");
    }
}
