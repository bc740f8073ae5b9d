//! The prompts of a repetition: their blocks on either side, what is in them, and how to tell that it arrived.

use super::args::LoadArgs;
use anyhow::{Context, ensure};
use ridge_model::kv::KvMemory;
use ridge_model::mapping::HugePages;
use ridge_model::memory::machine::MachineMemory;
use ridge_protocol::transfer::PageSource;
use ridge_protocol::{BlockHash, BlockId, BlockShape, RequestId, limits};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pages of which the digest's cost is measured.
const DIGEST_PAGES: usize = 4096;

/// Takes memory for all prompts of a repetition. Refuses sizes that no node would take.
pub fn memory(args: &LoadArgs) -> anyhow::Result<Arc<KvMemory>> {
    let page = args.format().page_bytes();
    ensure!(
        page <= limits::MAX_PAGE_BYTES,
        "--block-size {} makes pages of {page} bytes, more than the {} that pass between nodes",
        args.block_size,
        limits::MAX_PAGE_BYTES
    );
    ensure!(
        args.prompt_tokens <= limits::MAX_TOKENS,
        "--prompt-tokens {} is more than the {} that nodes accept",
        args.prompt_tokens,
        limits::MAX_TOKENS
    );
    // Both processes are on this machine.
    let need = 2.0 * args.blocks() as f64 * KvMemory::block_bytes(&args.format(), args.layers()) as f64;
    let available = MachineMemory::read().bytes as f64;
    ensure!(
        need < available,
        "--prompts {} of --prompt-tokens {} take {:.1} GB of KV memory on both sides together, and {:.1} GB are available",
        args.prompts,
        args.prompt_tokens,
        need / 1e9,
        available / 1e9
    );
    let kv = KvMemory::with_huge_pages(args.format(), args.layers(), args.blocks(), HugePages::Auto);
    Ok(Arc::new(kv.context("KV memory")?))
}

/// The prompt's dispatch in a round.
pub fn request(args: &LoadArgs, round: usize, prompt: usize) -> RequestId {
    RequestId((round * args.prompts + prompt) as u64)
}

/// The sender's blocks of a prompt, ascending as a fresh pool hands them out.
pub fn sender_blocks(args: &LoadArgs, prompt: usize) -> Vec<BlockId> {
    let first = prompt * args.blocks_each();
    (first..first + args.blocks_each()).map(|block| BlockId(block as u32)).collect()
}

/// The receiver's blocks of a prompt: descending, so that no block keeps its number.
pub fn receiver_blocks(args: &LoadArgs, prompt: usize) -> Vec<BlockId> {
    let last = args.blocks() as u32 - 1;
    sender_blocks(args, prompt).iter().map(|block| BlockId(last - block.0)).collect()
}

/// Stand-ins for the chain hashes of a prompt's full blocks: both sides must name the same.
pub fn hashes(args: &LoadArgs, round: usize, prompt: usize) -> Vec<BlockHash> {
    let hash = |block: usize| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&request(args, round, prompt).0.to_le_bytes());
        bytes[8..].copy_from_slice(&(block as u64).to_le_bytes());
        BlockHash(bytes)
    };
    (0..args.prompt_tokens / args.block_size).map(hash).collect()
}

/// Fills every page with bytes of its own.
pub fn fill(kv: &KvMemory) {
    let mut state = 0x5249_4447_u64;
    for block in 0..kv.blocks() {
        for layer in 0..kv.layers() {
            for word in kv.write(layer, BlockId(block as u32)).chunks_mut(8) {
                state = splitmix(state);
                word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
            }
        }
    }
}

/// Takes away what landed, so that the next round has to bring it again.
pub fn clear(kv: &KvMemory) {
    for block in 0..kv.blocks() {
        for layer in 0..kv.layers() {
            kv.write(layer, BlockId(block as u32)).fill(0);
        }
    }
}

/// One digest over all pages in the prompts' order, wherever `blocks` has put them. Not the digest under test.
pub fn content(args: &LoadArgs, kv: &KvMemory, blocks: impl Fn(&LoadArgs, usize) -> Vec<BlockId>) -> String {
    let mut hasher = blake3::Hasher::new();
    for prompt in 0..args.prompts {
        for block in blocks(args, prompt) {
            for layer in 0..kv.layers() {
                hasher.update(&kv.read(layer, block));
            }
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// Seconds per byte that a page's digest adds to the copy which a sender makes of it anyway.
pub fn sender_digest_s_per_byte(kv: &KvMemory, blocks: BlockShape) -> f64 {
    let mut page = Vec::new();
    added_s_per_byte(kv, |layer, block, digested| {
        let source = PageSource { blocks: vec![block], skip: 0, tokens: kv.format().block_size as u32 };
        if digested {
            black_box(kv.digested_page_in(blocks, layer, &source, 0, &mut page));
        } else {
            kv.page_in(blocks, layer, &source, &mut page);
        }
    })
}

/// The same on the side where pages land. Afterwards pages hold anything.
pub fn receiver_digest_s_per_byte(kv: &KvMemory) -> f64 {
    let page = vec![1; kv.page_bytes()];
    added_s_per_byte(kv, |layer, block, digested| {
        if digested {
            black_box(kv.land(layer, block, 0, [&page[..]]));
        } else {
            kv.write(layer, block).copy_from_slice(&page);
        }
    })
}

/// How much longer `copy` takes with a digest, by turns on pages that are not in caches; 0 if it is not longer.
fn added_s_per_byte(kv: &KvMemory, mut copy: impl FnMut(usize, BlockId, bool)) -> f64 {
    let mut spent = [Duration::ZERO; 2];
    let pairs = DIGEST_PAGES.min(kv.blocks() * kv.layers()) / 2;
    for i in 0..2 * pairs {
        let (block, digested) = (BlockId((i / kv.layers()) as u32), i % 2 == 1);
        let begin = Instant::now();
        copy(i % kv.layers(), block, digested);
        spent[usize::from(digested)] += begin.elapsed();
    }
    let bytes = (pairs.max(1) * kv.page_bytes()) as f64;
    spent[1].saturating_sub(spent[0]).as_secs_f64() / bytes
}

/// The next state of SplitMix64, mixed.
fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
