//! A batch plan as the device runs it: rows in order, items as arrays of numbers, block tables behind one another.
//!
//! Rows of items with one token (decode steps) come first, rows of longer ones (chunks of prompts) after them, because the two go
//! through different kernels. Knows no device.

use ridge_kernels::cuda::ops::pages::Write;
use ridge_kernels::cuda::plan::attention::Span;
use ridge_protocol::{BatchPlan, BlockId, TokenId};

/// The rows of a pass.
#[derive(Debug, Default)]
pub struct Batch {
    /// Token of each row.
    pub tokens: Vec<TokenId>,
    /// Position of each row.
    pub positions: Vec<u32>,
    /// Items of one row, in the order of their rows, which are the first ones.
    pub steps: Vec<Span>,
    /// Longer items, in the order of their rows, which follow.
    pub chunks: Vec<Span>,
    /// Block tables of all items, as far as their tokens reach.
    pub tables: Vec<u32>,
    /// What is left when only sampled rows go on: runs of one row, numbered in the order of the plan's items. Their tables
    /// are those of the whole batch.
    pub sampled: Vec<Span>,
    /// The row of the whole batch that each of them is.
    pub sampled_rows: Vec<u32>,
    /// Blocks that steps write to, one each.
    pub written_by_steps: Vec<BlockId>,
    /// Blocks that chunks write to.
    pub written_by_chunks: Vec<BlockId>,
}

impl Batch {
    /// Describes a plan that has been checked.
    pub fn new(plan: &BatchPlan, block_size: usize) -> Self {
        let mut batch = Self::default();
        let mut runs = vec![None; plan.items.len()];
        for steps in [true, false] {
            for (item, run) in plan.items.iter().zip(&mut runs) {
                let (start, rows) = (item.start as usize, item.tokens.len());
                if (rows == 1) != steps {
                    continue;
                }
                let blocks = (start + rows).div_ceil(block_size);
                let this = Span { first_row: batch.tokens.len(), rows, start, table: batch.tables.len() };
                batch.tokens.extend(&item.tokens);
                batch.positions.extend(item.start..item.start + rows as u32);
                batch.tables.extend(item.block_table[..blocks].iter().map(|block| block.0));
                let (runs, written) = match steps {
                    true => (&mut batch.steps, &mut batch.written_by_steps),
                    false => (&mut batch.chunks, &mut batch.written_by_chunks),
                };
                runs.push(this);
                written.extend(&item.block_table[start / block_size..blocks]);
                *run = Some(this);
            }
        }
        for (item, run) in plan.items.iter().zip(runs) {
            let run = run.expect("an item has one row or more");
            if item.sample.is_some() {
                let last = run.rows - 1;
                batch.sampled_rows.push((run.first_row + last) as u32);
                let first_row = batch.sampled.len();
                batch.sampled.push(Span { first_row, rows: 1, start: run.start + last, table: run.table });
            }
        }
        batch
    }

    /// Blocks that the pass reads or writes; one may occur more than once.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> {
        self.tables.iter().copied().map(BlockId)
    }

    /// Which rows go to which slots of which blocks.
    pub fn writes(&self, block_size: usize) -> Vec<Write> {
        let mut writes = Vec::new();
        for run in self.steps.iter().chain(&self.chunks) {
            let end = run.start + run.rows;
            for index in run.start / block_size..end.div_ceil(block_size) {
                let first = run.start.max(index * block_size);
                writes.push(Write {
                    block: self.tables[run.table + index],
                    slot: (first % block_size) as u32,
                    row: (run.first_row + first - run.start) as u32,
                    rows: (end.min((index + 1) * block_size) - first) as u32,
                });
            }
        }
        writes
    }

    /// All rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_protocol::{PlanItem, RequestId, SampleSpec, SamplingParams};
    use std::sync::Arc;

    fn item(request: u64, tokens: &[u32], start: u32, table: &[u32], sampled: bool) -> PlanItem {
        let params = Arc::new(SamplingParams::greedy(1));
        let sample = SampleSpec { params, history: Vec::new(), prompt_len: 0, position: 0 };
        PlanItem {
            request: RequestId(request),
            tokens: tokens.to_vec(),
            start,
            block_table: table.iter().map(|block| BlockId(*block)).collect(),
            sample: sampled.then_some(sample),
            reader: None,
        }
    }

    #[test]
    fn steps_come_first_and_samples_keep_the_order_of_the_items() {
        let items = vec![
            item(1, &[10, 11, 12], 2, &[7, 8, 9], true),
            item(2, &[20], 4, &[1, 2], true),
            item(3, &[30, 31], 0, &[5], false),
            item(4, &[40], 0, &[6], true),
        ];
        let batch = Batch::new(&BatchPlan { step: 0, items }, 4);
        assert_eq!(batch.tokens, [20, 40, 10, 11, 12, 30, 31]);
        assert_eq!(batch.positions, [4, 0, 2, 3, 4, 0, 1]);
        assert_eq!(batch.tables, [1, 2, 6, 7, 8, 5]);
        let run = |first_row, rows, start, table| Span { first_row, rows, start, table };
        assert_eq!(batch.steps, [run(0, 1, 4, 0), run(1, 1, 0, 2)]);
        assert_eq!(batch.chunks, [run(2, 3, 2, 3), run(5, 2, 0, 5)]);
        assert_eq!(batch.sampled_rows, [4, 0, 1]);
        assert_eq!(batch.sampled, [run(0, 1, 4, 3), run(1, 1, 4, 0), run(2, 1, 0, 2)]);
        assert_eq!(batch.written_by_steps, [2, 6].map(BlockId));
        assert_eq!(batch.written_by_chunks, [7, 8, 5].map(BlockId));
        let write = |block, slot, row, rows| Write { block, slot, row, rows };
        let want = [write(2, 0, 0, 1), write(6, 0, 1, 1), write(7, 2, 2, 2), write(8, 0, 4, 1), write(5, 0, 5, 2)];
        assert_eq!(batch.writes(4), want);
    }
}
