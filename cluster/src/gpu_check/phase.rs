//! The parts of the check, in the order in which they run, and what part of the time each may take.
//!
//! Each runs in a process of its own: a kernel that writes where it should not takes its process's device context with it, and one
//! that never ends has to be ended. Read [`Phase`] and [`slice`].

use clap::ValueEnum;
use std::time::Duration;

/// A part of the check.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub enum Phase {
    /// Every kernel is compiled for the device.
    Compile,
    /// Norms, rotations, gates, embeddings, pages: against f64 references.
    Rows,
    /// Attention, likewise.
    Attention,
    /// Products with weights of every type, likewise.
    Products,
    /// Products with fp8 and fp4 weights, likewise.
    Scaled,
    /// Kernels that are off by default because no device has run them, likewise.
    Experimental,
    /// A model's continuations and log-probabilities beside the CPU's, with and without graphs.
    Engine,
    /// Clusters of a small model: prompts and answers on the device, and mixed with the CPU.
    Clusters,
    /// Copies, products and attention at an 8B model's shapes, beside cuBLASLt.
    Timings,
    /// A synthetic 8B model, made here: prompts and decode steps of the whole engine.
    Model,
    /// The same on PyTorch: attention, a compiled block, decode steps.
    Torch,
    /// Clusters of the 8B model, and how long a first token takes.
    Serving,
    /// A few small cases under compute-sanitizer.
    Sanitizer,
}

impl Phase {
    /// All of them, in their order.
    pub const ALL: [Phase; 13] = [
        Self::Compile,
        Self::Rows,
        Self::Attention,
        Self::Products,
        Self::Scaled,
        Self::Experimental,
        Self::Engine,
        Self::Clusters,
        Self::Timings,
        Self::Model,
        Self::Torch,
        Self::Serving,
        Self::Sanitizer,
    ];

    /// Its name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no phase is skipped").get_name().to_owned()
    }

    /// Its weight in the division of time. No device has run any of this: these are guesses of seconds, and a phase that takes less
    /// leaves the rest to those after it.
    fn weight(self) -> u32 {
        match self {
            Self::Compile => 40,
            Self::Rows => 15,
            Self::Attention => 25,
            Self::Products => 50,
            Self::Scaled => 15,
            Self::Experimental => 15,
            Self::Engine => 20,
            Self::Clusters => 40,
            Self::Timings => 40,
            Self::Model => 100,
            Self::Torch => 110,
            Self::Serving => 80,
            Self::Sanitizer => 40,
        }
    }
}

/// What the first of `phases` may take of what is `left`: its part beside those that follow.
pub fn slice(left: Duration, phases: &[Phase]) -> Duration {
    let weights: u32 = phases.iter().map(|phase| phase.weight()).sum();
    match phases.first() {
        Some(first) => left.mul_f64(f64::from(first.weight()) / f64::from(weights)),
        None => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_whole_and_in_order() {
        assert_eq!(Phase::ALL.as_slice(), Phase::value_variants());
        assert_eq!(Phase::ALL.map(|phase| Phase::from_str(&phase.name(), false)), Phase::ALL.map(Ok));
    }

    #[test]
    fn what_a_phase_leaves_goes_to_the_next() {
        let second = Duration::from_secs(1);
        assert_eq!(slice(100 * second, &[Phase::Torch]), 100 * second);
        assert_eq!(slice(100 * second, &[]), Duration::ZERO);
        // Whatever is used, all slices together are what there was; and unused time grows the later ones.
        let (mut left, mut used) = (520 * second, Duration::ZERO);
        for i in 0..Phase::ALL.len() {
            let part = slice(left, &Phase::ALL[i..]);
            (left, used) = (left - part, used + part);
        }
        assert!(left < second && used > 519 * second, "{left:?} {used:?}");
        let early = slice(520 * second, &Phase::ALL[9..]);
        assert!(early > slice(300 * second, &Phase::ALL[9..]));
    }
}
