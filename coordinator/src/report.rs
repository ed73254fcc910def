//! The report of what a person has to look at: which slots of a step, and what text was in them.

use std::fmt::Write as _;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use lockstep_model::batch::{Batch, Values};

use crate::config::RunConfig;

/// Rows of a slot that a report shows.
const ROWS_SHOWN: usize = 8;

/// Writes a report into `directory` that begins with `words` and shows slots of step `step`, all where `slots` names none;
/// its path.
///
/// # Errors
/// If the system refuses.
pub(crate) fn write(
    directory: &Path,
    config: &RunConfig,
    words: &str,
    step: u64,
    slots: &[Range<u32>],
) -> anyhow::Result<PathBuf> {
    let mut text = format!("{words}\n");
    let everything = 0..config.batch.slots;
    let shown = if slots.is_empty() { std::slice::from_ref(&everything) } else { slots };
    for slot in shown.iter().cloned().flatten() {
        let _ = write!(text, "\nslot {slot} of step {step}\n");
        show(&mut text, config, &config.source.training_slot(step, slot));
    }
    let path = directory.join(format!("step-{step:09}.txt"));
    let written = fs::create_dir_all(directory).and_then(|()| fs::write(&path, text));
    written.with_context(|| format!("{}: cannot write", path.display())).map(|()| path)
}

/// A slot's rows: as text where there is a tokenizer, else as numbers.
fn show(text: &mut String, config: &RunConfig, batch: &Batch) {
    for column in &batch.columns {
        let width = column.shape[1];
        let rows: Vec<String> = match (&column.values, &config.tokenizer) {
            (Values::U32(tokens), Some(tokenizer)) if column.name == "tokens" => {
                tokens.chunks(width).map(|row| format!("{:?}", tokenizer.decode(row))).collect()
            }
            (Values::U32(_), Some(_)) => continue,
            (Values::U32(values), None) => values.chunks(width).map(|row| format!("{row:?}")).collect(),
            (Values::F32(values), _) => values.chunks(width).map(|row| format!("{row:?}")).collect(),
        };
        let _ = writeln!(text, "  {}", column.name);
        for row in rows.iter().take(ROWS_SHOWN) {
            let _ = writeln!(text, "    {row}");
        }
        if rows.len() > ROWS_SHOWN {
            let _ = writeln!(text, "    and {} rows more", rows.len() - ROWS_SHOWN);
        }
    }
}
