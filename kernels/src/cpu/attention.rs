//! Attention: cuts the items into pieces (one key/value head, a few rows, some splits of the context) and shares them out.
//! Also the writing of the cache.

use super::generic::attention::{Piece, RUN_QUERIES_MAX, RUN_QUERIES_MIN, Run, SPLIT, Scratch};
use super::{Cpu, Shared};
use crate::kv::{AttentionItem, KvFormat, KvWrite};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Mutex;

/// Tasks per thread below which runs become shorter, and then are cut at their splits: the last task to end keeps the other
/// threads waiting for about one part in as many.
const TASKS_PER_THREAD: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One task: some splits of one run.
struct Task {
    run: usize,
    kv_head: usize,
    splits: Range<usize>,
    /// Offset of the run's states among all of them, if its splits are computed apart.
    states: Option<usize>,
}

impl Cpu {
    /// Causal attention of every query of every item: `q` and `out` are `[rows, heads, head_dim]`, and query head `h` reads
    /// key/value head `h / (heads / kv_heads)`. Scores are multiplied by `scale`, which is positive; with `window`, the query
    /// at position `p` sees only the last `window` keys up to `p`. Rows of `out` that no item names are left alone.
    ///
    /// A query's result depends on its own vector, its position and the keys and values it attends, bit for bit: not on how
    /// queries are cut into items, nor on the page size or the threads. Items must not share rows (asserted). Bytes of
    /// pages past an item's last query are never used.
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
        assert!(scale > 0.0, "scores are scaled by {scale}");
        assert_eq!(q.len(), out.len());
        assert!(q.len().is_multiple_of(heads * fmt.head_dim));
        check_items(fmt, items, q.len() / (heads * fmt.head_dim));

        let queries = heads * items.iter().map(|item| item.rows).sum::<usize>();
        let run_queries = (queries / (self.threads() * TASKS_PER_THREAD)).clamp(RUN_QUERIES_MIN, RUN_QUERIES_MAX);
        let run_rows = (run_queries * fmt.kv_heads / heads).max(1);
        let out = Shared(out.as_mut_ptr());
        let runs: Vec<Run<'_>> = items
            .iter()
            .flat_map(|item| (0..item.rows).step_by(run_rows).map(move |row| (item, row)))
            .map(|(item, row)| Run {
                fmt,
                pages: item.pages,
                kv_head: 0,
                heads,
                row: item.first_row + row,
                rows: run_rows.min(item.rows - row),
                start: item.start + row,
                scale,
                window,
                q,
                out,
            })
            .collect();
        let of_head = |task: &Task| Run { kv_head: task.kv_head, ..runs[task.run].clone() };

        let (tasks, joins, states_len) = plan(&runs, fmt.kv_heads, self.threads());
        // Taken, so that a panic in a task leaves nothing half-written behind; calls that overlap each use their own.
        let mut states = std::mem::take(&mut *self.states.lock().expect("no holder of this lock can panic"));
        let floats = Shared(states.floats(states_len).as_mut_ptr());
        self.pool.run(tasks.len(), &|i| {
            let task = &tasks[i];
            // SAFETY: the offset is inside the buffer: `plan` counted its length.
            let states = task.states.map(|offset| unsafe { floats.at(offset) });
            let next = tasks.get(i + 1).map(|task| (of_head(task), task.splits.start));
            let piece = Piece { run: of_head(task), splits: task.splits.clone(), states, next };
            // SAFETY: items do not share rows, runs of an item share neither rows nor heads, and pieces of a run do not share
            // splits, so these outputs or states are this task's alone; the table proves the features.
            SCRATCH.with_borrow_mut(|scratch| unsafe { (self.kernels.attention)(&piece, scratch) });
        });
        self.split(joins.len(), runs.first().map_or(0, Run::state_len), &|range| {
            for (task, offset) in joins[range].iter().filter_map(|task| Some((task, task.states?))) {
                // SAFETY: the states were written by the tasks above, which are over; the outputs of this run and head are
                // this task's alone; the table proves the features.
                SCRATCH.with_borrow_mut(|scratch| unsafe {
                    (self.kernels.join_splits)(&of_head(task), floats.at(offset), scratch);
                });
            }
        });
        *self.states.lock().expect("no holder of this lock can panic") = states;
    }

    /// Writes rows of `k` and `v`, each `[rows, kv_heads * head_dim]`, into pages, as [`KvFormat::write`] does.
    pub fn write_kv(&self, fmt: &KvFormat, writes: &mut [KvWrite<'_>], k: &[f32], v: &[f32]) {
        let width = fmt.kv_heads * fmt.head_dim;
        let longest = writes.iter().map(|write| write.rows).max().unwrap_or(0);
        // Each write has one task, but only a `&mut` tells the compiler so: the lock is never waited for.
        let writes: Vec<Mutex<&mut KvWrite<'_>>> = writes.iter_mut().map(Mutex::new).collect();
        self.split(writes.len(), longest * width, &|range| {
            for write in &writes[range] {
                let write = &mut **write.lock().expect("each write has one task");
                let rows = write.row * width..(write.row + write.rows) * width;
                // SAFETY: the table proves the features.
                unsafe { (self.kernels.write_kv)(fmt, write.page, write.slot, &k[rows.clone()], &v[rows]) };
                if write.clear_rest {
                    fmt.zero_tail(write.page, write.slot + write.rows);
                }
            }
        });
    }
}

/// Cuts runs into tasks, the longest first. Also: one task of every run and head that is computed in splits, and the floats that
/// their states take.
fn plan(runs: &[Run<'_>], kv_heads: usize, threads: usize) -> (Vec<Task>, Vec<Task>, usize) {
    // Decoding and softmax make a key cost more than its products do; four queries more is close enough for a balance.
    let cost = |run: &Run<'_>, splits: &Range<usize>| {
        let end = (splits.end * SPLIT).min(run.start + run.rows);
        (end - splits.start * SPLIT) * (run.state_len() / 64 + 4)
    };
    let whole: usize = runs.iter().map(|run| cost(run, &run.splits()) * kv_heads).sum();
    let grain = whole / (threads * TASKS_PER_THREAD);
    let (mut tasks, mut joins, mut states_len) = (Vec::new(), Vec::new(), 0);
    for (i, run) in runs.iter().enumerate() {
        let splits = run.splits();
        let is_cut = threads > 1 && splits.len() > 1 && cost(run, &splits) > grain;
        let offsets: Vec<Option<usize>> =
            (0..kv_heads).map(|head| is_cut.then(|| states_len + head * splits.len() * run.state_len())).collect();
        let task = |kv_head: usize, splits: Range<usize>| Task { run: i, kv_head, splits, states: offsets[kv_head] };
        if is_cut {
            // Heads lie side by side in a page, so tasks at about the same time read about the same memory.
            tasks.extend(
                splits.clone().flat_map(|s| (0..kv_heads).map(move |head| (head, s..s + 1))).map(|(h, s)| task(h, s)),
            );
            joins.extend((0..kv_heads).map(|head| task(head, splits.clone())));
            states_len += kv_heads * splits.len() * run.state_len();
        } else {
            tasks.extend((0..kv_heads).map(|head| task(head, splits.clone())));
        }
    }
    tasks.sort_by_key(|task| std::cmp::Reverse(cost(&runs[task.run], &task.splits)));
    (tasks, joins, states_len)
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
