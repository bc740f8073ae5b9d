//! Buffers of pages on their way out, used again and again.
//!
//! A page in flight outlives its block, so it is copied. The allocator returns freed memory to the system after each burst, and
//! what comes fresh from there is mapped and zeroed first: three quarters of a sender's page faults, and a tenth of its time on
//! loopback. A buffer that is used again costs neither.

use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of free buffers that are kept: two transfers' credit of pages of 32 KiB.
const MAX_KEPT_BYTES: usize = 16 << 20;

/// A stack of free buffers. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers(Arc<Mutex<Free>>);

#[derive(Debug, Default)]
struct Free {
    buffers: Vec<Vec<u8>>,
    /// Capacities, added up.
    bytes: usize,
}

impl Buffers {
    /// What `fill` makes of a buffer with arbitrary contents, which comes back here when the last clone is dropped.
    pub fn fill(&self, fill: impl FnOnce(&mut Vec<u8>)) -> Bytes {
        let mut buffer = self.take();
        fill(&mut buffer);
        Bytes::from_owner(Lent { buffer, home: self.clone() })
    }

    fn take(&self) -> Vec<u8> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = free.buffers.pop().unwrap_or_default();
        free.bytes -= buffer.capacity();
        buffer
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + buffer.capacity() <= MAX_KEPT_BYTES {
            free.bytes += buffer.capacity();
            free.buffers.push(buffer);
        }
    }
}

/// A buffer that is in use.
struct Lent {
    buffer: Vec<u8>,
    home: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.give_back(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_its_last_clone() {
        let buffers = Buffers::default();
        let first = buffers.fill(|page| page.extend([1; 1000]));
        let (address, slice) = (first.as_ptr(), first.slice(10..20));
        drop(first);
        let second = buffers.fill(|page| page.extend([2; 1000]));
        assert_ne!(second.as_ptr(), address, "a part of it is still in use");
        assert_eq!(slice[..], [1; 10]);
        drop(slice);
        let third = buffers.fill(|page| {
            page.clear();
            page.extend([3; 500]);
        });
        assert_eq!((third.as_ptr(), &third[..]), (address, &[3; 500][..]));
    }

    #[test]
    fn only_so_much_is_kept() {
        let buffers = Buffers::default();
        let lent: Vec<_> = (0..4).map(|_| buffers.fill(|page| page.resize(MAX_KEPT_BYTES / 2, 0))).collect();
        drop(lent);
        assert_eq!(buffers.0.lock().expect("nobody panicked").bytes, MAX_KEPT_BYTES);
    }
}
