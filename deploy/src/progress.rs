//! What a run looks like to the person who started it: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use lockstep_coordinator::PairMeans;
use lockstep_coordinator::observe::{RunEvent, Sample};
use lockstep_model::checkpoint::Validation;

/// Share of the running means that a new step replaces.
const SMOOTHING: f64 = 0.05;
/// Lines printed of a run's steps where there is no terminal.
const LINES: u64 = 20;

/// Shows a run's events.
#[derive(Debug)]
pub(crate) struct Progress(Mutex<Shown>);

#[derive(Debug)]
struct Shown {
    /// On a terminal.
    bar: Option<ProgressBar>,
    total_steps: u64,
    first_step: u64,
    began: Instant,
    workers: usize,
    smoothed_loss: Option<f64>,
    tokens_per_sec: Option<f64>,
}

impl Progress {
    /// A bar if standard error is a terminal, else lines.
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{bar:30.cyan/blue} step {pos}/{len} · {msg}";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style)
        });
        Self(Mutex::new(Shown {
            bar,
            total_steps: 0,
            first_step: 0,
            began: Instant::now(),
            workers: 0,
            smoothed_loss: None,
            tokens_per_sec: None,
        }))
    }

    /// Shows one event.
    pub(crate) fn show(&self, event: &RunEvent) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).show(event);
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.0.lock().unwrap_or_else(PoisonError::into_inner).bar {
            bar.finish_and_clear();
        }
    }
}

impl Shown {
    fn show(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Started { step, total_steps, .. } => {
                (self.first_step, self.total_steps) = (*step, *total_steps);
                if let Some(bar) = &self.bar {
                    bar.set_length(*total_steps);
                    bar.set_position(*step);
                    bar.set_message("waiting for workers");
                }
            }
            RunEvent::WorkerJoined { worker, name, device, workers } => {
                self.workers = *workers;
                self.print(&format!("worker {worker} joined: {name}, {device}"));
            }
            RunEvent::WorkerLeft { worker, reason, workers } => {
                self.workers = *workers;
                self.print(&format!("worker {worker} left: {reason}"));
            }
            RunEvent::WorkerRefused { name, reason } => self.print(&format!("{name} was refused: {reason}")),
            RunEvent::Step { step, loss, pairs, tokens_per_sec } => self.step(*step, *loss, *pairs, *tokens_per_sec),
            RunEvent::Validation { validation: Validation { step, loss, bits_per_byte }, pairs } => {
                let bits = bits_per_byte.map_or(String::new(), |bits| format!(" · {bits:.4} bits per byte"));
                self.print(&format!("step {step}: validation loss {loss:.4}{bits}{}", pair_words(*pairs)));
                if *step == self.first_step {
                    self.began = Instant::now();
                }
            }
            RunEvent::Finding(words) => self.print(words),
            RunEvent::RolledBack { step } => {
                self.print(&format!("the run goes back to step {step}, before the first block that cannot be trusted"));
                (self.first_step, self.began) = (*step, Instant::now());
                if let Some(bar) = &self.bar {
                    bar.set_position(*step);
                }
            }
            RunEvent::Sample(sample) => self.print(&sample_text(sample)),
            RunEvent::Checkpoint { step, path } => self.print(&format!("step {step}: checkpoint {}", path.display())),
            RunEvent::Spans { .. } => {}
        }
    }

    fn step(&mut self, step: u64, loss: f64, pairs: Option<PairMeans>, tokens_per_sec: f64) {
        let smooth = |mean: Option<f64>, new: f64| Some(mean.map_or(new, |mean| mean + SMOOTHING * (new - mean)));
        self.smoothed_loss = smooth(self.smoothed_loss, loss);
        self.tokens_per_sec = smooth(self.tokens_per_sec, tokens_per_sec);
        let done = (step - self.first_step).max(1);
        let left = self.began.elapsed().as_secs_f64() / done as f64 * self.total_steps.saturating_sub(step) as f64;
        let message = format!(
            "loss {loss:.4} · smoothed {:.4}{} · {:.0} tokens/s · {} left · {} {}",
            self.smoothed_loss.unwrap_or(loss),
            pair_words(pairs),
            self.tokens_per_sec.unwrap_or(tokens_per_sec),
            HumanDuration(Duration::from_secs_f64(left)),
            self.workers,
            if self.workers == 1 { "worker" } else { "workers" },
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(step);
                bar.set_message(message);
            }
            None => {
                let every = (self.total_steps / LINES).max(1);
                if step.is_multiple_of(every) || step == self.total_steps {
                    eprintln!("step {step}/{} · {message}", self.total_steps);
                }
            }
        }
    }

    fn print(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

/// What to add to a loss of pairs.
fn pair_words(pairs: Option<PairMeans>) -> String {
    pairs.map_or(String::new(), |pairs| format!(" · {}", pairs.in_words()))
}

/// Prints a line on a terminal where another process may be drawing a bar: it takes the bar's place, and the bar comes back
/// below.
pub(crate) fn say(text: &str) {
    clear_line();
    eprintln!("{text}");
}

/// Clears what a bar of another process left on the terminal.
pub(crate) fn clear_line() {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[2K");
    }
}

fn sample_text(sample: &Sample) -> String {
    let text = match &sample.text {
        Ok(text) => format!("{}{text}", sample.prompt),
        Err(error) => format!("{}: {error}", sample.prompt),
    };
    let quoted: Vec<String> = text.lines().map(|line| format!("  │ {line}")).collect();
    format!("step {}: sample\n{}", sample.step, quoted.join("\n"))
}
