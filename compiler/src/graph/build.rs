//! Adding nodes: every node is inferred, checked, shared with an equal one, folded where it is a
//! small constant, and has an origin.

use std::sync::Arc;

use bytes::Bytes;
use kiln_runtime::tensor::{DType, Tensor};
use smallvec::{SmallVec, smallvec};

use super::eval::{Value, eval_op};
use super::infer::infer;
use super::op::{Affine, Axes, BinaryFn, Composite, Contract, Op, ReduceFn, Shape, Type, UnaryFn};
use super::{Args, Constant, Graph, Node, NodeId, Origin};
use crate::error::Diagnostic;

/// Results of at most this many elements are folded when all operands are constants.
const FOLD_ELEMENTS: usize = 4096;

/// Result of adding a node.
pub type Added = Result<NodeId, Diagnostic>;

impl Graph {
    /// Adds an input of the graph.
    pub fn input(&mut self, name: &str, ty: Type) -> NodeId {
        let op = Op::Input(self.inputs.len() as u32);
        self.inputs.push((name.to_string(), ty.clone()));
        self.push(op, Args::new(), ty, &Origin::from(name))
    }

    /// Adds a constant. Panics where the bytes do not fit the type: checked where they are read.
    pub fn constant_bytes(&mut self, ty: Type, bytes: Bytes, origin: &Origin) -> NodeId {
        assert_eq!(ty.size_bytes(), bytes.len(), "bytes of constant {origin}");
        const COMPARE_BYTES: usize = 256;
        if bytes.len() <= COMPARE_BYTES {
            let mut constants = self.constants.iter().enumerate();
            let same = constants
                .position(|(i, c)| c.ty == ty && c.bytes == bytes && !self.lengths.hangs(i as u32));
            if let Some(index) = same {
                return self.push(Op::Const(index as u32), Args::new(), ty, origin);
            }
        }
        let op = Op::Const(self.constants.len() as u32);
        Arc::make_mut(&mut self.constants).push(Constant { ty: ty.clone(), bytes });
        self.push(op, Args::new(), ty, origin)
    }

    /// Adds a constant tensor.
    pub fn tensor(&mut self, tensor: &Tensor, origin: &Origin) -> NodeId {
        let ty = Type::new(tensor.dtype(), tensor.shape());
        self.constant_bytes(ty, Bytes::copy_from_slice(tensor.bytes()), origin)
    }

    /// Adds a constant of one element with all extents 1, ready to repeat over a rank.
    pub fn scalar(&mut self, dtype: DType, rank: usize, value: f64, origin: &Origin) -> NodeId {
        let shape: Shape = std::iter::repeat_n(1, rank).collect();
        let value = Value::splat(dtype, &shape, value);
        self.tensor(&value.to_tensor(), origin)
    }

    /// Adds a list of i64.
    pub fn i64s(&mut self, shape: &[usize], values: &[i64], origin: &Origin) -> NodeId {
        self.tensor(&Tensor::from_slice(shape, values), origin)
    }

    /// The value of a node that is a constant; of one that hangs on dims where it grows as they do.
    pub fn value(&self, id: NodeId) -> Option<Value> {
        self.constant(id).filter(|_| !self.is_bent(id)).map(Value::from_constant)
    }

    /// Adds an operation over earlier nodes.
    pub fn add(&mut self, op: Op, args: &[NodeId], origin: &Origin) -> Added {
        let types: SmallVec<[&Type; 4]> = args.iter().map(|&a| self.ty(a)).collect();
        let ty: Type = infer(&op, &types).map_err(|misfit| {
            let operands: Vec<String> = types.iter().map(|t| super::text::type_text(t)).collect();
            Diagnostic::new(
                "K0201",
                format!("{} does not fit its operands", super::text::op_text(&op)),
            )
            .node(origin.as_ref())
            .expected(misfit.expected)
            .found(format!("{} (operands {})", misfit.found, operands.join(", ")))
        })?;
        drop(types);
        if let Some(id) = self.identity(&op, args, &ty) {
            return Ok(id);
        }
        if let (Op::Bits(_), Some(constant)) = (&op, args.first().and_then(|&x| self.constant(x))) {
            // However large it is, it stays where it is.
            let bytes = constant.bytes.clone();
            return Ok(self.constant_bytes(ty, bytes, origin));
        }
        if let Some(value) = self.fold(&op, args, &ty) {
            let others = self.fold_elsewhere(&op, args, (&ty, &value));
            return Ok(self.constant_for(&value, others, origin));
        }
        Ok(self.push(op, Args::from_slice(args), ty, origin))
    }

    /// Adds a node whose type is known, sharing an equal one.
    pub fn push(&mut self, op: Op, args: Args, ty: Type, origin: &Origin) -> NodeId {
        let key = (op, args);
        if let Some(&id) = self.known.get(&key) {
            return id;
        }
        let id = NodeId(self.nodes.len() as u32);
        self.known.insert(key.clone(), id);
        self.nodes.push(Node { op: key.0, args: key.1, ty, origin: origin.clone() });
        id
    }

    /// Operations that change nothing are not added.
    fn identity(&self, op: &Op, args: &[NodeId], ty: &Type) -> Option<NodeId> {
        let same = match op {
            Op::Cast(_) | Op::Bits(_) | Op::Reshape(_) | Op::Expand(_) => self.ty(args[0]) == ty,
            Op::Permute(axes) => axes.iter().enumerate().all(|(i, &a)| i == a as usize),
            Op::Slice(axes) => {
                self.ty(args[0]) == ty && axes.iter().all(|a| a.0 == 0 && (a.1 == 1 || a.2 == 1))
            }
            Op::Pad(borders) => borders.iter().all(|&b| b == (0, 0)),
            Op::Concat(_) => args.len() == 1,
            Op::Reduce(_, axes) => axes.iter().all(|&a| self.ty(args[0]).shape[a as usize] == 1),
            _ => false,
        };
        same.then(|| args[0])
    }

    /// The value of an operation over small constants.
    pub(crate) fn fold(&self, op: &Op, args: &[NodeId], ty: &Type) -> Option<Value> {
        let small = |ty: &Type| ty.numel() <= FOLD_ELEMENTS;
        if !small(ty) || args.is_empty() && !matches!(op, Op::Iota(..)) {
            return None;
        }
        // What is as long as a dim is small for some lengths only, and models for ranges are
        // compared with ones of other lengths.
        if !self.dims.is_empty() && matches!(op, Op::Iota(..) | Op::Expand(_)) {
            return None;
        }
        // A small piece of a large constant is worth reading; a large reduction is not.
        let value =
            |&a: &NodeId| self.constant(a).filter(|c| small(&c.ty)).map(Value::from_constant);
        let values: Vec<Value> = args.iter().map(value).collect::<Option<_>>()?;
        Some(eval_op(op, &values.iter().collect::<Vec<_>>(), ty))
    }

    // Shorthands, so that importers and rules read like equations.

    /// f(x)
    pub fn unary(&mut self, f: UnaryFn, x: NodeId, origin: &Origin) -> Added {
        self.add(Op::Unary(f), &[x], origin)
    }

    /// f(x, y); the operand of lower rank gets leading axes of extent 1.
    pub fn binary(&mut self, f: BinaryFn, x: NodeId, y: NodeId, origin: &Origin) -> Added {
        let rank = self.ty(x).rank().max(self.ty(y).rank());
        let (x, y) = (self.with_rank(x, rank, origin)?, self.with_rank(y, rank, origin)?);
        self.add(Op::Binary(f), &[x, y], origin)
    }

    /// condition ? x : y, ranks aligned as in [`binary`](Self::binary).
    pub fn select(&mut self, c: NodeId, x: NodeId, y: NodeId, origin: &Origin) -> Added {
        let rank = [c, x, y].iter().map(|&a| self.ty(a).rank()).max().unwrap_or(0);
        let c = self.with_rank(c, rank, origin)?;
        let (x, y) = (self.with_rank(x, rank, origin)?, self.with_rank(y, rank, origin)?);
        self.add(Op::Select, &[c, x, y], origin)
    }

    /// f(x, a number of x's dtype)
    pub fn binary_number(&mut self, f: BinaryFn, x: NodeId, y: f64, origin: &Origin) -> Added {
        let ty = self.ty(x).clone();
        let y = self.scalar(ty.dtype, ty.rank(), y, origin);
        self.add(Op::Binary(f), &[x, y], origin)
    }

    /// x with leading axes of extent 1 up to a rank.
    pub fn with_rank(&mut self, x: NodeId, rank: usize, origin: &Origin) -> Added {
        let ty = self.ty(x);
        let lead = rank.saturating_sub(ty.rank());
        let shape: Shape = std::iter::repeat_n(1, lead).chain(ty.shape.iter().copied()).collect();
        self.reshape(x, &shape, origin)
    }

    /// x under another shape.
    pub fn reshape(&mut self, x: NodeId, shape: &[usize], origin: &Origin) -> Added {
        self.add(Op::Reshape(Shape::from_slice(shape)), &[x], origin)
    }

    /// x with its axes in another order.
    pub fn permute(&mut self, x: NodeId, axes: &[usize], origin: &Origin) -> Added {
        let axes: Axes = axes.iter().map(|&a| a as u8).collect();
        self.add(Op::Permute(axes), &[x], origin)
    }

    /// x repeated to a shape of its rank.
    pub fn expand(&mut self, x: NodeId, shape: &[usize], origin: &Origin) -> Added {
        self.add(Op::Expand(Shape::from_slice(shape)), &[x], origin)
    }

    /// x as another dtype.
    pub fn cast(&mut self, x: NodeId, dtype: DType, origin: &Origin) -> Added {
        self.add(Op::Cast(dtype), &[x], origin)
    }

    /// The bits of x as another dtype.
    pub fn bits(&mut self, x: NodeId, dtype: DType, origin: &Origin) -> Added {
        self.add(Op::Bits(dtype), &[x], origin)
    }

    /// f over axes, which stay with extent 1.
    pub fn reduce(&mut self, f: ReduceFn, x: NodeId, axes: &[usize], origin: &Origin) -> Added {
        let mut axes: Axes = axes.iter().map(|&a| a as u8).collect();
        axes.sort_unstable();
        axes.dedup();
        self.add(Op::Reduce(f, axes), &[x], origin)
    }

    /// Mean over axes, which stay with extent 1.
    pub fn mean(&mut self, x: NodeId, axes: &[usize], origin: &Origin) -> Added {
        let count: usize = axes.iter().map(|&a| self.ty(x).shape[a]).product();
        let sum = self.reduce(ReduceFn::Sum, x, axes, origin)?;
        self.binary_number(BinaryFn::Mul, sum, 1.0 / count.max(1) as f64, origin)
    }

    /// A named function of x.
    pub fn composite(&mut self, f: Composite, x: NodeId, origin: &Origin) -> Added {
        self.add(Op::Composite(f), &[x], origin)
    }

    /// Batched matrix product of operands of one rank >= 2: `[.., m, k] x [.., k, n]`; leading
    /// extents are equal or 1.
    pub fn matmul(&mut self, x: NodeId, y: NodeId, origin: &Origin) -> Added {
        let (a, b) = (self.ty(x).shape.clone(), self.ty(y).shape.clone());
        let rank = a.len();
        let fits = rank >= 2 && b.len() == rank && a[rank - 1] == b[rank - 2];
        if !fits {
            return Err(Diagnostic::new("K0202", "the matrices of a product do not fit")
                .node(origin.as_ref())
                .expected("[.., m, k] x [.., k, n]")
                .found(format!("{a:?} x {b:?}")));
        }
        let (lead_a, lead_b) = (&a[..rank - 2], &b[..rank - 2]);
        let mut extents = super::infer::broadcast(lead_a, lead_b).map_err(|misfit| {
            Diagnostic::new("K0202", "the batches of a product do not fit")
                .node(origin.as_ref())
                .expected(misfit.expected)
                .found(misfit.found)
        })?;
        extents.extend([a[rank - 2], b[rank - 1], a[rank - 1]]);
        let lead = |shape: &[usize]| -> SmallVec<[Affine; 4]> {
            let of = |d: usize| match shape[d] {
                1 => Affine::constant(0),
                _ => Affine::axis(d),
            };
            (0..rank - 2).map(of).collect()
        };
        let (mut x_map, mut y_map) = (lead(&a), lead(&b));
        x_map.extend([Affine::axis(rank - 2), Affine::axis(rank)]);
        y_map.extend([Affine::axis(rank), Affine::axis(rank - 1)]);
        let contract = Contract { extents, n_out: rank, maps: [x_map, y_map] };
        self.add(Op::Contract(Box::new(contract)), &[x, y], origin)
    }

    /// Grouped N-dimensional convolution without padding: x `[n, c, d..]`, weight
    /// `[o, c / groups, k..]`, result `[n, o, e..]`. Pad x first where the model pads.
    pub fn conv(
        &mut self,
        [x, weight]: [NodeId; 2],
        (strides, dilations): (&[usize], &[usize]),
        groups: usize,
        origin: &Origin,
    ) -> Added {
        let (xs, ws) = (self.ty(x).shape.clone(), self.ty(weight).shape.clone());
        let spatial = xs.len().saturating_sub(2);
        let fits = xs.len() >= 3
            && ws.len() == xs.len()
            && groups > 0
            && ws[0].is_multiple_of(groups)
            && ws[1].checked_mul(groups) == Some(xs[1])
            && strides.len() == spatial
            && dilations.len() == spatial
            && strides.iter().chain(dilations).all(|&s| s > 0 && s < 1 << 31);
        if !fits {
            return Err(Diagnostic::new(
                "K0203",
                "the weight of a convolution does not fit its input",
            )
            .node(origin.as_ref())
            .expected(format!(
                "weight [o, {} / groups, k..], o a multiple of groups",
                xs.get(1).unwrap_or(&0)
            ))
            .found(format!("input {xs:?}, weight {ws:?}, groups {groups}, strides {strides:?}")));
        }
        let mut out: Shape = smallvec![xs[0], groups, ws[0] / groups];
        for d in 0..spatial {
            let reach = (ws[2 + d].max(1) - 1).checked_mul(dilations[d]);
            let room =
                reach.and_then(|r| xs[2 + d].checked_sub(r)).filter(|&r| r > 0 && ws[2 + d] > 0);
            let Some(room) = room else {
                return Err(Diagnostic::new(
                    "K0203",
                    "the window of a convolution is larger than its input",
                )
                .node(origin.as_ref())
                .found(format!("input {xs:?} (padded), weight {ws:?}, dilations {dilations:?}")));
            };
            out.push((room - 1) / strides[d] + 1);
        }
        let n_out = out.len();
        // Axes: n, g, o, e.. | c, k..
        let mut extents = out.clone();
        extents.extend(ws[1..].iter().copied());
        let channel = n_out;
        let mut x_map: SmallVec<[Affine; 4]> =
            smallvec![Affine::axis(0), Affine::axis(channel).plus(1, ws[1] as i64)];
        let mut w_map: SmallVec<[Affine; 4]> =
            smallvec![Affine::axis(2).plus(1, (ws[0] / groups) as i64), Affine::axis(channel)];
        for d in 0..spatial {
            let (at, tap) = (3 + d, channel + 1 + d);
            x_map.push(Affine::scaled(at, strides[d] as i64).plus(tap, dilations[d] as i64));
            w_map.push(Affine::axis(tap));
        }
        let contract = Contract { extents, n_out, maps: [x_map, w_map] };
        let grouped =
            self.add(Op::Contract(Box::new(contract.without_unit_axes())), &[x, weight], origin)?;
        let mut shape: Shape = smallvec![xs[0], ws[0]];
        shape.extend_from_slice(&out[3..]);
        self.reshape(grouped, &shape, origin)
    }
}

impl Contract {
    /// The same sum without the iteration axes of extent 1 that can go: all summed ones, and those
    /// of the group when a convolution has one group. Result axes stay, so the type does.
    pub fn without_unit_axes(&self) -> Contract {
        let keep: Vec<usize> =
            (0..self.extents.len()).filter(|&a| a < self.n_out || self.extents[a] != 1).collect();
        let place = |axis: usize| match keep.iter().position(|&k| k == axis) {
            Some(at) => Affine::axis(at),
            None => Affine::constant(0),
        };
        // A unit axis is always 0, whatever multiplies it.
        let strip = |index: &Affine| {
            let terms = index.terms.iter().copied().filter(|t| self.extents[t.0 as usize] != 1);
            Affine { terms: terms.collect(), offset: index.offset }.substitute(&place)
        };
        let maps = [0, 1].map(|i: usize| self.maps[i].iter().map(strip).collect());
        Contract {
            extents: keep.iter().map(|&a| self.extents[a]).collect(),
            n_out: self.n_out,
            maps,
        }
    }
}
