//! `cluster sim fault`: the production machines of whole clusters under virtual time, until an invariant breaks.
//!
//! What is simulated, and what must hold, is in `ridge-sim`; here are the flags, the clock and the report.

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use ridge_sim::{Failure, Sabotage, Scenario, Sum, try_run};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Flags of `cluster sim`.
#[derive(Args, Debug)]
pub struct SimArgs {
    /// What is simulated.
    #[command(subcommand)]
    pub command: SimCommand,
}

/// What `cluster sim` simulates.
#[derive(Subcommand, Debug)]
pub enum SimCommand {
    /// Look for a seed under which a cluster breaks an invariant: crashes, stalls, lost connections, damaged pages,
    /// overload. The same seed always gives the same run.
    Fault(FaultArgs),
}

/// Flags of `cluster sim fault`.
#[derive(Args, Debug)]
pub struct FaultArgs {
    /// First seed.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How many seeds. Default: 1, or as many as --seconds allows.
    #[arg(long, value_name = "K")]
    pub seeds: Option<u64>,
    /// Stop after this time, whatever is left of --seeds.
    #[arg(long, value_name = "S")]
    pub seconds: Option<u64>,
    /// Print every event.
    #[arg(long, conflicts_with = "json")]
    pub trace: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Break the world on purpose, to see the simulator notice.
    #[arg(long, value_enum, value_name = "HOW")]
    pub sabotage: Option<SabotageName>,
}

/// [`Sabotage`] on the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[allow(missing_docs, reason = "each is described where it is defined")]
pub enum SabotageName {
    TrustPages,
    LoseMessages,
    SkipPages,
    StopTimers,
    IgnoreSalts,
}

impl From<SabotageName> for Sabotage {
    fn from(name: SabotageName) -> Self {
        match name {
            SabotageName::TrustPages => Self::TrustPages,
            SabotageName::LoseMessages => Self::LoseMessages,
            SabotageName::SkipPages => Self::SkipPages,
            SabotageName::StopTimers => Self::StopTimers,
            SabotageName::IgnoreSalts => Self::IgnoreSalts,
        }
    }
}

/// Runs `cluster sim`.
pub fn run(args: &SimArgs) -> anyhow::Result<()> {
    match &args.command {
        SimCommand::Fault(args) => fault(args),
    }
}

fn fault(args: &FaultArgs) -> anyhow::Result<()> {
    let seeds = args.seeds.unwrap_or(if args.seconds.is_some() { u64::MAX } else { 1 });
    let last = args.seed.checked_add(seeds - 1).or(args.seeds.is_none().then_some(u64::MAX));
    let last = last.context("--seed and --seeds go beyond the last seed")?;
    let limit = args.seconds.map(Duration::from_secs);
    let started = Instant::now();
    let mut sum = Sum::default();
    for seed in args.seed..=last {
        if limit.is_some_and(|limit| started.elapsed() >= limit) {
            break;
        }
        let scenario = Scenario { sabotage: args.sabotage.map(Sabotage::from), ..Scenario::draw(seed) };
        match try_run(&scenario, args.trace) {
            Ok((outcome, lines)) => {
                lines.iter().for_each(|line| println!("{line}"));
                sum.add(&outcome);
            }
            Err(failure) => {
                report_failure(args, &failure);
                bail!("seed {seed} breaks an invariant, after {} that did not", sum.seeds);
            }
        }
    }
    report(args, &sum, started.elapsed());
    Ok(())
}

fn report(args: &FaultArgs, sum: &Sum, elapsed: Duration) {
    let per_minute = sum.seeds as f64 * 60.0 / elapsed.as_secs_f64();
    let trace = format!("{:016x}", sum.trace);
    if args.json {
        let counts: serde_json::Map<String, Value> =
            sum.counts.iter().map(|(what, count)| ((*what).to_owned(), Value::from(*count))).collect();
        let out = json!({
            "first_seed": args.seed,
            "seeds": sum.seeds,
            "seconds": elapsed.as_secs_f64(),
            "seeds_per_minute": per_minute,
            "settled_in_s_max": sum.settled_in_max.as_secs_f64(),
            "counts": counts,
            "trace": trace,
        });
        println!("{out:#}");
        return;
    }
    for (what, count) in &sum.counts {
        println!("{count:>12}  {what}");
    }
    println!("at rest at most {:.1} s after the last fault or arrival", sum.settled_in_max.as_secs_f64());
    println!("trace {trace}");
    println!(
        "{} seeds from {} in {:.1} s: {per_minute:.0} per minute, every invariant held",
        sum.seeds,
        args.seed,
        elapsed.as_secs_f64()
    );
}

fn report_failure(args: &FaultArgs, failure: &Failure) {
    let Failure { seed, invariant, lines } = failure;
    let sabotage = args.sabotage.and_then(|name| name.to_possible_value());
    let sabotage = sabotage.map_or(String::new(), |name| format!(" --sabotage {}", name.get_name()));
    let repeat = format!("cluster sim fault --seed {seed}{sabotage} --trace");
    if args.json {
        println!("{:#}", json!({ "failed_seed": seed, "invariant": invariant, "last": lines, "repeat": repeat }));
        return;
    }
    for line in lines {
        println!("{line}");
    }
    println!("broken: {invariant}");
    println!("{:#?}", Scenario::draw(*seed));
    println!("repeat: {repeat}");
}
