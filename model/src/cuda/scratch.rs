//! Buffers of a pass on the device, each for the largest pass so far; and the numbers that describe a pass.

use crate::memory::PassLimits;
use crate::spec::ModelSpec;
use ridge_kernels::cuda::ops::attention;
use ridge_kernels::cuda::{Buffer, CudaError, Device};
use ridge_kernels::{DType, KvDtype};
use std::sync::Arc;

/// Sections of [`Numbers`] begin at multiples of this many words: kernels read some of them four at a time.
const SECTION_WORDS: usize = 4;

macro_rules! buffers {
    ($($(#[$doc:meta])* $name:ident: $rows:ident * |$sizes:ident| $width:expr;)*) => {
        /// Activations of one pass.
        pub struct Scratch {
            device: Arc<dyn Device>,
            sizes: Sizes,
            limits: PassLimits,
            generation: u64,
            numbers: Buffer,
            parts: Buffer,
            $($(#[$doc])* pub $name: Buffer,)*
        }

        impl Scratch {
            /// Buffers without room for anything.
            pub fn new(device: &Arc<dyn Device>, spec: &ModelSpec, types: Types) -> Result<Self, CudaError> {
                let sizes = Sizes::new(spec, types);
                let limits = PassLimits { tokens: 0, sequences: 0 };
                let empty = || Buffer::new(device, 0);
                Ok(Self {
                    device: device.clone(), sizes, limits, generation: 0, numbers: empty()?, parts: empty()?,
                    $($name: empty()?,)*
                })
            }

            /// Makes room for a pass. Contents are lost if there was none.
            pub fn fit(&mut self, pass: PassLimits) -> Result<(), CudaError> {
                if pass.tokens <= self.limits.tokens && pass.sequences <= self.limits.sequences {
                    return Ok(());
                }
                let limits = PassLimits {
                    tokens: pass.tokens.max(self.limits.tokens),
                    sequences: pass.sequences.max(self.limits.sequences),
                };
                $({
                    let $sizes = &self.sizes;
                    let bytes = limits.$rows * ($width);
                    if bytes > self.$name.bytes() {
                        self.generation += 1;
                        // The old one goes first: there may not be room for both.
                        self.$name = Buffer::new(&self.device, 0)?;
                        self.$name = Buffer::new(&self.device, bytes)?;
                    }
                })*
                self.limits = limits;
                Ok(())
            }
        }

        fn bytes(all: &Sizes, pass: PassLimits) -> usize {
            let mut bytes = 0;
            $({
                let $sizes = all;
                bytes += pass.$rows * ($width);
            })*
            bytes
        }
    };
}

/// What decides the sizes of buffers, besides the model's shape.
#[derive(Clone, Copy, Debug)]
pub struct Types {
    /// Type of activations between products.
    pub compute: DType,
    /// Type of the cache.
    pub kv: KvDtype,
    /// Whether some layer's gate and up are stored in different types.
    pub apart: bool,
    /// Whether some matrix is fp8.
    pub fp8: bool,
}

/// Widths of rows.
struct Sizes {
    hidden: usize,
    q: usize,
    kv: usize,
    ffn: usize,
    /// `ffn` if some layer's gate and up are of different types, else 0.
    apart: usize,
    /// The widest row that an fp8 matrix is multiplied by, if there is one, else 0.
    fp8: usize,
    pairs: usize,
    vocab: usize,
    /// Bytes of an element of the compute type, and of a query's.
    compute: usize,
    query: usize,
}

impl Sizes {
    fn new(spec: &ModelSpec, types: Types) -> Self {
        Self {
            hidden: spec.hidden,
            q: spec.q_width(),
            kv: spec.kv_width(),
            ffn: spec.ffn,
            apart: if types.apart { spec.ffn } else { 0 },
            fp8: if types.fp8 { spec.hidden.max(spec.q_width()).max(spec.ffn) } else { 0 },
            pairs: spec.rope.rotary_dim / 2,
            vocab: spec.vocab,
            compute: bytes_of(types.compute),
            query: bytes_of(attention::query_dtype(types.kv)),
        }
    }
}

buffers! {
    /// `[rows, hidden]` f32: the residual stream.
    x: tokens * |s| s.hidden * 4;
    /// `[rows, hidden]` in the compute type: normed.
    h: tokens * |s| s.hidden * s.compute;
    /// `[rows, q_width]` f32: queries before they are turned.
    raw: tokens * |s| s.q * 4;
    /// `[rows, q_width]` in the type of queries.
    q: tokens * |s| s.q * s.query;
    /// `[rows, kv_width]` f32.
    k: tokens * |s| s.kv * 4;
    /// `[rows, kv_width]` f32.
    v: tokens * |s| s.kv * 4;
    /// `[rows, q_width]` in the compute type.
    attended: tokens * |s| s.q * s.compute;
    /// `[rows, ffn]` f32, where a layer's gate and up are of different types.
    gate: tokens * |s| s.apart * 4;
    /// As `gate`.
    up: tokens * |s| s.apart * 4;
    /// `[rows, ffn]` in the compute type.
    gated: tokens * |s| s.ffn * s.compute;
    /// `[rows, inputs]` e4m3: rows of an operand, rounded for a product with an fp8 matrix.
    codes: tokens * |s| s.fp8;
    /// `[rows]` f32: what each of them is multiplied by.
    code_scales: tokens * |s| if s.fp8 > 0 { 4 } else { 0 };
    /// `[rows, pairs]` f32.
    cos: tokens * |s| s.pairs * 4;
    /// `[rows, pairs]` f32.
    sin: tokens * |s| s.pairs * 4;
    /// As `x`, of the sampled rows.
    few_x: sequences * |s| s.hidden * 4;
    /// As `h`, of the sampled rows.
    few_h: sequences * |s| s.hidden * s.compute;
    /// As `cos`, of the sampled rows.
    few_cos: sequences * |s| s.pairs * 4;
    /// As `sin`, of the sampled rows.
    few_sin: sequences * |s| s.pairs * 4;
    /// `[sampled rows, vocab]` f32.
    logits: sequences * |s| s.vocab * 4;
}

impl Scratch {
    /// Uploads a pass's numbers, and returns where they begin.
    pub fn upload(&mut self, numbers: &Numbers) -> Result<u64, CudaError> {
        let bytes = size_of_val(&*numbers.words);
        if bytes > self.numbers.bytes() {
            self.generation += 1;
            self.numbers = Buffer::new(&self.device, bytes.next_power_of_two())?;
        }
        self.numbers.upload(0, &numbers.words)?;
        Ok(self.numbers.address())
    }
}

impl Scratch {
    /// Makes room for attention's partial results.
    pub fn fit_parts(&mut self, bytes: usize) -> Result<(), CudaError> {
        if bytes > self.parts.bytes() {
            self.generation += 1;
            self.parts = Buffer::new(&self.device, 0)?;
            self.parts = Buffer::new(&self.device, bytes.next_power_of_two())?;
        }
        Ok(())
    }

    /// Counts how often a buffer took another place: as long as it stays, addresses do.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Where they lie.
    pub fn parts(&self) -> u64 {
        self.parts.address()
    }
}

/// Bytes of all buffers for the largest pass.
pub fn scratch_bytes(spec: &ModelSpec, types: Types, pass: PassLimits) -> u64 {
    bytes(&Sizes::new(spec, types), pass) as u64
}

/// Bytes of an element of a plain type.
pub fn bytes_of(dtype: DType) -> usize {
    assert_eq!(dtype.block_len(), 1, "{} is not a type of activations", dtype.name());
    dtype.block_bytes()
}

/// Arrays of numbers that describe a pass, uploaded together.
#[derive(Default)]
pub struct Numbers {
    words: Vec<u32>,
}

impl Numbers {
    /// Adds an array; returns where it will begin, in bytes from the first one's.
    pub fn push(&mut self, array: &[u32]) -> u64 {
        self.words.resize(self.words.len().next_multiple_of(SECTION_WORDS), 0);
        let at = size_of_val(&*self.words);
        self.words.extend(array);
        at as u64
    }
}
