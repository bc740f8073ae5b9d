//! Hugging Face repositories: the cache on disk first, the hub if something is missing.
//!
//! The cache has huggingface_hub's layout, so that what Python downloaded is found here and the reverse:
//! `models--org--name/{refs/<revision>, blobs/<etag>, snapshots/<commit>/<file> -> blob}`.
//! Read [`resolve`] first; [`download`] fetches one file.

#[cfg(feature = "hub")]
pub mod download;

use super::safetensors::weight_files;
use super::{LoadError, LoadProgress};
use std::fs;
use std::path::{Path, PathBuf};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";

/// Where repositories are kept and fetched from.
#[derive(Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// Folder of the cache.
    pub cache: PathBuf,
    /// The hub's address, without a slash at the end.
    pub endpoint: String,
    /// Access token for private and gated repositories.
    pub token: Option<String>,
    /// Never ask the hub.
    pub offline: bool,
}

impl HubSettings {
    /// Reads the variables that huggingface_hub reads: `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` (then
    /// the file `$HF_HOME/token`) and `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::from_lookup(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// The same, from any table of variables.
    pub fn from_lookup(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let home = variable("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or(variable("HOME").map(|home| Path::new(&home).join(".cache")));
            cache.unwrap_or_default().join("huggingface")
        });
        let cache = variable("HF_HUB_CACHE").or(variable("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let token_file = variable("HF_TOKEN_PATH").map(PathBuf::from).unwrap_or_else(|| home.join("token"));
        let stored = || fs::read_to_string(&token_file).ok();
        let token = variable("HF_TOKEN").or(variable("HUGGING_FACE_HUB_TOKEN")).or_else(stored);
        let yes = |value: String| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on");
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Self {
            cache: cache.unwrap_or_else(|| home.join("hub")),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            offline: variable("HF_HUB_OFFLINE").is_some_and(yes),
        }
    }
}

impl std::fmt::Debug for HubSettings {
    /// Leaves the token out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = if self.token.is_some() { "set" } else { "none" };
        let (cache, offline) = (self.cache.display(), self.offline);
        write!(f, "HubSettings(cache {cache}, endpoint {}, token {token}, offline {offline})", self.endpoint)
    }
}

/// A repository at a revision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Repo {
    /// `org/name`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl Repo {
    /// Understands `org/name` and `org/name@revision`.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let plain = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.', '-'])
                && !part.contains("..")
                && !part.contains("--")
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        };
        let (org, name) = id.split_once('/')?;
        // A revision becomes part of a path; branches may have slashes, as in refs/pr/1.
        let sane = revision.split('/').all(plain);
        (plain(org) && plain(name) && sane).then(|| Self { id: id.to_owned(), revision: revision.to_owned() })
    }

    fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.id.replace('/', "--")))
    }
}

/// Whether the text looks like `org/name` or `org/name@revision`.
pub fn is_repo_id(text: &str) -> bool {
    Repo::parse(text).is_some()
}

/// The folder that holds a repository's model, downloaded if it has to be and may be.
pub fn resolve(
    id: &str,
    settings: &HubSettings,
    download: bool,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<PathBuf, LoadError> {
    let not_found = |tried: String| LoadError::NotFound { argument: id.to_owned(), tried };
    let repo = Repo::parse(id).ok_or_else(|| not_found("it is not a repository id (org/name@revision)".into()))?;
    let cached = cached_snapshot(&repo, &settings.cache);
    if let Some(folder) = cached.as_ref().filter(|folder| is_complete(folder)) {
        return Ok(folder.clone());
    }
    let state = match &cached {
        Some(folder) => format!("the cached copy in {} is incomplete", folder.display()),
        None => {
            format!("it is not in the cache ({}) and no folder or file of that name exists", settings.cache.display())
        }
    };
    if settings.offline || !download {
        let switch = if settings.offline { "HF_HUB_OFFLINE is set" } else { "downloading was not asked for" };
        return Err(not_found(format!("{state}, and {switch}")));
    }
    fetch(&repo, settings, progress)
}

#[cfg(feature = "hub")]
fn fetch(repo: &Repo, settings: &HubSettings, progress: &mut dyn FnMut(LoadProgress)) -> Result<PathBuf, LoadError> {
    download::fetch_model(repo, &repo.folder(&settings.cache), settings, progress)
}

#[cfg(not(feature = "hub"))]
fn fetch(repo: &Repo, _settings: &HubSettings, _progress: &mut dyn FnMut(LoadProgress)) -> Result<PathBuf, LoadError> {
    Err(LoadError::Hub {
        what: repo.id.clone(),
        message: "this build cannot download (feature 'hub' is off); use huggingface-cli download".into(),
    })
}

/// The snapshot that a revision points to, whether or not it is complete.
fn cached_snapshot(repo: &Repo, cache: &Path) -> Option<PathBuf> {
    let folder = repo.folder(cache);
    let reference = fs::read_to_string(folder.join("refs").join(&repo.revision)).ok();
    let commit = reference.as_deref().map_or(repo.revision.as_str(), str::trim);
    // The reference is a file that another program wrote: it must not lead out of the cache.
    let plain = !commit.is_empty() && commit.bytes().all(|b| b.is_ascii_alphanumeric());
    let snapshot = folder.join("snapshots").join(commit);
    (plain && snapshot.is_dir()).then_some(snapshot)
}

/// Whether a snapshot has everything that loading needs.
fn is_complete(folder: &Path) -> bool {
    let present = |file: &str| folder.join(file).is_file();
    let weights = weight_files(folder).unwrap_or_default();
    present("config.json") && present("tokenizer.json") && !weights.is_empty() && weights.iter().all(|f| present(f))
}
