//! `cluster bench engine` and `cluster roofline`: how close the engine comes to what the machine can do.
//!
//! Both drive the engine with batch plans, as a node's shell does, and measure the machine's limits between the
//! repetitions: the rates of a shared machine drift by a factor of two within minutes, so a time means something only
//! beside a limit of the same second. Read [`session`] (what runs) and [`measure`] (what is made of the times), then
//! [`roofline`] (the picture). `cluster bench interference` looks at servers from outside instead: [`interference`]; and `cluster bench transfer`
//! at the hand-off between two nodes: [`transfer`].

mod args;
pub mod host;
mod interference;
mod measure;
mod report;
mod roofline;
pub mod session;
mod transfer;

pub use args::{BenchArgs, BenchCommand, EngineBenchArgs, RooflineArgs, SetupArgs};
pub use roofline::run as run_roofline;

use measure::measure;
use session::{Phase, Session};

/// Runs `cluster bench`.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.command {
        BenchCommand::Engine(args) => engine(args),
        BenchCommand::Interference(args) => interference::run(args),
        BenchCommand::Transfer(args) => transfer::run(args),
        BenchCommand::TransferReceiver(args) => transfer::run_receiver(args),
    }
}

fn engine(args: &EngineBenchArgs) -> anyhow::Result<()> {
    let prefill = Phase::Prefill { tokens: args.prompt_tokens, chunk: args.setup.chunk };
    let decode =
        args.batch.iter().map(|&batch| Phase::Decode { batch, context: args.setup.context, steps: args.gen_tokens });
    let phases: Vec<Phase> = std::iter::once(prefill).chain(decode).collect();
    let mut session = Session::new(&args.setup, |_| phases)?;
    let run = measure(&mut session, usize::from(args.repeat));
    if args.setup.json {
        let mut out = report::json("engine", &session, &run);
        // There is one prompt length, so its figures stand without a list.
        out["prefill"] = out["prefill"][0].take();
        println!("{out:#}");
    } else {
        print!("{}", report::table(&session, &run));
    }
    Ok(())
}
