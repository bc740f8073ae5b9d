//! One child process: started with its end of our stdin pipe, read line by line, signalled, reaped.
//!
//! A child stops when its stdin ends, so none outlives the supervisor however that dies. It gets its own process
//! group, so Ctrl-C reaches the supervisor alone and the order of shutting down is ours. Read [`Spawn`] and [`Event`].

use anyhow::Context;
use serde::Deserialize;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{ChildStdin, Command};
use tokio::sync::mpsc;

/// Longest line of a child that is passed on; the rest is cut off.
const LINE_BYTES_MAX: usize = 16 << 10;

/// What a child reports on its stdout, one JSON object per line.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(tag = "ridge", rename_all = "lowercase")]
pub enum Report {
    /// How far the model is loaded, from 0 to 1.
    Loading {
        /// The share that is done.
        fraction: f64,
    },
    /// It accepts connections.
    Ready {
        /// Its UDP address.
        addr: SocketAddr,
        /// The router's HTTP address.
        #[serde(default)]
        http: Option<SocketAddr>,
    },
    /// The router's: a real prompt went through prefill, transfer and decode.
    Serving,
    /// A prefill node's, with `--chaos-corrupt-pages`: it damaged another page.
    Corrupted,
    /// A line that a newer role may print.
    #[serde(other)]
    Unknown,
}

/// What happens to a child, tagged with its index.
#[derive(Debug)]
pub enum Event {
    /// It said something.
    Report(usize, Report),
    /// It is gone.
    Exited(usize, ExitStatus),
}

/// How a child is started.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// Comes back in its events.
    pub index: usize,
    /// Prefix of its log lines.
    pub name: &'a str,
    /// The program.
    pub program: &'a Path,
    /// Its arguments; no secrets.
    pub args: Vec<String>,
    /// Variables set beside those inherited; secrets go here.
    pub env: Vec<(&'static str, String)>,
    /// Appended to; `None` sends its lines to our stderr.
    pub log_file: Option<PathBuf>,
}

/// A running child. Dropping it closes its stdin, which stops it.
#[derive(Debug)]
pub struct Running {
    /// Its process id.
    pub pid: u32,
    _stdin: ChildStdin,
}

impl Spawn<'_> {
    /// Starts it. What it reports and its end arrive on `events`.
    pub fn start(self, events: mpsc::Sender<Event>) -> anyhow::Result<Running> {
        let stderr = match &self.log_file {
            Some(path) => Stdio::from(
                File::options()
                    .create(true)
                    .append(true)
                    .open(path)
                    .with_context(|| format!("cannot open {}", path.display()))?,
            ),
            None => Stdio::piped(),
        };
        let mut child = Command::new(self.program)
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {} as {}", self.program.display(), self.name))?;
        let pid = child.id().context("it was just started")?;
        let stdin = child.stdin.take().context("its stdin is a pipe")?;
        let stdout = child.stdout.take().context("its stdout is a pipe")?;
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(pass_on(stderr, self.name.to_owned()));
        }
        let index = self.index;
        let name = self.name.to_owned();
        tokio::spawn(async move {
            read_reports(stdout, index, &name, &events).await;
            let status = child.wait().await.unwrap_or_else(|error| {
                tracing::error!(%error, name, "cannot wait for a child");
                ExitStatus::default()
            });
            let _ = events.send(Event::Exited(index, status)).await;
        });
        Ok(Running { pid, _stdin: stdin })
    }
}

impl Running {
    /// Asks it to finish what it is doing and stop.
    pub fn terminate(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    /// Stops it now.
    pub fn kill(&self) {
        self.signal(rustix::process::Signal::KILL);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        signal_child(self.pid, signal);
    }
}

/// Signals a child; one that is gone already is fine.
pub fn signal_child(pid: u32, signal: rustix::process::Signal) {
    let Some(id) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return };
    if let Err(error) = rustix::process::kill_process(id, signal)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(pid, %error, "cannot signal a child");
    }
}

/// Reads reports until the pipe closes. Lines that are none are passed on like log lines.
async fn read_reports(stdout: impl AsyncRead + Unpin, index: usize, name: &str, events: &mpsc::Sender<Event>) {
    let mut lines = Lines::new(stdout);
    while let Some(line) = lines.next().await {
        match serde_json::from_str::<Report>(&line) {
            Ok(Report::Unknown) => {}
            Ok(report) => {
                if events.send(Event::Report(index, report)).await.is_err() {
                    return;
                }
            }
            Err(_) => eprintln!("[{name}] {line}"),
        }
    }
}

async fn pass_on(stderr: impl AsyncRead + Unpin, name: String) {
    let mut lines = Lines::new(stderr);
    while let Some(line) = lines.next().await {
        eprintln!("[{name}] {line}");
    }
}

/// Lines of bounded length from a pipe that may hold anything.
struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    fn new(reader: R) -> Self {
        Self { reader: BufReader::new(reader), line: Vec::new() }
    }

    /// The next line without its end, or `None` when the pipe is closed.
    async fn next(&mut self) -> Option<String> {
        self.line.clear();
        loop {
            let buffer = self.reader.fill_buf().await.ok()?;
            if buffer.is_empty() {
                return (!self.line.is_empty()).then(|| self.text());
            }
            let end = buffer.iter().position(|b| *b == b'\n');
            let part = &buffer[..end.unwrap_or(buffer.len())];
            let room = LINE_BYTES_MAX - self.line.len();
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            let used = end.map_or(buffer.len(), |end| end + 1);
            self.reader.consume(used);
            if end.is_some() {
                return Some(self.text());
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.line).trim_end_matches('\r').to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let read = |line: &str| serde_json::from_str::<Report>(line).ok();
        let ready = r#"{"ridge":"ready","role":"router","addr":"127.0.0.1:7000","http":"127.0.0.1:8000"}"#;
        let addr = "127.0.0.1:7000".parse().expect("an address");
        let http = "127.0.0.1:8000".parse().ok();
        assert_eq!(read(ready), Some(Report::Ready { addr, http }));
        assert_eq!(read(r#"{"ridge":"loading","fraction":0.4}"#), Some(Report::Loading { fraction: 0.4 }));
        assert_eq!(read(r#"{"ridge":"serving"}"#), Some(Report::Serving));
        assert_eq!(read(r#"{"ridge":"news"}"#), Some(Report::Unknown));
        assert_eq!(read("hello"), None);
    }

    #[tokio::test]
    async fn lines_are_cut_and_never_lost() {
        let long = "x".repeat(LINE_BYTES_MAX + 10);
        let text = format!("one\r\n{long}\n\nlast");
        let mut lines = Lines::new(text.as_bytes());
        assert_eq!(lines.next().await.as_deref(), Some("one"));
        assert_eq!(lines.next().await.map(|l| l.len()), Some(LINE_BYTES_MAX));
        assert_eq!(lines.next().await.as_deref(), Some(""));
        assert_eq!(lines.next().await.as_deref(), Some("last"));
        assert_eq!(lines.next().await, None);
    }

    #[tokio::test]
    async fn a_child_reports_and_its_end_is_seen() {
        let (events, mut seen) = mpsc::channel(8);
        let script = r#"echo '{"ridge":"serving"}'; read line; exit 3"#;
        let spawn = Spawn {
            index: 5,
            name: "shell",
            program: Path::new("/bin/sh"),
            args: vec!["-c".into(), script.into()],
            env: vec![],
            log_file: None,
        };
        let running = spawn.start(events).expect("starts");
        assert!(matches!(seen.recv().await, Some(Event::Report(5, Report::Serving))));
        // Closing its stdin is what ends it.
        drop(running);
        let Some(Event::Exited(5, status)) = seen.recv().await else { panic!("it ends") };
        assert_eq!(status.code(), Some(3));
    }
}
