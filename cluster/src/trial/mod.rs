//! `cluster verify` and `cluster chaos`: does a cluster of real processes answer what a single process answers, whatever the
//! settings, and whatever happens to its nodes?
//!
//! Both draw requests from a seed, let one engine in this process answer them ([`cases`]), start clusters with the supervisor of
//! `up --local`, and compare every piece of every stream ([`ask`]). In the end every node must have all of its blocks again
//! ([`state`]). Read [`verify`] and [`chaos`] for what is done to the clusters.

mod ask;
mod cases;
mod chaos;
mod state;
mod verify;

pub use chaos::{ChaosArgs, run as chaos};
pub use verify::{VerifyArgs, run as verify};

use crate::size::parse_count;
use crate::up::{Embedded, MemberState, signal_child};
use anyhow::{Context, bail};
use clap::Args;
use rustix::process::Signal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A cluster that does not serve by then does not start.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// A stream that has not ended by then hangs.
const STREAM_TIMEOUT: Duration = Duration::from_secs(120);
/// A node that is not back by then does not come back.
const BACK_TIMEOUT: Duration = Duration::from_secs(120);
/// How often something awaited is looked at.
const POLL: Duration = Duration::from_millis(5);

/// What both commands are told about the model and the machine.
#[derive(Args, Debug)]
pub struct TrialArgs {
    /// Hugging Face folder, .gguf file or Hugging Face repository id. Without it, the built-in ridge-demo.
    #[arg(long)]
    pub model: Option<String>,
    /// Key of the prompts, the parameters and everything that is done.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Requests in flight at a time.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub clients: u16,
    /// Longest prompt plus answer, in tokens. Default: the model's own limit, 2048 at most.
    #[arg(long, value_parser = parse_count)]
    pub max_model_len: Option<usize>,
    /// Compute threads of each node. Default: an equal share of the cores.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Folder for the logs of the processes. Without it they are kept, and named, only if something is wrong.
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Where the processes' logs go.
struct Logs {
    folder: PathBuf,
    /// The user wants them whatever comes out.
    wanted: bool,
}

impl Logs {
    fn new(args: &TrialArgs) -> Self {
        let own = || std::env::temp_dir().join(format!("ridge-trial-{}", std::process::id()));
        Self { folder: args.log_dir.clone().unwrap_or_else(own), wanted: args.log_dir.is_some() }
    }

    /// The flags of a cluster that writes them below a folder of this name.
    fn flags(&self, name: &str) -> [String; 2] {
        ["--log-dir".to_owned(), self.folder.join(name).display().to_string()]
    }

    /// Removes what nobody needs, or says where it is.
    fn settle(self, clean: bool) {
        if clean && !self.wanted {
            let _ = std::fs::remove_dir_all(&self.folder);
        } else {
            eprintln!("logs of the processes: {}", self.folder.display());
        }
    }
}

/// Asks again and again until the answer is yes; false if it never is.
fn within(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}

/// Sends a signal to a member's process, if it has one now.
fn signal(member: &MemberState, signal: Signal) {
    if let Some(pid) = member.pid {
        signal_child(pid, signal);
    }
}

/// Kills a node and returns the moment, or `None` if it does not run.
fn kill(cluster: &Embedded, name: &str) -> Option<Instant> {
    let member = cluster.member(name).filter(|member| member.pid.is_some())?;
    let now = Instant::now();
    signal(&member, Signal::KILL);
    Some(now)
}

/// Waits until a node that was killed after so many restarts is back.
fn wait_back(cluster: &Embedded, name: &str, restarts: u32) -> anyhow::Result<()> {
    let back = || cluster.member(name).is_some_and(|member| member.ready && member.restarts > restarts);
    match within(BACK_TIMEOUT, back) {
        true => Ok(()),
        false => bail!("{name} was killed and is not back after {} s", BACK_TIMEOUT.as_secs()),
    }
}

/// Runs `work` on so many threads, each with its number, and returns what they return.
fn on_threads<T: Send>(count: usize, work: impl Fn(usize) -> anyhow::Result<T> + Sync) -> anyhow::Result<Vec<T>> {
    std::thread::scope(|scope| {
        let work = &work;
        let spawn = |index| std::thread::Builder::new().name("client".into()).spawn_scoped(scope, move || work(index));
        let threads: Result<Vec<_>, _> = (0..count).map(spawn).collect();
        let threads = threads.context("cannot start a thread")?;
        threads.into_iter().map(|thread| thread.join().expect("a client does not panic")).collect()
    })
}
