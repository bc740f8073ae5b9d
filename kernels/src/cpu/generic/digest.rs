//! Stripes of 64 bytes, copied and absorbed by XXH3 in one pass over them.

use crate::cpu::vector::Vector;

/// Bytes that XXH3 absorbs at a time.
pub(crate) const STRIPE: usize = 64;
/// Stripes after which the lanes are scrambled.
const STRIPES_PER_BLOCK: usize = 16;
/// Bytes of the secret.
pub(crate) const SECRET: usize = 192;
const PRIME32_1: u64 = 0x9e37_79b1;

/// XXH3's state inside a long input (the specification's "large inputs").
pub(crate) struct Lanes {
    pub(crate) lanes: [u64; 8],
    pub(crate) secret: [u8; SECRET],
    /// Stripes absorbed, the last one of the input not being among them.
    pub(crate) absorbed: usize,
}

impl Lanes {
    /// Absorbs a stripe with the part of the secret that begins at `at`.
    pub(crate) fn absorb(&mut self, stripe: &[u64; 8], at: usize) {
        absorb(&mut self.lanes, stripe, &words(&self.secret, at));
    }
}

#[inline(always)]
fn absorb(lanes: &mut [u64; 8], stripe: &[u64; 8], key: &[u64; 8]) {
    for i in 0..8 {
        let mixed = stripe[i] ^ key[i];
        let product = (mixed & 0xffff_ffff).wrapping_mul(mixed >> 32);
        lanes[i] = lanes[i].wrapping_add(product).wrapping_add(stripe[i ^ 1]);
    }
}

#[inline(always)]
fn scramble(lanes: &mut [u64; 8], key: &[u64; 8]) {
    for i in 0..8 {
        lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ key[i]).wrapping_mul(PRIME32_1);
    }
}

/// The eight little-endian words from byte `at` on.
#[inline(always)]
pub(crate) fn words(bytes: &[u8], at: usize) -> [u64; 8] {
    let stripe: &[u8; STRIPE] = bytes[at..].first_chunk().expect("a stripe");
    std::array::from_fn(|i| u64::from_le_bytes(*stripe[8 * i..].first_chunk().expect("eight bytes")))
}

/// Copies `stripes` stripes and absorbs them, none of which is the input's last. With `around_caches`, what is written does not
/// displace what caches hold, nor is it read first; a fence is left to the caller.
///
/// # Safety
/// The CPU has `V`'s features; `from` is valid for reads and `to` for writes of so many stripes, which do not overlap; with
/// `around_caches`, `to` is aligned to a stripe.
#[inline(always)]
pub(crate) unsafe fn copy_digested<V: Vector>(
    state: &mut Lanes,
    from: *const u8,
    to: *mut u8,
    stripes: usize,
    around_caches: bool,
) {
    // SAFETY: by contract.
    unsafe {
        if around_caches {
            pass::<V, true>(state, from, to, stripes);
        } else {
            pass::<V, false>(state, from, to, stripes);
        }
    }
}

/// # Safety
/// As [`copy_digested`].
#[inline(always)]
unsafe fn pass<V: Vector, const AROUND: bool>(state: &mut Lanes, from: *const u8, to: *mut u8, stripes: usize) {
    // Of its own, so that it stays in registers.
    let mut lanes = state.lanes;
    for i in 0..stripes {
        let place = (state.absorbed + i) % STRIPES_PER_BLOCK;
        // SAFETY: by contract.
        let stripe = unsafe {
            let stripe = from.add(STRIPE * i).cast::<[u64; 8]>().read_unaligned();
            let to = to.add(STRIPE * i).cast::<[u64; 8]>();
            if AROUND {
                V::stream(to, &stripe)
            } else {
                to.write_unaligned(stripe)
            }
            stripe
        };
        absorb(&mut lanes, &stripe.map(u64::from_le), &words(&state.secret, 8 * place));
        if place + 1 == STRIPES_PER_BLOCK {
            scramble(&mut lanes, &words(&state.secret, SECRET - STRIPE));
        }
    }
    state.lanes = lanes;
    state.absorbed += stripes;
}
