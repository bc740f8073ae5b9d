//! The HTTP server over loopback, with a byte-level model and a scripted cluster behind it.

mod answers;
mod client;
mod disconnect;
mod fake;
mod operations;
mod parameters;
mod resume;
mod streams;
