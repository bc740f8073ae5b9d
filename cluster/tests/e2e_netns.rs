//! Several hosts on one machine: router, prefill and decode nodes in network namespaces of their own, joined by a bridge.
//!
//! Runs where it may (root, `ip`, and netem for delay and loss), and else skips by name.

mod support;

use ridge_tests::cluster::{metrics, wait_idle, within};
use ridge_tests::http::Client;
use ridge_tests::model::prompt;
use ridge_tests::netns::Hosts;
use serde_json::{Value, json};
use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use support::{binary, completion, oracle, tiny_llama};
use tempfile::TempDir;

/// Hosts and what runs on each.
const HOSTS: [(&str, &str); 4] =
    [("router", "router"), ("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "decode")];
const CONTROL_PORT: u16 = 7000;
const HTTP_PORT: u16 = 8000;
const TIMEOUT: Duration = Duration::from_secs(60);

/// A cluster with a host for every process, set up by hand as docs/operating.md has it.
struct Spread {
    processes: Vec<Child>,
    output: Arc<Mutex<String>>,
    client: Client,
    _folder: TempDir,
    // Last: the hosts go when nothing runs on them any more.
    hosts: Hosts,
}

impl Spread {
    /// Starts it and moves this thread to the router's host.
    fn start(hosts: Hosts, model: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a temp dir");
        let output = Arc::new(Mutex::new(String::new()));
        let control = format!("{}:{CONTROL_PORT}", hosts.addr("router"));
        let mut processes = Vec::new();
        for (name, role) in HOSTS {
            let tls = folder.path().join(name);
            let mut issue = Command::new(binary());
            issue.args(["ca", "issue", name, "--role", role, "--ca-dir"]).arg(folder.path().join("ca"));
            let issued = issue.arg("--out").arg(&tls).output().expect("the binary starts");
            assert!(issued.status.success(), "{}", String::from_utf8_lossy(&issued.stderr));
            let mut command = hosts.command(name, binary());
            command
                .args([role, "--name", name, "--stop-on-stdin-eof", "--tls-dir"])
                .arg(&tls)
                .arg("--model")
                .arg(model);
            if role == "router" {
                command.args(["--listen", &control, "--port", &HTTP_PORT.to_string(), "--served-model-name", "test"]);
                command.args(["--host", &hosts.addr("router")]);
            } else {
                command.args(["--router", &control, "--listen", &format!("{}:0", hosts.addr(name)), "--threads", "1"]);
            }
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
            let mut child = command.spawn().expect("ip starts");
            collect(child.stderr.take().expect("is a pipe"), output.clone());
            processes.push(child);
        }
        hosts.enter("router");
        let addr: SocketAddr = format!("{}:{HTTP_PORT}", hosts.addr("router")).parse().expect("an address");
        let spread = Self { processes, output, client: Client::new(addr), _folder: folder, hosts };
        spread.wait_healthy();
        spread
    }

    fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn wait_healthy(&self) {
        let nodes = || -> usize { metrics(&self.client).all("ridge_kv_blocks_total").count() };
        let healthy = || self.client.get("/health").is_ok_and(|response| response.status == 200);
        assert!(within(TIMEOUT, || healthy() && nodes() == HOSTS.len() - 1), "not healthy\n{}", self.output());
    }

    /// Streams a completion; `on_piece` is told how many pieces have come.
    fn stream(&self, prompt: &[u32], max_tokens: u32, mut on_piece: impl FnMut(usize)) -> String {
        let mut request = completion(prompt, max_tokens);
        request["stream"] = json!(true);
        let (mut text, mut pieces) = (String::new(), 0);
        let each = |data: &str| {
            if data != "[DONE]" {
                let event: Value = serde_json::from_str(data).expect("an event is JSON");
                assert!(event["error"].is_null(), "{event}\n{}", self.output());
                text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
                pieces += 1;
                on_piece(pieces);
            }
            true
        };
        let streamed = self.client.stream("/v1/completions", &request).and_then(|events| events.for_each(each));
        streamed.unwrap_or_else(|error| panic!("{error}\n{}", self.output()));
        text
    }

    /// The decode node that has the stream.
    fn busy(&self) -> &'static str {
        let busy = || {
            let metrics = metrics(&self.client);
            let busy = |name: &&str| metrics.sum_where("ridge_requests_in_flight", "node", name) > 0.0;
            ["decode-0", "decode-1"].into_iter().find(busy)
        };
        // What the router shows is republished a few times a second.
        assert!(within(TIMEOUT, || busy().is_some()), "no decode node has the stream");
        busy().expect("just seen")
    }
}

impl Drop for Spread {
    fn drop(&mut self) {
        // Its stdin ends, and so does each; whoever does not is killed.
        for process in &mut self.processes {
            drop(process.stdin.take());
        }
        let over = |process: &mut Child| process.try_wait().is_ok_and(|status| status.is_some());
        if !within(TIMEOUT, || self.processes.iter_mut().all(over)) {
            self.processes.iter_mut().for_each(|process| drop(process.kill()));
        }
    }
}

fn collect(mut pipe: impl Read + Send + 'static, output: Arc<Mutex<String>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = pipe.read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..read]);
            output.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
        }
    });
}

fn hosts() -> Option<Hosts> {
    match Hosts::new(&HOSTS.map(|(name, _)| name)) {
        Ok(hosts) => Some(hosts),
        Err(why) => {
            eprintln!("skipped: no hosts of our own: {why}");
            None
        }
    }
}

#[test]
fn streams_cross_a_slow_and_lossy_network() {
    let Some(hosts) = hosts() else { return };
    if let Err(why) = hosts.impair(20, 1) {
        eprintln!("skipped: no delay and loss: {why}");
        return;
    }
    let model = tiny_llama();
    let spread = Spread::start(hosts, &model);
    for (salt, len) in [(40, 17), (41, 120), (42, 400)] {
        let prompt = prompt(salt, len);
        assert_eq!(spread.stream(&prompt, 60, |_| {}), oracle(&model, &prompt, 60, &[]).text, "prompt of {len}");
    }
    let after = wait_idle(&spread.client, || spread.output());
    assert!(after.sum_where("ridge_kv_transfers_committed_total", "role", "decode") >= 1.0, "KV crossed the network");
}

#[test]
fn a_stream_goes_on_elsewhere_when_a_cable_is_cut() {
    let Some(hosts) = hosts() else { return };
    let model = tiny_llama();
    let slow = hosts.impair(20, 1);
    if let Err(why) = &slow {
        eprintln!("skipped: no delay and loss, only a cut cable: {why}");
    }
    let spread = Spread::start(hosts, &model);
    let prompt = prompt(43, 100);
    let expected = oracle(&model, &prompt, 380, &[]).text;
    let mut cut = None;
    let got = spread.stream(&prompt, 380, |pieces| {
        if pieces == 5 {
            let node = spread.busy();
            spread.hosts.plug(node, false);
            cut = Some(node);
        }
    });
    assert_eq!(got, expected, "the cable of {cut:?} was cut");
    let moved = metrics(&spread.client).sum("ridge_router_redispatched_total");
    assert!(moved >= 1.0, "the answer was over before its cable was cut");
    spread.hosts.plug(cut.expect("was cut"), true);
    spread.wait_healthy();
    wait_idle(&spread.client, || spread.output());
}
