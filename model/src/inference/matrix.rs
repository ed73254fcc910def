//! Weights, laid out once for the rows that they are multiplied with: in panels of columns.

use std::ops::Range;

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::panel::{GROUPS, Group, Panel, Products, Rows, multiply_panel};
use crate::kernels::lanes::LANES;

/// Columns of a panel of weights.
const PANEL_COLUMNS: usize = GROUPS * LANES;
/// From so many rows a thread on, each takes some of the rows.
const MANY_ROWS: usize = 32;
/// Rows that one thread takes at a time, at most.
const MOST_ROWS: usize = 96;
/// Multiplications below which threads cost more than they bring.
const WORTH_THREADS: usize = 1 << 17;

/// Weights `[in, out]`, and a bias where there is one.
#[derive(Debug)]
pub(super) struct Matrix {
    /// `[panel][in][GROUPS]`.
    panels: Vec<Group>,
    /// in.
    pub(super) depth: usize,
    /// out.
    pub(super) columns: usize,
    pub(super) bias: Option<Vec<f32>>,
}

/// What a product is added to.
#[derive(Clone, Copy, Debug)]
enum Onto {
    Nothing,
    /// What is there.
    Itself,
}

/// Some columns of a matrix, as a tensor holds them.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) values: &'a [f32],
    pub(super) columns: usize,
    /// Whether the tensor is `[columns, in]`.
    pub(super) transposed: bool,
}

impl Matrix {
    /// Of parts with `depth` rows, side by side.
    pub(super) fn new(depth: usize, parts: &[Part<'_>], bias: Option<&[f32]>) -> Self {
        let columns = parts.iter().map(|part| part.columns).sum::<usize>();
        let mut panels = vec![Group::default(); columns.div_ceil(PANEL_COLUMNS) * depth * GROUPS];
        panels.par_chunks_mut(depth * GROUPS).enumerate().for_each(|(panel, groups)| {
            for column in panel * PANEL_COLUMNS..columns.min((panel + 1) * PANEL_COLUMNS) {
                let (part, within) = part_of(parts, column);
                let (group, lane) = (column % PANEL_COLUMNS / LANES, column % LANES);
                for row in 0..depth {
                    let place = if part.transposed { within * depth + row } else { row * part.columns + within };
                    groups[row * GROUPS + group].0[lane] = part.values[place];
                }
            }
        });
        Self { panels, depth, columns, bias: bias.map(<[f32]>::to_vec) }
    }

    /// out.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// One element.
    pub(super) fn at(&self, row: usize, column: usize) -> f32 {
        let (panel, within) = (column / PANEL_COLUMNS, column % PANEL_COLUMNS);
        self.panels[(panel * self.depth + row) * GROUPS + within / LANES].0[within % LANES]
    }

    /// Bytes that a product reads.
    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[Group]>(&self.panels)
    }

    /// `x W + b` in `y` `[rows, out]`, of rows `x` `[rows, in]`.
    pub(super) fn multiply(&self, x: &[f32], y: &mut Vec<f32>) {
        y.resize(x.len() / self.depth * self.columns, 0.0);
        self.multiply_to(x, y, Onto::Nothing);
    }

    /// Adds `x W + b` to `y` `[rows, out]`.
    pub(super) fn multiply_onto(&self, x: &[f32], y: &mut [f32]) {
        self.multiply_to(x, y, Onto::Itself);
    }

    fn multiply_to(&self, x: &[f32], y: &mut [f32], onto: Onto) {
        let (rows, threads) = (x.len() / self.depth, rayon::current_num_threads());
        let all = 0..self.panels.len() / (self.depth * GROUPS);
        if threads == 1 || rows * self.panels.len() * LANES < WORTH_THREADS {
            return self.multiply_panels(x, all, y, self.columns, onto);
        }
        if rows >= MANY_ROWS * threads {
            let block = rows.div_ceil(threads * rows.div_ceil(threads * MOST_ROWS)).next_multiple_of(2);
            let blocks = y.par_chunks_mut(block * self.columns).zip(x.par_chunks(block * self.depth));
            return blocks.for_each(|(y, x)| self.multiply_panels(x, all.clone(), y, self.columns, onto));
        }
        // Few rows: each thread takes some of the columns.
        let panels = all.len().div_ceil(2 * threads);
        let parts = all.clone().into_par_iter().step_by(panels).map(|first| {
            let last = all.end.min(first + panels);
            let columns = self.columns.min(last * PANEL_COLUMNS) - first * PANEL_COLUMNS;
            let mut part = vec![0.0; rows * columns];
            self.multiply_panels(x, first..last, &mut part, columns, Onto::Nothing);
            (first * PANEL_COLUMNS, columns, part)
        });
        for (start, columns, part) in parts.collect::<Vec<_>>() {
            for (y, part) in y.chunks_exact_mut(self.columns).zip(part.chunks_exact(columns)) {
                let y = &mut y[start..start + columns];
                match onto {
                    Onto::Nothing => y.copy_from_slice(part),
                    Onto::Itself => y.iter_mut().zip(part).for_each(|(element, sum)| *element += sum),
                }
            }
        }
    }

    /// Products with some panels, and biases, in rows `y` of `columns` elements.
    fn multiply_panels(&self, x: &[f32], panels: Range<usize>, y: &mut [f32], columns: usize, onto: Onto) {
        AutoArch::new().dispatch(MultiplyPanels { matrix: self, x, panels, y, columns, onto });
    }
}

/// The part that a column is in, and the column's number there.
fn part_of<'a>(parts: &'a [Part<'a>], mut column: usize) -> (&'a Part<'a>, usize) {
    for part in parts {
        if column < part.columns {
            return (part, column);
        }
        column -= part.columns;
    }
    unreachable!("a column of one of the parts")
}

struct MultiplyPanels<'a> {
    matrix: &'a Matrix,
    x: &'a [f32],
    panels: Range<usize>,
    y: &'a mut [f32],
    columns: usize,
    onto: Onto,
}

impl WithSimd for MultiplyPanels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let Self { matrix, x, panels, y, columns, onto } = self;
        let (rows, len, first) = (Rows::of(x, matrix.depth), matrix.depth * GROUPS, panels.start);
        let mut scratch = Vec::new();
        for panel in panels {
            let start = (panel - first) * PANEL_COLUMNS;
            let end = columns.min(start + PANEL_COLUMNS);
            let groups = &matrix.panels[panel * len..][..len];
            let bias = matrix.bias.as_ref().map(|bias| &bias[panel * PANEL_COLUMNS..][..end - start]);
            let mut part = PanelOutput { y, stride: columns, columns: start..end, bias, onto };
            multiply_panel::<S>(rows, Panel { groups, width: GROUPS, columns: end - start }, &mut scratch, &mut part);
        }
    }
}

/// A panel's columns of rows.
struct PanelOutput<'a> {
    y: &'a mut [f32],
    /// Elements of a row.
    stride: usize,
    /// The panel's columns in a row.
    columns: Range<usize>,
    /// Of the panel.
    bias: Option<&'a [f32]>,
    onto: Onto,
}

impl Products for PanelOutput<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, products: &[f32]) {
        let y = &mut self.y[row * self.stride..][self.columns.clone()];
        match (self.onto, self.bias) {
            (Onto::Nothing, None) => y.iter_mut().zip(products).for_each(|(y, product)| *y = *product),
            (Onto::Nothing, Some(bias)) => {
                y.iter_mut().zip(products).zip(bias).for_each(|((y, product), bias)| *y = product + bias);
            }
            (Onto::Itself, None) => y.iter_mut().zip(products).for_each(|(y, product)| *y += product),
            (Onto::Itself, Some(bias)) => {
                y.iter_mut().zip(products).zip(bias).for_each(|((y, product), bias)| *y += product + bias);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normals;

    /// Of weights so deep that a panel is read in parts.
    #[test]
    fn a_row_multiplied_alone_and_among_others_is_the_same_and_right() {
        let (depth, columns, rows) = (1100, 70, 133);
        let (weights, bias, x) = (normals(9, 1, depth * columns), normals(9, 2, columns), normals(9, 3, rows * depth));
        let part = Part { values: &weights, columns, transposed: false };
        let matrix = Matrix::new(depth, &[part], Some(&bias));
        let mut together = Vec::new();
        matrix.multiply(&x, &mut together);
        for (x, together) in x.chunks(depth).zip(together.chunks(columns)) {
            let (mut alone, mut added) = (Vec::new(), vec![1.0; columns]);
            matrix.multiply(x, &mut alone);
            matrix.multiply_onto(x, &mut added);
            assert_eq!(alone, together);
            for (column, (alone, added)) in alone.iter().zip(added).enumerate() {
                let weights = weights[column..].iter().step_by(columns);
                let sum: f64 = x.iter().zip(weights).map(|(&x, &weight)| f64::from(x) * f64::from(weight)).sum();
                let expected = sum + f64::from(bias[column]);
                assert!((f64::from(*alone) - expected).abs() < 1e-3, "{column}: {alone} is not {expected}");
                assert_eq!(added, 1.0 + alone);
            }
        }
    }
}
