//! From the body of a kernel to loops: views become index maps, and each kind of body gets its
//! nest. A kernel may need others before it (packing an operand); they share scratch memory.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::gpu_rows::Form;
use super::index::{
    Extents, Index, add, clamp, flatten, from_end, from_expr, repeat_index, scale, to_expr,
    unflatten,
};
use super::ir::{
    Buffer, BufferId, Count, DIMS, Expr, Loops, Number, Param, Place, Range, Scope, Stmt, Var,
};
use super::rewrite::{prune, runs};
use super::share::{share, spread};
use super::{moves, nest};
use crate::graph::eval::{Data, Value, reduce_identity};
use crate::graph::op::{Affine, BinaryFn, Op, ReduceFn, Type};
use crate::graph::used::{Span, span};
use crate::graph::{Body, Constant, Node};
use crate::rules::attention;

pub use super::target::Target;

/// Kernels of one node, in order, and the scratch memory between them.
#[derive(Clone, Debug, Default)]
pub struct Lowered {
    /// The kernels.
    pub kernels: Vec<Loops>,
    /// Type and element count of each scratch buffer.
    pub scratch: Vec<(DType, usize)>,
}

impl Lowered {
    /// With names for the kernels of a contraction: those that write no result pack operands.
    pub fn named(mut self, name: &str) -> Lowered {
        for (i, kernel) in self.kernels.iter_mut().enumerate() {
            let pack = kernel.buffers.iter().all(|b| b.param != Param::Out);
            kernel.name = match (pack, i, kernel.name.as_str()) {
                (true, _, "") => format!("{name}.pack{i}"),
                (false, 0, "") => name.to_string(),
                (false, _, "") => format!("{name}.{i}"),
                (_, _, part) => format!("{name}.{part}"),
            };
        }
        self
    }
}

/// Why a body has no loops: the operation and what is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(pub String);

/// Result of lowering a piece.
pub type Lowering<T> = Result<T, Refused>;

/// What is known of the arguments of a body.
#[derive(Clone, Copy, Default, Debug)]
pub struct Arguments<'a> {
    /// Value of an argument that is a constant of one element.
    pub scalars: &'a [Option<Number>],
    /// Which arguments are constants.
    pub constant: &'a [bool],
    /// The argument that lies in the memory of the result, at the same places.
    pub appended: Option<usize>,
}

/// What lowering knows of one body while it builds a kernel of it.
pub struct Lower<'a> {
    /// The body.
    pub body: &'a Body,
    /// Constants that bodies name.
    pub constants: &'a [Constant],
    /// Its arguments.
    pub args: Arguments<'a>,
    /// The machine.
    pub target: Target,
    /// Threads that share each row of a kernel on a GPU; 0 where rows are not shared.
    pub row_threads: usize,
    /// How passes over a row go through it, where its threads keep values of it in registers.
    pub form: Option<Form>,
    /// Buffers so far.
    pub buffers: Vec<Buffer>,
    /// Extents of the loop variables so far.
    pub extents: Extents,
    /// Which part of a variable's axis is in use, where it is one of a value's axes.
    spans: Vec<(Var, Span)>,
    /// Turns of loops that the run decides.
    ranges: Vec<Range>,
    /// Nodes whose value is already at hand: demanded index (once known) and value.
    bound: Vec<Option<Bound>>,
    memo: Vec<(usize, Vec<Index>, Arc<Expr>)>,
    /// Where the result is only a part of what is stored: the type of the whole, and where the
    /// part begins along each axis.
    inside: Option<(&'a Type, Vec<Index>)>,
    /// Where a concatenation was read across its parts: a loop variable and its first value in the
    /// next part.
    crossing: Option<(Var, usize)>,
}

enum Bound {
    /// The same value wherever it is asked for; remembers for which index.
    Cell { value: Arc<Expr>, asked: Option<Vec<Index>> },
    /// An element of a buffer in which the axes from one on stand from a place on.
    Row { buffer: BufferId, start: Index, axis: usize },
}

/// The kernels of a body.
pub fn lower(
    body: &Body,
    constants: &[Constant],
    args: Arguments,
    target: Target,
    name: &str,
) -> Lowering<Lowered> {
    let mut lower = Lower::new(body, constants, args, target);
    let root = lower.peel();
    let Node { op, args: operands, ty, .. } = &body.nodes[root];
    if let (Op::Pad(borders), 1..) = (op, ty.numel())
        && let inside = operands[0].index()
        && !matches!(body.nodes[inside].op, Op::Input(_))
    {
        let border = lower.fresh().border(root, borders)?;
        let border = Loops { name: format!("{name}.border"), ..border };
        let start = borders.iter().map(|b| Place::affine(Affine::constant(b.0 as i64)));
        lower.store_inside(ty, start.collect());
        let mut lowered = kernels(lower, inside, name)?;
        lowered.kernels.push(border);
        return Ok(shared(body, args, target.threads, lowered));
    }
    Ok(shared(body, args, target.threads, kernels(lower, root, name)?))
}

/// Cuts the kernels of a body into enough pieces.
fn shared(body: &Body, args: Arguments, threads: usize, mut lowered: Lowered) -> Lowered {
    let contraction = body.nodes.iter().any(|n| matches!(n.op, Op::Contract(_)))
        && attention::find(&body.nodes).is_none();
    // What is appended to lies where the result does.
    let way = |k: Loops| match (threads, args.appended.map(Param::Arg)) {
        (0, None) => vec![share(k, contraction)],
        (1.., old) if k.buffers.iter().all(|b| Some(b.param) != old) => spread(k),
        _ => vec![k],
    };
    lowered.kernels = lowered.kernels.into_iter().flat_map(way).collect();
    lowered
}

/// The kernels that store a node of a body.
fn kernels(lower: Lower, root: usize, name: &str) -> Lowering<Lowered> {
    let body = lower.body;
    if body.nodes[root].ty.numel() == 0 {
        return Ok(Lowered { kernels: Vec::new(), scratch: Vec::new() });
    }
    let is = |test: fn(&Op) -> bool| body.nodes.iter().position(|n| test(&n.op));
    if let Some(parts) = attention::find(&body.nodes) {
        return super::attention::lower(lower, root, &parts, name);
    }
    if let Some(contract) = is(|op| matches!(op, Op::Contract(_))) {
        return super::contract::lower(lower, root, contract, name);
    }
    let reduces: Vec<usize> =
        (0..body.nodes.len()).filter(|&n| matches!(body.nodes[n].op, Op::Reduce(..))).collect();
    let kernels = match &body.nodes[root].op {
        Op::Pad(borders) => vec![lower.pad(root, borders)?],
        Op::Concat(axis) => moves::concat(lower, root, *axis as usize)?,
        Op::Scatter(f) => lower.scatter(root, *f)?,
        Op::Scan(f, axis) => vec![lower.scan(root, *f, *axis as usize)?],
        _ => match reduces.as_slice() {
            [] => vec![nest::map(lower, root)?],
            [only] if nest::is_inline(body, root, *only) => {
                vec![nest::inline_reduce(lower, root, *only)?]
            }
            _ => vec![nest::row(lower, root, &reduces)?],
        },
    };
    let many = kernels.len() > 1;
    let named = kernels.into_iter().enumerate().map(|(i, k)| Loops {
        name: if many { format!("{name}.{i}") } else { name.to_string() },
        ..k
    });
    Ok(Lowered { kernels: named.collect(), scratch: Vec::new() })
}

/// The zero place.
pub fn origin_place() -> Place {
    Place::affine(Affine::default())
}

impl<'a> Lower<'a> {
    /// Lowering of a body, without buffers or variables.
    pub fn new(
        body: &'a Body,
        constants: &'a [Constant],
        args: Arguments<'a>,
        target: Target,
    ) -> Lower<'a> {
        let bound = body.nodes.iter().map(|_| None).collect();
        Lower {
            body,
            constants,
            args,
            target,
            row_threads: 0,
            form: None,
            buffers: Vec::new(),
            extents: Vec::new(),
            spans: Vec::new(),
            ranges: Vec::new(),
            bound,
            memo: Vec::new(),
            inside: None,
            crossing: None,
        }
    }

    /// Where a value was refused because a concatenation is read across its parts.
    pub fn crossing(&self) -> Option<(Var, usize)> {
        self.crossing
    }

    /// Another kernel of the same body.
    pub fn fresh(&self) -> Lower<'a> {
        let fresh = Lower::new(self.body, self.constants, self.args, self.target);
        Lower { inside: self.inside.clone(), ..fresh }
    }

    /// The same variables and buffers, for one more kernel.
    pub fn copy(&self) -> Lower<'a> {
        let (buffers, extents) = (self.buffers.clone(), self.extents.clone());
        let (spans, ranges) = (self.spans.clone(), self.ranges.clone());
        Lower { buffers, extents, spans, ranges, ..self.fresh() }
    }

    /// The node that is written. A reshape of a dense result changes no byte of it.
    fn peel(&self) -> usize {
        let mut root = self.body.nodes.len() - 1;
        while let Op::Reshape(_) = self.body.nodes[root].op {
            root = self.body.nodes[root].args[0].index();
        }
        root
    }

    /// Type of a node.
    pub fn ty(&self, node: usize) -> &'a Type {
        &self.body.nodes[node].ty
    }

    /// Whether a buffer is an argument that is known when the model is compiled.
    pub fn is_constant(&self, buffer: BufferId) -> bool {
        match self.buffers[buffer].param {
            Param::Arg(i) => self.args.constant.get(i).copied().unwrap_or(false),
            Param::Scratch(_) | Param::Out | Param::Dims | Param::None => false,
        }
    }

    /// A new buffer; loops know codes as bytes.
    pub fn buffer(&mut self, dtype: DType, len: usize, scope: Scope, param: Param) -> BufferId {
        let known = self.buffers.iter().position(|b| b.param == param && param != Param::None);
        known.unwrap_or_else(|| {
            self.buffers.push(Buffer { dtype: dtype.stored(), len, scope, param });
            self.buffers.len() - 1
        })
    }

    /// The result buffer for the node that is stored, and the place there of an element of it.
    pub fn result(&mut self, node: usize, index: &[Index]) -> (BufferId, Place) {
        let Some((ty, before)) = self.inside.clone() else {
            let ty = self.ty(node);
            return (self.out(ty), flatten(index, &ty.shape));
        };
        let shifted: Vec<Index> = index.iter().zip(&before).map(|(i, b)| add(i, b)).collect();
        (self.out(ty), flatten(&shifted, &ty.shape))
    }

    /// Whether the result is only a part of what is stored.
    pub fn is_part(&self) -> bool {
        self.inside.is_some()
    }

    /// Says that the result is a part of a value, which begins at these indices.
    pub fn store_inside(&mut self, ty: &'a Type, start: Vec<Index>) {
        self.inside = Some(match self.inside.take() {
            None => (ty, start),
            Some((whole, before)) => {
                (whole, before.iter().zip(&start).map(|(a, b)| add(a, b)).collect())
            }
        });
    }

    /// The result buffer.
    pub fn out(&mut self, ty: &Type) -> BufferId {
        self.buffer(ty.dtype, ty.numel(), Scope::Global, Param::Out)
    }

    /// A register buffer.
    pub fn register(&mut self, dtype: DType, len: usize) -> BufferId {
        self.buffer(dtype, len, Scope::Register, Param::None)
    }

    /// A new loop variable.
    pub fn var(&mut self, extent: usize) -> Lowering<Var> {
        self.extents.push(extent);
        Var::try_from(self.extents.len() - 1).map_err(|_| Refused("too many loops".into()))
    }

    /// A new variable for some of the turns of another: turn `i` of it stands for turns from
    /// `start + i * width` on, `width` of them. It makes as many as reach all that is in use.
    pub fn piece(&mut self, of: Var, extent: usize, start: usize, width: usize) -> Lowering<Var> {
        let var = self.var(extent)?;
        if let Some(Span::Dim { dim, more }) = self.span(of) {
            let (start, width) = (start as i64, width as i64);
            let add = i64::from(more) - start + width - 1;
            let to = Count { dim, add, width, times: 1 };
            self.ranges.push(Range { var, from: None, to });
        }
        Ok(var)
    }

    /// Two variables for all turns of another whose axis is in use in part: whole groups of
    /// `width`, and the turns that are left.
    pub fn whole_and_rest(&mut self, of: Var, width: usize) -> Lowering<Option<(Var, Var)>> {
        let Some(Span::Dim { dim, more }) = self.span(of) else { return Ok(None) };
        let extent = self.extents[of as usize];
        let (whole, rest) = (self.var(extent / width)?, self.var(extent)?);
        let bound = |width, times| Count { dim, add: i64::from(more), width, times };
        let width = width as i64;
        self.ranges.push(Range { var: whole, from: None, to: bound(width, 1) });
        let (from, to) = (Some(bound(width, width)), bound(1, 1));
        self.ranges.push(Range { var: rest, from, to });
        Ok(Some((whole, rest)))
    }

    /// Which part of a variable's axis is in use; none where all of it is.
    pub fn span(&self, var: Var) -> Option<Span> {
        self.spans.iter().find(|s| s.0 == var).map(|s| s.1)
    }

    /// The number of elements in use of an axis, as a value that is at most its extent.
    pub fn length(&mut self, ty: &Type, axis: usize) -> Expr {
        let extent = ty.shape[axis];
        let number = |v: i64| Arc::new(Expr::Const(DType::I64, Number::Int(v.into())));
        let Some(Span::Dim { dim, more }) = span(ty, axis) else {
            return Expr::Const(DType::I64, Number::Int(extent as i128));
        };
        let dims = self.buffer(DType::I64, DIMS, Scope::Global, Param::Dims);
        let place = Place::affine(Affine::constant(dim.into()));
        let load = Arc::new(Expr::Load(dims, place));
        let sum = Arc::new(Expr::Binary(BinaryFn::Add, load, number(more.into())));
        let least = Arc::new(Expr::Binary(BinaryFn::Max, sum, number(0)));
        Expr::Binary(BinaryFn::Min, least, number(extent as i64))
    }

    /// An index for each axis of a type, as [`axes`](Self::axes); loops over them run as far as
    /// the axes are in use.
    pub fn axes_of(&mut self, ty: &Type) -> Lowering<(Vec<Index>, Vec<Var>)> {
        let spans: Vec<Option<Span>> = (0..ty.rank()).map(|axis| span(ty, axis)).collect();
        self.axes_in_use(&ty.shape, &spans)
    }

    /// An index for each axis of a shape: a new variable, or 0 where the extent is 1.
    pub fn axes(&mut self, shape: &[usize]) -> Lowering<(Vec<Index>, Vec<Var>)> {
        self.axes_in_use(shape, &[])
    }

    /// The same with what is in use of each axis.
    pub fn axes_in_use(
        &mut self,
        shape: &[usize],
        spans: &[Option<Span>],
    ) -> Lowering<(Vec<Index>, Vec<Var>)> {
        let mut vars = Vec::new();
        let mut index = Vec::new();
        for (axis, &extent) in shape.iter().enumerate() {
            index.push(match extent {
                1 => origin_place(),
                _ => {
                    let var = self.var(extent)?;
                    if let Some(span) = spans.get(axis).copied().flatten() {
                        self.spans.push((var, span));
                        if let Span::Dim { dim, more } = span {
                            let to = Count { dim, add: more.into(), width: 1, times: 1 };
                            self.ranges.push(Range { var, from: None, to });
                        }
                    }
                    vars.push(var);
                    Place::affine(Affine::axis(var as usize))
                }
            });
        }
        Ok((index, vars))
    }

    /// Gives a node one value: that of an index, or of the one that is asked for first.
    pub fn bind_cell(&mut self, node: usize, value: Expr, index: Option<Vec<Index>>) {
        self.bound[node] = Some(Bound::Cell { value: Arc::new(value), asked: index });
        self.memo.clear();
    }

    /// Says that a node's row, its axes from `axis` on, stands in a buffer from a place on.
    pub fn bind_row(&mut self, node: usize, (buffer, start): (BufferId, &Index), axis: usize) {
        self.bound[node] = Some(Bound::Row { buffer, start: start.clone(), axis });
        self.memo.clear();
    }

    /// Says that a node's value is to be computed.
    pub fn unbind(&mut self, node: usize) {
        self.bound[node] = None;
        self.memo.clear();
    }

    /// Whether a node's value is at hand.
    pub fn is_bound(&self, node: usize) -> bool {
        self.bound[node].is_some()
    }

    /// The index for which a bound node was asked.
    pub fn asked(&self, node: usize) -> Option<Vec<Index>> {
        match &self.bound[node] {
            Some(Bound::Cell { asked, .. }) => asked.clone(),
            _ => None,
        }
    }

    /// An element of an argument.
    fn load_arg(&mut self, arg: usize, ty: &Type, index: &[Index]) -> Arc<Expr> {
        if let Some(number) = self.args.scalars.get(arg).copied().flatten() {
            return Arc::new(Expr::Const(ty.dtype.stored(), number));
        }
        let buffer = self.buffer(ty.dtype, ty.numel(), Scope::Global, Param::Arg(arg));
        Arc::new(Expr::Load(buffer, flatten(index, &ty.shape)))
    }

    /// Element `index` of a node's result.
    pub fn value(&mut self, node: usize, index: &[Index]) -> Lowering<Arc<Expr>> {
        match &mut self.bound[node] {
            Some(Bound::Cell { value, asked }) => {
                match asked {
                    Some(before) if before.as_slice() != index => {
                        return Err(Refused("a reduction of another place".into()));
                    }
                    _ => *asked = Some(index.to_vec()),
                }
                return Ok(value.clone());
            }
            Some(Bound::Row { buffer, start, axis }) => {
                let inner = flatten(&index[*axis..], &self.body.nodes[node].ty.shape[*axis..]);
                return Ok(Arc::new(Expr::Load(*buffer, add(start, &inner))));
            }
            None => {}
        }
        let known = self.memo.iter().find(|(n, i, _)| *n == node && i.as_slice() == index);
        if let Some((_, _, value)) = known {
            return Ok(value.clone());
        }
        let value = self.compute(node, index)?;
        self.memo.push((node, index.to_vec(), value.clone()));
        Ok(value)
    }

    fn compute(&mut self, node: usize, index: &[Index]) -> Lowering<Arc<Expr>> {
        let body = self.body;
        let n = &body.nodes[node];
        let args: Vec<usize> = n.args.iter().map(|a| a.index()).collect();
        Ok(Arc::new(match &n.op {
            Op::Input(i) => return Ok(self.load_arg(*i as usize, &n.ty, index)),
            Op::Const(i) => match one_number(&self.constants[*i as usize]) {
                Some(number) => Expr::Const(n.ty.dtype.stored(), number),
                None => return Err(Refused("a large constant inside a body".into())),
            },
            Op::Iota(_, axis) => to_expr(&index[*axis as usize]),
            Op::Unary(f) => Expr::Unary(*f, self.value(args[0], index)?),
            Op::Binary(f) => {
                let x = self.repeated(args[0], index)?;
                Expr::Binary(*f, x, self.repeated(args[1], index)?)
            }
            Op::Select => {
                let c = self.repeated(args[0], index)?;
                let x = self.repeated(args[1], index)?;
                Expr::Select(c, x, self.repeated(args[2], index)?)
            }
            Op::Cast(dtype) => Expr::Cast(*dtype, self.value(args[0], index)?),
            Op::Expand(_) => return self.repeated(args[0], index),
            Op::Concat(axis) => return self.part(&args, *axis as usize, index),
            Op::Gather(axis) => {
                let axis = *axis as usize;
                let inner = axis + self.ty(args[1]).rank();
                let at = self.value(args[1], &index[axis..inner])?;
                let source = self.ty(args[0]);
                let extent = source.shape[axis];
                let at = Expr::Cast(DType::I64, at);
                let length = self.length(source, axis);
                let mut from = index[..axis].to_vec();
                from.push(from_expr(clamp(from_end(at, length), extent)));
                from.extend_from_slice(&index[inner..]);
                return self.value(args[0], &from);
            }
            op => match self.view_index(op, node, index) {
                Some(from) => return self.value(args[0], &from),
                None => {
                    let text = crate::graph::text::op_text(op);
                    return Err(Refused(format!("{text} within a larger kernel")));
                }
            },
        }))
    }

    /// An element of a concatenation whose parts `args` are, where the index falls into one part
    /// whatever the loop variables are.
    fn part(&mut self, args: &[usize], axis: usize, index: &[Index]) -> Lowering<Arc<Expr>> {
        let at = &index[axis];
        let across = || Refused("a concatenation that is read across its parts".into());
        // Where a part is in use in part, it is for the run to say where the next one begins.
        let partial = args.iter().any(|&arg| span(self.ty(arg), axis).is_some());
        if at.dynamic.is_some() || partial {
            return Err(across());
        }
        let (low, high) = at.affine.range(&self.extents);
        let mut start = 0;
        for &arg in args {
            let end = start + self.ty(arg).shape[axis] as i64;
            if low >= start && high < end {
                let mut from = index.to_vec();
                from[axis] = scale(at, 1, -start);
                return self.value(arg, &from);
            }
            if let ([(var, 1)], true) = (at.affine.terms.as_slice(), low < end) {
                self.crossing = Some((*var, (end - at.affine.offset) as usize));
                break;
            }
            start = end;
        }
        Err(across())
    }

    /// The operand index of a view.
    pub fn view_index(&self, op: &Op, node: usize, index: &[Index]) -> Option<Vec<Index>> {
        let n = &self.body.nodes[node];
        let source = &self.ty(n.args.first()?.index()).shape;
        Some(match op {
            Op::Reshape(shape) => unflatten(&flatten(index, shape), source, &self.extents),
            Op::Permute(axes) => {
                let mut from = vec![origin_place(); index.len()];
                axes.iter().enumerate().for_each(|(d, &a)| from[a as usize] = index[d].clone());
                from
            }
            Op::Slice(axes) => index.iter().zip(axes).map(|(i, a)| scale(i, a.1, a.0)).collect(),
            Op::Window(axes) => {
                let lead = source.len() - axes.len();
                let windowed = axes.iter().enumerate().map(|(d, a)| {
                    let (at, tap) = (&index[lead + d], &index[lead + axes.len() + d]);
                    add(&scale(at, a.1 as i64, 0), &scale(tap, a.2 as i64, 0))
                });
                index[..lead].iter().cloned().chain(windowed).collect()
            }
            Op::Expand(_) => repeat_index(index, source),
            _ => return None,
        })
    }

    /// Element of a node at an index of the shape that it repeats to.
    fn repeated(&mut self, node: usize, index: &[Index]) -> Lowering<Arc<Expr>> {
        let from = repeat_index(index, &self.ty(node).shape);
        self.value(node, &from)
    }

    /// A kernel of the statements so far.
    pub fn finish(mut self, body: Vec<Stmt>) -> Loops {
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.retain(|range| runs(&body, range.var));
        ranges.sort_by_key(|range| range.var);
        if !ranges.is_empty() {
            self.buffer(DType::I64, DIMS, Scope::Global, Param::Dims);
        }
        let (buffers, body) = prune(self.buffers, body);
        Loops { name: String::new(), buffers, ranges, body }
    }
}

/// The number that a constant of one element is.
pub fn one_number(constant: &Constant) -> Option<Number> {
    if constant.ty.numel() != 1 {
        return None;
    }
    Some(match Value::from_constant(constant).data {
        Data::Float(v) => Number::Float(v[0]),
        Data::Int(v) => Number::Int(v[0]),
    })
}

/// What a reduction starts with.
pub fn identity(f: ReduceFn, dtype: DType) -> Expr {
    let (float, int) = reduce_identity(f, dtype);
    match dtype.is_float() {
        true => Expr::Const(dtype, Number::Float(float)),
        false => Expr::Const(dtype, Number::Int(int)),
    }
}
