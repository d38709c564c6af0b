//! The choice graph: every value that an output may need, with the kernels that may compute it.

use std::collections::{HashMap, HashSet};

use egg::Id;
use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::bodies::{Bodies, Places};
use super::extract::{Build, Cheapest, users};
use super::fuse;
use super::kind::{Kind, is_widening};
use super::lang::{ENode, Saturated};
use super::select::Selection;
use crate::graph::op::Op;
use crate::graph::{Args, Body, Graph, Node, NodeId, Origin};

/// A kernel for a value: a body over other values.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kernel {
    /// Number of its body.
    pub body: u32,
    /// The values that are its arguments.
    pub args: Places,
    /// The values that it computes: its result, then what is inside.
    pub inside: SmallVec<[u32; 8]>,
    /// Whether it only gives the bytes of its argument another shape, which is no work.
    pub alias: bool,
}

/// A value: an e-class.
#[derive(Clone, Debug)]
pub struct Value {
    /// The e-class.
    pub class: Id,
    /// Whether it hangs on constants only; it is computed when the model is compiled.
    pub constant: bool,
    /// Whether it is there anyway: a constant, or an input of the model.
    pub free: bool,
    /// How many operations of the model use it, at least 1.
    pub users: f64,
    /// Its single operations as kernels.
    pub operations: Vec<Kernel>,
}

/// All values that outputs may need.
pub struct ChoiceGraph {
    /// The values, operands mostly before users.
    pub values: Vec<Value>,
    /// The values that are outputs.
    pub outputs: Vec<u32>,
    /// Bodies of all kernels.
    pub bodies: Bodies,
}

impl ChoiceGraph {
    /// The choices that an e-graph leaves, before any fusion.
    pub fn new(saturated: &Saturated, cheapest: &Cheapest, graph: &Graph) -> ChoiceGraph {
        let egraph = &saturated.egraph;
        let needed = needed(saturated, graph);
        let users = users(saturated, graph);
        let order = cheapest.order.iter().copied().filter(|id| needed.contains(id));
        let order: Vec<Id> = order.collect();
        let places: HashMap<Id, u32> = order.iter().copied().zip(0..).collect();
        let outputs = graph.outputs.iter();
        let outputs = outputs.map(|o| places[&egraph.find(saturated.classes[o.1.index()])]);
        let mut out = ChoiceGraph {
            outputs: outputs.collect(),
            values: Vec::with_capacity(order.len()),
            bodies: Bodies::for_machine(egraph.analysis.dots),
        };
        for &class in &order {
            let is_input = |n: &ENode| matches!(n.op, Op::Input(_));
            let constant = egraph[class].data.constant;
            let widens = constant && widens(saturated, class);
            let free = constant && !widens || egraph[class].nodes.iter().any(is_input);
            let users = users.get(&class).map_or(1.0, |u| u.max(1.0));
            let place = out.values.len() as u32;
            let mut operations = Vec::new();
            if !free {
                let mut nodes: Vec<&ENode> = egraph[class].nodes.iter().collect();
                nodes.retain(|n| !widens || matches!(n.op, Op::Cast(_)));
                nodes.sort_unstable();
                for node in nodes {
                    let args: Vec<u32> =
                        node.args.iter().map(|a| places[&egraph.find(*a)]).collect();
                    // A value does not come from itself.
                    if !args.contains(&place) {
                        operations.push(out.operation(saturated, (class, place), node, &args));
                    }
                }
            }
            out.values.push(Value { class, constant, free, users, operations });
        }
        out
    }

    /// The kernel of one operation.
    fn operation(
        &mut self,
        saturated: &Saturated,
        (class, place): (Id, u32),
        node: &ENode,
        args: &[u32],
    ) -> Kernel {
        let node_of = |op: Op, id: Id, args: Args| {
            let data = &saturated.egraph[id].data;
            let origin = data.origin.clone().unwrap_or_else(|| "".into());
            Node { op, args, ty: data.ty.clone(), origin }
        };
        let operands = node.args.iter().enumerate();
        let mut nodes: Vec<Node> = operands
            .map(|(k, &arg)| node_of(Op::Input(k as u32), arg, Default::default()))
            .collect();
        // A value that is two operands is one argument.
        let first = |a: &u32| NodeId(args.iter().position(|b| b == a).unwrap_or(0) as u32);
        nodes.push(node_of(node.op.clone(), class, args.iter().map(first).collect()));
        let (body, args) = self.bodies.intern(&Body { nodes }, args);
        let alias = node.op.is_alias();
        Kernel { body, args, inside: SmallVec::from_slice(&[place]), alias }
    }

    /// Modelled time of a kernel by itself.
    pub fn us(&mut self, kernel: &Kernel) -> f64 {
        if kernel.alias {
            return 0.0;
        }
        let constant = |(k, &a): (usize, &u32)| u32::from(self.values[a as usize].constant) << k;
        let constants = kernel.args.iter().enumerate().map(constant).fold(0, |a, b| a | b);
        self.bodies.us(kernel.body, constants)
    }

    /// Adds the greedy fuser's kernels of an extracted graph, and gives them as a selection.
    pub fn greedy(
        &mut self,
        saturated: &Saturated,
        (extracted, classes): &(Graph, Vec<Id>),
        kernels: &mut [Vec<Kernel>],
    ) -> Selection {
        let places: HashMap<Id, u32> = self.values.iter().map(|v| v.class).zip(0..).collect();
        let class = |node: usize| saturated.egraph.find(classes[node]);
        let place = |node: usize| places.get(&class(node)).copied();
        let clusters = fuse::clusters(extracted);
        let mut selection: Selection = vec![None; self.values.len()];
        let mut choose = |value: u32, kernel: Kernel| {
            let known = &mut kernels[value as usize];
            let same = |k: &Kernel| k.body == kernel.body && k.args == kernel.args;
            let at = known.iter().position(same).unwrap_or_else(|| {
                known.push(kernel);
                known.len() - 1
            });
            selection[value as usize] = Some(at as u32);
        };
        for (root, node) in extracted.nodes.iter().enumerate() {
            let Some(value) = place(root).filter(|&v| !self.values[v as usize].free) else {
                continue;
            };
            let single = [root];
            let members = match (clusters.get(&root), &node.op) {
                (Some(members), _) => members.as_slice(),
                (None, op) if op.is_alias() => &single,
                (None, _) => continue,
            };
            let (body, arguments) = fuse::body(extracted, members);
            let args: Option<Vec<u32>> = arguments.into_iter().map(place).collect();
            let Some(args) = args.filter(|args| !args.contains(&value)) else { continue };
            let (body, args) = self.bodies.intern(&body, &args);
            let inside = members.iter().rev().filter_map(|&m| place(m)).collect();
            let alias = node.op.is_alias() && members.len() == 1;
            choose(value, Kernel { body, args, inside, alias });
        }
        selection
    }

    /// The graph of the chosen kernels, which come operands first. Constants are as they were.
    pub fn graph(&self, chosen: &[(u32, &Kernel)], build: Build, original: &Graph) -> Graph {
        let mut build = build;
        let nameless: Origin = "".into();
        for &(value, kernel) in chosen {
            let class = self.values[value as usize].class;
            let args = kernel.args.iter();
            let args = args.map(|&a| build.visit(self.values[a as usize].class, &nameless));
            let args: Args = args.collect();
            let root = self.bodies.get(kernel.body).root();
            let op = if kernel.alias { root.op.clone() } else { Op::Fused(kernel.body) };
            let mut inside = kernel.inside.clone();
            inside.sort_unstable();
            let names: Vec<Origin> = inside
                .iter()
                .filter_map(|&v| build.origin(self.values[v as usize].class))
                .collect();
            let names = fuse::joined(names.iter().map(|n| n.as_ref()));
            let origin = match self.bodies.kind(kernel.body) {
                Kind::Attention => format!("attention of {names}").into(),
                _ => names.into(),
            };
            let id = build.graph.push(op, args, root.ty.clone(), &origin);
            build.add(class, id);
        }
        for ((name, _), &value) in original.outputs.iter().zip(&self.outputs) {
            let id = build.visit(self.values[value as usize].class, &nameless);
            build.graph.outputs.push((name.clone(), id));
        }
        build.graph.bodies = self.bodies.list().to_vec();
        build.graph
    }
}

/// Whether a class is a list of what is multiplied, i16 or bytes as i32 or short floats as f32:
/// kernels read these.
fn widens(saturated: &Saturated, id: Id) -> bool {
    let egraph = &saturated.egraph;
    let is_short = |dtype: DType| match dtype {
        DType::I16 => true,
        DType::I8 => egraph.analysis.dots.whole,
        dtype => dtype.is_rounded(),
    };
    let short = |n: &ENode| {
        let from = n.args.first().map(|x| egraph[*x].data.ty.dtype);
        from.is_some_and(|from| is_widening(&n.op, from) && is_short(from))
    };
    egraph[id].data.ty.numel() > 1 && egraph[id].nodes.iter().any(short)
}

/// The classes that outputs may need; constants are leaves.
fn needed(saturated: &Saturated, graph: &Graph) -> HashSet<Id> {
    let egraph = &saturated.egraph;
    let outputs = graph.outputs.iter();
    let mut open: Vec<Id> = outputs.map(|o| egraph.find(saturated.classes[o.1.index()])).collect();
    let mut needed = HashSet::new();
    while let Some(id) = open.pop() {
        if !needed.insert(id) || egraph[id].data.constant && !widens(saturated, id) {
            continue;
        }
        open.extend(egraph[id].nodes.iter().flat_map(|n| &n.args).map(|a| egraph.find(*a)));
    }
    needed
}
