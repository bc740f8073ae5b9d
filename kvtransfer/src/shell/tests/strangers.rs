//! Who is not of the cluster, and who is not what it says: no word of theirs reaches a node, and each is counted.

use super::*;
use quinn::crypto::rustls::QuicClientConfig;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use ridge_protocol::limits;
use ridge_protocol::stats::ProtocolErrors;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;

/// How a stranger comes.
struct Stranger {
    /// For messages.
    who: &'static str,
    /// Certificate and key in PEM, if it shows any.
    shows: Option<(String, String)>,
    alpn: &'static [u8],
}

/// Dials as nobody of Ridge's would.
async fn dial(cluster: &Cluster, stranger: &Stranger, to: &Endpoint, name: &str) -> Result<quinn::Connection, String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(cluster.ca.cert_pem().as_bytes()).expect("PEM")).expect("a root");
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots);
    let mut config = match &stranger.shows {
        None => config.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).expect("PEM")];
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
            config.with_client_auth_cert(chain, key).expect("a certificate and its key")
        }
    };
    config.alpn_protocols = vec![stranger.alpn.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).expect("QUIC")));
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().expect("an address")).expect("an endpoint");
    let connecting = endpoint.connect_with(config, to.local_addr(), &format!("{name}.ridge")).expect("dials");
    patient(connecting).await.map_err(|e| e.to_string())
}

/// A certificate of the cluster's CA for `decode-0` and `prefill-0` in every role, valid from and until these years.
fn signed_by_the_ca(cluster: &Cluster, years: (i32, i32)) -> (String, String) {
    let common_name = |name: &str| {
        let mut distinguished_name = DistinguishedName::new();
        distinguished_name.push(DnType::CommonName, name);
        distinguished_name
    };
    let names = ["prefill-0.ridge", "decode-0.ridge", "prefill.role.ridge", "decode.role.ridge"];
    let mut params = CertificateParams::new(names.map(String::from)).expect("names");
    params.distinguished_name = common_name("prefill-0");
    params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
    params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
    let mut ca = CertificateParams::default();
    ca.distinguished_name = common_name("Ridge cluster CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let ca_key = std::fs::read_to_string(cluster._dir.path().join(ca::CA_KEY_FILE)).expect("the CA's key");
    let ca_key = KeyPair::from_pem(&ca_key).expect("a key");
    let key = KeyPair::generate().expect("a key");
    let cert = params.signed_by(&key, &Issuer::new(ca, &ca_key)).expect("signed");
    (cert.pem(), key.serialize_pem())
}

fn self_signed() -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let names = vec!["prefill-0.ridge".to_owned(), "prefill.role.ridge".to_owned()];
    let cert = CertificateParams::new(names).expect("names").self_signed(&key).expect("signed");
    (cert.pem(), key.serialize_pem())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_without_a_good_certificate_gets_past_the_handshake() {
    let cluster = Cluster::new();
    let foreign = Cluster::new().ca.issue(&node("prefill-0"), Role::Prefill).expect("a certificate");
    let good = signed_by_the_ca(&cluster, (2020, 4000));
    let shows = |who, shows| Stranger { who, shows, alpn: b"" };
    let strangers = [
        shows("without a certificate", None),
        shows("with another CA's certificate", Some((foreign.cert_pem, foreign.key_pem))),
        shows("with its own certificate", Some(self_signed())),
        shows("with an expired certificate", Some(signed_by_the_ca(&cluster, (2000, 2001)))),
        shows("with a certificate of the future", Some(signed_by_the_ca(&cluster, (3000, 3001)))),
        Stranger { who: "who speaks HTTP/3", shows: Some(good.clone()), alpn: b"h3" },
        Stranger { who: "who speaks an older version", shows: Some(good.clone()), alpn: b"ridge-kv/1" },
    ];
    let mut decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let router = cluster.endpoint("router", Role::Router);
    let (to, mut joined) = mpsc::channel(16);
    let _server = ControlServer::new(router.clone(), to);
    // It serves nobody, but its port is open.
    let prefill = cluster.endpoint("prefill-1", Role::Prefill);
    let doors = [
        (&decode.endpoint, "decode-0", limits::ALPN_KV),
        (&router, "router", limits::ALPN_CONTROL),
        (&prefill, "prefill-1", limits::ALPN_KV),
    ];
    for (door, name, alpn) in doors {
        for (at, stranger) in strangers.iter().enumerate() {
            let alpn = if stranger.alpn.is_empty() { alpn } else { stranger.alpn };
            let stranger = Stranger { who: stranger.who, shows: stranger.shows.clone(), alpn };
            // In TLS 1.3 the client is done before the server has seen its certificate, and may speak into the void.
            if let Ok(conn) = dial(&cluster, &stranger, door, name).await {
                if let Ok((mut send, _recv)) = conn.open_bi().await {
                    let hello = SenderMsg::Hello { name: node("prefill-0"), identity: identity(), blocks: blocks() };
                    let _ = send.write_all(&wire::encode(&hello).expect("encodes")).await;
                }
                let closed = patient(conn.closed()).await;
                let by_tls = matches!(closed, quinn::ConnectionError::ConnectionClosed(_));
                assert!(by_tls, "{name} let in a peer {}: {closed}", stranger.who);
            }
            let handshake = at as u64 + 1;
            let wanted = ProtocolErrors { handshake, ..ProtocolErrors::default() };
            let counted = async {
                while door.protocol_errors() != wanted {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let timely = tokio::time::timeout(PATIENCE, counted).await;
            assert!(timely.is_ok(), "{name}, a peer {}: {:?}", stranger.who, door.protocol_errors());
        }
    }
    assert!(decode.events.try_recv().is_err() && joined.try_recv().is_err(), "no word of theirs was heard");

    // The same client with a good certificate gets in: it was the certificate.
    let friend = Stranger { who: "of the cluster", shows: Some(good), alpn: limits::ALPN_KV };
    let conn = dial(&cluster, &friend, &decode.endpoint, "decode-0").await.expect("connects");
    let (mut send, _recv) = conn.open_bi().await.expect("opens");
    let hello = SenderMsg::Hello { name: node("prefill-0"), identity: identity(), blocks: blocks() };
    send.write_all(&[wire::encode(&hello), wire::encode(&abort(1))].map(|m| m.expect("encodes")).concat())
        .await
        .expect("writes");
    assert_eq!(decode.next().await, KvServerEvent::Message { from: node("prefill-0"), message: abort(1) });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_of_noise_are_nothing() {
    let cluster = Cluster::new();
    let mut decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let mut noise = 1u32;
    for len in (0..1500).step_by(7) {
        let datagram: Vec<u8> = (0..len)
            .map(|at| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // The first byte of a long header, so that some are taken for the start of a connection.
                if at == 0 { 0xc0 | (noise >> 28) as u8 } else { (noise >> 24) as u8 }
            })
            .collect();
        socket.send_to(&datagram, decode.endpoint.local_addr()).expect("sends");
    }
    let mut prefill = Prefill::new(cluster.endpoint("prefill-0", Role::Prefill), "prefill-0", identity());
    prefill.client.send(&decode.peer("decode-0"), abort(1));
    assert_eq!(decode.next().await, KvServerEvent::Message { from: node("prefill-0"), message: abort(1) });
}

/// Good certificates and claims that they do not support.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_beyond_the_certificate_ends_with_the_first_message() {
    let cluster = Cluster::new();
    let mut decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let router = cluster.endpoint("router", Role::Router);
    let (to, mut joined) = mpsc::channel(16);
    let _server = ControlServer::new(router.clone(), to);

    let to_decode = [
        ("router-1", Role::Router, "router-1", "does not give it the role prefill"),
        ("prefill-1", Role::Prefill, "prefill-0", "not for node \"prefill-0\""),
        ("prefill-1", Role::Prefill, "prefill-1.ridge", "not for node"),
        ("prefill-1", Role::Prefill, "prefill.role", "not for node"),
        ("prefill-1", Role::Prefill, "*", "not for node"),
        ("prefill-1", Role::Prefill, "", "not for node"),
    ];
    for (at, (name, role, claim, reason)) in to_decode.into_iter().enumerate() {
        let mut prefill = Prefill::new(cluster.endpoint(name, role), claim, identity());
        prefill.client.send(&decode.peer("decode-0"), abort(1));
        contains(&prefill.lost().await, reason);
        let refused = at as u64 + 1;
        assert_eq!(decode.endpoint.protocol_errors(), ProtocolErrors { refused, ..ProtocolErrors::default() });
    }
    assert!(decode.events.try_recv().is_err(), "no word of theirs was heard");

    let to_router = [
        ("prefill-1", Role::Prefill, "prefill-1", Role::Decode, "role decode"),
        ("decode-1", Role::Decode, "decode-1", Role::Prefill, "role prefill"),
        ("decode-1", Role::Decode, "decode-0", Role::Decode, "not for node \"decode-0\""),
        ("router-1", Role::Router, "router-1", Role::Router, "a router cannot join"),
        ("router-1", Role::Router, "router-1", Role::Decode, "role decode"),
    ];
    for (at, (name, role, claim, claimed_role, reason)) in to_router.into_iter().enumerate() {
        let endpoint = cluster.endpoint(name, role);
        let mut control = connect_control(&endpoint, router.local_addr(), &node("router")).await.expect("connects");
        control.send(&hello(claim, claimed_role)).await.expect("says hello");
        let Ok(RouterToNode::Refuse { reason: why }) = control.recv(PATIENCE).await else { panic!("not refused") };
        contains(&why, reason);
        let refused = at as u64 + 1;
        assert_eq!(router.protocol_errors(), ProtocolErrors { refused, ..ProtocolErrors::default() });
    }
    assert!(joined.try_recv().is_err(), "no word of theirs was heard");
}
