//! Pages made from pages of another format: other numbers of tokens, other element types.
//!
//! A token's bytes depend on that token alone, so a conversion goes token by token: what comes out is what
//! [`KvFormat::write`] would have written from the values that went in. Within one type that is the same bytes at another
//! place. Both layouts keep keys transposed, so nothing is turned: a row of a head's keys becomes a row.

use super::KvFormat;
use super::codec::{Bf16, Code, F16, F32, Float, Fp8, Int8};
use crate::KvDtype;

/// Consecutive tokens that are copied from a page into a page of another format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvMove {
    /// Slot of the first token in the page that has it.
    pub from: usize,
    /// Its slot in the page that gets it.
    pub to: usize,
    /// How many tokens.
    pub tokens: usize,
}

impl KvFormat {
    /// Writes tokens of `page`, a page of this format, into `out`, a page of format `to`.
    ///
    /// Float types become any type, rounded to nearest even as in [`KvFormat::write`]; 8-bit types only stay what they are.
    ///
    /// Panics if another type is asked of 8 bits, if the heads differ, or if a length or a slot does not fit.
    /// [`crate::convert_kv`] does the same with the machine's vectors, to the same bytes.
    pub fn convert(&self, page: &[u8], to: &KvFormat, out: &mut [u8], moved: KvMove) {
        self.recast(page, to, out, moved);
    }

    /// The body of [`Self::convert`], inlined so that each ISA compiles its own copy.
    #[inline(always)]
    pub(crate) fn recast(&self, page: &[u8], to: &KvFormat, out: &mut [u8], moved: KvMove) {
        assert_eq!((self.kv_heads, self.head_dim), (to.kv_heads, to.head_dim), "heads of one model");
        assert_eq!((page.len(), out.len()), (self.page_bytes(), to.page_bytes()));
        assert!(moved.from + moved.tokens <= self.block_size, "{moved:?} from {} slots", self.block_size);
        assert!(moved.to + moved.tokens <= to.block_size, "{moved:?} into {} slots", to.block_size);
        if moved.tokens == 0 {
            return;
        }
        if self.dtype == to.dtype {
            return self.copy_slots(page, to, out, moved);
        }
        match self.dtype {
            KvDtype::F32 => self.recode_from::<F32, 4>(page, to, out, moved),
            KvDtype::F16 => self.recode_from::<F16, 2>(page, to, out, moved),
            KvDtype::BF16 => self.recode_from::<Bf16, 2>(page, to, out, moved),
            KvDtype::Fp8 | KvDtype::Int8 => panic!("{} is not converted into {}", self.dtype.name(), to.dtype.name()),
        }
    }

    /// The same bytes at another place.
    fn copy_slots(&self, page: &[u8], to: &KvFormat, out: &mut [u8], KvMove { from, to: at, tokens }: KvMove) {
        let mut copy = |source: usize, target: usize, bytes: usize| {
            out[target..target + bytes].copy_from_slice(&page[source..source + bytes]);
        };
        let (element, scale) = (self.dtype.bytes(), self.dtype.scale_bytes());
        for head in 0..self.kv_heads {
            for d in 0..self.head_dim {
                copy(self.key(head, d, from), to.key(head, d, at), tokens * element);
            }
            copy(self.value(head, from), to.value(head, at), tokens * self.head_dim * element);
            copy(self.key_scale(head, from), to.key_scale(head, at), tokens * scale);
            copy(self.value_scale(head, from), to.value_scale(head, at), tokens * scale);
        }
    }

    #[inline(always)]
    fn recode_from<S: Float<M>, const M: usize>(&self, page: &[u8], to: &KvFormat, out: &mut [u8], moved: KvMove) {
        match to.dtype {
            KvDtype::F32 => self.recode::<S, M, F32, 4>(page, to, out, moved),
            KvDtype::F16 => self.recode::<S, M, F16, 2>(page, to, out, moved),
            KvDtype::BF16 => self.recode::<S, M, Bf16, 2>(page, to, out, moved),
            KvDtype::Fp8 => self.recode::<S, M, Fp8, 1>(page, to, out, moved),
            KvDtype::Int8 => self.recode::<S, M, Int8, 1>(page, to, out, moved),
        }
    }

    #[inline(always)]
    fn recode<S: Float<M>, const M: usize, C: Code<N>, const N: usize>(
        &self,
        page: &[u8],
        to: &KvFormat,
        out: &mut [u8],
        KvMove { from, to: at, tokens }: KvMove,
    ) {
        let (dim, scaled) = (self.head_dim, to.dtype.scale_bytes() > 0);
        // A head's elements, then the same coded: with these in between, each step is a plain loop over neighbours.
        let mut elements = vec![0.0; dim * tokens];
        let mut coded = vec![[0; N]; dim * tokens];
        // Of each token's key: the largest magnitude, as in `Code::scale`, and what to multiply by.
        let (mut largest, mut factors) = (vec![0; tokens], vec![1.0; tokens]);
        for head in 0..self.kv_heads {
            for (d, row) in elements.chunks_exact_mut(tokens).enumerate() {
                decode_all::<S, M>(&page[self.key(head, d, from)..][..tokens * M], row);
            }
            if scaled {
                largest.fill(0);
                for row in elements.chunks_exact(tokens) {
                    for (v, largest) in row.iter().zip(&mut largest) {
                        *largest = (v.to_bits() & 0x7fff_ffff).max(*largest);
                    }
                }
                for (i, (largest, factor)) in largest.iter().zip(&mut factors).enumerate() {
                    let scale = C::scale_of(f32::from_bits(*largest));
                    to.put_scale(out, to.key_scale(head, at + i), scale);
                    *factor = C::factor(scale);
                }
                for (row, coded) in elements.chunks_exact(tokens).zip(coded.chunks_exact_mut(tokens)) {
                    for ((v, factor), coded) in row.iter().zip(&factors).zip(coded) {
                        *coded = C::encode(*v, *factor);
                    }
                }
            } else {
                encode_all::<C, N>(&elements, 1.0, &mut coded);
            }
            for (d, row) in coded.chunks_exact(tokens).enumerate() {
                out[to.key(head, d, at)..][..tokens * N].copy_from_slice(row.as_flattened());
            }

            decode_all::<S, M>(&page[self.value(head, from)..][..tokens * dim * M], &mut elements);
            if scaled {
                let values = elements.chunks_exact(dim).zip(coded.chunks_exact_mut(dim));
                for (i, (value, coded)) in values.enumerate() {
                    let scale = C::scale(value);
                    to.put_scale(out, to.value_scale(head, at + i), scale);
                    encode_all::<C, N>(value, C::factor(scale), coded);
                }
            } else {
                encode_all::<C, N>(&elements, 1.0, &mut coded);
            }
            out[to.value(head, at)..][..tokens * dim * N].copy_from_slice(coded.as_flattened());
        }
    }
}

#[inline(always)]
fn decode_all<S: Float<M>, const M: usize>(from: &[u8], to: &mut [f32]) {
    for (bytes, v) in from.as_chunks::<M>().0.iter().zip(to) {
        *v = S::decode(*bytes);
    }
}

#[inline(always)]
fn encode_all<C: Code<N>, const N: usize>(from: &[f32], factor: f32, to: &mut [[u8; N]]) {
    for (v, coded) in from.iter().zip(to) {
        *coded = C::encode(*v, factor);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::quant::{bf16_to_f32, f16_to_f32};
    use crate::testing::Random;

    const FLOATS: [KvDtype; 3] = [KvDtype::F32, KvDtype::F16, KvDtype::BF16];

    /// Ordinary values of every size, and now and then one that a type cannot hold.
    fn values(random: &mut Random, len: usize) -> Vec<f32> {
        let odd = [f32::NAN, f32::INFINITY, -f32::INFINITY, 1e30, -1e-30, 70_000.0, 1e-42, -0.0, 448.0, 464.0];
        let one = |random: &mut Random| match random.within(0, 99) {
            0 => odd[random.within(0, odd.len() - 1)],
            power => random.normal() * 2f32.powi(power as i32 % 20 - 14),
        };
        (0..len).map(|_| one(random)).collect()
    }

    /// Keys and values of a slot as f32, all heads of it, read element by element.
    fn read(fmt: &KvFormat, page: &[u8], slot: usize) -> (Vec<f32>, Vec<f32>) {
        let element = |at: usize| match fmt.dtype {
            KvDtype::F32 => f32::from_le_bytes(page[at..at + 4].try_into().unwrap()),
            KvDtype::F16 => f16_to_f32(u16::from_le_bytes(page[at..at + 2].try_into().unwrap())),
            KvDtype::BF16 => bf16_to_f32(u16::from_le_bytes(page[at..at + 2].try_into().unwrap())),
            KvDtype::Fp8 | KvDtype::Int8 => unreachable!("only floats are read here"),
        };
        let places = || (0..fmt.kv_heads).flat_map(|head| (0..fmt.head_dim).map(move |d| (head, d)));
        let keys = places().map(|(head, d)| element(fmt.key(head, d, slot)));
        let values = places().map(|(head, d)| element(fmt.value(head, slot) + d * fmt.dtype.bytes()));
        (keys.collect(), values.collect())
    }

    /// Fills pages of one format, converts them into pages of another, and compares with writing there at once.
    fn check(from: KvFormat, to: KvFormat, seed: u64, wanted: impl Fn(&[Vec<u8>], usize) -> (Vec<f32>, Vec<f32>)) {
        let mut random = Random::new(seed);
        let width = from.kv_heads * from.head_dim;
        let tokens = random.within(1, 3 * from.block_size.max(to.block_size));
        let (k, v) = (values(&mut random, tokens * width), values(&mut random, tokens * width));
        let mut pages = vec![vec![0x55; from.page_bytes()]; tokens.div_ceil(from.block_size)];
        let mut got = vec![vec![0; to.page_bytes()]; tokens.div_ceil(to.block_size)];
        let mut want = got.clone();
        for token in 0..tokens {
            let row = token * width..(token + 1) * width;
            from.write(&mut pages[token / from.block_size], token % from.block_size, &k[row.clone()], &v[row.clone()]);
        }
        for token in 0..tokens {
            let (k, v) = wanted(&pages, token);
            to.write(&mut want[token / to.block_size], token % to.block_size, &k, &v);
        }
        let mut token = 0;
        while token < tokens {
            let slots = KvMove { from: token % from.block_size, to: token % to.block_size, tokens: 0 };
            let most = (from.block_size - slots.from).min(to.block_size - slots.to).min(tokens - token);
            let moved = KvMove { tokens: random.within(1, most), ..slots };
            from.convert(&pages[token / from.block_size], &to, &mut got[token / to.block_size], moved);
            token += moved.tokens;
        }
        assert!(got == want, "{from:?} into {to:?}, {tokens} tokens, seed {seed}");
    }

    fn formats(random: &mut Random, from: KvDtype, to: KvDtype) -> [KvFormat; 2] {
        let (kv_heads, head_dim) = (random.within(1, 3), [1, 5, 64, 80][random.within(0, 3)]);
        let sizes = [1, 3, 8, 16, 32, 48];
        [from, to].map(|dtype| {
            let block_size = sizes[random.within(0, sizes.len() - 1)];
            KvFormat { dtype, kv_heads, head_dim, block_size }
        })
    }

    #[test]
    fn a_converted_page_is_what_writing_would_have_given() {
        let mut random = Random::new(7);
        for source in FLOATS {
            for target in KvDtype::ALL {
                for seed in 0..20 {
                    let [from, to] = formats(&mut random, source, target);
                    check(from, to, seed, |pages, token| {
                        read(&from, &pages[token / from.block_size], token % from.block_size)
                    });
                }
            }
        }
    }

    /// What 8 bits hold cannot be read without rounding, but written with the same values it is the same bytes.
    #[test]
    fn eight_bits_move_as_they_are() {
        let mut random = Random::new(8);
        for dtype in [KvDtype::Fp8, KvDtype::Int8] {
            for seed in 0..20 {
                let [from, to] = formats(&mut random, dtype, dtype);
                // The very draws that `check` makes.
                let mut draws = Random::new(seed);
                let width = from.kv_heads * from.head_dim;
                let tokens = draws.within(1, 3 * from.block_size.max(to.block_size));
                let (k, v) = (values(&mut draws, tokens * width), values(&mut draws, tokens * width));
                check(from, to, seed, |_, token| {
                    let row = token * width..(token + 1) * width;
                    (k[row.clone()].to_vec(), v[row].to_vec())
                });
            }
        }
    }

    #[test]
    fn wider_types_hold_the_same_values() {
        let mut random = Random::new(9);
        for source in [KvDtype::F16, KvDtype::BF16] {
            let [from, to] = formats(&mut random, source, KvDtype::F32);
            let width = from.kv_heads * from.head_dim;
            let mut page = vec![0; from.page_bytes()];
            from.write(&mut page, 0, &random.vector(width), &random.vector(width));
            let mut out = vec![0; to.page_bytes()];
            from.convert(&page, &to, &mut out, KvMove { from: 0, to: 0, tokens: 1 });
            assert_eq!(read(&to, &out, 0), read(&from, &page, 0), "{source:?}");
        }
    }

    #[test]
    #[should_panic(expected = "int8 is not converted into bf16")]
    fn precision_is_not_made_up() {
        let [from, to] = [KvDtype::Int8, KvDtype::BF16];
        let [from, to] = [from, to].map(|dtype| KvFormat { dtype, kv_heads: 1, head_dim: 4, block_size: 2 });
        let mut out = vec![0; to.page_bytes()];
        from.convert(&vec![0; from.page_bytes()], &to, &mut out, KvMove { from: 0, to: 0, tokens: 1 });
    }
}
