//! What nodes say about themselves, as `/metrics` shows it: blocks above all. Read [`State`] and [`settle`].

use super::within;
use crate::client::Client;
use anyhow::{bail, ensure};
use std::time::Duration;

/// By then every lease has been settled, every node is back, and every report has come.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Nodes report every second: later than this, what is shown is from after the last event.
const REPORTS: Duration = Duration::from_millis(1500);

/// The text of `/metrics` at one moment.
#[derive(Debug)]
pub struct State(String);

impl State {
    /// Asks the router.
    pub fn read(client: &Client) -> anyhow::Result<Self> {
        let (status, text) = client.text("/metrics")?;
        ensure!(status == 200, "{}: GET /metrics answered HTTP {status}", client.base());
        Ok(Self(text))
    }

    /// A node's value of a metric, if the node takes part.
    pub fn of(&self, metric: &str, node: &str) -> Option<f64> {
        let start = format!("{metric}{{node=\"{node}\",");
        let line = self.0.lines().find(|line| line.starts_with(&start))?;
        line.rsplit_once(' ')?.1.parse().ok()
    }

    /// A metric of the router's own.
    pub fn router(&self, metric: &str) -> Option<f64> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '))?;
        line.parse().ok()
    }

    /// The sum of a metric over nodes.
    pub fn sum(&self, metric: &str, nodes: &[String]) -> f64 {
        nodes.iter().filter_map(|node| self.of(metric, node)).sum()
    }

    /// What is not as it should be when nobody asks for anything.
    fn unsettled(&self, nodes: &[String]) -> Option<String> {
        if self.router("ridge_router_requests_in_flight") != Some(0.0) {
            return Some("the router still has requests in flight".into());
        }
        nodes.iter().find_map(|node| self.unsettled_node(node))
    }

    fn unsettled_node(&self, node: &str) -> Option<String> {
        let blocks = |part: &str| self.of(&format!("ridge_kv_blocks_{part}"), node);
        let Some(total) = blocks("total") else { return Some(format!("{node} does not take part")) };
        for part in ["used", "reserved", "held"] {
            if blocks(part) != Some(0.0) {
                return Some(format!("{node} has {} blocks {part}", blocks(part).unwrap_or(f64::NAN)));
            }
        }
        let idle = blocks("free").unwrap_or(f64::NAN) + blocks("cached").unwrap_or(f64::NAN);
        if idle != total {
            return Some(format!("{node} has {idle} free and cached blocks of {total}"));
        }
        match self.of("ridge_kv_orphaned_blocks", node) {
            Some(0.0) => None,
            orphaned => Some(format!("{node} has {} orphaned blocks", orphaned.unwrap_or(f64::NAN))),
        }
    }
}

/// Waits until the cluster is healthy and idle with every block of every node accounted for; says what is wrong if it never is.
pub fn settle(client: &Client, nodes: &[String]) -> anyhow::Result<State> {
    std::thread::sleep(REPORTS);
    let mut wrong = String::new();
    let mut found = None;
    within(SETTLE_TIMEOUT, || {
        let state = match look(client, nodes) {
            Ok(state) => state,
            Err(error) => {
                wrong = format!("{error:#}");
                std::thread::sleep(REPORTS / 15);
                return false;
            }
        };
        found = Some(state);
        true
    });
    match found {
        Some(state) => Ok(state),
        None => bail!("not at rest after {} s: {wrong}", SETTLE_TIMEOUT.as_secs()),
    }
}

fn look(client: &Client, nodes: &[String]) -> anyhow::Result<State> {
    let (status, body) = client.text("/health")?;
    ensure!(status == 200, "/health says {body}");
    let state = State::read(client)?;
    match state.unsettled(nodes) {
        Some(wrong) => bail!(wrong),
        None => Ok(state),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(used: u32, orphaned: u32, free: u32) -> State {
        let node = |metric: &str, value: u32| format!("{metric}{{node=\"d-0\",role=\"decode\"}} {value}\n");
        let parts = [("total", 10), ("free", free), ("cached", 4), ("used", used), ("reserved", 0), ("held", 0)];
        let blocks = parts.map(|(part, value)| node(&format!("ridge_kv_blocks_{part}"), value)).concat();
        let rest = node("ridge_kv_orphaned_blocks", orphaned);
        State(format!("# HELP x y\nridge_router_requests_in_flight 0\n{blocks}{rest}"))
    }

    #[test]
    fn whatever_is_not_at_rest_is_named() {
        let nodes = ["d-0".to_owned()];
        assert_eq!(page(0, 0, 6).unsettled(&nodes), None);
        let check = |state: State, nodes: &[String], wanted: &str| {
            let wrong = state.unsettled(nodes).expect("is not at rest");
            assert!(wrong.contains(wanted), "{wrong}");
        };
        check(page(1, 0, 5), &nodes, "1 blocks used");
        check(page(0, 2, 6), &nodes, "2 orphaned");
        check(page(0, 0, 5), &nodes, "9 free and cached blocks of 10");
        check(page(0, 0, 6), &["d-1".to_owned()], "d-1 does not take part");
        check(State(String::new()), &nodes, "in flight");
    }
}
