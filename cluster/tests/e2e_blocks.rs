//! Blocks are accounted for: what is transferred is blocks times block bytes, and whatever clients do, every block
//! comes back.

mod support;

use ridge_tests::cluster::Cluster;
use ridge_tests::model::prompt;
use serde_json::json;
use std::time::Duration;
use support::{binary, complete, completion, oracle, tiny_llama};

/// Bytes of one block of the tiny Llama: K and V, 3 layers, 2 heads of 64 elements, 16 tokens, f32.
const BLOCK_BYTES: f64 = (2 * 3 * 2 * 64 * 16 * 4) as f64;

#[test]
fn transferred_bytes_are_blocks_times_block_bytes() {
    let cluster = Cluster::start(binary(), &tiny_llama(), &["--kv-cache-dtype", "f32", "--block-size", "16"]);
    let before = cluster.wait_idle();
    let lens = [16, 40, 100, 257];
    for len in lens {
        complete(&cluster, &prompt(1000 + len as u64, len), 4);
    }
    let after = cluster.wait_idle();
    let moved = |name: &str, label: &str, value: &str| {
        after.sum_where(name, label, value) - before.sum_where(name, label, value)
    };
    let sent = moved("ridge_kv_transfer_bytes_total", "direction", "out");
    let received = moved("ridge_kv_transfer_bytes_total", "direction", "in");
    let pages = moved("ridge_kv_transfer_pages_total", "direction", "in");
    assert_eq!(sent, received, "what leaves one side arrives at the other");
    assert_eq!(pages % 3.0, 0.0, "a block has three pages, one per layer");
    assert_eq!(received, pages / 3.0 * BLOCK_BYTES);
    let committed = moved("ridge_kv_transfers_committed_total", "role", "decode");
    if committed == lens.len() as f64 {
        // All four went by transfer, with no prefix in common.
        let blocks: usize = lens.iter().map(|len| len.div_ceil(16)).sum();
        assert_eq!(received, blocks as f64 * BLOCK_BYTES);
    }
    assert!(committed >= 1.0, "the long prompt at least goes by transfer");
    assert_eq!(after.sum("ridge_kv_digest_failures_total"), 0.0);
}

/// Clients that hang up at random moments, from before the first byte to after the last.
#[test]
fn a_hundred_hang_ups_leave_no_block_behind() {
    let model = tiny_llama();
    let cluster = Cluster::start(binary(), &model, &[]);
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for round in 0..100 {
        let mut request = completion(&prompt(5000 + round, 1 + random(400) as usize), 100);
        request["stream"] = json!(true);
        let events = random(40);
        let pause = Duration::from_millis(random(15));
        let hang_up = |client: &ridge_tests::http::Client| -> std::io::Result<()> {
            let stream = client.stream("/v1/completions", &request)?;
            if events == 0 {
                return Ok(());
            }
            let mut seen = 0;
            stream.for_each(|_| {
                seen += 1;
                seen < events
            })?;
            std::thread::sleep(pause);
            Ok(())
        };
        hang_up(&cluster.client).unwrap_or_else(|error| panic!("round {round}: {error}\n{}", cluster.output()));
    }
    cluster.wait_idle();
    let prompt = prompt(5, 77);
    assert_eq!(complete(&cluster, &prompt, 16), oracle(&model, &prompt, 16, &[]).text);
}

/// Hang-ups of many at once, while prompts wait, ship and decode side by side, in a pool that is too small for all.
#[test]
fn crowded_hang_ups_leave_no_block_behind() {
    // Room for about three sequences of the full context on each node.
    let memory = format!("{}", 100 * BLOCK_BYTES as u64);
    let flags = ["--kv-cache-dtype", "f32", "--kv-memory", &memory];
    let cluster = Cluster::start(binary(), &tiny_llama(), &flags);
    std::thread::scope(|scope| {
        for client in 0..16u64 {
            let http = cluster.client.clone();
            scope.spawn(move || {
                for round in 0..6u64 {
                    let salt = 7000 + client * 100 + round;
                    let mut request = completion(&prompt(salt, 50 + (salt * 37 % 350) as usize), 60);
                    request["stream"] = json!(true);
                    // Every third client stays to the end.
                    let events = if round % 3 == 0 { u64::MAX } else { salt % 11 };
                    let Ok(stream) = http.stream("/v1/completions", &request) else { continue };
                    let mut seen = 0;
                    let _ = stream.for_each(|_| {
                        seen += 1;
                        seen < events
                    });
                }
            });
        }
    });
    cluster.wait_idle();
}
