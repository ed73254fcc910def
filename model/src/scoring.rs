//! How likely a model finds given tokens: sequences of any length in windows of its context, many windows at a time.
//!
//! Windows wait until there are enough of one length for a batch, and batches of a length have one shape. So a window's
//! losses depend neither on the windows that it is computed with nor on how many there are.

use std::collections::BTreeMap;

use crate::batch::{Batch, Column, Sums, Values};
use crate::compute::{ComputeError, Computer};

/// Positions of a batch, where a single window has no more.
const POSITIONS: usize = 2048;
/// Positions of a row, at least; above, they are a power of two or the model's context.
const LEAST_LENGTH: usize = 16;

/// Tokens that a model reads at once, to predict some of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// At least 2, and at most one more than the context: all but the last are read, all but the first are predicted.
    pub tokens: Vec<u32>,
    /// The last so many of them count, at least 1.
    pub scored: usize,
}

/// Windows of at most `context` tokens read, each `stride` (1 to `context`) further on than the one before. Of each, what
/// no window before it has predicted counts: every token but the first, once, with `context - stride` tokens before it at
/// least, as far as there are so many.
pub fn windows(tokens: &[u32], context: usize, stride: usize) -> impl Iterator<Item = Window> + '_ {
    assert!((1..=context).contains(&stride), "a stride of {stride} in a context of {context}");
    let predicted_in_all = tokens.len().saturating_sub(1);
    let (mut start, mut predicted) = (0, 0);
    std::iter::from_fn(move || {
        if predicted == predicted_in_all {
            return None;
        }
        let end = predicted_in_all.min(start + context);
        let window = Window { tokens: tokens[start..=end].to_vec(), scored: end - predicted };
        (start, predicted) = (start + stride, end);
        Some(window)
    })
}

/// Computes windows in batches. Each comes with a key, by which its caller knows it again.
#[derive(Debug)]
pub struct Scorer<'a, K> {
    computer: &'a Computer,
    context: usize,
    /// Of a batch.
    positions: usize,
    /// By the length of their row.
    waiting: BTreeMap<usize, Vec<(Window, K)>>,
}

impl<'a, K> Scorer<'a, K> {
    /// A scorer by the model in `computer`, a Transformer that reads at most `context` tokens.
    pub fn new(computer: &'a Computer, context: usize) -> Self {
        Self { computer, context, positions: POSITIONS, waiting: BTreeMap::new() }
    }

    /// Adds a window, and gives the sums of those whose batch it completes: losses in nats, and tokens scored.
    ///
    /// # Errors
    /// If a token is outside the model, or the device fails.
    pub fn push(&mut self, window: Window, key: K) -> Result<Vec<(K, Sums)>, ComputeError> {
        let length = (window.tokens.len() - 1).next_power_of_two().max(LEAST_LENGTH).min(self.context);
        let waiting = self.waiting.entry(length).or_default();
        waiting.push((window, key));
        if waiting.len() < rows(self.positions, length) {
            return Ok(Vec::new());
        }
        let complete = std::mem::take(waiting);
        self.compute(length, complete)
    }

    /// Gives the sums of all windows that still wait.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(&mut self) -> Result<Vec<(K, Sums)>, ComputeError> {
        let waiting = std::mem::take(&mut self.waiting).into_iter().filter(|(_, windows)| !windows.is_empty());
        let sums = waiting.map(|(length, windows)| self.compute(length, windows));
        Ok(sums.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    fn compute(&self, length: usize, windows: Vec<(Window, K)>) -> Result<Vec<(K, Sums)>, ComputeError> {
        let batch = batch(windows.iter().map(|(window, _)| window), [rows(self.positions, length), length]);
        let sums = self.computer.row_losses(&batch)?;
        Ok(windows.into_iter().map(|(_, key)| key).zip(sums).collect())
    }
}

/// Rows of `length` positions in a batch of `positions`.
fn rows(positions: usize, length: usize) -> usize {
    (positions / length).max(1)
}

/// Windows as the first rows of a batch of this shape; what they leave of it has weight 0.
fn batch<'a>(windows: impl Iterator<Item = &'a Window>, shape: [usize; 2]) -> Batch {
    let [rows, length] = shape;
    let (mut tokens, mut targets) = (vec![0; rows * length], vec![0; rows * length]);
    let mut weights = vec![0.0; rows * length];
    for (row, window) in windows.enumerate() {
        let read = window.tokens.len() - 1;
        let (start, end) = (row * length, row * length + read);
        tokens[start..end].copy_from_slice(&window.tokens[..read]);
        targets[start..end].copy_from_slice(&window.tokens[1..]);
        weights[end - window.scored..end].fill(1.0);
    }
    let column = |name: &str, values| Column { name: name.into(), shape, values };
    Batch {
        columns: vec![
            column("tokens", Values::U32(tokens)),
            column("targets", Values::U32(targets)),
            column("weights", Values::F32(weights)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Gelu, GptConfig, LlamaConfig, ModelConfig};
    use crate::device::{ComputeDevice, DeviceChoice};
    use crate::layout::initial_parameters;

    const CONTEXT: usize = 24;
    const VOCAB_SIZE: usize = 50;

    fn models() -> [ModelConfig; 2] {
        let gpt = GptConfig {
            vocab_size: VOCAB_SIZE,
            context: CONTEXT,
            layers: 2,
            heads: 2,
            width: 32,
            bias: true,
            tied_head: false,
            score_head: false,
            gelu: Gelu::Exact,
            norm_epsilon: 1e-5,
            dropout: 0.3,
        };
        let llama = LlamaConfig {
            vocab_size: VOCAB_SIZE,
            context: CONTEXT,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            width: 32,
            head_width: None,
            ffn_width: 48,
            qk_norm: true,
            tied_head: true,
            score_head: false,
            rope_theta: 1e4,
            rope_scaling: None,
            norm_epsilon: 1e-5,
            dropout: 0.3,
        };
        [ModelConfig::Gpt(gpt), ModelConfig::Llama(llama)]
    }

    fn computer(model: &ModelConfig, parameters: impl Fn(Vec<f32>) -> Vec<f32>) -> Computer {
        let mut computer = Computer::new(model, &ComputeDevice::open(DeviceChoice::Cpu).unwrap());
        computer.load(&parameters(initial_parameters(model, 5))).unwrap();
        computer
    }

    /// Documents of 0 to 100 tokens.
    fn documents() -> Vec<Vec<u32>> {
        let document = |index: usize| (0..index * 37 % 101).map(|at| ((at * at + index) % VOCAB_SIZE) as u32).collect();
        (0..30).map(document).collect()
    }

    /// Sums by window, in the order of the windows.
    fn scored(mut scorer: Scorer<'_, usize>, windows: &[Window]) -> Vec<Sums> {
        let mut sums = vec![None; windows.len()];
        let mut keep = |done: Vec<(usize, Sums)>| {
            for (key, of_window) in done {
                assert_eq!(sums[key].replace(of_window), None, "window {key} is scored twice");
            }
        };
        for (key, window) in windows.iter().enumerate() {
            keep(scorer.push(window.clone(), key).unwrap());
        }
        keep(scorer.finish().unwrap());
        sums.into_iter().map(|sums| sums.expect("every window is scored")).collect()
    }

    #[test]
    fn every_token_but_the_first_counts_once_with_what_stands_before_it() {
        for (length, context) in [0, 1, 2, 3, 23, 24, 25, 26, 49, 100].into_iter().flat_map(|n| [(n, 24), (n, 1)]) {
            let tokens: Vec<u32> = (0..length).collect();
            for stride in 1..=context {
                let (mut next, mut before) = (1, None);
                for Window { tokens: window, scored } in windows(&tokens, context, stride) {
                    assert!(window.len() <= context + 1 && (1..window.len()).contains(&scored));
                    assert_eq!(before.map_or(0, |before| before + stride as u32), window[0]);
                    before = Some(window[0]);
                    assert!(window.windows(2).all(|pair| pair[0] + 1 == pair[1]));
                    let first = window[window.len() - scored];
                    assert_eq!(first, next, "of {length} with {stride} in {context}");
                    assert!((first - window[0]) as usize >= (context - stride).min(first as usize));
                    next = window[window.len() - 1] + 1;
                }
                assert_eq!(next, length.max(1), "with {stride} in {context}");
            }
        }
    }

    #[test]
    fn a_model_that_knows_nothing_loses_the_logarithm_of_its_vocabulary() {
        for model in models() {
            let computer = computer(&model, |parameters| vec![0.0; parameters.len()]);
            for stride in [1, 7, CONTEXT] {
                let windows: Vec<Window> = documents()
                    .iter()
                    .flat_map(|tokens| windows(tokens, CONTEXT, stride).collect::<Vec<_>>())
                    .collect();
                let sums = scored(Scorer::new(&computer, CONTEXT), &windows);
                for (sums, window) in sums.iter().zip(&windows) {
                    assert_eq!(sums.weight, window.scored as f64);
                    let expected = (VOCAB_SIZE as f64).ln() * window.scored as f64;
                    assert_eq!(sums.loss as f32, expected as f32);
                }
            }
        }
    }

    #[test]
    fn windows_are_scored_as_each_by_itself_whatever_is_beside_them() {
        for model in models() {
            let computer = computer(&model, |parameters| parameters.iter().map(|value| value * 8.0).collect());
            let windows: Vec<Window> =
                documents().iter().flat_map(|tokens| windows(tokens, CONTEXT, 10).collect::<Vec<_>>()).collect();
            let together = scored(Scorer::new(&computer, CONTEXT), &windows);
            for (window, sums) in windows.iter().zip(&together) {
                let alone = computer.loss(&batch([window].into_iter(), [1, window.tokens.len() - 1])).unwrap();
                assert_eq!(alone.weight, sums.weight);
                assert!((alone.loss - sums.loss).abs() < 1e-5 * alone.loss, "{alone:?} and {sums:?}");
            }
            // Other windows beside them, and another order: the same to the bit.
            let mut reversed = windows.clone();
            reversed.reverse();
            reversed.truncate(windows.len() - 3);
            let mut again = scored(Scorer::new(&computer, CONTEXT), &reversed);
            again.reverse();
            assert_eq!(again, together[3..]);
            // Another batch size: at most another rounding.
            for positions in [1, 100, 5000] {
                let other = scored(Scorer { positions, ..Scorer::new(&computer, CONTEXT) }, &windows);
                for (other, sums) in other.iter().zip(&together) {
                    assert!((other.loss - sums.loss).abs() < 1e-6 * sums.loss, "{other:?} and {sums:?}");
                }
            }
        }
    }
}
