//! The built-in model: inside the binary, written once to the cache folder so that processes share one mapping.
//!
//! Read [`unpack`]. The folder's name holds a hash of the content, so a newer binary never reads an older model.

use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/demo.rs"));
}

/// The name under which the built-in model is served.
pub const NAME: &str = "ridge-demo";

/// The folder of the built-in model under `cache`, written there if it was not yet.
pub fn unpack(cache: &Path) -> anyhow::Result<PathBuf> {
    unpack_files(embedded::FILES, cache)
}

fn unpack_files(files: &[(&str, &[u8])], cache: &Path) -> anyhow::Result<PathBuf> {
    ensure!(!files.is_empty(), "this binary was built without the built-in model; name one with --model");
    let mut hasher = blake3::Hasher::new();
    for (name, content) in files {
        hasher.update(name.as_bytes());
        hasher.update(&(content.len() as u64).to_le_bytes());
        hasher.update(content);
    }
    // The model's name is the folder's own name: it is what a router serves when nothing else was asked for.
    let parent = cache.join(&hasher.finalize().to_hex()[..16]);
    let folder = parent.join(NAME);
    if is_complete(files, &folder) {
        return Ok(folder);
    }
    std::fs::create_dir_all(&parent).with_context(|| format!("cannot create {}", parent.display()))?;
    // Another process may be writing the same files: each writes its own folder, the first rename wins.
    let part = parent.join(format!("{NAME}.{}.part", std::process::id()));
    std::fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
    for (name, content) in files {
        let path = part.join(name);
        std::fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let renamed = std::fs::rename(&part, &folder);
    if renamed.is_err() {
        // A folder is there already. If it is whole, a neighbour was faster; if not, its writer was cut short.
        if !is_complete(files, &folder) {
            std::fs::remove_dir_all(&folder).with_context(|| format!("cannot replace {}", folder.display()))?;
            std::fs::rename(&part, &folder).with_context(|| format!("cannot write {}", folder.display()))?;
        } else {
            let _ = std::fs::remove_dir_all(&part);
        }
    }
    Ok(folder)
}

fn is_complete(files: &[(&str, &[u8])], folder: &Path) -> bool {
    files.iter().all(|(name, content)| {
        std::fs::metadata(folder.join(name)).is_ok_and(|found| found.len() == content.len() as u64)
    })
}

/// A few of the questions that the built-in model was taught, for the banner.
pub fn suggestions(count: usize) -> Vec<String> {
    embedded::QUESTIONS
        .lines()
        .filter_map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(line.get("question")?.as_str()?.to_owned())
        })
        .take(count)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_written_once_and_repaired() {
        let cache = tempfile::tempdir().expect("a temp dir");
        let files: &[(&str, &[u8])] = &[("a", b"one"), ("b", b"two")];
        let folder = unpack_files(files, cache.path()).expect("writes");
        assert_eq!(std::fs::read(folder.join("b")).expect("is there"), b"two");
        assert_eq!(unpack_files(files, cache.path()).expect("finds"), folder);
        std::fs::write(folder.join("a"), b"o").expect("cuts a file short");
        unpack_files(files, cache.path()).expect("repairs");
        assert_eq!(std::fs::read(folder.join("a")).expect("is there"), b"one");
        let other = unpack_files(&[("a", b"other")], cache.path()).expect("writes");
        assert_ne!(other, folder);
    }

    #[test]
    fn a_binary_without_model_says_what_to_do() {
        let error = unpack_files(&[], Path::new("/nonexistent")).expect_err("nothing to unpack");
        assert!(error.to_string().contains("--model"), "{error}");
    }
}
