//! Axes that models join and part again, kept apart. A linear layer over `[batch * sequence,
//! width]` is one over `[batch, sequence, width]`; what is in use of two axes can be told, what is
//! in use of their product can not. So the operations between a reshape that joins axes in use in
//! part and the one that parts them are written over the axes themselves.

use smallvec::SmallVec;

use super::op::{Affine, Axes, Composite, Contract, Op, Shape};
use super::used::span;
use super::{Args, Graph, Node, NodeId};
use crate::error::Diagnostic;

/// The axes that an axis stands for, by extent; one where it stands for itself.
type Parts = SmallVec<[usize; 2]>;

/// A value as it is now: its axes in a row are the parts of the axes that it had.
#[derive(Clone, Debug)]
struct Value {
    id: NodeId,
    parts: Vec<Parts>,
}

impl Value {
    fn plain(id: NodeId, shape: &[usize]) -> Value {
        Value { id, parts: shape.iter().map(|&extent| one(extent)).collect() }
    }

    fn is_plain(&self) -> bool {
        self.parts.iter().all(|parts| parts.len() == 1)
    }

    /// Where the parts of an axis begin.
    fn place(&self, axis: usize) -> usize {
        self.parts[..axis].iter().map(|parts| parts.len()).sum()
    }

    fn shape(&self) -> Shape {
        self.parts.iter().flatten().copied().collect()
    }
}

fn one(extent: usize) -> Parts {
    Parts::from_slice(&[extent])
}

/// The same graph with axes in use in part kept apart wherever operations allow it.
pub fn apart(graph: &Graph) -> Graph {
    let mut apart = Apart { out: Graph::empty_like(graph), values: Vec::new() };
    for node in &graph.nodes {
        // What cannot be written so stays as it was.
        let value = apart.node(node).unwrap_or_else(|| apart.as_it_was(node));
        apart.values.push(value);
    }
    let outputs = graph.outputs.iter().map(|(name, id)| (name, id, &graph.node(*id).origin));
    for (name, id, origin) in outputs {
        let id = apart.joined(*id, &graph.ty(*id).shape, origin);
        apart.out.outputs.push((name.clone(), id));
    }
    apart.out
}

struct Apart {
    out: Graph,
    /// By number in the graph that was.
    values: Vec<Value>,
}

/// An operation that is written over parts, its operands, and the parts of its result.
type Written = Option<(Op, SmallVec<[NodeId; 4]>, Vec<Parts>)>;

impl Apart {
    /// A value with the shape that it had.
    fn joined(&mut self, id: NodeId, shape: &[usize], origin: &super::Origin) -> NodeId {
        let value = &self.values[id.index()];
        match value.is_plain() {
            true => value.id,
            false => {
                let joined = self.out.reshape(value.id, shape, origin);
                joined.expect("parts of an axis have its elements")
            }
        }
    }

    fn as_it_was(&mut self, node: &Node) -> Value {
        let arg = |apart: &mut Apart, &arg: &NodeId| {
            let shape: Shape =
                apart.values[arg.index()].parts.iter().map(|p| p.iter().product()).collect();
            apart.joined(arg, &shape, &node.origin)
        };
        let args: Args = node.args.iter().map(|a| arg(self, a)).collect();
        let id = match node.op {
            Op::Input(_) | Op::Const(_) => {
                self.out.push(node.op.clone(), args, node.ty.clone(), &node.origin)
            }
            _ => {
                let added = self.out.add(node.op.clone(), &args, &node.origin);
                added.expect("an operation that fitted its operands")
            }
        };
        Value::plain(id, &node.ty.shape)
    }

    fn node(&mut self, node: &Node) -> Option<Value> {
        let args: Vec<Value> =
            node.args.iter().map(|arg| self.values[arg.index()].clone()).collect();
        if let Op::Reshape(shape) = &node.op {
            return self.reshape(&args[0], shape, node);
        }
        if args.iter().all(Value::is_plain) {
            return None;
        }
        let (op, ids, parts) = self.written(node, &args)?;
        let id = self.added(op, &ids, node).ok()?;
        Some(Value { id, parts })
    }

    fn added(&mut self, op: Op, ids: &[NodeId], node: &Node) -> Result<NodeId, Diagnostic> {
        self.out.add(op, ids, &node.origin)
    }

    /// A reshape that joins an axis in use in part with others leaves them apart.
    fn reshape(&mut self, x: &Value, shape: &[usize], node: &Node) -> Option<Value> {
        let before = x.shape();
        let ty = self.out.ty(x.id);
        if ty.used.is_empty() || ty.numel() == 0 {
            return None;
        }
        let partial = |axis: usize| span(ty, axis).is_some();
        let parts = refine(&before, shape, &partial)?;
        let value = Value { id: x.id, parts };
        let id = self.added(Op::Reshape(value.shape()), &[x.id], node).ok()?;
        Some(Value { id, ..value })
    }

    fn written(&mut self, node: &Node, args: &[Value]) -> Written {
        let x = &args[0];
        let single = |axis: usize| (x.parts[axis].len() == 1).then(|| x.place(axis) as u8);
        let whole = |axis: usize| x.parts[axis].len() == 1;
        let op = node.op.clone();
        let same = |op: Op| Some((op, SmallVec::from_slice(&[x.id]), x.parts.clone()));
        match op {
            Op::Unary(_) | Op::Cast(_) | Op::Bits(_) => same(op),
            Op::Composite(f) => match f {
                Composite::Sigmoid | Composite::Silu | Composite::Gelu => same(op),
                Composite::Softmax(a) => same(Op::Composite(Composite::Softmax(single(a.into())?))),
                Composite::LayerNorm(a, epsilon) | Composite::RmsNorm(a, epsilon) => {
                    let first = single(a.into())?;
                    (usize::from(a)..x.parts.len()).all(whole).then_some(())?;
                    same(Op::Composite(match f {
                        Composite::LayerNorm(..) => Composite::LayerNorm(first, epsilon),
                        _ => Composite::RmsNorm(first, epsilon),
                    }))
                }
            },
            Op::Scan(f, axis) => same(Op::Scan(f, single(axis.into())?)),
            Op::Binary(_) | Op::Select => {
                let (ids, parts) = self.aligned(args, None, node)?;
                Some((op, ids, parts))
            }
            Op::Concat(axis) => {
                let (ids, mut parts) = self.aligned(args, Some(axis.into()), node)?;
                let at = parts[..usize::from(axis)].iter().map(|p| p.len()).sum::<usize>();
                parts[usize::from(axis)] = one(node.ty.shape[usize::from(axis)]);
                Some((Op::Concat(at as u8), ids, parts))
            }
            Op::Contract(contract) => self.contract(&contract, args, node),
            Op::Gather(axis) => {
                let (axis, at) = (usize::from(axis), single(axis.into())?);
                let index = &args[1].parts;
                let parts = [&x.parts[..axis], index, &x.parts[axis + 1..]].concat();
                Some((Op::Gather(at), SmallVec::from_slice(&[x.id, args[1].id]), parts))
            }
            Op::Permute(_) | Op::Expand(_) | Op::Slice(_) | Op::Pad(_) | Op::Reduce(..) => {
                let (op, parts) = moved(&op, x)?;
                let others = args[1..].iter().map(|value| value.id);
                Some((op, std::iter::once(x.id).chain(others).collect(), parts))
            }
            Op::Input(_) | Op::Const(_) | Op::Iota(..) | Op::Reshape(_) | Op::Window(_) => None,
            Op::Scatter(_) | Op::Fused(_) => None,
        }
    }

    /// Operands of one rank with equal parts for each axis, but for one that stays whole.
    fn aligned(
        &mut self,
        args: &[Value],
        but: Option<usize>,
        node: &Node,
    ) -> Option<(SmallVec<[NodeId; 4]>, Vec<Parts>)> {
        let mut all = Vec::new();
        for axis in 0..args[0].parts.len() {
            let found = args.iter().map(|value| &value.parts[axis]);
            let extent = found.clone().map(|parts| parts.iter().product()).max()?;
            let full = found.filter(|parts| parts.iter().product::<usize>() == extent);
            let parts = full.max_by_key(|parts| parts.len())?.clone();
            if but == Some(axis) && args.iter().any(|value| value.parts[axis].len() > 1) {
                return None;
            }
            all.push(parts);
        }
        let ids = args.iter().map(|value| {
            let like = |axis: usize| match but == Some(axis) {
                true => value.parts[axis].clone(),
                false => parted(&value.parts[axis], &all[axis]),
            };
            self.parted(value, (0..all.len()).map(like).collect(), node)
        });
        Some((ids.collect::<Option<_>>()?, all))
    }

    /// A value with these parts, where it has coarser ones and all of what is parted is in use.
    fn parted(&mut self, value: &Value, parts: Vec<Parts>, node: &Node) -> Option<NodeId> {
        if value.parts == parts {
            return Some(value.id);
        }
        let ty = self.out.ty(value.id);
        let fits = (0..parts.len()).all(|axis| {
            let at = value.place(axis);
            let whole = value.parts[axis].len() == 1 && span(ty, at).is_none();
            value.parts[axis] == parts[axis] || whole || value.parts[axis].iter().all(|&e| e == 1)
        });
        let shape: Shape = parts.iter().flatten().copied().collect();
        fits.then(|| self.added(Op::Reshape(shape), &[value.id], node).ok())?
    }

    fn contract(&mut self, contract: &Contract, args: &[Value], node: &Node) -> Written {
        let mut axes: Vec<Parts> = contract.extents.iter().map(|&extent| one(extent)).collect();
        for (map, value) in contract.maps.iter().zip(args) {
            for (index, parts) in map.iter().zip(&value.parts).filter(|(_, p)| p.len() > 1) {
                // A single element may lie at a place that is a number.
                let Some(axis) = index.as_axis() else { continue };
                let fits = contract.extents[axis] == parts.iter().product::<usize>()
                    && (axes[axis].len() == 1 || axes[axis] == *parts);
                fits.then(|| axes[axis] = parts.clone())?;
            }
        }
        let place = |axis: usize| axes[..axis].iter().map(|parts| parts.len()).sum::<usize>();
        let mut ids = SmallVec::new();
        let mut maps: [SmallVec<[Affine; 4]>; 2] = Default::default();
        for (operand, (map, value)) in contract.maps.iter().zip(args).enumerate() {
            let mut parts = Vec::new();
            for (index, own) in map.iter().zip(&value.parts) {
                let by = index.terms.iter().find(|t| axes[t.0 as usize].len() > 1);
                match (index.as_axis(), by) {
                    (Some(axis), Some(_)) => {
                        (own.iter().product::<usize>() == contract.extents[axis]).then_some(())?;
                        let at = place(axis);
                        let each = (0..axes[axis].len()).map(|k| Affine::axis(at + k));
                        maps[operand].extend(each);
                        parts.push(axes[axis].clone());
                    }
                    (_, None) => {
                        let spread = index.substitute(&|axis| Affine::axis(place(axis)));
                        // Parts of a single element are all at 0.
                        let zero = own.iter().all(|&e| e == 1) && index.terms.is_empty();
                        (own.len() == 1 || zero).then_some(())?;
                        maps[operand].push(spread);
                        maps[operand].extend((1..own.len()).map(|_| Affine::constant(0)));
                        parts.push(own.clone());
                    }
                    (None, Some(_)) => return None,
                }
            }
            ids.push(self.parted(value, parts, node)?);
        }
        let n_out = place(contract.n_out);
        let parts = axes[..contract.n_out].to_vec();
        let written = Contract { extents: axes.into_iter().flatten().collect(), n_out, maps };
        Some((Op::Contract(Box::new(written)), ids, parts))
    }
}

/// Parts like those of another operand: a single element has as many, of extent 1.
fn parted(own: &Parts, all: &Parts) -> Parts {
    let extent = own.iter().product::<usize>();
    match extent == all.iter().product::<usize>() {
        true => all.clone(),
        false if extent == 1 => all.iter().map(|_| 1).collect(),
        false => own.clone(),
    }
}

/// Operations with a parameter for each axis.
fn moved(op: &Op, x: &Value) -> Option<(Op, Vec<Parts>)> {
    let places = |axis: usize| {
        let first = x.place(axis) as u8;
        first..first + x.parts[axis].len() as u8
    };
    let mut parts = x.parts.clone();
    let op = match op {
        Op::Permute(axes) => {
            parts = axes.iter().map(|&axis| x.parts[usize::from(axis)].clone()).collect();
            Op::Permute(axes.iter().flat_map(|&axis| places(axis.into())).collect())
        }
        Op::Reduce(f, axes) => {
            for &axis in axes {
                parts[usize::from(axis)].iter_mut().for_each(|extent| *extent = 1);
            }
            let axes: Axes = axes.iter().flat_map(|&axis| places(axis.into())).collect();
            Op::Reduce(*f, axes)
        }
        Op::Expand(shape) => {
            for (own, &extent) in parts.iter_mut().zip(shape) {
                if own.iter().product::<usize>() != extent {
                    *own.last_mut()? = extent;
                }
            }
            Op::Expand(parts.iter().flatten().copied().collect())
        }
        Op::Slice(axes) => {
            let mut all = SmallVec::new();
            for (own, &range) in parts.iter_mut().zip(axes) {
                let whole = range == (0, 1, own.iter().product::<usize>());
                match whole || range.2 == 1 && own.iter().all(|&extent| extent == 1) {
                    true => all.extend(own.iter().map(|&extent| (0, 1, extent))),
                    false if own.len() == 1 => {
                        all.push(range);
                        *own = one(range.2);
                    }
                    false => return None,
                }
            }
            Op::Slice(all)
        }
        Op::Pad(borders) => {
            let mut all = SmallVec::new();
            for (own, &border) in parts.iter_mut().zip(borders) {
                if border != (0, 0) && own.len() > 1 {
                    return None;
                }
                all.push(border);
                all.extend((1..own.len()).map(|_| (0, 0)));
                own[0] += border.0 + border.1;
            }
            Op::Pad(all)
        }
        Op::Input(_) | Op::Const(_) | Op::Iota(..) | Op::Reshape(_) | Op::Window(_) => return None,
        Op::Scatter(_) | Op::Fused(_) | Op::Contract(_) | Op::Composite(_) => return None,
        Op::Unary(_) | Op::Cast(_) | Op::Scan(..) | Op::Binary(_) | Op::Select => return None,
        Op::Concat(_) | Op::Gather(_) | Op::Bits(_) => return None,
    };
    Some((op, parts))
}

/// The parts that axes `after` have of axes `before`: one for each axis that is in use in part, one
/// for what is in use whole between them. Nothing where an axis in use in part would be cut.
fn refine(
    before: &[usize],
    after: &[usize],
    partial: &dyn Fn(usize) -> bool,
) -> Option<Vec<Parts>> {
    let mut axes = before.iter().copied().enumerate().filter(|axis| axis.1 != 1);
    // What is left of the axis that was cut.
    let mut left: Option<usize> = None;
    let mut all = Vec::new();
    for &extent in after {
        let mut room = extent;
        let (mut parts, mut open) = (Parts::new(), false);
        while room > 1 {
            let (taken, whole) = match left.take() {
                Some(rest) => (rest, true),
                None => {
                    let (axis, rest) = axes.next()?;
                    (rest, !partial(axis))
                }
            };
            let part = match (taken <= room, whole) {
                (true, _) => taken,
                (false, true) if taken % room == 0 => {
                    left = Some(taken / room);
                    room
                }
                (false, _) => return None,
            };
            (room % part == 0).then(|| room /= part)?;
            match parts.last_mut() {
                Some(last) if open && whole => *last *= part,
                _ => parts.push(part),
            }
            open = whole;
        }
        if parts.is_empty() {
            parts.push(1);
        }
        all.push(parts);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::DType;

    use super::super::op::{ReduceFn, Type, UnaryFn};
    use super::super::used::{Span, Used, is_mixed};
    use super::super::{Graph, Origin};
    use super::*;

    /// An input in use in part along its first `partial` axes.
    fn input(graph: &mut Graph, name: &str, shape: &[usize], partial: usize) -> NodeId {
        let spans = (0..partial as u8).map(|a| (a, Span::Dim { dim: a, more: 0 }));
        let used: Used = spans.collect();
        graph.input(name, Type { used, ..Type::new(DType::F32, shape) })
    }

    #[test]
    fn shapes_have_common_parts() {
        let partial = |axes: &'static [usize]| move |axis: usize| axes.contains(&axis);
        let parts = |before: &[usize], after: &[usize], axes| {
            let parts = refine(before, after, &partial(axes))?;
            Some(parts.iter().map(|p| p.to_vec()).collect::<Vec<_>>())
        };
        assert_eq!(parts(&[4, 9, 8], &[36, 8], &[0, 1]), Some(vec![vec![4, 9], vec![8]]));
        assert_eq!(parts(&[4, 9, 8], &[36, 1, 8], &[]), Some(vec![vec![36], vec![1], vec![8]]));
        let heads = parts(&[9, 4, 64], &[9, 16, 16], &[0, 1]);
        assert_eq!(heads, Some(vec![vec![9], vec![4, 4], vec![16]]));
        assert_eq!(
            parts(&[9, 4, 4, 16], &[9, 4, 64], &[0, 1]).map(|p| p[2].clone()),
            Some(vec![64])
        );
        assert_eq!(parts(&[8, 9], &[9, 8], &[0]), None);
        assert_eq!(parts(&[16, 3], &[4, 12], &[0]), None);
        assert_eq!(parts(&[3, 4, 5], &[60], &[1]), Some(vec![vec![3, 4, 5]]));
    }

    #[test]
    fn a_layer_over_joined_axes_is_one_over_both() {
        let (mut graph, at) = (Graph::default(), Origin::from("test"));
        let x = input(&mut graph, "x", &[4, 9, 8], 2);
        let weight = input(&mut graph, "w", &[8, 6], 0);
        let rows = graph.reshape(x, &[36, 8], &at).expect("rows");
        let y = graph.matmul(rows, weight, &at).expect("a product");
        let y = graph.unary(UnaryFn::Tanh, y, &at).expect("a function");
        let sum = graph.reduce(ReduceFn::Sum, y, &[1], &at).expect("sums");
        let y = graph.binary(super::super::op::BinaryFn::Mul, y, sum, &at).expect("products");
        let y = graph.reshape(y, &[4, 9, 2, 3], &at).expect("a shape");
        graph.outputs.push(("y".to_string(), y));
        assert!(graph.nodes.iter().any(|node| is_mixed(&node.ty)));
        let apart = apart(&graph).live();
        assert!(apart.nodes.iter().all(|node| !is_mixed(&node.ty)), "{:?}", apart.nodes);
        assert_eq!(apart.ty(apart.outputs[0].1).shape, graph.ty(y).shape);
        let values = [[4, 9, 8].as_slice(), &[8, 6]].map(|shape| {
            let count: usize = shape.iter().product();
            let numbers: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
            let tensor = kiln_runtime::tensor::Tensor::from_slice(shape, &numbers);
            super::super::eval::Value::from_tensor(&tensor)
        });
        let want = super::super::eval::eval(&graph, &values);
        let got = super::super::eval::eval(&apart, &values);
        assert_eq!(got[0].as_f64s(), want[0].as_f64s());
    }
}
