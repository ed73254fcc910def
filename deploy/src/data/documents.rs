//! Documents of any length, read piece by piece.
//!
//! A `.txt` file is one document, or several with a line `<|endoftext|>` between them, as TinyStories has it; the line
//! break before that line belongs to it. A line of `.jsonl` and a row of `.parquet` is a document. Empty ones are left
//! out.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use lockstep_model::bpe::END_OF_TEXT;
use lockstep_model::words::last_safe_cut;

use super::inputs::{Format, InputFile};
use super::{jsonl, parquet};

/// A document longer than this comes in several pieces, as far as it can be cut between words.
const PIECE_BYTES: usize = 1 << 20;

/// A document, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) starts_document: bool,
    pub(crate) ends_document: bool,
    pub(crate) place: Place,
    /// How far it advances through the input, in bytes of the files.
    pub(crate) read_bytes: u64,
}

/// Where a piece begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) path: Arc<Path>,
    pub(crate) position: Position,
}

/// Where in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Position {
    /// A byte, from 0.
    Byte(u64),
    /// A line, from 1.
    Line(u64),
    /// A row, from 1.
    Row(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.position {
            Position::Byte(byte) => write!(formatter, "{path}: in the text from byte {byte} on"),
            Position::Line(line) => write!(formatter, "{path}: line {line}"),
            Position::Row(row) => write!(formatter, "{path}: row {row}"),
        }
    }
}

/// Pieces in the order of the files.
pub(crate) type Pieces<'a> = Box<dyn Iterator<Item = anyhow::Result<Piece>> + Send + 'a>;

/// A whole document, its place, and how many bytes of the file it took.
pub(super) type Document = (String, Place, u64);

/// The pieces of text files, in order. After an error nothing more is of use.
pub(crate) fn read(files: &[InputFile]) -> Pieces<'_> {
    Box::new(files.iter().flat_map(|file| read_file(file).unwrap_or_else(|error| Box::new([Err(error)].into_iter()))))
}

fn read_file(file: &InputFile) -> anyhow::Result<Pieces<'static>> {
    let shown = file.path.display();
    let open = || File::open(&file.path).with_context(|| format!("{shown}: cannot be read"));
    match file.format {
        Format::Text => Ok(Box::new(TextReader::new(&file.path, BufReader::with_capacity(1 << 20, open()?)))),
        Format::JsonLines => Ok(whole(jsonl::documents(&file.path, open()?))),
        Format::Parquet => Ok(whole(parquet::Rows::open(&file.path, open()?, file.bytes)?)),
        Format::Shard => bail!("{shown}: holds tokens, not text; prepare token shards by themselves"),
    }
}

/// The pieces of a text that lies in memory.
pub(crate) fn of_text<'a>(name: &str, text: &'a str) -> Pieces<'a> {
    Box::new(TextReader::new(Path::new(name), text.as_bytes()))
}

/// Puts a line break between documents where there is none, for tokenizers without an end-of-text.
pub(crate) fn separated_by_lines(pieces: Pieces<'_>) -> Pieces<'_> {
    let mut ends_in_line_break = true;
    Box::new(pieces.map(move |piece| {
        piece.map(|mut piece| {
            if piece.starts_document && !ends_in_line_break {
                piece.text.insert(0, '\n');
            }
            if !piece.text.is_empty() {
                ends_in_line_break = piece.text.ends_with('\n');
            }
            piece
        })
    }))
}

/// The pieces of documents that were read whole.
fn whole(documents: impl Iterator<Item = anyhow::Result<Document>> + Send + 'static) -> Pieces<'static> {
    let pieces = documents.flat_map(|document| match document {
        Ok((text, place, read_bytes)) => cut(text, &place, read_bytes).into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    });
    Box::new(pieces)
}

fn cut(mut text: String, place: &Place, mut read_bytes: u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    while !text.is_empty() {
        let rest = next_cut(&text).map(|at| text.split_off(at));
        pieces.push(Piece {
            text: std::mem::take(&mut text),
            starts_document: pieces.is_empty(),
            ends_document: rest.is_none(),
            place: place.clone(),
            read_bytes: std::mem::take(&mut read_bytes),
        });
        text = rest.unwrap_or_default();
    }
    pieces
}

/// Where a text that is long enough for a piece is to be cut: late in its first piece, or else wherever it can be.
fn next_cut(text: &str) -> Option<usize> {
    let first = text.get(..text.floor_char_boundary(PIECE_BYTES)).filter(|first| first.len() < text.len())?;
    last_safe_cut(first).or_else(|| last_safe_cut(text)).filter(|cut| *cut > 0)
}

/// Reads a text file as documents.
struct TextReader<R> {
    path: Arc<Path>,
    input: R,
    /// What was read of a line; between calls, the bytes of an incomplete character.
    line: Vec<u8>,
    /// Where `line` begins in the file.
    offset: u64,
    at_line_start: bool,
    /// The piece being gathered, and where it begins.
    piece: String,
    piece_offset: u64,
    /// Whether the document has given out a piece already.
    within_document: bool,
    /// Bytes of the file that no piece has accounted for.
    unaccounted: u64,
    finished: bool,
}

impl<R: BufRead> TextReader<R> {
    fn new(path: &Path, input: R) -> Self {
        Self {
            path: path.into(),
            input,
            line: Vec::new(),
            offset: 0,
            at_line_start: true,
            piece: String::new(),
            piece_offset: 0,
            within_document: false,
            unaccounted: 0,
            finished: false,
        }
    }

    /// Reads on until a piece is complete; `None` at the end of the file.
    fn next_piece(&mut self) -> anyhow::Result<Option<Piece>> {
        while let Some((text, is_separator)) = self.next_line()? {
            if is_separator {
                let line_break = if self.piece.ends_with("\r\n") { 2 } else { usize::from(self.piece.ends_with('\n')) };
                self.piece.truncate(self.piece.len() - line_break);
                let ended = self.end_document();
                self.piece_offset = self.offset;
                if ended.is_some() {
                    return Ok(ended);
                }
                continue;
            }
            self.piece.push_str(&text);
            if let Some(cut) = next_cut(&self.piece) {
                let rest = self.piece.split_off(cut);
                let text = std::mem::replace(&mut self.piece, rest);
                return Ok(Some(self.give_out(text, false)));
            }
        }
        Ok(self.end_document())
    }

    /// The next line, or a part of it, as text, and whether it is the separator; `None` at the end of the file.
    fn next_line(&mut self) -> anyhow::Result<Option<(String, bool)>> {
        let shown = self.path.display();
        let read = self.input.by_ref().take(PIECE_BYTES as u64).read_until(b'\n', &mut self.line);
        let read = read.with_context(|| format!("{shown}: cannot be read from byte {} on", self.offset))?;
        if self.line.is_empty() {
            return Ok(None);
        }
        let complete = match std::str::from_utf8(&self.line) {
            Ok(text) => text.len(),
            Err(error) if error.error_len().is_none() && read > 0 => error.valid_up_to(),
            Err(error) => {
                let byte = self.offset + error.valid_up_to() as u64;
                bail!("{shown}: invalid UTF-8 at byte {byte}; convert the file (for example with iconv -t UTF-8)");
            }
        };
        let rest = self.line.split_off(complete);
        let text = String::from_utf8(std::mem::replace(&mut self.line, rest)).expect("this part was found to be UTF-8");
        self.offset += complete as u64;
        self.unaccounted += complete as u64;
        let is_separator = self.at_line_start && text.trim_end_matches(['\r', '\n']) == END_OF_TEXT;
        self.at_line_start = text.ends_with('\n');
        Ok(Some((text, is_separator)))
    }

    /// The document's last piece; `None` if the document is empty.
    fn end_document(&mut self) -> Option<Piece> {
        if self.piece.is_empty() && !self.within_document {
            return None;
        }
        let text = std::mem::take(&mut self.piece);
        Some(self.give_out(text, true))
    }

    fn give_out(&mut self, text: String, ends_document: bool) -> Piece {
        let place = Place { path: self.path.clone(), position: Position::Byte(self.piece_offset) };
        self.piece_offset += text.len() as u64;
        let starts_document = !self.within_document;
        self.within_document = !ends_document;
        Piece { text, starts_document, ends_document, place, read_bytes: std::mem::take(&mut self.unaccounted) }
    }
}

impl<R: BufRead> Iterator for TextReader<R> {
    type Item = anyhow::Result<Piece>;

    fn next(&mut self) -> Option<anyhow::Result<Piece>> {
        if self.finished {
            return None;
        }
        let next = self.next_piece().transpose();
        self.finished = !matches!(next, Some(Ok(_)));
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Vec<Piece> {
        of_text("a.txt", text).collect::<anyhow::Result<_>>().unwrap()
    }

    /// The documents, put together from their pieces.
    fn documents(text: &str) -> Vec<String> {
        let mut documents: Vec<String> = Vec::new();
        for piece in pieces(text) {
            if piece.starts_document {
                documents.push(String::new());
            }
            documents.last_mut().unwrap().push_str(&piece.text);
        }
        documents
    }

    #[test]
    fn a_text_is_one_document_or_several_by_separator_lines() {
        assert_eq!(documents("one\ntwo\n"), ["one\ntwo\n"]);
        assert_eq!(documents("one\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\n\nthree"), ["one", "two", "\nthree"]);
        assert_eq!(documents("<|endoftext|>\n<|endoftext|>\none\n<|endoftext|>"), ["one"]);
        assert_eq!(documents("say <|endoftext|>\n"), ["say <|endoftext|>\n"]);
        assert!(documents("").is_empty());
        let second = &pieces("one\n<|endoftext|>\ntwo")[1];
        assert_eq!(second.place.position, Position::Byte(18));
        assert_eq!(pieces("one\n<|endoftext|>\ntwo").iter().map(|piece| piece.read_bytes).sum::<u64>(), 21);
    }

    #[test]
    fn a_long_document_comes_in_pieces_that_are_the_whole() {
        let lines: String = (0..300_000).map(|i| format!("line {i}, 第{i}行\n")).collect();
        for text in [lines.clone(), lines.replace('\n', " ")] {
            let found = pieces(&text);
            assert!(found.len() > 4 && found.iter().all(|piece| piece.text.len() <= 2 * PIECE_BYTES));
            assert!(found[0].starts_document && !found[1].starts_document && found.last().unwrap().ends_document);
            assert_eq!(found.iter().filter(|piece| piece.ends_document).count(), 1);
            assert_eq!(documents(&text), [text.as_str()]);
            let last = found.last().unwrap();
            assert_eq!(last.place.position, Position::Byte((text.len() - last.text.len()) as u64));
        }
        let unbroken = "字".repeat(PIECE_BYTES);
        assert_eq!(pieces(&unbroken).len(), 1, "cut nowhere, because nowhere between words");
    }

    #[test]
    fn bad_text_is_named_with_its_byte() {
        let bytes = [vec![b'a'; 3 * PIECE_BYTES], vec![0xE5, 0xAD]].concat();
        let error = TextReader::new(Path::new("a.txt"), &bytes[..]).find_map(Result::err).unwrap();
        assert_eq!(error.to_string().split(';').next(), Some("a.txt: invalid UTF-8 at byte 3145728"));
        let error = TextReader::new(Path::new("a.txt"), &b"ok\nn\xFFo\n"[..]).find_map(Result::err).unwrap();
        assert!(error.to_string().contains("byte 4"), "{error}");
    }

    #[test]
    fn lines_separate_documents_that_do_not_end_in_one() {
        let joined =
            |text| -> String { separated_by_lines(of_text("a.txt", text)).map(|piece| piece.unwrap().text).collect() };
        assert_eq!(joined("one\n<|endoftext|>\ntwo\n\n<|endoftext|>\nthree"), "one\ntwo\nthree");
        assert_eq!(joined("one"), "one");
    }
}
