//! One recording, replayed: the machine is built as it was, told what it was told, and what it answers is compared.

use ridge_protocol::Instant;
use ridge_protocol::record::{Answer, Ending, Frames, Header, Listener, Record, Recordable, RecordingError};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// One call and what came of it.
#[derive(Debug)]
pub struct Call<'a, M: Recordable> {
    /// From 1.
    pub number: u64,
    /// Machine time.
    pub now: Instant,
    /// `None` is a timeout.
    pub input: Option<&'a M::Input>,
    /// What the machine says now.
    pub outputs: &'a [M::Output],
    /// When it wants to be woken now.
    pub timeout: Option<Instant>,
}

/// How a replay went.
#[derive(Debug)]
pub struct Replayed<M> {
    /// The machine after its last call; `None` if it panicked.
    pub machine: Option<M>,
    /// Calls made.
    pub calls: u64,
    /// Times of the first and the last of them.
    pub span: Option<(Instant, Instant)>,
    /// Why it is over.
    pub end: End,
}

/// Why a replay is over.
#[derive(Debug)]
pub enum End {
    /// The recording says that it ends.
    Said(Ending),
    /// It does not: its process was killed. The call that it ends after, or within, has no answer to compare with.
    Unsaid,
    /// As many calls were made as were wanted.
    Wanted,
    /// The machine panics, and the recording ends there: its process panicked too, or was killed.
    Panicked(String),
    /// The machine answers otherwise than it did. Boxed because it is rare and large.
    Diverged(Box<Divergence>),
    /// It cannot be read on.
    Unreadable(RecordingError),
}

/// The first call that is answered otherwise.
#[derive(Debug)]
pub struct Divergence {
    /// From 1.
    pub call: u64,
    /// Its time.
    pub now: Instant,
    /// Its input, as `Debug` prints it; `None` is a timeout.
    pub input: Option<String>,
    /// What the machine answered when it was recorded.
    pub recorded: Answer,
    /// What it does now.
    pub present: Present,
}

/// What a machine does where it should have answered as recorded.
#[derive(Debug)]
pub enum Present {
    /// It says this.
    Answer {
        /// Up to where the recorded shell stopped asking, or all it has.
        outputs: Vec<String>,
        /// When it wants to be woken.
        timeout: Option<Instant>,
    },
    /// It panics with this message.
    Panic(String),
}

/// Replays what follows `header` for up to `until` calls; `each` sees every call that was answered as recorded, and the last
/// one whatever came of it, unless the machine panicked.
pub fn replay<M: Recordable, R: Read>(
    mut frames: Frames<R>,
    header: &Header,
    until: u64,
    mut each: impl FnMut(&Call<'_, M>) -> std::io::Result<()>,
) -> std::io::Result<Replayed<M>> {
    assert_eq!(header.machine, M::KIND, "the caller looked");
    let over = |end| Replayed { machine: None, calls: 0, span: None, end };
    let at = frames.position();
    let config = match frames.read::<M::Config>() {
        Ok(Some(config)) => config,
        Ok(None) => return Ok(over(End::Unreadable(RecordingError::CutOff(frames.position())))),
        Err(error) => return Ok(over(End::Unreadable(error))),
    };
    let mut machine = match quietly(|| M::build(config)) {
        Ok(machine) => machine,
        Err(message) => {
            let what = format!("the machine cannot be built as it was: {message}");
            return Ok(over(End::Unreadable(RecordingError::Damaged { at, what })));
        }
    };
    let mut replayed = over(End::Wanted);
    while replayed.calls < until {
        let at = frames.position();
        let (now, input) = match frames.read() {
            Ok(Some(Record::Input { now, input })) => (now, Some(input)),
            Ok(Some(Record::Timeout { now })) => (now, None),
            Ok(Some(Record::End(ending))) => {
                replayed.end = End::Said(ending);
                break;
            }
            Ok(Some(Record::Answer(_))) => {
                replayed.end = out_of_order(at, "an answer without a call");
                break;
            }
            other => {
                replayed.end = ended_without_a_word(other);
                break;
            }
        };
        replayed.calls += 1;
        replayed.span = Some((replayed.span.map_or(now, |(first, _)| first), now));
        let kept = input.clone();
        let called = quietly(|| match input {
            Some(input) => machine.handle(now, input),
            None => machine.handle_timeout(now),
        });
        let at = frames.position();
        let recorded = match frames.read::<Record<M::Input>>() {
            Ok(Some(Record::Answer(answer))) => Ok(answer),
            Ok(Some(Record::End(ending))) => Err(End::Said(ending)),
            Ok(Some(_)) => Err(out_of_order(at, "a call while the one before it has no answer")),
            other => Err(ended_without_a_word(other)),
        };
        let diverged = |recorded, present| {
            let input = kept.as_ref().map(|input| format!("{input:?}"));
            let divergence = Divergence { call: replayed.calls, now, input, recorded, present };
            End::Diverged(Box::new(divergence))
        };
        if let Err(message) = called {
            replayed.end = match recorded {
                Ok(recorded) => diverged(recorded, Present::Panic(message)),
                Err(End::Unreadable(error)) => End::Unreadable(error),
                Err(_) => End::Panicked(message),
            };
            return Ok(replayed);
        }
        let (outputs, present) = match quietly(|| answer(&mut machine, recorded.as_ref().ok())) {
            Ok(answered) => answered,
            Err(message) => {
                replayed.end = match recorded {
                    Ok(recorded) => diverged(recorded, Present::Panic(message)),
                    Err(_) => End::Panicked(message),
                };
                return Ok(replayed);
            }
        };
        let call =
            Call { number: replayed.calls, now, input: kept.as_ref(), outputs: &outputs, timeout: present.timeout };
        each(&call)?;
        match recorded {
            Ok(recorded) if recorded == present => {}
            Ok(recorded) => {
                let outputs = outputs.iter().map(|output| format!("{output:?}")).collect();
                replayed.end = diverged(recorded, Present::Answer { outputs, timeout: present.timeout });
                break;
            }
            Err(end) => {
                replayed.end = end;
                break;
            }
        }
    }
    replayed.machine = Some(machine);
    Ok(replayed)
}

/// Takes the outputs that the recorded shell took, or all of them where that is not known or where it took all.
fn answer<M: Recordable>(machine: &mut M, recorded: Option<&Answer>) -> (Vec<M::Output>, Answer) {
    let wanted = recorded.filter(|answer| !answer.drained).map(|answer| answer.outputs);
    let mut listener = Listener::default();
    let mut outputs = Vec::new();
    while wanted.is_none_or(|wanted| outputs.len() < wanted as usize) {
        let Some(output) = machine.poll_output() else { break };
        listener.hear(&output);
        outputs.push(output);
    }
    let drained = wanted.is_none();
    (outputs, listener.answer(drained, machine.poll_timeout()))
}

fn ended_without_a_word<T>(read: Result<Option<T>, RecordingError>) -> End {
    match read {
        Ok(_) | Err(RecordingError::CutOff(_)) => End::Unsaid,
        Err(error) => End::Unreadable(error),
    }
}

fn out_of_order(at: u64, what: &str) -> End {
    End::Unreadable(RecordingError::Damaged { at, what: what.into() })
}

/// Runs a machine, whose broken invariants are panics; gives the message of one.
fn quietly<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    // Nobody uses a machine after it has panicked.
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message").to_owned()
    })
}
