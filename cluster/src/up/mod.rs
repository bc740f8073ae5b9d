//! `cluster up --local`: the supervisor. It starts the roles as processes of their own, shows how they come up,
//! starts again what dies and ends everything in order.
//!
//! It makes no decision about requests: placement, batching and retries live in the machines. Read [`run`], then
//! [`Supervisor`].

mod banner;
mod child;
mod embedded;
mod launch;
mod plan;
mod progress;
mod relay;

pub use child::signal_child;
pub use embedded::{Embedded, Embedding, MODEL, MemberState};
pub use launch::{Model, find_model};
pub use relay::Relays;

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
    let stop_on_stdin_eof = args.supervision.stop_on_stdin_eof;
    let plan = plan(&args);
    if let Some(remark) = &plan.remark {
        eprintln!("note: {remark}");
    }
    let launch = Launch::prepare(args, &plan.members)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    runtime.block_on(async {
        let mut stop = Stop::Signals(Signals::new(stop_on_stdin_eof)?);
        let mut supervisor = Supervisor::new(launch, plan.members, started, Mode::Terminal(Progress::new()));
        let ended = supervisor.supervise(&mut stop).await;
        supervisor.mode.clear();
        // After a failure nobody waits for requests to finish.
        let drain = if ended.is_ok() { drain } else { Duration::from_secs(1) };
        supervisor.shut_down(drain, &mut stop).await;
        ended
    })
}

fn plan(args: &UpArgs) -> Plan {
    let cores = plan::available_cores();
    Plan::new(args.prefill.into(), args.decode.into(), args.threads.map(usize::from), args.cores_policy, &cores)
}

/// What stops a cluster.
enum Stop {
    /// A user or whoever started us.
    Signals(Signals),
    /// This program itself, once.
    Asked(oneshot::Receiver<()>),
}

impl Stop {
    async fn next(&mut self) {
        match self {
            Stop::Signals(signals) => signals.next().await,
            Stop::Asked(asked) if !asked.is_terminated() => drop(asked.await),
            Stop::Asked(_) => std::future::pending().await,
        }
    }
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
    /// Pages that it damaged because it was told to, over all restarts.
    corrupted: u64,
}

/// For whom a supervisor works.
enum Mode {
    /// A person, who sees what happens.
    Terminal(Progress),
    /// This program, whose business it is that children die.
    Embedded(embedded::Seen),
}

impl Mode {
    /// How many crashes within [`CRASH_WINDOW`] are too many.
    fn crashes_max(&self) -> usize {
        match self {
            Mode::Terminal(_) => CRASHES_MAX,
            Mode::Embedded(_) => usize::MAX,
        }
    }

    /// Before the restart after the last of so many crashes.
    fn pause(&self, crashes: usize) -> Duration {
        match self {
            Mode::Terminal(_) => BACKOFF * (1 << (crashes - 1)),
            Mode::Embedded(seen) => seen.restart_after,
        }
    }

    fn say(&mut self, line: &str) {
        self.clear();
        if matches!(self, Mode::Terminal(_)) {
            eprintln!("{line}");
        }
    }

    /// Makes room for another line.
    fn clear(&mut self) {
        if let Mode::Terminal(progress) = self {
            progress.clear();
        }
    }
}

/// The children and the loop that looks after them.
struct Supervisor {
    launch: Launch,
    slots: Vec<Slot>,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    mode: Mode,
    http: Option<SocketAddr>,
    serving: bool,
    started: Instant,
}

impl Supervisor {
    fn new(launch: Launch, members: Vec<Member>, started: Instant, mode: Mode) -> Self {
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
            corrupted: 0,
        };
        let slots = members.into_iter().map(slot).collect();
        Self { launch, slots, events, sender, mode, http: None, serving: false, started }
    }

    /// Starts everything and returns on a signal (`Ok`) or when there is no point in going on.
    async fn supervise(&mut self, stop: &mut Stop) -> anyhow::Result<()> {
        self.start(0)?;
        loop {
            if let Mode::Embedded(seen) = &self.mode {
                seen.update(self.http, self.serving, &self.slots);
            }
            let restart = self.slots.iter().filter_map(|slot| slot.restart_at).min();
            tokio::select! {
                () = stop.next() => return Ok(()),
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
        let relays = match &self.mode {
            Mode::Embedded(seen) => seen.relays(),
            Mode::Terminal(_) => None,
        };
        let slot = &mut self.slots[index];
        let spawn = Spawn {
            index,
            name: &slot.member.name,
            program: &self.launch.program,
            args: self.launch.arguments(&slot.member, router, http, relays),
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
            Report::Corrupted => self.slots[index].corrupted += 1,
            Report::Unknown => {}
        }
        if !self.serving
            && let Mode::Terminal(progress) = &mut self.mode
        {
            let stages: Vec<(&str, Stage)> = self.slots.iter().map(|s| (s.member.name.as_str(), s.stage)).collect();
            progress.show(&stages);
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
            self.mode.say(&format!("{} is back as pid {pid} after restart {}", slot.member.name, slot.restarts));
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
        let Mode::Terminal(progress) = &mut self.mode else { return };
        progress.clear();
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
        let log = self.launch.log_file(&self.slots[index].member);
        let log = log.map_or_else(String::new, |path| format!("; its log is {}", path.display()));
        let slot = &mut self.slots[index];
        let name = slot.member.name.clone();
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
        if crashes > self.mode.crashes_max() {
            bail!("{name} died {crashes} times within a minute, the last time with {status}; giving up{log}");
        }
        let pause = self.mode.pause(crashes);
        slot.restarts += 1;
        slot.restart_at = Some(now + pause);
        let line = format!("{name} died ({status}); restart {} in {} ms{log}", slot.restarts, pause.as_millis());
        self.mode.say(&line);
        Ok(())
    }

    /// Ends the router first, so that it can finish what it has accepted, then the nodes, then whatever is left.
    async fn shut_down(&mut self, drain: Duration, stop: &mut Stop) {
        let in_flight = self.serving && self.slots[0].running.is_some();
        if in_flight {
            let drain = drain.as_secs();
            self.mode.say(&format!("stopping: running requests get {drain} s to finish; Ctrl-C again stops at once"));
        }
        let patient = self.stop(0..1, drain, stop).await;
        if patient {
            self.stop(1..self.slots.len(), NODE_STOP, stop).await;
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
    async fn stop(&mut self, which: std::ops::Range<usize>, within: Duration, stop: &mut Stop) -> bool {
        let deadline = Instant::now() + within;
        for running in self.slots[which.clone()].iter().filter_map(|slot| slot.running.as_ref()) {
            running.terminate();
        }
        while self.slots[which.clone()].iter().any(|slot| slot.running.is_some()) {
            tokio::select! {
                event = self.events.recv() => self.bury(event.expect("we hold a sender")),
                () = sleep_until(deadline) => return true,
                () = stop.next() => return false,
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
