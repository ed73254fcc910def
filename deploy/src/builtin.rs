//! The default corpus, which comes with the program and needs no download.

use bible_lib::{Bible, BibleLookup, Translation};

/// Name of the corpus in `data.input`.
pub(crate) const KJV: &str = "builtin:kjv";

/// The King James text (public domain): a heading for each chapter, a line for each verse. The brackets around words
/// that the translators supplied are left out, and so, by the library's own reading, is what follows a colon in a verse.
pub(crate) fn king_james() -> anyhow::Result<String> {
    let broken = |error| anyhow::anyhow!("the built-in corpus is broken: {error}");
    let bible = Bible::new(Translation::KingJames).map_err(broken)?;
    let mut text = String::with_capacity(4_600_000);
    for book in bible.get_sorted_books() {
        let mut chapters = bible.get_chapters(&book).map_err(broken)?;
        chapters.sort_unstable();
        for chapter in chapters {
            text.push_str(&format!("{} {chapter}\n", BibleLookup::capitalize_book(&book)));
            let mut verses = bible.get_verses(&book, chapter).map_err(broken)?;
            verses.sort_unstable();
            for verse in verses {
                let line = bible.get_verse(BibleLookup::new(book.as_str(), chapter, verse), false);
                text.extend(line.map_err(broken)?.trim().chars().filter(|c| !matches!(c, '[' | ']')));
                text.push('\n');
            }
            text.push('\n');
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use lockstep_model::corpus::Corpus;
    use lockstep_model::digest::{bytes_sha256, hex};
    use lockstep_model::tokenizer::TokenizerKind;

    use super::*;

    #[test]
    fn the_corpus_is_whole_and_always_the_same() {
        let text = king_james().unwrap();
        assert!(
            text.starts_with("Genesis 1\nIn the beginning God created the heaven and the earth.\n"),
            "{}",
            &text[..200]
        );
        assert_eq!(text, king_james().unwrap());
        let digest = hex(&bytes_sha256(text.as_bytes()));
        expect_test::expect!["3445303 bytes, SHA-256 2e40813c647401193fcb1f1c584b99a54ab1abed95eac0b2f23b699653486073"]
            .assert_eq(&format!("{} bytes, SHA-256 {digest}", text.len()));
    }

    /// The least a Transformer must beat: each character predicted from the one before, with counts from the training part
    /// (one added to each), on the validation part.
    #[test]
    fn a_bigram_model_of_the_corpus() {
        let corpus = Corpus::of_text(&king_james().unwrap(), TokenizerKind::Chars, 0.9).unwrap();
        let vocabulary = corpus.tokenizer.vocab_size();
        let mut counts = vec![1u32; vocabulary * vocabulary];
        let (training, validation) = (corpus.training.to_vec(), corpus.validation.to_vec());
        training.windows(2).for_each(|pair| counts[pair[0] as usize * vocabulary + pair[1] as usize] += 1);
        let nats = |pair: &[u32]| {
            let row = &counts[pair[0] as usize * vocabulary..][..vocabulary];
            -(f64::from(row[pair[1] as usize]) / f64::from(row.iter().sum::<u32>())).ln()
        };
        let validation = validation.windows(2);
        let cross_entropy = validation.clone().map(nats).sum::<f64>() / validation.len() as f64;
        expect_test::expect!["2.340"].assert_eq(&format!("{cross_entropy:.3}"));
    }
}
