//! The learning rate of a step, a pure function of its number.

use crate::config::{Decay, ScheduleConfig};

/// The learning rate of optimizer step `step`, counted from 1, for a peak of `peak`.
///
/// It rises linearly to the peak at step `warmup_steps`, then follows the decay. The cosine is that of Loshchilov and
/// Hutter (arXiv:1608.03983), computed by `libm` so that every platform rounds the same.
pub fn learning_rate(schedule: &ScheduleConfig, peak: f64, step: u64) -> f64 {
    let warmup = schedule.warmup_steps;
    if step < warmup {
        return peak * step as f64 / warmup as f64;
    }
    let min = schedule.min_lr;
    // How much of the decay is over, in [0, 1].
    let progress = |start: u64, end: u64| {
        let (done, all) = (step.saturating_sub(start) as f64, end.saturating_sub(start).max(1) as f64);
        (done / all).min(1.0)
    };
    match schedule.decay {
        Decay::Constant => peak,
        Decay::Cosine { steps } => {
            let coefficient = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress(warmup, steps)));
            min + coefficient * (peak - min)
        }
        Decay::Linear { steps } => peak - (peak - min) * progress(warmup, steps),
        Decay::Wsd { steps } => {
            let start = schedule.steps.saturating_sub(steps).max(warmup);
            peak - (peak - min) * progress(start, schedule.steps)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(decay: Decay, at: &[u64]) -> Vec<f64> {
        let schedule = ScheduleConfig { steps: 100, warmup_steps: 10, decay, min_lr: 0.1 };
        at.iter().map(|&step| (learning_rate(&schedule, 1.0, step) * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn every_decay_warms_up_and_ends_at_its_minimum() {
        assert_eq!(rates(Decay::Constant, &[1, 5, 10, 50, 100]), [0.1, 0.5, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Decay::Cosine { steps: 100 }, &[1, 10, 55, 100, 120]), [0.1, 1.0, 0.55, 0.1, 0.1]);
        assert_eq!(rates(Decay::Linear { steps: 100 }, &[10, 55, 100, 120]), [1.0, 0.55, 0.1, 0.1]);
        assert_eq!(rates(Decay::Wsd { steps: 20 }, &[10, 50, 80, 90, 100]), [1.0, 1.0, 1.0, 0.55, 0.1]);
    }
}
