//! `lockstep bench compute`: how fast this machine's workers train, beside how fast it multiplies.

use std::io::IsTerminal as _;
use std::process::Stdio;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use lockstep_model::ceiling;
use lockstep_model::traffic::Traffic;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::task::JoinSet;

use super::measured::{self, Gpu, Report, Request};
use super::median;
use super::setting::Setting;
use super::shape::Shape;
use crate::child;
use crate::cli::{BenchCompute, Measurement};
use crate::commands::block_on;

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Summary {
    /// Tokens of a step are those of one worker.
    #[serde(flatten)]
    setting: Setting,
    /// Of all workers together: the sum of what each does in its median step.
    tokens_per_sec: f64,
    /// Of all workers' steps.
    step_ms_median: f64,
    /// The share of a step that its matrix products take when nothing else is done; none where they are not the CPU's.
    matmul_share: Option<f64>,
    /// What a worker's products alone reach.
    matmul_gflop_per_sec: Option<f64>,
    /// Of the largest worker; none where the system does not say.
    peak_rss_bytes: Option<u64>,
    /// Of the first worker; none on the CPU.
    gpu: Option<Gpu>,
    /// Mean loss of the last step, in nats a token.
    loss: f64,
}

/// Measures in processes of their own, at the same time, and prints the summary.
pub(crate) fn run(args: &BenchCompute) -> anyhow::Result<()> {
    let measurement = &args.measurement;
    let shape = Shape::load(&measurement.shape)?;
    if args.child {
        return measured::answer(&shape, measurement);
    }
    let measured = block_on(measure(measurement, measurement.steps))?;
    let summary = summarise(measurement, &shape, &measured)?;
    if measurement.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print(&summary);
    }
    Ok(())
}

/// What one worker measured.
pub(super) struct Measured {
    pub(super) device: String,
    pub(super) step_secs: Vec<f64>,
    loss: f64,
    peak_rss_bytes: Option<u64>,
    gpu: Option<Gpu>,
    product_secs: Option<f64>,
}

/// Lets all workers do that many steps at the same time.
pub(super) async fn measure(measurement: &Measurement, steps: u32) -> anyhow::Result<Vec<Measured>> {
    let bar = bar(u64::from(measurement.workers) * u64::from(steps));
    let mut workers = Vec::new();
    for _ in 0..measurement.workers {
        workers.push(Process::start(measurement)?);
    }
    let mut measured = Vec::new();
    for worker in &mut workers {
        let Report::Ready { device } = worker.hear().await? else { bail!("{}", Process::OUT_OF_TURN) };
        let (step_secs, loss) = (Vec::new(), f64::NAN);
        measured.push(Measured { device, step_secs, loss, peak_rss_bytes: None, gpu: None, product_secs: None });
    }

    for worker in &mut workers {
        worker.ask(Request::Steps(steps)).await?;
    }
    let mut running = JoinSet::new();
    for (mut worker, mut measured) in workers.into_iter().zip(measured) {
        let bar = bar.clone();
        running.spawn(async move {
            loop {
                match worker.hear().await? {
                    Report::Step { secs } => measured.step_secs.push(secs),
                    Report::Trained { loss, peak_rss_bytes, gpu } => {
                        (measured.loss, measured.peak_rss_bytes, measured.gpu) = (loss, peak_rss_bytes, gpu);
                        return anyhow::Ok((worker, measured));
                    }
                    _ => bail!("{}", Process::OUT_OF_TURN),
                }
                bar.inc(1);
            }
        });
    }
    let mut trained = Vec::new();
    while let Some(done) = running.join_next().await {
        trained.push(done??);
    }
    bar.finish_and_clear();

    for (worker, _) in &mut trained {
        worker.ask(Request::Products).await?;
    }
    for (worker, measured) in &mut trained {
        let Report::Multiplied { secs } = worker.hear().await? else { bail!("{}", Process::OUT_OF_TURN) };
        measured.product_secs = secs;
    }
    Ok(trained.into_iter().map(|(_, measured)| measured).collect())
}

/// Shown on a terminal only.
fn bar(steps: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30.cyan/blue} step {pos} of {len} · {eta} left");
    ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A worker: this program, told when to do what so that all do the same at once.
struct Process {
    process: Child,
    requests: ChildStdin,
    reports: Lines<BufReader<ChildStdout>>,
}

impl Process {
    const OUT_OF_TURN: &str = "a measuring process said something out of turn; are all of one version?";

    fn start(measurement: &Measurement) -> anyhow::Result<Self> {
        let mut command = child::command("bench")?;
        command.args(["compute", "--child", "--shape", &measurement.shape]);
        command.args(["--precision", &measurement.precision.to_string()]);
        command.args(["--device", &measurement.device.to_string(), "--threads", &measurement.threads().to_string()]);
        let mut process = command.stdout(Stdio::piped()).spawn().context("a measuring process cannot be started")?;
        let (requests, reports) = (process.stdin.take(), process.stdout.take());
        let pipes = requests.zip(reports).context("a measuring process has no pipes")?;
        Ok(Self { process, requests: pipes.0, reports: BufReader::new(pipes.1).lines() })
    }

    async fn ask(&mut self, request: Request) -> anyhow::Result<()> {
        let line = format!("{}\n", serde_json::to_string(&request)?);
        Ok(self.requests.write_all(line.as_bytes()).await?)
    }

    async fn hear(&mut self) -> anyhow::Result<Report> {
        match self.reports.next_line().await? {
            Some(line) => Ok(serde_json::from_str(&line)?),
            None => bail!("a measuring process ended: {}", self.process.wait().await?),
        }
    }
}

fn summarise(measurement: &Measurement, shape: &Shape, measured: &[Measured]) -> anyhow::Result<Summary> {
    let workers = measured.len() as f64;
    let medians: Vec<f64> = measured.iter().map(|worker| median(worker.step_secs.clone())).collect();
    let product_secs: Option<f64> = measured.iter().map(|worker| worker.product_secs).sum();
    let product_secs = product_secs.map(|secs| secs / workers);
    let operations = ceiling::operations(&ceiling::layers(&shape.model, shape.rows, shape.length));
    let first = measured.first().context("no worker measured anything")?;
    Ok(Summary {
        setting: Setting::new(measurement, shape, &first.device, shape.tokens()),
        tokens_per_sec: tokens_per_sec(shape, measured),
        step_ms_median: 1e3 * median(measured.iter().flat_map(|worker| worker.step_secs.clone()).collect()),
        matmul_share: product_secs.map(|secs| secs * workers / medians.iter().sum::<f64>()),
        matmul_gflop_per_sec: product_secs.map(|secs| operations / secs / 1e9),
        peak_rss_bytes: measured.iter().map(|worker| worker.peak_rss_bytes).max().flatten(),
        gpu: first.gpu.clone(),
        loss: first.loss,
    })
}

/// Of all workers together: the sum of what each does in its median step.
pub(super) fn tokens_per_sec(shape: &Shape, measured: &[Measured]) -> f64 {
    measured.iter().map(|worker| shape.tokens() as f64 / median(worker.step_secs.clone())).sum()
}

fn print(summary: &Summary) {
    summary.setting.print();
    println!("tokens_per_sec   {:.0}", summary.tokens_per_sec);
    summary.setting.print_step(summary.step_ms_median);
    if let (Some(share), Some(rate)) = (summary.matmul_share, summary.matmul_gflop_per_sec) {
        println!(
            "matmul_share     {share:.3}: what the step's matrix products take alone, at {rate:.1} GFLOP/s a worker"
        );
    }
    if let Some(bytes) = summary.peak_rss_bytes {
        println!("peak_rss_bytes   {bytes}");
    }
    if let Some(Gpu { peak_memory_bytes, step: Traffic { uploads, reads, launches } }) = &summary.gpu {
        println!("gpu_memory_bytes {peak_memory_bytes}");
        println!(
            "copies a step    {} of {} bytes there, {} of {} bytes back",
            uploads.tensors, uploads.bytes, reads.tensors, reads.bytes
        );
        println!("kernels a step   {}", launches.values().sum::<u64>());
        let mut launches: Vec<_> = launches.iter().collect();
        launches.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (kernel, count) in launches {
            println!("{count:>8} {}", kernel.split(" | ").take(2).collect::<Vec<_>>().join(" "));
        }
    }
    println!("loss             {:.6}", summary.loss);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Bench, Cli, Command};
    use clap::Parser as _;

    #[test]
    fn workers_add_up_and_the_share_is_of_the_median_step() {
        let cli = Cli::try_parse_from(["lockstep", "bench", "compute", "--shape", "tiny", "--workers", "2"]).unwrap();
        let Command::Bench(Bench::Compute(args)) = cli.command else { panic!("another command") };
        let worker = |step_secs: [f64; 3], product_secs, peak_rss_bytes| Measured {
            device: "cpu".into(),
            step_secs: step_secs.into(),
            loss: 4.0,
            peak_rss_bytes,
            gpu: None,
            product_secs,
        };
        let measured = [worker([0.3, 0.1, 0.2], Some(0.1), Some(7)), worker([0.4, 0.4, 9.0], Some(0.2), Some(9))];
        let shape = Shape::load("tiny").unwrap();
        let summary = summarise(&args.measurement, &shape, &measured).unwrap();
        assert_eq!(summary.tokens_per_sec, 768.0 / 0.2 + 768.0 / 0.4);
        assert_eq!(summary.step_ms_median, 400.0);
        assert!((summary.matmul_share.unwrap() - 0.5).abs() < 1e-12);
        assert_eq!(
            (summary.peak_rss_bytes, summary.setting.parameters, summary.setting.tokens_per_step),
            (Some(9), 818_176, 768)
        );
        let unknown = summarise(&args.measurement, &shape, &[worker([0.1; 3], None, None)]).unwrap();
        assert_eq!((unknown.matmul_share, unknown.peak_rss_bytes), (None, None));
    }
}
