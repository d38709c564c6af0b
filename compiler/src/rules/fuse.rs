//! The fuser: kernels grow from their result towards their operands, as long as the body stays of
//! a kind that has loops and no work is done twice.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::graph::op::{Op, Type};
use crate::graph::{Args, Body, Graph, Node, NodeId, composite};

/// Operations of a body at most.
const MAX_OPS: usize = 48;
/// Arguments of a body at most.
const MAX_ARGS: usize = 12;
/// Elements of a row that is reduced within a kernel at most.
const MAX_ROW: usize = 65_536;

/// What a body computes, and so which loops it gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// One operation that stands alone.
    Alone,
    /// Every element by itself.
    Map,
    /// Every element folds its own part of an operand.
    InlineReduce,
    /// Rows whose reductions are used again in the row.
    Row,
    /// A sum of products with an epilogue.
    Contract,
}

fn is_pointwise(op: &Op) -> bool {
    matches!(op, Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast(_))
}

fn is_view(op: &Op) -> bool {
    matches!(
        op,
        Op::Permute(_)
            | Op::Reshape(_)
            | Op::Expand(_)
            | Op::Slice(_)
            | Op::Window(_)
            | Op::Iota(..)
    )
}

/// The graph with named functions replaced by their definitions.
pub fn expand(graph: &Graph) -> Result<Graph> {
    let mut out = Graph::empty_like(graph);
    let mut place: Vec<NodeId> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let args: Args = node.args.iter().map(|a| place[a.index()]).collect();
        place.push(match &node.op {
            Op::Composite(f) => composite::define(&mut out, *f, args[0], &node.origin)
                .map_err(|d| Error::new(ErrorKind::Model, d))?,
            op => out.push(op.clone(), args, node.ty.clone(), &node.origin),
        });
    }
    let outputs = graph.outputs.iter();
    out.outputs = outputs.map(|(name, id)| (name.clone(), place[id.index()])).collect();
    Ok(out)
}

/// A set of nodes that become one body; the root is the largest number.
struct Cluster<'a> {
    graph: &'a Graph,
    /// Members, ascending.
    nodes: Vec<usize>,
}

impl Cluster<'_> {
    fn has(&self, node: usize) -> bool {
        self.nodes.binary_search(&node).is_ok()
    }

    fn with(&self, node: usize) -> Cluster<'_> {
        let mut nodes = self.nodes.clone();
        if let Err(at) = nodes.binary_search(&node) {
            nodes.insert(at, node);
        }
        Cluster { graph: self.graph, nodes }
    }

    fn op(&self, node: usize) -> &Op {
        &self.graph.nodes[node].op
    }

    fn ty(&self, node: usize) -> &Type {
        &self.graph.nodes[node].ty
    }

    fn args(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        self.graph.nodes[node].args.iter().map(|a| a.index())
    }

    /// Values from outside, in the order of their first use.
    fn arguments(&self) -> Vec<usize> {
        let mut arguments = Vec::new();
        for &node in &self.nodes {
            for arg in self.args(node) {
                if !self.has(arg) && !arguments.contains(&arg) {
                    arguments.push(arg);
                }
            }
        }
        arguments
    }

    /// The kind of the body, where it has loops.
    fn classify(&self) -> Option<Kind> {
        if self.nodes.len() == 1 {
            return Some(match self.op(self.nodes[0]) {
                op if is_pointwise(op) || is_view(op) || matches!(op, Op::Gather(_)) => Kind::Map,
                Op::Contract(_) => Kind::Contract,
                _ => Kind::Alone,
            });
        }
        if self.nodes.len() > MAX_OPS || self.arguments().len() > MAX_ARGS {
            return None;
        }
        let mut contracts = Vec::new();
        let mut reduces = Vec::new();
        for &n in &self.nodes {
            match self.op(n) {
                Op::Contract(_) => contracts.push(n),
                Op::Reduce(..) => reduces.push(n),
                op if is_pointwise(op) || is_view(op) || matches!(op, Op::Gather(_)) => {}
                _ => return None,
            }
        }
        match (contracts.as_slice(), reduces.as_slice()) {
            ([], []) => self.is_map().then_some(Kind::Map),
            ([contract], []) => self.is_contract(*contract).then_some(Kind::Contract),
            ([], [reduce]) if self.is_inline(*reduce) => Some(Kind::InlineReduce),
            ([], _) => self.is_row(&reduces).then_some(Kind::Row),
            _ => None,
        }
    }

    /// No element may be computed again for several results, unless it is only moved.
    fn is_map(&self) -> bool {
        let root = self.ty(self.nodes[self.nodes.len() - 1]).numel();
        self.nodes.iter().all(|&n| !is_pointwise(self.op(n)) || self.ty(n).numel() >= root)
    }

    /// Members that hang on `node`, itself included.
    fn above(&self, node: usize) -> Vec<usize> {
        let mut above = vec![node];
        for &n in self.nodes.iter().filter(|&&n| n > node) {
            if self.args(n).any(|a| above.contains(&a)) {
                above.push(n);
            }
        }
        above
    }

    /// From `node` to the root, pointwise operations and moves of all elements, used once each.
    fn is_epilogue(&self, node: usize) -> bool {
        let above = self.above(node);
        let root = self.nodes[self.nodes.len() - 1];
        let size = self.ty(node).numel();
        let mut moved = false;
        for &n in above.iter().skip(1) {
            let fits = match self.op(n) {
                op if is_pointwise(op) => !moved && self.ty(n).numel() == size,
                // Values computed after a permutation would have to be read elsewhere; and the
                // last axis, which runs in lanes, must stay the last one.
                Op::Permute(axes) => {
                    moved = true;
                    axes.last().is_none_or(|&a| a as usize + 1 == axes.len())
                }
                Op::Reshape(_) => true,
                _ => false,
            };
            if !fits {
                return false;
            }
        }
        above.contains(&root)
    }

    fn is_contract(&self, contract: usize) -> bool {
        let above = self.above(contract);
        // Everything else only moves elements, into the contraction or beside it.
        let beside = self.nodes.iter().filter(|n| !above.contains(n));
        let views = beside.clone().all(|&n| match self.op(n) {
            Op::Permute(_) | Op::Expand(_) | Op::Slice(_) => true,
            // Only a reshape that splits axes leaves their indices affine.
            Op::Reshape(to) => self.args(n).all(|a| only_splits(&self.ty(a).shape, to)),
            _ => false,
        });
        views && self.is_epilogue(contract)
    }

    fn is_inline(&self, reduce: usize) -> bool {
        let Op::Reduce(_, axes) = self.op(reduce) else { return false };
        let x = self.args(reduce).next().map(|a| self.ty(a));
        let Some(x) = x else { return false };
        // Long rows go across lanes, in a row kernel.
        let long =
            axes.last().is_some_and(|&a| a as usize + 1 == x.rank() && x.shape[a as usize] >= 16);
        !long && self.is_epilogue(reduce)
    }

    fn is_row(&self, reduces: &[usize]) -> bool {
        let first = reduces[0];
        let Op::Reduce(_, axes) = self.op(first) else { return false };
        let Some(full) = self.args(first).next().map(|a| self.ty(a).shape.clone()) else {
            return false;
        };
        let rank = full.len();
        let start = rank - axes.len();
        let trailing = axes.iter().enumerate().all(|(i, &a)| a as usize == start + i);
        let row: usize = full[start..].iter().product();
        if !trailing || row == 0 || row > MAX_ROW {
            return false;
        }
        let mut reduced = full.clone();
        reduced[start..].fill(1);
        let same = reduces.iter().all(|&r| {
            matches!(self.op(r), Op::Reduce(_, a) if a == axes)
                && self.args(r).all(|a| self.ty(a).shape == full)
        });
        let above = self.above(first);
        let fits = self.nodes.iter().all(|&n| {
            let shape = &self.ty(n).shape;
            let op = self.op(n);
            if is_view(op) || matches!(op, Op::Gather(_)) {
                // Views below the reductions only; a row is not moved once it is being folded.
                return !above.contains(&n);
            }
            *shape == full || *shape == reduced
        });
        same && fits
    }
}

/// Whether a reshape splits axes, and joins none but those of extent 1.
fn only_splits(from: &[usize], to: &[usize]) -> bool {
    let long =
        |shape: &[usize]| -> Vec<usize> { shape.iter().copied().filter(|&e| e != 1).collect() };
    super::table::split_of(&long(from), &long(to)).is_some()
}

/// Whether a value that several kernels want may be computed in each of them.
fn is_free(graph: &Graph, node: usize) -> bool {
    matches!(graph.nodes[node].op, Op::Permute(_) | Op::Reshape(_) | Op::Expand(_) | Op::Iota(..))
}

/// The graph with operations gathered into kernels.
pub fn fuse(graph: &Graph) -> Result<Graph> {
    let count = graph.nodes.len();
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); count];
    let mut constant = vec![false; count];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.args.iter().for_each(|a| users[a.index()].push(i));
        constant[i] =
            !matches!(node.op, Op::Input(_)) && node.args.iter().all(|a| constant[a.index()]);
    }
    let outputs: Vec<usize> = graph.outputs.iter().map(|o| o.1.index()).collect();
    let mut wanted = vec![false; count];
    outputs.iter().for_each(|&o| wanted[o] = true);
    let mut clusters: HashMap<usize, Vec<usize>> = HashMap::new();
    for root in (0..count).rev() {
        if !wanted[root] {
            continue;
        }
        match graph.nodes[root].op {
            Op::Input(_) | Op::Const(_) => continue,
            Op::Reshape(_) => {
                wanted[graph.nodes[root].args[0].index()] = true;
                continue;
            }
            _ => {}
        }
        let cluster = grow(graph, root, &users, &outputs, &constant);
        for argument in cluster.arguments() {
            wanted[argument] = true;
        }
        clusters.insert(root, cluster.nodes);
    }
    Ok(rebuild(graph, &wanted, &clusters))
}

fn grow<'a>(
    graph: &'a Graph,
    root: usize,
    users: &[Vec<usize>],
    outputs: &[usize],
    constant: &[bool],
) -> Cluster<'a> {
    let mut cluster = Cluster { graph, nodes: vec![root] };
    loop {
        // The latest argument first: its own operands come before it.
        let mut arguments = cluster.arguments();
        arguments.sort_unstable_by(|a, b| b.cmp(a));
        let next = arguments.into_iter().find(|&a| {
            let fixed = matches!(graph.nodes[a].op, Op::Input(_) | Op::Const(_));
            // Constants are computed once, by kernels of their own.
            if fixed || (constant[a] && !constant[root]) {
                return false;
            }
            let alone = !outputs.contains(&a) && users[a].iter().all(|&u| cluster.has(u));
            (alone || is_free(graph, a)) && cluster.with(a).classify().is_some()
        });
        match next {
            Some(node) => {
                let nodes = cluster.with(node).nodes;
                cluster = Cluster { graph, nodes };
            }
            None => return cluster,
        }
    }
}

/// A graph with one node for each cluster.
fn rebuild(graph: &Graph, wanted: &[bool], clusters: &HashMap<usize, Vec<usize>>) -> Graph {
    let mut out = Graph::empty_like(graph);
    let mut place: Vec<Option<NodeId>> = vec![None; graph.nodes.len()];
    let mut known: HashMap<String, u32> = HashMap::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let input = matches!(node.op, Op::Input(_));
        if !wanted[i] && !input {
            continue;
        }
        let Some(nodes) = clusters.get(&i) else {
            let args: Args = node.args.iter().filter_map(|a| place[a.index()]).collect();
            place[i] = Some(out.push(node.op.clone(), args, node.ty.clone(), &node.origin));
            continue;
        };
        let cluster = Cluster { graph, nodes: nodes.clone() };
        let arguments = cluster.arguments();
        let body = body_of(graph, nodes, &arguments);
        let key =
            format!("{:?}", body.nodes.iter().map(|n| (&n.op, &n.args, &n.ty)).collect::<Vec<_>>());
        let next = out.bodies.len() as u32;
        let number = *known.entry(key).or_insert(next);
        if number == next {
            out.bodies.push(Arc::new(body));
        }
        let args: Args = arguments.iter().filter_map(|&a| place[a]).collect();
        let origin = name_of(graph, nodes);
        place[i] = Some(out.push(Op::Fused(number), args, node.ty.clone(), &origin.into()));
    }
    let outputs = graph.outputs.iter();
    out.outputs =
        outputs.filter_map(|(name, id)| Some((name.clone(), place[id.index()]?))).collect();
    out
}

fn body_of(graph: &Graph, nodes: &[usize], arguments: &[usize]) -> Body {
    let mut body = Vec::new();
    let mut place: HashMap<usize, NodeId> = HashMap::new();
    for (i, &argument) in arguments.iter().enumerate() {
        let from = &graph.nodes[argument];
        place.insert(argument, NodeId(i as u32));
        body.push(Node { op: Op::Input(i as u32), args: Args::new(), ..from.clone() });
    }
    for &n in nodes {
        let from = &graph.nodes[n];
        let args: Args = from.args.iter().map(|a| place[&a.index()]).collect();
        place.insert(n, NodeId(body.len() as u32));
        body.push(Node { args, ..from.clone() });
    }
    Body { nodes: body }
}

/// The names of a kernel's nodes, each once, the first few.
fn name_of(graph: &Graph, nodes: &[usize]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for &n in nodes {
        let origin: &str = &graph.nodes[n].origin;
        if !names.contains(&origin) {
            names.push(origin);
        }
    }
    let shown: Vec<&str> = names.iter().copied().take(4).collect();
    let more = if names.len() > 4 { "+..." } else { "" };
    format!("{}{more}", shown.join("+"))
}
