//! A pool of pinned threads for loops whose iterations are independent. The caller takes part, so one thread means no workers.
//!
//! Tasks are claimed one by one from a counter: a thread that is late (asleep, or its core is busy) costs the others nothing
//! but its share. Idle workers spin for some tens of microseconds, because a forward pass issues its next operation at once,
//! and then sleep.

use super::gate::{Gate, JobNumber};
use super::primitive::{AtomicUsize, Mutex, Ordering};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Looks before sleeping when every thread has its own core: about 90 us where PAUSE takes 45 ns, 25 us where it takes 12.
const SPINS: u32 = 2000;
/// Looks before sleeping when threads must share cores: spinning would take the time that the spinner waits for.
const SPINS_OVERCOMMITTED: u32 = 20;

thread_local! {
    /// True while this thread runs a task; a loop inside a task then runs on the spot instead of waiting for itself.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of worker threads; see the module's text.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held for the length of a run: one job at a time.
    turn: Mutex<()>,
}

struct Shared {
    gate: Gate,
    /// The current job; written by the owner while the gate is closed, read by those inside.
    job: UnsafeCell<Option<Job>>,
    /// Next task to claim.
    next: AtomicUsize,
    /// The first panic of the current job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only field that is not Sync. The owner writes it only while the gate is closed and empty, workers read it
// only while inside, and the gate orders the two (explored by loom in `gate`).
unsafe impl Sync for Shared {}
// SAFETY: the job's pointer leads to a `Sync` closure, which any thread may call.
unsafe impl Send for Shared {}

#[derive(Clone, Copy)]
struct Job {
    /// The closure with its lifetime erased; it outlives the job because `run` closes the gate before it returns.
    f: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

impl ThreadPool {
    /// A pool of `threads` threads, the caller of [`Self::run`] included; 0 counts as 1. With `cores`, worker `i` is pinned to
    /// `cores[i % len]` and the caller stands for worker 0, which is left to pin itself.
    pub fn new(threads: usize, cores: Option<&[usize]>) -> ThreadPool {
        let threads = threads.max(1);
        let available = std::thread::available_parallelism().map_or(1, |n| n.get());
        let spins = if threads > available { SPINS_OVERCOMMITTED } else { SPINS };
        let shared = Arc::new(Shared {
            gate: Gate::new(spins),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
        });
        let workers = (1..threads)
            .map(|index| {
                let core = cores.filter(|c| !c.is_empty()).map(|c| c[index % c.len()]);
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || {
                        if let Some(core) = core {
                            pin_to(core);
                        }
                        worker(&shared);
                    })
                    .expect("the process may start its compute threads")
            })
            .collect();
        ThreadPool { shared, workers, turn: Mutex::new(()) }
    }

    /// Number of threads that take part in a run, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0..tasks)`, each index once, on any of the threads, and returns when all calls have. If a call panics, unclaimed
    /// tasks are dropped and the first panic goes on in the caller. Inside a task, a further `run` happens on the spot.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || IN_TASK.get() {
            (0..tasks).for_each(f);
            return;
        }
        // A panic of an earlier run unwound through this guard after the job had ended, so its poison means nothing.
        let turn = self.turn.lock().unwrap_or_else(|poison| poison.into_inner());
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased. The gate is closed and empty before this function returns or unwinds (`work`
        // catches panics), so no worker holds the pointer after `f`'s borrow ends.
        let f: *const (dyn Fn(usize) + Sync) =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f) };
        // SAFETY: the turn is ours and the gate is closed, so nobody else touches the cell.
        unsafe { *shared.job.get() = Some(Job { f, tasks }) };
        shared.next.store(0, Ordering::Relaxed);
        shared.gate.open();
        shared.work();
        shared.gate.close();
        let panic = shared.panic.lock().expect("no holder of this lock can panic").take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.gate.stop();
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics, so joining cannot fail; and a panic in drop would abort.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Claims and runs tasks until none is left. The caller is the owner or inside the gate.
    fn work(&self) {
        // SAFETY: the cell was written before the gate opened and is not written again until it is closed and empty.
        let Some(job) = (unsafe { *self.job.get() }) else { return };
        IN_TASK.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                // SAFETY: the closure lives until the gate has closed behind us.
                unsafe { (*job.f)(task) };
            }
        }));
        IN_TASK.set(false);
        if let Err(panic) = result {
            self.next.store(job.tasks, Ordering::Relaxed);
            self.panic.lock().expect("no holder of this lock can panic").get_or_insert(panic);
        }
    }
}

fn worker(shared: &Shared) {
    let mut seen = JobNumber::NONE;
    while let Some(job) = shared.gate.join(seen) {
        seen = job;
        shared.work();
        shared.gate.leave();
    }
}

/// Pins the calling thread to one core. A refusal (a core outside the process's set) is logged and costs only speed.
pub fn pin_to(core: usize) {
    #[cfg(target_os = "linux")]
    {
        let mut set = rustix::thread::CpuSet::new();
        if core < rustix::thread::CpuSet::MAX_CPU {
            set.set(core);
        }
        if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
            tracing::warn!(core, %error, "cannot pin a compute thread");
        }
    }
    #[cfg(not(target_os = "linux"))]
    tracing::debug!(core, "pinning is not supported here");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 7] {
            let pool = ThreadPool::new(threads, None);
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 5, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(3, None);
        for bad in 0..8 {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert!(i != bad, "task {i}"))));
            let message = caught.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(*message, format!("task {bad}"));
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn runs_nest_and_callers_queue() {
        let pool = ThreadPool::new(2, Some(&[0, 0]));
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(4, &|_| {
                            pool.run(2, &|_| {
                                sum.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 200 * 8);
    }

    #[test]
    fn workers_wake_after_sleeping() {
        let pool = ThreadPool::new(2, None);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let done = AtomicUsize::new(0);
            pool.run(64, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 64);
        }
    }
}
