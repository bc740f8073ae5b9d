//! A pool of pinned threads for loops whose iterations are independent. The caller takes part, so one thread means no workers.
//!
//! Each thread has a fixed, contiguous share of the tasks, so that it meets the same weights in every pass; one that is done
//! takes what others have left, so that a thread that is late (asleep, or its core is busy) costs nothing but its share (see
//! [`super::claims`]). Idle workers spin for [`SPIN`], because a forward pass issues its next operation at once, and then
//! sleep. Read [`Placement`] and [`ThreadPool`].

use super::claims::Claims;
use super::gate::{Gate, JobNumber};
use super::primitive::Mutex;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread with a core of its own looks for work before it sleeps: longer than any gap within a pass, and some
/// times what waking up costs (5 to 50 us).
pub const SPIN: Duration = Duration::from_micros(50);
/// The same where threads or processes share cores: spinning would take the time that the spinner waits for.
pub const SPIN_SHARED: Duration = Duration::from_micros(2);

/// How many threads a pool has, and how they are to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// Threads, the one that calls [`ThreadPool::run`] included; 0 counts as 1.
    pub threads: usize,
    /// Cores to pin them to: thread `i` goes to `cores[i % len]`.
    pub cores: Option<Vec<usize>>,
    /// Niceness, 0 to 19: above 0 they give way to other processes on the same cores. Linux only.
    pub nice: u8,
    /// Another process computes on the same cores: sleep sooner.
    pub shared: bool,
}

impl Placement {
    /// Threads that may run anywhere and have the cores to themselves.
    pub fn threads(threads: usize) -> Placement {
        Placement { threads, cores: None, nice: 0, shared: false }
    }

    /// The core of thread `index`.
    pub fn core(&self, index: usize) -> Option<usize> {
        let cores = self.cores.as_deref().filter(|cores| !cores.is_empty())?;
        Some(cores[index % cores.len()])
    }

    /// How long its threads look for work before they sleep.
    fn spin(&self) -> Duration {
        let available = std::thread::available_parallelism().map_or(1, |n| n.get());
        if self.shared || self.threads > available { SPIN_SHARED } else { SPIN }
    }
}

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
    /// Who has which tasks.
    claims: Claims,
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
    /// The threads of `placement`, of which the caller of [`Self::run`] is thread 0: it pins itself and sets its own priority.
    pub fn new(placement: &Placement) -> ThreadPool {
        let threads = placement.threads.max(1);
        let shared = Arc::new(Shared {
            gate: Gate::new(looks(placement.spin())),
            job: UnsafeCell::new(None),
            claims: Claims::new(threads),
            panic: Mutex::new(None),
        });
        let workers = (1..threads)
            .map(|index| {
                let (core, nice) = (placement.core(index), placement.nice);
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || {
                        lower_priority(nice);
                        if let Some(core) = core {
                            pin_to(core);
                        }
                        worker(&shared, index);
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
        shared.claims.reset(tasks);
        shared.gate.open();
        shared.work(0);
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
    /// Claims and runs tasks as this thread until none is left. The caller is the owner or inside the gate.
    fn work(&self, thread: usize) {
        // SAFETY: the cell was written before the gate opened and is not written again until it is closed and empty.
        let Some(job) = (unsafe { *self.job.get() }) else { return };
        IN_TASK.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut claims = self.claims.of(thread, job.tasks);
            while let Some(task) = claims.take() {
                // SAFETY: the closure lives until the gate has closed behind us.
                unsafe { (*job.f)(task) };
            }
        }));
        IN_TASK.set(false);
        if let Err(panic) = result {
            self.claims.drop_rest(job.tasks);
            self.panic.lock().expect("no holder of this lock can panic").get_or_insert(panic);
        }
    }
}

fn worker(shared: &Shared, thread: usize) {
    let mut seen = JobNumber::NONE;
    while let Some(job) = shared.gate.join(seen) {
        seen = job;
        shared.work(thread);
        shared.gate.leave();
    }
}

/// How many looks at the gate take this long; measured once, because a pause takes 12 ns on one CPU and 45 on another.
fn looks(time: Duration) -> u32 {
    const SAMPLE: u32 = 200;
    static LOOK_NS: OnceLock<f64> = OnceLock::new();
    let look_ns = LOOK_NS.get_or_init(|| {
        let sample = || {
            let begin = Instant::now();
            (0..SAMPLE).for_each(|_| std::hint::spin_loop());
            begin.elapsed().as_nanos() as f64 / f64::from(SAMPLE)
        };
        // The least: an interruption only makes a sample longer.
        (0..5).map(|_| sample()).fold(f64::INFINITY, f64::min).max(1.0)
    });
    (time.as_nanos() as f64 / look_ns) as u32
}

/// Lets other threads of the machine go before the calling one. 0 leaves it as it is; a refusal costs only the courtesy.
pub fn lower_priority(nice: u8) {
    if nice == 0 {
        return;
    }
    // On Linux "the calling process" of this call is the calling thread.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, i32::from(nice)) {
        tracing::warn!(nice, %error, "cannot lower the priority of a compute thread");
    }
    #[cfg(not(target_os = "linux"))]
    tracing::debug!(nice, "priorities of threads are not supported here");
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
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 7] {
            let pool = ThreadPool::new(&Placement::threads(threads));
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
        let pool = ThreadPool::new(&Placement::threads(3));
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
        let pool = ThreadPool::new(&Placement { cores: Some(vec![0]), nice: 5, shared: true, ..Placement::threads(2) });
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
        let pool = ThreadPool::new(&Placement::threads(2));
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
