//! What a body computes, and so which loops it gets: the legality of fusion, in one place.

use kiln_runtime::tensor::DType;

use super::attention;
use crate::graph::Node;
use crate::graph::op::{BinaryFn, Op, Type, UnaryFn};
use crate::graph::scalar::Parts;
use crate::graph::used::span;

/// Operations of a body at most.
pub const MAX_OPS: usize = 48;
/// Arguments of a body at most.
pub const MAX_ARGS: usize = 12;
/// Parts that concatenations of a body cut the result into at most.
const MAX_PARTS: usize = 8;
/// Elements that one thread may well compute alone.
const FEW: usize = 1 << 14;
/// Elements of a row that is reduced within a kernel at most.
const MAX_ROW: usize = 65_536;

/// What a body computes, and so which loops it gets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
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
    /// Two sums of products with a softmax between them.
    Attention,
}

/// Which last axis goes into lanes: that of the node that an epilogue follows, so that the epilogue
/// may not move it, or that of the result.
#[derive(Clone, Copy, PartialEq)]
enum Lanes {
    OfNode,
    OfResult,
}

pub(super) fn is_pointwise(op: &Op) -> bool {
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

/// The kind of a body, where it has loops. Its nodes are arguments (`Op::Input`) and operations,
/// operands before users, the last one the result.
pub fn classify(nodes: &[Node]) -> Option<Kind> {
    let body = Body { nodes };
    let members: Vec<usize> = body.members().collect();
    let (&root, arguments) = (members.last()?, nodes.len() - members.len());
    if members.len() == 1 {
        return Some(match &nodes[root].op {
            op if is_pointwise(op) || is_view(op) || matches!(op, Op::Gather(_)) => Kind::Map,
            Op::Contract(_) => Kind::Contract,
            _ => Kind::Alone,
        });
    }
    if members.len() > MAX_OPS || arguments > MAX_ARGS {
        return None;
    }
    if let Op::Pad(_) = nodes[root].op {
        return bordered(nodes, members[members.len() - 2]);
    }
    let mut contracts = Vec::new();
    let mut reduces = Vec::new();
    let mut concats = Vec::new();
    for &n in &members {
        match &nodes[n].op {
            Op::Contract(_) => contracts.push(n),
            Op::Reduce(..) => reduces.push(n),
            Op::Concat(axis) => concats.push((n, *axis as usize)),
            op if is_pointwise(op) || is_view(op) || matches!(op, Op::Gather(_)) => {}
            _ => return None,
        }
    }
    if !concats.is_empty() {
        let parts: usize = concats.iter().map(|c| nodes[c.0].args.len()).product();
        let map = contracts.is_empty() && reduces.is_empty() && parts <= MAX_PARTS;
        // Where a part is in use in part, only the run knows where the next one begins: each part
        // is stored by itself then, so the concatenation is what is stored.
        let top = body.peel(0);
        let known = |c: &(usize, usize)| {
            c.0 == top || nodes[c.0].args.iter().all(|a| span(&nodes[a.index()].ty, c.1).is_none())
        };
        let fits =
            map && body.is_map() && concats.iter().all(|c| known(c) && body.is_parted(c.0, c.1));
        return fits.then_some(Kind::Map);
    }
    match (contracts.as_slice(), reduces.as_slice()) {
        ([], []) => body.is_map().then_some(Kind::Map),
        ([contract], []) => body.is_contract(*contract).then_some(Kind::Contract),
        ([], [reduce]) if body.is_inline(*reduce) => Some(Kind::InlineReduce),
        ([], _) => body.is_row(&reduces).then_some(Kind::Row),
        ([_, _], [_, _]) => attention::find(nodes).map(|_| Kind::Attention),
        _ => None,
    }
}

/// The kind of a body that ends in a border around what `last` and the nodes before it compute:
/// they store into the middle of the result.
fn bordered(nodes: &[Node], last: usize) -> Option<Kind> {
    let root = nodes.last()?;
    let [inside, fill] = root.args[..] else { return None };
    let whole = root.ty.used.is_empty() && matches!(nodes[fill.index()].op, Op::Input(_));
    // The parts of a concatenation are those of what is stored, but for reshapes above it; and
    // there is one border at most.
    let inner = &nodes[..=last];
    let whole = whole && !inner.iter().any(|n| matches!(n.op, Op::Concat(_) | Op::Pad(_)));
    let kind = (whole && inside.index() == last).then(|| classify(inner))??;
    matches!(kind, Kind::Map | Kind::InlineReduce | Kind::Contract).then_some(kind)
}

/// A body with questions about it.
pub(super) struct Body<'a> {
    /// Its nodes.
    pub(super) nodes: &'a [Node],
}

impl Body<'_> {
    fn op(&self, node: usize) -> &Op {
        &self.nodes[node].op
    }

    fn ty(&self, node: usize) -> &Type {
        &self.nodes[node].ty
    }

    fn args(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        self.nodes[node].args.iter().map(|a| a.index())
    }

    fn members(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.nodes.len()).filter(|&n| !matches!(self.nodes[n].op, Op::Input(_)))
    }

    /// No element may be computed again for several results, unless it is only moved.
    fn is_map(&self) -> bool {
        // How many elements of a node are asked for: of the parts of a concatenation, so many as
        // they have of it.
        let mut asked = vec![0u128; self.nodes.len()];
        let numel = |n: usize| self.ty(n).numel() as u128;
        if let Some(root) = asked.last_mut() {
            *root = numel(self.nodes.len() - 1);
        }
        for n in (0..self.nodes.len()).rev() {
            for a in self.args(n) {
                let share = match self.op(n) {
                    Op::Concat(_) => asked[n] * numel(a) / numel(n).max(1),
                    _ => asked[n],
                };
                asked[a] = asked[a].max(share);
            }
        }
        self.members().all(|n| !is_pointwise(self.op(n)) || numel(n) >= asked[n])
    }

    /// The result but for reshapes, which change no byte of it; nothing before `least`.
    fn peel(&self, least: usize) -> usize {
        let mut root = self.nodes.len() - 1;
        while let (Op::Reshape(_), true) = (self.op(root), root > least) {
            root = self.nodes[root].args[0].index();
        }
        root
    }

    /// Whether the parts of a concatenation are parts of the result, along an axis with others
    /// before it, which threads share.
    fn is_parted(&self, concat: usize, axis: usize) -> bool {
        let root = self.peel(concat);
        let mut axes: Vec<Option<usize>> = vec![None; root + 1];
        let Some(first) = axes.get_mut(concat) else { return false };
        *first = Some(axis);
        for n in concat + 1..=root {
            for a in self.args(n) {
                let Some(below) = axes[a] else { continue };
                let Some(axis) = self.axis_above(n, a, below) else { return false };
                if axes[n].is_some_and(|known| known != axis) {
                    return false;
                }
                axes[n] = Some(axis);
            }
        }
        let ty = self.ty(root);
        axes[root].is_some_and(|axis| {
            let outer: usize = ty.shape[..axis].iter().product();
            root == concat || outer > 1 || ty.numel() <= FEW
        })
    }

    /// The axis of a node that an axis of its operand is, where it is one.
    fn axis_above(&self, node: usize, operand: usize, axis: usize) -> Option<usize> {
        let (from, to) = (&self.ty(operand).shape, &self.ty(node).shape);
        match self.op(node) {
            Op::Permute(axes) => axes.iter().position(|&a| a as usize == axis),
            // Where axes are joined, an index of the operand is no sum of indices.
            Op::Reshape(_) if only_splits(from, to) => {
                let after = |shape: &[usize], d: usize| shape[d + 1..].iter().product::<usize>();
                let same = |d: &usize| to[*d] == from[axis] && after(to, *d) == after(from, axis);
                (0..to.len()).find(same)
            }
            Op::Slice(ranges) => (ranges[axis].1 == 1).then_some(axis),
            Op::Expand(_) | Op::Concat(_) => Some(axis),
            op if is_pointwise(op) && from[axis] == to[axis] => Some(axis),
            _ => None,
        }
    }

    /// Members that hang on `node`, itself included.
    pub(super) fn above(&self, node: usize) -> Vec<usize> {
        let mut above = vec![node];
        for n in node + 1..self.nodes.len() {
            if self.args(n).any(|a| above.contains(&a)) {
                above.push(n);
            }
        }
        above
    }

    /// Which nodes `node` hangs on, itself included.
    pub(super) fn below(&self, node: usize) -> Vec<bool> {
        let mut below = vec![false; self.nodes.len()];
        below[node] = true;
        for n in (0..=node).rev() {
            if below[n] {
                self.args(n).for_each(|a| below[a] = true);
            }
        }
        below
    }

    /// From `node` to the root, pointwise operations and moves of all elements, used once each.
    fn is_epilogue(&self, node: usize, lanes: Lanes) -> bool {
        let above = self.above(node);
        let root = self.nodes.len() - 1;
        let size = self.ty(node).numel();
        let mut moved = false;
        // The moves on the way to each node: one element has one index, whoever asks for it.
        let mut ways: Vec<Option<Vec<&Op>>> = vec![None; self.nodes.len()];
        ways[node] = Some(Vec::new());
        for &n in above.iter().skip(1) {
            let mut below = self.args(n).filter_map(|a| ways[a].clone());
            let Some(mut way) = below.next() else { return false };
            if below.any(|other| other != way) {
                return false;
            }
            if is_view(self.op(n)) {
                way.push(self.op(n));
            }
            ways[n] = Some(way);
            let fits = match self.op(n) {
                op if is_pointwise(op) => !moved && self.ty(n).numel() == size,
                // Values computed after a permutation would have to be read elsewhere.
                Op::Permute(axes) => {
                    moved = true;
                    let stays = axes.last().is_none_or(|&a| a as usize + 1 == axes.len());
                    stays || lanes == Lanes::OfResult
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
        // Everything else only moves elements, into the contraction or beside it, or widens them;
        // or it is what makes integers of bytes, and numbers of them.
        let (shorts, below) = (self.is_of_parts(contract), self.below(contract));
        let dtype = self.ty(contract).dtype;
        let whole = dtype == DType::I32;
        let size = self.ty(contract).numel();
        let mut beside = self.members().filter(|n| !above.contains(n));
        let fits = |n: usize| {
            let once = !below[n] && is_pointwise(self.op(n)) && self.ty(n).numel() == size;
            let widens = self.ty(n).dtype == dtype && self.widened_from(n).is_some();
            self.is_move(n)
                || widens && (whole || below[n])
                || whole && once && self.is_vector_op(n)
        };
        beside.all(fits)
            && self.is_epilogue(contract, Lanes::OfNode)
            && self.is_vector(contract, &above, shorts)
    }

    /// The short number that a node is as an i32 or f32.
    fn widened_from(&self, node: usize) -> Option<DType> {
        let from = self.args(node).next().map(|a| self.ty(a).dtype)?;
        is_widening(self.op(node), from).then_some(from)
    }

    /// Whether the operands of a contraction, moved or not, are parts of words.
    fn is_of_parts(&self, contract: usize) -> bool {
        let from = |mut n: usize| loop {
            match (self.widened_from(n), self.args(n).next()) {
                (None, Some(arg)) if self.is_move(n) => n = arg,
                (from, _) => return from,
            }
        };
        let found: Vec<DType> = self.args(contract).filter_map(from).collect();
        matches!(found[..], [x, y] if Parts::of([x, y]).is_some())
    }

    /// Whether a node is an argument or only moves elements, at affine indices.
    pub(super) fn is_move(&self, node: usize) -> bool {
        match self.op(node) {
            Op::Input(_) | Op::Permute(_) | Op::Expand(_) | Op::Slice(_) => true,
            // Only a reshape that splits axes leaves their indices affine.
            Op::Reshape(to) => self.args(node).all(|a| only_splits(&self.ty(a).shape, to)),
            _ => false,
        }
    }

    /// Whether what follows a contraction that runs in vector lanes does so as well.
    fn is_vector(&self, contract: usize, above: &[usize], shorts: bool) -> bool {
        let lanes = shorts || self.ty(contract).dtype == DType::F32;
        let root = self.ty(self.nodes.len() - 1).dtype;
        let mut after = above.iter().filter(|&&n| n != contract);
        !lanes || is_lane(root) && after.all(|&n| self.is_vector_op(n))
    }

    /// Whether an operation runs in vector lanes.
    pub(super) fn is_vector_op(&self, node: usize) -> bool {
        let float = |n: usize| self.ty(n).dtype == DType::F32;
        let compares = |n: usize| matches!(self.op(n), Op::Binary(f) if f.is_comparison());
        match self.op(node) {
            Op::Cast(to) => self.args(node).all(|a| is_lane_cast(self.ty(a).dtype, *to)),
            Op::Unary(f) => *f != UnaryFn::Not && self.args(node).all(float),
            Op::Binary(f) => self.args(node).all(|a| is_lane_binary(*f, self.ty(a).dtype)),
            Op::Select => {
                let condition = self.args(node).next();
                condition.is_some_and(compares) && self.args(node).skip(1).all(float)
            }
            _ => true,
        }
    }

    fn is_inline(&self, reduce: usize) -> bool {
        let Op::Reduce(_, axes) = self.op(reduce) else { return false };
        let x = self.args(reduce).next().map(|a| self.ty(a));
        let Some(x) = x else { return false };
        // Long rows go across lanes, in a row kernel.
        let long =
            axes.last().is_some_and(|&a| a as usize + 1 == x.rank() && x.shape[a as usize] >= 16);
        !long && self.is_epilogue(reduce, Lanes::OfResult)
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
        let above: Vec<usize> = reduces.iter().flat_map(|&r| self.above(r)).collect();
        let fits = self.members().all(|n| {
            let shape = &self.ty(n).shape;
            let op = self.op(n);
            if is_view(op) || matches!(op, Op::Gather(_)) {
                // Views below all reductions only; what is folded of a row is not moved to another.
                return !above.contains(&n);
            }
            *shape == full || *shape == reduced
        });
        same && fits
    }
}

/// Whether an operation on a dtype only makes wider numbers of those that contractions sum in
/// words.
pub(super) fn is_widening(op: &Op, from: DType) -> bool {
    match op {
        Op::Cast(DType::I32) => matches!(from, DType::I16 | DType::I8 | DType::U8),
        Op::Cast(DType::F32) => from.is_rounded(),
        _ => false,
    }
}

/// Whether lanes hold values of a dtype. Short floats are only moved, rounded to and widened.
pub fn is_lane(dtype: DType) -> bool {
    let whole = matches!(dtype, DType::I32 | DType::I16 | DType::I8 | DType::U8);
    whole || dtype == DType::F32 || dtype.is_rounded()
}

/// Whether there is an instruction for a function of two values in lanes.
pub fn is_lane_binary(f: BinaryFn, dtype: DType) -> bool {
    match f {
        BinaryFn::Add | BinaryFn::Sub | BinaryFn::Mul | BinaryFn::Max | BinaryFn::Min => {
            is_lane(dtype) && !dtype.is_rounded()
        }
        BinaryFn::Div | BinaryFn::Eq | BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le => {
            dtype == DType::F32
        }
        BinaryFn::Pow | BinaryFn::Rem | BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => false,
    }
}

/// Whether lanes of one dtype can be those of another.
pub fn is_lane_cast(from: DType, to: DType) -> bool {
    // Only what f32 has exactly is a bound for it.
    let number = |dtype: DType| dtype == DType::F32 || dtype.is_rounded();
    let whole = number(from) && to == DType::I32;
    let short = (from.is_rounded() || to.is_rounded()) && !(number(from) && number(to));
    is_lane(from) && is_lane(to) && !whole && !short
}

/// Whether a reshape splits axes, and joins none but those of extent 1.
pub(super) fn only_splits(from: &[usize], to: &[usize]) -> bool {
    let long =
        |shape: &[usize]| -> Vec<usize> { shape.iter().copied().filter(|&e| e != 1).collect() };
    super::table::split_of(&long(from), &long(to)).is_some()
}
