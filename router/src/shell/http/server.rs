//! The accept loop and its end.
//!
//! `axum::serve`'s graceful shutdown waits for open event streams for ever (axum #2673); this one closes them after
//! a deadline.

use super::{App, HttpConfig, Shared, TextModel, router};
use crate::shell::gateway::Gateway;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

/// How long a client may take to send a request's head, or keep an idle connection open.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after an accept that failed for want of file descriptors, say.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long closed streams get to write their last event.
const CLOSING_GRACE: Duration = Duration::from_secs(1);

/// Serves HTTP on `listener` until `shutdown` completes, then stops accepting, lets answers finish for up to
/// [`HttpConfig::drain_deadline`] and ends what is left with an error event. Returns when every connection is closed.
pub async fn serve(
    listener: TcpListener,
    config: HttpConfig,
    model: Arc<dyn TextModel>,
    gateway: Gateway,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    if !config.bind.ip().is_loopback() && config.api_keys.is_empty() {
        tracing::warn!(bind = %config.bind, "anybody who reaches this address can use the model: no API key is set");
    }
    let connections = Arc::new(Semaphore::new(config.max_connections));
    let drain_deadline = config.drain_deadline;
    let (close, closing) = watch::channel(false);
    let app: Shared = Arc::new(App::new(config, model, gateway, closing)?);
    let router = router(app);
    let graceful = GracefulShutdown::new();
    let mut tasks = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        // A connection above the limit waits in the kernel's backlog.
        let accept = async {
            let permit = connections.clone().acquire_owned().await.expect("the semaphore is never closed");
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            accepted = accept => accepted,
            Some(_) = tasks.join_next() => continue,
            () = &mut shutdown => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = connection(stream, router.clone(), &graceful);
                tasks.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
    drop(listener);
    let everything_answered = async {
        graceful.shutdown().await;
        while tasks.join_next().await.is_some() {}
    };
    let mut everything_answered = pin!(everything_answered);
    if tokio::time::timeout(drain_deadline, &mut everything_answered).await.is_err() {
        tracing::warn!("closing streams that outlived the drain deadline");
        close.send_replace(true);
        // Dropping the tasks afterwards closes the connections of clients that do not read.
        tokio::time::timeout(CLOSING_GRACE, everything_answered).await.ok();
    }
    Ok(())
}

/// Serves one connection. hyper drops a request's handler, or the stream it returned, when the peer closes.
fn connection(
    stream: TcpStream,
    router: axum::Router,
    graceful: &GracefulShutdown,
) -> impl Future<Output = ()> + 'static {
    // Events are small and must not wait for each other.
    stream.set_nodelay(true).ok();
    let service = service_fn(move |request: Request<Incoming>| router.clone().oneshot(request.map(Body::new)));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_READ_TIMEOUT);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(HEADER_READ_TIMEOUT);
    let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
    let connection = graceful.watch(connection);
    async move {
        if let Err(error) = connection.await {
            tracing::debug!(error, "a connection ended");
        }
    }
}
