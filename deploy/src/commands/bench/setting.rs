//! What a benchmark was made with.

use indicatif::HumanCount;
use lockstep_model::config::Precision;
use lockstep_model::layout::Layout;
use serde::Serialize;

use super::shape::Shape;
use crate::cli::Measurement;

/// The part of a summary that all benchmarks have.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Setting {
    shape: String,
    device: String,
    /// Of products.
    precision: Precision,
    workers: u32,
    /// Of each worker.
    threads: u32,
    /// Steps measured, of each worker.
    steps: u32,
    /// Elements of the flat vector.
    pub(super) parameters: usize,
    /// Tokens that one step is about.
    pub(super) tokens_per_step: usize,
}

impl Setting {
    /// Of workers that compute on `device`.
    pub(super) fn new(measurement: &Measurement, shape: &Shape, device: &str, tokens_per_step: usize) -> Self {
        Self {
            shape: measurement.shape.clone(),
            device: device.into(),
            precision: measurement.precision,
            workers: measurement.workers,
            threads: measurement.threads(),
            steps: measurement.steps,
            parameters: Layout::of(&shape.model).len(),
            tokens_per_step,
        }
    }

    /// Prints it for people.
    pub(super) fn print(&self) {
        let Self { shape, device, workers, threads, tokens_per_step, .. } = self;
        let precision = match self.precision {
            Precision::F32 => "",
            Precision::Bf16 => ", products in bf16",
        };
        let parameters = HumanCount(self.parameters as u64);
        println!("shape            {shape}, {parameters} parameters, {tokens_per_step} tokens a step");
        println!("workers          {workers} with {threads} CPU thread(s) each, on {device}{precision}");
    }

    /// Prints the line of a median step.
    pub(super) fn print_step(&self, step_ms_median: f64) {
        println!("step_ms_median   {step_ms_median:.2} of {} steps", self.steps);
    }
}
