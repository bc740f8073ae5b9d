//! What memory the machine, or the container that this process is in, can still give.
//!
//! Linux: the lower of `MemAvailable` and what every control group around this process leaves, versions 1 and 2.
//! Elsewhere nothing is known, and nobody is refused. Read [`MachineMemory::read`].

use std::fmt::{self, Display};

/// What is assumed where nothing is known.
const ASSUMED_BYTES: u64 = 8 << 30;

/// Memory that may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MachineMemory {
    /// Bytes.
    pub bytes: u64,
    /// How that is known.
    pub source: MemorySource,
    /// False if `bytes` is a guess that nobody should be refused for.
    pub known: bool,
}

/// How it is known what memory there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemorySource {
    /// The user said so.
    Flag,
    /// `/proc/meminfo`.
    Available,
    /// A limit of a control group.
    ControlGroup,
    /// A guess.
    Assumed,
}

impl Display for MemorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flag => "--memory",
            Self::Available => "MemAvailable",
            Self::ControlGroup => "the control group's limit",
            Self::Assumed => "assumed",
        })
    }
}

impl MachineMemory {
    /// As the user said.
    pub fn given(bytes: u64) -> Self {
        Self { bytes, source: MemorySource::Flag, known: true }
    }

    /// What this process may use now.
    pub fn read() -> Self {
        Self::from_files(&|path| std::fs::read_to_string(path).ok())
    }

    /// The same from any file system.
    fn from_files(read: &dyn Fn(&str) -> Option<String>) -> Self {
        let available = read("/proc/meminfo").and_then(|text| field(&text, "MemAvailable:")).map(|kib| kib << 10);
        let Some(bytes) = available else {
            return Self { bytes: ASSUMED_BYTES, source: MemorySource::Assumed, known: false };
        };
        match control_group(read) {
            Some(limit) if limit < bytes => Self { bytes: limit, source: MemorySource::ControlGroup, known: true },
            _ => Self { bytes, source: MemorySource::Available, known: true },
        }
    }
}

/// What the tightest control group around this process leaves; pages of files count as left.
fn control_group(read: &dyn Fn(&str) -> Option<String>) -> Option<u64> {
    let groups = read("/proc/self/cgroup")?;
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let version = match controllers {
            "" => &VERSION_2,
            list if list.split(',').any(|name| name == "memory") => &VERSION_1,
            _ => continue,
        };
        // A container may see its own group as the root, whatever the path says: the root is always looked at.
        let mut path = path.trim_end_matches('/');
        loop {
            least = [least, version.left(read, path)].into_iter().flatten().min();
            let Some((parent, _)) = path.rsplit_once('/') else { break };
            path = parent;
        }
    }
    least
}

/// Where a version of control groups keeps its numbers.
struct Version {
    root: &'static str,
    limit: &'static str,
    usage: &'static str,
    file_pages: [&'static str; 2],
}

const VERSION_1: Version = Version {
    root: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    file_pages: ["total_active_file ", "total_inactive_file "],
};

const VERSION_2: Version = Version {
    root: "/sys/fs/cgroup",
    limit: "memory.max",
    usage: "memory.current",
    file_pages: ["active_file ", "inactive_file "],
};

impl Version {
    /// What the group at `path` leaves; `None` if it does not exist or has no limit.
    fn left(&self, read: &dyn Fn(&str) -> Option<String>, path: &str) -> Option<u64> {
        let file = |name: &str| read(&format!("{}{path}/{name}", self.root));
        // Version 2 says `max` where there is none; version 1 a number that no machine has.
        let limit: u64 = file(self.limit)?.trim().parse().ok()?;
        let usage: u64 = file(self.usage)?.trim().parse().ok()?;
        let stat = file("memory.stat").unwrap_or_default();
        let cached: u64 = self.file_pages.iter().filter_map(|name| field(&stat, name)).sum();
        Some(limit.saturating_sub(usage.saturating_sub(cached)))
    }
}

/// The number of the line that begins with `name`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.trim().trim_end_matches("kB").trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(files: &[(&str, &str)]) -> MachineMemory {
        MachineMemory::from_files(&|path| Some(files.iter().find(|(name, _)| *name == path)?.1.to_owned()))
    }

    const MEMINFO: (&str, &str) = ("/proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n");

    #[test]
    fn the_lowest_limit_counts() {
        let check = |files: &[(&str, &str)], bytes, source| {
            assert_eq!(memory(files), MachineMemory { bytes, source, known: true });
        };
        check(&[MEMINFO], 8000 << 10, MemorySource::Available);
        let v2 = [
            MEMINFO,
            ("/proc/self/cgroup", "0::/a/b\n"),
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/b/memory.current", "1000\n"),
            ("/sys/fs/cgroup/a/memory.max", "4000000\n"),
            ("/sys/fs/cgroup/a/memory.current", "1500000\n"),
            ("/sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 300000\nactive_file 200000\n"),
        ];
        check(&v2, 3_000_000, MemorySource::ControlGroup);
        // A version 1 container whose path is not visible inside: its group is the mount's root.
        let v1 = [
            MEMINFO,
            ("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "500000\n"),
        ];
        check(&v1, 1_500_000, MemorySource::ControlGroup);
        let unlimited = [
            MEMINFO,
            ("/proc/self/cgroup", "4:memory:/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "500000\n"),
        ];
        check(&unlimited, 8000 << 10, MemorySource::Available);
    }

    #[test]
    fn elsewhere_nothing_is_known() {
        assert!(!memory(&[]).known);
    }
}
