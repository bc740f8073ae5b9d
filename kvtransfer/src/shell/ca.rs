//! The cluster's certificate authority: a key in a directory, and certificates that name a node and its role.
//!
//! Whoever holds `ca.key` can admit nodes. A node's certificate carries two DNS names: `<name>.ridge`, which a peer
//! dials, and `<role>.role.ridge`, which says what the node may do.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use ridge_protocol::{NodeName, Role};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// File of the CA's certificate: public, every node needs it.
pub const CA_CERT_FILE: &str = "ca.pem";
/// File of the CA's key: mode 0600.
pub const CA_KEY_FILE: &str = "ca.key";
/// File of a node's certificate.
pub const NODE_CERT_FILE: &str = "node.pem";
/// File of a node's key: mode 0600.
pub const NODE_KEY_FILE: &str = "node.key";

const DAY: Duration = Duration::from_secs(86_400);
/// Certificates are valid from a day ago, so that a node whose clock is behind accepts them.
const CLOCK_SLACK: Duration = DAY;
const CA_VALIDITY: Duration = DAY.saturating_mul(3650);
const NODE_VALIDITY: Duration = DAY.saturating_mul(365);

/// Why the CA could not be loaded, created or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The file system refused.
    #[error("{path}: {error}")]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A key or certificate could not be made or read.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A key others can read is not a secret.
    #[error("{path} has mode {mode:o}, expected 600")]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A name that cannot stand in a certificate.
    #[error("node name {0:?} is not a DNS label: 1 to 63 of a-z, 0-9 and inner hyphens")]
    Name(String),
}

/// The cluster's certificate authority.
#[derive(Debug)]
pub struct ClusterCa {
    cert_pem: String,
    key: KeyPair,
}

/// A node's certificate and key, in PEM.
#[derive(Clone)]
pub struct NodeCert {
    /// The certificate.
    pub cert_pem: String,
    /// The private key.
    pub key_pem: String,
}

impl ClusterCa {
    /// Loads the CA from `dir`, or creates it there. Of several processes that race to create it one wins, and all
    /// return the winner's.
    pub fn load_or_create(dir: &Path) -> Result<Self, CaError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |error| CaError::Io { path, error }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io(dir))?;
        let key_path = dir.join(CA_KEY_FILE);
        if !key_path.exists() {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            // The key alone decides who won: linking a complete file to its final name is atomic and fails if the
            // name is taken.
            let temporary = dir.join(format!(".{CA_KEY_FILE}.{}", unique()));
            write_new(&temporary, key.serialize_pem().as_bytes(), 0o600)?;
            let linked = fs::hard_link(&temporary, &key_path);
            fs::remove_file(&temporary).map_err(io(&temporary))?;
            match linked {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CaError::Io { path: key_path, error });
                }
                _ => {}
            }
        }
        let mode = fs::metadata(&key_path).map_err(io(&key_path))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(CaError::Exposed { path: key_path, mode });
        }
        let key = KeyPair::from_pem(&fs::read_to_string(&key_path).map_err(io(&key_path))?)?;
        // Any certificate over the winning key is as good as another; renaming keeps the file whole for readers.
        let cert_path = dir.join(CA_CERT_FILE);
        if !cert_path.exists() {
            let temporary = dir.join(format!(".{CA_CERT_FILE}.{}", unique()));
            write_new(&temporary, ca_params().self_signed(&key)?.pem().as_bytes(), 0o644)?;
            fs::rename(&temporary, &cert_path).map_err(io(&cert_path))?;
        }
        let cert_pem = fs::read_to_string(&cert_path).map_err(io(&cert_path))?;
        Ok(Self { cert_pem, key })
    }

    /// The CA's certificate: what every node trusts.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Issues a certificate for a node in a role, with a fresh key.
    pub fn issue(&self, name: &NodeName, role: Role) -> Result<NodeCert, CaError> {
        if !is_label(&name.0) {
            return Err(CaError::Name(name.0.clone()));
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(vec![dns_name(name), role_dns_name(role)])?;
        params.distinguished_name = common_name(&name.0);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        valid_for(&mut params, NODE_VALIDITY);
        let cert = params.signed_by(&key, &Issuer::new(ca_params(), &self.key))?;
        Ok(NodeCert { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
    }
}

impl NodeCert {
    /// Writes `node.pem` and `node.key` (mode 0600) into `dir`, replacing what is there.
    pub fn write(&self, dir: &Path) -> Result<(), CaError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| CaError::Io { path: dir.to_owned(), error })?;
        for (file, text, mode) in [(NODE_KEY_FILE, &self.key_pem, 0o600), (NODE_CERT_FILE, &self.cert_pem, 0o644)] {
            let path = dir.join(file);
            let temporary = dir.join(format!(".{file}.{}", unique()));
            write_new(&temporary, text.as_bytes(), mode)?;
            fs::rename(&temporary, &path).map_err(|error| CaError::Io { path, error })?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for NodeCert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeCert").finish_non_exhaustive()
    }
}

/// The DNS name that stands for a node.
pub fn dns_name(name: &NodeName) -> String {
    format!("{name}.ridge")
}

/// The DNS name that stands for a role. No node name can collide with it: a node name has no dot.
pub fn role_dns_name(role: Role) -> String {
    format!("{role}.role.ridge")
}

/// Whether a node name is a DNS label.
pub fn is_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(inner) && !name.starts_with('-') && !name.ends_with('-')
}

/// Must be the same for every certificate over the same key: the issuer's name in a node's certificate is checked.
fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name("Ridge cluster CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, CA_VALIDITY);
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, name);
    distinguished_name
}

fn valid_for(params: &mut CertificateParams, validity: Duration) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(CLOCK_SLACK);
    params.not_after = epoch + now + validity;
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CaError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| CaError::Io { path: path.to_owned(), error })
}

/// A suffix no other thread or process uses at the same time.
fn unique() -> String {
    static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    format!("{}.{count}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn created_once_and_private() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let dir = dir.path().join("ca");
        let made = ClusterCa::load_or_create(&dir).expect("creates");
        let again = ClusterCa::load_or_create(&dir).expect("loads");
        assert_eq!(made.cert_pem(), again.cert_pem());
        let mode = |path: &Path| fs::metadata(path).expect("exists").permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join(CA_KEY_FILE)), 0o600);
        let cert = made.issue(&NodeName("decode-0".into()), Role::Decode).expect("issues");
        cert.write(&dir.join("decode-0")).expect("writes");
        assert_eq!(mode(&dir.join("decode-0").join(NODE_KEY_FILE)), 0o600);
        let left: Vec<_> = fs::read_dir(&dir).expect("lists").map(|e| e.expect("entry").file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "no temporary file stays: {left:?}");
    }

    #[test]
    fn racing_creators_agree() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let keys: Vec<String> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| ClusterCa::load_or_create(dir.path()).expect("creates").key.serialize_pem()))
                .collect();
            racers.into_iter().map(|racer| racer.join().expect("no panic")).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[test]
    fn an_exposed_key_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        ClusterCa::load_or_create(dir.path()).expect("creates");
        let key = dir.path().join(CA_KEY_FILE);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("chmod");
        assert!(matches!(ClusterCa::load_or_create(dir.path()), Err(CaError::Exposed { mode: 0o644, .. })));
    }

    #[test]
    fn names_that_could_pass_for_a_role_are_refused() {
        for name in ["", "prefill.role", "a.b", "-a", "a-", "A", "a b", &"x".repeat(64)] {
            assert!(!is_label(name), "{name:?}");
        }
        for name in ["a", "decode-0", "0"] {
            assert!(is_label(name), "{name:?}");
        }
    }
}
