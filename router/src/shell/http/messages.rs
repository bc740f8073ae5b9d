//! A conversation as clients send it to what chat templates read: content as one string, arguments as objects.

use super::error::ApiError;
use super::fields::Fields;
use super::text_model::TextModel;
use super::tools::{Calls, Tools};
use ridge_protocol::Grammar;
use serde_json::{Map, Value};

/// The parts of a request that the chat template sees.
#[derive(Debug)]
pub(super) struct Conversation {
    messages: Value,
    tools: Tools,
    add_generation_prompt: bool,
    /// The last message is the beginning of the answer: the prompt ends inside it.
    continue_final_message: bool,
    extra: Map<String, Value>,
}

impl Conversation {
    /// Reads `messages`, `tools` and the template's options.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        fields.refuse("chat_template", "the server's template is used")?;
        fields.refuse("functions", "use 'tools'")?;
        let messages: Vec<Value> = fields.require("messages")?;
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "'messages' must not be empty"));
        }
        let messages = messages.into_iter().enumerate().map(|(at, message)| normalise(at, message));
        let messages = Value::Array(messages.collect::<Result<_, _>>()?);
        let continue_final_message = fields.take("continue_final_message")?.unwrap_or(false);
        let add_generation_prompt = fields.take("add_generation_prompt")?;
        if continue_final_message && add_generation_prompt == Some(true) {
            let message = "'continue_final_message' and 'add_generation_prompt' cannot both be true";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        Ok(Self {
            messages,
            tools: Tools::take(fields)?,
            add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            extra: fields.take("chat_template_kwargs")?.unwrap_or_default(),
        })
    }

    /// How the answer spells the calls that it must be, and what makes it do so.
    pub(super) fn take_forced(&mut self) -> Option<(Calls, Grammar)> {
        self.tools.forced.take()
    }

    /// The prompt.
    pub(super) fn render(&self, model: &dyn TextModel) -> Result<String, ApiError> {
        let mut prompt = model
            .render_chat(&self.messages, self.tools.offered.as_ref(), self.add_generation_prompt, &self.extra)
            .map_err(|error| {
                ApiError::invalid("messages", format!("The chat template refused the messages: {error}"))
            })?;
        if self.continue_final_message {
            let last = self.messages.as_array().and_then(|all| all.last()).and_then(|last| last.get("content"));
            let content = last.and_then(Value::as_str).unwrap_or_default().trim();
            let end = prompt.rfind(content).filter(|_| !content.is_empty()).map(|at| at + content.len());
            let message = "'continue_final_message' needs a last message whose text the chat template keeps";
            prompt.truncate(end.ok_or_else(|| ApiError::invalid("continue_final_message", message))?);
        }
        Ok(prompt)
    }
}

/// One message: its role checked, its content flattened, the rest as it was.
fn normalise(at: usize, message: Value) -> Result<Value, ApiError> {
    let param = format!("messages[{at}]");
    let Value::Object(mut message) = message else {
        return Err(ApiError::invalid(&param, format!("'{param}' must be an object with 'role' and 'content'")));
    };
    if message.get("role").and_then(Value::as_str).unwrap_or_default().is_empty() {
        let param = format!("{param}.role");
        return Err(ApiError::invalid(&param, format!("'{param}' must be a string such as 'user'")));
    }
    let content = match message.shift_remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => flatten(&format!("{param}.content"), &parts)?,
        // An assistant message that only calls tools has no text.
        None | Some(Value::Null) if message.get("tool_calls").is_some_and(|calls| !calls.is_null()) => String::new(),
        _ => {
            let param = format!("{param}.content");
            let message = format!("'{param}' must be a string or an array of parts of type 'text'");
            return Err(ApiError::invalid(&param, message));
        }
    };
    message.insert("content".into(), Value::String(content));
    for (call, tool_call) in
        message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten().enumerate()
    {
        parse_arguments(&format!("{param}.tool_calls[{call}].function.arguments"), tool_call)?;
    }
    Ok(Value::Object(message))
}

/// Text parts joined by line ends, as vLLM does it.
fn flatten(param: &str, parts: &[Value]) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (at, part) in parts.iter().enumerate() {
        let param = format!("{param}[{at}]");
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text") | None, Some(text)) => texts.push(text),
            (Some("text"), None) => {
                return Err(ApiError::invalid(&param, format!("'{param}.text' must be a string")));
            }
            (kind, _) => {
                let kind = kind.unwrap_or("unknown");
                let message = format!("'{param}' is of type '{kind}', but this model reads text only");
                return Err(ApiError::invalid(&param, message));
            }
        }
    }
    Ok(texts.join("\n"))
}

/// OpenAI carries arguments as a string of JSON, templates print them as an object.
fn parse_arguments(param: &str, tool_call: &mut Value) -> Result<(), ApiError> {
    let Some(arguments) = tool_call.get_mut("function").and_then(|function| function.get_mut("arguments")) else {
        return Ok(());
    };
    if let Value::String(text) = arguments {
        let text = if text.trim().is_empty() { "{}" } else { text.as_str() };
        let parsed = serde_json::from_str(text)
            .map_err(|error| ApiError::invalid(param, format!("'{param}' is not valid JSON: {error}")))?;
        *arguments = parsed;
    }
    Ok(())
}
