//! A run as a table for people and as JSON for `bench/results`.

use super::host;
use super::measure::{Measured, Roof, Run, Spread, WARM_UPS};
use super::session::{Phase, Session};
use serde_json::{Value, json};
use std::fmt::Write;

const GIGA: f64 = 1e9;

/// The run as one JSON object; `prefill` and `decode` are lists. Units stand in the names; `gflops` and `gops` are per second.
pub fn json(benchmark: &str, session: &Session, run: &Run) -> Value {
    let model = &session.model;
    let of =
        |wanted: fn(&Phase) -> bool| run.phases.iter().filter(move |m| wanted(&m.phase)).map(|m| phase(m, &run.roof));
    let prefill: Vec<Value> = of(|phase| matches!(phase, Phase::Prefill { .. })).collect();
    let decode: Vec<Value> = of(|phase| matches!(phase, Phase::Decode { .. })).collect();
    json!({
        "benchmark": benchmark,
        "date": host::date(),
        "command": host::command(),
        "version": env!("CARGO_PKG_VERSION"),
        "machine": machine(session, run),
        "model": {
            "name": model.name,
            "arch": model.arch,
            "dtype": model.dtype,
            "parameters": model.parameters,
            "weight_bytes": model.weight_bytes,
            "kv_cache_dtype": session.kv_format().dtype.name(),
            "block_size": session.kv_format().block_size,
        },
        "warm_ups": WARM_UPS,
        "repetitions": run.phases.first().map_or(0, |m| m.repetitions.len()),
        "prefill": prefill,
        "decode": decode,
    })
}

fn machine(session: &Session, run: &Run) -> Value {
    let figures = [
        ("read_gb_s", run.limit(|l| l.read_bytes_per_s)),
        ("f32_gflops", run.limit(|l| l.f32_flops_per_s)),
        ("bf16_gflops", run.limit(|l| l.bf16_flops_per_s)),
        ("int8_gops", run.limit(|l| l.int8_ops_per_s)),
    ];
    let mut out = json!({
        "cpu": host::cpu_name(),
        "cores": host::cores(),
        "system": std::env::consts::OS,
        "threads": session.cpu().threads(),
        "isa": session.cpu().isa().name(),
    });
    for (name, Spread { median, min, max }) in figures {
        out[name] = rounded(median / GIGA);
        out[format!("{name}_min")] = rounded(min / GIGA);
        out[format!("{name}_max")] = rounded(max / GIGA);
    }
    out
}

fn phase(measured: &Measured, roof: &Roof) -> Value {
    let (cost, rate, seconds) = (&measured.cost, measured.tokens_per_s(), measured.seconds());
    let fraction = measured.roofline_fraction();
    let mut out = match measured.phase {
        Phase::Prefill { tokens, chunk } => json!({"prompt_tokens": tokens, "chunk": chunk.min(tokens)}),
        Phase::Decode { batch, context, steps } => json!({"batch": batch, "context": context, "gen_tokens": steps}),
    };
    let figures = [
        ("tokens_per_s", rate.median),
        ("tokens_per_s_min", rate.min),
        ("tokens_per_s_max", rate.max),
        ("seconds", seconds.median),
        ("seconds_min", seconds.min),
        ("seconds_max", seconds.max),
        ("predicted_s", measured.predicted_s().median),
        ("gflops", measured.flops_per_s() / GIGA),
        ("gb_s", measured.bytes_per_s() / GIGA),
        ("intensity", cost.intensity()),
        ("roofline_fraction", fraction.median),
        ("roofline_fraction_min", fraction.min),
        ("roofline_fraction_max", fraction.max),
    ];
    for (name, value) in figures {
        out[name] = rounded(value);
    }
    out["bound"] = bound(measured, roof).into();
    out["counted"] = json!({
        "matmul_flops": cost.matmul_flops,
        "attention_flops": cost.attention_flops,
        "weight_bytes": cost.weight_bytes,
        "kv_read_bytes": cost.kv_read_bytes,
        "kv_write_bytes": cost.kv_write_bytes,
    });
    out
}

/// Which side of the roof a phase is under.
fn bound(measured: &Measured, roof: &Roof) -> &'static str {
    if measured.cost.intensity() < roof.ridge() { "memory" } else { "compute" }
}

/// Five digits: more would be noise.
fn rounded(value: f64) -> Value {
    format!("{value:.4e}").parse::<f64>().map_or(Value::Null, Value::from)
}

/// The run as lines of text.
pub fn table(session: &Session, run: &Run) -> String {
    let mut out = String::new();
    let (model, machine) = (&session.model, run.machine());
    let _ = writeln!(
        out,
        "{} ({}, {:.2} B parameters, {:.2} GB {}, KV {}, blocks of {})",
        model.name,
        model.arch,
        model.parameters as f64 / GIGA,
        model.weight_bytes as f64 / GIGA,
        model.dtype,
        session.kv_format().dtype.name(),
        session.kv_format().block_size
    );
    let _ = writeln!(
        out,
        "{}, {} of {} cores, {}",
        host::cpu_name(),
        session.cpu().threads(),
        host::cores(),
        session.cpu().isa().name()
    );
    let _ = writeln!(
        out,
        "limits: read {:.1} GB/s, f32 {:.0} GFLOP/s, bf16 {:.0} GFLOP/s, int8 {:.0} GOP/s; ridge at {:.1} FLOP/byte\n",
        machine.read_bytes_per_s / GIGA,
        machine.f32_flops_per_s / GIGA,
        machine.bf16_flops_per_s / GIGA,
        machine.int8_ops_per_s / GIGA,
        run.roof.ridge()
    );
    let _ = writeln!(
        out,
        "{:<26} {:>9} {:>19} {:>9} {:>8} {:>10} {:>9} {:>8}",
        "phase", "tokens/s", "(min .. max)", "GFLOP/s", "GB/s", "FLOP/byte", "of roof", "bound"
    );
    for measured in &run.phases {
        let rate = measured.tokens_per_s();
        let _ = writeln!(
            out,
            "{:<26} {:>9.1} {:>19} {:>9.1} {:>8.2} {:>10.1} {:>8.0}% {:>8}",
            name(&measured.phase),
            rate.median,
            format!("({:.1} .. {:.1})", rate.min, rate.max),
            measured.flops_per_s() / GIGA,
            measured.bytes_per_s() / GIGA,
            measured.cost.intensity(),
            100.0 * measured.roofline_fraction().median,
            bound(measured, &run.roof)
        );
    }
    out
}

fn name(phase: &Phase) -> String {
    match *phase {
        Phase::Prefill { tokens, chunk } if chunk < tokens => format!("prefill {tokens} by {chunk}"),
        Phase::Prefill { tokens, .. } => format!("prefill {tokens}"),
        Phase::Decode { batch, context, .. } => format!("decode b={batch} at {context}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_digits() {
        assert_eq!(name(&Phase::Prefill { tokens: 512, chunk: 512 }), "prefill 512");
        assert_eq!(name(&Phase::Prefill { tokens: 4096, chunk: 512 }), "prefill 4096 by 512");
        assert_eq!(name(&Phase::Decode { batch: 4, context: 128, steps: 64 }), "decode b=4 at 128");
        assert_eq!(rounded(123_456.789), json!(123_460.0));
        assert_eq!(rounded(0.0), json!(0.0));
        assert_eq!(rounded(f64::NAN), Value::Null);
    }
}
