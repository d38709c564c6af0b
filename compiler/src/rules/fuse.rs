//! The fuser: kernels grow from their result towards their operands, as long as the body stays of
//! a kind that has loops and no work is done twice.

use std::collections::{BTreeMap, HashMap};

use super::attention::is_short;
use super::bodies::Bodies;
use super::kind::{Kind, MAX_OPS, classify};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::op::Op;
use crate::graph::{Args, Body, Graph, Node, NodeId, Origin, composite};

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

    /// The cluster as a body.
    fn body(&self) -> Body {
        body_of(self.graph, &self.nodes, &self.arguments())
    }

    /// Whether the body has loops, whatever the target is.
    fn fits(&self) -> bool {
        if self.nodes.len() > MAX_OPS {
            return false;
        }
        let body = self.body();
        classify(&body.nodes).is_some_and(|k| k != Kind::Attention || !is_short(&body.nodes))
    }
}

/// Whether a value that several kernels want may be computed in each of them.
fn is_free(graph: &Graph, node: usize) -> bool {
    matches!(graph.nodes[node].op, Op::Permute(_) | Op::Reshape(_) | Op::Expand(_) | Op::Iota(..))
}

/// The graph with operations gathered into kernels; kernels that are there stay as they are.
pub fn fuse(graph: &Graph) -> Graph {
    rebuild(graph, &clusters(graph))
}

/// The operations of each kernel by its last one, ascending.
pub type Clusters = BTreeMap<usize, Vec<usize>>;

/// Which operations become one kernel.
pub fn clusters(graph: &Graph) -> Clusters {
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
    let mut clusters = Clusters::new();
    for root in (0..count).rev() {
        if !wanted[root] {
            continue;
        }
        let arguments = match graph.nodes[root].op {
            Op::Input(_) | Op::Const(_) => continue,
            Op::Reshape(_) | Op::Bits(_) | Op::Fused(_) => {
                graph.nodes[root].args.iter().map(|a| a.index()).collect()
            }
            _ => {
                let cluster = grow(graph, root, &users, &outputs, &constant);
                let arguments = cluster.arguments();
                clusters.insert(root, cluster.nodes);
                arguments
            }
        };
        arguments.into_iter().for_each(|a| wanted[a] = true);
    }
    clusters
}

/// The body of a cluster and its arguments.
pub fn body(graph: &Graph, nodes: &[usize]) -> (Body, Vec<usize>) {
    let cluster = Cluster { graph, nodes: nodes.to_vec() };
    (cluster.body(), cluster.arguments())
}

fn grow<'a>(
    graph: &'a Graph,
    root: usize,
    users: &[Vec<usize>],
    outputs: &[usize],
    constant: &[bool],
) -> Cluster<'a> {
    let mut cluster = Cluster { graph, nodes: vec![root] };
    // What may be computed within a cluster: used by nothing else, or free to compute again.
    let inside = |cluster: &Cluster, a: usize| {
        let fixed = matches!(graph.nodes[a].op, Op::Input(_) | Op::Const(_));
        // Constants are computed once, by kernels of their own.
        let separate = fixed || (constant[a] && !constant[root]);
        let alone = !outputs.contains(&a) && users[a].iter().all(|&u| cluster.has(u));
        !separate && (alone || is_free(graph, a))
    };
    loop {
        // The latest argument first: its own operands come before it.
        let mut arguments = cluster.arguments();
        arguments.sort_unstable_by(|a, b| b.cmp(a));
        let candidates: Vec<usize> =
            arguments.into_iter().filter(|&a| inside(&cluster, a)).collect();
        let step = candidates.iter().find_map(|&a| {
            let with = cluster.with(a).nodes;
            let with = Cluster { graph, nodes: with };
            with.fits().then_some(with)
        });
        let next = step.or_else(|| candidates.iter().find_map(|&a| reach(&cluster, a, &inside)));
        match next {
            Some(larger) => cluster = Cluster { graph, nodes: larger.nodes },
            None => return cluster,
        }
    }
}

/// Operations that are no body yet, but are one together with what is below them: the path from
/// the use of a reduction to the reduction.
fn reach<'a>(
    cluster: &Cluster<'a>,
    first: usize,
    inside: &dyn Fn(&Cluster, usize) -> bool,
) -> Option<Cluster<'a>> {
    const STEPS: usize = 8;
    let graph = cluster.graph;
    let mut trial = Cluster { graph, nodes: cluster.with(first).nodes };
    let mut newest = first;
    for _ in 0..STEPS {
        let below = graph.nodes[newest].args.iter().map(|a| a.index());
        newest = below.filter(|&a| !trial.has(a) && inside(&trial, a)).max()?;
        trial = Cluster { graph, nodes: trial.with(newest).nodes };
        if trial.fits() {
            return Some(trial);
        }
    }
    None
}

/// A graph with one node for each cluster, and those that some cluster needs.
fn rebuild(graph: &Graph, clusters: &Clusters) -> Graph {
    let mut out = Graph::empty_like(graph);
    let mut bodies = Bodies::default();
    let mut place: Vec<Option<NodeId>> = vec![None; graph.nodes.len()];
    let wanted = wanted(graph, clusters);
    for (i, node) in graph.nodes.iter().enumerate() {
        let input = matches!(node.op, Op::Input(_));
        if !wanted[i] && !input {
            continue;
        }
        let made = match (clusters.get(&i), &node.op) {
            (Some(nodes), _) => {
                let (body, arguments) = body(graph, nodes);
                Some((body, arguments, Origin::from(name_of(graph, nodes))))
            }
            (None, Op::Fused(body)) => {
                let arguments = node.args.iter().map(|a| a.index()).collect();
                let body = graph.bodies[*body as usize].as_ref().clone();
                Some((body, arguments, node.origin.clone()))
            }
            (None, _) => None,
        };
        place[i] = Some(match made {
            Some((body, arguments, origin)) => {
                let arguments: Vec<u32> =
                    arguments.iter().filter_map(|&a| Some(place[a]?.0)).collect();
                let (number, args) = bodies.intern(&body, &arguments);
                let args = args.into_iter().map(NodeId).collect();
                out.push(Op::Fused(number), args, node.ty.clone(), &origin)
            }
            None => {
                let args: Args = node.args.iter().filter_map(|a| place[a.index()]).collect();
                out.push(node.op.clone(), args, node.ty.clone(), &node.origin)
            }
        });
    }
    out.bodies = bodies.list().to_vec();
    let outputs = graph.outputs.iter();
    out.outputs =
        outputs.filter_map(|(name, id)| Some((name.clone(), place[id.index()]?))).collect();
    out
}

/// Which nodes are outputs or arguments of what is wanted.
fn wanted(graph: &Graph, clusters: &Clusters) -> Vec<bool> {
    let mut wanted = vec![false; graph.nodes.len()];
    graph.outputs.iter().for_each(|o| wanted[o.1.index()] = true);
    for i in (0..graph.nodes.len()).rev() {
        if !wanted[i] {
            continue;
        }
        match clusters.get(&i) {
            Some(nodes) => {
                let cluster = Cluster { graph, nodes: nodes.clone() };
                cluster.arguments().into_iter().for_each(|a| wanted[a] = true);
            }
            None => graph.nodes[i].args.iter().for_each(|a| wanted[a.index()] = true),
        }
    }
    wanted
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

fn name_of(graph: &Graph, nodes: &[usize]) -> String {
    joined(nodes.iter().map(|&n| graph.nodes[n].origin.as_ref()))
}

/// The names of a kernel's nodes, each once, the first few.
pub fn joined<'a>(origins: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<&str> = Vec::new();
    for origin in origins {
        if !names.contains(&origin) && !origin.is_empty() {
            names.push(origin);
        }
    }
    let shown: Vec<&str> = names.iter().copied().take(4).collect();
    let more = if names.len() > 4 { "+..." } else { "" };
    format!("{}{more}", shown.join("+"))
}
