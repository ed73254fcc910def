//! `lockstep status`: what a live run is doing.

use anyhow::Context as _;
use lockstep_proto::v1::lockstep_client::LockstepClient;
use lockstep_proto::v1::{StatusReply, StatusRequest};
use serde_json::json;
use tonic::transport::Channel;

use super::{Usage, block_on};
use crate::cli::Status;

/// Asks a coordinator and prints its answer.
pub(crate) fn run(args: Status) -> anyhow::Result<()> {
    let status = block_on(async {
        let address = &args.address;
        let channel = Channel::from_shared(format!("http://{address}"))
            .map_err(|_| Usage(format!("{address}: no address; give HOST:PORT, for example 127.0.0.1:7070")))?;
        let channel = channel.connect().await;
        let channel = channel.with_context(|| format!("{address}: no coordinator answers; is the run over?"))?;
        let reply = LockstepClient::new(channel).status(StatusRequest {}).await;
        Ok(reply.with_context(|| format!("{address}: the coordinator gives no status"))?.into_inner())
    })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&as_json(&status))?);
    } else {
        print_text(&status);
    }
    Ok(())
}

fn as_json(status: &StatusReply) -> serde_json::Value {
    let workers = status.workers.iter().map(|worker| {
        json!({
            "worker_id": worker.worker_id,
            "name": worker.name,
            "device": worker.device,
            "device_class": worker.device_class,
            "tokens_per_sec": worker.tokens_per_sec,
            "leases": worker.leases,
            "blocks_accepted": worker.blocks_accepted,
            "workers": worker.workers,
        })
    });
    json!({
        "run_id": status.run_id,
        "incarnation": status.incarnation,
        "recipe": status.recipe,
        "step": status.step,
        "total_steps": status.total_steps,
        "loss": status.loss,
        "val_loss": status.val_loss,
        "tokens_per_sec": status.tokens_per_sec,
        "workers": workers.collect::<Vec<_>>(),
        "waiting_for": status.waiting_for,
        "evaluating": status.evaluating,
        "blocks_leased_again": status.blocks_leased_again,
        "twins": status.twins,
        "roll_backs": status.roll_backs,
        "quarantined": status.quarantined,
        "relay_of": status.relay_of,
    })
}

fn print_text(status: &StatusReply) {
    let number = |value: Option<f64>| value.map_or_else(|| "none yet".into(), |value| format!("{value:.4}"));
    if status.relay_of.is_empty() {
        println!("run              {} ({}), start {}", status.run_id, status.recipe, status.incarnation);
        println!("step             {} of {}", status.step, status.total_steps);
        println!("training loss    {}", number(status.loss));
        println!("validation loss  {}", number(status.val_loss));
    } else {
        println!("relay of         {}", status.relay_of);
        println!("run              {}", if status.run_id.is_empty() { "none yet" } else { &status.run_id });
        println!("version          {}", status.step);
    }
    println!("speed            {:.0} tokens/s", status.tokens_per_sec);
    println!("waiting for      {}", status.waiting_for);
    println!("done again       {} blocks of lost leases, {} twins", status.blocks_leased_again, status.twins);
    if status.roll_backs > 0 {
        println!("gone back        {} ×", status.roll_backs);
    }
    if !status.quarantined.is_empty() {
        println!("quarantined      {}", status.quarantined.join(", "));
    }
    println!(
        "\n{:<7} {:<20} {:<32} {:<17} {:>10} {:>7} {:>11}",
        "worker", "name", "device", "class", "tokens/s", "blocks", "stands for"
    );
    for worker in &status.workers {
        println!(
            "{:<7} {:<20} {:<32} {:<17} {:>10.0} {:>7} {:>11}",
            worker.worker_id,
            worker.name,
            worker.device,
            worker.device_class,
            worker.tokens_per_sec,
            worker.blocks_accepted,
            worker.workers.max(1)
        );
    }
}
