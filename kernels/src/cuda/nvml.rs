//! What a device's driver says of its state: power, utilisation, memory, clocks and temperature, from NVML (`libnvidia-ml`), found at
//! run time as the driver itself is. No device has run this.
//!
//! Read [`Nvml::open`] and [`Reading`].

use super::device::CudaError;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;
use std::sync::Arc;

/// Where the library is looked for: its name as the driver installs it.
const NAME: &str = "libnvidia-ml.so.1";
/// Longest version text (`NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE`).
const VERSION_BYTES: usize = 80;
/// `NVML_CLOCK_SM`.
const CLOCK_SM: c_int = 1;
/// `NVML_CLOCK_MEM`.
const CLOCK_MEMORY: c_int = 2;
/// `NVML_TEMPERATURE_GPU`.
const TEMPERATURE_GPU: c_int = 0;

/// A device's state. What it does not say is `None`.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Reading {
    /// Power that the board draws, in milliwatts.
    pub power_mw: Option<u32>,
    /// Part of the last moments (about a sixth of a second to a second) in which a kernel ran, in percent.
    pub busy_percent: Option<u32>,
    /// Part of them in which memory was read or written, in percent.
    pub memory_busy_percent: Option<u32>,
    /// Memory taken, by all processes, in bytes.
    pub memory_used_bytes: Option<u64>,
    /// Memory that there is, in bytes.
    pub memory_total_bytes: Option<u64>,
    /// Clock of the multiprocessors, in MHz.
    pub clock_mhz: Option<u32>,
    /// Clock of the memory, in MHz.
    pub memory_clock_mhz: Option<u32>,
    /// Temperature of the chip, in degrees Celsius.
    pub temperature_c: Option<u32>,
}

type Handle = *mut c_void;

/// `nvmlUtilization_t`.
#[repr(C)]
#[derive(Default)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// The library, initialised.
pub struct Nvml {
    by_bus: unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int,
    power: unsafe extern "C" fn(Handle, *mut c_uint) -> c_int,
    utilization: unsafe extern "C" fn(Handle, *mut Utilization) -> c_int,
    memory: unsafe extern "C" fn(Handle, *mut Memory) -> c_int,
    clock: unsafe extern "C" fn(Handle, c_int, *mut c_uint) -> c_int,
    /// CUDA 13 calls it deprecated: it may be gone one day.
    temperature: Option<unsafe extern "C" fn(Handle, c_int, *mut c_uint) -> c_int>,
    version: unsafe extern "C" fn(*mut c_char, c_uint) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    shutdown: unsafe extern "C" fn() -> c_int,
    /// The functions live as long as it does.
    _library: Library,
}

impl std::fmt::Debug for Nvml {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nvml")
    }
}

impl Nvml {
    /// Opens and initialises the library.
    ///
    /// # Errors
    ///
    /// [`CudaError::Unavailable`] if it is not on this machine, or too old.
    pub fn open() -> Result<Arc<Self>, CudaError> {
        Self::open_at(Path::new(NAME))
    }

    fn open_at(path: &Path) -> Result<Arc<Self>, CudaError> {
        let unavailable = |error: libloading::Error| CudaError::Unavailable(format!("{}: {error}", path.display()));
        // SAFETY: the library's initialisers are those of a plain shared library.
        let library = unsafe { Library::new(path) }.map_err(unavailable)?;
        // SAFETY: the signatures are those of nvml.h.
        let (nvml, init) = unsafe { Self::with(library) }.map_err(unavailable)?;
        // SAFETY: may be called at any time.
        let code = unsafe { init() };
        if code != 0 {
            let reason = nvml.reason(code);
            // What was not initialised must not be shut down; the library stays loaded.
            std::mem::forget(nvml);
            return Err(CudaError::Call { call: "nvmlInit", reason });
        }
        Ok(Arc::new(nvml))
    }

    /// # Safety
    ///
    /// The library is NVML.
    unsafe fn with(library: Library) -> Result<(Self, unsafe extern "C" fn() -> c_int), libloading::Error> {
        // SAFETY: the signatures are those of nvml.h.
        unsafe {
            let init = *library.get(b"nvmlInit_v2\0")?;
            let nvml = Self {
                by_bus: *library.get(b"nvmlDeviceGetHandleByPciBusId_v2\0")?,
                power: *library.get(b"nvmlDeviceGetPowerUsage\0")?,
                utilization: *library.get(b"nvmlDeviceGetUtilizationRates\0")?,
                memory: *library.get(b"nvmlDeviceGetMemoryInfo\0")?,
                clock: *library.get(b"nvmlDeviceGetClockInfo\0")?,
                temperature: library.get(b"nvmlDeviceGetTemperature\0").ok().map(|found| *found),
                version: *library.get(b"nvmlSystemGetDriverVersion\0")?,
                error: *library.get(b"nvmlErrorString\0")?,
                shutdown: *library.get(b"nvmlShutdown\0")?,
                _library: library,
            };
            Ok((nvml, init))
        }
    }

    fn reason(&self, code: c_int) -> String {
        // SAFETY: the library returns a text of its own for any number.
        let text = unsafe { (self.error)(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: it ends with a NUL and is never freed.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// The driver's version, such as `580.159.04`.
    pub fn driver_version(&self) -> Option<String> {
        let mut text = [0 as c_char; VERSION_BYTES];
        // SAFETY: there is room for as many bytes as it is told, of which it writes a text that ends with a NUL.
        let code = unsafe { (self.version)(text.as_mut_ptr(), VERSION_BYTES as c_uint) };
        let bytes: Vec<u8> = text.iter().map(|c| *c as u8).take_while(|byte| *byte != 0).collect();
        (code == 0 && bytes.len() < VERSION_BYTES).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The device at a PCI address as the CUDA driver writes it: the two number devices differently.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn device(self: &Arc<Self>, pci_bus_id: &str) -> Result<Gauge, CudaError> {
        let call = "nvmlDeviceGetHandleByPciBusId";
        let id =
            CString::new(pci_bus_id).map_err(|_| CudaError::Call { call, reason: "a NUL in the address".into() })?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a text and a place for the handle.
        let code = unsafe { (self.by_bus)(id.as_ptr(), &raw mut handle) };
        match code {
            0 => Ok(Gauge { nvml: self.clone(), handle }),
            code => Err(CudaError::Call { call, reason: format!("{pci_bus_id}: {}", self.reason(code)) }),
        }
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: it was initialised, and no handle is used after this.
        unsafe { (self.shutdown)() };
    }
}

/// One device.
#[derive(Debug)]
pub struct Gauge {
    nvml: Arc<Nvml>,
    handle: Handle,
}

// SAFETY: NVML may be called from any thread ("NVML is thread-safe" in its documentation); the handle is a name for a device.
unsafe impl Send for Gauge {}

impl Gauge {
    /// Its state now. Takes some milliseconds at most.
    pub fn read(&self) -> Reading {
        let number = |get: &dyn Fn(*mut c_uint) -> c_int| {
            let mut value = 0;
            (get(&raw mut value) == 0).then_some(value)
        };
        let (handle, nvml) = (self.handle, &self.nvml);
        let (mut busy, mut memory) = (Utilization::default(), Memory::default());
        // SAFETY: the handle is of this library, which is initialised, and each call gets a place for what it writes.
        unsafe {
            let has_busy = (nvml.utilization)(handle, &raw mut busy) == 0;
            let has_memory = (nvml.memory)(handle, &raw mut memory) == 0;
            Reading {
                power_mw: number(&|at| (nvml.power)(handle, at)),
                busy_percent: has_busy.then_some(busy.gpu),
                memory_busy_percent: has_busy.then_some(busy.memory),
                memory_used_bytes: has_memory.then_some(memory.used),
                memory_total_bytes: has_memory.then_some(memory.total),
                clock_mhz: number(&|at| (nvml.clock)(handle, CLOCK_SM, at)),
                memory_clock_mhz: number(&|at| (nvml.clock)(handle, CLOCK_MEMORY, at)),
                temperature_c: nvml.temperature.and_then(|read| number(&|at| read(handle, TEMPERATURE_GPU, at))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A library with NVML's functions, whose one device draws 321 W and has no thermometer.
    const STAND_IN: &str = r#"
        #include <string.h>
        static int alive = 0;
        int nvmlInit_v2(void) { alive = 1; return 0; }
        int nvmlShutdown(void) { alive = 0; return 0; }
        const char *nvmlErrorString(int code) { return code == 6 ? "Not Found" : "Unknown Error"; }
        int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "580.159.04", length); return alive ? 0 : 1; }
        int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
            static int one; *device = &one; return strcmp(id, "00000000:1B:00.0") == 0 ? 0 : 6;
        }
        int nvmlDeviceGetPowerUsage(void *d, unsigned *mw) { *mw = 321000; return alive ? 0 : 1; }
        int nvmlDeviceGetUtilizationRates(void *d, unsigned *r) { r[0] = 97; r[1] = 41; return 0; }
        int nvmlDeviceGetMemoryInfo(void *d, unsigned long long *m) { m[0] = 150ull << 30; m[1] = 0; m[2] = 20ull << 30; return 0; }
        int nvmlDeviceGetClockInfo(void *d, int which, unsigned *mhz) { *mhz = which == 1 ? 1980 : which == 2 ? 3201 : 7; return 0; }
        int nvmlDeviceGetTemperature(void *d, int which, unsigned *c) { return 3; }
    "#;

    #[test]
    fn a_device_is_read() {
        let folder = std::env::temp_dir().join(format!("ridge-nvml-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (source, library) = (folder.join("nvml.c"), folder.join("libnvml.so"));
        std::fs::write(&source, STAND_IN).unwrap();
        let built = Command::new("cc").args(["-w", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
        if !built.is_ok_and(|status| status.success()) {
            return println!("skipped: no C compiler");
        }
        let nvml = Nvml::open_at(&library).unwrap();
        assert_eq!(nvml.driver_version().as_deref(), Some("580.159.04"));
        let error = nvml.device("00000000:FF:00.0").unwrap_err();
        assert!(error.to_string().contains("00000000:FF:00.0: Not Found"), "{error}");
        let gauge = nvml.device("00000000:1B:00.0").unwrap();
        let want = Reading {
            power_mw: Some(321_000),
            busy_percent: Some(97),
            memory_busy_percent: Some(41),
            memory_used_bytes: Some(20 << 30),
            memory_total_bytes: Some(150 << 30),
            clock_mhz: Some(1980),
            memory_clock_mhz: Some(3201),
            temperature_c: None,
        };
        assert_eq!(gauge.read(), want);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_machine_without_it_says_so() {
        let error = Nvml::open_at(Path::new("libridge-no-such-library.so")).unwrap_err();
        assert!(
            matches!(&error, CudaError::Unavailable(text) if text.contains("libridge-no-such-library")),
            "{error:?}"
        );
        // Whatever this machine has, it is no panic.
        if let Err(error) = Nvml::open() {
            println!("{error}");
        }
    }
}
