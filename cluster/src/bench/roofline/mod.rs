//! `cluster roofline`: where prefill and decode stand under this machine's roof. Prefill belongs on the flat part,
//! decode on the slope; that they want different machines is why Ridge exists.
//!
//! A point's height is its share of the roof measured beside it, times the roof of the whole run: drift between
//! repetitions is divided out, so no point stands above the roof because of it. Read [`run`], then [`chart`].

mod chart;
mod plot;
mod svg;

use super::args::RooflineArgs;
use super::host;
use super::measure::{Run, measure};
use super::report;
use super::session::{Phase, Session};
use anyhow::Context;
use chart::{Ceiling, Chart, Point};

/// Prompt lengths, as far as the model goes.
const PROMPT_TOKENS: [usize; 7] = [16, 32, 64, 128, 256, 512, 1024];

/// Runs the command.
pub fn run(args: &RooflineArgs) -> anyhow::Result<()> {
    if let Some(folder) = args.svg.as_ref().and_then(|path| path.parent()).filter(|f| !f.as_os_str().is_empty()) {
        // Better said now than after minutes of measuring.
        anyhow::ensure!(folder.is_dir(), "--svg: there is no folder {}", folder.display());
    }
    let mut session = Session::new(&args.setup, |longest| phases(args, longest))?;
    let run = measure(&mut session, usize::from(args.repeat));
    let chart = chart(&session, &run, args);
    if args.setup.json {
        println!("{:#}", report::json("roofline", &session, &run));
    } else {
        println!("{}\n{}", report::table(&session, &run), plot::text(&chart));
    }
    if let Some(path) = &args.svg {
        std::fs::write(path, svg::draw(&chart)).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

/// Prompts and batches to measure on a model whose sequences have at most `longest` tokens.
fn phases(args: &RooflineArgs, longest: usize) -> Vec<Phase> {
    let prompts = match &args.prompt_tokens {
        Some(lengths) => lengths.clone(),
        None => PROMPT_TOKENS.into_iter().filter(|&length| length <= longest).collect(),
    };
    let chunk = args.setup.chunk;
    let prefill = prompts.into_iter().map(|tokens| Phase::Prefill { tokens, chunk });
    let (context, steps) = (args.setup.context, args.gen_tokens);
    let decode = args.batch.iter().map(|&batch| Phase::Decode { batch, context, steps });
    prefill.chain(decode).collect()
}

fn chart(session: &Session, run: &Run, args: &RooflineArgs) -> Chart {
    let (model, machine) = (&session.model, run.machine());
    let point = |measured: &super::measure::Measured, label: String| Point {
        label,
        intensity: measured.cost.intensity(),
        flops_per_s: measured.roofline_fraction().median * run.roof.at(measured.cost.intensity()),
    };
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for measured in &run.phases {
        match measured.phase {
            Phase::Prefill { tokens, .. } => prefill.push(point(measured, tokens.to_string())),
            Phase::Decode { batch, .. } => decode.push(point(measured, batch.to_string())),
        }
    }
    let mut ceilings = vec![("f32", machine.f32_flops_per_s), ("bf16", machine.bf16_flops_per_s)];
    if model.quantised {
        ceilings.push(("int8", machine.int8_ops_per_s));
    }
    Chart {
        title: format!("{} in {}", model.name, model.dtype),
        subtitle: format!(
            "{}, {} of {} cores ({})",
            host::cpu_name(),
            session.cpu().threads(),
            host::cores(),
            session.cpu().isa().name()
        ),
        note: format!(
            "cluster roofline: {} parameters, KV cache {}, decode at {} cached tokens, {}",
            billions(model.parameters),
            session.kv_format().dtype.name(),
            args.setup.context,
            host::date()
        ),
        roof: run.roof,
        ceilings: ceilings
            .into_iter()
            .filter(|(_, rate)| *rate > 0.0)
            .map(|(name, flops_per_s)| Ceiling { name, flops_per_s })
            .collect(),
        prefill,
        decode,
    }
}

fn billions(parameters: u64) -> String {
    match parameters {
        0..1_000_000_000 => format!("{:.1} M", parameters as f64 / 1e6),
        _ => format!("{:.2} B", parameters as f64 / 1e9),
    }
}
