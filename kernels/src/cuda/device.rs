//! What a device is to everybody above it: memory, copies in the order of one stream, and launches.
//!
//! [`Device`] has two implementations, the CUDA driver and the emulator. Its calls are unsafe because addresses are
//! numbers; [`Buffer`] owns one allocation and makes copies to and from it safe. Read [`Device`] and [`Buffer`] first.

use super::lock;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

/// Why something on a device went wrong.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CudaError {
    /// There is no such device here, or what it takes to use it is missing.
    #[error("{0}")]
    Unavailable(String),
    /// The driver, or a library of it, refused a call.
    #[error("{call}: {reason}")]
    Call {
        /// The function.
        call: &'static str,
        /// What it said.
        reason: String,
    },
    /// A kernel's source does not compile.
    #[error("{file} does not compile for {target}:\n{log}")]
    Compile {
        /// The `.cu` file.
        file: String,
        /// The architecture, or the host's compiler.
        target: String,
        /// What the compiler said.
        log: String,
    },
    /// There is not enough memory.
    #[error("{wanted} bytes of device memory asked for, {free} are free")]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes that are free.
        free: usize,
    },
    /// A launch was refused or failed.
    #[error("{kernel} of {file}: {reason}")]
    Launch {
        /// The kernel.
        kernel: &'static str,
        /// Its source.
        file: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A copy or fill reaches beyond its allocation.
    #[error("{bytes} bytes at {address:#x} are not within one allocation")]
    OutOfBounds {
        /// Where.
        address: u64,
        /// How many.
        bytes: usize,
    },
    /// Bytes around an allocation were overwritten (the emulator looks).
    #[error("the {bytes} bytes at {address:#x} were written beyond their {side}")]
    Overrun {
        /// The allocation.
        address: u64,
        /// Its length.
        bytes: usize,
        /// `begin` or `end`.
        side: &'static str,
    },
}

/// What is known of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Properties {
    /// Its name, as the driver says it.
    pub name: String,
    /// Compute capability times ten: 80 (A100), 89 (L4, RTX 40), 90 (H100, H200), 100 (B200).
    pub sm: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory of a block, in bytes, when a kernel asks for it.
    pub shared_per_block: u32,
    /// Device memory, in bytes.
    pub memory_bytes: u64,
    /// Second-level cache, in bytes.
    pub l2_bytes: u64,
}

/// A kernel: the source it is in and its `extern "C"` name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Kernel {
    /// File below `kernels/cuda/`, such as `gemm_mma.cu`.
    pub source: &'static str,
    /// Name of the `extern "C" __global__` function.
    pub name: &'static str,
}

/// The shape of a launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// An argument of a kernel. Its kind must be the parameter's: the emulator checks that, hardware would read other bytes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Arg {
    /// A device address (any pointer).
    Ptr(u64),
    /// `unsigned`.
    U32(u32),
    /// `int`.
    I32(i32),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// A structure of 128 bytes by value, aligned to 64: a tensor map.
    Bytes128([u8; 128]),
}

/// What Hopper's copy engine copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Element {
    /// bf16.
    Bf16,
    /// f16.
    F16,
    /// fp8, or any bytes.
    Byte,
}

impl Element {
    /// Bytes of one.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::Byte => 1,
        }
    }
}

/// A matrix in device memory, or several at equal distances, as Hopper's copy engine is told of it: row-major, fetched a box at a time
/// into shared memory, swizzled over the bytes of a box's rows; what lies outside is zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorMap {
    /// Where it begins; a multiple of 16.
    pub address: u64,
    /// What its elements are.
    pub element: Element,
    /// Elements of a row.
    pub cols: u64,
    /// Rows.
    pub rows: u64,
    /// Distance between rows; a multiple of 16.
    pub row_bytes: u64,
    /// How many matrices; 0 is one, whose boxes have two coordinates and not three.
    pub planes: u64,
    /// Distance between them; a multiple of 16.
    pub plane_bytes: u64,
    /// Elements of a row of a box: 128, 64 or 32 bytes of them.
    pub box_cols: u32,
    /// Rows of a box, at most 256.
    pub box_rows: u32,
}

/// An argument in memory, aligned as the strictest of them needs it.
#[repr(C, align(64))]
pub(super) struct ArgValue([u8; 128]);

impl ArgValue {
    pub(super) fn of(arg: &Arg) -> Self {
        let mut bytes = [0; 128];
        match arg {
            Arg::Ptr(v) | Arg::U64(v) => bytes[..8].copy_from_slice(&v.to_ne_bytes()),
            Arg::U32(v) => bytes[..4].copy_from_slice(&v.to_ne_bytes()),
            Arg::I32(v) => bytes[..4].copy_from_slice(&v.to_ne_bytes()),
            Arg::F32(v) => bytes[..4].copy_from_slice(&v.to_ne_bytes()),
            Arg::Bytes128(v) => bytes = *v,
        }
        Self(bytes)
    }
}

/// A device, or what stands in for one.
///
/// Everything is done in the order of the calls, as on one CUDA stream, while the caller goes on: an error of a launch may
/// only show at a later call or at [`Device::synchronize`].
///
/// # Safety
///
/// of the unsafe functions: the bytes that a call reads or writes on the device must lie in memory of this device that is
/// allocated and stays so until the call's work is done (freeing waits for it); what a launch reads and writes follows
/// from its kernel and arguments, which must be of the kinds and in the order of the kernel's parameters.
pub trait Device: Send + Sync + fmt::Debug {
    /// What is known of it.
    fn properties(&self) -> &Properties;

    /// Its PCI address, by which NVML knows it; `None` if it has none.
    fn pci_bus_id(&self) -> Option<String> {
        None
    }

    /// Bytes that are free now.
    fn free_bytes(&self) -> Result<u64, CudaError>;

    /// Allocates at a multiple of 256. The contents are undefined.
    fn alloc(&self, bytes: usize) -> Result<u64, CudaError>;

    /// Frees what [`Device::alloc`] returned, after everything that was asked for before.
    ///
    /// # Safety
    ///
    /// See the trait; and `at` is not used again.
    unsafe fn free(&self, at: u64);

    /// Copies from the host. The bytes may change as soon as this returns.
    ///
    /// # Safety
    ///
    /// See the trait.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), CudaError>;

    /// Copies to the host, and waits for it.
    ///
    /// # Safety
    ///
    /// See the trait.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), CudaError>;

    /// Copies within the device; the two ranges do not overlap.
    ///
    /// # Safety
    ///
    /// See the trait.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError>;

    /// Sets every byte.
    ///
    /// # Safety
    ///
    /// See the trait.
    unsafe fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), CudaError>;

    /// Launches a kernel, compiling its source if this is the first of it.
    ///
    /// # Safety
    ///
    /// See the trait.
    unsafe fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), CudaError>;

    /// Waits for everything asked for so far.
    fn synchronize(&self) -> Result<(), CudaError>;

    /// The argument that describes a matrix to the copy engine.
    ///
    /// # Errors
    ///
    /// If the device has no such engine, or the driver takes no such shape.
    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; 128], CudaError>;

    /// The CUDA stream that everything runs on, for libraries that take one, with its context current on this thread. `None` if there
    /// is no such thing.
    fn raw_stream(&self) -> Option<u64> {
        None
    }

    /// From now on writes down the calling thread's launches and makes none of them. Other threads go on as usual; this one may ask
    /// for nothing else that has a place in the stream. See [`Graph`].
    fn begin_recording(&self) -> Result<(), CudaError>;

    /// Makes a graph of what was written down since [`Device::begin_recording`], if it `keep`s it. Returns its number.
    fn end_recording(&self, keep: bool) -> Result<Option<u64>, CudaError>;

    /// Asks for all launches of a graph, with the arguments that they had, one after the other.
    ///
    /// # Safety
    ///
    /// See the trait, for each of the launches; and the graph has not been freed.
    unsafe fn replay(&self, graph: u64) -> Result<(), CudaError>;

    /// Frees a graph, after everything that was asked for before.
    ///
    /// # Safety
    ///
    /// The number came from [`Device::end_recording`] and is not used again.
    unsafe fn free_graph(&self, graph: u64);

    /// Allocates host memory that the device copies to without a detour. See [`Pinned`].
    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, CudaError>;

    /// Frees it.
    ///
    /// # Safety
    ///
    /// `at` came from [`Device::alloc_pinned`] with this many bytes; nothing uses it any more.
    unsafe fn free_pinned(&self, at: *mut u8, bytes: usize);

    /// Copies pieces of device memory, each an address and a length, one behind the other into host memory. The copies begin
    /// when everything asked for so far is done, and run beside what is asked for after them. Returns the number by which
    /// [`Device::fetched`] knows them. See [`Fetch`].
    ///
    /// # Safety
    ///
    /// See the trait; `to` came from [`Device::alloc_pinned`], has room, and nobody touches it until they are done.
    unsafe fn begin_fetch(&self, pieces: &[(u64, usize)], to: *mut u8) -> Result<u64, CudaError>;

    /// Whether the copies of a fetch are done, waiting for them if asked to. After `true` the number means nothing any more.
    fn fetched(&self, fetch: u64, wait: bool) -> Result<bool, CudaError>;
}

/// A launch that was written down.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Recorded {
    pub kernel: Kernel,
    pub launch: Launch,
    pub args: Vec<Arg>,
}

/// Which thread's launches a device writes down, and those it has.
#[derive(Debug, Default)]
pub(super) struct Recorder(Mutex<Option<(ThreadId, Vec<Recorded>)>>);

impl Recorder {
    pub fn begin(&self) -> Result<(), CudaError> {
        let mut state = lock(&self.0);
        if state.is_some() {
            return Err(CudaError::Unavailable("launches are being recorded already".into()));
        }
        *state = Some((std::thread::current().id(), Vec::new()));
        Ok(())
    }

    /// Whether the launch was written down, so that it must not be made.
    pub fn takes(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> bool {
        match &mut *lock(&self.0) {
            Some((thread, launches)) if *thread == std::thread::current().id() => {
                launches.push(Recorded { kernel, launch: *launch, args: args.to_vec() });
                true
            }
            _ => false,
        }
    }

    /// Refuses what is no launch to the thread that records.
    pub fn refuse(&self, what: &'static str) -> Result<(), CudaError> {
        match &*lock(&self.0) {
            Some((thread, _)) if *thread == std::thread::current().id() => Err(CudaError::Call {
                call: what,
                reason: "launches are being recorded, and nothing else can be".into(),
            }),
            _ => Ok(()),
        }
    }

    pub fn end(&self) -> Result<Vec<Recorded>, CudaError> {
        let mut state = lock(&self.0);
        match state.take() {
            Some((thread, launches)) if thread == std::thread::current().id() => Ok(launches),
            other => {
                *state = other;
                Err(CudaError::Unavailable("this thread records no launches".into()))
            }
        }
    }
}

/// Launches that were recorded once and are made again with one call: a device starts them one behind the other without the host.
/// Their arguments, addresses above all, stay what they were; what changes from time to time lies in the memory they point to.
#[derive(Debug)]
pub struct Graph {
    device: Arc<dyn Device>,
    number: u64,
}

impl Graph {
    /// Records the launches that `run` asks of the device on this thread. They are not made.
    ///
    /// # Errors
    ///
    /// Those of `run`, and what the device refuses: copies while recording, or graphs altogether.
    pub fn record(device: &Arc<dyn Device>, run: impl FnOnce() -> Result<(), CudaError>) -> Result<Self, CudaError> {
        /// Ends the recording if `run` fails or panics.
        struct Recording<'a>(&'a dyn Device);
        impl Drop for Recording<'_> {
            fn drop(&mut self) {
                if let Err(error) = self.0.end_recording(false) {
                    tracing::error!("a recording does not end: {error}");
                }
            }
        }
        device.begin_recording()?;
        let recording = Recording(&**device);
        run()?;
        std::mem::forget(recording);
        let number = device.end_recording(true)?.expect("a recording that is kept has a number");
        Ok(Self { device: device.clone(), number })
    }

    /// Asks for the launches again.
    ///
    /// # Safety
    ///
    /// What was promised of each launch when it was recorded holds again: its addresses are of memory that is still allocated, and
    /// what lies there is what the kernels expect.
    pub unsafe fn replay(&self) -> Result<(), CudaError> {
        // SAFETY: passed on; the graph lives as long as `self`.
        unsafe { self.device.replay(self.number) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: recorded by `record`, and nobody can ask for it any more.
        unsafe { self.device.free_graph(self.number) }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Numbers whose every bit pattern is a value and that have no padding, so that arrays of them are bytes.
pub trait Plain: Copy + Default + sealed::Sealed {}

macro_rules! plain {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Plain for $t {})* };
}
plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` types have no padding, so all `size_of_val` bytes are initialised; u8 needs no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; and whatever bytes are written, they are values of a `Plain` type.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// An allocation, freed when dropped.
#[derive(Debug)]
pub struct Buffer {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Allocates `bytes`; the contents are undefined.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, CudaError> {
        let address = device.alloc(bytes)?;
        Ok(Self { device: device.clone(), address, bytes })
    }

    /// Allocates and uploads.
    pub fn of<T: Plain>(device: &Arc<dyn Device>, values: &[T]) -> Result<Self, CudaError> {
        let buffer = Self::new(device, size_of_val(values))?;
        buffer.upload(0, values)?;
        Ok(buffer)
    }

    /// Where it begins; a multiple of 256.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device it lies on.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// The address of byte `offset`, at which `bytes` follow.
    ///
    /// # Panics
    ///
    /// If they do not.
    pub fn at(&self, offset: usize, bytes: usize) -> u64 {
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(fits, "{bytes} bytes at {offset} of a buffer of {}", self.bytes);
        self.address + offset as u64
    }

    /// Copies `values` to byte `offset`.
    ///
    /// # Panics
    ///
    /// If they reach beyond the end.
    pub fn upload<T: Plain>(&self, offset: usize, values: &[T]) -> Result<(), CudaError> {
        let to = self.at(offset, size_of_val(values));
        // SAFETY: the range lies in this allocation, which lives until `self` is dropped, and freeing waits.
        unsafe { self.device.upload(to, bytes_of(values)) }
    }

    /// Copies from byte `offset` on, waiting for everything before.
    ///
    /// # Panics
    ///
    /// If that reaches beyond the end.
    pub fn download<T: Plain>(&self, offset: usize, values: &mut [T]) -> Result<(), CudaError> {
        let from = self.at(offset, size_of_val(values));
        // SAFETY: the range lies in this allocation.
        unsafe { self.device.download(from, bytes_of_mut(values)) }
    }

    /// `count` values from the beginning.
    pub fn to_vec<T: Plain>(&self, count: usize) -> Result<Vec<T>, CudaError> {
        let mut values = vec![T::default(); count];
        self.download(0, &mut values)?;
        Ok(values)
    }

    /// Sets every byte; 0xff makes every float a NaN.
    pub fn fill(&self, byte: u8) -> Result<(), CudaError> {
        // SAFETY: exactly this allocation.
        unsafe { self.device.fill(self.address, byte, self.bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and nobody can ask for its address any more.
        unsafe { self.device.free(self.address) }
    }
}

/// Host memory that the device copies to directly; pageable memory would make a copy wait for the host.
#[derive(Debug)]
pub struct Pinned {
    device: Arc<dyn Device>,
    at: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory that belongs to this value alone; any thread may read, write or free it.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Allocates at least one byte.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, CudaError> {
        let bytes = bytes.max(1);
        let at = device.alloc_pinned(bytes)?;
        Ok(Self { device: device.clone(), at, bytes })
    }

    /// What it holds.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `alloc_pinned` gave this many initialised bytes; a `Fetch` that writes to them owns this value meanwhile.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this size, and no fetch is under way, because it would own this value.
        unsafe { self.device.free_pinned(self.at, self.bytes) }
    }
}

/// Copies to the host that are under way beside the device's other work.
#[derive(Debug)]
pub struct Fetch {
    /// `None` once the copies are done and the memory was handed back.
    pinned: Option<Pinned>,
    number: u64,
}

impl Fetch {
    /// Begins to copy `pieces` one behind the other into `pinned`, after everything asked for so far.
    ///
    /// # Safety
    ///
    /// Each piece lies in memory of `pinned`'s device that stays allocated, and what is asked for later does not write to it,
    /// until the copies are done.
    ///
    /// # Panics
    ///
    /// If they do not fit.
    pub unsafe fn begin(pieces: &[(u64, usize)], pinned: Pinned) -> Result<Self, CudaError> {
        let total: usize = pieces.iter().map(|(_, bytes)| bytes).sum();
        assert!(total <= pinned.bytes, "{total} bytes into {}", pinned.bytes);
        // SAFETY: the memory has room and is in this value's keeping; the pieces are the caller's promise.
        let number = unsafe { pinned.device.begin_fetch(pieces, pinned.at)? };
        Ok(Self { pinned: Some(pinned), number })
    }

    /// Hands the memory back, filled, if the copies are done; or waits for them.
    pub fn take(&mut self, wait: bool) -> Result<Option<Pinned>, CudaError> {
        let Some(pinned) = &self.pinned else { return Ok(None) };
        match pinned.device.fetched(self.number, wait)? {
            true => Ok(self.pinned.take()),
            false => Ok(None),
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        if let Some(pinned) = self.pinned.take()
            && pinned.device.fetched(self.number, true).is_err()
        {
            // Nobody knows whether the device still writes there: better lost than freed.
            std::mem::forget(pinned);
        }
    }
}
