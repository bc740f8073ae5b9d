//! The receiving process as the sending one sees it: orders go in, lines of JSON come out.

use super::receiver::Order;
use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// How long an answer may take: longer than a round.
const ANSWER_DEADLINE: Duration = Duration::from_secs(180);
/// How long the process gets to end.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// A receiving process. Dropping it ends it.
pub struct ReceivingProcess {
    child: Child,
    lines: Receiver<String>,
}

impl ReceivingProcess {
    /// Starts one of this program.
    pub fn start(tls_dir: &Path, flags: &[String]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.args(["bench", "transfer-receiver", "--tls-dir"]).arg(tls_dir).args(flags);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the receiving process")?;
        let stdout = child.stdout.take().expect("it is a pipe");
        let lines = read_lines(stdout)?;
        Ok(Self { child, lines })
    }

    /// Tells it what to do next.
    pub fn order(&mut self, order: Order) -> anyhow::Result<()> {
        let stdin = self.child.stdin.as_mut().expect("it is a pipe");
        writeln!(stdin, "{}", serde_json::to_string(&order)?).context("the receiving process takes no orders any more")
    }

    /// Its next answer.
    pub fn answer<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        match self.lines.recv_timeout(ANSWER_DEADLINE) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("the receiving process said {line:?}")),
            Err(RecvTimeoutError::Timeout) => bail!("the receiving process said nothing for {ANSWER_DEADLINE:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the receiving process has ended; what it said is above"),
        }
    }
}

impl Drop for ReceivingProcess {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + STOP_DEADLINE;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A thread reads them, so that waiting for one can have a deadline.
fn read_lines(stdout: ChildStdout) -> anyhow::Result<Receiver<String>> {
    let (to_lines, lines) = sync_channel(16);
    let read = move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if to_lines.send(line).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("receiver-stdout".into()).spawn(read).context("cannot start a thread")?;
    Ok(lines)
}
