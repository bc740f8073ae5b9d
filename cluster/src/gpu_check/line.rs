//! What a phase's process tells the one that started it: a JSON object a line, so that what was found before a process dies is kept.
//!
//! Read [`Line`].

use serde_json::{Value, json};

/// One finding.
#[derive(Clone, PartialEq, Debug)]
pub enum Line {
    /// An operation was checked.
    Check {
        /// Operation and type.
        name: String,
        /// Random cases tried.
        cases: u64,
        /// Largest error as a part of what is allowed; `None` if it is no number.
        error: Option<f64>,
        /// What went wrong.
        failure: Option<String>,
    },
    /// Something was timed.
    Time {
        /// What, such as `gemm bf16 qkv m=2048 own`.
        name: String,
        /// How long it took.
        seconds: f64,
        /// Operations that it did; 0 if that says nothing.
        operations: f64,
        /// Bytes that it moved; 0 if that says nothing.
        bytes: f64,
    },
    /// Something else that a report should have.
    Fact {
        /// What.
        name: String,
        /// Its value.
        value: Value,
    },
    /// Something could not be done here.
    Skipped {
        /// What.
        name: String,
        /// Why.
        why: String,
    },
}

impl Line {
    /// A time without operations or bytes.
    pub fn seconds(name: impl Into<String>, seconds: f64) -> Self {
        Self::Time { name: name.into(), seconds, operations: 0.0, bytes: 0.0 }
    }

    /// Something that went well or not.
    pub fn verdict(name: impl Into<String>, failure: Option<String>) -> Self {
        Self::Check { name: name.into(), cases: 1, error: None, failure }
    }

    /// As it is sent and reported.
    pub fn json(&self) -> Value {
        match self {
            Self::Check { name, cases, error, failure } => {
                json!({"check": name, "cases": cases, "error": error, "failure": failure})
            }
            Self::Time { name, seconds, operations, bytes } => {
                json!({"name": name, "seconds": seconds, "operations": operations, "bytes": bytes})
            }
            Self::Fact { name, value } => json!({"fact": name, "value": value}),
            Self::Skipped { name, why } => json!({"skipped": name, "why": why}),
        }
    }

    /// What a line of a process's output says; `None` if it is talk.
    pub fn parse(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let word = |key: &str| value[key].as_str().map(str::to_owned);
        let number = |key: &str| value[key].as_f64();
        if let Some(name) = word("check") {
            let cases = value["cases"].as_u64()?;
            return Some(Self::Check { name, cases, error: number("error"), failure: word("failure") });
        }
        if let Some(name) = word("name") {
            let seconds = number("seconds").filter(|seconds| seconds.is_finite() && *seconds > 0.0)?;
            let of = |key| number(key).unwrap_or(0.0);
            return Some(Self::Time { name, seconds, operations: of("operations"), bytes: of("bytes") });
        }
        if let Some(name) = word("skipped") {
            return Some(Self::Skipped { name, why: word("why")? });
        }
        word("fact").map(|name| Self::Fact { name, value: value["value"].clone() })
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Check { name, cases, error, failure } => {
                let error = error.map_or(String::new(), |error| format!(", error {error:.1e} of what is allowed"));
                write!(f, "{name:<34} {cases:3} cases{error}: {}", failure.as_deref().unwrap_or("ok"))
            }
            Self::Time { name, seconds, operations, bytes } => {
                write!(f, "{name:<44} {:12.1} us", seconds * 1e6)?;
                if *operations > 0.0 {
                    write!(f, " {:9.2} TFLOP/s", operations / seconds / 1e12)?;
                }
                if *bytes > 0.0 {
                    write!(f, " {:9.1} GB/s", bytes / seconds / 1e9)?;
                }
                Ok(())
            }
            Self::Fact { name, value } => {
                write!(f, "{name}: {}", value.as_str().map_or(value.to_string(), str::to_owned))
            }
            Self::Skipped { name, why } => write!(f, "{name}: skipped: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_round_trip_and_talk_is_none() {
        let failure = Some("an error of 3 times what is allowed".into());
        for line in [
            Line::Check { name: "matmul Q4_K gemm".into(), cases: 4, error: Some(0.5), failure },
            Line::verdict("cluster mixed", None),
            Line::Time { name: "copy".into(), seconds: 0.25, operations: 0.0, bytes: 1e9 },
            Line::Fact { name: "torch".into(), value: json!("2.11") },
            Line::Skipped { name: "sanitizer".into(), why: "not here".into() },
        ] {
            assert_eq!(Line::parse(&line.json().to_string()), Some(line.clone()), "{line}");
        }
        for talk in ["", "========= ERROR SUMMARY: 0 errors", "3", r#"{"name":"x"}"#, r#"{"name":"x","seconds":0}"#] {
            assert_eq!(Line::parse(talk), None, "{talk}");
        }
        assert_eq!(Line::parse(r#"{"name":"a","seconds":2}"#), Some(Line::seconds("a", 2.0)));
    }
}
