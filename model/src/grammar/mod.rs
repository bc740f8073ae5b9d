//! Constrained decoding: which tokens may come next if an answer is to match a [`Grammar`].
//!
//! [`Grammars`] compiles, once per grammar, and says what is wrong with one; [`Constraints`] follows the sequences that an
//! engine runs. What may follow is a function of the grammar and the answer's tokens alone, so a sequence that moves to
//! another node, or is computed twice, is constrained as before. It knows nothing of scheduling. The parsing itself is
//! llguidance's.

mod constraints;
mod vocabulary;

pub use constraints::{Allowed, Constraints};

use crate::tokenizer::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use ridge_protocol::{Grammar, GrammarKind};
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Compiled grammars that are kept. Clients send few different ones; each takes a few megabytes at most.
const MAX_COMPILED: usize = 32;
/// Symbols of a compiled grammar.
const MAX_SYMBOLS: usize = 200_000;
/// States of a compiled grammar's lexer, each one to two kilobytes.
const MAX_LEXER_STATES: usize = 50_000;
/// Work to build a lexer: about 20 ms.
const MAX_LEXER_WORK: u64 = 1_000_000;
/// Work of the lexer for one mask: about 15 ms.
const MAX_MASK_WORK: u64 = 200_000;
/// Work of the parser for one mask: a few milliseconds.
const MAX_MASK_ITEMS: usize = 50_000;
/// Brackets of a grammar within each other.
const MAX_DEPTH: usize = 128;
/// Rules and alternatives of a Lark grammar, one a line.
const MAX_LINES: usize = 4096;
/// Largest numbers in a regular expression or a rule that may be meant as repetitions.
const MAX_REPEAT: u64 = 10_000;
/// What may stand between two tokens of JSON: a space, or a new line and an indent. Without a bound, small models write blank
/// lines until their answer is too long.
const WHITESPACE: &str = r" |\r?\n[ \t]{0,40}";
/// Grammars are trees of any shape, and walked by recursion.
const STACK_BYTES: usize = 64 << 20;

/// Why a grammar cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

/// The grammars of one model.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocab: usize,
    /// Built when the first grammar comes: it takes a while, and most servers never see one.
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    /// The latest used is last.
    compiled: Mutex<Vec<(Grammar, Matcher)>>,
}

impl Grammars {
    /// For a model that chooses among `vocab` tokens.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab: usize) -> Self {
        Self { tokenizer, vocab, factory: OnceLock::new(), compiled: Mutex::default() }
    }

    /// Says what is wrong with a grammar, if anything. It takes milliseconds, or a good part of a second for the first one
    /// of a large vocabulary, and much stack.
    pub fn check(&self, grammar: &Grammar) -> Result<(), GrammarError> {
        on_deep_stack(|| self.matcher(grammar).map(drop))
    }

    /// A matcher at the beginning of an answer. To be called on a deep stack.
    fn matcher(&self, grammar: &Grammar) -> Result<Matcher, GrammarError> {
        let compiled = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut compiled = compiled();
            if let Some(at) = compiled.iter().position(|(known, _)| known == grammar) {
                compiled[at..].rotate_left(1);
                let (_, matcher) = compiled.last().expect("just found");
                // With caches of its own: what one sequence has explored must not count against another.
                return Ok(matcher.deep_clone());
            }
        }
        let matcher = self.compile(grammar)?;
        let mut compiled = compiled();
        if compiled.len() >= MAX_COMPILED {
            compiled.remove(0);
        }
        compiled.push((grammar.clone(), matcher.deep_clone()));
        Ok(matcher)
    }

    fn compile(&self, grammar: &Grammar) -> Result<Matcher, GrammarError> {
        check_shape(grammar)?;
        let factory =
            self.factory.get_or_init(|| factory(&self.tokenizer, self.vocab)).as_ref().map_err(Clone::clone)?;
        guarded(|| {
            let text = &grammar.text;
            let top = match grammar.kind {
                GrammarKind::JsonSchema => {
                    let schema = serde_json::from_str(text).map_err(|error| say(&format_args!("not JSON: {error}")))?;
                    TopLevelGrammar::from_json_schema(with_whitespace(schema))
                }
                GrammarKind::Regex => TopLevelGrammar::from_regex(text),
                GrammarKind::Lark => TopLevelGrammar::from_lark(text.clone()),
            };
            let parser = factory.create_parser(top).map_err(|error| say(&error))?;
            let mut matcher = Matcher::new(Ok(parser));
            // What it cannot begin with is found here, not on a node.
            matcher.compute_mask().map_err(|error| say(&error))?;
            Ok(matcher)
        })
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Grammars({:?}, {} tokens)", self.tokenizer, self.vocab)
    }
}

fn factory(tokenizer: &Tokenizer, vocab: usize) -> Result<ParserFactory, GrammarError> {
    let environment = vocabulary::environment(tokenizer, vocab)?;
    let mut factory = guarded(|| ParserFactory::new_simple(&environment).map_err(|error| say(&error)))?;
    factory.quiet();
    let limits = factory.limits_mut();
    limits.max_grammar_size = MAX_SYMBOLS;
    limits.max_lexer_states = MAX_LEXER_STATES;
    limits.initial_lexer_fuel = MAX_LEXER_WORK;
    limits.step_lexer_fuel = MAX_MASK_WORK;
    limits.step_max_items = MAX_MASK_ITEMS;
    // Otherwise an error repeats the whole grammar.
    limits.verbose_errors = false;
    Ok(factory)
}

/// The schema with bounded whitespace, unless it says itself what it wants (`x-guidance`).
fn with_whitespace(schema: Value) -> Value {
    let mut schema = match schema {
        // The same as an object, which can carry options.
        Value::Bool(true) => json!({}),
        schema => schema,
    };
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": WHITESPACE}));
    }
    schema
}

/// Refuses what the library would take too long for, or recurse too deeply into, before it bounds anything itself.
fn check_shape(grammar: &Grammar) -> Result<(), GrammarError> {
    let text = &grammar.text;
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    // Brackets within strings of a schema nest nothing, and its reader bounds the others.
    if grammar.kind != GrammarKind::JsonSchema && deepest > MAX_DEPTH {
        return Err(GrammarError(format!("more than {MAX_DEPTH} brackets within each other")));
    }
    if grammar.kind == GrammarKind::Lark && text.lines().count() > MAX_LINES {
        return Err(GrammarError(format!("more than {MAX_LINES} lines")));
    }
    if grammar.kind != GrammarKind::JsonSchema
        && let Some(count) = repetitions(text).find(|count| *count > MAX_REPEAT)
    {
        return Err(GrammarError(format!("a repetition of {count}; the limit is {MAX_REPEAT}")));
    }
    Ok(())
}

/// Numbers behind an opening brace or a comma: `a{3,500}`.
fn repetitions(text: &str) -> impl Iterator<Item = u64> {
    text.split(['{', ',']).skip(1).filter_map(|rest| {
        let digits = rest.trim_start();
        let end = digits.bytes().take_while(u8::is_ascii_digit).count();
        (end > 0).then(|| digits[..end].parse().unwrap_or(u64::MAX))
    })
}

fn say(error: &dyn std::fmt::Display) -> GrammarError {
    let text = error.to_string();
    // A panic that the library caught comes with its backtrace.
    GrammarError(text.split("\n<backtrace>").next().unwrap_or_default().trim().to_owned())
}

/// Calls the library, which may panic on a grammar that nobody would write: it is refused like any other bad one.
fn guarded<T>(call: impl FnOnce() -> Result<T, GrammarError>) -> Result<T, GrammarError> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err(GrammarError("it cannot be applied: the llguidance library failed".into())))
}

/// Runs `work` on a thread of its own that may recurse deeply.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES).spawn_scoped(scope, work);
        match thread.expect("the system can start a thread").join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
