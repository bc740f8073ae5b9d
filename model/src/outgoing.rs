//! Pages in their readers' blocks, which an engine made while it computed, until whoever sends them takes them.
//!
//! Where a prompt's reader keeps KV in another shape, a device converts its pages on their way to the host and the engine leaves them
//! here, besides the node's own pages in [`KvMemory`](crate::kv::KvMemory). A page that is not here (there was no room, or
//! it is of a cached prefix) is made of those: [`KvMemory::page_in`](crate::kv::KvMemory::page_in).
//!
//! Nothing outlives its hand-off: pages are kept of requests between [`Outgoing::open`] and [`Outgoing::close`] alone, so what a pass
//! still makes for one that was given up meanwhile is dropped. Nothing is larger than was planned: an engine makes a layer's pages if
//! [`Outgoing::claim`] has room for them.

use ridge_protocol::RequestId;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Layer, and index of the reader's block within the sequence.
type Place = (u32, u32);

/// The pages of all requests. Shared by the engine that makes them and the shell that ships them.
#[derive(Debug, Default)]
pub struct Outgoing(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// Bytes that pages and spare memory may take together.
    limit: usize,
    /// Bytes of the pages here, and of those for which an engine was given room.
    claimed: usize,
    requests: BTreeMap<RequestId, BTreeMap<Place, Box<[u8]>>>,
    taken: u64,
    /// Memory of earlier pages, to be used again: what is fresh from the system costs a page fault every 4 KiB.
    spare: Vec<Box<[u8]>>,
    spare_bytes: usize,
}

impl Outgoing {
    /// From now on there may be so many bytes; at first there may be none.
    pub fn allow(&self, bytes: usize) {
        self.lock().limit = bytes;
    }

    /// Pages of this request will be taken, or at last given up by [`Outgoing::close`].
    pub fn open(&self, request: RequestId) {
        self.lock().requests.entry(request).or_default();
    }

    /// Nobody takes pages of this request any more.
    pub fn close(&self, request: RequestId) {
        let mut kept = self.lock();
        for page in kept.requests.remove(&request).into_iter().flat_map(BTreeMap::into_values) {
            kept.recycle(page);
        }
    }

    /// Whether there is room for so many bytes of pages, which are then to be [`put`](Outgoing::put) here.
    pub fn claim(&self, bytes: usize) -> bool {
        let mut kept = self.lock();
        if kept.claimed + bytes > kept.limit {
            return false;
        }
        kept.claimed += bytes;
        while kept.claimed + kept.spare_bytes > kept.limit {
            let page = kept.spare.pop().expect("spare bytes are of spare pages");
            kept.spare_bytes -= page.len();
        }
        true
    }

    /// Keeps a copy of a page, for which room was claimed; of a request that is not open, nothing.
    pub fn put(&self, request: RequestId, layer: u32, index: u32, page: &[u8]) {
        let mut kept = self.lock();
        if !kept.requests.contains_key(&request) {
            kept.claimed -= page.len();
            return;
        }
        let copy = kept.copy(page);
        let pages = kept.requests.get_mut(&request).expect("just seen");
        if let Some(before) = pages.insert((layer, index), copy) {
            kept.recycle(before);
        }
    }

    /// Fills `page`, whatever it held, with a page that is here, which then is no longer. Whether it was.
    pub fn take(&self, request: RequestId, layer: u32, index: u32, page: &mut Vec<u8>) -> bool {
        let mut kept = self.lock();
        let Some(found) = kept.requests.get_mut(&request).and_then(|pages| pages.remove(&(layer, index))) else {
            return false;
        };
        page.clear();
        page.extend_from_slice(&found);
        kept.recycle(found);
        kept.taken += 1;
        true
    }

    /// Bytes of pages that are here or were claimed.
    pub fn bytes(&self) -> usize {
        self.lock().claimed
    }

    /// Pages taken so far.
    pub fn taken(&self) -> u64 {
        self.lock().taken
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn copy(&mut self, page: &[u8]) -> Box<[u8]> {
        // Readers are mostly alike, and so are pages.
        let Some(at) = self.spare.iter().rposition(|spare| spare.len() == page.len()) else { return page.into() };
        let mut copy = self.spare.swap_remove(at);
        self.spare_bytes -= copy.len();
        copy.copy_from_slice(page);
        copy
    }

    fn recycle(&mut self, page: Box<[u8]>) {
        self.claimed -= page.len();
        self.spare_bytes += page.len();
        self.spare.push(page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: RequestId = RequestId(1);
    const B: RequestId = RequestId(2);

    fn taken(outgoing: &Outgoing, request: RequestId, layer: u32, index: u32) -> Option<Vec<u8>> {
        let mut page = vec![0xff; 3];
        outgoing.take(request, layer, index, &mut page).then_some(page)
    }

    #[test]
    fn a_page_is_taken_once() {
        let outgoing = Outgoing::default();
        outgoing.allow(100);
        outgoing.open(A);
        assert!(outgoing.claim(8));
        outgoing.put(A, 1, 5, &[1; 4]);
        outgoing.put(A, 2, 5, &[2; 4]);
        assert_eq!(taken(&outgoing, A, 1, 4), None);
        assert_eq!(taken(&outgoing, B, 1, 5), None);
        assert_eq!(taken(&outgoing, A, 2, 5), Some(vec![2; 4]));
        assert_eq!((taken(&outgoing, A, 2, 5), outgoing.bytes(), outgoing.taken()), (None, 4, 1));
    }

    #[test]
    fn what_is_closed_is_gone_and_what_comes_late_is_dropped() {
        let outgoing = Outgoing::default();
        outgoing.allow(100);
        outgoing.open(A);
        assert!(outgoing.claim(100));
        outgoing.put(A, 0, 0, &[1; 40]);
        outgoing.close(A);
        assert_eq!((taken(&outgoing, A, 0, 0), outgoing.bytes()), (None, 60));
        // The pass that was running makes it all the same.
        outgoing.put(A, 1, 0, &[1; 60]);
        assert_eq!((taken(&outgoing, A, 1, 0), outgoing.bytes()), (None, 0));
        outgoing.close(A);
    }

    #[test]
    fn there_is_never_more_than_allowed() {
        let outgoing = Outgoing::default();
        assert!(!outgoing.claim(1), "nothing is allowed yet");
        outgoing.allow(100);
        outgoing.open(A);
        assert!(outgoing.claim(60) && !outgoing.claim(41));
        outgoing.put(A, 0, 0, &[1; 60]);
        assert_eq!(taken(&outgoing, A, 0, 0), Some(vec![1; 60]));
        // The memory of the page that was taken goes when there would be too much.
        let spare = |outgoing: &Outgoing| outgoing.lock().spare_bytes;
        assert_eq!((outgoing.bytes(), spare(&outgoing)), (0, 60));
        assert!(outgoing.claim(40));
        assert_eq!((outgoing.bytes(), spare(&outgoing)), (40, 60));
        assert!(outgoing.claim(20));
        assert_eq!((outgoing.bytes(), spare(&outgoing)), (60, 0));
    }

    #[test]
    fn memory_is_used_again() {
        let outgoing = Outgoing::default();
        outgoing.allow(100);
        outgoing.open(A);
        let place = |index: u32| {
            assert!(outgoing.claim(10));
            outgoing.put(A, 0, index, &[index as u8; 10]);
            outgoing.lock().requests[&A][&(0, index)].as_ptr()
        };
        let first = place(1);
        assert_eq!(taken(&outgoing, A, 0, 1), Some(vec![1; 10]));
        assert_eq!(place(2), first);
        assert_eq!(taken(&outgoing, A, 0, 2), Some(vec![2; 10]));
    }
}
