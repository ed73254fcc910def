//! Embeddings of tokens, and of their positions. Backward, each row of a table is the sum of the gradients of where it was
//! read, in the order of the tokens.

use std::sync::Arc;

use rayon::prelude::*;

use super::buffer::Buffer;
use super::{CpuTensor, Operation, row_major, shape, tensor};
use crate::kernels::Positions;

/// Rows that one thread adds to at a time.
const ROWS: usize = 64;

/// Rows of a table `[V, C]`, and where there is one, plus those of a table of positions: `[B, T, C]`.
#[derive(Clone, Debug)]
pub(crate) struct Embed {
    tokens: Arc<[u32]>,
    /// The position of each token.
    places: Arc<[u32]>,
    /// B and T.
    shape: [usize; 2],
}

impl Embed {
    pub(crate) fn new(tokens: &[u32], positions: &Positions) -> Self {
        let places = positions.places().into_iter().cycle().take(tokens.len()).collect();
        Self { tokens: tokens.into(), places, shape: positions.shape }
    }

    /// Which rows of each table are read.
    fn rows(&self) -> [&[u32]; 2] {
        [&self.tokens, &self.places]
    }
}

impl<const N: usize> Operation<N> for Embed {
    type Saved = (Self, [Vec<usize>; N]);

    fn forward(self, tables: [CpuTensor; N], _wanted: [bool; N]) -> (CpuTensor, Self::Saved) {
        let tables = tables.map(row_major);
        let shapes = tables.each_ref().map(shape);
        let width = shapes[0][1];
        let mut output = Buffer::of_any(self.tokens.len() * width);
        output.par_chunks_mut(width).enumerate().for_each(|(token, to)| {
            for (index, (table, rows)) in tables.iter().zip(self.rows()).enumerate() {
                let row = &table.storage::<f32>()[rows[token] as usize * width..][..width];
                match index {
                    0 => to.copy_from_slice(row),
                    _ => to.iter_mut().zip(row).for_each(|(to, x)| *to += x),
                }
            }
        });
        let [b, t] = self.shape;
        (tensor(output, &[b, t, width]), (self, shapes))
    }

    fn backward((embed, shapes): Self::Saved, gradient: CpuTensor, wanted: [bool; N]) -> [Option<CpuTensor>; N] {
        let gradient = row_major(gradient);
        let mut all_rows = embed.rows().into_iter().zip(wanted);
        shapes.map(|shape| {
            let (rows, wanted) = all_rows.next().expect("two tables at most");
            wanted.then(|| tensor(sums(rows, gradient.storage(), shape[0], shape[1]), &shape))
        })
    }
}

/// For each of `count` rows of `width` elements, the sum of those of `values` that `rows` says are its own.
fn sums(rows: &[u32], values: &[f32], count: usize, width: usize) -> Buffer {
    let mut sums = Buffer::of_any(count * width);
    sums.par_chunks_mut(ROWS * width).enumerate().for_each(|(part, sums)| {
        sums.fill(0.0);
        let own = part * ROWS..(part + 1) * ROWS;
        for (row, values) in
            rows.iter().zip(values.chunks_exact(width)).filter(|(row, _)| own.contains(&(**row as usize)))
        {
            let sum = &mut sums[(*row as usize - own.start) * width..][..width];
            sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        }
    });
    sums
}
