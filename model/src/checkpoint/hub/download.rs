//! Fetching files from the hub into the cache: metadata first, then the bytes, resumed where they ended, checked, and
//! only then linked into the snapshot.

use super::{HubSettings, Repo};
use crate::checkpoint::safetensors::{read_json, shard_names};
use crate::checkpoint::{LoadError, LoadProgress};
use aws_lc_rs::digest::{Context, SHA256};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files beside the weights that loading uses, where the repository has them.
const SMALL_FILES: [&str; 5] =
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
/// Attempts per file; each continues where the last ended.
const ATTEMPTS: u32 = 5;
/// Longest answer of the hub's API that is read.
const MAX_API_BYTES: u64 = 32 << 20;
/// Bytes between two progress reports.
const REPORT_BYTES: u64 = 8 << 20;

/// A repository at the commit that its revision points to now.
struct Remote<'a> {
    agent: Agent,
    settings: &'a HubSettings,
    repo: &'a Repo,
    commit: String,
    files: Vec<String>,
}

/// What the hub says about a file before it is fetched.
struct Metadata {
    etag: String,
    size: Option<u64>,
}

/// Fetches what a model needs into `folder`, the repository's place in the cache; returns the snapshot.
pub(super) fn fetch_model(
    repo: &Repo,
    folder: &Path,
    settings: &HubSettings,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<PathBuf, LoadError> {
    let remote = Remote::open(repo, settings)?;
    let has = |file: &str| remote.files.iter().any(|f| f == file);
    if !has(SINGLE) && !has(INDEX) {
        let ggufs: Vec<&str> = remote.files.iter().map(String::as_str).filter(|f| f.ends_with(".gguf")).collect();
        let message = if ggufs.is_empty() {
            "the repository has no safetensors".to_owned()
        } else {
            format!("the repository has only GGUF files; download one and name it: {}", ggufs.join(", "))
        };
        return Err(remote.error(&repo.id, message));
    }
    let snapshot = folder.join("snapshots").join(&remote.commit);
    for file in SMALL_FILES.into_iter().filter(|file| has(file)) {
        remote.fetch(file, folder, &snapshot, progress)?;
    }
    if has(SINGLE) {
        remote.fetch(SINGLE, folder, &snapshot, progress)?;
    } else {
        remote.fetch(INDEX, folder, &snapshot, progress)?;
        let index = read_json(&snapshot.join(INDEX))?.unwrap_or_default();
        for shard in shard_names(&index)? {
            remote.fetch(&shard, folder, &snapshot, progress)?;
        }
    }
    // Last, so that an interrupted download is not taken for the revision.
    write_atomically(&folder.join("refs").join(&repo.revision), remote.commit.as_bytes())?;
    Ok(snapshot)
}

impl<'a> Remote<'a> {
    fn open(repo: &'a Repo, settings: &'a HubSettings) -> Result<Self, LoadError> {
        let mut remote = Self { agent: agent(), settings, repo, commit: String::new(), files: Vec::new() };
        let url =
            format!("{}/api/models/{}/revision/{}", settings.endpoint, repo.id, repo.revision.replace('/', "%2F"));
        let mut response = remote.get(&url, None, &repo.id)?;
        let body = response.body_mut().with_config().limit(MAX_API_BYTES).read_to_vec();
        let body = body.map_err(|e| remote.error(&repo.id, e.to_string()))?;
        let json: serde_json::Value =
            serde_json::from_slice(&body).map_err(|e| remote.error(&repo.id, format!("the hub's answer: {e}")))?;
        let commit = json["sha"].as_str().unwrap_or_default();
        if commit.is_empty() || !commit.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(remote.error(&repo.id, "the hub's answer names no commit".into()));
        }
        remote.commit = commit.to_owned();
        let files = json["siblings"].as_array().into_iter().flatten();
        remote.files = files.filter_map(|f| f["rfilename"].as_str().map(str::to_owned)).collect();
        Ok(remote)
    }

    fn url(&self, file: &str) -> String {
        format!("{}/{}/resolve/{}/{file}", self.settings.endpoint, self.repo.id, self.commit)
    }

    fn error(&self, what: &str, message: String) -> LoadError {
        let what = if what == self.repo.id { what.to_owned() } else { format!("{} of {}", what, self.repo.id) };
        LoadError::Hub { what, message }
    }

    /// A GET that follows redirects; the token goes to the hub only, not to where it redirects.
    fn get(&self, url: &str, from: Option<u64>, what: &str) -> Result<Response<Body>, LoadError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.settings.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(from) = from.filter(|from| *from > 0) {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let response = request.call().map_err(|e| self.error(what, format!("{e} (at {url})")))?;
        self.checked(response, what)
    }

    fn checked(&self, response: Response<Body>, what: &str) -> Result<Response<Body>, LoadError> {
        let status = response.status();
        if status.is_success() || status.is_redirection() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        let known = response.headers().get("x-error-message").and_then(|v| v.to_str().ok()).unwrap_or("");
        let hint = match status.as_u16() {
            401 | 403 => "the repository is private, gated or does not exist: accept its terms and set HF_TOKEN",
            404 => "no such repository, revision or file",
            429 => "too many requests: wait, or set HF_TOKEN",
            _ => "the hub refused",
        };
        Err(self.error(what, format!("{status}: {hint} {known}").trim_end().to_owned()))
    }

    /// Asks for a file's identity without fetching it. Large files answer with a redirect whose headers count.
    fn metadata(&self, file: &str) -> Result<Metadata, LoadError> {
        let mut request = self.agent.head(self.url(file)).config().max_redirects(0).build();
        if let Some(token) = &self.settings.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = request.call().map_err(|e| self.error(file, e.to_string()))?;
        let response = self.checked(response, file)?;
        let text = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        let linked = text("x-linked-etag");
        let etag = linked.or(text("etag")).unwrap_or("").trim_start_matches("W/").trim_matches('"');
        if etag.is_empty()
            || etag.len() > 128
            || !etag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        {
            return Err(self.error(file, format!("the hub gave the entity tag '{etag}'")));
        }
        // Without the linked headers a redirect's length is that of the redirect.
        let length = text("content-length").filter(|_| response.status().is_success());
        let size = text("x-linked-size").or(length).and_then(|v| v.parse().ok());
        Ok(Metadata { etag: etag.to_owned(), size })
    }

    /// Brings one file into the snapshot, unless it is there.
    fn fetch(
        &self,
        file: &str,
        folder: &Path,
        snapshot: &Path,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(), LoadError> {
        let place = snapshot.join(file);
        if place.is_file() {
            return Ok(());
        }
        let metadata = self.metadata(file)?;
        let blobs = folder.join("blobs");
        for needed in [&blobs, snapshot] {
            fs::create_dir_all(needed).map_err(|e| LoadError::io(needed, &e))?;
        }
        let blob = blobs.join(&metadata.etag);
        let _lock = lock(folder, &metadata.etag)?;
        if !blob.is_file() {
            let partial = blobs.join(format!("{}.incomplete", metadata.etag));
            self.fetch_bytes(file, &metadata, &partial, progress)?;
            self.verify(file, &metadata, &partial)?;
            fs::rename(&partial, &blob).map_err(|e| LoadError::io(&blob, &e))?;
        }
        link(&metadata.etag, &blob, &place)
    }

    fn fetch_bytes(
        &self,
        file: &str,
        metadata: &Metadata,
        partial: &Path,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(), LoadError> {
        let length = || fs::metadata(partial).map_or(0, |m| m.len());
        let mut attempt = 1;
        loop {
            let before = length();
            match self.continue_file(file, metadata, partial, progress) {
                Ok(()) => return Ok(()),
                // The disk's refusal does not change by asking the hub again.
                Err(error @ LoadError::Io { .. }) => return Err(error),
                Err(error) if attempt >= ATTEMPTS => return Err(error),
                Err(error) => tracing::info!(%error, attempt, "download interrupted, continuing"),
            }
            // What counts is attempts without progress: a long download may be interrupted often.
            if length() >= before + REPORT_BYTES {
                attempt = 0;
            }
            std::thread::sleep(Duration::from_millis(200 << attempt));
            attempt += 1;
        }
    }

    /// One request for the bytes that are missing.
    fn continue_file(
        &self,
        file: &str,
        metadata: &Metadata,
        partial: &Path,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(), LoadError> {
        let io = |e: std::io::Error| LoadError::io(partial, &e);
        let mut out = OpenOptions::new().create(true).append(true).open(partial).map_err(io)?;
        let mut done = out.seek(SeekFrom::End(0)).map_err(io)?;
        let total = metadata.size.unwrap_or(0);
        if metadata.size == Some(done) {
            return Ok(());
        }
        if metadata.size.is_some_and(|size| done > size) {
            out.set_len(0).map_err(io)?;
            done = 0;
        }
        let mut response = self.get(&self.url(file), Some(done), file)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::RANGE_NOT_SATISFIABLE => {
                out.set_len(0).map_err(io)?;
                return Err(self.error(file, "the server does not continue the partial file; starting over".into()));
            }
            // The server ignored the range and sends everything.
            _ => {
                out.set_len(0).map_err(io)?;
                done = 0;
            }
        }
        let report = |done| LoadProgress::Download { file: file.to_owned(), done, total };
        progress(report(done));
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 18];
        let mut reported = done;
        loop {
            let read = body.read(&mut buffer).map_err(|e| self.error(file, e.to_string()))?;
            if read == 0 {
                break;
            }
            out.write_all(&buffer[..read]).map_err(io)?;
            done += read as u64;
            if metadata.size.is_some_and(|size| done > size) {
                out.set_len(0).map_err(io)?;
                return Err(self.error(file, format!("more than the announced {total} bytes arrived")));
            }
            if done - reported >= REPORT_BYTES {
                progress(report(done));
                reported = done;
            }
        }
        if metadata.size.is_some_and(|size| done < size) {
            return Err(self.error(file, format!("the connection ended after {done} of {total} bytes")));
        }
        out.sync_all().map_err(io)?;
        progress(report(done));
        Ok(())
    }

    /// The entity tag of a large file is its SHA-256; a file that does not match is removed.
    fn verify(&self, file: &str, metadata: &Metadata, partial: &Path) -> Result<(), LoadError> {
        if metadata.etag.len() != 64 || !metadata.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(());
        }
        let io = |e: std::io::Error| LoadError::io(partial, &e);
        let mut input = File::open(partial).map_err(io)?;
        let mut context = Context::new(&SHA256);
        let mut buffer = vec![0; 1 << 20];
        loop {
            match input.read(&mut buffer).map_err(io)? {
                0 => break,
                read => context.update(&buffer[..read]),
            }
        }
        let found: String = context.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect();
        if found.eq_ignore_ascii_case(&metadata.etag) {
            return Ok(());
        }
        let _ = fs::remove_file(partial);
        Err(self.error(file, format!("its SHA-256 is {found}, the hub says {}; try again", metadata.etag)))
    }
}

fn agent() -> Agent {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ureq::tls::TlsConfig::builder().unversioned_rustls_crypto_provider(provider).build();
    Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .max_redirects_will_error(false)
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(60)))
        .user_agent(concat!("ridge/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}

/// Holds other processes off one blob until the returned file is dropped.
fn lock(folder: &Path, etag: &str) -> Result<File, LoadError> {
    let locks = folder.with_file_name(".locks").join(folder.file_name().unwrap_or_default());
    fs::create_dir_all(&locks).map_err(|e| LoadError::io(&locks, &e))?;
    let path = locks.join(format!("{etag}.lock"));
    let file = OpenOptions::new().create(true).append(true).open(&path).map_err(|e| LoadError::io(&path, &e))?;
    file.lock().map_err(|e| LoadError::io(&path, &e))?;
    Ok(file)
}

/// Points the snapshot's file at the blob: a relative link where links work, a hard link or a copy elsewhere.
fn link(etag: &str, blob: &Path, place: &Path) -> Result<(), LoadError> {
    let _ = fs::remove_file(place);
    #[cfg(unix)]
    if std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), place).is_ok() {
        return Ok(());
    }
    let _ = etag;
    fs::hard_link(blob, place).or_else(|_| fs::copy(blob, place).map(|_| ())).map_err(|e| LoadError::io(place, &e))
}

fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), LoadError> {
    let io = |e: std::io::Error| LoadError::io(path, &e);
    fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).map_err(io)?;
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&temporary, bytes).map_err(io)?;
    fs::rename(&temporary, path).map_err(io)
}
