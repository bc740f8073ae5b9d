//! A running `cluster up --local`, as a user starts it: real processes, real sockets, a data folder of its own.
//!
//! Read [`Cluster`]. Dropping one stops it with Ctrl-C and checks that no process is left.

use crate::http::{Client, Response};
use crate::metrics::Metrics;
use crate::process::{Kill, Process, signal};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A cluster that does not serve by then is broken. Generous: test machines are busy.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// The same for stopping.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// Nodes report once a second; everything that should happen has happened long before this.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A supervisor process and what is known about it.
#[derive(Debug)]
pub struct Cluster {
    supervisor: Child,
    /// Its HTTP address.
    pub addr: SocketAddr,
    /// Talks to it.
    pub client: Client,
    /// Name of the model it serves.
    pub model: String,
    /// Everything it printed.
    output: Arc<Mutex<String>>,
    _data: Arc<TempDir>,
}

impl Cluster {
    /// Starts one on free ports and waits until it serves.
    pub fn start(binary: &Path, model: &Path, flags: &[&str]) -> Self {
        let data = Arc::new(tempfile::tempdir().expect("a temp dir"));
        Self::start_in(&data, binary, model, flags)
    }

    /// The same with a data folder that others may use too.
    pub fn start_in(data: &Arc<TempDir>, binary: &Path, model: &Path, flags: &[&str]) -> Self {
        let mut command = Command::new(binary);
        command.args(["up", "--local", "--port", "0", "--drain-timeout", "5", "--served-model-name", "test"]);
        command.arg("--model").arg(model).arg("--data-dir").arg(data.path()).args(flags);
        Self::spawn(command, data.clone())
    }

    /// Starts a prepared command and waits until it serves.
    pub fn spawn(mut command: Command, data: Arc<TempDir>) -> Self {
        let mut supervisor = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let output = Arc::new(Mutex::new(String::new()));
        collect(supervisor.stdout.take().expect("is a pipe"), output.clone());
        collect(supervisor.stderr.take().expect("is a pipe"), output.clone());
        let (model, addr) = match wait_for_banner(&mut supervisor, &output) {
            Ok(found) => found,
            Err(why) => {
                let _ = supervisor.kill();
                panic!("{why}\n{}", text(&output));
            }
        };
        Self { client: Client::new(addr), supervisor, addr, model, output, _data: data }
    }

    /// What it has printed so far, stdout and stderr mixed.
    pub fn output(&self) -> String {
        text(&self.output)
    }

    /// Process id of the supervisor.
    pub fn pid(&self) -> u32 {
        self.supervisor.id()
    }

    /// The role processes that run now.
    pub fn processes(&self) -> Vec<Process> {
        Process::children_of(self.pid())
    }

    /// The process of a member such as `decode-0`; panics if it does not run.
    pub fn process(&self, name: &str) -> Process {
        let found = self.processes().into_iter().find(|process| process.flag("--name") == Some(name));
        found.unwrap_or_else(|| panic!("{name} does not run\n{}", self.output()))
    }

    /// What `/metrics` says now.
    pub fn metrics(&self) -> Metrics {
        metrics(&self.client)
    }

    /// Waits until `/health` says that nothing is missing.
    pub fn wait_healthy(&self) {
        let ready = |response: Response| response.status == 200 && response.json()["status"] == "ready";
        let healthy = || self.client.get("/health").is_ok_and(ready);
        assert!(within(SETTLE_TIMEOUT, healthy), "not healthy again\n{}", self.output());
    }

    /// [`wait_idle`] for this cluster.
    pub fn wait_idle(&self) -> Metrics {
        wait_idle(&self.client, || self.output())
    }

    /// Presses Ctrl-C and waits for the end. Panics if any of its processes is left.
    pub fn stop(mut self) -> (ExitStatus, String) {
        let children: Vec<u32> = self.processes().iter().map(|process| process.pid).collect();
        signal(self.pid(), Kill::Interrupt);
        let status = wait(&mut self.supervisor, STOP_TIMEOUT).expect("Ctrl-C ends the supervisor");
        for pid in children {
            assert!(!Process::is_alive(pid), "process {pid} is left\n{}", self.output());
        }
        (status, self.output())
    }

    /// Kills the supervisor, so that it can do nothing for its children, and waits for those to notice.
    pub fn kill_supervisor(mut self) {
        let children: Vec<u32> = self.processes().iter().map(|process| process.pid).collect();
        assert!(!children.is_empty(), "nothing to outlive the supervisor");
        signal(self.pid(), Kill::Kill);
        self.supervisor.wait().expect("was killed");
        let gone = || children.iter().all(|pid| !Process::is_alive(*pid));
        assert!(within(STOP_TIMEOUT, gone), "children outlived their supervisor");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.supervisor.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        signal(self.pid(), Kill::Interrupt);
        if wait(&mut self.supervisor, STOP_TIMEOUT).is_none() {
            let _ = self.supervisor.kill();
            let _ = self.supervisor.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- output of the cluster ---\n{}", self.output());
        }
    }
}

/// Runs a command that is expected to fail, and returns what it wrote to stderr.
pub fn fails(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().expect("the binary starts");
    assert!(!output.status.success(), "it should have failed: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What `/metrics` of a server says now.
pub fn metrics(client: &Client) -> Metrics {
    let response = client.get("/metrics").expect("the router answers");
    assert_eq!(response.status, 200, "{}", response.body);
    Metrics::parse(&response.body).expect("is Prometheus text")
}

/// Waits until nothing is in flight and no node has a block in use, held or reserved; panics, with what the cluster printed, if
/// that takes too long, because then blocks were lost.
pub fn wait_idle(client: &Client, output: impl Fn() -> String) -> Metrics {
    const BUSY: [&str; 6] = [
        "ridge_kv_blocks_used",
        "ridge_kv_blocks_reserved",
        "ridge_kv_blocks_held",
        "ridge_requests_running",
        "ridge_requests_waiting",
        "ridge_router_requests_in_flight",
    ];
    let busy = |metrics: &Metrics| -> Vec<(&str, f64)> {
        BUSY.iter().map(|name| (*name, metrics.sum(name))).filter(|(_, sum)| *sum != 0.0).collect()
    };
    // Gauges arrive with a delay: what counts is a report from after the last event.
    std::thread::sleep(Duration::from_millis(1500));
    let idle = within(SETTLE_TIMEOUT, || busy(&metrics(client)).is_empty());
    let metrics = metrics(client);
    assert!(idle, "not idle: {:?}\n{}", busy(&metrics), output());
    assert_eq!(metrics.sum("ridge_kv_orphaned_blocks"), 0.0, "blocks were orphaned");
    for total in metrics.all("ridge_kv_blocks_total") {
        let node = total.label("node").expect("has a node");
        let parts = ["free", "cached", "used", "reserved", "held"];
        let parts = parts.map(|part| metrics.sum_where(&format!("ridge_kv_blocks_{part}"), "node", node));
        assert_eq!(parts.iter().sum::<f64>(), total.value, "blocks of {node}: {parts:?}");
    }
    metrics
}

/// Asks again and again until the answer is yes; false if it never is.
pub fn within(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wait_for_banner(supervisor: &mut Child, output: &Mutex<String>) -> Result<(String, SocketAddr), String> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if let Some(found) = read_banner(&text(output)) {
            return Ok(found);
        }
        if let Ok(Some(status)) = supervisor.try_wait() {
            std::thread::sleep(Duration::from_millis(100));
            return Err(format!("cluster up ended with {status}"));
        }
        if Instant::now() > deadline {
            return Err("cluster up does not serve".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `Ridge serves NAME at http://ADDR (after …)`.
fn read_banner(output: &str) -> Option<(String, SocketAddr)> {
    let line = output.lines().find_map(|line| line.strip_prefix("Ridge serves "))?;
    let (model, rest) = line.split_once(" at http://")?;
    let addr = rest.split_once(" (after")?.0.parse().ok()?;
    Some((model.to_owned(), addr))
}

fn collect(pipe: impl Read + Send + 'static, output: Arc<Mutex<String>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.push_str(&line);
            output.push('\n');
        }
    });
}

fn text(output: &Mutex<String>) -> String {
    output.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn wait(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let mut status = None;
    within(timeout, || {
        status = child.try_wait().ok().flatten();
        status.is_some()
    });
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banners_are_read() {
        let output = "prefill-0 ready\nRidge serves ridge-demo at http://127.0.0.1:8000 (after 0.4 s)\n\n";
        let addr = "127.0.0.1:8000".parse().expect("an address");
        assert_eq!(read_banner(output), Some(("ridge-demo".into(), addr)));
        assert_eq!(read_banner("Ridge serves"), None);
    }
}
