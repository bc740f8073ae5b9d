//! Constrained decoding: what is refused, what may come next, and that an answer is the same whoever continues it.

mod common;

use common::load_path;
use common::tiny::checkpoint;
use ridge_kernels::{Cpu, DType, KvDtype, KvFormat};
use ridge_model::checkpoint::Checkpoint;
use ridge_model::engine::{CpuEngine, Engine};
use ridge_model::generate::{GenerateError, generate};
use ridge_model::grammar::{Allowed, Constraints, Grammars};
use ridge_model::kv::KvMemory;
use ridge_protocol::{Grammar, GrammarKind, RequestId, SampleSpec, SamplingParams, TokenId, TokenOut};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

static DEMO: LazyLock<Checkpoint> = LazyLock::new(|| {
    load_path(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/ridge-demo"))).expect("it comes with the sources")
});
static GRAMMARS: LazyLock<Arc<Grammars>> =
    LazyLock::new(|| Arc::new(Grammars::new(DEMO.tokenizer.clone(), DEMO.spec.vocab)));

fn grammar(kind: GrammarKind, text: impl ToString) -> Grammar {
    Grammar { kind, text: text.to_string() }
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    })
}

fn engine() -> CpuEngine {
    let spec = &DEMO.spec;
    let format = KvFormat { dtype: KvDtype::F32, kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size: 16 };
    let kv = Arc::new(KvMemory::new(format, spec.layers, 40).expect("a small mapping"));
    CpuEngine::new(&DEMO, kv, Cpu::new(2, None), None).expect("a whole checkpoint")
}

fn params(grammar: Grammar, max_tokens: u32) -> SamplingParams {
    let stop_tokens = DEMO.generation.eos.clone();
    SamplingParams { grammar: Some(Box::new(grammar)), stop_tokens, ..SamplingParams::greedy(max_tokens) }
}

/// Text and tokens of an answer.
fn answer(engine: &mut CpuEngine, params: &SamplingParams) -> (String, Vec<TokenOut>) {
    let prompt = DEMO.tokenizer.encode("The detective wrote: ", true).expect("text");
    let out = generate(engine, &prompt, params, 64, 600, &mut |_| true).expect("an answer");
    let tokens: Vec<TokenId> = out.iter().map(|out| out.token).filter(|token| !params.is_stop(*token)).collect();
    (DEMO.tokenizer.decode(&tokens, false), out)
}

#[test]
fn answers_match_their_grammars() {
    let mut engine = engine();
    for (temperature, seed) in [(0.0, 0), (1.0, 1), (1.5, 2), (2.0, 3)] {
        let draw = |grammar| SamplingParams { temperature, seed, ..params(grammar, 200) };
        let (text, _) = answer(&mut engine, &draw(grammar(GrammarKind::JsonSchema, schema())));
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
        assert!(value["name"].is_string() && value["age"].as_u64().is_some_and(|age| age <= 150), "{text}");
        assert!(value["kind"] == "cat" || value["kind"] == "dog", "{text}");
        assert_eq!(value.as_object().map(|object| object.len()), Some(3), "{text}");

        let (text, out) = answer(&mut engine, &draw(grammar(GrammarKind::Regex, r"[0-9]{4}-[0-9]{2}-(0[1-9]|1[0-9])")));
        assert_eq!((text.len(), &text[4..5], &text[7..8]), (10, "-", "-"), "{text}");
        assert!(out.last().is_some_and(|last| last.ends), "nothing can follow a date: {out:?}");

        let rules = "start: (word \" \")? word\nword: \"yes\" | \"no\"\n";
        let (text, _) = answer(&mut engine, &draw(grammar(GrammarKind::Lark, rules)));
        assert!(["yes", "no", "yes yes", "yes no", "no yes", "no no"].contains(&text.as_str()), "{text:?}");
    }
}

/// Without a stop token, or with orders to ignore it, an answer still ends where its grammar does.
#[test]
fn an_answer_ends_with_its_grammar() {
    let mut engine = engine();
    let date = params(grammar(GrammarKind::Regex, "[0-9]{3}"), 50);
    for params in [
        SamplingParams { stop_tokens: vec![], ..date.clone() },
        SamplingParams { ignore_eos: true, ..date.clone() },
        date.clone(),
    ] {
        let (text, out) = answer(&mut engine, &params);
        assert!(text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit()), "{text:?}");
        let ends: Vec<bool> = out.iter().map(|out| out.ends).collect();
        assert_eq!(ends.iter().filter(|ends| **ends).count(), 1, "{ends:?}");
        assert_eq!(ends.last(), Some(&true));
    }
    // Where the grammar may end and may go on, the stop token is allowed, and no special token is before.
    let any = params(grammar(GrammarKind::Regex, "[0-9]+"), 50);
    let always = SamplingParams { logit_bias: vec![(DEMO.generation.eos[0], 100.0), (3, 1000.0)], ..any };
    let (text, out) = answer(&mut engine, &always);
    assert!(!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()), "{text:?}");
    assert_eq!(out.len(), 2, "as soon as it may: {out:?}");
    assert!(!out[1].ends, "it is the model's choice");
}

fn spec(params: &Arc<SamplingParams>, prompt: usize, history: &[TokenId]) -> SampleSpec {
    let (history, position) = (history.to_vec(), history.len() as u32);
    SampleSpec { params: params.clone(), prompt_len: prompt as u32, history, position }
}

fn allowed(constraints: &mut Constraints, request: u64, spec: &SampleSpec) -> Allowed {
    let ((), mut allowed) = constraints.beside(&[(RequestId(request), spec)], || ());
    allowed.remove(0)
}

/// Whoever has followed an answer from its beginning, and whoever gets it in the middle, allow the same tokens.
#[test]
fn masks_depend_on_the_answer_alone() {
    let mut engine = engine();
    let whole = SamplingParams { temperature: 1.2, seed: 5, ..params(grammar(GrammarKind::JsonSchema, schema()), 200) };
    let (_, out) = answer(&mut engine, &whole);
    let tokens: Vec<TokenId> = out.iter().map(|out| out.token).collect();
    let params = Arc::new(whole);
    let mut follower = Constraints::new(GRAMMARS.clone());
    for len in 0..tokens.len() {
        let history: Vec<TokenId> = [7, 8].into_iter().chain(tokens[..len].iter().copied()).collect();
        let spec = spec(&params, 2, &history);
        let from_here = allowed(&mut Constraints::new(GRAMMARS.clone()), 1, &spec);
        let followed = allowed(&mut follower, 1, &spec);
        assert_eq!(followed, from_here, "after {len} tokens");
        let drawn = TokenOut { token: tokens[len], logprob: None, top: vec![], ends: false };
        let taken = follower.take(&[(RequestId(1), &spec)], vec![followed], vec![drawn]);
        assert_eq!(taken[0].token.as_ref().map(|out| out.ends), Ok(out[len].ends), "after {len} tokens");
    }
    // The number of a sequence that is over may be another's, and a node may have gone another way before.
    let other = spec(&params, 1, &[7]);
    assert_eq!(allowed(&mut follower, 1, &other), allowed(&mut Constraints::new(GRAMMARS.clone()), 2, &other));
    let digits =
        Arc::new(SamplingParams { grammar: Some(Box::new(grammar(GrammarKind::Regex, "[0-9]"))), ..(*params).clone() });
    let digits = spec(&digits, 1, &[7]);
    assert_eq!(allowed(&mut follower, 1, &digits), allowed(&mut Constraints::new(GRAMMARS.clone()), 2, &digits));
    // Unconstrained items of the same pass are left alone.
    let free = spec(&Arc::new(SamplingParams::greedy(1)), 1, &[7]);
    let ((), both) = follower.beside(&[(RequestId(3), &free), (RequestId(1), &digits)], || ());
    assert_eq!(both[0], Allowed::Everything);
    assert!(matches!(both[1], Allowed::Only(_)));
}

#[test]
fn what_cannot_go_on_says_so() {
    let mut constraints = Constraints::new(GRAMMARS.clone());
    let mut refused = |grammar: Grammar, answer: &[TokenId]| {
        let history: Vec<TokenId> = [7].into_iter().chain(answer.iter().copied()).collect();
        let spec = spec(&Arc::new(params(grammar, 9)), 1, &history);
        match allowed(&mut constraints, 1, &spec) {
            Allowed::Nothing(reason) => reason.0,
            other => panic!("{other:?}"),
        }
    };
    // A grammar that the router would have refused, and an answer that cannot be this grammar's.
    assert!(refused(grammar(GrammarKind::Regex, "(a"), &[]).contains("cannot follow its grammar"));
    let letters = DEMO.tokenizer.encode("abc", false).expect("text");
    assert!(refused(grammar(GrammarKind::Regex, "[0-9]+"), &letters).contains("cannot follow its grammar"));
    assert!(refused(grammar(GrammarKind::Regex, "[0-9]+"), &[1 << 30]).contains("cannot follow its grammar"));

    let spec = spec(&Arc::new(params(grammar(GrammarKind::Regex, "[0-9]+"), 9)), 1, &[7]);
    let mask = allowed(&mut constraints, 2, &spec);
    let drawn = TokenOut { token: letters[0], logprob: None, top: vec![], ends: false };
    let taken = constraints.take(&[(RequestId(2), &spec)], vec![mask], vec![drawn]);
    assert!(taken[0].token.is_err(), "a token that was not allowed: {taken:?}");

    let error = generate(
        &mut engine() as &mut dyn Engine,
        &[7],
        &params(grammar(GrammarKind::Lark, "nonsense"), 4),
        16,
        64,
        &mut |_| true,
    );
    assert!(matches!(error, Err(GenerateError::NoToken(_))), "{error:?}");
}

#[test]
fn bad_grammars_are_refused_with_a_reason() {
    let check = |kind, text: &str| GRAMMARS.check(&grammar(kind, text)).map_err(|error| error.0);
    use GrammarKind::*;
    for (kind, text, reason) in [
        (JsonSchema, "{", "not JSON"),
        (JsonSchema, r#"{"type": "strin"}"#, "strin"),
        (JsonSchema, r#"{"type": "string", "minLength": 3, "maxLength": 2}"#, ""),
        (JsonSchema, r##"{"$ref": "#/$defs/none"}"##, ""),
        (JsonSchema, r#"{"not": {"type": "string"}}"#, "not"),
        (JsonSchema, "false", ""),
        (Regex, "(a", ""),
        (Regex, "a{20000}", "repetition of 20000"),
        (Regex, &"(".repeat(5000), "brackets"),
        (Lark, "", ""),
        (Lark, "start: nothing", "nothing"),
        (Lark, &"start: \"a\"\n".repeat(5000), "lines"),
        (Lark, &format!("start: {}", "[".repeat(5000)), "brackets"),
    ] {
        let error = check(kind, text).expect_err(&text[..text.len().min(60)]);
        assert!(error.contains(reason) && error.len() < 1000, "{:?}: {error}", &text[..text.len().min(60)]);
    }
    for (kind, text) in [
        (JsonSchema, "{}"),
        (JsonSchema, "true"),
        (JsonSchema, r##"{"$defs": {"l": {"type": "array", "items": {"$ref": "#/$defs/l"}}}, "$ref": "#/$defs/l"}"##),
        (Regex, "a{0,10000}"),
        (Regex, "é|[^x]*"),
        (Lark, "start: <|user|> \"x\""),
    ] {
        assert_eq!(check(kind, text), Ok(()), "{text}");
    }
}

/// Shapes that would exhaust a stack or take forever: each is accepted or refused, soon.
#[test]
fn large_grammars_end_soon() {
    use GrammarKind::*;
    let nested = |depth| (0..depth).fold(json!({}), |inner, _| json!({"type": "array", "items": inner})).to_string();
    let references: serde_json::Map<String, Value> = (0..4000)
        .map(|n| (format!("d{n}"), json!({"type": "array", "items": {"$ref": format!("#/$defs/d{}", n + 1)}})))
        .collect();
    let chain = |count: usize| {
        let rules = (0..count).map(|n| format!("r{n}: \"a\" r{}\n", n + 1)).collect::<String>();
        format!("start: r0\n{rules}r{count}: \"b\"\n")
    };
    let terminals = |count: usize| {
        let rules = (0..count).map(|n| format!("T{n}: \"a\" T{}\n", n + 1)).collect::<String>();
        format!("start: T0\n{rules}T{count}: \"b\"\n")
    };
    for (kind, text) in [
        (JsonSchema, nested(60)),
        (JsonSchema, json!({"$defs": references, "$ref": "#/$defs/d0"}).to_string()),
        (JsonSchema, json!({"type": "array", "minItems": 1_000_000_000u64}).to_string()),
        (JsonSchema, json!({"type": "string", "minLength": 1_000_000_000u64}).to_string()),
        (JsonSchema, json!({"type": "string", "pattern": "(a{1000}){1000}"}).to_string()),
        (JsonSchema, json!({"enum": (0..20_000).map(|n| n.to_string()).collect::<Vec<_>>()}).to_string()),
        (JsonSchema, json!({"allOf": vec![json!({"type": "object", "properties": {"a": {}}}); 2000]}).to_string()),
        (JsonSchema, json!({"anyOf": (0..2000).map(|n| json!({"const": n})).collect::<Vec<_>>()}).to_string()),
        (Regex, "(a{100}){100}".into()),
        (Regex, "((a{1,100}){1,100}){1,100}".into()),
        (Regex, format!("{}{}", "(a|".repeat(120), ")".repeat(120))),
        (Regex, "a|".repeat(100_000)),
        (Regex, "ab*".repeat(50_000)),
        (Lark, chain(4000)),
        (Lark, terminals(4000)),
        (Lark, format!("start: {}", "\"a\" | ".repeat(20_000) + "\"b\"")),
        (Lark, "start: start \"a\" | start start | \"\"".into()),
    ] {
        let begin = Instant::now();
        let outcome = GRAMMARS.check(&grammar(kind, &text));
        let took = begin.elapsed();
        eprintln!(
            "{kind:?} {} bytes {}: {took:?} {:?}",
            text.len(),
            &text[..text.len().min(40)],
            outcome.as_ref().err()
        );
        assert!(took < Duration::from_secs(20), "{kind:?} {} took {took:?}", &text[..text.len().min(60)]);
    }
}

/// A tokenizer with fewer tokens than the model has rows: those that only pad are never allowed.
#[test]
fn rows_that_pad_the_vocabulary_are_never_allowed() {
    let vocab = DEMO.tokenizer.vocab_size();
    let grammars = Arc::new(Grammars::new(DEMO.tokenizer.clone(), vocab + 45));
    let params =
        SamplingParams { grammar: Some(Box::new(grammar(GrammarKind::Regex, "(?s:.)*"))), ..SamplingParams::greedy(5) };
    let spec = spec(&Arc::new(params), 1, &[7]);
    let Allowed::Only(mask) = allowed(&mut Constraints::new(grammars), 1, &spec) else { panic!("it is constrained") };
    assert_eq!(mask.len(), (vocab + 45).div_ceil(32));
    let set: Vec<usize> = (0..mask.len() * 32).filter(|bit| mask[bit / 32] >> (bit % 32) & 1 == 1).collect();
    assert!(set.iter().all(|token| *token < vocab && !DEMO.tokenizer.is_special(*token as u32)), "{set:?}");
    assert!(set.len() > vocab / 2, "almost every token is text: {} of {vocab}", set.len());
}

/// A tokenizer of words, whose texts depend on their neighbours.
#[test]
fn a_tokenizer_without_a_table_of_bytes_is_refused() {
    let checkpoint = checkpoint(DType::F32);
    let grammars = Grammars::new(checkpoint.tokenizer.clone(), checkpoint.spec.vocab);
    let error = grammars.check(&grammar(GrammarKind::Regex, "a")).expect_err("it cannot be served");
    assert!(error.0.contains("tokenizer"), "{error}");
}

/// A model that likes blank lines is not given the room.
#[test]
fn whitespace_between_the_tokens_of_json_is_bounded() {
    let loose = json!({"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3});
    let mut engine = engine();
    let blank = DEMO.tokenizer.encode("\n", false).expect("text")[0];
    let params = params(grammar(GrammarKind::JsonSchema, loose), 300);
    let eager = SamplingParams { logit_bias: vec![(blank, 100.0)], ..params };
    let (text, _) = answer(&mut engine, &eager);
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    assert_eq!(value, json!([1, 1, 1]));
    assert!(text.contains('\n') && !text.contains("\n\n"), "{text:?}");
}
