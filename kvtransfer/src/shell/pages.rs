//! Pages on unidirectional streams: a header, then the page's bytes, again and again until the stream ends.
//!
//! The writer opens a stream per transfer, so that a cancelled transfer can be cut off; the reader does not care
//! which stream a page comes on. Pages yield to control messages on the same connection.

use super::control::{ControlError, lost_reason};
use super::endpoint::{CLOSE_PROTOCOL, MAX_PAGE_STREAMS};
use super::offences::{Offence, Offences};
use super::server::KvServerEvent;
use bytes::Bytes;
use quinn::{Connection, ReadError, RecvStream, SendStream, VarInt, WriteError};
use ridge_protocol::page::{PAGE_HEADER_BYTES, PageHeader, PageHeaderError};
use ridge_protocol::{NodeName, RequestId};
use std::collections::{BTreeMap, VecDeque};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// After control.
const PAGE_PRIORITY: i32 = -10;
/// Streams the writer keeps open; beyond it the least recently used one is finished. Half of what the peer allows,
/// because a finished stream counts until the peer has read it.
const MAX_OPEN_STREAMS: usize = MAX_PAGE_STREAMS as usize / 2;
/// Most slices that one read of a stream yields: a page of 32 KiB in datagrams of 1472 bytes.
const READ_CHUNKS: usize = 32;
/// On a stream whose transfer was aborted.
const RESET_ABORTED: VarInt = VarInt::from_u32(4);

/// Work for [`write_pages`].
#[derive(Debug)]
pub(crate) enum PageItem {
    /// Write this page.
    Page(PageHeader, Bytes),
    /// The transfer has no more pages.
    End(RequestId),
    /// The transfer was aborted: what is in flight need not arrive.
    Reset(RequestId),
}

/// Why page streams failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PageError {
    /// A header is not one.
    #[error(transparent)]
    Header(#[from] PageHeaderError),
    /// A page of a size no page of this model has.
    #[error("page of {got} bytes where {want} were agreed")]
    Size {
        /// In the header.
        got: u32,
        /// By the identities.
        want: usize,
    },
    /// A stream ended inside a header or a page.
    #[error("page stream ended inside a page")]
    Truncated,
    /// The connection ended.
    #[error("{0}")]
    Lost(String),
}

/// Writes queued pages until the queue closes or the connection does, and says why it stopped.
pub(crate) async fn write_pages(conn: Connection, mut queue: mpsc::Receiver<PageItem>) -> String {
    let mut streams = Streams { conn, open: BTreeMap::new(), uses: 0 };
    while let Some(item) = queue.recv().await {
        let written = match item {
            PageItem::Page(header, bytes) => streams.write(header, bytes).await,
            PageItem::End(request) => {
                streams.close(request, |stream| drop(stream.finish()));
                Ok(())
            }
            PageItem::Reset(request) => {
                streams.close(request, |stream| drop(stream.reset(RESET_ABORTED)));
                Ok(())
            }
        };
        if let Err(e) = written {
            return lost_reason(&streams.conn, &ControlError::Lost(e.to_string()));
        }
    }
    "no longer needed".to_owned()
}

struct Streams {
    conn: Connection,
    /// The open stream of a transfer, and when it was last used.
    open: BTreeMap<RequestId, (u64, SendStream)>,
    uses: u64,
}

impl Streams {
    async fn write(&mut self, header: PageHeader, bytes: Bytes) -> Result<(), PageError> {
        assert_eq!(header.len as usize, bytes.len(), "{}: a page is as long as its header says", header.request);
        if !self.open.contains_key(&header.request) {
            if self.open.len() >= MAX_OPEN_STREAMS {
                let oldest = self.open.iter().min_by_key(|(_, (used, _))| *used).map(|(request, _)| *request);
                // Its transfer goes on with a new stream.
                self.close(oldest.expect("the map is full"), |stream| drop(stream.finish()));
            }
            let stream = self.conn.open_uni().await.map_err(|e| PageError::Lost(e.to_string()))?;
            let _ = stream.set_priority(PAGE_PRIORITY);
            self.open.insert(header.request, (0, stream));
        }
        self.uses += 1;
        let (used, stream) = self.open.get_mut(&header.request).expect("just opened");
        *used = self.uses;
        let mut frame = [Bytes::copy_from_slice(&header.encode()), bytes];
        match stream.write_all_chunks(&mut frame).await {
            Ok(()) => Ok(()),
            // The peer does not want this transfer any more; its machine says so on the control stream.
            Err(WriteError::Stopped(_)) => Ok(()),
            Err(e) => Err(PageError::Lost(e.to_string())),
        }
    }

    fn close(&mut self, request: RequestId, how: impl FnOnce(&mut SendStream)) {
        if let Some((_, mut stream)) = self.open.remove(&request) {
            how(&mut stream);
        }
    }
}

/// Reads pages of `page_bytes` from every stream the peer opens, and says why it stopped. A peer that sends
/// anything else is disconnected.
pub(crate) async fn read_pages(
    conn: Connection,
    from: NodeName,
    page_bytes: usize,
    events: mpsc::Sender<KvServerEvent>,
    offences: &Offences,
) -> String {
    // The transport allows MAX_PAGE_STREAMS at once, which bounds the tasks; each holds one page.
    let mut streams = JoinSet::new();
    let error = loop {
        tokio::select! {
            accepted = conn.accept_uni() => match accepted {
                Ok(stream) => {
                    streams.spawn(read_stream(stream, from.clone(), page_bytes, events.clone()));
                }
                Err(e) => break PageError::Lost(e.to_string()),
            },
            Some(ended) = streams.join_next() => match ended {
                Ok(Ok(())) => {}
                Ok(Err(e)) => break e,
                Err(e) => break PageError::Lost(format!("page reader failed: {e}")),
            },
        }
    };
    streams.shutdown().await;
    let reason = match error {
        PageError::Lost(reason) => lost_reason(&conn, &ControlError::Lost(reason)),
        other => {
            offences.count(Offence::Page);
            other.to_string()
        }
    };
    conn.close(CLOSE_PROTOCOL, reason.as_bytes());
    reason
}

async fn read_stream(
    stream: RecvStream,
    from: NodeName,
    page_bytes: usize,
    events: mpsc::Sender<KvServerEvent>,
) -> Result<(), PageError> {
    let mut inflow = Inflow { stream, pieces: VecDeque::new(), len: 0 };
    while let Some(header) = inflow.take(PAGE_HEADER_BYTES, true).await? {
        let header = PageHeader::decode(&contiguous(&header))?;
        if header.len as usize != page_bytes {
            return Err(PageError::Size { got: header.len, want: page_bytes });
        }
        let Some(pieces) = inflow.take(page_bytes, false).await? else { break };
        let page = KvServerEvent::Page { from: from.clone(), header, bytes: PageBytes(pieces) };
        if events.send(page).await.is_err() {
            return Err(PageError::Lost("nobody listens".to_owned()));
        }
    }
    Ok(())
}

/// A stream's bytes in the transport's own slices of datagrams, so that they are copied once: to where they belong.
struct Inflow {
    stream: RecvStream,
    /// Read and not taken yet. No more than what one read yields beyond a page.
    pieces: VecDeque<Bytes>,
    /// Bytes in `pieces`.
    len: usize,
}

impl Inflow {
    /// The next `len` bytes; `None` if the stream was reset, or ended before the first of them where it may end.
    async fn take(&mut self, len: usize, may_end: bool) -> Result<Option<Vec<Bytes>>, PageError> {
        while self.len < len {
            let mut chunks = [const { Bytes::new() }; READ_CHUNKS];
            match self.stream.read_chunks(&mut chunks).await {
                Ok(Some(count)) => {
                    self.len += chunks[..count].iter().map(Bytes::len).sum::<usize>();
                    self.pieces.extend(chunks.into_iter().take(count));
                }
                Ok(None) if may_end && self.len == 0 => return Ok(None),
                Ok(None) => return Err(PageError::Truncated),
                Err(ReadError::Reset(_)) => return Ok(None),
                Err(e) => return Err(PageError::Lost(e.to_string())),
            }
        }
        self.len -= len;
        let (mut taken, mut missing) = (Vec::new(), len);
        while missing > 0 {
            let front = self.pieces.front_mut().expect("`len` bytes are here");
            let piece = front.split_to(missing.min(front.len()));
            if front.is_empty() {
                self.pieces.pop_front();
            }
            missing -= piece.len();
            taken.push(piece);
        }
        Ok(Some(taken))
    }
}

/// A header's bytes in one piece.
fn contiguous(pieces: &[Bytes]) -> [u8; PAGE_HEADER_BYTES] {
    pieces.concat().try_into().expect("as many bytes as were asked for")
}

/// The bytes of a page as they came: in slices of the datagrams that carried them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageBytes(Vec<Bytes>);

impl PageBytes {
    /// The pieces, one after the other as long as the page.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|piece| &piece[..])
    }
}
