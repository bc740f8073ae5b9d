//! From a path or a repository id to a described, validated, mapped checkpoint.
//!
//! Formats differ in spelling only: each of [`safetensors`], [`gguf`] and [`llama2c`] yields the same
//! [`ModelSpec`], the same canonical tensor names and the same row order. Nothing here computes.
//! Read [`Checkpoint`] and [`load`] first.

mod error;
pub mod fp8;
pub mod gguf;
pub mod gguf_model;
pub mod gguf_tokenizer;
pub mod hub;
pub mod llama2c;
mod map;
pub mod nvfp4;
#[cfg(target_os = "linux")]
mod pagemap;
pub mod safetensors;
mod tensors;

pub use error::LoadError;
pub use map::{FileMap, NewFile};
pub use tensors::{Tensor, TensorMap, wanted};

use crate::spec::ModelSpec;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model ready to compute with.
#[derive(Debug)]
pub struct Checkpoint {
    /// What to compute.
    pub spec: ModelSpec,
    /// The weights.
    pub tensors: TensorMap,
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, if the checkpoint or the options have one.
    pub template: Option<ChatTemplate>,
    /// What its authors recommend for generation.
    pub generation: GenerationConfig,
    /// A name for people: the repository id, the folder's name or the file's stem.
    pub name: String,
    /// BLAKE3 of [`TensorMap::digest`].
    pub weights_digest: [u8; 32],
    /// BLAKE3 of [`ModelSpec::canonical`].
    pub config_digest: [u8; 32],
    /// BLAKE3 of the vocabulary.
    pub tokenizer_digest: [u8; 32],
}

/// What a checkpoint's authors recommend for generation.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct GenerationConfig {
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// Token that begins a sequence.
    pub bos: Option<u32>,
    /// Default sampling temperature.
    pub temperature: Option<f32>,
    /// Default nucleus mass.
    pub top_p: Option<f32>,
    /// Default number of candidates.
    pub top_k: Option<u32>,
    /// Default repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// Where a model comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ModelSource {
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
    /// A llama2.c file; its tokenizer is `tok512.bin` or `tokenizer.bin` beside it.
    Llama2c(PathBuf),
    /// A Hugging Face repository, `org/name` or `org/name@revision`.
    Hub(String),
}

/// Choices of the user that a checkpoint does not answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LoadOptions {
    /// Another tokenizer than the checkpoint's: a folder, a `tokenizer.json` or, for llama2.c, a `.bin`.
    pub tokenizer: Option<PathBuf>,
    /// Another chat template than the checkpoint's: Jinja source.
    pub chat_template: Option<String>,
    /// Ask the hub for files that the cache lacks.
    pub download: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { tokenizer: None, chat_template: None, download: true }
    }
}

/// How far a load has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LoadProgress {
    /// A download started, continued or ended (`done == total`).
    Download {
        /// File within the repository.
        file: String,
        /// Bytes on disk.
        done: u64,
        /// Bytes in all, 0 when the server did not say.
        total: u64,
    },
    /// A weights file was mapped.
    Mapped {
        /// Its name.
        file: String,
        /// Its length.
        bytes: u64,
    },
    /// Tensors were checked against the description; the tokenizer comes next.
    Checked {
        /// How many tensors.
        tensors: usize,
    },
}

impl ModelSource {
    /// Understands what a user wrote after `--model`.
    pub fn parse(argument: &str) -> Result<Self, LoadError> {
        let path = Path::new(argument);
        let not_found = |tried: String| LoadError::NotFound { argument: argument.to_owned(), tried };
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.is_file() {
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
            return match extension.as_str() {
                "gguf" => Ok(Self::Gguf(path.to_owned())),
                "bin" => Ok(Self::Llama2c(path.to_owned())),
                "safetensors" | "json" => Err(not_found(format!(
                    "it is one file of a model; name its folder, {}",
                    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).display()
                ))),
                _ => Err(not_found("it is a file, but neither .gguf nor llama2.c .bin".into())),
            };
        }
        if hub::is_repo_id(argument) {
            return Ok(Self::Hub(argument.to_owned()));
        }
        Err(not_found(
            "it is not an existing folder, not an existing .gguf or .bin file, and not a Hugging Face repository id \
             (org/name or org/name@revision)"
                .into(),
        ))
    }
}

/// Loads a checkpoint: resolves the source, maps the weights, checks every tensor, builds tokenizer and template.
pub fn load(
    source: &ModelSource,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Checkpoint, LoadError> {
    match source {
        ModelSource::Folder(folder) => {
            let name = folder.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
            safetensors::load_folder(folder, name.unwrap_or_else(|| "model".into()), options, progress)
        }
        ModelSource::Gguf(path) => gguf_model::load_gguf(path, options, progress),
        ModelSource::Llama2c(path) => llama2c::load_llama2c(path, options, progress),
        ModelSource::Hub(id) => {
            let folder = hub::resolve(id, &hub::HubSettings::from_env(), options.download, progress)?;
            safetensors::load_folder(&folder, id.split('@').next().unwrap_or(id).to_owned(), options, progress)
        }
    }
}

/// Everything a format reader found, before the common checks.
pub(crate) struct Parts {
    pub(crate) spec: ModelSpec,
    pub(crate) tensors: TensorMap,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<String>,
    pub(crate) generation: GenerationConfig,
    pub(crate) name: String,
}

impl Parts {
    /// The checks and digests that all formats share.
    pub(crate) fn finish(mut self, options: &LoadOptions) -> Result<Checkpoint, LoadError> {
        let source = options.chat_template.clone().or(self.template);
        let special = |id: Option<u32>| id.map(|id| self.tokenizer.token_text(id)).unwrap_or_default();
        let template = source
            .map(|source| ChatTemplate::new(&source, &special(self.tokenizer.bos()), &special(self.tokenizer.eos())))
            .transpose()
            .map_err(|e| LoadError::Template(e.to_string()))?;
        if self.tokenizer.vocab_size() > self.spec.vocab {
            return Err(LoadError::Tokenizer(format!(
                "it has {} tokens but the model's embedding only {}; tokenizer and weights are not of one model",
                self.tokenizer.vocab_size(),
                self.spec.vocab
            )));
        }
        if self.generation.eos.is_empty() {
            self.generation.eos.extend(self.tokenizer.eos());
        }
        self.generation.bos = self.generation.bos.or(self.tokenizer.bos());
        Ok(Checkpoint {
            weights_digest: self.tensors.digest(),
            config_digest: *blake3::hash(self.spec.canonical().as_bytes()).as_bytes(),
            tokenizer_digest: self.tokenizer.digest(),
            spec: self.spec,
            tensors: self.tensors,
            tokenizer: Arc::new(self.tokenizer),
            template,
            generation: self.generation,
            name: self.name,
        })
    }
}
