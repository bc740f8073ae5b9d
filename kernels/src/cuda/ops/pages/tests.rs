//! Pages on the device have the bits of the CPU's.

use super::*;
use crate::cuda::ops::testing::{in_every_order, on};
use crate::cuda::{Buffer, Device};
use crate::reference;
use crate::testing::Random;
use std::sync::Arc;

const SHAPES: [(usize, usize, usize); 5] = [(1, 8, 1), (2, 64, 16), (3, 40, 7), (1, 128, 48), (2, 80, 64)];

/// Room for `blocks` pages, all bytes 0xff, and their description.
fn room(device: &Arc<dyn Device>, format: KvFormat, blocks: usize) -> (Buffer, Pages) {
    let stride = format.page_bytes().next_multiple_of(64) + 64;
    let buffer = Buffer::new(device, stride * blocks).unwrap();
    let pages = Pages { format, base: buffer.address(), block_stride: stride as u64 };
    (buffer, pages)
}

fn page(buffer: &Buffer, pages: &Pages, block: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages.format.page_bytes()];
    buffer.download(block * pages.block_stride as usize, &mut bytes).unwrap();
    bytes
}

/// Values of every magnitude, and in some rows what is not a number at all.
fn wild(random: &mut Random, n: usize, width: usize) -> Vec<f32> {
    let mut values = random.vector(n);
    for (i, row) in values.chunks_mut(width).enumerate() {
        match i % 5 {
            1 => row.iter_mut().for_each(|v| *v *= 1e-4),
            2 => row.iter_mut().for_each(|v| *v *= 300.0),
            3 => row[i % width] = [f32::NAN, f32::INFINITY, -0.0, 1e-40, -1e30][i % 5],
            4 => row.fill(0.0),
            _ => {}
        }
    }
    values
}

#[test]
fn written_pages_are_the_cpus_bit_for_bit() {
    in_every_order(|device, order| {
        let mut random = Random::new(21);
        for dtype in KvDtype::ALL {
            for (kv_heads, head_dim, block_size) in SHAPES {
                let format = KvFormat { dtype, kv_heads, head_dim, block_size };
                let (pairs, width) = (head_dim / 4, kv_heads * head_dim);
                // A new block that is filled in part, and one that is filled on from where it is.
                let (first, second) = (random.within(1, block_size), random.within(0, block_size - 1));
                let more = random.within(1, block_size - second);
                let rows = first + more;
                let (k, v) = (wild(&mut random, rows * width, width), wild(&mut random, rows * width, width));
                let (cos, sin) = (random.vector(rows * pairs), random.vector(rows * pairs));
                let writes = [
                    Write { block: 2, slot: 0, row: 0, rows: first as u32 },
                    Write { block: 0, slot: second as u32, row: first as u32, rows: more as u32 },
                ];
                for turned in [false, true] {
                    let (buffer, pages) = room(device, format, 3);
                    let list = Buffer::of(device, &Write::words(&writes)).unwrap();
                    let (dk, dv, dc, ds) = (on(device, &k), on(device, &v), on(device, &cos), on(device, &sin));
                    let turn = match turned {
                        true => KeyTurn { pairs, cos: dc.address(), sin: ds.address(), ..KeyTurn::default() },
                        false => KeyTurn::default(),
                    };
                    // SAFETY: the buffers have these shapes, the blocks are below 3 and the slots fit.
                    unsafe {
                        let list = (list.address(), writes.len());
                        write_kv(&**device, &pages, list, &turn, dk.address(), dv.address()).unwrap();
                    }
                    let mut keys = k.clone();
                    if turned {
                        reference::rope(&mut keys, kv_heads, head_dim, &cos, &sin);
                    }
                    let mut want = [vec![0xff; format.page_bytes()], vec![0xff; format.page_bytes()]];
                    format.write(&mut want[0], 0, &keys[..first * width], &v[..first * width]);
                    format.zero_tail(&mut want[0], first);
                    format.write(&mut want[1], second, &keys[first * width..], &v[first * width..]);
                    if second == 0 {
                        format.zero_tail(&mut want[1], more);
                    }
                    for (want, block) in want.iter().zip([2, 0]) {
                        assert!(page(&buffer, &pages, block) == *want, "{format:?} block {block} {turned} {order:?}");
                    }
                    assert!(page(&buffer, &pages, 1).iter().all(|byte| *byte == 0xff), "a page that nobody named");
                }
            }
        }
    });
}

/// With a norm the keys are those that `rotate_heads` computes.
#[test]
fn normed_keys_are_the_normed_heads() {
    in_every_order(|device, _| {
        let mut random = Random::new(22);
        let format = KvFormat { dtype: KvDtype::F32, kv_heads: 2, head_dim: 40, block_size: 8 };
        let (rows, pairs) = (5, 20);
        let (k, weight) = (random.vector(rows * 80), random.vector(40));
        let (cos, sin) = (random.vector(rows * pairs), random.vector(rows * pairs));
        let (dk, dw, dc, ds) = (on(device, &k), on(device, &weight), on(device, &cos), on(device, &sin));
        let (buffer, pages) = room(device, format, 1);
        let list = Buffer::of(device, &Write::words(&[Write { block: 0, slot: 0, row: 0, rows: 5 }])).unwrap();
        let turn = KeyTurn { norm: dw.address(), eps: 1e-6, pairs, cos: dc.address(), sin: ds.address() };
        let heads = super::super::rows::Heads { rows, heads: 2, head_dim: 40, pairs, eps: 1e-6 };
        // SAFETY: the buffers have these shapes.
        unsafe {
            write_kv(&**device, &pages, (list.address(), 1), &turn, dk.address(), dk.address()).unwrap();
            let (angles, to) = ((dc.address(), ds.address()), crate::DType::F32);
            super::super::rows::rotate_heads(&**device, &heads, dk.address(), dw.address(), angles, to, dk.address())
                .unwrap();
        }
        let mut want = vec![0; format.page_bytes()];
        format.write(&mut want, 0, &dk.to_vec::<f32>(rows * 80).unwrap(), &k);
        assert!(page(&buffer, &pages, 0) == want);
    });
}

#[test]
fn pages_are_copied_and_converted_as_the_cpu_would_write_them() {
    in_every_order(|device, order| {
        let mut random = Random::new(23);
        for (kv_heads, head_dim, block_size) in SHAPES {
            let width = kv_heads * head_dim;
            for from in KvDtype::ALL {
                let source = KvFormat { dtype: from, kv_heads, head_dim, block_size };
                let (k, v) = (random.vector(block_size * width), random.vector(block_size * width));
                let mut bytes = vec![0; source.page_bytes()];
                let used = random.within(1, block_size);
                source.write(&mut bytes, 0, &k[..used * width], &v[..used * width]);
                let (at, from_pages) = room(device, source, 3);
                at.upload(2 * from_pages.block_stride as usize, &bytes).unwrap();
                at.upload(0, &vec![0u8; bytes.len()]).unwrap();
                let blocks = Buffer::of(device, &[2u32, 0]).unwrap();
                let (keys, values) = decoded(&source, &bytes);
                for to in KvDtype::ALL {
                    let target = KvFormat { dtype: to, ..source };
                    let (staging, to_pages) = room(device, target, 2);
                    // SAFETY: both hold the blocks.
                    unsafe {
                        copy(&**device, 2, (&from_pages, blocks.address()), (&to_pages, 0)).unwrap();
                    }
                    let mut want = bytes.clone();
                    if to != from {
                        want = vec![0; target.page_bytes()];
                        target.write(&mut want, 0, &keys, &values);
                    }
                    let what = format!("{source:?} to {to:?} {order:?}");
                    assert!(page(&staging, &to_pages, 0) == want, "{what}");
                    assert!(page(&staging, &to_pages, 1).iter().all(|byte| *byte == 0), "{what}: zeros stay zeros");
                    // And back, to other places.
                    let (back, back_pages) = room(device, target, 3);
                    // SAFETY: both hold the blocks.
                    unsafe { copy(&**device, 2, (&to_pages, 0), (&back_pages, blocks.address())).unwrap() };
                    assert!(page(&back, &back_pages, 2) == want, "{what}, scattered");
                }
            }
        }
    });
}

/// Keys and values of a page, `[block_size, kv_heads * head_dim]`, in f32.
fn decoded(format: &KvFormat, page: &[u8]) -> (Vec<f32>, Vec<f32>) {
    use crate::quant::{bf16_to_f32, f16_to_f32};
    let bytes = format.dtype.bytes();
    let element = |at: usize| match format.dtype {
        KvDtype::F32 => f32::from_le_bytes(page[at..at + 4].try_into().unwrap()),
        KvDtype::F16 => f16_to_f32(u16::from_le_bytes([page[at], page[at + 1]])),
        KvDtype::BF16 => bf16_to_f32(u16::from_le_bytes([page[at], page[at + 1]])),
        KvDtype::Fp8 => crate::kv::e4m3_to_f32(page[at]),
        KvDtype::Int8 => f32::from(page[at] as i8),
    };
    let scale = |at: usize| match format.dtype {
        KvDtype::Int8 => f32::from_le_bytes(page[at..at + 4].try_into().unwrap()),
        _ => 1.0,
    };
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for slot in 0..format.block_size {
        for head in 0..format.kv_heads {
            for d in 0..format.head_dim {
                keys.push(element(format.key(head, d, slot)) * scale(format.key_scale(head, slot)));
                values.push(element(format.value(head, slot) + d * bytes) * scale(format.value_scale(head, slot)));
            }
        }
    }
    (keys, values)
}
