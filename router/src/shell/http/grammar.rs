//! `response_format` (OpenAI) and `structured_outputs` (vLLM): what an answer must match.
//!
//! A constraint that is silently dropped would give wrong answers with HTTP 200, so what is not understood is refused.

use super::Shared;
use super::error::ApiError;
use super::fields::Fields;
use ridge_protocol::{Grammar, GrammarKind, limits};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::time::Duration;

/// A grammar that takes longer to compile is refused. The first one of a large vocabulary takes a good part of a second.
const COMPILE_DEADLINE: Duration = Duration::from_secs(10);
/// What vLLM removed in its version 0.12.
const REMOVED: [&str; 5] =
    ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern"];

/// What an answer must match, and the parameter that says so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Constraint {
    /// For errors.
    pub(super) param: &'static str,
    /// Not compiled yet.
    pub(super) grammar: Grammar,
}

impl Constraint {
    /// Reads either parameter; both at once contradict each other.
    pub(super) fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        for name in REMOVED {
            let newer = name.trim_start_matches("guided_");
            fields.refuse(name, &format!("use 'structured_outputs': {{\"{newer}\": …}}"))?;
        }
        fields.refuse("grammar", "use 'structured_outputs': {\"grammar\": …}")?;
        let format =
            fields.take::<ResponseFormat>("response_format")?.map(ResponseFormat::grammar).transpose()?.flatten();
        let outputs = fields.take::<Map<String, Value>>("structured_outputs")?.map(structured).transpose()?.flatten();
        let (param, grammar) = match (format, outputs) {
            (None, None) => return Ok(None),
            (Some(grammar), None) => ("response_format", grammar),
            (None, Some(grammar)) => ("structured_outputs", grammar),
            (Some(_), Some(_)) => {
                let message = "'structured_outputs' and 'response_format' cannot both constrain an answer";
                return Err(ApiError::invalid("structured_outputs", message));
            }
        };
        Self::new(param, grammar).map(Some)
    }

    /// What this parameter asks for.
    pub(super) fn new(param: &'static str, grammar: Grammar) -> Result<Self, ApiError> {
        if grammar.text.len() > limits::MAX_GRAMMAR_BYTES {
            let (len, most) = (grammar.text.len(), limits::MAX_GRAMMAR_BYTES);
            return Err(ApiError::invalid(param, format!("'{param}' has {len} bytes, the limit is {most}")));
        }
        Ok(Self { param, grammar })
    }

    /// Compiles it where that holds up nobody, and says what is wrong with it: no node hears of a request whose grammar is no
    /// good.
    pub(super) async fn check(&self, app: &Shared) -> Result<(), ApiError> {
        let permit = app.tokenizing.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (model, grammar, param) = (app.model.clone(), self.grammar.clone(), self.param);
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            model.check_grammar(&grammar)
        });
        match tokio::time::timeout(COMPILE_DEADLINE, work).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(ApiError::invalid(param, format!("'{param}' cannot be used: {error}"))),
            Ok(Err(_)) => Err(ApiError::internal("compiling the grammar failed")),
            Err(_) => {
                let seconds = COMPILE_DEADLINE.as_secs();
                Err(ApiError::invalid(
                    param,
                    format!("'{param}' takes longer than {seconds} s to compile: simplify it"),
                ))
            }
        }
    }
}

#[derive(Deserialize)]
struct ResponseFormat {
    r#type: String,
    json_schema: Option<JsonSchema>,
}

/// `name`, `description` and `strict` change nothing: an answer always matches the schema.
#[derive(Deserialize)]
struct JsonSchema {
    schema: Option<Value>,
}

impl ResponseFormat {
    fn grammar(self) -> Result<Option<Grammar>, ApiError> {
        let param = "response_format";
        match (self.r#type.as_str(), self.json_schema) {
            ("text", _) => Ok(None),
            ("json_object", _) => Ok(Some(json_object())),
            ("json_schema", Some(JsonSchema { schema: Some(schema) })) => json_schema(param, schema).map(Some),
            ("json_schema", _) => {
                let message = "'response_format' of type 'json_schema' needs 'json_schema' with a 'schema'";
                Err(ApiError::invalid(param, message))
            }
            (kind, _) => {
                let message = format!(
                    "'response_format' of type '{kind}' is not supported; 'text', 'json_object' and 'json_schema' are"
                );
                Err(ApiError::invalid(param, message))
            }
        }
    }
}

/// vLLM's parameter: exactly one of its constraints.
fn structured(fields: Map<String, Value>) -> Result<Option<Grammar>, ApiError> {
    let param = "structured_outputs";
    let wrong = |what: &str| ApiError::invalid(param, format!("'{param}': {what}"));
    let text = |name: &str, value: Value| match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        _ => Err(wrong(&format!("'{name}' must be a string that is not empty"))),
    };
    let given = fields.into_iter().filter(|(_, value)| !matches!(value, Value::Null | Value::Bool(false)));
    let mut grammar = None;
    for (name, value) in given {
        let next = match name.as_str() {
            "json" => match value {
                Value::String(schema) => {
                    let schema = serde_json::from_str(&schema);
                    json_schema(param, schema.map_err(|error| wrong(&format!("'json' is not JSON: {error}")))?)?
                }
                schema => json_schema(param, schema)?,
            },
            "json_object" => json_object(),
            "regex" => Grammar { kind: GrammarKind::Regex, text: text("regex", value)? },
            "grammar" => Grammar { kind: GrammarKind::Lark, text: text("grammar", value)? },
            "choice" => {
                choice(value).ok_or_else(|| wrong("'choice' must be an array of strings that are not empty"))?
            }
            other => return Err(wrong(&format!("'{other}' is not supported"))),
        };
        if grammar.replace(next).is_some() {
            return Err(wrong("only one of 'json', 'json_object', 'regex', 'choice' and 'grammar' may be given"));
        }
    }
    match grammar {
        Some(grammar) => Ok(Some(grammar)),
        None => Err(wrong("one of 'json', 'json_object', 'regex', 'choice' and 'grammar' is needed")),
    }
}

fn json_schema(param: &str, schema: Value) -> Result<Grammar, ApiError> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Grammar { kind: GrammarKind::JsonSchema, text: schema.to_string() }),
        _ => Err(ApiError::invalid(param, format!("'{param}': a JSON schema is an object"))),
    }
}

fn json_object() -> Grammar {
    Grammar { kind: GrammarKind::JsonSchema, text: json!({"type": "object"}).to_string() }
}

/// One of several texts, as a rule whose alternatives are string literals.
fn choice(texts: Value) -> Option<Grammar> {
    let literal = |text: &Value| text.as_str().filter(|text| !text.is_empty()).map(|_| text.to_string());
    let literals: Vec<String> = texts.as_array()?.iter().map(literal).collect::<Option<_>>()?;
    let text = format!("start: {}", literals.join(" | "));
    (!literals.is_empty()).then_some(Grammar { kind: GrammarKind::Lark, text })
}
