//! Sizes in, plan or refusal out.

use super::machine::{MachineMemory, MemorySource};
use super::*;
use crate::spec::{Activation, AttentionSpec, FfnKind, FfnSpec, LayerSpec, RopeScaling, RopeSpec};
use ridge_kernels::KvDtype;

const MIB: u64 = 1 << 20;

/// Llama 3.2 1B: a block of 16 tokens is 512 KiB of f16, and begins 33 cache lines after the end of the one before it.
const BLOCK: u64 = (512 << 10) + 33 * 64;

/// The model's shape.
fn llama_1b() -> ModelSpec {
    let layer = LayerSpec { attention: AttentionSpec::default(), ffn: FfnSpec { kind: FfnKind::Gated, bias: false } };
    ModelSpec {
        arch: "llama".into(),
        hidden: 2048,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        ffn: 8192,
        vocab: 128_256,
        context: 131_072,
        norm_eps: 1e-5,
        rope: RopeSpec { theta: 5e5, rotary_dim: 64, scaling: RopeScaling::None },
        activation: Activation::Silu,
        sliding_window: None,
        layer_specs: vec![layer; 16],
        tied_head: true,
    }
}

fn demand(spec: &ModelSpec, mib: u64) -> Demand<'_> {
    Demand {
        spec,
        weights: WeightBytes { shared: 1200 * MIB, own: 100 * MIB },
        format: KvFormat { dtype: KvDtype::F16, kv_heads: 8, head_dim: 64, block_size: 16 },
        pass: PassLimits { tokens: 512, sequences: 8 },
        threads: 2,
        kv: KvDemand::Auto,
        max_model_len: None,
        machine: MachineMemory { bytes: mib * MIB, source: MemorySource::Available, known: true },
        nodes: 1,
        on_device: None,
    }
}

#[test]
fn items_add_up_and_default_kv_leaves_half() {
    let spec = llama_1b();
    let plan = plan(&demand(&spec, 16 << 10)).expect("fits");
    assert_eq!(plan.weights.total(), 1300 * MIB);
    // 512 rows of 2·2048 + 2·2048 + 2·512 + 2·8192 + 64 + 1 floats, and 8 rows of the vocabulary.
    assert_eq!(plan.activations, 4 * (512 * (4096 + 4096 + 1024 + 16_384 + 64 + 1) + 8 * 128_256));
    assert_eq!(plan.kv, plan.blocks as u64 * BLOCK);
    assert!(plan.total() <= 16 << 30);
    let left = (16u64 << 30) - (plan.total() - plan.kv);
    assert!(plan.kv <= left / 2 && plan.kv > left * 2 / 5, "{plan}");
    assert!(plan.headroom >= (plan.total() - plan.headroom) / 20);
    assert_eq!(plan.max_model_len, 131_072);
    let table = plan.to_string();
    for word in ["weights", "KV cache", "activations", "workspace", "headroom", "total", "MemAvailable"] {
        assert!(table.contains(word), "{table}");
    }
}

#[test]
fn the_context_is_cut_to_what_fits_unless_it_was_asked_for() {
    let spec = llama_1b();
    let small = demand(&spec, 3 << 10);
    let plan_small = plan(&small).expect("fits with a shorter context");
    assert!(plan_small.max_model_len < 131_072 && plan_small.max_model_len > 16_384, "{plan_small}");
    assert!(plan_small.total() <= 3 << 30);
    let refusal = plan(&Demand { max_model_len: Some(131_072), ..small.clone() }).expect_err("4 GiB of KV in 3 GiB");
    let words = refusal.to_string();
    assert!(words.contains("what would fit: at most --kv-memory "), "{words}");
    // What it advises is then accepted.
    let tokens = words.rsplit("--max-model-len ").next().expect("names a length").trim().parse().expect("a number");
    let bytes = words.split("--kv-memory ").nth(1).and_then(|w| w.split("MiB").next()).expect("names a size");
    let kv = KvDemand::Bytes(bytes.parse::<u64>().expect("a number") * MIB);
    let advised = Demand { max_model_len: Some(tokens), kv, ..small };
    assert!(plan(&advised).expect("was advised").blocks * 16 >= tokens);
}

#[test]
fn explicit_sizes_are_respected_or_refused() {
    let spec = llama_1b();
    let with = |kv| plan(&Demand { kv, max_model_len: Some(1000), ..demand(&spec, 4 << 10) });
    assert_eq!(with(KvDemand::Blocks(100)).expect("fits").blocks, 100);
    assert_eq!(with(KvDemand::Bytes(100 * MIB)).expect("fits").blocks as u64, 100 * MIB / BLOCK);
    assert!(with(KvDemand::Blocks(10)).expect_err("no sequence fits").to_string().contains("raise --kv-memory"));
    let Err(Refusal::TooLarge { short, plan, .. }) = with(KvDemand::Bytes(4 << 30)) else { panic!("more than all") };
    assert_eq!(plan.total() - short, 4 << 30);
}

#[test]
fn nodes_of_one_machine_share_it() {
    let spec = llama_1b();
    let one = demand(&spec, 8 << 10);
    let two = Demand { nodes: 2, ..one.clone() };
    let plan_two = plan(&two).expect("fits");
    // The mapped weights once, everything else twice.
    assert!(2 * plan_two.total() - 1200 * MIB <= 8 << 30);
    assert!(plan_two.kv < plan(&one).expect("fits").kv);
    let eight = Demand { nodes: 8, machine: MachineMemory { bytes: 3 << 30, ..one.machine }, ..one };
    let words = plan(&eight).expect_err("too many nodes").to_string();
    assert!(words.contains("instead of 8 nodes"), "{words}");
}

#[test]
fn weights_that_do_not_fit_are_said_to() {
    let spec = llama_1b();
    let words = plan(&demand(&spec, 1000)).expect_err("too small").to_string();
    assert!(words.contains("no KV cache at all: a machine needs"), "{words}");
    let unknown = MachineMemory { known: false, ..demand(&spec, 1000).machine };
    assert!(plan(&Demand { machine: unknown, ..demand(&spec, 1000) }).is_ok(), "a guess refuses nobody");
}
