//! Reads manifests and sources and says where the house rules of ARCHITECTURE.md are broken.
//!
//! Every check is a function from a [`Tree`] to complaints, so that a bad example in memory proves that it bites.
//! Read [`Tree`], then [`walls`] (who may import whom) and [`sources`] (what no file may contain).

mod code;
pub mod sources;
pub mod walls;

pub use code::code_only;

use std::collections::BTreeMap;
use std::path::Path;

/// Texts of a source tree by path relative to its root.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// Manifests, sources and papers.
    pub files: BTreeMap<String, String>,
}

impl Tree {
    /// Reads the `.rs`, `.toml` and `.md` files below `root`, without build output.
    pub fn read(root: &Path) -> std::io::Result<Self> {
        let mut tree = Self::default();
        tree.read_folder(root, "")?;
        Ok(tree)
    }

    /// A tree made up for a test.
    pub fn of(files: &[(&str, &str)]) -> Self {
        Self { files: files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect() }
    }

    fn read_folder(&mut self, folder: &Path, prefix: &str) -> std::io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = format!("{prefix}{name}");
            let kind = entry.file_type()?;
            if kind.is_dir() && !name.starts_with('.') && !name.starts_with("target") {
                self.read_folder(&entry.path(), &format!("{path}/"))?;
            } else if kind.is_file() && [".rs", ".toml", ".md"].iter().any(|end| name.ends_with(end)) {
                self.files.insert(path, std::fs::read_to_string(entry.path())?);
            }
        }
        Ok(())
    }

    /// Rust sources with their paths.
    pub fn rust(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().filter(|(path, _)| path.ends_with(".rs")).map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// Folders of the workspace's members, as its manifest lists them.
    pub fn members(&self) -> Vec<String> {
        let Some(manifest) = self.files.get("Cargo.toml") else { return Vec::new() };
        let list = manifest.split_once("members = [").and_then(|(_, rest)| rest.split_once(']'));
        let list = list.map_or("", |(list, _)| list);
        list.split(',').map(|item| item.trim().trim_matches('"').to_owned()).filter(|item| !item.is_empty()).collect()
    }
}

/// Every check over the whole tree.
pub fn complaints(tree: &Tree) -> Vec<String> {
    let checks: [fn(&Tree) -> Vec<String>; 9] = [
        walls::manifests,
        walls::machines,
        walls::bincode,
        walls::architecture_lists_every_crate,
        sources::unsafe_code,
        sources::unfinished,
        sources::unbounded,
        sources::long_files,
        sources::headers,
    ];
    checks.iter().flat_map(|check| check(tree)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_read() {
        let tree = Tree::of(&[("Cargo.toml", "[workspace]\nmembers = [\n    \"protocol\",\n    \"blocks\",\n]\n")]);
        assert_eq!(tree.members(), ["protocol", "blocks"]);
    }
}
