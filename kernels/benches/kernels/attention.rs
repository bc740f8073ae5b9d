//! Attention over paged caches with Llama-3's heads (32 queries, 8 keys): decode steps over long contexts in every cache type,
//! chunks of prompts, and writing a chunk's keys and values.

use crate::roof::{Operations, Roof, Work, random};
use criterion::Criterion;
use ridge_kernels::{AttentionItem, KvDtype, KvFormat, KvWrite, reference};
use std::hint::black_box;

const HEADS: usize = 32;

/// One group per cache type.
pub fn all(criterion: &mut Criterion, roof: &Roof) {
    // Elements per head, query rows, position of the first.
    let steps: [(usize, usize, usize); 3] = [(64, 1, 4095), (64, 1, 8191), (128, 1, 8191)];
    let chunks = [(64, 512, 0), (64, 512, 3584), (128, 512, 0), (128, 512, 3584)];
    for dtype in KvDtype::ALL {
        let mut group = criterion.benchmark_group(format!("attention/{}", dtype.name()));
        for (head_dim, rows, start) in steps.into_iter().chain(chunks) {
            if rows > 1 && dtype != KvDtype::BF16 {
                continue;
            }
            let fmt = KvFormat { dtype, kv_heads: 8, head_dim, block_size: 16 };
            let keys = start + rows;
            let blocks = keys.div_ceil(fmt.block_size);
            // Steps take turns on sequences that no cache holds together, as the layers of a pass do.
            let sequences = if rows == 1 { (512 << 20) / (blocks * fmt.page_bytes()) } else { 1 };
            let mut cache = Cache::new(fmt, keys, sequences);
            cache.write(roof);
            if rows > 1 && start == 0 {
                let bytes = 2.0 * (keys * fmt.kv_heads * head_dim * 4) as f64;
                let work = Work { operations: 0.0, kind: Operations::Floats, bytes };
                roof.bench(&mut group, &format!("write {keys} of {head_dim}"), work, || cache.write(roof));
            }
            let pages: Vec<&[u8]> = cache.memory[cache.aligned..].chunks_exact(fmt.page_bytes()).collect();
            let (scale, mut seed) = (1.0 / (head_dim as f32).sqrt(), 3);
            let q: Vec<f32> = (0..rows * HEADS * head_dim).map(|_| random(&mut seed)).collect();
            let mut out = vec![0.0; q.len()];
            let attend = |pages: &[&[u8]], out: &mut [f32]| {
                let items = [AttentionItem { pages, first_row: 0, rows, start }];
                roof.cpu.attention(&fmt, &items, HEADS, scale, None, black_box(&q), out);
            };
            attend(&pages[..blocks], &mut out);
            let (last, mut want) = ((rows - 1) * HEADS * head_dim, vec![0.0; HEADS * head_dim]);
            let item = [AttentionItem { pages: &pages[..blocks], first_row: 0, rows: 1, start: keys - 1 }];
            reference::attention(&fmt, &item, HEADS, scale, None, &q[last..], &mut want);
            assert!(out[last..].iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-4), "{dtype:?}");

            let pairs: usize = (start + 1..=keys).sum();
            let work = Work {
                operations: 4.0 * (pairs * HEADS * head_dim) as f64,
                kind: Operations::Floats,
                bytes: (blocks * fmt.page_bytes()) as f64,
            };
            let mut sequence = pages.chunks_exact(blocks).cycle();
            roof.bench(&mut group, &format!("{rows} from {start} of {head_dim}"), work, || {
                attend(sequence.next().expect("a cycle has no end"), black_box(&mut out));
            });
        }
        group.finish();
    }
}

/// Sequences of equal length.
struct Cache {
    fmt: KvFormat,
    keys: usize,
    /// Pages start at cache lines, as those of KV memory do.
    memory: Vec<u8>,
    aligned: usize,
    kv: Vec<f32>,
}

impl Cache {
    fn new(fmt: KvFormat, keys: usize, sequences: usize) -> Cache {
        let bytes = sequences * keys.div_ceil(fmt.block_size) * fmt.page_bytes();
        let mut memory = vec![0; bytes + 64];
        let aligned = memory.as_ptr().align_offset(64);
        memory.truncate(aligned + bytes);
        let mut seed = 1;
        let kv = (0..2 * keys * fmt.kv_heads * fmt.head_dim).map(|_| random(&mut seed)).collect();
        Cache { fmt, keys, memory, aligned, kv }
    }

    /// Every sequence's keys and values into its pages.
    fn write(&mut self, roof: &Roof) {
        let (fmt, keys) = (self.fmt, self.keys);
        let blocks = keys.div_ceil(fmt.block_size);
        let pages = self.memory[self.aligned..].chunks_exact_mut(fmt.page_bytes());
        let mut writes: Vec<KvWrite<'_>> = pages
            .enumerate()
            .map(|(i, page)| {
                let row = i % blocks * fmt.block_size;
                KvWrite { page, slot: 0, row, rows: fmt.block_size.min(keys - row), clear_rest: true }
            })
            .collect();
        let (k, v) = self.kv.split_at(self.kv.len() / 2);
        roof.cpu.write_kv(&fmt, &mut writes, k, v);
    }
}
