//! Documents of a `.parquet` file: the column `text`.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use parquet::basic::{Compression, Type};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader as _, SerializedFileReader};

use super::documents::{Document, Place, Position};

/// The column that is read.
const COLUMN: &str = "text";
/// Rows read at a time.
const ROWS: usize = 256;

/// Reads rows, one row group after the other.
pub(super) struct Rows {
    path: Arc<Path>,
    file: SerializedFileReader<File>,
    column: usize,
    /// The definition level of a row that is not null; 0 where none can be.
    full_level: i16,
    next_group: usize,
    reader: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Rows read and not yet given out, in order; `None` for a row without text.
    waiting: std::vec::IntoIter<Option<ByteArray>>,
    rows: u64,
    file_bytes: u64,
    total_rows: u64,
    finished: bool,
}

impl Rows {
    /// Opens a file and looks for its column.
    pub(super) fn open(path: &Path, file: File, file_bytes: u64) -> anyhow::Result<Self> {
        let shown = path.display();
        let file = SerializedFileReader::new(file).with_context(|| {
            format!("{shown}: is no parquet file, or not whole (its {file_bytes} bytes end without one's footer)")
        })?;
        let metadata = file.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let Some(column) = schema.columns().iter().position(|column| column.path().parts() == [COLUMN]) else {
            let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
            bail!("{shown}: has no column {COLUMN:?}; its columns are {}", names.join(", "));
        };
        let described = schema.column(column);
        if described.physical_type() != Type::BYTE_ARRAY || described.max_rep_level() > 0 {
            bail!("{shown}: the column {COLUMN:?} holds {:?}, not one string a row", described.physical_type());
        }
        for group in metadata.row_groups() {
            if let refused @ (Compression::ZSTD(_) | Compression::LZO) = group.column(column).compression() {
                let name = format!("{refused:?}");
                let name = name.split('(').next().unwrap_or_default().to_lowercase();
                bail!(
                    "{shown}: is compressed with {name}, which this program does not read; write it again with snappy, gzip, \
                     lz4 or brotli, for example in Python: pyarrow.parquet.write_table(pyarrow.parquet.read_table(\
                     \"{shown}\"), \"new.parquet\", compression=\"snappy\")"
                );
            }
        }
        let full_level = described.max_def_level();
        let total_rows = metadata.file_metadata().num_rows().unsigned_abs();
        Ok(Self {
            path: path.into(),
            file,
            column,
            full_level,
            next_group: 0,
            reader: None,
            waiting: Vec::new().into_iter(),
            rows: 0,
            file_bytes,
            total_rows,
            finished: false,
        })
    }

    /// The next row; `None` at the end.
    fn next_row(&mut self) -> anyhow::Result<Option<Document>> {
        let row = loop {
            if let Some(row) = self.waiting.next() {
                break row;
            }
            if !self.read_on()? {
                return Ok(None);
            }
        };
        self.rows += 1;
        let place = Place { path: self.path.clone(), position: Position::Row(self.rows) };
        let Some(bytes) = row else { bail!("{place}: the column {COLUMN:?} is null; leave the row out") };
        let text = match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.to_owned(),
            Err(error) => bail!("{place}: invalid UTF-8 at byte {} of the text", error.valid_up_to()),
        };
        // The file's bytes are spread evenly over its rows.
        let share =
            |rows: u64| (u128::from(self.file_bytes) * u128::from(rows) / u128::from(self.total_rows.max(1))) as u64;
        let read_bytes = share(self.rows).saturating_sub(share(self.rows - 1));
        Ok(Some((text, place, read_bytes)))
    }

    /// Reads more rows; `false` if there are none.
    fn read_on(&mut self) -> anyhow::Result<bool> {
        let broken = {
            let (path, row) = (self.path.clone(), self.rows + 1);
            move || format!("{}: row {row}: the column {COLUMN:?} cannot be read", path.display())
        };
        if self.reader.is_none() {
            if self.next_group == self.file.num_row_groups() {
                return Ok(false);
            }
            let group = self.file.get_row_group(self.next_group).with_context(broken.clone())?;
            let ColumnReader::ByteArrayColumnReader(reader) =
                group.get_column_reader(self.column).with_context(broken.clone())?
            else {
                bail!(
                    "{}: the column {COLUMN:?} is of another type in row group {}",
                    self.path.display(),
                    self.next_group
                );
            };
            self.reader = Some(reader);
            self.next_group += 1;
        }
        let Some(reader) = &mut self.reader else { return Ok(false) };
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        let (rows, ..) = reader.read_records(ROWS, Some(&mut levels), None, &mut values).with_context(broken)?;
        if rows == 0 {
            self.reader = None;
            return Ok(true);
        }
        let mut values = values.into_iter();
        self.waiting = match self.full_level {
            0 => values.map(Some).collect::<Vec<_>>(),
            full => levels.iter().map(|&level| if level == full { values.next() } else { None }).collect(),
        }
        .into_iter();
        Ok(true)
    }
}

impl Iterator for Rows {
    type Item = anyhow::Result<Document>;

    fn next(&mut self) -> Option<anyhow::Result<Document>> {
        if self.finished {
            return None;
        }
        let next = self.next_row().transpose();
        self.finished = !matches!(next, Some(Ok(_)));
        next
    }
}
