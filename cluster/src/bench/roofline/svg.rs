//! The chart as SVG, written by hand: equal charts give equal bytes. On a card of its own colour, because GitHub shows
//! pictures on white and on black.

use super::chart::{Chart, LogAxis, Point, tick_label};
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 520.0;
/// Left, top, right and bottom of the plot; ceilings are named to the right of it, where no point can be.
const PLOT: [f64; 4] = [80.0, 92.0, 738.0, 440.0];

const CARD: &str = "#ffffff";
const INK: &str = "#1f2328";
const FAINT: &str = "#59636e";
const GRID: &str = "#e6e9ed";
const PREFILL: &str = "#c2410c";
const DECODE: &str = "#1d4ed8";

/// The chart as an SVG document.
pub fn draw(chart: &Chart) -> String {
    let (x, y) = chart.axes();
    let frame = Frame { x, y };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\" \
         font-size=\"13\" role=\"img\">\n"
    );
    let _ = writeln!(out, "<title>Roofline of {}</title>", escaped(&chart.title));
    let _ = writeln!(
        out,
        "<rect x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"8\" fill=\"{CARD}\" stroke=\"#d1d9e0\"/>",
        WIDTH - 1.0,
        HEIGHT - 1.0
    );
    heads(&mut out, chart);
    frame.axes(&mut out);
    frame.roof(&mut out, chart);
    frame.series(&mut out, &chart.decode, "decode", DECODE, 20.0);
    frame.series(&mut out, &chart.prefill, "prefill", PREFILL, -11.0);
    out.push_str("</svg>\n");
    out
}

fn heads(out: &mut String, chart: &Chart) {
    let [left, _, right, _] = PLOT;
    text(out, (left, 30.0), "start", &format!("font-size=\"18\" font-weight=\"600\" fill=\"{INK}\""), &chart.title);
    text(out, (left, 51.0), "start", &format!("fill=\"{FAINT}\""), &chart.subtitle);
    text(out, (left, HEIGHT - 14.0), "start", &format!("font-size=\"11\" fill=\"{FAINT}\""), &chart.note);
    for (offset, colour, label) in
        [(0.0, PREFILL, "prefill, by prompt tokens"), (200.0, DECODE, "decode, by sequences in the batch")]
    {
        let _ = writeln!(out, "<circle cx=\"{}\" cy=\"70\" r=\"5\" fill=\"{colour}\"/>", left + 5.0 + offset);
        text(out, (left + 16.0 + offset, 74.5), "start", &format!("fill=\"{INK}\""), label);
    }
    let middle = (left + right) / 2.0;
    text(
        out,
        (middle, PLOT[3] + 42.0),
        "middle",
        &format!("fill=\"{INK}\""),
        "arithmetic intensity, FLOP per byte of weights and KV cache",
    );
    let turned = format!("fill=\"{INK}\" transform=\"rotate(-90 24 {0})\"", (PLOT[1] + PLOT[3]) / 2.0);
    text(out, (24.0, (PLOT[1] + PLOT[3]) / 2.0), "middle", &turned, "GFLOP/s");
}

/// The plot's rectangle with its axes.
struct Frame {
    x: LogAxis,
    y: LogAxis,
}

impl Frame {
    /// Pixels of an intensity and a rate in GFLOP/s.
    fn at(&self, intensity: f64, gflops: f64) -> (f64, f64) {
        let [left, top, right, bottom] = PLOT;
        (left + self.x.place(intensity) * (right - left), bottom - self.y.place(gflops) * (bottom - top))
    }

    fn axes(&self, out: &mut String) {
        let [left, top, right, bottom] = PLOT;
        let faint = format!("fill=\"{FAINT}\"");
        for tick in self.x.ticks() {
            let (x, _) = self.at(tick, self.y.min);
            line(out, (x, top), (x, bottom), &format!("stroke=\"{GRID}\""));
            text(out, (x, bottom + 18.0), "middle", &faint, &tick_label(tick));
        }
        for tick in self.y.ticks() {
            let (_, y) = self.at(self.x.min, tick);
            line(out, (left, y), (right, y), &format!("stroke=\"{GRID}\""));
            text(out, (left - 8.0, y + 4.5), "end", &faint, &tick_label(tick));
        }
        line(out, (left, bottom), (right, bottom), &format!("stroke=\"{FAINT}\""));
        line(out, (left, top), (left, bottom), &format!("stroke=\"{FAINT}\""));
    }

    fn roof(&self, out: &mut String, chart: &Chart) {
        let (roof, faint) = (&chart.roof, format!("font-size=\"12\" fill=\"{FAINT}\""));
        let ridge = roof.ridge();
        let gflops = |intensity| roof.at(intensity) / 1e9;
        let corners = [self.x.min, ridge, self.x.max].map(|intensity| self.at(intensity, gflops(intensity)));
        let path: Vec<String> = corners.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{INK}\" stroke-width=\"2.5\" stroke-linejoin=\"round\"/>",
            path.join(" ")
        );
        self.ceilings(out, chart);
        let (x, y) = corners[1];
        line(out, (x, y), (x, PLOT[3]), &format!("stroke=\"{FAINT}\" stroke-dasharray=\"2 4\""));
        text(out, (x + 6.0, PLOT[3] - 8.0), "start", &faint, &format!("ridge at {ridge:.1} FLOP/byte"));
        self.slope_label(out, corners[0], corners[1], &format!("{:.1} GB/s read from memory", roof.bandwidth / 1e9));
    }

    /// Names every ceiling and draws those below the roof from where the slope reaches them.
    fn ceilings(&self, out: &mut String, chart: &Chart) {
        const LINE_HEIGHT: f64 = 15.0;
        let mut ceilings: Vec<_> = chart.ceilings.iter().collect();
        ceilings.sort_by(|a, b| b.flops_per_s.total_cmp(&a.flops_per_s));
        let mut free = f64::NEG_INFINITY;
        for ceiling in ceilings {
            let rate = ceiling.flops_per_s / 1e9;
            let (from, to) = (self.at(ceiling.flops_per_s / chart.roof.bandwidth, rate), self.at(self.x.max, rate));
            if ceiling.flops_per_s < chart.roof.peak {
                line(out, from, to, &format!("stroke=\"{FAINT}\" stroke-dasharray=\"5 4\""));
            }
            let y = free.max(to.1 + 4.0);
            free = y + LINE_HEIGHT;
            let label = format!("{} {rate:.0} GFLOP/s", ceiling.name);
            text(out, (to.0 + 7.0, y), "start", &format!("font-size=\"12\" fill=\"{FAINT}\""), &label);
        }
    }

    /// Writes along the slope, above it.
    fn slope_label(&self, out: &mut String, from: (f64, f64), to: (f64, f64), label: &str) {
        let middle = ((from.0 + to.0) / 2.0, (from.1 + to.1) / 2.0);
        let degrees = (to.1 - from.1).atan2(to.0 - from.0).to_degrees();
        let turned = format!(
            "font-size=\"12\" fill=\"{FAINT}\" transform=\"rotate({degrees:.1} {:.1} {:.1}) translate(0 -9)\"",
            middle.0, middle.1
        );
        text(out, middle, "middle", &turned, label);
    }

    fn series(&self, out: &mut String, points: &[Point], name: &str, colour: &str, label_below: f64) {
        let _ = writeln!(out, "<g class=\"{name}\" fill=\"{colour}\">");
        for point in points {
            let (x, y) = self.at(point.intensity, point.flops_per_s / 1e9);
            let _ = writeln!(
                out,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\" stroke=\"{CARD}\" stroke-width=\"1.5\"><title>{name} {}: \
                 {:.1} FLOP/byte, {:.1} GFLOP/s</title></circle>",
                escaped(&point.label),
                point.intensity,
                point.flops_per_s / 1e9
            );
            text(out, (x, y + label_below), "middle", "font-size=\"12\"", &point.label);
        }
        out.push_str("</g>\n");
    }
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), style: &str) {
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>",
        from.0, from.1, to.0, to.1
    );
}

fn text(out: &mut String, at: (f64, f64), anchor: &str, style: &str, content: &str) {
    let _ = writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" {style}>{}</text>",
        at.0,
        at.1,
        escaped(content)
    );
}

/// Text as XML spells it. Characters that XML cannot hold become spaces: names come from files.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::chart::tests::example;
    use super::*;

    /// Checks that tags nest and attributes are quoted, and returns the number of elements.
    fn elements(svg: &str) -> usize {
        let (mut open, mut count, mut rest) = (Vec::new(), 0, svg);
        while let Some(start) = rest.find('<') {
            assert!(!rest[..start].contains('>'), "a bare > in {:?}", &rest[..start]);
            let end = start + rest[start..].find('>').expect("a tag ends");
            let tag = &rest[start + 1..end];
            rest = &rest[end + 1..];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "tags nest");
                continue;
            }
            count += 1;
            assert!(tag.matches('"').count() % 2 == 0, "{tag}");
            let bare = tag.split('"').step_by(2).collect::<String>();
            assert!(!bare.contains(['<', '&', '\'']), "{tag}");
            if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().expect("a tag has a name"));
            }
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest:?}");
        count
    }

    fn number(line: &str, attribute: &str) -> f64 {
        let (_, rest) = line.split_once(&format!(" {attribute}=\"")).expect("has the attribute");
        rest.split('"').next().and_then(|n| n.parse().ok()).expect("is a number")
    }

    #[test]
    fn the_picture_is_well_formed_and_escaped() {
        let svg = draw(&example());
        assert!(elements(&svg) > 40, "{svg}");
        assert!(svg.contains("a &lt;model&gt; &amp; &quot;more&quot; in BF16"), "{svg}");
        for mut rest in svg.split('&').skip(1) {
            rest = rest.split(';').next().unwrap_or_default();
            assert!(["amp", "lt", "gt", "quot"].contains(&rest), "{rest}");
        }
        assert_eq!(svg, draw(&example()), "the same data draw the same bytes");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn points_lie_inside_the_axes_and_under_the_roof() {
        let chart = example();
        let svg = draw(&chart);
        let points: Vec<&str> =
            svg.lines().filter(|line| line.contains("<circle") && line.contains("<title>")).collect();
        assert_eq!(points.len(), chart.prefill.len() + chart.decode.len());
        let (x, y) = chart.axes();
        let frame = Frame { x, y };
        let [left, top, right, bottom] = PLOT;
        for point in points {
            let (cx, cy) = (number(point, "cx"), number(point, "cy"));
            assert!(cx > left && cx < right && cy > top && cy < bottom, "{point}");
            let intensity = x.min * (x.max / x.min).powf((cx - left) / (right - left));
            assert!(cy > frame.at(intensity, chart.roof.at(intensity) / 1e9).1 - 0.1, "{point}");
        }
    }

    #[test]
    fn characters_that_xml_cannot_hold_are_left_out() {
        assert_eq!(escaped("a\u{0}b\u{1b}[0m<é>"), "a b [0m&lt;é&gt;");
    }
}
