//! Attention: cuts the items into runs (one key/value head, a few rows) and shares them out.

use super::generic::attention::{RUN_ROWS, Run, Scratch};
use super::{Cpu, Shared};
use crate::kv::{AttentionItem, KvFormat};
use std::cell::RefCell;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Cpu {
    /// Causal attention of every query of every item: `q` and `out` are `[rows, heads, head_dim]`, and query head `h` reads
    /// key/value head `h / (heads / kv_heads)`. Scores are multiplied by `scale`; with `window`, the query at position `p`
    /// sees only the last `window` keys up to `p`. Rows of `out` that no item names are left alone.
    ///
    /// A query's result depends on its own vector, its position and the keys and values it attends, bit for bit: not on how
    /// queries are cut into items, nor on the page size. Items must not share rows (asserted). Bytes of pages past an
    /// item's last query are never used.
    #[allow(clippy::too_many_arguments, reason = "an operation of the model has these operands")]
    pub fn attention(
        &self,
        fmt: &KvFormat,
        items: &[AttentionItem<'_>],
        heads: usize,
        scale: f32,
        window: Option<usize>,
        q: &[f32],
        out: &mut [f32],
    ) {
        assert!(fmt.kv_heads > 0 && fmt.head_dim > 0 && fmt.block_size > 0);
        assert!(heads > 0 && heads.is_multiple_of(fmt.kv_heads), "{heads} heads, {} of keys", fmt.kv_heads);
        assert_eq!(q.len(), out.len());
        assert!(q.len().is_multiple_of(heads * fmt.head_dim));
        check_items(fmt, items, q.len() / (heads * fmt.head_dim));

        // The longest runs first would balance better; in order is good enough with several runs per thread.
        let runs: Vec<(usize, usize)> = items
            .iter()
            .enumerate()
            .flat_map(|(i, item)| (0..item.rows).step_by(RUN_ROWS).map(move |row| (i, row)))
            .collect();
        let out = Shared(out.as_mut_ptr());
        self.pool.run(runs.len() * fmt.kv_heads, &|task| {
            let (item, row) = runs[task / fmt.kv_heads];
            let item = &items[item];
            let run = Run {
                fmt,
                pages: item.pages,
                kv_head: task % fmt.kv_heads,
                heads,
                row: item.first_row + row,
                rows: RUN_ROWS.min(item.rows - row),
                start: item.start + row,
                scale,
                window,
                q,
                out: out.base(),
            };
            // SAFETY: items do not share rows and runs of an item share neither rows nor heads, so these outputs are this
            // task's alone; the table proves the features.
            SCRATCH.with_borrow_mut(|scratch| unsafe { (self.kernels.attention)(&run, scratch) });
        });
    }
}

/// Every item fits the pages and rows, and no two items share a row: outputs are written without a lock.
fn check_items(fmt: &KvFormat, items: &[AttentionItem<'_>], rows: usize) {
    let mut taken = vec![false; rows];
    for item in items {
        let keys = item.start + item.rows;
        assert!(item.rows == 0 || keys <= item.pages.len() * fmt.block_size, "{keys} keys, {} pages", item.pages.len());
        assert!(item.pages.iter().all(|page| page.len() == fmt.page_bytes()));
        for row in &mut taken[item.first_row..item.first_row + item.rows] {
            assert!(!*row, "two items share a row");
            *row = true;
        }
    }
}
