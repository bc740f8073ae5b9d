//! A process that says [`Line`]s, and has until a deadline. Read [`run`].

use super::line::Line;
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::VecDeque;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Last lines of its talk that are kept, to say why it failed.
const KEPT: usize = 6;
/// Longest part of a line that is read at once: what is longer is no finding.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// How it ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It said all it had to.
    Done,
    /// Its time was over first.
    OutOfTime,
    /// It broke.
    Failed(String),
    /// It was not run.
    Skipped(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::OutOfTime => f.write_str("out of time; what it had found is kept"),
            Self::Failed(why) => write!(f, "FAILED: {why}"),
            Self::Skipped(why) => write!(f, "skipped: {why}"),
        }
    }
}

enum Heard {
    Finding(Line),
    Talk(String),
}

/// Starts a process and hears what it says; ends it, and whatever it started, at the deadline. Its standard error goes to ours.
pub fn run(mut command: Command, deadline: Instant, on_line: &mut dyn FnMut(Line)) -> Outcome {
    let program = command.get_program().to_string_lossy().into_owned();
    // The end of its input tells a phase that nobody waits for it any more. A group of its own is ended as one.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Outcome::Skipped(format!("{program} is not on this machine"));
        }
        Err(error) => return Outcome::Failed(format!("{program} does not start: {error}")),
    };
    let (sender, heard) = channel();
    if let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) {
        listen(out, sender.clone(), false);
        listen(err, sender, true);
    }
    let mut talk: VecDeque<String> = VecDeque::new();
    // Until both ends are closed; a helper of it that lives on may hold them open, so its own end is looked for as well.
    let mut ended = None;
    loop {
        let now = Instant::now();
        if now >= deadline {
            end(&mut child);
            return Outcome::OutOfTime;
        }
        let patience = (deadline - now).min(Duration::from_millis(200));
        match heard.recv_timeout(patience) {
            Ok(Heard::Finding(line)) => on_line(line),
            Ok(Heard::Talk(text)) => {
                talk.push_back(text);
                if talk.len() > KEPT {
                    talk.pop_front();
                }
            }
            Err(RecvTimeoutError::Timeout) if ended.is_none() => ended = child.try_wait().ok().flatten(),
            // It has ended, and nothing came for a while.
            Err(RecvTimeoutError::Timeout) => break,
            Err(RecvTimeoutError::Disconnected) => match child.try_wait() {
                Ok(Some(status)) => {
                    ended = Some(status);
                    break;
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => return Outcome::Failed(format!("{program}: {error}")),
            },
        }
    }
    end(&mut child);
    match ended {
        Some(status) if status.success() => Outcome::Done,
        Some(status) => {
            let talk: Vec<String> = talk.into();
            Outcome::Failed(format!("{program} ended with {status}: {}", talk.join(" / ")))
        }
        None => Outcome::Failed(format!("{program} went away")),
    }
}

/// Ends its group, and takes its leave of it.
fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // Nobody is left in it, usually.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

/// Reads what a process says on a thread, until it closes its end.
fn listen(from: impl Read + Send + 'static, to: Sender<Heard>, aloud: bool) {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        loop {
            let mut bytes = Vec::new();
            match (&mut from).take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes) {
                Ok(read) if read > 0 => {}
                _ => return,
            }
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            if aloud {
                eprintln!("{text}");
            }
            let heard = match Line::parse(&text) {
                Some(line) if !aloud => Heard::Finding(line),
                _ if text.is_empty() => continue,
                _ => Heard::Talk(text),
            };
            if to.send(heard).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, within_ms: u64) -> (Outcome, Vec<Line>) {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let mut lines = Vec::new();
        let deadline = Instant::now() + Duration::from_millis(within_ms);
        (run(command, deadline, &mut |line| lines.push(line)), lines)
    }

    #[test]
    fn findings_are_heard_and_talk_explains_failures() {
        let said = r#"echo '{"name":"a","seconds":1}'; echo talk; echo worse >&2"#;
        assert_eq!(shell(said, 20_000), (Outcome::Done, vec![Line::seconds("a", 1.0)]));
        let (outcome, lines) = shell(&format!("{said}; exit 3"), 20_000);
        let Outcome::Failed(why) = &outcome else { panic!("{outcome}") };
        assert!(why.contains("exit status: 3") && why.contains("worse") && why.contains("talk"), "{why}");
        assert_eq!(lines.len(), 1);
        let gone = run(Command::new("ridge-no-such-program"), Instant::now() + Duration::from_secs(9), &mut |_| {});
        assert_eq!(gone, Outcome::Skipped("ridge-no-such-program is not on this machine".into()));
    }

    /// What was said before the deadline is kept, and the process's own children end with it.
    #[test]
    fn a_process_that_hangs_is_ended() {
        let begun = Instant::now();
        let (outcome, lines) = shell(r#"echo '{"name":"a","seconds":1}'; sleep 600 & sleep 600"#, 1500);
        assert_eq!((outcome, lines), (Outcome::OutOfTime, vec![Line::seconds("a", 1.0)]));
        assert!(begun.elapsed() < Duration::from_secs(60));
    }

    /// A helper that outlives it and holds its output open does not hold us.
    #[test]
    fn a_process_that_leaves_a_helper_behind_has_ended() {
        let begun = Instant::now();
        assert_eq!(shell("sleep 600 & exit 0", 60_000).0, Outcome::Done);
        assert!(begun.elapsed() < Duration::from_secs(50));
    }
}
