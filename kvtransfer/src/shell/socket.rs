//! The UDP socket under quinn: large buffers, and batches that the kernel accepts.
//!
//! quinn 0.11 hands the kernel up to 10 datagrams in one call and does not see that Linux refuses more than 65507
//! bytes: quinn-udp takes the error for a failed MTU probe and reports success, so with a path MTU above about 6500
//! every full batch is silently lost and the connection falls back to 1200 bytes. [`CappedSocket`] caps the batch.

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, UdpPoller};
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Most payload bytes in one UDP datagram over IPv4, and in one batch of datagrams.
pub const MAX_UDP_PAYLOAD: usize = 65_507;

/// A socket whose batches stay within [`MAX_UDP_PAYLOAD`].
#[derive(Debug)]
pub(crate) struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    segments: usize,
    receive_segments: usize,
    receive_buffer: usize,
}

impl CappedSocket {
    /// Binds `addr`, asks for `buffer_bytes` of socket buffer each way, and caps batches for datagrams of `mtu`.
    pub(crate) fn bind(addr: SocketAddr, mtu: u16, buffer_bytes: usize, runtime: &dyn Runtime) -> io::Result<Self> {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(addr),
            socket2::Type::DGRAM,
            Some(socket2::Protocol::UDP),
        )?;
        // The kernel silently grants less than asked for when net.core.[rw]mem_max is lower.
        socket.set_recv_buffer_size(buffer_bytes)?;
        socket.set_send_buffer_size(buffer_bytes)?;
        let (receive, send) = (socket.recv_buffer_size()?, socket.send_buffer_size()?);
        tracing::info!(%addr, asked = buffer_bytes, receive, send, "UDP socket buffers (Linux reports twice the payload)");
        socket.bind(&addr.into())?;
        let inner = runtime.wrap_udp_socket(UdpSocket::from(socket))?;
        let mtu = usize::from(mtu.max(1));
        Ok(Self {
            inner,
            segments: (MAX_UDP_PAYLOAD / mtu).max(1),
            receive_segments: 65_536_usize.div_ceil(mtu),
            // Linux doubles what it grants, for its own bookkeeping, and reports that.
            receive_buffer: if cfg!(target_os = "linux") { receive / 2 } else { receive },
        })
    }

    /// Payload bytes that wait in the kernel at most.
    pub(crate) fn receive_buffer(&self) -> usize {
        self.receive_buffer
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.segments)
    }

    fn max_receive_segments(&self) -> usize {
        // quinn allocates this many datagrams of the largest size for each slot of a receive batch. A slot must hold
        // the 64 KiB that the kernel may coalesce from smaller datagrams, or it would cut them off.
        self.inner.max_receive_segments().min(self.receive_segments)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
