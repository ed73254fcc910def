//! Tensors from files into the flat vector, and out of it.

use std::borrow::Cow;

use rayon::prelude::*;
use safetensors::tensor::{Dtype, TensorView, View};

use super::element::ElementType;
use super::names::Foreign;

/// Rows of a matrix that are turned at a time: what is read of each of its columns then lies together.
const TURNED_ROWS: usize = 16;

/// Copies a file's tensor, whose sizes are right, to `values`; transposed, those are `[columns, rows]` of what it is there.
pub(super) fn read(view: &TensorView<'_>, element: ElementType, transposed: bool, values: &mut [f32]) {
    let data = view.data();
    match *view.shape() {
        [rows, columns] if transposed => {
            values.par_chunks_mut(TURNED_ROWS * rows).enumerate().for_each(|(block, values)| {
                for row in 0..rows {
                    for (values, column) in values.chunks_exact_mut(rows).zip(block * TURNED_ROWS..) {
                        values[row] = element.read(data, row * columns + column);
                    }
                }
            });
        }
        _ => values.iter_mut().enumerate().for_each(|(index, value)| *value = element.read(data, index)),
    }
}

/// A tensor of the flat vector, as another form has it.
#[derive(Debug)]
pub(super) struct Written<'a> {
    pub(super) foreign: Foreign,
    pub(super) element: ElementType,
    /// Empty where all are 0.
    pub(super) values: &'a [f32],
}

impl Written<'_> {
    /// How many elements it has.
    pub(super) fn elements(&self) -> usize {
        self.foreign.shape.iter().product()
    }

    /// Its bytes, row-major.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let Self { foreign, element, values } = self;
        let mut bytes = Vec::with_capacity(self.elements() * element.bytes());
        if values.is_empty() {
            (0..self.elements()).for_each(|_| element.write(0.0, &mut bytes));
            return bytes;
        }
        match foreign.shape[..] {
            [rows, columns] => {
                for row in 0..rows {
                    let row = foreign.paired_heads.map_or(row, |heads| unpaired(row, rows / heads));
                    let place = |column| if foreign.transposed { column * rows + row } else { row * columns + column };
                    (0..columns).for_each(|column| element.write(values[place(column)], &mut bytes));
                }
            }
            _ => values.iter().for_each(|value| element.write(*value, &mut bytes)),
        }
        bytes
    }
}

/// Where row `row` of a matrix whose heads, of `head_width` rows, are turned in neighbouring pairs stands in one whose heads
/// are turned by halves: pair i is elements i and i + D/2 there.
pub(super) fn unpaired(row: usize, head_width: usize) -> usize {
    let (head, within) = (row / head_width, row % head_width);
    head * head_width + within / 2 + within % 2 * (head_width / 2)
}

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        self.element.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.foreign.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes().into()
    }

    fn data_len(&self) -> usize {
        self.elements() * self.element.bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn foreign(shape: &[usize], transposed: bool, paired_heads: Option<usize>) -> Foreign {
        Foreign { name: "t".into(), shape: shape.to_vec(), transposed, paired_heads }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(rows in 1usize..40, columns in 1usize..40, transposed: bool, seed: u32) {
            let values: Vec<f32> = (0..rows * columns).map(|i| f32::from_bits(seed.wrapping_add(i as u32 * 7919))).collect();
            let written = Written { foreign: foreign(&[rows, columns], transposed, None), element: ElementType::F32, values: &values };
            let bytes = written.bytes();
            let view = TensorView::new(Dtype::F32, vec![rows, columns], &bytes).unwrap();
            let mut back = vec![0.0f32; values.len()];
            read(&view, ElementType::F32, transposed, &mut back);
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&back), bits(&values));
        }

        /// Interleaved to halves is `w.view(n, rows/n/2, 2, cols).transpose(1, 2)`; ours is its inverse.
        #[test]
        fn pairs_are_the_inverse_of_halves(heads in 1usize..5, half in 1usize..9) {
            let head_width = 2 * half;
            let halves = |row: usize| {
                let (head, part, index) = (row / head_width, row % head_width / half, row % half);
                head * head_width + 2 * index + part
            };
            for row in 0..heads * head_width {
                prop_assert_eq!(halves(unpaired(row, head_width)), row);
                prop_assert_eq!(unpaired(halves(row), head_width), row);
            }
        }
    }

    #[test]
    fn a_matrix_is_turned_and_its_rows_are_paired() {
        // Ours is [in 2, out 4]; a head of 4.
        let values: Vec<f32> = (0..8).map(|value| value as f32).collect();
        let bytes = |paired_heads| {
            let written =
                Written { foreign: foreign(&[4, 2], true, paired_heads), element: ElementType::F32, values: &values };
            written.bytes().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
        };
        assert_eq!(bytes(None), [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]);
        assert_eq!(bytes(Some(1)), [0.0, 4.0, 2.0, 6.0, 1.0, 5.0, 3.0, 7.0]);
        let zeros = Written { foreign: foreign(&[3], false, None), element: ElementType::Bf16, values: &[] };
        assert_eq!(zeros.bytes(), [0; 6]);
    }
}
