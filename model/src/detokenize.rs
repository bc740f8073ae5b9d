//! Token ids to text as they arrive.
//!
//! A stream of ids gives the same text as [`Tokenizer::decode`] of all of them, in pieces that are whole characters.
//! Read [`StreamDecoder`] first.

use crate::tokenizer::Tokenizer;
use std::sync::Arc;

/// Turns the ids of one sequence into text, one at a time.
#[derive(Debug)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Tokens are bytes: only an unfinished character is kept.
    Bytes(Lossy),
    /// The decoder looks at neighbours: decode a window with and without the new token and emit the difference.
    Window { ids: Vec<u32>, read: usize },
}

/// Most tokens that a window keeps waiting for a character to become whole; no character is longer than 4 bytes.
const WINDOW_WAIT: usize = 8;

impl StreamDecoder {
    /// A decoder for a sequence that starts with the next id.
    pub fn new(tokenizer: &Arc<Tokenizer>, skip_special: bool) -> Self {
        Self::start(tokenizer, skip_special, true)
    }

    /// A decoder for the continuation of `prompt`: a leading space belongs to the text, because it separates the two.
    pub fn after(tokenizer: &Arc<Tokenizer>, skip_special: bool, prompt: &[u32]) -> Self {
        let text_before = prompt.iter().any(|&id| !(skip_special && tokenizer.is_special(id)));
        let mut decoder = Self::start(tokenizer, skip_special, !text_before);
        if let State::Window { ids, read } = &mut decoder.state {
            ids.extend_from_slice(&prompt[prompt.len().saturating_sub(WINDOW_WAIT)..]);
            *read = ids.len();
        }
        decoder
    }

    fn start(tokenizer: &Arc<Tokenizer>, skip_special: bool, at_start: bool) -> Self {
        let state = match tokenizer.pieces() {
            Some((_, strip)) => State::Bytes(Lossy::new(strip && at_start)),
            None => State::Window { ids: Vec::new(), read: 0 },
        };
        Self { tokenizer: tokenizer.clone(), skip_special, state }
    }

    /// Takes the next id; yields the text that is now certain, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return None;
        }
        let mut out = String::new();
        match &mut self.state {
            State::Bytes(lossy) => {
                let (pieces, _) = self.tokenizer.pieces().expect("the state was chosen by its presence");
                lossy.push(pieces.piece(id), &mut out);
            }
            State::Window { ids, read } => {
                ids.push(id);
                let decode = |ids: &[u32]| self.tokenizer.decode_by_library(ids, self.skip_special);
                let (before, now) = (decode(&ids[..*read]), decode(ids));
                let whole = !now.ends_with('\u{FFFD}') || ids.len() - *read >= WINDOW_WAIT;
                if whole && now.len() > before.len() {
                    out.push_str(now.get(before.len()..).unwrap_or_default());
                    ids.drain(..*read);
                    *read = ids.len();
                }
            }
        }
        (!out.is_empty()).then_some(out)
    }

    /// Ends the sequence: an unfinished character becomes U+FFFD.
    pub fn flush(&mut self) -> Option<String> {
        let mut out = String::new();
        match &mut self.state {
            State::Bytes(lossy) => lossy.finish(&mut out),
            State::Window { ids, read } => {
                let before = self.tokenizer.decode_by_library(&ids[..*read], self.skip_special);
                let now = self.tokenizer.decode_by_library(ids, self.skip_special);
                out.push_str(now.get(before.len()..).unwrap_or_default());
                ids.clear();
                *read = 0;
            }
        }
        (!out.is_empty()).then_some(out)
    }
}

/// Bytes to characters, incrementally; what can never become valid is U+FFFD, as in `String::from_utf8_lossy`.
#[derive(Debug)]
pub(crate) struct Lossy {
    pending: Vec<u8>,
    strip_space: bool,
}

impl Lossy {
    pub(crate) fn new(strip_space: bool) -> Self {
        Self { pending: Vec::new(), strip_space }
    }

    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut String) {
        let bytes = match bytes {
            [] => return,
            [b' ', rest @ ..] if self.strip_space => rest,
            all => all,
        };
        self.strip_space = false;
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    out.push_str(std::str::from_utf8(valid).expect("valid up to here"));
                    let Some(bad) = error.error_len() else {
                        rest = tail;
                        break;
                    };
                    out.push('\u{FFFD}');
                    rest = &tail[bad..];
                }
            }
        }
        // At most three bytes of an unfinished character remain.
        let kept = rest.len();
        let from = self.pending.len() - kept;
        self.pending.drain(..from);
    }

    pub(crate) fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push('\u{FFFD}');
            self.pending.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(chunks: &[&[u8]], expected: &[&str]) {
        let mut lossy = Lossy::new(false);
        let mut got: Vec<String> = Vec::new();
        for chunk in chunks {
            let mut out = String::new();
            lossy.push(chunk, &mut out);
            got.push(out);
        }
        let mut out = String::new();
        lossy.finish(&mut out);
        got.push(out);
        assert_eq!(got, expected);
        let all: Vec<u8> = chunks.concat();
        assert_eq!(got.concat(), String::from_utf8_lossy(&all));
    }

    #[test]
    fn characters_are_never_split() {
        check(&[b"ab", b"c"], &["ab", "c", ""]);
        check(&[b"\xe2", b"\x82", b"\xac!"], &["", "", "€!", ""]);
        check(&[b"\xf0\x9f", b"\x98"], &["", "", "\u{FFFD}"]);
        check(&[b"\xe2\x82", b"a"], &["", "\u{FFFD}a", ""]);
        check(&[b"\xff\xe2", b"\xe2\x82\xac"], &["\u{FFFD}", "\u{FFFD}€", ""]);
    }

    #[test]
    fn one_leading_space_goes() {
        let mut lossy = Lossy::new(true);
        let mut out = String::new();
        for piece in [&b""[..], b" ", b" a", b" b"] {
            lossy.push(piece, &mut out);
        }
        assert_eq!(out, " a b");
    }
}
