//! What must be equal on two nodes before KV may pass between them.

use serde::{Deserialize, Serialize};

/// How keys and values lie in a page (docs/protocol.md, K). A node of another layout would read a page as noise, so the name
/// changes whenever the layout does.
pub const KV_LAYOUT: &str = "k-transposed";

/// The identity of a model as far as its KV cache is concerned.
///
/// Two nodes exchange it before the first byte of KV; [`ModelIdentity::mismatch`] names the first field that
/// differs (protocol rule P-4).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// BLAKE3 over the weights manifest: names, dtypes, shapes and sampled contents of all tensors.
    pub weights: [u8; 32],
    /// BLAKE3 over the canonical model description.
    pub config: [u8; 32],
    /// BLAKE3 over the tokenizer's vocabulary.
    pub tokenizer: [u8; 32],
    /// Transformer layers.
    pub layers: u32,
    /// KV heads per layer.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// `f32`, `f16`, `bf16`, `fp8` or `int8`.
    pub kv_dtype: String,
    /// [`KV_LAYOUT`] of the node's version.
    pub kv_layout: String,
    /// RoPE parameters in canonical text: base, scaling and rotary dimension.
    pub rope: String,
}

impl ModelIdentity {
    /// Bytes of one page: K and V of one block in one layer.
    pub fn page_bytes(&self) -> usize {
        // int8 has an f32 scale per token and head besides.
        let (element, scale) = match self.kv_dtype.as_str() {
            "f32" => (4, 0),
            "fp8" => (1, 0),
            "int8" => (1, 4),
            _ => (2, 0),
        };
        // Saturating: a peer may claim any size, and whoever reads it compares with a limit.
        let vector = (self.head_dim as usize).saturating_mul(element).saturating_add(scale);
        [2, self.kv_heads, self.block_size]
            .into_iter()
            .fold(vector, |bytes: usize, factor| bytes.saturating_mul(factor as usize))
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.page_bytes().saturating_mul(self.layers as usize)
    }

    /// The first field in which two identities differ, with both values, or `None` if KV may pass.
    pub fn mismatch(&self, other: &ModelIdentity) -> Option<String> {
        fn hex(bytes: &[u8; 32]) -> String {
            bytes[..8].iter().map(|b| format!("{b:02x}")).collect()
        }
        let fields = [
            ("weights", hex(&self.weights), hex(&other.weights)),
            ("config", hex(&self.config), hex(&other.config)),
            ("tokenizer", hex(&self.tokenizer), hex(&other.tokenizer)),
            ("layers", self.layers.to_string(), other.layers.to_string()),
            ("kv_heads", self.kv_heads.to_string(), other.kv_heads.to_string()),
            ("head_dim", self.head_dim.to_string(), other.head_dim.to_string()),
            ("block_size", self.block_size.to_string(), other.block_size.to_string()),
            ("kv_dtype", self.kv_dtype.clone(), other.kv_dtype.clone()),
            ("kv_layout", self.kv_layout.clone(), other.kv_layout.clone()),
            ("rope", self.rope.clone(), other.rope.clone()),
        ];
        fields
            .into_iter()
            .find(|(_, ours, theirs)| ours != theirs)
            .map(|(name, ours, theirs)| format!("{name} differs: {ours} here, {theirs} there"))
    }
}
