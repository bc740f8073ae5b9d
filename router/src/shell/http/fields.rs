//! Reading a JSON body parameter by parameter, so that an error names the parameter.
//!
//! `serde` alone would say "invalid type: string, expected u32 at line 1 column 80"; clients want to know that it was
//! `max_tokens`. A parameter that is `null` is as good as absent. What nobody took is ignored and logged.

use super::error::ApiError;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The parameters of a body that are still to be read.
#[derive(Debug)]
pub(super) struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a body; a syntax error names line and column.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value = serde_json::from_slice(body).map_err(|error| {
            ApiError::bad_request(format!("We could not parse the JSON body of your request: {error}"))
        })?;
        match value {
            Value::Object(map) => Ok(Self { map }),
            _ => Err(ApiError::bad_request("The body of the request must be a JSON object")),
        }
    }

    /// An optional parameter.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.map.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|error| ApiError::invalid(name, format!("Invalid value for '{name}': {error}"))),
        }
    }

    /// A parameter that must be there.
    pub(super) fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::invalid(name, format!("Missing required parameter: '{name}'")))
    }

    /// Whether a parameter was sent and not yet taken.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// Refuses a parameter that would change the answer and that Ridge does not know how to honour.
    pub(super) fn refuse(&self, name: &str, why: &str) -> Result<(), ApiError> {
        if self.has(name) { Err(ApiError::invalid(name, format!("'{name}' is not supported: {why}"))) } else { Ok(()) }
    }

    /// Logs what was not taken. Clients send all sorts of hints meant for other servers.
    pub(super) fn ignore_rest(self) {
        for name in self.map.keys() {
            tracing::debug!(parameter = %name.escape_debug(), "ignored an unknown request parameter");
        }
    }
}
