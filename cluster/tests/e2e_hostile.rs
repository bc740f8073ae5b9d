//! Peers that break the protocol, at the ports of real processes: sessions end, processes live, and `/metrics` knows.

mod support;

use quinn::crypto::rustls::QuicClientConfig;
use ridge_kvtransfer::shell::{ClusterCa, NodeCert};
use ridge_protocol::wire::{NodeToRouter, ReceiverMsg, encode};
use ridge_protocol::{NodeName, RequestId, Role, limits};
use ridge_tests::cluster::{Cluster, within};
use ridge_tests::model::prompt;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use support::{binary, complete, oracle, tiny_llama};

const PATIENCE: Duration = Duration::from_secs(30);

/// Dials a member, with a certificate or without one, says something and hears why the connection ended.
fn attack(
    ca: &ClusterCa,
    cert: Option<&NodeCert>,
    (member, addr): (&str, SocketAddr),
    alpn: &[u8],
    bytes: &[u8],
) -> quinn::ConnectionError {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.cert_pem().as_bytes()).expect("PEM")).expect("a root");
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots);
    let mut config = match cert {
        None => config.with_no_client_auth(),
        Some(cert) => {
            let chain = vec![CertificateDer::from_pem_slice(cert.cert_pem.as_bytes()).expect("PEM")];
            let key = PrivateKeyDer::from_pem_slice(cert.key_pem.as_bytes()).expect("PEM");
            config.with_client_auth_cert(chain, key).expect("a certificate and its key")
        }
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).expect("QUIC")));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let conversation = async {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().expect("an address")).expect("an endpoint");
        let conn = endpoint.connect_with(config, addr, &format!("{member}.ridge")).expect("dials").await?;
        let (mut send, _recv) = conn.open_bi().await?;
        // The peer may be faster in closing than we in writing.
        let _ = send.write_all(bytes).await;
        Err::<(), _>(conn.closed().await)
    };
    let ended = runtime.block_on(async { tokio::time::timeout(PATIENCE, conversation).await });
    ended.expect("the peer ends it in time").expect_err("conversations end with an error")
}

/// Where a member listens, as the banner's table says.
fn address(cluster: &Cluster, member: &str) -> SocketAddr {
    let output = cluster.output();
    let row = output.lines().find(|line| line.split_whitespace().nth(1) == Some(member));
    let addr = row.and_then(|row| row.split_whitespace().last()).and_then(|addr| addr.parse().ok());
    addr.unwrap_or_else(|| panic!("no address of {member}\n{output}"))
}

#[test]
fn hostile_peers_are_closed_counted_and_survived() {
    let (model, prompt) = (tiny_llama(), prompt(31, 40));
    let expected = oracle(&model, &prompt, 40, &[]).text;
    let data = Arc::new(tempfile::tempdir().expect("a temp dir"));
    let cluster = Cluster::start_in(&data, binary(), &model, &[]);
    let pids = |cluster: &Cluster| {
        let mut pids: Vec<u32> = cluster.processes().iter().map(|process| process.pid).collect();
        pids.sort_unstable();
        pids
    };
    let before = pids(&cluster);
    let ca = ClusterCa::load_or_create(&data.path().join("ca")).expect("the cluster's CA");

    let mut huge = encode(&NodeToRouter::Drained).expect("encodes");
    huge[11] = 0xff;
    let mut nonsense = encode(&NodeToRouter::Drained).expect("encodes");
    nonsense[16] = 0xff;
    let another = encode(&ReceiverMsg::Commit { request: RequestId(1) }).expect("encodes");
    let frames = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), huge, nonsense, another];
    let doors = [("router", Role::Decode, limits::ALPN_CONTROL), ("decode-0", Role::Prefill, limits::ALPN_KV)];
    for (member, role, alpn) in doors {
        let addr = address(&cluster, member);
        let cert = ca.issue(&NodeName("intruder".into()), role).expect("a certificate");
        for bytes in &frames {
            let ended = attack(&ca, Some(&cert), (member, addr), alpn, bytes);
            assert!(matches!(ended, quinn::ConnectionError::ApplicationClosed(_)), "{member}: {ended}");
        }
        let ended = attack(&ca, None, (member, addr), alpn, &frames[0]);
        assert!(matches!(ended, quinn::ConnectionError::ConnectionClosed(_)), "{member}: {ended}");
    }
    // The prefill node's port is open too, and nobody is served there.
    let addr = address(&cluster, "prefill-0");
    let cert = ca.issue(&NodeName("intruder".into()), Role::Decode).expect("a certificate");
    let ended = attack(&ca, Some(&cert), ("prefill-0", addr), limits::ALPN_KV, &frames[0]);
    assert!(matches!(ended, quinn::ConnectionError::ApplicationClosed(_)), "{ended}");

    let errors = |cluster: &Cluster, node: &str, kind: &str| {
        let metrics = cluster.metrics();
        let mut samples = metrics.all("ridge_protocol_errors_total");
        let found = samples.find(|s| s.label("node") == Some(node) && s.label("kind") == Some(kind));
        found.map(|sample| sample.value)
    };
    for (node, kind, count) in [
        ("router", "control", 4.0),
        ("router", "handshake", 1.0),
        ("decode-0", "control", 4.0),
        ("decode-0", "handshake", 1.0),
        ("prefill-0", "refused", 1.0),
    ] {
        // Nodes report once a second.
        let counted = within(PATIENCE, || errors(&cluster, node, kind) == Some(count));
        assert!(counted, "{node} {kind}: {:?}, not {count}", errors(&cluster, node, kind));
    }
    assert_eq!(complete(&cluster, &prompt, 40), expected);
    assert_eq!(pids(&cluster), before, "a process was started again");
    cluster.wait_idle();
}
