//! The tensor graph: what a model computes, before anything is decided about how.

pub mod apart;
pub mod build;
pub mod composite;
pub mod eval;
pub mod infer;
pub mod lengths;
pub mod op;
pub mod reduce;
pub mod scalar;
pub mod small;
pub mod text;
pub mod used;
pub mod verify;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use kiln_runtime::plan::{PlanDim, PlanState};
use smallvec::SmallVec;

use lengths::Lengths;
use op::{Op, Type};

/// Number of a node within its graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(pub u32);

impl NodeId {
    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Operands of a node.
pub type Args = SmallVec<[NodeId; 4]>;

/// Names of the model's nodes that a node comes from.
pub type Origin = Arc<str>;

/// One operation with its operands, its type and where it comes from.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// Its operands: earlier nodes.
    pub args: Args,
    /// The type of its result.
    pub ty: Type,
    /// Where it comes from in the model.
    pub origin: Origin,
}

/// A constant tensor; large ones point into the model file.
#[derive(Clone, PartialEq, Debug)]
pub struct Constant {
    /// Its type.
    pub ty: Type,
    /// Row-major elements in native order, not necessarily aligned.
    pub bytes: Bytes,
}

/// The body of a fused kernel: nodes in order, the last one is the result. Inputs are arguments.
#[derive(Clone, PartialEq, Debug)]
pub struct Body {
    /// Nodes, operands before users.
    pub nodes: Vec<Node>,
}

impl Body {
    /// The node that is the result.
    pub fn root(&self) -> &Node {
        self.nodes.last().expect("a body has at least one node")
    }
}

/// A graph of tensor operations, operands before users.
#[derive(Clone, Default, Debug)]
pub struct Graph {
    /// Nodes; operands come before users.
    pub nodes: Vec<Node>,
    /// Dims whose lengths a run decides; types speak of them by number.
    pub dims: Vec<PlanDim>,
    /// Inputs with their names and types, in the order of the model.
    pub inputs: Vec<(String, Type)>,
    /// Outputs with their names, in the order of the model.
    pub outputs: Vec<(String, NodeId)>,
    /// Outputs that the next run reads as inputs.
    pub states: Vec<PlanState>,
    /// Constants that `Op::Const` names. Shared: graphs of one model hold the same table.
    pub constants: Arc<Vec<Constant>>,
    /// Bodies that `Op::Fused` names.
    pub bodies: Vec<Arc<Body>>,
    /// Bounds of slices that lay beyond their axis while a model was imported for ranges of dims:
    /// a bound that hangs on a dim lies within it for other lengths.
    pub beyond: Vec<(Origin, i64)>,
    /// Constants that hang on dims, while a model is imported.
    pub lengths: Lengths,
    known: HashMap<(Op, Args), NodeId>,
}

impl Graph {
    /// A graph without nodes, with the inputs and constants of another.
    pub fn empty_like(other: &Graph) -> Graph {
        Graph {
            dims: other.dims.clone(),
            inputs: other.inputs.clone(),
            states: other.states.clone(),
            constants: other.constants.clone(),
            ..Graph::default()
        }
    }

    /// The node of that number.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The type of a value.
    pub fn ty(&self, id: NodeId) -> &Type {
        &self.nodes[id.index()].ty
    }

    /// Node numbers in order.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    /// The state that is appended to where it lies, from that input on.
    pub fn grows(&self, input: usize) -> Option<PlanState> {
        self.states.iter().find(|state| state.in_place && state.input == input).copied()
    }

    /// The constant that a node is, if it is one.
    pub fn constant(&self, id: NodeId) -> Option<&Constant> {
        match self.node(id).op {
            Op::Const(index) => Some(&self.constants[index as usize]),
            _ => None,
        }
    }

    /// Everything that the graph says, as text, but for the elements of constants: graphs with
    /// equal texts and equal constants are equal.
    pub fn describe(&self) -> String {
        // All fields, so that none is forgotten. What is known again follows from the nodes; what
        // lay beyond its axis and what hangs on dims is settled when a graph has been proved.
        let Graph { nodes, dims, inputs, outputs, states, constants, bodies, .. } = self;
        let Graph { beyond: _, lengths: _, known: _, .. } = self;
        let types: Vec<&Type> = constants.iter().map(|constant| &constant.ty).collect();
        format!("{dims:?}\n{inputs:?}\n{outputs:?}\n{states:?}\n{types:?}\n{bodies:?}\n{nodes:?}")
    }

    /// The graph without nodes that no output needs; inputs stay.
    pub fn live(&self) -> Graph {
        let mut needed: Vec<bool> =
            self.nodes.iter().map(|n| matches!(n.op, Op::Input(_))).collect();
        self.outputs.iter().for_each(|o| needed[o.1.index()] = true);
        for (i, node) in self.nodes.iter().enumerate().rev() {
            if needed[i] {
                node.args.iter().for_each(|a| needed[a.index()] = true);
            }
        }
        let mut out = Graph::empty_like(self);
        out.bodies = self.bodies.clone();
        let mut place = vec![NodeId(0); self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate().filter(|(i, _)| needed[*i]) {
            let args = node.args.iter().map(|a| place[a.index()]).collect();
            place[i] = out.push(node.op.clone(), args, node.ty.clone(), &node.origin);
        }
        let outputs = self.outputs.iter();
        out.outputs = outputs.map(|(name, id)| (name.clone(), place[id.index()])).collect();
        out
    }
}
