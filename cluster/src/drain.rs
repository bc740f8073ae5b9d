//! `cluster drain`: takes a node out of service and waits until it has nothing left.

use crate::client::Client;
use crate::size::parse_duration;
use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Between two looks at the node.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long the router may take for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Flags of `cluster drain`.
#[derive(Args, Debug)]
pub struct DrainArgs {
    /// The node's name, such as decode-0.
    pub node: String,
    /// The router's HTTP address.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// The router's admin key, if it has one. Better passed in RIDGE_ADMIN_KEY.
    #[arg(long, env = "RIDGE_ADMIN_KEY", hide_env_values = true, value_name = "KEY")]
    pub admin_key: Option<String>,
    /// How long to wait for the node to have nothing left. It goes on draining after that.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// Asks for the drain, then watches the node until it is empty or gone.
pub fn run(args: &DrainArgs) -> anyhow::Result<()> {
    let key = args.admin_key.as_deref().filter(|key| !key.is_empty());
    let client = Client::new(&args.url, key, ANSWER_TIMEOUT)?;
    let name = &args.node;
    client.post_json(&format!("/v1/nodes/{name}/drain"), &json!({}))?;
    let until = Instant::now() + args.timeout;
    let mut last = None;
    loop {
        // The router's view is republished a few times a second; the first one may be from before the drain.
        std::thread::sleep(POLL_INTERVAL);
        let listed = client.get_json("/v1/nodes")?;
        let nodes = listed["data"].as_array().context("the router's list of nodes is not a list")?;
        let Some(node) = nodes.iter().find(|node| node["name"] == name.as_str()) else {
            println!("{name} is drained and has left the cluster");
            return Ok(());
        };
        if node["draining"] != true {
            continue;
        }
        let (in_flight, held) = (node["in_flight"].as_u64(), node["blocks"]["held"].as_u64());
        if last != in_flight {
            println!("{name}: {} sequences left", in_flight.unwrap_or_default());
            last = in_flight;
        }
        if in_flight == Some(0) && held == Some(0) {
            println!("{name} is drained; stop it when you like");
            return Ok(());
        }
        if Instant::now() >= until {
            bail!("{name} still has {} after {:?}; it goes on draining", left(node), args.timeout);
        }
    }
}

fn left(node: &Value) -> String {
    format!("{} sequences and {} blocks that are being shipped", node["in_flight"], node["blocks"]["held"])
}
