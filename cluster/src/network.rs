//! Flags of the network between a cluster's processes.

use crate::size::parse_duration;
use clap::{Args, ValueEnum};
use ridge_kvtransfer::shell::{Congestion, TransportOptions};
use std::time::Duration;

/// Silences that a peer may be allowed: shorter ones would be mistaken for a busy core, longer ones for a hung client.
const PEER_TIMEOUTS: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(60);
/// Signs of life in the time after which a silent peer is lost: one may be late, and one may be dropped.
const SIGNS_OF_LIFE: u32 = 5;

/// How the processes of a cluster talk with one another.
#[derive(Args, Debug, Clone)]
pub struct NetworkArgs {
    /// After how long a silent node counts as dead and its work goes elsewhere, such as 500ms. A stalled process is noticed by
    /// nothing else; a dead one's connections end at once.
    #[arg(long, env = "RIDGE_PEER_TIMEOUT", value_name = "TIME", default_value = "1s", value_parser = parse_peer_timeout)]
    pub peer_timeout: Duration,
    /// Congestion control of the connections between nodes.
    #[arg(long, env = "RIDGE_CONGESTION", value_enum, default_value_t)]
    pub congestion: CongestionArg,
    /// Largest UDP payload to try. Default: 65000 on loopback, else 8952, which fits jumbo frames; what the path carries is
    /// found out below it.
    #[arg(long, env = "RIDGE_MTU", value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1200..=65000))]
    pub mtu: Option<u16>,
}

/// Congestion control.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum CongestionArg {
    #[default]
    Cubic,
    NewReno,
    Bbr,
}

impl NetworkArgs {
    /// As the endpoints take it.
    pub fn transport(&self) -> TransportOptions {
        TransportOptions {
            mtu: self.mtu,
            congestion: match self.congestion {
                CongestionArg::Cubic => Congestion::Cubic,
                CongestionArg::NewReno => Congestion::NewReno,
                CongestionArg::Bbr => Congestion::Bbr,
            },
            keep_alive: self.peer_timeout / SIGNS_OF_LIFE,
            idle_timeout: self.peer_timeout,
            ..TransportOptions::default()
        }
    }

    /// The same as flags, for a child process.
    pub fn flags(&self) -> Vec<String> {
        let congestion = self.congestion.to_possible_value().expect("no value is skipped");
        let mut flags = vec![
            format!("--peer-timeout={}ms", self.peer_timeout.as_millis()),
            format!("--congestion={}", congestion.get_name()),
        ];
        flags.extend(self.mtu.map(|mtu| format!("--mtu={mtu}")));
        flags
    }
}

fn parse_peer_timeout(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text)?;
    match PEER_TIMEOUTS.contains(&time) {
        true => Ok(time),
        false => Err(format!("must be from {:?} to {:?}", PEER_TIMEOUTS.start(), PEER_TIMEOUTS.end())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        network: NetworkArgs,
    }

    #[test]
    fn children_get_the_same_settings() {
        for flags in [&["x"][..], &["x", "--peer-timeout", "0.25s", "--congestion", "bbr", "--mtu", "1452"]] {
            let given = Line::try_parse_from(flags).expect("good flags").network;
            let again = Line::try_parse_from([vec!["x".to_owned()], given.flags()].concat()).expect("flags").network;
            assert_eq!(given.transport(), again.transport());
        }
    }

    #[test]
    fn useless_timeouts_are_refused() {
        for text in ["1ms", "2min", "soon", "-1s"] {
            assert!(Line::try_parse_from(["x".to_owned(), format!("--peer-timeout={text}")]).is_err(), "{text}");
        }
    }
}
