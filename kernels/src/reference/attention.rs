//! Causal attention over pages by its definition: all scores of a query, a softmax, a weighted sum.

use crate::kv::{AttentionItem, KvDtype, KvFormat, e4m3_to_f32};
use crate::quant::{bf16_to_f32, f16_to_f32};

/// Attention of every query of every item; `q` and `out` are `[rows, heads, head_dim]`. Query head `h` reads key/value head
/// `h / (heads / kv_heads)`.
pub fn attention(
    fmt: &KvFormat,
    items: &[AttentionItem<'_>],
    heads: usize,
    scale: f32,
    window: Option<usize>,
    q: &[f32],
    out: &mut [f32],
) {
    let dim = fmt.head_dim;
    for item in items {
        for i in 0..item.rows {
            let pos = item.start + i;
            for head in 0..heads {
                let at = ((item.first_row + i) * heads + head) * dim;
                let kv_head = head / (heads / fmt.kv_heads);
                let keys = AttentionItem::first_key(pos, window)..=pos;
                let mut p: Vec<f32> = keys
                    .clone()
                    .map(|key| {
                        let (k, _) = read(fmt, item, kv_head, key);
                        scale * k.iter().zip(&q[at..]).map(|(a, b)| a * b).sum::<f32>()
                    })
                    .collect();
                super::softmax(&mut p);
                let mut sum = vec![0.0f64; dim];
                for (p, key) in p.iter().zip(keys) {
                    let (_, v) = read(fmt, item, kv_head, key);
                    for (s, v) in sum.iter_mut().zip(v) {
                        *s += f64::from(*p) * f64::from(v);
                    }
                }
                for (out, s) in out[at..][..dim].iter_mut().zip(sum) {
                    *out = s as f32;
                }
            }
        }
    }
}

/// The key and value of one head at one position.
pub(crate) fn read(fmt: &KvFormat, item: &AttentionItem<'_>, kv_head: usize, pos: usize) -> (Vec<f32>, Vec<f32>) {
    let (page, slot) = (item.pages[pos / fmt.block_size], pos % fmt.block_size);
    let key_scale = scale(fmt, page, fmt.key_scale(kv_head, slot));
    let value_scale = scale(fmt, page, fmt.value_scale(kv_head, slot));
    let value = fmt.value(kv_head, slot);
    (0..fmt.head_dim)
        .map(|d| {
            let key = element(fmt.dtype, &page[fmt.key(kv_head, d, slot)..]) * key_scale;
            (key, element(fmt.dtype, &page[value + d * fmt.dtype.bytes()..]) * value_scale)
        })
        .unzip()
}

/// The element that some bytes begin with, without its scale.
fn element(dtype: KvDtype, bytes: &[u8]) -> f32 {
    match dtype {
        KvDtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        KvDtype::F16 => f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
        KvDtype::BF16 => bf16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
        KvDtype::Fp8 => e4m3_to_f32(bytes[0]),
        KvDtype::Int8 => f32::from(bytes[0] as i8),
    }
}

fn scale(fmt: &KvFormat, page: &[u8], at: usize) -> f32 {
    match fmt.dtype.scale_bytes() {
        0 => 1.0,
        _ => element(KvDtype::F32, &page[at..]),
    }
}
