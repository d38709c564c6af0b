//! Chains of instructions side by side. A processor looks some 60 instructions ahead: where each
//! waits for the one before, as in a polynomial, it starts the next chain too late by itself.

use std::collections::{HashMap, HashSet};

use regalloc2::{OperandKind, RegClass, VReg};

use super::ssa::Step;

/// Steps of a chain from which on it is worth while.
const FEWEST: usize = 10;

fn defined(step: &Step) -> impl Iterator<Item = VReg> + '_ {
    step.operands.iter().filter(|o| o.kind() == OperandKind::Def).map(|o| o.vreg())
}

fn used(step: &Step) -> impl Iterator<Item = VReg> + '_ {
    step.operands.iter().filter(|o| o.kind() == OperandKind::Use).map(|o| o.vreg())
}

/// How many of these chains vector registers can hold at the same time, and at least 1.
pub fn width(copies: &[&[Step]], registers: usize) -> usize {
    if copies.iter().any(|copy| copy.len() < FEWEST) {
        return 1;
    }
    let vector = |r: &VReg| r.class() == RegClass::Float;
    let made: HashSet<VReg> = copies.iter().flat_map(|c| c.iter()).flat_map(defined).collect();
    let given: HashSet<VReg> =
        copies.iter().flat_map(|c| c.iter()).flat_map(used).filter(vector).collect();
    let given = given.difference(&made).count();
    let most = copies.iter().map(|copy| most_alive(copy)).max().unwrap_or(0);
    (registers.saturating_sub(given) / most.max(1)).clamp(1, copies.len())
}

/// Vector registers that are made in a chain and used later in it, at most.
fn most_alive(copy: &[Step]) -> usize {
    let mut last: HashMap<VReg, usize> = HashMap::new();
    for (at, step) in copy.iter().enumerate() {
        used(step).for_each(|r| _ = last.insert(r, at));
    }
    let (mut alive, mut most): (Vec<VReg>, usize) = (Vec::new(), 0);
    for (at, step) in copy.iter().enumerate() {
        alive.extend(defined(step).filter(|r| r.class() == RegClass::Float));
        most = most.max(alive.len());
        alive.retain(|r| last.get(r).is_some_and(|&last| last > at));
    }
    most
}

/// The steps of these chains in turns, one of each; one that needs what another chain has yet to
/// make waits for it.
pub fn in_turns(copies: &[&[Step]]) -> Vec<Step> {
    let mut waiting: HashSet<VReg> =
        copies.iter().flat_map(|copy| copy.iter()).flat_map(defined).collect();
    let mut next = vec![0; copies.len()];
    let mut order = Vec::new();
    let all = copies.iter().map(|copy| copy.len()).sum();
    while order.len() < all {
        for (copy, at) in copies.iter().zip(&mut next) {
            let Some(step) = copy.get(*at) else { continue };
            if used(step).any(|r| waiting.contains(&r)) {
                continue;
            }
            defined(step).for_each(|r| _ = waiting.remove(&r));
            order.push(step.clone());
            *at += 1;
        }
    }
    order
}
