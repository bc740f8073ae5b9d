//! A cluster of this same binary, started for a measurement and stopped after it.
//!
//! It is `cluster up --local` as a child process, told apart from a user's only by its stdin: the cluster stops when
//! that ends, so none outlives the measurement however that dies. Read [`Mode`] and [`Cluster`].

use super::args::InterferenceArgs;
use crate::cli::CoresPolicy;
use anyhow::{Context, bail};
use clap::ValueEnum;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// How long a cluster gets to stop: longer than its supervisor gives its nodes.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// How the cores are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// A prefill node and a decode node.
    Disaggregated,
    /// One node does both.
    CoLocated,
}

impl Mode {
    /// Both, in the order of measuring.
    pub const ALL: [Self; 2] = [Self::Disaggregated, Self::CoLocated];

    /// As reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disaggregated => "disaggregated",
            Self::CoLocated => "co-located",
        }
    }

    /// The flags of `up --local` that make it, and those that the user gave.
    pub fn flags(self, args: &InterferenceArgs) -> Vec<String> {
        let prefill = match self {
            Self::Disaggregated => "1",
            Self::CoLocated => "0",
        };
        let mut flags: Vec<String> = ["--prefill", prefill, "--decode", "1"].map(str::to_owned).into();
        let mut flag = |name: &str, value: String| flags.extend([name.to_owned(), value]);
        if let Some(model) = &args.model {
            flag("--model", model.clone());
        }
        if let Some(policy) = args.cores_policy {
            flag("--cores-policy", policy.to_possible_value().expect("no policy is skipped").get_name().to_owned());
        }
        if let Some(threads) = args.threads {
            let shared = args.cores_policy == Some(CoresPolicy::Share);
            let both = self == Self::CoLocated && !shared;
            flag("--threads", (if both { 2 * u32::from(threads) } else { threads.into() }).to_string());
        }
        flags.extend(args.up.iter().cloned());
        flags
    }
}

/// A cluster that serves. Dropping it stops it.
#[derive(Debug)]
pub struct Cluster {
    child: Child,
    /// Where it serves.
    pub url: String,
}

impl Cluster {
    /// Starts one and waits until it serves.
    pub fn start(flags: &[String], key: Option<&str>, timeout: Duration) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.args(["up", "--local", "--stop-on-stdin-eof", "--host", "127.0.0.1", "--port", "0"]);
        command.args(["--drain-timeout", "1"]).args(flags);
        match key {
            Some(key) => command.env("RIDGE_API_KEY", key),
            None => command.env_remove("RIDGE_API_KEY"),
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start cluster up --local {}", flags.join(" ")))?;
        let stdout = child.stdout.take().expect("it is a pipe");
        let (sender, url) = sync_channel(1);
        let mut cluster = Self { child, url: String::new() };
        std::thread::Builder::new()
            .name("up-stdout".into())
            .spawn(move || find_url(stdout, &sender))
            .context("cannot start a thread")?;
        let why = match url.recv_timeout(timeout) {
            Ok(url) => {
                cluster.url = url;
                return Ok(cluster);
            }
            Err(RecvTimeoutError::Timeout) => {
                format!("did not serve within {} s (--start-timeout)", timeout.as_secs_f64())
            }
            Err(RecvTimeoutError::Disconnected) => match cluster.wait(STOP_TIMEOUT) {
                Some(status) => format!("ended with {status}; what it said is above"),
                None => "closed its stdout".into(),
            },
        };
        bail!("cluster up --local {}: {why}", flags.join(" "))
    }

    fn wait(&mut self, timeout: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                Ok(status) => return status,
                Err(_) => return None,
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if self.wait(STOP_TIMEOUT).is_none() {
            eprintln!("note: the cluster of pid {} does not stop and is killed", self.child.id());
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Reads all of the supervisor's stdout, so that it never waits for us, and sends the URL in it.
fn find_url(stdout: impl Read, sender: &SyncSender<String>) {
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        if let Some(url) = url_in(&line) {
            // A second one would find the channel full, and nobody waiting.
            let _ = sender.try_send(url);
        }
    }
}

/// The first line of the supervisor's banner: `Ridge serves NAME at URL (after 0.4 s)`.
fn url_in(line: &str) -> Option<String> {
    let plain = line.replace("\x1b[1m", "").replace("\x1b[0m", "");
    let (_, rest) = plain.strip_prefix("Ridge serves ")?.rsplit_once(" at http://")?;
    Some(format!("http://{}", rest.split_once(" (after ")?.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{BenchArgs, BenchCommand};
    use clap::{Args, FromArgMatches};

    fn flags(mode: Mode, line: &[&str]) -> String {
        let command = BenchArgs::augment_args(clap::Command::new("bench"));
        let line = [&["bench", "interference", "--local"], line].concat();
        let matches = command.try_get_matches_from(line).expect("is valid");
        match BenchArgs::from_arg_matches(&matches).expect("is valid").command {
            BenchCommand::Interference(args) => mode.flags(&args).join(" "),
            _ => panic!("is interference"),
        }
    }

    #[test]
    fn both_modes_get_the_same_cores() {
        assert_eq!(flags(Mode::Disaggregated, &[]), "--prefill 1 --decode 1");
        assert_eq!(flags(Mode::CoLocated, &[]), "--prefill 0 --decode 1");
        assert_eq!(flags(Mode::Disaggregated, &["--threads", "3"]), "--prefill 1 --decode 1 --threads 3");
        assert_eq!(flags(Mode::CoLocated, &["--threads", "3"]), "--prefill 0 --decode 1 --threads 6");
        let share = ["--threads", "3", "--cores-policy", "share", "--model", "m", "--", "--kv-cache-dtype", "fp8"];
        let want = "--prefill 0 --decode 1 --model m --cores-policy share --threads 3 --kv-cache-dtype fp8";
        assert_eq!(flags(Mode::CoLocated, &share), want);
    }

    #[test]
    fn the_banner_says_where() {
        let url = Some("http://127.0.0.1:8000".to_owned());
        assert_eq!(url_in("Ridge serves ridge-demo at http://127.0.0.1:8000 (after 0.4 s)"), url);
        assert_eq!(url_in("\x1b[1mRidge serves a at b at http://127.0.0.1:8000\x1b[0m (after 0.4 s)"), url);
        assert_eq!(url_in("Health http://127.0.0.1:8000/health"), None);
    }
}
