//! `lockstep serve`: what is asked for, checked; then the server.

use std::time::Duration;

use anyhow::Context as _;
use lockstep_model::inference::Limits;
use tokio::net::TcpListener;

use super::open_model::{OpenModel, own_name};
use super::{Caller, Usage, block_on};
use crate::cli::Serve;
use crate::serve::{self, Access, ServeConfig};
use crate::stop::Requests;
use crate::telemetry;

/// Where the API key may stand.
const KEY_VARIABLE: &str = "LOCKSTEP_API_KEY";
/// What is said when the process ends in the middle of answers.
const AT_ONCE: &str = "stopped at once; answers under way are cut off";

/// Serves a run's model.
pub(crate) fn run(args: &Serve) -> anyhow::Result<()> {
    telemetry::init("info", false);
    let access = access(args)?;
    let (slots, queue) = (args.sequences as usize, args.queue as usize);
    let model = OpenModel::load(&args.model, Limits { sequences: slots, ..Limits::default() }, Caller::Waits)?;
    let template = model.template()?;
    let OpenModel { engine, tokenizer, manifest, device } = model;
    let context = engine.context();
    let name = args.model_name.clone().unwrap_or_else(|| own_name(&args.model.run, &manifest.recipe_name));
    let cache_mib = (slots * context * engine.cache_bytes_per_token()) as f64 / f64::from(1 << 20);
    let described = format!(
        "model {name}: step {}, context {context} tokens, on {device}\n{}\n{slots} sequences at once, whose key-value caches \
         take at most {cache_mib:.1} MiB, and {queue} waiting",
        manifest.step,
        template.describe(),
    );
    block_on(async {
        let address = args.listen;
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("{address}: cannot listen; is another program using the port? Port 0 takes a free one")
        })?;
        let address = listener.local_addr()?;
        let who = match access {
            Access::Key(_) => "for whoever has the API key",
            Access::LocalNames => "for programs on this machine",
            Access::Anyone => "for anyone who reaches it",
        };
        eprintln!("{described}\nlistening on http://{address} {who}: a page to talk on, and the API at /v1");
        let config = ServeConfig {
            engine,
            tokenizer,
            template,
            name,
            params_sha256: manifest.params_sha256,
            slots,
            queue,
            max_tokens: args.max_tokens.map_or(context, |tokens| tokens as usize),
            access,
            grace: Duration::from_secs(args.grace_secs),
        };
        serve::run(config, listener, Requests::by_signal()?.first(AT_ONCE)).await
    })
}

/// Who may ask, if that is safe.
fn access(args: &Serve) -> anyhow::Result<Access> {
    let key = match &args.api_key_file {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
            Some((path.display().to_string(), text))
        }
        None => std::env::var(KEY_VARIABLE).ok().map(|key| (KEY_VARIABLE.to_string(), key)),
    };
    if let Some((place, key)) = key {
        let key = key.trim();
        if key.is_empty() || key.chars().any(|character| !character.is_ascii_graphic()) {
            return Err(Usage(format!(
                "{place}: an API key is one word of ASCII characters; for example the output of `openssl rand -hex 16`"
            ))
            .into());
        }
        return Ok(Access::Key(key.into()));
    }
    match (args.insecure, args.listen.ip().is_loopback()) {
        (true, _) => Ok(Access::Anyone),
        (false, true) => Ok(Access::LocalNames),
        (false, false) => Err(Usage(format!(
            "--listen {}: whoever reaches this address could use the model, since no API key is asked for. Give one in \
             --api-key-file FILE or the variable {KEY_VARIABLE}; or listen on 127.0.0.1; or, on a network you trust, add \
             --insecure. Traffic is not encrypted: beyond such a network, put a proxy with TLS before it",
            args.listen
        ))
        .into()),
    }
}
