//! Copying a page and computing its digest in one pass.
//!
//! A page's digest costs a fifth of copying it when it is computed afterwards, and next to nothing while bytes are on their way
//! through the registers: memory is what a copy waits for.

use super::dispatch::{Isa, Kernels};
use super::generic::digest::{Lanes, SECRET, STRIPE, words};

const PRIME32: [u64; 3] = [0x9e37_79b1, 0x85eb_ca77, 0xc2b2_ae3d];
const PRIME64: [u64; 5] =
    [0x9e37_79b1_85eb_ca87, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0x85eb_ca77_c2b2_ae63, 0x27d4_eb2f_1656_67c5];

/// XXH3's default secret, as little-endian words.
const DEFAULT_SECRET: [u64; SECRET / 8] = [
    0xbe4b_a423_396c_feb8,
    0x1cad_21f7_2c81_017c,
    0xdb97_9083_e96d_d4de,
    0x1f67_b3b7_a4a4_4072,
    0x78e5_c0cc_4ee6_79cb,
    0x2172_ffcc_7dd0_5a82,
    0x8e24_43f7_7446_08b8,
    0x4c26_3a81_e690_35e0,
    0xcb00_c391_bb52_283c,
    0xa32e_531b_8b65_d088,
    0x4ef9_0da2_9748_6471,
    0xd8ac_dea9_46ef_1938,
    0x3f34_9ce3_3f76_faa8,
    0x1d4f_0bc7_c7bb_dcf9,
    0x3159_b4cd_4be0_518a,
    0x6473_78d9_c97e_9fc8,
    0xc3eb_d334_83ac_c5ea,
    0xeb63_13fa_ffa0_81c5,
    0x49da_f0b7_51dd_0d17,
    0x9e68_d429_2655_16d3,
    0xfca1_477d_58be_162b,
    0xce31_d07a_d1b8_f88f,
    0x2804_1695_8f3a_cb45,
    0x7e40_4bbb_cafb_d7af,
];

/// Where a copy is written to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyTo {
    /// Through the caches: it is read again at once.
    Caches,
    /// Around them: it is read later, and then by somebody else. Half the traffic, as lines are not read before they are written.
    Memory,
}

/// Bytes on their way to a page, which come in pieces and whose digest is computed meanwhile: XXH3-128 with a seed
/// (<https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>), the same on every ISA.
pub struct DigestedCopy<'a> {
    to: &'a mut [u8],
    how: CopyTo,
    state: Lanes,
    /// A stripe that is not whole yet, or the last one.
    pending: [u8; STRIPE],
    pending_len: usize,
    kernels: &'static Kernels,
}

impl<'a> DigestedCopy<'a> {
    /// Whether pages of this many bytes can be copied so: whole stripes, and more than XXH3 takes for a short input.
    pub fn takes(bytes: usize) -> bool {
        bytes > 240 && bytes.is_multiple_of(STRIPE)
    }

    /// Nothing copied yet. Asserts [`takes`](Self::takes) of the page's length.
    pub fn new(to: &'a mut [u8], how: CopyTo, seed: u64) -> Self {
        let kernels = Kernels::of(Isa::detect()).expect("a detected ISA is available");
        Self::with_kernels(kernels, to, how, seed)
    }

    fn with_kernels(kernels: &'static Kernels, to: &'a mut [u8], how: CopyTo, seed: u64) -> Self {
        assert!(Self::takes(to.len()), "a page of {} bytes", to.len());
        // Stores around the caches are of whole, aligned lines.
        let how = if to.as_ptr().addr().is_multiple_of(STRIPE) { how } else { CopyTo::Caches };
        let mut secret = [0; SECRET];
        for (i, (bytes, word)) in secret.chunks_exact_mut(8).zip(DEFAULT_SECRET).enumerate() {
            let word = if i % 2 == 0 { word.wrapping_add(seed) } else { word.wrapping_sub(seed) };
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let [a, b, c] = PRIME32;
        let [p, q, r, s, t] = PRIME64;
        let state = Lanes { lanes: [c, p, q, r, s, b, t, a], secret, absorbed: 0 };
        Self { to, how, state, pending: [0; STRIPE], pending_len: 0, kernels }
    }

    /// Copies the next bytes.
    ///
    /// # Panics
    ///
    /// If they are more than the page has room for.
    pub fn push(&mut self, mut piece: &[u8]) {
        // The last stripe is absorbed otherwise, at the end.
        let regular = self.to.len() / STRIPE - 1;
        while !piece.is_empty() {
            let whole = (piece.len() / STRIPE).min(regular - self.state.absorbed);
            if self.pending_len == 0 && whole > 0 {
                let (stripes, rest) = piece.split_at(whole * STRIPE);
                self.pass(stripes);
                piece = rest;
                continue;
            }
            let room = STRIPE - self.pending_len;
            assert!(room > 0, "more than the {} bytes of the page", self.to.len());
            let (head, rest) = piece.split_at(room.min(piece.len()));
            self.pending[self.pending_len..][..head.len()].copy_from_slice(head);
            self.pending_len += head.len();
            piece = rest;
            if self.pending_len == STRIPE && self.state.absorbed < regular {
                let stripe = self.pending;
                self.pass(&stripe);
                self.pending_len = 0;
            }
        }
    }

    /// Copies whole stripes.
    fn pass(&mut self, from: &[u8]) {
        let to = &mut self.to[self.state.absorbed * STRIPE..][..from.len()];
        let (stripes, around_caches) = (from.len() / STRIPE, self.how == CopyTo::Memory);
        // SAFETY: the table proves the features; both sides are so long, and `to` is borrowed mutably, so nothing overlaps it; it
        // is aligned if `how` says so, as stripes were copied to it before.
        unsafe { (self.kernels.copy_digested)(&mut self.state, from.as_ptr(), to.as_mut_ptr(), stripes, around_caches) }
    }

    /// The digest of the whole page.
    ///
    /// # Panics
    ///
    /// If bytes are missing.
    pub fn finish(mut self) -> u128 {
        let len = self.to.len();
        let copied = self.state.absorbed * STRIPE + self.pending_len;
        assert!(copied == len, "{copied} bytes of {len}");
        self.to[len - STRIPE..].copy_from_slice(&self.pending);
        self.state.absorb(&words(&self.pending, 0), SECRET - STRIPE - 7);
        let len = len as u64;
        let low = merge(&self.state, 11, len.wrapping_mul(PRIME64[0]));
        let high = merge(&self.state, SECRET - STRIPE - 11, !len.wrapping_mul(PRIME64[1]));
        u128::from(high) << 64 | u128::from(low)
    }
}

impl Drop for DigestedCopy<'_> {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.how == CopyTo::Memory {
            // Writes around the caches are ordered by nothing else. SAFETY: every x86-64 has the instruction.
            unsafe { std::arch::x86_64::_mm_sfence() }
        }
    }
}

/// Half of a digest out of the lanes.
fn merge(state: &Lanes, at: usize, start: u64) -> u64 {
    let key = words(&state.secret, at);
    let mut hash = start;
    for i in [0, 2, 4, 6] {
        let product = u128::from(state.lanes[i] ^ key[i]) * u128::from(state.lanes[i + 1] ^ key[i + 1]);
        hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
    }
    hash ^= hash >> 37;
    hash = hash.wrapping_mul(0x1656_6791_9e37_79f9);
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use twox_hash::XxHash3_128;

    const SEED: u64 = 0x0123_4567_89ab_cdef;

    fn bytes(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    /// Copies `from` in pieces of these lengths, round and round.
    fn copy(isa: Isa, from: &[u8], pieces: &[usize], how: CopyTo, shift: usize) -> (Vec<u8>, u128) {
        let mut room = vec![0; from.len() + 2 * STRIPE];
        let start = room.as_ptr().align_offset(STRIPE) + shift;
        let to = &mut room[start..][..from.len()];
        let kernels = Kernels::of(isa).expect("available");
        let mut copy = DigestedCopy::with_kernels(kernels, to, how, SEED);
        let (mut rest, mut lengths) = (from, pieces.iter().cycle());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*lengths.next().expect("a cycle")).min(rest.len()));
            copy.push(piece);
            rest = after;
        }
        let digest = copy.finish();
        (to.to_vec(), digest)
    }

    #[test]
    fn it_is_xxh3_of_what_was_copied() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            // Around the ends of blocks of 1024 bytes, and pages of real models.
            for len in [256, 960, 1024, 1088, 1984, 2048, 2112, 4096, 32_768, 33_024] {
                let from = bytes(len);
                let want = XxHash3_128::oneshot_with_seed(SEED, &from);
                for pieces in [&[usize::MAX][..], &[1], &[63], &[64, 1, 127], &[1439], &[1000, 24]] {
                    for (how, shift) in [(CopyTo::Caches, 0), (CopyTo::Memory, 0), (CopyTo::Memory, 3)] {
                        let got = copy(isa, &from, pieces, how, shift);
                        assert_eq!(got, (from.clone(), want), "{isa:?}, {len} bytes in {pieces:?}, {how:?} + {shift}");
                    }
                }
            }
        }
    }

    #[test]
    fn short_and_odd_pages_are_not_taken() {
        assert!([0, 64, 192, 240, 300].iter().all(|&bytes| !DigestedCopy::takes(bytes)));
        assert!(DigestedCopy::takes(256));
    }

    #[test]
    #[should_panic(expected = "255 bytes of 256")]
    fn missing_bytes_are_noticed() {
        let mut page = [0; 256];
        let mut copy = DigestedCopy::new(&mut page, CopyTo::Caches, SEED);
        copy.push(&[0; 255]);
        copy.finish();
    }

    #[test]
    #[should_panic(expected = "more than the 256 bytes")]
    fn too_many_bytes_are_noticed() {
        let mut page = [0; 256];
        DigestedCopy::new(&mut page, CopyTo::Caches, SEED).push(&[0; 257]);
    }
}
