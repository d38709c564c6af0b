//! Chains of scales and shifts by constants become one scale and one shift, before the e-graph: in
//! there, the ways to group constants would outnumber everything else.
//!
//! `(x * a + b) * c + d = x * (a * c) + (b * c + d)`, which changes rounding as every regrouping.

use crate::graph::op::{BinaryFn, Op};
use crate::graph::{Args, Graph, NodeId, Origin};

/// The graph with chains of constants gathered.
pub fn gather(graph: &Graph) -> Graph {
    let mut users = vec![0usize; graph.nodes.len()];
    graph.nodes.iter().flat_map(|n| &n.args).for_each(|a| users[a.index()] += 1);
    graph.outputs.iter().for_each(|o| users[o.1.index()] += 1);
    let mut out =
        Gather { graph: Graph::empty_like(graph), constant: Vec::new(), once: Vec::new() };
    let mut place: Vec<NodeId> = Vec::with_capacity(graph.nodes.len());
    for (i, node) in graph.nodes.iter().enumerate() {
        let args: Args = node.args.iter().map(|a| place[a.index()]).collect();
        let id = out.node(&node.op, &args, node.ty.clone(), &node.origin);
        out.once[id.index()] = users[i] == 1;
        place.push(id);
    }
    let outputs = graph.outputs.iter();
    out.graph.outputs = outputs.map(|(name, id)| (name.clone(), place[id.index()])).collect();
    // What was regrouped would be looked at by every rule.
    out.graph.live()
}

struct Gather {
    graph: Graph,
    constant: Vec<bool>,
    /// Whether a node has one user in the original graph.
    once: Vec<bool>,
}

impl Gather {
    fn push(
        &mut self,
        op: &Op,
        args: &[NodeId],
        ty: crate::graph::op::Type,
        origin: &Origin,
    ) -> NodeId {
        let id = self.graph.push(op.clone(), Args::from_slice(args), ty, origin);
        if id.index() == self.constant.len() {
            let constant =
                !matches!(op, Op::Input(_)) && args.iter().all(|a| self.constant[a.index()]);
            self.constant.push(constant);
            self.once.push(true);
        }
        id
    }

    /// The constant operand of a commutative operation, and the other one.
    fn split(&self, id: NodeId, f: BinaryFn) -> Option<(NodeId, NodeId)> {
        let node = self.graph.node(id);
        if node.op != Op::Binary(f) || !node.ty.dtype.is_float() {
            return None;
        }
        let (x, y) = (node.args[0], node.args[1]);
        match (self.constant[x.index()], self.constant[y.index()]) {
            (false, true) if self.graph.ty(x) == &node.ty => Some((y, x)),
            (true, false) if self.graph.ty(y) == &node.ty => Some((x, y)),
            _ => None,
        }
    }

    fn node(
        &mut self,
        op: &Op,
        args: &[NodeId],
        ty: crate::graph::op::Type,
        origin: &Origin,
    ) -> NodeId {
        if let Op::Binary(f @ (BinaryFn::Mul | BinaryFn::Add)) = op {
            let (x, y) = (args[0], args[1]);
            let pair = match (self.constant[x.index()], self.constant[y.index()]) {
                (false, true) => Some((y, x)),
                (true, false) => Some((x, y)),
                _ => None,
            };
            if let Some((constant, other)) = pair
                && self.graph.ty(other) == &ty
                && ty.dtype.is_float()
                && let Some(id) = self.regroup(*f, constant, other, origin)
            {
                return id;
            }
        }
        self.push(op, args, ty, origin)
    }

    /// `f(other, constant)` where `other` ends in an operation with a constant itself.
    fn regroup(
        &mut self,
        f: BinaryFn,
        constant: NodeId,
        other: NodeId,
        origin: &Origin,
    ) -> Option<NodeId> {
        if !self.once[other.index()] {
            return None;
        }
        if let Some((first, x)) = self.split(other, f) {
            let joined = self.join(f, first, constant, origin)?;
            return self.apply(f, x, joined, origin);
        }
        if f == BinaryFn::Mul
            && let Some((shift, x)) = self.split(other, BinaryFn::Add)
        {
            let scaled = match self.regroup(BinaryFn::Mul, constant, x, origin) {
                Some(scaled) => scaled,
                None => self.apply(BinaryFn::Mul, x, constant, origin)?,
            };
            let shifted = self.join(BinaryFn::Mul, shift, constant, origin)?;
            return self.apply(BinaryFn::Add, scaled, shifted, origin);
        }
        None
    }

    fn join(&mut self, f: BinaryFn, a: NodeId, b: NodeId, origin: &Origin) -> Option<NodeId> {
        let types = [self.graph.ty(a), self.graph.ty(b)];
        let ty = crate::graph::infer::infer(&Op::Binary(f), &types).ok()?;
        Some(self.push(&Op::Binary(f), &[a, b], ty, origin))
    }

    fn apply(
        &mut self,
        f: BinaryFn,
        x: NodeId,
        constant: NodeId,
        origin: &Origin,
    ) -> Option<NodeId> {
        let ty = self.graph.ty(x).clone();
        let id = self.join(f, x, constant, origin)?;
        (self.graph.ty(id) == &ty).then_some(id)
    }
}
