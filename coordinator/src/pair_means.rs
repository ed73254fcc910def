//! What is logged where pairs of answers are learned from, under the names that TRL's trainers give it.

use lockstep_model::batch::Sums;
use lockstep_model::config::Objective;
use serde::{Deserialize, Serialize};

/// Means over pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairMeans {
    /// Reward of preferred answers.
    #[serde(rename = "rewards/chosen")]
    pub chosen: f64,
    /// Reward of the others.
    #[serde(rename = "rewards/rejected")]
    pub rejected: f64,
    /// Share of the pairs whose preferred answer has the higher reward; where both are equal, a pair counts half.
    #[serde(rename = "rewards/accuracies")]
    pub accuracy: f64,
    /// The first less the second.
    #[serde(rename = "rewards/margins")]
    pub margin: f64,
    /// Log-probability of preferred answers, in nats; none where there is only a score.
    #[serde(rename = "logps/chosen", default, skip_serializing_if = "Option::is_none")]
    pub chosen_log_prob: Option<f64>,
    /// Log-probability of the others.
    #[serde(rename = "logps/rejected", default, skip_serializing_if = "Option::is_none")]
    pub rejected_log_prob: Option<f64>,
}

impl PairMeans {
    /// Of what was summed up for `objective`; nothing where that is not about pairs.
    pub fn of(objective: Objective, sums: Sums) -> Option<Self> {
        let has_log_probs = match objective {
            Objective::NextToken => return None,
            Objective::Reward => false,
            Objective::Dpo(_) => true,
        };
        let mean = |sum: f64| sum / sums.weight;
        let (chosen, rejected) = (mean(sums.pairs.chosen_reward), mean(sums.pairs.rejected_reward));
        Some(Self {
            chosen,
            rejected,
            accuracy: mean(sums.pairs.accurate),
            margin: chosen - rejected,
            chosen_log_prob: has_log_probs.then(|| mean(sums.pairs.chosen_log_prob)),
            rejected_log_prob: has_log_probs.then(|| mean(sums.pairs.rejected_log_prob)),
        })
    }

    /// The two numbers that tell most, for people.
    pub fn in_words(&self) -> String {
        format!("accuracy {:.3} · margin {:.3}", self.accuracy, self.margin)
    }
}

#[cfg(test)]
mod tests {
    use lockstep_model::batch::PairSums;
    use lockstep_model::config::DpoConfig;

    use super::*;

    #[test]
    fn means_are_named_as_trl_names_them() {
        let pairs = PairSums {
            accurate: 1.5,
            chosen_reward: 4.0,
            rejected_reward: -2.0,
            chosen_log_prob: -20.0,
            rejected_log_prob: -40.0,
        };
        let sums = Sums { loss: 1.0, weight: 2.0, pairs };
        let json = |objective| serde_json::to_string(&PairMeans::of(objective, sums)).unwrap();
        expect_test::expect![[r#"
            null
            {"rewards/chosen":2.0,"rewards/rejected":-1.0,"rewards/accuracies":0.75,"rewards/margins":3.0}
            {"rewards/chosen":2.0,"rewards/rejected":-1.0,"rewards/accuracies":0.75,"rewards/margins":3.0,"logps/chosen":-10.0,"logps/rejected":-20.0}"#]]
        .assert_eq(&[Objective::NextToken, Objective::Reward, Objective::Dpo(DpoConfig { beta: 0.1, label_smoothing: 0.0 })].map(json).join("\n"));
    }
}
