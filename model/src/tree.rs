//! The one order in which a step's slots are added up, whoever computed them.
//!
//! Slots are the leaves of a binary tree that spans the next power of two. A [`Block`] is a node of it: an aligned run of
//! slots. A node's sum is its left child's plus its right child's; where the right child covers no slot, the left one
//! passes through unchanged. Floating-point addition is not associative, so a fixed tree is what makes a step's gradient
//! independent of how its slots were spread over workers.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// One node of the tree: the slots from `index * 2^level` to `(index + 1) * 2^level - 1`, as far as they exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Block {
    /// Height above the leaves; 0 is a single slot.
    pub level: u32,
    /// Position among the nodes of its level.
    pub index: u32,
}

impl Block {
    /// The leaf of one slot.
    pub fn leaf(slot: u32) -> Self {
        Self { level: 0, index: slot }
    }

    /// The node of `level` that covers `slot`.
    pub fn above(slot: u32, level: u32) -> Self {
        Self { level, index: slot >> level }
    }

    /// The node that covers all of `slots` slots.
    pub fn root(slots: u32) -> Self {
        Self { level: slots.max(1).next_power_of_two().trailing_zeros(), index: 0 }
    }

    /// The existing slots that this block covers in a step of `slots` slots; empty where there are none.
    pub fn slots(self, slots: u32) -> Range<u32> {
        let start = (u64::from(self.index) << self.level).min(u64::from(slots));
        let end = ((u64::from(self.index) + 1) << self.level).min(u64::from(slots));
        start as u32..end as u32
    }

    /// Whether this block is a node of the tree over `slots` slots that covers at least one of them.
    pub fn exists(self, slots: u32) -> bool {
        self.level <= Self::root(slots).level && !self.slots(slots).is_empty()
    }

    /// The node one level up.
    pub fn parent(self) -> Self {
        Self { level: self.level + 1, index: self.index / 2 }
    }

    /// The other child of the parent.
    pub fn sibling(self) -> Self {
        Self { level: self.level, index: self.index ^ 1 }
    }

    /// Left and right child; `None` for a leaf.
    pub fn children(self) -> Option<[Self; 2]> {
        let level = self.level.checked_sub(1)?;
        Some([0, 1].map(|side| Self { level, index: self.index * 2 + side }))
    }

    /// This block among those of `outer`, which holds it: as if the first slot there were 0.
    pub fn within(self, outer: Self) -> Self {
        Self { level: self.level, index: self.index - (outer.index << (outer.level - self.level)) }
    }

    /// The reverse of [`Self::within`].
    pub fn inside(self, outer: Self) -> Self {
        Self { level: self.level, index: self.index + (outer.index << (outer.level - self.level)) }
    }

    /// Whether `other` lies within this block.
    pub fn contains(self, other: Self) -> bool {
        other.level <= self.level && u64::from(other.index) >> (self.level - other.level) == u64::from(self.index)
    }
}

impl std::fmt::Display for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.level, self.index)
    }
}

/// Adds up the blocks of one step as they come, in any order, to the same result.
#[derive(Clone, Debug)]
pub struct TreeSum<T> {
    /// Of each slot, whether it is counted.
    counted: Vec<bool>,
    /// Sums of nodes whose sibling is still missing.
    waiting: BTreeMap<Block, T>,
}

impl<T> TreeSum<T> {
    /// An empty sum over `slots` slots (at least 1).
    pub fn new(slots: u32) -> Self {
        Self { counted: vec![false; slots.max(1) as usize], waiting: BTreeMap::new() }
    }

    /// Adds one block, whose slots must not be counted yet, and merges it upwards as far as siblings are there.
    /// `add(left, right, node)` adds the right operand to the left one, which makes the sum of `node`.
    ///
    /// # Errors
    /// Gives the value back if the block is no node of this tree or overlaps one already counted.
    pub fn insert(&mut self, block: Block, value: T, mut add: impl FnMut(T, T, Block) -> T) -> Result<(), T> {
        let slots = self.slots();
        if !block.exists(slots) {
            return Err(value);
        }
        let covered = block.slots(slots);
        let covered = &mut self.counted[covered.start as usize..covered.end as usize];
        if covered.contains(&true) {
            return Err(value);
        }
        covered.fill(true);
        let root = Block::root(slots);
        let (mut block, mut value) = (block, value);
        while block != root {
            let sibling = block.sibling();
            if sibling.exists(slots) {
                let Some(other) = self.waiting.remove(&sibling) else { break };
                let (left, right) = if block.index < sibling.index { (value, other) } else { (other, value) };
                value = add(left, right, block.parent());
            }
            block = block.parent();
        }
        self.waiting.insert(block, value);
        Ok(())
    }

    /// Whether every slot is counted.
    pub fn is_complete(&self) -> bool {
        self.waiting.contains_key(&Block::root(self.slots()))
    }

    /// The sum over all slots, if every one is counted.
    pub fn into_root(mut self) -> Option<T> {
        self.waiting.remove(&Block::root(self.slots()))
    }

    fn slots(&self) -> u32 {
        self.counted.len() as u32
    }
}

/// The sum of consecutive slots, given in order, along the tree; `None` of none. Blocks being aligned, it is that of any
/// block that consists of so many slots. `add` is that of [`TreeSum::insert`], with nodes as if the first slot were 0.
///
/// # Errors
/// The first among `leaves`.
pub fn sum_leaves<T, E>(
    leaves: impl ExactSizeIterator<Item = Result<T, E>>,
    mut add: impl FnMut(T, T, Block) -> T,
) -> Result<Option<T>, E> {
    let mut sum = TreeSum::new(leaves.len() as u32);
    for (slot, leaf) in (0..).zip(leaves) {
        let inserted = sum.insert(Block::leaf(slot), leaf?, &mut add);
        assert!(inserted.is_ok(), "each slot is counted once");
    }
    Ok(sum.into_root())
}

/// Adds `right` to `left`, element by element.
///
/// # Panics
/// If the vectors differ in length, which the layout rules out.
pub fn add_vectors(mut left: Vec<f32>, right: &[f32]) -> Vec<f32> {
    assert_eq!(left.len(), right.len(), "gradient vectors of one layout have one length");
    for (l, r) in left.iter_mut().zip(right) {
        *l += r;
    }
    left
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The tree's sum, by recursion over its definition.
    fn plain(slots: &[f32], block: Block) -> f32 {
        let n = slots.len() as u32;
        let Some([left, right]) = block.children() else { return slots[block.index as usize] };
        if right.exists(n) { plain(slots, left) + plain(slots, right) } else { plain(slots, left) }
    }

    /// Cuts the tree at random into blocks that cover it once.
    fn partition(block: Block, slots: u32, coins: &mut impl Iterator<Item = bool>, out: &mut Vec<Block>) {
        if !block.exists(slots) {
            return;
        }
        match block.children() {
            Some(children) if coins.next() == Some(true) => {
                children.into_iter().for_each(|child| partition(child, slots, coins, out));
            }
            _ => out.push(block),
        }
    }

    proptest! {
        #[test]
        fn any_partition_in_any_order_gives_the_same_bits(
            values in prop::collection::vec(-1e6f32..1e6, 1..40),
            coins in prop::collection::vec(any::<bool>(), 100),
            order in any::<u64>(),
        ) {
            let slots = values.len() as u32;
            let root = Block::root(slots);
            let mut blocks = Vec::new();
            partition(root, slots, &mut coins.into_iter(), &mut blocks);
            blocks.sort_by_key(|b| (u64::from(b.index) + 1).wrapping_mul(order | 1).rotate_left(b.level));

            let mut sum = TreeSum::new(slots);
            for block in blocks {
                prop_assert!(!sum.is_complete());
                sum.insert(block, plain(&values, block), |a, b, _| a + b).unwrap();
            }
            prop_assert_eq!(sum.into_root().unwrap().to_bits(), plain(&values, root).to_bits());
        }
    }

    #[test]
    fn a_slot_is_counted_once() {
        let mut sum = TreeSum::new(4);
        let add = |a: u32, b: u32, _: Block| a + b;
        sum.insert(Block::leaf(1), 2, add).unwrap();
        assert_eq!(sum.insert(Block::leaf(1), 9, add), Err(9));
        assert_eq!(sum.insert(Block { level: 1, index: 0 }, 9, add), Err(9));
        sum.insert(Block::leaf(0), 1, add).unwrap();
        assert_eq!(sum.insert(Block::leaf(0), 9, add), Err(9));
        sum.insert(Block { level: 1, index: 1 }, 7, add).unwrap();
        assert_eq!(sum.insert(Block::root(4), 9, add), Err(9));
        assert_eq!(sum.into_root(), Some(10));
    }

    #[test]
    fn a_block_has_a_number_within_another() {
        let outer = Block { level: 3, index: 5 };
        for block in (40..48).map(Block::leaf).chain([Block { level: 2, index: 11 }, outer]) {
            let within = block.within(outer);
            assert_eq!(within.slots(u32::MAX), block.slots(48).start - 40..block.slots(48).end - 40);
            assert_eq!(within.inside(outer), block);
        }
    }

    #[test]
    fn blocks_outside_the_tree_are_refused() {
        let mut sum = TreeSum::new(3);
        assert!(sum.insert(Block::leaf(3), 0, |a, b, _| a + b).is_err());
        assert!(sum.insert(Block { level: 3, index: 0 }, 0, |a, b, _| a + b).is_err());
        assert_eq!(Block { level: 1, index: 1 }.slots(3), 2..3);
        assert_eq!(Block::root(1), Block::leaf(0));
    }
}
