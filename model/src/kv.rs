//! The memory that KV pages live in, shared by the engine that fills it and the shell that ships it.
//!
//! [`KvMemory`] is one anonymous mapping of `blocks x layers` pages. A page is K and V of one block in one layer, as
//! [`KvFormat`] lays them out; it is the unit of locking and of transfer. The memory knows neither sequences nor
//! owners: block numbers are handed out by `ridge-blocks`.
//!
//! A block's pages are neighbours, because memory becomes resident as it is written, in huge pages by the 2 MiB. Block
//! numbers are handed out from 0 up, so that what is in use is dense and ends in one huge page that is not full; were
//! a layer's pages neighbours, there would be one such end per layer.
//!
//! Who may touch a page is decided elsewhere and checked here: [`KvMemory::read`] and [`KvMemory::write`] take the
//! page's lock without waiting and panic if it is taken the wrong way, because that means that a hand-off invariant
//! is already broken (a block shipped before it was finished, or computed into before it was granted).

#![allow(unsafe_code, reason = "pages are handed out as slices of one mapping that engine and network share")]

use crate::mapping::{self, HugePages, HugePagesGot};
use crate::outgoing::Outgoing;
use ridge_kernels::sync::page_lock::PageLocks;
use ridge_kernels::{CopyTo, DigestedCopy, KvDtype, KvFormat, KvMove, convert_kv};
use ridge_protocol::page::seeded_digest;
use ridge_protocol::transfer::PageSource;
use ridge_protocol::{BlockId, BlockShape, CacheDtype};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Pages start at multiples of this many bytes, a cache line, so that no two pages share one.
const PAGE_ALIGN: usize = 64;

/// Blocks at least as large as this begin [`SHIFT`] bytes further apart. Large blocks are mostly multiples of a large power of two,
/// so that the same head of neighbouring blocks would compete for the same few lines of every cache.
const SHIFT_FROM: usize = 128 << 10;
/// An odd number of cache lines, a little more than a head's keys of one block often take.
const SHIFT: usize = 33 * PAGE_ALIGN;

/// Why KV memory could not be had.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KvError {
    /// There would be nothing in it.
    #[error("KV memory needs at least one layer and one block, got {layers} and {blocks}")]
    Empty {
        /// Layers asked for.
        layers: usize,
        /// Blocks asked for.
        blocks: usize,
    },
    /// The size does not fit in the address space.
    #[error("KV memory of {layers} layers and {blocks} blocks of {page_bytes} bytes overflows the address space")]
    TooLarge {
        /// Layers asked for.
        layers: usize,
        /// Blocks asked for.
        blocks: usize,
        /// Bytes per page.
        page_bytes: usize,
    },
    /// The operating system refused.
    #[error("cannot map {bytes} bytes of KV memory: {reason}")]
    Map {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        reason: String,
    },
}

/// All KV pages of one node.
pub struct KvMemory {
    format: KvFormat,
    layers: usize,
    blocks: usize,
    /// Distance between the pages of a block: the page size rounded up to [`PAGE_ALIGN`].
    stride: usize,
    /// Distance between blocks.
    block_stride: usize,
    /// Zeroed by the system; a page costs memory from its first write on.
    map: memmap2::MmapRaw,
    huge_pages: HugePagesGot,
    /// One per page, in the order of the pages.
    locks: PageLocks,
    /// Where an engine has a second copy of the pages.
    device: OnceLock<DeviceCopy>,
    outgoing: Outgoing,
}

/// A device's copy of the pages.
pub trait FetchPage: Send + Sync {
    /// Reads a page, as the work asked of the device so far leaves it.
    fn fetch(&self, layer: usize, block: BlockId, page: &mut [u8]);

    /// As [`KvFormat::convert`] of each of these moves from the device's pages of a layer into `page`, of format `to` and zero so far.
    fn fetch_converted(&self, layer: usize, moves: &[(BlockId, KvMove)], to: &KvFormat, page: &mut [u8]);
}

impl<T: FetchPage + ?Sized> FetchPage for std::sync::Arc<T> {
    fn fetch(&self, layer: usize, block: BlockId, page: &mut [u8]) {
        (**self).fetch(layer, block, page);
    }

    fn fetch_converted(&self, layer: usize, moves: &[(BlockId, KvMove)], to: &KvFormat, page: &mut [u8]) {
        (**self).fetch_converted(layer, moves, to, page);
    }
}

/// Which of the two copies of a page is the newer one.
struct DeviceCopy {
    source: Box<dyn FetchPage>,
    /// Blocks with at least one page that arrived here: a pass asks for every block that it reads.
    arrived_blocks: Vec<AtomicBool>,
    /// Pages that were written here and not yet copied to the device.
    arrived: Vec<AtomicBool>,
    /// Pages that the device wrote and that were not copied here: whoever reads one fetches it first.
    stale: Vec<AtomicBool>,
    /// One fetch at a time, so that a second reader of a page waits for the first one's.
    fetching: Mutex<()>,
}

impl KvMemory {
    /// Maps memory for `blocks x layers` pages, all zero, without huge pages.
    pub fn new(format: KvFormat, layers: usize, blocks: usize) -> Result<Self, KvError> {
        Self::with_huge_pages(format, layers, blocks, HugePages::Off)
    }

    /// Maps memory for `blocks x layers` pages, all zero.
    pub fn with_huge_pages(format: KvFormat, layers: usize, blocks: usize, huge: HugePages) -> Result<Self, KvError> {
        if layers == 0 || blocks == 0 {
            return Err(KvError::Empty { layers, blocks });
        }
        let page_bytes = format.page_bytes();
        let block_stride = Self::block_bytes(&format, layers);
        let bytes = blocks
            .checked_mul(block_stride)
            .filter(|bytes| *bytes <= isize::MAX as usize && blocks <= u32::MAX as usize)
            .ok_or(KvError::TooLarge { layers, blocks, page_bytes })?;
        let (map, huge_pages) =
            mapping::map(bytes, huge).map_err(|error| KvError::Map { bytes, reason: error.to_string() })?;
        let locks = PageLocks::new(layers * blocks);
        let stride = stride(&format);
        Ok(Self {
            format,
            layers,
            blocks,
            stride,
            block_stride,
            map: map.into(),
            huge_pages,
            locks,
            device: OnceLock::new(),
            outgoing: Outgoing::default(),
        })
    }

    /// Bytes that a block takes over all layers, which saturate.
    pub fn block_bytes(format: &KvFormat, layers: usize) -> usize {
        let bytes = stride(format).saturating_mul(layers);
        if bytes < SHIFT_FROM { bytes } else { bytes.saturating_add(SHIFT) }
    }

    /// Distance between blocks, in bytes.
    pub fn block_stride(&self) -> usize {
        self.block_stride
    }

    /// Distance between the pages of a block, in bytes.
    pub fn page_stride(&self) -> usize {
        self.stride
    }

    /// The same for pages of this layout.
    pub fn page_stride_of(format: &KvFormat) -> usize {
        stride(format)
    }

    /// Pages in other nodes' blocks, made by an engine while it computed.
    pub fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    /// Whether the memory will be in huge pages.
    pub fn huge_pages(&self) -> &HugePagesGot {
        &self.huge_pages
    }

    /// The layout of a page.
    pub fn format(&self) -> &KvFormat {
        &self.format
    }

    /// Bytes of one page.
    pub fn page_bytes(&self) -> usize {
        self.format.page_bytes()
    }

    /// Blocks in each layer.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The bytes of a page, for as long as nobody writes it. Any number of readers may hold one page.
    ///
    /// # Panics
    ///
    /// If the page is being written, or does not exist.
    pub fn read(&self, layer: usize, block: BlockId) -> PageRead<'_> {
        let page = self.page(layer, block);
        if let Some(device) = self.device.get()
            && device.stale[page].load(Ordering::Acquire)
        {
            self.refresh(device, layer, block);
        }
        self.lock_read(layer, block)
    }

    /// As [`KvMemory::read`], whoever has the newer copy.
    fn lock_read(&self, layer: usize, block: BlockId) -> PageRead<'_> {
        let page = self.page(layer, block);
        assert!(self.locks.try_read(page), "page of layer {layer}, block {} is read while it is written", block.0);
        PageRead { memory: self, page }
    }

    /// Fills `page`, whatever it held, with one page in another node's blocks, made from this memory's pages of the layer (rule
    /// K-12). Blocks of the same shape are copied as they are.
    ///
    /// # Panics
    ///
    /// As [`KvMemory::read`]; if the source does not hold the tokens that it names, or they do not fit in one of those blocks;
    /// or if this memory's type is not converted into theirs ([`CacheDtype::converts_into`]).
    pub fn page_in(&self, blocks: BlockShape, layer: usize, source: &PageSource, page: &mut Vec<u8>) {
        page.clear();
        let to = format_in(blocks, &self.format);
        if to == self.format {
            assert_eq!((source.blocks.len(), source.skip), (1, 0), "a page of the same shape is one of ours");
            return page.extend_from_slice(&self.read(layer, source.blocks[0]));
        }
        page.resize(to.page_bytes(), 0);
        let moves = moves_of(source, self.format.block_size);
        if self.converted_by_the_device(layer, &moves, &to, page) {
            return;
        }
        for (block, moved) in moves {
            convert_kv(&self.format, &self.read(layer, block), &to, page, moved);
        }
    }

    /// As [`KvMemory::page_in`]; gives the page's digest by `seed` ([`seeded_digest`]), which costs next to nothing while a page is
    /// copied.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn digested_page_in(
        &self,
        blocks: BlockShape,
        layer: usize,
        source: &PageSource,
        seed: u64,
        page: &mut Vec<u8>,
    ) -> u128 {
        if format_in(blocks, &self.format) != self.format || !DigestedCopy::takes(self.page_bytes()) {
            self.page_in(blocks, layer, source, page);
            return seeded_digest(seed, page);
        }
        assert_eq!((source.blocks.len(), source.skip), (1, 0), "a page of the same shape is one of ours");
        page.resize(self.page_bytes(), 0);
        let mut copy = DigestedCopy::new(page, CopyTo::Caches, seed);
        copy.push(&self.read(layer, source.blocks[0]));
        copy.finish()
    }

    /// Writes a page that arrived, in pieces, and gives the digest by `seed` of what is there now. The next who reads it is a pass,
    /// so it goes around this core's caches.
    ///
    /// # Panics
    ///
    /// As [`KvMemory::write`], and if the pieces are not as long as a page.
    pub fn land<'a>(
        &self,
        layer: usize,
        block: BlockId,
        seed: u64,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> u128 {
        let mut page = self.write(layer, block);
        if DigestedCopy::takes(page.len()) {
            let mut copy = DigestedCopy::new(&mut page, CopyTo::Memory, seed);
            pieces.into_iter().for_each(|piece| copy.push(piece));
            return copy.finish();
        }
        let mut at = 0;
        for piece in pieces {
            page[at..][..piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        assert_eq!(at, page.len(), "the pieces are a page");
        seeded_digest(seed, &page)
    }

    /// Has the device convert pages that it alone has, so that they cross once and as what they become. Whether it did.
    fn converted_by_the_device(
        &self,
        layer: usize,
        moves: &[(BlockId, KvMove)],
        to: &KvFormat,
        page: &mut [u8],
    ) -> bool {
        let Some(device) = self.device.get() else { return false };
        let stale = |block: BlockId| device.stale[self.page(layer, block)].load(Ordering::Acquire);
        if !moves.iter().all(|(block, _)| stale(*block)) {
            return false;
        }
        // Nobody fetches, and so writes, these pages meanwhile.
        let _one = device.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        if !moves.iter().all(|(block, _)| stale(*block)) {
            return false;
        }
        let _reads: Vec<PageRead<'_>> = moves.iter().map(|(block, _)| self.lock_read(layer, *block)).collect();
        device.source.fetch_converted(layer, moves, to, page);
        true
    }

    /// The bytes of a page, for its only user.
    ///
    /// # Panics
    ///
    /// If the page is being read or written, or does not exist.
    pub fn write(&self, layer: usize, block: BlockId) -> PageWrite<'_> {
        let page = self.page(layer, block);
        assert!(self.locks.try_write(page), "page of layer {layer}, block {} is written while it is in use", block.0);
        if let Some(device) = self.device.get() {
            // Whoever writes a page that the device wrote before has no use for what was there.
            device.stale[page].store(false, Ordering::Relaxed);
        }
        PageWrite { memory: self, page, arrives: true }
    }

    /// As [`KvMemory::write`], for the engine that copies its own device's page here: nothing arrives by it.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn write_copy(&self, layer: usize, block: BlockId) -> PageWrite<'_> {
        let mut write = self.write(layer, block);
        write.arrives = false;
        write
    }

    /// From now on a device has a copy of every page, as they are now. Only the first one counts.
    pub fn attach(&self, source: Box<dyn FetchPage>) {
        let flags = |count: usize| (0..count).map(|_| AtomicBool::new(false)).collect();
        let pages = self.blocks * self.layers;
        self.device.get_or_init(|| DeviceCopy {
            source,
            arrived_blocks: flags(self.blocks),
            arrived: flags(pages),
            stale: flags(pages),
            fetching: Mutex::default(),
        });
    }

    /// The device has been asked to write this page, which will be fetched when somebody reads it here.
    pub fn mark_stale(&self, layer: usize, block: BlockId) {
        if let Some(device) = self.device.get() {
            device.stale[self.page(layer, block)].store(true, Ordering::Release);
        }
    }

    /// Calls `copy` for the layers in which this block was written since it was last asked for, other than through
    /// [`KvMemory::write_copy`].
    pub fn take_arrivals(&self, block: BlockId, mut copy: impl FnMut(usize)) {
        let Some(device) = self.device.get() else { return };
        // Acquire: what was written under the guard that set the flag is seen by whoever finds it set.
        let flag = &device.arrived_blocks[block.0 as usize];
        if !flag.load(Ordering::Relaxed) || !flag.swap(false, Ordering::Acquire) {
            return;
        }
        for layer in 0..self.layers {
            if device.arrived[self.page(layer, block)].swap(false, Ordering::Acquire) {
                copy(layer);
            }
        }
    }

    /// Fetches a page that the device has newer, unless somebody else just did.
    fn refresh(&self, device: &DeviceCopy, layer: usize, block: BlockId) {
        let _one = device.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        let stale = &device.stale[self.page(layer, block)];
        if stale.load(Ordering::Acquire) {
            let mut write = self.write_copy(layer, block);
            // `write` takes the flag away; the others must wait until the bytes are here.
            stale.store(true, Ordering::Relaxed);
            device.source.fetch(layer, block, &mut write);
            drop(write);
            stale.store(false, Ordering::Release);
        }
    }

    /// A page's place among all pages.
    fn page(&self, layer: usize, block: BlockId) -> usize {
        assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        assert!((block.0 as usize) < self.blocks, "block {} of {}", block.0, self.blocks);
        block.0 as usize * self.layers + layer
    }

    /// Where a page begins; within the mapping, for every page that [`KvMemory::page`] returns.
    fn address(&self, page: usize) -> *mut u8 {
        debug_assert!(page < self.layers * self.blocks);
        // `wrapping_add` needs no proof: the callers' dereferences do.
        let (block, layer) = (page / self.layers, page % self.layers);
        self.map.as_mut_ptr().wrapping_add(block * self.block_stride + layer * self.stride)
    }
}

/// Pages of a model whose pages are `own`, in other blocks.
pub(crate) fn format_in(blocks: BlockShape, own: &KvFormat) -> KvFormat {
    KvFormat { dtype: kv_dtype(blocks.dtype), block_size: blocks.block_size() as usize, ..*own }
}

/// The moves that fill a page, in order, from blocks of `own` tokens.
///
/// # Panics
///
/// If the source does not hold the tokens that it names.
pub(crate) fn moves_of(source: &PageSource, own: usize) -> Vec<(BlockId, KvMove)> {
    let (mut from, mut filled) = (source.skip as usize, 0);
    let mut moves = Vec::with_capacity(source.blocks.len());
    for block in &source.blocks {
        let tokens = (own - from).min(source.tokens as usize - filled);
        moves.push((*block, KvMove { from, to: filled, tokens }));
        (from, filled) = (0, filled + tokens);
    }
    assert_eq!(filled, source.tokens as usize, "{source:?} does not hold its tokens");
    moves
}

/// The kernels' name for an element type.
fn kv_dtype(dtype: CacheDtype) -> KvDtype {
    match dtype {
        CacheDtype::F32 => KvDtype::F32,
        CacheDtype::F16 => KvDtype::F16,
        CacheDtype::Bf16 => KvDtype::BF16,
        CacheDtype::Fp8 => KvDtype::Fp8,
        CacheDtype::Int8 => KvDtype::Int8,
    }
}

/// Distance between the pages of a block.
fn stride(format: &KvFormat) -> usize {
    format.page_bytes().next_multiple_of(PAGE_ALIGN)
}

/// A page being read.
pub struct PageRead<'a> {
    memory: &'a KvMemory,
    page: usize,
}

impl Deref for PageRead<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the page lies within the mapping (`page < blocks * layers`, and so many blocks were mapped,
        // each with room for its pages), is initialised (by the system, to zero), and the mapping outlives `self.memory`. Its read lock
        // is held until `self` is dropped, so that no `PageWrite` of this page exists meanwhile.
        unsafe { std::slice::from_raw_parts(self.memory.address(self.page), self.memory.page_bytes()) }
    }
}

impl Drop for PageRead<'_> {
    fn drop(&mut self) {
        self.memory.locks.release_read(self.page);
    }
}

/// A page being written.
pub struct PageWrite<'a> {
    memory: &'a KvMemory,
    page: usize,
    /// Whether an engine's device has yet to get what is written.
    arrives: bool,
}

impl Deref for PageWrite<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as for `PageRead`; the write lock held here excludes every other guard of this page.
        unsafe { std::slice::from_raw_parts(self.memory.address(self.page), self.memory.page_bytes()) }
    }
}

impl DerefMut for PageWrite<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: in bounds and initialised as for `PageRead`. The write lock excludes every other guard of this
        // page, and `&mut self` every other borrow through this one.
        unsafe { std::slice::from_raw_parts_mut(self.memory.address(self.page), self.memory.page_bytes()) }
    }
}

impl Drop for PageWrite<'_> {
    fn drop(&mut self) {
        if self.arrives
            && let Some(device) = self.memory.device.get()
        {
            // The page before its block: whoever finds the block's flag finds the page's.
            device.arrived[self.page].store(true, Ordering::Release);
            device.arrived_blocks[self.page / self.memory.layers].store(true, Ordering::Release);
        }
        self.memory.locks.release_write(self.page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> KvMemory {
        let format = KvFormat { dtype: KvDtype::F32, kv_heads: 1, head_dim: 4, block_size: 4 };
        KvMemory::new(format, 2, 3).expect("a small mapping")
    }

    #[test]
    fn pages_do_not_overlap() {
        let memory = memory();
        for layer in 0..2 {
            for block in 0..3 {
                memory.write(layer, BlockId(block)).fill((layer * 3) as u8 + block as u8 + 1);
            }
        }
        for layer in 0..2 {
            for block in 0..3 {
                let page = memory.read(layer, BlockId(block));
                assert_eq!(page.len(), 2 * 4 * 4 * 4);
                assert!(page.iter().all(|byte| *byte == (layer * 3) as u8 + block as u8 + 1));
            }
        }
    }

    #[test]
    fn readers_share() {
        let memory = memory();
        let (a, b) = (memory.read(0, BlockId(0)), memory.read(0, BlockId(0)));
        assert_eq!(*a, *b);
    }

    /// Eleven tokens in blocks of four, in blocks of three and of six of every type that they are converted into: as if
    /// they had been written there, with zeros after the last one.
    #[test]
    fn pages_in_other_blocks_are_as_if_written_there() {
        let memory = memory();
        let (format, tokens) = (*memory.format(), 11);
        let blocks = [2, 0, 1].map(BlockId);
        let key = |token: usize| [token as f32 + 0.1, 1.5, -2.0, 0.25 * token as f32];
        let value = |token: usize| key(token + 50);
        for token in 0..tokens {
            let mut page = memory.write(1, blocks[token / 4]);
            format.write(&mut page, token % 4, &key(token), &value(token));
        }
        let mut page = vec![0xff; 7];
        for (dtype, block_size) in CacheDtype::ALL.into_iter().flat_map(|dtype| [(dtype, 3), (dtype, 4), (dtype, 6)]) {
            let shape = BlockShape::new(block_size, dtype).expect("a block holds a token");
            let size = block_size as usize;
            let to = KvFormat { dtype: kv_dtype(dtype), block_size: size, ..format };
            for first in (0..tokens).step_by(size) {
                let end = (first + size).min(tokens);
                let source = PageSource {
                    blocks: blocks[first / 4..end.div_ceil(4)].to_vec(),
                    skip: (first % 4) as u32,
                    tokens: (end - first) as u32,
                };
                let mut want = vec![0; to.page_bytes()];
                (first..end).for_each(|token| to.write(&mut want, token - first, &key(token), &value(token)));
                memory.page_in(shape, 1, &source, &mut page);
                assert!(page == want, "{shape}, tokens {first}..{end}");
            }
        }
    }

    /// Pages of 128 bytes, whose digest comes after the copy, and of 2048, whose digest comes with it.
    #[test]
    fn a_page_leaves_and_lands_with_its_digest() {
        for head_dim in [4, 64] {
            let format = KvFormat { dtype: KvDtype::F32, kv_heads: 1, head_dim, block_size: 4 };
            let memory = KvMemory::new(format, 2, 3).expect("a small mapping");
            let bytes: Vec<u8> = (0..memory.page_bytes()).map(|i| (i * 7) as u8).collect();
            let digest = seeded_digest(9, &bytes);
            assert_eq!(memory.land(1, BlockId(2), 9, bytes.chunks(100)), digest);
            assert_eq!(*memory.read(1, BlockId(2)), bytes);

            let source = PageSource { blocks: vec![BlockId(2)], skip: 0, tokens: 4 };
            for (block_size, dtype) in [(4, CacheDtype::F32), (8, CacheDtype::F32), (4, CacheDtype::Bf16)] {
                let shape = BlockShape::new(block_size, dtype).expect("a block holds a token");
                let (mut plain, mut page) = (Vec::new(), vec![5; 3]);
                memory.page_in(shape, 1, &source, &mut plain);
                let got = memory.digested_page_in(shape, 1, &source, 9, &mut page);
                assert_eq!((&page, got), (&plain, seeded_digest(9, &plain)), "{shape}, heads of {head_dim}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "the pieces are a page")]
    fn a_page_that_is_too_short_does_not_land() {
        memory().land(0, BlockId(0), 0, [&[0; 100][..]]);
    }

    #[test]
    #[should_panic(expected = "does not hold its tokens")]
    fn a_source_that_is_too_short_panics() {
        let shape = BlockShape::new(8, CacheDtype::F32).expect("a block holds a token");
        memory().page_in(shape, 0, &PageSource { blocks: vec![BlockId(0)], skip: 1, tokens: 4 }, &mut vec![]);
    }

    #[test]
    #[should_panic(expected = "page of layer 1, block 2 is read while it is written")]
    fn reading_a_page_being_written_panics() {
        let memory = memory();
        let _write = memory.write(1, BlockId(2));
        memory.read(1, BlockId(2));
    }

    #[test]
    #[should_panic(expected = "page of layer 0, block 1 is written while it is in use")]
    fn writing_a_page_being_read_panics() {
        let memory = memory();
        let _read = memory.read(0, BlockId(1));
        memory.write(0, BlockId(1));
    }

    /// A device whose pages are full of their layer's number plus 100.
    struct Numbered;

    impl FetchPage for Numbered {
        fn fetch(&self, layer: usize, _: BlockId, page: &mut [u8]) {
            page.fill(100 + layer as u8);
        }

        fn fetch_converted(&self, _: usize, moves: &[(BlockId, KvMove)], _: &KvFormat, page: &mut [u8]) {
            page.fill(200 + moves.len() as u8);
        }
    }

    #[test]
    fn arrivals_are_told_once_and_copies_are_none() {
        let memory = memory();
        let arrived = |block| {
            let mut layers = Vec::new();
            memory.take_arrivals(BlockId(block), |layer| layers.push(layer));
            layers
        };
        memory.write(0, BlockId(1)).fill(1);
        assert!(arrived(1).is_empty(), "no device");
        memory.attach(Box::new(Numbered));
        memory.write(1, BlockId(1)).fill(1);
        memory.write(0, BlockId(2)).fill(1);
        memory.write(1, BlockId(2)).fill(1);
        memory.write_copy(0, BlockId(0)).fill(1);
        assert_eq!((arrived(0), arrived(1), arrived(2)), (vec![], vec![1], vec![0, 1]));
        assert_eq!((arrived(1), arrived(2)), (vec![], vec![]));
        memory.write(0, BlockId(1)).fill(2);
        assert_eq!(arrived(1), [0]);
    }

    #[test]
    fn a_page_that_the_device_has_newer_is_fetched_by_its_reader() {
        let memory = memory();
        memory.attach(Box::new(Numbered));
        let block = BlockId(1);
        memory.write_copy(1, block).fill(7);
        assert_eq!(memory.read(1, block)[0], 7);
        memory.mark_stale(1, block);
        assert_eq!((memory.read(1, block)[0], memory.read(0, block)[0]), (101, 0));
        memory.take_arrivals(block, |layer| panic!("layer {layer} did not arrive: it was fetched"));
        // In other blocks, pages that the device alone has are its to convert; not if one of them is here.
        let (shape, mut page) = (BlockShape::new(6, CacheDtype::F16).expect("a block holds a token"), Vec::new());
        let source = PageSource { blocks: vec![block, BlockId(2)], skip: 0, tokens: 6 };
        memory.mark_stale(1, block);
        memory.page_in(shape, 1, &source, &mut page);
        assert!(page.contains(&0), "slots of block 2 are here, and zero");
        memory.mark_stale(1, block);
        memory.mark_stale(1, BlockId(2));
        memory.page_in(shape, 1, &source, &mut page);
        assert!(page.iter().all(|byte| *byte == 202));
        memory.mark_stale(0, block);
        memory.write(0, block).fill(9);
        assert_eq!(memory.read(0, block)[0], 9, "what arrived since is newer");
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let format = || KvFormat { dtype: KvDtype::F32, kv_heads: 1, head_dim: 4, block_size: 4 };
        assert!(matches!(KvMemory::new(format(), 0, 1), Err(KvError::Empty { .. })));
        assert!(matches!(KvMemory::new(format(), 1 << 30, 1 << 40), Err(KvError::TooLarge { .. })));
    }
}
