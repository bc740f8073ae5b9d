//! Times, and what they are worth beside the machine's limits of the same seconds.
//!
//! ```text
//! three warm-ups of every phase
//! repeat:  for each phase:  limits, repetition;  at the end limits once more
//! ```
//!
//! A repetition's roof is made of the limits measured just before and just after it. Phases take turns, so that a slow
//! minute of a shared machine falls on all of them. Read [`measure`] and [`Measured`].

use super::session::{Phase, Session};
use ridge_kernels::machine::Limits;
use ridge_model::cost::Cost;

/// Runs of each phase before the measured ones.
pub const WARM_UPS: usize = 3;

/// The middle and the ends of some measurements.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    /// Half are below it.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else { panic!("a spread of nothing") };
        let half = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 };
        Self { median, min, max }
    }
}

/// What bounds any computation on the machine: memory and arithmetic.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Roof {
    /// Bytes per second.
    pub bandwidth: f64,
    /// Operations per second of the fastest arithmetic that the model's weights allow.
    pub peak: f64,
}

impl Roof {
    /// Quantised weights may be multiplied as small integers; floats as bf16 or f32, whichever this machine does faster.
    pub fn of(limits: &Limits, quantised: bool) -> Self {
        let floats = limits.f32_flops_per_s.max(limits.bf16_flops_per_s);
        let peak = if quantised { floats.max(limits.int8_ops_per_s) } else { floats };
        Self { bandwidth: limits.read_bytes_per_s, peak }
    }

    /// Least seconds for a cost: `flops / min(peak, intensity * bandwidth)`.
    pub fn seconds(&self, cost: &Cost) -> f64 {
        (cost.flops() as f64 / self.peak).max(cost.bytes() as f64 / self.bandwidth)
    }

    /// Operations per second that an arithmetic intensity (operations per byte) allows.
    pub fn at(&self, intensity: f64) -> f64 {
        self.peak.min(intensity * self.bandwidth)
    }

    /// The intensity from which arithmetic is the limit.
    pub fn ridge(&self) -> f64 {
        self.peak / self.bandwidth
    }
}

/// One timed run.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Repetition {
    /// What it took.
    pub seconds: f64,
    /// What the roof around it allows.
    pub predicted_s: f64,
}

/// A phase and its repetitions.
#[derive(Clone, PartialEq, Debug)]
pub struct Measured {
    /// What was run.
    pub phase: Phase,
    /// What it computes and moves.
    pub cost: Cost,
    /// At least one.
    pub repetitions: Vec<Repetition>,
}

impl Measured {
    /// Seconds of a repetition.
    pub fn seconds(&self) -> Spread {
        Spread::of(self.repetitions.iter().map(|r| r.seconds))
    }

    /// Seconds that the roof allows.
    pub fn predicted_s(&self) -> Spread {
        Spread::of(self.repetitions.iter().map(|r| r.predicted_s))
    }

    /// Tokens per second.
    pub fn tokens_per_s(&self) -> Spread {
        Spread::of(self.repetitions.iter().map(|r| self.phase.tokens() as f64 / r.seconds))
    }

    /// Operations per second, of the median time.
    pub fn flops_per_s(&self) -> f64 {
        self.cost.flops() as f64 / self.seconds().median
    }

    /// Bytes per second, of the median time.
    pub fn bytes_per_s(&self) -> f64 {
        self.cost.bytes() as f64 / self.seconds().median
    }

    /// Share of what the roof allows, 1 at best; each repetition beside its own roof.
    pub fn roofline_fraction(&self) -> Spread {
        Spread::of(self.repetitions.iter().map(|r| r.predicted_s / r.seconds))
    }
}

/// A whole run.
pub struct Run {
    /// Every measurement of the machine, in order.
    pub limits: Vec<Limits>,
    /// The roof of the run: from the medians of its limits.
    pub roof: Roof,
    /// The phases, in the session's order.
    pub phases: Vec<Measured>,
}

impl Run {
    /// One limit of the machine over the run.
    pub fn limit(&self, which: impl Fn(&Limits) -> f64) -> Spread {
        Spread::of(self.limits.iter().map(which))
    }

    /// The medians of all limits.
    pub fn machine(&self) -> Limits {
        medians(&self.limits)
    }
}

fn medians(limits: &[Limits]) -> Limits {
    let median = |which: fn(&Limits) -> f64| Spread::of(limits.iter().map(which)).median;
    Limits {
        read_bytes_per_s: median(|l| l.read_bytes_per_s),
        f32_flops_per_s: median(|l| l.f32_flops_per_s),
        bf16_flops_per_s: median(|l| l.bf16_flops_per_s),
        int8_ops_per_s: median(|l| l.int8_ops_per_s),
    }
}

/// Warms up and measures every phase of the session `repeat` times. Says on stderr how far it is.
pub fn measure(session: &mut Session, repeat: usize) -> Run {
    assert!(repeat > 0, "nothing would be measured");
    let quantised = session.model.quantised;
    let mut phases: Vec<Measured> = session
        .phases
        .iter()
        .map(|&phase| Measured { phase, cost: phase.cost(&session.cost), repetitions: Vec::new() })
        .collect();
    eprintln!("warming up");
    for measured in &phases {
        for _ in 0..WARM_UPS {
            session.warm_up(measured.phase);
        }
    }
    let mut limits = vec![session.limits()];
    for number in 1..=repeat {
        eprintln!("repetition {number} of {repeat}");
        for measured in &mut phases {
            let seconds = session.repetition(measured.phase).as_secs_f64();
            limits.push(session.limits());
            let around = Roof::of(&medians(&limits[limits.len() - 2..]), quantised);
            let predicted_s = around.seconds(&measured.cost);
            measured.repetitions.push(Repetition { seconds, predicted_s });
        }
    }
    let roof = Roof::of(&medians(&limits), quantised);
    Run { limits, roof, phases }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(read: f64, f32: f64, bf16: f64, int8: f64) -> Limits {
        Limits { read_bytes_per_s: read, f32_flops_per_s: f32, bf16_flops_per_s: bf16, int8_ops_per_s: int8 }
    }

    #[test]
    fn medians() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
    }

    #[test]
    fn the_roof_is_the_lower_of_two_limits() {
        let roof = Roof::of(&limits(10.0, 100.0, 200.0, 400.0), false);
        assert_eq!(roof, Roof { bandwidth: 10.0, peak: 200.0 });
        assert_eq!(Roof::of(&limits(10.0, 100.0, 50.0, 400.0), false).peak, 100.0);
        assert_eq!(Roof::of(&limits(10.0, 100.0, 50.0, 400.0), true).peak, 400.0);
        assert_eq!((roof.ridge(), roof.at(5.0), roof.at(20.0), roof.at(1000.0)), (20.0, 50.0, 200.0, 200.0));
        let cost = |flops, bytes| Cost { matmul_flops: flops, weight_bytes: bytes, ..Cost::default() };
        assert_eq!(roof.seconds(&cost(100, 100)), 10.0);
        assert_eq!(roof.seconds(&cost(4000, 10)), 20.0);
    }

    #[test]
    fn a_fraction_compares_each_repetition_with_its_own_roof() {
        let measured = Measured {
            phase: Phase::Decode { batch: 2, context: 8, steps: 4 },
            cost: Cost { matmul_flops: 80, weight_bytes: 40, ..Cost::default() },
            // The machine ran at half its speed during the second repetition, and so did the engine.
            repetitions: vec![
                Repetition { seconds: 2.0, predicted_s: 1.0 },
                Repetition { seconds: 4.0, predicted_s: 2.0 },
                Repetition { seconds: 2.5, predicted_s: 1.0 },
            ],
        };
        assert_eq!(measured.roofline_fraction(), Spread { median: 0.5, min: 0.4, max: 0.5 });
        assert_eq!(measured.tokens_per_s(), Spread { median: 3.2, min: 2.0, max: 4.0 });
        assert_eq!((measured.flops_per_s(), measured.bytes_per_s()), (32.0, 16.0));
    }
}
