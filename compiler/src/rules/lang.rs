//! Graph operations as e-nodes. The type of a value is e-class data, so that forms of different
//! types can never be joined: a union of such classes is a bug and stops at once.

use std::sync::Arc;

use egg::{DidMerge, EGraph, Id, Language};
use smallvec::SmallVec;

use crate::graph::infer::infer;
use crate::graph::op::{Op, Type};
use crate::graph::scalar::Dots;
use crate::graph::{Body, Constant, Graph, Origin};

/// An operation over e-classes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ENode {
    /// The operation.
    pub op: Op,
    /// Its operands.
    pub args: SmallVec<[Id; 4]>,
}

impl ENode {
    /// An operation over classes.
    pub fn new(op: Op, args: &[Id]) -> ENode {
        ENode { op, args: SmallVec::from_slice(args) }
    }
}

impl Language for ENode {
    type Discriminant = std::mem::Discriminant<Op>;

    fn discriminant(&self) -> Self::Discriminant {
        std::mem::discriminant(&self.op)
    }

    fn matches(&self, other: &Self) -> bool {
        self.op == other.op && self.args.len() == other.args.len()
    }

    fn children(&self) -> &[Id] {
        &self.args
    }

    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.args
    }
}

/// What is known of a class.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// Type of the value.
    pub ty: Type,
    /// Whether it hangs on constants only.
    pub constant: bool,
    /// Where it comes from, if it stands for a node of the model.
    pub origin: Option<Origin>,
}

/// Infers types; inputs and constants have theirs from the model.
#[derive(Clone, Default)]
pub struct Infer {
    /// Types of inputs.
    pub inputs: Vec<Type>,
    /// Constants.
    pub constants: Arc<Vec<Constant>>,
    /// Bodies of kernels, once there are any.
    pub bodies: Vec<Arc<Body>>,
    /// The dot products of the target: where there are those of integers, products are of bytes
    /// where they can be, else of short integers.
    pub dots: Dots,
    /// Origin of the node that a rule looks at, and so of what the rule makes.
    pub origin: Option<Origin>,
}

impl egg::Analysis<ENode> for Infer {
    type Data = Known;

    fn make(egraph: &mut EGraph<ENode, Self>, node: &ENode, _id: Id) -> Known {
        let types: SmallVec<[&Type; 4]> = node.args.iter().map(|a| &egraph[*a].data.ty).collect();
        let (ty, constant) = match &node.op {
            Op::Input(i) => (egraph.analysis.inputs[*i as usize].clone(), false),
            Op::Const(i) => (egraph.analysis.constants[*i as usize].ty.clone(), true),
            Op::Fused(body) => {
                let ty = egraph.analysis.bodies[*body as usize].root().ty.clone();
                (ty, node.args.iter().all(|a| egraph[*a].data.constant))
            }
            op => {
                let ty = infer(op, &types).expect("rules and graphs make typed nodes only");
                (ty, node.args.iter().all(|a| egraph[*a].data.constant))
            }
        };
        Known { ty, constant, origin: egraph.analysis.origin.clone() }
    }

    fn merge(&mut self, a: &mut Known, b: Known) -> DidMerge {
        assert_eq!(a.ty, b.ty, "an unsound rule joined values of different types");
        let merged = Known {
            ty: b.ty.clone(),
            constant: a.constant || b.constant,
            origin: a.origin.clone().or(b.origin.clone()),
        };
        let changed = DidMerge(*a != merged, b != merged);
        *a = merged;
        changed
    }
}

/// The e-graph of a model.
pub type Egg = EGraph<ENode, Infer>;

/// An e-graph with the classes of a graph's nodes.
pub struct Saturated {
    /// The e-graph.
    pub egraph: Egg,
    /// Class of each node.
    pub classes: Vec<Id>,
}

/// The e-graph of a graph, before any rule.
pub fn build(graph: &Graph) -> Saturated {
    let inputs = graph.inputs.iter().map(|i| i.1.clone()).collect();
    let mut egraph =
        Egg::new(Infer { inputs, constants: graph.constants.clone(), ..Infer::default() });
    let mut classes: Vec<Id> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let args: SmallVec<[Id; 4]> = node.args.iter().map(|a| classes[a.index()]).collect();
        let id = egraph.add(ENode { op: node.op.clone(), args });
        if egraph[id].data.origin.is_none() {
            let known = Known { origin: Some(node.origin.clone()), ..egraph[id].data.clone() };
            egraph.set_analysis_data(id, known);
        }
        classes.push(id);
    }
    egraph.rebuild();
    Saturated { egraph, classes }
}
