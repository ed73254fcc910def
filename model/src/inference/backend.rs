//! What computes logits, and keeps what sequences have read: on the CPU a network of its own, on other devices burn's.

use super::awake::awake;
use super::network::{Cache, Network, Run};
use crate::compute::{ComputeError, Computer};
use crate::config::ModelConfig;
use crate::device::ComputeDevice;
use crate::kernels::KeyCache;

/// Parameters on a device, and a cache for each place.
#[derive(Debug)]
pub(super) enum Backend {
    Cpu {
        network: Box<Network>,
        caches: Vec<Cache>,
    },
    /// One sequence after the other.
    Device {
        computer: Box<Computer>,
        caches: Vec<KeyCache>,
        cache_bytes_per_token: usize,
    },
}

impl Backend {
    /// `None` of the straight line.
    pub(super) fn new(
        model: &ModelConfig,
        parameters: &[f32],
        device: &ComputeDevice,
    ) -> Result<Option<Self>, ComputeError> {
        if device.is_cpu() {
            let network = Network::new(model, parameters).map(Box::new);
            return Ok(network.map(|network| Self::Cpu { network, caches: Vec::new() }));
        }
        let elements = match model {
            ModelConfig::Gpt(gpt) => gpt.layers * gpt.width,
            ModelConfig::Llama(llama) => llama.layers * llama.kv_heads * llama.head_width(),
            ModelConfig::Line(_) => return Ok(None),
        };
        let mut computer = Box::new(Computer::new(model, device));
        computer.load(parameters)?;
        let cache_bytes_per_token = 2 * elements * size_of::<f32>();
        Ok(Some(Self::Device { computer, caches: Vec::new(), cache_bytes_per_token }))
    }

    /// Bytes that a token takes of a cache.
    pub(super) fn cache_bytes_per_token(&self) -> usize {
        match self {
            Self::Cpu { network, .. } => network.cache_bytes_per_token(),
            Self::Device { cache_bytes_per_token, .. } => *cache_bytes_per_token,
        }
    }

    /// Bytes of weights that a pass reads.
    pub(super) fn weight_bytes(&self) -> usize {
        match self {
            Self::Cpu { network, .. } => network.weight_bytes(),
            Self::Device { computer, .. } => computer.layout().len() * size_of::<f32>(),
        }
    }

    /// All parameters as they are now, flat in layout order.
    pub(super) fn parameters(&self) -> Result<Vec<f32>, ComputeError> {
        match self {
            Self::Cpu { network, .. } => network.parameters(),
            Self::Device { computer, .. } => computer.parameters(),
        }
    }

    /// Adds a place, with an empty cache.
    pub(super) fn add_place(&mut self) {
        match self {
            Self::Cpu { network, caches } => caches.push(network.cache()),
            Self::Device { caches, .. } => caches.push(KeyCache::default()),
        }
    }

    /// Keeps the first `length` tokens of a place's cache, and makes room for `tokens` in all.
    pub(super) fn keep(&mut self, place: usize, length: usize, tokens: usize) {
        match self {
            Self::Cpu { caches, .. } => {
                caches[place].truncate(length);
                caches[place].reserve(tokens);
            }
            Self::Device { caches, .. } => caches[place].truncate(length),
        }
    }

    /// Has a place's cache be the first `length` tokens of another's.
    pub(super) fn copy(&mut self, from: usize, to: usize, length: usize) {
        match self {
            Self::Cpu { caches, .. } => caches[to] = caches[from].beginning(length),
            Self::Device { caches, .. } => {
                let mut copy = caches[from].clone();
                copy.truncate(length);
                caches[to] = copy;
            }
        }
    }

    /// Reads the tokens of `runs`, each of another place. The logits `[V]` of each run that asks for them.
    pub(super) fn forward(&mut self, runs: &[Run<'_>]) -> Result<Vec<Vec<f32>>, ComputeError> {
        match self {
            Self::Cpu { network, caches } => Ok(awake(|| network.forward(runs, caches))),
            Self::Device { computer, caches, .. } => {
                let mut logits = Vec::new();
                for run in runs {
                    let after = computer.next_token_logits_after(&mut caches[run.place], run.tokens)?;
                    logits.extend(run.wants_logits.then_some(after));
                }
                Ok(logits)
            }
        }
    }
}
