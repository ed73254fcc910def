//! A sequence of tokens, wherever it lies: in memory or in mapped shards.

use std::ops::Range;
use std::sync::Arc;

use crate::shard::Shard;

/// Tokens visited at a time.
const BLOCK: usize = 1 << 16;

/// A part of a corpus. Cloning and splitting share what it is a part of.
#[derive(Clone, Debug)]
pub struct Tokens {
    segments: Arc<[Segment]>,
    /// Which of all the segments' tokens.
    range: Range<usize>,
}

#[derive(Debug)]
struct Segment {
    /// Which tokens of the sequence it holds.
    range: Range<usize>,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Memory(Vec<u32>),
    Mapped(Shard),
}

impl From<Vec<u32>> for Tokens {
    fn from(tokens: Vec<u32>) -> Self {
        let range = 0..tokens.len();
        Self { segments: [Segment { range: range.clone(), storage: Storage::Memory(tokens) }].into(), range }
    }
}

impl From<Vec<Shard>> for Tokens {
    /// The shards' tokens, one shard after the other.
    fn from(shards: Vec<Shard>) -> Self {
        let mut end = 0;
        let segments: Vec<Segment> = shards
            .into_iter()
            .map(|shard| {
                let start = end;
                end += shard.len();
                Segment { range: start..end, storage: Storage::Mapped(shard) }
            })
            .collect();
        Self { segments: segments.into(), range: 0..end }
    }
}

impl Tokens {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The first `count` tokens (at most all), and the others.
    pub fn split_at(&self, count: usize) -> (Self, Self) {
        let middle = self.range.start + count.min(self.len());
        let part = |range| Self { segments: self.segments.clone(), range };
        (part(self.range.start..middle), part(middle..self.range.end))
    }

    /// Appends `count` tokens from the one at `start` on to `out`. They must exist.
    pub fn copy(&self, start: usize, count: usize, out: &mut Vec<u32>) {
        assert!(start + count <= self.len(), "tokens {start} to {} of {}", start + count, self.len());
        let wanted = self.range.start + start..self.range.start + start + count;
        let first = self.segments.partition_point(|segment| segment.range.end <= wanted.start);
        for segment in self.segments[first..].iter().take_while(|segment| segment.range.start < wanted.end) {
            let here = wanted.start.max(segment.range.start)..wanted.end.min(segment.range.end);
            let within = here.start - segment.range.start..here.end - segment.range.start;
            match &segment.storage {
                Storage::Memory(tokens) => out.extend_from_slice(&tokens[within]),
                Storage::Mapped(shard) => shard.copy(within, out),
            }
        }
    }

    /// Visits all tokens in order, a block at a time.
    pub fn for_each_block(&self, mut each: impl FnMut(&[u32])) {
        let mut block = Vec::with_capacity(BLOCK.min(self.len()));
        for start in (0..self.len()).step_by(BLOCK) {
            block.clear();
            self.copy(start, BLOCK.min(self.len() - start), &mut block);
            each(&block);
        }
    }

    /// All of them, in memory.
    pub fn to_vec(&self) -> Vec<u32> {
        let mut all = Vec::with_capacity(self.len());
        self.copy(0, self.len(), &mut all);
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::shard::{ShardWriter, Width};

    proptest! {
        #[test]
        fn shards_and_memory_serve_the_same(lengths in proptest::collection::vec(0usize..40, 1..5), split in 0usize..200) {
            let dir = tempfile::tempdir().unwrap();
            let total: usize = lengths.iter().sum();
            let all: Vec<u32> = (0..total as u32).map(|i| i * 7).collect();
            let mut rest = all.as_slice();
            let shards = lengths.iter().enumerate().map(|(index, &length)| {
                let path = dir.path().join(format!("{index}.bin"));
                let mut writer = ShardWriter::create(&path, Width::Two).unwrap();
                let (these, others) = rest.split_at(length);
                rest = others;
                writer.push(these).unwrap();
                writer.finish().unwrap();
                Shard::open(&path).unwrap()
            });
            let mapped = Tokens::from(shards.collect::<Vec<_>>());
            let memory = Tokens::from(all.clone());
            prop_assert_eq!(mapped.to_vec(), all.clone());
            for tokens in [mapped, memory] {
                let (first, second) = tokens.split_at(split);
                prop_assert_eq!(first.len(), split.min(total));
                prop_assert_eq!([first.to_vec(), second.to_vec()].concat(), all.clone());
                let mut seen = Vec::new();
                second.for_each_block(|block| seen.extend_from_slice(block));
                prop_assert_eq!(seen, second.to_vec());
                for start in 0..second.len() {
                    let mut window = Vec::new();
                    second.copy(start, 1, &mut window);
                    prop_assert_eq!(window, [all[first.len() + start]]);
                }
            }
        }
    }
}
