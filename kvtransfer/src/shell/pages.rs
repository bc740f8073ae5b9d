//! Pages on unidirectional streams: a header, then the page's bytes, again and again until the stream ends.
//!
//! The writer opens a stream per transfer, so that a cancelled transfer can be cut off; the reader does not care
//! which stream a page comes on. Pages yield to control messages on the same connection.

use super::control::{ControlError, lost_reason};
use super::endpoint::{CLOSE_PROTOCOL, MAX_PAGE_STREAMS};
use super::offences::{Offence, Offences};
use super::server::KvServerEvent;
use bytes::{BufMut, Bytes, BytesMut};
use quinn::{Connection, ReadError, ReadExactError, RecvStream, SendStream, VarInt, WriteError};
use ridge_protocol::page::{PAGE_HEADER_BYTES, PageHeader, PageHeaderError};
use ridge_protocol::{NodeName, RequestId};
use std::collections::BTreeMap;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// After control.
const PAGE_PRIORITY: i32 = -10;
/// Streams the writer keeps open; beyond it the least recently used one is finished. Half of what the peer allows,
/// because a finished stream counts until the peer has read it.
const MAX_OPEN_STREAMS: usize = MAX_PAGE_STREAMS as usize / 2;
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
    mut stream: RecvStream,
    from: NodeName,
    page_bytes: usize,
    events: mpsc::Sender<KvServerEvent>,
) -> Result<(), PageError> {
    let mut buffer = BytesMut::new();
    loop {
        let mut header = [0; PAGE_HEADER_BYTES];
        match stream.read_exact(&mut header).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0) | ReadExactError::ReadError(ReadError::Reset(_))) => return Ok(()),
            Err(ReadExactError::FinishedEarly(_)) => return Err(PageError::Truncated),
            Err(ReadExactError::ReadError(e)) => return Err(PageError::Lost(e.to_string())),
        }
        let header = PageHeader::decode(&header)?;
        if header.len as usize != page_bytes {
            return Err(PageError::Size { got: header.len, want: page_bytes });
        }
        // Takes the same memory again once the last page was dropped, and does not clear it first.
        buffer.reserve(page_bytes);
        while buffer.len() < page_bytes {
            let missing = page_bytes - buffer.len();
            match stream.read_buf(&mut (&mut buffer).limit(missing)).await {
                Ok(0) => return Err(PageError::Truncated),
                Ok(_) => {}
                Err(e) => {
                    // quinn puts its own error into the I/O error.
                    return match e.get_ref().and_then(|inner| inner.downcast_ref::<ReadError>()) {
                        Some(ReadError::Reset(_)) => Ok(()),
                        _ => Err(PageError::Lost(e.to_string())),
                    };
                }
            }
        }
        let page = KvServerEvent::Page { from: from.clone(), header, bytes: buffer.split().freeze() };
        if events.send(page).await.is_err() {
            return Err(PageError::Lost("nobody listens".to_owned()));
        }
    }
}
