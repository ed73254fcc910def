//! Which steps are of no use, by what is known of the whole step alone: so it is the same for any number of workers.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::number::bits;

/// What is usual is the median over so many steps.
pub const STEPS_REMEMBERED: usize = 64;
/// Fewer norms than this say nothing of what is usual.
pub const LEAST_NORMS: usize = 8;

/// What is to become of steps whose gradient is of no use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SkipConfig {
    /// The run halts after so many skipped steps in a row; 0: never.
    pub max_in_a_row: u32,
    /// A step is skipped, too, if its gradient's norm is more than so many times the median of the last 64 steps.
    pub above_median: Option<f64>,
}

/// The norms of the last steps, by which the next ones are judged. Part of every checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepFilter {
    #[serde(with = "bits")]
    norms: VecDeque<f64>,
    /// Steps skipped since the last one that was applied.
    pub skipped_in_a_row: u32,
}

/// What a step is judged by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepNumbers {
    /// Mean loss.
    pub loss: f64,
    /// L2 norm of the mean gradient.
    pub grad_norm: f64,
}

impl StepFilter {
    /// Whether a step is to be skipped, and takes note of it: its loss or gradient is not finite, or its norm is beyond
    /// what `config` allows.
    pub fn skips(&mut self, config: SkipConfig, StepNumbers { loss, grad_norm }: StepNumbers) -> bool {
        let usual = usual(self.norms.iter().copied());
        let beyond = |times: f64| usual.is_some_and(|usual| grad_norm > times * usual);
        let skip = !loss.is_finite() || !grad_norm.is_finite() || config.above_median.is_some_and(beyond);
        if grad_norm.is_finite() {
            self.norms.push_back(grad_norm);
            if self.norms.len() > STEPS_REMEMBERED {
                self.norms.pop_front();
            }
        }
        self.skipped_in_a_row = if skip { self.skipped_in_a_row + 1 } else { 0 };
        skip
    }
}

/// What is usual by the norms known: their median, the upper one of two; `None` while there are too few.
pub fn usual(norms: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut norms: Vec<f64> = norms.into_iter().collect();
    let middle = norms.len() / 2;
    (norms.len() >= LEAST_NORMS).then(|| *norms.select_nth_unstable_by(middle, f64::total_cmp).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: SkipConfig = SkipConfig { max_in_a_row: 3, above_median: Some(10.0) };

    fn judge(filter: &mut StepFilter, loss: f64, grad_norm: f64) -> bool {
        filter.skips(CONFIG, StepNumbers { loss, grad_norm })
    }

    #[test]
    fn what_is_not_finite_is_skipped_and_counted() {
        let mut filter = StepFilter::default();
        assert!(!judge(&mut filter, 1.0, 1e30), "with nothing known, nothing is unusual");
        for (number, (loss, norm)) in [(f64::NAN, 1.0), (1.0, f64::INFINITY), (f64::INFINITY, 1.0)].iter().enumerate() {
            assert!(judge(&mut filter, *loss, *norm));
            assert_eq!(filter.skipped_in_a_row, number as u32 + 1);
        }
        assert!(!judge(&mut filter, 1.0, 1.0));
        assert_eq!(filter.skipped_in_a_row, 0);
    }

    #[test]
    fn what_is_unusual_is_skipped_where_that_is_asked_for() {
        let mut filter = StepFilter::default();
        (1..=9).for_each(|norm| assert!(!judge(&mut filter, 1.0, f64::from(norm))));
        let mut tolerant = filter.clone();
        assert!(!judge(&mut filter, 1.0, 50.0), "ten times the median of 5");
        assert!(judge(&mut filter, 1.0, 61.0), "the median is 6 by now");
        assert!(
            !tolerant.skips(SkipConfig { above_median: None, ..CONFIG }, StepNumbers { loss: 1.0, grad_norm: 1e9 })
        );
    }

    #[test]
    fn a_checkpoint_brings_back_what_is_known() {
        let mut filter = StepFilter::default();
        for step in 1..=100 {
            judge(&mut filter, 1.0, 1.0 / f64::from(step));
        }
        let text = serde_json::to_string(&filter).unwrap();
        let mut back: StepFilter = serde_json::from_str(&text).unwrap();
        assert_eq!(back, filter);
        assert_eq!(judge(&mut back, 1.0, 0.2), judge(&mut filter, 1.0, 0.2));
    }
}
