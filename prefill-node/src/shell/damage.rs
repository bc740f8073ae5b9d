//! Memory that fails, on purpose: `--chaos-corrupt-pages` flips a bit of a page between its digest and the wire. Only tests ask
//! for it; what it shows is that a receiver never lets such a page be read.

use bytes::{Bytes, BytesMut};
use ridge_kvtransfer::shell::process::Status;
use ridge_protocol::RequestId;

/// Damages one page of so many, and one of a transfer at most: a receiver gives a transfer up at its first bad page, so a
/// second one could not be found.
#[derive(Debug)]
pub(super) struct Damage {
    every: u32,
    pages: u32,
    last: Option<RequestId>,
}

impl Damage {
    /// Damages the `every`-th page, or the first one after it that is of a later transfer than the last damaged one.
    pub(super) fn new(every: u32) -> Self {
        Self { every, pages: 0, last: None }
    }

    /// The page as it is to be sent. Says on stdout that it is damaged, so that whoever tests can count.
    pub(super) fn apply(&mut self, request: RequestId, page: Bytes) -> Bytes {
        self.pages += 1;
        if self.pages < self.every || self.last.is_some_and(|last| request <= last) || page.is_empty() {
            return page;
        }
        self.pages = 0;
        self.last = Some(request);
        let mut page = BytesMut::from(&page[..]);
        let bit = request.0 as usize % (page.len() * 8);
        page[bit / 8] ^= 1 << (bit % 8);
        Status::Corrupted.print();
        page.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_of_every_third_page_and_one_page_of_a_transfer() {
        let mut damage = Damage::new(3);
        let page = Bytes::from_static(&[0; 16]);
        let bits = |page: Bytes| page.iter().map(|byte| byte.count_ones()).sum::<u32>();
        let mut apply = |request: u64| bits(damage.apply(RequestId(request), page.clone()));
        assert_eq!([1, 1, 1, 1, 1, 1, 1].map(&mut apply), [0, 0, 1, 0, 0, 0, 0]);
        assert_eq!([2, 2, 2, 2, 3].map(&mut apply), [1, 0, 0, 0, 1]);
    }
}
