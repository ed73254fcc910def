//! What the model that a run begins with says of each row that it is compared with: collected before step 1, and kept in
//! `references.json`.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use lockstep_model::checkpoint::Manifest;
use lockstep_model::digest::{hex, vector_sha256};
use lockstep_model::sampler::Source;
use lockstep_model::tree::Block;
use serde::{Deserialize, Serialize};

use crate::engine::{LeaseId, WorkerId};
use crate::run_dir::replace;

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    /// SHA-256 of the model's parameters, hexadecimal.
    params_sha256: String,
    /// SHA-256 of the rows, hexadecimal.
    corpus_sha256: String,
    /// Log-probability of each row, in nats.
    log_probs: Vec<f32>,
}

/// Where the numbers of a run are, or will be.
#[derive(Clone, Debug)]
pub struct ReferenceFile<'a> {
    path: &'a Path,
    /// SHA-256 of the parameters that the run begins with, hexadecimal.
    params_sha256: &'a str,
    /// SHA-256 of the rows, hexadecimal.
    corpus_sha256: &'a str,
}

impl<'a> ReferenceFile<'a> {
    /// That of the run which `manifest` is of, at `path`.
    pub fn of(path: &'a Path, manifest: &'a Manifest) -> Self {
        let params_sha256 = manifest.initial_sha256.as_deref().unwrap_or_default();
        Self { path, params_sha256, corpus_sha256: &manifest.corpus_sha256 }
    }

    /// The numbers of `source`'s rows, if they are there, and their SHA-256, hexadecimal.
    ///
    /// # Errors
    /// If they cannot be read, or belong to another model or other rows.
    pub fn read(&self, source: &Source) -> anyhow::Result<Option<(Arc<[f32]>, String)>> {
        let shown = self.path.display();
        let text = match fs::read_to_string(self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            read => read.with_context(|| format!("{shown}: cannot be read"))?,
        };
        let saved: Saved = serde_json::from_str(&text).with_context(|| format!("{shown}: is no file of references"))?;
        if saved.params_sha256 != self.params_sha256 || saved.corpus_sha256 != self.corpus_sha256 {
            bail!(
                "{shown}: says what another model says, or of other rows than the run's; put the run's own file back, or start a \
                 new run"
            );
        }
        let rows: usize = (0..source.reference_slots()).map(|slot| source.reference_rows(slot)).sum();
        if saved.log_probs.len() != rows {
            bail!("{shown}: has {} numbers for {rows} rows; put the run's own file back", saved.log_probs.len());
        }
        let sha256 = hex(&vector_sha256(&saved.log_probs));
        Ok(Some((saved.log_probs.into(), sha256)))
    }

    fn write(&self, log_probs: Vec<f32>) -> anyhow::Result<()> {
        let (params_sha256, corpus_sha256) = (self.params_sha256.into(), self.corpus_sha256.into());
        replace(self.path, &serde_json::to_string(&Saved { params_sha256, corpus_sha256, log_probs })?)
    }
}

/// The numbers of results that are here.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    /// Of results that may count yet.
    offered: BTreeMap<(WorkerId, LeaseId), Vec<f32>>,
    /// Of slots whose results count.
    slots: BTreeMap<u32, Vec<f32>>,
}

impl Collected {
    /// Keeps the numbers of a result until it is known whether it counts.
    pub(crate) fn offer(&mut self, worker: WorkerId, lease: LeaseId, values: Vec<f32>) {
        self.offered.insert((worker, lease), values);
    }

    /// The result does not count.
    pub(crate) fn discard(&mut self, worker: WorkerId, lease: LeaseId) {
        self.offered.remove(&(worker, lease));
    }

    /// The result counts for `block` of `source`'s slots.
    ///
    /// # Errors
    /// If it has another number of rows.
    pub(crate) fn accept(
        &mut self,
        worker: WorkerId,
        lease: LeaseId,
        block: Block,
        source: &Source,
    ) -> anyhow::Result<()> {
        let Some(values) = self.offered.remove(&(worker, lease)) else { return Ok(()) };
        let mut rest = &values[..];
        for slot in block.slots(source.reference_slots()) {
            let of_slot = rest.split_off(..source.reference_rows(slot)).context("a result with too few rows counts")?;
            self.slots.insert(slot, of_slot.to_vec());
        }
        Ok(())
    }

    /// Writes down what every slot's rows were given, once all are here, and gives it with its SHA-256, hexadecimal.
    ///
    /// # Errors
    /// If the model gives an answer no probability at all, or the system refuses.
    pub(crate) fn finish(self, file: &ReferenceFile<'_>) -> anyhow::Result<(Arc<[f32]>, String)> {
        let values: Vec<f32> = self.slots.into_values().flatten().collect();
        if let Some(row) = values.iter().position(|value| !value.is_finite()) {
            bail!(
                "the model that the run begins with gives row {row} the log-probability {}, which nothing can be compared with; \
                 its parameters are damaged, or it cannot compute with them",
                values[row]
            );
        }
        let sha256 = hex(&vector_sha256(&values));
        file.write(values.clone())?;
        Ok((values.into(), sha256))
    }
}

/// Whether a result with `values` numbers fits `block` of `source`'s slots.
pub(crate) fn fits(source: &Source, block: Block, values: usize) -> bool {
    let slots = source.reference_slots();
    block.exists(slots) && block.slots(slots).map(|slot| source.reference_rows(slot)).sum::<usize>() == values
}
