//! What came of all phases: for people at the end of a run, and as JSON for `bench/results`.

use super::line::Line;
use super::marks::{Mark, marks};
use super::phase::Phase;
use super::process::Outcome;
use crate::bench::host;
use anyhow::Context;
use ridge_kernels::cuda::Properties;
use ridge_model::device::DeviceChoice;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// A run so far.
pub struct Report {
    head: Value,
    /// Shapes are small, or there is no device: its times say nothing.
    meaningless: bool,
    /// What was found, by phase.
    pub lines: Vec<(Phase, Line)>,
    /// Phases that are over, how they ended and what they took.
    pub phases: Vec<(Phase, Outcome, Duration)>,
}

impl Report {
    /// Of a run that begins.
    pub fn new(choice: DeviceChoice, device: &Properties, (seed, budget_s): (u64, u64), meaningless: bool) -> Self {
        let head = json!({
            "benchmark": "gpu-check",
            "date": host::date(),
            "command": host::command(),
            "version": env!("CARGO_PKG_VERSION"),
            "device": {
                "choice": choice.to_string(),
                "name": device.name,
                "sm": device.sm,
                "multiprocessors": device.multiprocessors,
                "memory_bytes": device.memory_bytes,
                "driver": driver_version(),
            },
            "machine": {"cpu": host::cpu_name(), "cores": host::cores(), "system": std::env::consts::OS},
            "seed": seed,
            "budget_s": budget_s,
        });
        Self { head, meaningless, lines: Vec::new(), phases: Vec::new() }
    }

    /// Everything that went wrong.
    pub fn failures(&self) -> Vec<String> {
        let phases = self.phases.iter().filter_map(|(phase, outcome, _)| match outcome {
            Outcome::Failed(why) => Some(format!("{}: {why}", phase.name())),
            _ => None,
        });
        let checks = self.lines.iter().filter_map(|(phase, line)| match line {
            Line::Check { name, failure: Some(why), .. } => Some(format!("{}: {name}: {why}", phase.name())),
            _ => None,
        });
        phases.chain(checks).collect()
    }

    fn marks(&self) -> Vec<Mark> {
        let lines = self.lines.iter().map(|(_, line)| line);
        marks(lines.filter(|_| !self.meaningless))
    }

    /// The marks for people, with a word if none can be measured here.
    pub fn table(&self) -> Vec<String> {
        let mut lines = vec!["--- marks: ratios within this run, the worst shape of each".to_owned()];
        if self.meaningless {
            lines.push("(small shapes, or no device: these times mean nothing)".to_owned());
        }
        lines.extend(self.marks().iter().map(Mark::to_string));
        lines
    }

    /// The whole report.
    pub fn json(&self, elapsed: Duration) -> Value {
        let mut out = self.head.clone();
        let phases = self.phases.iter().map(|(phase, outcome, took)| {
            json!({"phase": phase.name(), "outcome": outcome.to_string(), "seconds": rounded(took.as_secs_f64())})
        });
        out["phases"] = phases.collect();
        for (key, wanted) in [
            ("checks", (|line| matches!(line, Line::Check { .. })) as fn(&Line) -> bool),
            ("times", |line| matches!(line, Line::Time { .. })),
            ("facts", |line| matches!(line, Line::Fact { .. })),
            ("skipped", |line| matches!(line, Line::Skipped { .. })),
        ] {
            let of = self.lines.iter().filter(|(_, line)| wanted(line)).map(|(phase, line)| {
                let mut value = line.json();
                value["phase"] = json!(phase.name());
                value
            });
            out[key] = of.collect();
        }
        out["marks"] = self.marks().iter().map(Mark::json).collect();
        out["failures"] = json!(self.failures());
        out["seconds"] = rounded(elapsed.as_secs_f64());
        out
    }

    /// Writes it to a file, which is either the last report or this one.
    pub fn write(&self, path: &Path, elapsed: Duration) -> anyhow::Result<()> {
        let partial = path.with_extension("part");
        let text = format!("{:#}\n", self.json(elapsed));
        std::fs::write(&partial, text)
            .and_then(|()| std::fs::rename(&partial, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

fn rounded(seconds: f64) -> Value {
    json!((seconds * 10.0).round() / 10.0)
}

/// The kernel module's version, such as 580.159.04, where it says so.
fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let words = text.lines().next()?.split_whitespace();
    let version = words.filter(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'));
    version.map(str::to_owned).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_of_phases_and_checks() {
        let device = Properties {
            name: "x".into(),
            sm: 90,
            multiprocessors: 1,
            shared_per_block: 1,
            memory_bytes: 1,
            l2_bytes: 1,
        };
        let mut report = Report::new(DeviceChoice::Cuda(0), &device, (7, 520), false);
        report.lines.push((Phase::Rows, Line::verdict("good", None)));
        report.lines.push((Phase::Rows, Line::verdict("bad", Some("off".into()))));
        report.lines.push((Phase::Timings, Line::seconds("copy", 2.0)));
        report.phases.push((Phase::Rows, Outcome::Done, Duration::from_secs(2)));
        report.phases.push((Phase::Torch, Outcome::Skipped("not here".into()), Duration::ZERO));
        report.phases.push((Phase::Model, Outcome::Failed("broke".into()), Duration::from_secs(1)));
        assert_eq!(report.failures(), ["model: broke", "rows: bad: off"]);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("report.json");
        report.write(&path, Duration::from_secs(3)).expect("written");
        let read: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("there")).expect("JSON");
        assert_eq!(read["times"][0]["phase"], "timings");
        assert_eq!(read["phases"][1]["outcome"], "skipped: not here");
        assert_eq!((read["failures"].as_array().map(Vec::len), &read["device"]["sm"]), (Some(2), &json!(90)));
    }
}
