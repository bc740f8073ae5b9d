//! The experiment: clients that decode all the time, and long prompts that arrive in between.
//!
//! ```text
//! warm up:  one request of each kind
//! quiet:    every client: complete a new prompt, again and again, for --seconds
//! loaded:   the same, while a long prompt arrives every --every seconds; until --seconds are over and all are answered
//! ```
//!
//! At the end of a phase the clients wait for their next token, which ends the latency that is running, and hang up.
//! Read [`Plan`], [`Target`] and [`run_phase`].

use super::prompts::{Prompts, Random, Stream};
use crate::client::Client;
use anyhow::{Context, bail, ensure};
use std::ops::ControlFlow;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

/// Long prompts of a phase, each of which may have a thread of its own.
const LONG_PROMPTS_MAX: usize = 1000;
/// How long a server gets to put away what was hung up on.
const SETTLE: Duration = Duration::from_millis(500);

/// What is done to every server.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// Clients that decode.
    pub clients: usize,
    /// Tokens of their prompts.
    pub prompt_tokens: usize,
    /// Tokens of their answers.
    pub gen_tokens: usize,
    /// Tokens of long prompts.
    pub long_prompt_tokens: usize,
    /// Tokens of the answers to them.
    pub long_gen_tokens: usize,
    /// Between two long prompts.
    pub every: Duration,
    /// Least length of a phase.
    pub seconds: Duration,
    /// Key of the prompts.
    pub seed: u64,
}

impl Plan {
    /// Says what would make the experiment meaningless.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(self.gen_tokens >= 2, "--gen-tokens {}: one token has no latency to the next", self.gen_tokens);
        let (every, seconds) = (self.every.as_secs_f64(), self.seconds.as_secs_f64());
        ensure!(every < seconds, "--every {every} leaves no long prompt within --seconds {seconds}");
        let arrivals = self.arrivals();
        ensure!(
            arrivals <= LONG_PROMPTS_MAX,
            "--every {every} makes {arrivals} long prompts; {LONG_PROMPTS_MAX} are the most"
        );
        Ok(())
    }

    /// Long prompts of the loaded phase: at `every`, twice `every` and so on, before `seconds` are over.
    pub fn arrivals(&self) -> usize {
        (self.seconds.as_secs_f64() / self.every.as_secs_f64()).ceil() as usize - 1
    }
}

/// A server, and how to ask it.
#[derive(Debug)]
pub struct Target {
    /// Talks to it.
    pub client: Client,
    /// The model's name in its API.
    pub model: String,
    /// Makes its prompts.
    pub prompts: Prompts,
}

/// What was seen in a phase. Times are in milliseconds.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Seen {
    /// Length of the phase.
    pub seconds: f64,
    /// Requests of the decoding clients.
    pub requests: u64,
    /// Tokens that came, of all requests.
    pub tokens: u64,
    /// Between two arrivals of tokens of a decoding client.
    pub itl_ms: Vec<f64>,
    /// From the request to its first token, of the decoding clients.
    pub ttft_ms: Vec<f64>,
    /// The same of the long prompts.
    pub long_ttft_ms: Vec<f64>,
    /// The longest of the decoding clients' prompts, as the server counted it.
    pub prompt_tokens: Option<u64>,
    /// The longest of the long prompts, as the server counted it.
    pub long_prompt_tokens: Option<u64>,
}

impl Seen {
    fn merge(&mut self, other: Seen) {
        self.requests += other.requests;
        self.tokens += other.tokens;
        self.itl_ms.extend(other.itl_ms);
        self.ttft_ms.extend(other.ttft_ms);
        self.long_ttft_ms.extend(other.long_ttft_ms);
        self.prompt_tokens = self.prompt_tokens.max(other.prompt_tokens);
        self.long_prompt_tokens = self.long_prompt_tokens.max(other.long_prompt_tokens);
    }
}

/// One request of each kind, not counted: it pages weights in, and shows at once what the server refuses.
pub fn warm_up(target: &Target, plan: &Plan) -> anyhow::Result<()> {
    const WARM_UP_TOKENS: usize = 8;
    let mut random = Random::new(plan.seed, Stream::WarmUp);
    for (prompt_tokens, max_tokens) in
        [(plan.prompt_tokens, plan.gen_tokens.min(WARM_UP_TOKENS)), (plan.long_prompt_tokens, plan.long_gen_tokens)]
    {
        let prompt = target.prompts.draw(&mut random, prompt_tokens);
        let mut came = false;
        target
            .client
            .complete(&target.model, &prompt, max_tokens, &mut |_| {
                came = true;
                ControlFlow::Continue(())
            })
            .with_context(|| format!("a prompt of {prompt_tokens} tokens, to warm up"))?;
        ensure!(came, "{}: no token came for a prompt of {prompt_tokens} tokens", target.client.base());
    }
    Ok(())
}

/// Runs a phase, with or without long prompts.
pub fn run_phase(target: &Target, plan: &Plan, loaded: bool) -> anyhow::Result<Seen> {
    let control = Control::default();
    let started = Instant::now();
    let mut seen = Seen::default();
    std::thread::scope(|scope| {
        let start = Start { scope, control: &control };
        let clients: Vec<_> = (0..plan.clients)
            .filter_map(|index| start.spawn(move |control| decode(target, plan, index, loaded, control)))
            .collect();
        let mut longs = Vec::new();
        for index in 0..if loaded { plan.arrivals() } else { 0 } {
            if !control.sleep_until(started + plan.every * (index as u32 + 1)) {
                break;
            }
            longs.extend(start.spawn(move |control| prefill(target, plan, index, control)));
        }
        control.sleep_until(started + plan.seconds);
        let mut collect = |handles: Vec<ScopedJoinHandle<'_, Seen>>| {
            handles.into_iter().for_each(|handle| seen.merge(handle.join().expect("it returns its errors")));
        };
        collect(longs);
        control.stop();
        collect(clients);
    });
    seen.seconds = started.elapsed().as_secs_f64();
    if let Some(error) = control.into_error() {
        return Err(error);
    }
    if seen.itl_ms.is_empty() {
        bail!("{}: no answer had a second token (is ignore_eos supported?)", target.client.base());
    }
    std::thread::sleep(SETTLE);
    Ok(seen)
}

/// A client that completes one new prompt after the other.
fn decode(target: &Target, plan: &Plan, index: usize, loaded: bool, control: &Control) -> anyhow::Result<Seen> {
    let mut random = Random::new(plan.seed, Stream::Client { index, loaded });
    let mut seen = Seen::default();
    while control.goes_on().is_continue() {
        let prompt = target.prompts.draw(&mut random, plan.prompt_tokens);
        let begin = Instant::now();
        let mut last = None;
        let answer = target.client.complete(&target.model, &prompt, plan.gen_tokens, &mut |now| {
            match last.replace(now) {
                None => seen.ttft_ms.push(ms(now - begin)),
                Some(last) => seen.itl_ms.push(ms(now - last)),
            }
            control.goes_on()
        })?;
        // Asking on without a token would be asking as fast as the server refuses.
        ensure!(last.is_some(), "{}: an answer had no token", target.client.base());
        seen.requests += 1;
        seen.tokens += answer.tokens;
        seen.prompt_tokens = seen.prompt_tokens.max(answer.prompt_tokens);
    }
    Ok(seen)
}

/// A long prompt, from its arrival to its last token.
fn prefill(target: &Target, plan: &Plan, index: usize, control: &Control) -> anyhow::Result<Seen> {
    let prompt = target.prompts.draw(&mut Random::new(plan.seed, Stream::Long(index)), plan.long_prompt_tokens);
    let begin = Instant::now();
    let mut first = None;
    let answer = target.client.complete(&target.model, &prompt, plan.long_gen_tokens, &mut |now| {
        first.get_or_insert(now);
        control.goes_on()
    })?;
    let first = first.with_context(|| format!("{}: a long prompt's answer had no token", target.client.base()))?;
    Ok(Seen {
        tokens: answer.tokens,
        long_ttft_ms: vec![ms(first - begin)],
        long_prompt_tokens: answer.prompt_tokens,
        ..Seen::default()
    })
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Starts the threads of a phase.
struct Start<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    control: &'scope Control,
}

impl<'scope> Start<'scope, '_> {
    /// A thread whose error ends the phase.
    fn spawn(
        &self,
        work: impl FnOnce(&Control) -> anyhow::Result<Seen> + Send + 'scope,
    ) -> Option<ScopedJoinHandle<'scope, Seen>> {
        let control = self.control;
        let run = move || {
            work(control).unwrap_or_else(|error| {
                control.fail(error);
                Seen::default()
            })
        };
        let spawned = Builder::new().name("bench-client".into()).spawn_scoped(self.scope, run);
        spawned.map_err(|error| control.fail(anyhow::Error::new(error).context("cannot start a thread"))).ok()
    }
}

/// Whether a phase goes on, and what ended it before its time.
#[derive(Default)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stopped: bool,
    /// The first: others follow from it.
    error: Option<anyhow::Error>,
}

impl Control {
    fn goes_on(&self) -> ControlFlow<()> {
        let stopped = self.state.lock().unwrap_or_else(PoisonError::into_inner).stopped;
        if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn stop(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
        self.changed.notify_all();
    }

    fn fail(&self, error: anyhow::Error) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).error.get_or_insert(error);
        self.stop();
    }

    /// False if the phase was stopped meanwhile.
    fn sleep_until(&self, at: Instant) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let left = at.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(state, left, |state| !state.stopped);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !state.stopped
    }

    fn into_error(self) -> Option<anyhow::Error> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(every: f64, seconds: f64) -> Plan {
        Plan {
            clients: 1,
            prompt_tokens: 1,
            gen_tokens: 2,
            long_prompt_tokens: 1,
            long_gen_tokens: 1,
            every: Duration::from_secs_f64(every),
            seconds: Duration::from_secs_f64(seconds),
            seed: 0,
        }
    }

    #[test]
    fn long_prompts_arrive_before_the_end() {
        let check =
            |every, seconds, want: usize| assert_eq!(plan(every, seconds).arrivals(), want, "{every} {seconds}");
        check(8.0, 60.0, 7);
        check(8.0, 64.0, 7);
        check(8.0, 64.5, 8);
        check(8.0, 8.5, 1);
    }

    #[test]
    fn meaningless_plans_are_refused() {
        let check = |plan: Plan, wanted: &str| {
            let error = plan.check().expect_err("is refused").to_string();
            assert!(error.contains(wanted), "{wanted}: {error}");
        };
        assert!(plan(8.0, 60.0).check().is_ok());
        check(plan(8.0, 8.0), "--every 8");
        check(plan(0.001, 60.0), "59999 long prompts");
        check(Plan { gen_tokens: 1, ..plan(8.0, 60.0) }, "--gen-tokens 1");
    }

    #[test]
    fn the_first_error_stops_everything() {
        let control = Control::default();
        assert!(control.sleep_until(Instant::now() + Duration::from_millis(1)));
        control.fail(anyhow::anyhow!("first"));
        control.fail(anyhow::anyhow!("second"));
        assert!(control.goes_on().is_break());
        assert!(!control.sleep_until(Instant::now() + Duration::from_secs(600)));
        assert_eq!(control.into_error().expect("one").to_string(), "first");
    }
}
