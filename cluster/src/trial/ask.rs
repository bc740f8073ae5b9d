//! One streamed request: every piece is compared with the oracle as it comes. Read [`ask`].

use super::STREAM_TIMEOUT;
use super::cases::{Case, Expected};
use crate::client::{Client, End, error_message};
use anyhow::{anyhow, bail};
use serde_json::Value;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// How long a client stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stay {
    /// To the end of the answer.
    ToTheEnd,
    /// Until so many pieces have come.
    Pieces(u64),
    /// So long, wherever the answer is.
    Time(Duration),
}

/// What came of it.
#[derive(Clone, PartialEq, Debug)]
pub enum Verdict {
    /// The oracle's answer, from the first token to the last.
    Same,
    /// The client hung up; so far it was the oracle's.
    Left,
    /// Something else, in words.
    Different(String),
}

/// What has come so far.
#[derive(Debug, Default)]
pub struct Heard {
    text: String,
    tokens: u64,
    scores: Vec<(String, f32)>,
    finish: Option<String>,
}

/// Asks for `body`, which differs from the case's own at most in what does not change the answer. `on_piece` is told how many
/// tokens have come, and when.
pub fn ask(client: &Client, case: &Case, body: &Value, stay: Stay, on_piece: &mut dyn FnMut(u64, Instant)) -> Verdict {
    let mut heard = Heard::default();
    let mut pieces = 0;
    let limit = if let Stay::Time(time) = stay { time } else { STREAM_TIMEOUT };
    let ended = client.stream("/v1/completions", body, limit, &mut |event, now| {
        let before = heard.tokens;
        heard.take(&event)?;
        heard.compare_any(case)?;
        if heard.tokens > before {
            pieces += 1;
            on_piece(heard.tokens, now);
        }
        Ok(if stay == Stay::Pieces(pieces) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    });
    let different = |why: String| Verdict::Different(format!("{}: {why}", case.what));
    match ended {
        Ok(End::Done) => match heard.compare_whole(&case.expected) {
            Ok(()) => Verdict::Same,
            Err(_) if case.instead.as_ref().is_some_and(|instead| heard.compare_whole(instead).is_ok()) => {
                Verdict::Same
            }
            Err(error) => different(error.to_string()),
        },
        Ok(End::HungUp) => Verdict::Left,
        Ok(End::Timeout) if matches!(stay, Stay::Time(_)) => Verdict::Left,
        ended => different(broken(ended, heard.tokens)),
    }
}

/// What is wrong with a stream that did not come to its end.
fn broken(ended: anyhow::Result<End>, tokens: u64) -> String {
    match ended {
        Ok(End::Timeout) => format!("hangs: {tokens} tokens after {} s", STREAM_TIMEOUT.as_secs()),
        Ok(_) => format!("the stream broke off after {tokens} tokens"),
        Err(error) => format!("{error:#}, after {tokens} tokens"),
    }
}

/// As [`ask`], to the end, for an answer that is compared only until `on_piece` says that it was struck; from the beginning if
/// `certain`. What came is for the caller to judge.
pub fn hear(
    client: &Client,
    case: &Case,
    mut certain: bool,
    on_piece: &mut dyn FnMut(u64) -> bool,
) -> Result<Heard, String> {
    let mut heard = Heard::default();
    let ended = client.stream("/v1/completions", &case.body, STREAM_TIMEOUT, &mut |event, _| {
        let before = heard.tokens;
        heard.take(&event)?;
        if certain {
            heard.compare_any(case)?;
        }
        certain &= heard.tokens == before || !on_piece(heard.tokens);
        Ok(ControlFlow::Continue(()))
    });
    match ended {
        Ok(End::Done) => Ok(heard),
        ended => Err(format!("{}: {}", case.what, broken(ended, heard.tokens))),
    }
}

impl Heard {
    /// Whether it is this answer, from the first token to the last.
    pub fn is(&self, expected: &Expected) -> bool {
        self.compare_whole(expected).is_ok()
    }

    fn take(&mut self, event: &Value) -> anyhow::Result<()> {
        if let Some(message) = error_message(event) {
            bail!("the server reports: {message}");
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            self.tokens = tokens;
        }
        let choice = &event["choices"][0];
        self.text.push_str(choice["text"].as_str().unwrap_or_default());
        if let Some(finish) = choice["finish_reason"].as_str() {
            self.finish = Some(finish.to_owned());
        }
        let list = |key: &str| choice["logprobs"][key].as_array().into_iter().flatten();
        let scored = list("tokens").zip(list("token_logprobs"));
        self.scores
            .extend(scored.filter_map(|(text, score)| Some((text.as_str()?.to_owned(), score.as_f64()? as f32))));
        Ok(())
    }

    /// What came is how an answer begins that may come.
    fn compare_any(&self, case: &Case) -> anyhow::Result<()> {
        match &case.instead {
            Some(instead) if self.compare(instead).is_ok() => Ok(()),
            _ => self.compare(&case.expected),
        }
    }

    /// What came is how the oracle's answer begins.
    fn compare(&self, expected: &Expected) -> anyhow::Result<()> {
        if !expected.text.starts_with(&self.text) {
            return Err(difference("text", &self.text, &expected.text));
        }
        if self.tokens > expected.ids.len() as u64 {
            bail!("{} tokens came where the oracle has {}", self.tokens, expected.ids.len());
        }
        if let Some(scores) = &expected.scores
            && !scores.starts_with(&self.scores)
        {
            let at = scores.iter().zip(&self.scores).take_while(|(want, got)| want == got).count();
            bail!("token {at} has {:?} where the oracle has {:?}", self.scores.get(at), scores.get(at));
        }
        Ok(())
    }

    fn compare_whole(&self, expected: &Expected) -> anyhow::Result<()> {
        self.compare(expected)?;
        let scores = expected.scores.as_ref().map_or(0, Vec::len);
        let counts = [
            ("characters", self.text.chars().count(), expected.text.chars().count()),
            ("tokens", self.tokens as usize, expected.ids.len()),
            ("log-probabilities", self.scores.len(), scores),
        ];
        for (name, got, want) in counts {
            if got != want {
                bail!("the answer ends after {got} {name} where the oracle has {want}");
            }
        }
        let finish = self.finish.as_deref().unwrap_or("nothing");
        if finish != expected.finish {
            bail!("the answer ends with {finish} where the oracle has {}", expected.finish);
        }
        Ok(())
    }
}

fn difference(name: &str, got: &str, want: &str) -> anyhow::Error {
    let at = got.chars().zip(want.chars()).take_while(|(got, want)| got == want).count();
    let rest = |text: &str| text.chars().skip(at).take(40).collect::<String>();
    anyhow!("{name} differs at character {at}: {:?} where the oracle has {:?}", rest(got), rest(want))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn expected() -> Expected {
        let scores = vec![("a".to_owned(), -0.5), ("b".to_owned(), -1.5)];
        Expected { ids: vec![1, 2], text: "ab".into(), finish: "length", scores: Some(scores) }
    }

    fn hear(events: &[Value]) -> Result<(), String> {
        let mut heard = Heard::default();
        for event in events {
            heard.take(event).map_err(|error| error.to_string())?;
            heard.compare(&expected()).map_err(|error| error.to_string())?;
        }
        heard.compare_whole(&expected()).map_err(|error| error.to_string())
    }

    fn piece(text: &str, tokens: u64, score: f32, finish: Option<&str>) -> Value {
        let logprobs = json!({"tokens": [text], "token_logprobs": [score]});
        let choice = json!({"text": text, "logprobs": logprobs, "finish_reason": finish});
        json!({"choices": [choice], "usage": {"completion_tokens": tokens}})
    }

    #[test]
    fn every_difference_is_noticed() {
        let first = || piece("a", 1, -0.5, None);
        let last = || piece("b", 2, -1.5, Some("length"));
        assert_eq!(hear(&[first(), last()]), Ok(()));
        let wrong = |events: &[Value], why: &str| {
            let error = hear(events).expect_err(why);
            assert!(error.contains(why), "{error}");
        };
        wrong(&[first(), piece("c", 2, -1.5, Some("length"))], "text differs at character 1: \"c\"");
        wrong(&[first()], "ends after 1 characters");
        wrong(&[first(), first()], "text differs");
        wrong(&[first(), piece("b", 3, -1.5, None)], "3 tokens came");
        wrong(&[first(), piece("b", 1, -1.5, Some("length"))], "ends after 1 tokens");
        wrong(&[first(), piece("b", 2, -1.25, Some("length"))], "token 1 has");
        wrong(&[first(), piece("b", 2, -1.5, Some("stop"))], "ends with stop");
        wrong(&[first(), json!({"error": {"message": "broken"}})], "reports: broken");
    }
}
