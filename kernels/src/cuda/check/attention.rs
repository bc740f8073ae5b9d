//! Checks of attention over ragged batches with paged caches, in the kernels for single queries and in those for chunks.

use super::{Checks, Draw, error, poisoned, precision, read, rounded};
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::ops::attention::{self, Layer, Lists, query_dtype};
use crate::cuda::ops::pages::Pages;
use crate::cuda::plan::attention::{
    Decode, ITEM_WORDS, Prefill, PrefillKernel, Span, WGMMA_HEADS, experimental_prefill_kernel, prefill_kernel,
};
use crate::{AttentionItem, DType, KvDtype, KvFormat, reference};
use std::sync::Arc;

pub(super) fn run(checks: &mut Checks<'_>) {
    let longest = checks.size(70, 3000);
    for dtype in KvDtype::ALL {
        for (what, kernels) in [("decode", Kernels::Single), ("prefill", Kernels::Chunks)] {
            let cases = checks.size(2, 6);
            checks.check(format!("attention {what} {}", dtype.name()), cases, |device, draw| {
                attend(device, draw, dtype, kernels, longest)
            });
        }
    }
}

/// Hopper's kernel, where it is.
pub(super) fn run_experimental(checks: &mut Checks<'_>) {
    if checks.device.properties().sm != 90 {
        return;
    }
    let (longest, cases) = (checks.size(70, 3000), checks.size(2, 8));
    for dtype in [KvDtype::BF16, KvDtype::F16] {
        checks.check(format!("wgmma attention {}", dtype.name()), cases, |device, draw| {
            attend(device, draw, dtype, Kernels::Experimental, longest)
        });
    }
}

/// What is checked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernels {
    Single,
    Chunks,
    /// Chunks, by the kernel that is off by default.
    Experimental,
}

fn attend(
    device: &Arc<dyn Device>,
    draw: &mut Draw,
    dtype: KvDtype,
    kernels: Kernels,
    longest: usize,
) -> Result<f64, CudaError> {
    let (single, experimental) = (kernels == Kernels::Single, kernels == Kernels::Experimental);
    let kv_heads = draw.within(1, 2);
    let dims: &[usize] = if experimental { &WGMMA_HEADS } else { &[16, 64, 80, 128] };
    let (heads, head_dim) = (kv_heads * draw.within(1, 4), dims[draw.within(0, dims.len() - 1)]);
    // Hopper's kernel takes pages of whole 16 tokens.
    let sizes = if experimental { [16, 32, 48] } else { [4, 16, 32] };
    let format = KvFormat { dtype, kv_heads, head_dim, block_size: sizes[draw.within(0, 2)] };
    let window = [None, Some(draw.within(1, longest))][draw.within(0, 1)];
    let stride = format.page_bytes().next_multiple_of(64);
    let (mut memory, mut tables, mut spans) = (Vec::new(), Vec::new(), Vec::new());
    let mut rows = 0;
    for _ in 0..draw.within(1, 4) {
        let length = draw.within(1, longest);
        let queries = if single { 1 } else { draw.within(1, length.min(100)) };
        spans.push(Span { first_row: rows, rows: queries, start: length - queries, table: tables.len() });
        rows += queries;
        for first in (0..length).step_by(format.block_size) {
            let tokens = format.block_size.min(length - first) * kv_heads * head_dim;
            // Slots that nobody wrote are NaN: none may be read.
            let mut page = vec![0xff; stride];
            let (k, v) = (draw.vector(tokens), draw.vector(tokens));
            format.write(&mut page[..format.page_bytes()], 0, &k, &v);
            tables.push((memory.len() / stride) as u32);
            memory.extend(page);
        }
    }
    let query = query_dtype(dtype);
    let (q_bytes, q) = rounded(query, &draw.vector(rows * heads * head_dim));
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut want = vec![0.0; q.len()];
    let pages: Vec<&[u8]> = tables.iter().map(|b| &memory[*b as usize * stride..][..format.page_bytes()]).collect();
    expected(&format, &spans, &pages, (heads, scale, window), &q, &mut want);

    let (memory, tables, q) =
        (Buffer::of(device, &memory)?, Buffer::of(device, &tables)?, Buffer::of(device, &q_bytes)?);
    let pages = Pages { format, base: memory.address(), block_stride: stride as u64 };
    let layer = Layer { pages, tables: tables.address(), heads, scale };
    let to = if query == DType::F32 { DType::F32 } else { query };
    let out = poisoned(device, to, want.len())?;
    let target = (to, out.address());
    let (shared, sm) = (device.properties().shared_per_block as usize, device.properties().sm);
    let kernel = match experimental {
        true => experimental_prefill_kernel(&format, shared, sm).chosen,
        false => prefill_kernel(&format, shared).chosen,
    };
    let decode = single.then(|| Decode::new(&spans, window));
    let (list, work) = match &decode {
        Some(plan) => (plan.items.clone(), plan.work.clone()),
        None => {
            let plan = Prefill::new(&spans, window, kernel.tile());
            (plan.items, plan.work)
        }
    };
    let (item_count, work_count) = (list.len() / ITEM_WORDS, work.len() / 2);
    let (list, work) = (Buffer::of(device, &list)?, Buffer::of(device, &work)?);
    let lists = Lists { items: list.address(), item_count, work: work.address(), work_count };
    // SAFETY: the lists are of the plan, tables name pages of `memory`, and `q` and `out` have all rows.
    unsafe {
        match &decode {
            Some(plan) => {
                let parts = Buffer::new(device, plan.workspace_bytes(heads, head_dim))?;
                let place = (parts.address(), plan.is_direct());
                attention::decode(&**device, &layer, &lists, place, q.address(), target)?;
            }
            None => attention::prefill(&**device, &layer, &lists, kernel, q.address(), target)?,
        }
    }
    // Weights are rounded to the type of queries before they meet the values; where tensor cores widen a cache of 8 bits, they and
    // the queries to bf16.
    let widened = query == DType::F32 && !single && kernel != PrefillKernel::Simt;
    let loss = if widened { 3.0 * precision(DType::BF16) } else { 2.0 * precision(query) };
    Ok(error(&read(&out, to)?, &want, loss, loss))
}

/// What the reference computes, a few rows at a time on every core: in f64 it takes longer than anything on a device. The spans' rows
/// follow one another.
fn expected(
    format: &KvFormat,
    spans: &[Span],
    pages: &[&[u8]],
    (heads, scale, window): (usize, f32, Option<usize>),
    q: &[f32],
    want: &mut [f32],
) {
    let (row, cores) = (heads * format.head_dim, std::thread::available_parallelism().map_or(1, usize::from));
    std::thread::scope(|scope| {
        let (mut q, mut want) = (q, want);
        for span in spans {
            let each = span.rows.div_ceil(cores);
            for first in (0..span.rows).step_by(each) {
                let rows = each.min(span.rows - first);
                let (part, rest) = std::mem::take(&mut want).split_at_mut(rows * row);
                let (queries, others) = q.split_at(rows * row);
                (want, q) = (rest, others);
                let item = AttentionItem { pages: &pages[span.table..], first_row: 0, rows, start: span.start + first };
                scope.spawn(move || reference::attention(format, &[item], heads, scale, window, queries, part));
            }
        }
    });
}
