//! Who runs which task of a job: a fixed share per thread, and what a late thread has left for whoever is done.
//!
//! In words: the tasks are cut into one contiguous range per thread. A thread takes its own tasks first, in order, then those
//! of the next thread, and so on around. Each range has a counter, which everyone who takes from it adds to, so that each task
//! is taken once. Counters are a cache line apart: while all threads keep to their own, none waits for another's line.

use super::primitive::{AtomicUsize, Ordering};

/// A counter on cache lines of its own; two, because CPUs fetch them in pairs.
#[repr(align(128))]
struct Next(AtomicUsize);

/// See the module's text.
pub(crate) struct Claims {
    next: Box<[Next]>,
}

impl Claims {
    /// For this many threads, at least one.
    pub(crate) fn new(threads: usize) -> Claims {
        Claims { next: (0..threads).map(|_| Next(AtomicUsize::new(0))).collect() }
    }

    /// Begins a job. Nobody may be taking tasks; who takes some later must have been told of the job by something that orders
    /// memory, such as the gate.
    pub(crate) fn reset(&self, tasks: usize) {
        for (thread, next) in self.next.iter().enumerate() {
            next.0.store(self.start(thread, tasks), Ordering::Relaxed);
        }
    }

    /// The tasks of a job as `thread` comes by them.
    pub(crate) fn of(&self, thread: usize, tasks: usize) -> Taker<'_> {
        Taker { claims: self, tasks, range: thread, left: self.next.len() }
    }

    /// Makes all tasks that nobody has taken yet vanish.
    #[cfg_attr(loom, allow(dead_code, reason = "the pool, which calls it, is left out under loom"))]
    pub(crate) fn drop_rest(&self, tasks: usize) {
        for (thread, next) in self.next.iter().enumerate() {
            // Not a store: another thread's claim in between would be forgotten, and its task be done twice.
            next.0.fetch_max(self.start(thread + 1, tasks), Ordering::Relaxed);
        }
    }

    /// The first task of a thread's range; the ranges cover `0..tasks`.
    fn start(&self, thread: usize, tasks: usize) -> usize {
        tasks * thread / self.next.len()
    }
}

/// One thread's way through a job.
pub(crate) struct Taker<'a> {
    claims: &'a Claims,
    tasks: usize,
    /// Whose range is being taken from.
    range: usize,
    /// Ranges that may hold something, this one included.
    left: usize,
}

impl Taker<'_> {
    /// The next task that is this thread's to run.
    pub(crate) fn take(&mut self) -> Option<usize> {
        while self.left > 0 {
            let next = &self.claims.next[self.range].0;
            let end = self.claims.start(self.range + 1, self.tasks);
            // Looking before adding keeps finished ranges' lines shared.
            if next.load(Ordering::Relaxed) < end {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task < end {
                    return Some(task);
                }
            }
            self.left -= 1;
            self.range = if self.range + 1 == self.claims.next.len() { 0 } else { self.range + 1 };
        }
        None
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn own_tasks_come_first_and_every_task_once() {
        let claims = Claims::new(3);
        claims.reset(7);
        let mut second = claims.of(1, 7);
        assert_eq!((second.take(), second.take()), (Some(2), Some(3)));
        let mut first = claims.of(0, 7);
        assert_eq!(first.take(), Some(0));
        // The second thread has finished its own range and goes on to the third's, then the first's.
        assert_eq!([second.take(), second.take(), second.take(), second.take()], [Some(4), Some(5), Some(6), Some(1)]);
        assert_eq!((second.take(), first.take(), claims.of(2, 7).take()), (None, None, None));
    }

    #[test]
    fn nothing_is_left_after_a_drop() {
        let claims = Claims::new(2);
        claims.reset(10);
        assert_eq!(claims.of(1, 10).take(), Some(5));
        claims.drop_rest(10);
        assert_eq!((claims.of(0, 10).take(), claims.of(1, 10).take()), (None, None));
    }
}
