//! `lockstep rate`: what is asked for, checked; then the server, and what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use lockstep_model::chat_template::Message;
use lockstep_model::inference::{Limits, Sampling};
use tokio::net::TcpListener;

use super::open_model::{OpenModel, own_name, run_directory};
use super::{Caller, Usage, block_on};
use crate::chat::answer::default_tokens;
use crate::cli::Rate;
use crate::rate::desk::Desk;
use crate::rate::preferences::{Choice, Found, Judgement, PreferenceFile};
use crate::rate::prompts;
use crate::rate::raters::Raters;
use crate::rate::room::Room;
use crate::rate::sampling::{Reader, Sampler};
use crate::rate::{self, RateConfig};
use crate::stop::Requests;
use crate::telemetry;
use crate::web::access::Hosts;
use crate::web::scheduler::Scheduler;

/// Answers that are sampled at once, at most.
const MOST_SEQUENCES: usize = 8;
/// Sequences of a rater, at most: the two answers of a pair.
const SEQUENCES_OF_RATER: usize = 2;
/// What judgements are called in a run's directory.
const OUT: &str = "preferences.jsonl";
/// What is said when the process ends at once.
const AT_ONCE: &str = "stopped at once; what was judged is kept";

/// Has people rate a run's model.
pub(crate) fn run(args: &Rate) -> anyhow::Result<()> {
    telemetry::init("info", false);
    let raters = raters(args)?;
    let hosts = hosts(args, &raters)?;
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, ..Sampling::default() };
    sampling.validate().map_err(|error| Usage(error.to_string()))?;
    let names = raters.names();
    let asked = args.prompts.as_deref().map(prompts::read).transpose()?;
    let sequences = names.len() * SEQUENCES_OF_RATER;
    let slots = sequences.min(MOST_SEQUENCES);
    let model = OpenModel::load(&args.model, Limits { sequences: slots, ..Limits::default() }, Caller::Waits)?;
    let template = model.template()?;
    let OpenModel { engine, tokenizer, manifest, device } = model;
    let context = engine.context();
    eprintln!(
        "model {}: step {}, context {context} tokens, on {device}\n{}",
        own_name(&args.model.run, &manifest.recipe_name),
        manifest.step,
        template.describe()
    );
    let reader = Reader { tokenizer, template, context };
    let asked = asked.map(|asked| readable(args, &reader, asked)).transpose()?;

    let out = args.out.clone().unwrap_or_else(|| run_directory(&args.model.run).join(OUT));
    let (file, found) = PreferenceFile::open(&out)?;
    let Found { lines, cut_bytes } = found;
    if cut_bytes > 0 {
        eprintln!("{}: the last line was cut off, and nobody was told that it was kept: it is removed", out.display());
    }
    let desk = |name: &String| match &asked {
        Some(prompts) => Desk::planned(args.seed, name, prompts, args.rounds.into()),
        None => Desk::typed(args.seed, name),
    };
    let mut desks: BTreeMap<String, Desk> = names.iter().map(|name| (name.clone(), desk(name))).collect();
    for line in lines {
        // Others may have judged before.
        let name = line.rater().to_owned();
        desks.entry(name).or_insert_with_key(|name| Desk::typed(args.seed, name)).apply(line);
    }
    let far = names.iter().map(|name| {
        let progress = desks[name].progress();
        let of = progress.total.map_or_else(String::new, |total| format!(" of {total}"));
        format!("{name} {}{of}", progress.judged)
    });
    eprintln!("judgements go to {}; judged so far: {}", out.display(), far.collect::<Vec<_>>().join(", "));
    let room = Arc::new(Room::new(file, desks));

    block_on(async {
        let address = args.listen;
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("{address}: cannot listen; is another program using the port? Port 0 takes a free one")
        })?;
        let (scheduler, ended) =
            Scheduler::start(engine, slots, sequences - slots).context("no thread for the engine")?;
        eprint!("{}", links(&raters, listener.local_addr()?));
        let sampler = Sampler {
            scheduler: Arc::new(scheduler),
            reader,
            seed: args.seed,
            temperature: args.temperature,
            top_p: args.top_p,
            max_tokens: args.max_tokens.map_or_else(|| default_tokens(context), |tokens| tokens as usize),
            params_sha256: manifest.params_sha256,
        };
        let model = own_name(&args.model.run, &manifest.recipe_name);
        let config = RateConfig { sampler, ended, room: room.clone(), raters, model, hosts };
        rate::run(config, listener, Requests::by_signal()?.first(AT_ONCE)).await
    })?;
    eprintln!("{}", summary(&room, &args.model.run, &out));
    Ok(())
}

/// Who rates.
fn raters(args: &Rate) -> anyhow::Result<Raters> {
    let Some(path) = &args.raters else {
        return Ok(
            Raters::parse(args.rater.iter().map(String::as_str)).map_err(|error| Usage(format!("--rater: {error}")))?
        );
    };
    let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    match Raters::parse(text.lines()) {
        Ok(Raters::Anybody) => {
            Err(Usage(format!("{}: no rater is in it; a line is NAME=TOKEN", path.display())).into())
        }
        Ok(raters) => Ok(raters),
        Err(error) => Err(Usage(format!("{}: {error}", path.display())).into()),
    }
}

/// Under which names the server answers, if that is safe.
fn hosts(args: &Rate, raters: &Raters) -> Result<Hosts, Usage> {
    match (raters, args.insecure, args.listen.ip().is_loopback()) {
        (Raters::Named(_), ..) | (_, true, _) => Ok(Hosts::Any),
        (Raters::Anybody, false, true) => Ok(Hosts::Local),
        (Raters::Anybody, false, false) => Err(Usage(format!(
            "--listen {}: whoever reaches this address could rate, since no token is asked for. Name raters with --rater \
             NAME=TOKEN or --raters FILE; or listen on 127.0.0.1; or, on a network you trust, add --insecure. Traffic is not \
             encrypted: beyond such a network, put a proxy with TLS before it",
            args.listen
        ))),
    }
}

/// The prompts that the model reads, each once. The others are counted.
fn readable(args: &Rate, reader: &Reader, asked: Vec<prompts::Prompt>) -> anyhow::Result<Vec<Vec<Message>>> {
    let (all, mut seen) = (asked.len(), BTreeSet::new());
    let (mut prompts, mut repeated, mut unread) = (Vec::new(), 0, Vec::new());
    for prompt in asked {
        let said: Vec<(String, String)> =
            prompt.messages.iter().map(|message| (message.role.clone(), message.content.clone())).collect();
        if !seen.insert(said) {
            repeated += 1;
            continue;
        }
        match reader.tokens(&prompt.messages) {
            Ok(_) => prompts.push(prompt.messages),
            Err(error) => unread.push(format!("{}: {error}", prompt.place)),
        }
    }
    let path = args.prompts.as_deref().unwrap_or(Path::new("")).display();
    eprint!("{path}: {all} prompts found");
    if repeated > 0 {
        eprint!(", of which {repeated} stand there before");
    }
    match unread.first() {
        None => eprintln!(),
        Some(first) => eprintln!("; the model does not read {} of them, which are left out ({first})", unread.len()),
    }
    if prompts.is_empty() {
        bail!("{path}: there is nothing to ask the model");
    }
    Ok(prompts)
}

/// Where raters are to go.
fn links(raters: &Raters, address: std::net::SocketAddr) -> String {
    let mut text = match raters {
        Raters::Anybody => return format!("listening on http://{address} for whoever rates\n"),
        Raters::Named(_) => format!("listening on http://{address} for those with a link"),
    };
    if address.ip().is_unspecified() {
        text.push_str(", in which this machine's own name is to stand for the address");
    }
    text.push('\n');
    if let Raters::Named(raters) = raters {
        for rater in raters {
            text.push_str(&format!("  {}: http://{address}/?token={}\n", rater.name, rater.token));
        }
    }
    text
}

/// What is in the file at the end, and what to do with it.
fn summary(room: &Room, run: &Path, out: &Path) -> String {
    let desks = room.desks();
    let live = || desks.values().flat_map(Desk::live);
    let count =
        |choices: &[Choice]| live().filter(|judgement: &&Judgement| choices.contains(&judgement.choice)).count();
    let (all, chosen) = (live().count(), count(&[Choice::First, Choice::Second]));
    let out = out.display();
    if all == 0 {
        return format!("nothing is judged in {out}");
    }
    let whose = desks.iter().filter(|(_, desk)| !desk.live().is_empty());
    let whose: Vec<String> = whose.map(|(name, desk)| format!("{name} {}", desk.live().len())).collect();
    let mut text = format!(
        "{all} judgements in {out}, by {}: {chosen} choices, {} ties, {} times both bad",
        whose.join(", "),
        count(&[Choice::Tie]),
        count(&[Choice::BothBad])
    );
    if chosen > 0 {
        let run = run.display();
        text.push_str(&format!("\ntrain on the choices: lockstep train dpo --set init={run} --set data.input={out}"));
    }
    text
}
