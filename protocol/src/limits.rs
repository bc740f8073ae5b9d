//! Hard limits of the wire. A peer that goes beyond one is disconnected with an error that names it.

/// Version of everything in this crate that crosses a wire. Part of the ALPN and of every frame.
pub const PROTOCOL_VERSION: u16 = 5;
/// ALPN of a node's control connection to the router.
pub const ALPN_CONTROL: &[u8] = b"ridge-control/5";
/// ALPN of a KV connection: of a prefill node, or a decode node that drains, to a decode node.
pub const ALPN_KV: &[u8] = b"ridge-kv/5";

/// Longest body of a control message that carries no prompt, in bytes.
pub const MAX_CONTROL_BYTES: usize = 64 << 10;
/// Longest body of a message that carries a prompt or the hashes of one, in bytes.
pub const MAX_PROMPT_BYTES: usize = 8 << 20;
/// Longest prompt plus answer that any node accepts, in tokens.
pub const MAX_TOKENS: usize = 1 << 20;
/// Largest page (one block of one layer, K and V) on the wire, in bytes.
pub const MAX_PAGE_BYTES: usize = 16 << 20;
/// Most entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most `top_logprobs`.
pub const MAX_TOP_LOGPROBS: usize = 20;
/// Most `stop` strings (OpenAI allows 4; vLLM users send more).
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest `stop` string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;
/// Most stop token ids.
pub const MAX_STOP_TOKENS: usize = 64;
/// Longest grammar that constrains an answer, in bytes: a JSON schema, a regular expression or rules.
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;
