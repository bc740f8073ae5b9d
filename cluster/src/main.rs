//! The `cluster` command: the supervisor `up`, the three roles, and the tools around them.
//!
//! This crate may import everything and decides nothing about requests. Read `cli.rs`, then `up/mod.rs`.

#![forbid(unsafe_code)]

mod bench;
mod ca;
mod cli;
mod client;
mod demo;
mod dirs;
mod drain;
mod generate;
mod gpu_check;
mod logging;
mod network;
mod record;
mod replay;
mod roles;
mod sim;
mod size;
mod synth;
mod trial;
mod up;

use clap::Parser;
use cli::{Cli, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let quiet = !matches!(cli.command, Command::Router(_) | Command::Prefill(_) | Command::Decode(_));
    logging::init(cli.log_format, if quiet { "warn" } else { "info" });
    let done = match cli.command {
        Command::Up(args) => up::run(*args),
        Command::Router(args) => roles::router(*args),
        Command::Prefill(args) => roles::prefill(*args),
        Command::Decode(args) => roles::decode(*args),
        Command::Drain(args) => drain::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::GpuCheck(args) => gpu_check::run(&args),
        Command::Synth(args) => synth::write(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Roofline(args) => bench::run_roofline(&args),
        Command::Sim(args) => sim::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Verify(args) => trial::verify(&args),
        Command::Chaos(args) => trial::chaos(&args),
        Command::Ca(args) => ca::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}
