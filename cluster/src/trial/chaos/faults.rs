//! What is done to the cluster: faults drawn from a seed, each of which passes by itself. Read [`Fault`] and [`inject`].

use super::super::state::State;
use super::super::{kill, signal, wait_back};
use crate::client::Client;
use crate::up::{Embedded, Relays};
use ridge_protocol::Role;
use ridge_sim::Random;
use rustix::process::Signal;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Pause between two faults, in milliseconds: shorter than most of them last, so that they meet.
const PAUSE_MS: (u64, u64) = (50, 700);
/// How long a node is stopped, a cable cut or packets lost, in milliseconds: from less than `--peer-timeout` to more.
const SPELL_MS: (u64, u64) = (100, 2500);
/// Datagrams of a thousand that are lost in a spell of loss.
const LOSS_PERMILLE: (u64, u64) = (5, 100);
/// How often the injector looks at the clock.
const TICK: Duration = Duration::from_millis(5);

/// Something that happens to processes and the network between them.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Fault {
    /// SIGKILL; the supervisor starts the node again.
    Kill(String),
    /// SIGSTOP, and later SIGCONT.
    Stall(String),
    /// Nothing passes between two living processes, and later everything again.
    Cut(String, String),
    /// A part of all datagrams is lost for a while.
    Lose(u64),
}

/// A node's death.
#[derive(Clone, PartialEq, Debug)]
pub struct Kill {
    /// When.
    pub at: Instant,
    /// A decode node that had streams, as the router saw it.
    pub streams: bool,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Faults {
    /// Nodes that were killed.
    pub kills: Vec<Kill>,
    /// Nodes that were stopped for a while.
    pub stalls: u64,
    /// Cables that were cut for a while.
    pub cuts: u64,
    /// Spells of loss.
    pub losses: u64,
    /// Datagrams that did not arrive because of a cut or a loss.
    pub dropped: u64,
    /// When each fault came and went, in words.
    pub log: Vec<String>,
}

/// What others may know while faults come.
#[derive(Debug, Default)]
pub struct Progress {
    kills: AtomicU64,
    over: AtomicBool,
}

impl Progress {
    /// Nodes that were killed so far.
    pub fn kills(&self) -> u64 {
        self.kills.load(Ordering::Relaxed)
    }
}

/// Lets faults come and go while `work` runs. Afterwards the network is whole and every node is back.
pub fn inject<T: Send>(
    cluster: &Embedded,
    relays: &Relays,
    client: &Client,
    random: Random,
    work: impl FnOnce(&Progress) -> T + Send,
) -> (T, Faults) {
    let progress = Progress::default();
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let done = work(&progress);
            progress.over.store(true, Ordering::Relaxed);
            done
        });
        let injector = Injector {
            cluster,
            relays,
            client,
            random,
            progress: &progress,
            started: Instant::now(),
            passing: Vec::new(),
            faults: Faults::default(),
        };
        let faults = injector.run(|| worker.is_finished());
        (worker.join().expect("the load does not panic"), faults)
    })
}

struct Injector<'a> {
    cluster: &'a Embedded,
    relays: &'a Relays,
    client: &'a Client,
    random: Random,
    progress: &'a Progress,
    started: Instant,
    /// What is going on, and until when.
    passing: Vec<(Instant, Fault)>,
    faults: Faults,
}

impl Injector<'_> {
    fn run(mut self, is_over: impl Fn() -> bool) -> Faults {
        let dropped = self.relays.dropped();
        let mut next = Instant::now();
        while !is_over() && !self.progress.over.load(Ordering::Relaxed) {
            let now = Instant::now();
            self.let_pass(|until| until <= now);
            if now >= next {
                let fault = self.draw();
                self.strike(fault);
                next = now + self.milliseconds(PAUSE_MS);
            }
            std::thread::sleep(TICK);
        }
        self.let_pass(|_| true);
        for member in self.cluster.members() {
            // Whoever was being started again when the load ended.
            if !member.ready && wait_back(self.cluster, &member.name, member.restarts.saturating_sub(1)).is_err() {
                self.note(format!("{} does not come back", member.name));
            }
        }
        self.faults.dropped = self.relays.dropped() - dropped;
        self.faults
    }

    fn milliseconds(&mut self, (low, high): (u64, u64)) -> Duration {
        Duration::from_millis(self.random.range(low, high))
    }

    fn draw(&mut self) -> Fault {
        let prefill = self.cluster.names(Role::Prefill);
        let decode = self.cluster.names(Role::Decode);
        let nodes = [&prefill[..], &decode].concat();
        let random = &mut self.random;
        let mut one = |names: &[String]| names[random.pick(names.len() as u64) as usize].clone();
        let (node, from, to) = (one(&nodes), one(&prefill), one(&decode));
        match self.random.pick(10) {
            0..5 => Fault::Kill(node),
            5..7 => Fault::Stall(node),
            7 => Fault::Cut("router".to_owned(), node),
            8 => Fault::Cut(from, to),
            _ => Fault::Lose(self.random.range(LOSS_PERMILLE.0, LOSS_PERMILLE.1)),
        }
    }

    fn strike(&mut self, fault: Fault) {
        if self.passing.iter().any(|(_, other)| *other == fault) {
            return;
        }
        let until = Instant::now() + self.milliseconds(SPELL_MS);
        match &fault {
            Fault::Kill(name) => {
                let decodes =
                    self.cluster.member(name).is_some_and(|member| member.role == Role::Decode && member.ready);
                let streams = decodes
                    && State::read(self.client)
                        .is_ok_and(|state| state.of("ridge_requests_in_flight", name).is_some_and(|n| n > 0.0));
                let Some(at) = kill(self.cluster, name) else { return };
                self.faults.kills.push(Kill { at, streams });
                self.progress.kills.fetch_add(1, Ordering::Relaxed);
            }
            Fault::Stall(name) => {
                let Some(member) = self.cluster.member(name).filter(|member| member.ready) else { return };
                signal(&member, Signal::STOP);
                self.faults.stalls += 1;
            }
            Fault::Cut(one, other) => {
                self.relays.cut(one, other, true);
                self.faults.cuts += 1;
            }
            Fault::Lose(permille) => {
                self.relays.lose(*permille);
                self.faults.losses += 1;
            }
        }
        self.note(format!("{fault:?}"));
        if !matches!(fault, Fault::Kill(_)) {
            self.passing.push((until, fault));
        }
    }

    /// Ends the faults whose end is `due`.
    fn let_pass(&mut self, due: impl Fn(Instant) -> bool) {
        let (over, passing) = std::mem::take(&mut self.passing).into_iter().partition(|(until, _)| due(*until));
        self.passing = passing;
        for (_, fault) in over {
            match &fault {
                // If it was killed meanwhile, its successor does not mind.
                Fault::Stall(name) => self.cluster.member(name).iter().for_each(|member| signal(member, Signal::CONT)),
                Fault::Cut(one, other) => self.relays.cut(one, other, false),
                Fault::Lose(_) => self.relays.lose(0),
                Fault::Kill(_) => {}
            }
            self.note(format!("over: {fault:?}"));
        }
    }

    fn note(&mut self, what: String) {
        self.faults.log.push(format!("{:8.3} {what}", self.started.elapsed().as_secs_f64()));
    }
}
