//! Chat templates: Jinja as transformers runs it.
//!
//! Templates were written against Python, so this is the place of every difference between minijinja and
//! transformers' environment: JSON spelling, `{% generation %}`, `raise_exception`, `strftime_now`, Python's methods.
//! A template comes from a model file and is untrusted: it runs with fuel, a recursion limit and no access to
//! anything but its arguments. Read [`ChatTemplate`] first.

mod python;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Instructions that one rendering may execute; the longest known template uses about 100 per message.
const FUEL: u64 = 20_000_000;
/// Depth of macros and includes.
const RECURSION: usize = 200;
/// Longest template source, in bytes; the longest known one has 40 KB.
const MAX_SOURCE_BYTES: usize = 4 << 20;
/// The names under which clients and templates know the model's reasoning.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
}

/// What a rendering may depend on, beside the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions<'a> {
    /// End with the opening of an assistant message.
    pub add_generation_prompt: bool,
    /// Tool descriptions, an array in OpenAI's form.
    pub tools: Option<&'a Json>,
    /// Further variables (`chat_template_kwargs`), such as `enable_thinking`.
    pub extra: Option<&'a Map<String, Json>>,
    /// What `strftime_now` tells; the local time when absent.
    pub now: Option<jiff::civil::DateTime>,
}

/// Why a template could not be compiled or rendered.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TemplateError {
    /// The source is not valid Jinja.
    #[error("it does not compile: {0}")]
    Compile(String),
    /// The template itself refused the conversation with `raise_exception`.
    #[error("{0}")]
    Raised(String),
    /// Rendering failed.
    #[error("it does not render this conversation: {0}")]
    Render(String),
}

/// Carries a template's own message through the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Exception(String);

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are the texts of those tokens.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TemplateError::Compile(format!(
                "{} bytes of source, more than {MAX_SOURCE_BYTES}",
                source.len()
            )));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TemplateError::Compile(e.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        // transformers escapes nothing: a prompt is not HTML.
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("fromjson", fromjson);
        environment.add_filter("indent", python::indent);
        environment.add_filter("format", python::format);
        environment.add_filter("length", python::length);
        environment.add_filter("count", python::length);
        environment.add_test("iterable", python::is_iterable);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_template_owned("chat", without_generation_tags(source))
            .map_err(|e| TemplateError::Compile(describe(&e)))?;
        Ok(Self { environment, source: source.to_owned(), bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The source it was compiled from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for `messages`, an array in OpenAI's form.
    pub fn render(&self, messages: &Json, options: &RenderOptions<'_>) -> Result<String, TemplateError> {
        let messages: Vec<Json> = match messages {
            Json::Array(items) => items.iter().map(with_reasoning_names).collect(),
            _ => return Err(TemplateError::Render("messages is not an array".into())),
        };
        let mut context = Map::new();
        context.insert("bos_token".into(), self.bos.clone().into());
        context.insert("eos_token".into(), self.eos.clone().into());
        for (key, value) in options.extra.into_iter().flatten() {
            context.insert(key.clone(), value.clone());
        }
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), options.tools.cloned().unwrap_or(Json::Null));
        context.entry("documents").or_insert(Json::Null);
        context.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        let now = options.now;
        let clock = move |format: String| {
            let now = now.unwrap_or_else(|| jiff::Zoned::now().datetime());
            let mut text = String::new();
            let printer = jiff::fmt::strtime::BrokenDownTime::from(now);
            printer.format(&format, &mut text).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
            Ok::<_, Error>(text)
        };
        let mut variables: BTreeMap<String, Value> =
            context.into_iter().map(|(key, value)| (key, Value::from(Serde(value)))).collect();
        variables.insert("strftime_now".to_owned(), Value::from_function(clock));
        let template = self.environment.get_template("chat").map_err(|e| TemplateError::Render(describe(&e)))?;
        // The engine panics on a few things that templates can say (3.0.5: an empty string in reverse). A rendering leaves
        // nothing behind that could be half done.
        let rendered = catch_unwind(AssertUnwindSafe(|| template.render(Value::from(variables))));
        rendered
            .map_err(|_| TemplateError::Render("the template engine failed".into()))?
            .map_err(|e| refusal(&e).unwrap_or_else(|| TemplateError::Render(describe(&e))))
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate({} bytes)", self.source.len())
    }
}

/// Offers a message's reasoning under every name that templates read, as transformers does.
fn with_reasoning_names(message: &Json) -> Json {
    let Json::Object(fields) = message else { return message.clone() };
    let Some(reasoning) = REASONING.iter().filter_map(|name| fields.get(*name)).find(|v| !v.is_null()) else {
        return message.clone();
    };
    let mut out = Map::new();
    out.insert("thinking".into(), reasoning.clone());
    out.extend(fields.clone());
    out.insert("reasoning_content".into(), reasoning.clone());
    Json::Object(out)
}

/// Training marks the assistant's text with `{% generation %}`; for a prompt it is a block like any other.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let word = tag.trim_start_matches(['{', '%', '-', '+']).trim_end_matches(['}', '%', '-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag.replace(word, "if true")),
            "endgeneration" => out.push_str(&tag.replace(word, "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Exception(message)))
}

fn fromjson(text: String) -> Result<Value, Error> {
    let json: Json = serde_json::from_str(&text).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
    Ok(Value::from(Serde(json)))
}

/// The template's own message, if that is what ended the rendering.
fn refusal(error: &Error) -> Option<TemplateError> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Exception(message)) = error.downcast_ref() {
            return Some(TemplateError::Raised(message.clone()));
        }
        cause = error.source();
    }
    None
}

fn describe(error: &Error) -> String {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    format!("{}{line}", error.detail().map_or_else(|| error.kind().to_string(), |d| format!("{}: {d}", error.kind())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(source: &str, messages: Json, expected: &str) {
        let template = ChatTemplate::new(source, "<s>", "</s>").expect("compiles");
        let options = RenderOptions { add_generation_prompt: true, ..Default::default() };
        assert_eq!(template.render(&messages, &options).as_deref(), Ok(expected), "{source}");
    }

    #[test]
    fn python_spelling() {
        check(
            "{{ messages[0] | tojson }}",
            json!([{"b": "<é>", "a": [1, 2.0, null]}]),
            r#"{"b": "<é>", "a": [1, 2.0, null]}"#,
        );
        check(
            "{{ messages[0]|tojson(indent=2) }}",
            json!([{"a": [1], "b": {}}]),
            "{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}",
        );
        check(
            "{{ messages[0]|tojson(separators=(',', ':'), sort_keys=True) }}",
            json!([{"b": 1, "a": 2}]),
            r#"{"a":2,"b":1}"#,
        );
        check(
            "{{ messages[0].x|tojson(ensure_ascii=True) }}",
            json!([{"x": "é😀\u{7f}"}]),
            "\"\\u00e9\\ud83d\\ude00\\u007f\"",
        );
        check("{{ true }} {{ none }} {{ [1, 'a'] }}", json!([]), "True None [1, 'a']");
        check("{{ '{\"a\": 1}'|fromjson }}", json!([]), "{'a': 1}");
    }

    #[test]
    fn python_edges() {
        check(
            "{{ none is iterable }} {{ 'a' is iterable }} {{ [] is iterable }} {{ nothing|length }}",
            json!([]),
            "False True True 0",
        );
        check("{{ '{\n'|indent(2, first=true) }}|{{ 'a\nb\n\nc'|indent }}", json!([]), "  {\n|a\n    b\n\n    c");
        check("{{ 'a\nb'|indent('> ', true) }}", json!([]), "> a\n> b");
    }

    #[test]
    fn blocks_and_tags() {
        check("  {% if true %}\na{%- generation -%} b {%- endgeneration %}\n  {% endif %}\n", json!([]), "ab");
        check("{{ bos_token }}{% if add_generation_prompt %}go{% endif %}", json!([]), "<s>go");
        check("{{ messages[0].thinking }}", json!([{"reasoning": "hm"}]), "hm");
    }

    #[test]
    fn refusals_are_told_apart() {
        let render = |source: &str| {
            ChatTemplate::new(source, "", "").and_then(|t| t.render(&json!([]), &RenderOptions::default()))
        };
        assert_eq!(render("{{ raise_exception('no tools') }}"), Err(TemplateError::Raised("no tools".into())));
        let inside_macro = "{% macro m() %}{{ raise_exception('x') }}{% endmacro %}{{ m() }}";
        assert_eq!(render(inside_macro), Err(TemplateError::Raised("x".into())));
        assert!(matches!(render("{% if %}"), Err(TemplateError::Compile(_))));
        assert!(matches!(render("{{ messages.nothing.here }}"), Err(TemplateError::Render(_))));
    }

    #[test]
    fn formats_have_bounded_widths() {
        check("{{ '%5d|%-3s' | format(3, 'x') }}|{{ '%(a)s' | format(a=1) }}", json!([]), "    3|x  |1");
        check("{{ '{:>3}{a}'.format(1, a=2) }}", json!([]), "  12");
        let refused = [
            "{{ '%99999999999d' | format(1) }}",
            "{{ '%.99999999999f' | format(1.0) }}",
            "{{ '{:>99999999999}'.format(1) }}",
            "{{ 'a\nb' | indent('x' * 99999999) }}",
            "{{ [1, 2] | tojson(indent='x' * 99999999) }}",
        ];
        for source in refused {
            let template = ChatTemplate::new(source, "", "").expect("compiles");
            let rendered = template.render(&json!([]), &RenderOptions::default());
            assert!(matches!(rendered, Err(TemplateError::Render(_))), "{source}");
        }
    }

    /// Found by fuzzing.
    #[test]
    fn an_empty_string_in_reverse_is_an_error_and_no_panic() {
        let template = ChatTemplate::new("{{ messages[0].content[::-1] }}", "", "").expect("compiles");
        let render = |content: &str| template.render(&json!([{"content": content}]), &RenderOptions::default());
        assert_eq!(render("ab").as_deref(), Ok("ba"));
        assert_eq!(render(""), Err(TemplateError::Render("the template engine failed".into())));
    }

    #[test]
    fn hostile_templates_end() {
        let render = |source: &str| {
            ChatTemplate::new(source, "", "").and_then(|t| t.render(&json!([]), &RenderOptions::default()))
        };
        let deep = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}";
        assert!(matches!(render(deep), Err(TemplateError::Render(_))));
        let long = "{% for a in range(10000) %}{% for b in range(10000) %}{% set c = a %}{% endfor %}{% endfor %}";
        assert!(matches!(render(long), Err(TemplateError::Render(_))));
    }
}
