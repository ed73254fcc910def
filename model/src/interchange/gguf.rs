//! The container GGUF, version 3 (`docs/gguf.md` of ggml-org/ggml): keys and values, places of tensors, tensors.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::element::ElementType;
use super::weights::Written;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Kinds of value.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
/// Tensors begin at multiples of it, in bytes.
pub(super) const ALIGNMENT: usize = 32;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Texts(Vec<String>),
}

/// Keys and values, in the order in which they are written.
pub(super) type Metadata = Vec<(String, Value)>;

/// Writes a file, one tensor in memory at a time.
pub(super) fn write(path: &Path, metadata: &Metadata, tensors: &[Written<'_>]) -> io::Result<()> {
    let mut file = Counted { inner: BufWriter::new(File::create(path)?), written: 0 };
    file.write_all(MAGIC)?;
    file.write_all(&VERSION.to_le_bytes())?;
    file.write_all(&(tensors.len() as u64).to_le_bytes())?;
    file.write_all(&(metadata.len() as u64).to_le_bytes())?;
    for (key, value) in metadata {
        text(&mut file, key)?;
        self::value(&mut file, value)?;
    }
    let mut offset = 0;
    for tensor in tensors {
        let shape = &tensor.foreign.shape;
        text(&mut file, &tensor.foreign.name)?;
        file.write_all(&(shape.len() as u32).to_le_bytes())?;
        // The innermost first.
        for size in shape.iter().rev() {
            file.write_all(&(*size as u64).to_le_bytes())?;
        }
        file.write_all(&type_number(tensor.element).to_le_bytes())?;
        file.write_all(&(offset as u64).to_le_bytes())?;
        offset += (tensor.elements() * tensor.element.bytes()).next_multiple_of(ALIGNMENT);
    }
    file.align()?;
    for tensor in tensors {
        file.write_all(&tensor.bytes())?;
        file.align()?;
    }
    file.inner.flush()
}

fn text(file: &mut impl Write, text: &str) -> io::Result<()> {
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(text.as_bytes())
}

fn value(file: &mut impl Write, value: &Value) -> io::Result<()> {
    let kind = match value {
        Value::U32(_) => U32,
        Value::F32(_) => F32,
        Value::Bool(_) => BOOL,
        Value::Text(_) => TEXT,
        Value::I32s(_) | Value::F32s(_) | Value::Texts(_) => ARRAY,
    };
    file.write_all(&kind.to_le_bytes())?;
    let array = |file: &mut dyn Write, kind: u32, length: usize| {
        file.write_all(&kind.to_le_bytes())?;
        file.write_all(&(length as u64).to_le_bytes())
    };
    match value {
        Value::U32(number) => file.write_all(&number.to_le_bytes()),
        Value::F32(number) => file.write_all(&number.to_le_bytes()),
        Value::Bool(yes) => file.write_all(&[u8::from(*yes)]),
        Value::Text(words) => text(file, words),
        Value::I32s(numbers) => {
            array(file, I32, numbers.len())?;
            numbers.iter().try_for_each(|number| file.write_all(&number.to_le_bytes()))
        }
        Value::F32s(numbers) => {
            array(file, F32, numbers.len())?;
            numbers.iter().try_for_each(|number| file.write_all(&number.to_le_bytes()))
        }
        Value::Texts(texts) => {
            array(file, TEXT, texts.len())?;
            texts.iter().try_for_each(|words| text(file, words))
        }
    }
}

/// ggml's number of a form.
fn type_number(element: ElementType) -> u32 {
    match element {
        ElementType::F32 => 0,
        ElementType::F16 => 1,
        ElementType::Bf16 => 30,
    }
}

/// A file, and how much of it is written.
struct Counted<W> {
    inner: W,
    written: usize,
}

impl<W: Write> Counted<W> {
    /// Writes zeros up to where a tensor may begin.
    fn align(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(ALIGNMENT) - self.written;
        self.write_all(&[0; ALIGNMENT][..padding])
    }
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.written += written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interchange::names::Foreign;

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let tensor = |name: &str, shape: &[usize], element, values| Written {
            foreign: Foreign { name: name.into(), shape: shape.to_vec(), transposed: false, paired_heads: None },
            element,
            values,
        };
        let metadata = vec![("a".into(), Value::U32(7)), ("b".into(), Value::Texts(vec!["xy".into()]))];
        let tensors =
            [tensor("t", &[1, 3], ElementType::Bf16, &[1.0, 2.0, 3.0]), tensor("u", &[1], ElementType::F32, &[-1.0])];
        write(&path, &metadata, &tensors).unwrap();
        let mut expected = Vec::new();
        let mut put = |bytes: &[u8]| expected.extend_from_slice(bytes);
        put(b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
        put(b"\x01\0\0\0\0\0\0\0a\x04\0\0\0\x07\0\0\0");
        put(b"\x01\0\0\0\0\0\0\0b\x09\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0xy");
        put(b"\x01\0\0\0\0\0\0\0t\x02\0\0\0\x03\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x1e\0\0\0\0\0\0\0\0\0\0\0");
        put(b"\x01\0\0\0\0\0\0\0u\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0");
        expected.resize(expected.len().next_multiple_of(32), 0);
        let data = expected.len();
        expected.extend([0x80, 0x3f, 0x00, 0x40, 0x40, 0x40]);
        expected.resize(data + 32, 0);
        expected.extend((-1f32).to_le_bytes());
        expected.resize(data + 64, 0);
        assert_eq!(std::fs::read(path).unwrap(), expected);
    }
}
