//! Which block of the tree an idle worker gets.

use std::ops::Range;

use lockstep_model::tree::Block;

/// Bits of a word.
const WORD: usize = u64::BITS as usize;

/// Which slots may be leased, and which blocks: a block is free if all its slots are. To change a block, or to choose one,
/// takes time in proportion to the tree's height, and to the block's slots by the word.
#[derive(Clone, Debug)]
pub(super) struct Free {
    slots: u32,
    /// The nodes of the tree, level by level from the leaves.
    levels: Vec<Flags>,
}

impl Free {
    /// `slots` slots, at least 1, all of them free.
    pub(super) fn new(slots: u32) -> Self {
        let nodes = |level: u32| slots.max(1).div_ceil(1 << level) as usize;
        Self { slots, levels: (0..=Block::root(slots).level).map(|level| Flags::all(nodes(level))).collect() }
    }

    /// Whether all of a block, which exists, is free.
    pub(super) fn contains(&self, block: Block) -> bool {
        self.levels[block.level as usize].is_set(block.index as usize)
    }

    /// All slots of a block, which exists, become free, or none is any more.
    pub(super) fn set(&mut self, block: Block, free: bool) {
        for (below, flags) in (0..=block.level).rev().zip(&mut self.levels) {
            let start = (block.index as usize) << below;
            flags.set(start..((block.index as usize + 1) << below).min(flags.nodes), free);
        }
        let mut node = block;
        while (node.level as usize) + 1 < self.levels.len() {
            let sibling = node.sibling();
            let parent = node.parent();
            let whole = free && (!sibling.exists(self.slots) || self.contains(sibling));
            if self.contains(parent) == whole {
                break;
            }
            self.levels[parent.level as usize].set(parent.index as usize..parent.index as usize + 1, whole);
            node = parent;
        }
    }

    /// The free block with the most slots, at most `max_slots` of them; among equals the lowest, and the first of its level.
    pub(super) fn choose(&self, max_slots: u32) -> Option<Block> {
        let mut chosen: Option<(usize, Block)> = None;
        for (level, flags) in (0..self.levels.len() as u32).zip(&self.levels).rev() {
            if chosen.is_some_and(|(size, _)| size > 1 << level) {
                break;
            }
            // All nodes of a level have the same size, but for the last, which may be cut off.
            let last = flags.nodes - 1;
            let index = match 1u64 << level <= u64::from(max_slots) {
                true => flags.first_set(),
                false => flags.is_set(last).then_some(last),
            };
            let Some(block) = index.map(|index| Block { level, index: index as u32 }) else { continue };
            let size = block.slots(self.slots).len();
            if size <= max_slots as usize && chosen.is_none_or(|(larger, _)| larger <= size) {
                chosen = Some((size, block));
            }
        }
        chosen.map(|(_, block)| block)
    }
}

/// A flag for each node of a level.
#[derive(Clone, Debug)]
struct Flags {
    nodes: usize,
    words: Vec<u64>,
    /// No word before this one has a flag that is set.
    first: usize,
}

impl Flags {
    fn all(nodes: usize) -> Self {
        let mut flags = Self { nodes, words: vec![0; nodes.div_ceil(WORD)], first: 0 };
        flags.set(0..nodes, true);
        flags
    }

    fn is_set(&self, node: usize) -> bool {
        self.words[node / WORD] >> (node % WORD) & 1 == 1
    }

    fn set(&mut self, nodes: Range<usize>, flag: bool) {
        let Range { mut start, end } = nodes;
        self.first = if flag { self.first.min(start / WORD) } else { self.first };
        while start < end {
            let (word, bit) = (start / WORD, start % WORD);
            let bits = (end - start).min(WORD - bit);
            let mask = (u64::MAX >> (WORD - bits)) << bit;
            if flag {
                self.words[word] |= mask;
            } else {
                self.words[word] &= !mask;
            }
            start += bits;
        }
        while self.words.get(self.first) == Some(&0) {
            self.first += 1;
        }
    }

    fn first_set(&self) -> Option<usize> {
        self.words.get(self.first).map(|word| self.first * WORD + word.trailing_zeros() as usize)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Slots as characters: `.` is free. Returns the slots of the chosen block.
    fn chosen(slots: &str, max_slots: u32) -> Option<Range<u32>> {
        let mut free = Free::new(slots.len() as u32);
        let taken = (0..).zip(slots.bytes()).filter(|(_, slot)| *slot != b'.');
        taken.for_each(|(slot, _)| free.set(Block::leaf(slot), false));
        free.choose(max_slots).map(|block| block.slots(slots.len() as u32))
    }

    /// The choice, and all blocks that are free, by their definition.
    fn plain(free: &[bool], max_slots: u32) -> (Option<Block>, Vec<Block>) {
        let slots = free.len() as u32;
        let levels = 0..=Block::root(slots).level;
        let nodes =
            levels.flat_map(|level| (0..).map(move |index| Block { level, index }).take_while(|b| b.exists(slots)));
        let whole = nodes.filter(|block| block.slots(slots).all(|slot| free[slot as usize]));
        let whole: Vec<Block> = whole.collect();
        let mut chosen: Option<Block> = None;
        for block in whole.iter().filter(|block| block.slots(slots).len() <= max_slots as usize) {
            if chosen.is_none_or(|smaller| smaller.slots(slots).len() < block.slots(slots).len()) {
                chosen = Some(*block);
            }
        }
        (chosen, whole)
    }

    proptest! {
        #[test]
        fn what_is_chosen_follows_from_which_slots_are_free(
            slots in 1..300u32,
            changes in prop::collection::vec((any::<u32>(), 0..5u32, any::<bool>(), 1..80u32), 1..60),
        ) {
            let mut free = Free::new(slots);
            let mut flags = vec![true; slots as usize];
            for (index, level, flag, max_slots) in changes {
                let level = level.min(Block::root(slots).level);
                let block = Block { level, index: index % slots.div_ceil(1 << level) };
                free.set(block, flag);
                block.slots(slots).for_each(|slot| flags[slot as usize] = flag);
                let (chosen, whole) = plain(&flags, max_slots);
                prop_assert_eq!(free.choose(max_slots), chosen);
                prop_assert!(whole.iter().all(|block| free.contains(*block)));
            }
        }
    }

    #[test]
    fn the_largest_free_block_within_the_limit_comes_first() {
        assert_eq!(chosen("........", 8), Some(0..8));
        assert_eq!(chosen("........", 7), Some(0..4));
        assert_eq!(chosen("........", 1), Some(0..1));
        assert_eq!(chosen("x.......", 8), Some(4..8));
        assert_eq!(chosen("x...x...", 8), Some(2..4));
        assert_eq!(chosen("x.x.x.x.", 8), Some(1..2));
        assert_eq!(chosen("xxxxxxxx", 8), None);
    }

    #[test]
    fn blocks_are_aligned() {
        assert_eq!(chosen("x..x", 2), Some(1..2));
    }

    #[test]
    fn a_block_at_the_end_counts_the_slots_that_exist() {
        assert_eq!(chosen(".....", 5), Some(0..5));
        assert_eq!(chosen(".....", 1), Some(0..1));
        assert_eq!(chosen("xxxx...", 3), Some(4..7));
        assert_eq!(chosen("xxxx.", 1), Some(4..5));
        assert_eq!(chosen(".", 1), Some(0..1));
    }
}
