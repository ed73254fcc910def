//! A process that trains and multiplies when it is told to, so that several can do either at the same time.

use std::io::{BufRead as _, Write as _};
use std::sync::mpsc;
use std::time::Instant;

use anyhow::Context as _;
use lockstep_model::batch::Batch;
use lockstep_model::compute::{Computer, SlotGradient, SlotKey};
use lockstep_model::config::Precision;
use lockstep_model::device::ComputeDevice;
use lockstep_model::layout::initial_parameters;
use lockstep_model::traffic::{Traffic, counted};
use serde::{Deserialize, Serialize};

use super::peak_rss_bytes;
use super::shape::Shape;
use crate::cli::Measurement;

/// Steps before the first that is measured, in which memory is asked for and GPU kernels are compiled.
const WARM_UP: u32 = 3;
/// How often a layer's products are done; the median counts.
#[cfg(feature = "cpu")]
const REPETITIONS: usize = 7;
/// Slots that steps take in turn.
const SLOTS: u32 = 4;

/// A line to the process.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) enum Request {
    /// Train that many steps.
    Steps(u32),
    /// Multiply what a step multiplies.
    Products,
}

/// A line from the process.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) enum Report {
    /// It has warmed up.
    Ready {
        /// What it computes on.
        device: String,
    },
    /// A step is done.
    Step {
        /// How long it took.
        secs: f64,
    },
    /// So are all that were asked for.
    Trained {
        /// Mean of the last step, in nats a token.
        loss: f64,
        /// The most memory that the process has had; none where the system does not say.
        peak_rss_bytes: Option<u64>,
        /// What a GPU was asked for; none on the CPU.
        gpu: Option<Gpu>,
    },
    /// The products of a step are done.
    Multiplied {
        /// How long they took; none where they are not the CPU's.
        secs: Option<f64>,
    },
}

/// What one step asks of a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Gpu {
    /// The most memory that was taken of it.
    pub(super) peak_memory_bytes: u64,
    /// Copies and kernels of a step.
    pub(super) step: Traffic,
}

/// Answers requests on standard input until there are no more.
pub(super) fn answer(shape: &Shape, measurement: &Measurement) -> anyhow::Result<()> {
    let Measurement { device, precision, .. } = *measurement;
    let threads = measurement.threads() as usize;
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("CPU threads cannot be started")?;
    let device = ComputeDevice::open(device)?;
    let mut computer = Computer::new(&shape.model, &device).with_precision(precision)?;
    computer.load(&initial_parameters(&shape.model, 1))?;
    let slots: Vec<Batch> = (0..SLOTS).map(|slot| shape.batch(slot)).collect();
    let step = |step: u32| -> anyhow::Result<f64> {
        let key = SlotKey { seed: 1, step: u64::from(step), slot: 0 };
        let SlotGradient { sums, gradient } = computer.gradient(&slots[(step % SLOTS) as usize], key)?;
        computer.reuse(gradient);
        Ok(sums.mean())
    };
    (0..WARM_UP).try_for_each(|index| step(index).map(drop))?;

    let requests = requests();
    say(&Report::Ready { device: device.description.clone() })?;
    for request in requests {
        match request? {
            Request::Steps(steps) => {
                let (mut loss, mut memory_bytes) = (f64::NAN, None);
                for index in 0..steps {
                    let start = Instant::now();
                    loss = step(index)?;
                    say(&Report::Step { secs: start.elapsed().as_secs_f64() })?;
                    memory_bytes = memory_bytes.max(device.memory_bytes());
                }
                let gpu = memory_bytes.map(|peak_memory_bytes| {
                    let (done, traffic) = counted(|| step(steps));
                    done.map(|_| Gpu { peak_memory_bytes, step: traffic })
                });
                say(&Report::Trained { loss, peak_rss_bytes: peak_rss_bytes(), gpu: gpu.transpose()? })?;
            }
            Request::Products => say(&Report::Multiplied { secs: product_secs(shape, precision, &device) })?,
        }
    }
    Ok(())
}

/// Lines of standard input. Its end, when nobody waits for an answer any more, ends this process at once.
fn requests() -> mpsc::Receiver<anyhow::Result<Request>> {
    let (sender, requests) = mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let request = line.map_err(anyhow::Error::from).and_then(|line| Ok(serde_json::from_str(&line)?));
            if sender.send(request).is_err() {
                return;
            }
        }
        std::process::exit(0);
    });
    requests
}

fn say(report: &Report) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(report)?)?;
    Ok(out.flush()?)
}

#[cfg(feature = "cpu")]
fn product_secs(shape: &Shape, precision: Precision, device: &ComputeDevice) -> Option<f64> {
    use lockstep_model::ceiling::{Layers, Operands, layers};

    let median_secs = |layers: Layers| {
        let mut operands = Operands::new(layers);
        let mut secs = || {
            let start = Instant::now();
            operands.multiply(precision);
            start.elapsed().as_secs_f64()
        };
        super::median((0..REPETITIONS).map(|_| secs()).collect())
    };
    let all = layers(&shape.model, shape.rows, shape.length);
    device.is_cpu().then(|| all.into_iter().map(|layers| median_secs(layers) * layers.count as f64).sum())
}

#[cfg(not(feature = "cpu"))]
fn product_secs(_: &Shape, _: Precision, _: &ComputeDevice) -> Option<f64> {
    None
}
