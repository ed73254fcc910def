//! `lockstep examples`: material for a first run through all stages.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};

use anyhow::Context as _;

use crate::cli::Examples;
use crate::examples;
use crate::telemetry;

/// Writes lines to a file, or to standard output.
pub(crate) fn run(args: &Examples) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let place = args.out.as_ref().map_or("standard output".into(), |path| path.display().to_string());
    let cannot = || format!("{place}: cannot be written");
    let mut out: Box<dyn io::Write> = match &args.out {
        Some(path) => Box::new(File::create(path).with_context(cannot)?),
        None => Box::new(io::stdout().lock()),
    };
    let mut out = BufWriter::new(&mut out);
    let mut lines = examples::lines(args.kind, args.part, args.seed).take(args.count as usize);
    let written = lines.try_for_each(|line| writeln!(out, "{line}")).and_then(|()| out.flush());
    match written {
        // Whoever reads has had enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.with_context(cannot),
    }
}
