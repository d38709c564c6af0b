//! Nests of loops: axes that run through memory together become one, the last axis goes into
//! vector lanes, the outer ones are shared out to threads.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::gpu_rows::Form;
use super::gpu_sums::Sum;
use super::index::{Extents, Index, add, flatten};
use super::ir::{BufferId, Expr, Kind, Loops, Place, Stmt, Var};
pub use super::lanes::{is_vector, vectorize, writes};

use super::lanes::beside;
use super::lower::{Lower, Lowering, Refused, identity, origin_place};
use super::rewrite::{each_affine, rewrite, substitute};
use super::turn::turned;
use crate::graph::op::{Affine, Op, ReduceFn, UnaryFn};
use crate::graph::used::{Span, span};
use crate::graph::{Body, Node};

/// Parallel loops are collapsed until there are at least this many pieces.
const PIECES: usize = 64;
/// Iterations of a single long axis that stay together.
const BLOCK: usize = 8192;

/// Joins neighbouring loops whose indices always move together: where every index has
/// `coefficient(outer) == coefficient(inner) * extent(inner)`, one loop does for both.
pub fn coalesce(lower: &mut Lower, vars: &mut Vec<Var>, body: Vec<Stmt>) -> Vec<Stmt> {
    let mut body = body;
    let mut at = 1;
    while at < vars.len() {
        let (outer, inner) = (vars[at - 1] as usize, vars[at] as usize);
        let extent = lower.extents[inner] as i64;
        // Loops whose turns the run decides stay as they are.
        let mut joint = [outer, inner].iter().all(|&v| lower.span(v as Var).is_none());
        each_affine(&body, &mut |a| {
            joint &= a.coefficient(outer) == a.coefficient(inner) * extent;
        });
        if joint {
            lower.extents[inner] *= lower.extents[outer];
            body = substitute(&body, outer as Var, &Affine::constant(0));
            vars.remove(at - 1);
            at = at.saturating_sub(1).max(1);
        } else {
            at += 1;
        }
    }
    body
}

/// How many of the loops, from the outermost, are shared out to threads.
pub fn parallel_prefix(extents: &Extents, vars: &[Var]) -> usize {
    let mut product = 1usize;
    vars.iter()
        .take_while(|&&v| {
            let more = product < PIECES;
            product = product.saturating_mul(extents[v as usize]);
            more
        })
        .count()
}

/// Loops around statements, the first `parallel` of them parallel.
pub fn wrap(extents: &Extents, vars: &[Var], body: Vec<Stmt>, parallel: usize) -> Vec<Stmt> {
    vars.iter().enumerate().rev().fold(body, |body, (i, &var)| {
        let kind = if i < parallel { Kind::Parallel } else { Kind::Serial };
        vec![Stmt::For { var, extent: extents[var as usize], kind, body }]
    })
}

/// The nest of statements over the axes of the result.
fn nest(lower: &mut Lower, mut vars: Vec<Var>, body: Vec<Stmt>) -> Vec<Stmt> {
    if lower.target.threads > 0 {
        return super::gpu::nest(lower, vars, body);
    }
    let mut body = coalesce(lower, &mut vars, body);
    if let [only] = vars[..]
        && lower.span(only).is_none()
    {
        let n = lower.extents[only as usize];
        let fits = |b: &usize| n.is_multiple_of(*b) && b.is_multiple_of(lower.target.lanes);
        let block = (n > 2 * BLOCK).then(|| (BLOCK / 8..=BLOCK).rev().find(fits)).flatten();
        if let Some(block) = block
            && let (Ok(outer), Ok(inner)) = (lower.var(n / block), lower.var(block))
        {
            let index = Affine::scaled(outer as usize, block as i64).plus(inner as usize, 1);
            body = substitute(&body, only, &index);
            vars = vec![outer, inner];
        }
    }
    let Some(inner) = vars.pop() else { return body };
    lower.target = lower.target.for_axis(lower.extents[inner as usize]);
    if let Some(body) = turned(lower, &mut vars, inner, &body) {
        let parallel = parallel_prefix(&lower.extents, &vars);
        return wrap(&lower.extents, &vars, body, parallel);
    }
    let body = beside(lower, &mut vars, inner, body);
    let parallel = parallel_prefix(&lower.extents, &vars);
    let body = vectorize(lower, inner, body);
    wrap(&lower.extents, &vars, body, parallel)
}

/// A kernel that stores a value at a place for every index.
pub fn store_nest(
    mut lower: Lower,
    vars: Vec<Var>,
    buffer: BufferId,
    place: Place,
    value: Arc<Expr>,
) -> Loops {
    let store = Stmt::Store { buffer, place, value: (*value).clone() };
    let body = nest(&mut lower, vars, vec![store]);
    lower.finish(body)
}

/// A kernel that computes every element of a node by itself.
pub fn map(lower: Lower, root: usize) -> Lowering<Loops> {
    super::boxes::store(lower, root)
}

/// Whether every element of the root asks for one element of the reduction.
pub fn is_inline(body: &Body, root: usize, reduce: usize) -> bool {
    body.nodes[root].ty.numel() == body.nodes[reduce].ty.numel() && {
        let Op::Reduce(_, axes) = &body.nodes[reduce].op else { return false };
        let x = &body.nodes[body.nodes[reduce].args[0].index()].ty;
        // A row has at least one element.
        let empty = axes.iter().any(|&a| x.shape[a as usize] == 0);
        // A reduction along the innermost axis goes faster across lanes.
        let innermost = axes.last().is_some_and(|&a| a as usize + 1 == x.rank());
        let long = axes.last().is_some_and(|&a| x.shape[a as usize] >= 8);
        let window = matches!(body.nodes[body.nodes[reduce].args[0].index()].op, Op::Window(_));
        let first = x.rank() - axes.len();
        let trailing = axes.iter().enumerate().all(|(i, &a)| a as usize == first + i);
        // A row is stored with the axes that it was folded with.
        let to = &body.nodes[root].ty.shape;
        let same = x.rank() == to.len()
            && x.shape[..first] == to[..first]
            && !is_moved(&body.nodes[..=root], reduce);
        empty || !(innermost && long && same) || window || !trailing
    }
}

/// Whether a node that hangs on one does more than compute with its elements where they stand.
fn is_moved(nodes: &[Node], one: usize) -> bool {
    let mut above = vec![false; nodes.len()];
    above[one] = true;
    for (n, node) in nodes.iter().enumerate().skip(one + 1) {
        above[n] = node.args.iter().any(|a| above[a.index()]);
        let stays = matches!(node.op, Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast(_));
        if above[n] && !stays {
            return true;
        }
    }
    false
}

/// A kernel in which every element of the result folds its own part of the operand.
pub fn inline_reduce(mut lower: Lower, root: usize, reduce: usize) -> Lowering<Loops> {
    let ty = lower.ty(root).clone();
    let Op::Reduce(f, axes) = &lower.body.nodes[reduce].op else {
        return Err(Refused("a reduction".into()));
    };
    let dtype = lower.ty(reduce).dtype;
    let cell = lower.register(dtype, 1);
    let (index, vars) = lower.axes_of(&ty)?;
    let (out, place) = lower.result(root, &index);
    lower.bind_cell(reduce, Expr::Load(cell, origin_place()), None);
    let result = lower.value(root, &index)?;
    let mut from = lower.asked(reduce).ok_or_else(|| Refused("a dead reduction".into()))?;
    let operand = lower.body.nodes[reduce].args[0].index();
    let of = lower.ty(operand);
    let shape = &of.shape;
    let extents: Vec<usize> = axes.iter().map(|&a| shape[a as usize]).collect();
    let spans: Vec<Option<Span>> = axes.iter().map(|&a| span(of, a as usize)).collect();
    let (summed, inner) = lower.axes_in_use(&extents, &spans)?;
    axes.iter().zip(summed).for_each(|(&a, i)| from[a as usize] = i);
    let start = identity(*f, dtype);
    if axes.iter().any(|&a| shape[a as usize] == 0) {
        let store = |buffer, place, value| Stmt::Store { buffer, place, value };
        let zero = Place::affine(Affine::default());
        let body = vec![store(cell, zero, start), store(out, place, (*result).clone())];
        let nested = nest(&mut lower, vars, body);
        return Ok(lower.finish(nested));
    }
    let next = lower.value(operand, &from)?;
    let update = Expr::Binary(f.binary(lower.buffers[cell].dtype), cell_value(cell), next);
    if lower.target.threads > 0 {
        let zero = Place::affine(Affine::default());
        let store = |buffer, place, value| Stmt::Store { buffer, place, value };
        let result = store(out, place.clone(), (*result).clone());
        let update = store(cell, zero, update.clone());
        let sum = Sum { f: *f, cell, start: start.clone(), update, result };
        if let Some(body) = super::gpu_sums::shared(&mut lower, [&vars, &inner], &sum)? {
            return Ok(lower.finish(body));
        }
    }
    Ok(accumulate(lower, vars, inner, cell, [start, update], (out, place, result)))
}

fn cell_value(cell: BufferId) -> Arc<Expr> {
    Arc::new(Expr::Load(cell, Place::affine(Affine::default())))
}

/// For every index of `vars`: a cell starts with a value, is updated for every index of `summed`,
/// and a result that uses it is stored.
pub fn accumulate(
    mut lower: Lower,
    vars: Vec<Var>,
    summed: Vec<Var>,
    cell: BufferId,
    [start, update]: [Expr; 2],
    (out, place, result): (BufferId, Place, Arc<Expr>),
) -> Loops {
    let zero = Place::affine(Affine::default());
    let store = |buffer, place, value| Stmt::Store { buffer, place, value };
    let folded = wrap(&lower.extents, &summed, vec![store(cell, zero.clone(), update)], 0);
    let mut body = vec![store(cell, zero, start)];
    body.extend(folded);
    body.push(store(out, place, (*result).clone()));
    let body = nest(&mut lower, vars, body);
    lower.finish(body)
}

/// A kernel with a result row per outer index: each reduction is one pass over the row, and so is
/// the result. Where threads share a row they keep it in registers, if they can.
pub fn row(lower: Lower, root: usize, reduces: &[usize]) -> Lowering<Loops> {
    for form in Form::all().into_iter().filter(|_| lower.target.threads > 0) {
        let mut kept = lower.fresh();
        kept.form = Some(form);
        if let Ok(kernel) = row_in(kept, root, reduces) {
            return Ok(kernel);
        }
    }
    row_in(lower, root, reduces)
}

fn row_in(mut lower: Lower, root: usize, reduces: &[usize]) -> Lowering<Loops> {
    let Op::Reduce(_, axes) = &lower.body.nodes[reduces[0]].op else {
        return Err(Refused("a reduction".into()));
    };
    let operand = lower.ty(lower.body.nodes[reduces[0]].args[0].index()).clone();
    let full = operand.shape.clone();
    let spans: Vec<Option<Span>> = (0..full.len()).map(|a| span(&operand, a)).collect();
    let rank = full.len();
    let first = rank - axes.len();
    let trailing = axes.iter().enumerate().all(|(i, &a)| a as usize == first + i);
    if !trailing || full[first..].contains(&0) {
        return Err(Refused("a reduction over axes that are not the last ones".into()));
    }
    let root_ty = lower.ty(root).clone();
    let (outer, outer_vars) = lower.axes_in_use(&full[..first], &spans[..first])?;
    lower.row_threads = super::gpu::row_threads(&lower, &full[..first], &full[first..], reduces);
    if lower.form.is_some() && lower.row_threads == 0 {
        return Err(Refused("a row that threads do not share".into()));
    }
    let mut body = Vec::new();
    for (k, &reduce) in reduces.iter().enumerate() {
        let kept = keep(&mut lower, root, &reduces[k..], &outer);
        let row = (&full[first..], &spans[first..]);
        body.extend(reduce_pass(&mut lower, reduce, &outer, row, kept)?);
    }
    let reduced = root_ty.numel() != full.iter().product::<usize>()
        || full[first..].iter().product::<usize>() == 1;
    let shape: Vec<usize> = if reduced { vec![1; rank - first] } else { full[first..].to_vec() };
    let (inner, inner_vars) = lower.axes_in_use(&shape, &spans[first..])?;
    let index: Vec<Index> = outer.iter().chain(&inner).cloned().collect();
    if root_ty.rank() != rank || root_ty.shape[..first] != full[..first] {
        return Err(Refused("a row with other axes than its reductions".into()));
    }
    let value = lower.value(root, &index)?;
    let (buffer, place) = lower.result(root, &index);
    let store = Stmt::Store { buffer, place, value: (*value).clone() };
    body.extend(pass(&mut lower, inner_vars, vec![store])?);
    if lower.row_threads > 0 {
        let mut vars = outer_vars;
        let body = coalesce(&mut lower, &mut vars, body);
        let body = super::gpu::grouped(&mut lower, &mut vars, body)?;
        let body = super::gpu::blocks(&mut lower, &vars, body)?;
        return Ok(lower.finish(body));
    }
    let parallel = parallel_prefix(&lower.extents, &outer_vars);
    let nested = wrap(&lower.extents, &outer_vars, body, parallel);
    Ok(lower.finish(nested))
}

/// The operand of a node.
fn operand(lower: &Lower, node: usize) -> usize {
    lower.body.nodes[node].args[0].index()
}

/// A node whose row stands in a buffer from a place on.
type Kept = (usize, BufferId, Index);

/// What the pass of the first of these reductions keeps for those after it: threads in registers,
/// others in the row of the result.
fn keep(lower: &mut Lower, root: usize, reduces: &[usize], outer: &[Index]) -> Vec<Kept> {
    if lower.row_threads > 0 {
        let (now, later) = (operand(lower, reduces[0]), &reduces[1..]);
        let later: Vec<usize> =
            later.iter().map(|&reduce| operand(lower, reduce)).chain([root]).collect();
        let row: usize = lower.ty(now).shape[outer.len()..].iter().product();
        let nodes = super::gpu_rows::kept(lower, row, now, &later);
        let buffer = |n: usize| (n, lower.register(lower.ty(n).dtype, row), origin_place());
        return nodes.into_iter().map(buffer).collect();
    }
    let ty = lower.ty(root);
    let kept = if lower.is_part() { None } else { keep_in_row(lower, root, reduces[0], reduces) };
    kept.map(|n| (n, lower.out(ty), flatten(outer, &ty.shape))).into_iter().collect()
}

/// The operand of a reduction, where it is dear to compute and later passes want it again: it is
/// kept in the row of the result, which is not written before the last pass.
fn keep_in_row(lower: &Lower, root: usize, reduce: usize, later: &[usize]) -> Option<usize> {
    let nodes = &lower.body.nodes;
    let operand = nodes[reduce].args[0].index();
    let dear = matches!(
        nodes[operand].op,
        Op::Unary(UnaryFn::Exp | UnaryFn::Tanh | UnaryFn::Erf | UnaryFn::Log)
    );
    let used_again = nodes
        .iter()
        .enumerate()
        .any(|(i, n)| i != reduce && n.args.iter().any(|a| a.index() == operand));
    let fits = nodes[operand].ty == nodes[root].ty && later.first() == Some(&reduce);
    // A second value may not take the row while the first is still wanted.
    let last = later.len() == 1;
    (dear && used_again && fits && last).then_some(operand)
}

/// Statements over the axes of a row.
pub fn pass(lower: &mut Lower, mut vars: Vec<Var>, body: Vec<Stmt>) -> Lowering<Vec<Stmt>> {
    let body = coalesce(lower, &mut vars, body);
    if lower.row_threads > 0 {
        return super::gpu::pass(lower, vars, body);
    }
    Ok(match vars.pop() {
        None => body,
        Some(inner) => {
            let body = vectorize(lower, inner, body);
            wrap(&lower.extents, &vars, body, 0)
        }
    })
}

/// One reduction of a row: several vector accumulators, then a scalar. The values that are folded
/// may be kept, and others that these are computed of: operands before users.
pub fn reduce_pass(
    lower: &mut Lower,
    reduce: usize,
    outer: &[Index],
    (shape, spans): (&[usize], &[Option<Span>]),
    keep: impl IntoIterator<Item = Kept>,
) -> Lowering<Vec<Stmt>> {
    let Op::Reduce(f, _) = lower.body.nodes[reduce].op else {
        return Err(Refused("a reduction".into()));
    };
    let (inner, mut vars) = lower.axes_in_use(shape, spans)?;
    let index: Vec<Index> = outer.iter().chain(&inner).cloned().collect();
    let operand = operand(lower, reduce);
    let ty = lower.ty(operand).clone();
    let mut step = Vec::new();
    // What is kept may take the place of what it is computed from, and is computed once.
    for (node, buffer, start) in keep {
        let value = (*lower.value(node, &index)?).clone();
        step.push(Stmt::Store { buffer, place: add(&start, &flatten(&inner, shape)), value });
        lower.bind_row(node, (buffer, &start), outer.len());
    }
    let value = lower.value(operand, &index)?;
    let cell = lower.register(ty.dtype, 1);
    let zero = Place::affine(Affine::default());
    let start = identity(f, ty.dtype);
    let update = Expr::Binary(f.binary(ty.dtype), cell_value(cell), value);
    step.push(Stmt::Store { buffer: cell, place: zero.clone(), value: update });
    let step = coalesce(lower, &mut vars, step);
    let mut out = vec![Stmt::Store { buffer: cell, place: zero, value: start.clone() }];
    match vars.pop() {
        None => out.extend(step),
        Some(last) if lower.row_threads > 0 => {
            out.extend(super::gpu::reduce(lower, f, cell, (last, &vars), start, step)?);
        }
        Some(last) => out.extend(reduce_lanes(lower, f, cell, (last, &vars), start, step)?),
    }
    let mut index = outer.to_vec();
    index.resize(lower.ty(reduce).rank(), origin_place());
    lower.bind_cell(reduce, Expr::Load(cell, origin_place()), Some(index));
    Ok(out)
}

/// Statements that fold into a cell for every turn of `last`, in lanes where they can.
pub fn reduce_lanes(
    lower: &mut Lower,
    f: ReduceFn,
    cell: BufferId,
    (last, outer): (Var, &[Var]),
    start: Expr,
    step: Vec<Stmt>,
) -> Lowering<Vec<Stmt>> {
    let (extent, lanes) = (lower.extents[last as usize], lower.target.lanes);
    let float = lower.buffers[cell].dtype == DType::F32;
    let single = lower.target.threads > 0;
    if single || extent < lanes || !float || !is_vector(&lower.buffers, &step, last) {
        let body = vec![Stmt::For { var: last, extent, kind: Kind::Serial, body: step }];
        return Ok(wrap(&lower.extents, outer, body, 0));
    }
    let steps = extent / lanes;
    let partial = lower.whole_and_rest(last, lanes)?;
    let unroll = if steps >= 8 && partial.is_none() { 4 } else { 1 };
    let wide = lower.register(lower.buffers[cell].dtype, unroll * lanes);
    let (lane, copy) = (lower.var(lanes)?, lower.var(unroll)?);
    let at = Affine::scaled(copy as usize, lanes as i64).plus(lane as usize, 1);
    let vector = |body| Stmt::For { var: lane, extent: lanes, kind: Kind::Vector, body };
    let each = |body| Stmt::For { var: copy, extent: unroll, kind: Kind::Unroll, body };
    let at_place = |index: &Affine, place: &Affine| {
        let index = |a: &Affine| {
            a.substitute(&|v| if v == last as usize { index.clone() } else { Affine::axis(v) })
        };
        let registers = [(cell, wide, place.clone())];
        rewrite(&step, &index, &registers)
    };
    let (main, left) = (steps / unroll, steps % unroll);
    let mut body = Vec::new();
    let turn = match partial {
        Some((whole, _)) => whole,
        None => lower.var(main)?,
    };
    let stride = (unroll * lanes) as i64;
    let index = at.clone().plus(turn as usize, stride);
    let inside = vec![each(vec![vector(at_place(&index, &at))])];
    body.push(Stmt::For { var: turn, extent: main, kind: Kind::Serial, body: inside });
    let lane_index = Affine::axis(lane as usize);
    if left > 0 {
        let turn = lower.var(left)?;
        let index = Affine {
            offset: main as i64 * stride,
            ..lane_index.clone().plus(turn as usize, lanes as i64)
        };
        let inside = vec![vector(at_place(&index, &lane_index))];
        body.push(Stmt::For { var: turn, extent: left, kind: Kind::Serial, body: inside });
    }
    let rest = extent % lanes;
    if let Some((_, tail)) = partial {
        let inside = substitute(&step, last, &Affine::axis(tail as usize));
        body.push(Stmt::For { var: tail, extent, kind: Kind::Serial, body: inside });
    } else if rest > 0 {
        let tail = lower.var(rest)?;
        let index = Affine { offset: (steps * lanes) as i64, ..Affine::axis(tail as usize) };
        let inside = substitute(&step, last, &index);
        body.push(Stmt::For { var: tail, extent: rest, kind: Kind::Serial, body: inside });
    }
    let first = Stmt::Store { buffer: wide, place: Place::affine(at.clone()), value: start };
    let mut out = vec![each(vec![vector(vec![first])])];
    out.extend(wrap(&lower.extents, outer, body, 0));
    let folded =
        Expr::Binary(f.binary(DType::F32), cell_value(cell), Arc::new(Expr::Fold(f, wide)));
    let zero = Place::affine(Affine::default());
    out.push(Stmt::Store { buffer: cell, place: zero, value: folded });
    Ok(out)
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::{DType, Tensor};

    use super::super::lower::{Arguments, lower};
    use crate::Compiler;
    use crate::graph::eval::{Value, eval};
    use crate::graph::op::{BinaryFn, ReduceFn, Type};
    use crate::graph::text::parse;
    use crate::graph::{Body, Graph};

    #[test]
    fn sums_of_rows_may_lie_along_another_axis() {
        let (mut graph, o) = (Graph::default(), "sum".into());
        let x = graph.input("x", Type::new(DType::F32, &[24, 10, 16]));
        let y = graph.reduce(ReduceFn::Sum, x, &[1, 2], &o).expect("fits");
        let y = graph.reshape(y, &[1, 24, 1], &o).expect("fits");
        let y = graph.binary_number(BinaryFn::Mul, y, 2.0, &o).expect("fits");
        graph.outputs.push(("y".into(), y));
        let values: Vec<f32> = (0..24 * 160).map(|k| (k % 7) as f32).collect();
        let given = Tensor::from_slice(&[24, 10, 16], &values);
        let expected = eval(&graph, &[Value::from_tensor(&given)]);
        for egraph in [false, true] {
            let kernels = Compiler::new().egraph(egraph).optimise(&graph).expect("fits");
            let executable = Compiler::new().build(&kernels).unwrap_or_else(|e| panic!("{e}"));
            let got = executable.run(&[("x", given.view())]).unwrap_or_else(|e| panic!("{e}"));
            assert!(Value::from_tensor(&got[0].1) == expected[0]);
        }
    }

    #[test]
    fn a_row_reads_no_sum_of_another() {
        let text = "%0 = input 0 : f32[4,4,5] \"x\"
             %1 = reduce max [2] %0 : f32[4,4,1] \"n\"
             %2 = reduce sum [2] %0 : f32[4,4,1] \"n\"
             %3 = permute [1,0,2] %2 : f32[4,4,1] \"n\"
             %4 = add %1 %3 : f32[4,4,1] \"n\"
             %5 = mul %0 %4 : f32[4,4,5] \"n\"
             output \"y\" %5";
        let body = Body { nodes: parse(text, &[]).expect("a graph").nodes };
        let target = Compiler::new().cpu().target();
        let lowered = lower(&body, &[], Arguments::default(), target, "n");
        assert_eq!(lowered.map(drop).map_err(|e| e.0), Err("a reduction of another place".into()));
    }
}
