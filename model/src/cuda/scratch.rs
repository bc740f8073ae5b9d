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
    ($($(#[$doc:meta])* $name:ident: $rows:ident * $width:expr;)*) => {
        /// Activations of one pass.
        pub struct Scratch {
            device: Arc<dyn Device>,
            sizes: Sizes,
            limits: PassLimits,
            numbers: Buffer,
            parts: Buffer,
            $($(#[$doc])* pub $name: Buffer,)*
        }

        impl Scratch {
            /// Buffers without room for anything.
            pub fn new(device: &Arc<dyn Device>, spec: &ModelSpec, compute: DType, query: DType) -> Result<Self, CudaError> {
                let sizes = Sizes::new(spec, compute, query);
                let limits = PassLimits { tokens: 0, sequences: 0 };
                let empty = || Buffer::new(device, 0);
                Ok(Self { device: device.clone(), sizes, limits, numbers: empty()?, parts: empty()?, $($name: empty()?,)* })
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
                    let bytes = limits.$rows * ($width)(&self.sizes);
                    if bytes > self.$name.bytes() {
                        // The old one goes first: there may not be room for both.
                        self.$name = Buffer::new(&self.device, 0)?;
                        self.$name = Buffer::new(&self.device, bytes)?;
                    }
                })*
                self.limits = limits;
                Ok(())
            }
        }

        fn bytes(sizes: &Sizes, pass: PassLimits) -> usize {
            0 $(+ pass.$rows * ($width)(sizes))*
        }
    };
}

/// Widths of rows.
struct Sizes {
    hidden: usize,
    q: usize,
    kv: usize,
    ffn: usize,
    pairs: usize,
    vocab: usize,
    /// Bytes of an element of the compute type, and of a query's.
    compute: usize,
    query: usize,
}

impl Sizes {
    fn new(spec: &ModelSpec, compute: DType, query: DType) -> Self {
        Self {
            hidden: spec.hidden,
            q: spec.q_width(),
            kv: spec.kv_width(),
            ffn: spec.ffn,
            pairs: spec.rope.rotary_dim / 2,
            vocab: spec.vocab,
            compute: bytes_of(compute),
            query: bytes_of(query),
        }
    }
}

buffers! {
    /// `[rows, hidden]` f32: the residual stream.
    x: tokens * |s: &Sizes| s.hidden * 4;
    /// `[rows, hidden]` in the compute type: normed.
    h: tokens * |s: &Sizes| s.hidden * s.compute;
    /// `[rows, q_width]` or `[rows, ffn]` f32: queries before they are turned, gates before their product.
    raw: tokens * |s: &Sizes| s.q.max(s.ffn) * 4;
    /// `[rows, q_width]` in the type of queries.
    q: tokens * |s: &Sizes| s.q * s.query;
    /// `[rows, kv_width]` f32.
    k: tokens * |s: &Sizes| s.kv * 4;
    /// `[rows, kv_width]` f32.
    v: tokens * |s: &Sizes| s.kv * 4;
    /// `[rows, q_width]` in the compute type.
    attended: tokens * |s: &Sizes| s.q * s.compute;
    /// `[rows, ffn]` f32.
    up: tokens * |s: &Sizes| s.ffn * 4;
    /// `[rows, ffn]` in the compute type.
    gated: tokens * |s: &Sizes| s.ffn * s.compute;
    /// `[rows, pairs]` f32.
    cos: tokens * |s: &Sizes| s.pairs * 4;
    /// `[rows, pairs]` f32.
    sin: tokens * |s: &Sizes| s.pairs * 4;
    /// As `x`, of the sampled rows.
    few_x: sequences * |s: &Sizes| s.hidden * 4;
    /// As `h`, of the sampled rows.
    few_h: sequences * |s: &Sizes| s.hidden * s.compute;
    /// As `cos`, of the sampled rows.
    few_cos: sequences * |s: &Sizes| s.pairs * 4;
    /// As `sin`, of the sampled rows.
    few_sin: sequences * |s: &Sizes| s.pairs * 4;
    /// `[sampled rows, vocab]` f32.
    logits: sequences * |s: &Sizes| s.vocab * 4;
}

impl Scratch {
    /// Uploads a pass's numbers, and returns where they begin.
    pub fn upload(&mut self, numbers: &Numbers) -> Result<u64, CudaError> {
        let bytes = size_of_val(&*numbers.words);
        if bytes > self.numbers.bytes() {
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
            self.parts = Buffer::new(&self.device, 0)?;
            self.parts = Buffer::new(&self.device, bytes.next_power_of_two())?;
        }
        Ok(())
    }

    /// Where they lie.
    pub fn parts(&self) -> u64 {
        self.parts.address()
    }
}

/// Bytes of all buffers for the largest pass.
pub fn scratch_bytes(spec: &ModelSpec, compute: DType, kv: KvDtype, pass: PassLimits) -> u64 {
    bytes(&Sizes::new(spec, compute, attention::query_dtype(kv)), pass) as u64
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
