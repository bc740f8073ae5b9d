//! `cluster gpu-check`: what a device must show before anybody leans on it, and how fast it is, in one command.
//!
//! ```text
//! this process   divides the time, starts a process per phase, keeps what it says, writes the report     run, process, marks
//! a phase        checks or times, and says what it finds, a JSON object a line                           child, line
//! ```
//!
//! A phase that is over its time is ended and what it had said is kept; the next one starts on a fresh context of the device. With
//! `--device emulated` all of it runs on any machine with a C++ compiler, with small shapes and times that mean nothing, which is how
//! it is tested. Read [`run`], then [`Phase`] and [`marks`].

mod child;
mod clusters;
mod engine;
mod libraries;
mod line;
mod marks;
mod model;
mod phase;
mod process;
mod report;
mod sampling;

use crate::roles;
use crate::synth::Preset;
use anyhow::{Context, bail, ensure};
use clap::Args;
use line::Line;
pub use phase::Phase;
use process::Outcome;
use report::Report;
use ridge_kernels::cuda::Properties;
use ridge_model::device::{self, DeviceChoice};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The PyTorch script, so that it travels with the binary.
const TORCH_SCRIPT: &str = include_str!("../../../bench/gpu/torch_check.py");
/// What a phase is told to take of its time: the rest is for ending by itself.
const OWN_PART: f64 = 0.9;
/// Less time than this is not worth starting a phase for.
const WORTHWHILE: Duration = Duration::from_secs(3);

/// Flags of `cluster gpu-check`.
#[derive(Args, Debug)]
pub struct GpuCheckArgs {
    /// The device: cuda:N, or emulated.
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub device: DeviceChoice,
    /// Phases to run, such as products,timings. Default: all.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PHASES")]
    pub only: Vec<Phase>,
    /// Seconds for all of it. Each phase has its part; what one leaves goes to the next.
    #[arg(long, value_name = "SECONDS", default_value_t = 520, value_parser = clap::value_parser!(u64).range(5..=86_400))]
    pub budget_s: u64,
    /// Model whose answers are compared with the CPU's: folder, .gguf file or repository id. Without it, the built-in ridge-demo.
    #[arg(long)]
    pub model: Option<String>,
    /// Shape of the synthetic model. Default: llama-3.1-8b; on the emulator, tiny-llama.
    #[arg(long, value_enum)]
    pub preset: Option<Preset>,
    /// Folder for the synthetic model, some 40 GB for llama-3.1-8b with what serving it needs. Default: a temporary one, removed
    /// at the end.
    #[arg(long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Python that has PyTorch.
    #[arg(long, value_name = "PROGRAM", default_value = "python3")]
    pub python: PathBuf,
    /// Key of the random values. Default: another one each time.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Write the report to this file, after each phase.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Print the report as one JSON object; lines go to stderr then.
    #[arg(long)]
    pub json: bool,
    /// Run one phase in this process.
    #[arg(long, hide = true, value_enum)]
    pub phase: Option<Phase>,
    /// Run small shapes on a device, too.
    #[arg(long, hide = true)]
    pub small: bool,
}

impl GpuCheckArgs {
    /// Whether shapes are small and times mean nothing.
    fn is_small(&self) -> bool {
        self.small || self.device == DeviceChoice::Emulated
    }

    fn preset(&self) -> Preset {
        let default = if self.is_small() { Preset::TinyLlama } else { Preset::Llama31_8b };
        self.preset.unwrap_or(default)
    }
}

/// Runs the command; fails if a check does, or if a phase broke. Missed marks and skipped phases are reported and no failure.
pub fn run(args: &GpuCheckArgs) -> anyhow::Result<()> {
    if let Some(phase) = args.phase {
        return child::run(phase, args);
    }
    let started = Instant::now();
    let end = started + Duration::from_secs(args.budget_s);
    let seed = args.seed.unwrap_or_else(fresh_seed);
    let say = |line: &str| if args.json { eprintln!("{line}") } else { println!("{line}") };
    // Opened once to know what it is, or to say why it cannot be used; and closed again before anybody else opens it.
    let properties = properties(args)?;
    say(&describe(&properties));
    say(&format!("seed {seed}, {} s", args.budget_s));
    let temporary = match &args.work_dir {
        Some(_) => None,
        None => Some(tempfile::tempdir().context("cannot make a temporary folder")?),
    };
    let work = match (&args.work_dir, &temporary) {
        (Some(folder), _) => folder.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => bail!("no folder to work in"),
    };
    std::fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let libraries = libraries::find(&args.python, &work);
    let mut phases = if args.only.is_empty() { Phase::ALL.to_vec() } else { args.only.clone() };
    phases.sort_unstable();
    phases.dedup();

    let mut report = Report::new(args.device, &properties, (seed, args.budget_s), args.is_small());
    for (at, phase) in phases.iter().enumerate() {
        let begun = Instant::now();
        let left = end.saturating_duration_since(begun);
        let part = phase::slice(left, &phases[at..]);
        say(&format!("--- {} ({:.0} s)", phase.name(), part.as_secs_f64()));
        let outcome = if part < WORTHWHILE {
            Outcome::Skipped("the time is used up".into())
        } else {
            run_phase(*phase, args, seed, (&work, &libraries), begun + part, &mut |line| {
                say(&line.to_string());
                report.lines.push((*phase, line));
            })
        };
        if outcome != Outcome::Done {
            say(&format!("{}: {outcome}", phase.name()));
        }
        report.phases.push((*phase, outcome, begun.elapsed()));
        if let Some(path) = &args.out {
            report.write(path, started.elapsed())?;
        }
    }
    report.table().iter().for_each(|line| say(line));
    if args.json {
        println!("{:#}", report.json(started.elapsed()));
    }
    let failures = report.failures();
    ensure!(failures.is_empty(), "{} failed: {}", failures.len(), failures.join("; "));
    say(&format!("no check failed, in {} s", started.elapsed().as_secs()));
    Ok(())
}

/// Nanoseconds of the clock: a seed that nobody chose.
fn fresh_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(1, |since| since.as_nanos() as u64)
}

fn properties(args: &GpuCheckArgs) -> anyhow::Result<Properties> {
    // What finds the device needs no compiled kernel, and no library beside the driver.
    let found = device::properties(args.device, roles::kernel_cache().as_deref());
    let found = found.with_context(|| format!("--device {}", args.device))?;
    found.with_context(|| format!("--device {} is no CUDA device", args.device))
}

fn describe(device: &Properties) -> String {
    let Properties { name, sm, multiprocessors, .. } = device;
    format!("{name}: sm_{sm}, {multiprocessors} multiprocessors, {} MiB", device.memory_bytes >> 20)
}

/// Runs a phase until it ends or its time does.
fn run_phase(
    phase: Phase,
    args: &GpuCheckArgs,
    seed: u64,
    (work, libraries): (&Path, &libraries::Libraries),
    deadline: Instant,
    on_line: &mut dyn FnMut(Line),
) -> Outcome {
    let part = deadline.saturating_duration_since(Instant::now());
    match phase {
        Phase::Torch => {
            let script = work.join("torch_check.py");
            if let Err(error) = std::fs::write(&script, TORCH_SCRIPT) {
                return Outcome::Failed(format!("{}: {error}", script.display()));
            }
            let mut command = Command::new(&args.python);
            command.arg(&script).arg(format!("--budget-s={}", part.mul_f64(OWN_PART).as_secs()));
            if args.is_small() {
                command.arg("--small");
            }
            let on = if args.device == DeviceChoice::Emulated { "cpu".into() } else { args.device.to_string() };
            command.args(["--device", &on]);
            process::run(command, deadline, on_line)
        }
        Phase::Sanitizer => run_sanitizer(args, seed, (work, libraries), deadline, on_line),
        _ => process::run(command(phase, args, seed, (work, libraries), part, None), deadline, on_line),
    }
}

/// This program as one phase, behind another one that watches it if there is one.
fn command(
    phase: Phase,
    args: &GpuCheckArgs,
    seed: u64,
    (work, libraries): (&Path, &libraries::Libraries),
    part: Duration,
    behind: Option<&[&str]>,
) -> Command {
    let this = std::env::current_exe().unwrap_or_else(|_| "cluster".into());
    let mut command = match behind {
        Some([program, flags @ ..]) => {
            let mut command = Command::new(program);
            command.args(flags).arg(this);
            command
        }
        _ => Command::new(this),
    };
    command.arg("gpu-check").args(["--phase", &phase.name(), "--device", &args.device.to_string()]);
    command.args(["--seed", &seed.to_string(), "--budget-s", &part.mul_f64(OWN_PART).as_secs().max(5).to_string()]);
    command.arg("--work-dir").arg(work);
    if let Some(model) = &args.model {
        command.args(["--model", model]);
    }
    command.args(["--preset", &args.preset().name()]);
    if args.small || behind.is_some() {
        command.arg("--small");
    }
    libraries.show_to(&mut command);
    command
}

/// Small cases under compute-sanitizer: bad accesses first, then races within a block.
fn run_sanitizer(
    args: &GpuCheckArgs,
    seed: u64,
    folders: (&Path, &libraries::Libraries),
    deadline: Instant,
    on_line: &mut dyn FnMut(Line),
) -> Outcome {
    /// What it exits with if it found something, and a check never does.
    const FOUND: &str = "86";
    if args.device == DeviceChoice::Emulated {
        return Outcome::Skipped("compute-sanitizer watches CUDA devices; the emulator looks at bounds itself".into());
    }
    let Some(sanitizer) = libraries::sanitizer() else {
        return Outcome::Skipped("compute-sanitizer is not on this machine".into());
    };
    let runs = [
        ("memcheck", Phase::Rows),
        ("memcheck", Phase::Attention),
        ("memcheck", Phase::Products),
        ("racecheck", Phase::Attention),
        ("racecheck", Phase::Products),
    ];
    for (at, (tool, phase)) in runs.into_iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let part = left / (runs.len() - at) as u32;
        let watch = [sanitizer.as_str(), "--tool", tool, "--error-exitcode", FOUND, "--print-limit", "5"];
        let command = command(phase, args, seed, folders, part, Some(&watch));
        let name = format!("{tool} {}", phase.name());
        // What it says of checks has been said without it.
        let outcome = process::run(command, Instant::now() + part, &mut |_| {});
        on_line(match outcome {
            Outcome::Done => Line::verdict(name, None),
            Outcome::Failed(why) => Line::verdict(name, Some(why)),
            other => Line::Skipped { name, why: other.to_string() },
        });
    }
    Outcome::Done
}
