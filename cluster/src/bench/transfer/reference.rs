//! What the machine's loopback carries without Ridge: plaintext TCP between the same two processes, and iperf3.

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes per read and write, iperf3's own default.
const BUFFER: usize = 128 << 10;
/// How long a transfer may stand still.
const STALL: Duration = Duration::from_secs(30);
/// How often iperf3's server is tried until it listens, and how long is waited between two tries.
const TRIES: (u32, Duration) = (50, Duration::from_millis(20));

/// A listener on a free port of the loopback.
pub fn listen() -> anyhow::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on loopback TCP")
}

/// Takes `bytes` and says so with one byte.
pub fn receive(listener: &TcpListener, bytes: u64) -> anyhow::Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(STALL))?;
    let mut buffer = vec![0; BUFFER];
    let mut left = bytes;
    while left > 0 {
        let read = stream.read(&mut buffer)?;
        ensure!(read > 0, "TCP ended {left} bytes early");
        left = left.saturating_sub(read as u64);
    }
    Ok(stream.write_all(&[1])?)
}

/// Sends `bytes` and waits for the answer; returns bytes per second.
pub fn send(to: SocketAddr, bytes: u64) -> anyhow::Result<f64> {
    let mut stream = TcpStream::connect(to).context("cannot connect over loopback TCP")?;
    stream.set_write_timeout(Some(STALL))?;
    stream.set_read_timeout(Some(STALL))?;
    let buffer = vec![0x5a; BUFFER];
    let begin = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let part = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stream.write_all(&buffer[..part])?;
        left -= part as u64;
    }
    stream.read_exact(&mut [0])?;
    Ok(bytes as f64 / begin.elapsed().as_secs_f64())
}

/// What iperf3 measures over one TCP connection, in bytes per second; `None` if it is not installed, or saw nothing.
pub fn iperf3(bytes: u64) -> anyhow::Result<Option<f64>> {
    // The port is free again when the listener is dropped.
    let port = listen()?.local_addr()?.port().to_string();
    let server = Command::new("iperf3").args(["-s", "-1", "-p", &port]).stdout(Stdio::null()).spawn();
    let _server = match server {
        Ok(server) => Running(server),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("cannot start iperf3"),
    };
    let mut said = String::new();
    for _ in 0..TRIES.0 {
        let mut client = Command::new("iperf3");
        client.args(["-c", "127.0.0.1", "-p", &port, "-n", &bytes.to_string(), "-J"]);
        let output = client.output().context("cannot start iperf3")?;
        let report: Value = serde_json::from_slice(&output.stdout).context("iperf3's report")?;
        if let Some(bits) = report["end"]["sum_received"]["bits_per_second"].as_f64() {
            // It counts nothing when so little was sent that its receiver was told to stop before it looked.
            return Ok((bits > 0.0).then_some(bits / 8.0));
        }
        // Not listening yet, most likely; its exit status does not always say so.
        said = report["error"].to_string();
        std::thread::sleep(TRIES.1);
    }
    bail!("iperf3 has measured nothing: {said}")
}

/// A child that does not outlive its use.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_on_both_ends() {
        let listener = listen().expect("loopback");
        let addr = listener.local_addr().expect("bound");
        let receiver = std::thread::spawn(move || receive(&listener, 3 * BUFFER as u64 + 1));
        assert!(send(addr, 3 * BUFFER as u64 + 1).expect("sent") > 0.0);
        receiver.join().expect("no panic").expect("everything came");
    }

    #[test]
    fn an_early_end_is_an_error() {
        let listener = listen().expect("loopback");
        drop(TcpStream::connect(listener.local_addr().expect("bound")).expect("connects"));
        let error = receive(&listener, 10).expect_err("nothing came").to_string();
        assert!(error.contains("10 bytes early"), "{error}");
    }
}
