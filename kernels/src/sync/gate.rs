//! The core of the thread pool: how workers enter and leave a job that its owner opens and closes. Knows neither threads nor
//! closures, so that loom can explore it.
//!
//! In words: the owner publishes a job by opening the gate. A worker that sees an open gate it has not been through joins
//! (adds itself to a count), works, and leaves. When the owner's own share is done it closes the gate and waits until the
//! count is zero. Nobody can join a closed gate, so after that the job's borrows may end; and a worker that sleeps through a
//! job does not delay it.

use super::primitive::{AtomicU64, Condvar, Mutex, MutexGuard, Ordering, spin_loop};

/// Workers inside the job: the low 30 bits.
const INSIDE: u64 = (1 << 30) - 1;
/// The pool is shutting down.
const STOP: u64 = 1 << 30;
/// The job may be joined.
const OPEN: u64 = 1 << 31;
/// One job number; the high 32 bits count jobs, so that a worker does not join the same one twice.
const JOB: u64 = 1 << 32;

/// A job's number, wrapping at 2^32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct JobNumber(u64);

impl JobNumber {
    /// What a worker that has seen no job yet passes to [`Gate::join`].
    pub(crate) const NONE: JobNumber = JobNumber(0);
}

/// See the module's text.
pub(crate) struct Gate {
    /// Job number, open and stop flags, and the number of workers inside, in one word so that joining is one step.
    state: AtomicU64,
    /// Workers asleep. A sleeper checks `state` under this lock, and whoever changes `state` takes the lock before it decides
    /// whether anyone must be woken, so no wake-up is lost.
    asleep: Mutex<usize>,
    opened: Condvar,
    emptied: Condvar,
    /// How often to look before going to sleep.
    spins: u32,
}

impl Gate {
    pub(crate) fn new(spins: u32) -> Gate {
        Gate { state: AtomicU64::new(0), asleep: Mutex::new(0), opened: Condvar::new(), emptied: Condvar::new(), spins }
    }

    /// Owner: lets workers in. What the owner wrote before is visible to whoever joins. The gate must be closed and empty.
    pub(crate) fn open(&self) {
        let before = self.state.load(Ordering::Relaxed);
        assert_eq!(before & (OPEN | INSIDE), 0, "the gate is in use");
        let next = before.wrapping_add(JOB) | OPEN;
        self.state.store(next, Ordering::Release);
        let sleepers = *self.lock();
        if sleepers > 0 {
            self.opened.notify_all();
        }
    }

    /// Owner: lets nobody else in and waits for those inside. What they wrote is visible afterwards.
    pub(crate) fn close(&self) {
        let inside = |state: u64| state & INSIDE != 0;
        if !inside(self.state.fetch_and(!OPEN, Ordering::AcqRel)) {
            return;
        }
        for _ in 0..self.spins {
            if !inside(self.state.load(Ordering::Acquire)) {
                return;
            }
            spin_loop();
        }
        let mut guard = self.lock();
        while inside(self.state.load(Ordering::Acquire)) {
            guard = self.emptied.wait(guard).expect("no holder of this lock can panic");
        }
    }

    /// Worker: waits for a job other than `seen` and joins it; `None` once the pool stops. Each join needs one [`Self::leave`].
    pub(crate) fn join(&self, seen: JobNumber) -> Option<JobNumber> {
        let wanted = |state: u64| state & STOP != 0 || (state & OPEN != 0 && state / JOB != seen.0);
        loop {
            let mut state = self.state.load(Ordering::Relaxed);
            for _ in 0..self.spins {
                if wanted(state) {
                    break;
                }
                spin_loop();
                state = self.state.load(Ordering::Relaxed);
            }
            if !wanted(state) {
                let mut guard = self.lock();
                state = self.state.load(Ordering::Relaxed);
                while !wanted(state) {
                    *guard += 1;
                    guard = self.opened.wait(guard).expect("no holder of this lock can panic");
                    *guard -= 1;
                    state = self.state.load(Ordering::Relaxed);
                }
            }
            while wanted(state) {
                if state & STOP != 0 {
                    return None;
                }
                match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                    Ok(_) => return Some(JobNumber(state / JOB)),
                    Err(now) => state = now,
                }
            }
        }
    }

    /// Worker: ends a join.
    pub(crate) fn leave(&self) {
        let after = self.state.fetch_sub(1, Ordering::Release) - 1;
        if after & (OPEN | INSIDE) == 0 {
            // The owner checks under this lock before it sleeps.
            drop(self.lock());
            self.emptied.notify_all();
        }
    }

    /// Owner: makes every present and later join answer `None`.
    pub(crate) fn stop(&self) {
        self.state.fetch_or(STOP, Ordering::Release);
        drop(self.lock());
        self.opened.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.asleep.lock().expect("no holder of this lock can panic")
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::super::claims::Claims;
    use super::super::primitive::AtomicUsize;
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;

    struct Shared {
        gate: Gate,
        /// Stands for the job's borrow: written by the owner while the gate is closed, read by workers inside.
        job: UnsafeCell<usize>,
        claims: Claims,
        done: AtomicUsize,
    }
    // SAFETY: `job` is guarded by the gate, which is what the test checks.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}

    fn work(shared: &Shared, thread: usize) {
        // SAFETY: the caller is the owner or inside the gate, and the owner writes only while nobody is inside.
        let tasks = shared.job.with(|p| unsafe { *p });
        let mut claims = shared.claims.of(thread, tasks);
        while claims.take().is_some() {
            shared.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Runs the jobs through a pool of this many workers under every interleaving of at most `bound` preemptions; without a
    /// bound, even one worker and two jobs take many minutes.
    fn explore(workers: usize, jobs: &'static [usize], bound: Option<usize>) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = bound;
        model.check(move || {
            let shared = Arc::new(Shared {
                gate: Gate::new(0),
                job: UnsafeCell::new(0),
                claims: Claims::new(workers + 1),
                done: AtomicUsize::new(0),
            });
            let threads: Vec<_> = (1..=workers)
                .map(|thread| {
                    let shared = shared.clone();
                    loom::thread::spawn(move || {
                        let mut seen = JobNumber::NONE;
                        while let Some(job) = shared.gate.join(seen) {
                            seen = job;
                            work(&shared, thread);
                            shared.gate.leave();
                        }
                    })
                })
                .collect();
            for &tasks in jobs {
                // SAFETY: the gate is closed and empty, so no worker reads.
                shared.job.with_mut(|p| unsafe { *p = tasks });
                shared.claims.reset(tasks);
                shared.done.store(0, Ordering::Relaxed);
                shared.gate.open();
                work(&shared, 0);
                shared.gate.close();
                assert_eq!(shared.done.load(Ordering::Relaxed), tasks);
            }
            shared.gate.stop();
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_one_worker_two_jobs() {
        explore(1, &[2, 1], Some(3));
    }

    #[test]
    fn loom_two_workers_one_job() {
        explore(2, &[2], Some(2));
    }
}
