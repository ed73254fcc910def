//! Vectors in fewer bytes, with everybody computing on the same numbers all the same.
//!
//! A step's gradient is [rounded](Rounding) at every node of the slot tree, whether it travels from there or not, so that it
//! does not show where a lease was cut. Parameters are [published](advance) as rounded differences, and what the rounding left
//! over is made up for by later ones.

mod blocks;
mod gradients;
mod parameters;

use serde::{Deserialize, Serialize};

pub use self::gradients::Rounding;
pub use self::parameters::{DIFFERENCE_BYTES, add_difference, advance};

/// In which form a run's vectors travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compression {
    /// Gradients of blocks.
    pub gradients: GradientFormat,
    /// Parameters, to whoever holds the version before.
    pub parameters: ParameterFormat,
}

/// What gradients are rounded to at every node, and so may travel as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientFormat {
    /// Nothing: 4 bytes an element.
    #[default]
    F32,
    /// The upper 16 bits of an f32: 2 bytes an element.
    Bf16,
    /// Whole numbers of a byte, with a power of two for each 256 of them, which takes one byte more.
    Int8,
}

/// What versions of the parameters differ by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParameterFormat {
    /// Anything: each version is published whole, 4 bytes an element.
    #[default]
    F32,
    /// A bf16: 2 bytes an element.
    Bf16,
}
