//! Pages that the CUDA engine makes for readers whose blocks are not the pool's, on the emulated device: the bytes that the CPU would make
//! of the node's own pages, there when their layer is announced, and gone with their hand-off.

mod common;

use common::tiny::{checkpoint, item, memory, prompts};
use ridge_kernels::cuda::Device;
use ridge_kernels::cuda::emulated::{Emulated, Order};
use ridge_kernels::{Cpu, DType, KvDtype};
use ridge_model::cuda::CudaEngine;
use ridge_model::device::DeviceOptions;
use ridge_model::engine::{Engine, cache_dtype};
use ridge_model::kv::KvMemory;
use ridge_model::memory::PassLimits;
use ridge_protocol::transfer::PageSource;
use ridge_protocol::{BatchPlan, BlockId, BlockShape, CacheDtype, PlanItem, Reader, RequestId};
use std::sync::Arc;

const LARGE: PassLimits = PassLimits { tokens: 128, sequences: 8 };

fn engine(device: &Arc<Emulated>, kv: KvMemory, limits: PassLimits) -> CudaEngine {
    let device: Arc<dyn Device> = device.clone();
    let (checkpoint, cpu) = (checkpoint(DType::F32), Cpu::new(1, None));
    CudaEngine::new(&checkpoint, Arc::new(kv), cpu, device, limits, &DeviceOptions::default()).expect("an engine")
}

fn shape(block_size: usize, dtype: CacheDtype) -> BlockShape {
    BlockShape::new(block_size as u32, dtype).expect("a block holds a token")
}

/// Blocks of a pool that lie in no order.
fn blocks(first: u32, tokens: usize, block_size: usize) -> Vec<BlockId> {
    (first..first + tokens.div_ceil(block_size) as u32).rev().map(BlockId).collect()
}

/// A part of a prompt, of which all is sent in such blocks.
fn part(request: u64, prompt: usize, tokens: std::ops::Range<usize>, table: &[BlockId], to: BlockShape) -> PlanItem {
    let prompt = &prompts()[prompt];
    let reader = Reader { blocks: to, tokens: prompt.len() as u32 };
    PlanItem { reader: Some(reader), ..item(request, &prompt[tokens.clone()], tokens.start, table) }
}

/// The page that the CPU makes of the node's own.
fn by_the_cpu(kv: &KvMemory, to: BlockShape, layer: usize, source: &PageSource) -> Vec<u8> {
    // What the device alone has would be converted there.
    source.blocks.iter().for_each(|block| drop(kv.read(layer, *block)));
    let mut page = Vec::new();
    kv.page_in(to, layer, source, &mut page);
    page
}

/// Runs a pass and takes each page that it completes when its layer is announced; returns how many. None is left for the CPU to make.
fn check_pass(engine: &mut CudaEngine, items: Vec<PlanItem>, context: &str) -> usize {
    let kv = engine.kv().clone();
    let own = kv.format().block_size as u32;
    let mut taken = 0;
    let readers: Vec<(PlanItem, Reader)> = items.iter().map(|item| (item.clone(), item.reader.expect("one"))).collect();
    engine.run(&BatchPlan { step: 0, items }, &mut |layer| {
        for (item, reader) in &readers {
            for index in reader.completed(item.start, item.start + item.tokens.len() as u32) {
                let size = reader.blocks.block_size();
                let source = PageSource::of(index, size, reader.tokens, &item.block_table, own);
                let mut page = vec![0xff; 5];
                let made = kv.outgoing().take(item.request, layer, index, &mut page);
                assert!(made, "{context}: page {index} of {} in layer {layer} was not made", item.request);
                let want = by_the_cpu(&kv, reader.blocks, layer as usize, &source);
                assert!(page == want, "{context}: page {index} of {} in layer {layer}", item.request);
                taken += 1;
            }
        }
    });
    taken
}

/// Prompts in chunks, alone and together, of which one continues another's prefix and one ends with a single token.
fn check(device: &Arc<Emulated>, from: KvDtype, own: usize, to: BlockShape) {
    let context = format!("{from:?} in blocks of {own} to {to}");
    let mut engine = engine(device, memory(from, own, 200), LARGE);
    (1..=5).for_each(|request| engine.kv().outgoing().open(RequestId(request)));
    let pages = |tokens: usize| tokens.div_ceil(to.block_size() as usize);
    let (a, b, c) = (blocks(0, 61, own), blocks(61, 33, own), blocks(100, 5, own));
    // Another shape in the same pass.
    let other = shape(own + 3, to.dtype);
    let mut made = check_pass(&mut engine, vec![part(1, 4, 0..16, &a, to)], &context);
    let together = vec![part(1, 4, 16..48, &a, to), part(2, 3, 0..32, &b, to), part(3, 1, 0..5, &c, other)];
    made += check_pass(&mut engine, together, &context);
    made += check_pass(&mut engine, vec![part(1, 4, 48..61, &a, to), part(2, 3, 32..33, &b, to)], &context);
    assert_eq!(made, 2 * (pages(61) + pages(33) + 5usize.div_ceil(own + 3)), "{context}: two layers of every page");
    // The first blocks of the same prompt, and others behind them.
    let cached = 48 / own * own;
    let again = [&a[..cached / own], &blocks(140, 61 - cached, own)].concat();
    let rest = check_pass(&mut engine, vec![part(4, 4, cached..61, &again, to)], &context);
    assert_eq!(
        rest,
        2 * (pages(61) - cached / to.block_size() as usize),
        "{context}: what the prefix did not complete"
    );
    // A single token is a decode step to the engine.
    let alone = check_pass(&mut engine, vec![part(5, 0, 0..1, &blocks(190, 1, own), to)], &context);
    assert_eq!((alone, engine.kv().outgoing().bytes()), (2, 0), "{context}");
    device.synchronize().expect("no kernel wrote where it should not");
}

#[test]
fn pages_for_readers_are_the_cpus_bit_for_bit() {
    let Some(device) = Emulated::for_tests() else { return };
    let sizes = [(16, 32), (8, 64), (64, 8), (7, 5), (16, 24), (1, 16), (20, 16)];
    let mut turn = 0;
    for from in KvDtype::ALL {
        for to in CacheDtype::ALL.into_iter().filter(|to| cache_dtype(from).converts_into(*to)) {
            for _ in 0..2 {
                device.set_order([Order::Forward, Order::Backward, Order::Shuffled(turn)][turn as usize % 3]);
                let (own, size) = sizes[turn as usize % sizes.len()];
                check(&device, from, own, shape(size, to));
                turn += 1;
            }
        }
    }
}

/// The same blocks in another type, and the same type in blocks of the same size: the first is made, the second taken as it is.
#[test]
fn only_what_differs_is_made() {
    let Some(device) = Emulated::for_tests() else { return };
    for (to, made) in [(CacheDtype::Int8, true), (CacheDtype::Bf16, false)] {
        let mut engine = engine(&device, memory(KvDtype::BF16, 16, 3), LARGE);
        let kv = engine.kv().clone();
        kv.outgoing().open(RequestId(1));
        let plan = BatchPlan { step: 0, items: vec![part(1, 3, 0..33, &blocks(0, 33, 16), shape(16, to))] };
        engine.run(&plan, &mut |_| {});
        let page = kv.format().head_dim * kv.format().kv_heads * 16 * 2 + 2 * 16 * 4 * kv.format().kv_heads;
        assert_eq!(kv.outgoing().bytes(), if made { 2 * 3 * page } else { 0 });
        kv.outgoing().close(RequestId(1));
        assert_eq!(kv.outgoing().bytes(), 0, "nothing outlives the hand-off");
    }
}

/// What a pass makes for a hand-off that ended meanwhile is dropped; where there is no room, nothing is made, and whoever sends makes it of
/// the node's own pages, which are there as ever.
#[test]
fn nothing_is_kept_without_a_taker_or_without_room() {
    let Some(device) = Emulated::for_tests() else { return };
    let to = shape(12, CacheDtype::F16);
    let table = blocks(0, 61, 8);
    let pass = |request| BatchPlan { step: 0, items: vec![part(request, 4, 0..61, &table, to)] };
    let mut reference = engine(&device, memory(KvDtype::F32, 8, 8), LARGE);
    let kv = reference.kv().clone();
    kv.outgoing().open(RequestId(1));
    reference.run(&pass(1), &mut |layer| {
        if layer == 0 {
            kv.outgoing().close(RequestId(1));
        }
    });
    assert_eq!(kv.outgoing().bytes(), 0, "of a hand-off that ended during its pass");
    // A layer's are 9216 bytes. The first may have twice two blocks of 2048 at a time; the other twice three, of two layers of two passes.
    for (tokens, want) in [(4, [0, 0]), (16, [12, 0])] {
        let mut engine = engine(&device, memory(KvDtype::F32, 8, 8), PassLimits { tokens, sequences: 1 });
        let small = engine.kv().clone();
        let made = [1, 2].map(|request| {
            small.outgoing().open(RequestId(request));
            engine.run(&pass(request), &mut |_| {});
            small.outgoing().bytes()
        });
        assert_eq!(made, [want[0] * 1536; 2], "{tokens}");
        let mut page = Vec::new();
        for (request, want) in [1, 2].into_iter().zip(want) {
            let mut made = 0;
            for (index, layer) in (0..6).flat_map(|index| [(index, 0), (index, 1)]) {
                let source = PageSource::of(index, 12, 61, &table, 8);
                match small.outgoing().take(RequestId(request), layer as u32, index, &mut page) {
                    true => made += 1,
                    false => small.page_in(to, layer, &source, &mut page),
                }
                assert!(page == by_the_cpu(&kv, to, layer, &source), "page {index} of layer {layer}");
            }
            assert_eq!(made, want, "{tokens}");
        }
        assert_eq!(small.outgoing().bytes(), 0);
    }
}
