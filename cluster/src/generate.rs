//! `cluster generate`: one process, no scheduler, no network. What it prints is what a cluster must answer.

use crate::cli::GenerateArgs;
use crate::{demo, dirs, roles};
use anyhow::Context;
use ridge_kernels::sync::pool::Placement;
use ridge_model::detokenize::StreamDecoder;
use ridge_model::generate::generate;
use ridge_model::memory::PassLimits;
use ridge_model::template::RenderOptions;
use ridge_model::worker::{LoadedEngine, load_engine};
use ridge_protocol::SamplingParams;
use serde_json::json;
use std::io::Write;
use std::sync::Arc;

/// Runs the command.
pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => demo::unpack(&dirs::cache()?)?.display().to_string(),
    };
    let threads = args.threads.map_or_else(roles::default_threads, usize::from);
    let options = roles::engine(model, Placement::threads(threads), &args.engine);
    // As `generate` rounds it.
    let block_size = args.engine.block_size;
    let pass = PassLimits { tokens: (args.chunk / block_size).max(1) * block_size, sequences: 1 };
    let mut loaded = load_engine(&options, pass, &mut |_| {})?;
    let prompt = prompt(args, &loaded)?;
    let checkpoint = loaded.checkpoint.clone();
    let params = SamplingParams {
        temperature: args.temperature,
        seed: args.seed,
        ignore_eos: args.ignore_eos,
        stop_tokens: checkpoint.generation.eos.clone(),
        ..SamplingParams::greedy(args.max_tokens)
    };

    let mut decoder = StreamDecoder::new(&checkpoint.tokenizer, true);
    let stream = !args.ids && !args.json;
    let mut text = String::new();
    let mut show = |piece: Option<String>| {
        let piece = piece.unwrap_or_default();
        if stream {
            print!("{piece}");
            let _ = std::io::stdout().flush();
        }
        text.push_str(&piece);
    };
    let out = generate(loaded.engine.as_mut(), &prompt, &params, args.chunk, loaded.max_model_len, &mut |out| {
        if !params.is_stop(out.token) {
            show(decoder.push(out.token));
        }
        true
    })?;
    show(decoder.flush());

    let ids: Vec<u32> = out.iter().map(|out| out.token).collect();
    if args.json {
        let finish = if ids.last().is_some_and(|last| params.is_stop(*last)) { "stop" } else { "length" };
        let answer = json!({"prompt_ids": prompt, "ids": ids, "text": text, "finish_reason": finish});
        println!("{answer}");
    } else if args.ids {
        println!("{}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
    } else {
        println!();
    }
    Ok(())
}

/// The prompt's tokens: as given, from text, or through the chat template.
fn prompt(args: &GenerateArgs, loaded: &LoadedEngine) -> anyhow::Result<Vec<u32>> {
    if let Some(ids) = &args.prompt_ids {
        return Ok(ids.clone());
    }
    let checkpoint = Arc::clone(&loaded.checkpoint);
    let text = args.prompt.as_deref().context("either --prompt or --prompt-ids")?;
    if !args.chat {
        return Ok(checkpoint.tokenizer.encode(text, true)?);
    }
    let template = checkpoint.template.as_ref().context("this model has no chat template")?;
    let messages = json!([{"role": "user", "content": text}]);
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    // The template writes the special tokens itself.
    Ok(checkpoint.tokenizer.encode(&template.render(&messages, &options)?, false)?)
}
