//! The table of targets, and one module for each kind of outside.

mod folder;
mod grammar;
mod http;
mod model;
mod nodes;
mod peers;
mod router;
mod wire;

use crate::mutate::Shape;
use crate::mutate::Shape::{Bytes, Json, Text};

/// A decoder of bytes from outside, or a machine that hears a peer.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: of libFuzzer's target, and of the folder of its corpus.
    pub name: &'static str,
    /// What the bytes are.
    pub input: &'static str,
    /// Takes any bytes. Panics if there is a defect, and only then.
    pub run: fn(&[u8]),
    /// Good inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// How good inputs are damaged.
    pub shape: Shape,
    /// Inputs in the short test.
    pub cases: u32,
}

macro_rules! target {
    ($name:literal, $input:literal, $run:path, $seeds:path, $shape:expr, $cases:literal) => {
        Target { name: $name, input: $input, run: $run, seeds: $seeds, shape: $shape, cases: $cases }
    };
}

/// Every target.
#[rustfmt::skip]
pub const TARGETS: &[Target] = &[
    target!("wire_node_to_router", "frames that a node sends to the router", wire::node_to_router, wire::node_to_router_seeds, Bytes, 20_000),
    target!("wire_router_to_node", "frames that the router sends to a node", wire::router_to_node, wire::router_to_node_seeds, Bytes, 20_000),
    target!("wire_sender", "frames that a prefill node sends to a decode node", wire::sender, wire::sender_seeds, Bytes, 20_000),
    target!("wire_receiver", "frames that a decode node sends to a prefill node", wire::receiver, wire::receiver_seeds, Bytes, 20_000),
    target!("page_header", "the header of a KV page", wire::page, wire::page_seeds, Bytes, 20_000),
    target!("decode_node", "what the router and prefill nodes say to a decode node", nodes::decode, nodes::seeds, Bytes, 20_000),
    target!("prefill_node", "what the router and decode nodes say to a prefill node", nodes::prefill, nodes::seeds, Bytes, 20_000),
    target!("router", "what nodes say to the router", router::router, nodes::seeds, Bytes, 20_000),
    target!("http_chat", "bodies of /v1/chat/completions", http::chat, http::chat_seeds, Json, 1_000),
    target!("http_completions", "bodies of /v1/completions", http::completions, http::completions_seeds, Json, 1_000),
    target!("http_tokenize", "bodies of /tokenize and /detokenize", http::tokenize, http::tokenize_seeds, Json, 500),
    target!("config", "config.json", model::config, model::config_seeds, Json, 1_000),
    target!("generation_config", "generation_config.json", model::generation_config, model::generation_config_seeds, Json, 200),
    target!("tokenizer", "tokenizer.json", model::tokenizer, model::tokenizer_seeds, Json, 2_000),
    target!("tokenizer_config", "tokenizer_config.json", model::tokenizer_config, model::tokenizer_config_seeds, Json, 200),
    target!("template", "a chat template", model::template, model::template_seeds, Text(&model::TEMPLATE_WORDS), 20_000),
    target!("grammar", "a grammar that constrains an answer, behind a byte for its kind", grammar::grammar, grammar::seeds, Text(&grammar::WORDS), 1_000),
    target!("safetensors", "a safetensors file", model::safetensors, model::safetensors_seeds, Bytes, 1_000),
    target!("safetensors_header", "the JSON header of a safetensors file", model::safetensors_header, model::safetensors_header_seeds, Json, 1_000),
    target!("shard_index", "model.safetensors.index.json", model::shard_index, model::shard_index_seeds, Json, 200),
    target!("gguf", "a GGUF file", model::gguf, model::gguf_seeds, Bytes, 1_000),
    target!("gguf_metadata", "the metadata of a GGUF file, as JSON", model::gguf_metadata, model::gguf_metadata_seeds, Json, 1_000),
    target!("llama2c", "a llama2.c model file", model::llama2c, model::llama2c_seeds, Bytes, 500),
    target!("llama2c_tokenizer", "a llama2.c tokenizer file", model::llama2c_tokenizer, model::llama2c_tokenizer_seeds, Bytes, 500),
    target!("packed", "a file of packed weights", model::packed, model::packed_seeds, Bytes, 200),
];

/// The target called `name`.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// What libFuzzer's targets call.
pub fn run(name: &str, bytes: &[u8]) {
    let target = find(name).unwrap_or_else(|| panic!("there is no target called {name}"));
    (target.run)(bytes);
}
