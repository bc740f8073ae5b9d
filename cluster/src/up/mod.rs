//! `cluster up --local`: the supervisor. It starts the roles as processes of their own, shows how they come up,
//! starts again what dies and ends everything in order.
//!
//! It makes no decision about requests: placement, batching and retries live in the machines. Read [`run`], then
//! [`Supervisor`].

mod banner;
mod child;
mod launch;
mod plan;
mod progress;

use crate::cli::{CoreList, UpArgs};
use crate::{demo, logging, roles};
use anyhow::{Context, bail};
use banner::{Banner, Row};
use child::{Event, Report, Running, Spawn};
use launch::Launch;
use plan::{Member, Plan};
use progress::{Progress, Stage};
use ridge_protocol::Role;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::process::ExitStatus;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout_at};

/// Crashes of one child within [`CRASH_WINDOW`] after which the supervisor gives up.
const CRASHES_MAX: usize = 5;
/// How far back crashes count.
const CRASH_WINDOW: Duration = Duration::from_secs(60);
/// Pause before the first restart; doubled for every further crash in the window.
const BACKOFF: Duration = Duration::from_millis(100);
/// How long nodes get to stop once the router is gone: nothing is left for them to finish.
const NODE_STOP: Duration = Duration::from_secs(3);
/// How long the system gets to bury what was killed.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// Runs the cluster until a signal, or until a child cannot be kept alive.
pub fn run(args: UpArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let drain = Duration::from_secs(args.drain_timeout);
    let cores = plan::available_cores();
    let threads = args.threads.map(usize::from);
    let stop_on_stdin_eof = args.supervision.stop_on_stdin_eof;
    let plan = Plan::new(args.prefill.into(), args.decode.into(), threads, args.cores_policy, &cores);
    if let Some(remark) = &plan.remark {
        eprintln!("note: {remark}");
    }
    let launch = Launch::prepare(args, &plan.members)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    runtime.block_on(async {
        let mut signals = Signals::new(stop_on_stdin_eof)?;
        let mut supervisor = Supervisor::new(launch, plan.members, started);
        let ended = supervisor.supervise(&mut signals).await;
        supervisor.progress.clear();
        // After a failure nobody waits for requests to finish.
        let drain = if ended.is_ok() { drain } else { Duration::from_secs(1) };
        supervisor.shut_down(drain, &mut signals).await;
        ended
    })
}

/// The signals that stop the cluster.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// The terminal was closed.
    hang_up: Signal,
    /// Whoever started us is gone.
    stdin_closed: oneshot::Receiver<()>,
}

impl Signals {
    fn new(stop_on_stdin_eof: bool) -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            stdin_closed: roles::watch_stdin(stop_on_stdin_eof)?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
            // It ends once, and at once if nobody watches: asking it again would be a mistake.
            Ok(()) = &mut self.stdin_closed, if !self.stdin_closed.is_terminated() => {}
        }
    }
}

/// One member and what has become of it.
struct Slot {
    member: Member,
    running: Option<Running>,
    stage: Stage,
    addr: Option<SocketAddr>,
    /// It was ready at least once: a first start that fails is a mistake to report, not a crash to repeat.
    proven: bool,
    /// When it crashed lately, oldest first.
    crashes: VecDeque<Instant>,
    restarts: u32,
    restart_at: Option<Instant>,
}

/// The children and the loop that looks after them.
struct Supervisor {
    launch: Launch,
    slots: Vec<Slot>,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    progress: Progress,
    http: Option<SocketAddr>,
    serving: bool,
    started: Instant,
}

impl Supervisor {
    fn new(launch: Launch, members: Vec<Member>, started: Instant) -> Self {
        assert_eq!(members.first().map(|m| m.role), Some(Role::Router), "the router comes first");
        let (sender, events) = mpsc::channel(256);
        let slot = |member| Slot {
            member,
            running: None,
            stage: Stage::Starting,
            addr: None,
            proven: false,
            crashes: VecDeque::new(),
            restarts: 0,
            restart_at: None,
        };
        let slots = members.into_iter().map(slot).collect();
        Self { launch, slots, events, sender, progress: Progress::new(), http: None, serving: false, started }
    }

    /// Starts everything and returns on a signal (`Ok`) or when there is no point in going on.
    async fn supervise(&mut self, signals: &mut Signals) -> anyhow::Result<()> {
        self.start(0)?;
        loop {
            let restart = self.slots.iter().filter_map(|slot| slot.restart_at).min();
            tokio::select! {
                () = signals.next() => return Ok(()),
                event = self.events.recv() => match event.expect("we hold a sender") {
                    Event::Report(index, report) => self.on_report(index, report)?,
                    Event::Exited(index, status) => self.on_exit(index, status)?,
                },
                () = sleep_until(restart.unwrap_or_else(Instant::now)), if restart.is_some() => self.restart_due()?,
            }
        }
    }

    fn start(&mut self, index: usize) -> anyhow::Result<()> {
        // A router that is started again listens where it did before.
        let (router, http) = (self.slots[0].addr, self.http);
        let slot = &mut self.slots[index];
        let spawn = Spawn {
            index,
            name: &slot.member.name,
            program: &self.launch.program,
            args: self.launch.arguments(&slot.member, router, http),
            env: self.launch.environment(&slot.member),
            log_file: self.launch.log_file(&slot.member),
        };
        slot.running = Some(spawn.start(self.sender.clone())?);
        slot.stage = Stage::Starting;
        slot.restart_at = None;
        Ok(())
    }

    fn restart_due(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let due = |slot: &Slot| slot.restart_at.is_some_and(|at| at <= now);
        let indices: Vec<usize> = (0..self.slots.len()).filter(|i| due(&self.slots[*i])).collect();
        indices.into_iter().try_for_each(|index| self.start(index))
    }

    fn on_report(&mut self, index: usize, report: Report) -> anyhow::Result<()> {
        match report {
            Report::Loading { fraction } => self.slots[index].stage = Stage::Loading(fraction),
            Report::Ready { addr, http } => self.on_ready(index, addr, http)?,
            Report::Serving => self.on_serving(),
            Report::Unknown => {}
        }
        if !self.serving {
            let stages: Vec<(&str, Stage)> = self.slots.iter().map(|s| (s.member.name.as_str(), s.stage)).collect();
            self.progress.show(&stages);
        }
        Ok(())
    }

    fn on_ready(&mut self, index: usize, addr: SocketAddr, http: Option<SocketAddr>) -> anyhow::Result<()> {
        let slot = &mut self.slots[index];
        slot.stage = Stage::Ready;
        slot.addr = Some(addr);
        let first_time = !std::mem::replace(&mut slot.proven, true);
        if !first_time {
            let pid = slot.running.as_ref().map_or(0, |running| running.pid);
            eprintln!("{} is back as pid {pid} after restart {}", slot.member.name, slot.restarts);
        }
        if slot.member.role == Role::Router {
            self.http = Some(http.context("the router did not say where it serves HTTP")?);
            if first_time {
                // Only now is it known where nodes find the router.
                (1..self.slots.len()).try_for_each(|node| self.start(node))?;
            }
        }
        Ok(())
    }

    fn on_serving(&mut self) {
        // A router says it again whenever the topology has changed and a prompt has passed once more.
        if std::mem::replace(&mut self.serving, true) {
            return;
        }
        self.progress.clear();
        let suggestions =
            if self.launch.model.from == launch::Source::BuiltIn { demo::suggestions(6) } else { Vec::new() };
        let banner = Banner {
            http: self.http.expect("the router was ready before it served"),
            model: self.launch.names[0].clone(),
            took: format!("{:.1} s", self.started.elapsed().as_secs_f64()),
            keyed: !self.launch.keys().is_empty(),
            rows: self.slots.iter().map(Slot::row).collect(),
            suggestions,
            color: logging::use_color(&std::io::stdout()),
        };
        use std::io::Write;
        let mut out = std::io::stdout().lock();
        // Whoever closed our stdout does not want to read this.
        let _ = write!(out, "{banner}").and_then(|()| out.flush());
    }

    fn on_exit(&mut self, index: usize, status: ExitStatus) -> anyhow::Result<()> {
        self.progress.clear();
        let log = self.launch.log_file(&self.slots[index].member);
        let log = log.map_or_else(String::new, |path| format!("; its log is {}", path.display()));
        let slot = &mut self.slots[index];
        let name = &slot.member.name;
        slot.running = None;
        slot.stage = Stage::Starting;
        if !slot.proven {
            bail!("{name} failed to start ({status}){log}");
        }
        let now = Instant::now();
        slot.crashes.push_back(now);
        while slot.crashes.front().is_some_and(|at| now.duration_since(*at) > CRASH_WINDOW) {
            slot.crashes.pop_front();
        }
        let crashes = slot.crashes.len();
        if crashes > CRASHES_MAX {
            bail!("{name} died {crashes} times within a minute, the last time with {status}; giving up{log}");
        }
        let pause = BACKOFF * (1 << (crashes - 1));
        slot.restarts += 1;
        slot.restart_at = Some(now + pause);
        eprintln!("{name} died ({status}); restart {} in {} ms{log}", slot.restarts, pause.as_millis());
        Ok(())
    }

    /// Ends the router first, so that it can finish what it has accepted, then the nodes, then whatever is left.
    async fn shut_down(&mut self, drain: Duration, signals: &mut Signals) {
        let in_flight = self.serving && self.slots[0].running.is_some();
        if in_flight {
            eprintln!("stopping: running requests get {} s to finish; Ctrl-C again stops at once", drain.as_secs());
        }
        let patient = self.stop(0..1, drain, signals).await;
        if patient {
            self.stop(1..self.slots.len(), NODE_STOP, signals).await;
        }
        for running in self.slots.iter().filter_map(|slot| slot.running.as_ref()) {
            running.kill();
        }
        let deadline = Instant::now() + KILL_WAIT;
        while self.slots.iter().any(|slot| slot.running.is_some()) {
            match timeout_at(deadline, self.events.recv()).await {
                Ok(Some(event)) => self.bury(event),
                _ => {
                    eprintln!("some processes could not be ended; look for them with: ps -C cluster");
                    return;
                }
            }
        }
    }

    /// Terminates some children and waits. False if the user lost patience.
    async fn stop(&mut self, which: std::ops::Range<usize>, within: Duration, signals: &mut Signals) -> bool {
        let deadline = Instant::now() + within;
        for running in self.slots[which.clone()].iter().filter_map(|slot| slot.running.as_ref()) {
            running.terminate();
        }
        while self.slots[which.clone()].iter().any(|slot| slot.running.is_some()) {
            tokio::select! {
                event = self.events.recv() => self.bury(event.expect("we hold a sender")),
                () = sleep_until(deadline) => return true,
                () = signals.next() => return false,
            }
        }
        true
    }

    fn bury(&mut self, event: Event) {
        if let Event::Exited(index, _) = event {
            self.slots[index].running = None;
        }
    }
}

impl Slot {
    fn row(&self) -> Row {
        let cores = match (&self.member.cores, self.member.threads) {
            (Some(cores), _) => CoreList::to_string(cores),
            (None, 0) => "any".into(),
            (None, threads) => format!("any ({threads} threads)"),
        };
        Row {
            role: self.member.role.to_string(),
            name: self.member.name.clone(),
            pid: self.running.as_ref().map_or(0, |running| running.pid),
            cores,
            addr: self.addr.map_or_else(|| "-".into(), |addr| addr.to_string()),
        }
    }
}
