//! `cluster replay`: makes the decisions of recorded processes again and says where they come out otherwise.
//!
//! Read [`run`], then [`drive::replay`].

mod drive;
mod report;
#[cfg(test)]
mod tests;
mod text;

use anyhow::{Context, bail};
use clap::Args;
use report::{Report, Wanted};
use ridge_decode_node::machine::DecodeNode;
use ridge_kvtransfer::shell::record::EXTENSION;
use ridge_kvtransfer::{Receiver, Sender};
use ridge_prefill_node::machine::PrefillNode;
use ridge_protocol::RequestId;
use ridge_protocol::record::{Frames, Header, Recordable};
use ridge_router::machine::Router;
use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// Flags of `cluster replay`.
#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// Recordings, or folders of them.
    #[arg(required = true, value_name = "FILE|DIR")]
    pub paths: Vec<PathBuf>,
    /// Print every call with what the machine answers.
    #[arg(long)]
    pub trace: bool,
    /// Print only calls that have to do with this request, such as r1763666179123456789.
    #[arg(long, value_name = "ID", value_parser = parse_request)]
    pub request: Option<RequestId>,
    /// Stop after this many calls of each recording.
    #[arg(long, value_name = "N")]
    pub until: Option<u64>,
    /// Print the whole state of the machine after the last call.
    #[arg(long)]
    pub state: bool,
}

fn parse_request(text: &str) -> Result<RequestId, String> {
    let digits = text.strip_prefix('r').unwrap_or(text);
    digits.parse().map(RequestId).map_err(|_| format!("{text:?} is not a request; write r123 or 123"))
}

/// Runs the command.
pub fn run(args: &ReplayArgs) -> anyhow::Result<()> {
    let mut files = Vec::new();
    for path in &args.paths {
        files.extend(recordings(path)?);
    }
    let wanted = Wanted {
        trace: args.trace || args.request.is_some(),
        request: args.request,
        until: args.until.unwrap_or(u64::MAX),
        state: args.state,
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    match replay_all(&files, &wanted, &mut out) {
        // Whoever reads has read enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(error).context("cannot write to stdout"),
        Ok(failed) if failed.is_empty() => Ok(()),
        Ok(failed) => {
            drop(out);
            bail!("{} of {} recordings did not replay: {}", failed.len(), files.len(), failed.join(", "))
        }
    }
}

/// A file itself, or the recordings in a folder by name.
fn recordings(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let cannot = || format!("cannot read {}", path.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).with_context(cannot)? {
        let file = entry.with_context(cannot)?.path();
        if file.extension().is_some_and(|extension| extension == EXTENSION) {
            files.push(file);
        }
    }
    if files.is_empty() {
        bail!("no recording (*.{EXTENSION}) is in {}", path.display());
    }
    files.sort();
    Ok(files)
}

/// Replays one file after the other and reports on each. Returns the names of those that did not replay.
fn replay_all(files: &[PathBuf], wanted: &Wanted, out: &mut impl Write) -> std::io::Result<Vec<String>> {
    let mut failed = Vec::new();
    let mut calls = 0;
    for path in files {
        writeln!(out, "{}", path.display())?;
        let opened = File::open(path).map_err(Into::into).and_then(|file| Frames::open(BufReader::new(file)));
        let replayed = match opened {
            Ok((header, frames)) => replay_one(frames, &header, wanted, out)?,
            Err(error) => {
                writeln!(out, "  {error}")?;
                None
            }
        };
        match replayed {
            Some(more) => calls += more,
            None => failed.push(path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()),
        }
        out.flush()?;
    }
    if failed.is_empty() {
        writeln!(out, "{} recordings, {calls} calls: every answer is as recorded", files.len())?;
        out.flush()?;
    }
    Ok(failed)
}

/// Replays one recording; `None` if it did not replay.
fn replay_one<R: Read>(
    frames: Frames<R>,
    header: &Header,
    wanted: &Wanted,
    out: &mut impl Write,
) -> std::io::Result<Option<u64>> {
    match header.machine.as_str() {
        Router::KIND => replay_machine::<Router, R>(frames, header, wanted, out),
        PrefillNode::KIND => replay_machine::<PrefillNode, R>(frames, header, wanted, out),
        DecodeNode::KIND => replay_machine::<DecodeNode, R>(frames, header, wanted, out),
        Sender::KIND => replay_machine::<Sender, R>(frames, header, wanted, out),
        Receiver::KIND => replay_machine::<Receiver, R>(frames, header, wanted, out),
        other => {
            writeln!(out, "  a recording of a machine {other:?}, which this version of Ridge does not know")?;
            Ok(None)
        }
    }
}

fn replay_machine<M: Recordable, R: Read>(
    frames: Frames<R>,
    header: &Header,
    wanted: &Wanted,
    out: &mut impl Write,
) -> std::io::Result<Option<u64>> {
    let mut report = Report::begin(header, wanted, out)?;
    let replayed = drive::replay::<M, R>(frames, header, wanted.until, |call| report.on_call(call))?;
    report.end(&replayed)
}
