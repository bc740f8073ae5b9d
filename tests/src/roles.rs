//! A cluster set up by hand, as on several machines: a router and nodes with flags of their own, which nobody starts again.
//!
//! Read [`Roles`]. Dropping one ends its processes.

use crate::cluster::{metrics, wait_idle, within};
use crate::http::Client;
use crate::metrics::Metrics;
use crate::process::{Kill, signal};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;
use tempfile::TempDir;

/// Generous: test machines are busy.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Processes by name, the router first.
#[derive(Debug)]
pub struct Roles {
    processes: Vec<(String, Child)>,
    /// Talks to the router.
    pub client: Client,
    binary: PathBuf,
    model: PathBuf,
    control: String,
    output: Arc<Mutex<String>>,
    folder: TempDir,
}

impl Roles {
    /// Starts a router with these flags beside what it must have.
    pub fn start(binary: &Path, model: &Path, flags: &[&str]) -> Self {
        let (folder, output) = (tempfile::tempdir().expect("a temp dir"), Arc::default());
        let mut command = role(binary, folder.path(), model, "router", "router");
        command.args(["--listen", "127.0.0.1:0", "--host", "127.0.0.1", "--port", "0", "--served-model-name", "test"]);
        let (child, ready) = spawn(command.args(flags), &output);
        let addr = |key: &str| ready[key].as_str().unwrap_or_else(|| panic!("no {key} in {ready}")).to_owned();
        Self {
            processes: vec![("router".into(), child)],
            client: Client::new(addr("http").parse().expect("an address")),
            binary: binary.into(),
            model: model.into(),
            control: addr("addr"),
            output,
            folder,
        }
    }

    /// Starts a `prefill` or `decode` node, and waits until the router knows it.
    pub fn join(&mut self, name: &str, kind: &str, flags: &[&str]) {
        let mut command = role(&self.binary, self.folder.path(), &self.model, name, kind);
        command.args(["--router", &self.control, "--threads", "1"]).args(flags);
        let (child, _) = spawn(&mut command, &self.output);
        self.processes.push((name.into(), child));
        let known = || self.nodes().iter().any(|node| node["name"] == name);
        assert!(within(TIMEOUT, known), "{name} does not join\n{}", self.output());
    }

    /// What `GET /v1/nodes` lists.
    pub fn nodes(&self) -> Vec<Value> {
        let listed = self.client.get("/v1/nodes").expect("the router answers").ok();
        listed["data"].as_array().cloned().unwrap_or_default()
    }

    /// Sends a signal to one of them.
    pub fn signal(&self, name: &str, kill: Kill) {
        let (_, child) = self.processes.iter().find(|(other, _)| other == name).expect("it was started");
        signal(child.id(), kill);
    }

    /// What `/metrics` says now.
    pub fn metrics(&self) -> Metrics {
        metrics(&self.client)
    }

    /// [`wait_idle`] for this cluster.
    pub fn wait_idle(&self) -> Metrics {
        wait_idle(&self.client, || self.output())
    }

    /// What they have written to stderr so far.
    pub fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Roles {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- output of the processes ---\n{}", self.output());
        }
        for (_, child) in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A role's command, with a certificate of its own.
fn role(binary: &Path, folder: &Path, model: &Path, name: &str, kind: &str) -> Command {
    let tls = folder.join(name);
    let mut issue = Command::new(binary);
    issue.args(["ca", "issue", name, "--role", kind, "--ca-dir"]).arg(folder.join("ca")).arg("--out").arg(&tls);
    let issued = issue.output().expect("the binary starts");
    assert!(issued.status.success(), "{}", String::from_utf8_lossy(&issued.stderr));
    let mut command = Command::new(binary);
    command.args([kind, "--name", name, "--stop-on-stdin-eof", "--tls-dir"]).arg(&tls).arg("--model").arg(model);
    command
}

/// Starts it and waits for the line in which it says where it listens.
fn spawn(command: &mut Command, output: &Arc<Mutex<String>>) -> (Child, Value) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary starts");
    let mut errors = child.stderr.take().expect("is a pipe");
    let collected = output.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = errors.read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..read]);
            collected.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
        }
    });
    let lines = BufReader::new(child.stdout.take().expect("is a pipe"));
    let (say, hear) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        for line in lines.lines().map_while(Result::ok) {
            if let Ok(report) = serde_json::from_str::<Value>(&line)
                && report["ridge"] == "ready"
            {
                let _ = say.try_send(report);
            }
        }
    });
    let ready = hear.recv_timeout(TIMEOUT).unwrap_or_else(|_| {
        let _ = child.kill();
        panic!("it does not start\n{}", output.lock().unwrap_or_else(PoisonError::into_inner))
    });
    (child, ready)
}
