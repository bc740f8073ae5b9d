//! KV as the tokens it stands for, and an engine that reads and writes it.

use super::client::next_token;
use ridge_protocol::{BatchPlan, BlockId, RequestId, TokenId, TokenOut};
use std::collections::BTreeMap;

/// One page: the tokens of a block's slots, as one layer knows them.
pub type Page = Vec<TokenId>;

/// A node's pages by layer and block.
#[derive(Debug, Default)]
pub struct SimKv {
    pages: BTreeMap<(u32, BlockId), Page>,
    block_size: usize,
}

impl SimKv {
    pub fn new(block_size: u32) -> Self {
        Self { pages: BTreeMap::new(), block_size: block_size as usize }
    }

    /// Writes what one layer of a pass writes.
    pub fn write_layer(&mut self, plan: &BatchPlan, layer: u32) {
        for item in &plan.items {
            for (offset, token) in item.tokens.iter().enumerate() {
                let position = item.start as usize + offset;
                let block = item.block_table[position / self.block_size];
                let page = self.pages.entry((layer, block)).or_default();
                let slot = position % self.block_size;
                page.truncate(slot);
                assert_eq!(page.len(), slot, "position {position} is written before the one in front of it");
                page.push(*token);
            }
        }
    }

    /// Samples for the items of a pass that ask for it, from what the pages of every layer say.
    pub fn sample(&self, plan: &BatchPlan, layers: u32) -> Vec<(RequestId, TokenOut)> {
        let sampling = plan.items.iter().filter(|item| item.sample.is_some());
        sampling
            .map(|item| {
                let length = item.start as usize + item.tokens.len();
                let mut seen: Option<Vec<TokenId>> = None;
                for layer in 0..layers {
                    let tokens: Vec<TokenId> =
                        item.block_table.iter().flat_map(|b| self.pages[&(layer, *b)].clone()).take(length).collect();
                    assert_eq!(tokens.len(), length, "{}: KV is missing in layer {layer}", item.request);
                    assert!(seen.is_none_or(|s| s == tokens), "{}: layers disagree", item.request);
                    seen = Some(tokens);
                }
                let token = next_token(&seen.expect("a model has layers"));
                (item.request, TokenOut { token, logprob: None, top: Vec::new() })
            })
            .collect()
    }

    pub fn read(&self, layer: u32, block: BlockId) -> Page {
        self.pages[&(layer, block)].clone()
    }

    pub fn land(&mut self, layer: u32, block: BlockId, page: Page) {
        self.pages.insert((layer, block), page);
    }
}
