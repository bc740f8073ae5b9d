//! One sequence as the router follows it: what the client has seen, and who works on it.

use super::dispatch::Dispatch;
use super::types::{ClientId, Submit, Usage};
use ridge_protocol::wire::{FinishReason, Receipt};
use ridge_protocol::{Instant, NodeId, SamplingParams, TokenId, TokenOut};
use std::collections::BTreeMap;

#[derive(Debug)]
pub(super) struct Sequence {
    pub client: ClientId,
    /// Prompt, then every token the client has been given.
    pub tokens: Vec<TokenId>,
    pub prompt_len: u32,
    pub params: SamplingParams,
    pub salt: u64,
    pub whole_path: bool,
    pub dispatch: Option<Dispatch>,
    pub attempts: u32,
    /// Nodes that failed it.
    pub avoid: Vec<NodeId>,
    /// Until then it goes to none of `avoid`: a node had no room for it.
    pub pause: Option<Instant>,
    /// When to give up waiting: for a node, or for a sign of life.
    pub deadline: Instant,
    /// Tokens that arrived before their turn: the prefill and the decode node speak over different connections.
    early: BTreeMap<u32, Early>,
    /// It was dispatched again after the client had been given tokens.
    failed_over: bool,
    pub usage: Usage,
}

/// A token that arrived, who said it, and whether it is the last.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Early {
    pub out: TokenOut,
    pub by: NodeId,
    pub finish: Option<FinishReason>,
}

/// What became of a token that arrived.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Arrival {
    /// These are next in the client's stream; the last may end it.
    InOrder(Vec<(u32, Early)>),
    /// Its turn has not come, or it was seen before.
    Nothing,
    /// It was seen before, but not that it is the last one.
    Ends(FinishReason),
    /// It contradicts what the client was given.
    Diverged {
        /// Position within the answer.
        index: u32,
        /// The client has this one.
        had: TokenId,
    },
}

impl Sequence {
    pub fn new(submit: Submit, deadline: Instant) -> Self {
        let prompt_len = submit.tokens.len() as u32;
        Self {
            client: submit.client,
            tokens: submit.tokens,
            prompt_len,
            params: submit.params,
            salt: submit.salt,
            whole_path: submit.whole_path,
            dispatch: None,
            attempts: 0,
            avoid: Vec::new(),
            pause: None,
            deadline,
            early: BTreeMap::new(),
            failed_over: false,
            usage: Usage { prompt_tokens: prompt_len, ..Usage::default() },
        }
    }

    /// Index of the next token the client waits for.
    pub fn next_index(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt_len
    }

    /// When it wants to be looked at: no later than its deadline.
    pub fn due(&self) -> Instant {
        self.pause.unwrap_or(self.deadline)
    }

    /// Takes a token of the present dispatch.
    pub fn arrive(&mut self, by: NodeId, index: u32, out: TokenOut, finish: Option<FinishReason>) -> Arrival {
        let next = self.next_index();
        if index < next {
            let had = self.tokens[(self.prompt_len + index) as usize];
            return match finish {
                _ if had != out.token => Arrival::Diverged { index, had },
                Some(reason) if index + 1 == next => Arrival::Ends(reason),
                _ => Arrival::Nothing,
            };
        }
        // At most one token is early in practice; a peer that sends far ahead is cut off by the answer's length.
        if index >= self.params.max_tokens {
            return Arrival::Nothing;
        }
        let early = self.early.entry(index).or_insert(Early { out: out.clone(), by, finish });
        if early.out.token != out.token {
            return Arrival::Diverged { index, had: early.out.token };
        }
        if early.finish.is_none() && finish.is_some() {
            (early.by, early.finish) = (by, finish);
        }
        let mut ready = Vec::new();
        while let Some(early) = self.early.remove(&self.next_index()) {
            let (index, last) = (self.next_index(), early.finish.is_some());
            self.tokens.push(early.out.token);
            ready.push((index, early));
            if last {
                break;
            }
        }
        if ready.is_empty() { Arrival::Nothing } else { Arrival::InOrder(ready) }
    }

    /// Forgets tokens of a dispatch that is over. What nodes say of the prompt's KV from now on is not about the client's.
    pub fn drop_early(&mut self) {
        self.early.clear();
        self.failed_over |= self.next_index() > 0;
    }

    /// Takes a node's account of where the prompt's KV came from.
    pub fn on_receipt(&mut self, from_decode: bool, receipt: Receipt) {
        let so_far = self.usage.receipt;
        if self.failed_over {
            // What a node finds in its cache now may be its own earlier work: no saving of the client's. What it
            // computes, the client waits for a second time.
            self.usage.receipt = Receipt {
                recomputed: so_far.recomputed.saturating_add(receipt.computed).saturating_add(receipt.recomputed),
                transferred: so_far.transferred.saturating_add(receipt.transferred),
                transfer_bytes: so_far.transfer_bytes.saturating_add(receipt.transfer_bytes),
                converted: receipt.converted.or(so_far.converted),
                ..so_far
            };
            return;
        }
        if from_decode {
            self.usage.receipt = Receipt { times: so_far.times, ..receipt };
            if receipt.transferred == 0 {
                self.usage.cached_tokens = self.usage.cached_tokens.max(receipt.cached);
            }
        } else {
            self.usage.cached_tokens = receipt.cached;
        }
        self.usage.cached_tokens = self.usage.cached_tokens.min(self.prompt_len);
    }
}
