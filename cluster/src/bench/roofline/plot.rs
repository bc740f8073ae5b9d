//! The chart in characters.

use super::chart::{Chart, Point, tick_label};
use std::fmt::Write;

const COLUMNS: usize = 72;
const ROWS: usize = 20;
const PREFILL: char = '●';
const DECODE: char = '○';

/// The chart as lines of text.
pub fn text(chart: &Chart) -> String {
    let (x, y) = chart.axes();
    let column = |intensity: f64| (x.place(intensity) * (COLUMNS - 1) as f64).round() as usize;
    let row = |gflops: f64| ROWS - 1 - (y.place(gflops) * (ROWS - 1) as f64).round() as usize;
    let mut cells = vec![[' '; COLUMNS]; ROWS];
    let mut put = |column: usize, gflops: f64, mark: char| cells[row(gflops)][column] = mark;
    for at in 0..COLUMNS {
        let intensity = x.min * (x.max / x.min).powf(at as f64 / (COLUMNS - 1) as f64);
        let mark = if intensity < chart.roof.ridge() { '╱' } else { '─' };
        put(at, chart.roof.at(intensity) / 1e9, mark);
    }
    // A point that falls on another's cell hides it; both stand in the table.
    for (points, mark) in [(&chart.decode, DECODE), (&chart.prefill, PREFILL)] {
        for Point { intensity, flops_per_s, .. } in points {
            put(column(*intensity), flops_per_s / 1e9, mark);
        }
    }

    let mut labels = vec![String::new(); ROWS];
    for tick in y.ticks() {
        labels[row(tick)] = tick_label(tick);
    }
    let mut out = format!("GFLOP/s     {PREFILL} prefill   {DECODE} decode   ╱─ roof\n");
    for (cells, label) in cells.iter().zip(&labels) {
        let edge = if label.is_empty() { '│' } else { '┤' };
        let line: String = cells.iter().collect();
        let _ = writeln!(out, "{label:>8} {edge}{}", line.trim_end());
    }
    let (mut edge, mut numbers) = (vec!['─'; COLUMNS], String::new());
    for tick in x.ticks() {
        edge[column(tick)] = '┬';
        let label = tick_label(tick);
        // Numbers are centred under their ticks and never touch.
        let start = (column(tick) + 1).saturating_sub(label.len().div_ceil(2));
        if numbers.is_empty() || start > numbers.len() {
            let _ = write!(numbers, "{:start$}{label}", "", start = start - numbers.len());
        }
    }
    let edge: String = edge.iter().collect();
    let _ = writeln!(out, "{:>8} └{edge}\n{:>8}  {numbers}  FLOP/byte", "", "");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_and_roof_are_drawn() {
        let text = text(&super::super::chart::tests::example());
        let body: String = text.lines().skip(1).collect();
        assert_eq!(body.matches(PREFILL).count(), 2, "{text}");
        assert_eq!(body.matches(DECODE).count(), 2, "{text}");
        assert!(body.matches('╱').count() > 10 && body.matches('─').count() > COLUMNS, "{text}");
        assert_eq!(text.lines().count(), ROWS + 3, "{text}");
        assert!(text.contains("FLOP/byte") && text.lines().all(|line| line.chars().count() < 100), "{text}");
    }
}
