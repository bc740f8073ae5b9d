//! Attention against the reference, over ragged batches; alone and in company, in one piece and in chunks.

use super::*;
use crate::cuda::emulated::Order;
use crate::cuda::ops::testing::{decode as numbers, encode, in_every_order, poisoned, precision, read};
use crate::cuda::plan::attention::{Decode, Prefill, Span, prefill_kernel};
use crate::cuda::{Buffer, Device};
use crate::testing::{Random, assert_close, assert_same};
use crate::{AttentionItem, KvFormat, reference};
use std::sync::Arc;

/// Caches of some sequences, in pages on the host and on the device, the blocks dealt out at random.
struct World {
    format: KvFormat,
    heads: usize,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    tables: Vec<Vec<u32>>,
    pages: Vec<Vec<u8>>,
    memory: Buffer,
    stride: usize,
    table: Buffer,
}

impl World {
    fn new(device: &Arc<dyn Device>, random: &mut Random, format: KvFormat, heads: usize, lengths: &[usize]) -> Self {
        let bs = format.block_size;
        let needed: usize = lengths.iter().map(|n| n.div_ceil(bs)).sum();
        let mut free: Vec<u32> = (0..needed as u32 + 3).collect();
        // Bytes that nobody wrote are NaN in most types: none may be used.
        let mut pages = vec![vec![0xff; format.page_bytes()]; free.len()];
        let width = format.kv_heads * format.head_dim;
        let mut tables = Vec::new();
        for length in lengths {
            let table: Vec<u32> =
                (0..length.div_ceil(bs)).map(|_| free.swap_remove(random.within(0, free.len() - 1))).collect();
            for (i, block) in table.iter().enumerate() {
                let tokens = bs.min(length - i * bs);
                let (k, v) = (random.vector(tokens * width), random.vector(tokens * width));
                format.write(&mut pages[*block as usize], 0, &k, &v);
            }
            tables.push(table);
        }
        let stride = format.page_bytes().next_multiple_of(64) + 64;
        let memory = Buffer::new(device, stride * pages.len()).unwrap();
        for (i, page) in pages.iter().enumerate() {
            memory.upload(i * stride, page).unwrap();
        }
        let table = Buffer::of(device, &tables.concat()).unwrap();
        Self { format, heads, lengths: lengths.to_vec(), tables, pages, memory, stride, table }
    }

    fn layer(&self) -> Layer {
        let pages = Pages { format: self.format, base: self.memory.address(), block_stride: self.stride as u64 };
        let scale = 1.0 / (self.format.head_dim as f32).sqrt();
        Layer { pages, tables: self.table.address(), heads: self.heads, scale }
    }

    fn width(&self) -> usize {
        self.heads * self.format.head_dim
    }

    /// The last `rows[i]` positions of each sequence.
    fn spans(&self, rows: &[usize]) -> Vec<Span> {
        let (mut first_row, mut table) = (0, 0);
        let mut spans = Vec::new();
        for (i, rows) in rows.iter().enumerate() {
            spans.push(Span { first_row, rows: *rows, start: self.lengths[i] - rows, table });
            first_row += rows;
            table += self.tables[i].len();
        }
        spans
    }

    fn reference(&self, spans: &[Span], window: Option<usize>, q: &[f32]) -> Vec<f32> {
        let pages: Vec<Vec<&[u8]>> =
            self.tables.iter().map(|table| table.iter().map(|b| &*self.pages[*b as usize]).collect()).collect();
        let items: Vec<AttentionItem<'_>> = spans
            .iter()
            .zip(&pages)
            .map(|(s, pages)| AttentionItem { pages, first_row: s.first_row, rows: s.rows, start: s.start })
            .collect();
        let mut out = vec![0.0; q.len()];
        reference::attention(&self.format, &items, self.heads, self.layer().scale, window, q, &mut out);
        out
    }

    /// Uploads queries and lists and calls `run`; rows that no item names stay poisoned.
    fn launch(
        &self,
        q: &[f32],
        to: DType,
        (items, work): (&[u32], &[u32]),
        run: impl Fn(&dyn Device, &Lists, u64, u64) -> Result<(), CudaError>,
    ) -> Vec<f32> {
        let device = self.memory.device();
        let of = query_dtype(self.format.dtype);
        let dq = Buffer::of(device, &encode(of, q)).unwrap();
        let out = poisoned(device, to, q.len());
        let (di, dw) = (Buffer::of(device, items).unwrap(), Buffer::of(device, work).unwrap());
        let lists = Lists {
            items: di.address(),
            item_count: items.len() / ITEM_WORDS,
            work: dw.address(),
            work_count: work.len() / 2,
        };
        run(&**device, &lists, dq.address(), out.address()).unwrap();
        read(&out, to)
    }

    fn decode(&self, spans: &[Span], window: Option<usize>, q: &[f32], to: DType) -> Vec<f32> {
        let mut plan = Decode::new(spans, window);
        // Padding, as a recorded graph has it.
        plan.work.extend(crate::cuda::plan::attention::NOTHING);
        let bytes = plan.workspace_bytes(self.heads, self.format.head_dim);
        let workspace = Buffer::new(self.memory.device(), bytes.max(1)).unwrap();
        self.launch(q, to, (&plan.items, &plan.work), |device, lists, q, out| {
            let partial = (workspace.address(), plan.is_direct());
            // SAFETY: everything was made for this batch.
            unsafe { super::decode(device, &self.layer(), lists, partial, q, (to, out)) }
        })
    }

    fn prefill(&self, kernel: PrefillKernel, spans: &[Span], window: Option<usize>, q: &[f32], to: DType) -> Vec<f32> {
        let plan = Prefill::new(spans, window, kernel.tile());
        self.launch(q, to, (&plan.items, &plan.work), |device, lists, q, out| {
            // SAFETY: everything was made for this batch.
            unsafe { super::prefill(device, &self.layer(), lists, kernel, q, (to, out)) }
        })
    }

    /// Queries as the kernel gets them.
    fn queries(&self, random: &mut Random, rows: usize) -> Vec<f32> {
        let of = query_dtype(self.format.dtype);
        numbers(of, &encode(of, &random.vector(rows * self.width())))
    }
}

const CACHES: [KvDtype; 5] = KvDtype::ALL;

#[test]
fn single_queries_attend_as_the_reference_does() {
    // Heads per key head beyond a block's, block sizes that are no multiple of four, heads that are no power of two.
    let shapes = [(2, 6, 64, 16), (1, 9, 128, 64), (3, 3, 40, 7), (2, 4, 256, 32), (1, 2, 8, 1), (2, 2, 80, 4)];
    in_every_order(|device, order| {
        let mut random = Random::new(31);
        for (i, (kv_heads, heads, head_dim, block_size)) in shapes.into_iter().enumerate() {
            for dtype in [CACHES[i % 5], CACHES[(i + 2) % 5]] {
                let format = KvFormat { dtype, kv_heads, head_dim, block_size };
                let lengths = [1, random.within(2, 500), random.within(513, 1100)];
                let world = World::new(device, &mut random, format, heads, &lengths);
                let q = world.queries(&mut random, 3);
                for window in [None, Some(random.within(1, 600))] {
                    for to in [DType::F32, DType::BF16] {
                        let spans = world.spans(&[1; 3]);
                        let got = world.decode(&spans, window, &q, to);
                        let want = world.reference(&spans, window, &q);
                        let what = format!("{format:?} {lengths:?} {window:?} {order:?}");
                        assert_close(&got, &want, precision(to).max(1e-5), precision(to).max(1e-5), &what);
                        // Alone: the shorter ones are then direct, and in another row.
                        for i in 0..3 {
                            let span = Span { first_row: 0, ..spans[i] };
                            let row = i * world.width()..(i + 1) * world.width();
                            assert_same(&world.decode(&[span], window, &q[row.clone()], to), &got[row], &what);
                        }
                    }
                }
            }
        }
    });
}

/// Each chunk of a prompt against the reference, rows alone and in any company, and the same bits however the prompt is cut.
fn chunks_of_prompts(
    device: &Arc<dyn Device>,
    order: Order,
    kernel: PrefillKernel,
    format: KvFormat,
    heads: usize,
    seed: u64,
    tolerance: f32,
) {
    let mut random = Random::new(seed);
    let lengths = [random.within(1, 30), random.within(70, 180), random.within(40, 100)];
    let world = World::new(device, &mut random, format, heads, &lengths);
    let rows = [lengths[0], random.within(1, lengths[1]), random.within(1, lengths[2])];
    let q = world.queries(&mut random, rows.iter().sum());
    let spans = world.spans(&rows);
    for window in [None, Some(random.within(1, 90))] {
        let what = format!("{kernel:?} {format:?} {lengths:?} {rows:?} {window:?} {order:?}");
        let got = world.prefill(kernel, &spans, window, &q, DType::F32);
        let want = world.reference(&spans, window, &q);
        assert_close(&got, &want, tolerance, tolerance, &what);
        let rounded = world.prefill(kernel, &spans, window, &q, DType::BF16);
        assert_same(&rounded, &numbers(DType::BF16, &encode(DType::BF16, &got)), "the output's type rounds once");
        // Cut anew, one item at a time and out of order.
        let mut pieces = Vec::new();
        for span in &spans {
            let mut row = 0;
            while row < span.rows {
                let count = random.within(1, span.rows - row);
                pieces.push(Span { first_row: span.first_row + row, rows: count, start: span.start + row, ..*span });
                row += count;
            }
        }
        pieces.reverse();
        assert_same(&world.prefill(kernel, &pieces, window, &q, DType::F32), &got, &format!("in pieces: {what}"));
    }
}

#[test]
fn chunks_attend_as_the_reference_does_without_tensor_cores() {
    let shapes = [
        (2, 4, 64, 16, KvDtype::F32),
        (1, 3, 72, 5, KvDtype::F16),
        (2, 2, 8, 1, KvDtype::Int8),
        (1, 1, 256, 48, KvDtype::Fp8),
        (3, 3, 64, 64, KvDtype::BF16),
    ];
    in_every_order(|device, order| {
        for (i, (kv_heads, heads, head_dim, block_size, dtype)) in shapes.into_iter().enumerate() {
            let format = KvFormat { dtype, kv_heads, head_dim, block_size };
            chunks_of_prompts(device, order, PrefillKernel::Simt, format, heads, 40 + i as u64, 1e-5);
        }
    });
}

#[test]
fn chunks_attend_as_the_reference_does_on_tensor_cores() {
    let shapes = [
        (1, 2, 64, 16, KvDtype::F16),
        (2, 2, 80, 8, KvDtype::BF16),
        (1, 1, 96, 7, KvDtype::F16),
        (1, 3, 128, 32, KvDtype::BF16),
        (2, 2, 64, 16, KvDtype::Fp8),
        (1, 2, 128, 24, KvDtype::Int8),
        (1, 1, 80, 7, KvDtype::Int8),
    ];
    in_every_order(|device, order| {
        for (i, (kv_heads, heads, head_dim, block_size, dtype)) in shapes.into_iter().enumerate() {
            let format = KvFormat { dtype, kv_heads, head_dim, block_size };
            let kernel = prefill_kernel(&format, 163 << 10).chosen;
            let narrow = matches!(dtype, KvDtype::Fp8 | KvDtype::Int8);
            assert_eq!(kernel, PrefillKernel::Mma { stages: if narrow { 1 } else { 2 } });
            // Weights are rounded to the cache's type, or bf16, before they meet the values; queries of caches of 8 bits are too.
            let tolerance = if narrow { 3.0 * precision(DType::BF16) } else { 2.0 * precision(query_dtype(dtype)) };
            chunks_of_prompts(device, order, kernel, format, heads, 50 + i as u64, tolerance);
        }
    });
}

#[test]
fn chunks_attend_as_the_reference_does_on_warpgroups() {
    let shapes = [(1, 2, 64, 16, KvDtype::F16), (1, 1, 128, 32, KvDtype::BF16), (2, 2, 128, 64, KvDtype::F16)];
    in_every_order(|device, order| {
        for (i, (kv_heads, heads, head_dim, block_size, dtype)) in shapes.into_iter().enumerate() {
            let format = KvFormat { dtype, kv_heads, head_dim, block_size };
            let tolerance = 2.0 * precision(query_dtype(dtype));
            chunks_of_prompts(device, order, PrefillKernel::Wgmma, format, heads, 70 + i as u64, tolerance);
        }
    });
}

/// Large heads, with both tiles in flight and with one.
#[test]
fn chunks_with_one_stage_are_those_with_two() {
    in_every_order(|device, order| {
        let mut random = Random::new(60);
        let format = KvFormat { dtype: KvDtype::F16, kv_heads: 1, head_dim: 256, block_size: 16 };
        let world = World::new(device, &mut random, format, 1, &[150]);
        let q = world.queries(&mut random, 20);
        let spans = world.spans(&[20]);
        let run = |stages| world.prefill(PrefillKernel::Mma { stages }, &spans, None, &q, DType::F32);
        let (one, two) = (run(1), run(2));
        assert_same(&one, &two, &format!("{order:?}"));
        assert_close(&two, &world.reference(&spans, None, &q), 2e-3, 2e-3, &format!("{order:?}"));
    });
}
