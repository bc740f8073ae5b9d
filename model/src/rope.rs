//! Rotary position embedding: the cosines and sines of one position, for every scaling that [`RopeScaling`] names.
//!
//! The numbers are those of transformers' `modeling_rope_utils`: frequencies and angles are rounded to f32 where it
//! rounds them, because at position 100 000 an angle's last bit is worth a thousandth of a turn.
//!
//! **Everything here depends on the position alone**, never on the length of the chunk or the batch it is computed
//! in: cached keys are already rotated, so anything else would make a sequence's KV depend on how it was scheduled.
//! For dynamic NTK scaling, whose base grows with the sequence length, that fixes the definition: the token at
//! position `p` is rotated for a sequence of `p + 1` tokens. This is what transformers computes when it is fed one
//! token at a time through its cache. (Fed a whole prompt longer than the original context, it rotates all of it
//! with the base of the prompt's length: such a prompt's cache differs from one grown token by token. vLLM always
//! uses the base of the longest sequence.)

use crate::spec::{RopeScaling, RopeSpec};
use std::f64::consts::PI;

/// The frequencies of one model.
pub struct Rope {
    /// Radians per position, one per rotated pair; `rotary_dim / 2` of them.
    frequencies: Vec<f32>,
    /// Factor on cos and sin (YaRN); 1 otherwise.
    attention_factor: f32,
    /// What dynamic scaling needs to recompute the frequencies past its original context.
    dynamic: Option<Dynamic>,
}

struct Dynamic {
    theta: f64,
    factor: f64,
    original_context: usize,
}

impl Rope {
    /// Computes the frequencies of `spec`, which has been checked by `ModelSpec::defect`.
    pub fn new(spec: &RopeSpec) -> Self {
        let pairs = spec.rotary_dim / 2;
        let plain = base_frequencies(spec.theta, pairs);
        let mut rope = Rope { frequencies: plain, attention_factor: 1.0, dynamic: None };
        match &spec.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                for frequency in &mut rope.frequencies {
                    *frequency /= *factor as f32;
                }
            }
            RopeScaling::Dynamic { factor, original_context } => {
                rope.dynamic =
                    Some(Dynamic { theta: spec.theta, factor: *factor, original_context: *original_context });
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                for frequency in &mut rope.frequencies {
                    *frequency =
                        llama3(*frequency, *factor, *low_freq_factor, *high_freq_factor, *original_context as f64);
                }
            }
            RopeScaling::Factors(factors) => {
                assert_eq!(factors.len(), pairs, "one rope factor per rotated pair");
                for (frequency, factor) in rope.frequencies.iter_mut().zip(factors) {
                    *frequency /= factor;
                }
            }
            RopeScaling::Yarn { .. } => rope.apply_yarn(spec),
        }
        rope
    }

    /// Rotated pairs per head: the length of a row of cosines.
    pub fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// Writes the cosines and sines of `position`, each [`Rope::pairs`] long.
    pub fn fill(&self, position: u32, cos: &mut [f32], sin: &mut [f32]) {
        match &self.dynamic {
            Some(dynamic) if position as usize >= dynamic.original_context => {
                let frequencies = dynamic.frequencies(position as usize + 1, self.pairs());
                self.fill_with(&frequencies, position, cos, sin);
            }
            _ => self.fill_with(&self.frequencies, position, cos, sin),
        }
    }

    fn fill_with(&self, frequencies: &[f32], position: u32, cos: &mut [f32], sin: &mut [f32]) {
        assert_eq!(cos.len(), frequencies.len(), "a row of cosines");
        assert_eq!(sin.len(), frequencies.len(), "a row of sines");
        for (i, frequency) in frequencies.iter().enumerate() {
            let (s, c) = f64::from(frequency * position as f32).sin_cos();
            cos[i] = c as f32 * self.attention_factor;
            sin[i] = s as f32 * self.attention_factor;
        }
    }

    /// YaRN (Peng et al., 2023): pairs that turn more than `beta_fast` times within the original context keep their
    /// frequency, pairs that turn less than `beta_slow` times are slowed by `factor`, and a ramp joins the two.
    fn apply_yarn(&mut self, spec: &RopeSpec) {
        let RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
            mscale,
            mscale_all_dim,
            truncate,
        } = &spec.scaling
        else {
            unreachable!("called for YaRN only");
        };
        let magnitude = |coefficient: f64| if *factor <= 1.0 { 1.0 } else { 0.1 * coefficient * factor.ln() + 1.0 };
        let derived = match (mscale.filter(|m| *m != 0.0), mscale_all_dim.filter(|m| *m != 0.0)) {
            (Some(mscale), Some(all)) => magnitude(mscale) / magnitude(all),
            _ => magnitude(1.0),
        };
        self.attention_factor = attention_factor.unwrap_or(derived) as f32;

        let dim = spec.rotary_dim as f64;
        // The (fractional) dimension that turns `rotations` times within the original context.
        let dimension =
            |rotations: f64| dim * (*original_context as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * spec.theta.ln());
        let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
        if *truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        for (i, frequency) in self.frequencies.iter_mut().enumerate() {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            let slowed = (f64::from(*frequency) / factor) as f32;
            *frequency = slowed * (1.0 - kept) + *frequency * kept;
        }
    }
}

impl Dynamic {
    /// The frequencies of a sequence of `len` tokens, more than the original context.
    fn frequencies(&self, len: usize, pairs: usize) -> Vec<f32> {
        let dim = 2.0 * pairs as f64;
        let stretch = self.factor * len as f64 / self.original_context as f64 - (self.factor - 1.0);
        base_frequencies(self.theta * stretch.powf(dim / (dim - 2.0)), pairs)
    }
}

/// `theta ^ (-2i / dim)` for each pair `i`.
fn base_frequencies(theta: f64, pairs: usize) -> Vec<f32> {
    let theta = f64::from(theta as f32);
    (0..pairs).map(|i| 1.0 / theta.powf(f64::from(i as f32 / pairs as f32)) as f32).collect()
}

/// Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, the ones between interpolated.
fn llama3(frequency: f32, factor: f64, low_freq_factor: f64, high_freq_factor: f64, original: f64) -> f32 {
    let wavelength = 2.0 * PI / f64::from(frequency);
    if wavelength > original / low_freq_factor {
        (f64::from(frequency) / factor) as f32
    } else if wavelength < original / high_freq_factor {
        frequency
    } else {
        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
        let frequency = f64::from(frequency);
        ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(scaling: RopeScaling, position: u32) -> Vec<f32> {
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, rotary_dim: 8, scaling });
        let (mut cos, mut sin) = (vec![0.0; 4], vec![0.0; 4]);
        rope.fill(position, &mut cos, &mut sin);
        cos.extend(sin);
        cos
    }

    #[test]
    fn plain_frequencies_are_powers_of_the_base() {
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, rotary_dim: 8, scaling: RopeScaling::None });
        let expected = [1.0, 0.1, 0.01, 0.001f32];
        assert!(rope.frequencies.iter().zip(expected).all(|(a, b)| (a / b - 1.0).abs() < 1e-6));
    }

    #[test]
    fn position_zero_does_not_rotate() {
        assert_eq!(row(RopeScaling::None, 0), [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn linear_scaling_halves_positions() {
        assert_eq!(row(RopeScaling::Linear { factor: 2.0 }, 6), row(RopeScaling::None, 3));
        assert_eq!(row(RopeScaling::Factors(vec![2.0; 4]), 6), row(RopeScaling::None, 3));
    }

    #[test]
    fn dynamic_scaling_begins_after_the_original_context() {
        let dynamic = || RopeScaling::Dynamic { factor: 2.0, original_context: 16 };
        assert_eq!(row(dynamic(), 15), row(RopeScaling::None, 15));
        assert_ne!(row(dynamic(), 16), row(RopeScaling::None, 16));
    }

    #[test]
    fn llama3_keeps_short_and_slows_long_wavelengths() {
        // Wavelengths are 6.3, 63, 628 and 6283 positions; the ramp spans 32 to 128.
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 128 };
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, rotary_dim: 8, scaling });
        assert_eq!(rope.frequencies[0], 1.0);
        assert!(rope.frequencies[1] < 0.1 && rope.frequencies[1] > 0.1 / 8.0);
        assert!((rope.frequencies[3] - 0.001 / 8.0).abs() < 1e-9);
    }
}
