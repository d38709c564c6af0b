//! Takes one node of each e-class that is needed: the cheapest by area flow (a value's cost is
//! shared by as many users as it had in the model), children before parents, without cycles.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use egg::Id;
use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::cost::{integers_us, op_us, rounded_us};
use super::kind::is_widening;
use super::lang::{ENode, Saturated};
use crate::graph::op::Op;
use crate::graph::{Args, Graph, NodeId, Origin};

/// Bytes per microsecond of a value that is written and read.
const BYTES_PER_US: f64 = 10_000.0;

/// The cost of a node by itself, apart from its operands.
fn node_us(saturated: &Saturated, class: Id, node: &ENode) -> f64 {
    let data = &saturated.egraph[class].data;
    if data.constant {
        return 0.0;
    }
    let constant =
        [0, 1].map(|k: usize| node.args.get(k).is_some_and(|a| saturated.egraph[*a].data.constant));
    let bytes = data.ty.size_bytes() as f64;
    // Pointwise work usually runs in the epilogue of what makes its operand.
    let traffic = match &node.op {
        Op::Input(_) | Op::Const(_) | Op::Reshape(_) | Op::Bits(_) | Op::Fused(_) => 0.0,
        Op::Permute(_) => 4.0 * bytes,
        Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast(_) | Op::Expand(_) | Op::Iota(..) => {
            0.2 * bytes
        }
        Op::Slice(_) | Op::Window(_) => 0.5 * bytes,
        Op::Pad(_)
        | Op::Concat(_)
        | Op::Gather(_)
        | Op::Scatter(_)
        | Op::Reduce(..)
        | Op::Scan(..)
        | Op::Contract(_)
        | Op::Composite(_) => bytes,
    };
    let work = match &node.op {
        Op::Contract(contract) => {
            let from = [0, 1].map(|k: usize| widened_from(saturated, node.args[k]));
            let dots = saturated.egraph.analysis.dots;
            match data.ty.dtype {
                DType::I32 => integers_us(contract, constant, from),
                // Else what makes an operand rounds it, and keeps it as f32.
                _ if dots.rounded.is_some() => rounded_us(contract, constant, from, dots),
                _ => op_us(&node.op, data.ty.numel() as f64, constant),
            }
        }
        op => op_us(op, data.ty.numel() as f64, constant),
    };
    0.01 + traffic / BYTES_PER_US + work
}

/// What a class, moved or not, is widened from.
fn widened_from(saturated: &Saturated, class: Id) -> Option<DType> {
    let egraph = &saturated.egraph;
    let from = |n: &ENode| {
        let dtype = egraph[*n.args.first()?].data.ty.dtype;
        is_widening(&n.op, dtype).then_some(dtype)
    };
    egraph[class].nodes.iter().find_map(|n| match &n.op {
        Op::Permute(_) | Op::Pad(_) => egraph[n.args[0]].nodes.iter().find_map(from),
        _ => from(n),
    })
}

/// How many operations of the model use each class, or parts of it.
pub fn users(saturated: &Saturated, original: &Graph) -> HashMap<Id, f64> {
    let egraph = &saturated.egraph;
    let mut users: HashMap<Id, f64> = HashMap::new();
    for node in &original.nodes {
        for arg in &node.args {
            *users.entry(egraph.find(saturated.classes[arg.index()])).or_insert(0.0) += 1.0;
        }
    }
    inherit_users(saturated, &mut users);
    users
}

/// The graph of the cheapest nodes, with the class of each.
pub fn extract(saturated: &Saturated, cheapest: &Cheapest, original: &Graph) -> (Graph, Vec<Id>) {
    let mut build = Build::new(saturated, cheapest, original);
    for (name, id) in &original.outputs {
        let origin = &original.node(*id).origin;
        let out = build.visit(saturated.classes[id.index()], origin);
        build.graph.outputs.push((name.clone(), out));
    }
    (build.graph, build.classes)
}

/// The same value in another layout, or before it is widened, has the users of the value; a value
/// made by merging has its parts as users.
fn inherit_users(saturated: &Saturated, users: &mut HashMap<Id, f64>) {
    let egraph = &saturated.egraph;
    let mut classes: Vec<Id> = egraph.classes().map(|c| c.id).collect();
    classes.sort_unstable();
    let is_slice = |n: &ENode| matches!(n.op, Op::Slice(_));
    let mut parts: HashMap<Id, f64> = HashMap::new();
    for class in &classes {
        let mut whole: Vec<Id> =
            egraph[*class].nodes.iter().filter(|n| is_slice(n)).map(|n| n.args[0]).collect();
        whole.sort_unstable();
        whole.dedup();
        whole.into_iter().for_each(|x| *parts.entry(egraph.find(x)).or_insert(0.0) += 1.0);
    }
    parts.into_iter().for_each(|(class, count)| {
        users.entry(class).or_insert(count);
    });
    for _ in 0..2 {
        for class in &classes {
            let Some(count) = users.get(class).copied() else { continue };
            for node in &egraph[*class].nodes {
                let moves = matches!(node.op, Op::Permute(_) | Op::Reshape(_));
                let is_short = |x: &Id| egraph[*x].data.ty.dtype.is_rounded();
                let widens = node.op == Op::Cast(DType::F32) && node.args.iter().all(is_short);
                if moves || widens {
                    let other = users.entry(egraph.find(node.args[0])).or_insert(0.0);
                    *other = other.max(count);
                }
            }
        }
    }
}

/// A node for each class.
pub struct Cheapest {
    /// The nodes.
    pub nodes: HashMap<Id, ENode>,
    /// The classes, each after the operands of its node.
    pub order: Vec<Id>,
}

/// A node for each class, by Knuth's generalisation of Dijkstra's algorithm: a class is settled by
/// the cheapest node whose operands are settled, so the choice has no cycles.
pub fn cheapest(saturated: &Saturated, users: &HashMap<Id, f64>) -> Cheapest {
    cheapest_by(&|class, node| node_us(saturated, class, node), saturated, users)
}

/// The same by other costs of nodes, which are positive.
pub fn cheapest_by(
    node_us: &dyn Fn(Id, &ENode) -> f64,
    saturated: &Saturated,
    users: &HashMap<Id, f64>,
) -> Cheapest {
    let egraph = &saturated.egraph;
    let mut classes: Vec<Id> = egraph.classes().map(|c| c.id).collect();
    classes.sort_unstable();
    let mut nodes: Vec<(Id, &ENode, Vec<Id>)> = Vec::new();
    for &class in &classes {
        let mut sorted: Vec<&ENode> = egraph[class].nodes.iter().collect();
        sorted.sort_unstable();
        for node in sorted {
            let mut args: Vec<Id> = node.args.iter().map(|a| egraph.find(*a)).collect();
            args.sort_unstable();
            args.dedup();
            nodes.push((class, node, args));
        }
    }
    let mut waiting: Vec<usize> = nodes.iter().map(|n| n.2.len()).collect();
    let mut used_by: HashMap<Id, Vec<usize>> = HashMap::new();
    let mut queue: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    // Costs are positive, so their bits are in the order of their values.
    let key = |cost: f64| cost.to_bits();
    for (i, (class, node, args)) in nodes.iter().enumerate() {
        args.iter().for_each(|a| used_by.entry(*a).or_default().push(i));
        if args.is_empty() {
            queue.push(Reverse((key(node_us(*class, node)), i)));
        }
    }
    let mut cost: HashMap<Id, f64> = HashMap::new();
    let mut best: HashMap<Id, ENode> = HashMap::new();
    let mut order: Vec<Id> = Vec::new();
    while let Some(Reverse((bits, i))) = queue.pop() {
        let (class, node, _) = &nodes[i];
        if best.contains_key(class) {
            continue;
        }
        best.insert(*class, (*node).clone());
        order.push(*class);
        cost.insert(*class, f64::from_bits(bits));
        for &user in used_by.get(class).map_or(&[][..], Vec::as_slice) {
            waiting[user] -= 1;
            if waiting[user] == 0 {
                let (class, node, args) = &nodes[user];
                let below: f64 = args
                    .iter()
                    .map(|a| cost[a] / users.get(a).copied().unwrap_or(1.0).max(1.0))
                    .sum();
                let total = node_us(*class, node) + below;
                queue.push(Reverse((key(total), user)));
            }
        }
    }
    Cheapest { nodes: best, order }
}

/// A graph that is made of classes.
pub struct Build<'a> {
    saturated: &'a Saturated,
    cheapest: &'a Cheapest,
    /// The graph so far.
    pub graph: Graph,
    /// The class of each node.
    pub classes: Vec<Id>,
    done: HashMap<Id, NodeId>,
    open: Vec<(Id, Origin)>,
}

impl<'a> Build<'a> {
    /// A graph with the inputs of the original, used or not.
    pub fn new(saturated: &'a Saturated, cheapest: &'a Cheapest, original: &Graph) -> Build<'a> {
        let graph = Graph::empty_like(original);
        let (classes, done, open) = (Vec::new(), HashMap::new(), Vec::new());
        let mut build = Build { saturated, cheapest, graph, classes, done, open };
        for (i, node) in original.nodes.iter().enumerate() {
            if let Op::Input(_) = node.op {
                build.visit(saturated.classes[i], &node.origin);
            }
        }
        build
    }

    /// Adds a class after its operands; a loop instead of recursion, since models can be deep.
    pub fn visit(&mut self, class: Id, origin: &Origin) -> NodeId {
        let root = self.saturated.egraph.find(class);
        self.open.push((root, origin.clone()));
        while let Some((class, user)) = self.open.last().cloned() {
            if self.done.contains_key(&class) {
                self.open.pop();
                continue;
            }
            let node = &self.cheapest.nodes[&class];
            let data = &self.saturated.egraph[class].data;
            let origin = data.origin.clone().unwrap_or(user);
            let args: SmallVec<[Id; 4]> =
                node.args.iter().map(|a| self.saturated.egraph.find(*a)).collect();
            let missing: Vec<Id> =
                args.iter().copied().filter(|a| !self.done.contains_key(a)).collect();
            if missing.is_empty() {
                let args: Args = args.iter().map(|a| self.done[a]).collect();
                // Zero points are numbers in the code.
                let number = data.constant && data.ty.numel() == 1 && !data.ty.dtype.is_float();
                let folded = number.then(|| self.graph.fold(&node.op, &args, &data.ty)).flatten();
                let id = match folded {
                    Some(value) => self.graph.tensor(&value.to_tensor(), &origin),
                    None => self.graph.push(node.op.clone(), args, data.ty.clone(), &origin),
                };
                self.add(class, id);
                self.open.pop();
            } else {
                self.open.extend(missing.into_iter().rev().map(|a| (a, origin.clone())));
            }
        }
        self.done[&root]
    }

    /// Where the value of a class comes from.
    pub fn origin(&self, class: Id) -> Option<Origin> {
        self.saturated.egraph[class].data.origin.clone()
    }

    /// Notes that a node is the value of a class.
    pub fn add(&mut self, class: Id, id: NodeId) {
        // Equal nodes of two classes are one node.
        if id.index() == self.classes.len() {
            self.classes.push(class);
        }
        self.done.insert(class, id);
    }
}
