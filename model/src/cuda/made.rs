//! Pages in other blocks than the pool's: what a pass makes for those whom its prompts are sent to.
//!
//! The same in every layer, so it is worked out once for a pass. Knows no device.

use super::scratch::Numbers;
use crate::engine::cache_dtype;
use crate::kv::{format_in, moves_of};
use ridge_kernels::KvFormat;
use ridge_kernels::cuda::ops::pages::Move;
use ridge_protocol::limits::MAX_PAGE_BYTES;
use ridge_protocol::transfer::PageSource;
use ridge_protocol::{BatchPlan, PlanItem, RequestId};

/// Pages of one shape, one behind the other.
#[derive(Debug)]
pub struct Made {
    /// Their layout.
    pub format: KvFormat,
    /// Whose each is, and the index of its block within the sequence.
    pub pages: Vec<(RequestId, u32)>,
    /// What they are made of: from the pool's blocks into these pages, as many as there are.
    pub moves: Vec<Move>,
    /// Whether a page has slots that no move fills.
    pub partial: bool,
    /// Where the words of the moves lie among the pass's numbers.
    pub list: u64,
}

impl Made {
    /// The pages that are complete with this pass, in the order of their shapes' first readers. `own` is a page of the pool.
    pub fn by(plan: &BatchPlan, own: &KvFormat) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for item in &plan.items {
            let Some(format) = wanted(item, own) else { continue };
            let at = all.iter().position(|made| made.format == format).unwrap_or_else(|| {
                all.push(Self { format, pages: Vec::new(), moves: Vec::new(), partial: false, list: 0 });
                all.len() - 1
            });
            all[at].add(item, own.block_size as u32);
        }
        all.retain(|made| !made.pages.is_empty());
        all
    }

    /// The pages that an item completes.
    fn add(&mut self, item: &PlanItem, own: u32) {
        let Some(reader) = item.reader else { return };
        let size = self.format.block_size as u32;
        for index in reader.completed(item.start, item.start + item.tokens.len() as u32) {
            let source = PageSource::of(index, size, reader.tokens, &item.block_table, own);
            let to = self.pages.len() as u32;
            let moves = moves_of(&source, own as usize);
            self.moves.extend(moves.into_iter().map(|(block, slots)| Move { from: block.0, to, slots }));
            self.pages.push((item.request, index));
            self.partial |= source.tokens < size;
        }
    }

    /// Writes the moves down where the device reads them.
    pub fn place(&mut self, numbers: &mut Numbers) {
        self.list = numbers.push(&Move::words(&self.moves));
    }

    /// Distance between pages, in bytes: a multiple of 16, as kernels want it.
    pub fn stride(&self) -> usize {
        self.format.page_bytes().next_multiple_of(16)
    }

    /// Bytes from the first page to the end of the last one.
    pub fn staged_bytes(&self) -> usize {
        self.pages.len() * self.stride()
    }

    /// Bytes of the pages themselves.
    pub fn page_bytes(&self) -> usize {
        self.pages.len() * self.format.page_bytes()
    }
}

/// In which pages the item's reader wants its KV, if they are not the pool's and can be made (rule K-12). What cannot be made is not sent
/// either: the sender refuses it.
fn wanted(item: &PlanItem, own: &KvFormat) -> Option<KvFormat> {
    let blocks = item.reader?.blocks;
    let bytes = blocks.page_bytes(own.kv_heads as u32, own.head_dim as u32);
    if !cache_dtype(own.dtype).converts_into(blocks.dtype) || bytes > MAX_PAGE_BYTES {
        return None;
    }
    Some(format_in(blocks, own)).filter(|format| format != own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_kernels::{KvDtype, KvMove};
    use ridge_protocol::{BlockId, BlockShape, CacheDtype, Reader};

    const OWN: KvFormat = KvFormat { dtype: KvDtype::BF16, kv_heads: 1, head_dim: 8, block_size: 4 };

    fn item(
        request: u64,
        tokens: std::ops::Range<u32>,
        table: &[u32],
        reader: Option<(u32, CacheDtype, u32)>,
    ) -> PlanItem {
        let reader = reader.map(|(size, dtype, tokens)| Reader {
            blocks: BlockShape::new(size, dtype).expect("a block holds a token"),
            tokens,
        });
        let block_table = table.iter().map(|block| BlockId(*block)).collect();
        let (start, tokens) = (tokens.start, tokens.map(|_| 0).collect());
        PlanItem { request: RequestId(request), tokens, start, block_table, sample: None, reader }
    }

    fn made(items: Vec<PlanItem>) -> Vec<Made> {
        Made::by(&BatchPlan { step: 0, items }, &OWN)
    }

    #[test]
    fn pages_straddle_blocks_and_chunks_and_shapes_are_kept_apart() {
        let int8 = |tokens| Some((6, CacheDtype::Int8, tokens));
        // Ten of fourteen tokens, of which eight were there; all of seven; and one whose reader has larger blocks.
        let all = made(vec![
            item(1, 8..12, &[9, 8, 7], int8(14)),
            item(2, 0..7, &[5, 6], int8(7)),
            item(3, 0..8, &[1, 2], Some((2, CacheDtype::Bf16, 8))),
            item(4, 0..4, &[3], Some((8, CacheDtype::F16, 20))),
        ]);
        assert_eq!(all.len(), 2, "nothing of the fourth is complete");
        let go = |from, slot, to, into, tokens| Move { from, to, slots: KvMove { from: slot, to: into, tokens } };
        let request = |request, index| (RequestId(request), index);
        assert_eq!(all[0].format, KvFormat { dtype: KvDtype::Int8, block_size: 6, ..OWN });
        assert_eq!(all[0].pages, [request(1, 1), request(2, 0), request(2, 1)]);
        let want = [go(8, 2, 0, 0, 2), go(7, 0, 0, 2, 4), go(5, 0, 1, 0, 4), go(6, 0, 1, 4, 2), go(6, 2, 2, 0, 1)];
        assert_eq!(all[0].moves, want);
        assert!(all[0].partial && !all[1].partial);
        assert_eq!(all[1].pages, [0, 1, 2, 3].map(|index| request(3, index)));
        assert_eq!(all[1].moves, [go(1, 0, 0, 0, 2), go(1, 2, 1, 0, 2), go(2, 0, 2, 0, 2), go(2, 2, 3, 0, 2)]);
        // Keys and values of 8 elements and their scales: 144 bytes a page.
        assert_eq!((all[0].page_bytes(), all[0].staged_bytes()), (3 * 144, 3 * 144));
    }

    #[test]
    fn nothing_is_made_for_those_who_take_pages_as_they_are_or_not_at_all() {
        let alike = item(1, 0..8, &[1, 2], Some((4, CacheDtype::Bf16, 8)));
        let nobody = item(2, 0..8, &[1, 2], None);
        let absurd = item(3, 0..8, &[1, 2], Some((u32::MAX, CacheDtype::Bf16, 8)));
        assert!(made(vec![alike, nobody, absurd]).is_empty());
        let narrow = KvFormat { dtype: KvDtype::Fp8, ..OWN };
        let plan = BatchPlan { step: 0, items: vec![item(1, 0..8, &[1, 2], Some((4, CacheDtype::Bf16, 8)))] };
        assert!(Made::by(&plan, &narrow).is_empty(), "fp8 becomes no other type");
    }
}
