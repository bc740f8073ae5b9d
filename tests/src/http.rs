//! A small HTTP/1.1 client over a plain socket: one request per connection, server-sent events as they come.
//!
//! Written here so that a test can hang up in the middle of an answer and see every byte. Read [`Client`].

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

/// No answer of a test takes longer.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Talks to one server.
#[derive(Clone, Debug)]
pub struct Client {
    addr: SocketAddr,
    /// Lines sent with every request.
    headers: Vec<String>,
}

/// An answer, complete.
#[derive(Clone, Debug)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body as text.
    pub body: String,
}

impl Response {
    /// The body as JSON; panics with the body if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }

    /// The body as JSON if the status is 200; panics with everything else.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }
}

impl Client {
    /// For the server at `addr`.
    pub fn new(addr: SocketAddr) -> Self {
        Self { addr, headers: Vec::new() }
    }

    /// The same with an API key.
    pub fn with_key(&self, key: &str) -> Self {
        self.with_header("Authorization", &format!("Bearer {key}"))
    }

    /// The same with one more header line.
    pub fn with_header(&self, name: &str, value: &str) -> Self {
        let mut client = self.clone();
        client.headers.push(format!("{name}: {value}\r\n"));
        client
    }

    /// `GET path`.
    pub fn get(&self, path: &str) -> std::io::Result<Response> {
        self.send("GET", path, "")?.read_all()
    }

    /// `POST path` with a JSON body.
    pub fn post(&self, path: &str, body: &Value) -> std::io::Result<Response> {
        self.send("POST", path, &body.to_string())?.read_all()
    }

    /// `POST path`, answer to be read as server-sent events.
    pub fn stream(&self, path: &str, body: &Value) -> std::io::Result<Events> {
        Self::events(self.send("POST", path, &body.to_string())?)
    }

    /// Streams a completion to its end, and calls `each` with every event and the text it brings. An event that is an error fails
    /// the test.
    pub fn stream_completion(&self, request: &Value, mut each: impl FnMut(&Value, &str)) {
        let mut request = request.clone();
        request["stream"] = Value::Bool(true);
        let events = self.stream("/v1/completions", &request).expect("a stream");
        let read = events.for_each(|data| {
            if data != "[DONE]" {
                let event: Value = serde_json::from_str(data).expect("an event is JSON");
                assert!(event["error"].is_null(), "{event}");
                each(&event, event["choices"][0]["text"].as_str().unwrap_or_default());
            }
            true
        });
        read.expect("the stream ends well");
    }

    /// `GET path`, answer to be read as server-sent events.
    pub fn get_stream(&self, path: &str) -> std::io::Result<Events> {
        Self::events(self.send("GET", path, "")?)
    }

    fn events(open: Open) -> std::io::Result<Events> {
        if open.status != 200 {
            let response = open.read_all()?;
            return Err(std::io::Error::other(format!("status {}: {}", response.status, response.body)));
        }
        Ok(Events { open })
    }

    fn send(&self, method: &str, path: &str, body: &str) -> std::io::Result<Open> {
        let socket = TcpStream::connect_timeout(&self.addr, TIMEOUT)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_nodelay(true)?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\n{}\
             Content-Length: {}\r\n\r\n{body}",
            self.addr,
            self.headers.concat(),
            body.len()
        );
        (&socket).write_all(request.as_bytes())?;
        Open::read_head(socket)
    }
}

/// An answer whose body is still to be read.
#[derive(Debug)]
struct Open {
    status: u16,
    headers: Vec<(String, String)>,
    chunked: bool,
    /// Bytes left of the present chunk, or of the body if its length was announced.
    left: Option<u64>,
    reader: BufReader<TcpStream>,
}

impl Open {
    fn read_head(socket: TcpStream) -> std::io::Result<Self> {
        let mut reader = BufReader::new(socket);
        let status_line = read_line(&mut reader)?;
        let status = status_line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or_else(|| std::io::Error::other(format!("not a status line: {status_line:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = read_line(&mut reader)?;
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':') {
                headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let header = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let chunked = header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        let left = if chunked { Some(0) } else { header("content-length").and_then(|value| value.parse().ok()) };
        Ok(Self { status, chunked, left, headers, reader })
    }

    /// Some bytes of the body, none at its end.
    fn read_some(&mut self) -> std::io::Result<Vec<u8>> {
        if self.chunked && self.left == Some(0) {
            let size = read_line(&mut self.reader)?;
            let size = u64::from_str_radix(size.trim(), 16)
                .map_err(|_| std::io::Error::other(format!("not a chunk size: {size:?}")))?;
            if size == 0 {
                self.left = None;
                self.chunked = false;
                let mut rest = Vec::new();
                self.reader.read_to_end(&mut rest)?;
                return Ok(Vec::new());
            }
            self.left = Some(size);
        }
        let buffer = self.reader.fill_buf()?;
        let take = self.left.map_or(buffer.len(), |left| buffer.len().min(left as usize));
        let bytes = buffer[..take].to_vec();
        self.reader.consume(take);
        if let Some(left) = &mut self.left {
            *left -= take as u64;
            if bytes.is_empty() && *left > 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if self.chunked && *left == 0 {
                read_line(&mut self.reader)?;
            }
        }
        Ok(bytes)
    }

    fn read_all(mut self) -> std::io::Result<Response> {
        let mut body = Vec::new();
        loop {
            let bytes = self.read_some()?;
            if bytes.is_empty() {
                break;
            }
            body.extend(bytes);
        }
        let body = String::from_utf8_lossy(&body).into_owned();
        Ok(Response { status: self.status, headers: self.headers, body })
    }
}

fn read_line(reader: &mut impl BufRead) -> std::io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// An event stream. Dropping it hangs up.
#[derive(Debug)]
pub struct Events {
    open: Open,
}

impl Events {
    /// Every event's data in order; `[DONE]` is one of them.
    pub fn collect_data(self) -> std::io::Result<Vec<String>> {
        let mut all = Vec::new();
        self.for_each(|data| {
            all.push(data.to_owned());
            true
        })?;
        Ok(all)
    }

    /// Calls `each` with the data of every event until it returns false (then hangs up) or the stream ends.
    pub fn for_each(self, mut each: impl FnMut(&str) -> bool) -> std::io::Result<()> {
        self.for_each_event(|_, data| each(data))
    }

    /// The same with the id of every event, which is empty if it has none.
    pub fn for_each_event(mut self, mut each: impl FnMut(&str, &str) -> bool) -> std::io::Result<()> {
        let mut pending = Vec::new();
        loop {
            let bytes = self.open.read_some()?;
            if bytes.is_empty() {
                return Ok(());
            }
            pending.extend(bytes);
            while let Some(end) = pending.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = pending.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event);
                let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).map(str::trim_start);
                let Some(data) = field("data:") else { continue };
                if !each(field("id:").unwrap_or_default(), data) {
                    return Ok(());
                }
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.open.reader.get_ref().shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn server(answer: &'static str) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let client = Client::new(listener.local_addr().expect("is bound"));
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("a client");
            let mut request = [0; 4096];
            let _ = socket.read(&mut request);
            let _ = socket.write_all(answer.as_bytes());
        });
        client
    }

    #[test]
    fn plain_answers() {
        let client = server("HTTP/1.1 429 Too Many\r\nRetry-After: 1\r\nContent-Length: 7\r\n\r\n{\"a\":1}");
        let response = client.post("/x", &Value::Null).expect("an answer");
        assert_eq!((response.status, response.json()["a"].as_u64()), (429, Some(1)));
        assert!(response.headers.contains(&("retry-after".into(), "1".into())));
    }

    #[test]
    fn chunked_events() {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let answer: &'static str = Box::leak(
            format!("{head}8\r\ndata: a\n\r\n15\r\n\ndata: b\n\ndata: [DONE\r\n3\r\n]\n\n\r\n0\r\n\r\n").into(),
        );
        let data = server(answer).stream("/x", &Value::Null).and_then(Events::collect_data).expect("events");
        assert_eq!(data, ["a", "b", "[DONE]"]);
    }

    #[test]
    fn a_broken_stream_is_an_error() {
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\ndata: a\n\n";
        assert!(server(answer).stream("/x", &Value::Null).and_then(Events::collect_data).is_err());
    }
}
