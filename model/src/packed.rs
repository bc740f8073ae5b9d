//! Packed weights: where they are kept, and how they get there.
//!
//! Kernels read weights in an order of their own ([`ridge_kernels::Packed`]). Packing 100 GB takes a minute, and every process
//! that serves a model needs the same bytes, so large models are packed once into a file in the cache folder, which all
//! processes of the machine map. What cannot be cached (no folder, no space, a small model) is packed into private memory.
//!
//! The file's name has a digest of everything that its contents follow from: packing version, shapes, the checkpoint's digest and
//! the identity of its files. Its header has a digest of the contents, which the first process after a reboot checks: what was
//! written before a crash may not have reached the disk. Files appear by rename, so that a reader sees all or nothing.
//!
//! All threads fill the file, through a mapping: making the pages of a large file is as much work as packing, and calls of
//! write() for one file wait for each other.

use crate::checkpoint::{Checkpoint, FileMap, NewFile, Tensor};
use crate::mapping::{self, HugePages};
use crate::memory::machine::MachineMemory;
use ridge_kernels::{Cpu, DType, Matrix, Packed, lock_file};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use twox_hash::XxHash3_128;

/// Changes whenever packing or the file's layout does.
const VERSION: &str = "ridge packed weights 2";
/// The header has a page of its own, so that weights start on a page.
const HEADER: usize = 4096;
/// Weights below this are packed into private memory: it takes milliseconds.
pub const WORTH_A_FILE: usize = 64 << 20;
/// Bytes packed at a time: as much of the checkpoint, and of the file, is resident meanwhile.
const PIECE: usize = 32 << 20;
/// Bytes digested at a time, by one thread.
const DIGESTED: usize = 1 << 20;
/// How long to wait for another process that is packing the same model.
const PATIENCE: Duration = Duration::from_secs(600);

/// A packed matrix's shape and place in its [`Store`].
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    dtype: DType,
    rows: usize,
    cols: usize,
    gated: bool,
    start: usize,
    bytes: usize,
}

/// All packed weights of a model.
pub struct Store {
    memory: Memory,
}

enum Memory {
    Private(memmap2::MmapMut),
    File(FileMap),
}

impl Store {
    /// A matrix as the kernels take it. The slot must come from this store's builder.
    pub fn get(&self, slot: &Slot) -> Packed<'_> {
        let bytes = match &self.memory {
            Memory::Private(map) => &map[..],
            Memory::File(file) => &file.bytes()[HEADER..],
        };
        let bytes = &bytes[slot.start..slot.start + slot.bytes];
        Packed::new(slot.dtype, slot.rows, slot.cols, slot.gated, bytes).expect("the slot was measured for its shape")
    }
}

struct Entry {
    slot: Slot,
    matrix: Tensor,
    up: Option<Tensor>,
}

/// Collects what is to be packed.
#[derive(Default)]
pub struct Builder {
    entries: Vec<Entry>,
    bytes: usize,
}

impl Builder {
    /// A place for a matrix.
    pub fn matrix(&mut self, matrix: Tensor) -> Slot {
        self.add(matrix, None)
    }

    /// A place for two matrices as one gated one, if they are alike.
    pub fn gated(&mut self, gate: &Tensor, up: &Tensor) -> Option<Slot> {
        let alike = (gate.dtype, gate.rows, gate.cols) == (up.dtype, up.rows, up.cols);
        alike.then(|| self.add(gate.clone(), Some(up.clone())))
    }

    fn add(&mut self, matrix: Tensor, up: Option<Tensor>) -> Slot {
        let (dtype, rows, cols, gated) = (matrix.dtype, matrix.rows, matrix.cols, up.is_some());
        let bytes = Packed::bytes(dtype, rows, cols, gated).expect("a tensor's shape can be stored");
        let slot = Slot { dtype, rows, cols, gated, start: self.bytes, bytes };
        // Strips are whole cache lines, so every matrix starts on one.
        self.bytes += bytes;
        self.entries.push(Entry { slot, matrix, up });
        slot
    }

    /// Bytes of everything added so far.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Packs, or finds packed, what was added. `cache` is a folder for files; it is created if need be.
    pub fn build(self, checkpoint: &Checkpoint, cpu: &Cpu, cache: Option<&Path>) -> io::Result<Store> {
        let (begin, sources) = (Instant::now(), checkpoint.tensors.files());
        if let Some(cache) = cache.filter(|_| self.bytes >= WORTH_A_FILE) {
            match self.in_file(&checkpoint.weights_digest, &sources, cpu, cache) {
                Ok(file) => {
                    let path = file.path().display();
                    tracing::info!(bytes = self.bytes, ms = begin.elapsed().as_millis(), %path, "packed weights mapped");
                    return Ok(Store { memory: Memory::File(file) });
                }
                Err(error) => {
                    let (folder, memory) = (cache.display(), MachineMemory::read());
                    if memory.known && self.bytes as u64 > memory.bytes {
                        let (bytes, source) = (memory.bytes, memory.source);
                        return Err(io::Error::other(format!(
                            "{folder} cannot keep them ({error}), and memory has room for {bytes} only ({source}): name a folder \
                             with enough space by --weights-cache"
                        )));
                    }
                    tracing::warn!(%folder, %error, "packed weights cannot be cached: every process has its own copy");
                }
            }
        }
        let (mut map, huge_pages) = mapping::map(self.bytes.max(1), HugePages::Auto)?;
        for piece in self.pieces() {
            piece.pack(cpu, &mut map[piece.start..][..piece.bytes]);
            sources.iter().for_each(|file| file.release());
        }
        tracing::info!(bytes = self.bytes, ms = begin.elapsed().as_millis(), %huge_pages, "weights packed");
        Ok(Store { memory: Memory::Private(map) })
    }

    /// The file with what was added, of a checkpoint with this digest and these files: found in the folder `cache`, if it
    /// is there and whole, or made there.
    pub fn in_file(&self, digest: &[u8; 32], files: &[&FileMap], cpu: &Cpu, cache: &Path) -> io::Result<FileMap> {
        std::fs::create_dir_all(cache)?;
        let (family, key) = self.key(digest, files);
        let name = format!("{family}-{key}");
        let path = cache.join(format!("{name}.packed"));
        if let Some(file) = self.open(&path, &key, cpu) {
            return Ok(file);
        }
        let _lock = lock_file(&cache.join(format!("{name}.lock")), PATIENCE, || ())?;
        // Another process may have packed it meanwhile.
        if let Some(file) = self.open(&path, &key, cpu) {
            return Ok(file);
        }
        let free = rustix::fs::statvfs(cache)?;
        let (free, needed) = (free.f_bavail * free.f_frsize, (self.bytes + HEADER) as u64);
        if free < needed + needed / 4 {
            return Err(io::Error::other(format!("{needed} bytes are needed and {free} free")));
        }
        let unfinished = cache.join(format!("{name}.unfinished"));
        self.write(files, cpu, &unfinished, &key).and_then(|()| std::fs::rename(&unfinished, &path)).inspect_err(
            |_| {
                // Best effort: the next attempt truncates it.
                let _ = std::fs::remove_file(&unfinished);
            },
        )?;
        forget_others(cache, &family, &name);
        self.open(&path, &key, cpu)
            .ok_or_else(|| io::Error::other(format!("{} changed while it was written", path.display())))
    }

    /// Names of the checkpoint's place and of this version of it.
    fn key(&self, digest: &[u8; 32], files: &[&FileMap]) -> (String, String) {
        let mut hasher = blake3::Hasher::new();
        let mut family = blake3::Hasher::new();
        hasher.update(VERSION.as_bytes()).update(digest);
        for file in files {
            hasher.update(file.identity().as_bytes());
            family.update(file.path().canonicalize().unwrap_or_default().as_os_str().as_encoded_bytes());
        }
        for Entry { slot, .. } in &self.entries {
            hasher.update(format!("{slot:?}").as_bytes());
        }
        (family.finalize().to_hex()[..8].into(), hasher.finalize().to_hex()[..32].into())
    }

    /// The file, if it is there and whole.
    fn open(&self, path: &Path, key: &str, cpu: &Cpu) -> Option<FileMap> {
        let file = FileMap::open(path).ok()?;
        file.prefer_huge_pages();
        let (header, contents) = file.bytes().split_at_checked(HEADER)?;
        let header = Header::read(header)?;
        if header.key != key || contents.len() != self.bytes {
            return None;
        }
        if header.boot != boot_id() {
            let digests = self.pieces().map(|piece| piece.digest(cpu, &contents[piece.start..][..piece.bytes]));
            if header.digest != digests.fold(0, u128::wrapping_add) {
                tracing::warn!(path = %path.display(), "packed weights are damaged and will be packed again");
                return None;
            }
            let checked = Header { boot: boot_id(), ..header };
            // If it cannot be noted, the next process checks again.
            let _ = File::options().write(true).open(path).and_then(|file| file.write_all_at(&checked.bytes(), 0));
        }
        let renewed = file.renew_small_pages();
        if renewed > 0 {
            tracing::info!(bytes = renewed, path = %path.display(), "packed weights that were in small pages were read again");
        }
        Some(file)
    }

    /// Writes the file; what is read of `sources` meanwhile does not stay resident.
    fn write(&self, sources: &[&FileMap], cpu: &Cpu, path: &Path, key: &str) -> io::Result<()> {
        let mut file = NewFile::create(path, HEADER + self.bytes)?;
        let mut sum = 0u128;
        for piece in self.pieces() {
            let digest = file.write(HEADER + piece.start, piece.bytes, |out| {
                piece.pack(cpu, out);
                piece.digest(cpu, out)
            })?;
            sum = sum.wrapping_add(digest);
            sources.iter().for_each(|file| file.release());
        }
        let header = Header { key: key.to_owned(), boot: boot_id(), digest: sum };
        file.write(0, HEADER, |page| page.copy_from_slice(&header.bytes()))
    }

    /// All that is packed, from the first byte to the last.
    fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        self.entries.iter().flat_map(Entry::pieces)
    }
}

impl Entry {
    /// In parts of about [`PIECE`] bytes.
    fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let Slot { dtype, rows, cols, gated, start, .. } = self.slot;
        let bytes = move |rows| Packed::bytes(dtype, rows, cols, gated).expect("a part of what was measured");
        // Whole strips, whether of 64 rows or of 32 pairs.
        let step = (PIECE / bytes(64).max(1)).max(1) * 64;
        (0..rows).step_by(step).map(move |first| {
            let rows = first..rows.min(first + step);
            Piece { entry: self, start: start + bytes(first), bytes: bytes(rows.len()), rows }
        })
    }
}

/// Consecutive rows of a matrix, or of two, and their place in the store.
struct Piece<'a> {
    entry: &'a Entry,
    rows: Range<usize>,
    start: usize,
    bytes: usize,
}

impl Piece<'_> {
    fn pack(&self, cpu: &Cpu, out: &mut [u8]) {
        fn part(tensor: &Tensor, rows: Range<usize>) -> Matrix<'_> {
            let whole = tensor.matrix();
            let bytes = &whole.data()[rows.start * whole.row_bytes()..rows.end * whole.row_bytes()];
            Matrix::new(tensor.dtype, rows.len(), tensor.cols, bytes).expect("rows of a matrix are one")
        }
        let up = self.entry.up.as_ref().map(|up| part(up, self.rows.clone()));
        cpu.pack(&part(&self.entry.matrix, self.rows.clone()), up.as_ref(), out);
    }

    /// Its part of the file's digest, which is the sum over all pieces: taken of small parts, keyed with their places, by all
    /// threads.
    fn digest(&self, cpu: &Cpu, packed: &[u8]) -> u128 {
        let sum = Mutex::new(0u128);
        cpu.pool().run(packed.len().div_ceil(DIGESTED), &|part| {
            let at = part * DIGESTED;
            let bytes = &packed[at..packed.len().min(at + DIGESTED)];
            let digest = XxHash3_128::oneshot_with_seed((self.start + at) as u64, bytes);
            let mut sum = sum.lock().expect("no holder of this lock can panic");
            *sum = sum.wrapping_add(digest);
        });
        sum.into_inner().expect("no holder of this lock can panic")
    }
}

/// What the first page of a file says.
struct Header {
    key: String,
    boot: String,
    digest: u128,
}

impl Header {
    /// Lines of text, padded to the page.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{VERSION}\n{}\n{}\n{:032x}\n", self.key, self.boot, self.digest).into_bytes();
        bytes.resize(HEADER, 0);
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Header> {
        let end = bytes.iter().position(|byte| *byte == 0)?;
        let mut lines = std::str::from_utf8(&bytes[..end]).ok()?.lines();
        if lines.next()? != VERSION {
            return None;
        }
        let (key, boot) = (lines.next()?.to_owned(), lines.next()?.to_owned());
        Some(Header { key, boot, digest: u128::from_str_radix(lines.next()?, 16).ok()? })
    }
}

/// Changes with every start of the machine. Where that cannot be known, files are always checked.
fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_else(|_| format!("process {}", std::process::id()))
}

/// Removes files of earlier versions of the same checkpoint. Processes that have them mapped keep them.
fn forget_others(cache: &Path, family: &str, name: &str) {
    let Ok(entries) = std::fs::read_dir(cache) else { return };
    let stale = |path: &PathBuf| {
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        file.starts_with(&format!("{family}-")) && !file.starts_with(name)
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(stale) {
        tracing::info!(path = %path.display(), "removing packed weights of an earlier version");
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder() -> Builder {
        let bytes = |seed: u8| (0..70 * 36).map(|i| seed.wrapping_mul(31).wrapping_add(i as u8)).collect::<Vec<u8>>();
        let tensor = |seed| Tensor::owned(DType::Q8_0, 70, 32, bytes(seed)[..70 * 34].to_vec()).expect("70 blocks");
        let mut builder = Builder::default();
        builder.matrix(tensor(1));
        builder.gated(&tensor(2), &tensor(3)).expect("alike");
        builder
    }

    fn private(cpu: &Cpu) -> Vec<u8> {
        let builder = builder();
        let mut bytes = vec![0; builder.bytes()];
        for piece in builder.pieces() {
            piece.pack(cpu, &mut bytes[piece.start..][..piece.bytes]);
        }
        bytes
    }

    #[test]
    fn files_are_made_once_and_hold_the_same_bytes() {
        let (cpu, folder) = (Cpu::new(2, None), tempfile::tempdir().expect("a folder"));
        let made = builder().in_file(&[7; 32], &[], &cpu, folder.path()).expect("packed");
        assert_eq!(made.bytes()[HEADER..], private(&cpu));
        let found = builder().in_file(&[7; 32], &[], &cpu, folder.path()).expect("found");
        assert_eq!(made.identity(), found.identity());
        // Another version of the checkpoint takes its place; who has the old one mapped keeps it.
        let other = builder().in_file(&[8; 32], &[], &cpu, folder.path()).expect("packed");
        assert!(other.path().exists() && !made.path().exists());
        assert_eq!(made.bytes()[HEADER..], private(&cpu));
    }

    #[test]
    fn what_a_crash_left_behind_is_not_believed() {
        let (cpu, folder) = (Cpu::new(1, None), tempfile::tempdir().expect("a folder"));
        let path = builder().in_file(&[7; 32], &[], &cpu, folder.path()).expect("packed").path().to_owned();
        let whole = std::fs::read(&path).expect("readable");
        let header = Header::read(&whole[..HEADER]).expect("a header");
        let earlier = Header { boot: "an earlier start".into(), ..header }.bytes();

        // Whole, but of before the reboot: checked, and marked as checked.
        std::fs::write(&path, [&earlier, &whole[HEADER..]].concat()).expect("writable");
        builder().in_file(&[7; 32], &[], &cpu, folder.path()).expect("checked");
        assert_eq!(std::fs::read(&path).expect("readable"), whole);

        let mut damaged = [&earlier, &whole[HEADER..]].concat();
        damaged[HEADER + 100] ^= 1;
        for bad in [&damaged[..], &whole[..HEADER + 10], &whole[..20], b""] {
            std::fs::remove_file(&path).expect("removable");
            std::fs::write(&path, bad).expect("writable");
            let file = builder().in_file(&[7; 32], &[], &cpu, folder.path()).expect("packed again");
            assert_eq!(file.bytes()[HEADER..], whole[HEADER..]);
        }
    }

    #[test]
    fn what_is_packed_in_pieces_is_packed_as_if_at_once() {
        let (cpu, folder) = (Cpu::new(2, None), tempfile::tempdir().expect("a folder"));
        let (rows, cols) = (PIECE / 256 + 100, 32);
        let tensor = |seed: u32| {
            let values = (0..(rows * cols) as u32).flat_map(|i| (i ^ seed).to_le_bytes());
            Tensor::owned(DType::F32, rows, cols, values.collect()).expect("4 bytes each")
        };
        let (gate, up) = (tensor(0), tensor(1 << 31));
        let mut builder = Builder::default();
        builder.gated(&gate, &up).expect("alike");
        assert_eq!(builder.pieces().count(), 2);
        let file = builder.in_file(&[7; 32], &[], &cpu, folder.path()).expect("packed");
        let mut whole = vec![0; builder.bytes()];
        cpu.pack(&gate.matrix(), Some(&up.matrix()), &mut whole);
        assert!(file.bytes()[HEADER..] == whole);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert!(builder().in_file(&[7; 32], &[], &Cpu::new(1, None), &file.path().join("below")).is_err());
    }
}
