//! Prepared corpora: what `prepare` makes of texts, what recipes make of that, and how damage is told.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lockstep_model::dataset::Dataset;
use serde_json::Value;

use crate::cluster::{SMALL, data, fail, fingerprint, inspect, lockstep, path, python, succeed, text};

/// Some sentences of each kind, as documents.
fn documents() -> Vec<String> {
    let document = |i: usize| match i % 3 {
        0 => format!("The {i}th little dog ran to the river, and the river ran on.\nIt didn't stop."),
        1 => format!("学而时习之，不亦说乎？有朋自远方来，不亦乐乎？第{i}章。"),
        _ => format!("She said:  \"{i} times {i} is {}\"\t🙂\n\nThe dog didn't know.", i * i),
    };
    (0..300).map(document).collect()
}

fn separated(documents: &[String]) -> String {
    documents.join("\n<|endoftext|>\n")
}

fn prepare(inputs: &[&Path], tokenizer: &str, more: &[&str], out: &Path) -> Command {
    let mut command = lockstep(&["prepare"], &[]);
    command.args(inputs).args(["--tokenizer", tokenizer, "--out", path(out)]).args(more);
    command
}

/// A BPE corpus of the sentences above.
fn prepared(dir: &Path) -> PathBuf {
    let (input, out) = (dir.join("text.txt"), dir.join("corpus"));
    fs::write(&input, separated(&documents())).unwrap();
    succeed(prepare(&[&input], "bpe", &["--vocab-size", "400"], &out));
    out
}

fn train(run: &Path, more: &[&str], overrides: &[&str]) {
    let arguments = ["train", "quickstart", "--device", "cpu", "--run", path(run)];
    succeed(lockstep(&[&arguments, more].concat(), &[SMALL, overrides].concat()));
}

#[test]
fn a_prepared_corpus_trains_to_the_same_bits_and_generates_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path());
    let input = format!("data.input={}", path(&corpus));
    let overrides = [input.as_str(), "tokenizer.kind=auto"];
    let run = |name: &str| dir.path().join(name);
    train(&run("one"), &["--workers", "1"], &overrides);
    train(&run("two"), &["--workers", "2"], &overrides);
    assert_eq!(fingerprint(&run("one")), fingerprint(&run("two")));

    // Text that becomes tokens as the run starts gives the same tokens, and so the same run.
    let text_input = format!("data.input={}", path(&dir.path().join("text.txt")));
    let learned = [text_input.as_str(), "tokenizer.kind=bpe", "tokenizer.vocab_size=400", "checkpoint.stop_after=7"];
    train(&run("text"), &["--workers", "2"], &learned);
    succeed(lockstep(
        &["train", "--device", "cpu", "--resume", "--run", path(&run("text"))],
        &["checkpoint.stop_after=0"],
    ));
    assert_eq!(fingerprint(&run("one")), fingerprint(&run("text")));

    let shown = inspect(&run("one"));
    let corpus = Dataset::open(&corpus).unwrap();
    let bits = |loss: &Value| loss.as_f64().unwrap() / std::f64::consts::LN_2;
    let bits_per_byte = shown["val_bits_per_byte"].as_f64().unwrap();
    let per_token = bits(&shown["val_loss"]) / bits_per_byte;
    let average = corpus.manifest.bytes as f64 / corpus.manifest.tokens as f64;
    assert!((per_token / average - 1.0).abs() < 0.1, "{per_token} bytes a token at the end, {average} in all");
    let metrics = fs::read_to_string(run("one").join("metrics.jsonl")).unwrap();
    assert!(metrics.lines().last().unwrap().contains("\"val_bits_per_byte\":"), "{metrics}");

    let trained = run("one");
    let generate = |prompt: &str| {
        let arguments = ["generate", "--run", path(&trained), "--device", "cpu", "--tokens", "30", "--prompt", prompt];
        text(&succeed(lockstep(&arguments, &[])).stdout)
    };
    for prompt in ["The dog", "学而<|endoftext|>"] {
        assert!(generate(prompt).starts_with(prompt));
        assert_eq!(generate(prompt), generate(prompt));
    }
}

#[test]
fn documents_are_the_same_from_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let documents = documents();
    let (plain, lines) = (dir.path().join("a.txt"), dir.path().join("a.jsonl"));
    fs::write(&plain, separated(&documents)).unwrap();
    let object = |(i, text): (usize, &String)| format!("{}\n", serde_json::json!({ "id": i, "text": text }));
    fs::write(&lines, documents.iter().enumerate().map(object).collect::<String>()).unwrap();
    let [from_plain, from_lines] = ["plain", "lines"].map(|name| dir.path().join(name));
    succeed(prepare(&[&plain], "bpe", &["--vocab-size", "350"], &from_plain));
    succeed(prepare(&[&lines], "bpe", &["--vocab-size", "350"], &from_lines));
    for file in ["manifest.json", "tokenizer.json", "shard-00000.bin"] {
        assert!(fs::read(from_plain.join(file)).unwrap() == fs::read(from_lines.join(file)).unwrap(), "{file}");
    }
    let corpus = Dataset::open(&from_plain).unwrap();
    assert_eq!(corpus.manifest.documents, documents.len() as u64);
    assert_eq!(corpus.manifest.bytes, documents.iter().map(|text| text.len() as u64).sum::<u64>());
    let tokens = corpus.tokens.to_vec();
    let ends = |token: &u32| Some(*token) == corpus.tokenizer.end_of_text();
    let back: Vec<String> = tokens.split(ends).map(|document| corpus.tokenizer.decode(document)).collect();
    assert_eq!(back.split_last(), Some((&String::new(), &documents[..])), "an end stands after each document");

    // Shards are inputs, too: of llm.c, and without their header of nanoGPT.
    let tokenizer = from_plain.join("tokenizer.json");
    let nano = dir.path().join("nano.bin");
    let shard = fs::read(from_plain.join("shard-00000.bin")).unwrap();
    fs::write(&nano, &shard[1024..]).unwrap();
    let again = dir.path().join("again");
    succeed(prepare(&[&nano], path(&tokenizer), &[], &again));
    assert_eq!(Dataset::open(&again).unwrap().manifest, corpus.manifest);

    // Without an end of text, documents are lines.
    let chars = dir.path().join("chars");
    succeed(prepare(&[&lines], "chars", &[], &chars));
    let corpus = Dataset::open(&chars).unwrap();
    assert_eq!(corpus.tokenizer.decode(&corpus.tokens.to_vec()), documents.join("\n"));
}

#[test]
fn pyarrow_tables_are_read_and_our_tokenizer_opens_in_python() {
    const TEST: &str = "pyarrow_tables_are_read_and_our_tokenizer_opens_in_python";
    let Some(python) = python(TEST, &["pyarrow", "tokenizers"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path());
    let script = "
import json, sys
import pyarrow, pyarrow.parquet as parquet, tokenizers
folder, corpus = sys.argv[1:]
texts = open(folder + '/text.txt', encoding='utf-8').read().split('\\n<|endoftext|>\\n')
table = pyarrow.table({'id': list(range(len(texts))), 'text': texts})
for codec in ['none', 'snappy', 'gzip', 'brotli', 'lz4', 'zstd']:
    parquet.write_table(table, f'{folder}/{codec}.parquet', compression=codec, row_group_size=70)
parquet.write_table(pyarrow.table({'text': ['a', None]}), folder + '/null.parquet')
parquet.write_table(pyarrow.table({'body': ['a']}), folder + '/body.parquet')
ours = tokenizers.Tokenizer.from_file(corpus + '/tokenizer.json')
ids = [id for text in texts for id in ours.encode(text).ids + [ours.token_to_id('<|endoftext|>')]]
json.dump(ids, open(folder + '/ids.json', 'w'))
";
    let mut command = Command::new(python);
    command.args(["-c", script, path(dir.path()), path(&corpus)]);
    succeed(command);
    let ids: Vec<u32> = serde_json::from_str(&fs::read_to_string(dir.path().join("ids.json")).unwrap()).unwrap();
    let corpus = Dataset::open(&corpus).unwrap();
    assert!(corpus.tokens.to_vec() == ids, "the library encodes as we do");

    let table = |codec: &str| dir.path().join(format!("{codec}.parquet"));
    for codec in ["none", "snappy", "gzip", "brotli", "lz4"] {
        let out = dir.path().join(codec);
        succeed(prepare(&[&table(codec)], "bpe", &["--vocab-size", "400"], &out));
        assert_eq!(Dataset::open(&out).unwrap().manifest, corpus.manifest, "{codec}");
    }
    let refused = |name: &str| fail(prepare(&[&table(name)], "bytes", &[], &dir.path().join("out")), 1);
    assert!(refused("zstd").contains("compressed with zstd"));
    assert!(refused("null").contains("null.parquet: row 2"));
    assert!(refused("body").contains("its columns are body"));
    let whole = fs::read(table("gzip")).unwrap();
    for cut in [0, 3, whole.len() / 2, whole.len() - 1] {
        fs::write(table("cut"), &whole[..cut]).unwrap();
        assert!(refused("cut").contains("cut.parquet"), "cut to {cut} bytes");
    }
}

#[test]
fn malformed_inputs_are_named_with_their_place_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (|name: &str| dir.path().join(name), dir.path().join("out"));
    for (name, bytes, said) in [
        ("a.txt", &b"good\nba\xFFd"[..], "a.txt: invalid UTF-8 at byte 7"),
        ("a.jsonl", b"{\"text\":\"a\"}\n{\"text\":", "a.jsonl: line 2, byte 2"),
        ("b.jsonl", b"{\"txt\":\"a\"}\n", "missing field `text`"),
        ("a.parquet", b"PAR1 and no more", "a.parquet"),
        ("a.bin", b"\x01\x00\x02", "a.bin: at byte 2"),
        ("b.bin", b"\x01\x00\x00\x02", "b.bin: at byte 2: token 512"),
        ("c.bin", b"\x88\xD8\x34\x01\x01\x00\x00\x00", "c.bin: at byte 8: the file ends within its header"),
        ("empty.txt", b"", "no text"),
        ("a.md", b"text", ".jsonl"),
    ] {
        fs::write(file(name), bytes).unwrap();
        let found = fail(prepare(&[&file(name)], "bytes", &[], &out), 1);
        assert!(found.contains(said), "{name}: {found}");
        assert!(!out.exists() && !dir.path().join(".out.partial").exists(), "{name}");
    }
    assert!(fail(prepare(&[&file("missing.txt")], "bytes", &[], &out), 1).contains("missing.txt"));
    assert!(fail(prepare(&[&file("a.bin")], "bpe", &[], &out), 1).contains("--tokenizer FILE"));
    assert!(fail(prepare(&[&file("a.txt")], "bep", &[], &out), 2).contains("bep"));
    assert!(fail(prepare(&[&file("a.txt")], "bytes", &["--vocab-size", "300"], &out), 2).contains("--vocab-size"));
    assert!(fail(prepare(&[&file("a.txt")], "bpe", &["--vocab-size", "256"], &out), 2).contains("257"));
    fs::write(file("good.txt"), "abc").unwrap();
    fs::write(file("chars.json"), r#"{"kind":"chars","vocabulary":"ab"}"#).unwrap();
    let unknown = fail(prepare(&[&file("good.txt")], path(&file("chars.json")), &[], &out), 1);
    assert!(unknown.contains("good.txt") && unknown.contains("byte 2"), "{unknown}");
    assert!(fail(prepare(&[&file("good.txt")], path(&file("good.txt")), &[], &out), 1).contains("tokenizer.json"));
}

#[test]
fn a_damaged_corpus_and_a_tokenizer_that_disagrees_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path());
    let refused = |inputs: &str, more: &[&str]| {
        let input = format!("data.input={inputs}");
        let run = dir.path().join("run");
        let said = fail(lockstep(&["train", "quickstart", "--run", path(&run)], &[SMALL, &[&input], more].concat()), 1);
        assert!(!run.exists());
        said
    };
    assert!(refused(path(&corpus), &["tokenizer.kind=chars"]).contains("\"bpe\""));
    let other = dir.path().join("other");
    succeed(prepare(&[&dir.path().join("text.txt")], "bytes", &[], &other));
    let both = format!("['{}', '{}']", path(&corpus), path(&other));
    assert!(refused(&both, &["tokenizer.kind=auto"]).contains("another tokenizer"));

    let shard = corpus.join("shard-00000.bin");
    let whole = fs::read(&shard).unwrap();
    fs::write(&shard, &whole[..whole.len() - 7]).unwrap();
    let said = refused(path(&corpus), &["tokenizer.kind=auto"]);
    assert!(said.contains(&format!("shard-00000.bin: at byte {}", whole.len() - 7)), "{said}");
    let mut changed = whole;
    changed[2000] ^= 1;
    fs::write(&shard, changed).unwrap();
    let said = refused(path(&corpus), &["tokenizer.kind=auto"]);
    assert!(said.contains("shard-00000.bin: at byte 0") && said.contains("SHA-256"), "{said}");
}

#[test]
fn a_mixture_trains_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path());
    let (english, run) = (dir.path().join("english.txt"), |name: &str| dir.path().join(name));
    fs::write(&english, "The cat did not know what the dog knew. ".repeat(200)).unwrap();
    let both = format!("data.input=['{}', '{}']", path(&corpus), path(&english));
    let overrides = [both.as_str(), "data.weights=[1, 3]", "tokenizer.kind=auto"];
    train(&run("one"), &["--workers", "1"], &overrides);
    train(&run("two"), &["--workers", "2"], &overrides);
    assert_eq!(fingerprint(&run("one")), fingerprint(&run("two")));
    train(&run("other"), &[], &[both.as_str(), "data.weights=[3, 1]", "tokenizer.kind=auto"]);
    assert_ne!(fingerprint(&run("one")), fingerprint(&run("other")));
}

#[test]
fn real_texts_survive_in_both_languages() {
    const TEST: &str = "real_texts_survive_in_both_languages";
    let texts = ["tinystories/tinystories-lower-4MB.txt", "chinese/classics_simplified.txt"];
    let Some(paths) = texts.iter().map(|text| data(TEST, text)).collect::<Option<Vec<_>>>() else { return };
    for input in paths {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("corpus");
        succeed(prepare(&[&input], "bpe", &["--vocab-size", "2000"], &out));
        let corpus = Dataset::open(&out).unwrap();
        let mut tokens = corpus.tokens.to_vec();
        assert_eq!(tokens.pop(), corpus.tokenizer.end_of_text());
        assert!(corpus.tokenizer.decode(&tokens) == fs::read_to_string(&input).unwrap(), "{}", input.display());
        assert_eq!(corpus.manifest.vocab_size, 2000);
        // A character of Chinese takes three bytes: pieces are worth having.
        assert!(corpus.manifest.bytes as f64 / corpus.manifest.tokens as f64 > 2.0);
    }
}
