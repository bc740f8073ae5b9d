//! KV pages on the device, and their traffic with the host's.
//!
//! The device has a page for each page of [`KvMemory`], with the same bytes and at the same distances. What a pass writes is copied
//! to the host's pages a layer at a time, beside the computing of later layers; what arrived at the host from a peer is
//! copied to the device before a pass reads it. So network and schedulers see the host's pages alone, and a node's device
//! is nobody else's concern.

#![allow(unsafe_code, reason = "the device's memory is addressed by numbers")]

use crate::kv::KvMemory;
use ridge_kernels::KvFormat;
use ridge_kernels::cuda::{Buffer, CudaError, Device, Fetch, Pinned};
use ridge_protocol::BlockId;
use std::collections::VecDeque;
use std::sync::Arc;

/// Layers whose pages may be on their way to the host at a time: the device stays busy while the host copies one of them.
pub const LAYERS_UNDER_WAY: usize = 3;

/// The device's pages.
pub struct DevicePages {
    /// Before the pool, because dropping it waits for the copies from there.
    under_way: VecDeque<Shipment>,
    device: Arc<dyn Device>,
    kv: Arc<KvMemory>,
    pool: Buffer,
    /// Memory of earlier shipments, to be used again.
    spare: Vec<Pinned>,
    pinned_bytes: usize,
}

/// One layer's pages on their way to the host.
struct Shipment {
    layer: usize,
    blocks: Vec<BlockId>,
    fetch: Fetch,
}

impl DevicePages {
    /// Allocates a page for each of the host's.
    pub fn new(device: &Arc<dyn Device>, kv: Arc<KvMemory>) -> Result<Self, CudaError> {
        let pool = Buffer::new(device, kv.blocks() * kv.block_stride())?;
        // Slots that no token was written to are zero in every page, from the start.
        pool.fill(0)?;
        kv.track_arrivals();
        Ok(Self { device: device.clone(), kv, pool, under_way: VecDeque::new(), spare: Vec::new(), pinned_bytes: 0 })
    }

    /// Where the first page lies.
    pub fn address(&self) -> u64 {
        self.pool.address()
    }

    /// The layout of a page.
    pub fn format(&self) -> &KvFormat {
        self.kv.format()
    }

    /// The host's pages.
    pub fn host(&self) -> &Arc<KvMemory> {
        &self.kv
    }

    /// Where a page begins, within the pool.
    fn offset(&self, layer: usize, block: BlockId) -> usize {
        block.0 as usize * self.kv.block_stride() + layer * self.kv.page_stride()
    }

    /// Copies the pages of these blocks that arrived at the host since the last time.
    pub fn upload_arrivals(&self, blocks: impl Iterator<Item = BlockId>) -> Result<(), CudaError> {
        let mut result = Ok(());
        for block in blocks {
            self.kv.take_arrivals(block, |layer| {
                if result.is_ok() {
                    result = self.pool.upload(self.offset(layer, block), &self.kv.read(layer, block));
                }
            });
        }
        result
    }

    /// Begins to copy a layer's pages of these blocks to the host, after everything asked of the device so far. `landed` hears of
    /// layers that are there, in order.
    pub fn ship(&mut self, layer: usize, blocks: &[BlockId], landed: &mut dyn FnMut(usize)) -> Result<(), CudaError> {
        while self.under_way.len() >= LAYERS_UNDER_WAY {
            self.land(true, landed)?;
        }
        while self.land(false, landed)? {}
        let bytes = self.kv.page_bytes();
        let pinned = self.pinned(blocks.len() * bytes)?;
        let pieces: Vec<(u64, usize)> =
            blocks.iter().map(|block| (self.pool.at(self.offset(layer, *block), bytes), bytes)).collect();
        // SAFETY: the pieces are pages of the pool, which lives as long as `self`, whose `land` or drop waits for the fetch. A
        // page of a layer is written once in a pass, before this, and every pass lands what it shipped.
        let fetch = unsafe { Fetch::begin(&pieces, pinned)? };
        self.under_way.push_back(Shipment { layer, blocks: blocks.to_vec(), fetch });
        Ok(())
    }

    /// Waits until everything shipped has landed.
    pub fn land_all(&mut self, landed: &mut dyn FnMut(usize)) -> Result<(), CudaError> {
        while self.land(true, landed)? {}
        Ok(())
    }

    /// Puts the oldest shipment into the host's pages, if it is there or is to be waited for. Whether it did.
    fn land(&mut self, wait: bool, landed: &mut dyn FnMut(usize)) -> Result<bool, CudaError> {
        let Some(oldest) = self.under_way.front_mut() else { return Ok(false) };
        let Some(pinned) = oldest.fetch.take(wait)? else { return Ok(false) };
        let Shipment { layer, blocks, .. } = self.under_way.pop_front().expect("there is an oldest");
        for (block, page) in blocks.iter().zip(pinned.bytes().chunks_exact(self.kv.page_bytes())) {
            self.kv.write_copy(layer, *block).copy_from_slice(page);
        }
        self.spare.push(pinned);
        landed(layer);
        Ok(true)
    }

    /// Pinned memory of at least this size.
    fn pinned(&mut self, bytes: usize) -> Result<Pinned, CudaError> {
        if bytes > self.pinned_bytes {
            // Sizes grow with the largest pass; what is too small is given back.
            self.spare.clear();
            self.pinned_bytes = bytes;
        }
        let fits = self.spare.iter().position(|pinned| pinned.bytes().len() >= bytes);
        match fits {
            Some(index) => Ok(self.spare.swap_remove(index)),
            None => Pinned::new(&self.device, self.pinned_bytes),
        }
    }
}
