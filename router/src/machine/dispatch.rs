//! One attempt at a sequence: which nodes work on it, how far the hand-off is, and the table of what their words mean then.

use ridge_protocol::{Conversion, NodeId, RequestId, Step};

/// The present dispatch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Dispatch {
    pub request: RequestId,
    pub prefill: Option<NodeId>,
    /// `None` when the first token is also the last: then nobody decodes.
    pub decode: Option<NodeId>,
    pub phase: Phase,
    /// The decode node was told to move it.
    pub moving: Option<Moving>,
    /// What KV becomes between the two nodes, if their blocks differ.
    pub conversion: Option<Conversion>,
}

/// Where a sequence goes whose decode node drains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Moving {
    /// The dispatch there.
    pub next: RequestId,
    pub to: NodeId,
}

/// Whose turn it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// A prefill node's alone: its token is the first and the last.
    FirstOnly,
    /// A prefill node's (or a draining decode node's, in its place), which hands over to a decode node.
    HandOff,
    /// The decode node's, which has the KV. The prefill node's part is over.
    HandedOver,
    /// A decode node's alone: it computes the prompt itself.
    Alone,
}

/// What can be heard of a dispatch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Word {
    /// A token, from the prefill node.
    PrefillToken,
    /// The hand-off was committed, the prefill node says.
    Shipped,
    /// It failed, the prefill node says.
    Unshipped,
    /// The prefill node cannot go on.
    PrefillFailed,
    /// The prefill node is gone.
    PrefillLost,
    /// A token, from the decode node.
    DecodeToken,
    /// The decode node computed the prompt, which was to come.
    Recomputed,
    /// The decode node cannot go on.
    DecodeFailed,
    /// The decode node is gone.
    DecodeLost,
    /// The decode node drains, and offers what it has to another.
    Moves,
    /// Nothing was heard for too long.
    Silence,
}

/// The transition table. `End` means that the sequence is dispatched anew.
pub(super) fn step(phase: Phase, word: Word) -> Step<Phase> {
    use Word::*;
    match (phase, word) {
        (_, Silence) => Step::End,

        (Phase::FirstOnly, PrefillToken) => Step::Enter(Phase::FirstOnly),
        (Phase::FirstOnly, Unshipped | PrefillFailed | PrefillLost) => Step::End,
        // Nobody decodes.
        (Phase::FirstOnly, _) => Step::Ignore,

        (Phase::HandOff, PrefillToken) => Step::Enter(Phase::HandOff),
        // Either may be first: they come on different connections.
        (Phase::HandOff, Shipped | DecodeToken) => Step::Enter(Phase::HandedOver),
        (Phase::HandOff, Unshipped | Recomputed) => Step::Enter(Phase::Alone),
        (Phase::HandOff, PrefillFailed | PrefillLost) => Step::End,

        (Phase::HandedOver, PrefillToken | Shipped | DecodeToken) => Step::Enter(Phase::HandedOver),
        (Phase::HandedOver, Recomputed) => Step::Enter(Phase::Alone),
        // The decode node has everything it needs.
        (Phase::HandedOver, Unshipped | PrefillFailed | PrefillLost) => Step::Ignore,

        (Phase::Alone, DecodeToken | Recomputed) => Step::Enter(Phase::Alone),
        // Nobody else has a part in this.
        (Phase::Alone, PrefillToken | Shipped | Unshipped | PrefillFailed | PrefillLost) => Step::Ignore,

        (_, DecodeFailed | DecodeLost) => Step::End,
        // As another dispatch.
        (_, Moves) => Step::Enter(Phase::HandOff),
    }
}

impl Dispatch {
    /// Takes a word, and enters the phase that it brings about.
    pub fn hear(&mut self, word: Word) -> Step<Phase> {
        let step = step(self.phase, word);
        if let Step::Enter(next) = step {
            self.phase = next;
        }
        step
    }

    /// Which of two words it is when node `id` says it; `None` if that node has no part in this.
    pub fn word(&self, id: NodeId, of_prefill: Word, of_decode: Word) -> Option<Word> {
        match id {
            id if self.decode == Some(id) => Some(of_decode),
            id if self.prefill == Some(id) => Some(of_prefill),
            _ => None,
        }
    }

    /// Who is to say something next.
    pub fn owing(&self) -> Option<NodeId> {
        match self.phase {
            Phase::FirstOnly | Phase::HandOff => self.prefill,
            Phase::HandedOver | Phase::Alone => self.decode,
        }
    }

    /// Whether its nodes keep KV in different types: what they compute may then differ in a last place, and in a token.
    pub fn rounds(&self) -> bool {
        self.conversion.is_some_and(|conversion| conversion.from.dtype != conversion.to.dtype)
    }

    pub fn check_integrity(&self) {
        let nodes = (self.prefill.is_some(), self.decode.is_some());
        let fits = match self.phase {
            Phase::FirstOnly => nodes == (true, false),
            Phase::HandOff => nodes == (true, true),
            Phase::HandedOver => nodes.1,
            Phase::Alone => nodes == (false, true),
        };
        assert!(fits, "{}: {:?} with {nodes:?}", self.request, self.phase);
    }
}

#[cfg(test)]
#[test]
fn transitions_are_as_recorded() {
    use Word::*;
    let phases = [Phase::FirstOnly, Phase::HandOff, Phase::HandedOver, Phase::Alone];
    let words = [
        PrefillToken,
        Shipped,
        Unshipped,
        PrefillFailed,
        PrefillLost,
        DecodeToken,
        Recomputed,
        DecodeFailed,
        DecodeLost,
        Moves,
        Silence,
    ];
    let table = ridge_protocol::step::table("router", &phases, &words, step);
    ridge_protocol::step::check_table(concat!(env!("CARGO_MANIFEST_DIR"), "/src/machine/transitions.txt"), &table);
}
