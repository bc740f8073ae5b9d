//! `cluster bench transfer`: how fast KV pages get from one node's memory into another's, and what holds them up.
//!
//! Two processes on this machine, the second started by the first, take the nodes' full path: the machines of both sides,
//! TLS and QUIC, digests computed over the sender's memory and checked over the receiver's, pages in KV memory on both
//! sides. Plaintext TCP over the same loopback is measured in turns with it, because the rates of a shared machine drift.
//! Read [`sender`] (one round), [`receiver`] (its other end) and [`report`] (what is made of the figures).

mod args;
mod child;
mod load;
mod receiver;
mod reference;
mod report;
mod sender;
mod usage;

pub use args::{ReceiverArgs, TransferArgs};
pub use receiver::run as run_receiver;

use crate::roles;
use anyhow::{Context, ensure};
use child::ReceivingProcess;
use receiver::{Listening, Order, Received};
use report::{Cell, Repetition};
use ridge_kvtransfer::shell::{ClusterCa, NodeTls};
use ridge_model::kv::KvMemory;
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::{NodeName, Role};
use sender::SendingSide;
use std::path::Path;
use std::sync::Arc;

/// The sending node's name.
const SENDER: &str = "prefill-0";
/// The receiving node's name.
const RECEIVER: &str = "decode-0";

/// Runs `cluster bench transfer`.
pub fn run(args: &TransferArgs) -> anyhow::Result<()> {
    let kv = load::memory(&args.load)?;
    load::fill(&kv);
    let content = load::content(&args.load, &kv, load::sender_blocks);
    let folder = tempfile::tempdir().context("a folder for certificates")?;
    let (sender_tls, receiver_tls) = (folder.path().join("sender"), folder.path().join("receiver"));
    certificates(folder.path(), &sender_tls, SENDER, Role::Prefill)?;
    certificates(folder.path(), &receiver_tls, RECEIVER, Role::Decode)?;
    let tls = NodeTls::read(&sender_tls.join("ca.pem"), &sender_tls)?;
    let mut cells = Vec::new();
    for &mtu in &args.mtu {
        cells.push(measure(args, mtu, &kv, &content, &tls, &receiver_tls).with_context(|| format!("--mtu {mtu}"))?);
    }
    if args.json {
        println!("{:#}", report::json(args, &cells));
    } else {
        print!("{}", report::table(args, &cells));
    }
    Ok(())
}

/// Issues a node's certificate from the CA in `folder`.
fn certificates(folder: &Path, node: &Path, name: &str, role: Role) -> anyhow::Result<()> {
    let ca = ClusterCa::load_or_create(folder)?;
    ca.issue(&NodeName(name.into()), role)?.write(node)?;
    std::fs::write(node.join("ca.pem"), ca.cert_pem()).context("ca.pem")
}

/// All repetitions with datagrams of one size.
fn measure(
    args: &TransferArgs,
    mtu: u16,
    kv: &Arc<KvMemory>,
    content: &str,
    tls: &NodeTls,
    receiver_tls: &Path,
) -> anyhow::Result<Cell> {
    let network = args.network(mtu);
    let mut process = ReceivingProcess::start(receiver_tls, &[args.load.flags(), network.flags()].concat())?;
    let Listening { addr } = process.answer()?;
    let blocks = args.load.identity().block_shape().context("blocks hold at least one token")?;
    let peer = KvPeer { name: NodeName(RECEIVER.into()), addr, blocks };
    let runtime = roles::node_runtime()?;
    let entered = runtime.enter();
    let mut side = SendingSide::new(&args.load, kv.clone(), tls, &network.transport(), &NodeName(SENDER.into()), peer)?;
    drop(entered);
    let bytes = args.load.pages() * kv.page_bytes() as u64;
    let mut repetitions = Vec::new();
    // Round 0 makes the connection, finds the path's MTU and touches all memory; it is not counted.
    for round in 0..=usize::from(args.repeat) {
        eprintln!("datagrams of {mtu}: round {round} of {}", args.repeat);
        process.order(Order::Tcp(bytes))?;
        let Listening { addr } = process.answer()?;
        let tcp_bytes_per_s = reference::send(addr, bytes)?;
        let iperf3_bytes_per_s = reference::iperf3(bytes)?;
        process.order(Order::Round(round))?;
        let sent = runtime.block_on(side.round(round))?;
        let received: Received = process.answer()?;
        ensure!(
            sent.pages == args.load.pages() && sent.bytes == bytes,
            "{} pages of {} were sent",
            sent.pages,
            args.load.pages()
        );
        ensure!(
            received.pages == sent.pages && received.bytes == bytes,
            "{} of {} pages landed",
            received.pages,
            sent.pages
        );
        ensure!(received.content == content, "what landed is not what was sent");
        let digest_s_per_byte = load::sender_digest_s_per_byte(kv, blocks);
        repetitions.push(Repetition { sent, received, digest_s_per_byte, tcp_bytes_per_s, iperf3_bytes_per_s });
    }
    repetitions.remove(0);
    Ok(Cell { mtu, bytes, repetitions, link: side.link()? })
}
