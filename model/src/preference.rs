//! Learning from pairs of answers, of which people prefer one: from what a network gives for each row of a slot to the
//! slot's loss, and how that changes with each of them.
//!
//! Row 2i is the preferred answer of pair i, and row 2i + 1 the other one. The losses are functions of one number a row, so
//! that their gradient is that of the sum of these numbers, each times its slope.

use crate::batch::{PairSums, Sums};
use crate::config::DpoConfig;

/// The loss of a slot's pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct PairLoss {
    /// Summed over pairs, each of weight 1.
    pub sums: Sums,
    /// The loss's derivative by each row's number.
    pub slopes: Vec<f32>,
}

/// The loss of a reward model, −log σ(r⁺ − r⁻) (Bradley and Terry 1952; Ouyang et al., arXiv:2203.02155), of the scores of
/// rows.
pub fn reward_loss(scores: &[f32]) -> PairLoss {
    of_pairs(scores, |scores| {
        let [chosen, rejected] = scores.map(f64::from);
        let margin = chosen - rejected;
        let slope = -logistic(-margin);
        let pair = PairSums {
            accurate: accuracy(margin),
            chosen_reward: chosen,
            rejected_reward: rejected,
            ..PairSums::default()
        };
        (softplus(-margin), [slope, -slope], pair)
    })
}

/// The loss of direct preference optimisation (Rafailov et al., arXiv:2305.18290) of the log-probabilities of rows and
/// those that the reference gives them: with an answer's reward r = β · (log π − log π_ref) and h = r⁺ − r⁻, it is
/// −(1 − ε) · log σ(h) − ε · log σ(−h), where ε is the label smoothing (Mitchell 2023).
pub fn dpo_loss(log_probs: &[f32], references: &[f32], config: DpoConfig) -> PairLoss {
    let DpoConfig { beta, label_smoothing } = config;
    let both: Vec<[f32; 2]> = log_probs.iter().copied().zip(references.iter().copied()).map(Into::into).collect();
    of_pairs(&both, |[chosen, rejected]| {
        let reward = |[log_prob, reference]: [f32; 2]| beta * (f64::from(log_prob) - f64::from(reference));
        let (chosen_reward, rejected_reward) = (reward(chosen), reward(rejected));
        let margin = chosen_reward - rejected_reward;
        let loss = (1.0 - label_smoothing) * softplus(-margin) + label_smoothing * softplus(margin);
        let slope = beta * (label_smoothing * logistic(margin) - (1.0 - label_smoothing) * logistic(-margin));
        let pair = PairSums {
            accurate: accuracy(margin),
            chosen_reward,
            rejected_reward,
            chosen_log_prob: chosen[0].into(),
            rejected_log_prob: rejected[0].into(),
        };
        (loss, [slope, -slope], pair)
    })
}

/// Sums up what `of_pair` says of each pair of rows: its loss, the slopes, what is logged.
fn of_pairs<T: Copy>(rows: &[T], of_pair: impl Fn([T; 2]) -> (f64, [f64; 2], PairSums)) -> PairLoss {
    let (mut sums, mut slopes) = (Sums::default(), Vec::with_capacity(rows.len()));
    for &pair in rows.as_chunks().0 {
        let (loss, of_rows, pairs) = of_pair(pair);
        sums = sums + Sums { loss, weight: 1.0, pairs };
        slopes.extend(of_rows.map(|slope| slope as f32));
    }
    PairLoss { sums, slopes }
}

/// 1 where the preferred answer leads, 0 where it does not, half where nothing is between them.
fn accuracy(margin: f64) -> f64 {
    match margin.partial_cmp(&0.0) {
        Some(std::cmp::Ordering::Greater) => 1.0,
        Some(std::cmp::Ordering::Equal) => 0.5,
        _ => 0.0,
    }
}

/// log(1 + eˣ), which is −log σ(−x).
fn softplus(x: f64) -> f64 {
    x.max(0.0) + libm::log1p(libm::exp(-x.abs()))
}

/// σ(x).
fn logistic(x: f64) -> f64 {
    let small = libm::exp(-x.abs());
    if x >= 0.0 { 1.0 / (1.0 + small) } else { small / (1.0 + small) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Checks every slope against a central difference of the loss.
    fn check_slopes(rows: &[f32], loss: impl Fn(&[f32]) -> PairLoss) {
        const STEP: f32 = 1.0 / 64.0;
        for (row, &slope) in loss(rows).slopes.iter().enumerate() {
            let moved = |by: f32| {
                let mut rows = rows.to_vec();
                rows[row] += by;
                (f64::from(rows[row]), loss(&rows).sums.loss)
            };
            let ((left, below), (right, above)) = (moved(-STEP), moved(STEP));
            let difference = (above - below) / (right - left);
            assert!((difference - f64::from(slope)).abs() < 1e-4, "row {row}: {slope} is not {difference}");
        }
    }

    #[test]
    fn who_knows_nothing_has_a_loss_of_log_2_and_half_of_the_pairs() {
        let config = DpoConfig { beta: 0.1, label_smoothing: 0.0 };
        for loss in [reward_loss(&[0.5; 6]), dpo_loss(&[-3.0, -9.0], &[-3.0, -9.0], config)] {
            assert!((loss.sums.mean() - std::f64::consts::LN_2).abs() < 1e-15);
            assert_eq!(loss.sums.pairs.accurate / loss.sums.weight, 0.5);
        }
    }

    /// By hand: β = 0.5, rewards 0.5 · (−2 + 4) = 1 and 0.5 · (−6 + 5) = −0.5, so h = 1.5.
    #[test]
    fn rewards_are_relative_to_the_reference() {
        let loss = |label_smoothing| dpo_loss(&[-2.0, -6.0], &[-4.0, -5.0], DpoConfig { beta: 0.5, label_smoothing });
        let PairLoss { sums, slopes } = loss(0.0);
        assert!((sums.loss - 0.201_413_277_982_752).abs() < 1e-12, "{}", sums.loss);
        let expected = PairSums {
            accurate: 1.0,
            chosen_reward: 1.0,
            rejected_reward: -0.5,
            chosen_log_prob: -2.0,
            rejected_log_prob: -6.0,
        };
        assert_eq!(sums.pairs, expected);
        assert_eq!(slopes[0], -slopes[1]);
        // Smoothed, the loss is larger by ε · h.
        assert!((loss(0.25).sums.loss - sums.loss - 0.25 * 1.5).abs() < 1e-12);
    }

    #[test]
    fn extreme_margins_stay_finite() {
        let PairLoss { sums, slopes } = reward_loss(&[-1e30, 1e30, 1e30, -1e30]);
        assert_eq!((sums.loss, sums.pairs.accurate), (2.0 * f64::from(1e30f32), 1.0));
        assert_eq!(slopes, [-1.0, 1.0, -0.0, 0.0]);
    }

    proptest! {
        #[test]
        fn slopes_are_derivatives(rows in prop::collection::vec(-8f32..8.0, 2..9), beta in 0.01f64..2.0, smoothing in 0.0f64..0.5) {
            let rows = &rows[..rows.len() / 2 * 2];
            let references: Vec<f32> = rows.iter().rev().map(|row| row * 0.7 - 1.0).collect();
            check_slopes(rows, reward_loss);
            let config = DpoConfig { beta, label_smoothing: smoothing };
            check_slopes(rows, |rows| dpo_loss(rows, &references, config));
        }
    }
}
