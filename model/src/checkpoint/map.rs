//! The one place that maps a file into memory, and so the one `unsafe` block of checkpoint loading.

use super::LoadError;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// The bytes of a file, mapped read-only and shared by every tensor in it.
#[derive(Clone, Debug)]
pub struct FileMap {
    path: Arc<PathBuf>,
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
        Ok(Self { path: Arc::new(path.to_owned()), map: Arc::new(map), modified })
    }

    /// Where it was mapped from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
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

    /// Asks the kernel to read the file ahead. A hint: failure is of no consequence.
    pub fn will_need(&self) {
        let _ = self.map.advise(memmap2::Advice::WillNeed);
    }
}
