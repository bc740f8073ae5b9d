//! One phase in a process of its own: what it finds goes to standard output, a line each. Read [`run`].

use super::line::Line;
use super::{GpuCheckArgs, Phase, clusters, engine, model, sampling};
use crate::roles;
use anyhow::{Context, bail};
use ridge_kernels::cuda::check::timing::{self, Subject};
use ridge_kernels::cuda::check::{self, Effort, Group};
use ridge_kernels::cuda::nvml::Nvml;
use ridge_kernels::cuda::ops::blas;
use ridge_kernels::cuda::source::SOURCES;
use ridge_kernels::cuda::{Device, compile};
use ridge_model::device::{self, DeviceChoice};
use serde_json::json;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a phase needs.
pub struct Job<'a> {
    /// What was asked for.
    pub args: &'a GpuCheckArgs,
    /// Key of random values.
    pub seed: u64,
    /// When it should have ended.
    pub deadline: Instant,
    /// Folder for the synthetic model.
    pub work: PathBuf,
}

impl Job<'_> {
    /// Small shapes, whose times mean nothing.
    pub fn is_small(&self) -> bool {
        self.args.is_small()
    }

    /// Whether its time is over.
    pub fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// Opens the device.
    pub fn device(&self) -> anyhow::Result<Arc<dyn Device>> {
        let choice = self.args.device;
        let opened =
            device::open(choice, roles::kernel_cache().as_deref()).with_context(|| format!("--device {choice}"));
        opened?.with_context(|| format!("--device {choice} is no CUDA device"))
    }
}

/// Says a finding. A reader that is gone ends the process soon: nobody waits for it.
pub fn say(line: &Line) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", line.json()).and_then(|()| out.flush());
}

/// Runs a phase.
pub fn run(phase: Phase, args: &GpuCheckArgs) -> anyhow::Result<()> {
    end_with_the_parent();
    let context = Job {
        args,
        seed: args.seed.unwrap_or(1),
        deadline: Instant::now() + Duration::from_secs(args.budget_s),
        work: args.work_dir.clone().context("a phase is told where to work")?,
    };
    match phase {
        Phase::Compile => compile(&context),
        Phase::Rows => checks(&context, Group::Rows),
        Phase::Attention => checks(&context, Group::Attention),
        Phase::Products => checks(&context, Group::Products),
        Phase::Scaled => checks(&context, Group::Scaled),
        Phase::Experimental => {
            if context.device()?.properties().sm != 90 {
                let why = "these kernels are for compute capability 9.0".into();
                say(&Line::Skipped { name: "experimental kernels".into(), why });
                return Ok(());
            }
            checks(&context, Group::Experimental)
        }
        Phase::Engine => {
            sampling::run(&context)?;
            engine::run(&context)
        }
        Phase::Clusters => clusters::small(&context),
        Phase::Timings => timings(&context),
        Phase::Model => model::run(&context),
        Phase::Serving => clusters::serving(&context),
        Phase::Torch | Phase::Sanitizer => bail!("{} is another program's", phase.name()),
    }
}

/// A phase that nobody hears any more is of no use, and holds the device.
fn end_with_the_parent() {
    std::thread::spawn(|| {
        let mut input = std::io::stdin().lock();
        let mut bytes = [0; 64];
        while input.read(&mut bytes).is_ok_and(|read| read > 0) {}
        std::process::exit(1);
    });
}

/// Compiles every source, all at once.
fn compile(context: &Job<'_>) -> anyhow::Result<()> {
    if context.args.device == DeviceChoice::Emulated {
        let why = "the emulator builds what is used when it is used".into();
        say(&Line::Skipped { name: "compiling".into(), why });
        return Ok(());
    }
    let sm = context.device()?.properties().sm;
    let cache = roles::kernel_cache();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for source in SOURCES {
            let cache = cache.as_deref();
            scope.spawn(move || {
                let begun = Instant::now();
                let made = compile::cubin(source.name, sm, cache);
                say(&Line::verdict(format!("compile {}", source.name), made.err().map(|error| error.to_string())));
                say(&Line::seconds(format!("compile {}", source.name), begun.elapsed().as_secs_f64().max(1e-6)));
            });
        }
    });
    say(&Line::seconds("compile all", started.elapsed().as_secs_f64()));
    Ok(())
}

fn checks(context: &Job<'_>, group: Group) -> anyhow::Result<()> {
    let effort = if context.is_small() { Effort::Small } else { Effort::Full };
    let mut report = |check: &check::Check| {
        say(&Line::Check {
            name: check.name.clone(),
            cases: check.cases as u64,
            error: check.worst.is_finite().then_some(check.worst),
            failure: check.failure.clone(),
        });
    };
    check::run(&context.device()?, group, context.seed, effort, Some(context.deadline), &mut report)?;
    Ok(())
}

fn timings(context: &Job<'_>) -> anyhow::Result<()> {
    let device = context.device()?;
    let effort = if context.is_small() { Effort::Small } else { Effort::Full };
    let mut report = |timing: timing::Timing| {
        let timing::Timing { name, seconds, operations, bytes } = timing;
        say(&Line::Time { name, seconds, operations, bytes });
    };
    if let Err(error) = blas::open(&device, 1) {
        say(&Line::Skipped { name: "cuBLASLt".into(), why: error.to_string() });
    }
    // What the marks are measured by comes first.
    for subject in [Subject::Copy, Subject::Gemm, Subject::Attention, Subject::Gemv] {
        timing::run(&device, subject, effort, context.seed, Some(context.deadline), &mut report)?;
    }
    state(&*device);
    if context.is_late() {
        say(&Line::Fact { name: "timings".into(), value: json!("cut short by the deadline") });
    }
    Ok(())
}

/// What the driver says of the device just after it has worked: a card that was throttled explains its times.
fn state(device: &dyn Device) {
    let Some(id) = device.pci_bus_id() else { return };
    let read = Nvml::open().and_then(|nvml| Ok((nvml.device(&id)?.read(), nvml.driver_version())));
    match read {
        Ok((reading, driver)) => {
            let value = json!({
                "driver": driver,
                "power_w": reading.power_mw.map(|mw| f64::from(mw) / 1e3),
                "clock_mhz": reading.clock_mhz,
                "memory_clock_mhz": reading.memory_clock_mhz,
                "temperature_c": reading.temperature_c,
                "memory_used_bytes": reading.memory_used_bytes,
            });
            say(&Line::Fact { name: "device".into(), value });
        }
        Err(error) => say(&Line::Skipped { name: "device state".into(), why: error.to_string() }),
    }
}
