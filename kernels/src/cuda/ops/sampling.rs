//! From logits to tokens (`sampling.cu`): the token, and the log-probabilities, that the CPU's sampler gives for the same logits.
//!
//! [`Sampler`] holds the requests of one batch of rows on the device, and the memory that choosing takes, which is kept from batch
//! to batch: [`Sampler::prepare`], [`Sampler::run`], [`Sampler::read`]. The order of operations
//! is the CPU's: log-probabilities of the raw logits, penalties and biases, a mask of allowed tokens, then the largest logit
//! or temperature, top-k, top-p, min-p and one draw, which is a function of seed and position.

use super::blocks_of;
use crate::cuda::{Arg, Buffer, CudaError, Device, Kernel, Launch};
use std::sync::Arc;

const SOURCE: &str = "sampling.cu";
/// `CHUNK` of the kernels.
const CHUNK: usize = 128;
/// Threads of a block that has a row to itself.
const THREADS: u32 = 512;
/// Shared memory of such a block: `Shared` of the kernels.
const SHARED_BYTES: u32 = 16 + 4 * (2 * 1024 + THREADS / 32 + 2);
/// Chunks of a block of [`Sampler::peaks`], a warp each.
const WARPS: usize = 8;
const REQUEST_WORDS: usize = 20;
const RESULT_WORDS: usize = 8;
/// Sums of the nucleus stay exact up to this vocabulary.
const VOCAB_MAX: usize = 1 << 19;
/// What a log-probability of minus infinity is reported as (JSON has no infinity); the CPU's sampler has the same.
const LOWEST_LOGPROB: f32 = -9999.0;
const NONE: u32 = u32::MAX;

/// How one row's token is chosen.
#[derive(Clone, Debug)]
pub struct Request {
    /// 0 takes the largest logit.
    pub temperature: f32,
    /// Keep the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Nucleus mass; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens below this share of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// The generator's key.
    pub seed: u64,
    /// The generator's counter: the position of the token to be drawn.
    pub position: u32,
    /// Divides positive and multiplies negative logits of tokens in `seen`.
    pub repetition: f32,
    /// Subtracted from the logits of tokens that were generated.
    pub presence: f32,
    /// Subtracted per time that a token was generated.
    pub frequency: f32,
    /// Tokens of prompt and answer, each once, with how often the answer has it.
    pub seen: Vec<(u32, u32)>,
    /// Added to these tokens' logits, in this order.
    pub biases: Vec<(u32, f32)>,
    /// A bit per token, the lowest of each word first: 0 forbids it.
    pub mask: Option<Vec<u32>>,
    /// How many of the likeliest tokens to report beside the chosen one.
    pub logprobs: Option<u8>,
}

impl Request {
    /// Takes the largest logit.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            position: 0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            seen: Vec::new(),
            biases: Vec::new(),
            mask: None,
            logprobs: None,
        }
    }

    /// The words that the kernels read; lists are appended to what all rows share.
    fn words(&self, vocab: usize, adjustments: &mut Vec<u32>, masks: &mut Vec<u32>) -> [u32; REQUEST_WORDS] {
        let penalties = adjustments.len() / 2;
        adjustments.extend(self.seen.iter().flat_map(|(token, count)| [*token, *count]));
        let biases = adjustments.len() / 2;
        let mut sorted = self.biases.clone();
        // Stable: biases of one token are added in their order, by one thread.
        sorted.sort_by_key(|(token, _)| *token);
        adjustments.extend(sorted.iter().flat_map(|(token, bias)| [*token, bias.to_bits()]));
        let mask = self.mask.as_ref().map_or(NONE, |mask| {
            assert_eq!(mask.len(), vocab.div_ceil(32), "a bit per token");
            masks.extend(mask);
            (masks.len() - mask.len()) as u32
        });
        [
            self.logprobs.map_or(NONE, u32::from),
            u32::from(self.temperature == 0.0),
            // A reciprocal that overflows would make 0 · infinity of the largest logit itself.
            self.temperature.recip().min(f32::MAX).to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.seed as u32,
            (self.seed >> 32) as u32,
            self.position,
            penalties as u32,
            self.seen.len() as u32,
            biases as u32,
            sorted.len() as u32,
            mask,
            self.repetition.to_bits(),
            self.repetition.recip().to_bits(),
            self.presence.to_bits(),
            self.frequency.to_bits(),
            0,
            0,
        ]
    }
}

/// A chosen token.
#[derive(Clone, PartialEq, Debug)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log-probability before penalties and filters, if asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with their log-probabilities, likeliest first, if asked for.
    pub top: Vec<(u32, f32)>,
}

/// Bytes of device memory that sampling takes beside the logits, for `rows` rows of which `reported` ask for log-probabilities
/// (if any does, the raw logits of all are kept).
pub fn scratch_bytes(rows: usize, vocab: usize, reported: bool) -> usize {
    let chunks = vocab.div_ceil(CHUNK);
    rows * (vocab * 8 + chunks * 12 + if reported { vocab * 4 } else { 0 })
}

/// The requests of some rows on the device.
#[derive(Debug)]
pub struct Sampler {
    vocab: usize,
    /// Which rows ask for log-probabilities.
    reported: Vec<bool>,
    /// Most tokens reported by any row.
    top: usize,
    adjusted: bool,
    requests: Buffer,
    adjustments: Buffer,
    masks: Buffer,
    peaks: Buffer,
    keys: Buffer,
    sums: Buffer,
    raw: Buffer,
    results: Buffer,
}

impl Sampler {
    /// A sampler of rows of `vocab` logits, without rows as yet.
    ///
    /// # Panics
    ///
    /// If there is no token, or more than 2^19.
    pub fn new(device: &Arc<dyn Device>, vocab: usize) -> Result<Self, CudaError> {
        assert!((1..=VOCAB_MAX).contains(&vocab), "a vocabulary of {vocab}");
        let empty = || Buffer::new(device, 16);
        Ok(Self {
            vocab,
            reported: Vec::new(),
            top: 0,
            adjusted: false,
            requests: empty()?,
            adjustments: empty()?,
            masks: empty()?,
            peaks: empty()?,
            keys: empty()?,
            sums: empty()?,
            raw: empty()?,
            results: empty()?,
        })
    }

    /// Uploads a request per row. Memory grows to the largest batch and is never given back.
    pub fn prepare(&mut self, requests: &[Request]) -> Result<(), CudaError> {
        let (rows, vocab, chunks) = (requests.len(), self.vocab, self.vocab.div_ceil(CHUNK));
        let (mut adjustments, mut masks) = (Vec::new(), Vec::new());
        let words: Vec<u32> =
            requests.iter().flat_map(|request| request.words(vocab, &mut adjustments, &mut masks)).collect();
        self.adjusted = !adjustments.is_empty();
        self.reported = requests.iter().map(|request| request.logprobs.is_some()).collect();
        self.top = requests.iter().filter_map(|request| request.logprobs).max().map_or(0, usize::from);
        for (buffer, words) in
            [(&mut self.requests, &words), (&mut self.adjustments, &adjustments), (&mut self.masks, &masks)]
        {
            grow(buffer, words.len() * 4)?;
            buffer.upload(0, words)?;
        }
        grow(&mut self.peaks, rows * chunks * 4)?;
        grow(&mut self.keys, rows * vocab * 8)?;
        grow(&mut self.sums, rows * chunks * 8)?;
        grow(&mut self.raw, if self.reported.contains(&true) { rows * vocab * 4 } else { 0 })?;
        let result_bytes = rows * self.result_words() * 4;
        grow(&mut self.results, result_bytes)
    }

    /// Asks for the tokens of `logits`, `[rows, vocab]` f32 for the rows that were prepared, which are left in an unspecified state.
    ///
    /// # Safety
    ///
    /// `logits` leads to that many floats on the sampler's device, which nobody else uses until this is done.
    pub unsafe fn run(&self, logits: u64) -> Result<(), CudaError> {
        if self.reported.is_empty() {
            return Ok(());
        }
        if self.reported.contains(&true) {
            // SAFETY: passed on, here and below; all other memory is the sampler's own, with the shapes that `prepare` gave it.
            unsafe {
                self.find_peaks(logits, false)?;
                self.per_row("sampling_report", logits)?;
            }
        }
        if self.adjusted {
            let args = [
                Arg::U32(self.vocab as u32),
                Arg::Ptr(logits),
                Arg::Ptr(self.requests.address()),
                Arg::Ptr(self.adjustments.address()),
            ];
            let shape = Launch { grid: [self.reported.len() as u32, 1, 1], block: [THREADS, 1, 1], shared_bytes: 0 };
            let kernel = Kernel { source: SOURCE, name: "sampling_adjust" };
            // SAFETY: see above.
            unsafe { self.device().launch(kernel, &shape, &args)? };
        }
        // SAFETY: see above.
        unsafe {
            self.find_peaks(logits, true)?;
            self.per_row("sampling_choose", logits)
        }
    }

    /// Waits for the tokens.
    pub fn read(&self) -> Result<Vec<Sampled>, CudaError> {
        let words = self.results.to_vec::<u32>(self.reported.len() * self.result_words())?;
        let rows = words.chunks_exact(self.result_words()).zip(&self.reported);
        Ok(rows.map(|(words, reported)| result(words, *reported)).collect())
    }

    fn result_words(&self) -> usize {
        RESULT_WORDS + 2 * self.top
    }

    fn device(&self) -> &Arc<dyn Device> {
        self.requests.device()
    }

    unsafe fn find_peaks(&self, logits: u64, masked: bool) -> Result<(), CudaError> {
        let chunks = self.vocab.div_ceil(CHUNK);
        let shape = Launch {
            grid: [blocks_of(chunks, WARPS), self.reported.len() as u32, 1],
            block: [32 * WARPS as u32, 1, 1],
            shared_bytes: 0,
        };
        let args = [
            Arg::U32(self.vocab as u32),
            Arg::Ptr(logits),
            Arg::Ptr(self.requests.address()),
            Arg::Ptr(self.masks.address()),
            Arg::U32(u32::from(masked)),
            Arg::Ptr(self.peaks.address()),
        ];
        // SAFETY: passed on.
        unsafe { self.device().launch(Kernel { source: SOURCE, name: "sampling_peaks" }, &shape, &args) }
    }

    /// Launches one of the two kernels that give a row to a block; they have the same parameters.
    unsafe fn per_row(&self, name: &'static str, logits: u64) -> Result<(), CudaError> {
        let shape =
            Launch { grid: [self.reported.len() as u32, 1, 1], block: [THREADS, 1, 1], shared_bytes: SHARED_BYTES };
        let memory = [&self.requests, &self.peaks, &self.keys, &self.sums, &self.raw];
        let mut args = vec![Arg::U32(self.vocab as u32), Arg::Ptr(logits)];
        args.extend(memory.map(|buffer| Arg::Ptr(buffer.address())));
        args.extend([Arg::U32(self.result_words() as u32), Arg::Ptr(self.results.address())]);
        // SAFETY: passed on.
        unsafe { self.device().launch(Kernel { source: SOURCE, name }, &shape, &args) }
    }
}

/// Makes a buffer at least `bytes` long; what it held is lost if it grows.
fn grow(buffer: &mut Buffer, bytes: usize) -> Result<(), CudaError> {
    if buffer.bytes() < bytes {
        *buffer = Buffer::new(buffer.device(), bytes)?;
    }
    Ok(())
}

/// A row's result, from the words that its block left.
fn result(words: &[u32], reported: bool) -> Sampled {
    let token = words[0];
    if !reported {
        return Sampled { token, logprob: None, top: Vec::new() };
    }
    let (logit, largest) = (f32::from_bits(words[1]), f32::from_bits(words[4]));
    let sum = f64::from_bits(u64::from(words[3]) << 32 | u64::from(words[2]));
    let total = if largest == f32::NEG_INFINITY { f64::NEG_INFINITY } else { f64::from(largest) + sum.ln() };
    let logprob = |logit: f32| match logit == f32::NEG_INFINITY {
        true => LOWEST_LOGPROB,
        false => ((f64::from(logit) - total) as f32).max(LOWEST_LOGPROB),
    };
    let pairs = words[RESULT_WORDS..].chunks_exact(2).take(words[5] as usize);
    let top = pairs.map(|pair| (pair[0], logprob(f32::from_bits(pair[1])))).collect();
    Sampled { token, logprob: Some(logprob(logit)), top }
}
