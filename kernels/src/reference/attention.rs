//! Causal attention over pages by its definition: all scores of a query, a softmax, a weighted sum.

use crate::dtype::DType;
use crate::kv::{AttentionItem, KvDtype, KvFormat};
use crate::quant::dequantize_row;

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
fn read(fmt: &KvFormat, item: &AttentionItem<'_>, kv_head: usize, pos: usize) -> (Vec<f32>, Vec<f32>) {
    let (keys, values) = item.pages[pos / fmt.block_size].split_at(fmt.half_bytes());
    let bytes = fmt.row(kv_head, pos % fmt.block_size);
    let dtype = match fmt.dtype {
        KvDtype::F32 => DType::F32,
        KvDtype::F16 => DType::F16,
        KvDtype::BF16 => DType::BF16,
    };
    let mut k = vec![0.0; fmt.head_dim];
    let mut v = vec![0.0; fmt.head_dim];
    dequantize_row(dtype, &keys[bytes.clone()], &mut k);
    dequantize_row(dtype, &values[bytes], &mut v);
    (k, v)
}
