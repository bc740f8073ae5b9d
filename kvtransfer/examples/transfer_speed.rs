//! How fast KV pages pass over loopback QUIC: one connection, a thread with its own runtime on each side.
//!
//! `cargo run --release -p ridge-kvtransfer --example transfer_speed -- [GiB per MTU] [verify]`

use bytes::Bytes;
use ridge_kvtransfer::shell::{
    ClusterCa, Endpoint, KvClient, KvClientEvent, KvServer, KvServerEvent, NodeTls, TransportOptions,
};
use ridge_protocol::page::{PageHeader, page_digest};
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::wire::{ReceiverMsg, SenderMsg};
use ridge_protocol::{ModelIdentity, NodeName, RequestId, Role, TokenOut};
use std::net::SocketAddr;
use std::time::Instant;
use tokio::sync::mpsc;

const REQUEST: RequestId = RequestId(1);
/// Pages in flight, as a receiver machine would grant them.
const CREDIT: u32 = 256;
const MTUS: [u16; 4] = [1472, 6500, 8952, 65000];

/// Pages of 64 KiB.
fn identity() -> ModelIdentity {
    ModelIdentity {
        weights: [0; 32],
        config: [0; 32],
        tokenizer: [0; 32],
        layers: 32,
        kv_heads: 8,
        head_dim: 128,
        block_size: 16,
        kv_dtype: "bf16".into(),
        kv_layout: String::new(),
        rope: String::new(),
    }
}

fn endpoint(ca: &ClusterCa, name: &str, role: Role, mtu: u16) -> Endpoint {
    let cert = ca.issue(&NodeName(name.into()), role).expect("a certificate");
    let tls = NodeTls::load(ca.cert_pem(), &cert.cert_pem, &cert.key_pem).expect("TLS");
    let options = TransportOptions { mtu: Some(mtu), ..TransportOptions::default() };
    Endpoint::bind("127.0.0.1:0".parse().expect("an address"), &tls, &options).expect("an endpoint")
}

fn on_own_runtime<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
}

async fn receive(endpoint: Endpoint, verify: bool) {
    let (to, mut events) = mpsc::channel(64);
    let mut server = KvServer::new(endpoint.clone(), identity(), to);
    let mut landed = 0;
    let mut total = None;
    while total != Some(landed) {
        match events.recv().await.expect("the server lives") {
            KvServerEvent::Page { from, header, bytes } => {
                if verify {
                    let digest = page_digest(header.request, header.layer, header.index, &bytes);
                    assert_eq!(digest, header.digest, "a page is damaged");
                }
                landed += 1;
                if landed % u64::from(CREDIT / 2) == 0 {
                    server.send(&from, ReceiverMsg::Credit { request: REQUEST, pages: CREDIT / 2 });
                }
            }
            KvServerEvent::Message { message: SenderMsg::Finish { pages, .. }, .. } => total = Some(pages),
            KvServerEvent::Message { .. } => {}
            KvServerEvent::Lost { reason, .. } => panic!("lost: {reason}"),
        }
    }
    server.send(&NodeName("prefill-0".into()), ReceiverMsg::Commit { request: REQUEST });
    while !matches!(events.recv().await, Some(KvServerEvent::Lost { .. }) | None) {}
}

async fn send(endpoint: Endpoint, addr: SocketAddr, pages: u64) -> f64 {
    let (to, mut events) = mpsc::channel(64);
    let peer = KvPeer { name: NodeName("decode-0".into()), addr };
    let mut client = KvClient::new(endpoint.clone(), NodeName("prefill-0".into()), identity(), to);
    let page = Bytes::from(vec![0x5a; identity().page_bytes()]);
    let digest = page_digest(REQUEST, 0, 0, &page);
    let header = PageHeader { request: REQUEST, layer: 0, index: 0, len: page.len() as u32, digest };
    let mut credit = CREDIT;
    let mut sent = 0;
    // The first page opens the connection, so that the handshake is not measured.
    client.send(&peer, SenderMsg::Offer { request: REQUEST, tokens: 1, hashes: vec![] });
    let mut started = Instant::now();
    loop {
        match events.recv().await.expect("the client lives") {
            KvClientEvent::Up { .. } => started = Instant::now(),
            KvClientEvent::Message { message: ReceiverMsg::Credit { pages, .. }, .. } => credit += pages,
            KvClientEvent::Message { message: ReceiverMsg::Commit { .. }, .. } => break,
            KvClientEvent::Message { .. } => {}
            KvClientEvent::Lost { reason, .. } => panic!("lost: {reason}"),
        }
        while credit > 0 && sent < pages {
            client.ship(&peer, header, page.clone());
            credit -= 1;
            sent += 1;
            if sent == pages {
                let first = TokenOut { token: 0, logprob: None, top: vec![] };
                client.send(&peer, SenderMsg::Finish { request: REQUEST, pages, first });
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    endpoint.close("done");
    endpoint.wait_idle().await;
    (pages * page.len() as u64) as f64 / seconds / 1e9
}

fn main() {
    let gib: u64 = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(2);
    let verify = std::env::args().any(|arg| arg == "verify");
    let pages = (gib << 30) / identity().page_bytes() as u64;
    let dir = tempfile::tempdir().expect("temporary directory");
    let ca = ClusterCa::load_or_create(dir.path()).expect("a CA");
    println!(
        "{gib} GiB in pages of {} bytes, digests {}",
        identity().page_bytes(),
        if verify { "checked" } else { "not checked" }
    );
    for mtu in MTUS {
        let (tell, addr) = std::sync::mpsc::channel();
        let rate = std::thread::scope(|scope| {
            let ca = &ca;
            scope.spawn(move || {
                on_own_runtime(async {
                    let endpoint = endpoint(ca, "decode-0", Role::Decode, mtu);
                    tell.send(endpoint.local_addr()).expect("the sender waits");
                    receive(endpoint, verify).await;
                });
            });
            let addr = addr.recv().expect("the receiver starts");
            on_own_runtime(async { send(endpoint(ca, "prefill-0", Role::Prefill, mtu), addr, pages).await })
        });
        println!("mtu {mtu:5}: {rate:5.2} GB/s, {:5.1} Gbit/s", rate * 8.0);
    }
}
