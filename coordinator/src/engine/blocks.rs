//! Which block of the tree an idle worker gets.

use lockstep_model::tree::Block;

/// The free block with the most slots, at most `max_slots` of them, and among equals the first. `free` says of each
/// slot whether it may be leased; a block is free if all its slots are. Takes time in proportion to the slots.
pub(super) fn choose(free: &[bool], max_slots: u32) -> Option<Block> {
    let slots = free.len() as u32;
    let size = |block: Block| block.slots(slots).len();
    let mut chosen: Option<Block> = None;
    let mut nodes = free.to_vec();
    for level in 0..=Block::root(slots).level {
        let mut blocks = (0..).map(|index| Block { level, index }).zip(&nodes);
        let first = blocks.find(|(block, free)| **free && size(*block) <= max_slots as usize);
        if let Some((block, _)) = first
            && chosen.is_none_or(|smaller| size(smaller) < size(block))
        {
            chosen = Some(block);
        }
        nodes = nodes.chunks(2).map(|children| children.iter().all(|free| *free)).collect();
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slots as characters: `.` is free. Returns the slots of the chosen block.
    fn chosen(slots: &str, max_slots: u32) -> Option<std::ops::Range<u32>> {
        let free: Vec<bool> = slots.chars().map(|slot| slot == '.').collect();
        choose(&free, max_slots).map(|block| block.slots(free.len() as u32))
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
