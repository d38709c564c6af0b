//! A kernel for each operation, nothing fused: the form with optimisation off.

use std::sync::Arc;

use crate::error::Result;
use crate::graph::op::Op;
use crate::graph::verify::{Verified, verify};
use crate::graph::{Args, Body, Graph, Node, NodeId};
use crate::rules::fuse::expand;

/// The graph with every operation in a body of its own.
pub fn unfused(graph: &Graph) -> Result<Verified<Graph>> {
    let graph = &expand(graph)?;
    let mut out = Graph::empty_like(graph);
    let mut place: Vec<NodeId> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let args: Args = node.args.iter().map(|a| place[a.index()]).collect();
        let op = match &node.op {
            Op::Input(_) | Op::Const(_) | Op::Fused(_) => node.op.clone(),
            op if op.is_alias() => op.clone(),
            op => {
                let mut nodes: Vec<Node> = Vec::new();
                for (i, arg) in node.args.iter().enumerate() {
                    let from = graph.node(*arg);
                    let op = Op::Input(i as u32);
                    nodes.push(Node { op, args: Args::new(), ..from.clone() });
                }
                let inner: Args = (0..node.args.len() as u32).map(NodeId).collect();
                nodes.push(Node { op: op.clone(), args: inner, ..node.clone() });
                out.bodies.push(Arc::new(Body { nodes }));
                Op::Fused(out.bodies.len() as u32 - 1)
            }
        };
        place.push(out.push(op, args, node.ty.clone(), &node.origin));
    }
    let outputs = graph.outputs.iter();
    out.outputs = outputs.map(|(name, id)| (name.clone(), place[id.index()])).collect();
    verify(out)
}
