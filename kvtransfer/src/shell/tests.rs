//! The driver over real QUIC on loopback, in one process: who gets in (more in `strangers`), what hostile bytes do (in
//! `hostile`), what arrives, what is noticed when a peer goes.

mod hostile;
mod strangers;

use super::*;
use bytes::Bytes;
use ridge_protocol::page::{PageHeader, page_digest};
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::wire::{self, NodeHello, NodeToRouter, ReceiverMsg, RouterToNode, SenderMsg};
use ridge_protocol::{BlockShape, CacheDtype, Duration, ModelIdentity, NodeId, NodeName, RequestId, Role};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(20);

struct Cluster {
    ca: ClusterCa,
    _dir: tempfile::TempDir,
}

impl Cluster {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        Self { ca: ClusterCa::load_or_create(dir.path()).expect("a CA"), _dir: dir }
    }

    fn endpoint(&self, name: &str, role: Role) -> Endpoint {
        self.endpoint_with(name, role, &TransportOptions::default())
    }

    fn endpoint_with(&self, name: &str, role: Role, options: &TransportOptions) -> Endpoint {
        let cert = self.ca.issue(&node(name), role).expect("a certificate");
        let tls = NodeTls::load(self.ca.cert_pem(), &cert.cert_pem, &cert.key_pem).expect("TLS");
        Endpoint::bind("127.0.0.1:0".parse().expect("an address"), &tls, options).expect("an endpoint")
    }

    /// A prefill node and a decode node that serves.
    fn pair(&self, options: &TransportOptions) -> (Prefill, Decode) {
        let decode = Decode::new(self.endpoint_with("decode-0", Role::Decode, options), identity());
        let prefill = Prefill::new(self.endpoint_with("prefill-0", Role::Prefill, options), "prefill-0", identity());
        (prefill, decode)
    }
}

struct Prefill {
    client: KvClient,
    events: mpsc::Receiver<KvClientEvent>,
}

impl Prefill {
    fn new(endpoint: Endpoint, name: &str, identity: ModelIdentity) -> Self {
        let (to, events) = mpsc::channel(16);
        Self { client: KvClient::new(endpoint, node(name), identity, to), events }
    }

    async fn next(&mut self) -> KvClientEvent {
        patient(self.events.recv()).await.expect("the client lives")
    }

    /// Why the peer could not be used.
    async fn lost(&mut self) -> String {
        match self.next().await {
            KvClientEvent::Lost { reason, .. } => reason,
            other => panic!("not lost: {other:?}"),
        }
    }
}

struct Decode {
    server: KvServer,
    events: mpsc::Receiver<KvServerEvent>,
    endpoint: Endpoint,
}

impl Decode {
    fn new(endpoint: Endpoint, identity: ModelIdentity) -> Self {
        let (to, events) = mpsc::channel(64);
        Self { server: KvServer::new(endpoint.clone(), identity, to), events, endpoint }
    }

    fn peer(&self, name: &str) -> KvPeer {
        KvPeer { name: node(name), addr: self.endpoint.local_addr(), blocks: blocks() }
    }

    async fn next(&mut self) -> KvServerEvent {
        patient(self.events.recv()).await.expect("the server lives")
    }

    async fn lost(&mut self) -> String {
        match self.next().await {
            KvServerEvent::Lost { reason, .. } => reason,
            other => panic!("not lost: {other:?}"),
        }
    }
}

async fn patient<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

fn node(name: &str) -> NodeName {
    NodeName(name.to_owned())
}

fn blocks() -> BlockShape {
    identity().block_shape().expect("a block holds a token")
}

/// Pages of 32 KiB.
fn identity() -> ModelIdentity {
    ModelIdentity {
        weights: [1; 32],
        config: [2; 32],
        tokenizer: [3; 32],
        layers: 16,
        kv_heads: 8,
        head_dim: 64,
        block_size: 16,
        kv_dtype: CacheDtype::Bf16,
        kv_layout: String::new(),
        rope: "500000".into(),
    }
}

fn abort(id: u64) -> SenderMsg {
    SenderMsg::Abort { request: RequestId(id), reason: "a test".into() }
}

fn contains(text: &str, part: &str) {
    assert!(text.contains(part), "{text:?} does not contain {part:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_pass_in_order_both_ways() {
    let (mut prefill, mut decode) = Cluster::new().pair(&TransportOptions::default());
    let peer = decode.peer("decode-0");
    // Queued while dialing.
    (0..50).for_each(|id| prefill.client.send(&peer, abort(id)));
    assert_eq!(prefill.next().await, KvClientEvent::Up { peer: node("decode-0") });
    for id in 0..50 {
        assert_eq!(decode.next().await, KvServerEvent::Message { from: node("prefill-0"), message: abort(id) });
    }
    let commit = |id| ReceiverMsg::Commit { request: RequestId(id) };
    (0..50).for_each(|id| decode.server.send(&node("prefill-0"), commit(id)));
    for id in 0..50 {
        assert_eq!(prefill.next().await, KvClientEvent::Message { from: node("decode-0"), message: commit(id) });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_clusters_nodes_are_refused() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let mut decode = Decode::new(ours.endpoint("decode-0", Role::Decode), identity());
    let mut prefill = Prefill::new(theirs.endpoint("prefill-0", Role::Prefill), "prefill-0", identity());
    prefill.client.send(&decode.peer("decode-0"), abort(1));
    contains(&prefill.lost().await, "invalid peer certificate");
    assert!(decode.events.try_recv().is_err());

    // A server that trusts anybody's CA but is asked by a node whose own CA it does not know.
    let cert = theirs.ca.issue(&node("prefill-1"), Role::Prefill).expect("a certificate");
    let tls = NodeTls::load(ours.ca.cert_pem(), &cert.cert_pem, &cert.key_pem).expect("TLS");
    let endpoint = Endpoint::bind("127.0.0.1:0".parse().expect("an address"), &tls, &TransportOptions::default());
    let mut prefill = Prefill::new(endpoint.expect("an endpoint"), "prefill-1", identity());
    prefill.client.send(&decode.peer("decode-0"), abort(1));
    prefill.lost().await;
    assert!(decode.events.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_impostor_and_a_node_of_another_role_are_refused() {
    let cluster = Cluster::new();
    let decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let mut prefill = Prefill::new(cluster.endpoint("prefill-0", Role::Prefill), "prefill-0", identity());
    prefill.client.send(&decode.peer("decode-1"), abort(1));
    contains(&prefill.lost().await, "not valid for name");

    // Its name is right, but it may not receive.
    let not_decode = Decode::new(cluster.endpoint("other", Role::Prefill), identity());
    prefill.client.send(&not_decode.peer("other"), abort(1));
    contains(&prefill.lost().await, "role decode");

    // A router may not send, and nobody may use another's name.
    let mut wrong_role = Prefill::new(cluster.endpoint("router", Role::Router), "router", identity());
    wrong_role.client.send(&decode.peer("decode-0"), abort(1));
    contains(&wrong_role.lost().await, "refused: the certificate of router does not give it the role prefill");
    let mut wrong_name = Prefill::new(cluster.endpoint("prefill-3", Role::Prefill), "prefill-0", identity());
    wrong_name.client.send(&decode.peer("decode-0"), abort(1));
    contains(&wrong_name.lost().await, "refused: the peer's certificate is not for node \"prefill-0\"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_model_is_refused_by_field() {
    let cluster = Cluster::new();
    let decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let check = async |other: ModelIdentity, want: &str| {
        let mut prefill = Prefill::new(cluster.endpoint("prefill-0", Role::Prefill), "prefill-0", other);
        prefill.client.send(&decode.peer("decode-0"), abort(1));
        contains(&prefill.lost().await, want);
    };
    check(ModelIdentity { layers: 17, ..identity() }, "refused: layers differs: 16 here, 17 there").await;
    let int8 = ModelIdentity { kv_dtype: CacheDtype::Int8, ..identity() };
    check(int8, "refused: kv_dtype differs: bf16 here, int8 there, and int8 is not converted into bf16").await;
}

/// A sender whose own blocks are others may come, if it says that it sends this node's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_must_be_the_receivers() {
    let cluster = Cluster::new();
    let mut decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let other = ModelIdentity { block_size: 32, kv_dtype: CacheDtype::F32, ..identity() };
    let mut prefill = Prefill::new(cluster.endpoint("prefill-0", Role::Prefill), "prefill-0", other);
    // What the router told it of an earlier process: pages of the same number of bytes, but not the same pages.
    let blocks = BlockShape::new(32, CacheDtype::Int8).expect("a block holds a token");
    let stale = KvPeer { blocks, ..decode.peer("decode-0") };
    prefill.client.send(&stale, abort(1));
    let want = "refused: this node's blocks are bf16 in blocks of 16, and pages would come as int8 in blocks of 32";
    contains(&prefill.lost().await, want);
    prefill.client.send(&decode.peer("decode-0"), abort(2));
    assert_eq!(prefill.next().await, KvClientEvent::Up { peer: node("decode-0") });
    assert_eq!(decode.next().await, KvServerEvent::Message { from: node("prefill-0"), message: abort(2) });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_arrive_intact_at_every_mtu() {
    const PAGES: u32 = 2048;
    let size = identity().page_bytes();
    assert_eq!(PAGES as usize * size, 64 << 20);
    for mtu in [1472, 8952, 65000] {
        let options = TransportOptions { mtu: Some(mtu), ..TransportOptions::default() };
        let (mut prefill, mut decode) = Cluster::new().pair(&options);
        let peer = decode.peer("decode-0");
        for at in 0..PAGES {
            // 50 transfers interleave: more than the writer keeps streams open for.
            let (request, layer, index) = (RequestId(u64::from(at % 50)), at / 128, at % 128);
            let page: Bytes = (0..size).map(|byte| (byte as u32 * 31 + at) as u8).collect::<Vec<u8>>().into();
            let digest = page_digest(request, layer, index, &page);
            let header = PageHeader { request, layer, index, len: size as u32, digest };
            prefill.client.ship(&peer, header, page);
        }
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < PAGES as usize {
            let KvServerEvent::Page { header, bytes, .. } = decode.next().await else { panic!("not a page") };
            let page = bytes.pieces().collect::<Vec<_>>().concat();
            assert_eq!(page_digest(header.request, header.layer, header.index, &page), header.digest, "mtu {mtu}");
            assert!(seen.insert((header.layer, header.index)), "mtu {mtu}: a page came twice");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_transfer_is_cut_off_and_others_go_on() {
    let (mut prefill, mut decode) = Cluster::new().pair(&TransportOptions::default());
    let peer = decode.peer("decode-0");
    let page = |request| {
        let bytes = Bytes::from(vec![5; 32768]);
        (PageHeader { request, layer: 0, index: 0, len: 32768, digest: 0 }, bytes)
    };
    let ship = |client: &mut KvClient, request| {
        let (header, bytes) = page(RequestId(request));
        client.ship(&peer, header, bytes);
    };
    for request in 0..200 {
        ship(&mut prefill.client, request);
        prefill.client.send(&peer, abort(request));
    }
    ship(&mut prefill.client, 1000);
    let (mut aborts, mut last) = (0, false);
    while aborts < 200 || !last {
        match decode.next().await {
            KvServerEvent::Message { .. } => aborts += 1,
            KvServerEvent::Page { header, .. } => last |= header.request == RequestId(1000),
            KvServerEvent::Lost { reason, .. } => panic!("{reason}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_and_a_silent_peer_are_noticed() {
    let options = TransportOptions {
        idle_timeout: Duration::from_millis(1000),
        keep_alive: Duration::from_millis(200),
        ..TransportOptions::default()
    };
    let cluster = Cluster::new();
    let (mut prefill, mut decode) = cluster.pair(&options);
    let peer = decode.peer("decode-0");
    prefill.client.send(&peer, abort(1));
    prefill.next().await;
    decode.next().await;
    decode.endpoint.close("maintenance");
    contains(&prefill.lost().await, "closed by peer: maintenance");
    decode.lost().await;
    prefill.client.send(&peer, abort(2));
    prefill.client.forget(&peer);
    assert!(prefill.events.try_recv().is_err(), "what is said before forget is dropped");

    // A process that is killed says nothing: its runtime goes, and with it its connections' timers.
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut doomed = {
        let _in_there = runtime.enter();
        Decode::new(cluster.endpoint_with("decode-1", Role::Decode, &options), identity())
    };
    let peer = doomed.peer("decode-1");
    prefill.client.send(&peer, abort(3));
    prefill.next().await;
    doomed.next().await;
    std::mem::forget(doomed);
    runtime.shutdown_background();
    contains(&prefill.lost().await, "timed out");
}

/// The system closes a dead process's socket, and answers for its port: nobody has to wait for the idle timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_gone_is_noticed_long_before_it_is_silent_for_too_long() {
    let options = TransportOptions {
        idle_timeout: Duration::from_secs(60),
        keep_alive: Duration::from_millis(200),
        ..TransportOptions::default()
    };
    let cluster = Cluster::new();
    let mut prefill =
        Prefill::new(cluster.endpoint_with("prefill-0", Role::Prefill, &options), "prefill-0", identity());
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut doomed = {
        let _in_there = runtime.enter();
        Decode::new(cluster.endpoint_with("decode-0", Role::Decode, &options), identity())
    };
    let peer = doomed.peer("decode-0");
    prefill.client.send(&peer, abort(1));
    prefill.next().await;
    doomed.next().await;
    // An idle peer that lives is left alone, however often its port is tried.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(prefill.events.try_recv().is_err(), "nothing is lost yet");
    // With its runtime goes everything that could say goodbye, and with the endpoint its socket.
    runtime.shutdown_background();
    drop(doomed);
    let killed = std::time::Instant::now();
    contains(&prefill.lost().await, "closed");
    // A few hundred milliseconds on a machine with time to spare.
    assert!(killed.elapsed() < Duration::from_secs(10), "noticed after {:?}", killed.elapsed());
    println!("noticed after {:?}", killed.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_node_takes_its_seat_after_the_old_one_is_lost() {
    let cluster = Cluster::new();
    let mut decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let peer = decode.peer("decode-0");
    let start = || Prefill::new(cluster.endpoint("prefill-0", Role::Prefill), "prefill-0", identity());
    let mut first = start();
    first.client.send(&peer, abort(1));
    decode.next().await;
    let mut second = start();
    second.client.send(&peer, abort(2));
    assert!(matches!(decode.next().await, KvServerEvent::Lost { .. }));
    assert_eq!(decode.next().await, KvServerEvent::Message { from: node("prefill-0"), message: abort(2) });
    assert_eq!(first.next().await, KvClientEvent::Up { peer: node("decode-0") });
    contains(&first.lost().await, "connected again");
    decode.server.send(&node("prefill-0"), ReceiverMsg::Commit { request: RequestId(2) });
    second.next().await;
    assert!(matches!(second.next().await, KvClientEvent::Message { .. }));
}

fn hello(name: &str, role: Role) -> NodeToRouter {
    NodeToRouter::Hello(NodeHello {
        name: node(name),
        role,
        kv_addr: None,
        identity: identity(),
        max_model_len: 4096,
        blocks: 10,
        pid: 1,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_join_speak_and_are_refused() {
    let cluster = Cluster::new();
    let endpoint = cluster.endpoint("router", Role::Router);
    let addr = endpoint.local_addr();
    let (to, mut events) = mpsc::channel(16);
    let mut server = ControlServer::new(endpoint, to);
    let node_endpoint = cluster.endpoint("decode-0", Role::Decode);

    let mut control = connect_control(&node_endpoint, addr, &node("router")).await.expect("connects");
    control.send(&hello("decode-0", Role::Decode)).await.expect("says hello");
    let Some(ControlServerEvent::Joined { conn, hello: joined, .. }) = patient(events.recv()).await else {
        panic!("not joined")
    };
    assert_eq!(joined.name, node("decode-0"));
    server.send(conn, RouterToNode::Welcome { node: NodeId(7) });
    assert_eq!(control.recv(PATIENCE).await, Ok(RouterToNode::Welcome { node: NodeId(7) }));
    let (mut handle, mut heard) = control.split(16);
    handle.try_send(NodeToRouter::Drained).expect("queues");
    let message = NodeToRouter::Drained;
    assert_eq!(patient(events.recv()).await, Some(ControlServerEvent::Message { conn, message }));
    // The last word arrives before the connection closes.
    server.send(conn, RouterToNode::Refuse { reason: "full".into() });
    server.close(conn, "the cluster is full");
    let refuse = RouterToNode::Refuse { reason: "full".into() };
    assert_eq!(patient(heard.recv()).await, Some(ControlEvent::Message(refuse)));
    assert!(matches!(patient(heard.recv()).await, Some(ControlEvent::Closed(_))));
    assert!(matches!(patient(events.recv()).await, Some(ControlServerEvent::Closed { conn: c, .. }) if c == conn));

    // A claim that the certificate does not support never reaches the router.
    for (claim, reason) in [(hello("decode-0", Role::Prefill), "role prefill"), (hello("x", Role::Decode), "\"x\"")] {
        let mut control = connect_control(&node_endpoint, addr, &node("router")).await.expect("connects");
        control.send(&claim).await.expect("says hello");
        let Ok(RouterToNode::Refuse { reason: why }) = control.recv(PATIENCE).await else { panic!("not refused") };
        contains(&why, reason);
    }
    assert!(events.try_recv().is_err());

    // A node is not a router, and this router serves no KV.
    let error = connect_control(&node_endpoint, node_endpoint.local_addr(), &node("decode-0")).await;
    contains(&error.expect_err("not a router").to_string(), "role router");
    let conn = node_endpoint.connect_kv(addr, &node("router")).await;
    contains(&conn.expect_err("not a decode node").to_string(), "role decode");
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_dropped_not_waited_for() {
    let cluster = Cluster::new();
    let router = cluster.endpoint("router", Role::Router);
    let (to, _events) = mpsc::channel(16);
    let _server = ControlServer::new(router.clone(), to);
    let endpoint = cluster.endpoint("decode-0", Role::Decode);
    let control = connect_control(&endpoint, router.local_addr(), &node("router")).await.expect("connects");
    let (mut handle, mut events) = control.split(1);
    // On this one thread the writer has no turn before the loop is through.
    for _ in 0..control::CONTROL_QUEUE {
        handle.try_send(NodeToRouter::Drained).expect("queues");
    }
    assert_eq!(handle.try_send(NodeToRouter::Drained), Err(ControlError::QueueFull));
    assert_eq!(handle.try_send(NodeToRouter::Drained), Err(ControlError::Closed));
    assert!(matches!(patient(events.recv()).await, Some(ControlEvent::Closed(_))));
}
