//! Checks a whole graph and hands out the proof: later stages take `Verified<Graph>` only.

use smallvec::SmallVec;

use super::infer::infer;
use super::op::{Op, Type};
use super::{Body, Graph, Node};
use crate::error::{Diagnostic, Error, ErrorKind, Result};

/// A value that has passed its verifier; only verifiers make it.
#[derive(Clone, Debug)]
pub struct Verified<T>(T);

impl<T> std::ops::Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Checks order, types, inputs, constants and bodies of a graph.
pub fn verify(graph: Graph) -> Result<Verified<Graph>> {
    let problems: Vec<Diagnostic> =
        check_nodes(&graph, &graph.nodes)
            .chain(graph.bodies.iter().flat_map(|body| check_nodes(&graph, &body.nodes)))
            .chain(graph.outputs.iter().filter(|(_, id)| id.index() >= graph.nodes.len()).map(
                |(name, id)| Diagnostic::new("K0901", format!("output {name} is node {id:?}")),
            ))
            .collect();
    match problems.is_empty() {
        true => Ok(Verified(graph)),
        false => Err(Error { kind: ErrorKind::Model, diagnostics: problems }),
    }
}

fn check_nodes<'a>(
    graph: &'a Graph,
    nodes: &'a [Node],
) -> impl Iterator<Item = Diagnostic> + use<'a> {
    nodes.iter().enumerate().filter_map(move |(i, node)| {
        check_node(graph, nodes, i).err().map(|text| {
            Diagnostic::new("K0901", text).node(node.origin.as_ref()).help("this is a bug of Kiln")
        })
    })
}

fn check_node(graph: &Graph, nodes: &[Node], at: usize) -> std::result::Result<(), String> {
    let node = &nodes[at];
    if let Some(arg) = node.args.iter().find(|a| a.index() >= at) {
        return Err(format!("node {at} uses {arg:?}, which comes later"));
    }
    let types: SmallVec<[&Type; 4]> = node.args.iter().map(|a| &nodes[a.index()].ty).collect();
    let expected = match &node.op {
        Op::Input(_) => node.ty.clone(),
        Op::Const(i) => match graph.constants.get(*i as usize) {
            Some(constant) => constant.ty.clone(),
            None => return Err(format!("no constant {i}")),
        },
        Op::Fused(i) => match graph.bodies.get(*i as usize) {
            Some(body) => fused_type(body, &types)?,
            None => return Err(format!("no body {i}")),
        },
        op => infer(op, &types).map_err(|m| {
            format!("{}: expected {}, found {}", super::text::op_text(op), m.expected, m.found)
        })?,
    };
    match expected == node.ty {
        true => Ok(()),
        false => Err(format!("node {at} is {:?}, inference says {expected:?}", node.ty)),
    }
}

fn fused_type(body: &Body, args: &[&Type]) -> std::result::Result<Type, String> {
    for node in &body.nodes {
        if let Op::Input(i) = node.op {
            match args.get(i as usize) {
                Some(ty) if **ty == node.ty => {}
                other => return Err(format!("argument {i} is {other:?}, not {:?}", node.ty)),
            }
        }
    }
    Ok(body.root().ty.clone())
}
