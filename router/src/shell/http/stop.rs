//! Finding stop strings in text that arrives piece by piece.
//!
//! Each stop string is a Knuth-Morris-Pratt automaton fed byte by byte: its state is the length of its longest
//! prefix with which the text ends. Text is held back exactly while some automaton is in a state above 0, so nothing
//! that may still become part of a stop string goes out, and nothing else waits. The string that is complete first
//! wins; of two that end at the same byte the longer one. Both rules look at one byte at a time, which is why the
//! result cannot depend on where tokens begin and end.

/// Watches one answer for its stop strings.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    automata: Vec<Automaton>,
    held: String,
    matched: Option<usize>,
}

#[derive(Clone, Debug)]
struct Automaton {
    pattern: Vec<u8>,
    /// `fallback[k]`: length of the longest proper prefix of the pattern that ends its first `k` bytes.
    fallback: Vec<usize>,
    state: usize,
}

impl StopMatcher {
    /// Watches for any of `stops`, none of which is empty.
    pub fn new(stops: &[String]) -> Self {
        Self { automata: stops.iter().map(|stop| Automaton::new(stop)).collect(), held: String::new(), matched: None }
    }

    /// Which stop string was found, by its index.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Takes the next piece of text; returns what can be shown for certain. After a match there is nothing more.
    pub fn push(&mut self, text: &str) -> String {
        if self.matched.is_some() {
            return String::new();
        }
        if self.automata.is_empty() {
            return text.to_owned();
        }
        for (at, byte) in text.bytes().enumerate() {
            let complete = self
                .automata
                .iter_mut()
                .enumerate()
                .filter_map(|(index, automaton)| automaton.step(byte).then_some((automaton.pattern.len(), index)));
            // `max_by_key` on the reversed index: the longest, and of equal ones the first.
            if let Some((length, index)) = complete.max_by_key(|(length, index)| (*length, usize::MAX - index)) {
                self.matched = Some(index);
                let end = self.held.len() + at + 1;
                let mut shown = std::mem::take(&mut self.held);
                // The pattern starts on a character boundary of the text, as both are UTF-8 and agree byte for byte.
                shown.push_str(&text[..at + 1]);
                shown.truncate(end - length);
                return shown;
            }
        }
        self.held.push_str(text);
        let pending = self.automata.iter().map(|automaton| automaton.state).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - pending);
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back, when the answer ended without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

impl Automaton {
    fn new(pattern: &str) -> Self {
        assert!(!pattern.is_empty(), "an empty stop string would match everywhere");
        let pattern = pattern.as_bytes().to_vec();
        let mut fallback = vec![0; pattern.len() + 1];
        let mut length = 0;
        for at in 1..pattern.len() {
            while length > 0 && pattern[at] != pattern[length] {
                length = fallback[length];
            }
            length += usize::from(pattern[at] == pattern[length]);
            fallback[at + 1] = length;
        }
        Self { pattern, fallback, state: 0 }
    }

    /// Whether the pattern ends with this byte.
    fn step(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.pattern[self.state] != byte {
            self.state = self.fallback[self.state];
        }
        self.state += usize::from(self.pattern[self.state] == byte);
        self.state == self.pattern.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The oracle: the match that ends first, and of those the one that starts first, on the whole text at once.
    fn cut<'a>(text: &'a str, stops: &[String]) -> &'a str {
        let first = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at))).min();
        first.map_or(text, |(_, start)| &text[..start])
    }

    fn stream(pieces: &[String], stops: &[String]) -> Vec<String> {
        let mut matcher = StopMatcher::new(stops);
        let mut shown: Vec<String> = pieces.iter().map(|piece| matcher.push(piece)).collect();
        shown.push(matcher.finish());
        shown
    }

    #[track_caller]
    fn check(pieces: &[&str], stops: &[&str], expected: &[&str]) {
        let pieces: Vec<String> = pieces.iter().map(|s| s.to_string()).collect();
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        assert_eq!(stream(&pieces, &stops), expected);
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        check(&["Hello", " wor", "ld"], &[], &["Hello", " wor", "ld", ""]);
        check(&["one\n", "two"], &["\n\n"], &["one", "\ntwo", ""]);
        check(&["one\n", "\ntwo"], &["\n\n"], &["one", "", ""]);
        check(&["aaab", "c"], &["aabc"], &["a", "", ""]);
        check(&["aaa", "a", "b"], &["aab"], &["a", "a", "", ""]);
        check(&["EN", "D of"], &["END"], &["", "", ""]);
        check(&["EN", "TER"], &["END"], &["", "ENTER", ""]);
        check(&["EN"], &["END"], &["", "EN"]);
        check(&["naïv", "e ï"], &["ve", "é"], &["naï", "", ""]);
    }

    #[test]
    fn the_string_that_ends_first_wins() {
        check(&["xabcd"], &["abcd", "bc"], &["xa", ""]);
        check(&["x", "a", "b", "c", "d"], &["abcd", "bc"], &["x", "", "", "a", "", ""]);
        check(&["xabc"], &["bc", "abc"], &["x", ""]);
    }

    proptest! {
        #[test]
        fn streaming_equals_the_cut_of_the_whole(
            pieces in proptest::collection::vec("[abé]{0,4}", 0..12),
            stops in proptest::collection::vec("[abé]{1,5}", 0..4),
        ) {
            let whole = pieces.concat();
            let shown = stream(&pieces, &stops);
            prop_assert_eq!(shown.concat(), cut(&whole, &stops));
            // Nothing is shown that a later piece could turn into part of a stop string.
            let mut out = String::new();
            let mut seen = String::new();
            for (piece, text) in pieces.iter().zip(&shown) {
                seen.push_str(piece);
                out.push_str(text);
                prop_assert!(stops.iter().all(|stop| !out.contains(stop.as_str())));
                let held = if cut(&seen, &stops) == seen { &seen[out.len()..] } else { "" };
                let longest = stops.iter().flat_map(|stop| {
                    stop.char_indices().map(|(at, _)| &stop[..at]).filter(|prefix| seen.ends_with(prefix))
                }).map(str::len).max().unwrap_or(0);
                if cut(&seen, &stops) == seen {
                    prop_assert_eq!(held.len(), longest);
                }
            }
        }
    }
}
