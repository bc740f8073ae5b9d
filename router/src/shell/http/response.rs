//! Response bodies of chat and completions, whole and in chunks. Field order is OpenAI's.

use super::answer::{Delta, Finish, Scored, StopReason};
use super::logprobs::{ChatLogprobs, TextLogprobs};
use super::text_model::TextModel;
use super::tools::{CallPart, Calls};
use ridge_protocol::wire::{FinishReason, Receipt};
use serde::Serialize;

/// Which endpoint is answering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Dialect {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

/// What all objects of one answer share.
#[derive(Clone, Debug)]
pub(super) struct Head {
    /// Which endpoint.
    pub(super) dialect: Dialect,
    /// Ends with the request's id.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// As the client named it.
    pub(super) model: String,
    /// Changes when answers may.
    pub(super) fingerprint: String,
    /// Log-probabilities were asked for.
    pub(super) scored: bool,
    /// What every answer is, if it is calls.
    pub(super) calls: Option<Calls>,
}

/// A response or a chunk of one.
#[derive(Serialize)]
pub(super) struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<ChoiceBody<'a>>,
    /// Absent, `null`, or the counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ridge: Option<RidgeBody>,
}

/// Token counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct UsageBody {
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
    pub(super) total_tokens: u32,
    pub(super) prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Where prompt tokens came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct PromptTokensDetails {
    pub(super) cached_tokens: u32,
}

/// What only Ridge says, on request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct RidgeBody {
    /// `null` if every answer was cut at a stop string, before the cluster reported.
    pub(super) receipt: Option<Receipt>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum ChoiceBody<'a> {
    Chat {
        index: usize,
        #[serde(flatten)]
        part: ChatPart<'a>,
        logprobs: Option<ChatLogprobs>,
        finish_reason: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        stop_reason: Option<&'a StopReason>,
    },
    Text {
        index: usize,
        text: &'a str,
        logprobs: Option<TextLogprobs>,
        finish_reason: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        stop_reason: Option<&'a StopReason>,
    },
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum ChatPart<'a> {
    Delta(ChatDelta<'a>),
    Message(ChatMessage<'a>),
}

#[derive(Serialize)]
struct ChatDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

#[derive(Serialize)]
struct ChatMessage<'a> {
    role: &'static str,
    /// `null` if the answer is calls.
    content: Option<&'a str>,
    refusal: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A call, or in a chunk the next part of one.
#[derive(Serialize)]
struct ToolCall {
    /// In chunks only.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: ToolFunction,
}

#[derive(Serialize)]
struct ToolFunction {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl Head {
    fn body<'a>(&'a self, object: &'static str, choices: Vec<ChoiceBody<'a>>) -> Body<'a> {
        Body {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage: None,
            ridge: None,
        }
    }

    fn chunk<'a>(&'a self, choices: Vec<ChoiceBody<'a>>, usage: Option<Option<UsageBody>>) -> Body<'a> {
        let object = match self.dialect {
            Dialect::Chat => "chat.completion.chunk",
            Dialect::Completion => "text_completion",
        };
        Body { usage, ..self.body(object, choices) }
    }

    /// The chunk before a choice's first text; completions have none.
    pub(super) fn opening(&self, index: usize, usage: Option<Option<UsageBody>>) -> Option<Body<'_>> {
        let content = self.calls.is_none().then_some("");
        let delta = ChatDelta { role: Some("assistant"), content, tool_calls: Vec::new() };
        (self.dialect == Dialect::Chat).then(|| self.chunk(vec![self.chat_delta(index, delta, None, None)], usage))
    }

    /// The chunks of one part of an answer: text or parts of calls, then (in chat) the end on its own.
    pub(super) fn parts<'a>(
        &'a self,
        model: &dyn TextModel,
        index: usize,
        delta: &'a Delta,
        calls: Vec<CallPart>,
        usage: Option<Option<UsageBody>>,
    ) -> impl Iterator<Item = Body<'a>> {
        let finish = delta.finish.as_ref();
        let choices = match self.dialect {
            Dialect::Completion => vec![self.text_choice(model, index, &delta.text, &delta.scored, finish)],
            Dialect::Chat => {
                let content = self.calls.is_none().then_some(delta.text.as_str());
                let said = content.is_some_and(|text| !text.is_empty()) || !calls.is_empty();
                let shown = (said || !delta.scored.is_empty()).then(|| {
                    let logprobs = self.scored.then(|| ChatLogprobs::new(model, &delta.scored));
                    let call = |part: CallPart| ToolCall { index: Some(part.index), ..self.tool_call(index, part) };
                    let tool_calls = calls.into_iter().map(call).collect();
                    self.chat_delta(index, ChatDelta { role: None, content, tool_calls }, logprobs, None)
                });
                let nothing = ChatDelta { role: None, content: None, tool_calls: Vec::new() };
                let end = finish.map(|finish| self.chat_delta(index, nothing, None, Some(finish)));
                shown.into_iter().chain(end).collect()
            }
        };
        choices.into_iter().map(move |choice| self.chunk(vec![choice], usage))
    }

    /// The chunk after all choices.
    pub(super) fn tail(&self, usage: Option<UsageBody>, ridge: Option<RidgeBody>) -> Body<'_> {
        Body { ridge, ..self.chunk(Vec::new(), usage.map(Some)) }
    }

    /// The response of a request that does not stream.
    pub(super) fn whole<'a>(
        &'a self,
        model: &dyn TextModel,
        answers: &'a [Delta],
        usage: UsageBody,
        ridge: Option<RidgeBody>,
    ) -> Body<'a> {
        let choices = answers.iter().enumerate().map(|(index, answer)| {
            let finish = answer.finish.as_ref();
            match self.dialect {
                Dialect::Completion => self.text_choice(model, index, &answer.text, &answer.scored, finish),
                Dialect::Chat => ChoiceBody::Chat {
                    index,
                    part: ChatPart::Message(self.message(index, &answer.text)),
                    logprobs: self.scored.then(|| ChatLogprobs::new(model, &answer.scored)),
                    finish_reason: finish.map(|finish| self.finish_reason(finish)),
                    stop_reason: finish.and_then(|finish| finish.stop_reason.as_ref()),
                },
            }
        });
        let object = match self.dialect {
            Dialect::Chat => "chat.completion",
            Dialect::Completion => "text_completion",
        };
        Body { usage: Some(Some(usage)), ridge, ..self.body(object, choices.collect()) }
    }

    fn message<'a>(&self, choice: usize, text: &'a str) -> ChatMessage<'a> {
        let parts = self.calls.as_ref().map(|calls| calls.read(text));
        let content = parts.is_none().then_some(text);
        let tool_calls = parts.into_iter().flatten().map(|part| self.tool_call(choice, part)).collect();
        ChatMessage { role: "assistant", content, refusal: None, tool_calls }
    }

    /// Its id is the answer's and its place there, so that it is the same in every reading of a stream.
    fn tool_call(&self, choice: usize, part: CallPart) -> ToolCall {
        let CallPart { index, name, arguments } = part;
        ToolCall {
            index: None,
            id: name.as_ref().map(|_| format!("call-{}-{choice}-{index}", self.id)),
            r#type: name.as_ref().map(|_| "function"),
            function: ToolFunction { name, arguments },
        }
    }

    fn chat_delta<'a>(
        &self,
        index: usize,
        delta: ChatDelta<'a>,
        logprobs: Option<ChatLogprobs>,
        finish: Option<&'a Finish>,
    ) -> ChoiceBody<'a> {
        ChoiceBody::Chat {
            index,
            part: ChatPart::Delta(delta),
            logprobs,
            finish_reason: finish.map(|finish| self.finish_reason(finish)),
            stop_reason: finish.and_then(|finish| finish.stop_reason.as_ref()),
        }
    }

    /// As OpenAI has it: `tool_calls` where the model chose among tools, `stop` where the request named one.
    fn finish_reason(&self, finish: &Finish) -> &'static str {
        match (finish.reason, &self.calls) {
            (FinishReason::Length, _) => "length",
            (FinishReason::Stop, Some(Calls::Required)) => "tool_calls",
            (FinishReason::Stop, _) => "stop",
        }
    }

    fn text_choice<'a>(
        &self,
        model: &dyn TextModel,
        index: usize,
        text: &'a str,
        scored: &[Scored],
        finish: Option<&'a Finish>,
    ) -> ChoiceBody<'a> {
        ChoiceBody::Text {
            index,
            text,
            logprobs: self.scored.then(|| TextLogprobs::new(model, scored)),
            finish_reason: finish.map(|finish| self.finish_reason(finish)),
            stop_reason: finish.and_then(|finish| finish.stop_reason.as_ref()),
        }
    }
}
