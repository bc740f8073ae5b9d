//! KV pages on the device, and their traffic with the host's.
//!
//! The device has a page for each page of [`KvMemory`], with the same bytes and at the same distances. What a pass writes of prompts
//! is copied to the host's pages a layer at a time, beside the computing of later layers; and where a prompt is read in blocks of
//! another shape, pages in those are gathered and converted in one launch and come along ([`Made`], to [`Outgoing`]). What a pass writes
//! of decode steps is fetched when somebody reads it there, converted on the way if its reader wants another shape. What arrived at the
//! host from a peer, which is always in this node's shape (rule K-12), is copied to the device before a pass reads it, many pages at a
//! time. So network and schedulers see the host's memory alone, and a node's device is nobody else's concern.
//!
//! [`Outgoing`]: crate::outgoing::Outgoing

#![allow(unsafe_code, reason = "the device's memory is addressed by numbers")]

use super::made::Made;
use crate::kv::{FetchPage, KvMemory};
use crate::memory::PassLimits;
use ridge_kernels::cuda::ops::pages::{self, Move, Pages};
use ridge_kernels::cuda::{Buffer, CudaError, Device, Fetch, Pinned};
use ridge_kernels::{KvFormat, KvMove};
use ridge_protocol::BlockId;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Layers whose pages may be on their way to the host at a time: the device stays busy while the host copies one of them.
const LAYERS_UNDER_WAY: usize = 3;
/// Bytes that the pages made of a layer may take, as a multiple of the pages that they are made of: twice as wide a type, or the empty
/// slots of short prompts in large blocks.
const MADE_BYTES: usize = 2;
/// Passes whose pages may wait to be sent: the one that is sent while the next is computed, and that.
const OUTGOING_PASSES: usize = 2;

/// The device's pages.
pub struct DevicePages {
    /// Before the pool, because dropping it waits for the copies from there.
    under_way: VecDeque<Shipment>,
    device: Arc<dyn Device>,
    kv: Arc<KvMemory>,
    pool: Arc<Pool>,
    /// Memory of earlier shipments, to be used again.
    spare: Vec<(Buffer, Pinned)>,
    place_bytes: usize,
    /// Most bytes that the pages made of a layer may take.
    made_bytes: usize,
    landing: Landing,
}

/// Memory for pages on their way from the host.
struct Landing {
    /// On the host, one behind the other.
    gathered: Vec<u8>,
    staging: Buffer,
    /// Numbers of the blocks that they go to.
    numbers: Buffer,
    /// Pages at a time.
    pages: usize,
}

/// One layer's pages on their way to the host.
struct Shipment {
    /// Before the memory that it copies from.
    fetch: Fetch,
    staging: Buffer,
    layer: usize,
    /// Whose pages come first.
    blocks: Vec<BlockId>,
    /// What follows.
    made: Arc<[Made]>,
}

/// Where pages lie on the device.
struct Pool {
    memory: Buffer,
    block_stride: usize,
    page_stride: usize,
    format: KvFormat,
    /// Where pages are converted: their moves, then what comes of them. Made when it is first needed.
    converted: Mutex<Option<Buffer>>,
}

impl Pool {
    /// Where a page begins, within the memory.
    fn offset(&self, layer: usize, block: BlockId) -> usize {
        block.0 as usize * self.block_stride + layer * self.page_stride
    }

    /// Pages of a layer as the kernels take them.
    fn of_layer(&self, layer: usize) -> Pages {
        let base = self.memory.address() + (layer * self.page_stride) as u64;
        Pages { format: self.format, base, block_stride: self.block_stride as u64 }
    }

    /// See [`FetchPage::fetch_converted`].
    fn convert(
        &self,
        layer: usize,
        moves: &[(BlockId, KvMove)],
        to: &KvFormat,
        page: &mut [u8],
    ) -> Result<(), CudaError> {
        let moves: Vec<Move> =
            moves.iter().map(|(block, slots)| Move { from: block.0, to: 0, slots: *slots }).collect();
        let words = Move::words(&moves);
        let begin = size_of_val(&*words).next_multiple_of(16);
        let bytes = begin + page.len();
        let mut buffer = self.converted.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = match &mut *buffer {
            Some(memory) if memory.bytes() >= bytes => memory,
            other => other.insert(Buffer::new(self.memory.device(), bytes.next_power_of_two())?),
        };
        memory.upload(0, &words)?;
        memory.upload(begin, page)?;
        let block_stride = page.len().next_multiple_of(16) as u64;
        let target = Pages { format: *to, base: memory.at(begin, page.len()), block_stride };
        // SAFETY: the moves are from blocks of the pool into the one page, whose memory is ours alone under the lock.
        unsafe {
            pages::move_tokens(&**memory.device(), (&moves, memory.address()), &self.of_layer(layer), &target)?;
        }
        memory.download(begin, page)
    }
}

impl FetchPage for Pool {
    fn fetch(&self, layer: usize, block: BlockId, page: &mut [u8]) {
        let fetched = self.memory.download(self.offset(layer, block), page);
        // The reader needs the page and there is no other: the node is started again.
        fetched
            .unwrap_or_else(|error| panic!("the device does not give back layer {layer}, block {}: {error}", block.0));
    }

    fn fetch_converted(&self, layer: usize, moves: &[(BlockId, KvMove)], to: &KvFormat, page: &mut [u8]) {
        // As above.
        self.convert(layer, moves, to, page)
            .unwrap_or_else(|error| panic!("the device does not convert pages of layer {layer}: {error}"));
    }
}

impl DevicePages {
    /// Allocates a page for each of the host's. Pages of passes up to `limits` are made for readers of another shape.
    pub fn new(device: &Arc<dyn Device>, kv: Arc<KvMemory>, limits: PassLimits) -> Result<Self, CudaError> {
        let (block_stride, page_stride) = (kv.block_stride(), kv.page_stride());
        let memory = Buffer::new(device, kv.blocks() * block_stride)?;
        // Slots that no token was written to are zero in every page, from the start.
        memory.fill(0)?;
        let pool =
            Arc::new(Pool { memory, block_stride, page_stride, format: *kv.format(), converted: Mutex::default() });
        kv.attach(Box::new(pool.clone()));
        let pages = landing_pages(page_stride).min(kv.blocks());
        let landing = Landing {
            gathered: Vec::new(),
            staging: Buffer::new(device, pages * page_stride)?,
            numbers: Buffer::new(device, pages * size_of::<u32>())?,
            pages,
        };
        kv.outgoing().allow(outgoing_bytes(kv.format(), page_stride, limits, kv.layers()) as usize);
        let made_bytes = MADE_BYTES * layer_bytes(kv.format(), page_stride, limits);
        let (under_way, device) = (VecDeque::new(), device.clone());
        Ok(Self { under_way, device, kv, pool, spare: Vec::new(), place_bytes: 0, made_bytes, landing })
    }

    /// The layout of a page.
    pub fn format(&self) -> &KvFormat {
        self.kv.format()
    }

    /// The host's pages.
    pub fn host(&self) -> &Arc<KvMemory> {
        &self.kv
    }

    /// Copies the pages of these blocks that arrived at the host since the last time: a layer's as one array, which the device
    /// scatters.
    pub fn upload_arrivals(&mut self, blocks: impl Iterator<Item = BlockId>) -> Result<(), CudaError> {
        let mut arrived = vec![Vec::new(); self.kv.layers()];
        for block in blocks {
            self.kv.take_arrivals(block, |layer| arrived[layer].push(block));
        }
        let stride = self.kv.page_stride();
        for (layer, blocks) in arrived.iter().enumerate() {
            for blocks in blocks.chunks(self.landing.pages) {
                let Landing { gathered, staging, numbers, .. } = &mut self.landing;
                gathered.resize(blocks.len() * stride, 0);
                for (block, place) in blocks.iter().zip(gathered.chunks_exact_mut(stride)) {
                    let page = self.kv.read(layer, *block);
                    place[..page.len()].copy_from_slice(&page);
                }
                // The stream's order keeps these apart from the pages before, which the device may not have scattered yet.
                staging.upload(0, gathered)?;
                numbers.upload(0, &blocks.iter().map(|block| block.0).collect::<Vec<u32>>())?;
                let pages = self.pool.of_layer(layer);
                let staged = Pages { base: staging.address(), block_stride: stride as u64, ..pages };
                // SAFETY: the numbers are of blocks of the pool, and the staging memory has a page for each.
                unsafe { pages::copy(&*self.device, blocks.len(), (&staged, 0), (&pages, numbers.address()))? };
            }
        }
        Ok(())
    }

    /// Notes that a layer's pages of these blocks, which the device has been asked to write, are to be fetched by whoever reads them:
    /// those of decode steps, which hardly anybody ever reads.
    pub fn keep(&self, layer: usize, blocks: &[BlockId]) {
        blocks.iter().for_each(|block| self.kv.mark_stale(layer, *block));
    }

    /// Pages of a layer as the kernels take them.
    pub fn of_layer(&self, layer: usize) -> Pages {
        self.pool.of_layer(layer)
    }

    /// Begins to copy a layer's pages of these blocks to the host, and those that are made of it if there is room for them there, after
    /// everything asked of the device so far. `numbers` is the address of the blocks' numbers, `base` that of the numbers that `made` was
    /// placed among. `landed` hears of layers that are there, in order.
    pub fn ship(
        &mut self,
        layer: usize,
        (blocks, numbers): (&[BlockId], u64),
        (made, base): (&Arc<[Made]>, u64),
        landed: &mut dyn FnMut(usize),
    ) -> Result<(), CudaError> {
        let made = if self.has_room(made) { made.clone() } else { Arc::default() };
        if blocks.is_empty() && made.is_empty() && self.under_way.is_empty() {
            landed(layer);
            return Ok(());
        }
        while self.under_way.len() >= LAYERS_UNDER_WAY {
            self.land(true, landed)?;
        }
        while self.land(false, landed)? {}
        let (own, stride) = (self.of_layer(layer), self.kv.page_stride());
        let own_bytes = blocks.len() * stride;
        let bytes = own_bytes + made.iter().map(Made::staged_bytes).sum::<usize>();
        let (staging, pinned) = self.place(bytes)?;
        let gathered = Pages { base: staging.address(), block_stride: stride as u64, ..own };
        // One behind the other on the device first: a copy per page would keep the host busy.
        // SAFETY: the numbers are of blocks of the pool, and the staging memory has a page for each.
        unsafe { pages::copy(&*self.device, blocks.len(), (&own, numbers), (&gathered, 0))? };
        let mut at = own_bytes;
        for made in made.iter() {
            let base_of_made = staging.at(at, made.staged_bytes());
            let pages = Pages { format: made.format, base: base_of_made, block_stride: made.stride() as u64 };
            // SAFETY: the moves are from blocks of the pool, and the staging memory has these pages behind the others.
            unsafe {
                if made.partial {
                    self.device.fill(pages.base, 0, made.staged_bytes())?;
                }
                pages::move_tokens(&*self.device, (&made.moves, base + made.list), &own, &pages)?;
            }
            at += made.staged_bytes();
        }
        // SAFETY: the staging memory is kept with the fetch, and used again only when that is done.
        let fetch = unsafe { Fetch::begin(&[(staging.address(), bytes)], pinned)? };
        self.under_way.push_back(Shipment { fetch, staging, layer, blocks: blocks.to_vec(), made });
        Ok(())
    }

    /// Whether what can be made of a layer has room here and at the host, which is then claimed.
    fn has_room(&self, made: &[Made]) -> bool {
        let sum = |bytes: fn(&Made) -> usize| made.iter().map(bytes).sum::<usize>();
        sum(Made::staged_bytes) <= self.made_bytes && self.kv.outgoing().claim(sum(Made::page_bytes))
    }

    /// Waits until everything shipped has landed.
    pub fn land_all(&mut self, landed: &mut dyn FnMut(usize)) -> Result<(), CudaError> {
        while self.land(true, landed)? {}
        Ok(())
    }

    /// Puts the oldest shipment into the host's memory, if it is there or is to be waited for. Whether it did.
    fn land(&mut self, wait: bool, landed: &mut dyn FnMut(usize)) -> Result<bool, CudaError> {
        let Some(oldest) = self.under_way.front_mut() else { return Ok(false) };
        let Some(pinned) = oldest.fetch.take(wait)? else { return Ok(false) };
        let Shipment { layer, blocks, made, staging, .. } = self.under_way.pop_front().expect("there is an oldest");
        let (page_bytes, stride) = (self.kv.page_bytes(), self.kv.page_stride());
        let (own, mut rest) = pinned.bytes().split_at(blocks.len() * stride);
        for (block, page) in blocks.iter().zip(own.chunks_exact(stride)) {
            self.kv.write_copy(layer, *block).copy_from_slice(&page[..page_bytes]);
        }
        for made in made.iter() {
            let (pages, others) = rest.split_at(made.staged_bytes());
            for ((request, index), page) in made.pages.iter().zip(pages.chunks_exact(made.stride())) {
                self.kv.outgoing().put(*request, layer as u32, *index, &page[..made.format.page_bytes()]);
            }
            rest = others;
        }
        self.spare.push((staging, pinned));
        landed(layer);
        Ok(true)
    }

    /// Memory of at least this size on both sides.
    fn place(&mut self, bytes: usize) -> Result<(Buffer, Pinned), CudaError> {
        if bytes > self.place_bytes {
            // Sizes grow with the largest pass; what is too small is given back.
            self.spare.clear();
            self.place_bytes = bytes;
        }
        let fits = self.spare.iter().position(|(staging, _)| staging.bytes() >= bytes);
        match fits {
            Some(index) => Ok(self.spare.swap_remove(index)),
            None => Ok((Buffer::new(&self.device, self.place_bytes)?, Pinned::new(&self.device, self.place_bytes)?)),
        }
    }
}

/// Pages that land at a time: some megabytes, after which more at once is no faster.
fn landing_pages(page_stride: usize) -> usize {
    (8usize << 20).div_ceil(page_stride)
}

/// Bytes of a layer's pages of the largest pass.
fn layer_bytes(format: &KvFormat, page_stride: usize, pass: PassLimits) -> usize {
    (pass.tokens.div_ceil(format.block_size) + pass.sequences) * page_stride
}

/// Bytes of staging memory, on each side, for passes up to `tokens` of prompts, and for what arrives.
pub fn staging_bytes(format: &KvFormat, page_stride: usize, pass: PassLimits) -> u64 {
    let shipped = LAYERS_UNDER_WAY * (1 + MADE_BYTES) * layer_bytes(format, page_stride, pass);
    (shipped + landing_pages(page_stride) * page_stride) as u64
}

/// Bytes of host memory for pages that were made and not yet sent. What has no room, because readers are slow, the host makes when they are
/// ready.
pub fn outgoing_bytes(format: &KvFormat, page_stride: usize, pass: PassLimits, layers: usize) -> u64 {
    (OUTGOING_PASSES * layers * layer_bytes(format, page_stride, pass)) as u64
}
