//! What a device's memory goes to: the same five items as on the host, planned before anything is allocated.
//!
//! Pure, as its neighbour: sizes go in, a plan or a refusal comes out. Read [`DeviceDemand`] and [`DevicePlan`].

use super::size;
use crate::cuda::Footprint;
use std::fmt::{self, Display};

/// Attention's partial sums, and code. An estimate: no device has been measured.
const WORKSPACE_BYTES: u64 = 64 << 20;
/// Headroom as a share of everything else, for what the driver rounds up.
const HEADROOM_SHARE: u64 = 50;

/// Everything that decides how much of a device's memory a node needs and may use.
#[derive(Clone, PartialEq, Debug)]
pub struct DeviceDemand<'a> {
    /// What the engine takes besides the pool.
    pub engine: Footprint,
    /// Bytes of a block of the pool, over all layers.
    pub block_bytes: u64,
    /// Name of the device.
    pub name: &'a str,
    /// Its memory.
    pub total: u64,
    /// Of that, what is free.
    pub free: u64,
    /// The part of its memory that this node may use.
    pub utilization: f64,
}

/// The five items on the device, in bytes.
#[derive(Clone, PartialEq, Debug)]
pub struct DevicePlan {
    /// Weights.
    pub weights: u64,
    /// The KV pool.
    pub kv: u64,
    /// Buffers of the largest pass.
    pub activations: u64,
    /// Scratch and code.
    pub workspace: u64,
    /// What is left free on purpose.
    pub headroom: u64,
    /// Blocks in the pool.
    pub blocks: usize,
    /// What this node may use.
    pub allowed: u64,
    name: String,
    total_bytes: u64,
    utilization: f64,
}

/// The node does not fit on the device.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[error("out of device memory before the start: {} more needed than there is\n{plan}\n  {advice}", size(*.short))]
pub struct DeviceRefusal {
    plan: Box<DevicePlan>,
    short: u64,
    advice: String,
}

impl DevicePlan {
    /// All five items.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.activations + self.workspace + self.headroom
    }
}

impl Display for DevicePlan {
    /// A table, one item a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = [
            ("weights", self.weights, "as stored, or in the compute type".to_owned()),
            ("KV cache", self.kv, format!("{} blocks, each with its copy in the host's memory", self.blocks)),
            ("activations", self.activations, "buffers of the largest pass".into()),
            (
                "workspace",
                self.workspace,
                "what products need beside their operands; partial sums, code (estimated)".into(),
            ),
            ("headroom", self.headroom, "what the driver rounds up (a fiftieth)".into()),
        ];
        for (name, bytes, remark) in rows {
            writeln!(f, "  {name:11} {:>11}  {remark}", size(bytes))?;
        }
        let percent = self.utilization * 100.0;
        let of = format!("of {}: {percent:.0} % of {}, as far as free", size(self.allowed), size(self.total_bytes));
        write!(f, "  {:11} {:>11}  {of} ({})", "total", size(self.total()), self.name)
    }
}

/// Blocks that the device has room for when everything else has its part; 0 if it does not even fit without.
pub fn room(demand: &DeviceDemand<'_>) -> usize {
    let Footprint { weights, products, activations } = demand.engine;
    let others = weights + products + activations + WORKSPACE_BYTES;
    let before_headroom = allowed(demand) / (HEADROOM_SHARE + 1) * HEADROOM_SHARE;
    let blocks = before_headroom.saturating_sub(others) / demand.block_bytes;
    usize::try_from(blocks).unwrap_or(usize::MAX)
}

/// Divides the device's memory up for a pool of `blocks`.
pub fn plan(demand: &DeviceDemand<'_>, blocks: usize) -> Result<DevicePlan, DeviceRefusal> {
    let Footprint { weights, products, activations } = demand.engine;
    let (kv, workspace) = (blocks as u64 * demand.block_bytes, WORKSPACE_BYTES + products);
    let plan = DevicePlan {
        weights,
        kv,
        activations,
        workspace,
        headroom: (weights + kv + activations + workspace) / HEADROOM_SHARE,
        blocks,
        allowed: allowed(demand),
        name: demand.name.to_owned(),
        total_bytes: demand.total,
        utilization: demand.utilization,
    };
    if plan.total() <= plan.allowed && blocks > 0 {
        return Ok(plan);
    }
    let advice = match room(demand) {
        0 => "what would fit: no KV cache at all; a larger device, smaller weights, a higher --gpu-memory-utilization or fewer \
              --max-num-batched-tokens"
            .to_owned(),
        blocks => format!("what would fit: --kv-memory {}", blocks as u64 * demand.block_bytes),
    };
    let short = plan.total().saturating_sub(plan.allowed);
    Err(DeviceRefusal { plan: Box::new(plan), short, advice })
}

fn allowed(demand: &DeviceDemand<'_>) -> u64 {
    demand.free.min((demand.total as f64 * demand.utilization) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(total: u64) -> DeviceDemand<'static> {
        DeviceDemand {
            engine: Footprint { weights: 2400 << 20, products: 0, activations: 200 << 20 },
            block_bytes: 512 << 10,
            name: "a device",
            total,
            free: total - (1 << 30),
            utilization: 0.9,
        }
    }

    #[test]
    fn the_pool_gets_what_is_left() {
        let demand = demand(24 << 30);
        let blocks = room(&demand);
        let planned = plan(&demand, blocks).expect("what there is room for");
        assert!(planned.total() <= planned.allowed && planned.allowed == (24f64 * 0.9 * f64::from(1 << 30)) as u64);
        assert!(planned.allowed - planned.total() < 2 * demand.block_bytes, "{planned}");
        let refusal = plan(&demand, blocks + 100).expect_err("more than there is room for").to_string();
        assert!(refusal.contains("out of device memory") && refusal.contains("--kv-memory"), "{refusal}");
        assert!(refusal.contains("weights") && refusal.contains("2.34 GiB"), "{refusal}");
    }

    #[test]
    fn a_device_that_is_too_small_is_refused_with_numbers() {
        let small = demand(3 << 30);
        assert_eq!(room(&small), 0);
        let refusal = plan(&small, 1).expect_err("2 GiB are free").to_string();
        assert!(refusal.contains("no KV cache at all") && refusal.contains("a device"), "{refusal}");
    }
}
