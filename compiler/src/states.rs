//! States of a model: outputs that the next run reads as inputs.
//!
//! A cache is read, and given out longer by the rows that a run adds. Where its dims have ranges,
//! the input gets room for the longest, as the output has, and the model reads as much of it as it
//! did: a slice from the start. Both then have the same strides, so they may be the same memory;
//! what is joined to the rest is all that a run writes.

use kiln_runtime::plan::PlanState;

use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::op::{Op, Type};
use crate::graph::text::type_text;
use crate::graph::used::{Span, span};
use crate::graph::{Args, Graph, NodeId};

/// Pairs inputs with outputs, by name; one `*` in both stands for the same text.
///
/// # Errors
/// Pairs that are not there, or do not fit together, all at once.
pub fn keep(mut graph: Graph, pairs: &[(String, String)]) -> Result<Graph> {
    let mut problems = Vec::new();
    for (input, output) in pairs {
        match find(&graph, input, output) {
            Ok(found) => graph.states.extend(found),
            Err(problem) => problems.push(problem),
        }
    }
    for (i, state) in graph.states.iter().enumerate() {
        let same = |s: &PlanState| s.input == state.input || s.output == state.output;
        if graph.states[..i].iter().any(same) {
            let problem = Diagnostic::new("K0111", "an input or output that is part of two states");
            problems.push(problem.tensor(graph.inputs[state.input].0.clone()));
        }
    }
    if !problems.is_empty() {
        return Err(Error { kind: ErrorKind::Usage, diagnostics: problems });
    }
    Ok(with_room(&graph))
}

/// All pairs that a pair of names means.
fn find(
    graph: &Graph,
    input: &str,
    output: &str,
) -> std::result::Result<Vec<PlanState>, Diagnostic> {
    let inputs: Vec<&str> = graph.inputs.iter().map(|i| i.0.as_str()).collect();
    let outputs: Vec<&str> = graph.outputs.iter().map(|o| o.0.as_str()).collect();
    let wrong = |what: &str| {
        Diagnostic::new("K0111", what).tensor(format!("{input}={output}")).help(
            "--state INPUT=OUTPUT names an input and the output that it takes its next value from",
        )
    };
    if input.contains('*') != output.contains('*') {
        return Err(wrong("a * in one name of a state only"));
    }
    let mut states = Vec::new();
    for (i, name) in inputs.iter().enumerate() {
        let Some(star) = matched(input, name) else { continue };
        let wanted = output.replacen('*', star, 1);
        let Some(o) = outputs.iter().position(|name| *name == wanted) else {
            let problem = wrong("the model has no such output");
            return Err(problem.found(wanted).expected(outputs.join(", ")));
        };
        states.push(PlanState { input: i, output: o, in_place: false });
    }
    if states.is_empty() {
        let problem = wrong("the model has no such input");
        return Err(problem.found(input.to_string()).expected(inputs.join(", ")));
    }
    for state in &mut states {
        let (take, give) = (&graph.inputs[state.input].1, graph.ty(graph.outputs[state.output].1));
        if !fit(take, give) {
            let problem = Diagnostic::new("K0111", "an output that is no next value of the input");
            let name = |port: usize, side: &[&str]| side[port].to_string();
            let (take, give) = (type_text(take), type_text(give));
            let pair = format!("{}={}", name(state.input, &inputs), name(state.output, &outputs));
            let problem = problem.tensor(pair).expected(take).found(give);
            return Err(problem.help(
                "a state that grows does so along a dim: give the dim a range, as in \
                 --dim past=0..1024",
            ));
        }
        state.in_place = grows(graph, *state);
    }
    Ok(states)
}

/// What `*` stands for where a pattern fits a name.
fn matched<'a>(pattern: &str, name: &'a str) -> Option<&'a str> {
    match pattern.split_once('*') {
        None => (pattern == name).then_some(""),
        Some((before, after)) => name.strip_prefix(before)?.strip_suffix(after),
    }
}

fn dim(ty: &Type, axis: usize) -> Option<u8> {
    match span(ty, axis) {
        Some(Span::Dim { dim, .. }) => Some(dim),
        Some(Span::Mixed) | None => None,
    }
}

/// Whether a value may be the next one of an input: every axis is as long, or as long as the same
/// dim and some more.
fn fit(take: &Type, give: &Type) -> bool {
    take.dtype == give.dtype
        && take.rank() == give.rank()
        && (0..take.rank()).all(|axis| match (dim(take, axis), dim(give, axis)) {
            (None, None) => take.shape[axis] == give.shape[axis],
            (take, give) => take == give,
        })
}

/// Whether an output is the input with more behind it.
fn grows(graph: &Graph, state: PlanState) -> bool {
    let output = graph.outputs[state.output].1;
    let node = graph.node(output);
    let Op::Concat(axis) = node.op else { return false };
    let others = graph.outputs.iter().filter(|o| o.1 == output).count();
    let first = &graph.node(node.args[0]).op;
    let fixed = |a: usize| {
        a == usize::from(axis) || node.ty.shape[a] == graph.inputs[state.input].1.shape[a]
    };
    others == 1
        && *first == Op::Input(state.input as u32)
        && dim(&node.ty, axis.into()).is_some()
        && (0..node.ty.rank()).all(fixed)
}

/// The graph whose inputs that grow have room for what they grow by.
fn with_room(graph: &Graph) -> Graph {
    let mut out = Graph::empty_like(graph);
    let mut place: Vec<NodeId> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let args: Args = node.args.iter().map(|a| place[a.index()]).collect();
        let grows = match node.op {
            Op::Input(i) => graph.grows(i as usize),
            _ => None,
        };
        let Some(state) = grows else {
            place.push(out.push(node.op.clone(), args, node.ty.clone(), &node.origin));
            continue;
        };
        let whole = graph.ty(graph.outputs[state.output].1);
        let ty = Type { shape: whole.shape.clone(), ..node.ty.clone() };
        out.inputs[state.input].1 = ty.clone();
        let input = out.push(node.op.clone(), args, ty, &node.origin);
        let first = Op::Slice(node.ty.shape.iter().map(|&extent| (0, 1, extent)).collect());
        let args = Args::from_slice(&[input]);
        place.push(out.push(first, args, node.ty.clone(), &node.origin));
    }
    let outputs = graph.outputs.iter();
    out.outputs = outputs.map(|(name, id)| (name.clone(), place[id.index()])).collect();
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_the_same_text() {
        assert_eq!(matched("past_*", "past_k0"), Some("k0"));
        assert_eq!(matched("past.*.key", "past.11.key"), Some("11"));
        assert_eq!(matched("past.*.key", "past.11.value"), None);
        assert_eq!(matched("h", "h"), Some(""));
        assert_eq!(matched("h", "hh"), None);
    }
}
