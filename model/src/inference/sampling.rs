//! How the next token is chosen from the logits.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::random::{Draws, Stream};

/// Likeliest tokens that are ranked at first, where only the likeliest are asked for; then four times as many.
const RANKED: usize = 64;

/// How the next token is chosen from the logits. Steps are taken in the order of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Logits of tokens that have been read or chosen are divided by this where they are positive, else multiplied (Keskar et al.,
    /// arXiv:1909.05858); 1 changes none.
    pub repetition_penalty: f64,
    /// Taken from the logits of tokens that have been chosen.
    pub presence_penalty: f64,
    /// Taken from a logit for each time that its token has been chosen.
    pub frequency_penalty: f64,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Keeps the so many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens whose probabilities reach this (Holtzman et al., arXiv:1904.09751); 1 keeps all.
    pub top_p: f64,
    /// Keeps tokens at least this times as likely as the likeliest (Nguyen et al., arXiv:2407.01082); 0 keeps all.
    pub min_p: f64,
    /// Names the sequence of draws.
    pub seed: u64,
}

/// Why a choice makes no sense.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum SamplingError {
    /// Negative, infinite or not a number.
    #[error("temperature {0}: must be 0 (the likeliest token) or a positive number; for example 0.8")]
    Temperature(f64),
    /// Not a probability.
    #[error("top-p {0}: must be above 0 and at most 1; for example 0.95")]
    TopP(f64),
    /// Not a share.
    #[error("min-p {0}: must be at least 0 and below 1; for example 0.05")]
    MinP(f64),
    /// Would turn the order of tokens round, or is not a number.
    #[error("repetition penalty {0}: must be a positive number; 1 is none, for example 1.1")]
    RepetitionPenalty(f64),
    /// Not a number that can be taken from a logit.
    #[error("presence or frequency penalty {0}: must be a finite number; 0 is none, for example 0.5")]
    CountPenalty(f64),
}

impl Default for Sampling {
    /// Draws from the model's own distribution.
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Takes the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks the values.
    ///
    /// # Errors
    /// Names the value that makes no sense.
    pub fn validate(&self) -> Result<(), SamplingError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(SamplingError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplingError::TopP(self.top_p));
        }
        if !(0.0..1.0).contains(&self.min_p) {
            return Err(SamplingError::MinP(self.min_p));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return Err(SamplingError::RepetitionPenalty(self.repetition_penalty));
        }
        let infinite = [self.presence_penalty, self.frequency_penalty].into_iter().find(|penalty| !penalty.is_finite());
        infinite.map_or(Ok(()), |penalty| Err(SamplingError::CountPenalty(penalty)))
    }

    /// The next token, from its `logits` (at least one), after `tokens`, of which those from the one numbered `chosen` on were
    /// chosen before. Equal logits are ranked by token number.
    pub fn pick(&self, logits: &[f32], tokens: &[u32], chosen: usize) -> u32 {
        let logits = self.penalised(logits, tokens, chosen);
        let likeliest = (0..logits.len() as u32).min_by(|&a, &b| rank(&logits, a, b)).unwrap_or(0);
        if self.temperature == 0.0 {
            return likeliest;
        }
        let top = f64::from(logits[likeliest as usize]);
        let weight = |token: u32| libm::exp((f64::from(logits[token as usize]) - top) / self.temperature);
        let mut kept: Vec<u32> = (0..logits.len() as u32).collect();
        if self.top_k > 0 && self.top_k < kept.len() {
            rank_first(&mut kept, self.top_k, &logits);
            kept.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            let wanted = self.top_p * kept.iter().map(|&token| weight(token)).sum::<f64>();
            let count = fewest(&mut kept, &logits, wanted, weight);
            kept.truncate(count);
        }
        let mut kept: Vec<(u32, f64)> = kept.into_iter().map(|token| (token, weight(token))).collect();
        kept.retain(|&(token, weight)| weight >= self.min_p || token == likeliest);

        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let target = Draws::new(self.seed, Stream::Generation).unit(0, (tokens.len() - chosen) as u64) * total;
        let mut passed = 0.0;
        let drawn = kept.iter().find(|(_, weight)| {
            passed += weight;
            target < passed
        });
        drawn.or(kept.last()).map_or(likeliest, |&(token, _)| token)
    }

    /// The logits after all penalties.
    fn penalised<'a>(&self, logits: &'a [f32], tokens: &[u32], chosen: usize) -> Cow<'a, [f32]> {
        let mut logits = Cow::Borrowed(logits);
        if self.repetition_penalty != 1.0 {
            let (logits, penalty) = (logits.to_mut(), self.repetition_penalty as f32);
            for token in tokens.iter().collect::<std::collections::BTreeSet<_>>() {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
            }
        }
        if self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 {
            let mut counts = BTreeMap::<u32, u32>::new();
            tokens[chosen..].iter().for_each(|&token| *counts.entry(token).or_default() += 1);
            let logits = logits.to_mut();
            for (token, count) in counts {
                let penalty = self.presence_penalty + self.frequency_penalty * f64::from(count);
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit -= penalty as f32;
                }
            }
        }
        logits
    }
}

/// The likelier one first.
fn rank(logits: &[f32], a: u32, b: u32) -> std::cmp::Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// Puts the `count` likeliest tokens first, in order.
fn rank_first(tokens: &mut [u32], count: usize, logits: &[f32]) {
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count, |&a, &b| rank(logits, a, b));
    }
    let count = count.min(tokens.len());
    tokens[..count].sort_unstable_by(|&a, &b| rank(logits, a, b));
}

/// How many of the likeliest tokens, which are put first, it takes until their weights reach `wanted`; at least one.
fn fewest(tokens: &mut [u32], logits: &[f32], wanted: f64, weight: impl Fn(u32) -> f64) -> usize {
    let mut ranked = RANKED;
    loop {
        rank_first(tokens, ranked, logits);
        let mut mass = 0.0;
        let reached = tokens.iter().take(ranked).position(|&token| {
            mass += weight(token);
            mass >= wanted
        });
        match reached {
            Some(last) => return last + 1,
            None if ranked >= tokens.len() => return tokens.len(),
            None => ranked *= 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, -5.0];

    /// How often each token comes, of 20,000.
    fn counts(sampling: Sampling) -> [usize; 4] {
        let mut counts = [0; 4];
        let tokens = vec![0; 20_000];
        (0..20_000).for_each(|chosen| counts[sampling.pick(&LOGITS, &tokens, chosen) as usize] += 1);
        counts
    }

    fn plain() -> Sampling {
        Sampling { seed: 3, ..Sampling::default() }
    }

    #[test]
    fn temperature_zero_takes_the_likeliest() {
        assert_eq!(counts(Sampling::greedy()), [0, 20_000, 0, 0]);
        assert_eq!(Sampling::greedy().pick(&[1.0, 2.0, 2.0], &[], 0), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let total: f64 = LOGITS.iter().map(|&logit| f64::from(logit).exp()).sum();
        for (count, logit) in counts(plain()).into_iter().zip(LOGITS) {
            let (share, expected) = (count as f64 / 20_000.0, f64::from(logit).exp() / total);
            assert!((share - expected).abs() < 0.015, "{share} is not {expected}");
        }
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let top_k = counts(Sampling { top_k: 2, ..plain() });
        assert!(top_k[0] == 0 && top_k[3] == 0 && top_k[2] > 0);
        assert_eq!(counts(Sampling { top_p: 0.6, ..plain() }), [0, 20_000, 0, 0]);
        let top_p = counts(Sampling { top_p: 0.7, ..plain() });
        assert!(top_p[0] == 0 && top_p[2] > 0);
        // e^-1 = 0.37, e^-2 = 0.14
        let min_p = counts(Sampling { min_p: 0.2, ..plain() });
        assert!(min_p[0] == 0 && min_p[3] == 0 && min_p[2] > 0);
    }

    #[test]
    fn the_fewest_likeliest_are_found_in_a_large_vocabulary() {
        let logits: Vec<f32> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) % 1000) as f32 / 500.0).collect();
        let weight = |token: u32| f64::from(logits[token as usize]).exp();
        let mut ranked: Vec<u32> = (0..5000).collect();
        ranked.sort_by(|&a, &b| rank(&logits, a, b));
        let total: f64 = ranked.iter().map(|&token| weight(token)).sum();
        for share in [1e-6, 0.01, 0.3, 0.9, 0.9999] {
            let mut tokens: Vec<u32> = (0..5000).collect();
            let count = fewest(&mut tokens, &logits, share * total, weight);
            assert_eq!(tokens[..count], ranked[..count]);
            let mass = |count| ranked[..count].iter().map(|&token| weight(token)).sum::<f64>();
            assert!(mass(count) >= share * total && mass(count - 1) < share * total);
        }
    }

    #[test]
    fn what_was_said_is_said_less_often() {
        let pick = |sampling: Sampling, tokens: &[u32], chosen| sampling.pick(&LOGITS, tokens, chosen);
        let repetition = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        assert_eq!((pick(repetition, &[1], 1), pick(repetition, &[0], 1)), (2, 1));
        let presence = Sampling { presence_penalty: 1.5, ..Sampling::greedy() };
        assert_eq!((pick(presence, &[1], 1), pick(presence, &[1], 0)), (1, 2), "a prompt does not count");
        let frequency = Sampling { frequency_penalty: 0.6, ..Sampling::greedy() };
        assert_eq!((pick(frequency, &[1], 0), pick(frequency, &[1, 1], 0)), (1, 2));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(plain().validate().is_ok());
        let nonsense = [
            Sampling { temperature: -1.0, ..plain() },
            Sampling { top_p: 0.0, ..plain() },
            Sampling { min_p: 1.0, ..plain() },
            Sampling { repetition_penalty: 0.0, ..plain() },
            Sampling { presence_penalty: f64::NAN, ..plain() },
        ];
        assert!(nonsense.into_iter().all(|sampling| sampling.validate().is_err()));
    }
}
