//! `cluster bench interference`: how much do decoding users feel somebody else's long prompt?
//!
//! A few clients decode all the time. Their inter-token latency is measured without and with long prompts that arrive
//! every few seconds, for any OpenAI-compatible server, or for Ridge in both of its modes. This is a client: it sees
//! what users see and knows nothing of what the server does. Read [`load`] (what runs), [`crate::client`] (how tokens are
//! counted), [`report`] (what is printed, and the keys of the JSON object) and [`local`] (clusters of our own).

mod args;
mod load;
mod local;
mod prompts;
mod report;

pub use args::InterferenceArgs;

use crate::client::{Client, ListedModel};
use anyhow::{Context, ensure};
use load::{Plan, Target, run_phase, warm_up};
use local::{Cluster, Mode};
use prompts::Prompts;
use report::Measured;

/// Runs `cluster bench interference`.
pub fn run(args: &InterferenceArgs) -> anyhow::Result<()> {
    let plan = Plan {
        clients: args.clients.into(),
        prompt_tokens: args.prompt_tokens,
        gen_tokens: args.gen_tokens,
        long_prompt_tokens: args.long_prompt_tokens,
        long_gen_tokens: args.long_gen_tokens,
        every: args.every,
        seconds: args.seconds,
        seed: args.seed.unwrap_or_else(seed_of_now),
    };
    plan.check()?;
    let servers = if args.local { clusters(args, &plan)? } else { urls(args, &plan)? };
    if args.json {
        println!("{:#}", report::json(&plan, args.timeout, &servers));
    } else {
        print!("{}", report::table(&plan, &servers));
    }
    Ok(())
}

fn urls(args: &InterferenceArgs, plan: &Plan) -> anyhow::Result<Vec<Measured>> {
    // A mistake in the last address should not show after the first server's measurement.
    let clients: Vec<Client> =
        args.url.iter().map(|url| Client::new(url, key(args), args.timeout)).collect::<Result<_, _>>()?;
    let measure_one = |client: Client| {
        let name = client.base().to_owned();
        measure(&name, client, args.model.as_deref(), args, plan)
    };
    clients.into_iter().map(measure_one).collect()
}

fn clusters(args: &InterferenceArgs, plan: &Plan) -> anyhow::Result<Vec<Measured>> {
    let measure_mode = |mode: Mode| {
        let flags = mode.flags(args);
        eprintln!("{}: cluster up --local {}", mode.name(), flags.join(" "));
        let cluster = Cluster::start(&flags, key(args), args.start_timeout)?;
        let client = Client::new(&cluster.url, key(args), args.timeout)?;
        let measured = measure(mode.name(), client, None, args, plan)?;
        Ok(Measured { up_flags: Some(flags), ..measured })
    };
    Mode::ALL.into_iter().map(measure_mode).collect()
}

/// The key that is sent: an empty variable means none, and the first of several is as good as any.
fn key(args: &InterferenceArgs) -> Option<&str> {
    args.api_key.as_deref()?.split(',').find(|key| !key.is_empty())
}

/// Both phases of one server. Says on stderr how far it is.
fn measure(
    name: &str,
    client: Client,
    model: Option<&str>,
    args: &InterferenceArgs,
    plan: &Plan,
) -> anyhow::Result<Measured> {
    let model = find_model(&client, model, plan)?;
    let prompts = Prompts::prepare(&client, &model, args.prompts, plan.seed)?;
    let target = Target { client, model, prompts };
    eprintln!("{name}: warming up");
    warm_up(&target, plan)?;
    eprintln!("{name}: {} s without long prompts", plan.seconds.as_secs_f64());
    let quiet = run_phase(&target, plan, false).context("without long prompts")?;
    eprintln!("{name}: {} s with {} long prompts", plan.seconds.as_secs_f64(), plan.arrivals());
    let loaded = run_phase(&target, plan, true).context("with long prompts")?;
    Ok(Measured {
        name: name.to_owned(),
        url: target.client.base().to_owned(),
        prompts: target.prompts.name(),
        model: target.model,
        up_flags: None,
        quiet,
        loaded,
    })
}

/// The name to ask for; refuses prompts that the server says it cannot take.
fn find_model(client: &Client, wanted: Option<&str>, plan: &Plan) -> anyhow::Result<String> {
    let listed = client.models()?;
    let Some(ListedModel { name, max_model_len }) = (match wanted {
        Some(name) => listed.into_iter().find(|model| model.name == name),
        None => listed.into_iter().next(),
    }) else {
        // Some servers take names that they do not list; if this one does not, the first request will say so.
        let name =
            wanted.with_context(|| format!("{}: /v1/models lists none; name one with --model", client.base()))?;
        return Ok(name.to_owned());
    };
    for (flag, prompt, answer) in [
        ("--prompt-tokens", plan.prompt_tokens, plan.gen_tokens),
        ("--long-prompt-tokens", plan.long_prompt_tokens, plan.long_gen_tokens),
    ] {
        let fits = max_model_len.is_none_or(|most| prompt.saturating_add(answer) <= most);
        let most = max_model_len.unwrap_or(usize::MAX);
        ensure!(fits, "{}: {flag} {prompt} and {answer} generated are more than the {most} of {name}", client.base());
    }
    Ok(name)
}

/// A server may keep the KV of prompts that it has seen, so another run takes other prompts.
fn seed_of_now() -> u64 {
    jiff::Timestamp::now().as_microsecond().unsigned_abs()
}
