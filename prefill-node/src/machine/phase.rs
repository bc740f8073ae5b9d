//! Where a prompt stands, and the table of what may happen to it there.

use ridge_protocol::Step;

/// Where a prompt stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Unknown here, or no longer.
    Absent,
    /// Without blocks.
    Waiting,
    /// Being computed, chunk by chunk.
    Running,
    /// Computed. Its blocks stay until the hand-off is settled.
    Held,
    /// Given up, but the running pass still writes its blocks.
    Doomed,
}

/// What can happen to one prompt. Whether the running pass computes a part of it decides how it can be given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cause {
    /// The router wants it computed.
    Submit,
    /// It gets its blocks.
    Admit,
    /// Its last chunk is computed, and a decode node waits for its KV.
    Finish,
    /// Its last chunk is computed, and nobody waits.
    FinishAlone,
    /// Its last chunk is computed, and no token may follow it.
    NoToken,
    /// Nobody wants it any more.
    Cancel,
    /// The same during a pass that computes a part of it.
    CancelInPass,
    /// The decode node has everything.
    Commit,
    /// The hand-off failed.
    Abort,
    /// The same during a pass that computes a part of it.
    AbortInPass,
    /// The pass that kept it here is over.
    PassOver,
}

/// The transition table: every legal step of a prompt, and what the others mean.
pub(super) fn step(phase: Phase, cause: Cause) -> Step<Phase> {
    use Cause::*;
    match (phase, cause) {
        (Phase::Absent, Submit) => Step::Enter(Phase::Waiting),
        // It ended while these were on their way.
        (Phase::Absent, Cancel | Commit | Abort) => Step::Ignore,
        (Phase::Absent, _) => Step::Bug,

        // A duplicate is not an error.
        (_, Submit) => Step::Ignore,

        (Phase::Waiting, Admit) => Step::Enter(Phase::Running),
        (Phase::Waiting, Cancel | Abort) => Step::End,
        (Phase::Waiting, _) => Step::Bug,

        (Phase::Running, Finish) => Step::Enter(Phase::Held),
        (Phase::Running, FinishAlone | NoToken | Cancel | Abort) => Step::End,
        (Phase::Running, CancelInPass | AbortInPass) => Step::Enter(Phase::Doomed),
        // `Commit`: the first token is not known yet, and a hand-off ends with it.
        (Phase::Running, Admit | Commit | PassOver) => Step::Bug,

        (Phase::Held, Cancel | Commit | Abort) => Step::End,
        (Phase::Held, _) => Step::Bug,

        (Phase::Doomed, CancelInPass) => Step::Ignore,
        (Phase::Doomed, PassOver) => Step::End,
        // Its hand-off ended before.
        (Phase::Doomed, _) => Step::Bug,
    }
}

#[cfg(test)]
#[test]
fn transitions_are_as_recorded() {
    use Cause::*;
    let phases = [Phase::Absent, Phase::Waiting, Phase::Running, Phase::Held, Phase::Doomed];
    let causes =
        [Submit, Admit, Finish, FinishAlone, NoToken, Cancel, CancelInPass, Commit, Abort, AbortInPass, PassOver];
    let table = ridge_protocol::step::table("prefill", &phases, &causes, step);
    ridge_protocol::step::check_table(concat!(env!("CARGO_MANIFEST_DIR"), "/src/machine/transitions.txt"), &table);
}
