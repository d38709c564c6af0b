//! Maps over concatenations: the result is cut into boxes, and in each box every concatenation
//! reads one of its operands. A rotary embedding is two halves so, and a cache with new rows after
//! it is the rows that are copied and those that are computed, in one kernel.

use super::index::{Index, scale};
use super::ir::{Expr, Loops, Param, Stmt, Var};
use super::lower::{Lower, Lowering, Refused};
use super::nest::{coalesce, parallel_prefix, vectorize, wrap};
use crate::graph::used::{Span, spans};

/// Boxes of a result at most.
const MOST: usize = 24;

/// A box: start and extent along each axis.
type Box = Vec<(usize, usize)>;

/// Indices of a box: new variables, or numbers where the extent is 1. `spans` says what is in use
/// of each axis, counted from where the whole of it begins.
fn axes(
    lower: &mut Lower,
    ranges: &[(usize, usize)],
    spans: &[Option<Span>],
) -> Lowering<(Vec<Index>, Vec<Option<Var>>)> {
    let mut vars = Vec::with_capacity(ranges.len());
    let mut index = Vec::with_capacity(ranges.len());
    for (&(start, extent), span) in ranges.iter().zip(spans) {
        let span = span.map(|span| match span {
            Span::Dim { dim, more } => Span::Dim { dim, more: more - start as i32 },
            Span::Mixed => Span::Mixed,
        });
        let (at, var) = lower.axes_in_use(&[extent], &[span])?;
        index.push(scale(&at[0], 1, start as i64));
        vars.push(var.first().copied());
    }
    Ok((index, vars))
}

/// The boxes of a node's result, in row-major order of their starts within each cut.
fn boxes(parent: &Lower, node: usize) -> Lowering<Vec<Box>> {
    let mut open: Vec<Box> = vec![parent.ty(node).shape.iter().map(|&e| (0, e)).collect()];
    let mut done = Vec::new();
    let spans = spans(parent.ty(node));
    while let Some(ranges) = open.pop() {
        let mut trial = parent.fresh();
        let (index, vars) = axes(&mut trial, &ranges, &spans)?;
        let Err(refused) = trial.value(node, &index) else {
            done.push(ranges);
            continue;
        };
        let cut = trial.crossing().and_then(|(var, at)| {
            let axis = vars.iter().position(|v| *v == Some(var))?;
            Some((axis, at))
        });
        let Some((axis, at)) = cut else { return Err(refused) };
        if open.len() + done.len() > MOST {
            return Err(Refused("a concatenation of too many parts".into()));
        }
        let (start, extent) = ranges[axis];
        let (mut first, mut second) = (ranges.clone(), ranges);
        first[axis] = (start, at);
        second[axis] = (start + at, extent - at);
        open.extend([second, first]);
    }
    Ok(done)
}

/// A kernel that computes a node and stores it.
pub fn store(mut lower: Lower, node: usize) -> Lowering<Loops> {
    let boxes = boxes(&lower, node)?;
    let shape = lower.ty(node).shape.clone();
    let whole = |d: &usize| boxes.iter().all(|b| b[*d] == (0, shape[*d]));
    let shared = (0..shape.len()).take_while(whole).count();
    // One box is one nest; of several, the axes before the first cut are shared.
    let shared = if boxes.len() == 1 { 0 } else { shared };
    let spans = spans(lower.ty(node));
    let (outer, mut vars) = lower.axes_in_use(&shape[..shared], &spans[..shared])?;
    let mut body = Vec::new();
    let single = boxes.len() == 1;
    // Rows of the largest box, where they are cut and so do not follow one another.
    let largest = boxes.iter().max_by_key(|b| b.iter().map(|r| r.1).product::<usize>());
    if let (Some(&(_, extent)), Some(&row)) = (largest.and_then(|b| b.last()), shape.last())
        && extent < row
    {
        lower.target = lower.target.for_axis(extent);
    }
    for ranges in boxes {
        let (inner, own) = axes(&mut lower, &ranges[shared..], &spans[shared..])?;
        let index: Vec<Index> = outer.iter().cloned().chain(inner).collect();
        let value = lower.value(node, &index)?;
        let (out, place) = lower.result(node, &index);
        // What is there already.
        if let Expr::Load(from, found) = &*value
            && lower.args.appended.is_some_and(|a| lower.buffers[*from].param == Param::Arg(a))
            && *found == place
        {
            continue;
        }
        let own: Vec<Var> = own.into_iter().flatten().collect();
        if single {
            return Ok(super::nest::store_nest(lower, own, out, place, value));
        }
        let store = vec![Stmt::Store { buffer: out, place, value: (*value).clone() }];
        body.extend(nest(&mut lower, own, store));
    }
    let body = coalesce(&mut lower, &mut vars, body);
    let parallel = parallel_prefix(&lower.extents, &vars);
    let body = wrap(&lower.extents, &vars, body, parallel);
    Ok(lower.finish(body))
}

/// Serial loops around the statements of one box.
pub fn nest(lower: &mut Lower, mut vars: Vec<Var>, body: Vec<Stmt>) -> Vec<Stmt> {
    let body = coalesce(lower, &mut vars, body);
    let Some(inner) = vars.pop() else { return body };
    let body = vectorize(lower, inner, body);
    wrap(&lower.extents, &vars, body, 0)
}
