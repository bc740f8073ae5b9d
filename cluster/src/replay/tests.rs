//! Recordings that replay, and every way in which one does not.

use super::drive::{Divergence, End, Present, Replayed, replay};
use super::report::Wanted;
use super::{recordings, replay_all};
use ridge_kvtransfer::shell::record::{RecordOptions, Recorded};
use ridge_kvtransfer::{Sender, SenderConfig, SenderInput};
use ridge_protocol::record::{Answer, Ending, Frames, Header, Record, Recordable, preamble, push_frame};
use ridge_protocol::{Duration, Instant, Machine, NodeName};
use std::path::{Path, PathBuf};

/// Says every number up to what it was last told, and wakes after as many nanoseconds.
#[derive(Debug)]
struct Counter {
    /// Where it begins.
    from: u64,
    said: Vec<u64>,
    wakes: Option<Instant>,
}

impl Machine for Counter {
    type Input = u64;
    type Output = u64;

    fn handle(&mut self, now: Instant, input: u64) {
        assert!(input < 100, "cannot count to {input}");
        self.said = (self.from..input).rev().collect();
        self.wakes = Some(now + Duration::from_nanos(input));
    }

    fn handle_timeout(&mut self, _: Instant) {
        self.wakes = None;
    }

    fn poll_output(&mut self) -> Option<u64> {
        self.said.pop()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.wakes
    }

    fn check_integrity(&self) {}
}

impl Recordable for Counter {
    const KIND: &'static str = "counter";
    type Config = u64;

    fn build(from: u64) -> Self {
        Self { from, said: Vec::new(), wakes: None }
    }
}

fn node() -> NodeName {
    NodeName("node".into())
}

fn only_recording(folder: &Path) -> PathBuf {
    let mut files = recordings(folder).expect("a folder");
    assert_eq!(files.len(), 1);
    files.remove(0)
}

/// Records four calls, some of whose outputs are not taken before the next one.
fn recorded() -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a temp dir");
    let options = RecordOptions { folder: folder.path().into(), limit_bytes: 1 << 20 };
    let mut machine = Recorded::<Counter>::start(&node(), 1, Some(&options)).expect("starts");
    for (now, input, taken) in [(10, 5, 9), (20, 9, 3), (30, 4, 9)] {
        machine.handle(Instant(now), input);
        assert!((0..taken).map_while(|_| machine.poll_output()).count() > 0);
    }
    machine.handle_timeout(Instant(34));
    drop(machine);
    std::fs::read(only_recording(folder.path())).expect("reads")
}

type Parts = (Header, u64, Vec<Record<u64>>);

fn parts(bytes: &[u8]) -> Parts {
    let (header, mut frames) = Frames::open(bytes).expect("opens");
    let from = frames.read().expect("reads").expect("a configuration");
    (header, from, std::iter::from_fn(|| frames.read().expect("reads")).collect())
}

/// The same recording with something changed, as sound a file as it was.
fn changed(bytes: &[u8], change: impl FnOnce(&mut Parts)) -> Vec<u8> {
    let mut parts = parts(bytes);
    change(&mut parts);
    let mut out = preamble();
    push_frame(&parts.0, &mut out);
    push_frame(&parts.1, &mut out);
    parts.2.iter().for_each(|record| push_frame(record, &mut out));
    out
}

/// Replays and returns the outputs of every call too.
fn replayed(bytes: &[u8], until: u64) -> (Replayed<Counter>, Vec<Vec<u64>>) {
    let (header, frames) = Frames::open(bytes).expect("opens");
    let mut outputs = Vec::new();
    let replayed = replay::<Counter, _>(frames, &header, until, |call| {
        assert_eq!(call.number, outputs.len() as u64 + 1);
        outputs.push(call.outputs.to_vec());
        Ok(())
    });
    (replayed.expect("nothing is printed"), outputs)
}

fn divergence(bytes: &[u8]) -> Divergence {
    match replayed(bytes, u64::MAX).0.end {
        End::Diverged(divergence) => *divergence,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_recording_replays_as_it_was() {
    let bytes = recorded();
    assert_eq!(replayed(&bytes, 0).0.calls, 0);
    let (all, outputs) = replayed(&bytes, u64::MAX);
    assert!(matches!(all.end, End::Said(Ending::Closed)), "{:?}", all.end);
    assert_eq!(outputs, [vec![1, 2, 3, 4], vec![1, 2, 3], vec![1, 2, 3], vec![]]);
    assert_eq!((all.calls, all.span), (4, Some((Instant(10), Instant(34)))));
    let (some, outputs) = replayed(&bytes, 2);
    assert!(matches!(some.end, End::Wanted), "{:?}", some.end);
    assert_eq!((some.calls, outputs.len()), (2, 2));
    assert_eq!(some.machine.expect("it did not panic").wakes, Some(Instant(29)));
}

#[test]
fn a_changed_input_is_found() {
    let bytes = changed(&recorded(), |(_, _, records)| {
        assert_eq!(records[4], Record::Input { now: Instant(30), input: 4 });
        records[4] = Record::Input { now: Instant(30), input: 6 };
    });
    let Divergence { call, now, input, recorded, present } = divergence(&bytes);
    assert_eq!((call, now, input.as_deref()), (3, Instant(30), Some("6")));
    assert_eq!((recorded.outputs, recorded.timeout), (3, Some(Instant(34))));
    let Present::Answer { outputs, timeout } = present else { panic!("{present:?}") };
    assert_eq!((outputs.join(" ").as_str(), timeout), ("1 2 3 4 5", Some(Instant(36))));
}

#[test]
fn every_part_of_an_answer_counts() {
    let tamper = |at: usize, change: fn(&mut Answer)| {
        let bytes = changed(&recorded(), |(_, _, records)| {
            let Record::Answer(answer) = &mut records[at] else { panic!("{records:?}") };
            change(answer);
        });
        divergence(&bytes).call
    };
    assert_eq!(tamper(1, |answer| answer.digest ^= 1), 1);
    assert_eq!(tamper(1, |answer| answer.outputs += 1), 1);
    assert_eq!(tamper(1, |answer| answer.timeout = None), 1);
    assert_eq!(tamper(3, |answer| answer.drained = true), 2, "it had more to say");
    assert_eq!(tamper(7, |answer| answer.timeout = Some(Instant(1))), 4);
    let configured = changed(&recorded(), |(_, from, _)| *from = 2);
    assert_eq!(divergence(&configured).call, 1);
}

#[test]
fn panics_are_told_apart() {
    let fatal = Record::Input { now: Instant(30), input: 1000 };
    let only_here = changed(&recorded(), |(_, _, records)| records[4] = fatal.clone());
    let Present::Panic(message) = divergence(&only_here).present else { panic!("it panics") };
    assert_eq!(message, "cannot count to 1000");
    for ending in [Some(Ending::Panicked), None] {
        let there_too = changed(&recorded(), |(_, _, records)| {
            records.truncate(4);
            records.push(fatal.clone());
            records.extend(ending.map(Record::End));
        });
        let (replayed, _) = replayed(&there_too, u64::MAX);
        let End::Panicked(message) = replayed.end else { panic!("{:?}", replayed.end) };
        assert_eq!((replayed.calls, message.as_str()), (3, "cannot count to 1000"));
    }
}

#[test]
fn a_killed_process_leaves_a_good_recording() {
    let bytes = recorded();
    let mut head = preamble();
    push_frame(&parts(&bytes).0, &mut head);
    push_frame(&1u64, &mut head);
    for end in head.len()..bytes.len() {
        let (replayed, _) = replayed(&bytes[..end], u64::MAX);
        assert!(matches!(replayed.end, End::Unsaid), "cut at {end}: {:?}", replayed.end);
    }
}

#[test]
fn records_in_disorder_are_damage() {
    let check = |change: fn(&mut Vec<Record<u64>>)| {
        let (replayed, _) = replayed(&changed(&recorded(), |(_, _, records)| change(records)), u64::MAX);
        assert!(matches!(replayed.end, End::Unreadable(_)), "{:?}", replayed.end);
    };
    check(|records| drop(records.remove(0)));
    check(|records| drop(records.remove(1)));
    check(|records| records.swap(2, 3));
}

fn report(files: &[PathBuf], wanted: &Wanted) -> (Vec<String>, String) {
    let mut out = Vec::new();
    let failed = replay_all(files, wanted, &mut out).expect("a Vec takes everything");
    (failed, String::from_utf8(out).expect("is text"))
}

const ALL: Wanted = Wanted { trace: false, request: None, until: u64::MAX, state: false };

#[test]
fn reports_say_what_happened() {
    let folder = tempfile::tempdir().expect("a temp dir");
    let options = RecordOptions { folder: folder.path().into(), limit_bytes: 1 << 20 };
    let mut sender = Recorded::<Sender>::start(&node(), SenderConfig::default(), Some(&options)).expect("starts");
    sender.handle(Instant(1_500_000_000), SenderInput::PeerUp(node()));
    sender.handle_timeout(Instant(2_000_000_000));
    drop(sender);
    let file = only_recording(folder.path());
    let (failed, text) = report(std::slice::from_ref(&file), &ALL);
    assert_eq!(failed, [""; 0], "{text}");
    assert!(text.contains("sender machine of node"), "{text}");
    assert!(text.contains("2 calls from 1.500000 to 2.000000 s: 1 inputs, 1 timeouts"), "{text}");
    assert!(text.contains("1  PeerUp"), "{text}");
    assert!(text.contains("the process stopped in order"), "{text}");
    assert!(text.contains("1 recordings, 2 calls: every answer is as recorded"), "{text}");
    let (_, text) = report(&[file], &Wanted { trace: true, state: true, ..ALL });
    assert!(text.contains("PeerUp(NodeName(\"node\"))") && text.contains("sessions: {}"), "{text}");
}

#[test]
fn what_is_no_recording_is_said() {
    let folder = tempfile::tempdir().expect("a temp dir");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("writes");
        path
    };
    let check = |path: PathBuf, want: &str| {
        let name = path.file_name().expect("has a name").to_string_lossy().into_owned();
        let (failed, text) = report(&[path], &ALL);
        assert_eq!(failed, [name]);
        assert!(text.contains(want), "{want:?} is not in {text}");
    };
    check(write("empty", b""), "not a recording");
    check(write("text", b"What is this?"), "not a recording");
    check(write("short", b"RIDGEREC"), "ends within a record");
    check(write("counter", &recorded()), "\"counter\", which this version of Ridge does not know");
    check(folder.path().join("missing"), "No such file");
    // A counter's configuration and inputs under a router's name.
    let disguised = changed(&recorded(), |(header, _, _)| header.machine = "router".into());
    check(write("router", &disguised), "makes no sense to this build");
    let mut damaged = recorded();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    assert!(matches!(replayed(&damaged, u64::MAX).0.end, End::Unreadable(_)));
    let error = recordings(folder.path()).expect_err("none ends in .rec").to_string();
    assert!(error.contains("*.rec"), "{error}");
}
