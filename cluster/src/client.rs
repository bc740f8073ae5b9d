//! A client of any OpenAI-compatible server: its models, its token ids, and streamed completions.
//!
//! It opens a connection per request, goes through no proxy, and never waits longer than one timeout per request.
//!
//! How tokens are counted. An event that brings a token is an *arrival*; two arrivals make one inter-token latency.
//! How many tokens came so far is what the server says, in this order: `usage.completion_tokens` of the event (vLLM and
//! Ridge, asked for with `continuous_usage_stats`), `timings.predicted_n` (llama.cpp, asked for with `timings_per_token`),
//! else one per event with text. So a server that sends several tokens at once, or holds half a character back, has
//! fewer arrivals than tokens: what a reader waits for is counted, not what could be inferred.
//! Read [`Client`] and [`Meter`].

use anyhow::{Context, anyhow, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

/// A server that does not accept a connection by then is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest line of an event stream.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// Longest answer that is not a stream.
const BODY_BYTES_MAX: u64 = 16 << 20;
/// What is shown of an error's body.
const ERROR_CHARS_MAX: usize = 500;

/// Talks to one server.
#[derive(Debug)]
pub struct Client {
    agent: Agent,
    base: String,
    key: Option<String>,
    timeout: Duration,
}

/// A model as `/v1/models` lists it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedModel {
    /// Its name.
    pub name: String,
    /// Longest prompt plus answer in tokens, if the server says so.
    pub max_model_len: Option<usize>,
}

/// What came of a completion.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Answer {
    /// Tokens that came.
    pub tokens: u64,
    /// Tokens of the prompt, if the server said so.
    pub prompt_tokens: Option<u64>,
}

impl Client {
    /// For the server at `url`, each request of which may take `timeout`.
    pub fn new(url: &str, key: Option<&str>, timeout: Duration) -> anyhow::Result<Self> {
        let base = base_of(url).map_err(|why| anyhow!("--url {url}: {why}"))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ureq::tls::TlsConfig::builder().unversioned_rustls_crypto_provider(provider).build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .proxy(None)
            .http_status_as_error(false)
            .timeout_connect(Some(timeout.min(CONNECT_TIMEOUT)))
            .timeout_global(Some(timeout))
            // A server may close an idle connection just when the next request goes out on it.
            .max_idle_connections(0)
            .user_agent(concat!("ridge-bench/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Ok(Self { agent, base, key: key.map(str::to_owned), timeout })
    }

    /// The server's address, without `/v1`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The body of an answer to `GET path`, whatever its status.
    pub fn text(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let mut response = self.agent.get(self.url(path)).call().map_err(|error| self.error("GET", path, error))?;
        let text = response.body_mut().with_config().limit(BODY_BYTES_MAX).read_to_string();
        Ok((response.status().as_u16(), text.map_err(|error| self.error("GET", path, error))?))
    }

    /// Streams the answer to `body`, event by event, for at most `within`: then the client hangs up, wherever it is.
    pub fn stream(
        &self,
        path: &str,
        body: &Value,
        within: Duration,
        on_event: &mut dyn FnMut(Value, Instant) -> anyhow::Result<ControlFlow<()>>,
    ) -> anyhow::Result<End> {
        let request = self.agent.post(self.url(path)).config().timeout_global(Some(within)).build();
        let ended = match request.header("Content-Type", "application/json").send(body.to_string()) {
            Ok(response) if response.status() != 200 => return Err(self.refused("POST", path, response)),
            Ok(response) => {
                let reader = BufReader::new(response.into_body().into_reader());
                read_events(reader, |event| on_event(event, Instant::now()))
            }
            Err(error) => Err(Broken::Transport(error)),
        };
        match ended {
            Ok(end) => Ok(end),
            Err(Broken::Transport(error)) if is_timeout(&error) => Ok(End::Timeout),
            Err(Broken::Transport(error)) => Err(anyhow!("{}: POST {path}: {}", self.base, self.describe(error))),
            Err(Broken::Content(why)) => Err(why.context(format!("{}: POST {path}", self.base))),
        }
    }

    /// What the server serves.
    pub fn models(&self) -> anyhow::Result<Vec<ListedModel>> {
        let listed = self.get_json("/v1/models")?;
        let models = listed["data"].as_array().into_iter().flatten().filter_map(|model| {
            let max_model_len = model["max_model_len"].as_u64().and_then(|len| usize::try_from(len).ok());
            Some(ListedModel { name: model["id"].as_str()?.to_owned(), max_model_len })
        });
        Ok(models.collect())
    }

    /// The token ids of `text`, from `/tokenize` as vLLM, Ridge (`prompt`) and llama.cpp (`content`) have it.
    pub fn tokenize(&self, model: &str, text: &str) -> anyhow::Result<Vec<u32>> {
        const PATH: &str = "/tokenize";
        let body = json!({"model": model, "prompt": text, "content": text, "add_special_tokens": false});
        let answer = self.post_json(PATH, &body)?;
        let ids = answer["tokens"].as_array().into_iter().flatten().map(|id| u32::try_from(id.as_u64()?).ok());
        let ids: Option<Vec<u32>> = ids.collect();
        ids.filter(|ids| !ids.is_empty()).with_context(|| format!("{}: POST {PATH} answered no token ids", self.base))
    }

    /// Streams a greedy completion of `max_tokens` tokens; end-of-text tokens do not end it. `on_arrival` is told when
    /// tokens come, and may hang up.
    pub fn complete(
        &self,
        model: &str,
        prompt: &Value,
        max_tokens: usize,
        on_arrival: &mut dyn FnMut(Instant) -> ControlFlow<()>,
    ) -> anyhow::Result<Answer> {
        const PATH: &str = "/v1/completions";
        let body = json!({
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true},
            "timings_per_token": true, "skip_special_tokens": false,
        });
        let response = self.post(PATH, &body)?;
        if response.status() != 200 {
            return Err(self.refused("POST", PATH, response));
        }
        let kind = response.body().mime_type().unwrap_or("nothing").to_owned();
        ensure!(kind == "text/event-stream", "{}: POST {PATH} answered {kind} instead of an event stream", self.base);
        let mut meter = Meter::default();
        let ended = read_events(BufReader::new(response.into_body().into_reader()), |event| {
            let now = Instant::now();
            Ok(if meter.on_event(&event)? { on_arrival(now) } else { ControlFlow::Continue(()) })
        });
        let why = match ended {
            Ok(End::HungUp | End::Done) => return Ok(meter.answer),
            Ok(End::Closed) if meter.finished => return Ok(meter.answer),
            Ok(End::Closed | End::Timeout) => anyhow!("the server closed the stream in the middle of the answer"),
            Err(Broken::Transport(error)) => anyhow!(self.describe(error)),
            Err(Broken::Content(why)) => why,
        };
        let tokens = meter.answer.tokens;
        bail!("{}: the stream of POST {PATH} broke after {tokens} tokens: {why:#}", self.base)
    }

    /// What a path answers, if it answers 200 and JSON.
    pub fn get_json(&self, path: &str) -> anyhow::Result<Value> {
        let request = self.agent.get(self.url(path));
        let request = match &self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        };
        let response = request.call().map_err(|error| self.error("GET", path, error))?;
        self.json("GET", path, response)
    }

    /// What a path answers to a body, if it answers success and JSON.
    pub fn post_json(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let response = self.post(path, body)?;
        self.json("POST", path, response)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    fn post(&self, path: &str, body: &Value) -> anyhow::Result<Response<Body>> {
        let request = self.agent.post(self.url(path)).header("Content-Type", "application/json");
        let request = match &self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        };
        request.send(body.to_string()).map_err(|error| self.error("POST", path, error))
    }

    fn json(&self, method: &str, path: &str, mut response: Response<Body>) -> anyhow::Result<Value> {
        if !response.status().is_success() {
            return Err(self.refused(method, path, response));
        }
        let text = response.body_mut().with_config().limit(BODY_BYTES_MAX).read_to_string();
        let text = text.map_err(|error| self.error(method, path, error))?;
        serde_json::from_str(&text).with_context(|| format!("{}: {method} {path} did not answer JSON", self.base))
    }

    fn refused(&self, method: &str, path: &str, mut response: Response<Body>) -> anyhow::Error {
        let status = response.status();
        let body = response.body_mut().with_config().limit(BODY_BYTES_MAX).lossy_utf8(true).read_to_string();
        let body = body.unwrap_or_else(|error| format!("(its body cannot be read: {error})"));
        let message = match serde_json::from_str::<Value>(&body) {
            Ok(body) => error_message(&body).unwrap_or_else(|| body.to_string()),
            Err(_) => body.trim().to_owned(),
        };
        let hint = if matches!(status.as_u16(), 401 | 403) { " (--api-key)" } else { "" };
        anyhow!("{}: {method} {path} answered HTTP {status}{hint}: {}", self.base, cut(&message))
    }

    fn error(&self, method: &str, path: &str, error: ureq::Error) -> anyhow::Error {
        anyhow!("{}: {method} {path}: {}", self.base, self.describe(error))
    }

    fn describe(&self, error: ureq::Error) -> String {
        match error {
            ureq::Error::Timeout(ureq::Timeout::Connect) => {
                format!("no connection within {} s", self.timeout.min(CONNECT_TIMEOUT).as_secs_f64())
            }
            ureq::Error::Timeout(_) => {
                format!("no complete answer within {} s (--timeout)", self.timeout.as_secs_f64())
            }
            ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                "nothing listens there: connection refused".into()
            }
            ureq::Error::HostNotFound => "there is no such host".into(),
            error => error.to_string(),
        }
    }
}

/// The server's address without `/v1` and without a slash at its end.
fn base_of(url: &str) -> Result<String, String> {
    let uri: Uri = url.parse().map_err(|error| format!("is not a URL: {error}"))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err("is not a URL such as http://127.0.0.1:8000".into());
    };
    if !["http", "https"].contains(&scheme) {
        return Err(format!("{scheme} is not supported, http and https are"));
    }
    if authority.as_str().contains('@') {
        return Err("must not hold a password; keys are passed in RIDGE_API_KEY".into());
    }
    if uri.query().is_some() {
        return Err("must not hold a query".into());
    }
    let path = uri.path().trim_end_matches('/');
    Ok(format!("{scheme}://{authority}{}", path.strip_suffix("/v1").unwrap_or(path)))
}

/// Counts the tokens of a stream.
#[derive(Debug, Default)]
struct Meter {
    answer: Answer,
    /// The server said why it stopped.
    finished: bool,
}

impl Meter {
    /// Takes an event; true if tokens arrived with it.
    fn on_event(&mut self, event: &Value) -> anyhow::Result<bool> {
        if let Some(message) = error_message(event) {
            bail!("the server reports: {}", cut(&message));
        }
        let number = |part: &Value| part.as_u64();
        let usage = &event["usage"];
        self.answer.prompt_tokens = number(&usage["prompt_tokens"]).or(self.answer.prompt_tokens);
        let choice = &event["choices"][0];
        self.finished |= choice["finish_reason"].is_string();
        let text = choice["text"].as_str().is_some_and(|text| !text.is_empty());
        let counted = number(&usage["completion_tokens"]).or_else(|| number(&event["timings"]["predicted_n"]));
        let before = self.answer.tokens;
        self.answer.tokens = counted.unwrap_or(before + u64::from(text)).max(before);
        // The totals at the end come without a choice: they may correct the count, but nothing arrives with them.
        Ok(choice.is_object() && self.answer.tokens > before)
    }
}

/// The message of OpenAI's error envelope, or of what resembles it.
pub fn error_message(body: &Value) -> Option<String> {
    let error = body.get("error").filter(|error| !error.is_null())?;
    let message = error["message"].as_str().or(error.as_str()).map(str::to_owned);
    Some(message.unwrap_or_else(|| error.to_string()))
}

fn cut(text: &str) -> String {
    if text.chars().count() <= ERROR_CHARS_MAX {
        return text.to_owned();
    }
    text.chars().take(ERROR_CHARS_MAX).chain("…".chars()).collect()
}

/// The client ran out of time, before the answer began or in the middle of it.
fn is_timeout(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Timeout(_) => true,
        // A body's reader wraps it.
        ureq::Error::Io(error) => error.kind() == std::io::ErrorKind::TimedOut,
        _ => false,
    }
}

/// How a stream ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// With `[DONE]`.
    Done,
    /// Without it.
    Closed,
    /// We hung up.
    HungUp,
    /// Our time was over. Only [`Client::stream`] tells this from a failure.
    Timeout,
}

/// Why a stream could not be read to its end.
#[derive(Debug)]
enum Broken {
    Transport(ureq::Error),
    Content(anyhow::Error),
}

/// Reads server-sent events, the data of each of which is a line of JSON.
fn read_events(
    mut reader: impl BufRead,
    mut on_event: impl FnMut(Value) -> anyhow::Result<ControlFlow<()>>,
) -> Result<End, Broken> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        if read.map_err(|error| Broken::Transport(error.into()))? == 0 {
            return Ok(End::Closed);
        }
        if line.last() != Some(&b'\n') && line.len() as u64 == LINE_BYTES_MAX {
            return Err(Broken::Content(anyhow!("a line is longer than {LINE_BYTES_MAX} bytes")));
        }
        let text = line.trim_ascii();
        let data = match text.strip_prefix(b"data:") {
            Some(data) => data.trim_ascii(),
            None => match text.strip_prefix(b"error:") {
                Some(error) => {
                    let error = String::from_utf8_lossy(error.trim_ascii());
                    return Err(Broken::Content(anyhow!("the server reports: {}", cut(&error))));
                }
                None => continue,
            },
        };
        if data == b"[DONE]" {
            return Ok(End::Done);
        }
        let event = serde_json::from_slice(data);
        let event = event.map_err(|error| anyhow!("an event is not JSON: {error}")).map_err(Broken::Content)?;
        if on_event(event).map_err(Broken::Content)?.is_break() {
            return Ok(End::HungUp);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn urls() {
        let check = |url: &str, want: Option<&str>| assert_eq!(base_of(url).ok().as_deref(), want, "{url}");
        check("http://127.0.0.1:8000", Some("http://127.0.0.1:8000"));
        check("http://localhost:8000/v1/", Some("http://localhost:8000"));
        check("https://example.org/llm/v1", Some("https://example.org/llm"));
        check("http://[::1]:8000/", Some("http://[::1]:8000"));
        for bad in ["127.0.0.1:8000", "localhost", "", "http://", "ftp://a/", "http://a:b@c/", "http://a/?x=1", "/v1"] {
            check(bad, None);
        }
    }

    /// Tokens and arrivals of a stream of events.
    fn metered(events: &[Value]) -> (u64, usize) {
        let mut meter = Meter::default();
        let arrivals = events.iter().filter(|event| meter.on_event(event).expect("no error")).count();
        (meter.answer.tokens, arrivals)
    }

    #[test]
    fn tokens_are_what_the_server_counts_and_else_events_with_text() {
        let plain = |text: &str| json!({"choices": [{"text": text, "finish_reason": null}]});
        assert_eq!(metered(&[plain("a"), plain(""), plain("b")]), (2, 2));
        let usage = |text: &str, tokens: u64| json!({"choices": [{"text": text}], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}});
        assert_eq!(metered(&[usage("", 0), usage("a", 1), usage("bc", 3), usage("", 4), usage("d", 4)]), (4, 3));
        let timed = |tokens: u64| json!({"choices": [{"text": ""}], "timings": {"predicted_n": tokens}});
        assert_eq!(metered(&[timed(1), timed(2)]), (2, 2));
        let total = json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}});
        assert_eq!(metered(&[plain("a"), plain("b"), total]), (4, 2));
        let null = json!({"choices": [{"text": "a"}], "usage": null});
        assert_eq!(metered(&[null]), (1, 1));
    }

    /// A server that gives every client the same answer, and a client of it.
    fn server(answer: &'static str, timeout: Duration) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/v1", listener.local_addr().expect("is bound"));
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("a client");
            let _ = socket.read(&mut [0; 8192]);
            let _ = socket.write_all(answer.as_bytes());
            // A server without an answer does not hang up either.
            if answer.is_empty() {
                std::thread::sleep(Duration::from_secs(60));
            }
        });
        Client::new(&url, Some("key"), timeout).expect("a URL")
    }

    const LONG: Duration = Duration::from_secs(30);
    const STREAM: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";

    fn complete(answer: &str, timeout: Duration) -> anyhow::Result<(Answer, usize)> {
        let client = server(Box::leak(answer.to_owned().into_boxed_str()), timeout);
        let mut arrivals = 0;
        let answer = client.complete("m", &json!("hello"), 4, &mut |_| {
            arrivals += 1;
            ControlFlow::Continue(())
        })?;
        Ok((answer, arrivals))
    }

    #[test]
    fn streams_are_read() {
        let one =
            "data: {\"choices\":[{\"text\":\"a\"}]}\r\n\r\n: keep-alive\n\ndata:{\"choices\":[{\"text\":\"b\"}]}\n\n";
        let usage =
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";
        let (answer, arrivals) = complete(&format!("{STREAM}{one}{usage}"), LONG).expect("an answer");
        assert_eq!((answer.tokens, answer.prompt_tokens, arrivals), (2, Some(3), 2));
        // Not every server says [DONE].
        let last = "data: {\"choices\":[{\"text\":\"c\",\"finish_reason\":\"length\"}]}\n\n";
        assert_eq!(complete(&format!("{STREAM}{one}{last}"), LONG).expect("an answer").0.tokens, 3);
    }

    #[test]
    fn what_goes_wrong_is_named() {
        let check = |answer: &str, timeout: Duration, wanted: &[&str]| {
            let error = complete(answer, timeout).expect_err("is no answer");
            let error = format!("{error:#}");
            for wanted in [&["http://127.0.0.1:", "/v1/completions"], wanted].concat() {
                assert!(error.contains(wanted), "{wanted}: {error}");
            }
        };
        let refused = "HTTP/1.1 400 Bad Request\r\nContent-Length: 33\r\n\r\n{\"error\":{\"message\":\"too long\"}} ";
        check(refused, LONG, &["HTTP 400", "too long"]);
        check("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", LONG, &["HTTP 401", "--api-key"]);
        let json = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
        check(json, LONG, &["application/json instead of an event stream"]);
        check("", Duration::from_millis(200), &["within 0.2 s (--timeout)"]);
        check("SSH-2.0\r\n\r\n", LONG, &[]);
        let token = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
        check(&format!("{STREAM}{token}"), LONG, &["broke after 1 tokens", "middle of the answer"]);
        check(&format!("{STREAM}data: x\n\n"), LONG, &["not JSON"]);
        check(&format!("{STREAM}{token}data: {{\"error\":{{\"message\":\"out\"}}}}\n\n"), LONG, &["reports: out"]);
        check(&format!("{STREAM}error: {{\"code\":500}}\n\n"), LONG, &["reports: {\"code\":500}"]);
    }

    #[test]
    fn a_listener_that_says_nothing_and_none_at_all() {
        let error = format!("{:#}", server("", Duration::from_millis(200)).models().expect_err("no answer"));
        assert!(error.contains("GET /v1/models") && error.contains("--timeout"), "{error}");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let client = Client::new(&format!("http://127.0.0.1:{port}"), None, LONG).expect("a URL");
        let error = format!("{:#}", client.models().expect_err("nobody"));
        assert!(error.contains("nothing listens there"), "{error}");
    }
}
