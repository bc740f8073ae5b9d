//! One try-lock per KV page: any number of readers or one writer, never waiting. A refusal is an answer, because a scheduler
//! that hands the same page to a reader and a writer has a bug that waiting would hide.

use super::primitive::{AtomicU32, Ordering};

/// Lock word of a page being written; any other value is its number of readers.
const WRITER: u32 = u32::MAX;

/// `n` independent try-read-write locks.
///
/// A successful `try_*` happens after the matching releases before it, so the bytes of the page may be handed over by it.
#[derive(Debug)]
pub struct PageLocks {
    words: Box<[AtomicU32]>,
}

impl PageLocks {
    /// `n` free locks.
    pub fn new(n: usize) -> PageLocks {
        PageLocks { words: (0..n).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Number of locks.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// True if there are no locks.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Adds a reader to page `i` unless it is being written.
    #[must_use]
    pub fn try_read(&self, i: usize) -> bool {
        let word = &self.words[i];
        let mut seen = word.load(Ordering::Relaxed);
        // WRITER - 1 readers is the limit, so that a count can never become the writer's mark.
        while seen < WRITER - 1 {
            match word.compare_exchange_weak(seen, seen + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Removes a reader that [`Self::try_read`] added. Panics if page `i` has none.
    pub fn release_read(&self, i: usize) {
        let before = self.words[i].fetch_sub(1, Ordering::Release);
        assert!(before != 0 && before != WRITER, "page {i} was not locked for reading");
    }

    /// Makes the caller the only user of page `i`, if it has no other.
    #[must_use]
    pub fn try_write(&self, i: usize) -> bool {
        self.words[i].compare_exchange(0, WRITER, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Ends a [`Self::try_write`]. Panics if page `i` was not being written.
    pub fn release_write(&self, i: usize) {
        let before = self.words[i].swap(0, Ordering::Release);
        assert_eq!(before, WRITER, "page {i} was not locked for writing");
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_a_writer_does_not() {
        let locks = PageLocks::new(2);
        assert!(locks.try_read(0));
        assert!(locks.try_read(0));
        assert!(!locks.try_write(0));
        assert!(locks.try_write(1));
        assert!(!locks.try_read(1));
        assert!(!locks.try_write(1));
        locks.release_read(0);
        assert!(!locks.try_write(0));
        locks.release_read(0);
        assert!(locks.try_write(0));
        locks.release_write(1);
        assert!(locks.try_read(1));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;

    /// A page whose bytes loom watches for unsynchronised access.
    struct Page {
        locks: PageLocks,
        bytes: UnsafeCell<u32>,
    }
    // SAFETY: `bytes` is only touched while the lock is held, which is what the test checks.
    unsafe impl Sync for Page {}
    // SAFETY: as above.
    unsafe impl Send for Page {}

    #[test]
    fn loom_bytes_are_never_shared_with_a_writer() {
        loom::model(|| {
            let page = Arc::new(Page { locks: PageLocks::new(1), bytes: UnsafeCell::new(0) });
            let writer = {
                let page = page.clone();
                loom::thread::spawn(move || {
                    if page.locks.try_write(0) {
                        // SAFETY: the write lock is held.
                        page.bytes.with_mut(|p| unsafe { *p += 1 });
                        page.locks.release_write(0);
                    }
                })
            };
            let reader = {
                let page = page.clone();
                loom::thread::spawn(move || read(&page))
            };
            read(&page);
            writer.join().unwrap();
            reader.join().unwrap();
            assert!(page.locks.try_write(0), "every lock was released");
        });
    }

    fn read(page: &Page) {
        if page.locks.try_read(0) {
            // SAFETY: a read lock is held.
            page.bytes.with(|p| unsafe { assert!(*p <= 1) });
            page.locks.release_read(0);
        }
    }
}
