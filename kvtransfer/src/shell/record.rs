//! Recording a machine while it runs: [`Recorded`] stands where the machine stood and writes down what passes.
//!
//! The shell's loop never waits for the disk. It appends to a buffer of limited size; a thread writes that out every few
//! milliseconds. If the disk is too slow, full, or the file has reached its limit, recording ends with an error in the
//! log and in the file, and the machine goes on. A recording can only be replayed from its beginning, so nothing is left
//! out of its middle.

use ridge_protocol::limits::PROTOCOL_VERSION;
use ridge_protocol::record::{Ending, Header, Listener, Record, Recordable, preamble, push_frame};
use ridge_protocol::{Duration, Instant, Machine, NodeName};
use std::fs::OpenOptions;
use std::io::Write;
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// How recordings' names end.
pub const EXTENSION: &str = "rec";
/// Bytes that may wait for the disk: seconds of the busiest node.
const BUFFER_BYTES: usize = 32 << 20;
/// How long calls are gathered before they are written: what a killed process loses of its recording.
const GATHER: Duration = Duration::from_millis(10);
/// How long a process that ends waits for its last records to be written.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);

/// Where a process records its machines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordOptions {
    /// Folder for the files; created if it is not there.
    pub folder: PathBuf,
    /// Most bytes of one file.
    pub limit_bytes: u64,
}

/// A recording could not be begun.
#[derive(Debug, thiserror::Error)]
#[error("cannot record to {path}: {error}; name another folder with --record, or leave it away")]
pub struct RecordError {
    /// Where.
    path: PathBuf,
    /// What the system said.
    error: std::io::Error,
}

/// A machine that is recorded, if its process is asked to.
///
/// It is driven as the machine is; queries go through `Deref`. Without a recording it costs a branch per call.
#[derive(Debug)]
pub struct Recorded<M: Recordable> {
    machine: M,
    tape: Option<Tape>,
}

impl<M: Recordable> Recorded<M> {
    /// Builds the machine and, with `options`, begins a file for this life of it.
    pub fn start(node: &NodeName, config: M::Config, options: Option<&RecordOptions>) -> Result<Self, RecordError> {
        let tape = options.map(|options| Tape::begin::<M>(node, &config, options)).transpose()?;
        Ok(Self { machine: M::build(config), tape })
    }

    /// Recordings that were given up while their process goes on: 0 or 1.
    pub fn recordings_stopped(&self) -> u32 {
        u32::from(self.tape.as_ref().is_some_and(Tape::is_stopped))
    }
}

impl<M: Recordable> Deref for Recorded<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.machine
    }
}

impl<M: Recordable> Machine for Recorded<M> {
    type Input = M::Input;
    type Output = M::Output;

    fn handle(&mut self, now: Instant, input: M::Input) {
        if let Some(tape) = &mut self.tape {
            tape.call(&self.machine, &Record::Input { now, input: &input });
        }
        self.machine.handle(now, input);
    }

    fn handle_timeout(&mut self, now: Instant) {
        if let Some(tape) = &mut self.tape {
            tape.call::<M>(&self.machine, &Record::Timeout { now });
        }
        self.machine.handle_timeout(now);
    }

    fn poll_output(&mut self) -> Option<M::Output> {
        let output = self.machine.poll_output();
        if let Some(tape) = &mut self.tape {
            match &output {
                Some(output) => tape.hear(output),
                None => tape.answer(&self.machine, true),
            }
        }
        output
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.machine.poll_timeout()
    }

    fn check_integrity(&self) {
        self.machine.check_integrity();
    }
}

impl<M: Recordable> Drop for Recorded<M> {
    fn drop(&mut self) {
        let Some(tape) = &mut self.tape else { return };
        if std::thread::panicking() {
            // The machine may be in pieces: it is asked nothing more.
            tape.end(Ending::Panicked);
        } else {
            tape.answer(&self.machine, false);
            tape.end(Ending::Closed);
        }
    }
}

/// What is said to and by a machine, on its way to the writer.
#[derive(Debug)]
struct Tape {
    writer: Writer,
    listener: Listener,
    /// The last call's answer is not written yet.
    unanswered: bool,
    /// Reused for every frame.
    frame: Vec<u8>,
}

impl Tape {
    fn begin<M: Recordable>(node: &NodeName, config: &M::Config, options: &RecordOptions) -> Result<Self, RecordError> {
        let started_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let header = Header {
            machine: M::KIND.into(),
            ridge: env!("CARGO_PKG_VERSION").into(),
            protocol: PROTOCOL_VERSION,
            node: node.clone(),
            pid: std::process::id(),
            started_ms,
        };
        let path = options.folder.join(file_name(&header));
        let cannot = |error| RecordError { path: path.clone(), error };
        let mut file = create(&options.folder, &path).map_err(cannot)?;
        let mut head = preamble();
        push_frame(&header, &mut head);
        push_frame(config, &mut head);
        file.write_all(&head).map_err(cannot)?;
        tracing::info!(path = %path.display(), "recording; the file will hold users' prompts and answers");
        let writer = Writer::spawn(file, path.clone(), options.limit_bytes, head.len() as u64).map_err(cannot)?;
        Ok(Self::new(writer))
    }

    fn new(writer: Writer) -> Self {
        Self { writer, listener: Listener::default(), unanswered: false, frame: Vec::new() }
    }

    fn is_stopped(&self) -> bool {
        self.writer.stopped
    }

    fn call<M: Recordable>(&mut self, machine: &M, call: &Record<&M::Input>) {
        self.answer(machine, false);
        self.write(call);
        self.unanswered = true;
    }

    fn hear<O: serde::Serialize>(&mut self, output: &O) {
        if !self.is_stopped() {
            self.listener.hear(output);
        }
    }

    /// Writes the answer to the last call, once.
    fn answer<M: Recordable>(&mut self, machine: &M, drained: bool) {
        if std::mem::take(&mut self.unanswered) && !self.is_stopped() {
            let answer = self.listener.answer(drained, machine.poll_timeout());
            self.write(&Record::<()>::Answer(answer));
        }
    }

    fn write<I: serde::Serialize>(&mut self, record: &Record<I>) {
        if self.is_stopped() {
            return;
        }
        self.frame.clear();
        push_frame(record, &mut self.frame);
        if let Err(reason) = self.writer.append(&self.frame) {
            tracing::error!(path = %self.writer.path.display(), %reason, "recording stopped; serving goes on");
            self.end(Ending::Stopped(reason));
        }
    }

    /// The last record, whatever the limits say.
    fn end(&mut self, ending: Ending) {
        if !self.is_stopped() {
            self.frame.clear();
            push_frame(&Record::<()>::End(ending), &mut self.frame);
            self.writer.close(&self.frame);
        }
    }
}

/// Only its owner may read what users have written.
fn create(folder: &Path, path: &Path) -> std::io::Result<std::fs::File> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Such as `decode-0-receiver-1763666179123-4242.rec`: every life of a machine has a file of its own.
fn file_name(header: &Header) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '_' };
    let node: String = header.node.0.chars().map(plain).collect();
    format!("{node}-{}-{}-{}.{EXTENSION}", header.machine, header.started_ms, header.pid)
}

/// The buffer before the disk, and the thread behind it.
#[derive(Debug)]
struct Writer {
    shared: Arc<Shared>,
    path: PathBuf,
    limit_bytes: u64,
    /// Bytes written or in the buffer.
    accepted_bytes: u64,
    /// Nothing more is taken.
    stopped: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Nothing follows.
    closed: bool,
    /// The thread has ended, after an error if there is one.
    done: bool,
    error: Option<String>,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    /// `written_bytes` are in the file already.
    fn spawn(
        file: impl Write + Send + 'static,
        path: PathBuf,
        limit_bytes: u64,
        written_bytes: u64,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        std::thread::Builder::new().name("recorder".into()).spawn(move || write_out(&theirs, file))?;
        Ok(Self { shared, path, limit_bytes, accepted_bytes: written_bytes, stopped: false })
    }

    /// Takes bytes or says why not. Never waits for the disk.
    fn append(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut queue = self.shared.queue();
        if let Some(error) = queue.error.take() {
            return Err(error);
        }
        let accepted = self.accepted_bytes + bytes.len() as u64;
        if accepted > self.limit_bytes {
            return Err(format!("its limit of {} bytes (--record-limit) is reached", self.limit_bytes));
        }
        if queue.bytes.len() + bytes.len() > BUFFER_BYTES {
            return Err(format!("the disk is too slow: {} bytes wait to be written", queue.bytes.len()));
        }
        let wakes = queue.bytes.is_empty();
        queue.bytes.extend_from_slice(bytes);
        drop(queue);
        self.accepted_bytes = accepted;
        if wakes {
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// Takes the last bytes.
    fn close(&mut self, bytes: &[u8]) {
        let mut queue = self.shared.queue();
        queue.bytes.extend_from_slice(bytes);
        queue.closed = true;
        drop(queue);
        self.shared.changed.notify_all();
        self.stopped = true;
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.changed.notify_all();
        let wait = self.shared.changed.wait_timeout_while(self.shared.queue(), FLUSH_DEADLINE, |queue| !queue.done);
        let (queue, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            tracing::error!(path = %self.path.display(), "the end of the recording is lost: the disk is too slow");
        } else if let Some(error) = &queue.error {
            tracing::error!(path = %self.path.display(), %error, "the end of the recording is lost");
        }
    }
}

/// The writer's thread.
fn write_out(shared: &Shared, mut file: impl Write) {
    loop {
        let queue = shared.queue();
        let idle = |queue: &mut Queue| queue.bytes.is_empty() && !queue.closed;
        let queue = shared.changed.wait_while(queue, idle).unwrap_or_else(PoisonError::into_inner);
        let gathered = shared.changed.wait_timeout_while(queue, GATHER, |queue| !queue.closed);
        let (mut queue, _) = gathered.unwrap_or_else(PoisonError::into_inner);
        let (bytes, closed) = (std::mem::take(&mut queue.bytes), queue.closed);
        drop(queue);
        let error = file.write_all(&bytes).err().map(|error| format!("it cannot be written: {error}"));
        if closed || error.is_some() {
            let mut queue = shared.queue();
            queue.done = true;
            queue.error = error;
            drop(queue);
            shared.changed.notify_all();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_protocol::record::{Answer, Frames};
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    /// Adds up what it is told, and says every sum twice.
    #[derive(Debug)]
    struct Adder {
        sum: u64,
        said: Vec<u64>,
        next: Option<Instant>,
    }

    impl Machine for Adder {
        type Input = u64;
        type Output = u64;

        fn handle(&mut self, now: Instant, input: u64) {
            self.sum += input;
            self.said.extend([self.sum; 2]);
            self.next = Some(now + Duration::from_nanos(10));
        }

        fn handle_timeout(&mut self, _: Instant) {
            self.next = None;
        }

        fn poll_output(&mut self) -> Option<u64> {
            self.said.pop()
        }

        fn poll_timeout(&self) -> Option<Instant> {
            self.next
        }

        fn check_integrity(&self) {}
    }

    impl Recordable for Adder {
        const KIND: &'static str = "adder";
        type Config = u64;

        fn build(sum: u64) -> Self {
            Self { sum, said: Vec::new(), next: None }
        }
    }

    fn node() -> NodeName {
        NodeName("node/0".into())
    }

    fn drain(machine: &mut Recorded<Adder>) -> Vec<u64> {
        std::iter::from_fn(|| machine.poll_output()).collect()
    }

    fn only_file(folder: &Path) -> PathBuf {
        let mut files = std::fs::read_dir(folder).expect("is there").map(|entry| entry.expect("reads").path());
        let file = files.next().expect("one file");
        assert_eq!(files.next(), None);
        file
    }

    fn records(bytes: &[u8]) -> Vec<Record<u64>> {
        let (header, mut frames) = Frames::open(bytes).expect("opens");
        assert_eq!((header.machine.as_str(), &header.node), ("adder", &node()));
        assert_eq!(frames.read::<u64>().expect("reads"), Some(100), "the configuration");
        std::iter::from_fn(|| frames.read().expect("reads")).collect()
    }

    fn answer(outputs: &[u64], drained: bool, timeout: Option<u64>) -> Record<u64> {
        let mut listener = Listener::default();
        outputs.iter().for_each(|output| listener.hear(output));
        Record::Answer(listener.answer(drained, timeout.map(Instant)))
    }

    #[test]
    fn calls_and_answers_are_written_in_order() {
        let folder = tempfile::tempdir().expect("a temp dir");
        let options = RecordOptions { folder: folder.path().join("new"), limit_bytes: 1 << 20 };
        let mut machine = Recorded::<Adder>::start(&node(), 100, Some(&options)).expect("starts");
        machine.handle(Instant(1), 5);
        assert_eq!(machine.poll_output(), Some(105));
        // A call before the last one's outputs are taken, as when acting on one of them.
        machine.handle(Instant(2), 1);
        assert_eq!(drain(&mut machine), [106, 106, 105]);
        assert_eq!(drain(&mut machine), [0; 0]);
        machine.handle_timeout(Instant(12));
        assert_eq!((machine.sum, machine.recordings_stopped()), (106, 0));
        drop(machine);

        let file = only_file(&options.folder);
        let mode = std::fs::metadata(&file).expect("is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "nobody else may read prompts");
        let name = file.file_name().and_then(|name| name.to_str()).expect("a name");
        assert!(name.starts_with("node_0-adder-") && name.ends_with(".rec"), "{name}");
        let expected = [
            Record::Input { now: Instant(1), input: 5 },
            answer(&[105], false, Some(11)),
            Record::Input { now: Instant(2), input: 1 },
            answer(&[106, 106, 105], true, Some(12)),
            Record::Timeout { now: Instant(12) },
            answer(&[], false, None),
            Record::End(Ending::Closed),
        ];
        assert_eq!(records(&std::fs::read(file).expect("reads")), expected);
    }

    #[test]
    fn without_a_folder_nothing_is_written() {
        let mut machine = Recorded::<Adder>::start(&node(), 1, None).expect("starts");
        machine.handle(Instant(1), 5);
        assert_eq!(drain(&mut machine), [6, 6]);
        assert_eq!(machine.recordings_stopped(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_had_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a temp file");
        let options = RecordOptions { folder: file.path().join("below"), limit_bytes: 1 };
        let error = Recorded::<Adder>::start(&node(), 1, Some(&options)).expect_err("no folder").to_string();
        assert!(error.contains("below") && error.contains("--record"), "{error}");
    }

    #[test]
    fn the_last_input_of_a_machine_that_panics_is_kept() {
        let folder = tempfile::tempdir().expect("a temp dir");
        let options = RecordOptions { folder: folder.path().into(), limit_bytes: 1 << 20 };
        let panicked = std::thread::spawn(move || {
            let mut machine = Recorded::<Adder>::start(&node(), 100, Some(&options)).expect("starts");
            machine.handle(Instant(3), u64::MAX);
        });
        assert!(panicked.join().is_err(), "the sum overflows");
        let records = records(&std::fs::read(only_file(folder.path())).expect("reads"));
        let expected = [Record::Input { now: Instant(3), input: u64::MAX }, Record::End(Ending::Panicked)];
        assert_eq!(records, expected);
    }

    #[test]
    fn a_file_keeps_to_its_limit_and_the_machine_goes_on() {
        let folder = tempfile::tempdir().expect("a temp dir");
        let options = RecordOptions { folder: folder.path().into(), limit_bytes: 1000 };
        let mut machine = Recorded::<Adder>::start(&node(), 100, Some(&options)).expect("starts");
        for now in 0..1000 {
            machine.handle(Instant(now), 1);
            assert_eq!(drain(&mut machine), [101 + now; 2]);
        }
        assert_eq!(machine.recordings_stopped(), 1);
        drop(machine);
        let bytes = std::fs::read(only_file(folder.path())).expect("reads");
        assert!(bytes.len() < 1100, "{} bytes", bytes.len());
        let records = records(&bytes);
        assert!(records.len() > 10, "{records:?}");
        let Some(Record::End(Ending::Stopped(reason))) = records.last() else { panic!("{records:?}") };
        assert!(reason.contains("--record-limit"), "{reason}");
    }

    /// A disk that writes nothing until it is told to.
    struct SlowDisk {
        go: Receiver<()>,
        written: SyncSender<Vec<u8>>,
    }

    impl Write for SlowDisk {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.go.recv().map_err(|_| std::io::Error::other("the disk is gone"))?;
            self.written.send(bytes.to_vec()).map_err(std::io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn on_disk(disk: impl Write + Send + 'static) -> Recorded<Adder> {
        let writer = Writer::spawn(disk, "slow.rec".into(), u64::MAX, 0).expect("starts");
        Recorded { machine: Adder::build(0), tape: Some(Tape::new(writer)) }
    }

    #[test]
    fn a_disk_that_is_too_slow_ends_the_recording_and_nothing_else() {
        let (go, gate) = sync_channel(2);
        let (written, files) = sync_channel(2);
        let mut machine = on_disk(SlowDisk { go: gate, written });
        let mut calls = 0;
        while machine.recordings_stopped() == 0 {
            machine.handle(Instant(0), 1);
            calls += 1;
            assert_eq!(drain(&mut machine), [calls; 2]);
            assert!(calls < 10_000_000, "the buffer has no limit");
        }
        machine.handle(Instant(0), 1);
        assert_eq!(drain(&mut machine), [calls + 1; 2], "it goes on");
        // What was accepted is written when the disk comes to itself, and then the reason.
        go.send(()).and_then(|()| go.send(())).expect("the disk waits");
        drop(machine);
        let mut bytes = preamble();
        let header =
            Header { machine: "adder".into(), ridge: String::new(), protocol: 0, node: node(), pid: 0, started_ms: 0 };
        push_frame(&header, &mut bytes);
        push_frame(&100u64, &mut bytes);
        bytes.extend(files.iter().flatten());
        let records = records(&bytes);
        assert!(matches!(records[0], Record::Input { now: Instant(0), input: 1 }));
        assert!(matches!(records[1], Record::Answer(Answer { outputs: 2, .. })));
        let Some(Record::End(Ending::Stopped(reason))) = records.last() else { panic!("no end") };
        assert!(reason.contains("too slow"), "{reason}");
    }

    #[test]
    fn a_disk_that_fails_ends_the_recording_and_nothing_else() {
        let (go, gate) = sync_channel(1);
        let (written, _files) = sync_channel(1);
        drop(go);
        let mut machine = on_disk(SlowDisk { go: gate, written });
        let mut calls = 0;
        let stopped = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while machine.recordings_stopped() == 0 {
            machine.handle(Instant(0), 1);
            calls += 1;
            assert_eq!(drain(&mut machine), [calls; 2]);
            assert!(std::time::Instant::now() < stopped, "nobody noticed");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}
