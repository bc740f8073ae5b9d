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
fn pages_are_gathered_and_scattered_as_they_are() {
    in_every_order(|device, order| {
        let mut random = Random::new(23);
        for dtype in KvDtype::ALL {
            let format = KvFormat { dtype, kv_heads: 2, head_dim: 40, block_size: random.within(1, 40) };
            let bytes: Vec<u8> = (0..format.page_bytes()).map(|_| random.bits() as u8).collect();
            let (at, pages) = room(device, format, 3);
            at.upload(2 * pages.block_stride as usize, &bytes).unwrap();
            let blocks = Buffer::of(device, &[2u32, 0]).unwrap();
            let ((staging, staged), (back, back_pages)) = (room(device, format, 2), room(device, format, 3));
            // SAFETY: all hold the blocks.
            unsafe {
                copy(&**device, 2, (&pages, blocks.address()), (&staged, 0)).unwrap();
                copy(&**device, 2, (&staged, 0), (&back_pages, blocks.address())).unwrap();
            }
            assert!(
                page(&staging, &staged, 0) == bytes && page(&back, &back_pages, 2) == bytes,
                "{format:?} {order:?}"
            );
            assert!(page(&back, &back_pages, 1).iter().all(|byte| *byte == 0xff), "a page that nobody named");
        }
    });
}

/// Pages of one shape become pages of another, of every type that they are converted into: the CPU's bytes.
#[test]
fn tokens_are_moved_as_the_cpu_moves_them() {
    in_every_order(|device, order| {
        let mut random = Random::new(24);
        for from in KvDtype::ALL {
            let narrow = matches!(from, KvDtype::Fp8 | KvDtype::Int8);
            for to in KvDtype::ALL.into_iter().filter(|to| !narrow || *to == from) {
                let (kv_heads, head_dim) = (random.within(1, 3), 8 * random.within(1, 12));
                let sizes = [random.within(1, 40), random.within(1, 40)];
                let [source, target] = [(from, sizes[0]), (to, sizes[1])].map(|(dtype, block_size)| KvFormat {
                    dtype,
                    kv_heads,
                    head_dim,
                    block_size,
                });
                let width = kv_heads * head_dim;
                let (at, from_pages) = room(device, source, 3);
                let mut pages = Vec::new();
                for block in 0..3 {
                    let mut bytes = vec![0; source.page_bytes()];
                    let n = source.block_size * width;
                    source.write(&mut bytes, 0, &wild(&mut random, n, head_dim), &wild(&mut random, n, head_dim));
                    at.upload(block * from_pages.block_stride as usize, &bytes).unwrap();
                    pages.push(bytes);
                }
                let (staging, to_pages) = room(device, target, 2);
                let mut want = vec![vec![0xff; target.page_bytes()]; 2];
                let moves: Vec<Move> = (0..2u32)
                    .map(|page| {
                        let tokens = random.within(1, sizes[0].min(sizes[1]));
                        let slots = KvMove {
                            from: random.within(0, sizes[0] - tokens),
                            to: random.within(0, sizes[1] - tokens),
                            tokens,
                        };
                        Move { from: random.within(0, 2) as u32, to: page, slots }
                    })
                    .collect();
                for m in &moves {
                    source.convert(&pages[m.from as usize], &target, &mut want[m.to as usize], m.slots);
                }
                let list = Buffer::of(device, &Move::words(&moves)).unwrap();
                // SAFETY: both hold the blocks.
                unsafe { move_tokens(&**device, (&moves, list.address()), &from_pages, &to_pages).unwrap() };
                for (block, want) in want.iter().enumerate() {
                    assert!(page(&staging, &to_pages, block) == *want, "{source:?} to {target:?}: {moves:?} {order:?}");
                }
            }
        }
    });
}
