//! The one place that maps a file into memory, and so the one `unsafe` block of checkpoint loading.

use super::LoadError;
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
