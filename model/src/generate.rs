//! Text from fixed parameters, token by token.

use serde::{Deserialize, Serialize};

use crate::compute::{ComputeError, Computer};
use crate::random::{Draws, Stream};

/// How the next token is chosen from the logits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Keeps the so many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens whose probabilities reach this (Holtzman et al., arXiv:1904.09751); 1 keeps all.
    pub top_p: f64,
    /// Names the sequence of draws.
    pub seed: u64,
}

/// Why a choice makes no sense.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ChoiceError {
    /// Negative, infinite or not a number.
    #[error("temperature {0}: must be 0 (the likeliest token) or a positive number; for example 0.8")]
    Temperature(f64),
    /// Not a probability.
    #[error("top-p {0}: must be above 0 and at most 1; for example 0.95")]
    TopP(f64),
}

impl Choice {
    /// Checks the values.
    ///
    /// # Errors
    /// Names the value that makes no sense.
    pub fn validate(&self) -> Result<(), ChoiceError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(ChoiceError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(ChoiceError::TopP(self.top_p));
        }
        Ok(())
    }

    /// The token for place `position` of the sequence, from its `logits`. Equal logits are ranked by token number.
    pub fn pick(&self, logits: &[f32], position: u64) -> u32 {
        let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
        ranked.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        let Some(&likeliest) = ranked.first() else { return 0 };
        if self.temperature == 0.0 {
            return likeliest;
        }
        if self.top_k > 0 {
            ranked.truncate(self.top_k);
        }
        let top = f64::from(logits[likeliest as usize]);
        let weight = |token: u32| libm::exp((f64::from(logits[token as usize]) - top) / self.temperature);
        let mut weights: Vec<f64> = ranked.iter().map(|&token| weight(token)).collect();
        let total: f64 = weights.iter().sum();
        let mut mass = 0.0;
        let kept = weights.iter().take_while(|&&weight| {
            let wanted = mass < self.top_p * total;
            mass += weight;
            wanted
        });
        let kept = kept.count().max(1);
        weights.truncate(kept);

        let target = Draws::new(self.seed, Stream::Generation).unit(0, position) * weights.iter().sum::<f64>();
        let mut passed = 0.0;
        let drawn = weights.iter().position(|weight| {
            passed += weight;
            target < passed
        });
        ranked[drawn.unwrap_or(kept - 1)]
    }
}

/// Continues `prompt` (at least one token) by at most `count` tokens, giving out each as it is chosen. The model reads
/// at most its last `context` tokens. Stops early where it chooses `end`, which is not given out, or `each` returns
/// `false`.
///
/// # Errors
/// If the model is no Transformer, a token is outside it, or the device fails.
pub fn generate(
    computer: &Computer,
    context: usize,
    prompt: &[u32],
    count: usize,
    choice: &Choice,
    end: Option<u32>,
    mut each: impl FnMut(u32) -> bool,
) -> Result<(), ComputeError> {
    if prompt.is_empty() {
        return Err(ComputeError::Input("the prompt is empty: a model continues at least one token".into()));
    }
    let mut tokens = prompt.to_vec();
    for position in 0..count {
        let window = &tokens[tokens.len().saturating_sub(context)..];
        let token = choice.pick(&computer.next_token_logits(window)?, position as u64);
        tokens.push(token);
        if Some(token) == end || !each(token) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Gelu, GptConfig, ModelConfig};
    use crate::device::{ComputeDevice, DeviceChoice};
    use crate::layout::initial_parameters;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, -5.0];

    fn counts(choice: Choice) -> [usize; 4] {
        let mut counts = [0; 4];
        (0..20_000).for_each(|position| counts[choice.pick(&LOGITS, position) as usize] += 1);
        counts
    }

    const PLAIN: Choice = Choice { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3 };

    #[test]
    fn temperature_zero_takes_the_likeliest() {
        assert_eq!(counts(Choice { temperature: 0.0, ..PLAIN }), [0, 20_000, 0, 0]);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let total: f64 = LOGITS.iter().map(|&logit| f64::from(logit).exp()).sum();
        for (count, logit) in counts(PLAIN).into_iter().zip(LOGITS) {
            let (share, expected) = (count as f64 / 20_000.0, f64::from(logit).exp() / total);
            assert!((share - expected).abs() < 0.015, "{share} is not {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let top_k = counts(Choice { top_k: 2, ..PLAIN });
        assert!(top_k[0] == 0 && top_k[3] == 0 && top_k[2] > 0);
        assert_eq!(counts(Choice { top_p: 0.6, ..PLAIN }), [0, 20_000, 0, 0]);
        let top_p = counts(Choice { top_p: 0.7, ..PLAIN });
        assert!(top_p[0] == 0 && top_p[2] > 0);
    }

    #[test]
    fn generation_stops_at_the_end_of_text() {
        let gpt = GptConfig {
            vocab_size: 7,
            context: 4,
            layers: 1,
            heads: 1,
            width: 8,
            bias: false,
            tied_head: true,
            gelu: Gelu::Exact,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        };
        let model = ModelConfig::Gpt(gpt);
        let mut computer = Computer::new(&model, &ComputeDevice::open(DeviceChoice::Cpu).unwrap());
        computer.load(&initial_parameters(&model, 1)).unwrap();
        let choice = Choice { temperature: 5.0, ..PLAIN };
        let tokens = |end| {
            let mut tokens = Vec::new();
            let each = |token| {
                tokens.push(token);
                true
            };
            generate(&computer, 4, &[1], 50, &choice, end, each).unwrap();
            tokens
        };
        let all = tokens(None);
        assert_eq!(all.len(), 50);
        let end = all[20];
        let first = all.iter().position(|&token| token == end).unwrap();
        assert_eq!(tokens(Some(end)), all[..first], "what comes before, and not the end itself");
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Choice { temperature: -1.0, ..PLAIN }.validate().is_err());
        assert!(Choice { top_p: 0.0, ..PLAIN }.validate().is_err());
        assert!(PLAIN.validate().is_ok());
    }
}
