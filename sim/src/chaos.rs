//! Faults: what strikes, and how it passes.

use super::network::{Conn, End, IDLE_TIMEOUT, PageFrame};
use super::node::{Machines, SimNode};
use super::run::{Event, Life, World};
use ridge_decode_node::machine::DecodeInput;
use ridge_prefill_node::machine::PrefillInput;
use ridge_protocol::{Duration, Instant, Machine, NodeId};

/// What a node that was asked to stop gets to finish.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// What can strike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    Crash,
    Restart,
    RouterCrash,
    ControlLoss,
    KvLoss,
    Cut,
    Stall,
    Slowdown,
}

impl World {
    /// Draws when each fault strikes: while clients come and are served.
    pub fn plan_faults(&mut self) {
        let faults = self.scenario.faults;
        let planned = [
            (Fault::Crash, faults.crashes),
            (Fault::Restart, faults.restarts),
            (Fault::RouterCrash, faults.router_crashes),
            (Fault::ControlLoss, faults.control_losses),
            (Fault::KvLoss, faults.kv_losses),
            (Fault::Cut, faults.cuts),
            (Fault::Stall, faults.stalls),
            (Fault::Slowdown, faults.slowdowns),
        ];
        let window = self.scenario.arrivals + Duration::from_millis(500);
        for (fault, count) in planned {
            for _ in 0..count {
                let at = self.now + Duration::from_micros(self.random.pick(window.as_micros() as u64));
                self.at(at, Event::Fault(fault));
                self.faults_left += 1;
            }
        }
    }

    /// Does what a fault does, if it finds a victim.
    pub fn strike(&mut self, fault: Fault) {
        self.faults_left -= 1;
        let happened = match fault {
            Fault::Crash => self.crash(),
            Fault::Restart => self.ask_to_stop(),
            Fault::RouterCrash => Some(self.crash_router()),
            Fault::ControlLoss => self.lose_control(),
            Fault::KvLoss => self.lose_kv(),
            Fault::Cut => Some(self.cut()),
            Fault::Stall => self.stall(),
            Fault::Slowdown => self.slow_down(),
        };
        if let Some((what, until)) = happened {
            *self.happened.entry(what).or_default() += 1;
            // What it broke is noticed, and dialed again, some time after it is over.
            self.disturbed_until = self.disturbed_until.max(until + 2 * IDLE_TIMEOUT);
        }
    }

    fn victim(&mut self) -> Option<usize> {
        let up: Vec<usize> = (0..self.nodes.len()).filter(|&place| self.nodes[place].alive).collect();
        (!up.is_empty()).then(|| self.random.of(&up))
    }

    /// A node dies: its peers notice after a while, and it comes back without memory, perhaps before they do.
    fn crash(&mut self) -> Option<(&'static str, Instant)> {
        let place = self.victim()?;
        let back = self.end_process(place);
        Some(("node crashed", back))
    }

    fn end_process(&mut self, place: usize) -> Instant {
        let node = &mut self.nodes[place];
        (node.alive, node.stalled) = (false, false);
        node.inbox.clear();
        let life = node.life;
        self.handoffs.forget(life);
        self.break_all(life);
        let most = self.random.of(&[100_000, 1_000_000, 8_000_000]);
        let back = self.now + Duration::from_micros(1000 + self.random.pick(most));
        self.at(back, Event::Restart(place));
        back
    }

    /// A node is told to stop, as a supervisor does: it finishes what it has, goes, and comes back.
    fn ask_to_stop(&mut self) -> Option<(&'static str, Instant)> {
        let place = self.victim().filter(|&place| !self.nodes[place].stalled && !self.nodes[place].stopping)?;
        let (now, node) = (self.now, &mut self.nodes[place]);
        node.stopping = true;
        let life = node.life;
        let idle = match &mut node.machines {
            Machines::Prefill(machine) => {
                machine.handle(now, PrefillInput::Shutdown);
                machine.is_idle()
            }
            Machines::Decode(machine, _) => {
                machine.handle(now, DecodeInput::Shutdown);
                machine.is_idle()
            }
        };
        self.at(if idle { now } else { now + DRAIN_DEADLINE }, Event::Left(life));
        self.settle_node(place);
        Some(("node asked to stop", now + DRAIN_DEADLINE))
    }

    /// A node that was asked to stop is drained, or out of time.
    pub fn on_left(&mut self, life: Life) {
        let back = self.end_process(life.place);
        self.disturbed_until = self.disturbed_until.max(back + 2 * IDLE_TIMEOUT);
    }

    fn crash_router(&mut self) -> (&'static str, Instant) {
        for conn in self.network.control.keys().copied().collect::<Vec<_>>() {
            self.break_control(conn);
        }
        self.replace_router();
        ("router crashed", self.now)
    }

    /// Every connection of a process ends.
    fn break_all(&mut self, life: Life) {
        let control: Vec<NodeId> =
            self.network.control.iter().filter(|(_, c)| c.life == life).map(|(conn, _)| *conn).collect();
        for conn in control {
            self.break_control(conn);
        }
        let kv = self.network.kv.iter().filter(|(_, kv)| kv.from == life || kv.seated == Some(life));
        for conn in kv.map(|(conn, _)| *conn).collect::<Vec<_>>() {
            self.break_kv(conn);
        }
    }

    pub fn restart(&mut self, place: usize) {
        let old = &self.nodes[place];
        let life = Life { place, count: old.life.count + 1 };
        self.nodes[place] = SimNode::new(life, old.name.clone(), old.role(), &self.scenario);
        self.dial_router(life);
    }

    fn lose_control(&mut self) -> Option<(&'static str, Instant)> {
        let up: Vec<NodeId> = self.network.control.iter().filter(|(_, c)| !c.broken).map(|(conn, _)| *conn).collect();
        if up.is_empty() {
            return None;
        }
        let conn = self.random.of(&up);
        self.break_control(conn);
        Some(("control connection lost", self.now))
    }

    fn lose_kv(&mut self) -> Option<(&'static str, Instant)> {
        let up: Vec<Conn> = self.network.kv.iter().filter(|(_, kv)| !kv.broken).map(|(conn, _)| *conn).collect();
        if up.is_empty() {
            return None;
        }
        let conn = self.random.of(&up);
        self.break_kv(conn);
        Some(("KV connection lost", self.now))
    }

    /// Two processes do not reach each other; if it lasts, what connects them breaks.
    fn cut(&mut self) -> (&'static str, Instant) {
        let a = self.random.pick(self.nodes.len() as u64) as usize;
        let b = self.random.pick(self.nodes.len() as u64) as usize;
        let ends = if a == b { (End::Router, End::Node(a)) } else { (End::Node(a.min(b)), End::Node(a.max(b))) };
        let until = self.now + self.pause();
        self.network.cuts.insert(ends, until);
        if until.since(self.now) > IDLE_TIMEOUT {
            self.at(self.now + IDLE_TIMEOUT, Event::CutBreaks(ends.0, ends.1));
            ("network cut, connections lost", until)
        } else {
            ("network cut, connections kept", until)
        }
    }

    pub fn on_cut_breaks(&mut self, a: End, b: End) {
        let between = |x: End, y: End| (x.min(y), x.max(y)) == (a, b);
        let control = self.network.control.iter().filter(|(_, c)| between(End::Router, End::Node(c.life.place)));
        for conn in control.map(|(conn, _)| *conn).collect::<Vec<_>>() {
            self.break_control(conn);
        }
        let kv = self.network.kv.iter();
        let kv = kv.filter(|(_, kv)| between(End::Node(kv.from.place), End::Node(self.place_named(&kv.to.name))));
        for conn in kv.map(|(conn, _)| *conn).collect::<Vec<_>>() {
            self.break_kv(conn);
        }
    }

    /// A short or a long one, on both sides of the idle timeout.
    fn pause(&mut self) -> Duration {
        let most = self.random.of(&[200, 2_000, 10_000]);
        Duration::from_millis(1 + self.random.pick(most))
    }

    /// A process stands still: what reaches it waits, and if it lasts, its peers give it up.
    fn stall(&mut self) -> Option<(&'static str, Instant)> {
        let place = self.victim().filter(|&place| !self.nodes[place].stalled)?;
        let life = self.nodes[place].life;
        let until = self.now + self.pause();
        self.nodes[place].stalled = true;
        self.at(until, Event::Resume(life));
        if until.since(self.now) > IDLE_TIMEOUT {
            self.at(self.now + IDLE_TIMEOUT, Event::Silent(life));
            Some(("node stalled, connections lost", until))
        } else {
            Some(("node stalled, connections kept", until))
        }
    }

    pub fn on_silent(&mut self, life: Life) {
        self.break_all(life);
    }

    fn slow_down(&mut self) -> Option<(&'static str, Instant)> {
        let place = self.victim()?;
        self.nodes[place].slowness = self.random.of(&[10, 50, 200]);
        let until = self.now + self.pause();
        self.at(until, Event::Faster(self.nodes[place].life));
        Some(("engine slow", until))
    }

    /// Damages a page in the sender's memory or on its way: after its digest was taken.
    pub fn damage(&mut self, page: &mut PageFrame) {
        if !self.random.chance(self.scenario.faults.damage_permille) || page.cells.is_empty() {
            return;
        }
        *self.happened.entry("page damaged").or_default() += 1;
        let at = self.random.pick(page.cells.len() as u64) as usize;
        match self.random.pick(3) {
            0 => page.cells[at] ^= 1 << self.random.pick(64),
            1 => page.cells.truncate(at),
            // Misdirected: it claims to be its own mirror image.
            _ => page.index = page.index.wrapping_add(1),
        }
    }
}
