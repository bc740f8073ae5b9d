//! Processes as `ps` shows them: who is whose child, with which arguments, alive or not. Linux only.

use std::path::PathBuf;

/// A process of this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its parent's id.
    pub parent: u32,
    /// Its arguments, the program first.
    pub args: Vec<String>,
    /// It has ended and waits for its parent to notice.
    pub zombie: bool,
}

impl Process {
    /// Looks one up.
    pub fn find(pid: u32) -> Option<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let stat = std::fs::read_to_string(folder.join("stat")).ok()?;
        // The name in parentheses may hold anything, so fields are counted from its end.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let args = std::fs::read(folder.join("cmdline")).ok()?;
        let args = args.split(|b| *b == 0).filter(|a| !a.is_empty());
        let args = args.map(|a| String::from_utf8_lossy(a).into_owned()).collect();
        Some(Self { pid, parent, args, zombie: state == "Z" || state == "X" })
    }

    /// All living children of a process.
    pub fn children_of(parent: u32) -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| Self::find(entry.file_name().to_str()?.parse().ok()?))
            .filter(|process| process.parent == parent && !process.zombie)
            .collect()
    }

    /// Whether it still runs.
    pub fn is_alive(pid: u32) -> bool {
        Self::find(pid).is_some_and(|process| !process.zombie)
    }

    /// The value after a flag of its command line.
    pub fn flag(&self, name: &str) -> Option<&str> {
        let at = self.args.iter().position(|arg| arg == name)?;
        self.args.get(at + 1).map(String::as_str)
    }
}

/// A signal that tests send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kill {
    /// What Ctrl-C sends.
    Interrupt,
    /// What asks a process to stop.
    Terminate,
    /// Cannot be caught.
    Kill,
    /// Freezes the process.
    Stop,
    /// Lets it go on.
    Continue,
}

/// Sends a signal to a process that a test started; one that is gone already is fine.
pub fn signal(pid: u32, kill: Kill) {
    use rustix::process::{Pid, Signal, kill_process};
    let signal = match kill {
        Kill::Terminate => Signal::TERM,
        Kill::Interrupt => Signal::INT,
        Kill::Kill => Signal::KILL,
        Kill::Stop => Signal::STOP,
        Kill::Continue => Signal::CONT,
    };
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    if let Err(error) = kill_process(pid, signal) {
        assert_eq!(error, rustix::io::Errno::SRCH, "cannot signal {pid:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::within;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn children_are_found_and_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("starts");
        let listed = || Process::children_of(std::process::id()).into_iter().find(|p| p.pid == child.id());
        assert!(listed().is_some(), "is listed");
        // The kernel shows a new program's arguments a moment after it has started.
        let shown = || listed().is_some_and(|found| found.flag("sleep") == Some("60"));
        assert!(within(Duration::from_secs(10), shown), "{:?}", listed());
        signal(child.id(), Kill::Kill);
        child.wait().expect("ends");
        assert!(!Process::is_alive(child.id()));
        signal(child.id(), Kill::Kill);
    }
}
