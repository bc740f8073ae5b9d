//! How a batch's attention is cut into blocks of threads, and which kernel each part takes.
//!
//! Single queries (decoding) go split by split of their cache, chunks of prompts tile by tile of their queries. Both lists are
//! made once per step and window, for all layers; a list may be padded with [`NOTHING`] to a length that a recorded graph of
//! launches has.

use super::Choice;
use crate::cuda::{Element, TensorMap};
use crate::{KvDtype, KvFormat};

/// Keys per split, at absolute positions: the CPU's cut.
pub const SPLIT: usize = 512;
/// Threads of a block that computes a split.
pub const DECODE_THREADS: usize = 128;
/// Query heads that may share a block's reads of the cache.
pub const GROUPS: [usize; 4] = [1, 2, 4, 8];
/// The entry of a list of work that asks for nothing.
pub const NOTHING: [u32; 2] = [u32::MAX, 0];
/// Words of an item on the device.
pub const ITEM_WORDS: usize = 8;

/// Consecutive queries of one sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// Row of the first query.
    pub first_row: usize,
    /// Queries.
    pub rows: usize,
    /// Absolute position of the first one.
    pub start: usize,
    /// Where the sequence's block table begins among all of them, in entries.
    pub table: usize,
}

impl Span {
    /// The words that the kernels read (`Item` in `attention.cuh`).
    fn words(&self, window: Option<usize>, parts: usize) -> [u32; ITEM_WORDS] {
        // A window of 0 is one of 1: a position sees itself.
        let window = window.map_or(0, |window| window.max(1));
        let word = |n: usize| u32::try_from(n).expect("rows, positions and tables are counted in 32 bits");
        [word(self.first_row), word(self.rows), word(self.start), word(self.table), word(window), word(parts), 0, 0]
    }

    /// The splits that the query at the first position sees.
    fn splits(&self, window: Option<usize>) -> std::ops::Range<usize> {
        let first = window.map_or(0, |window| (self.start + 1).saturating_sub(window.max(1)));
        first / SPLIT..self.start / SPLIT + 1
    }
}

/// The single queries of a batch.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Decode {
    /// [`ITEM_WORDS`] words per item.
    pub items: Vec<u32>,
    /// Two words per block of threads and key/value head: an item and a split.
    pub work: Vec<u32>,
    /// Splits in all, each with a partial result of its own.
    pub parts: usize,
}

impl Decode {
    /// Cuts the caches of `spans`, each of one row, into splits.
    pub fn new(spans: &[Span], window: Option<usize>) -> Self {
        let mut plan = Self::default();
        for (item, span) in spans.iter().enumerate() {
            assert_eq!(span.rows, 1, "{span:?} is no single query");
            plan.items.extend(span.words(window, plan.parts));
            let splits = span.splits(window);
            plan.parts += splits.len();
            plan.work.extend(splits.flat_map(|split| [item as u32, split as u32]));
        }
        plan
    }

    /// Whether every item has one split, so that nothing is left to combine.
    pub fn is_direct(&self) -> bool {
        self.parts * ITEM_WORDS == self.items.len()
    }

    /// Bytes of the partial results of `heads` query heads.
    pub fn workspace_bytes(&self, heads: usize, head_dim: usize) -> usize {
        if self.is_direct() { 0 } else { self.parts * heads * (head_dim + 2) * 4 }
    }
}

/// Chunks of prompts.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Prefill {
    /// [`ITEM_WORDS`] words per item.
    pub items: Vec<u32>,
    /// Two words per block of threads and query head: an item, and the first row of a tile within it.
    pub work: Vec<u32>,
}

impl Prefill {
    /// Cuts the queries of `spans` into tiles of `tile` rows, the longest work first.
    pub fn new(spans: &[Span], window: Option<usize>, tile: usize) -> Self {
        let items = spans.iter().flat_map(|span| span.words(window, 0)).collect();
        let mut tiles: Vec<(usize, [u32; 2])> = Vec::new();
        for (item, span) in spans.iter().enumerate() {
            for row in (0..span.rows).step_by(tile) {
                let last = span.start + span.rows.min(row + tile) - 1;
                let first = window.map_or(0, |window| (span.start + row + 1).saturating_sub(window.max(1)));
                tiles.push((last - first, [item as u32, row as u32]));
            }
        }
        // Stable: equal tiles stay in the order of the batch.
        tiles.sort_by_key(|(keys, _)| std::cmp::Reverse(*keys));
        Self { items, work: tiles.into_iter().flat_map(|(_, work)| work).collect() }
    }
}

/// How many query heads of a key/value head share a block of [`Decode`], and its shared memory in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DecodeShape {
    /// One of [`GROUPS`].
    pub group: usize,
    /// Blocks per key/value head.
    pub chunks: usize,
    /// Shared memory in bytes.
    pub shared_bytes: usize,
}

/// Chooses among [`GROUPS`] for `group` query heads per key/value head.
pub fn decode_shape(format: &KvFormat, group: usize, shared_per_block: usize) -> Choice<DecodeShape> {
    let dim = format.head_dim;
    assert!(dim.is_multiple_of(8) && (8..=256).contains(&dim), "heads of {dim} elements");
    let shape = |size: usize| {
        let streams = DECODE_THREADS / (dim / 8);
        let warps = DECODE_THREADS / 32;
        let floats = SPLIT + size * (dim + 2 * warps + SPLIT.max(streams * dim));
        DecodeShape { group: size, chunks: group.div_ceil(size), shared_bytes: 8 * SPLIT + 4 * floats }
    };
    let fewest = group.div_ceil(GROUPS[GROUPS.len() - 1]);
    Choice::first(GROUPS.map(shape), |shape| {
        if shape.shared_bytes > shared_per_block {
            return Some(format!("{} bytes of shared memory, {shared_per_block} at most", shape.shared_bytes));
        }
        (shape.chunks > fewest).then(|| format!("the cache would be read {} times, {fewest} will do", shape.chunks))
    })
}

/// A kernel for chunks of prompts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PrefillKernel {
    /// Tensor cores (mma.sync): tiles of 64 queries by 64 keys, `stages` tiles of keys and values in flight. Caches of 8 bits are
    /// widened to bf16 tile by tile, in one stage.
    Mma {
        /// One or two.
        stages: usize,
    },
    /// Hopper's copy engine and two warpgroups: tiles of 128 queries by 64 keys, four tiles of keys and values in flight, for pages of
    /// whole 16 tokens. No device has run it: only on demand.
    Wgmma,
    /// Multiply-adds in f32, for every cache and head size: tiles of 16 queries by 32 keys.
    Simt,
}

impl PrefillKernel {
    /// Queries per tile.
    pub const fn tile(self) -> usize {
        match self {
            PrefillKernel::Wgmma => 128,
            PrefillKernel::Mma { .. } => 64,
            PrefillKernel::Simt => 16,
        }
    }

    /// Shared memory in bytes.
    pub const fn shared_bytes(self, format: &KvFormat) -> usize {
        let head_dim = format.head_dim;
        match self {
            // Keys [head_dim][64] and values [64][head_dim], 16 bits each, in four stages, with two barriers each.
            PrefillKernel::Wgmma => 4 * (2 * (2 * 64 * head_dim) + 2 * 8),
            // Keys [head_dim][64 + 8] and values [64][head_dim + 8], 16 bits each.
            // Behind them two scales per key, where there are any.
            PrefillKernel::Mma { stages } => {
                let scales = if matches!(format.dtype, KvDtype::Int8) { 2 * 64 * 4 } else { 0 };
                stages * 2 * (head_dim * 72 + 64 * (head_dim + 8)) + scales
            }
            // Queries [16][head_dim + 1], keys and values [32][head_dim + 1], weights [16][33], two scales per key; f32.
            PrefillKernel::Simt => 4 * ((16 + 2 * 32) * (head_dim + 1) + 16 * 33 + 2 * 32),
        }
    }
}

/// Head sizes that the tensor-core kernel is compiled for.
pub const MMA_HEADS: [usize; 5] = [64, 80, 96, 128, 256];

/// Head sizes that the Hopper kernel is compiled for.
pub const WGMMA_HEADS: [usize; 2] = [64, 128];

/// Tokens of a page that Hopper's copy engine fetches at a time.
const PIECE: usize = 16;

/// Where the keys and the values of a layer lie, as Hopper's copy engine is told of them: that of block `b` begins at `base + b *
/// block_stride`, and boxes are those of the kernel.
pub fn page_maps(format: &KvFormat, base: u64, block_stride: u64) -> [TensorMap; 2] {
    let element = match format.dtype {
        KvDtype::F16 => Element::F16,
        KvDtype::BF16 => Element::Bf16,
        other => panic!("no tensor map of a cache of {}", other.name()),
    };
    let (heads, dim, tokens) = (format.kv_heads as u64, format.head_dim as u64, format.block_size as u64);
    let map = |address, cols, rows, box_cols, box_rows| TensorMap {
        address,
        element,
        cols,
        rows,
        row_bytes: 2 * cols,
        // Block numbers are the caller's promise: nobody asks for one beyond the last.
        planes: 1 << 31,
        plane_bytes: block_stride,
        box_cols,
        box_rows,
    };
    let keys = map(base, tokens, heads * dim, PIECE as u32, dim as u32);
    [keys, map(base + 2 * heads * dim * tokens, dim, heads * tokens, 64, PIECE as u32)]
}

/// Chooses the kernel for chunks of prompts.
pub fn prefill_kernel(format: &KvFormat, shared_per_block: usize) -> Choice<PrefillKernel> {
    let candidates = [PrefillKernel::Mma { stages: 2 }, PrefillKernel::Mma { stages: 1 }, PrefillKernel::Simt];
    Choice::first(candidates, |kernel| objection(*kernel, format, shared_per_block))
}

/// As [`prefill_kernel`], among kernels that no device has run yet too. `sm` is the device's compute capability times ten.
pub fn experimental_prefill_kernel(format: &KvFormat, shared_per_block: usize, sm: u32) -> Choice<PrefillKernel> {
    let candidates =
        [PrefillKernel::Wgmma, PrefillKernel::Mma { stages: 2 }, PrefillKernel::Mma { stages: 1 }, PrefillKernel::Simt];
    Choice::first(candidates, |kernel| match kernel {
        PrefillKernel::Wgmma if sm != 90 => Some(format!("wgmma is Hopper's (sm_90), this is sm_{sm}")),
        _ => objection(*kernel, format, shared_per_block),
    })
}

/// Why a kernel cannot be used.
fn objection(kernel: PrefillKernel, format: &KvFormat, shared_per_block: usize) -> Option<String> {
    let dim = format.head_dim;
    assert!(dim.is_multiple_of(8) && (8..=256).contains(&dim), "heads of {dim} elements");
    let bytes = kernel.shared_bytes(format);
    if bytes > shared_per_block {
        return Some(format!("{bytes} bytes of shared memory, {shared_per_block} at most"));
    }
    let heads: &[usize] = match kernel {
        PrefillKernel::Mma { .. } => &MMA_HEADS,
        PrefillKernel::Wgmma => &WGMMA_HEADS,
        PrefillKernel::Simt => return None,
    };
    let name = format.dtype.name();
    match (format.dtype, kernel) {
        (KvDtype::F32, _) => Some("tensor cores would round keys and values of f32".into()),
        (_, PrefillKernel::Wgmma) if !format.block_size.is_multiple_of(PIECE) => {
            Some(format!("pages are fetched {PIECE} tokens at a time, they have {}", format.block_size))
        }
        (KvDtype::Fp8 | KvDtype::Int8, PrefillKernel::Wgmma) => {
            Some(format!("it takes 16-bit floats, the cache is {name}"))
        }
        (KvDtype::Fp8 | KvDtype::Int8, PrefillKernel::Mma { stages: 2 }) => {
            Some(format!("a cache of {name} is widened tile by tile, which waits for what it reads"))
        }
        _ if !heads.contains(&dim) => Some(format!("no tensor-core kernel for heads of {dim} elements")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: KvFormat = KvFormat { dtype: KvDtype::BF16, kv_heads: 2, head_dim: 128, block_size: 16 };

    #[test]
    fn caches_are_cut_at_absolute_positions() {
        let span = |row, start| Span { first_row: row, rows: 1, start, table: 10 * row };
        let plan = Decode::new(&[span(0, 511), span(1, 512), span(2, 5000)], None);
        assert_eq!(plan.work[..6], [0, 0, 1, 0, 1, 1]);
        assert_eq!((plan.parts, plan.is_direct()), (1 + 2 + 10, false));
        assert_eq!(plan.items[16..24], [2, 1, 5000, 20, 0, 3, 0, 0]);
        assert_eq!(plan.workspace_bytes(4, 64), 13 * 4 * 66 * 4);
        // With a window of 100 the last of them sees positions 4901..=5000.
        let plan = Decode::new(&[span(0, 511), span(1, 512), span(2, 5000)], Some(100));
        assert_eq!(plan.work, [0, 0, 1, 0, 1, 1, 2, 9]);
        let plan = Decode::new(&[span(0, 3)], Some(0));
        assert!(plan.is_direct() && plan.items[4] == 1 && plan.workspace_bytes(4, 64) == 0);
    }

    #[test]
    fn long_tiles_come_first() {
        let spans = [
            Span { first_row: 0, rows: 70, start: 0, table: 0 },
            Span { first_row: 70, rows: 3, start: 1000, table: 5 },
        ];
        let plan = Prefill::new(&spans, None, 64);
        assert_eq!(plan.work, [1, 0, 0, 64, 0, 0]);
        assert_eq!(plan.items.len(), 2 * ITEM_WORDS);
        assert_eq!(Prefill::new(&spans, Some(8), 64).work, [0, 0, 0, 64, 1, 0]);
    }

    #[test]
    fn groups_share_reads_of_the_cache() {
        let pick = |group| {
            let choice = decode_shape(&FORMAT, group, 48 << 10);
            (choice.chosen.group, choice.chosen.chunks, choice.rejected.len())
        };
        assert_eq!(
            [1, 2, 3, 4, 7, 8, 9, 16].map(pick),
            [(1, 1, 0), (2, 1, 1), (4, 1, 2), (4, 1, 2), (8, 1, 3), (8, 1, 3), (8, 2, 3), (8, 2, 3)]
        );
        for head_dim in (8..=256).step_by(8) {
            let choice = decode_shape(&KvFormat { head_dim, ..FORMAT }, 8, 48 << 10);
            assert_eq!(choice.chosen.chunks, 1, "no head size needs more shared memory than every device has");
        }
        let choice = decode_shape(&FORMAT, 4, 48 << 10);
        assert_eq!(choice.rejected[0].1, "the cache would be read 4 times, 1 will do");
    }

    #[test]
    fn tensor_cores_are_used_where_they_can_be() {
        let of = |dtype, head_dim, shared| prefill_kernel(&KvFormat { dtype, head_dim, ..FORMAT }, shared);
        assert_eq!(of(KvDtype::BF16, 128, 163 << 10).chosen, PrefillKernel::Mma { stages: 2 });
        let small = of(KvDtype::F16, 256, 99 << 10);
        assert_eq!(small.chosen, PrefillKernel::Mma { stages: 1 });
        assert_eq!(small.rejected[0].1, "141312 bytes of shared memory, 101376 at most");
        let fp8 = of(KvDtype::Fp8, 128, 163 << 10);
        assert_eq!(fp8.chosen, PrefillKernel::Mma { stages: 1 });
        assert_eq!(fp8.rejected[0].1, "a cache of fp8 is widened tile by tile, which waits for what it reads");
        let f32 = of(KvDtype::F32, 128, 163 << 10);
        assert_eq!((f32.chosen, f32.rejected.len()), (PrefillKernel::Simt, 2));
        assert_eq!(f32.rejected[0].1, "tensor cores would round keys and values of f32");
        let int8 = KvFormat { dtype: KvDtype::Int8, ..FORMAT };
        assert_eq!(PrefillKernel::Mma { stages: 1 }.shared_bytes(&int8), 2 * (128 * 72 + 64 * 136) + 512);
        assert_eq!(of(KvDtype::BF16, 72, 163 << 10).rejected[0].1, "no tensor-core kernel for heads of 72 elements");
        for head_dim in (8..=256).step_by(8) {
            of(KvDtype::F32, head_dim, 99 << 10);
        }
        let new = |head_dim, sm| experimental_prefill_kernel(&KvFormat { head_dim, ..FORMAT }, 227 << 10, sm);
        assert_eq!(new(128, 90).chosen, PrefillKernel::Wgmma);
        assert_eq!(new(80, 90).rejected[0].1, "no tensor-core kernel for heads of 80 elements");
        let odd = experimental_prefill_kernel(&KvFormat { block_size: 24, ..FORMAT }, 227 << 10, 90);
        assert_eq!(odd.rejected[0].1, "pages are fetched 16 tokens at a time, they have 24");
        assert_eq!(PrefillKernel::Wgmma.shared_bytes(&FORMAT), 131_136);
        let [keys, values] = page_maps(&FORMAT, 4096, 20_000);
        assert_eq!((keys.cols, keys.rows, keys.row_bytes, keys.box_cols, keys.box_rows), (16, 256, 32, 16, 128));
        assert_eq!((values.address, values.cols, values.rows, values.row_bytes), (4096 + 8192, 128, 32, 256));
        assert_eq!(new(128, 100).chosen, PrefillKernel::Mma { stages: 2 });
        assert_eq!(new(128, 100).rejected[0].1, "wgmma is Hopper's (sm_90), this is sm_100");
    }
}
