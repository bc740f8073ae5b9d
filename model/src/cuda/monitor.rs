//! A device's state, read each second on a thread of its own, so that nobody who asks for it waits for the driver.
//!
//! Read [`Monitor`].

use ridge_kernels::cuda::nvml::{Gauge, Nvml, Reading};
use ridge_kernels::cuda::{CudaError, Device};
use ridge_protocol::stats::DeviceStats;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Time between readings.
const EVERY: Duration = Duration::from_secs(1);

/// Reads until it is dropped.
#[derive(Debug)]
pub struct Monitor {
    latest: Arc<Mutex<DeviceStats>>,
    /// Its end tells the thread to end.
    _stop: SyncSender<()>,
}

impl Monitor {
    /// Watches a device. `None`, and a line in the log, where NVML is missing or does not know it.
    pub fn start(device: &dyn Device) -> Option<Self> {
        match Self::try_start(device) {
            Ok(monitor) => monitor,
            Err(error) => {
                tracing::info!("no metrics of the device: {error}");
                None
            }
        }
    }

    fn try_start(device: &dyn Device) -> Result<Option<Self>, CudaError> {
        // The emulated device has no state.
        let Some(id) = device.pci_bus_id() else { return Ok(None) };
        let nvml = Nvml::open()?;
        let gauge = nvml.device(&id)?;
        tracing::debug!(driver = nvml.driver_version(), pci = id, "the device's state is read each second");
        Ok(Self::watch(move || stats(&Gauge::read(&gauge))))
    }

    /// Calls `read` now and then each second, on a thread.
    fn watch(read: impl Fn() -> DeviceStats + Send + 'static) -> Option<Self> {
        let (stop, stopped) = sync_channel(0);
        let latest = Arc::new(Mutex::new(read()));
        let kept = latest.clone();
        let run = move || {
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                let now = read();
                *kept.lock().unwrap_or_else(PoisonError::into_inner) = now;
            }
        };
        match std::thread::Builder::new().name("device-state".into()).spawn(run) {
            Ok(_) => Some(Self { latest, _stop: stop }),
            Err(error) => {
                tracing::warn!("no metrics of the device: {error}");
                None
            }
        }
    }

    /// The last reading, about a second old at most while the driver answers.
    pub fn latest(&self) -> DeviceStats {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stats(reading: &Reading) -> DeviceStats {
    DeviceStats {
        power_mw: reading.power_mw,
        busy_percent: reading.busy_percent,
        memory_busy_percent: reading.memory_busy_percent,
        memory_used_bytes: reading.memory_used_bytes,
        memory_total_bytes: reading.memory_total_bytes,
        clock_mhz: reading.clock_mhz,
        memory_clock_mhz: reading.memory_clock_mhz,
        temperature_c: reading.temperature_c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_kernels::cuda::emulated::Emulated;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn the_state_is_read_again_and_again_until_nobody_wants_it() {
        let reads = Arc::new(AtomicU32::new(0));
        let counted = reads.clone();
        let read = move || {
            let count = counted.fetch_add(1, Ordering::Relaxed) + 1;
            DeviceStats { power_mw: Some(count), ..DeviceStats::default() }
        };
        let monitor = Monitor::watch(read).expect("a thread");
        assert_eq!(monitor.latest().power_mw, Some(1));
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while monitor.latest().power_mw < Some(2) {
            assert!(std::time::Instant::now() < deadline, "it is read each second");
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(monitor);
        // What the reader holds is let go of: the thread has ended.
        while Arc::strong_count(&reads) > 1 {
            assert!(std::time::Instant::now() < deadline, "the thread ends");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn an_emulated_device_has_no_state() {
        let Some(device) = Emulated::for_tests() else { return };
        assert!(Monitor::start(&*device).is_none());
    }
}
