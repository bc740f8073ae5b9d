//! The pool: ref-counts by claim, a prefix index over published blocks, and an LRU list of those nobody refers to.

use ridge_protocol::stats::BlockCounts;
use ridge_protocol::{BlockHash, BlockId};
use std::collections::{BTreeMap, VecDeque};

/// Why somebody refers to a block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Claim {
    /// A sequence is being computed with it.
    Used,
    /// KV is to land in it.
    Reserved,
    /// Its KV was computed and waits for the hand-off to be acknowledged.
    Held,
}

/// Blocks of one sequence under one claim. Neither `Clone` nor `Copy`: it is settled by [`BlockPool::release`] or
/// turned by [`BlockPool::reclaim`], and `check_integrity` of the owner finds one that was dropped.
#[must_use = "a lease must be given back to its pool"]
#[derive(PartialEq, Eq, Debug)]
pub struct Lease {
    claim: Claim,
    blocks: Vec<BlockId>,
}

impl Lease {
    /// The blocks in sequence order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Why they are referred to.
    pub fn claim(&self) -> Claim {
        self.claim
    }
}

/// Fewer blocks can be had than were asked for. Nothing was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{wanted} blocks wanted, {available} available")]
pub struct OutOfBlocks {
    /// Asked for.
    pub wanted: usize,
    /// Free and evictable.
    pub available: usize,
}

/// A change of the prefix index since [`BlockPool::take_changes`] was last called.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CacheChange {
    /// Now findable.
    pub added: Vec<BlockHash>,
    /// No longer findable.
    pub removed: Vec<BlockHash>,
}

impl CacheChange {
    /// The same in pieces of at most `most` hashes, for messages of limited size. Nothing if nothing changed.
    pub fn split(self, most: usize) -> Vec<CacheChange> {
        let added = self.added.chunks(most).map(|piece| CacheChange { added: piece.to_vec(), removed: Vec::new() });
        let removed = self.removed.chunks(most).map(|piece| CacheChange { added: Vec::new(), removed: piece.to_vec() });
        added.chain(removed).collect()
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Block {
    /// References by claim: used, reserved, held.
    refs: [u32; 3],
    /// Set while the block is findable in the index.
    hash: Option<BlockHash>,
    /// Present in the LRU list under this stamp when nobody refers to it and it is findable.
    idle_since: u64,
}

impl Block {
    fn is_referenced(&self) -> bool {
        self.refs.iter().any(|&n| n > 0)
    }

    /// The state it is counted under: the strongest claim wins.
    fn state(&self) -> State {
        match (self.refs, self.hash) {
            ([used, _, _], _) if used > 0 => State::Used,
            ([_, reserved, _], _) if reserved > 0 => State::Reserved,
            ([_, _, held], _) if held > 0 => State::Held,
            (_, Some(_)) => State::Cached,
            (_, None) => State::Free,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Used = 0,
    Reserved = 1,
    Held = 2,
    Cached = 3,
    Free = 4,
}

/// All blocks of a node.
///
/// Every block is in exactly one state: used, reserved, held, cached (findable, nobody refers to it) or free.
/// Allocation takes free blocks first, then evicts the cached block that has been idle longest.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: VecDeque<BlockId>,
    /// Idle stamp to block: the first entry is evicted first.
    idle: BTreeMap<u64, BlockId>,
    index: BTreeMap<BlockHash, BlockId>,
    counts: [u32; 5],
    clock: u64,
    /// Hashes whose findability changed since the last report, and what it is now.
    changes: BTreeMap<BlockHash, bool>,
    caching: bool,
}

impl BlockPool {
    /// A pool of `total` free blocks. `caching` false makes [`BlockPool::publish`] a no-op.
    pub fn new(total: u32, caching: bool) -> Self {
        assert!(total > 0, "a pool has at least one block");
        Self {
            blocks: vec![Block::default(); total as usize],
            free: (0..total).map(BlockId).collect(),
            idle: BTreeMap::new(),
            index: BTreeMap::new(),
            counts: [0, 0, 0, 0, total],
            clock: 0,
            changes: BTreeMap::new(),
            caching,
        }
    }

    /// Blocks that can be had now: free ones and evictable ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks in the pool.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        let count = |state: State| self.counts[state as usize];
        BlockCounts {
            total: self.blocks.len() as u32,
            free: count(State::Free),
            cached: count(State::Cached),
            used: count(State::Used),
            reserved: count(State::Reserved),
            held: count(State::Held),
        }
    }

    /// How many leading `hashes` are findable, without taking them.
    pub fn matched(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.index.contains_key(hash)).count()
    }

    /// Whether [`lease`](Self::lease) would succeed and leave at least `reserve` blocks available.
    pub fn can_lease(&self, hashes: &[BlockHash], limit: usize, total: usize, reserve: usize) -> bool {
        let (matched, available) = self.prefix(hashes, limit.min(total));
        total - matched.len() + reserve <= available
    }

    /// The longest findable prefix, and how many blocks are available beside it.
    fn prefix(&self, hashes: &[BlockHash], limit: usize) -> (Vec<BlockId>, usize) {
        let matched: Vec<BlockId> = hashes.iter().take(limit).map_while(|hash| self.index.get(hash).copied()).collect();
        // Matched blocks that are idle would be counted as evictable: they are not, since they are to be taken.
        let idle = matched.iter().filter(|b| !self.blocks[b.0 as usize].is_referenced()).count();
        (matched, self.available() - idle)
    }

    /// Takes the longest findable prefix of `hashes`, at most `limit` blocks, plus fresh blocks up to `total`.
    ///
    /// Returns the lease and how many leading blocks came from the cache. On failure nothing is taken.
    pub fn lease(
        &mut self,
        claim: Claim,
        hashes: &[BlockHash],
        limit: usize,
        total: usize,
    ) -> Result<(Lease, usize), OutOfBlocks> {
        let (matched, available) = self.prefix(hashes, limit.min(total));
        let wanted = total - matched.len();
        if wanted > available {
            return Err(OutOfBlocks { wanted, available });
        }
        let cached = matched.len();
        let mut lease = Lease { claim, blocks: matched };
        for block in &lease.blocks {
            self.add_ref(*block, claim);
        }
        for _ in 0..wanted {
            let block = self.take_one().expect("availability was checked");
            self.add_ref(block, claim);
            lease.blocks.push(block);
        }
        Ok((lease, cached))
    }

    /// Adds fresh blocks to a lease.
    pub fn grow(&mut self, lease: &mut Lease, extra: usize) -> Result<(), OutOfBlocks> {
        let available = self.available();
        if extra > available {
            return Err(OutOfBlocks { wanted: extra, available });
        }
        for _ in 0..extra {
            let block = self.take_one().expect("availability was checked");
            self.add_ref(block, lease.claim);
            lease.blocks.push(block);
        }
        Ok(())
    }

    /// Turns a lease's claim into another.
    pub fn reclaim(&mut self, lease: &mut Lease, claim: Claim) {
        for at in 0..lease.blocks.len() {
            let block = lease.blocks[at];
            self.add_ref(block, claim);
            self.drop_ref(block, lease.claim);
        }
        lease.claim = claim;
    }

    /// Gives a lease back. Findable blocks stay cached; the others become free.
    pub fn release(&mut self, lease: Lease) {
        // Last block first: of one sequence the tail is evicted before the prefix that others may share.
        for block in lease.blocks.iter().rev() {
            self.drop_ref(*block, lease.claim);
        }
    }

    /// Makes a full block findable under its chain hash. If another block already is, that one stays.
    pub fn publish(&mut self, block: BlockId, hash: BlockHash) {
        let entry = &mut self.blocks[block.0 as usize];
        assert!(entry.is_referenced(), "only a block in use can be published");
        if !self.caching || self.index.contains_key(&hash) || entry.hash.is_some() {
            return;
        }
        entry.hash = Some(hash);
        self.index.insert(hash, block);
        self.changes.insert(hash, true);
    }

    /// What changed in the index since the last call. A hash is in one of the two lists at most.
    pub fn take_changes(&mut self) -> CacheChange {
        let mut change = CacheChange::default();
        for (hash, findable) in std::mem::take(&mut self.changes) {
            let list = if findable { &mut change.added } else { &mut change.removed };
            list.push(hash);
        }
        change
    }

    /// Makes the next [`take_changes`](Self::take_changes) report the whole index, for a listener that knows nothing.
    pub fn announce_all(&mut self) {
        self.changes = self.index.keys().map(|hash| (*hash, true)).collect();
    }

    /// Panics if a block is in two states, lost, or findable where it should not be. `leases` are all that exist:
    /// a block whose references exceed theirs is orphaned, and its number is returned.
    pub fn check_integrity<'a>(&self, leases: impl Iterator<Item = &'a Lease>) -> u32 {
        let mut owed = vec![[0u32; 3]; self.blocks.len()];
        for lease in leases {
            for block in &lease.blocks {
                owed[block.0 as usize][lease.claim as usize] += 1;
            }
        }
        let mut counts = [0; 5];
        let mut orphaned = 0;
        for (block, owed) in self.blocks.iter().zip(&owed) {
            counts[block.state() as usize] += 1;
            for (have, owed) in block.refs.iter().zip(owed) {
                assert!(have >= owed, "a lease refers to a block that was already given back");
            }
            orphaned += u32::from(block.refs != *owed);
        }
        assert_eq!(counts, self.counts, "block counts drifted");
        assert_eq!(counts.iter().sum::<u32>() as usize, self.blocks.len(), "blocks are not conserved");
        assert_eq!(self.free.len(), counts[State::Free as usize] as usize, "free list drifted");
        assert_eq!(self.idle.len(), counts[State::Cached as usize] as usize, "idle list drifted");
        for (hash, block) in &self.index {
            assert_eq!(self.blocks[block.0 as usize].hash, Some(*hash), "prefix index drifted");
        }
        orphaned
    }

    fn take_one(&mut self) -> Option<BlockId> {
        if let Some(block) = self.free.pop_front() {
            return Some(block);
        }
        let (_, block) = self.idle.pop_first()?;
        let entry = &mut self.blocks[block.0 as usize];
        let hash = entry.hash.take().expect("idle blocks are findable");
        self.index.remove(&hash);
        self.changes.insert(hash, false);
        self.counts[State::Cached as usize] -= 1;
        self.counts[State::Free as usize] += 1;
        Some(block)
    }

    fn add_ref(&mut self, block: BlockId, claim: Claim) {
        let entry = &mut self.blocks[block.0 as usize];
        let before = entry.state();
        if before == State::Cached {
            self.idle.remove(&entry.idle_since).expect("cached blocks are idle");
        }
        entry.refs[claim as usize] += 1;
        self.counts[before as usize] -= 1;
        self.counts[entry.state() as usize] += 1;
    }

    fn drop_ref(&mut self, block: BlockId, claim: Claim) {
        let entry = &mut self.blocks[block.0 as usize];
        let before = entry.state();
        assert!(entry.refs[claim as usize] > 0, "block {block:?} was given back twice");
        entry.refs[claim as usize] -= 1;
        let after = entry.state();
        self.counts[before as usize] -= 1;
        self.counts[after as usize] += 1;
        match after {
            State::Cached => {
                self.clock += 1;
                entry.idle_since = self.clock;
                self.idle.insert(self.clock, block);
            }
            State::Free => self.free.push_back(block),
            State::Used | State::Reserved | State::Held => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash_blocks;

    fn lease(pool: &mut BlockPool, hashes: &[BlockHash], total: usize) -> (Lease, usize) {
        pool.lease(Claim::Used, hashes, usize::MAX, total).expect("fits")
    }

    #[test]
    fn blocks_come_and_go() {
        let mut pool = BlockPool::new(4, true);
        let (a, cached) = lease(&mut pool, &[], 3);
        assert_eq!((cached, pool.available()), (0, 1));
        assert_eq!(pool.lease(Claim::Used, &[], 9, 2), Err(OutOfBlocks { wanted: 2, available: 1 }));
        assert_eq!(pool.check_integrity([&a].into_iter()), 0);
        pool.release(a);
        assert_eq!(pool.counts().free, 4);
    }

    #[test]
    fn a_prefix_is_found_again_until_evicted() {
        let mut pool = BlockPool::new(4, true);
        let hashes = hash_blocks(0, 2, &[1, 2, 3, 4]);
        let (a, _) = lease(&mut pool, &hashes, 2);
        for (block, hash) in a.blocks().to_vec().into_iter().zip(&hashes) {
            pool.publish(block, *hash);
        }
        let first = a.blocks().to_vec();
        pool.release(a);
        assert_eq!((pool.counts().cached, pool.counts().free), (2, 2));
        let (b, cached) = lease(&mut pool, &hashes, 3);
        assert_eq!((cached, &b.blocks()[..2]), (2, &first[..]));
        pool.release(b);
        // Four fresh blocks need everything: the prefix goes, its tail first.
        let (c, cached) = lease(&mut pool, &[], 4);
        assert_eq!((cached, pool.matched(&hashes)), (0, 0));
        let changes = pool.take_changes();
        assert_eq!((changes.added.len(), changes.removed.len()), (0, 2), "only the last state is reported");
        pool.release(c);
    }

    #[test]
    fn taking_a_cached_prefix_does_not_count_it_as_evictable() {
        let mut pool = BlockPool::new(2, true);
        let hashes = hash_blocks(0, 1, &[7]);
        let (a, _) = lease(&mut pool, &hashes, 1);
        pool.publish(a.blocks()[0], hashes[0]);
        pool.release(a);
        // One cached, one free: prefix plus two fresh blocks cannot be had.
        assert_eq!(pool.lease(Claim::Used, &hashes, 1, 3), Err(OutOfBlocks { wanted: 2, available: 1 }));
        assert_eq!(pool.check_integrity([].into_iter()), 0);
    }

    #[test]
    fn claims_are_counted_apart() {
        let mut pool = BlockPool::new(3, true);
        let (mut a, _) = pool.lease(Claim::Reserved, &[], 0, 2).expect("fits");
        assert_eq!(pool.counts().reserved, 2);
        pool.reclaim(&mut a, Claim::Used);
        assert_eq!((pool.counts().reserved, pool.counts().used), (0, 2));
        pool.reclaim(&mut a, Claim::Held);
        assert_eq!(pool.counts().held, 2);
        pool.grow(&mut a, 1).expect("fits");
        assert_eq!(pool.counts().held, 3);
        pool.release(a);
        assert_eq!(pool.counts().free, 3);
    }

    #[test]
    fn asking_agrees_with_doing_and_costs_no_cache() {
        let mut pool = BlockPool::new(4, true);
        let hashes = hash_blocks(0, 1, &[7, 8]);
        let (a, _) = lease(&mut pool, &hashes, 2);
        for (block, hash) in a.blocks().to_vec().into_iter().zip(&hashes) {
            pool.publish(block, *hash);
        }
        pool.release(a);
        assert!(pool.can_lease(&hashes, 2, 4, 0));
        assert!(!pool.can_lease(&hashes, 2, 4, 1), "the prefix is not available twice");
        assert!(!pool.can_lease(&[], 0, 5, 0));
        assert_eq!(pool.matched(&hashes), 2, "asking evicts nothing");
        pool.take_changes();
        pool.announce_all();
        assert_eq!(pool.take_changes().added.len(), 2);
    }

    #[test]
    fn a_lost_lease_is_found() {
        let mut pool = BlockPool::new(3, true);
        let (lost, _) = pool.lease(Claim::Used, &[], 0, 2).expect("fits");
        drop(lost);
        assert_eq!(pool.check_integrity([].into_iter()), 2);
    }

    #[test]
    fn without_caching_nothing_is_kept() {
        let mut pool = BlockPool::new(1, false);
        let hashes = hash_blocks(0, 1, &[7]);
        let (a, _) = lease(&mut pool, &hashes, 1);
        pool.publish(a.blocks()[0], hashes[0]);
        pool.release(a);
        assert_eq!((pool.counts().cached, pool.matched(&hashes)), (0, 0));
    }
}
