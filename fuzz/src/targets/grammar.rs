//! Grammars that constrain an answer: compiled as the router does it, then followed as an engine does.

use super::folder::{Folder, VOCAB};
use ridge_model::checkpoint::ModelSource;
use ridge_model::grammar::{Allowed, Constraints, Grammars};
use ridge_protocol::{Grammar, GrammarKind, RequestId, SampleSpec, SamplingParams, TokenId, TokenOut};
use std::sync::{Arc, OnceLock};

/// Tokens of an answer.
const STEPS: usize = 12;

/// Whatever the grammar, it is refused or followed; what a node that comes in the middle allows is what one allows that has
/// been there from the beginning.
pub(super) fn grammar(bytes: &[u8]) {
    static TOKENIZER: OnceLock<Arc<ridge_model::tokenizer::Tokenizer>> = OnceLock::new();
    let tokenizer = TOKENIZER.get_or_init(|| {
        let folder = Folder::new();
        folder.load(ModelSource::Folder(folder.path(""))).expect("a good model").tokenizer
    });
    let Some((kind, text)) = bytes.split_first() else { return };
    let kind = match kind % 3 {
        0 => GrammarKind::JsonSchema,
        1 => GrammarKind::Regex,
        _ => GrammarKind::Lark,
    };
    let grammar = Grammar { kind, text: String::from_utf8_lossy(text).into_owned() };
    let grammars = Arc::new(Grammars::new(tokenizer.clone(), VOCAB));
    if grammars.check(&grammar).is_err() {
        return;
    }
    let params = Arc::new(SamplingParams {
        grammar: Some(Box::new(grammar)),
        stop_tokens: vec![2],
        ..SamplingParams::greedy(9)
    });
    let mut follower = Constraints::new(grammars.clone());
    let mut history: Vec<TokenId> = vec![1];
    for step in 0..STEPS {
        let position = history.len() as u32;
        let spec = SampleSpec { params: params.clone(), history: history.clone(), prompt_len: 1, position };
        let items = [(RequestId(1), &spec)];
        let ((), followed) = follower.beside(&items, || ());
        let ((), anew) = Constraints::new(grammars.clone()).beside(&items, || ());
        let Allowed::Only(mask) = &followed[0] else { return };
        assert_eq!(followed, anew, "after {:?}", &history[1..]);
        let allowed: Vec<TokenId> =
            (0..VOCAB as u32).filter(|token| mask[*token as usize / 32] >> (token % 32) & 1 == 1).collect();
        let token = allowed[(step * 7 + text.len()) % allowed.len()];
        let drawn = TokenOut { token, logprob: None, top: Vec::new(), ends: false };
        let taken = follower.take(&items, followed, vec![drawn]);
        match &taken[0].token {
            Ok(out) if !out.ends && !params.is_stop(token) => history.push(token),
            _ => return,
        }
    }
}

/// Pieces that grammars are made of.
pub(super) const WORDS: [&str; 42] = [
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "\"",
    ":",
    ",",
    "|",
    "*",
    "+",
    "?",
    "\n",
    "\\",
    "{2,5}",
    "[a-c]",
    ".",
    "^",
    "start: ",
    "A: ",
    "/ab+/",
    "%ignore ",
    "%json ",
    "<|im_end|>",
    "[max_tokens=3]",
    "\"type\":",
    "\"object\"",
    "\"string\"",
    "\"array\"",
    "\"items\":",
    "\"enum\":",
    "\"const\":",
    "\"$ref\":\"#\"",
    "\"pattern\":",
    "\"minLength\":",
    "\"required\":",
    "\"properties\":",
    "\"anyOf\":",
    "\"allOf\":",
    "\"oneOf\":",
    "99999999999",
];

pub(super) fn seeds() -> Vec<Vec<u8>> {
    [
        (0, r#"{"type":"object","properties":{"a":{"type":"string","maxLength":3},"b":{"enum":["ab",1,null]}},"required":["b"]}"#),
        (0, r##"{"$defs":{"l":{"type":"array","items":{"$ref":"#/$defs/l"},"maxItems":2}},"$ref":"#/$defs/l"}"##),
        (0, r#"{"anyOf":[{"type":"integer","minimum":3,"multipleOf":2},{"type":"string","pattern":"^a+b$","format":"date"}]}"#),
        (1, "(ab|ba){2,5}[^a-y]?(?i:x)"),
        (1, "a+b*"),
        (2, "start: item (\" \" item)*\nitem: \"ab\" | WORD | <|im_end|>\nWORD: /[a-d]{1,3}/\n"),
        (2, "start: a\na: \"a\" a | b[max_tokens=4]\nb: /b+/\n%ignore / +/\n"),
        (2, "start: @j\nj: %json {\"const\": \"a\"}\n"),
    ]
    .map(|(kind, text)| [&[kind], text.as_bytes()].concat())
    .to_vec()
}
