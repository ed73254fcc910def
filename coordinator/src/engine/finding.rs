//! What a person should know of the work, beside who comes and goes.

use std::fmt;
use std::ops::Range;

/// Something noticed.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// Too few workers are left: nothing is leased out.
    Paused {
        /// How many more it takes.
        missing: u32,
    },
    /// Enough workers are here again.
    Resumed,
    /// A block looks wrong, and is computed again before it counts.
    Suspicious {
        /// The step.
        step: u64,
        /// Its slots.
        slots: Range<u32>,
        /// Who computed it.
        name: String,
        /// L2 norm of its gradient.
        norm: f64,
        /// What is usual for so many tokens: the median; `None` where the norm is not finite.
        median: Option<f64>,
    },
    /// Two workers computed the same: it is right, however it looks.
    Confirmed {
        /// The step.
        step: u64,
        /// Its slots.
        slots: Range<u32>,
        /// Who computed it.
        names: [String; 2],
    },
    /// One worker computed the same twice, and nobody else was there to check.
    Unchecked {
        /// The step.
        step: u64,
        /// Its slots.
        slots: Range<u32>,
        /// Who computed it.
        name: String,
    },
    /// Two results differ, and a third worker is to decide.
    Disputed {
        /// The step.
        step: u64,
        /// Its slots.
        slots: Range<u32>,
        /// Who computed them.
        names: Vec<String>,
    },
    /// A worker computed something else than others: it is quarantined.
    Outvoted {
        /// The step.
        step: u64,
        /// Its slots.
        slots: Range<u32>,
        /// Who.
        name: String,
        /// The first step in which a block of this worker's counts that nobody checked, if there is one.
        unchecked_since: Option<u64>,
    },
    /// A step's gradient is no use: the parameters stay as they were.
    Skipped {
        /// The step.
        step: u64,
        /// Skipped steps in a row, this one included.
        in_a_row: u32,
        /// The slots whose gradients looked wrong and were confirmed; empty where none did by itself.
        slots: Vec<Range<u32>>,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paused { missing } => {
                write!(f, "paused: {missing} more worker{} needed", if *missing == 1 { "" } else { "s" })
            }
            Self::Resumed => f.write_str("enough workers are here again"),
            Self::Suspicious { step, slots, name, norm, median } => {
                write!(f, "{} of step {step}, by {name}: the gradient's norm is {norm:.3e}", in_words(slots))?;
                if let Some(median) = median {
                    write!(f, ", usual is {median:.3e}")?;
                }
                f.write_str("; computed again before it counts")
            }
            Self::Confirmed { step, slots, names: [first, second] } => write!(
                f,
                "{} of step {step}: {first} and {second} computed the same; it is the data or the model",
                in_words(slots)
            ),
            Self::Unchecked { step, slots, name } => {
                write!(
                    f,
                    "{} of step {step}: {name} computed the same twice, and nobody else could check",
                    in_words(slots)
                )
            }
            Self::Disputed { step, slots, names } => write!(
                f,
                "{} of step {step}: {} computed different results; another worker decides",
                in_words(slots),
                names.join(" and ")
            ),
            Self::Outvoted { step, slots, name, unchecked_since } => {
                write!(
                    f,
                    "{} of step {step}: {name} computed something else than others; quarantined",
                    in_words(slots)
                )?;
                match unchecked_since {
                    Some(step) => write!(f, ". Blocks of it that nobody checked count since step {step}"),
                    None => Ok(()),
                }
            }
            Self::Skipped { step, in_a_row, slots } => {
                write!(f, "step {step} is skipped ({in_a_row} in a row): its gradient is no use")?;
                if !slots.is_empty() {
                    let slots: Vec<String> = slots.iter().map(in_words).collect();
                    write!(f, " because of {}", slots.join(", "))?;
                }
                Ok(())
            }
        }
    }
}

/// A range of slots, as people say it.
pub(super) fn in_words(slots: &Range<u32>) -> String {
    match slots.len() {
        1 => format!("slot {}", slots.start),
        _ => format!("slots {}-{}", slots.start, slots.end - 1),
    }
}
