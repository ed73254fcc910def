//! The learning rate of a step, a pure function of its number; and of the local steps in it.

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

/// The learning rates of the local steps of step `step`, counted from 1, of which each step has `local_steps`: the same
/// curve, at so many points for each step. The last one's is that of the step itself.
pub fn local_learning_rates(schedule: &ScheduleConfig, peak: f64, local_steps: u32, step: u64) -> Vec<f64> {
    let local = u64::from(local_steps);
    let stretched = |steps: u64| steps.saturating_mul(local);
    let decay = match schedule.decay {
        Decay::Constant => Decay::Constant,
        Decay::Cosine { steps } => Decay::Cosine { steps: stretched(steps) },
        Decay::Linear { steps } => Decay::Linear { steps: stretched(steps) },
        Decay::Wsd { steps } => Decay::Wsd { steps: stretched(steps) },
    };
    let &ScheduleConfig { steps, warmup_steps, min_lr, .. } = schedule;
    let schedule = ScheduleConfig { steps: stretched(steps), warmup_steps: stretched(warmup_steps), decay, min_lr };
    ((step - 1) * local + 1..=step * local).map(|number| learning_rate(&schedule, peak, number)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_steps_are_points_of_the_same_curve() {
        for decay in
            [Decay::Constant, Decay::Cosine { steps: 18 }, Decay::Linear { steps: 20 }, Decay::Wsd { steps: 8 }]
        {
            let schedule = ScheduleConfig { steps: 20, warmup_steps: 3, decay, min_lr: 0.1 };
            let local: Vec<f64> = (1..=20).flat_map(|step| local_learning_rates(&schedule, 1.0, 10, step)).collect();
            assert_eq!(local.len(), 200);
            let steps = (1..=20).map(|step| learning_rate(&schedule, 1.0, step));
            for (last, step) in local.iter().skip(9).step_by(10).zip(steps) {
                assert!((last - step).abs() < 1e-12, "{decay:?}: {last} is not {step}");
            }
            assert!(local[..30].is_sorted() && local[29..].is_sorted_by(|a, b| a >= b), "{decay:?}: {local:?}");
            assert_eq!(local_learning_rates(&schedule, 1.0, 1, 7), [learning_rate(&schedule, 1.0, 7)]);
        }
    }

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
