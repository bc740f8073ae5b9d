//! Where Ridge keeps things: the data folder (cluster CA, certificates of a run) and the cache folder (built-in
//! model). Follows the XDG base directories; private folders get mode 0700.

use anyhow::Context;
use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// `XDG_DATA_HOME/ridge`, or `~/.local/share/ridge`.
pub fn data() -> anyhow::Result<PathBuf> {
    xdg("XDG_DATA_HOME", ".local/share").context("name a folder with --data-dir")
}

/// `XDG_CACHE_HOME/ridge`, or `~/.cache/ridge`.
pub fn cache() -> anyhow::Result<PathBuf> {
    xdg("XDG_CACHE_HOME", ".cache")
}

fn xdg(variable: &str, below_home: &str) -> anyhow::Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute(variable).or_else(|| absolute("HOME").map(|home| home.join(below_home)));
    Ok(base.with_context(|| format!("neither {variable} nor HOME is set to a folder"))?.join("ridge"))
}

/// Creates a folder that only its owner may enter.
pub fn create_private(path: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

/// A folder for the secrets of one run, removed when it is dropped.
///
/// It holds a locked file while its process lives, so that the next run can tell a folder in use from one whose
/// owner was killed.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Creates one under `data` and removes those whose owner is gone.
    pub fn create(data: &Path) -> anyhow::Result<Self> {
        let runs = data.join("run");
        create_private(&runs)?;
        remove_stale(&runs);
        let path = runs.join(std::process::id().to_string());
        create_private(&path)?;
        let lock = lock_file(&path)?;
        lock.try_lock().with_context(|| format!("{} is in use", path.display()))?;
        Ok(Self { path, _lock: lock })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the folder of this run");
        }
    }
}

fn lock_file(folder: &Path) -> anyhow::Result<File> {
    let path = folder.join("lock");
    File::create(&path).with_context(|| format!("cannot create {}", path.display()))
}

fn remove_stale(runs: &Path) {
    let Ok(entries) = std::fs::read_dir(runs) else { return };
    for entry in entries.flatten() {
        // A folder without a lock file belongs to a process that is just creating it.
        let Ok(lock) = File::open(entry.path().join("lock")) else { continue };
        if lock.try_lock().is_ok() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn run_folders_are_private_and_cleaned_up() {
        let data = tempfile::tempdir().expect("a temp dir");
        let stale = data.path().join("run/1");
        create_private(&stale).expect("creates");
        lock_file(&stale).expect("creates");
        let run = RunDir::create(data.path()).expect("creates");
        assert!(!stale.exists(), "a folder that nobody locks is removed");
        let mode = std::fs::metadata(run.path()).expect("is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        remove_stale(&data.path().join("run"));
        assert!(run.path().exists(), "a folder in use stays");
        let path = run.path().to_owned();
        drop(run);
        assert!(!path.exists());
    }
}
