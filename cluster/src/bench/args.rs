//! Flags of `cluster bench engine` and of `cluster roofline`.

use super::interference::InterferenceArgs;
use super::transfer::{ReceiverArgs, TransferArgs};
use crate::cli::EngineArgs;
use crate::size::parse_count;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Flags of `cluster bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What `cluster bench` measures.
#[derive(Subcommand, Debug)]
pub enum BenchCommand {
    /// Measure the engine alone, prefill and decode, beside what the machine can do at most.
    Engine(Box<EngineBenchArgs>),
    /// Measure how much decoding users feel somebody else's long prompt, on any OpenAI-compatible server.
    Interference(Box<InterferenceArgs>),
    /// Measure the KV hand-off between two processes, beside plaintext TCP.
    Transfer(Box<TransferArgs>),
    /// The other process of `transfer`.
    #[command(hide = true)]
    TransferReceiver(Box<ReceiverArgs>),
}

/// What both commands need to set up an engine and to measure it.
#[derive(Args, Debug)]
pub struct SetupArgs {
    /// Hugging Face folder, .gguf file or Hugging Face repository id. Without it, the built-in ridge-demo.
    #[arg(long)]
    pub model: Option<String>,
    /// Compute threads. Default: one per core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Prompt tokens computed in one pass.
    #[arg(long, default_value_t = 512, value_parser = parse_count)]
    pub chunk: usize,
    /// Tokens that each sequence has cached before its first decode step.
    #[arg(long, default_value_t = 128, value_parser = parse_count)]
    pub context: usize,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// What the engine is to be like.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// Flags of `cluster bench engine`.
#[derive(Args, Debug)]
pub struct EngineBenchArgs {
    /// Tokens of the prompt that is prefilled.
    #[arg(long, default_value_t = 512, value_parser = parse_count)]
    pub prompt_tokens: usize,
    /// Numbers of sequences that decode together, such as 1,4,8,16.
    #[arg(long, value_delimiter = ',', default_value = "1,4,8,16", value_parser = parse_count, value_name = "LIST")]
    pub batch: Vec<usize>,
    /// Decode steps per repetition.
    #[arg(long, default_value_t = 64, value_parser = parse_count)]
    pub gen_tokens: usize,
    /// Measured repetitions of each phase, after three warm-ups (prompts, or decode steps).
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repeat: u16,
    /// The model, and how to run it.
    #[command(flatten)]
    pub setup: SetupArgs,
}

/// Flags of `cluster roofline`.
#[derive(Args, Debug)]
pub struct RooflineArgs {
    /// Prompt lengths to prefill. Default: 16,32,64,128,256,512,1024, as far as the model goes.
    #[arg(long, value_delimiter = ',', value_parser = parse_count, value_name = "LIST")]
    pub prompt_tokens: Option<Vec<usize>>,
    /// Numbers of sequences that decode together.
    #[arg(
        long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64", value_parser = parse_count,
        value_name = "LIST"
    )]
    pub batch: Vec<usize>,
    /// Decode steps per repetition.
    #[arg(long, default_value_t = 8, value_parser = parse_count)]
    pub gen_tokens: usize,
    /// Measured repetitions of each phase, after three warm-ups (prompts, or decode steps).
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repeat: u16,
    /// Write the picture to this file, too.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// The model, and how to run it.
    #[command(flatten)]
    pub setup: SetupArgs,
}
