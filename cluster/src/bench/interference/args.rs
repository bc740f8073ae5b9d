//! Flags of `cluster bench interference`.

use crate::cli::CoresPolicy;
use crate::size::parse_count;
use clap::{Args, ValueEnum};
use std::time::Duration;

/// Flags of `cluster bench interference`.
#[derive(Args, Debug)]
#[command(after_help = "Further flags of `up --local` follow after --, such as: --local -- --kv-cache-dtype fp8")]
pub struct InterferenceArgs {
    /// Servers to measure, one after the other: http(s)://HOST:PORT, with or without /v1. Any server with OpenAI's
    /// streaming /v1/completions will do.
    #[arg(long, value_name = "URL", num_args = 1.., required_unless_present = "local", conflicts_with = "local")]
    pub url: Vec<String>,
    /// Start Ridge on this machine instead and measure it twice: with one prefill and one decode node, and with one decode
    /// node that computes prompts itself.
    #[arg(long)]
    pub local: bool,
    /// With --url, the model's name in the API (default: the first of /v1/models). With --local, what `up --model` takes
    /// (default: the built-in ridge-demo).
    #[arg(long)]
    pub model: Option<String>,
    /// Key that the servers want. Better passed in RIDGE_API_KEY, because other users can read a process's arguments.
    #[arg(long, env = "RIDGE_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Clients that decode all the time.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub clients: u16,
    /// Tokens of each of their prompts.
    #[arg(long, default_value_t = 32, value_parser = parse_count)]
    pub prompt_tokens: usize,
    /// Tokens of each of their answers, two at least.
    #[arg(long, default_value_t = 128, value_parser = parse_count)]
    pub gen_tokens: usize,
    /// Tokens of the long prompts.
    #[arg(long, default_value_t = 1024, value_parser = parse_count)]
    pub long_prompt_tokens: usize,
    /// Tokens of the answers to the long prompts.
    #[arg(long, default_value_t = 1, value_parser = parse_count)]
    pub long_gen_tokens: usize,
    /// Seconds between two long prompts. They arrive on time, whether or not the one before has been answered.
    #[arg(long, value_name = "SECONDS", default_value = "8", value_parser = parse_seconds)]
    pub every: Duration,
    /// Seconds without long prompts, and again with them. The phase with them ends when all of them have been answered.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_seconds)]
    pub seconds: Duration,
    /// Seconds that one request may take, from the connection to the last token.
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = parse_seconds)]
    pub timeout: Duration,
    /// What prompts are made of.
    #[arg(long, value_enum, default_value_t)]
    pub prompts: PromptKind,
    /// Key of the prompts. Default: from the clock, because a server may remember prompts that it has seen.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// With --local: compute threads of each of the two nodes. The co-located node gets as many as have cores of their own
    /// then: both nodes' with --cores-policy split, one node's with share. Default: what --cores-policy gives.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16384), conflicts_with = "url")]
    pub threads: Option<u16>,
    /// With --local: who computes on which cores.
    #[arg(long, value_enum, conflicts_with = "url")]
    pub cores_policy: Option<CoresPolicy>,
    /// With --local: seconds that a cluster may take until it serves.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = parse_seconds)]
    pub start_timeout: Duration,
    /// With --local: further flags of `up --local`.
    #[arg(last = true, conflicts_with = "url", value_name = "UP_FLAGS")]
    pub up: Vec<String>,
}

/// What prompts are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum PromptKind {
    /// Token ids if the server has /tokenize, else text.
    #[default]
    Auto,
    /// Token ids: prompts have exactly the length that was asked for.
    Tokens,
    /// Words: prompts have about the length that was asked for.
    Text,
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.trim().parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if (0.001..=1e6).contains(&seconds) {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err("must be between 0.001 and 1000000 seconds".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds() {
        assert_eq!(parse_seconds("1.5"), Ok(Duration::from_millis(1500)));
        for bad in ["0", "-1", "nan", "inf", "1e9", "8 s", ""] {
            assert!(parse_seconds(bad).is_err(), "{bad:?}");
        }
    }
}
