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
use ridge_kernels::KvFormat;
use ridge_kernels::sync::page_lock::PageLocks;
use ridge_protocol::BlockId;
use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

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
    /// Kept only for an engine that has another copy of the pages.
    arrivals: OnceLock<Arrivals>,
}

/// What was written here and not yet copied to the device that computes.
struct Arrivals {
    /// Blocks with at least one such page: a pass asks for every block that it reads.
    blocks: Vec<AtomicBool>,
    /// In the order of the pages.
    pages: Vec<AtomicBool>,
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
            arrivals: OnceLock::new(),
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
        assert!(self.locks.try_read(page), "page of layer {layer}, block {} is read while it is written", block.0);
        PageRead { memory: self, page }
    }

    /// The bytes of a page, for its only user.
    ///
    /// # Panics
    ///
    /// If the page is being read or written, or does not exist.
    pub fn write(&self, layer: usize, block: BlockId) -> PageWrite<'_> {
        let page = self.page(layer, block);
        assert!(self.locks.try_write(page), "page of layer {layer}, block {} is written while it is in use", block.0);
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

    /// From now on remembers which pages are written, for an engine whose device has a copy of its own.
    pub fn track_arrivals(&self) {
        let flags = |count: usize| (0..count).map(|_| AtomicBool::new(false)).collect();
        self.arrivals.get_or_init(|| Arrivals { blocks: flags(self.blocks), pages: flags(self.blocks * self.layers) });
    }

    /// Calls `copy` for the layers in which this block was written since it was last asked for, other than through
    /// [`KvMemory::write_copy`].
    pub fn take_arrivals(&self, block: BlockId, mut copy: impl FnMut(usize)) {
        let Some(arrivals) = self.arrivals.get() else { return };
        // Acquire: what was written under the guard that set the flag is seen by whoever finds it set.
        let flag = &arrivals.blocks[block.0 as usize];
        if !flag.load(Ordering::Relaxed) || !flag.swap(false, Ordering::Acquire) {
            return;
        }
        for layer in 0..self.layers {
            if arrivals.pages[self.page(layer, block)].swap(false, Ordering::Acquire) {
                copy(layer);
            }
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
            && let Some(arrivals) = self.memory.arrivals.get()
        {
            // The page before its block: whoever finds the block's flag finds the page's.
            arrivals.pages[self.page].store(true, Ordering::Release);
            arrivals.blocks[self.page / self.memory.layers].store(true, Ordering::Release);
        }
        self.memory.locks.release_write(self.page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_kernels::KvDtype;

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

    #[test]
    fn arrivals_are_told_once_and_copies_are_none() {
        let memory = memory();
        let arrived = |block| {
            let mut layers = Vec::new();
            memory.take_arrivals(BlockId(block), |layer| layers.push(layer));
            layers
        };
        memory.write(0, BlockId(1)).fill(1);
        assert!(arrived(1).is_empty(), "nobody asked for them to be remembered");
        memory.track_arrivals();
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
    fn impossible_sizes_are_errors() {
        let format = || KvFormat { dtype: KvDtype::F32, kv_heads: 1, head_dim: 4, block_size: 4 };
        assert!(matches!(KvMemory::new(format(), 0, 1), Err(KvError::Empty { .. })));
        assert!(matches!(KvMemory::new(format(), 1 << 30, 1 << 40), Err(KvError::TooLarge { .. })));
    }
}
