//! What an event means in a phase of a machine's session: the value of its transition table.
//!
//! Every machine declares its legal steps in one function from a phase and a cause to a [`Step`], and a snapshot of
//! [`table`] stands beside it, so that a changed step shows as a changed line.

use std::fmt::Debug;

/// What happens to a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step<Phase> {
    /// It is (or stays) in this phase.
    Enter(Phase),
    /// It is over.
    End,
    /// Nothing: late or repeated.
    Ignore,
    /// The peer broke the protocol: the session is aborted.
    Violation,
    /// Our own side broke its contract: the machine panics.
    Bug,
}

/// A transition table as text: a line each of `machine phase cause end`.
pub fn table<P: Copy + PartialEq + Debug, C: Copy + Debug>(
    machine: &str,
    phases: &[P],
    causes: &[C],
    step: fn(P, C) -> Step<P>,
) -> String {
    let mut text = String::new();
    for phase in phases {
        for cause in causes {
            let end = match step(*phase, *cause) {
                Step::Enter(to) if to == *phase => "stays".to_owned(),
                Step::Enter(to) => format!("-> {to:?}"),
                other => format!("{other:?}").to_lowercase(),
            };
            text.push_str(&format!("{machine:8} {:12} {:12} {end}\n", format!("{phase:?}"), format!("{cause:?}")));
        }
    }
    text
}

/// Compares a table with its snapshot, a file; with `RIDGE_BLESS=1` in the environment, after a deliberate change,
/// rewrites it first.
///
/// # Panics
///
/// If they differ.
pub fn check_table(snapshot: &str, table: &str) {
    if std::env::var_os("RIDGE_BLESS").is_some() {
        std::fs::write(snapshot, table).unwrap_or_else(|error| panic!("{snapshot}: {error}"));
    }
    assert_eq!(std::fs::read_to_string(snapshot).unwrap_or_default(), table);
}
