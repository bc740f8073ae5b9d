//! A Hugging Face folder: config, tokenizer, and weights in one or several safetensors files.
//!
//! The safetensors container is eight bytes of length, a JSON header and raw tensors, so it is written as a stream
//! here; the crate of that name wants all tensors in memory. Read [`write`] first.

use super::presets::{Family, Llama3Rope, Shape};
use super::tensors::{Tensor, tensors};
use super::vocab::Vocabulary;
use anyhow::Context;
use ridge_kernels::DType;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// Files are split at about this size, as `save_pretrained` does.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Writes the folder and returns the bytes of its weights.
pub fn write(shape: &Shape, dtype: DType, seed: u64, folder: &Path) -> anyhow::Result<u64> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let vocab = Vocabulary::new(shape);
    let all = tensors(shape);
    let shards = shards(&all, dtype);
    let name = |i: usize| match shards.len() {
        1 => "model.safetensors".to_owned(),
        n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    };
    // Files side by side: the system copies what is written to one file on one core, which takes longer than making it does on many.
    let threads = (super::cores() / shards.len()).max(1);
    let write = |i: usize| write_shard(&shards[i], dtype, (seed, threads), &folder.join(name(i)));
    let write = &write;
    let written: Vec<anyhow::Result<u64>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..shards.len()).map(|i| scope.spawn(move || write(i))).collect();
        workers.into_iter().map(|worker| worker.join().expect("writing a file does not panic")).collect()
    });
    let mut weight_map = Map::new();
    let mut total = 0;
    for (i, (shard, written)) in shards.iter().zip(written).enumerate() {
        total += written?;
        weight_map.extend(shard.iter().map(|t| (t.hf_name.clone(), json!(name(i)))));
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(folder, "model.safetensors.index.json", &index)?;
    }
    write_json(folder, "config.json", &config(shape, &vocab, dtype))?;
    write_json(folder, "generation_config.json", &generation_config(&vocab))?;
    write_json(folder, "tokenizer.json", &tokenizer(&vocab))?;
    write_json(folder, "tokenizer_config.json", &tokenizer_config(shape, &vocab))?;
    Ok(total)
}

fn write_json(folder: &Path, name: &str, value: &Value) -> anyhow::Result<()> {
    super::create(&folder.join(name), |out| Ok(serde_json::to_writer_pretty(out, value)?))
}

fn tensor_bytes(tensor: &Tensor, dtype: DType) -> u64 {
    (tensor.rows * tensor.cols * dtype.block_bytes()) as u64
}

/// Consecutive tensors of at most [`SHARD_BYTES`] together.
fn shards(all: &[Tensor], dtype: DType) -> Vec<Vec<Tensor>> {
    let mut shards: Vec<Vec<Tensor>> = vec![Vec::new()];
    let mut room = SHARD_BYTES;
    for tensor in all {
        let bytes = tensor_bytes(tensor, dtype);
        if bytes > room {
            shards.push(Vec::new());
            room = SHARD_BYTES;
        }
        room = room.saturating_sub(bytes);
        shards.last_mut().expect("never empty").push(tensor.clone());
    }
    shards
}

fn write_shard(shard: &[Tensor], dtype: DType, seed: (u64, usize), path: &Path) -> anyhow::Result<u64> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in shard {
        let end = offset + tensor_bytes(tensor, dtype);
        let dims = if tensor.vector { vec![tensor.cols] } else { vec![tensor.rows, tensor.cols] };
        let entry = json!({"dtype": dtype.name(), "shape": dims, "data_offsets": [offset, end]});
        header.insert(tensor.hf_name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    // Readers map the file: data begins at a multiple of eight.
    header.resize(header.len().next_multiple_of(8), b' ');
    super::create(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        let mut written = 0;
        for tensor in shard {
            written += super::write_tensor(tensor, dtype, seed, &|row| row, out)?;
        }
        assert_eq!(written, offset, "the header announced every byte");
        Ok(())
    })?;
    Ok(offset)
}

fn config(shape: &Shape, vocab: &Vocabulary, dtype: DType) -> Value {
    let (class, model_type) = match shape.family {
        Family::Llama => ("LlamaForCausalLM", "llama"),
        Family::Mistral => ("MistralForCausalLM", "mistral"),
        Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
    };
    let torch_dtype = match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        _ => "bfloat16",
    };
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": shape.rope.as_ref().map(rope_scaling),
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "torch_dtype": torch_dtype,
        "use_cache": true,
    });
    if matches!(shape.family, Family::Mistral | Family::Qwen2 | Family::Qwen3) {
        config["sliding_window"] = json!(shape.window);
    }
    if matches!(shape.family, Family::Qwen2 | Family::Qwen3) {
        config["use_sliding_window"] = json!(false);
    }
    config
}

fn rope_scaling(rope: &Llama3Rope) -> Value {
    json!({
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": Llama3Rope::LOW_FREQ_FACTOR,
        "high_freq_factor": Llama3Rope::HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": rope.original_context,
    })
}

fn generation_config(vocab: &Vocabulary) -> Value {
    json!({"bos_token_id": vocab.bos, "eos_token_id": vocab.eos, "do_sample": false})
}

fn tokenizer_config(shape: &Shape, vocab: &Vocabulary) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": if vocab.add_bos { json!(vocab.special_text(vocab.bos)) } else { Value::Null },
        "eos_token": vocab.special_text(vocab.eos[0]),
        "pad_token": vocab.special_text(*vocab.eos.last().expect("has an end")),
        "add_bos_token": vocab.add_bos,
        "add_eos_token": false,
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": false,
        "chat_template": vocab.chat_template,
    })
}

fn tokenizer(vocab: &Vocabulary) -> Value {
    let special_ids = vocab.special.iter().zip(vocab.base.len()..);
    let added: Vec<Value> = special_ids
        .map(|(content, id)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let byte_level = |add_prefix_space: bool, use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex,
        })
    };
    let split = json!({
        "type": "Split", "pattern": {"Regex": vocab.split.regex}, "behavior": "Isolated", "invert": false,
    });
    let post_processor = if vocab.add_bos {
        let bos = vocab.special_text(vocab.bos);
        let part = |kind: &str, id: &str, type_id: u32| json!({kind: {"id": id, "type_id": type_id}});
        json!({
            "type": "TemplateProcessing",
            "single": [part("SpecialToken", bos, 0), part("Sequence", "A", 0)],
            "pair": [
                part("SpecialToken", bos, 0), part("Sequence", "A", 0),
                part("SpecialToken", bos, 1), part("Sequence", "B", 1),
            ],
            "special_tokens": {bos: {"id": bos, "ids": [vocab.bos], "tokens": [bos]}},
        })
    } else {
        byte_level(false, false)
    };
    let ids: Map<String, Value> = vocab.base.iter().zip(0..).map(|(t, id): (_, u32)| (t.clone(), json!(id))).collect();
    let merges: Vec<String> = vocab.merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": if vocab.split.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level(false, false)]},
        "post_processor": post_processor,
        "decoder": byte_level(true, true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": vocab.split.ignore_merges, "vocab": ids, "merges": merges,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::presets::Preset;

    #[test]
    fn the_folder_reads_back() {
        let folder = tempfile::tempdir().expect("a temp dir");
        let shape = Preset::TinyQwen3.shape();
        let bytes = write(&shape, DType::BF16, 1, folder.path()).expect("writes");
        let file = std::fs::read(folder.path().join("model.safetensors")).expect("is there");
        let read = ::safetensors::SafeTensors::deserialize(&file).expect("is safetensors");
        assert_eq!(read.len(), tensors(&shape).len());
        let q = read.tensor("model.layers.2.self_attn.q_proj.weight").expect("is there");
        assert_eq!(q.shape(), [512, 256]);
        assert_eq!(q.dtype(), ::safetensors::Dtype::BF16);
        assert_eq!(bytes, tensors(&shape).iter().map(|t| (t.rows * t.cols * 2) as u64).sum::<u64>());
    }

    #[test]
    fn large_models_are_split() {
        let all = tensors(&Preset::Llama31_8b.shape());
        let shards = shards(&all, DType::BF16);
        assert_eq!(shards.len(), 4);
        assert_eq!(shards.iter().map(Vec::len).sum::<usize>(), all.len());
    }
}
