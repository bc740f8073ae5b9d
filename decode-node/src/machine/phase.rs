//! Where a sequence stands, and the table of what may happen to it there.

use ridge_protocol::Step;

/// Where a sequence stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Unknown here, or no longer.
    Absent,
    /// Without blocks.
    Waiting,
    /// Blocks are reserved and KV lands in them.
    Transferring,
    /// In the batch: to be computed, chunk by chunk, then token by token.
    Running,
    /// Its KV is held until another decode node has it, or nobody wants it any more.
    Moving,
    /// Given up, but the running pass still writes its blocks.
    Doomed,
}

/// What can happen to one sequence. Whether the running pass computes a part of it decides how it can be given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cause {
    /// The router wants it continued.
    Submit,
    /// It gets blocks, for KV that comes.
    Reserve,
    /// It gets blocks, and is computed here.
    Admit,
    /// Its KV is here and verified.
    Land,
    /// The hand-off failed, as the receiver says.
    Fail,
    /// The same, as the router says, who may know before.
    FailAfar,
    /// The hand-off failed, and all of its prompt was cached anyway: it needs other blocks (see `compute_here`).
    FailWhole,
    /// It makes room for others.
    Preempt,
    /// Another node is to continue it.
    Move,
    /// Its KV is whole, and offered to that node.
    Leave,
    /// That node has its KV, or will compute it.
    Settle,
    /// It said its last token.
    Finish,
    /// No further token can be drawn for it.
    NoToken,
    /// Nobody wants it any more.
    Cancel,
    /// The same during a pass that computes a part of it.
    CancelInPass,
    /// The pass that kept it here is over.
    PassOver,
}

/// The transition table: every legal step of a sequence, and what the others mean.
pub(super) fn step(phase: Phase, cause: Cause) -> Step<Phase> {
    use Cause::*;
    match (phase, cause) {
        (Phase::Absent, Submit) => Step::Enter(Phase::Waiting),
        // It ended while these were on their way.
        (Phase::Absent, Land | Fail | FailAfar | Move | Settle | Cancel) => Step::Ignore,
        (Phase::Absent, _) => Step::Bug,

        // A duplicate is not an error.
        (_, Submit) => Step::Ignore,

        (Phase::Waiting, Reserve) => Step::Enter(Phase::Transferring),
        (Phase::Waiting, Admit) => Step::Enter(Phase::Running),
        // It will be computed here.
        (Phase::Waiting, FailAfar) => Step::Enter(Phase::Waiting),
        // There is nothing to move: the router places it anew.
        (Phase::Waiting, Move | Cancel) => Step::End,

        (Phase::Transferring, Land | Fail | FailAfar) => Step::Enter(Phase::Running),
        (Phase::Transferring, FailWhole) => Step::Enter(Phase::Waiting),
        (Phase::Transferring | Phase::Running, Move) => Step::Enter(phase),
        (Phase::Transferring, Cancel) => Step::End,

        (Phase::Running, Preempt) => Step::Enter(Phase::Waiting),
        (Phase::Running, Leave) => Step::Enter(Phase::Moving),
        (Phase::Running, Finish | NoToken | Cancel) => Step::End,
        (Phase::Running, CancelInPass) => Step::Enter(Phase::Doomed),

        (Phase::Moving, Settle | Cancel) => Step::End,

        (Phase::Doomed, CancelInPass) => Step::Ignore,
        (Phase::Doomed, PassOver) => Step::End,

        // A hand-off was given up before it ended, or a move was asked for twice.
        (_, Land | Fail | FailAfar | Settle | Move) => Step::Ignore,
        _ => Step::Bug,
    }
}

#[cfg(test)]
#[test]
fn transitions_are_as_recorded() {
    use Cause::*;
    let phases = [Phase::Absent, Phase::Waiting, Phase::Transferring, Phase::Running, Phase::Moving, Phase::Doomed];
    let causes = [
        Submit,
        Reserve,
        Admit,
        Land,
        Fail,
        FailAfar,
        FailWhole,
        Preempt,
        Move,
        Leave,
        Settle,
        Finish,
        NoToken,
        Cancel,
        CancelInPass,
        PassOver,
    ];
    let table = ridge_protocol::step::table("decode", &phases, &causes, step);
    ridge_protocol::step::check_table(concat!(env!("CARGO_MANIFEST_DIR"), "/src/machine/transitions.txt"), &table);
}
