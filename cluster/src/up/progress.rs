//! What the user sees while models load: one line that is rewritten on a terminal, plain lines otherwise.
//!
//! Read [`Progress`]. It writes to stderr, so that stdout holds the banner only.

use std::io::{IsTerminal, Write};

/// How far one process is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Stage {
    /// Not started, or started and silent.
    Starting,
    /// The share of the model that is loaded.
    Loading(f64),
    /// It accepts connections.
    Ready,
}

/// Shows stages as they change.
#[derive(Debug)]
pub struct Progress {
    terminal: bool,
    shown: Vec<(String, String)>,
    open: bool,
}

impl Progress {
    /// For the stderr of this process.
    pub fn new() -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { terminal: std::io::stderr().is_terminal() && !dumb, shown: Vec::new(), open: false }
    }

    /// Shows what changed since the last call.
    pub fn show(&mut self, stages: &[(&str, Stage)]) {
        let now: Vec<(String, String)> =
            stages.iter().map(|(name, stage)| ((*name).to_owned(), describe(*stage, self.terminal))).collect();
        let changed: Vec<&(String, String)> = now.iter().filter(|entry| !self.shown.contains(entry)).collect();
        if changed.is_empty() {
            return;
        }
        let join = |entries: &mut dyn Iterator<Item = &(String, String)>| {
            entries.map(|(name, stage)| format!("{name} {stage}")).collect::<Vec<_>>().join("  ")
        };
        let mut out = std::io::stderr().lock();
        // A terminal that went away must not stop the cluster.
        let _ = if self.terminal {
            self.open = true;
            write!(out, "\r\x1b[K{}", join(&mut now.iter())).and_then(|()| out.flush())
        } else {
            writeln!(out, "{}", join(&mut changed.into_iter()))
        };
        drop(out);
        self.shown = now;
    }

    /// Takes the line away, before something else is printed.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.open) {
            let mut out = std::io::stderr().lock();
            let _ = write!(out, "\r\x1b[K").and_then(|()| out.flush());
        }
        self.shown.clear();
    }
}

/// On a terminal every percent counts; in a log, quarters do.
fn describe(stage: Stage, terminal: bool) -> String {
    match stage {
        Stage::Starting => "starting".into(),
        Stage::Ready => "ready".into(),
        Stage::Loading(fraction) => {
            let percent = (fraction.clamp(0.0, 1.0) * 100.0) as u32;
            format!("loading {}%", if terminal { percent } else { percent / 25 * 25 })
        }
    }
}

/// A size for people.
pub fn human_bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.0} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_show_quarters_and_terminals_every_percent() {
        assert_eq!(describe(Stage::Loading(0.49), false), "loading 25%");
        assert_eq!(describe(Stage::Loading(0.49), true), "loading 49%");
        assert_eq!(describe(Stage::Loading(7.0), true), "loading 100%");
        assert_eq!(describe(Stage::Ready, false), "ready");
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(human_bytes(10_432_928), "10 MB");
        assert_eq!(human_bytes(2_471_000_000), "2.47 GB");
    }
}
