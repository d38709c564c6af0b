//! Wrong rules are caught: each rule is harmed in every way that fits what it makes, and the check
//! that every form of a value is equal has to notice.

use std::panic::{AssertUnwindSafe, catch_unwind};

use egg::Id;
use kiln_runtime::tensor::DType;

use super::checks::{Random, check_classes, inputs_of};
use super::lang::{ENode, Egg, build};
use super::table::{RULES, Rule, add, saturate_by, shape};
use super::{Budget, fuse};
use crate::graph::op::{BinaryFn, Op, ReduceFn, UnaryFn};

/// Makes another operation of one.
type Harm = fn(&mut Egg, &ENode) -> Option<Id>;

const HARMS: [(&str, Harm); 5] = [
    ("forgets an operation", forget),
    ("swaps operands", swap),
    ("takes another function", confuse),
    ("mixes up axes", mix),
    ("is off by one", shift),
];
/// How far below its result a rule is harmed.
const DEPTHS: usize = 3;
/// Graphs that rules are tried on, and how many of them for one wrong rule.
const GRAPHS: u64 = 400;
const TRIES: usize = 60;

fn forget(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let class = egraph.lookup(node.clone())?;
    let same = |arg: &Id| egraph[*arg].data.ty == egraph[class].data.ty;
    node.args.iter().copied().find(same)
}

fn swap(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    use BinaryFn::{Add, And, Eq, Max, Min, Mul, Ne, Or, Xor};
    let commutes = |f: BinaryFn| matches!(f, Add | Mul | Max | Min | Eq | Ne | And | Or | Xor);
    match node.op {
        Op::Binary(f) if commutes(f) => return None,
        Op::Binary(_) | Op::Concat(_) | Op::Contract(_) => {}
        _ => return None,
    }
    let (first, last) = (*node.args.first()?, *node.args.last()?);
    if first == last || egraph[first].data.ty != egraph[last].data.ty {
        return None;
    }
    let args: Vec<Id> = node.args.iter().rev().copied().collect();
    Some(add(egraph, node.op.clone(), &args))
}

fn confuse(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let op = match &node.op {
        Op::Binary(BinaryFn::Add) => Op::Binary(BinaryFn::Sub),
        Op::Binary(BinaryFn::Sub) => Op::Binary(BinaryFn::Add),
        Op::Binary(BinaryFn::Mul) => Op::Binary(BinaryFn::Add),
        Op::Binary(BinaryFn::Max) => Op::Binary(BinaryFn::Min),
        Op::Binary(BinaryFn::Min) => Op::Binary(BinaryFn::Max),
        Op::Unary(UnaryFn::Neg) => Op::Unary(UnaryFn::Abs),
        Op::Unary(UnaryFn::Abs) => Op::Unary(UnaryFn::Neg),
        Op::Reduce(ReduceFn::Sum, axes) => Op::Reduce(ReduceFn::Max, axes.clone()),
        Op::Reduce(ReduceFn::Max, axes) => Op::Reduce(ReduceFn::Min, axes.clone()),
        _ => return None,
    };
    Some(add(egraph, op, &node.args))
}

/// Two axes that are longer than 1 and equal among these extents.
fn twins(extents: &[usize]) -> Option<(usize, usize)> {
    let pairs = (0..extents.len()).flat_map(|i| (i + 1..extents.len()).map(move |j| (i, j)));
    pairs.into_iter().find(|&(i, j)| extents[i] == extents[j] && extents[i] > 1)
}

fn mix(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    match &node.op {
        Op::Permute(axes) => {
            let class = egraph.lookup(node.clone())?;
            let (i, j) = twins(&shape(egraph, class))?;
            let mut axes = axes.clone();
            axes.swap(i, j);
            Some(add(egraph, Op::Permute(axes), &node.args))
        }
        // The elements in another order.
        Op::Reshape(to) => {
            let from = shape(egraph, node.args[0]);
            let long: Vec<usize> = (0..from.len()).filter(|&axis| from[axis] > 1).collect();
            let &[.., i, j] = &long[..] else { return None };
            let mut axes: Vec<u8> = (0..from.len() as u8).collect();
            axes.swap(i, j);
            let turned = add(egraph, Op::Permute(axes.into_iter().collect()), &node.args);
            Some(add(egraph, Op::Reshape(to.clone()), &[turned]))
        }
        // One operand is read along another axis.
        Op::Contract(contract) => {
            let mut wrong = contract.clone();
            let extents: Vec<usize> = wrong.maps[0]
                .iter()
                .map(|index| index.as_axis().map_or(1, |axis| contract.extents[axis]))
                .collect();
            let (i, j) = twins(&extents)?;
            wrong.maps[0].swap(i, j);
            Some(add(egraph, Op::Contract(wrong), &node.args))
        }
        _ => None,
    }
}

fn shift(egraph: &mut Egg, node: &ENode) -> Option<Id> {
    let op = match &node.op {
        Op::Slice(ranges) => {
            let from = shape(egraph, node.args[0]);
            let mut ranges = ranges.clone();
            let free = ranges.iter().zip(&from).position(|(r, &e)| r.1 == 1 && r.2 < e)?;
            let (start, _, extent) = ranges[free];
            let fits = start as usize + extent < from[free];
            ranges[free].0 = if fits { start + 1 } else { start - 1 };
            Op::Slice(ranges)
        }
        Op::Pad(borders) => {
            let mut borders = borders.clone();
            let uneven = borders.iter().position(|b| b.0 != b.1)?;
            borders[uneven] = (borders[uneven].1, borders[uneven].0);
            Op::Pad(borders)
        }
        // The last element of a sum is forgotten.
        Op::Contract(contract) => {
            let mut wrong = contract.clone();
            let axis = (wrong.n_out..wrong.extents.len()).find(|&a| wrong.extents[a] > 1)?;
            wrong.extents[axis] -= 1;
            Op::Contract(wrong)
        }
        _ => return None,
    };
    Some(add(egraph, op, &node.args))
}

/// The class with a node that lies so deep below it harmed.
fn harmed(egraph: &mut Egg, class: Id, harm: Harm, depth: usize) -> Option<Id> {
    let node = egraph[class].nodes.first()?.clone();
    let ty = egraph[class].data.ty.clone();
    let wrong = match depth {
        0 => harm(egraph, &node),
        _ => (0..node.args.len()).find_map(|k| {
            let other = harmed(egraph, node.args[k], harm, depth - 1)?;
            let mut args = node.args.clone();
            args[k] = other;
            Some(add(egraph, node.op.clone(), &args))
        }),
    }?;
    (egraph[wrong].data.ty == ty && egraph.find(wrong) != egraph.find(class)).then_some(wrong)
}

/// Saturates a random graph with rules applied so, and looks at every form of every value.
fn check(seed: u64, apply: &dyn Fn(&Rule, &mut Egg, &ENode) -> Option<Id>) -> Result<(), String> {
    let graph = Random::new(seed, DType::F64).finish();
    let plain = fuse::expand(&graph).expect("definitions are typed");
    let mut saturated = build(&plain);
    saturated.egraph.analysis.dots.whole = seed % 2 == 1;
    saturate_by(apply, &mut saturated.egraph, Budget { rounds: 5, nodes: 600 });
    check_classes(&saturated, &inputs_of(&plain)).map(drop)
}

#[test]
fn wrong_rules_are_caught() {
    let mut fires: Vec<Vec<u64>> = vec![Vec::new(); RULES.len()];
    for seed in 1..=GRAPHS {
        let seen = std::cell::RefCell::new(vec![false; RULES.len()]);
        let noted = check(seed, &|rule, egraph, node| {
            let equal = (rule.apply)(egraph, node)?;
            let at = RULES.iter().position(|r| r.name == rule.name)?;
            seen.borrow_mut()[at] = true;
            Some(equal)
        });
        assert_eq!(noted, Ok(()), "the rules as they are");
        fires.iter_mut().zip(seen.into_inner()).filter(|f| f.1).for_each(|f| f.0.push(seed));
    }
    // A wrong rule may break what other rules rely on, loudly.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let (mut caught, mut missed) = (0, Vec::new());
    for (rule, seeds) in RULES.iter().zip(&fires) {
        for ((harm_name, harm), depth) in
            HARMS.iter().flat_map(|harm| (0..DEPTHS).map(move |depth| (harm, depth)))
        {
            let applied = std::cell::Cell::new(0usize);
            let wrong = |other: &Rule, egraph: &mut Egg, node: &ENode| {
                let equal = (other.apply)(egraph, node)?;
                if other.name != rule.name {
                    return Some(equal);
                }
                let wrong = harmed(egraph, equal, *harm, depth);
                applied.set(applied.get() + usize::from(wrong.is_some()));
                wrong.or(Some(equal))
            };
            let fails = |seed: &u64| {
                catch_unwind(AssertUnwindSafe(|| check(*seed, &wrong))).map_or(true, |r| r.is_err())
            };
            let found = seeds.iter().take(TRIES).any(fails);
            match (found, applied.get()) {
                (true, _) => caught += 1,
                (false, 0) => {}
                (false, times) => missed.push((rule.name, *harm_name, depth, times)),
            }
        }
    }
    std::panic::set_hook(hook);
    println!("{caught} wrong rules are caught, {} are not: {missed:#?}", missed.len());
    assert!(caught >= 20 && missed.len() * 20 <= caught, "{caught} caught, missed: {missed:#?}");
}
