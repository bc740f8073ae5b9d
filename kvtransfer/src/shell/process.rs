//! What every node process has: a clock for its machines, and status lines for whoever started it.

use ridge_protocol::{Instant, NodeName, Role};
use std::io::Write;
use std::net::SocketAddr;

/// Maps the operating system's monotonic clock to machine time. One per process.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    epoch: tokio::time::Instant,
}

impl Clock {
    /// A clock that reads zero now.
    pub fn start() -> Self {
        Self { epoch: tokio::time::Instant::now() }
    }

    /// Machine time now.
    pub fn now(&self) -> Instant {
        Instant(u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Sleeps until a machine's deadline; for ever if it has none.
    pub async fn sleep_until(&self, deadline: Option<Instant>) {
        match deadline {
            Some(deadline) => {
                tokio::time::sleep_until(self.epoch + ridge_protocol::Duration::from_nanos(deadline.0)).await;
            }
            None => std::future::pending().await,
        }
    }
}

/// A line on standard output for the supervisor. Logs go to standard error, so the two never mix.
#[derive(Clone, PartialEq, Debug)]
pub enum Status<'a> {
    /// Loading has come this far, from 0 to 1.
    Loading(f32),
    /// The process takes part in the cluster, or is about to.
    Ready {
        /// What it is.
        role: Role,
        /// Its name.
        name: &'a NodeName,
        /// Its UDP address.
        addr: SocketAddr,
        /// Its HTTP address (router).
        http: Option<SocketAddr>,
    },
    /// A real prompt has passed through the cluster (router).
    Serving,
    /// A page was damaged on purpose (prefill node under test).
    Corrupted,
}

impl Status<'_> {
    /// Prints the line. A supervisor that is gone is noticed elsewhere, so a closed pipe is not an error here.
    pub fn print(&self) {
        let line = match self {
            Status::Loading(fraction) => format!(r#"{{"ridge":"loading","fraction":{fraction:.3}}}"#),
            Status::Ready { role, name, addr, http } => {
                let http = http.map(|http| format!(r#","http":"{http}""#)).unwrap_or_default();
                format!(r#"{{"ridge":"ready","role":"{role}","name":"{name}","addr":"{addr}"{http}}}"#)
            }
            Status::Serving => r#"{"ridge":"serving"}"#.to_string(),
            Status::Corrupted => r#"{"ridge":"corrupted"}"#.to_string(),
        };
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_starts_at_zero_and_moves_on() {
        let clock = Clock::start();
        let first = clock.now();
        assert!(first.0 < 1_000_000_000, "a fresh clock reads about zero");
        assert!(clock.now() >= first);
    }
}
