//! The thread that adds up the vectors of blocks that were lent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use lockstep_model::compression::Rounding;
use lockstep_model::tree::{Block, TreeSum};

use super::{BlockSum, Reply};
use crate::exchange::Spare;

/// What it is asked to do, in order.
pub(super) enum Job {
    /// A block of so many slots was lent.
    Begin { lease: u64, block: Block, slots: u32, rounding: Rounding },
    /// Part of it counts.
    Add { lease: u64, part: Block, vector: Vec<f32> },
    /// All of it does: `sum` is complete with its gradient.
    Finish { lease: u64, sum: Box<BlockSum>, since: Instant, reply: Reply },
    /// It is not wanted any more.
    Drop { lease: u64 },
}

/// A block, as far as it has come.
struct Adding {
    block: Block,
    rounding: Rounding,
    sum: TreeSum<Vec<f32>>,
}

/// Does jobs until there are none. Vectors that were added go to `spare`.
pub(super) fn run(jobs: Receiver<Job>, spare: &Arc<Spare>) {
    let mut blocks: BTreeMap<u64, Adding> = BTreeMap::new();
    for job in jobs {
        match job {
            Job::Begin { lease, block, slots, rounding } => {
                blocks.insert(lease, Adding { block, rounding, sum: TreeSum::new(slots) });
            }
            Job::Add { lease, part, vector } => {
                let Some(Adding { block, rounding, sum }) = blocks.get_mut(&lease) else { continue };
                let inserted = sum.insert(part.within(*block), vector, |left, right, node| {
                    let sum = rounding.add(left, &right, node.inside(*block));
                    spare.give_back(right);
                    sum
                });
                debug_assert!(inserted.is_ok(), "the engine accepts every slot of a block once");
            }
            Job::Finish { lease, sum, since, reply } => {
                let gradient = blocks.remove(&lease).and_then(|adding| adding.sum.into_root());
                // Whoever asked may be gone.
                let _ = reply.send(match gradient {
                    Some(gradient) => Ok(BlockSum { gradient: Some(gradient), compute: since.elapsed(), ..*sum }),
                    None => Err("the sum of the block is incomplete".into()),
                });
            }
            Job::Drop { lease } => drop(blocks.remove(&lease)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lockstep_model::batch::Sums;
    use lockstep_model::compression::GradientFormat;
    use tokio::sync::oneshot;

    use super::*;

    /// What is added, and rounded, within a block is what would be in the whole tree.
    #[test]
    fn a_block_is_added_as_the_tree_has_it() {
        for format in [GradientFormat::F32, GradientFormat::Bf16, GradientFormat::Int8] {
            let rounding = Rounding { format, seed: 3, step: 5 };
            let leaf = |slot: u32| {
                let mut vector: Vec<f32> = (0..300).map(|e| ((e * 37 + slot * 101) % 91) as f32 / 7.0 - 6.0).collect();
                rounding.round(Block::leaf(slot), &mut vector);
                vector
            };
            // The second half of a tree of fifteen slots, of which the last is missing.
            let block = Block { level: 3, index: 1 };
            let mut whole = TreeSum::new(15);
            for slot in 8..15 {
                whole.insert(Block::leaf(slot), leaf(slot), |l, r, node| rounding.add(l, &r, node)).unwrap();
            }
            let expected = {
                let zero = vec![0.0; 300];
                whole.insert(Block { level: 3, index: 0 }, zero, |_, right, _| right).unwrap();
                whole.into_root().unwrap()
            };
            let (jobs, queue) = std::sync::mpsc::channel();
            let (reply, mut answer) = oneshot::channel();
            jobs.send(Job::Begin { lease: 1, block, slots: 7, rounding }).unwrap();
            let pair = rounding.add(leaf(10), &leaf(11), Block { level: 1, index: 5 });
            let parts = [(Block { level: 1, index: 5 }, pair)].into_iter();
            for (part, vector) in parts.chain([14, 8, 13, 12, 9].map(|slot| (Block::leaf(slot), leaf(slot)))) {
                jobs.send(Job::Add { lease: 1, part, vector }).unwrap();
            }
            let sum = BlockSum {
                sums: Sums::default(),
                slot_sums: Vec::new(),
                gradient: None,
                row_values: Vec::new(),
                batch_sha256: [0; 32],
                compute: Duration::ZERO,
            };
            jobs.send(Job::Finish { lease: 1, sum: Box::new(sum), since: Instant::now(), reply }).unwrap();
            drop(jobs);
            run(queue, &Arc::default());
            assert_eq!(answer.try_recv().unwrap().unwrap().gradient, Some(expected), "{format:?}");
        }
    }
}
