//! Why a checkpoint was refused: every variant names the thing and, where there is one, the fix.

use std::path::{Path, PathBuf};

/// Why [`load`](super::load) failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LoadError {
    /// The model argument is neither a file, a folder nor a repository id.
    #[error("no model at '{argument}': {tried}")]
    NotFound {
        /// What the user wrote.
        argument: String,
        /// What was looked for, and what would have worked.
        tried: String,
    },
    /// A file could not be opened or read.
    #[error("{}: {message}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's words.
        message: String,
    },
    /// A file that a folder must have is absent.
    #[error("{} has no {file}: {hint}", .folder.display())]
    Missing {
        /// The model folder.
        folder: PathBuf,
        /// The file.
        file: String,
        /// Where to get it.
        hint: String,
    },
    /// The architecture is not one that Ridge computes.
    #[error("architecture '{found}' is not supported; supported: {supported}")]
    Architecture {
        /// As the checkpoint spells it.
        found: String,
        /// Comma-separated list.
        supported: String,
    },
    /// The architecture is supported but this variant of it is not.
    #[error("{file}: {what} is not supported")]
    Unsupported {
        /// The file that asks for it.
        file: String,
        /// The field and its value.
        what: String,
    },
    /// A configuration field is missing or has an impossible value.
    #[error("{file}: {message}")]
    Config {
        /// The file.
        file: String,
        /// The field and what is wrong with it.
        message: String,
    },
    /// A weights file is damaged or hostile.
    #[error("{file}: {message}; download the file again")]
    Damaged {
        /// The file.
        file: String,
        /// What does not fit.
        message: String,
    },
    /// A tensor that the description asks for is not in the checkpoint.
    #[error("the checkpoint has no tensor '{name}'{}", called(.source_name))]
    TensorMissing {
        /// Canonical name.
        name: String,
        /// Name in the files.
        source_name: Option<String>,
    },
    /// A tensor has another shape than the description asks for.
    #[error("tensor '{name}' has shape {found:?}, the model description wants {wanted:?}")]
    TensorShape {
        /// Canonical name.
        name: String,
        /// Rows and columns wanted; a vector has one row.
        wanted: [usize; 2],
        /// Dimensions found, outermost first.
        found: Vec<usize>,
    },
    /// A tensor is stored in a type that no kernel reads.
    #[error("tensor '{name}' is stored as {dtype}, which is not supported; supported: {supported}")]
    TensorType {
        /// Name in the file.
        name: String,
        /// The type.
        dtype: String,
        /// Comma-separated list.
        supported: String,
    },
    /// The tokenizer cannot be built.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template does not compile.
    #[error("chat template: {0}")]
    Template(String),
    /// The weights could not be packed for the kernels.
    #[error("packing {bytes} bytes of weights: {reason}")]
    Packing {
        /// Their packed size.
        bytes: usize,
        /// The operating system's words.
        reason: String,
    },
    /// A download failed.
    #[error("downloading {what}: {message}")]
    Hub {
        /// Repository and file.
        what: String,
        /// What went wrong and what to try.
        message: String,
    },
}

fn called(source_name: &Option<String>) -> String {
    source_name.as_ref().map(|name| format!(" (called '{name}' in its files)")).unwrap_or_default()
}

impl LoadError {
    pub(crate) fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), message: error.to_string() }
    }

    pub(crate) fn config(file: &str, message: impl Into<String>) -> Self {
        Self::Config { file: file.to_owned(), message: message.into() }
    }

    pub(crate) fn damaged(file: &str, message: impl Into<String>) -> Self {
        Self::Damaged { file: file.to_owned(), message: message.into() }
    }
}
