//! A vocabulary of any size that tokenises real text: byte-level BPE over every short lower-case string.
//!
//! Tokens are the 256 bytes, then merges that extend a word by one letter in order of length and English letter
//! frequency, then the family's special tokens at their real ids, then padding. No text was used to make it.
//! Read [`Vocabulary`].

use super::presets::{Family, Shape};

/// A complete byte-level BPE vocabulary.
#[derive(Clone, PartialEq, Debug)]
pub struct Vocabulary {
    /// Bytes and merged tokens, in GPT-2's visible spelling; the index is the id.
    pub base: Vec<String>,
    /// Left and right part of each token after the bytes.
    pub merges: Vec<(String, String)>,
    /// Special tokens; the first has the id after the base's last.
    pub special: Vec<String>,
    /// Rows of the embedding that no token uses.
    pub padding: usize,
    /// Id that begins a sequence.
    pub bos: u32,
    /// Whether the tokenizer puts `bos` before every text.
    pub add_bos: bool,
    /// Ids that end an answer, the turn's end first.
    pub eos: Vec<u32>,
    /// Jinja source of the chat template.
    pub chat_template: &'static str,
    /// The splitting of text into words.
    pub split: Split,
}

/// How text is split before merging.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Split {
    /// The regular expression, as `tokenizer.json` holds it.
    pub regex: &'static str,
    /// `tokenizer.ggml.pre` of the same splitting.
    pub ggml: &'static str,
    /// A word that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// Text is brought to normal form C first.
    pub nfc: bool,
}

const LLAMA_SPLIT: Split = Split {
    regex: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ggml: "llama-bpe",
    ignore_merges: true,
    nfc: false,
};
const QWEN_SPLIT: Split = Split {
    regex: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ggml: "qwen2",
    ignore_merges: false,
    nfc: true,
};

const LLAMA_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + \
    '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";
const QWEN_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
    '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
const MISTRAL_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}\
    {{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}\
    {% endfor %}";

impl Vocabulary {
    /// The vocabulary of a shape: as many tokens as its embedding has rows, padding included.
    pub fn new(shape: &Shape) -> Self {
        let (special, padding) = special_tokens(shape.family, shape.vocab);
        let base_len = shape.vocab - special.len() - padding;
        let (base, merges) = base(base_len);
        let id = |name: &str| {
            let at = special.iter().position(|s| s == name).expect("the family has this token");
            (base_len + at) as u32
        };
        let (bos, eos, template, split) = match shape.family {
            Family::Llama => {
                let eos = vec![id("<|eot_id|>"), id("<|end_of_text|>")];
                (id("<|begin_of_text|>"), eos, LLAMA_TEMPLATE, LLAMA_SPLIT)
            }
            Family::Mistral => (id("<s>"), vec![id("</s>")], MISTRAL_TEMPLATE, LLAMA_SPLIT),
            Family::Qwen2 | Family::Qwen3 => {
                let eos = vec![id("<|im_end|>"), id("<|endoftext|>")];
                (id("<|endoftext|>"), eos, QWEN_TEMPLATE, QWEN_SPLIT)
            }
        };
        let add_bos = matches!(shape.family, Family::Llama | Family::Mistral);
        Self { base, merges, special, padding, bos, add_bos, eos, chat_template: template, split }
    }

    /// Tokens and padding.
    pub fn len(&self) -> usize {
        self.base.len() + self.special.len() + self.padding
    }

    /// The text of a special token.
    pub fn special_text(&self, id: u32) -> &str {
        &self.special[id as usize - self.base.len()]
    }
}

/// Special tokens and padding rows. The real vocabularies keep their real ids.
fn special_tokens(family: Family, vocab: usize) -> (Vec<String>, usize) {
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    match family {
        Family::Llama => {
            let mut special = names(&[
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|reserved_special_token_0|>",
                "<|reserved_special_token_1|>",
                "<|finetune_right_pad_id|>",
                "<|reserved_special_token_2|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eom_id|>",
                "<|eot_id|>",
                "<|python_tag|>",
            ]);
            let count = if vocab >= 128_256 { 256 } else { 16 };
            special.extend((special.len()..count).map(|i| format!("<|reserved_special_token_{}|>", i - 8)));
            (special, 0)
        }
        Family::Mistral => (names(&["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]), 0),
        Family::Qwen2 | Family::Qwen3 => {
            let special = names(&["<|endoftext|>", "<|im_start|>", "<|im_end|>"]);
            // 151 643 base tokens and these three; the embedding is padded to 151 936 rows.
            let padding = if vocab >= 151_936 { 290 } else { 5 };
            (special, padding)
        }
    }
}

/// Bytes first, then merges in order of length.
fn base(len: usize) -> (Vec<String>, Vec<(String, String)>) {
    assert!(len >= 256, "a vocabulary of {len} does not hold every byte");
    const LETTERS: &str = "etaoinshrdlcumwfgypbvkjxqz";
    let mut tokens: Vec<String> = byte_symbols().iter().map(char::to_string).collect();
    let mut merges = Vec::with_capacity(len - 256);
    let mut words: Vec<String> = std::iter::once('Ġ').chain(LETTERS.chars()).map(String::from).collect();
    while tokens.len() < len {
        let mut longer = Vec::with_capacity(words.len() * LETTERS.len());
        for word in &words {
            for letter in LETTERS.chars() {
                if tokens.len() + longer.len() == len {
                    break;
                }
                longer.push(format!("{word}{letter}"));
                merges.push((word.clone(), letter.to_string()));
            }
        }
        tokens.extend(longer.iter().cloned());
        words = longer;
    }
    (tokens, merges)
}

/// GPT-2's visible character of each byte, in its order: printable bytes stand for themselves, the others for the
/// characters from U+0100 on.
fn byte_symbols() -> Vec<char> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let plain = (0..=255u8).filter(|b| printable(*b)).map(char::from);
    let hidden = (0..=255u8).filter(|b| !printable(*b)).count() as u32;
    let stand_ins = (0..hidden).map(|i| char::from_u32(0x100 + i).expect("below the surrogates"));
    plain.chain(stand_ins).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::presets::Preset;
    use std::collections::BTreeSet;

    fn check(preset: Preset) -> Vocabulary {
        let shape = preset.shape();
        let vocab = Vocabulary::new(&shape);
        assert_eq!(vocab.len(), shape.vocab);
        assert_eq!(vocab.merges.len(), vocab.base.len() - 256);
        let distinct: BTreeSet<&String> = vocab.base.iter().chain(&vocab.special).collect();
        assert_eq!(distinct.len(), vocab.base.len() + vocab.special.len());
        for (token, (left, right)) in vocab.base[256..].iter().zip(&vocab.merges) {
            assert_eq!(*token, format!("{left}{right}"));
        }
        vocab
    }

    #[test]
    fn every_preset_has_a_vocabulary_of_its_size() {
        for preset in [Preset::TinyLlama, Preset::TinyQwen2, Preset::TinyQwen3, Preset::TinyMistral] {
            check(preset);
        }
        check(Preset::Mistral7b);
    }

    #[test]
    fn real_vocabularies_keep_their_ids() {
        let llama = check(Preset::Llama32_1b);
        assert_eq!((llama.bos, llama.eos.as_slice()), (128_000, [128_009, 128_001].as_slice()));
        let qwen = check(Preset::Qwen3_06b);
        assert_eq!((qwen.bos, qwen.eos.as_slice()), (151_643, [151_645, 151_643].as_slice()));
        assert_eq!(qwen.special_text(151_644), "<|im_start|>");
    }

    #[test]
    fn bytes_have_the_usual_symbols() {
        let symbols = byte_symbols();
        assert_eq!(symbols.len(), 256);
        assert_eq!(symbols[0], '!');
        assert!(symbols.contains(&'Ġ') && symbols.contains(&'Ċ'));
    }
}
