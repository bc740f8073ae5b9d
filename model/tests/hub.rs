//! Downloads against a hub of a few lines on loopback.
#![cfg(feature = "hub")]

mod common;

use common::shared;
use ridge_model::checkpoint::hub::{HubSettings, Repo, resolve};
use ridge_model::checkpoint::safetensors::load_folder;
use ridge_model::checkpoint::{LoadError, LoadOptions, LoadProgress};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files, what was asked for, and how often the weights' connection still breaks half-way.
struct Hub {
    files: HashMap<String, Vec<u8>>,
    weights_etag: String,
    log: Vec<String>,
    breaks_left: u32,
}

fn serve(hub: Hub) -> (String, Arc<Mutex<Hub>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("bound"));
    let hub = Arc::new(Mutex::new(hub));
    let shared = hub.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = answer(stream, &mut shared.lock().expect("one thread"));
        }
    });
    (address, hub)
}

fn answer(mut stream: TcpStream, hub: &mut Hub) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut request, mut range, mut authorised) = (String::new(), 0usize, false);
    reader.read_line(&mut request)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(from) = line.strip_prefix("range: bytes=") {
            range = from.trim_end_matches('-').parse().unwrap_or(0);
        }
        authorised |= line == "authorization: bearer secret";
    }
    let mut words = request.split_whitespace();
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    hub.log.push(format!("{method} {path} {range} {authorised}"));
    let mut send = |head: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {head}\r\nConnection: close\r\n")?;
        write!(stream, "Content-Length: {}\r\n\r\n", body.len())?;
        stream.write_all(if method == "HEAD" { &[] } else { body })
    };
    if path == "/api/models/org/name/revision/main" {
        let names: Vec<_> = hub.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": names}).to_string();
        return send("200 OK", body.as_bytes());
    }
    let file = path.rsplit('/').next().unwrap_or("");
    let Some(bytes) = hub.files.get(file).filter(|_| !path.contains("other")) else {
        return send("404 Not Found", b"no");
    };
    let large = file.ends_with(".safetensors");
    if large && path.starts_with("/org/name/resolve/") {
        let etag = &hub.weights_etag;
        let head = format!(
            "302 Found\r\nLocation: /cdn/{file}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}",
            bytes.len()
        );
        return send(&head, b"moved");
    }
    let body = &bytes[range.min(bytes.len())..];
    let status = if range > 0 { "206 Partial Content" } else { "200 OK" };
    let head = format!("{status}\r\nETag: \"etag{}\"", file.replace('.', ""));
    if large && hub.breaks_left > 0 {
        hub.breaks_left -= 1;
        write!(stream, "HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len())?;
        return stream.write_all(&body[..body.len() / 2]);
    }
    send(&head, body)
}

fn sha256(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn stories() -> Option<Hub> {
    let folder = shared("models/stories260K-hf")?;
    let files = std::fs::read_dir(folder).expect("readable").map(|file| {
        let path = file.expect("entry").path();
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        (name, std::fs::read(path).expect("readable"))
    });
    let files: HashMap<String, Vec<u8>> = files.collect();
    let weights_etag = sha256(&files["model.safetensors"]);
    Some(Hub { files, weights_etag, log: Vec::new(), breaks_left: 0 })
}

/// Settings as environment variables would give them.
fn settings(endpoint: &str, home: &Path, offline: &str) -> HubSettings {
    HubSettings::from_lookup(&|name| match name {
        "HF_ENDPOINT" => Some(format!("{endpoint}/")),
        "HF_HOME" => Some(home.display().to_string()),
        "HF_TOKEN" => Some("secret\n".into()),
        "HF_HUB_OFFLINE" => Some(offline.into()),
        _ => None,
    })
}

#[test]
fn downloads_resumes_and_reuses() {
    let Some(mut hub) = stories() else { return };
    hub.breaks_left = 1;
    let size = hub.files["model.safetensors"].len();
    let (endpoint, hub) = serve(hub);
    let home = tempfile::tempdir().expect("a temporary folder");
    let online = settings(&endpoint, home.path(), "0");
    let mut last = None;
    let folder = resolve("org/name", &online, true, &mut |p| last = Some(p)).expect("downloads");
    let file = "model.safetensors".to_owned();
    assert_eq!(last, Some(LoadProgress::Download { file, done: size as u64, total: size as u64 }));
    assert_eq!(folder, home.path().join("hub/models--org--name/snapshots").join(COMMIT));
    let checkpoint = load_folder(&folder, "org/name".into(), &LoadOptions::default(), &mut |_| {}).expect("loads");
    assert_eq!(checkpoint.spec.layers, 5);
    let log = std::mem::take(&mut hub.lock().expect("not poisoned").log);
    // The second request for the weights continues where the first ended, and the token stays with the hub.
    assert!(log.contains(&format!("GET /cdn/model.safetensors {} false", size / 2)), "{log:#?}");
    assert!(log.iter().any(|l| l.starts_with("HEAD /org/name/resolve") && l.ends_with("true")), "{log:#?}");
    assert!(!log.iter().any(|l| l.contains("/cdn/") && l.ends_with("true")), "{log:#?}");
    // The second time nothing is asked, and the cache serves offline.
    resolve("org/name", &online, true, &mut |_| {}).expect("is cached");
    resolve("org/name", &settings("http://127.0.0.1:1", home.path(), "1"), true, &mut |_| {}).expect("is cached");
    resolve(&format!("org/name@{COMMIT}"), &online, false, &mut |_| {}).expect("is cached under its commit");
    assert!(hub.lock().expect("not poisoned").log.is_empty());
    assert!(folder.join("config.json").symlink_metadata().expect("exists").is_symlink());
}

#[test]
fn a_wrong_digest_is_refused() {
    let Some(mut hub) = stories() else { return };
    hub.weights_etag = sha256(b"something else");
    let (endpoint, _hub) = serve(hub);
    let home = tempfile::tempdir().expect("a temporary folder");
    let online = settings(&endpoint, home.path(), "");
    let error = resolve("org/name", &online, true, &mut |_| {}).expect_err("does not verify").to_string();
    assert!(error.contains("SHA-256") && error.contains("model.safetensors"), "{error}");
    // Nothing that could be taken for the model is left.
    let offline = settings(&endpoint, home.path(), "1");
    let error = resolve("org/name", &offline, true, &mut |_| {}).expect_err("is incomplete").to_string();
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let Some(hub) = stories() else { return };
    let (endpoint, _hub) = serve(hub);
    let home = tempfile::tempdir().expect("a temporary folder");
    let online = settings(&endpoint, home.path(), "");
    let Err(LoadError::Hub { what, message }) = resolve("other/name", &online, true, &mut |_| {}) else {
        panic!("there is no such repository")
    };
    assert_eq!(what, "other/name");
    assert!(message.contains("404"), "{message}");
    let error = resolve("other/name", &online, false, &mut |_| {}).expect_err("not cached").to_string();
    assert!(error.contains("not in the cache"), "{error}");
    assert!(!format!("{online:?}").contains("secret"));
}

#[test]
fn repository_ids() {
    let check = |text: &str, expected: Option<(&str, &str)>| {
        let parsed = Repo::parse(text);
        assert_eq!(parsed.as_ref().map(|r| (r.id.as_str(), r.revision.as_str())), expected, "{text}");
    };
    check("org/name", Some(("org/name", "main")));
    check("org/name@refs/pr/1", Some(("org/name", "refs/pr/1")));
    check("Qwen/Qwen3-0.6B", Some(("Qwen/Qwen3-0.6B", "main")));
    for bad in ["name", "a/b/c", "../x", "a/..", "a/b@../..", "a/b@", "a b/c", "/etc/passwd", "a//b", "a/b@x/../y"] {
        check(bad, None);
    }
}
