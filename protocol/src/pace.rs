//! How fast a node is: learnt by its scheduler from its own passes, reported to the router for placement.

use crate::time::Duration;
use serde::{Deserialize, Serialize};

/// A new observation counts this part.
const NEW: u64 = 8;

/// Moving averages over a node's passes. Zero while unknown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Pace {
    /// A pass that computes no prompt: what a batch waits for its next tokens. In nanoseconds.
    pub step_ns: u64,
    /// What one more prompt token adds to a pass, in nanoseconds.
    pub prompt_token_ns: u64,
}

impl Pace {
    /// Takes the time of a pass over so many prompt tokens and so many decoding sequences.
    pub fn learn(&mut self, prompt_tokens: u32, decoding: u32, busy: Duration) {
        let busy = busy.as_nanos() as u64;
        if prompt_tokens == 0 {
            average(&mut self.step_ns, busy);
        } else {
            // Beside decoding sequences the weights are read anyway.
            let anyway = if decoding > 0 { self.step_ns } else { 0 };
            average(&mut self.prompt_token_ns, busy.saturating_sub(anyway) / u64::from(prompt_tokens));
        }
    }

    /// Prompt tokens that make a pass take `stretch` times as long as one without, or `None` while that is unknown.
    pub fn tokens_within(&self, stretch: u32) -> Option<u64> {
        let room = self.step_ns * u64::from(stretch.saturating_sub(1));
        (self.step_ns > 0 && self.prompt_token_ns > 0).then(|| room / self.prompt_token_ns)
    }
}

/// Never back to zero, which means unknown.
fn average(value: &mut u64, new: u64) {
    *value = if *value == 0 { new } else { (*value * (NEW - 1) + new) / NEW }.max(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_prompts_are_told_apart() {
        let mut pace = Pace::default();
        assert_eq!(pace.tokens_within(2), None);
        pace.learn(0, 4, Duration::from_millis(80));
        assert_eq!(pace.tokens_within(2), None);
        pace.learn(10, 4, Duration::from_millis(130));
        assert_eq!(pace, Pace { step_ns: 80_000_000, prompt_token_ns: 5_000_000 });
        assert_eq!(
            (pace.tokens_within(2), pace.tokens_within(3), pace.tokens_within(1)),
            (Some(16), Some(32), Some(0))
        );
        pace.learn(10, 0, Duration::from_millis(130));
        assert_eq!(pace.prompt_token_ns, 6_000_000);
    }

    #[test]
    fn a_pass_that_takes_no_time_is_known_all_the_same() {
        let mut pace = Pace::default();
        pace.learn(0, 1, Duration::ZERO);
        pace.learn(5, 1, Duration::ZERO);
        assert_eq!(pace.tokens_within(2), Some(1));
    }
}
