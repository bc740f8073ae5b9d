//! What the picture shows, and the logarithmic axes that both drawings share. Knows neither characters nor SVG.

use crate::bench::measure::Roof;

/// A roofline with two series of points.
#[derive(Clone, PartialEq, Debug)]
pub struct Chart {
    /// Model and storage type.
    pub title: String,
    /// The machine.
    pub subtitle: String,
    /// How it was made.
    pub note: String,
    /// Bandwidth and peak.
    pub roof: Roof,
    /// Compute rates of the machine's instructions; the roof's peak is one of them.
    pub ceilings: Vec<Ceiling>,
    /// Labelled with prompt lengths.
    pub prefill: Vec<Point>,
    /// Labelled with batch sizes.
    pub decode: Vec<Point>,
}

/// One kind of arithmetic at full speed.
#[derive(Clone, PartialEq, Debug)]
pub struct Ceiling {
    /// What it multiplies.
    pub name: &'static str,
    /// Its operations per second.
    pub flops_per_s: f64,
}

/// A phase.
#[derive(Clone, PartialEq, Debug)]
pub struct Point {
    /// What tells it from others of its series.
    pub label: String,
    /// Operations per byte.
    pub intensity: f64,
    /// Operations per second.
    pub flops_per_s: f64,
}

impl Chart {
    /// Axes that hold every point, every ceiling and the ridge, with some room: intensity in FLOP per byte, and GFLOP/s.
    pub fn axes(&self) -> (LogAxis, LogAxis) {
        let points = || self.prefill.iter().chain(&self.decode);
        let xs = points().map(|p| p.intensity).chain([self.roof.ridge() / 2.0, self.roof.ridge() * 2.0]);
        let ys = points().map(|p| p.flops_per_s).chain(self.ceilings.iter().map(|c| c.flops_per_s));
        let x = LogAxis::around(xs);
        let left = self.roof.at(x.min);
        (x, LogAxis::around(ys.chain([self.roof.peak, left]).map(|y| y / 1e9)))
    }
}

/// A logarithmic axis.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LogAxis {
    /// Its lower end.
    pub min: f64,
    /// Its upper end.
    pub max: f64,
}

impl LogAxis {
    /// The axis from a step (1, 2 or 5 times a power of ten) below all values to one above them. Values must be
    /// positive; without any it is 1 to 10.
    pub fn around(values: impl IntoIterator<Item = f64>) -> Self {
        const ROOM: f64 = 1.25;
        let values = values.into_iter().filter(|v| v.is_finite() && *v > 0.0);
        let ends = values.fold(None, |ends, v| match ends {
            None => Some((v, v)),
            Some((min, max)) => Some((v.min(min), v.max(max))),
        });
        let Some((min, max)) = ends else { return Self { min: 1.0, max: 10.0 } };
        let (min, max) = (min / ROOM, max * ROOM);
        let below = steps(min).rfind(|step| *step <= min);
        let above = steps(max).find(|step| *step >= max);
        Self { min: below.unwrap_or(min), max: above.unwrap_or(max) }
    }

    /// Where a value lies: 0 at the lower end, 1 at the upper.
    pub fn place(&self, value: f64) -> f64 {
        (value / self.min).ln() / (self.max / self.min).ln()
    }

    /// Where to write numbers: powers of ten, or steps of 1, 2 and 5 if there are few powers.
    pub fn ticks(&self) -> Vec<f64> {
        let inside = |v: &f64| (self.min * 0.999..=self.max * 1.001).contains(v);
        let first = self.min.log10().floor() as i32;
        let last = self.max.log10().ceil() as i32;
        let powers: Vec<f64> = (first..=last).map(|e| 10f64.powi(e)).filter(inside).collect();
        if powers.len() > 3 {
            return powers;
        }
        (first..=last).flat_map(|e| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(e))).filter(inside).collect()
    }
}

/// Steps of 1, 2 and 5 around a value, rising.
fn steps(value: f64) -> impl DoubleEndedIterator<Item = f64> {
    let exponent = value.log10().floor() as i32;
    (exponent - 1..=exponent + 1).flat_map(|e| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(e)))
}

/// A tick's number as people write it: `0.5`, `20`, `1000`.
pub fn tick_label(value: f64) -> String {
    let decimals = if value < 0.999 { (-value.log10()).ceil() as usize } else { 0 };
    format!("{value:.decimals$}")
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A machine of 20 GB/s and 200 GFLOP/s, and phases below its roof.
    pub fn example() -> Chart {
        let point =
            |label: &str, intensity, gflops| Point { label: label.into(), intensity, flops_per_s: gflops * 1e9 };
        Chart {
            title: "a <model> & \"more\" in BF16".into(),
            subtitle: "A CPU, 2 of 2 cores".into(),
            note: "cluster roofline".into(),
            roof: Roof { bandwidth: 20e9, peak: 200e9 },
            ceilings: vec![Ceiling { name: "f32", flops_per_s: 100e9 }, Ceiling { name: "bf16", flops_per_s: 200e9 }],
            prefill: vec![point("16", 16.0, 150.0), point("1024", 900.0, 180.0)],
            decode: vec![point("1", 1.0, 18.0), point("8", 7.9, 100.0)],
        }
    }

    #[test]
    fn ticks_are_powers_or_steps() {
        let check = |min, max, want: &[&str]| {
            let labels: Vec<String> = LogAxis { min, max }.ticks().into_iter().map(tick_label).collect();
            assert_eq!(labels, want);
        };
        check(1.0, 10.0, &["1", "2", "5", "10"]);
        check(0.5, 50.0, &["0.5", "1", "2", "5", "10", "20", "50"]);
        check(0.5, 2000.0, &["1", "10", "100", "1000"]);
        check(0.02, 0.05, &["0.02", "0.05"]);
        check(200.0, 500.0, &["200", "500"]);
    }

    #[test]
    fn axes_hold_their_values() {
        let check = |values: &[f64], min: f64, max: f64| {
            let axis = LogAxis::around(values.iter().copied());
            assert!((axis.min / min - 1.0).abs() < 1e-9 && (axis.max / max - 1.0).abs() < 1e-9, "{values:?}: {axis:?}");
        };
        check(&[1.0, 100.0], 0.5, 200.0);
        check(&[0.9, 700.0], 0.5, 1000.0);
        check(&[3.0], 2.0, 5.0);
        check(&[], 1.0, 10.0);
        check(&[0.0, f64::NAN], 1.0, 10.0);
    }

    #[test]
    fn places_are_even_in_the_logarithm() {
        let axis = LogAxis { min: 1.0, max: 100.0 };
        for (value, place) in [(1.0, 0.0), (10.0, 0.5), (100.0, 1.0)] {
            assert!((axis.place(value) - place).abs() < 1e-12, "{value}");
        }
        let (x, y) = example().axes();
        assert!(x.min <= 1.0 && x.max >= 900.0 && y.min <= 18.0 && y.max >= 200.0, "{x:?} {y:?}");
    }
}
