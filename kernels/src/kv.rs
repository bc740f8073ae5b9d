//! The layout of a KV page: one layer's keys and values for one block of tokens. Knows bytes, not block tables or ownership.
//!
//! A page is K then V, each `[kv_heads][block_size][head_dim]`, so that the tokens of one head are contiguous: attention
//! streams a head, and a page is one contiguous range to ship.

use crate::quant::{f32_to_bf16, f32_to_f16};

/// Element type of cached keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KvDtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl KvDtype {
    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 | KvDtype::BF16 => 2,
        }
    }
}

/// Shape of a KV page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct KvFormat {
    /// Element type.
    pub dtype: KvDtype,
    /// Key/value heads of the layer.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Tokens per page.
    pub block_size: usize,
}

impl KvFormat {
    /// Bytes of one page: keys and values of `block_size` tokens.
    pub fn page_bytes(&self) -> usize {
        2 * self.half_bytes()
    }

    /// Writes one token's key and value, each `[kv_heads * head_dim]`, into `slot`, rounding to nearest even.
    ///
    /// Panics if a length or the slot does not fit the format.
    pub fn write(&self, page: &mut [u8], slot: usize, k: &[f32], v: &[f32]) {
        assert_eq!(page.len(), self.page_bytes());
        assert!(slot < self.block_size);
        assert_eq!(k.len(), self.kv_heads * self.head_dim);
        assert_eq!(v.len(), self.kv_heads * self.head_dim);
        let (keys, values) = page.split_at_mut(self.half_bytes());
        for head in 0..self.kv_heads {
            let elements = head * self.head_dim..(head + 1) * self.head_dim;
            let bytes = self.row(head, slot);
            encode(self.dtype, &k[elements.clone()], &mut keys[bytes.clone()]);
            encode(self.dtype, &v[elements], &mut values[bytes]);
        }
    }

    /// Zeroes every slot from `from_slot` on, so that a partly filled page has defined bytes when it is hashed or shipped.
    pub fn zero_tail(&self, page: &mut [u8], from_slot: usize) {
        assert_eq!(page.len(), self.page_bytes());
        assert!(from_slot <= self.block_size);
        let row = self.head_dim * self.dtype.bytes();
        if row == 0 || self.block_size == 0 {
            return;
        }
        for head in page.chunks_exact_mut(self.block_size * row) {
            head[from_slot * row..].fill(0);
        }
    }

    /// Bytes of the keys alone, or of the values alone.
    pub(crate) fn half_bytes(&self) -> usize {
        self.kv_heads * self.block_size * self.head_dim * self.dtype.bytes()
    }

    /// Byte range, within the keys or within the values, of one head's vector for one slot.
    #[inline(always)]
    pub(crate) fn row(&self, head: usize, slot: usize) -> std::ops::Range<usize> {
        let row = self.head_dim * self.dtype.bytes();
        let start = (head * self.block_size + slot) * row;
        start..start + row
    }
}

fn encode(dtype: KvDtype, src: &[f32], dst: &mut [u8]) {
    match dtype {
        KvDtype::F32 => {
            for (s, d) in src.iter().zip(dst.as_chunks_mut::<4>().0) {
                *d = s.to_le_bytes();
            }
        }
        KvDtype::F16 => {
            for (&s, d) in src.iter().zip(dst.as_chunks_mut::<2>().0) {
                *d = f32_to_f16(s).to_le_bytes();
            }
        }
        KvDtype::BF16 => {
            for (&s, d) in src.iter().zip(dst.as_chunks_mut::<2>().0) {
                *d = f32_to_bf16(s).to_le_bytes();
            }
        }
    }
}

/// A run of consecutive queries of one sequence, and the pages that hold its keys and values.
#[derive(Clone, Copy, Debug)]
pub struct AttentionItem<'a> {
    /// The sequence's pages in order; position `p` is slot `p % block_size` of page `p / block_size`.
    pub pages: &'a [&'a [u8]],
    /// Row of `q` and `out` that holds the first query.
    pub first_row: usize,
    /// Number of queries.
    pub rows: usize,
    /// Absolute position of the first query. The query at position `p` attends keys `0..=p`, or with a sliding window `w` only
    /// the last `w` of them.
    pub start: usize,
}

impl AttentionItem<'_> {
    /// First key the query at position `pos` attends.
    #[inline(always)]
    pub(crate) fn first_key(pos: usize, window: Option<usize>) -> usize {
        window.map_or(0, |w| (pos + 1).saturating_sub(w.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_head_major_and_tails_clear() {
        let fmt = KvFormat { dtype: KvDtype::F32, kv_heads: 2, head_dim: 3, block_size: 2 };
        let mut page = vec![0xff; fmt.page_bytes()];
        fmt.write(&mut page, 0, &[0., 1., 2., 3., 4., 5.], &[6., 7., 8., 9., 10., 11.]);
        fmt.zero_tail(&mut page, 1);
        let floats: Vec<f32> = page.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let expected =
            [0., 1., 2., 0., 0., 0., 3., 4., 5., 0., 0., 0., 6., 7., 8., 0., 0., 0., 9., 10., 11., 0., 0., 0.];
        assert_eq!(floats, expected);
    }
}
