//! Makes a graph that shows a fault as small as it can be.
//!
//! First the nodes just above each value are tried by themselves. Then, greedily, what a fault does
//! not need is left out, step by step, as long as the fault stays (delta debugging; Zeller and
//! Hildebrandt 2002). Values between are replaced by inputs that have what the interpreter computes
//! for them.

use std::collections::HashMap;

use super::eval::{Value, eval_nodes};
use super::op::Op;
use super::{Args, Graph, Node, NodeId};

/// How often a fault is looked for at most.
const TRIES: usize = 10_000;
/// How many operations one above the other are tried by themselves.
const DEPTHS: usize = 4;

/// A graph without nodes and inputs that no output needs, and the numbers of the inputs that stay.
pub fn needed(graph: &Graph) -> (Graph, Vec<usize>) {
    let live = graph.live();
    let used = |input: usize| {
        let is_it = |id: &NodeId| live.node(*id).op == Op::Input(input as u32);
        let read = |id: NodeId| live.nodes.iter().any(|node| node.args.contains(&id));
        live.ids()
            .filter(is_it)
            .any(|id| read(id) || live.outputs.iter().any(|output| output.1 == id))
    };
    let kept: Vec<usize> = (0..live.inputs.len()).filter(|&input| used(input)).collect();
    let mut out = Graph { inputs: Vec::new(), ..Graph::empty_like(&live) };
    out.bodies = live.bodies.clone();
    out.inputs = kept.iter().map(|&input| live.inputs[input].clone()).collect();
    let mut place = vec![NodeId(0); live.nodes.len()];
    for (i, node) in live.nodes.iter().enumerate() {
        let op = match node.op {
            Op::Input(input) => match kept.iter().position(|&k| k == input as usize) {
                Some(at) => Op::Input(at as u32),
                None => continue,
            },
            ref op => op.clone(),
        };
        let args = node.args.iter().map(|a| place[a.index()]).collect();
        place[i] = out.push(op, args, node.ty.clone(), &node.origin);
    }
    out.outputs = live.outputs.iter().map(|(name, id)| (name.clone(), place[id.index()])).collect();
    (out, kept)
}

/// The smallest graph that was found to have a fault, with values for its inputs. `fails` says
/// whether a graph has it; the graph that is given does. Graphs with states or dims of their own
/// are given back as they are.
pub fn reduce(
    graph: &Graph,
    inputs: &[Value],
    fails: &mut dyn FnMut(&Graph, &[Value]) -> bool,
) -> (Graph, Vec<Value>) {
    let mut best = (graph.clone(), inputs.to_vec());
    if !graph.states.is_empty() || !graph.dims.is_empty() {
        return best;
    }
    let mut tries = 0;
    let mut fails = |graph: &Graph, inputs: &[Value]| {
        tries += 1;
        tries <= TRIES && fails(graph, inputs)
    };
    let values = eval_nodes(graph, inputs);
    let cones = (1..=DEPTHS).flat_map(|depth| computed(graph).map(move |id| (id, depth)));
    let cones = cones.map(|(id, depth)| cone(graph, (id, depth), &values));
    if let Some(cone) = cones.into_iter().find(|(graph, inputs)| fails(graph, inputs)) {
        best = cone;
    }
    while let Some(smaller) = smaller(&best.0, &best.1, &mut fails) {
        best = smaller;
    }
    best
}

/// The nodes of a graph that compute.
fn computed(graph: &Graph) -> impl Iterator<Item = NodeId> {
    graph.ids().filter(|id| !matches!(graph.node(*id).op, Op::Input(_) | Op::Const(_)))
}

/// A node and those so far below it, over inputs.
fn cone(graph: &Graph, (top, depth): (NodeId, usize), values: &[Value]) -> (Graph, Vec<Value>) {
    let mut inside = vec![top];
    let mut edge = vec![top];
    for _ in 1..depth {
        let below = edge.iter().flat_map(|id| graph.node(*id).args.iter().copied());
        edge = below.filter(|id| !matches!(graph.node(*id).op, Op::Input(_))).collect();
        inside.extend(&edge);
    }
    inside.sort_unstable();
    inside.dedup();
    let mut out = Graph { inputs: Vec::new(), ..Graph::empty_like(graph) };
    out.bodies = graph.bodies.clone();
    let mut place: HashMap<NodeId, NodeId> = HashMap::new();
    let mut inputs = Vec::new();
    for id in inside {
        let node = graph.node(id);
        let args: Args = node
            .args
            .iter()
            .map(|arg| {
                *place.entry(*arg).or_insert_with(|| match graph.node(*arg) {
                    Node { op: op @ Op::Const(_), ty, origin, .. } => {
                        out.push(op.clone(), Args::new(), ty.clone(), origin)
                    }
                    other => {
                        inputs.push(values[arg.index()].clone());
                        out.input(&format!("x{}", inputs.len() - 1), other.ty.clone())
                    }
                })
            })
            .collect();
        let new = out.push(node.op.clone(), args, node.ty.clone(), &node.origin);
        place.insert(id, new);
    }
    out.outputs.push(("y".into(), place[&top]));
    (out, inputs)
}

/// The first simpler graph that still fails.
fn smaller(
    graph: &Graph,
    inputs: &[Value],
    fails: &mut dyn FnMut(&Graph, &[Value]) -> bool,
) -> Option<(Graph, Vec<Value>)> {
    let mut failing = |candidate: (Graph, Vec<Value>)| {
        Some(candidate).filter(|(graph, inputs)| fails(graph, inputs))
    };
    let computed: Vec<NodeId> = computed(graph).collect();
    // One output instead of several.
    if graph.outputs.len() > 1 {
        let found = graph.outputs.iter().find_map(|o| failing(with_output(graph, inputs, o.1)));
        if found.is_some() {
            return found;
        }
    }
    let output = |id: &NodeId| graph.outputs.iter().any(|o| o.1 == *id);
    // An earlier value as the output.
    if let [(_, last)] = graph.outputs[..] {
        let inner = computed.iter().filter(|id| **id != last);
        let found = inner.into_iter().find_map(|&id| failing(with_output(graph, inputs, id)));
        if found.is_some() {
            return found;
        }
    }
    // A value as an input, the last ones first: with it goes all that only it needs.
    let values = eval_nodes(graph, inputs);
    let inner = computed.iter().rev().filter(|id| !output(id));
    let found = inner
        .into_iter()
        .find_map(|&id| failing(with_input(graph, inputs, id, values[id.index()].clone())));
    if found.is_some() {
        return found;
    }
    // An operand in place of what is made of it.
    let bypass = |&id: &NodeId| {
        let node = graph.node(id);
        let same = node.args.iter().filter(|a| graph.ty(**a) == &node.ty).copied();
        same.map(move |operand| (id, operand)).collect::<Vec<_>>()
    };
    let mut pairs = computed.iter().flat_map(bypass);
    pairs.find_map(|(id, operand)| failing(replaced(graph, inputs, id, operand)))
}

/// The graph with one value as its only output.
fn with_output(graph: &Graph, inputs: &[Value], id: NodeId) -> (Graph, Vec<Value>) {
    let mut graph = graph.clone();
    graph.outputs = vec![("y".into(), id)];
    trimmed(&graph, inputs)
}

/// The graph with an input in place of a value.
fn with_input(graph: &Graph, inputs: &[Value], id: NodeId, value: Value) -> (Graph, Vec<Value>) {
    let mut out = Graph::empty_like(graph);
    out.bodies = graph.bodies.clone();
    let mut place: Vec<NodeId> = Vec::with_capacity(graph.nodes.len());
    for (i, node) in graph.nodes.iter().enumerate() {
        let args: Args = node.args.iter().map(|a| place[a.index()]).collect();
        place.push(match i == id.index() {
            true => out.input(&format!("v{}", graph.inputs.len()), node.ty.clone()),
            false => out.push(node.op.clone(), args, node.ty.clone(), &node.origin),
        });
    }
    out.outputs =
        graph.outputs.iter().map(|(name, id)| (name.clone(), place[id.index()])).collect();
    let mut inputs = inputs.to_vec();
    inputs.push(value);
    let (graph, inputs) = trimmed(&out, &inputs);
    (named_apart(graph), inputs)
}

/// The graph with another node in place of one.
fn replaced(graph: &Graph, inputs: &[Value], id: NodeId, by: NodeId) -> (Graph, Vec<Value>) {
    let mut graph = graph.clone();
    let other = |a: &mut NodeId| {
        if *a == id {
            *a = by;
        }
    };
    graph.nodes.iter_mut().flat_map(|node| &mut node.args).for_each(other);
    graph.outputs.iter_mut().map(|output| &mut output.1).for_each(other);
    trimmed(&graph, inputs)
}

fn trimmed(graph: &Graph, inputs: &[Value]) -> (Graph, Vec<Value>) {
    let (graph, kept) = needed(graph);
    (graph, kept.into_iter().map(|i| inputs[i].clone()).collect())
}

/// Every input under a name of its own.
fn named_apart(mut graph: Graph) -> Graph {
    graph.inputs.iter_mut().enumerate().for_each(|(i, input)| input.0 = format!("x{i}"));
    graph
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::{DType, Tensor};

    use super::*;
    use crate::graph::op::{BinaryFn, Type, UnaryFn};

    /// A chain with a sine in its middle, beside another output.
    fn chain() -> (Graph, Vec<Value>) {
        let mut graph = Graph::default();
        let o = "n".into();
        let x = graph.input("x", Type::new(DType::F32, &[2, 3]));
        let z = graph.input("z", Type::new(DType::F32, &[2, 3]));
        let other = graph.unary(UnaryFn::Exp, z, &o).expect("a node");
        let mut y = graph.unary(UnaryFn::Abs, x, &o).expect("a node");
        y = graph.binary(BinaryFn::Add, y, z, &o).expect("a node");
        y = graph.permute(y, &[1, 0], &o).expect("a node");
        y = graph.unary(UnaryFn::Sin, y, &o).expect("a node");
        y = graph.binary_number(BinaryFn::Mul, y, 3.0, &o).expect("a node");
        graph.outputs = vec![("a".into(), other), ("b".into(), y)];
        let value = Value::from_tensor(&Tensor::from_slice(&[2, 3], &[1.0f32; 6]));
        (graph, vec![value.clone(), value])
    }

    #[test]
    fn what_a_fault_needs_is_left() {
        let (graph, inputs) = chain();
        let has_sine =
            |graph: &Graph| graph.nodes.iter().any(|node| node.op == Op::Unary(UnaryFn::Sin));
        let mut seen = 0;
        let (small, values) = reduce(&graph, &inputs, &mut |graph, inputs| {
            seen += 1;
            assert_eq!(graph.inputs.len(), inputs.len());
            for ((_, ty), value) in graph.inputs.iter().zip(inputs) {
                assert_eq!(ty, &value.ty);
            }
            has_sine(graph)
        });
        // The sine, of an input that has its operand's value.
        assert_eq!(
            (small.nodes.len(), values.len()),
            (2, 1),
            "{}",
            crate::graph::text::print(&small)
        );
        assert_eq!(values[0].ty.shape[..], [3, 2]);
        assert_eq!(values[0].as_f64s(), [2.0; 6]);
        // By itself it is found before anything is left out.
        assert!(seen < 12, "{seen}");
        // What needs two operations is left with two.
        let (pair, _) = reduce(&graph, &inputs, &mut |graph, _| {
            has_sine(graph) && graph.nodes.iter().any(|n| n.op == Op::Unary(UnaryFn::Abs))
        });
        assert_eq!(computed(&pair).count(), 3, "{}", crate::graph::text::print(&pair));
    }
}
