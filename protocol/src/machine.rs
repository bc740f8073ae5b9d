//! The contract between a machine, which decides, and its shell, which does.

use crate::time::Instant;

/// A deterministic state machine without I/O, clock, threads or randomness of its own.
///
/// A shell drives it in this order, and nothing else touches it:
///
/// 1. [`handle`](Machine::handle) an input, or [`handle_timeout`](Machine::handle_timeout) when
///    [`poll_timeout`](Machine::poll_timeout) has passed;
/// 2. call [`poll_output`](Machine::poll_output) until it yields `None`, doing what each output says;
/// 3. sleep until the next input or the instant of `poll_timeout`.
///
/// The same inputs at the same instants yield the same outputs, so a run can be simulated and replayed. Bad input
/// from a peer is a value that ends that session; a broken invariant of our own panics, in release builds too.
pub trait Machine {
    /// What can happen to it.
    type Input;
    /// What it wants done.
    type Output;

    /// Takes one event.
    fn handle(&mut self, now: Instant, input: Self::Input);
    /// Fires every deadline that has passed at `now`.
    fn handle_timeout(&mut self, now: Instant);
    /// The next thing to do, oldest first.
    fn poll_output(&mut self) -> Option<Self::Output>;
    /// When [`handle_timeout`](Machine::handle_timeout) wants to be called, if nothing happens before.
    fn poll_timeout(&self) -> Option<Instant>;
    /// Panics if an invariant is broken. Shells call it when idle, simulators after every step.
    fn check_integrity(&self);
}
