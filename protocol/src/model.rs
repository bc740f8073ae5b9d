//! What must be equal on two nodes before KV may pass between them.

use serde::{Deserialize, Serialize};

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
    /// `f32`, `f16` or `bf16`.
    pub kv_dtype: String,
    /// RoPE parameters in canonical text: base, scaling and rotary dimension.
    pub rope: String,
}

impl ModelIdentity {
    /// Bytes of one page: K and V of one block in one layer.
    pub fn page_bytes(&self) -> usize {
        let element = if self.kv_dtype == "f32" { 4 } else { 2 };
        // Saturating: a peer may claim any size, and whoever reads it compares with a limit.
        [self.kv_heads, self.block_size, self.head_dim]
            .into_iter()
            .fold(2 * element, |bytes: usize, factor| bytes.saturating_mul(factor as usize))
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
            ("rope", self.rope.clone(), other.rope.clone()),
        ];
        fields
            .into_iter()
            .find(|(_, ours, theirs)| ours != theirs)
            .map(|(name, ours, theirs)| format!("{name} differs: {ours} here, {theirs} there"))
    }
}
