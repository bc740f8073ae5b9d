//! Recordings: every call into a machine, in order, with a digest of what it answered.
//!
//! A machine's outputs are a function of its configuration and its inputs, so the file of one is enough to make the same
//! decisions again. It is the preamble `RIDGEREC` and a format version, then frames: a [`Header`], the machine's
//! configuration, and [`Record`]s to the end. A frame is a length and a digest (4 bytes each, little-endian) before a
//! body packed by [`wire::pack`].
//!
//! Read [`Recordable`], then [`Record`]. Files are written by `ridge-kvtransfer` (`shell/record.rs`) and replayed by
//! `cluster replay`.

use crate::wire::{self, WireError};
use crate::{Instant, Machine, NodeName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::io::{ErrorKind, Read};
use twox_hash::XxHash3_128;

/// Version of the frames and of [`Header`]. What is in a record changes with the machines: see [`Header::ridge`].
pub const FORMAT_VERSION: u16 = 1;
/// Longest body of a frame, in bytes: above any input that the wire's own limits let through.
pub const MAX_FRAME_BYTES: usize = 64 << 20;
const MAGIC: [u8; 8] = *b"RIDGEREC";
/// Length and digest.
const FRAME_HEADER_BYTES: usize = 8;

/// A machine that can be written down and built again.
///
/// Whatever changes it goes through [`Machine`]: the wrapper that records hands out `&Self` only.
pub trait Recordable:
    Machine<Input: Clone + Serialize + DeserializeOwned + Debug, Output: Serialize + Debug> + Debug + Sized
{
    /// Names the machine in file names and headers.
    const KIND: &'static str;
    /// Everything that [`Recordable::build`] needs.
    type Config: Serialize + DeserializeOwned + Debug;

    /// The machine before its first call.
    fn build(config: Self::Config) -> Self;
}

/// Whose recording a file is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Header {
    /// [`Recordable::KIND`].
    pub machine: String,
    /// Version of Ridge that ran it. Another one may decide otherwise, or know other inputs.
    pub ridge: String,
    /// [`limits::PROTOCOL_VERSION`](crate::limits::PROTOCOL_VERSION) of that version.
    pub protocol: u16,
    /// The process's name in its cluster.
    pub node: NodeName,
    /// Its process id.
    pub pid: u32,
    /// When it began, in milliseconds since 1970: the zero of its machine time, to within a few milliseconds.
    pub started_ms: u64,
}

/// One line of a recording. A call is written before it is made, so a machine that panics has left its last input.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Record<I> {
    /// [`Machine::handle`] was called.
    Input {
        /// With this time.
        now: Instant,
        /// And this input.
        input: I,
    },
    /// [`Machine::handle_timeout`] was called.
    Timeout {
        /// With this time.
        now: Instant,
    },
    /// What the call before it was answered with.
    Answer(Answer),
    /// Nothing follows, for this reason. A process that was killed leaves none.
    End(Ending),
}

/// What a machine said between one call and the next.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// How many outputs were taken. The shell may make the next call before it has taken all of them.
    pub outputs: u32,
    /// It was asked for one more and had none.
    pub drained: bool,
    /// Over the packed outputs.
    pub digest: u64,
    /// [`Machine::poll_timeout`] after the outputs were taken.
    pub timeout: Option<Instant>,
}

/// Why a recording ends.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Ending {
    /// The process stopped in order.
    Closed,
    /// The process panicked, in this machine or elsewhere.
    Panicked,
    /// Recording was given up, for the reason given, and the process went on without it.
    Stopped(String),
}

/// Gathers the outputs that follow a call.
#[derive(Debug, Default)]
pub struct Listener {
    outputs: u32,
    packed: Vec<u8>,
}

impl Listener {
    /// Takes note of an output.
    pub fn hear<O: Serialize>(&mut self, output: &O) {
        self.outputs += 1;
        wire::pack(output, &mut self.packed);
    }

    /// Ends an answer and begins the next one.
    pub fn answer(&mut self, drained: bool, timeout: Option<Instant>) -> Answer {
        let answer = Answer { outputs: self.outputs, drained, digest: digest(&self.packed), timeout };
        self.outputs = 0;
        self.packed.clear();
        answer
    }
}

/// What stands before the first frame.
pub fn preamble() -> Vec<u8> {
    [&MAGIC[..], &FORMAT_VERSION.to_le_bytes()].concat()
}

/// Appends a frame.
pub fn push_frame<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend([0; FRAME_HEADER_BYTES]);
    wire::pack(value, out);
    let (header, body) = out[start..].split_at_mut(FRAME_HEADER_BYTES);
    let len = u32::try_from(body.len()).expect("an input is shorter than MAX_FRAME_BYTES");
    header[..4].copy_from_slice(&len.to_le_bytes());
    header[4..].copy_from_slice(&(digest(body) as u32).to_le_bytes());
}

fn digest(bytes: &[u8]) -> u64 {
    XxHash3_128::oneshot(bytes) as u64
}

/// Why a recording cannot be read on. Offsets are in bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// The file could not be read.
    #[error("cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// It begins with something else.
    #[error("not a recording: it does not begin with RIDGEREC")]
    Magic,
    /// Another version wrote it.
    #[error("a recording of format {0}; this version of Ridge reads format {FORMAT_VERSION}")]
    Format(u16),
    /// It ends within a frame, as the last one does when its process is killed.
    #[error("it ends within a record, at byte {0}")]
    CutOff(u64),
    /// A frame is not what was written.
    #[error("damaged at byte {at}: {what}")]
    Damaged {
        /// Where the frame begins.
        at: u64,
        /// What is wrong with it.
        what: String,
    },
    /// A frame is sound and means nothing here.
    #[error("the record at byte {at} makes no sense to this build of Ridge ({error}); was it written by another one?")]
    Meaning {
        /// Where the frame begins.
        at: u64,
        /// What the decoder said.
        error: WireError,
    },
}

/// The frames of a recording, read one after the other.
#[derive(Debug)]
pub struct Frames<R> {
    reader: R,
    at: u64,
}

impl<R: Read> Frames<R> {
    /// Reads preamble and header; the next frame is the machine's configuration.
    pub fn open(mut reader: R) -> Result<(Header, Self), RecordingError> {
        let mut bytes = [0; MAGIC.len() + 2];
        let got = fill(&mut reader, &mut bytes)?;
        if !bytes[..got].starts_with(&MAGIC[..got.min(MAGIC.len())]) || got == 0 {
            return Err(RecordingError::Magic);
        }
        if got < bytes.len() {
            return Err(RecordingError::CutOff(got as u64));
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != FORMAT_VERSION {
            return Err(RecordingError::Format(version));
        }
        let mut frames = Self { reader, at: bytes.len() as u64 };
        let header = frames.read()?.ok_or(RecordingError::CutOff(frames.at))?;
        Ok((header, frames))
    }

    /// Where the next frame begins.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next frame, or `None` at the end of the file.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>, RecordingError> {
        let at = self.at;
        let mut header = [0; FRAME_HEADER_BYTES];
        match fill(&mut self.reader, &mut header)? {
            0 => return Ok(None),
            FRAME_HEADER_BYTES => {}
            got => return Err(RecordingError::CutOff(at + got as u64)),
        }
        let [len, sum] = [0, 4].map(|i| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]));
        if len as usize > MAX_FRAME_BYTES {
            let what = format!("a record of {len} bytes is above the limit of {MAX_FRAME_BYTES}");
            return Err(RecordingError::Damaged { at, what });
        }
        // Grown as bytes come: a damaged length must not take memory that the file cannot fill.
        let mut body = Vec::new();
        let got = self.reader.by_ref().take(u64::from(len)).read_to_end(&mut body)?;
        self.at += (FRAME_HEADER_BYTES + got) as u64;
        if got < len as usize {
            return Err(RecordingError::CutOff(self.at));
        }
        if digest(&body) as u32 != sum {
            return Err(RecordingError::Damaged { at, what: "its digest does not match".into() });
        }
        wire::unpack(&body).map(Some).map_err(|error| RecordingError::Meaning { at, error })
    }
}

/// Reads until `bytes` are full or the file ends; says how many it got.
fn fill(reader: &mut impl Read, bytes: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match reader.read(&mut bytes[got..]) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let node = NodeName("decode-0".into());
        Header { machine: "toy".into(), ridge: "0.1.0".into(), protocol: 2, node, pid: 7, started_ms: 1 }
    }

    fn records() -> Vec<Record<Vec<u32>>> {
        let mut listener = Listener::default();
        listener.hear(&"one");
        listener.hear(&2.5f32);
        vec![
            Record::Input { now: Instant(5), input: vec![1, u32::MAX] },
            Record::Answer(listener.answer(true, Some(Instant(9)))),
            Record::Timeout { now: Instant(9) },
            Record::Answer(listener.answer(false, None)),
            Record::End(Ending::Stopped("enough".into())),
        ]
    }

    fn file() -> Vec<u8> {
        let mut file = preamble();
        push_frame(&header(), &mut file);
        records().iter().for_each(|record| push_frame(record, &mut file));
        file
    }

    fn read(file: &[u8]) -> Result<Vec<Record<Vec<u32>>>, RecordingError> {
        let (found, mut frames) = Frames::open(file)?;
        assert_eq!(found, header());
        let mut all = Vec::new();
        while let Some(record) = frames.read()? {
            all.push(record);
        }
        assert_eq!(frames.position(), file.len() as u64);
        Ok(all)
    }

    #[test]
    fn recordings_round_trip() {
        assert_eq!(read(&file()).expect("reads"), records());
    }

    #[test]
    fn answers_differ_by_what_was_said_and_by_how_it_was_said() {
        let say = |words: &[&str]| {
            let mut listener = Listener::default();
            words.iter().for_each(|word| listener.hear(word));
            listener.answer(true, None)
        };
        assert_eq!(say(&["a", "b"]), say(&["a", "b"]));
        assert_ne!(say(&["a", "b"]), say(&["b", "a"]));
        assert_ne!(say(&["a", "b"]), say(&["ab"]));
        let mut listener = Listener::default();
        listener.hear(&"before");
        listener.answer(true, None);
        assert_eq!(listener.answer(true, None), say(&[]), "an answer begins empty");
    }

    /// Every prefix and every changed byte: an error or fewer records, never a panic, never a record that was not there.
    #[test]
    fn damage_is_found() {
        let whole = file();
        for end in 0..whole.len() {
            match read(&whole[..end]) {
                Ok(some) => assert!(records().starts_with(&some) && some.len() < records().len(), "{end}"),
                Err(RecordingError::CutOff(at)) => assert_eq!(at, end as u64),
                Err(RecordingError::Magic) => assert_eq!(end, 0),
                Err(other) => panic!("cut at {end}: {other}"),
            }
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut changed = whole.clone();
                changed[at] ^= 1 << bit;
                assert!(read(&changed).is_err(), "bit {bit} of byte {at}");
            }
        }
        assert!(matches!(read(b"GGUF and much more"), Err(RecordingError::Magic)));
        assert!(matches!(read(&[&MAGIC[..], &[9, 0], &[0; 20]].concat()), Err(RecordingError::Format(9))));
    }

    #[test]
    fn another_builds_records_are_named_as_such() {
        let mut file = preamble();
        push_frame(&header(), &mut file);
        push_frame(&"not a record", &mut file);
        let error = read(&file).expect_err("no record");
        assert!(error.to_string().contains("written by another one"), "{error}");
    }
}
