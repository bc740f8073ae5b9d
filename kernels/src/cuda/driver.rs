//! The real device: the CUDA driver, found at run time through cudarc.
//!
//! Everything runs on one stream in the order of the calls; copies to the host that go on beside it have a second one, which
//! waits for events of the first. cudarc's own contexts and slices are not used: they would order streams behind our back
//! and allocate pinned memory that the host reads slowly. **No device has run this file yet.**
//!
//! cudarc panics where a library or a symbol is missing; [`Driver::open`] asks for both before it uses anything, so that a machine
//! without a driver gets an error.

use super::compile;
use super::device::{
    Arg, ArgValue, CudaError, Device, Element, Kernel, Launch, Properties, Recorded, Recorder, TensorMap,
};
use super::lock;
use cudarc::driver::{DriverError, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Uploads of at least this many bytes go through pinned memory, in pieces of this size.
const STAGING_BYTES: usize = 16 << 20;
/// Uploads from this length on go through them.
const STAGED_FROM: usize = 1 << 20;
/// Threads that fill a staging buffer: one alone does not keep up with the bus.
const STAGING_THREADS: usize = 4;
/// Oldest compute capability that the kernels are written for.
const OLDEST_SM: u32 = 80;

/// A device and its streams.
#[derive(Debug)]
pub struct Driver {
    properties: Properties,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Kernels and copies in order.
    stream: sys::CUstream,
    /// Copies to the host.
    side: sys::CUstream,
    cache: Option<PathBuf>,
    functions: Mutex<HashMap<Kernel, Function>>,
    modules: Mutex<HashMap<&'static str, sys::CUmodule>>,
    staging: Mutex<Option<Staging>>,
    fetches: Mutex<Fetches>,
    recorder: Recorder,
    graphs: Mutex<Graphs>,
}

/// Graphs that were made, by number.
#[derive(Debug, Default)]
struct Graphs {
    made: u64,
    kept: HashMap<u64, sys::CUgraphExec>,
}

/// A kernel that has been loaded, and the dynamic shared memory that it was allowed.
#[derive(Clone, Copy, Debug)]
struct Function {
    handle: sys::CUfunction,
    shared_bytes: u32,
}

/// Two pinned buffers for uploads in turns, and when the device has read each.
#[derive(Debug)]
struct Staging {
    buffers: [*mut u8; 2],
    read: [sys::CUevent; 2],
    next: usize,
}

/// Events of fetches: those in use by number, and those to be used again.
#[derive(Debug, Default)]
struct Fetches {
    begun: u64,
    pending: HashMap<u64, sys::CUevent>,
    spare: Vec<sys::CUevent>,
}

// SAFETY: the driver's handles may be used from any thread once its context is current there, which `Driver::enter` sees to
// before every call; the pinned buffers are used under their mutex alone.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver API is thread-safe, and everything that changes here is behind a mutex.
unsafe impl Sync for Driver {}

/// Whether the driver's library is on this machine.
pub fn is_present() -> bool {
    // SAFETY: opens the library and closes it; NVIDIA's initialisers do nothing that the process must prepare for.
    unsafe { sys::is_culib_present() }
}

/// The devices that the driver shows, or why there are none.
pub fn devices() -> Result<usize, CudaError> {
    if !is_present() {
        let text = "the NVIDIA driver (libcuda) is not on this machine";
        return Err(CudaError::Unavailable(text.into()));
    }
    guarded(|| {
        call("cuInit", result::init())?;
        Ok(call("cuDeviceGetCount", result::device::get_count())? as usize)
    })
}

/// Runs what may ask a driver too old for a function: cudarc panics then.
fn guarded<T>(run: impl FnOnce() -> Result<T, CudaError>) -> Result<T, CudaError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let reason = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        Err(CudaError::Unavailable(format!("the NVIDIA driver on this machine is too old or incomplete: {reason}")))
    })
}

fn call<T>(call: &'static str, result: Result<T, DriverError>) -> Result<T, CudaError> {
    result.map_err(|error| CudaError::Call { call, reason: format!("{error:?}") })
}

impl Driver {
    /// Opens device `ordinal`; compiled kernels are kept in the folder `cache`, which must be the user's own.
    pub fn open(ordinal: usize, cache: Option<&Path>) -> Result<Self, CudaError> {
        let count = devices()?;
        if ordinal >= count {
            let text = format!("there is no device cuda:{ordinal}: the driver shows {count}");
            return Err(CudaError::Unavailable(text));
        }
        guarded(|| Self::open_checked(ordinal, cache))
    }

    fn open_checked(ordinal: usize, cache: Option<&Path>) -> Result<Self, CudaError> {
        use sys::CUdevice_attribute_enum as Attribute;
        let device = call("cuDeviceGet", result::device::get(ordinal as i32))?;
        // SAFETY: `device` is what the driver just returned.
        let attribute =
            |attribute| call("cuDeviceGetAttribute", unsafe { result::device::get_attribute(device, attribute) });
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let properties = Properties {
            name: call("cuDeviceGetName", result::device::get_name(device))?,
            sm: (major * 10 + minor) as u32,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
            // SAFETY: as above.
            memory_bytes: call("cuDeviceTotalMem", unsafe { result::device::total_mem(device) })? as u64,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u64,
        };
        if properties.sm < OLDEST_SM {
            return Err(CudaError::Unavailable(format!(
                "{} has compute capability {major}.{minor}; the kernels need 8.0 or later",
                properties.name
            )));
        }
        // SAFETY: a valid device; the context is released when the driver is dropped, and kept current by `enter`.
        let context = call("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        // SAFETY: retained just now.
        call("cuCtxSetCurrent", unsafe { result::ctx::set_current(context) })?;
        let stream = || call("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking));
        let driver = Self {
            properties,
            device,
            context,
            stream: stream()?,
            side: stream()?,
            cache: cache.map(Path::to_path_buf),
            functions: Mutex::default(),
            modules: Mutex::default(),
            staging: Mutex::default(),
            fetches: Mutex::default(),
            recorder: Recorder::default(),
            graphs: Mutex::default(),
        };
        driver.rehearse()?;
        Ok(driver)
    }

    /// Calls every function once that a pass needs, within the caller's guard: whatever is missing is missing here.
    fn rehearse(&self) -> Result<(), CudaError> {
        let at = self.alloc(256)?;
        let pinned = self.alloc_pinned(256)?;
        // SAFETY: 256 bytes on either side, freed below when everything has been waited for.
        unsafe {
            self.fill(at, 0x5a, 128)?;
            self.copy(at, at + 128, 128)?;
            self.upload(at, &[0x5a; 16])?;
            let fetch = self.begin_fetch(&[(at, 256)], pinned)?;
            self.fetched(fetch, true)?;
            let mut bytes = [0; 256];
            self.download(at, &mut bytes)?;
            let same = std::slice::from_raw_parts(pinned, 256) == bytes && bytes == [0x5a; 256];
            self.free_pinned(pinned, 256);
            self.free(at);
            if !same {
                return Err(CudaError::Unavailable(format!(
                    "{} does not keep what is written to it",
                    self.properties.name
                )));
            }
        }
        Ok(())
    }

    /// Makes the context current on this thread. Cheap if it is already.
    fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained for as long as `self` lives.
        call("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }

    /// A kernel, compiled and loaded if it is the first time, that may use this much shared memory.
    fn function(&self, kernel: Kernel, shared_bytes: u32) -> Result<sys::CUfunction, CudaError> {
        let mut functions = lock(&self.functions);
        let mut function = match functions.get(&kernel) {
            Some(function) => *function,
            None => {
                let module = self.module(kernel.source)?;
                let name = CString::new(kernel.name).expect("names of kernels are identifiers");
                // SAFETY: the module is loaded and stays so until `self` is dropped.
                let handle = call("cuModuleGetFunction", unsafe { result::module::get_function(module, name) })?;
                // 48 KiB need no permission.
                Function { handle, shared_bytes: 48 << 10 }
            }
        };
        if shared_bytes > function.shared_bytes {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
            // SAFETY: a loaded function.
            let set = unsafe { result::function::set_function_attribute(function.handle, MOST, shared_bytes as i32) };
            call("cuFuncSetAttribute", set)?;
            function.shared_bytes = shared_bytes;
        }
        functions.insert(kernel, function);
        Ok(function.handle)
    }

    fn module(&self, source: &'static str) -> Result<sys::CUmodule, CudaError> {
        let mut modules = lock(&self.modules);
        if let Some(module) = modules.get(source) {
            return Ok(*module);
        }
        let code = compile::cubin(source, self.properties.sm, self.cache.as_deref())?;
        // SAFETY: machine code that NVRTC made for this device; the driver copies it.
        let module = call("cuModuleLoadData", unsafe { result::module::load_data(code.as_ptr().cast()) })?;
        modules.insert(source, module);
        Ok(module)
    }

    /// Copies much through pinned memory: while the device reads one buffer, threads fill the other.
    ///
    /// # Safety
    ///
    /// As for [`Device::upload`].
    unsafe fn upload_staged(&self, to: u64, from: &[u8]) -> Result<(), CudaError> {
        let mut staging = lock(&self.staging);
        let staging = match &mut *staging {
            Some(staging) => staging,
            empty => empty.insert(self.new_staging()?),
        };
        for (index, piece) in from.chunks(STAGING_BYTES).enumerate() {
            let turn = staging.next;
            staging.next = 1 - turn;
            // SAFETY: the event exists; when it is done, nobody reads the buffer, which is `STAGING_BYTES` long and ours
            // alone under the lock. The device's range is the caller's promise.
            unsafe {
                call("cuEventSynchronize", result::event::synchronize(staging.read[turn]))?;
                let buffer = std::slice::from_raw_parts_mut(staging.buffers[turn], piece.len());
                fill_in_parallel(buffer, piece);
                let at = to + (index * STAGING_BYTES) as u64;
                call("cuMemcpyHtoDAsync", result::memcpy_htod_async(at, buffer, self.stream))?;
                call("cuEventRecord", result::event::record(staging.read[turn], self.stream))?;
            }
        }
        Ok(())
    }

    fn new_staging(&self) -> Result<Staging, CudaError> {
        let buffers = [self.alloc_pinned(STAGING_BYTES)?, self.alloc_pinned(STAGING_BYTES)?];
        Ok(Staging { buffers, read: [self.new_event()?, self.new_event()?], next: 0 })
    }

    fn new_event(&self) -> Result<sys::CUevent, CudaError> {
        call("cuEventCreate", result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))
    }
}

impl Driver {
    /// A graph of launches one behind the other. It is put together by hand and not captured from the stream, so that what other
    /// threads ask of the stream meanwhile has nothing to do with it.
    fn instantiate(&self, launches: &[Recorded]) -> Result<sys::CUgraphExec, CudaError> {
        /// Destroyed in any case: what runs is made of it.
        struct Draft(sys::CUgraph);
        impl Drop for Draft {
            fn drop(&mut self) {
                // SAFETY: made below, and nobody else has it.
                let _ = unsafe { sys::cuGraphDestroy(self.0) };
            }
        }
        let mut draft = std::ptr::null_mut();
        // SAFETY: a place for the handle.
        call("cuGraphCreate", unsafe { sys::cuGraphCreate(&raw mut draft, 0) }.result())?;
        let draft = Draft(draft);
        let mut last: Option<sys::CUgraphNode> = None;
        for Recorded { kernel, launch, args } in launches {
            let mut values: Vec<ArgValue> = args.iter().map(ArgValue::of).collect();
            let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| (&raw mut *value).cast()).collect();
            let node = sys::CUDA_KERNEL_NODE_PARAMS {
                func: self.function(*kernel, launch.shared_bytes)?,
                gridDimX: launch.grid[0],
                gridDimY: launch.grid[1],
                gridDimZ: launch.grid[2],
                blockDimX: launch.block[0],
                blockDimY: launch.block[1],
                blockDimZ: launch.block[2],
                sharedMemBytes: launch.shared_bytes,
                kernelParams: pointers.as_mut_ptr(),
                extra: std::ptr::null_mut(),
                kern: std::ptr::null_mut(),
                ctx: std::ptr::null_mut(),
            };
            let mut at = std::ptr::null_mut();
            let before = last.as_ref().map_or(std::ptr::null(), |node| &raw const *node);
            // SAFETY: the draft lives, `before` is one of its nodes or none, and the driver copies the parameters and what they
            // point to before it returns.
            let added = unsafe {
                let count = usize::from(last.is_some());
                sys::cuGraphAddKernelNode_v2(&raw mut at, draft.0, before, count, &raw const node)
            };
            call("cuGraphAddKernelNode", added.result())?;
            last = Some(at);
        }
        let mut graph = std::ptr::null_mut();
        // SAFETY: the draft lives; a place for the handle.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut graph, draft.0, 0) };
        call("cuGraphInstantiate", made.result())?;
        Ok(graph)
    }
}

/// Copies with several threads.
fn fill_in_parallel(to: &mut [u8], from: &[u8]) {
    let part = from.len().div_ceil(STAGING_THREADS).max(1 << 20);
    std::thread::scope(|scope| {
        for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}

impl Device for Driver {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn pci_bus_id(&self) -> Option<String> {
        let mut text = [0 as c_char; 32];
        // SAFETY: a device of the driver, and room for as many bytes as it is told; it writes a text that ends with a NUL.
        let asked = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as i32, self.device) };
        let bytes: Vec<u8> = text.iter().map(|c| *c as u8).take_while(|byte| *byte != 0).collect();
        asked.result().is_ok().then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    fn free_bytes(&self) -> Result<u64, CudaError> {
        self.enter()?;
        Ok(call("cuMemGetInfo", result::mem_get_info())?.0 as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<u64, CudaError> {
        self.enter()?;
        // SAFETY: no requirement but a context. A length of 0 is refused by the driver.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(at) => Ok(at),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(CudaError::OutOfMemory { wanted: bytes, free: self.free_bytes()? as usize })
            }
            Err(error) => call("cuMemAlloc", Err(error)),
        }
    }

    unsafe fn free(&self, at: u64) {
        // SAFETY: the caller's promise; the driver waits for the work that uses it.
        let freed = self.enter().and_then(|()| call("cuMemFree", unsafe { result::free_sync(at) }));
        if let Err(error) = freed {
            tracing::error!("device memory was not freed: {error}");
        }
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), CudaError> {
        self.recorder.refuse("upload")?;
        self.enter()?;
        if from.len() >= STAGED_FROM {
            // SAFETY: the caller's promise.
            return unsafe { self.upload_staged(to, from) };
        }
        // SAFETY: the caller's promise for the device; the driver copies pageable memory before it returns.
        call("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(to, from, self.stream) })
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), CudaError> {
        self.recorder.refuse("download")?;
        self.enter()?;
        // SAFETY: the caller's promise; `to` is borrowed until the copy is done, because this waits for it.
        unsafe {
            call("cuMemcpyDtoHAsync", result::memcpy_dtoh_async(to, from, self.stream))?;
            call("cuStreamSynchronize", result::stream::synchronize(self.stream))
        }
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        self.recorder.refuse("copy")?;
        self.enter()?;
        // SAFETY: the caller's promise.
        call("cuMemcpyDtoDAsync", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }

    unsafe fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), CudaError> {
        self.recorder.refuse("fill")?;
        self.enter()?;
        // SAFETY: the caller's promise.
        call("cuMemsetD8Async", unsafe { result::memset_d8_async(at, byte, bytes, self.stream) })
    }

    unsafe fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), CudaError> {
        if self.recorder.takes(kernel, launch, args) {
            return Ok(());
        }
        self.enter()?;
        let failed = |reason| CudaError::Launch { kernel: kernel.name, file: kernel.source, reason };
        let function = self.function(kernel, launch.shared_bytes)?;
        let mut values: Vec<ArgValue> = args.iter().map(ArgValue::of).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| (&raw mut *value).cast()).collect();
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let shape = ((gx, gy, gz), (bx, by, bz), launch.shared_bytes);
        // SAFETY: the function is loaded, `pointers` are to values that the driver copies before it returns, and that they fit the
        // kernel's parameters is the caller's promise.
        let launched =
            unsafe { result::launch_kernel(function, shape.0, shape.1, shape.2, self.stream, &mut pointers) };
        launched.map_err(|error| failed(format!("{error:?} for {launch:?}")))
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.recorder.refuse("synchronize")?;
        self.enter()?;
        // SAFETY: both streams live as long as `self`.
        unsafe {
            call("cuStreamSynchronize", result::stream::synchronize(self.stream))?;
            call("cuStreamSynchronize", result::stream::synchronize(self.side))
        }
    }

    fn begin_recording(&self) -> Result<(), CudaError> {
        self.recorder.begin()
    }

    fn end_recording(&self, keep: bool) -> Result<Option<u64>, CudaError> {
        let launches = self.recorder.end()?;
        if !keep {
            return Ok(None);
        }
        self.enter()?;
        let graph = guarded(|| self.instantiate(&launches))?;
        let mut graphs = lock(&self.graphs);
        graphs.made += 1;
        let number = graphs.made;
        graphs.kept.insert(number, graph);
        Ok(Some(number))
    }

    unsafe fn replay(&self, graph: u64) -> Result<(), CudaError> {
        self.recorder.refuse("replay")?;
        self.enter()?;
        let graph = *lock(&self.graphs).kept.get(&graph).expect("a graph that was recorded");
        // SAFETY: the graph and the stream exist; what its launches read and write is the caller's promise.
        call("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph, self.stream) }.result())
    }

    unsafe fn free_graph(&self, graph: u64) {
        let Some(graph) = lock(&self.graphs).kept.remove(&graph) else { return };
        let freed = self.enter().and_then(|()| self.synchronize()).and_then(|()| {
            // SAFETY: nobody else has it, and it is not running any more.
            call("cuGraphExecDestroy", unsafe { sys::cuGraphExecDestroy(graph) }.result())
        });
        if let Err(error) = freed {
            tracing::error!("a graph was not freed: {error}");
        }
    }

    fn raw_stream(&self) -> Option<u64> {
        self.enter().ok()?;
        Some(self.stream as u64)
    }

    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; 128], CudaError> {
        use sys::{
            CUtensorMapDataType_enum as Type, CUtensorMapFloatOOBfill_enum as Fill,
            CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
            CUtensorMapSwizzle_enum as Swizzle,
        };
        if self.properties.sm < 90 {
            return Err(CudaError::Unavailable(format!("{} has no copy engine for tensors", self.properties.name)));
        }
        self.enter()?;
        let element = match map.element {
            Element::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Element::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Element::Byte => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let swizzle = match map.box_cols as usize * map.element.bytes() {
            128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            other => panic!("boxes of {other} bytes in a row"),
        };
        let mut out = sys::CUtensorMap { opaque: [0; 16] };
        // An old driver lacks the function, which cudarc would panic about.
        guarded(|| {
            // SAFETY: pointers to arrays of at least as many dimensions, and of one stride less, and to where the map goes; the address
            // is only written down.
            let encoded = unsafe {
                sys::cuTensorMapEncodeTiled(
                    &raw mut out,
                    element,
                    if map.planes == 0 { 2 } else { 3 },
                    map.address as *mut c_void,
                    [map.cols, map.rows, map.planes].as_ptr(),
                    [map.row_bytes, map.plane_bytes].as_ptr(),
                    [map.box_cols, map.box_rows, 1].as_ptr(),
                    [1, 1, 1].as_ptr(),
                    Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    swizzle,
                    Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            };
            call("cuTensorMapEncodeTiled", encoded.result())
        })?;
        let mut bytes = [0; 128];
        for (field, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(out.opaque) {
            *field = word.to_ne_bytes();
        }
        Ok(bytes)
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        self.enter()?;
        // Flags of 0: not write-combined, which the host would read at a crawl.
        // SAFETY: no requirement but a context; the memory is initialised below.
        unsafe {
            let at = call("cuMemHostAlloc", result::malloc_host(bytes.max(1), 0))?.cast::<u8>();
            at.write_bytes(0, bytes.max(1));
            Ok(at)
        }
    }

    unsafe fn free_pinned(&self, at: *mut u8, _bytes: usize) {
        // SAFETY: the caller's promise.
        let freed = self.enter().and_then(|()| call("cuMemFreeHost", unsafe { result::free_host(at.cast()) }));
        if let Err(error) = freed {
            tracing::error!("pinned memory was not freed: {error}");
        }
    }

    unsafe fn begin_fetch(&self, pieces: &[(u64, usize)], to: *mut u8) -> Result<u64, CudaError> {
        self.recorder.refuse("begin_fetch")?;
        self.enter()?;
        let mut fetches = lock(&self.fetches);
        let event = match fetches.spare.pop() {
            Some(event) => event,
            None => self.new_event()?,
        };
        let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: streams and event exist; the second record takes the event's place only after the wait was queued. The
        // memory on either side is the caller's promise.
        unsafe {
            call("cuEventRecord", result::event::record(event, self.stream))?;
            call("cuStreamWaitEvent", result::stream::wait_event(self.side, event, wait))?;
            let mut to = to;
            for (from, bytes) in pieces {
                let room = std::slice::from_raw_parts_mut(to, *bytes);
                call("cuMemcpyDtoHAsync", result::memcpy_dtoh_async(room, *from, self.side))?;
                to = to.add(*bytes);
            }
            call("cuEventRecord", result::event::record(event, self.side))?;
        }
        fetches.begun += 1;
        let number = fetches.begun;
        fetches.pending.insert(number, event);
        Ok(number)
    }

    fn fetched(&self, fetch: u64, wait: bool) -> Result<bool, CudaError> {
        self.enter()?;
        let event = *lock(&self.fetches).pending.get(&fetch).expect("a fetch that was begun and is not done");
        // SAFETY: the event exists until `self` is dropped.
        let done = unsafe { if wait { result::event::synchronize(event) } else { result::event::query(event) } };
        if let Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) = done {
            return Ok(false);
        }
        call("cuEventQuery", done)?;
        let mut fetches = lock(&self.fetches);
        if let Some(event) = fetches.pending.remove(&fetch) {
            fetches.spare.push(event);
        }
        Ok(true)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().and_then(|()| self.synchronize()).is_err() {
            // A device that no longer answers is left as it is.
            return;
        }
        let staging = lock(&self.staging).take();
        let (fetches, modules) = (std::mem::take(&mut *lock(&self.fetches)), std::mem::take(&mut *lock(&self.modules)));
        let graphs = std::mem::take(&mut *lock(&self.graphs));
        // SAFETY: everything asked for is done, and these handles are used by nobody else.
        unsafe {
            for (buffer, event) in staging.into_iter().flat_map(|s| s.buffers.into_iter().zip(s.read)) {
                let _ = result::free_host(buffer.cast());
                let _ = result::event::destroy(event);
            }
            for event in fetches.spare.into_iter().chain(fetches.pending.into_values()) {
                let _ = result::event::destroy(event);
            }
            for graph in graphs.kept.into_values() {
                let _ = sys::cuGraphExecDestroy(graph);
            }
            for module in modules.into_values() {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.side);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a driver there is an error that says so; with one, the self-test's kernel runs.
    #[test]
    fn a_missing_driver_is_an_error_and_not_a_panic() {
        match Driver::open(0, None) {
            Ok(driver) => println!("{:?}", driver.properties()),
            Err(error) => {
                println!("{error}");
                assert!(matches!(error, CudaError::Unavailable(_) | CudaError::Call { .. }), "{error:?}");
                assert!(is_present() || error.to_string().contains("libcuda"), "{error}");
            }
        }
    }
}
