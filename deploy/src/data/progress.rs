//! How far reading is: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// Lines printed of a phase where there is no terminal.
const LINES: u64 = 5;
const MB: f64 = 1e6;

/// Shows one phase after the other.
pub(crate) struct Progress {
    /// On a terminal.
    bar: Option<ProgressBar>,
    phase: &'static str,
    total_bytes: u64,
    done_bytes: u64,
    lines_printed: u64,
    began: Instant,
}

impl Progress {
    /// Shows nothing until a phase begins.
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{bar:30.cyan/blue} {prefix} · {bytes} of {total_bytes} · {bytes_per_sec} · {eta} left";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style)
        });
        Self { bar, phase: "", total_bytes: 0, done_bytes: 0, lines_printed: 0, began: Instant::now() }
    }

    /// Begins to go through `total_bytes`.
    pub(crate) fn begin(&mut self, phase: &'static str, total_bytes: u64) {
        (self.phase, self.total_bytes, self.done_bytes, self.lines_printed) = (phase, total_bytes, 0, 0);
        self.began = Instant::now();
        match &self.bar {
            Some(bar) => {
                bar.set_length(total_bytes);
                bar.set_prefix(phase);
                bar.reset();
            }
            None if total_bytes == 0 => eprintln!("{phase}"),
            None => {}
        }
    }

    /// Goes on by `bytes`.
    pub(crate) fn advance(&mut self, bytes: u64) {
        self.done_bytes += bytes;
        if let Some(bar) = &self.bar {
            bar.set_position(self.done_bytes);
            return;
        }
        let share = (self.done_bytes * LINES).checked_div(self.total_bytes).unwrap_or(LINES);
        if share > self.lines_printed {
            self.lines_printed = share;
            let secs = self.began.elapsed().as_secs_f64();
            let left = secs / self.done_bytes as f64 * self.total_bytes.saturating_sub(self.done_bytes) as f64;
            eprintln!(
                "{} · {:.1} of {:.1} MB · {:.1} MB/s · {} left",
                self.phase,
                self.done_bytes as f64 / MB,
                self.total_bytes as f64 / MB,
                self.done_bytes as f64 / MB / secs,
                HumanDuration(Duration::from_secs_f64(left)),
            );
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
