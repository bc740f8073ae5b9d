//! The one place that maps files into memory.

use super::LoadError;
#[cfg(target_os = "linux")]
use super::pagemap;
use crate::mapping::HUGE_PAGE_BYTES;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// The bytes of a file, mapped read-only and shared by every tensor in it.
#[derive(Clone, Debug)]
pub struct FileMap {
    path: Arc<PathBuf>,
    file: Arc<File>,
    map: Arc<memmap2::Mmap>,
    modified: Option<SystemTime>,
}

impl FileMap {
    /// Maps the file at `path`.
    #[allow(unsafe_code, reason = "weights are read in place; copying 100 GB through read() is not an option")]
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(|e| LoadError::io(path, &e))?;
        // SAFETY: the map is private to this process and only ever read. Its contents are validated as bytes, and no
        // reference into it claims more than `&[u8]`, so a concurrent write by another process changes values, not
        // memory safety of typed data. A concurrent truncation raises SIGBUS: docs/operating.md tells operators to
        // replace checkpoint files by rename, never in place.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| LoadError::io(path, &e))?;
        let modified = file.metadata().and_then(|m| m.modified()).ok();
        Ok(Self { path: Arc::new(path.to_owned()), file: Arc::new(file), map: Arc::new(map), modified })
    }

    /// Where it was mapped from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Copies bytes from `start` on, past the mapping: one byte read through it makes up to 2 MiB of the file's pages resident.
    pub fn read(&self, start: usize, bytes: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(bytes, start as u64)
    }

    /// Which version of which file this is: path, length and time of the last change.
    pub fn identity(&self) -> String {
        let path = self.path.canonicalize();
        let since = self.modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        let nanoseconds = since.map_or(0, |since| since.as_nanos());
        format!("{} {} {nanoseconds}", path.as_ref().unwrap_or(&self.path).display(), self.map.len())
    }

    /// Lets the kernel take the pages that were read so far out of this process; they are read again when touched.
    #[allow(unsafe_code, reason = "a private read-only file mapping loses nothing")]
    pub fn release(&self) {
        // SAFETY: the mapping is of a file and was never written, so dropped pages come back with the same contents.
        let _ = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    /// Asks for huge pages: what the kernel then reads from disk for this mapping comes in pieces of 2 MiB. A hint.
    pub fn prefer_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        let _ = self.map.advise(memmap2::Advice::HugePage);
    }

    /// Has those pieces of 2 MiB that the page cache holds in small pages read again, each as one huge page, and says how many bytes
    /// that were. Where memory was short for a while, parts of a file are dropped and come back small, and stay so for as long as
    /// they are in memory: with a tenth of the weights in small pages, decoding was measured to be a fifth slower. Does nothing if most
    /// are small, because then the file system has no others. What another process has mapped stays as it is.
    #[cfg(target_os = "linux")]
    #[allow(unsafe_code, reason = "a private read-only file mapping loses nothing")]
    pub fn renew_small_pages(&self) -> usize {
        let (base, pieces) = (self.map.as_ptr().addr(), self.map.len() / HUGE_PAGE_BYTES);
        if !base.is_multiple_of(HUGE_PAGE_BYTES) {
            return 0;
        }
        let touch = |piece: usize| std::hint::black_box(self.map[piece * HUGE_PAGE_BYTES]);
        (0..pieces).for_each(|piece| _ = touch(piece));
        let Ok(small) = pagemap::small_pieces(base, pieces) else { return 0 };
        if small.len() * 2 > pieces {
            return 0;
        }
        for &piece in &small {
            let start = piece * HUGE_PAGE_BYTES;
            // SAFETY: as in `release`.
            let _ =
                unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, HUGE_PAGE_BYTES) };
            let len = std::num::NonZeroU64::new(HUGE_PAGE_BYTES as u64);
            let _ = rustix::fs::fadvise(&*self.file, start as u64, len, rustix::fs::Advice::DontNeed);
            touch(piece);
        }
        small.len() * HUGE_PAGE_BYTES
    }

    /// Elsewhere nothing is known about pages.
    #[cfg(not(target_os = "linux"))]
    pub fn renew_small_pages(&self) -> usize {
        0
    }

    /// Asks the kernel to read the file ahead. A hint: failure is of no consequence.
    pub fn will_need(&self) {
        let _ = self.map.advise(memmap2::Advice::WillNeed);
    }
}

/// A file that is being made, written through mappings of its parts: all threads can fill those at once, and the pages are
/// as large as the file system has them.
#[derive(Debug)]
pub struct NewFile(File);

impl NewFile {
    /// Makes a file of `bytes` zeros, or makes one of what is at `path`.
    pub fn create(path: &Path, bytes: usize) -> std::io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        // Space is set aside: a mapped page that finds none ends the process. Not every file system can.
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes as u64) {
            Err(full @ rustix::io::Errno::NOSPC) => return Err(full.into()),
            Err(_) => file.set_len(bytes as u64)?,
            Ok(()) => {}
        }
        Ok(Self(file))
    }

    /// Lets `write` at `bytes` bytes from `start` on, which do not stay resident.
    #[allow(unsafe_code, reason = "threads that write() to one file wait for each other")]
    pub fn write<R>(&mut self, start: usize, bytes: usize, write: impl FnOnce(&mut [u8]) -> R) -> std::io::Result<R> {
        // A huge page that the mapping has only a part of would be made writable 4 KiB at a time.
        let from = start / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        let len = (start + bytes).next_multiple_of(HUGE_PAGE_BYTES) - from;
        let mut options = memmap2::MmapOptions::new();
        // SAFETY: the bytes are borrowed from `self`, which is the only handle of this process, until the mapping ends. Other
        // processes do not know the file before it is renamed; one that truncated it meanwhile would end this process.
        let mut map = unsafe { options.offset(from as u64).len(len).map_mut(&self.0) }?;
        #[cfg(target_os = "linux")]
        // A hint: without it pages of the cache are smaller, and so are those that readers map.
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(write(&mut map[start - from..][..bytes]))
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Where the file system has huge pages, a piece that was read small is huge again; everywhere the bytes stay.
    #[test]
    fn small_pages_are_renewed() {
        const PIECES: usize = 8;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("weights");
        let bytes: Vec<u8> = (0..PIECES * HUGE_PAGE_BYTES).map(|i| (i / 4096 * 7 + i) as u8).collect();
        std::fs::write(&path, &bytes).expect("a file");
        let file = File::open(&path).expect("there");
        file.sync_all().expect("on disk");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("a hint");
        // One piece is read small.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("a hint");
        file.read_exact_at(&mut [0; 100], (3 * HUGE_PAGE_BYTES + 4096) as u64).expect("long enough");

        let map = FileMap::open(&path).expect("it maps");
        map.prefer_huge_pages();
        let renewed = map.renew_small_pages();
        assert_eq!(map.bytes(), bytes);
        let base = map.map.as_ptr().addr();
        if renewed > 0 {
            assert_eq!(renewed, HUGE_PAGE_BYTES);
            assert_eq!(pagemap::small_pieces(base, PIECES).expect("it just could"), [0; 0]);
        } else {
            eprintln!("not shown: this file system or kernel has no huge pages in its page cache");
        }
    }
}
