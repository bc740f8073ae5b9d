//! Typed messages over one bidirectional stream.
//!
//! [`Control`] is for the handshake, where one side speaks and the other answers. [`Control::split`] then gives the
//! node's loop a handle that never blocks and a stream of events that ends with exactly one `Closed`.

use super::endpoint::{CLOSE_DONE, CLOSE_OVERLOAD, CLOSE_PROTOCOL, Endpoint};
use super::offences::{Offence, Offences};
use quinn::{Connection, ReadExactError, RecvStream, SendStream};
use ridge_protocol::wire::{self, FRAME_HEADER_BYTES, FrameHeader, Message, WireError};
use ridge_protocol::{Duration, NodeName, Role};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// Control before pages.
const CONTROL_PRIORITY: i32 = 10;
/// How long a graceful close waits for the peer to acknowledge the last message.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);
/// Messages waiting to be written; more means that the peer does not read.
pub(crate) const CONTROL_QUEUE: usize = 1 << 14;

/// Why a control stream is of no more use.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ControlError {
    /// The connection ended.
    #[error("{0}")]
    Lost(String),
    /// The peer finished its half of the stream.
    #[error("the peer closed the control stream")]
    Finished,
    /// The peer finished its half of the stream too early.
    #[error("the control stream ended inside a message")]
    Truncated,
    /// What came is not a message.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Nothing came in time.
    #[error("no message within {0:?}")]
    Deadline(Duration),
    /// A handle's queue is full; the connection is being closed.
    #[error("control queue is full: {CONTROL_QUEUE} messages wait for the peer to read")]
    QueueFull,
    /// A handle's connection is closed.
    #[error("the control stream is closed")]
    Closed,
}

/// What a split control stream yields.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ControlEvent<Rx> {
    /// The peer spoke.
    Message(Rx),
    /// It never will again. Always last, exactly once.
    Closed(String),
}

/// One control stream, not yet split: says `Tx`, hears `Rx`.
#[derive(Debug)]
pub struct Control<Tx, Rx> {
    conn: Connection,
    writer: SendStream,
    reader: Reader<Rx>,
    says: PhantomData<fn(Tx)>,
}

impl<Tx: Message, Rx: Message> Control<Tx, Rx> {
    /// The dialing side opens the stream. The peer hears of it with the first message.
    pub async fn open(endpoint: &Endpoint, conn: Connection) -> Result<Self, ControlError> {
        let (send, recv) = conn.open_bi().await.map_err(|e| ControlError::Lost(e.to_string()))?;
        Ok(Self::new(endpoint, conn, send, recv))
    }

    /// The accepting side waits for the stream, as long as a handshake may take.
    pub async fn accept(endpoint: &Endpoint, conn: Connection) -> Result<Self, ControlError> {
        let deadline = endpoint.options().handshake_deadline;
        let accepted = tokio::time::timeout(deadline, conn.accept_bi()).await;
        let (send, recv) = accepted
            .map_err(|_| ControlError::Deadline(deadline))
            .and_then(|opened| opened.map_err(|e| ControlError::Lost(e.to_string())))
            .inspect_err(|_| endpoint.offences().count(Offence::Handshake))?;
        Ok(Self::new(endpoint, conn, send, recv))
    }

    fn new(endpoint: &Endpoint, conn: Connection, writer: SendStream, recv: RecvStream) -> Self {
        // Fails only on a stream that is closed, which the first write reports.
        let _ = writer.set_priority(CONTROL_PRIORITY);
        let reader = Reader { conn: conn.clone(), recv, offences: endpoint.offences().clone(), hears: PhantomData };
        Self { conn, writer, reader, says: PhantomData }
    }

    /// The connection it runs on.
    pub fn connection(&self) -> &Connection {
        &self.conn
    }

    /// Whether the peer's certificate is for this name and role.
    pub fn verify_peer(&self, name: &NodeName, role: Role) -> Result<(), super::PeerError> {
        super::tls::verify_peer(&self.conn, name, role)
    }

    /// Writes one message.
    pub async fn send(&mut self, message: &Tx) -> Result<(), ControlError> {
        write_message(&mut self.writer, message).await
    }

    /// Reads one message.
    pub async fn recv(&mut self, deadline: Duration) -> Result<Rx, ControlError> {
        tokio::time::timeout(deadline, self.reader.read()).await.map_err(|_| ControlError::Deadline(deadline))?
    }

    /// Sends a last message, waits a moment for it to arrive, and closes the connection with `reason`.
    pub(crate) async fn refuse(mut self, message: &Tx, code: quinn::VarInt, reason: &str) {
        if self.send(message).await.is_ok() && self.writer.finish().is_ok() {
            let _ = tokio::time::timeout(FLUSH_DEADLINE, self.writer.stopped()).await;
        }
        self.conn.close(code, reason.as_bytes());
    }

    /// Starts a writer and a reader task; at most `events` of them wait for the caller, then the peer has to.
    pub fn split(self, events: usize) -> (ControlHandle<Tx>, mpsc::Receiver<ControlEvent<Rx>>)
    where
        Tx: Send + Sync + 'static,
        Rx: Send + 'static,
    {
        let (to_events, from_reader) = mpsc::channel(events);
        let (handle, queue) = ControlHandle::new(self.conn.clone());
        let (writer, reader) = self.into_halves();
        tokio::spawn(writer.run(queue));
        tokio::spawn(async move {
            let reason = reader.run(&to_events, |message| Ok(ControlEvent::Message(message))).await;
            let _ = to_events.send(ControlEvent::Closed(reason)).await;
        });
        (handle, from_reader)
    }

    /// For a caller that runs both halves itself.
    pub(crate) fn into_halves(self) -> (Writer<Tx>, Reader<Rx>) {
        (Writer { conn: self.conn, send: self.writer, says: PhantomData }, self.reader)
    }
}

/// The node loop's end of a control stream. Dropping it closes the connection after what is queued.
#[derive(Debug)]
pub struct ControlHandle<Tx> {
    queue: Option<mpsc::Sender<Tx>>,
    conn: Connection,
    close: CloseReason,
}

/// Why a handle closes its connection, for the writer that does it.
type CloseReason = Arc<Mutex<Option<String>>>;

/// The receiving end of a [`ControlHandle`].
#[derive(Debug)]
pub(crate) struct ControlQueue<Tx> {
    queue: mpsc::Receiver<Tx>,
    close: CloseReason,
}

impl<Tx> ControlHandle<Tx> {
    pub(crate) fn new(conn: Connection) -> (Self, ControlQueue<Tx>) {
        let (to, queue) = mpsc::channel(CONTROL_QUEUE);
        let close = CloseReason::default();
        (Self { queue: Some(to), conn, close: close.clone() }, ControlQueue { queue, close })
    }

    /// The receiving end of a queue that somebody else fills.
    pub(crate) fn queue_of(queue: mpsc::Receiver<Tx>) -> ControlQueue<Tx> {
        ControlQueue { queue, close: CloseReason::default() }
    }

    /// Queues a message. A full queue closes the connection: its peer does not read.
    pub fn try_send(&mut self, message: Tx) -> Result<(), ControlError> {
        let queue = self.queue.as_ref().ok_or(ControlError::Closed)?;
        match queue.try_send(message) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(ControlError::Closed),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.conn.close(CLOSE_OVERLOAD, ControlError::QueueFull.to_string().as_bytes());
                self.queue = None;
                Err(ControlError::QueueFull)
            }
        }
    }

    /// Closes the connection after everything queued was delivered, or after a second.
    pub fn close(&mut self, reason: &str) {
        self.close.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.to_owned());
        self.queue = None;
    }
}

/// The saying half.
#[derive(Debug)]
pub(crate) struct Writer<Tx> {
    conn: Connection,
    send: SendStream,
    says: PhantomData<fn(Tx)>,
}

impl<Tx: Message> Writer<Tx> {
    /// Writes what is queued; closes the connection when the queue's other end is gone. Says why it stopped.
    pub(crate) async fn run(mut self, queue: ControlQueue<Tx>) -> String {
        let ControlQueue { mut queue, close } = queue;
        while let Some(message) = queue.recv().await {
            if let Err(e) = write_message(&mut self.send, &message).await {
                // Our own message may break a limit: the peer must not wait for it.
                let code = if let ControlError::Wire(_) = e { CLOSE_PROTOCOL } else { CLOSE_DONE };
                let reason = lost_reason(&self.conn, &e);
                self.conn.close(code, reason.as_bytes());
                return reason;
            }
        }
        if self.send.finish().is_ok() {
            let _ = tokio::time::timeout(FLUSH_DEADLINE, self.send.stopped()).await;
        }
        let reason = close.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reason = reason.unwrap_or_else(|| "no longer needed".to_owned());
        self.conn.close(CLOSE_DONE, reason.as_bytes());
        reason
    }
}

async fn write_message<Tx: Message>(writer: &mut SendStream, message: &Tx) -> Result<(), ControlError> {
    let frame = wire::encode(message)?;
    writer.write_chunk(frame.into()).await.map_err(|e| ControlError::Lost(e.to_string()))
}

/// The hearing half.
#[derive(Debug)]
pub(crate) struct Reader<Rx> {
    conn: Connection,
    recv: RecvStream,
    offences: Offences,
    hears: PhantomData<fn() -> Rx>,
}

impl<Rx: Message> Reader<Rx> {
    /// One message. The header is judged before the body is allocated. Not cancel-safe.
    async fn read(&mut self) -> Result<Rx, ControlError> {
        self.read_frame().await.inspect_err(|e| {
            if let ControlError::Wire(_) | ControlError::Truncated = e {
                self.offences.count(Offence::Control);
            }
        })
    }

    async fn read_frame(&mut self) -> Result<Rx, ControlError> {
        let mut header = [0; FRAME_HEADER_BYTES];
        self.recv.read_exact(&mut header).await.map_err(|e| self.error(e))?;
        let header = FrameHeader::decode::<Rx>(&header)?;
        let mut body = vec![0; header.len as usize];
        self.recv.read_exact(&mut body).await.map_err(|e| self.error(e))?;
        Ok(wire::decode(&body)?)
    }

    fn error(&self, e: ReadExactError) -> ControlError {
        let e = match e {
            ReadExactError::FinishedEarly(0) => ControlError::Finished,
            ReadExactError::FinishedEarly(_) => ControlError::Truncated,
            ReadExactError::ReadError(e) => ControlError::Lost(e.to_string()),
        };
        if self.conn.close_reason().is_some() { ControlError::Lost(lost_reason(&self.conn, &e)) } else { e }
    }

    /// Hands over messages until there are no more, and says why. `event` objects to a message with a reason,
    /// which closes the connection.
    pub(crate) async fn run<E>(
        mut self,
        events: &mpsc::Sender<E>,
        mut event: impl FnMut(Rx) -> Result<E, String>,
    ) -> String {
        let reason = loop {
            let message = match self.read().await {
                Ok(message) => message,
                Err(e) => break lost_reason(&self.conn, &e),
            };
            match event(message) {
                Ok(event) => {
                    if events.send(event).await.is_err() {
                        break "nobody listens".to_owned();
                    }
                }
                Err(reason) => {
                    self.offences.count(Offence::Control);
                    break reason;
                }
            }
        };
        // Without effect on a connection that is closed already.
        self.conn.close(CLOSE_PROTOCOL, reason.as_bytes());
        reason
    }
}

/// Why a stream failed: what ended the connection says more than what ended the stream.
pub(crate) fn lost_reason(conn: &Connection, error: &ControlError) -> String {
    match conn.close_reason() {
        Some(quinn::ConnectionError::ApplicationClosed(close)) if !close.reason.is_empty() => {
            format!("closed by peer: {}", String::from_utf8_lossy(&close.reason))
        }
        Some(closed) if !matches!(error, ControlError::Wire(_)) => closed.to_string(),
        _ => error.to_string(),
    }
}
