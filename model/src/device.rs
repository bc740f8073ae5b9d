//! Which device an engine computes on: what the user asked for, and what is there.
//!
//! Read [`DeviceChoice`] and [`open`].

use ridge_kernels::cuda::driver::{self, Driver};
use ridge_kernels::cuda::emulated::Emulated;
use ridge_kernels::cuda::{CudaError, Device, Properties, selftest};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// Architectures on which a device has checked the kernels: each has a result of `cluster gpu-check` in `bench/results/`.
/// `auto` takes no other, whatever is there.
const CHECKED_ARCHITECTURES: &[u32] = &[];

/// What the user asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DeviceChoice {
    /// The first CUDA device if there is one that works and whose like has passed its checks, else the CPU.
    #[default]
    Auto,
    /// The CPU's cores.
    Cpu,
    /// A CUDA device by its number.
    Cuda(usize),
    /// The CUDA kernels, run on the CPU without a device: slow, for tests.
    Emulated,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "emulated" => Ok(Self::Emulated),
            _ => {
                let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
                number.map(Self::Cuda).ok_or_else(|| format!("{text:?} is not auto, cpu or cuda:N"))
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Emulated => f.write_str("emulated"),
        }
    }
}

/// Which kernels may be used where there is a choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KernelSet {
    /// The simplest that do the job.
    #[default]
    Stable,
    /// Also those for one architecture that no device has checked yet.
    Experimental,
}

/// Whose kernels multiply many rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ProductSet {
    /// Ridge's own.
    Own,
    /// For each matrix the fastest of Ridge's own and NVIDIA's library (cuBLASLt, where it is), measured when a machine loads the model
    /// for the first time.
    #[default]
    Measured,
}

/// How an engine uses its device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceOptions {
    /// Which CUDA kernels may be used.
    pub kernels: KernelSet,
    /// Whose products.
    pub products: ProductSet,
    /// Whether decode steps are recorded as graphs of launches.
    pub graphs: bool,
    /// Whether pages of prompts go to the host's memory as they are computed. If not, they are fetched when somebody reads them, and a
    /// prefill node's hand-off waits for that; for measuring what shipping costs.
    pub ship: bool,
    /// Folder for compiled kernels and measured products; `None` compiles at every start, and measures nothing.
    pub cache: Option<PathBuf>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { kernels: KernelSet::Stable, products: ProductSet::Measured, graphs: true, ship: true, cache: None }
    }
}

/// Opens a CUDA device; `None` is the CPU. Compiled kernels are kept in the folder `cache`, if there is one.
///
/// # Errors
///
/// What is missing, if a device was asked for by name. `auto` logs it and takes the CPU.
pub fn open(choice: DeviceChoice, cache: Option<&Path>) -> Result<Option<Arc<dyn Device>>, CudaError> {
    match choice {
        DeviceChoice::Cpu => Ok(None),
        DeviceChoice::Cuda(number) => checked(Driver::open(number, cache).map(|driver| Arc::new(driver) as _)),
        DeviceChoice::Emulated => checked(emulated(cache).map(|device| Arc::new(device) as _)),
        DeviceChoice::Auto if !driver::is_present() => {
            tracing::info!("computing on the CPU: no NVIDIA driver on this machine");
            Ok(None)
        }
        DeviceChoice::Auto => Ok(open_checked(cache).unwrap_or_else(|error| {
            tracing::warn!("computing on the CPU: {error}");
            None
        })),
    }
}

/// What is known of a device, without computing on it; `None` is the CPU. For `auto`, of the first CUDA device if there is one.
///
/// # Errors
///
/// What is missing.
pub fn properties(choice: DeviceChoice, cache: Option<&Path>) -> Result<Option<Properties>, CudaError> {
    match choice {
        DeviceChoice::Cpu => Ok(None),
        DeviceChoice::Auto if !driver::is_present() => Ok(None),
        DeviceChoice::Auto => Ok(Some(Driver::open(0, None)?.properties().clone())),
        DeviceChoice::Cuda(number) => Ok(Some(Driver::open(number, None)?.properties().clone())),
        DeviceChoice::Emulated => Ok(Some(emulated(cache)?.properties().clone())),
    }
}

/// The emulated device, with the instructions of every kernel that is on by default: fp8's came with 8.9.
fn emulated(cache: Option<&Path>) -> Result<Emulated, CudaError> {
    let device = match cache {
        Some(cache) => Emulated::new(&cache.join("emulated")),
        None => Emulated::beside_the_program(),
    };
    Ok(device?.with_properties(|properties| properties.sm = 89))
}

/// The first CUDA device, if the kernels have passed their checks on its like.
fn open_checked(cache: Option<&Path>) -> Result<Option<Arc<dyn Device>>, CudaError> {
    let driver = Driver::open(0, cache)?;
    let properties = driver.properties();
    if !CHECKED_ARCHITECTURES.contains(&properties.sm) {
        tracing::warn!(
            device = properties.name,
            sm = properties.sm,
            "computing on the CPU: no device of this architecture has checked Ridge's kernels. `cluster gpu-check` does, and \
             `--device cuda:0` uses it all the same"
        );
        return Ok(None);
    }
    checked(Ok(Arc::new(driver) as _))
}

/// A device must first show that it computes at all.
fn checked(device: Result<Arc<dyn Device>, CudaError>) -> Result<Option<Arc<dyn Device>>, CudaError> {
    let device = device?;
    selftest::run(&device)?;
    let properties = device.properties();
    tracing::info!(
        device = properties.name,
        sm = properties.sm,
        multiprocessors = properties.multiprocessors,
        memory_mib = properties.memory_bytes >> 20,
        "computing on a device. Ridge's CUDA kernels have passed their checks in an emulator; no device has checked them yet: \
         `cluster gpu-check` does"
    );
    Ok(Some(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_round_trip() {
        for text in ["auto", "cpu", "cuda:0", "cuda:7", "emulated"] {
            assert_eq!(text.parse::<DeviceChoice>().map(|choice| choice.to_string()).as_deref(), Ok(text));
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn without_a_driver_auto_is_the_cpu_and_a_named_device_an_error() {
        assert!(open(DeviceChoice::Cpu, None).unwrap().is_none());
        if driver::is_present() {
            println!("skipped: there is a driver here");
            return;
        }
        assert!(open(DeviceChoice::Auto, None).unwrap().is_none());
        let error = open(DeviceChoice::Cuda(0), None).unwrap_err();
        assert!(error.to_string().contains("the NVIDIA driver (libcuda) is not on this machine"), "{error}");
    }
}
