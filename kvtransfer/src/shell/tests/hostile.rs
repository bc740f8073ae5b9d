//! Malformed frames and pages from peers with good certificates, to every endpoint there is: the session is closed with a
//! reason, it is counted, and the endpoint goes on.

use super::*;
use ridge_protocol::limits;
use ridge_protocol::stats::ProtocolErrors;
use ridge_protocol::wire::{FRAME_HEADER_BYTES, Message};

/// What a hostile peer writes on a control stream.
struct Malformed {
    bytes: Vec<u8>,
    /// It then ends the stream.
    finish: bool,
    /// What the other side says of it.
    reason: &'static str,
}

/// Everything that is wrong with a frame, one thing at a time.
fn malformed<M: Message>(good: &M) -> Vec<Malformed> {
    let good = wire::encode(good).expect("encodes");
    let body = good.len() - FRAME_HEADER_BYTES;
    let with = |at: usize, value: u8, reason| {
        let mut bytes = good.clone();
        bytes[at] = value;
        Malformed { bytes, finish: false, reason }
    };
    let mut longer = with(8, body as u8 + 1, "1 bytes after the message");
    longer.bytes.push(0);
    let mut shorter = with(8, body as u8 - 1, "malformed body");
    shorter.bytes.pop();
    vec![
        Malformed { bytes: b"GET / HTTP/1.1\r\n\r\n".to_vec(), finish: false, reason: "RDG1" },
        with(0, b'X', "RDG1"),
        with(4, 9, "protocol version 9"),
        with(6, 77, "frame of class 77"),
        with(11, 0x7f, "above the limit"),
        with(12, 1, "reserved bytes"),
        with(FRAME_HEADER_BYTES, 0x77, "malformed body"),
        longer,
        shorter,
        Malformed { bytes: good[..20].to_vec(), finish: true, reason: "inside a message" },
        Malformed { bytes: good[..7].to_vec(), finish: true, reason: "inside a message" },
    ]
}

fn frame<M: Message>(message: &M) -> Vec<u8> {
    wire::encode(message).expect("encodes")
}

fn count(endpoint: &Endpoint, wanted: ProtocolErrors) {
    assert_eq!(endpoint.protocol_errors(), wanted);
}

/// A connection with its control stream, without the driver. All of it lives: a stream that is dropped is reset.
struct ByHand {
    conn: quinn::Connection,
    send: quinn::SendStream,
    _recv: quinn::RecvStream,
}

impl ByHand {
    /// Says `before` and then something malformed, and hears why the connection was closed.
    async fn attack(&mut self, before: &[u8], what: &Malformed) {
        self.send.write_all(&[before, &what.bytes].concat()).await.expect("writes");
        if what.finish {
            self.send.finish().expect("finishes");
        }
        self.closed_by_peer(what.reason).await;
    }

    async fn closed_by_peer(&self, reason: &str) {
        let quinn::ConnectionError::ApplicationClosed(close) = patient(self.conn.closed()).await else {
            panic!("not closed by the peer: {:?}", self.conn.close_reason())
        };
        contains(&String::from_utf8_lossy(&close.reason), reason);
    }
}

/// A good prefill node's connection to a decode node.
async fn to_decode(cluster: &Cluster, decode: &Decode) -> ByHand {
    let endpoint = cluster.endpoint("prefill-0", Role::Prefill);
    let conn = endpoint.connect_kv(decode.endpoint.local_addr(), &node("decode-0")).await.expect("connects");
    let (send, recv) = conn.open_bi().await.expect("opens");
    ByHand { conn, send, _recv: recv }
}

fn kv_hello() -> Vec<u8> {
    frame(&SenderMsg::Hello { name: node("prefill-0"), identity: identity(), blocks: blocks() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_to_a_decode_node() {
    let cluster = Cluster::new();
    let mut decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let out_of_turn = |bytes, reason| Malformed { bytes, finish: false, reason };
    let mut after_hello = malformed(&abort(1));
    after_hello.push(out_of_turn(kv_hello(), "second Hello"));
    let mut instead_of_hello =
        malformed(&SenderMsg::Hello { name: node("prefill-0"), identity: identity(), blocks: blocks() });
    instead_of_hello.push(out_of_turn(frame(&abort(1)), "not Hello"));
    let mut control = 0;
    for (before, cases) in [(kv_hello(), after_hello), (Vec::new(), instead_of_hello)] {
        for case in cases {
            to_decode(&cluster, &decode).await.attack(&before, &case).await;
            if !before.is_empty() {
                contains(&decode.lost().await, case.reason);
            }
            control += 1;
            count(&decode.endpoint, ProtocolErrors { control, ..ProtocolErrors::default() });
        }
    }
    assert!(decode.events.try_recv().is_err(), "nothing of it reached the node");
    serves_still(&cluster, &mut decode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_pages_to_a_decode_node() {
    let cluster = Cluster::new();
    let mut decode = Decode::new(cluster.endpoint("decode-0", Role::Decode), identity());
    let header = |len| PageHeader { request: RequestId(1), layer: 0, index: 0, len, digest: 0 }.encode().to_vec();
    let with = |at: usize, value: u8| {
        let mut bytes = header(32768);
        bytes[at] = value;
        bytes
    };
    let cases = [
        (vec![0xaa; 100], "RKVP"),
        (with(0, b'X'), "RKVP"),
        (with(4, 9), "protocol version 9"),
        (with(6, 1), "reserved bytes"),
        (with(28, 1), "reserved bytes"),
        (header(u32::MAX), "outside 1.."),
        (header(0), "outside 1.."),
        (header(4096), "page of 4096 bytes where 32768 were agreed"),
        (header(32768)[..30].to_vec(), "inside a page"),
        (header(32768), "inside a page"),
        ([header(32768), vec![0; 1000]].concat(), "inside a page"),
    ];
    for (at, (bytes, reason)) in cases.into_iter().enumerate() {
        let mut peer = to_decode(&cluster, &decode).await;
        peer.send.write_all(&kv_hello()).await.expect("writes");
        let mut pages = peer.conn.open_uni().await.expect("opens");
        pages.write_all(&bytes).await.expect("writes");
        pages.finish().expect("finishes");
        peer.closed_by_peer(reason).await;
        contains(&decode.lost().await, reason);
        count(&decode.endpoint, ProtocolErrors { page: at as u64 + 1, ..ProtocolErrors::default() });
    }
    serves_still(&cluster, &mut decode).await;
}

/// A good prefill node is heard.
async fn serves_still(cluster: &Cluster, decode: &mut Decode) {
    let mut prefill = Prefill::new(cluster.endpoint("prefill-9", Role::Prefill), "prefill-9", identity());
    prefill.client.send(&decode.peer("decode-0"), abort(7));
    assert_eq!(decode.next().await, KvServerEvent::Message { from: node("prefill-9"), message: abort(7) });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_to_the_router() {
    let cluster = Cluster::new();
    let router = cluster.endpoint("router", Role::Router);
    let (to, mut events) = mpsc::channel(16);
    let _server = ControlServer::new(router.clone(), to);
    let endpoint = cluster.endpoint("decode-0", Role::Decode);
    let greeting = hello("decode-0", Role::Decode);
    let out_of_turn = |bytes, reason| Malformed { bytes, finish: false, reason };
    let mut after_hello = malformed(&NodeToRouter::Receipt { request: RequestId(1), receipt: Default::default() });
    after_hello.push(out_of_turn(frame(&greeting), "second Hello"));
    let mut instead_of_hello = malformed(&greeting);
    instead_of_hello.push(out_of_turn(frame(&NodeToRouter::Drained), "not Hello"));
    let mut control = 0;
    for (before, cases) in [(frame(&greeting), after_hello), (Vec::new(), instead_of_hello)] {
        for case in cases {
            let conn = endpoint.connect_router(router.local_addr(), &node("router")).await.expect("connects");
            let (send, recv) = conn.open_bi().await.expect("opens");
            ByHand { conn, send, _recv: recv }.attack(&before, &case).await;
            if !before.is_empty() {
                assert!(matches!(patient(events.recv()).await, Some(ControlServerEvent::Joined { .. })));
                let Some(ControlServerEvent::Closed { reason, .. }) = patient(events.recv()).await else {
                    panic!("not closed")
                };
                contains(&reason, case.reason);
            }
            control += 1;
            count(&router, ProtocolErrors { control, ..ProtocolErrors::default() });
        }
    }
    assert!(events.try_recv().is_err(), "nothing of it reached the router");
    let mut good = connect_control(&endpoint, router.local_addr(), &node("router")).await.expect("connects");
    good.send(&greeting).await.expect("says hello");
    assert!(matches!(patient(events.recv()).await, Some(ControlServerEvent::Joined { .. })));
}

/// Takes the next connection and its control stream.
async fn by_hand(accepted: &mut mpsc::Receiver<quinn::Connection>) -> ByHand {
    let conn = patient(accepted.recv()).await.expect("the endpoint lives");
    let (send, recv) = patient(conn.accept_bi()).await.expect("a control stream");
    ByHand { conn, send, _recv: recv }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_to_a_prefill_node() {
    let cluster = Cluster::new();
    let hostile = cluster.endpoint("decode-0", Role::Decode);
    let mut accepted = hostile.serve(limits::ALPN_KV);
    let peer = KvPeer { name: node("decode-0"), addr: hostile.local_addr(), blocks: blocks() };
    let endpoint = cluster.endpoint("prefill-0", Role::Prefill);
    let mut prefill = Prefill::new(endpoint.clone(), "prefill-0", identity());
    let commit = ReceiverMsg::Commit { request: RequestId(1) };
    let out_of_turn = |bytes, reason| Malformed { bytes, finish: false, reason };
    let mut after_welcome = malformed(&commit);
    after_welcome.push(out_of_turn(frame(&ReceiverMsg::Welcome), "second answer to Hello"));
    let mut instead_of_welcome = malformed(&commit);
    instead_of_welcome.push(out_of_turn(frame(&commit), "in answer to Hello"));
    let mut control = 0;
    for (before, cases) in [(frame(&ReceiverMsg::Welcome), after_welcome), (Vec::new(), instead_of_welcome)] {
        for case in cases {
            prefill.client.send(&peer, abort(1));
            by_hand(&mut accepted).await.attack(&before, &case).await;
            if !before.is_empty() {
                assert_eq!(prefill.next().await, KvClientEvent::Up { peer: node("decode-0") });
            }
            contains(&prefill.lost().await, case.reason);
            prefill.client.forget(&peer);
            control += 1;
            count(&endpoint, ProtocolErrors { control, ..ProtocolErrors::default() });
        }
    }
    // A good decode node is spoken to.
    let mut decode = Decode::new(cluster.endpoint("decode-9", Role::Decode), identity());
    prefill.client.send(&decode.peer("decode-9"), abort(7));
    assert_eq!(decode.next().await, KvServerEvent::Message { from: node("prefill-0"), message: abort(7) });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_from_a_router_to_a_node() {
    let cluster = Cluster::new();
    let hostile = cluster.endpoint("router", Role::Router);
    let mut accepted = hostile.serve(limits::ALPN_CONTROL);
    let endpoint = cluster.endpoint("decode-0", Role::Decode);
    let options = LinkOptions {
        name: node("decode-0"),
        listen: endpoint.local_addr(),
        advertise: None,
        router: hostile.local_addr(),
        router_name: node("router"),
        tls_dir: std::path::PathBuf::new(),
        transport: TransportOptions::default(),
    };
    let NodeToRouter::Hello(greeting) = hello("decode-0", Role::Decode) else { panic!("is a Hello") };
    let mut events = link::start(endpoint.clone(), &options, greeting);
    let welcome = RouterToNode::Welcome { node: NodeId(1) };
    for (at, case) in malformed(&RouterToNode::Cancel { request: RequestId(1) }).into_iter().enumerate() {
        by_hand(&mut accepted).await.attack(&frame(&welcome), &case).await;
        assert!(matches!(patient(events.recv()).await, Some(LinkEvent::Up(NodeId(1), _))));
        let Some(LinkEvent::Down(reason)) = patient(events.recv()).await else { panic!("not down") };
        contains(&reason, case.reason);
        count(&endpoint, ProtocolErrors { control: at as u64 + 1, ..ProtocolErrors::default() });
    }
    // It dials again, and a router that behaves has it.
    let mut router = by_hand(&mut accepted).await;
    router.send.write_all(&frame(&welcome)).await.expect("writes");
    assert!(matches!(patient(events.recv()).await, Some(LinkEvent::Up(..))));
}
