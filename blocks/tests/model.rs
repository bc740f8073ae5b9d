//! The pool against the simplest model that gives the same answers: a list of leases and a map of what is findable.
//!
//! The model counts nothing and keeps no index; it looks everything up in its leases. Where the pool may choose a block,
//! the model says which choices are right. A sequence of operations that fails is shrunk to a short one.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use ridge_blocks::{BlockPool, Claim, Lease, OutOfBlocks, hash_blocks};
use ridge_protocol::stats::BlockCounts;
use ridge_protocol::{BlockHash, BlockId};
use std::collections::BTreeMap;

/// What a node's scheduler may do with its pool. `lease` counts the leases that there are, again from 0 after the last.
#[derive(Clone, Debug)]
enum Operation {
    Lease { claim: Claim, prompt: Vec<BlockHash>, limit: usize, extra: usize },
    Grow { lease: usize, extra: usize },
    Reclaim { lease: usize, claim: Claim },
    Publish { lease: usize, blocks: usize },
    Release { lease: usize },
    Ask { prompt: Vec<BlockHash>, limit: usize, extra: usize, reserve: usize },
    TakeChanges,
    AnnounceAll,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    use Operation::*;
    let claim = || prop_oneof![Just(Claim::Used), Just(Claim::Reserved), Just(Claim::Held)];
    // Two tokens to choose from, so that prompts share prefixes.
    let prompt = || prop::collection::vec(0..2u32, 0..6).prop_map(|tokens| hash_blocks(0, 1, &tokens));
    let limit = || prop_oneof![Just(usize::MAX), 0..6usize];
    let one = prop_oneof![
        4 => (claim(), prompt(), limit(), 0..3usize)
            .prop_map(|(claim, prompt, limit, extra)| Lease { claim, prompt, limit, extra }),
        1 => (any::<usize>(), 0..4usize).prop_map(|(lease, extra)| Grow { lease, extra }),
        1 => (any::<usize>(), claim()).prop_map(|(lease, claim)| Reclaim { lease, claim }),
        3 => (any::<usize>(), 0..6usize).prop_map(|(lease, blocks)| Publish { lease, blocks }),
        3 => any::<usize>().prop_map(|lease| Release { lease }),
        1 => (prompt(), limit(), 0..3usize, 0..4usize)
            .prop_map(|(prompt, limit, extra, reserve)| Ask { prompt, limit, extra, reserve }),
        1 => Just(TakeChanges),
        1 => Just(AnnounceAll),
    ];
    prop::collection::vec(one, 1..120)
}

/// A lease as the model has it.
struct Held {
    claim: Claim,
    blocks: Vec<BlockId>,
    prompt: Vec<BlockHash>,
}

#[derive(Default)]
struct Model {
    total: u32,
    caching: bool,
    leases: Vec<Held>,
    findable: BTreeMap<BlockHash, BlockId>,
    /// Findable blocks that nobody has, longest idle first.
    idle: Vec<BlockId>,
    /// Findability that was not reported yet.
    changes: BTreeMap<BlockHash, bool>,
}

impl Model {
    fn is_leased(&self, block: BlockId) -> bool {
        self.leases.iter().any(|lease| lease.blocks.contains(&block))
    }

    fn is_findable(&self, block: BlockId) -> bool {
        self.findable.values().any(|found| *found == block)
    }

    fn free(&self) -> Vec<BlockId> {
        (0..self.total).map(BlockId).filter(|block| !self.is_leased(*block) && !self.is_findable(*block)).collect()
    }

    fn available(&self) -> usize {
        (0..self.total).filter(|block| !self.is_leased(BlockId(*block))).count()
    }

    fn prefix(&self, prompt: &[BlockHash], limit: usize) -> Vec<BlockId> {
        prompt.iter().take(limit).map_while(|hash| self.findable.get(hash).copied()).collect()
    }

    /// Blocks that could be had besides those of `prefix`.
    fn available_beside(&self, prefix: &[BlockId]) -> usize {
        self.available() - prefix.iter().filter(|block| !self.is_leased(**block)).count()
    }

    /// The pool chose `block` as a fresh one: it had to be free, or the one longest idle if none was.
    fn take(&mut self, block: BlockId) {
        let free = self.free();
        if !free.is_empty() {
            assert!(free.contains(&block), "{block:?} was taken, and {free:?} were free");
            return;
        }
        assert_eq!(block, self.idle.remove(0), "not the one that was idle longest");
        let hash = *self.findable.iter().find(|(_, found)| **found == block).expect("idle blocks are findable").0;
        self.findable.remove(&hash);
        self.changes.insert(hash, false);
    }

    fn release(&mut self, at: usize) {
        let mut lease = self.leases.remove(at);
        while let Some(block) = lease.blocks.pop() {
            if self.is_findable(block) && !self.is_leased(block) && !lease.blocks.contains(&block) {
                self.idle.push(block);
            }
        }
    }

    fn publish(&mut self, block: BlockId, hash: BlockHash) {
        if self.caching && !self.findable.contains_key(&hash) && !self.is_findable(block) {
            self.findable.insert(hash, block);
            self.changes.insert(hash, true);
        }
    }

    /// Every block under the strongest claim on it.
    fn counts(&self) -> BlockCounts {
        let mut counts = BlockCounts { total: self.total, ..BlockCounts::default() };
        for block in (0..self.total).map(BlockId) {
            let claims = self.leases.iter().filter(|lease| lease.blocks.contains(&block)).map(|lease| lease.claim);
            *match claims.min() {
                Some(Claim::Used) => &mut counts.used,
                Some(Claim::Reserved) => &mut counts.reserved,
                Some(Claim::Held) => &mut counts.held,
                None if self.is_findable(block) => &mut counts.cached,
                None => &mut counts.free,
            } += 1;
        }
        counts
    }
}

/// The pool and the model side by side; a lease has the same place in both.
struct Pair {
    pool: BlockPool,
    leases: Vec<Lease>,
    model: Model,
}

impl Pair {
    fn run(&mut self, operation: Operation) {
        match operation {
            Operation::Lease { claim, prompt, limit, extra } => self.lease(claim, prompt, limit, extra),
            Operation::Ask { prompt, limit, extra, reserve } => {
                let total = prompt.len() + extra;
                let prefix = self.model.prefix(&prompt, limit.min(total));
                let enough = total - prefix.len() + reserve <= self.model.available_beside(&prefix);
                assert_eq!(self.pool.can_lease(&prompt, limit, total, reserve), enough);
                assert_eq!(self.pool.matched(&prompt), self.model.prefix(&prompt, usize::MAX).len());
            }
            Operation::TakeChanges => {
                let (added, removed): (Vec<_>, Vec<_>) =
                    std::mem::take(&mut self.model.changes).into_iter().partition(|(_, findable)| *findable);
                let changes = self.pool.take_changes();
                assert_eq!(changes.added, added.into_iter().map(|(hash, _)| hash).collect::<Vec<_>>());
                assert_eq!(changes.removed, removed.into_iter().map(|(hash, _)| hash).collect::<Vec<_>>());
            }
            Operation::AnnounceAll => {
                self.pool.announce_all();
                self.model.changes = self.model.findable.keys().map(|hash| (*hash, true)).collect();
            }
            // The rest is done to a lease.
            _ if self.leases.is_empty() => {}
            Operation::Grow { lease, extra } => self.grow(lease % self.leases.len(), extra),
            Operation::Reclaim { lease, claim } => {
                let at = lease % self.leases.len();
                self.pool.reclaim(&mut self.leases[at], claim);
                self.model.leases[at].claim = claim;
            }
            Operation::Publish { lease, blocks } => {
                let held = &self.model.leases[lease % self.leases.len()];
                let pairs = held.blocks.iter().copied().zip(held.prompt.iter().copied()).take(blocks);
                for (block, hash) in pairs.collect::<Vec<_>>() {
                    self.pool.publish(block, hash);
                    self.model.publish(block, hash);
                }
            }
            Operation::Release { lease } => {
                let at = lease % self.leases.len();
                self.pool.release(self.leases.remove(at));
                self.model.release(at);
            }
        }
        self.compare();
    }

    fn lease(&mut self, claim: Claim, prompt: Vec<BlockHash>, limit: usize, extra: usize) {
        let total = prompt.len() + extra;
        let prefix = self.model.prefix(&prompt, limit.min(total));
        let (wanted, available) = (total - prefix.len(), self.model.available_beside(&prefix));
        match self.pool.lease(claim, &prompt, limit, total) {
            Ok((lease, cached)) => {
                assert!(wanted <= available, "{total} blocks were had of {available}");
                assert_eq!((lease.claim(), cached), (claim, prefix.len()));
                assert_eq!(lease.blocks()[..cached], prefix);
                self.model.idle.retain(|block| !prefix.contains(block));
                self.model.leases.push(Held { claim, blocks: prefix, prompt });
                self.take_fresh(self.model.leases.len() - 1, &lease);
                self.leases.push(lease);
            }
            Err(error) => {
                assert!(wanted > available, "{error}");
                assert_eq!(error, OutOfBlocks { wanted, available });
            }
        }
    }

    fn grow(&mut self, at: usize, extra: usize) {
        let available = self.model.available();
        let had = self.leases[at].blocks().len();
        match self.pool.grow(&mut self.leases[at], extra) {
            Ok(()) => {
                assert_eq!(self.leases[at].blocks().len(), had + extra);
                let lease = self.leases.remove(at);
                self.take_fresh(at, &lease);
                self.leases.insert(at, lease);
            }
            Err(error) => {
                assert!(extra > available, "{error}");
                assert_eq!(error, OutOfBlocks { wanted: extra, available });
                assert_eq!(self.leases[at].blocks().len(), had, "nothing was taken");
            }
        }
    }

    /// Judges the blocks that the pool's lease has and the model's has not yet.
    fn take_fresh(&mut self, at: usize, lease: &Lease) {
        let had = self.model.leases[at].blocks.len();
        for block in &lease.blocks()[had..] {
            self.model.take(*block);
            self.model.leases[at].blocks.push(*block);
        }
    }

    fn compare(&self) {
        assert_eq!(self.pool.counts(), self.model.counts());
        assert_eq!(self.pool.available(), self.model.available());
        assert_eq!(self.pool.check_integrity(self.leases.iter()), 0);
        for (lease, held) in self.leases.iter().zip(&self.model.leases) {
            assert_eq!((lease.claim(), lease.blocks()), (held.claim, &held.blocks[..]));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_pool_answers_as_the_model_does(total in 1..12u32, caching: bool, operations in operations()) {
        let model = Model { total, caching, ..Model::default() };
        let mut pair = Pair { pool: BlockPool::new(total, caching), leases: Vec::new(), model };
        pair.compare();
        for operation in operations {
            pair.run(operation);
        }
        while !pair.leases.is_empty() {
            pair.run(Operation::Release { lease: 0 });
        }
        prop_assert_eq!(pair.pool.available(), total as usize);
    }
}
