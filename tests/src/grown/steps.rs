//! The operations that random graphs are made of, each one step of a graph that grows.

use kiln::graph::NodeId;
use kiln::graph::op::{Affine, BinaryFn, Composite, Contract, Op, ReduceFn, UnaryFn};
use kiln::tensor::DType;

use super::{DTYPES, Diet, Grower, origin};

impl Grower {
    pub(super) fn unary(&mut self, x: NodeId) -> Option<NodeId> {
        use UnaryFn::{Abs, Ceil, Cos, Floor, Log, Recip, Round, Sign, Sin, Sqrt};
        let f = self.pick(&UnaryFn::ALL).0;
        if matches!(f, Floor | Ceil | Round | Sign) && !self.is_exact(x) {
            return None;
        }
        // Of large numbers, neighbours are apart by more than a radian.
        let largest = self.values[x.index()].as_f64s().into_iter().filter(|v| v.is_finite());
        if matches!(f, Sin | Cos) && largest.fold(0.0, |m: f64, v| m.max(v.abs())) > 1e6 {
            return None;
        }
        let x = match f {
            Sqrt | Log | Recip if self.diet == Diet::Tame && self.ty(x).dtype.is_float() => {
                let positive = self.add(Op::Unary(Abs), &[x])?;
                let least = self.number(x, 0.25)?;
                self.add(Op::Binary(BinaryFn::Add), &[positive, least])?
            }
            _ => x,
        };
        self.add(Op::Unary(f), &[x])
    }

    pub(super) fn binary(&mut self, x: NodeId) -> Option<NodeId> {
        use BinaryFn::{Add, Div, Max, Min, Mul, Pow, Rem, Sub};
        let f = match self.chance(2) {
            true => self.pick(&[Add, Sub, Mul, Max, Min]),
            false => self.pick(&BinaryFn::ALL).0,
        };
        let y = self.partner(x)?;
        let exact = self.is_exact(x) && self.is_exact(y);
        let tame = self.diet == Diet::Tame;
        match f {
            _ if f.is_comparison() && !exact => None,
            Rem if !exact => None,
            // Sums of infinities of both signs hang on their order where rules join constants.
            // The remainder of a quotient beyond the mantissa is not what code says it is.
            Add | Sub | Mul | Div | Rem if !tame => None,
            Div if self.ty(y).dtype.is_float() => {
                let positive = self.add(Op::Unary(UnaryFn::Abs), &[y])?;
                let least = self.number(y, 0.5)?;
                let y = self.add(Op::Binary(Add), &[positive, least])?;
                self.add(Op::Binary(Div), &[x, y])
            }
            Pow => {
                let x = match self.ty(x).dtype.is_float() && tame {
                    true => self.add(Op::Unary(UnaryFn::Abs), &[x])?,
                    false => x,
                };
                let power = self.pick(&[0.5, 1.0, 2.0, 3.0, 1.5, 4.0]);
                let y = self.number(x, power)?;
                self.add(Op::Binary(Pow), &[x, y])
            }
            _ => self.add(Op::Binary(f), &[x, y]),
        }
    }

    pub(super) fn select(&mut self, x: NodeId) -> Option<NodeId> {
        let shape = self.shape(x);
        let fits = |&id: &NodeId| {
            let ty = self.graph.ty(id);
            ty.dtype == DType::Bool && kiln::graph::infer::broadcast(&shape, &ty.shape).is_ok()
        };
        let conditions: Vec<NodeId> = self.open.iter().copied().filter(fits).collect();
        let condition = match conditions.is_empty() {
            true => self.constant(DType::Bool, &shape)?,
            false => self.pick(&conditions),
        };
        let y = self.partner(x)?;
        let (x, y) = if self.chance(2) { (x, y) } else { (y, x) };
        self.add(Op::Select, &[condition, x, y])
    }

    pub(super) fn cast(&mut self, x: NodeId) -> Option<NodeId> {
        let to = self.pick(&DTYPES);
        let jumps = self.ty(x).dtype.is_float() && !to.is_float();
        if jumps && !self.is_exact(x) {
            return None;
        }
        self.add(Op::Cast(to), &[x])
    }

    /// Integers as others of as many bytes, or as codes, and back. (Zeros of code have any sign.)
    pub(super) fn bits(&mut self, x: NodeId) -> Option<NodeId> {
        let from = self.ty(x).dtype;
        let fits = |to: &DType| {
            let whole = !from.is_float() && !to.is_float() && *to != DType::Bool;
            whole && to.bytes() == from.bytes() && *to != from
        };
        let all: Vec<DType> = kiln::tensor::DTYPES.into_iter().filter(fits).collect();
        if all.is_empty() {
            return None;
        }
        let to = self.pick(&all);
        self.add(Op::Bits(to), &[x])
    }

    pub(super) fn permute(&mut self, x: NodeId) -> Option<NodeId> {
        let mut axes: Vec<u8> = (0..self.ty(x).rank() as u8).collect();
        (1..axes.len()).for_each(|i| axes.swap(i, self.random.below(i + 1)));
        self.add(Op::Permute(axes.into_iter().collect()), &[x])
    }

    /// Joins two axes, splits one, adds or drops one of extent 1.
    pub(super) fn reshape(&mut self, x: NodeId) -> Option<NodeId> {
        let mut shape = self.shape(x);
        let axis = self.random.below(shape.len().max(1));
        match self.random.below(4) {
            0 => shape.insert(axis.min(shape.len()), 1),
            1 if shape.get(axis) == Some(&1) => drop(shape.remove(axis)),
            2 if axis + 1 < shape.len() => shape[axis] *= shape.remove(axis + 1),
            _ => {
                let extent = *shape.get(axis)?;
                let factors: Vec<usize> =
                    (2..extent).filter(|&f| extent.is_multiple_of(f)).collect();
                let factor = factors.get(self.random.below(factors.len().max(1)))?;
                shape[axis] /= factor;
                shape.insert(axis + 1, *factor);
            }
        }
        self.add(Op::Reshape(shape.into_iter().collect()), &[x])
    }

    pub(super) fn expand(&mut self, x: NodeId) -> Option<NodeId> {
        let mut shape = self.shape(x);
        let axis = self.random.below(shape.len() + 1);
        shape.insert(axis, 1);
        let x = self.add(Op::Reshape(shape.iter().copied().collect()), &[x])?;
        shape[axis] = 2 + self.random.below(3);
        self.add(Op::Expand(shape.into_iter().collect()), &[x])
    }

    pub(super) fn slice(&mut self, x: NodeId) -> Option<NodeId> {
        let shape = self.shape(x);
        let range = |&extent: &usize| {
            if extent == 0 || self.chance(2) {
                return (0, 1, extent);
            }
            let (start, step) = (self.random.below(extent), 1 + self.random.below(3));
            match self.chance(3) {
                true => (start as i64, -(step as i64), start / step + 1),
                false => (start as i64, step as i64, (extent - 1 - start) / step + 1),
            }
        };
        let ranges = shape.iter().map(range).collect();
        self.add(Op::Slice(ranges), &[x])
    }

    pub(super) fn pad(&mut self, x: NodeId) -> Option<NodeId> {
        let rank = self.ty(x).rank();
        let border = |_| match self.chance(2) {
            true => (0, 0),
            false => (self.random.below(3), self.random.below(3)),
        };
        let borders = (0..rank).map(border).collect();
        let dtype = self.ty(x).dtype;
        let fill = self.constant(dtype, &[])?;
        self.add(Op::Pad(borders), &[x, fill])
    }

    pub(super) fn concat(&mut self, x: NodeId) -> Option<NodeId> {
        let (dtype, mut shape) = (self.ty(x).dtype, self.shape(x));
        let axis = self.random.below(shape.len().max(1));
        *shape.get_mut(axis)? = 1 + self.random.below(3);
        let y = match self.random.below(3) {
            0 => self.slice(x)?,
            1 => self.constant(dtype, &shape)?,
            _ => x,
        };
        let mut args = vec![x, y];
        if self.chance(3) {
            args.push(x);
        }
        if self.chance(2) {
            args.reverse();
        }
        self.add(Op::Concat(axis as u8), &args)
    }

    /// Indices from a constant or from data; some count from the end, some are out of range.
    pub(super) fn gather(&mut self, x: NodeId) -> Option<NodeId> {
        let rank = self.ty(x).rank();
        let axis = self.random.below(rank.max(1));
        let is_index =
            |&id: &NodeId| matches!(self.ty(id).dtype, DType::I32 | DType::I64) && id != x;
        let indices: Vec<NodeId> = self.open.iter().copied().filter(is_index).collect();
        let index = match indices.is_empty() || self.chance(2) {
            true => {
                let shape: Vec<usize> =
                    (0..self.random.below(3)).map(|_| 1 + self.random.below(4)).collect();
                let dtype = self.pick(&[DType::I32, DType::I64]);
                self.constant(dtype, &shape)?
            }
            false => self.pick(&indices),
        };
        self.add(Op::Gather(axis as u8), &[x, index])
    }

    pub(super) fn scatter(&mut self, x: NodeId) -> Option<NodeId> {
        let (dtype, mut shape) = (self.ty(x).dtype, self.shape(x));
        let count = 1 + self.random.below(5);
        *shape.first_mut()? = count;
        let index = self.constant(DType::I64, &[count])?;
        let updates = self.constant(dtype, &shape)?;
        let f = [None, Some(ReduceFn::Sum), Some(ReduceFn::Max), Some(ReduceFn::Min)];
        let f = self.pick(&f);
        self.add(Op::Scatter(f), &[x, index, updates])
    }

    /// Sliding windows along the last axes, folded.
    pub(super) fn windows(&mut self, x: NodeId) -> Option<NodeId> {
        let shape = self.shape(x);
        let count = 1 + self.random.below(2);
        let lead = shape.len().checked_sub(count)?;
        let window = |&extent: &usize| {
            let size = (1 + self.random.below(3)).min(extent);
            (size, 1 + self.random.below(2), 1 + self.random.below(2))
        };
        let windows = shape[lead..].iter().map(window).collect();
        let y = self.add(Op::Window(windows), &[x])?;
        if self.chance(4) {
            return Some(y);
        }
        let taps = (shape.len()..shape.len() + count).map(|axis| axis as u8).collect();
        let f = self.pick(&[ReduceFn::Max, ReduceFn::Max, ReduceFn::Sum, ReduceFn::Min]);
        let y = self.add(Op::Reduce(f, taps), &[y])?;
        let to = self.ty(y).shape[..shape.len()].iter().copied().collect();
        self.add(Op::Reshape(to), &[y])
    }

    fn some_axes(&mut self, x: NodeId) -> Vec<u8> {
        let rank = self.ty(x).rank() as u8;
        (0..rank).filter(|_| self.chance(2)).collect()
    }

    pub(super) fn reduce(&mut self, x: NodeId) -> Option<NodeId> {
        let axes = self.some_axes(x);
        let f = self.pick(&ReduceFn::ALL).0;
        self.add(Op::Reduce(f, axes.into_iter().collect()), &[x])
    }

    /// The largest or the smallest element.
    pub(super) fn greatest(&mut self, x: NodeId) -> Option<NodeId> {
        let axes = self.some_axes(x);
        let f = self.pick(&[ReduceFn::Max, ReduceFn::Min]);
        self.add(Op::Reduce(f, axes.into_iter().collect()), &[x])
    }

    pub(super) fn scan(&mut self, x: NodeId) -> Option<NodeId> {
        let axis = self.random.below(self.ty(x).rank().max(1));
        let f = self.pick(&ReduceFn::ALL).0;
        self.add(Op::Scan(f, axis as u8), &[x])
    }

    /// A product with weights, or with itself turned; often with a bias and a bound.
    pub(super) fn product(&mut self, x: NodeId) -> Option<NodeId> {
        let (dtype, shape) = (self.ty(x).dtype, self.shape(x));
        let rank = shape.len();
        let &[.., rows, sums] = &shape[..] else { return None };
        let y = match self.random.below(4) {
            0 => {
                let mut axes: Vec<u8> = (0..rank as u8).collect();
                axes.swap(rank - 1, rank - 2);
                let turned = self.add(Op::Permute(axes.into_iter().collect()), &[x])?;
                self.graph.matmul(x, turned, &origin()).ok()?
            }
            1 => {
                let w = self.constant(dtype, &[3, rows])?;
                let w = self.graph.with_rank(w, rank, &origin()).ok()?;
                self.settle(w)?;
                self.graph.matmul(w, x, &origin()).ok()?
            }
            _ => {
                let columns = 1 + self.random.below(20);
                let w = self.constant(dtype, &[sums, columns])?;
                let w = self.graph.with_rank(w, rank, &origin()).ok()?;
                self.settle(w)?;
                self.graph.matmul(x, w, &origin()).ok()?
            }
        };
        let y = self.settle(y)?;
        if self.chance(2) {
            return Some(y);
        }
        let mut along = vec![1; self.ty(y).rank()];
        *along.last_mut()? = *self.shape(y).last()?;
        let bias = self.constant(dtype, &along)?;
        let y = self.add(Op::Binary(BinaryFn::Add), &[y, bias])?;
        let zero = self.number(y, 0.0)?;
        self.add(Op::Binary(BinaryFn::Max), &[y, zero])
    }

    pub(super) fn convolution(&mut self, x: NodeId) -> Option<NodeId> {
        let (dtype, shape) = (self.ty(x).dtype, self.shape(x));
        if shape.len() < 3 || shape.contains(&0) {
            return None;
        }
        let spatial = shape.len() - 2;
        let mut borders = vec![(0, 0); 2];
        borders.extend((0..spatial).map(|_| (self.random.below(2), self.random.below(2))));
        let zero = self.graph.scalar(dtype, 0, 0.0, &origin());
        self.settle(zero)?;
        let x = self.add(Op::Pad(borders.into_iter().collect()), &[x, zero])?;
        let channels = shape[1];
        let divisors: Vec<usize> = (1..=channels).filter(|&g| channels.is_multiple_of(g)).collect();
        let groups = self.pick(&divisors);
        let mut weights = vec![groups * (1 + self.random.below(4)), channels / groups];
        let extents = self.shape(x);
        weights.extend(extents[2..].iter().map(|&e| e.min(1 + self.random.below(3))));
        let w = self.constant(dtype, &weights)?;
        let strides: Vec<usize> = (0..spatial).map(|_| 1 + self.random.below(2)).collect();
        let dilations: Vec<usize> =
            (0..spatial).map(|_| if self.chance(4) { 2 } else { 1 }).collect();
        let y = self.graph.conv([x, w], (&strides, &dilations), groups, &origin()).ok()?;
        self.settle(y)
    }

    /// A sum of products whose operands share any axes in any order.
    pub(super) fn einsum(&mut self, x: NodeId) -> Option<NodeId> {
        let (dtype, shape) = (self.ty(x).dtype, self.shape(x));
        let own: Vec<usize> =
            (0..1 + self.random.below(2)).map(|_| 1 + self.random.below(4)).collect();
        // Axes of x and axes of y alone, in an order of their own, the first ones in the result.
        let all: Vec<usize> = shape.iter().chain(&own).copied().collect();
        let mut order: Vec<usize> = (0..all.len()).collect();
        (1..order.len()).for_each(|i| order.swap(i, self.random.below(i + 1)));
        let place = |axis: usize| order.iter().position(|&o| o == axis).expect("all are there");
        let shared: Vec<usize> = (0..shape.len()).filter(|_| self.chance(2)).collect();
        let mut of_y: Vec<usize> = shared.into_iter().chain(shape.len()..all.len()).collect();
        (1..of_y.len()).for_each(|i| of_y.swap(i, self.random.below(i + 1)));
        let lengths: Vec<usize> = of_y.iter().map(|&axis| all[axis]).collect();
        let y = self.constant(dtype, &lengths)?;
        let contract = Contract {
            extents: order.iter().map(|&axis| all[axis]).collect(),
            n_out: self.random.below(all.len() + 1),
            maps: [
                (0..shape.len()).map(|axis| Affine::axis(place(axis))).collect(),
                of_y.iter().map(|&axis| Affine::axis(place(axis))).collect(),
            ],
        };
        self.add(Op::Contract(Box::new(contract)), &[x, y])
    }

    pub(super) fn composite(&mut self, x: NodeId) -> Option<NodeId> {
        let rank = self.ty(x).rank();
        let axis = self.random.below(rank.max(1)) as u8;
        let epsilon = 1e-3f32.to_bits();
        let f = self.pick(&[
            Composite::Sigmoid,
            Composite::Silu,
            Composite::Gelu,
            Composite::Softmax(axis),
            Composite::LayerNorm(axis, epsilon),
            Composite::RmsNorm(axis, epsilon),
        ]);
        let along = !matches!(f, Composite::Sigmoid | Composite::Silu | Composite::Gelu);
        (!along || rank > 0).then(|| self.add(Op::Composite(f), &[x])).flatten()
    }

    /// Scores of x with itself, a softmax of them, and x weighted by it.
    pub(super) fn attention(&mut self, x: NodeId) -> Option<NodeId> {
        let rank = self.ty(x).rank();
        if rank < 2 || !self.ty(x).dtype.is_float() {
            return None;
        }
        let mut axes: Vec<u8> = (0..rank as u8).collect();
        axes.swap(rank - 1, rank - 2);
        let keys = self.add(Op::Permute(axes.into_iter().collect()), &[x])?;
        let scores = self.graph.matmul(x, keys, &origin()).ok()?;
        let mut scores = self.settle(scores)?;
        let scale = self.number(scores, 0.25)?;
        scores = self.add(Op::Binary(BinaryFn::Mul), &[scores, scale])?;
        if self.chance(2) {
            let mask = self.partner(scores)?;
            scores = self.add(Op::Binary(BinaryFn::Add), &[scores, mask])?;
        }
        let weights = self.add(Op::Composite(Composite::Softmax(rank as u8 - 1)), &[scores])?;
        let mixed = self.graph.matmul(weights, x, &origin()).ok()?;
        self.settle(mixed)
    }
}
