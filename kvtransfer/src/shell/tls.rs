//! TLS for every connection of a node: mutual, TLS 1.3, one suite, only the cluster's CA.

use super::ca::{self, dns_name, is_label, role_dns_name};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use ridge_protocol::{NodeName, Role, limits};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Why a node's TLS configuration was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("{0}")]
    Read(String),
    /// Not a PEM file with what was expected in it.
    #[error("{what}: {error}")]
    Pem {
        /// Which of the inputs.
        what: &'static str,
        /// What is wrong with it.
        error: String,
    },
    /// rustls refused it, for example because key and certificate do not match.
    #[error("TLS configuration: {0}")]
    Config(String),
}

/// Why a peer is not who it should be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    /// It showed no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// The certificate is not one of ours in form.
    #[error("the peer's certificate does not parse: {0}")]
    Malformed(String),
    /// It claims a name its certificate does not carry.
    #[error("the peer's certificate is not for node {name:?}")]
    Name {
        /// The claim.
        name: String,
    },
    /// It may not do what it wants to do.
    #[error("the certificate of {name} does not give it the role {role}")]
    Role {
        /// Whose.
        name: NodeName,
        /// What it claimed.
        role: Role,
    },
}

/// What a node needs to prove itself and to check others.
#[derive(Clone)]
pub struct NodeTls {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl NodeTls {
    /// From PEM texts: the CA's certificate, the node's certificate and its key.
    pub fn load(ca_pem: &str, cert_pem: &str, key_pem: &str) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for cert in certificates("CA certificate", ca_pem)? {
            roots.add(cert).map_err(|e| TlsError::Pem { what: "CA certificate", error: e.to_string() })?;
        }
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|e| TlsError::Pem { what: "node key", error: e.to_string() })?;
        let mut provider = aws_lc_rs::default_provider();
        // QUIC's Initial packets need this suite anyway, and on x86 and Arm servers it is the fastest.
        provider.cipher_suites.retain(|suite| suite.suite() == rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert_eq!(provider.cipher_suites.len(), 1, "the provider has TLS13_AES_128_GCM_SHA256");
        let tls = Self {
            roots: Arc::new(roots),
            chain: certificates("node certificate", cert_pem)?,
            key: Arc::new(key),
            provider: Arc::new(provider),
        };
        tls.server()?;
        tls.client(limits::ALPN_KV)?;
        Ok(tls)
    }

    /// From files: the CA's certificate, and a directory with `node.pem` and `node.key`.
    pub fn read(ca_cert: &Path, node_dir: &Path) -> Result<Self, TlsError> {
        let read =
            |path: &Path| std::fs::read_to_string(path).map_err(|e| TlsError::Read(format!("{}: {e}", path.display())));
        let cert = read(&node_dir.join(ca::NODE_CERT_FILE))?;
        let key = read(&node_dir.join(ca::NODE_KEY_FILE))?;
        Self::load(&read(ca_cert)?, &cert, &key)
    }

    /// Accepts both of the cluster's protocols.
    pub(crate) fn server(&self) -> Result<QuicServerConfig, TlsError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
            .build()
            .map_err(|e| TlsError::Config(e.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| TlsError::Config(e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|e| TlsError::Config(e.to_string()))?;
        config.alpn_protocols = vec![limits::ALPN_CONTROL.to_vec(), limits::ALPN_KV.to_vec()];
        // Connections live for hours: every one shows its certificate, none is resumed.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        QuicServerConfig::try_from(config).map_err(|e| TlsError::Config(e.to_string()))
    }

    /// Dials with one of the cluster's protocols.
    pub(crate) fn client(&self, alpn: &[u8]) -> Result<QuicClientConfig, TlsError> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| TlsError::Config(e.to_string()))?
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|e| TlsError::Config(e.to_string()))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = Resumption::disabled();
        QuicClientConfig::try_from(config).map_err(|e| TlsError::Config(e.to_string()))
    }
}

impl fmt::Debug for NodeTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeTls").finish_non_exhaustive()
    }
}

fn certificates(what: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match certs {
        Ok(certs) if certs.is_empty() => Err(TlsError::Pem { what, error: "no certificate in it".into() }),
        Ok(certs) => Ok(certs),
        Err(e) => Err(TlsError::Pem { what, error: e.to_string() }),
    }
}

/// Checks that the peer's certificate, which the CA has signed, is for this name and this role.
pub fn verify_peer(conn: &quinn::Connection, name: &NodeName, role: Role) -> Result<(), PeerError> {
    let identity = conn.peer_identity().ok_or(PeerError::NoCertificate)?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| PeerError::NoCertificate)?;
    let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
    let cert = webpki::EndEntityCert::try_from(leaf).map_err(|e| PeerError::Malformed(e.to_string()))?;
    let carries = |dns: String| {
        ServerName::try_from(dns).is_ok_and(|subject| cert.verify_is_valid_for_subject_name(&subject).is_ok())
    };
    if !is_label(&name.0) || !carries(dns_name(name)) {
        return Err(PeerError::Name { name: name.0.chars().take(64).collect() });
    }
    if !carries(role_dns_name(role)) {
        return Err(PeerError::Role { name: name.clone(), role });
    }
    Ok(())
}
