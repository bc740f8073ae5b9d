//! Tools: what the template is told of them, and calls that `tool_choice` asks for.
//!
//! An answer that must be a call is constrained to one, and its text is taken apart again. Under `required` it is a list of objects
//! with a name and arguments, under a named function its arguments alone: the same for every model, as vLLM does it, because the
//! grammar and not the model's habit decides what is written. Under `auto` the answer is plain text.

use super::error::ApiError;
use super::fields::Fields;
use super::grammar::Constraint;
use ridge_protocol::{Grammar, GrammarKind};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Longest name of a function, as OpenAI has it.
const MAX_NAME: usize = 64;
/// What stands before a call's arguments, around its name.
const CALL: (&str, &str) = ("{\"name\": \"", "\", \"arguments\": ");

/// The tools of a request.
#[derive(Debug, Default)]
pub(super) struct Tools {
    /// For the template: an array in OpenAI's form.
    pub(super) offered: Option<Value>,
    /// What the answer must be.
    pub(super) forced: Option<(Calls, Grammar)>,
}

/// How an answer's text spells calls.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Calls {
    /// The arguments of this function.
    Named(String),
    /// One call or more, in a list.
    Required,
}

/// A part of a call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct CallPart {
    /// Which of the answer's calls.
    pub(super) index: usize,
    /// Set on a call's first part.
    pub(super) name: Option<String>,
    /// The next piece of the arguments' JSON.
    pub(super) arguments: String,
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let tools: Vec<Map<String, Value>> = fields.take("tools")?.unwrap_or_default();
        let functions = tools.iter().enumerate().map(|(at, tool)| Function::read(at, tool));
        let functions = functions.collect::<Result<Vec<_>, _>>()?;
        let several = fields.take("parallel_tool_calls")?.unwrap_or(true);
        let offered = |tools: Vec<Map<String, Value>>| {
            (!tools.is_empty()).then(|| tools.into_iter().map(Value::Object).collect())
        };
        let forced = match fields.take::<Value>("tool_choice")? {
            None => None,
            Some(Value::String(choice)) if choice == "auto" => None,
            Some(Value::String(choice)) if choice == "none" => return Ok(Self::default()),
            Some(Value::String(choice)) if choice == "required" => {
                if functions.is_empty() {
                    return Err(ApiError::invalid("tool_choice", "'tool_choice' \"required\" needs 'tools'"));
                }
                Some((Calls::Required, required(&functions, several)?))
            }
            Some(choice) => {
                let name = choice["function"]["name"].as_str().filter(|_| choice["type"] == "function");
                let name = name.ok_or_else(|| {
                    let message = format!(
                        "'tool_choice' {choice} is not supported; \"none\", \"auto\", \"required\" and \
                         {{\"type\": \"function\", \"function\": {{\"name\": …}}}} are"
                    );
                    ApiError::invalid("tool_choice", message)
                })?;
                let function = functions.iter().find(|function| function.name == name).ok_or_else(|| {
                    ApiError::invalid("tool_choice", format!("'tool_choice' names '{name}', which 'tools' lacks"))
                })?;
                let text = function.checked()?.parameters.to_string();
                Some((Calls::Named(name.to_owned()), Grammar { kind: GrammarKind::JsonSchema, text }))
            }
        };
        Ok(Self { offered: offered(tools), forced })
    }
}

/// What a grammar needs of a tool.
struct Function<'a> {
    at: usize,
    name: &'a str,
    parameters: Value,
}

impl<'a> Function<'a> {
    fn read(at: usize, tool: &'a Map<String, Value>) -> Result<Self, ApiError> {
        let function = tool.get("function").filter(|_| tool.get("type").is_some_and(|kind| kind == "function"));
        let Some(function) = function else {
            let param = format!("tools[{at}]");
            let message = format!("'{param}' must be an object with \"type\": \"function\" and a \"function\"");
            return Err(ApiError::invalid(&param, message));
        };
        let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
        let none = || json!({"type": "object", "properties": {}, "additionalProperties": false});
        let parameters = function.get("parameters").filter(|given| !given.is_null()).cloned().unwrap_or_else(none);
        Ok(Self { at, name, parameters })
    }

    /// Refuses what a call could not be made of. A tool that is only shown to the model may be anything.
    fn checked(&self) -> Result<&Self, ApiError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if self.name.is_empty() || self.name.len() > MAX_NAME || !self.name.chars().all(plain) {
            let param = format!("tools[{}].function.name", self.at);
            let message = format!("'{param}' must be 1 to {MAX_NAME} letters, digits, '_', '-' and '.'");
            return Err(ApiError::invalid(&param, message));
        }
        if !self.parameters.is_object() {
            let param = format!("tools[{}].function.parameters", self.at);
            return Err(ApiError::invalid(&param, format!("'{param}' must be a JSON schema, which is an object")));
        }
        Ok(self)
    }
}

/// A list of calls. Each function's schema stays a document of its own, so that its `$ref`s mean what they did.
fn required(functions: &[Function<'_>], several: bool) -> Result<Grammar, ApiError> {
    let names: Vec<String> = (0..functions.len()).map(|number| format!("call_{number}")).collect();
    let more = if several { " (\", \" call)*" } else { "" };
    let mut text = format!("start: \"[\" call{more} \"]\"\ncall: {}\n", names.join(" | "));
    for (function, rule) in functions.iter().zip(names) {
        let mut schema = function.checked()?.parameters.clone();
        let fields = schema.as_object_mut().expect("it was checked");
        // Unbounded white space would let an answer go on for ever.
        fields.entry("x-guidance").or_insert_with(|| json!({"whitespace_flexible": false}));
        let before = json!(format!("{}{}{}", CALL.0, function.name, CALL.1));
        writeln!(text, "{rule}: {before} arguments_{rule} \"}}\"\narguments_{rule}: %json {schema}")
            .expect("a string takes everything");
    }
    Ok(Grammar { kind: GrammarKind::Lark, text })
}

impl Calls {
    /// As a constraint, for errors of the compiler.
    pub(super) fn constraint(grammar: Grammar) -> Result<Constraint, ApiError> {
        Constraint::new("tools", grammar)
    }

    /// The calls of an answer that is all there.
    pub(super) fn read(&self, text: &str) -> Vec<CallPart> {
        CallReader::new(self.clone()).push(text)
    }
}

/// Takes an answer's text apart as it comes.
#[derive(Debug)]
pub(super) struct CallReader {
    calls: Calls,
    /// Calls so far.
    count: usize,
    /// Text of the list that belongs to no complete call yet.
    rest: String,
}

impl CallReader {
    pub(super) fn new(calls: Calls) -> Self {
        Self { calls, count: 0, rest: String::new() }
    }

    /// The parts that `text` completes. A list's calls come whole; one that `max_tokens` has cut never comes.
    pub(super) fn push(&mut self, text: &str) -> Vec<CallPart> {
        match &self.calls {
            Calls::Named(_) if text.is_empty() => Vec::new(),
            Calls::Named(name) => {
                let first = std::mem::replace(&mut self.count, 1) == 0;
                vec![CallPart { index: 0, name: first.then(|| name.clone()), arguments: text.to_owned() }]
            }
            Calls::Required => {
                self.rest.push_str(text);
                // Only a closing brace completes a call: long arguments are not read again with each of their tokens.
                let complete = |reader: &mut Self| text.contains('}').then(|| reader.next_call())?;
                std::iter::from_fn(|| complete(self)).collect()
            }
        }
    }

    /// The next call of the list, if it is complete. Its arguments are cut out as they were written.
    fn next_call(&mut self) -> Option<CallPart> {
        let begin = self.rest.find(CALL.0)? + CALL.0.len();
        let name = &self.rest[begin..begin + self.rest[begin..].find('"')?];
        let arguments = self.rest[begin + name.len()..].strip_prefix(CALL.1)?;
        let mut values = serde_json::Deserializer::from_str(arguments).into_iter::<serde::de::IgnoredAny>();
        values.next()?.ok()?;
        let len = values.byte_offset();
        // The end of the object: without it, a number might go on.
        arguments[len..].starts_with('}').then_some(())?;
        let index = self.count;
        self.count += 1;
        let part = CallPart { index, name: Some(name.to_owned()), arguments: arguments[..len].to_owned() };
        let read = self.rest.len() - arguments.len() + len + 1;
        self.rest.drain(..read);
        Some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(index: usize, name: &str, arguments: &str) -> CallPart {
        CallPart { index, name: Some(name.into()), arguments: arguments.into() }
    }

    #[test]
    fn a_list_of_calls_comes_apart_wherever_it_is_cut() {
        let text = r#"[{"name": "f", "arguments": {"a": "}, {\"name\": \"g\""}}, {"name": "g.2", "arguments": 12}]"#;
        let expected = [call(0, "f", r#"{"a": "}, {\"name\": \"g\""}"#), call(1, "g.2", "12")];
        assert_eq!(Calls::Required.read(text), expected);
        for cut in 0..=text.len() {
            let mut reader = CallReader::new(Calls::Required);
            let parts = [reader.push(&text[..cut]), reader.push(&text[cut..])].concat();
            assert_eq!(parts, expected, "cut at {cut}");
        }
        assert_eq!(Calls::Required.read(&text[..text.len() - 2]), expected[..1], "a call that was cut is none");
    }

    #[test]
    fn arguments_of_a_named_function_stream() {
        let mut reader = CallReader::new(Calls::Named("f".into()));
        assert_eq!(reader.push(""), []);
        assert_eq!(reader.push("{\"a\""), [call(0, "f", "{\"a\"")]);
        assert_eq!(reader.push(": 1}"), [CallPart { index: 0, name: None, arguments: ": 1}".into() }]);
    }
}
