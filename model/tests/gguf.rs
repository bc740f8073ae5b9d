//! GGUF: a file written here loads; no damaged file panics or allocates without bound.

mod common;

use common::{GgufWriter, load_path, shared};
use ridge_kernels::DType;
use ridge_model::checkpoint::gguf::{Gguf, Value};
use ridge_model::checkpoint::{LoadError, Tensor};
use ridge_model::spec::RopeScaling;

const HIDDEN: usize = 8;
const HEADS: usize = 2;
const FFN: usize = 12;
const VOCAB: usize = 261;

fn f32s(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

/// A one-layer Llama whose every element names its row: q and k rows as llama.cpp's converter orders them.
fn small_model() -> GgufWriter {
    let mut w = GgufWriter::default();
    w.string("general.architecture", "llama");
    w.u32("llama.context_length", 64);
    w.u32("llama.embedding_length", HIDDEN as u32);
    w.u32("llama.block_count", 1);
    w.u32("llama.feed_forward_length", FFN as u32);
    w.u32("llama.attention.head_count", HEADS as u32);
    w.u32("llama.attention.head_count_kv", 1);
    w.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    w.string("tokenizer.ggml.model", "llama");
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "a", "\u{2581}"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    let kinds = (0..VOCAB as u32).map(|id| [2, 3, 3, 1, 1].get(id as usize).copied().unwrap_or(6u32));
    w.strings("tokenizer.ggml.tokens", &tokens);
    w.array("tokenizer.ggml.scores", 6, &(0..VOCAB).map(|_| 0f32.to_le_bytes().to_vec()).collect::<Vec<_>>());
    w.array("tokenizer.ggml.token_type", 5, &kinds.map(|k| k.to_le_bytes().to_vec()).collect::<Vec<_>>());
    w.u32("tokenizer.ggml.bos_token_id", 1);
    w.u32("tokenizer.ggml.eos_token_id", 2);
    let mut matrix = |name: &str, rows: usize, cols: usize| {
        let dims = if rows == 1 { vec![cols] } else { vec![rows, cols] };
        w.tensor(name, &dims, 0, f32s((0..rows * cols).map(|i| (i / cols) as f32)));
    };
    matrix("token_embd.weight", VOCAB, HIDDEN);
    matrix("output_norm.weight", 1, HIDDEN);
    for (name, rows, cols) in [
        ("attn_norm", 1, HIDDEN),
        ("ffn_norm", 1, HIDDEN),
        ("attn_q", HIDDEN, HIDDEN),
        ("attn_k", HIDDEN / HEADS, HIDDEN),
        ("attn_v", HIDDEN / HEADS, HIDDEN),
        ("attn_output", HIDDEN, HIDDEN),
        ("ffn_gate", FFN, HIDDEN),
        ("ffn_up", FFN, HIDDEN),
        ("ffn_down", HIDDEN, FFN),
    ] {
        matrix(&format!("blk.0.{name}.weight"), rows, cols);
    }
    w
}

fn load_bytes(bytes: &[u8]) -> Result<ridge_model::checkpoint::Checkpoint, LoadError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, bytes).expect("writes");
    load_path(&path)
}

fn first_column(tensor: &Tensor) -> Vec<f32> {
    tensor.to_f32().chunks(tensor.cols).map(|row| row[0]).collect()
}

#[test]
fn a_small_model_loads_with_rows_in_half_split_order() {
    let checkpoint = load_bytes(&small_model().finish()).expect("loads");
    let spec = &checkpoint.spec;
    assert_eq!((spec.head_dim, spec.kv_heads, spec.vocab, spec.tied_head), (4, 1, VOCAB, true));
    // Pairs (0, 1), (2, 3) become halves: even rows first.
    let q = checkpoint.tensors.get("layers.0.wq").expect("wq");
    assert_eq!(first_column(q), [0., 2., 1., 3., 4., 6., 5., 7.]);
    assert_eq!(first_column(checkpoint.tensors.get("layers.0.wk").expect("wk")), [0., 2., 1., 3.]);
    assert_eq!(first_column(checkpoint.tensors.get("layers.0.wv").expect("wv")), [0., 1., 2., 3.]);
    assert_eq!(checkpoint.generation.eos, [2]);
    let ids = checkpoint.tokenizer.encode("a</s>é", true).expect("encodes");
    assert_eq!(ids[..5], [1, 4, 3, 2, 4]);
    // SentencePiece puts a space before text, also before text that follows a special token; decoding drops the first.
    assert_eq!(checkpoint.tokenizer.decode(&ids, true), "a é");
}

#[test]
fn rope_factors_and_quantised_rows() {
    let mut w = small_model();
    w.tensor("rope_freqs.weight", &[2], 0, f32s([1.0, 8.0].into_iter()));
    let checkpoint = load_bytes(&w.finish()).expect("loads");
    assert_eq!(checkpoint.spec.rope.scaling, RopeScaling::Factors(vec![1.0, 8.0]));
    // A row permutation of a quantised matrix moves whole rows of blocks.
    let bytes: Vec<u8> = (0..4u8).flat_map(|row| [row; 34]).collect();
    let q8 = Tensor::owned(DType::Q8_0, 4, 32, bytes).expect("fits");
    let moved = q8.with_rows(|row| 3 - row);
    assert_eq!(moved.bytes()[..34], [3; 34]);
}

#[test]
fn errors_name_the_thing() {
    let message = |edit: &dyn Fn(&mut GgufWriter)| {
        let mut w = small_model();
        edit(&mut w);
        load_bytes(&w.finish()).expect_err("is refused").to_string()
    };
    let expect =
        |text: String, parts: &[&str]| parts.iter().for_each(|p| assert!(text.contains(p), "{text} lacks {p}"));
    expect(message(&|w| w.u32("llama.expert_count", 8)), &["mixture of 8 experts"]);
    expect(message(&|w| w.tensor("rope_freqs.weight", &[2, 2], 0, vec![0; 16])), &["rope_freqs"]);
    expect(message(&|w| w.string("llama.rope.scaling.type", "longrope")), &["longrope", "yarn"]);
    let other = GgufWriter::default().finish();
    expect(load_bytes(&other).expect_err("empty").to_string(), &["unnamed", "llama, qwen2, qwen3"]);
    let mut mixtral = GgufWriter::default();
    mixtral.string("general.architecture", "gemma3");
    expect(load_bytes(&mixtral.finish()).expect_err("gemma").to_string(), &["gemma3", "supported"]);
    let cut = small_model().finish();
    let text = load_bytes(&cut[..cut.len() - 40]).expect_err("cut off").to_string();
    expect(text, &["m.gguf", "ffn_down", "download the file again"]);
}

#[test]
fn a_tensor_of_another_shape_is_refused() {
    let mut w = small_model();
    w.u32("llama.vocab_size", 999);
    let error = load_bytes(&w.finish()).expect_err("embed has 261 rows");
    let wanted = [999, HIDDEN];
    assert_eq!(error, LoadError::TensorShape { name: "embed".into(), wanted, found: vec![VOCAB, HIDDEN] });
}

/// Every truncation and a great many single changes: an error or a model, never a panic.
#[test]
fn damaged_files_never_panic() {
    let whole = small_model().finish();
    let gguf = Gguf::parse("whole", &whole).expect("parses");
    assert_eq!(gguf.value("llama.block_count"), Some(&Value::Unsigned(1)));
    let header =
        whole.len() - gguf.tensors.values().map(|t| t.range(whole.len()).expect("in the file").len()).sum::<usize>();
    for end in 0..header.min(whole.len()) {
        let _ = Gguf::parse("cut", &whole[..end]);
    }
    // A fixed-seed generator, so that a failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize
    };
    for round in 0..20_000 {
        let mut bytes = whole[..header].to_vec();
        for _ in 0..1 + round % 3 {
            let at = random() % bytes.len();
            bytes[at] = match random() % 4 {
                0 => 0xff,
                1 => 0,
                2 => bytes[at] ^ (1 << (random() % 8)),
                _ => random() as u8,
            };
        }
        if let Ok(gguf) = Gguf::parse("flipped", &bytes) {
            for tensor in gguf.tensors.values() {
                let _ = tensor.range(bytes.len());
            }
            if round % 20 == 0 {
                let _ = ridge_model::tokenizer::Tokenizer::from_gguf(&gguf);
                let _ = load_bytes(&bytes);
            }
        }
    }
}

#[test]
fn hostile_counts_are_refused_without_allocating() {
    let header = |tensors: u64, entries: u64| {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes
    };
    assert!(Gguf::parse("t", &header(u64::MAX, 0)).is_err());
    assert!(Gguf::parse("e", &header(0, u64::MAX)).is_err());
    // One entry: key "k", an array of 2^60 strings.
    let mut bytes = header(0, 1);
    bytes.extend(1u64.to_le_bytes());
    bytes.push(b'k');
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(8u32.to_le_bytes());
    bytes.extend((1u64 << 60).to_le_bytes());
    assert!(Gguf::parse("a", &bytes).is_err());
    // Arrays of arrays of arrays.
    let mut bytes = header(0, 1);
    bytes.extend(1u64.to_le_bytes());
    bytes.push(b'k');
    for _ in 0..1000 {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
    }
    assert!(Gguf::parse("n", &bytes).is_err());
    assert!(
        matches!(Gguf::parse("v", b"GGUF\0\0\0\x03"), Err(LoadError::Unsupported { what, .. }) if what.contains("big-endian"))
    );
}

#[test]
fn real_vocabularies_cut_anywhere() {
    let Some(path) = shared("tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf") else { return };
    let bytes = std::fs::read(path).expect("readable");
    for end in (0..bytes.len()).step_by(9973) {
        let _ = Gguf::parse("cut", &bytes[..end]);
    }
}

#[test]
fn elements_of_arrays_are_limited_because_each_takes_32_bytes() {
    let array = |elements: usize| {
        let mut w = GgufWriter::default();
        // Two arrays: the limit is on all of them together.
        w.array("a", 0, &[vec![0; elements / 2]]);
        let mut bytes = w.finish();
        // The writer counts pieces.
        let at = bytes.len() - elements / 2 - 8;
        bytes[at..at + 8].copy_from_slice(&(elements as u64 / 2).to_le_bytes());
        let again = bytes[24..].to_vec();
        bytes.extend(again);
        bytes[16..24].copy_from_slice(&2u64.to_le_bytes());
        let second = bytes.len() - elements / 2 - 4 - 4 - 8 - 1;
        assert_eq!(bytes[second], b'a');
        bytes[second] = b'b';
        Gguf::parse("f", &bytes)
    };
    assert!(array(1 << 10).is_ok());
    let Err(LoadError::Damaged { message, .. }) = array((1 << 24) + 2) else { panic!("too many elements passed") };
    assert!(message.contains("more than 16777216 elements"), "{message}");
}
