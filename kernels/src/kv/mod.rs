//! The layout of a KV page: one layer's keys and values for one block of tokens. Knows bytes, not block tables or ownership.
//!
//! ```text
//! keys    [kv_heads][head_dim][block_size]
//! values  [kv_heads][block_size][head_dim]
//! and with int8:  scales of the keys [kv_heads][block_size], then of the values, f32
//! ```
//!
//! Keys are stored transposed: one load reads the same element of neighbouring keys, so that scores are computed for
//! several keys at a time, each as one chain of multiply-adds over the head's elements, without turning or adding up lanes.
//! Values are weighed element by element and lie as they come. A head's keys, and its values, are one contiguous range.
//!
//! A token's bytes depend on that token alone (int8 has a scale per token and head), so a page does not depend on how a
//! prompt was cut into chunks.

mod codec;
mod convert;

use codec::{Bf16, Code, F16, F32, Fp8, Int8};

pub use codec::{e4m3_to_f32, f32_to_e4m3};
pub use convert::KvMove;

/// Element type of cached keys and values. All round to nearest even.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KvDtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// OCP 8-bit float E4M3 without scale; larger magnitudes (infinity too) become 448, NaN stays NaN.
    Fp8,
    /// 8-bit integers times one f32 scale per token and head, for keys and for values: the largest magnitude / 127. The scale
    /// is f32 because in f16 those of small vectors would be subnormal; it costs 3 % of a head of 64. A vector with a NaN or an
    /// infinity reads as NaN throughout.
    Int8,
}

impl KvDtype {
    /// Every type.
    pub const ALL: [KvDtype; 5] = [KvDtype::F32, KvDtype::F16, KvDtype::BF16, KvDtype::Fp8, KvDtype::Int8];

    /// The name on the command line and in a model's identity.
    pub const fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::BF16 => "bf16",
            KvDtype::Fp8 => "fp8",
            KvDtype::Int8 => "int8",
        }
    }

    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 | KvDtype::BF16 => 2,
            KvDtype::Fp8 | KvDtype::Int8 => 1,
        }
    }

    /// Bytes of scale per token and head, for the key and again for the value.
    pub const fn scale_bytes(self) -> usize {
        match self {
            KvDtype::Int8 => 4,
            KvDtype::F32 | KvDtype::F16 | KvDtype::BF16 | KvDtype::Fp8 => 0,
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
        2 * self.kv_heads * self.block_size * (self.head_dim * self.dtype.bytes() + self.dtype.scale_bytes())
    }

    /// Writes the keys and values of consecutive tokens, each `[tokens, kv_heads * head_dim]`, into the slots from `slot` on.
    ///
    /// Panics if a length or a slot does not fit the format. [`crate::Cpu::write_kv`] does the same with the machine's vectors
    /// and threads, to the same bits.
    pub fn write(&self, page: &mut [u8], slot: usize, k: &[f32], v: &[f32]) {
        self.fill(page, slot, k, v);
    }

    /// The body of [`Self::write`], inlined so that each ISA compiles its own copy.
    #[inline(always)]
    pub(crate) fn fill(&self, page: &mut [u8], slot: usize, k: &[f32], v: &[f32]) {
        let width = self.kv_heads * self.head_dim;
        assert_eq!(page.len(), self.page_bytes());
        assert_eq!(k.len(), v.len());
        assert!(k.len().is_multiple_of(width) && slot + k.len() / width <= self.block_size);
        match self.dtype {
            KvDtype::F32 => self.encode::<F32, 4>(page, slot, k, v),
            KvDtype::F16 => self.encode::<F16, 2>(page, slot, k, v),
            KvDtype::BF16 => self.encode::<Bf16, 2>(page, slot, k, v),
            KvDtype::Fp8 => self.encode::<Fp8, 1>(page, slot, k, v),
            KvDtype::Int8 => self.encode::<Int8, 1>(page, slot, k, v),
        }
    }

    #[inline(always)]
    fn encode<C: Code<N>, const N: usize>(&self, page: &mut [u8], slot: usize, k: &[f32], v: &[f32]) {
        let (dim, width) = (self.head_dim, self.kv_heads * self.head_dim);
        for head in 0..self.kv_heads {
            let elements = head * dim..(head + 1) * dim;
            for (i, k) in k.chunks_exact(width).enumerate() {
                self.put_scale(page, self.key_scale(head, slot + i), C::scale(&k[elements.clone()]));
            }
            for (i, v) in v.chunks_exact(width).enumerate() {
                let v = &v[elements.clone()];
                let scale = C::scale(v);
                self.put_scale(page, self.value_scale(head, slot + i), scale);
                let row = &mut page[self.value(head, slot + i)..][..dim * N];
                let factor = C::factor(scale);
                for (v, out) in v.iter().zip(row.as_chunks_mut::<N>().0) {
                    *out = C::encode(*v, factor);
                }
            }
            self.encode_keys::<C, N>(page, head, slot, &k[head * dim..]);
        }
    }

    /// Writes one head's keys; `k` starts at the head's first element of the first token.
    #[inline(always)]
    fn encode_keys<C: Code<N>, const N: usize>(&self, page: &mut [u8], head: usize, slot: usize, k: &[f32]) {
        // Encoding runs along a token, storing along the slots: a small tile in between lets each have its neighbours.
        const TOKENS: usize = 16;
        const ELEMENTS: usize = 64;
        let (dim, width) = (self.head_dim, self.kv_heads * self.head_dim);
        let tokens = k.len().div_ceil(width);
        let mut tile = [[[0u8; N]; ELEMENTS]; TOKENS];
        for first in (0..tokens).step_by(TOKENS) {
            let count = TOKENS.min(tokens - first);
            for from in (0..dim).step_by(ELEMENTS) {
                let elements = ELEMENTS.min(dim - from);
                for (i, coded) in tile[..count].iter_mut().enumerate() {
                    let key = &k[(first + i) * width..][..dim];
                    let factor = C::factor(C::scale(key));
                    for (v, out) in key[from..from + elements].iter().zip(coded) {
                        *out = C::encode(*v, factor);
                    }
                }
                for d in 0..elements {
                    let row = &mut page[self.key(head, from + d, slot + first)..][..count * N];
                    for (coded, out) in tile.iter().zip(row.as_chunks_mut::<N>().0) {
                        *out = coded[d];
                    }
                }
            }
        }
    }

    /// Nothing for types without scales.
    #[inline(always)]
    fn put_scale(&self, page: &mut [u8], at: usize, scale: f32) {
        if self.dtype.scale_bytes() == 4 {
            page[at..at + 4].copy_from_slice(&scale.to_le_bytes());
        }
    }

    /// Zeroes every slot from `from_slot` on, so that a partly filled page has defined bytes when it is hashed or shipped.
    pub fn zero_tail(&self, page: &mut [u8], from_slot: usize) {
        assert_eq!(page.len(), self.page_bytes());
        assert!(from_slot <= self.block_size);
        if self.kv_heads * self.head_dim * (self.block_size - from_slot) == 0 {
            return;
        }
        let element = self.dtype.bytes();
        let mut clear = |bytes: std::ops::Range<usize>, slot_bytes: usize| {
            if slot_bytes > 0 {
                for slots in page[bytes].chunks_exact_mut(self.block_size * slot_bytes) {
                    slots[from_slot * slot_bytes..].fill(0);
                }
            }
        };
        clear(0..self.value(0, 0), element);
        clear(self.value(0, 0)..self.key_scale(0, 0), self.head_dim * element);
        clear(self.key_scale(0, 0)..self.page_bytes(), self.dtype.scale_bytes());
    }

    /// Where element `d` of the key in a slot lies; the next slot's is beside it, the next element's `block_size` further.
    #[inline(always)]
    pub(crate) fn key(&self, head: usize, d: usize, slot: usize) -> usize {
        ((head * self.head_dim + d) * self.block_size + slot) * self.dtype.bytes()
    }

    /// Where the value in a slot begins.
    #[inline(always)]
    pub(crate) fn value(&self, head: usize, slot: usize) -> usize {
        ((self.kv_heads + head) * self.block_size + slot) * self.head_dim * self.dtype.bytes()
    }

    /// Where the scale of the key in a slot lies, if the type has scales.
    #[inline(always)]
    pub(crate) fn key_scale(&self, head: usize, slot: usize) -> usize {
        self.value(self.kv_heads, 0) + (head * self.block_size + slot) * self.dtype.scale_bytes()
    }

    /// Where the scale of the value in a slot lies, if the type has scales.
    #[inline(always)]
    pub(crate) fn value_scale(&self, head: usize, slot: usize) -> usize {
        self.key_scale(self.kv_heads + head, slot)
    }
}

/// Consecutive tokens to be written into one page.
pub struct KvWrite<'a> {
    /// The page.
    pub page: &'a mut [u8],
    /// Slot of the first token.
    pub slot: usize,
    /// Its row among the keys and values.
    pub row: usize,
    /// Number of tokens.
    pub rows: usize,
    /// Whether to zero the slots after them: the block is new, and what an earlier owner left must never be shipped.
    pub clear_rest: bool,
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn keys_are_transposed_and_tails_clear() {
        let fmt = KvFormat { dtype: KvDtype::F32, kv_heads: 2, head_dim: 3, block_size: 2 };
        let mut page = vec![0xff; fmt.page_bytes()];
        fmt.write(&mut page, 0, &[0., 1., 2., 3., 4., 5.], &[6., 7., 8., 9., 10., 11.]);
        fmt.zero_tail(&mut page, 1);
        let floats: Vec<f32> = page.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let expected =
            [0., 0., 1., 0., 2., 0., 3., 0., 4., 0., 5., 0., 6., 7., 8., 0., 0., 0., 9., 10., 11., 0., 0., 0.];
        assert_eq!(floats, expected);
    }

    /// Tokens written together or one by one, and over whatever was there, give the same page.
    #[test]
    fn a_page_depends_on_its_tokens_alone() {
        let mut random = Random::new(9);
        for dtype in KvDtype::ALL {
            for (head_dim, block_size, tokens) in [(5, 7, 4), (64, 16, 16), (80, 48, 37), (128, 1, 1)] {
                let fmt = KvFormat { dtype, kv_heads: 3, head_dim, block_size };
                let width = 3 * head_dim;
                let (k, v) = (random.vector(tokens * width), random.vector(tokens * width));
                let mut together = vec![0xff; fmt.page_bytes()];
                fmt.write(&mut together, 0, &k, &v);
                fmt.zero_tail(&mut together, tokens);
                let mut single = vec![0x55; fmt.page_bytes()];
                fmt.zero_tail(&mut single, 0);
                assert!(single.iter().all(|byte| *byte == 0), "{dtype:?}: a tail from 0 is the page");
                for slot in 0..tokens {
                    let token = slot * width..(slot + 1) * width;
                    fmt.write(&mut single, slot, &k[token.clone()], &v[token]);
                }
                assert!(single == together, "{dtype:?} {head_dim} {block_size}");
            }
        }
    }
}
