//! A device made of host memory and the host's C++ compiler: it runs the kernels' own sources, a block after the other.
//!
//! Each `.cu` file becomes a shared library (built once, then found by the hash of everything that went into it) in which
//! `kernels/cuda/emulate/` stands for CUDA. Threads of a block are fibers that run from barrier to barrier in an order that
//! can be chosen, so that a missing barrier shows as another result. Memory is undefined when allocated (all ones: NaN in
//! every float type) and lies between guard zones that are looked at when the device is synchronised and when memory is
//! freed. What it cannot show: the time that anything takes, and races between blocks.

use super::device::{Arg, ArgValue, CudaError, Device, Kernel, Launch, Properties, Recorded, Recorder, TensorMap};
use super::lock;
use super::source::{EMULATOR, HEADERS, Source};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

/// Bytes on either side of an allocation that must stay as they are.
const GUARD_BYTES: usize = 4096;
const GUARD: u8 = 0xa5;
const ALIGN: usize = 256;

/// In which order the threads of a block are let run to their next barrier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Ascending.
    Forward,
    /// Descending.
    Backward,
    /// Another one in each round, drawn from this seed.
    Shuffled(u64),
}

impl Order {
    /// Orders that a test should try.
    pub const ALL: [Order; 3] = [Order::Forward, Order::Backward, Order::Shuffled(7)];
}

/// The emulated device.
#[derive(Debug)]
pub struct Emulated {
    properties: Properties,
    folder: PathBuf,
    order: Mutex<Order>,
    memory: Mutex<BTreeMap<u64, Allocation>>,
    fetches: Mutex<Fetches>,
    recorder: Recorder,
    graphs: Mutex<Graphs>,
}

/// Recorded launches by number.
#[derive(Debug, Default)]
struct Graphs {
    made: u64,
    kept: HashMap<u64, Arc<Vec<Recorded>>>,
}

/// Copies to the host that nobody has asked after yet: they are done when somebody does, as late as a device could.
#[derive(Debug, Default)]
struct Fetches {
    begun: u64,
    pending: HashMap<u64, Pending>,
}

#[derive(Debug)]
struct Pending {
    pieces: Vec<(u64, usize)>,
    to: *mut u8,
}

// SAFETY: `to` is memory that the fetch alone uses until it is done; which thread does that does not matter.
unsafe impl Send for Pending {}

/// Memory with its guard zones, in units of the alignment.
#[derive(Debug)]
struct Allocation {
    bytes: usize,
    block: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: an allocation is plain memory without an owning thread; the map that holds it is behind a mutex.
unsafe impl Send for Allocation {}

impl Emulated {
    /// A device whose libraries are kept in `folder`, which must be the user's own: code is loaded from it.
    ///
    /// Fails if there is no C++ compiler.
    pub fn new(folder: &Path) -> Result<Self, CudaError> {
        compiler().map_err(CudaError::Unavailable)?;
        std::fs::create_dir_all(folder)
            .map_err(|error| CudaError::Unavailable(format!("cannot write {}: {error}", folder.display())))?;
        let properties = Properties {
            name: "emulated on the host".into(),
            sm: 80,
            multiprocessors: 4,
            shared_per_block: 163 << 10,
            memory_bytes: 4 << 30,
            l2_bytes: 1 << 20,
        };
        Ok(Self {
            properties,
            folder: folder.into(),
            order: Mutex::new(Order::Forward),
            memory: Mutex::default(),
            fetches: Mutex::default(),
            recorder: Recorder::default(),
            graphs: Mutex::default(),
        })
    }

    /// A device that keeps its libraries beside the program that is running, in the build's own folder; `None`, with a
    /// printed reason, where there is no C++ compiler: tests that need it are skipped by name.
    pub fn for_tests() -> Option<Arc<Self>> {
        match Self::beside_the_program() {
            Ok(device) => Some(Arc::new(device)),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    /// A device that keeps its libraries beside the program that is running.
    pub fn beside_the_program() -> Result<Self, CudaError> {
        let program = std::env::current_exe().map_err(|error| CudaError::Unavailable(error.to_string()))?;
        Self::new(&program.with_file_name("ridge-emulated"))
    }

    /// Changes the order of threads for the launches that follow.
    pub fn set_order(&self, order: Order) {
        *lock(&self.order) = order;
    }

    /// Pretends to be another device, for plans that depend on it.
    #[must_use]
    pub fn with_properties(mut self, change: impl FnOnce(&mut Properties)) -> Self {
        change(&mut self.properties);
        self
    }

    /// Checks that the range lies within one allocation.
    fn bounds(&self, address: u64, bytes: usize) -> Result<*mut u8, CudaError> {
        let memory = lock(&self.memory);
        let owner = memory.range(..=address).next_back();
        let fits = owner.is_some_and(|(begin, allocation)| {
            (address - begin).checked_add(bytes as u64).is_some_and(|end| end <= allocation.bytes as u64)
        });
        if fits { Ok(address as *mut u8) } else { Err(CudaError::OutOfBounds { address, bytes }) }
    }

    /// Finds the first allocation whose guard zones were written to.
    fn check_guards(memory: &BTreeMap<u64, Allocation>) -> Result<(), CudaError> {
        memory.iter().try_for_each(|(address, allocation)| allocation.check(*address))
    }
}

impl Allocation {
    fn new(bytes: usize) -> Option<(u64, Self)> {
        let size = bytes.checked_next_multiple_of(ALIGN)?.checked_add(2 * GUARD_BYTES)?;
        let layout = std::alloc::Layout::from_size_align(size, ALIGN).ok()?;
        // SAFETY: the size is not 0, because there are guard zones.
        let block = unsafe { std::alloc::alloc(layout) };
        if block.is_null() {
            return None;
        }
        // SAFETY: `size` bytes were allocated, and `GUARD_BYTES + bytes <= size`.
        unsafe {
            block.write_bytes(GUARD, size);
            block.add(GUARD_BYTES).write_bytes(0xff, bytes);
        }
        Some((block as u64 + GUARD_BYTES as u64, Self { bytes, block, layout }))
    }

    fn check(&self, address: u64) -> Result<(), CudaError> {
        // SAFETY: the block is allocated with `layout` until `self` is dropped, initialised in full by `new`, and no launch
        // is running, because launches return when they are done.
        let all = unsafe { std::slice::from_raw_parts(self.block, self.layout.size()) };
        let untouched = |zone: &[u8]| zone.iter().all(|byte| *byte == GUARD);
        let (before, after) = (&all[..GUARD_BYTES], &all[GUARD_BYTES + self.bytes..]);
        for (zone, side) in [(before, "begin"), (after, "end")] {
            if !untouched(zone) {
                return Err(CudaError::Overrun { address, bytes: self.bytes, side });
            }
        }
        Ok(())
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { std::alloc::dealloc(self.block, self.layout) }
    }
}

impl Device for Emulated {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn free_bytes(&self) -> Result<u64, CudaError> {
        let used: usize = lock(&self.memory).values().map(|allocation| allocation.bytes).sum();
        Ok(self.properties.memory_bytes.saturating_sub(used as u64))
    }

    fn alloc(&self, bytes: usize) -> Result<u64, CudaError> {
        let free = self.free_bytes()? as usize;
        let refused = CudaError::OutOfMemory { wanted: bytes, free };
        if bytes > free {
            return Err(refused);
        }
        let (address, allocation) = Allocation::new(bytes).ok_or(refused)?;
        lock(&self.memory).insert(address, allocation);
        Ok(address)
    }

    unsafe fn free(&self, at: u64) {
        let allocation = lock(&self.memory).remove(&at);
        let check = allocation.map(|allocation| allocation.check(at));
        // Freeing happens in destructors: a second panic would hide the first.
        if !std::thread::panicking() {
            match check {
                None => panic!("{at:#x} is freed and was not allocated"),
                Some(Err(error)) => panic!("{error}"),
                Some(Ok(())) => {}
            }
        }
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), CudaError> {
        self.recorder.refuse("upload")?;
        let to = self.bounds(to, from.len())?;
        // SAFETY: the range lies within an allocation, whose memory no reference in Rust points to.
        unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), CudaError> {
        self.recorder.refuse("download")?;
        let from = self.bounds(from, to.len())?;
        // SAFETY: as in `upload`, and every byte was initialised when it was allocated.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from, to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        self.recorder.refuse("copy")?;
        let (from, to) = (self.bounds(from, bytes)?, self.bounds(to, bytes)?);
        // SAFETY: both ranges lie within allocations; `copy` allows overlap, although the caller promised none.
        unsafe { to.copy_from(from, bytes) };
        Ok(())
    }

    unsafe fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), CudaError> {
        self.recorder.refuse("fill")?;
        let at = self.bounds(at, bytes)?;
        // SAFETY: the range lies within an allocation.
        unsafe { at.write_bytes(byte, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), CudaError> {
        if self.recorder.takes(kernel, launch, args) {
            return Ok(());
        }
        let failed = |reason: String| CudaError::Launch { kernel: kernel.name, file: kernel.source, reason };
        if launch.shared_bytes > self.properties.shared_per_block {
            let limit = self.properties.shared_per_block;
            return Err(failed(format!("{} bytes of shared memory, the device has {limit}", launch.shared_bytes)));
        }
        let library = library(&self.folder, kernel.source)?;
        let name = CString::new(kernel.name).map_err(|_| failed("a name with a NUL".into()))?;
        let (order, seed) = match *lock(&self.order) {
            Order::Forward => (0, 0),
            Order::Backward => (1, 0),
            Order::Shuffled(seed) => (2, seed),
        };
        let kinds: Vec<u8> = args.iter().map(kind).chain([0]).collect();
        let mut values: Vec<ArgValue> = args.iter().map(ArgValue::of).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| (&raw mut *v).cast()).collect();
        let mut message = [0u8; 1024];
        // One launch at a time in a library: its threads and shared memory are static.
        let entry = lock(&library.entry);
        // SAFETY: the function has this signature (`RIDGE_KERNELS` in launch.h), the pointers are to arrays of the lengths it
        // reads, strings end in NUL, and it checks the kinds of the arguments against the kernel's parameters. What the
        // kernel itself touches is the caller's promise.
        let code = unsafe {
            (*entry)(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared_bytes,
                kinds.as_ptr().cast(),
                pointers.as_mut_ptr(),
                order,
                seed,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        drop(entry);
        if code != 0 {
            let end = message.iter().position(|byte| *byte == 0).unwrap_or(message.len());
            return Err(failed(String::from_utf8_lossy(&message[..end]).into_owned()));
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.recorder.refuse("synchronize")?;
        Self::check_guards(&lock(&self.memory))
    }

    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; 128], CudaError> {
        // The numbers as they are, in the order in which `hopper.cuh` reads them when it is emulated.
        let mut bytes = [0; 128];
        let wide = [map.address, map.cols, map.rows, map.row_bytes, map.planes, map.plane_bytes];
        for (field, value) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(wide) {
            *field = value.to_le_bytes();
        }
        let narrow = [map.box_cols, map.box_rows, map.element.bytes() as u32];
        for (field, value) in bytes[48..].as_chunks_mut::<4>().0.iter_mut().zip(narrow) {
            *field = value.to_le_bytes();
        }
        Ok(bytes)
    }

    fn begin_recording(&self) -> Result<(), CudaError> {
        self.recorder.begin()
    }

    fn end_recording(&self, keep: bool) -> Result<Option<u64>, CudaError> {
        let launches = self.recorder.end()?;
        if !keep {
            return Ok(None);
        }
        let mut graphs = lock(&self.graphs);
        graphs.made += 1;
        let number = graphs.made;
        graphs.kept.insert(number, Arc::new(launches));
        Ok(Some(number))
    }

    unsafe fn replay(&self, graph: u64) -> Result<(), CudaError> {
        self.recorder.refuse("replay")?;
        let launches = lock(&self.graphs).kept.get(&graph).cloned().expect("a graph that was recorded");
        launches.iter().try_for_each(|Recorded { kernel, launch, args }| {
            // SAFETY: the caller's promise is that of each launch.
            unsafe { self.launch(*kernel, launch, args) }
        })
    }

    unsafe fn free_graph(&self, graph: u64) {
        lock(&self.graphs).kept.remove(&graph);
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        let layout = pinned_layout(bytes).ok_or(CudaError::OutOfMemory { wanted: bytes, free: 0 })?;
        // SAFETY: `pinned_layout` has no size of 0.
        let at = unsafe { std::alloc::alloc_zeroed(layout) };
        if at.is_null() { Err(CudaError::OutOfMemory { wanted: bytes, free: 0 }) } else { Ok(at) }
    }

    unsafe fn free_pinned(&self, at: *mut u8, bytes: usize) {
        let layout = pinned_layout(bytes).expect("it was allocated with this layout");
        // SAFETY: the caller says that `alloc_pinned` returned it for this size.
        unsafe { std::alloc::dealloc(at, layout) }
    }

    unsafe fn begin_fetch(&self, pieces: &[(u64, usize)], to: *mut u8) -> Result<u64, CudaError> {
        self.recorder.refuse("begin_fetch")?;
        for (from, bytes) in pieces {
            self.bounds(*from, *bytes)?;
        }
        let mut fetches = lock(&self.fetches);
        fetches.begun += 1;
        let number = fetches.begun;
        fetches.pending.insert(number, Pending { pieces: pieces.to_vec(), to });
        Ok(number)
    }

    fn fetched(&self, fetch: u64, _wait: bool) -> Result<bool, CudaError> {
        let pending = lock(&self.fetches).pending.remove(&fetch);
        let Pending { pieces, mut to } = pending.expect("a fetch that was begun and is not done");
        for (from, bytes) in pieces {
            let from = self.bounds(from, bytes)?;
            // SAFETY: `from` lies within an allocation; who began the fetch promised room for all pieces behind `to`.
            unsafe {
                to.copy_from_nonoverlapping(from, bytes);
                to = to.add(bytes);
            }
        }
        Ok(true)
    }
}

fn pinned_layout(bytes: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(bytes.max(1), ALIGN).ok()
}

/// The letters of `emulate::Kernel::kinds`.
fn kind(arg: &Arg) -> u8 {
    match arg {
        Arg::Ptr(_) => b'p',
        Arg::U32(_) => b'u',
        Arg::I32(_) => b'i',
        Arg::U64(_) => b'U',
        Arg::F32(_) => b'f',
        Arg::Bytes128(_) => b'b',
    }
}

type Entry = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    u32,
    *const c_char,
    *mut *mut c_void,
    u32,
    u64,
    *mut c_char,
    usize,
) -> c_int;

/// A source's library. It stays loaded: other devices of this process may use it.
struct Library {
    entry: Mutex<Entry>,
}

/// The library of a source, built and opened if this is the first time that the process asks.
fn library(folder: &Path, source: &'static str) -> Result<&'static Library, CudaError> {
    static OPEN: Mutex<Option<HashMap<(PathBuf, &'static str), &'static Library>>> = Mutex::new(None);
    let mut open = lock(&OPEN);
    let open = open.get_or_insert_default();
    if let Some(library) = open.get(&(folder.to_path_buf(), source)) {
        return Ok(library);
    }
    let path = build(folder, source)?;
    let call = |call, error: libloading::Error| CudaError::Call { call, reason: error.to_string() };
    // SAFETY: the library was made from this program's own sources, in a folder of the user's own; it has no initialisers
    // beyond static data.
    let library = unsafe { libloading::Library::new(&path) }.map_err(|error| call("dlopen", error))?;
    // SAFETY: `RIDGE_KERNELS` in launch.h defines the symbol with this signature.
    let entry = unsafe { library.get::<Entry>(b"ridge_emulate\0") }.map_err(|error| call("dlsym", error))?;
    let entry = Mutex::new(*entry);
    // Never unloaded: `entry` points into it.
    std::mem::forget(library);
    let library: &'static Library = Box::leak(Box::new(Library { entry }));
    open.insert((folder.to_path_buf(), source), library);
    Ok(library)
}

/// The C++ compiler's version, or why there is none. It is asked once.
fn compiler() -> Result<&'static str, String> {
    static VERSION: OnceLock<Result<String, String>> = OnceLock::new();
    let version = VERSION.get_or_init(|| match Command::new("c++").arg("--version").output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(format!("the C++ compiler `c++` does not run: {}", output.status)),
        Err(error) => Err(format!("the emulator needs a C++ compiler, and `c++` is not here: {error}")),
    });
    version.as_deref().map_err(Clone::clone)
}

/// Flags of every build. Sums are not contracted, so that a kernel's own `fmaf` decides; with the instruction at hand it is not
/// a library call.
fn flags() -> Vec<&'static str> {
    let mut flags = vec!["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"];
    // Kernels see memory under several types, as CUDA allows them to.
    flags.extend(["-fno-strict-aliasing", "-w", "-DRIDGE_EMULATED"]);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        flags.extend(["-mavx2", "-mfma"]);
    }
    flags
}

/// Builds the library of a source, unless an earlier run did.
fn build(folder: &Path, source: &'static str) -> Result<PathBuf, CudaError> {
    let version = compiler().map_err(CudaError::Unavailable)?;
    let failed = |log: String| CudaError::Compile { file: source.into(), target: "the host".into(), log };
    let main = Source::find(source).ok_or_else(|| failed("there is no such source".into()))?;
    let files: Vec<(&str, _)> = [main].into_iter().chain(HEADERS).chain(EMULATOR).map(|f| (f.name, f.text())).collect();
    let mut hash = blake3::Hasher::new();
    for part in flags().into_iter().chain([version]).chain(files.iter().flat_map(|(name, text)| [*name, text])) {
        hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    let stem = format!("{}-{}", source.trim_end_matches(".cu"), &hash.finalize().to_hex()[..16]);
    let done = folder.join(format!("{stem}.so"));
    if done.exists() {
        return Ok(done);
    }
    // Several processes may build at once: each in a folder of its own, and the last to finish wins.
    let place = folder.join(format!("{stem}-{}", std::process::id()));
    let io = |error: std::io::Error| failed(format!("{}: {error}", place.display()));
    std::fs::create_dir_all(place.join("emulate")).map_err(io)?;
    for (name, text) in &files {
        std::fs::write(place.join(name), text.as_bytes()).map_err(io)?;
    }
    let shim = "#include \"emulate/launch.h\"\n";
    std::fs::write(place.join("names.cpp"), format!("{shim}#include \"{source}\"\n")).map_err(io)?;
    let run = |arguments: &[&str]| {
        let output = Command::new("c++").current_dir(&place).args(flags()).args(arguments).output().map_err(io)?;
        match output.status.success() {
            true => Ok(output.stdout),
            false => Err(failed(String::from_utf8_lossy(&output.stderr).into_owned())),
        }
    };
    // Kernels may be made by macros: the preprocessor finds their names.
    let text = run(&["-E", "-P", "-D__global__=ridge_global_marker", "names.cpp"])?;
    let text = String::from_utf8_lossy(&text);
    let names = kernel_names(&text);
    let table: Vec<String> = names.iter().map(|name| format!("    RIDGE_KERNEL({name}),\n")).collect();
    let unit =
        format!("{shim}#include \"{source}\"\nRIDGE_KERNELS(\n{})\n", table.concat().trim_end().trim_end_matches(','));
    std::fs::write(place.join("unit.cpp"), unit).map_err(io)?;
    run(&["unit.cpp", "-o", "unit.so"])?;
    std::fs::rename(place.join("unit.so"), &done).map_err(io)?;
    std::fs::remove_dir_all(&place).map_err(io)?;
    Ok(done)
}

/// Names of the functions that follow the marker in preprocessed text.
fn kernel_names(text: &str) -> Vec<&str> {
    let heads = text.split("ridge_global_marker").skip(1);
    let names = heads.filter_map(|rest| rest.split('(').next()?.split_whitespace().last());
    names.collect()
}

#[cfg(test)]
mod tests;
