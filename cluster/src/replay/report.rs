//! What `cluster replay` prints about one recording.

use super::drive::{Call, Divergence, End, Present, Replayed};
use super::text::{kind, requests, shorten};
use ridge_protocol::limits::PROTOCOL_VERSION;
use ridge_protocol::record::{Answer, Ending, Header, Recordable};
use ridge_protocol::{Instant, RequestId};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

/// What the user wants to see.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Every call.
    pub trace: bool,
    /// Only those of this request.
    pub request: Option<RequestId>,
    /// Calls to make.
    pub until: u64,
    /// The machine in the end.
    pub state: bool,
}

/// Counts and prints while a recording is replayed.
pub struct Report<'a, W> {
    wanted: &'a Wanted,
    out: &'a mut W,
    timeouts: u64,
    kinds: BTreeMap<String, u64>,
    requests: BTreeSet<u64>,
    /// As last printed: it is worth a line when it changes.
    timeout: Option<Instant>,
}

impl<'a, W: Write> Report<'a, W> {
    /// Prints whose recording it is.
    pub fn begin(header: &Header, wanted: &'a Wanted, out: &'a mut W) -> io::Result<Self> {
        let Header { machine, ridge, protocol, node, pid, started_ms } = header;
        let since = i64::try_from(*started_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        let since = since.map_or_else(|| "an unknown time".into(), |time| time.to_string());
        writeln!(out, "  {machine} machine of {node} (pid {pid}, ridge {ridge}) from {since} on")?;
        if (ridge.as_str(), *protocol) != (env!("CARGO_PKG_VERSION"), PROTOCOL_VERSION) {
            let ours = env!("CARGO_PKG_VERSION");
            writeln!(
                out,
                "  note: ridge {ridge} with protocol {protocol} recorded it, and this is {ours} with {PROTOCOL_VERSION}: \
                 it may decide otherwise"
            )?;
        }
        Ok(Self { wanted, out, timeouts: 0, kinds: BTreeMap::new(), requests: BTreeSet::new(), timeout: None })
    }

    /// Counts a call, and prints it if that is wanted.
    pub fn on_call<M: Recordable>(&mut self, call: &Call<'_, M>) -> io::Result<()> {
        let input = match call.input {
            Some(input) => {
                *self.kinds.entry(kind(input)).or_default() += 1;
                format!("{input:?}")
            }
            None => {
                self.timeouts += 1;
                "timeout".into()
            }
        };
        self.requests.extend(requests(&input));
        if !self.wanted.trace {
            return Ok(());
        }
        let outputs: Vec<String> = call.outputs.iter().map(|output| format!("{output:?}")).collect();
        let names =
            |id: RequestId| outputs.iter().chain([&input]).any(|text| requests(text).any(|other| other == id.0));
        if self.wanted.request.is_some_and(|request| !names(request)) {
            return Ok(());
        }
        writeln!(self.out, "{:>8} {} {}", call.number, seconds(call.now), shorten(&input))?;
        for output in &outputs {
            writeln!(self.out, "{:21} -> {}", "", shorten(output))?;
        }
        if std::mem::replace(&mut self.timeout, call.timeout) != call.timeout {
            writeln!(self.out, "{:21} {}", "", wakes(call.timeout))?;
        }
        Ok(())
    }

    /// Prints what came of it. Returns the number of calls if the recording replayed.
    pub fn end<M: Recordable>(self, replayed: &Replayed<M>) -> io::Result<Option<u64>> {
        let Self { wanted, out, .. } = self;
        if wanted.state
            && let Some(machine) = &replayed.machine
        {
            writeln!(out, "{machine:#?}")?;
        }
        let inputs: u64 = self.kinds.values().sum();
        let (first, last) = replayed.span.unwrap_or_default();
        writeln!(
            out,
            "  {} calls from {} to {} s: {inputs} inputs, {} timeouts; {} requests",
            replayed.calls,
            seconds(first).trim_start(),
            seconds(last).trim_start(),
            self.timeouts,
            self.requests.len()
        )?;
        let mut kinds: Vec<(&String, &u64)> = self.kinds.iter().collect();
        kinds.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), name.as_str()));
        for (name, count) in kinds {
            writeln!(out, "  {count:>10}  {name}")?;
        }
        let good = match &replayed.end {
            End::Said(Ending::Closed) => "the process stopped in order",
            End::Said(Ending::Panicked) => "the process panicked",
            End::Said(Ending::Stopped(reason)) => {
                writeln!(out, "  recording was given up: {reason}")?;
                "the rest of the run is not in it"
            }
            End::Unsaid => "it breaks off: the process was killed, or its disk was full",
            End::Wanted => "as far as was asked for",
            End::Panicked(message) => {
                writeln!(out, "  the machine panics: {message}")?;
                "the recording ends there too"
            }
            End::Unreadable(error) => {
                writeln!(out, "  UNREADABLE after {} calls: {error}", replayed.calls)?;
                return Ok(None);
            }
            End::Diverged(divergence) => {
                print_divergence(divergence, out)?;
                return Ok(None);
            }
        };
        writeln!(out, "  every answer is as recorded; {good}")?;
        Ok(Some(replayed.calls))
    }
}

fn print_divergence(divergence: &Divergence, out: &mut impl Write) -> io::Result<()> {
    let Divergence { call, now, input, recorded, present } = divergence;
    writeln!(out, "  DIVERGES at call {call}, {} s", seconds(*now).trim_start())?;
    writeln!(out, "    input     {}", input.as_deref().map_or_else(|| "timeout".into(), shorten))?;
    let Answer { outputs, drained, digest, timeout } = recorded;
    let more = if *drained { "" } else { ", perhaps more after the next call" };
    writeln!(out, "    recorded  {outputs} outputs{more} (digest {digest:016x}), {}", wakes(*timeout))?;
    match present {
        Present::Panic(message) => writeln!(out, "    now       panics: {message}"),
        Present::Answer { outputs, timeout } => {
            writeln!(out, "    now       {} outputs, {}", outputs.len(), wakes(*timeout))?;
            outputs.iter().try_for_each(|output| writeln!(out, "              -> {}", shorten(output)))
        }
    }
}

fn wakes(timeout: Option<Instant>) -> String {
    timeout.map_or_else(|| "no timeout".into(), |at| format!("wakes at {}", seconds(at).trim_start()))
}

/// Machine time in seconds.
fn seconds(at: Instant) -> String {
    format!("{:>12.6}", at.0 as f64 / 1e9)
}
