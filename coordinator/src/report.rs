//! The report of what a person has to look at: which slots of a step, and what text was in them.

use std::fmt::Write as _;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use lockstep_model::batch::{Batch, Values};
use lockstep_model::checkpoint;

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
    let path = directory.join(checkpoint::directory_name(step) + ".txt");
    let written = fs::create_dir_all(directory).and_then(|()| fs::write(&path, text));
    written.with_context(|| format!("{}: cannot write", path.display())).map(|()| path)
}

/// Removes the reports of later steps than `step`: the run is to do these again.
///
/// # Errors
/// If the system refuses.
pub(crate) fn remove_after(directory: &Path, step: u64) -> anyhow::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("{}: cannot read", directory.display()))?,
    };
    for entry in entries {
        let path = entry.with_context(|| format!("{}: cannot read", directory.display()))?.path();
        let stem = path.extension().filter(|extension| *extension == "txt").and(path.file_stem());
        if stem.and_then(|stem| checkpoint::step_of(Path::new(stem))).is_some_and(|later| later > step) {
            fs::remove_file(&path).with_context(|| format!("{}: cannot remove", path.display()))?;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_behind_which_a_run_went_back_have_no_reports() {
        let dir = tempfile::tempdir().unwrap();
        let (reports, config) = (dir.path().join("reports"), RunConfig::line(dir.path()));
        remove_after(&reports, 0).unwrap();
        let path = write(&reports, &config, "words", 3, &[]).unwrap();
        let later = [4, 5].map(|step| write(&reports, &config, "words", step, &[]).unwrap());
        let own = reports.join("step-000000005-what-i-think.txt");
        fs::write(&own, "a person's").unwrap();
        remove_after(&reports, 3).unwrap();
        assert!(path.exists() && own.exists() && later.iter().all(|path| !path.exists()));
    }
}
