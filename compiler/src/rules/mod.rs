//! The optimiser: an e-graph finds equal forms of a graph, the cheapest is taken and fused.

mod algebra;
pub mod attention;
pub mod bodies;
mod bytes;
#[cfg(test)]
mod checks;
pub mod choices;
pub mod constants;
mod contract;
pub mod cost;
pub mod cuts;
pub mod extract;
pub mod fuse;
mod integers;
pub mod kind;
pub mod lang;
#[cfg(test)]
mod members;
#[cfg(test)]
mod mutants;
mod reads;
pub mod select;
mod shuffle;
mod siblings;
pub mod table;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::error::Result;
use crate::graph::scalar::Dots;
use crate::graph::verify::{Verified, verify};
use crate::graph::{Graph, Origin};
use choices::{ChoiceGraph, Kernel};

/// Budgets are counts, never time, so that equal input gives equal results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Rounds of all rules.
    pub rounds: usize,
    /// E-nodes.
    pub nodes: usize,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget { rounds: 40, nodes: 60_000 }
    }
}

/// For each rule, how often it made two forms equal, by the origin of what it rewrote.
pub type Fired = BTreeMap<&'static str, BTreeMap<Origin, usize>>;

/// What optimisation did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How often each rule made two forms equal, by the origin of what it rewrote.
    pub fired: Fired,
    /// E-nodes after saturation.
    pub nodes: usize,
    /// E-classes after saturation.
    pub classes: usize,
    /// Modelled cost of the greedy fuser's kernels on the graph as imported, in microseconds.
    pub greedy_us: f64,
    /// Modelled cost of the kernels that were chosen, in microseconds.
    pub chosen_us: f64,
}

/// A graph of kernels and how it came about.
#[derive(Clone, Debug)]
pub struct Optimised {
    /// Nodes are inputs, constants, reshapes (the same bytes) and fused bodies.
    pub graph: Verified<Graph>,
    /// What was done.
    pub report: Report,
}

/// The graph as kernels. Without a budget for the e-graph, the greedy fuser works on the graph as
/// it is. `dots`: the dot products that the target has instructions for.
pub fn optimise(graph: &Graph, budget: Option<Budget>, dots: Dots) -> Result<Optimised> {
    let plain = fuse::expand(graph)?;
    let greedy = fuse::fuse(&plain);
    let greedy_us = cost::kernels_us(&greedy, dots);
    let mut report = Report { greedy_us, chosen_us: greedy_us, ..Report::default() };
    let Some(budget) = budget else {
        return Ok(Optimised { graph: verify(greedy)?, report });
    };
    // A: algebra and layout.
    let gathered = constants::gather(&plain);
    let mut saturated = lang::build(&gathered);
    saturated.egraph.analysis.dots = dots;
    report.fired = table::saturate(&mut saturated.egraph, budget);
    report.nodes = saturated.egraph.total_size();
    report.classes = saturated.egraph.number_of_classes();
    let users = extract::users(&saturated, &gathered);
    let cheapest = extract::cheapest(&saturated, &users);
    let extracted = extract::extract(&saturated, &cheapest, &gathered);
    // B: fusion.
    let mut choices = ChoiceGraph::new(&saturated, &cheapest, &gathered);
    let mut kernels = cuts::cuts(&mut choices);
    attention::add(&mut choices, &mut kernels);
    // C: a choice of kernels; that of the greedy fuser is one to start from.
    let start = choices.greedy(&saturated, &extracted, &mut kernels);
    let chosen = select::Problem::new(&mut choices, &kernels).solve(&[start]);
    let chosen: Vec<(u32, &Kernel)> =
        chosen.into_iter().map(|(v, k)| (v, &kernels[v as usize][k as usize])).collect();
    let build = extract::Build::new(&saturated, &cheapest, &gathered);
    let chosen = choices.graph(&chosen, build, &gathered);
    let fused = fuse::fuse(&chosen);
    let fused_us = cost::kernels_us(&fused, dots);
    // Never dearer than the greedy fuser on the model as it came.
    let best = if fused_us <= greedy_us { fused } else { greedy };
    report.chosen_us = fused_us.min(greedy_us);
    Ok(Optimised { graph: verify(best)?, report })
}
