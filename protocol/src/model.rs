//! What must be equal on two nodes before KV may pass between them, and what is converted where it is not.
//!
//! The model must be the same. Blocks may differ in shape: read [`CacheDtype::converts_into`] for what is converted.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU32;

/// How keys and values lie in a page (docs/protocol.md, K). A node of another layout would read a page as noise, so the name
/// changes whenever the layout does.
pub const KV_LAYOUT: &str = "k-transposed";

/// Element type of cached keys and values.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheDtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// OCP 8-bit float E4M3.
    Fp8,
    /// 8-bit integers with an f32 scale per token and head.
    Int8,
}

impl CacheDtype {
    /// Every type.
    pub const ALL: [CacheDtype; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Fp8, Self::Int8];

    /// The name on the command line, in messages and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
        }
    }

    /// The type of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes of a head's vector of so many elements, its scale included. Saturates.
    const fn vector_bytes(self, elements: usize) -> usize {
        let (element, scale) = match self {
            Self::F32 => (4, 0),
            Self::F16 | Self::Bf16 => (2, 0),
            Self::Fp8 => (1, 0),
            Self::Int8 => (1, 4),
        };
        elements.saturating_mul(element).saturating_add(scale)
    }

    /// Whether KV of this type is converted into `to` on its way. This is the declaration that rule K-12 speaks of.
    ///
    /// Floats become each other, and 8 bits: the values, rounded as if they had been written in `to` at once. What was
    /// rounded to 8 bits stays so: a node that keeps more bits was asked for their precision, and would not get it.
    pub const fn converts_into(self, to: Self) -> bool {
        match (self, to) {
            (Self::F32 | Self::F16 | Self::Bf16, _) => true,
            (Self::Fp8, Self::Fp8) | (Self::Int8, Self::Int8) => true,
            (Self::Fp8 | Self::Int8, _) => false,
        }
    }
}

impl fmt::Display for CacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a node decides about its blocks of KV, where all else about them follows from the model.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct BlockShape {
    block_size: NonZeroU32,
    /// Element type.
    pub dtype: CacheDtype,
}

impl BlockShape {
    /// Blocks of `block_size` tokens; `None` if that is zero.
    pub fn new(block_size: u32, dtype: CacheDtype) -> Option<Self> {
        Some(Self { block_size: NonZeroU32::new(block_size)?, dtype })
    }

    /// Tokens per block; at least one.
    pub fn block_size(self) -> u32 {
        self.block_size.get()
    }

    /// Bytes of one page: K and V of one block in one layer. Saturates: a peer may claim any size, and whoever reads it
    /// compares with a limit.
    pub fn page_bytes(self, kv_heads: u32, head_dim: u32) -> usize {
        [2, kv_heads, self.block_size()]
            .into_iter()
            .fold(self.dtype.vector_bytes(head_dim as usize), |bytes: usize, factor| {
                bytes.saturating_mul(factor as usize)
            })
    }

    /// Leading blocks of a sequence of `len` tokens that `computed` tokens fill; the last block may stay part-filled when
    /// there are no more.
    pub fn filled_blocks(self, computed: u32, len: u32) -> u32 {
        if computed >= len { len.div_ceil(self.block_size()) } else { computed / self.block_size() }
    }

    /// Why KV of this shape is not converted into blocks of `to`, or `None` if it is (rule K-12).
    pub fn refusal(self, to: BlockShape) -> Option<String> {
        let (from, to) = (self.dtype, to.dtype);
        (!from.converts_into(to))
            .then(|| format!("kv_dtype differs: {to} here, {from} there, and {from} is not converted into {to}"))
    }
}

impl fmt::Display for BlockShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in blocks of {}", self.dtype, self.block_size)
    }
}

/// What became of the blocks of a hand-off on their way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Conversion {
    /// As the sender had them.
    pub from: BlockShape,
    /// As the receiver has them.
    pub to: BlockShape,
}

impl fmt::Display for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.from, self.to)
    }
}

/// The identity of a model as far as its KV cache is concerned.
///
/// Two nodes exchange it before the first byte of KV; [`ModelIdentity::refusal`] names the first field that stands in the
/// way (protocol rule P-4).
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
    /// Element type of the KV cache.
    pub kv_dtype: CacheDtype,
    /// [`KV_LAYOUT`] of the node's version.
    pub kv_layout: String,
    /// RoPE parameters in canonical text: base, scaling and rotary dimension.
    pub rope: String,
}

impl ModelIdentity {
    /// What the node decides about its blocks; `None` if they would hold no token.
    pub fn block_shape(&self) -> Option<BlockShape> {
        BlockShape::new(self.block_size, self.kv_dtype)
    }

    /// Bytes of one page: K and V of one block in one layer; zero if blocks would hold no token.
    pub fn page_bytes(&self) -> usize {
        self.block_shape().map_or(0, |shape| shape.page_bytes(self.kv_heads, self.head_dim))
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.page_bytes().saturating_mul(self.layers as usize)
    }

    /// The first field in which two models differ, with both values, or `None` if they are the same. Block size and type
    /// are a node's, not the model's.
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
            ("kv_layout", self.kv_layout.clone(), other.kv_layout.clone()),
            ("rope", self.rope.clone(), other.rope.clone()),
        ];
        fields
            .into_iter()
            .find(|(_, ours, theirs)| ours != theirs)
            .map(|(name, ours, theirs)| format!("{name} differs: {ours} here, {theirs} there"))
    }

    /// Why this node takes no KV from `sender`: the first field that stands in the way, with both values; `None` if KV may
    /// pass, as it is or converted.
    pub fn refusal(&self, sender: &ModelIdentity) -> Option<String> {
        let shapes = |identity: &Self| identity.block_shape().ok_or("block_size differs: no block holds 0 tokens");
        self.mismatch(sender).or_else(|| match (shapes(sender), shapes(self)) {
            (Ok(from), Ok(to)) => from.refusal(to),
            (Err(reason), _) | (_, Err(reason)) => Some(reason.to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(block_size: u32, dtype: CacheDtype) -> BlockShape {
        BlockShape::new(block_size, dtype).expect("a block holds a token")
    }

    fn identity(block_size: u32, kv_dtype: CacheDtype) -> ModelIdentity {
        ModelIdentity {
            weights: [1; 32],
            config: [2; 32],
            tokenizer: [3; 32],
            layers: 2,
            kv_heads: 2,
            head_dim: 64,
            block_size,
            kv_dtype,
            kv_layout: KV_LAYOUT.into(),
            rope: "10000".into(),
        }
    }

    /// What converts into what, a row per sender: f32, f16, bf16, fp8, int8.
    #[test]
    fn declared_conversions() {
        let row = |from: CacheDtype| CacheDtype::ALL.map(|to| from.converts_into(to));
        assert_eq!(
            CacheDtype::ALL.map(row),
            [
                [true, true, true, true, true],
                [true, true, true, true, true],
                [true, true, true, true, true],
                [false, false, false, true, false],
                [false, false, false, false, true],
            ]
        );
        for dtype in CacheDtype::ALL {
            assert_eq!(CacheDtype::named(dtype.name()), Some(dtype));
        }
        assert_eq!(CacheDtype::named("f8"), None);
    }

    #[test]
    fn blocks_of_any_size_pass_and_precision_is_not_made_up() {
        let ours = identity(16, CacheDtype::Bf16);
        assert_eq!(ours.refusal(&ours), None);
        assert_eq!(ours.refusal(&identity(32, CacheDtype::F32)), None);
        let want = "kv_dtype differs: bf16 here, int8 there, and int8 is not converted into bf16";
        assert_eq!(ours.refusal(&identity(16, CacheDtype::Int8)).as_deref(), Some(want));
        assert_eq!(identity(64, CacheDtype::Int8).refusal(&ours), None);
    }

    #[test]
    fn another_model_is_refused_with_the_field_and_both_values() {
        let ours = identity(16, CacheDtype::F32);
        let check = |change: fn(&mut ModelIdentity), want: &str| {
            let mut theirs = ours.clone();
            change(&mut theirs);
            assert_eq!(ours.refusal(&theirs).as_deref(), Some(want));
            assert_eq!(ours.mismatch(&theirs).as_deref(), Some(want));
        };
        check(|i| i.layers = 3, "layers differs: 2 here, 3 there");
        check(|i| i.kv_heads = 1, "kv_heads differs: 2 here, 1 there");
        check(|i| i.head_dim = 32, "head_dim differs: 64 here, 32 there");
        check(|i| i.rope = "500000".into(), "rope differs: 10000 here, 500000 there");
        check(|i| i.kv_layout = "rows".into(), "kv_layout differs: k-transposed here, rows there");
        check(|i| i.weights[0] = 9, "weights differs: 0101010101010101 here, 0901010101010101 there");
        let empty = ModelIdentity { block_size: 0, ..ours.clone() };
        assert_eq!(ours.refusal(&empty).as_deref(), Some("block_size differs: no block holds 0 tokens"));
    }

    #[test]
    fn pages_are_as_large_as_their_elements_and_scales() {
        let bytes = |dtype| shape(16, dtype).page_bytes(2, 64);
        assert_eq!(CacheDtype::ALL.map(bytes), [16384, 8192, 8192, 4096, 4352]);
        assert_eq!(identity(16, CacheDtype::Int8).block_bytes(), 2 * 4352);
        assert_eq!(shape(u32::MAX, CacheDtype::F32).page_bytes(u32::MAX, u32::MAX), usize::MAX);
    }

    #[test]
    fn a_block_is_filled_by_its_last_token_or_the_sequences() {
        let filled = |block_size, computed, len| shape(block_size, CacheDtype::F32).filled_blocks(computed, len);
        assert_eq!([0, 7, 8, 15, 16].map(|computed| filled(8, computed, 20)), [0, 0, 1, 1, 2]);
        assert_eq!((filled(8, 19, 20), filled(8, 20, 20), filled(8, 16, 16)), (2, 3, 2));
        assert_eq!(filled(u32::MAX, 20, 20), 1);
    }
}
