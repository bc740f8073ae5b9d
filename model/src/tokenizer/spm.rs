//! SentencePiece's BPE as GGUF stores it: tokens with scores, no merge list.
//!
//! In plain words: cut the text into characters; while two neighbours joined are a token, join the pair with the
//! best score (of equal scores the leftmost); spell every piece that is not a token in bytes. A merge list cannot say
//! the same in all cases, because here any pair whose join is a token may merge, at that token's score.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

/// SentencePiece's visible space.
pub(crate) const SPACE: char = '\u{2581}';

/// Vocabulary and scores.
#[derive(Debug)]
pub(crate) struct Spm {
    ids: HashMap<Box<str>, u32>,
    scores: Vec<f32>,
    /// Id that spells each byte.
    bytes: Vec<u32>,
    /// Prepend a space to text at the start and after a special token.
    pub(crate) add_space_prefix: bool,
}

/// A run of the text; a merged-away one has length 0.
#[derive(Clone, Copy)]
struct Symbol {
    previous: Option<usize>,
    next: Option<usize>,
    start: usize,
    len: usize,
}

/// A candidate join, valid while both sides are as long as when it was found.
struct Bigram {
    left: usize,
    right: usize,
    score: f32,
    len: usize,
}

impl Spm {
    /// `tokens` in the order of ids. `None` unless every byte can be spelled, by `<0x..>` or as a token, or there is
    /// an unknown token to stand for it.
    pub(crate) fn new(
        tokens: &[String],
        scores: Vec<f32>,
        unknown: Option<u32>,
        add_space_prefix: bool,
    ) -> Option<Self> {
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            ids.entry(token.as_str().into()).or_insert(id as u32);
        }
        let spell = |byte: u8| {
            let raw = char::from(byte).to_string();
            ids.get(format!("<0x{byte:02X}>").as_str())
                .or_else(|| ids.get(raw.as_str()).filter(|_| byte < 0x80))
                .copied()
                .or(unknown)
        };
        let bytes = (0..=255).map(spell).collect::<Option<Vec<u32>>>()?;
        (scores.len() == tokens.len()).then_some(Self { ids, scores, bytes, add_space_prefix })
    }

    /// Appends the ids of a stretch of text without special tokens.
    pub(crate) fn encode(&self, text: &str, after_special: bool, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let mut escaped = String::with_capacity(text.len() + text.len() / 4 + 3);
        if self.add_space_prefix && after_special {
            escaped.push(SPACE);
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        self.encode_escaped(&escaped, out);
    }

    fn encode_escaped(&self, text: &str, out: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol { previous: i.checked_sub(1), next: Some(i + 1), start, len: c.len_utf8() })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.consider(text, &symbols, Some(right - 1), Some(right), &mut queue);
        }
        while let Some(bigram) = queue.pop() {
            let (left, right) = (symbols[bigram.left], symbols[bigram.right]);
            // One side was merged in the meantime: this join no longer exists.
            if left.len == 0 || right.len == 0 || left.len + right.len != bigram.len {
                continue;
            }
            symbols[bigram.left].len = bigram.len;
            symbols[bigram.left].next = right.next;
            symbols[bigram.right].len = 0;
            if let Some(next) = right.next {
                symbols[next].previous = Some(bigram.left);
            }
            self.consider(text, &symbols, left.previous, Some(bigram.left), &mut queue);
            self.consider(text, &symbols, Some(bigram.left), right.next, &mut queue);
        }
        for symbol in symbols.iter().filter(|s| s.len > 0) {
            let piece = &text[symbol.start..symbol.start + symbol.len];
            match self.ids.get(piece) {
                Some(&id) => out.push(id),
                None => out.extend(piece.bytes().map(|b| self.bytes[b as usize])),
            }
        }
    }

    fn consider(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
        queue: &mut BinaryHeap<Bigram>,
    ) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let len = symbols[left].len + symbols[right].len;
        let start = symbols[left].start;
        if let Some(&id) = self.ids.get(&text[start..start + len]) {
            queue.push(Bigram { left, right, score: self.scores[id as usize], len });
        }
    }
}

impl Ord for Bigram {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Bigram {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Bigram {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Bigram {}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[u32]) {
        let tokens: Vec<String> =
            ["<unk>", "a", "b", "c", "ab", "bc", "abc", "\u{2581}", "\u{2581}a"].map(String::from).to_vec();
        let scores = vec![0.0, -9.0, -9.0, -9.0, -3.0, -2.0, -1.0, -9.0, -5.0];
        let spm = Spm::new(&tokens, scores, Some(0), false).expect("bytes fall back to <unk>");
        let mut out = Vec::new();
        spm.encode(text, true, &mut out);
        assert_eq!(out, expected, "{text}");
    }

    #[test]
    fn merges_by_score() {
        check("", &[]);
        check("ab", &[4]);
        // bc (-2) before ab (-3), then a+bc.
        check("abc", &[6]);
        check("bcb", &[5, 2]);
        check(" ab", &[7, 4]);
        check(" a", &[8]);
        // Unknown: one <unk> per byte.
        check("aé", &[1, 0, 0]);
    }
}
