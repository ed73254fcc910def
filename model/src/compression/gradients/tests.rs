use proptest::prelude::*;

use super::*;
use crate::pieces::l2_norm;

const FORMATS: [GradientFormat; 2] = [GradientFormat::Bf16, GradientFormat::Int8];
const NODE: Block = Block { level: 2, index: 3 };

fn rounding(format: GradientFormat) -> Rounding {
    Rounding { format, seed: 1, step: 7 }
}

fn bits(vector: &[f32]) -> Vec<u32> {
    vector.iter().map(|value| value.to_bits()).collect()
}

/// Numbers of many magnitudes, as gradients are.
fn gradient(elements: usize, seed: u64) -> Vec<f32> {
    let mut vector = vec![0.0; elements];
    crate::random::normal(seed, Stream::Initialisation, 0, 1.0, &mut vector);
    let magnitude = |i: usize| 2f32.powi((i / 100 % 37) as i32 - 20);
    vector.iter_mut().enumerate().for_each(|(i, value)| *value *= magnitude(i));
    vector
}

/// What is written is read back to the bit, in parts of whole units too.
fn survives(format: GradientFormat, rounded: &[f32]) {
    let bytes = format.encode(rounded);
    assert_eq!(bytes.len(), format.bytes(rounded.len()));
    let (mut back, mut in_parts) = (Vec::new(), Vec::new());
    format.decode(&bytes, &mut back);
    bytes.chunks(3 * format.unit_bytes()).for_each(|part| format.decode(part, &mut in_parts));
    assert_eq!(bits(&back), bits(rounded), "{format:?}");
    assert_eq!(bits(&in_parts), bits(rounded), "{format:?}, in parts");
}

proptest! {
    #[test]
    fn any_vector_is_written_and_rounded_again_as_it_was_rounded(
        any in prop::collection::vec(any::<u32>(), 0..900),
        near in prop::collection::vec(-1e3f32..1e3, 0..900),
        step in any::<u64>(),
    ) {
        let any: Vec<f32> = any.into_iter().map(f32::from_bits).collect();
        let finite: Vec<f32> = any.iter().copied().filter(|value| value.is_finite()).collect();
        for format in FORMATS {
            let rounding = Rounding { format, seed: 5, step };
            for vector in [&any, &finite, &near] {
                let mut rounded = vector.clone();
                rounding.round(NODE, &mut rounded);
                survives(format, &rounded);
                let mut again = rounded.clone();
                Rounding { step: step ^ 1, ..rounding }.round(Block::leaf(0), &mut again);
                prop_assert_eq!(bits(&again), bits(&rounded));
                let is_finite = |vector: &[f32]| vector.iter().all(|value| value.is_finite());
                prop_assert_eq!(is_finite(&rounded), is_finite(vector), "{:?}", format);
            }
        }
        survives(GradientFormat::F32, &any);
    }

    /// A step's gradient, cut into blocks anywhere: each is summed by itself, written, read, and added above.
    #[test]
    fn where_the_tree_is_cut_does_not_show(
        slots in 1u32..12,
        coins in prop::collection::vec(any::<bool>(), 100),
        seed in 0u64..1000,
    ) {
        for format in FORMATS {
            let rounding = Rounding { format, seed, step: 3 };
            let leaf = |slot: u32| {
                let mut gradient = gradient(600, seed + u64::from(slot));
                rounding.round(Block::leaf(slot), &mut gradient);
                gradient
            };
            let root = Block::root(slots);
            let whole = node(rounding, root, slots, &leaf);
            let (mut blocks, mut coins) = (Vec::new(), coins.iter().copied());
            cut(root, slots, &mut coins, &mut blocks);
            blocks.reverse();
            let mut sum = crate::tree::TreeSum::new(slots);
            for block in blocks {
                let covered = block.slots(slots);
                let leaves = covered.clone().map(|slot| Ok::<_, ()>(leaf(slot)));
                let leaves = leaves.collect::<Vec<_>>().into_iter();
                // As a worker does, by the leases' own slots alone.
                let of_block = crate::tree::sum_leaves(leaves, |left, right, node| {
                    rounding.add(left, &right, Block { index: node.index + (covered.start >> node.level), ..node })
                });
                let mut travelled = Vec::new();
                format.decode(&format.encode(&of_block.unwrap().unwrap()), &mut travelled);
                sum.insert(block, travelled, |left, right, node| rounding.add(left, &right, node)).unwrap();
            }
            prop_assert_eq!(bits(&sum.into_root().unwrap()), bits(&whole), "{:?}", format);
        }
    }
}

/// The definition: a node's gradient is that of its children, added and rounded, or the left one's.
fn node(rounding: Rounding, block: Block, slots: u32, leaf: &impl Fn(u32) -> Vec<f32>) -> Vec<f32> {
    let Some([left, right]) = block.children() else { return leaf(block.index) };
    let left = node(rounding, left, slots, leaf);
    if !right.exists(slots) {
        return left;
    }
    let right = node(rounding, right, slots, leaf);
    let mut sum: Vec<f32> = left.iter().zip(&right).map(|(left, right)| left + right).collect();
    rounding.round(block, &mut sum);
    sum
}

/// Cuts the tree at random into blocks that cover it once.
fn cut(block: Block, slots: u32, coins: &mut impl Iterator<Item = bool>, blocks: &mut Vec<Block>) {
    match block.children() {
        _ if !block.exists(slots) => {}
        Some(children) if coins.next() == Some(true) => {
            children.into_iter().for_each(|child| cut(child, slots, coins, blocks));
        }
        _ => blocks.push(block),
    }
}

/// The mean over many steps' draws is within five standard errors of what was rounded, and each result is a neighbour.
#[test]
fn rounding_is_unbiased() {
    const STEPS: u64 = 4000;
    let mut vector = vec![100.0, -100.3];
    vector.extend((1..200).map(|i| (i as f32 * 0.71).sin() * 2f32.powi(-(i / 20))));
    for format in FORMATS {
        // How far neighbours are apart (the scale is 1 for numbers up to 127), and which share of that is cut off.
        let neighbours = |value: f32| match format {
            GradientFormat::Int8 => (1.0, f64::from(value) - f64::from(value).floor()),
            _ => {
                let power = f64::from(f32::from_bits(value.to_bits() & EXPONENT));
                (power / 128.0, f64::from(value.to_bits() & !UPPER) / 65_536.0)
            }
        };
        let mut sums = vec![0f64; vector.len()];
        for step in 0..STEPS {
            let mut rounded = vector.clone();
            Rounding { format, seed: 11, step }.round(NODE, &mut rounded);
            for ((sum, rounded), exact) in sums.iter_mut().zip(rounded).zip(&vector) {
                let error = f64::from(rounded) - f64::from(*exact);
                assert!(error.abs() < neighbours(*exact).0, "{format:?}: {exact} became {rounded}");
                *sum += error;
            }
        }
        for (sum, exact) in sums.iter().zip(&vector) {
            let (apart, cut) = neighbours(*exact);
            let standard_error = apart * (cut * (1.0 - cut) / STEPS as f64).sqrt();
            let mean = sum / STEPS as f64;
            let bound = 5.0 * standard_error + apart / 65_536.0;
            assert!(
                mean.abs() < bound,
                "{format:?}: {exact} is off by {mean:e} on average, {standard_error:e} usually"
            );
        }
    }
}

#[test]
fn seed_step_node_and_element_decide_and_nothing_else() {
    let vector = gradient(PIECE_ELEMENTS + 1234, 1);
    for format in FORMATS {
        let rounded = |rounding: Rounding, node: Block, vector: &[f32]| {
            let mut vector = vector.to_vec();
            rounding.round(node, &mut vector);
            bits(&vector)
        };
        let rounding = rounding(format);
        let first = rounded(rounding, NODE, &vector);
        let others = [
            rounded(Rounding { seed: 2, ..rounding }, NODE, &vector),
            rounded(Rounding { step: 8, ..rounding }, NODE, &vector),
            rounded(rounding, Block { level: 1, ..NODE }, &vector),
            rounded(rounding, Block { index: 2, ..NODE }, &vector),
        ];
        assert!(others.iter().all(|other| *other != first));
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one_thread.install(|| rounded(rounding, NODE, &vector)), first);
        assert_eq!(rounded(rounding, NODE, &vector[..512]), first[..512]);

        // And adding is adding, then rounding.
        let other = gradient(vector.len(), 2);
        let sum: Vec<f32> = vector.iter().zip(&other).map(|(a, b)| a + b).collect();
        assert_eq!(bits(&rounding.add(vector.clone(), &other, NODE)), rounded(rounding, NODE, &sum));
    }
    let mut same = vector.clone();
    rounding(GradientFormat::F32).round(NODE, &mut same);
    assert_eq!(bits(&same), bits(&vector));
}

#[test]
fn what_is_not_finite_is_seen_to_be_so() {
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7F80_0001), f32::from_bits(u32::MAX)] {
        for format in FORMATS {
            let mut vector = gradient(1000, 3);
            vector[300] = wrong;
            rounding(format).round(NODE, &mut vector);
            assert!(!vector[300].is_finite() && !l2_norm(&vector).is_finite());
            let spoilt = if format == GradientFormat::Int8 { 256..512 } else { 300..301 };
            assert!(vector.iter().enumerate().all(|(i, value)| value.is_finite() != spoilt.contains(&i)));
        }
    }
    let mut large = [f32::MAX, -f32::MAX];
    rounding(GradientFormat::Bf16).round(NODE, &mut large);
    let largest = f32::from_bits(0x7F7F_0000);
    assert_eq!(large, [largest, -largest]);
}

/// The same on every machine, and what the contract gives as examples.
#[test]
fn the_bits_are_pinned() {
    let mut vector = vec![1.0f32, 1.001, -0.3, 1e-4, 0.017, -2.5, 0.0, 3e-3, 0.77];
    vector.extend((0..300).map(|i| (i as f32 - 150.0) / 64.0));
    for (format, expected) in [
        (
            GradientFormat::Bf16,
            expect_test::expect![
                "[1.0, 1.0, -0.29882813, 0.0001001358, 0.016967773, -2.5, 0.0, 0.0029907227, 0.76953125] dd6c6ae4d84626b4"
            ],
        ),
        (
            GradientFormat::Int8,
            expect_test::expect!["[1.0, 1.0, -0.3125, 0.0, 0.0, -2.5, 0.0, 0.0, 0.78125] 4178af9bed1c0e5b"],
        ),
    ] {
        let mut rounded = vector.clone();
        rounding(format).round(NODE, &mut rounded);
        let digest = crate::digest::hex(&crate::digest::vector_sha256(&rounded));
        expected.assert_eq(&format!("{:?} {}", &rounded[..9], &digest[..16]));
    }
}
