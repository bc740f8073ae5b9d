//! What is simulated: the cluster, its load and its faults, all drawn from one seed.

use super::random::Random;
use ridge_protocol::Duration;

/// A cluster, what is asked of it, and what goes wrong.
#[derive(Clone, PartialEq, Debug)]
pub struct Scenario {
    /// Everything random follows from it.
    pub seed: u64,
    /// Prefill nodes.
    pub prefill: usize,
    /// Decode nodes.
    pub decode: usize,
    /// Blocks per prefill node, were they of `block_size`.
    pub prefill_blocks: u32,
    /// Blocks per decode node, were they of `block_size`.
    pub decode_blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Tokens per block of every other node: where this is another number, KV is converted on its way.
    pub other_block_size: u32,
    /// Layers.
    pub layers: u32,
    /// Prompt tokens per prefill pass.
    pub chunk: u32,
    /// Prompt tokens per decode pass.
    pub local_chunk: u32,
    /// Prompts computed at a time on a prefill node.
    pub max_running: usize,
    /// Sequences per decode batch.
    pub max_num_seqs: usize,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Longest sequence of every other node, if that is less.
    pub short_model_len: u32,
    /// Blocks left free at admission, per running sequence.
    pub headroom_blocks: usize,
    /// Whether prefixes are reused.
    pub prefix_caching: bool,
    /// Pages in flight per transfer.
    pub credit_pages: u32,
    /// Transfers at once, per node.
    pub max_sessions: usize,
    /// Requests that may wait on a node.
    pub max_waiting: usize,
    /// Requests that may be in flight in the router.
    pub max_in_flight: usize,
    /// Dispatches of one sequence before it fails.
    pub max_attempts: u32,
    /// What a hand-off waits for a peer that is alive.
    pub lease: Duration,
    /// How long either side of a hand-off waits for one that shows life at most.
    pub patience: Duration,
    /// What the router waits for a sign of life.
    pub progress_deadline: Duration,
    /// What the router waits for a node.
    pub placement_deadline: Duration,
    /// Clients in all.
    pub clients: usize,
    /// Within which they all come.
    pub arrivals: Duration,
    /// Of 100 clients, how many leave early.
    pub leave_percent: u64,
    /// Longest answer asked for.
    pub max_answer: u64,
    /// Of 1000 clients, how many name tokens that end their answer, perhaps the first one. Where it is not 0, a quarter of all have
    /// grammars, which may end it too.
    pub stop_permille: u64,
    /// Usual time of a message on its way, at most.
    pub latency: Duration,
    /// Usual time of a layer, at most.
    pub layer_time: Duration,
    /// A restarted decode node takes KV at its old address.
    pub fixed_addresses: bool,
    /// What goes wrong.
    pub faults: Faults,
    /// What is broken on purpose.
    pub sabotage: Option<Sabotage>,
}

/// How many of each fault are tried. A fault without a victim (a lost connection where there is none) does not count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Faults {
    /// Nodes that die and come back without memory.
    pub crashes: u64,
    /// Nodes that are asked to stop, finish what they have, and come back.
    pub restarts: u64,
    /// Routers that die with every client's connection; another takes the place.
    pub router_crashes: u64,
    /// Connections between a node and the router that break.
    pub control_losses: u64,
    /// Connections between a prefill and a decode node that break.
    pub kv_losses: u64,
    /// Two processes that cannot reach each other for a while.
    pub cuts: u64,
    /// Nodes that stand still for a while, as if stopped by a signal.
    pub stalls: u64,
    /// Nodes whose engine is slow for a while.
    pub slowdowns: u64,
    /// Of 1000 pages, how many are damaged on their way or in the sender's memory.
    pub damage_permille: u64,
}

/// A fault that the invariants must not survive: it proves that the simulator can fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sabotage {
    /// Every page counts as intact, whatever its digest says.
    TrustPages,
    /// One in a hundred control messages vanishes while its connection lives on.
    LoseMessages,
    /// One in a hundred pages is reported as landed and never written.
    SkipPages,
    /// No node's deadline ever passes.
    StopTimers,
    /// Nodes are told that all tenants are one.
    IgnoreSalts,
}

impl Sabotage {
    /// Every one.
    pub const ALL: [Sabotage; 5] =
        [Self::TrustPages, Self::LoseMessages, Self::SkipPages, Self::StopTimers, Self::IgnoreSalts];
}

impl Scenario {
    /// A small healthy cluster with time enough: what tests vary.
    pub fn calm(seed: u64) -> Self {
        Self {
            seed,
            prefill: 1,
            decode: 1,
            prefill_blocks: 64,
            decode_blocks: 64,
            block_size: 4,
            other_block_size: 4,
            layers: 3,
            chunk: 16,
            local_chunk: 7,
            max_running: 4,
            max_num_seqs: 8,
            max_model_len: 64,
            short_model_len: 64,
            headroom_blocks: 1,
            prefix_caching: true,
            credit_pages: 3,
            max_sessions: 1000,
            max_waiting: 1000,
            max_in_flight: 4096,
            max_attempts: 20,
            lease: Duration::from_secs(10),
            patience: Duration::from_secs(15),
            progress_deadline: Duration::from_secs(60),
            placement_deadline: Duration::from_secs(60),
            clients: 20,
            arrivals: Duration::from_secs(3),
            leave_percent: 0,
            max_answer: 20,
            stop_permille: 0,
            latency: Duration::from_millis(2),
            layer_time: Duration::from_millis(3),
            fixed_addresses: false,
            faults: Faults::default(),
            sabotage: None,
        }
    }

    /// Any cluster and any faults. One seed in five has none, so that what only a healthy cluster promises is checked too.
    pub fn draw(seed: u64) -> Self {
        let mut r = Random::new(seed, 0);
        let block_size = r.of(&[1, 2, 4, 8, 16]);
        let max_model_len = r.range(24, if block_size == 1 { 40 } else { 96 }) as u32;
        // What one longest sequence needs, and room for few or for many more.
        let least = max_model_len.div_ceil(block_size);
        let mut blocks = |low: u64, high: u64| least * r.range(low, high) as u32 / 2 + r.pick(5) as u32;
        let (prefill_blocks, decode_blocks) = (blocks(2, 8), blocks(2, 10));
        let seconds = Duration::from_secs;
        // Drawn apart from the rest, so that a seed's cluster is otherwise what it was before blocks could differ.
        let mut apart = Random::new(seed, 2);
        let mixed = apart.chance(400);
        Self {
            seed,
            prefill: r.of(&[0, 1, 1, 1, 2, 2, 3]),
            decode: r.range(1, 3) as usize,
            prefill_blocks,
            decode_blocks,
            block_size,
            other_block_size: if mixed { apart.of(&[1, 2, 3, 4, 6, 8, 16, 24]) } else { block_size },
            layers: r.range(1, 3) as u32,
            chunk: block_size * r.range(1, 6) as u32 + r.pick(4) as u32,
            local_chunk: r.range(1, 24) as u32,
            max_running: r.range(1, 6) as usize,
            max_num_seqs: r.range(1, 8) as usize,
            max_model_len,
            short_model_len: if r.chance(150) { max_model_len * 3 / 4 } else { max_model_len },
            headroom_blocks: r.pick(3) as usize,
            prefix_caching: !r.chance(150),
            credit_pages: r.range(1, 12) as u32,
            max_sessions: r.of(&[1000, 1000, 1000, 2]),
            max_waiting: r.of(&[1000, 1000, 1000, 2]),
            max_in_flight: r.of(&[4096, 4096, 4096, 6]),
            max_attempts: r.range(2, 8) as u32,
            lease: seconds(r.of(&[2, 10])),
            patience: seconds(r.of(&[8, 600])),
            progress_deadline: seconds(r.of(&[20, 900])),
            placement_deadline: seconds(r.of(&[1, 30, 30])),
            clients: r.range(3, 20) as usize,
            arrivals: Duration::from_millis(r.of(&[20, 500, 3000])),
            leave_percent: r.of(&[0, 0, 10, 50]),
            max_answer: r.range(1, 24),
            stop_permille: r.of(&[0, 400, 800]),
            latency: Duration::from_micros(r.of(&[100, 2_000, 20_000])),
            layer_time: Duration::from_micros(r.of(&[50, 3_000, 10_000])),
            fixed_addresses: r.chance(500),
            faults: if seed.is_multiple_of(5) { Faults::default() } else { Faults::draw(&mut r) },
            sabotage: None,
        }
    }

    /// Whether nothing is meant to go wrong: then nothing may be done twice.
    pub fn is_calm(&self) -> bool {
        self.faults == Faults::default()
    }

    /// The context of a node, by its place.
    pub fn context(&self, place: usize) -> u32 {
        if place.is_multiple_of(2) { self.max_model_len } else { self.short_model_len }
    }

    /// Tokens per block of a node, by its place.
    pub fn block_size(&self, place: usize) -> u32 {
        if place.is_multiple_of(2) { self.block_size } else { self.other_block_size }
    }

    /// Blocks of a node with room for as many tokens as `blocks` of `block_size`.
    pub fn blocks(&self, place: usize, blocks: u32) -> u32 {
        (blocks * self.block_size).div_ceil(self.block_size(place))
    }

    /// Whether some limit is low enough for a client to be refused.
    pub fn may_overload(&self) -> bool {
        self.max_in_flight < self.clients || self.max_waiting < self.clients
    }
}

impl Faults {
    /// Few kinds at a time, so that each is met in otherwise quiet company too.
    fn draw(r: &mut Random) -> Self {
        let all = r.chance(250);
        let mut some = |permille: u64, most: u64| if all || r.chance(permille) { 1 + r.pick(most) } else { 0 };
        Self {
            crashes: some(400, 3),
            restarts: some(200, 2),
            router_crashes: some(100, 1),
            control_losses: some(250, 3),
            kv_losses: some(300, 3),
            cuts: some(250, 2),
            stalls: some(250, 2),
            slowdowns: some(200, 2),
            damage_permille: some(250, 40),
        }
    }
}
