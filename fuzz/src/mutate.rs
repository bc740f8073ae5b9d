//! Hostile inputs from good ones: a seeded generator that damages what the decoders accept.
//!
//! Bytes alone do not get far into a format with structure, so JSON is changed value by value and text word by word;
//! the rest is changed as bytes, with an eye for numbers that claim lengths.

use crate::random::Random;
use serde_json::{Map, Value, json};

/// What a target's input looks like, and so how it is damaged.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// Bytes with little-endian numbers in them.
    Bytes,
    /// A JSON text.
    Json,
    /// A text of these words, among others.
    Text(&'static [&'static str]),
}

/// Longest input that is made.
const MAX_BYTES: usize = 256 << 10;

/// An endless supply of inputs.
#[derive(Debug)]
pub struct Mutator {
    random: Random,
    seeds: Vec<Vec<u8>>,
    shape: Shape,
    /// Seeds that were not yet tried as they are.
    untouched: usize,
}

impl Mutator {
    /// Inputs like `seeds`, of which there is at least one.
    pub fn new(seed: u64, seeds: Vec<Vec<u8>>, shape: Shape) -> Self {
        assert!(!seeds.is_empty(), "there is something to start from");
        Self { random: Random::new(seed), untouched: seeds.len(), seeds, shape }
    }

    /// The next input: the seeds as they are first, then damaged ones.
    pub fn next_input(&mut self) -> Vec<u8> {
        if self.untouched > 0 {
            self.untouched -= 1;
            return self.seeds[self.untouched].clone();
        }
        let mut input = self.random.of(&self.seeds).clone();
        // Few changes reach deep, many reach far.
        let changes = 1 << self.random.below(4);
        for _ in 0..changes {
            input = self.change(input);
        }
        input.truncate(MAX_BYTES);
        input
    }

    fn change(&mut self, input: Vec<u8>) -> Vec<u8> {
        // Every shape is bytes too.
        let as_bytes = self.random.below(8) == 0;
        match self.shape {
            Shape::Json if !as_bytes => match serde_json::from_slice::<Value>(&input) {
                Ok(mut value) => {
                    self.change_json(&mut value);
                    value.to_string().into_bytes()
                }
                Err(_) => self.change_bytes(input),
            },
            Shape::Text(words) if !as_bytes => self.change_text(input, words),
            _ => self.change_bytes(input),
        }
    }

    fn change_bytes(&mut self, mut input: Vec<u8>) -> Vec<u8> {
        const NUMBERS: [u64; 12] =
            [0, 1, 2, 7, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, i64::MAX as u64, u64::MAX - 7, u64::MAX];
        if input.is_empty() {
            return vec![self.random.word() as u8];
        }
        let at = self.random.below(input.len());
        let some = 1 + self.random.below(32.min(input.len() - at));
        match self.random.below(9) {
            0 => input[at] ^= 1 << self.random.below(8),
            1 => input[at] = self.random.word() as u8,
            2 => {
                let width = (1 << self.random.below(4)).min(input.len() - at);
                let number = self.random.of(&NUMBERS).to_le_bytes();
                input[at..at + width].copy_from_slice(&number[..width]);
            }
            // What a length counts: one more or less than there is.
            3 => input[at] = input[at].wrapping_add(1),
            4 => input[at] = input[at].wrapping_sub(1),
            5 => input.truncate(at),
            6 => drop(input.drain(at..at + some)),
            7 => {
                let again = input[at..at + some].to_vec();
                input.splice(at..at, again);
            }
            _ => {
                let other = self.random.of(&self.seeds).clone();
                let from = self.random.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
        input
    }

    fn change_text(&mut self, input: Vec<u8>, words: &[&str]) -> Vec<u8> {
        let text = String::from_utf8_lossy(&input);
        let chars: Vec<char> = text.chars().collect();
        let at = self.random.below(chars.len() + 1);
        let to = (at + self.random.below(12)).min(chars.len());
        let (before, middle, after): (String, String, String) =
            (chars[..at].iter().collect(), chars[at..to].iter().collect(), chars[to..].iter().collect());
        let word = *self.random.of(words);
        match self.random.below(4) {
            0 => format!("{before}{word}{middle}{after}"),
            1 => format!("{before}{word}{after}"),
            2 => format!("{before}{after}"),
            _ => format!("{before}{middle}{middle}{after}"),
        }
        .into_bytes()
    }

    fn change_json(&mut self, root: &mut Value) {
        let count = nodes(root);
        let other = self.anything();
        let mut at = self.random.below(count);
        let node = nth(root, &mut at).expect("the place is within the tree");
        match (self.random.below(6), node) {
            (0, Value::Object(map)) if !map.is_empty() => drop_one(map, self.random.below(map.len())),
            (0 | 1, Value::Array(items)) if !items.is_empty() => {
                let index = self.random.below(items.len());
                if self.random.below(2) == 0 {
                    items.remove(index);
                } else {
                    items.insert(index, items[index].clone());
                }
            }
            (1, Value::Object(map)) if map.len() > 1 => {
                // A key with another's value.
                let values: Vec<Value> = map.values().cloned().collect();
                let index = self.random.below(map.len());
                if let Some(value) = map.values_mut().nth(index) {
                    *value = self.random.of(&values).clone();
                }
            }
            (2, Value::Number(number)) => {
                let value = number.as_f64().unwrap_or_default();
                *number = match self.random.below(3) {
                    0 => number.as_i64().and_then(|n| n.checked_add(1)).unwrap_or_default().into(),
                    1 => number.as_i64().and_then(|n| n.checked_neg()).unwrap_or_default().into(),
                    _ => serde_json::Number::from_f64(value * 1e9).unwrap_or_else(|| 0.into()),
                };
            }
            (2 | 3, Value::String(text)) => {
                let cut = (0..=text.len()).rev().filter(|at| text.is_char_boundary(*at)).nth(text.len() / 2);
                match self.random.below(3) {
                    0 => text.truncate(cut.unwrap_or(0)),
                    1 => text.push('\u{2581}'),
                    _ => *text = text.repeat(2),
                }
            }
            (4, node) => *node = json!([node.take(), other]),
            (_, node) => *node = other,
        }
    }

    fn anything(&mut self) -> Value {
        match self.random.below(16) {
            0 => Value::Null,
            1 => json!(true),
            2 => json!(0),
            3 => json!(-1),
            4 => json!(1),
            5 => json!(3),
            6 => json!(u64::MAX),
            7 => json!(i64::MIN),
            8 => json!(1u64 << 33),
            9 => json!(0.5),
            10 => json!(1e300),
            11 => json!(""),
            12 => json!("a\u{0}é😀"),
            13 => json!([]),
            14 => json!({}),
            _ => (0..100).fold(json!("deep"), |inner, _| json!([inner])),
        }
    }
}

fn drop_one(map: &mut Map<String, Value>, index: usize) {
    if let Some(key) = map.keys().nth(index).cloned() {
        map.shift_remove(&key);
    }
}

/// Values in the tree, itself included.
fn nodes(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(nodes).sum::<usize>(),
        Value::Object(map) => 1 + map.values().map(nodes).sum::<usize>(),
        _ => 1,
    }
}

/// The value that comes `at`th in reading order; counts `at` down on its way.
fn nth<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, at)),
        Value::Object(map) => map.values_mut().find_map(|item| nth(item, at)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_sequence_of_inputs() {
        let inputs = |seed| {
            let mut mutator = Mutator::new(seed, vec![br#"{"a": [1, "x"]}"#.to_vec()], Shape::Json);
            (0..200).map(|_| mutator.next_input()).collect::<Vec<_>>()
        };
        assert_eq!(inputs(1), inputs(1));
        assert_ne!(inputs(1), inputs(2));
    }

    #[test]
    fn every_value_of_a_tree_can_be_reached() {
        let mut tree = json!({"a": [1, {"b": 2}], "c": 3});
        let count = nodes(&tree);
        assert_eq!(count, 6);
        for place in 0..count {
            let mut at = place;
            *nth(&mut tree.clone(), &mut at).expect("is there") = Value::Null;
        }
        assert_eq!(nth(&mut tree, &mut { count }), None);
    }
}
