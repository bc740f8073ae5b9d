//! What a process's threads used of their cores while something ran.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::time::Instant;

/// Cores used between two moments.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Wall time, in seconds.
    pub seconds: f64,
    /// CPU time of all threads, in seconds.
    pub cpu_s: f64,
    /// CPU time of the busiest thread, in seconds, known by the hundredth. 0 where the system does not tell.
    pub busiest_s: f64,
}

/// A moment from which to count.
pub struct Since {
    begin: Instant,
    cpu_s: f64,
    threads: BTreeMap<String, f64>,
}

impl Since {
    /// Now.
    pub fn now() -> Self {
        Self { threads: threads(), cpu_s: process(), begin: Instant::now() }
    }

    /// What was used since then.
    pub fn usage(&self) -> Usage {
        let seconds = self.begin.elapsed().as_secs_f64();
        let cpu_s = process() - self.cpu_s;
        let used = |(thread, cpu_s): (String, f64)| cpu_s - self.threads.get(&thread).unwrap_or(&0.0);
        Usage { seconds, cpu_s, busiest_s: threads().into_iter().map(used).fold(0.0, f64::max) }
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.cpu_s += other.cpu_s;
        self.busiest_s += other.busiest_s;
    }
}

/// Seconds that this process has spent on cores.
fn process() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The same of each thread, by its id.
fn threads() -> BTreeMap<String, f64> {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return BTreeMap::new() };
    let seconds = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        // The name may hold anything but ends with the last parenthesis; user and system time are fields 14 and 15.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
        let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
        Some((
            task.file_name().to_string_lossy().into_owned(),
            ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
        ))
    };
    tasks.flatten().filter_map(seconds).collect()
}
