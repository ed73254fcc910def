//! Both sides beside each other, for people.

use indicatif::{DecimalBytes, HumanCount};

use super::report::Report;
use super::{Summary, Workload};

/// Digits of a digest that are shown.
const DIGITS: usize = 16;

/// Prints the table.
pub(super) fn print(summary: &Summary) {
    let Summary { checkpoint, training, inference, workload, .. } = summary;
    let parameters = HumanCount(summary.parameters as u64);
    println!("checkpoint  {}, {parameters} parameters", checkpoint.display());
    println!("device      {}, {} CPU thread(s)", summary.device, summary.threads);
    println!();
    row("", "training", "inference");
    let Workload { slots, sequences_per_slot, context, prompt_tokens, generated_tokens, streams } = workload;
    row(
        "a step, a stream",
        &format!("{slots} slots of {sequences_per_slot} × {context} tokens"),
        &format!("{prompt_tokens} tokens of prompt, {generated_tokens} more"),
    );

    heading("memory, by arithmetic");
    let memory = [&training.memory, &inference.memory];
    let bytes = |name: &str, of: fn(&super::report::Memory) -> u64| {
        let [left, right] = memory.map(|memory| shown(Some(of(memory)).filter(|bytes| *bytes > 0), "none"));
        row(name, &left, &right);
    };
    bytes("  parameters", |memory| memory.parameters);
    bytes("  gradients", |memory| memory.gradients);
    bytes("  optimizer's moments", |memory| memory.moments);
    bytes("  activations kept", |memory| memory.activations);
    bytes(&format!("  keys and values, {streams} streams"), |memory| memory.cache);
    bytes("  in all", |memory| memory.total());
    heading("memory of the process, measured");
    let measured = |name: &str, of: fn(&Report) -> Option<u64>| {
        let [left, right] = [training, inference].map(|report| shown(of(report), "not known"));
        row(name, &left, &right);
    };
    measured("  before it reads the model", |report| report.start_rss_bytes);
    measured("  at its peak", |report| report.peak_rss_bytes);

    heading("tokens a second");
    let rate = |report: &Report, name: &str| HumanCount(report.tokens_per_sec[name].round() as u64).to_string();
    row("  a training step", &rate(training, "step"), "");
    row("  prefill", "", &rate(inference, "prefill"));
    row("  decoding, one stream", "", &rate(inference, "decode_1"));
    row(&format!("  decoding, {streams} streams"), "", &rate(inference, &format!("decode_{streams}")));

    heading("direction of data");
    let none = || "none".to_string();
    let [left, right] = [training, inference].map(|report| &report.direction);
    row("  forward", &left.forward, &right.forward);
    row("  backward", &left.backward.clone().unwrap_or_else(none), &right.backward.clone().unwrap_or_else(none));
    row("  update", &left.update.clone().unwrap_or_else(none), &right.update.clone().unwrap_or_else(none));
    row("  what grows", &left.grows.clone().unwrap_or_else(none), &right.grows.clone().unwrap_or_else(none));

    let active = |report: &Report| match report.dropout_active {
        true => format!("active, {}", summary.dropout),
        false if summary.dropout > 0.0 => "inactive".to_string(),
        false => "inactive: the model has none".to_string(),
    };
    row("dropout", &active(training), &active(inference));
    heading("SHA-256 of the parameters");
    row("  before", &training.sha256_before[..DIGITS], &inference.sha256_before[..DIGITS]);
    let after = |report: &Report, of: &str| {
        let digits = &report.sha256_after[..DIGITS];
        let verdict = if report.parameters_changed { "changed" } else { "unchanged" };
        format!("{digits} {verdict} {of}")
    };
    row("  after", &after(training, "by a step"), &after(inference, "by generating"));
}

fn shown(bytes: Option<u64>, otherwise: &str) -> String {
    bytes.map_or_else(|| otherwise.into(), |bytes| DecimalBytes(bytes).to_string())
}

fn heading(name: &str) {
    println!("{name}");
}

fn row(name: &str, training: &str, inference: &str) {
    println!("{}", format!("{name:<30} {training:<36} {inference}").trim_end());
}
