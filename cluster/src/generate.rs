//! `cluster generate`: one process, no scheduler, no network. What it prints is what a cluster must answer.

use crate::cli::{EngineArgs, GenerateArgs};
use crate::{demo, dirs, roles};
use anyhow::{Context, bail};
use ridge_kernels::sync::pool::Placement;
use ridge_model::detokenize::StreamDecoder;
use ridge_model::generate::{generate, generate_handed_over};
use ridge_model::grammar::Grammars;
use ridge_model::memory::PassLimits;
use ridge_model::template::RenderOptions;
use ridge_model::worker::{LoadedEngine, load_engine};
use ridge_protocol::{Grammar, GrammarKind, SamplingParams, TokenOut};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

/// Runs the command.
pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => demo::unpack(&dirs::cache()?)?.display().to_string(),
    };
    let threads = args.threads.map_or_else(roles::default_threads, usize::from);
    let load = |engine: &EngineArgs| {
        let options = roles::engine(model.clone(), Placement::threads(threads), engine);
        // As `generate` rounds it.
        let tokens = (args.chunk / engine.block_size).max(1) * engine.block_size;
        load_engine(&options, PassLimits { tokens, sequences: 1 }, &mut |_| {})
    };
    let mut loaded = load(&args.engine)?;
    let mut prefill = args.prefill_kv.is_given().then(|| load(&args.prefill_kv.over(&args.engine))).transpose()?;
    if let Some(reason) = prefill.as_ref().and_then(|prefill| loaded.identity.refusal(&prefill.identity)) {
        bail!("{reason}");
    }
    let prompt = prompt(args, &loaded)?;
    let checkpoint = loaded.checkpoint.clone();
    let params = SamplingParams {
        temperature: args.temperature,
        seed: args.seed,
        ignore_eos: args.ignore_eos,
        stop_tokens: checkpoint.generation.eos.clone(),
        grammar: grammar(args, &loaded)?.map(Box::new),
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
    let mut on_token = |out: &TokenOut| {
        if !params.is_stop(out.token) {
            show(decoder.push(out.token));
        }
        true
    };
    let (engine, limit) = (loaded.engine.as_mut(), loaded.max_model_len);
    let out = match &mut prefill {
        None => generate(engine, &prompt, &params, args.chunk, limit, &mut on_token)?,
        Some(prefill) => {
            let first = prefill.engine.as_mut();
            generate_handed_over(first, engine, &prompt, &params, args.chunk, limit, &mut on_token)?
        }
    };
    show(decoder.flush());

    let ids: Vec<u32> = out.iter().map(|out| out.token).collect();
    if args.json {
        let stopped = out.last().is_some_and(|last| last.ends || params.is_stop(last.token));
        let finish = if stopped { "stop" } else { "length" };
        let answer = json!({"prompt_ids": prompt, "ids": ids, "text": text, "finish_reason": finish});
        println!("{answer}");
    } else if args.ids {
        println!("{}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
    } else {
        println!();
    }
    Ok(())
}

/// What the answer must match, if anything; one that is no good is refused before anything is computed.
fn grammar(args: &GenerateArgs, loaded: &LoadedEngine) -> anyhow::Result<Option<Grammar>> {
    let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| path.display().to_string());
    let (flag, kind, text) = match (&args.json_schema, &args.regex, &args.grammar) {
        (Some(path), _, _) => ("--json-schema", GrammarKind::JsonSchema, read(path)?),
        (_, Some(pattern), _) => ("--regex", GrammarKind::Regex, pattern.clone()),
        (_, _, Some(path)) => ("--grammar", GrammarKind::Lark, read(path)?),
        (None, None, None) => return Ok(None),
    };
    let (grammar, checkpoint) = (Grammar { kind, text }, &loaded.checkpoint);
    Grammars::new(checkpoint.tokenizer.clone(), checkpoint.spec.vocab).check(&grammar).context(flag)?;
    Ok(Some(grammar))
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
