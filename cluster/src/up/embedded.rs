//! A cluster inside this program: the same supervisor, processes and command lines as `cluster up --local`, for commands that
//! try it out. It starts again what dies, as often as it dies, and says who runs where. Read [`Embedded`].

use super::launch::Launch;
use super::relay::Relays;
use super::{Mode, Slot, Stop, Supervisor, plan, progress::Stage};
use crate::cli::{Cli, Command};
use anyhow::{Context, anyhow, bail};
use clap::Parser;
use ridge_protocol::Role;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// The name under which it serves its model.
pub const MODEL: &str = "trial";
/// What the router gets to finish its requests when the cluster is stopped.
const DRAIN: Duration = Duration::from_secs(1);
/// How often a start is looked at.
const POLL: Duration = Duration::from_millis(10);

/// A cluster that serves. Dropping it stops it.
#[derive(Debug)]
pub struct Embedded {
    seen: Seen,
    stop: Option<oneshot::Sender<()>>,
    supervisor: Option<JoinHandle<anyhow::Result<()>>>,
}

/// One of its processes, as it is now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberState {
    /// Its name, such as `decode-0`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Its process; `None` between death and restart.
    pub pid: Option<u32>,
    /// Its UDP address, once it said so.
    addr: Option<SocketAddr>,
    /// It said that it is ready.
    pub ready: bool,
    /// How often it was started again.
    pub restarts: u32,
    /// Pages that it damaged because it was told to, over all restarts.
    pub corrupted: u64,
}

/// What the supervisor's thread tells.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    state: Arc<Mutex<State>>,
    relays: Option<Arc<Relays>>,
    pub(super) restart_after: Duration,
}

/// What is special about a cluster inside this program.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// Everything that nodes say to the router and to decode nodes goes through these.
    pub relays: Option<Arc<Relays>>,
    /// Pause between a death and the restart.
    pub restart_after: Duration,
    /// A cluster that does not serve by then does not start.
    pub start_timeout: Duration,
}

#[derive(Debug, Default)]
struct State {
    http: Option<SocketAddr>,
    serving: bool,
    members: Vec<MemberState>,
}

impl Seen {
    pub(super) fn relays(&self) -> Option<&Relays> {
        self.relays.as_deref()
    }

    pub(super) fn update(&self, http: Option<SocketAddr>, serving: bool, slots: &[Slot]) {
        let members: Vec<MemberState> = slots.iter().map(state_of).collect();
        if let Some(relays) = self.relays() {
            relays.place(members.iter().filter_map(|member| Some((member.name.as_str(), member.addr?))));
        }
        *self.lock() = State { http, serving, members };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn state_of(slot: &Slot) -> MemberState {
    MemberState {
        name: slot.member.name.clone(),
        role: slot.member.role,
        pid: slot.running.as_ref().map(|running| running.pid),
        addr: slot.addr,
        ready: slot.stage == Stage::Ready,
        restarts: slot.restarts,
        corrupted: slot.corrupted,
    }
}

impl Embedded {
    /// Starts `cluster up --local` with these flags, on a free port and without keys, and waits until it serves.
    pub fn start(flags: &[String], embedding: Embedding) -> anyhow::Result<Self> {
        let Embedding { relays, restart_after, start_timeout } = embedding;
        let own = [
            "cluster",
            "up",
            "--local",
            "--host=127.0.0.1",
            "--port=0",
            "--api-key=",
            "--device=cpu",
            "--served-model-name",
            MODEL,
        ];
        let line = own.into_iter().map(str::to_owned).chain(flags.iter().cloned());
        let what = format!("cluster up --local {}", flags.join(" "));
        let Command::Up(args) = Cli::try_parse_from(line).with_context(|| what.clone())?.command else {
            unreachable!("the line says up");
        };
        let plan = plan(&args);
        let launch = Launch::prepare(*args, &plan.members).with_context(|| what.clone())?;
        let seen = Seen { state: Arc::default(), relays, restart_after };
        let (stop, asked) = oneshot::channel();
        let mode = Mode::Embedded(seen.clone());
        let supervisor = std::thread::Builder::new().name("supervisor".into()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let mut stop = Stop::Asked(asked);
                let mut supervisor = Supervisor::new(launch, plan.members, Instant::now(), mode);
                let ended = supervisor.supervise(&mut stop).await;
                supervisor.shut_down(DRAIN, &mut stop).await;
                ended
            })
        });
        let supervisor = Some(supervisor.context("cannot start a thread")?);
        let mut cluster = Self { seen, stop: Some(stop), supervisor };
        cluster.wait_serving(start_timeout).with_context(|| what)?;
        Ok(cluster)
    }

    fn wait_serving(&mut self, within: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + within;
        loop {
            if self.seen.lock().serving {
                return Ok(());
            }
            if self.supervisor.as_ref().is_some_and(JoinHandle::is_finished) {
                let ended = self.supervisor.take().map(JoinHandle::join);
                return match ended {
                    Some(Ok(Err(error))) => Err(error),
                    _ => Err(anyhow!("the supervisor ended before the cluster served")),
                };
            }
            if Instant::now() > deadline {
                bail!("does not serve within {} s", within.as_secs_f64());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Where it serves.
    pub fn url(&self) -> String {
        let http = self.seen.lock().http.expect("a cluster that serves has an address");
        format!("http://{http}")
    }

    /// Its processes, the router first.
    pub fn members(&self) -> Vec<MemberState> {
        self.seen.lock().members.clone()
    }

    /// One of its processes.
    pub fn member(&self, name: &str) -> Option<MemberState> {
        self.seen.lock().members.iter().find(|member| member.name == name).cloned()
    }

    /// Names of its nodes of a role.
    pub fn names(&self, role: Role) -> Vec<String> {
        self.members().into_iter().filter(|member| member.role == role).map(|member| member.name).collect()
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        // Either side may be gone already: then there is nothing to stop.
        drop(self.stop.take());
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
    }
}
