//! KV as numbers that depend on everything before them, and an engine that reads and writes it.
//!
//! The KV of a position in a layer is a hash of the tenant's salt, the layer and all tokens up to it, computed from
//! the KV of the position in front, as it stands in the pool. A sampled token hashes the KV of the whole context in all
//! layers. So a page that is missing, stale, damaged, another tenant's or from another place in a sequence changes the
//! answer, as it would in a model.

use super::random::mix;
use ridge_protocol::transfer::PageSource;
use ridge_protocol::{BatchPlan, BlockId, NoToken, RequestId, SamplingParams, TokenId, TokenOut};
use std::collections::BTreeMap;

/// Tokens of the simulated vocabulary. Few, so that stop tokens are met.
pub const VOCAB: u32 = 400;

/// What one layer knows of one position.
pub type Cell = u64;

/// What stands in front of the first position.
fn root(salt: u64, layer: u32) -> Cell {
    mix(mix(salt) ^ u64::from(layer))
}

fn cell(before: Cell, token: TokenId) -> Cell {
    mix(before ^ u64::from(token) << 20)
}

/// What attention sees of a cell; a context is their sum.
fn seen(cell: Cell, layer: u32, position: usize) -> u64 {
    mix(cell ^ u64::from(layer) << 40 ^ (position as u64) << 48)
}

/// Samples after a context that sums up to `context`: a function of (seed, position), and of the history where the
/// parameters ask for it. A grammar ends the answer after one token of eight; the flag says so.
fn sampled(
    context: u64,
    params: &SamplingParams,
    position: usize,
    history: &[TokenId],
    prompt_len: usize,
) -> (TokenId, bool) {
    let mut hash = mix(context ^ mix(params.seed ^ (position as u64) << 32));
    if params.needs_history() {
        hash = history.iter().fold(hash ^ prompt_len as u64, |hash, token| mix(hash ^ u64::from(*token)));
    }
    ((hash % u64::from(VOCAB)) as TokenId, params.grammar.is_some() && hash >> 61 == 0)
}

/// The tokens that a prompt must be answered with, were the context to hold `max_model_len` tokens, and whether the last one
/// ends the answer by itself.
pub fn oracle(
    prompt: &[TokenId],
    params: &SamplingParams,
    salt: u64,
    layers: u32,
    max_model_len: usize,
) -> (Vec<TokenId>, bool) {
    let mut last: Vec<Cell> = (0..layers).map(|layer| root(salt, layer)).collect();
    let mut context = 0u64;
    let mut tokens = prompt.to_vec();
    let mut known = 0;
    while tokens.len() < max_model_len && tokens.len() - prompt.len() < params.max_tokens as usize {
        for (position, token) in tokens.iter().enumerate().skip(known) {
            for (layer, last) in (0..).zip(&mut last) {
                *last = cell(*last, *token);
                context = context.wrapping_add(seen(*last, layer, position));
            }
        }
        known = tokens.len();
        let (token, ends) = sampled(context, params, known, &tokens, prompt.len());
        tokens.push(token);
        if ends || params.is_stop(token) {
            return (tokens.split_off(prompt.len()), true);
        }
    }
    (tokens.split_off(prompt.len()), false)
}

/// One page: a block's slots in one layer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Page {
    pub cells: Vec<Cell>,
    /// It landed and its digest did not match: nobody may read it.
    poisoned: bool,
}

impl Page {
    /// Stands for the digest of a page's bytes, which covers its place too (rule K-2).
    pub fn digest(&self, request: RequestId, layer: u32, index: u32) -> u64 {
        let place = mix(request.0 ^ u64::from(layer) << 40 ^ u64::from(index) << 48);
        self.cells.iter().fold(place ^ self.cells.len() as u64, |hash, cell| mix(hash ^ cell))
    }
}

/// A node's pages by layer and block.
#[derive(Debug)]
pub struct SimKv {
    pages: Vec<Page>,
    blocks: usize,
    block_size: usize,
    layers: u32,
}

impl SimKv {
    pub fn new(layers: u32, blocks: u32, block_size: u32) -> Self {
        let pages = vec![Page::default(); layers as usize * blocks as usize];
        Self { pages, blocks: blocks as usize, block_size: block_size as usize, layers }
    }

    fn at(&self, layer: u32, block: BlockId) -> usize {
        layer as usize * self.blocks + block.0 as usize
    }

    /// Writes what one layer of a pass writes. `salts` says whose each request is.
    pub fn write_layer(&mut self, plan: &BatchPlan, layer: u32, salts: &BTreeMap<RequestId, u64>) {
        for item in &plan.items {
            let start = item.start as usize;
            let mut last = match start.checked_sub(1) {
                None => root(salts[&item.request], layer),
                Some(before) => {
                    let page = self.read(layer, item.block_table[before / self.block_size]);
                    let found = page.cells.get(before % self.block_size).copied();
                    found.unwrap_or_else(|| panic!("{}: KV of position {before} is missing", item.request))
                }
            };
            for (position, token) in (start..).zip(&item.tokens) {
                last = cell(last, *token);
                let at = self.at(layer, item.block_table[position / self.block_size]);
                let slot = position % self.block_size;
                let page = &mut self.pages[at];
                if slot == 0 {
                    page.poisoned = false;
                }
                assert!(!page.poisoned, "{}: a page is continued that did not match its digest", item.request);
                page.cells.truncate(slot);
                assert_eq!(page.cells.len(), slot, "position {position} is written before the one in front of it");
                page.cells.push(last);
            }
        }
    }

    /// Samples for the items of a pass that ask for it, from what the pages of every layer say.
    pub fn sample(&self, plan: &BatchPlan) -> Vec<(RequestId, Result<TokenOut, NoToken>)> {
        let sampling = plan.items.iter().filter_map(|item| item.sample.as_ref().map(|sample| (item, sample)));
        sampling
            .map(|(item, sample)| {
                let length = item.start as usize + item.tokens.len();
                assert_eq!(length, sample.position as usize, "{}: sampled at the wrong place", item.request);
                let mut context = 0u64;
                for layer in 0..self.layers {
                    let mut position = 0;
                    for block in &item.block_table {
                        let wanted = (length - position).min(self.block_size);
                        let cells = &self.read(layer, *block).cells;
                        assert!(cells.len() >= wanted, "{}: KV is missing in layer {layer}", item.request);
                        for cell in &cells[..wanted] {
                            context = context.wrapping_add(seen(*cell, layer, position));
                            position += 1;
                        }
                    }
                }
                let (history, prompt_len) = (&sample.history, sample.prompt_len as usize);
                let (token, ends) = sampled(context, &sample.params, length, history, prompt_len);
                (item.request, Ok(TokenOut { token, logprob: None, top: Vec::new(), ends }))
            })
            .collect()
    }

    /// A page that something reads: it must not be one that did not match its digest.
    pub fn read(&self, layer: u32, block: BlockId) -> &Page {
        let page = &self.pages[self.at(layer, block)];
        assert!(!page.poisoned, "page {layer}/{block:?} is read, and did not match its digest");
        page
    }

    /// The cells of a page of another node's, or of this one's, as they stand in the pages that hold its tokens.
    pub fn page_from(&self, layer: u32, source: &PageSource) -> Page {
        let held = source.blocks.iter().flat_map(|block| &self.read(layer, *block).cells);
        let cells: Vec<Cell> = held.copied().skip(source.skip as usize).take(source.tokens as usize).collect();
        assert_eq!(cells.len(), source.tokens as usize, "a page is shipped before it is computed");
        Page { cells, poisoned: false }
    }

    /// Writes a page that came in, checks it where it lies and says whether it is intact.
    pub fn land(&mut self, layer: u32, block: BlockId, cells: Vec<Cell>, matches: impl Fn(&Page) -> bool) -> bool {
        let at = self.at(layer, block);
        self.pages[at] = Page { cells, poisoned: false };
        let intact = matches(&self.pages[at]);
        self.pages[at].poisoned = !intact;
        intact
    }
}
