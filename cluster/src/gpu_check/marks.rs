//! What the times are worth: each mark as a ratio of times of one run, and whether it is met. Pure.
//!
//! Where a mark is about many shapes, its value is the worst of them. Read [`marks`].

use super::line::Line;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A mark, and what was reached.
#[derive(Clone, PartialEq, Debug)]
pub struct Mark {
    /// What is compared.
    pub what: String,
    /// The ratio that was measured, if everything for it was.
    pub value: Option<f64>,
    /// What it should be.
    pub mark: f64,
    /// Whether the mark is the least and not the most that it may be.
    pub at_least: bool,
    /// Where the value is from, when it is the worst of several.
    pub at: String,
}

impl Mark {
    /// Whether it is met, if it was measured.
    pub fn is_met(&self) -> Option<bool> {
        self.value.map(|value| if self.at_least { value >= self.mark } else { value <= self.mark })
    }

    /// For the report.
    pub fn json(&self) -> Value {
        json!({
            "what": self.what, "value": self.value, "mark": self.mark,
            "at_least": self.at_least, "at": self.at, "met": self.is_met(),
        })
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = self.value.map_or("-".into(), |value| format!("{value:.3}"));
        let sign = if self.at_least { ">=" } else { "<=" };
        let verdict = match self.is_met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        };
        write!(f, "{:<62} {value:>8} {sign} {:<5} {verdict:<13} {}", self.what, self.mark, self.at)
    }
}

/// Times by name.
struct Times<'a>(BTreeMap<&'a str, (f64, f64, f64)>);

impl<'a> Times<'a> {
    fn new(lines: impl IntoIterator<Item = &'a Line>) -> Self {
        let times = lines.into_iter().filter_map(|line| match line {
            Line::Time { name, seconds, operations, bytes } => Some((name.as_str(), (*seconds, *operations, *bytes))),
            _ => None,
        });
        Self(times.collect())
    }

    fn seconds(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(|(seconds, _, _)| *seconds)
    }

    /// Bytes per second.
    fn bandwidth(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(|(seconds, _, bytes)| bytes / seconds)
    }

    /// The shortest of those whose names begin so.
    fn fastest(&self, prefix: &str) -> Option<f64> {
        let of = self.0.iter().filter(|(name, _)| name.starts_with(prefix));
        of.map(|(_, (seconds, _, _))| *seconds).min_by(f64::total_cmp)
    }

    /// The most operations per second of those whose names begin so.
    fn rate(&self, prefix: &str) -> Option<f64> {
        let of = self.0.iter().filter(|(name, _)| name.starts_with(prefix));
        of.map(|(_, (seconds, operations, _))| operations / seconds).max_by(f64::total_cmp)
    }

    /// The least ratio of the times of `slow` to those of `fast`, over names `PREFIX SHAPE slow`, and its shape. `None` if `fast` was
    /// never timed beside `slow`.
    fn worst(&self, (slow_prefix, slow): (&str, &str), (fast_prefix, fast): (&str, &str)) -> Option<(f64, String)> {
        let ratios = self.0.iter().filter_map(|(name, (seconds, _, _))| {
            let shape = name.strip_prefix(fast_prefix)?.strip_suffix(fast)?;
            let other = self.seconds(&format!("{slow_prefix}{shape}{slow}"))?;
            Some((other / seconds, shape.trim().to_owned()))
        });
        ratios.min_by(|(a, _), (b, _)| a.total_cmp(b))
    }
}

/// The marks of `times`, in the order of the table in which they were set.
pub fn marks<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Vec<Mark> {
    let times = Times::new(lines);
    let mut all = Vec::new();
    let mut least = |what: &str, value: Option<(f64, String)>, mark: f64| {
        let (value, at) = value.map_or((None, String::new()), |(value, at)| (Some(value), at));
        all.push(Mark { what: what.into(), value, mark, at_least: true, at });
    };
    let ratio = |above: Option<f64>, below: Option<f64>| Some((above? / below?, String::new()));
    let bf16 = "gemm bf16";
    let beside_blas = |own: &str| times.worst((bf16, " cublasLt"), (bf16, own));
    least("bf16 products: cuBLASLt's time / own kernel's", beside_blas(" own"), 0.9);
    if let Some(found) = beside_blas(" wgmma") {
        least("bf16 products: cuBLASLt's time / Hopper's experiment's", Some(found), 0.9);
    }
    least("bf16 products: cuBLASLt's time / chosen path's", beside_blas(" chosen"), 1.0);
    let fp8 = "gemm fp8";
    least("fp8 products: chosen bf16's time / chosen fp8's", times.worst((bf16, " chosen"), (fp8, " chosen")), 1.6);
    least("the same with our own fp8 kernel", times.worst((bf16, " chosen"), (fp8, " own")), 1.6);
    // Where the library cannot apply factors itself, with a kernel of ours behind it.
    let library = [" cublasLt", " cublasLt-unscaled"].into_iter();
    let beside = library.filter_map(|by| times.worst((fp8, by), (fp8, " chosen"))).min_by(|a, b| a.0.total_cmp(&b.0));
    least("fp8 products: cuBLASLt's time / chosen path's", beside, 1.0);
    let sdpa = times.fastest("sdpa 8192 ");
    for (kernel, what) in [("mma", "default kernel"), ("wgmma", "Hopper's experiment")] {
        let own = times.seconds(&format!("attention prefill 8192 {kernel}"));
        if kernel == "mma" || own.is_some() {
            least(&format!("prefill attention, 8192: fastest SDPA's time / {what}'s"), ratio(sdpa, own), 0.8);
        }
    }
    let rate = |name: &str| times.0.get(name).map(|(seconds, operations, _)| operations / seconds);
    let best = times.rate("gemm bf16");
    least("8B bf16 prefill 4096: its rate / best bf16 product's", ratio(rate("model bf16 prefill 4096"), best), 0.6);
    if let Some(found) = rate("model bf16 prefill 4096, experimental kernels") {
        least("the same with Hopper's experiments", ratio(Some(found), best), 0.6);
    }
    for batch in [1, 32] {
        let name = format!("model bf16 decode b={batch}");
        let copied = times.bandwidth("copy");
        least(
            &format!("8B bf16 decode b={batch}: bytes/s / copied bytes/s"),
            ratio(times.bandwidth(&name), copied),
            0.8,
        );
        let other = times.seconds(&format!("decode b={batch}"));
        least(&format!("8B bf16 decode b={batch}: transformers' time / ours"), ratio(other, times.seconds(&name)), 2.0);
    }
    let (bf16, quantised) = (times.seconds("model bf16 decode b=1"), times.seconds("model q4_k decode b=1"));
    least("8B decode b=1: bf16's time / Q4_K's", ratio(bf16, quantised), 2.4);
    let unshipped = times.seconds("model bf16 prefill 4096, pages not shipped");
    let shipped = times.seconds("model bf16 prefill 4096");
    let slower = shipped.zip(unshipped).map(|(with, without)| with / without - 1.0);
    let tail = times.seconds("serving device first token 4096");
    let exposed = tail.zip(shipped).map(|(first, alone)| (first - alone) / first);
    let most = |what: &str, value, mark| Mark { what: what.into(), value, mark, at_least: false, at: String::new() };
    all.push(most("shipping beside prefill 4096: what it adds", slower, 0.03));
    all.push(most("first token of 4096 through a cluster: part beside the pass", exposed, 0.02));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(name: &str, seconds: f64) -> Line {
        Line::Time { name: name.into(), seconds, operations: 0.0, bytes: 0.0 }
    }

    fn of<'a>(marks: &'a [Mark], what: &str) -> &'a Mark {
        marks.iter().find(|mark| mark.what.contains(what)).unwrap_or_else(|| panic!("no mark {what}"))
    }

    #[test]
    fn nothing_measured_meets_nothing() {
        let marks = marks(&[]);
        assert!(marks.len() >= 12 && marks.iter().all(|mark| mark.is_met().is_none()), "{marks:?}");
        assert!(marks[0].to_string().ends_with("not measured  "), "{:?}", marks[0].to_string());
    }

    #[test]
    fn the_worst_shape_counts() {
        let lines = [
            time("gemm bf16 qkv m=512 own", 2.0),
            time("gemm bf16 qkv m=512 cublasLt", 1.9),
            time("gemm bf16 out m=512 own", 2.0),
            time("gemm bf16 out m=512 cublasLt", 1.0),
            time("gemm bf16 out m=512 chosen", 1.0),
            // Not measured beside the library: does not count.
            time("gemm bf16 down m=512 own", 100.0),
            time("gemm fp8 out m=512 own", 0.5),
            time("gemm fp8 out m=512 chosen", 0.4),
            time("gemm fp8 out m=512 cublasLt", 0.6),
            time("gemm fp8 out m=512 cublasLt-unscaled", 0.3),
            time("gemm fp8 out m=512 rounding", 0.5),
            // Has nothing beside it.
            time("gemm fp8_blocks out m=2048 chosen", 0.1),
        ];
        let marks = marks(&lines);
        let own = of(&marks, "bf16 products: cuBLASLt's time / own kernel's");
        assert_eq!((own.value, own.at.as_str(), own.is_met()), (Some(0.5), "out m=512", Some(false)));
        assert_eq!(of(&marks, "bf16 products: cuBLASLt's time / chosen path's").is_met(), Some(true));
        assert_eq!(of(&marks, "chosen fp8's").value, Some(2.5));
        assert_eq!(of(&marks, "our own fp8 kernel").value, Some(2.0));
        let beside = of(&marks, "fp8 products: cuBLASLt's time / chosen path's");
        assert_eq!((beside.value.map(|v| (v * 100.0).round()), beside.is_met()), (Some(75.0), Some(false)));
    }

    #[test]
    fn ratios_are_of_the_run() {
        let whole =
            |name: &str, seconds, operations, bytes| Line::Time { name: name.into(), seconds, operations, bytes };
        let lines = [
            whole("copy", 1.0, 0.0, 1000.0),
            whole("gemm bf16 out m=512 own", 1.0, 50.0, 0.0),
            whole("gemm bf16 out m=8192 own", 1.0, 100.0, 0.0),
            whole("model bf16 prefill 4096", 2.0, 130.0, 0.0),
            whole("model bf16 prefill 4096, pages not shipped", 1.9, 130.0, 0.0),
            whole("model bf16 decode b=1", 0.1, 0.0, 85.0),
            whole("model q4_k decode b=1", 0.05, 0.0, 30.0),
            whole("decode b=1", 0.3, 0.0, 0.0),
            whole("sdpa 8192 FLASH_ATTENTION gqa", 0.9, 0.0, 0.0),
            whole("sdpa 8192 CUDNN_ATTENTION wide", 0.8, 0.0, 0.0),
            whole("attention prefill 8192 mma", 1.0, 0.0, 0.0),
            whole("serving device first token 4096", 2.5, 0.0, 0.0),
        ];
        let marks = marks(&lines);
        let near = |what: &str, want: f64, met: bool| {
            let mark = of(&marks, what);
            let value = mark.value.unwrap_or_else(|| panic!("{what} was measured"));
            assert!((value - want).abs() < 1e-9 && mark.is_met() == Some(met), "{mark}");
        };
        near("prefill 4096: its rate", 0.65, true);
        near("decode b=1: bytes/s", 0.85, true);
        near("b=1: transformers' time", 3.0, true);
        near("bf16's time / Q4_K's", 2.0, false);
        near("fastest SDPA's time / default", 0.8, true);
        near("what it adds", 2.0 / 1.9 - 1.0, false);
        near("part beside the pass", 0.2, false);
        assert_eq!(of(&marks, "decode b=32: bytes/s").is_met(), None);
    }
}
