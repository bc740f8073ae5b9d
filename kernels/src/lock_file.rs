//! A file as a lock between processes.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

/// Locks the file at `path`, which is made if need be, for as long as the returned handle lives: the lock ends with the process, however
/// that ends. If another process has it, calls `waiting` once and waits.
///
/// # Errors
///
/// If the file cannot be opened, or another process keeps it for longer than `patience`.
pub fn lock_file(path: &Path, patience: Duration, waiting: impl FnOnce()) -> std::io::Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    let deadline = Instant::now() + patience;
    let mut waiting = Some(waiting);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                if let Some(waiting) = waiting.take() {
                    waiting();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
