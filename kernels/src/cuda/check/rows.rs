//! Checks of what is done to rows, and of keys and values on their way into pages.

use super::{Checks, Draw, TYPES, error, poisoned, precision, read, rounded};
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::ops::pages::{self, KeyTurn, Move, Pages, Write};
use crate::cuda::ops::rows::{self, Heads};
use crate::{DType, KvDtype, KvFormat, KvMove, reference};
use std::sync::Arc;

pub(super) fn run(checks: &mut Checks<'_>) {
    let (rows_max, width_max) = (checks.size(5, 300), checks.size(200, 8192));
    for dtype in TYPES {
        checks.check(format!("rms_norm to {}", dtype.name()), 4, |device, draw| {
            norm(device, draw, dtype, rows_max, width_max)
        });
        checks.check(format!("rotate_heads to {}", dtype.name()), 4, |device, draw| {
            rotate(device, draw, dtype, rows_max)
        });
        checks.check(format!("silu_mul to {}", dtype.name()), 4, |device, draw| {
            silu(device, draw, dtype, rows_max * width_max)
        });
        checks.check(format!("embed from {}", dtype.name()), 2, |device, draw| embed(device, draw, dtype, width_max));
    }
    let pages_max = checks.size(3, 40);
    for dtype in KvDtype::ALL {
        checks.check(format!("write_kv {}", dtype.name()), 4, |device, draw| write_kv(device, draw, dtype, pages_max));
        checks.check(format!("move_tokens {}", dtype.name()), 4, |device, draw| {
            move_tokens(device, draw, dtype, pages_max)
        });
    }
}

fn norm(
    device: &Arc<dyn Device>,
    draw: &mut Draw,
    dtype: DType,
    rows_max: usize,
    width_max: usize,
) -> Result<f64, CudaError> {
    let (rows, width) = (draw.within(1, rows_max), draw.within(1, width_max));
    let (x, weight) = (draw.vector(rows * width), draw.vector(width));
    let mut want = vec![0.0; x.len()];
    reference::rms_norm(&x, &weight, 1e-5, &mut want);
    let (dx, dw) = (Buffer::of(device, &x)?, Buffer::of(device, &weight)?);
    let out = poisoned(device, dtype, x.len())?;
    // SAFETY: the buffers have `rows` rows of `width` elements.
    unsafe { rows::rms_norm(&**device, (rows, width), 1e-5, dx.address(), dw.address(), dtype, out.address())? };
    Ok(error(&read(&out, dtype)?, &want, precision(dtype), 1e-5))
}

fn rotate(device: &Arc<dyn Device>, draw: &mut Draw, dtype: DType, rows_max: usize) -> Result<f64, CudaError> {
    let (rows, heads, head_dim) = (draw.within(1, rows_max), draw.within(1, 6), 8 * draw.within(1, 16));
    let pairs = draw.within(1, head_dim / 2);
    let angles: Vec<f32> = draw.vector(rows * pairs);
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    let (x, weight) = (draw.vector(rows * heads * head_dim), draw.vector(head_dim));
    let mut want = vec![0.0; x.len()];
    reference::rms_norm(&x, &weight, 1e-6, &mut want);
    reference::rope(&mut want, heads, head_dim, &cos, &sin);
    let [dx, dw, dc, ds] = [&x, &weight, &cos, &sin].map(|values| Buffer::of(device, values));
    let (dx, dw, dc, ds) = (dx?, dw?, dc?, ds?);
    let out = poisoned(device, dtype, x.len())?;
    let shape = Heads { rows, heads, head_dim, pairs, eps: 1e-6 };
    let turn = (dc.address(), ds.address());
    // SAFETY: the buffers have the sizes that `shape` says.
    unsafe { rows::rotate_heads(&**device, &shape, dx.address(), dw.address(), turn, dtype, out.address())? };
    Ok(error(&read(&out, dtype)?, &want, precision(dtype), 2.0 * precision(dtype)))
}

fn silu(device: &Arc<dyn Device>, draw: &mut Draw, dtype: DType, most: usize) -> Result<f64, CudaError> {
    let n = draw.within(1, most);
    let (gate, up) = (draw.vector(n), draw.vector(n));
    let mut want = gate.clone();
    reference::silu_mul(&mut want, &up);
    let (dg, du) = (Buffer::of(device, &gate)?, Buffer::of(device, &up)?);
    let out = poisoned(device, dtype, n)?;
    // SAFETY: each buffer has `n` elements.
    unsafe { rows::silu_mul(&**device, n, dg.address(), du.address(), dtype, out.address())? };
    Ok(error(&read(&out, dtype)?, &want, precision(dtype), 1e-5))
}

fn embed(device: &Arc<dyn Device>, draw: &mut Draw, dtype: DType, width_max: usize) -> Result<f64, CudaError> {
    let (vocab, width, count) = (draw.within(1, 50), draw.within(1, width_max), draw.within(1, 20));
    let (bytes, table) = rounded(dtype, &draw.vector(vocab * width));
    let ids: Vec<u32> = (0..count).map(|_| draw.within(0, vocab - 1) as u32).collect();
    let want: Vec<f32> = ids.iter().flat_map(|id| table[*id as usize * width..][..width].to_vec()).collect();
    let (table, ids) = (Buffer::of(device, &bytes)?, Buffer::of(device, &ids)?);
    let out = poisoned(device, DType::F32, count * width)?;
    // SAFETY: ids are rows of the table; the output has a row for each.
    unsafe { rows::embed(&**device, (count, width), ids.address(), dtype, table.address(), out.address())? };
    Ok(if read(&out, DType::F32)? == want { 0.0 } else { f64::INFINITY })
}

/// Pages must have the CPU's bits.
fn write_kv(device: &Arc<dyn Device>, draw: &mut Draw, dtype: KvDtype, pages_max: usize) -> Result<f64, CudaError> {
    let (kv_heads, head_dim) = (draw.within(1, 4), 8 * draw.within(1, 16));
    let format = KvFormat { dtype, kv_heads, head_dim, block_size: [1, 4, 16, 32][draw.within(0, 3)] };
    let stride = format.page_bytes().next_multiple_of(64);
    let (mut writes, mut rows) = (Vec::new(), 0);
    for block in 0..draw.within(1, pages_max) as u32 {
        let slot = draw.within(0, format.block_size - 1);
        let count = draw.within(1, format.block_size - slot);
        writes.push(Write { block, slot: slot as u32, row: rows as u32, rows: count as u32 });
        rows += count;
    }
    let width = kv_heads * head_dim;
    let (k, v) = (draw.vector(rows * width), draw.vector(rows * width));
    let mut want = vec![0xff; stride * writes.len()];
    for write in &writes {
        let page = &mut want[write.block as usize * stride..][..format.page_bytes()];
        let these = write.row as usize * width..(write.row + write.rows) as usize * width;
        if write.slot == 0 {
            format.zero_tail(page, 0);
        }
        format.write(page, write.slot as usize, &k[these.clone()], &v[these]);
    }
    let memory = Buffer::new(device, want.len())?;
    memory.fill(0xff)?;
    let (dk, dv) = (Buffer::of(device, &k)?, Buffer::of(device, &v)?);
    let list = Buffer::of(device, &Write::words(&writes))?;
    let pages = Pages { format, base: memory.address(), block_stride: stride as u64 };
    let list = (list.address(), writes.len());
    // SAFETY: the writes are of blocks of `memory` and of rows of `k` and `v`.
    unsafe { pages::write_kv(&**device, &pages, list, &KeyTurn::default(), dk.address(), dv.address())? };
    Ok(if memory.to_vec::<u8>(want.len())? == want { 0.0 } else { f64::INFINITY })
}

/// Tokens that are moved to pages of another size and type must have the CPU's bits.
fn move_tokens(device: &Arc<dyn Device>, draw: &mut Draw, from: KvDtype, pages_max: usize) -> Result<f64, CudaError> {
    let (kv_heads, head_dim) = (draw.within(1, 4), 8 * draw.within(1, 16));
    // 8 bits stay what they are.
    let to = match from {
        KvDtype::Fp8 | KvDtype::Int8 => from,
        _ => KvDtype::ALL[draw.within(0, KvDtype::ALL.len() - 1)],
    };
    let mut format = |dtype| KvFormat { dtype, kv_heads, head_dim, block_size: draw.within(1, 48) };
    let (source, target) = (format(from), format(to));
    let (strides, count) =
        ([source, target].map(|format| format.page_bytes().next_multiple_of(64)), draw.within(1, pages_max));
    let (mut pages, mut want) = (vec![0; strides[0] * count], vec![0xff; strides[1] * count]);
    let mut moves = Vec::new();
    for page in 0..count {
        let n = source.block_size * kv_heads * head_dim;
        let bytes = &mut pages[page * strides[0]..][..source.page_bytes()];
        source.write(bytes, 0, &draw.vector(n), &draw.vector(n));
        let tokens = draw.within(1, source.block_size.min(target.block_size));
        let slots = KvMove {
            from: draw.within(0, source.block_size - tokens),
            to: draw.within(0, target.block_size - tokens),
            tokens,
        };
        let other = count - 1 - page;
        source.convert(bytes, &target, &mut want[other * strides[1]..][..target.page_bytes()], slots);
        moves.push(Move { from: page as u32, to: other as u32, slots });
    }
    let (from, to) = (Buffer::of(device, &pages)?, Buffer::new(device, want.len())?);
    to.fill(0xff)?;
    let list = Buffer::of(device, &Move::words(&moves))?;
    let of =
        |format, buffer: &Buffer, stride: usize| Pages { format, base: buffer.address(), block_stride: stride as u64 };
    let (from_pages, to_pages) = (of(source, &from, strides[0]), of(target, &to, strides[1]));
    // SAFETY: the moves are between pages of the two buffers, each to a page of its own.
    unsafe { pages::move_tokens(&**device, (&moves, list.address()), &from_pages, &to_pages)? };
    Ok(if to.to_vec::<u8>(want.len())? == want { 0.0 } else { f64::INFINITY })
}
