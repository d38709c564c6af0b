//! Phase B: fusion as priority cuts, after technology mapping of logic (Mishchenko, Cho,
//! Chatterjee, Brayton, "Combinational and sequential mapping with priority cuts", ICCAD 2007).
//! Values are visited operands first; the kernels of a value are its operations with the kept
//! kernels of their operands inside, and the few cheapest are kept. Pairwise fusion rules in the
//! e-graph would list all convex cuts of every diamond, which are exponentially many.

use std::collections::HashMap;

use rustc_hash::FxHashSet;

use super::attention;
use super::bodies::Places;
use super::choices::{ChoiceGraph, Kernel};
use super::kind::Kind;

/// Fused kernels kept for a value, of each kind: what may have a contraction inside and what may
/// have a map inside differs, so the cheapest of one kind must not push out the other; nor may
/// parts of a softmax push out the whole of it, which attention is made of.
const KEEP: usize = 4;
/// Fusions tried for a value in one visit.
const TRIES: usize = 64;
/// Visits of the values whose operands changed.
const SWEEPS: usize = 6;

/// For every value, its kernels: the kept fusions, cheapest first, then its single operations.
pub fn cuts(graph: &mut ChoiceGraph) -> Vec<Vec<Kernel>> {
    let count = graph.values.len();
    let mut kept: Vec<Vec<Kernel>> = vec![Vec::new(); count];
    // Area flow: what a value costs, with what it needs, shared by its users.
    let mut flow: Vec<f64> =
        graph.values.iter().map(|v| if v.free { 0.0 } else { f64::INFINITY }).collect();
    let users = users(graph);
    let mut dirty: Vec<bool> = graph.values.iter().map(|v| !v.free).collect();
    for _ in 0..SWEEPS {
        if !dirty.contains(&true) {
            break;
        }
        for at in 0..count {
            if !std::mem::replace(&mut dirty[at], false) {
                continue;
            }
            let (best, kernels) = visit(graph, &kept, &flow, at);
            let same = kernels == kept[at] && (best - flow[at]).abs() < 1e-9;
            (flow[at], kept[at]) = (best, kernels);
            if !same {
                users[at].iter().for_each(|&u| dirty[u as usize] = true);
            }
        }
    }
    kept
}

/// The values with an operation over each value.
fn users(graph: &ChoiceGraph) -> Vec<Vec<u32>> {
    let mut users: Vec<Vec<u32>> = vec![Vec::new(); graph.values.len()];
    for (at, value) in graph.values.iter().enumerate() {
        for &arg in value.operations.iter().flat_map(|k| &k.args) {
            if users[arg as usize].last() != Some(&(at as u32)) {
                users[arg as usize].push(at as u32);
            }
        }
    }
    users
}

/// The kernels of a value that are kept, and the flow of the best.
fn visit(
    graph: &mut ChoiceGraph,
    kept: &[Vec<Kernel>],
    flow: &[f64],
    at: usize,
) -> (f64, Vec<Kernel>) {
    let score = |graph: &mut ChoiceGraph, kernel: &Kernel| {
        // Of what is taken in parts, a part pays for itself; else users share alike.
        let parts = graph.bodies.parts(kernel.body);
        let share = |(&a, &part): (&u32, &f64)| {
            let users = graph.values[a as usize].users;
            flow[a as usize] * if part < 1.0 { part } else { 1.0 / users }
        };
        let operands: f64 = kernel.args.iter().zip(parts).map(share).sum();
        graph.us(kernel) + operands
    };
    let operations = graph.values[at].operations.clone();
    let mut found: Vec<(f64, Kernel)> = Vec::new();
    for kernel in &operations {
        found.push((score(graph, kernel), kernel.clone()));
    }
    let mut seen: FxHashSet<(u32, Places)> =
        operations.iter().map(|k| (k.body, k.args.clone())).collect();
    let mut tries = 0;
    let mut next = 0;
    while next < found.len() && tries < TRIES {
        let consumer = found[next].1.clone();
        next += 1;
        if consumer.alias {
            continue;
        }
        for (k, &arg) in consumer.args.iter().enumerate() {
            for producer in &kept[arg as usize] {
                tries += 1;
                if tries > TRIES || producer.args.contains(&(at as u32)) {
                    continue;
                }
                let Some(kernel) = fused(graph, &consumer, k, producer) else { continue };
                if !kernel.args.contains(&(at as u32))
                    && seen.insert((kernel.body, kernel.args.clone()))
                {
                    found.push((score(graph, &kernel), kernel));
                }
            }
        }
    }
    let best = found.iter().map(|f| f.0).fold(f64::INFINITY, f64::min);
    let mut kernels: Vec<(f64, Kernel)> = found.split_off(operations.len());
    kernels.retain(|k| k.0.is_finite());
    kernels.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    let mut room: HashMap<Kind, usize> = HashMap::new();
    let mut whole = false;
    kernels.retain(|k| {
        let softmax = attention::is_softmax(&graph.bodies.get(k.1.body).nodes);
        let first = softmax && !whole;
        whole |= softmax;
        let room = room.entry(graph.bodies.kind(k.1.body)).or_insert(KEEP);
        let fits = *room > 0 || first;
        *room = room.saturating_sub(1);
        fits
    });
    let kept = kernels.into_iter().map(|k| k.1).chain(operations);
    (best, kept.collect())
}

/// A kernel with its argument `at` computed inside by another, where the two have loops.
pub(super) fn fused(
    graph: &mut ChoiceGraph,
    consumer: &Kernel,
    at: usize,
    producer: &Kernel,
) -> Option<Kernel> {
    let of = (consumer.body, consumer.args.as_slice());
    let (body, args) = graph.bodies.fuse(of, at, (producer.body, &producer.args))?;
    let mut inside = consumer.inside.clone();
    for &value in &producer.inside {
        if !inside.contains(&value) {
            inside.push(value);
        }
    }
    Some(Kernel { body, args, inside, alias: false })
}
