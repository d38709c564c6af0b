//! Kernels that move values: borders, running sums, updates in place, concatenations.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::index::{Index, add, clamp, flatten, from_end, from_expr, inside, scale, to_expr};
use super::ir::{Expr, Kind, Loops, Number, Place, Stmt};
use super::lower::{Lower, Lowering, origin_place};
use super::{boxes, nest};
use crate::graph::op::{Affine, BinaryFn, ReduceFn, Type};
use crate::graph::used::{Span, span};

impl Lower<'_> {
    /// Rows along the last axis: those in the border are filled, others copied between fills.
    pub fn pad(mut self, root: usize, borders: &[(usize, usize)]) -> Lowering<Loops> {
        let ty = self.ty(root).clone();
        if ty.numel() == 0 {
            return Ok(self.finish(Vec::new()));
        }
        let node = &self.body.nodes[root];
        let (x, fill) = (node.args[0].index(), node.args[1].index());
        let rank = ty.rank();
        let out = self.out(&ty);
        let fill_index = vec![origin_place(); self.ty(fill).rank()];
        let fill = self.value(fill, &fill_index)?;
        let Some(last) = rank.checked_sub(1) else {
            let value = self.value(x, &[])?;
            let store = Stmt::Store { buffer: out, place: origin_place(), value: (*value).clone() };
            return Ok(self.finish(vec![store]));
        };
        // What surrounds rows that are in use is so too: only axes without a border may be in part.
        let spans: Vec<Option<Span>> = (0..last).map(|axis| span(&ty, axis)).collect();
        let (mut index, outer) = self.axes_in_use(&ty.shape[..last], &spans)?;
        let (before, after) = borders[last];
        let source = self.ty(x).shape.clone();
        self.target = self.target.for_axis(source[last]);
        let mut from: Vec<Index> =
            (0..last).map(|d| scale(&index[d], 1, -(borders[d].0 as i64))).collect();
        let mut piece = |this: &mut Self, start: usize, extent: usize, copy: bool| {
            if extent == 0 {
                return Ok(Vec::new());
            }
            let var = this.var(extent)?;
            index
                .push(Place::affine(Affine { offset: start as i64, ..Affine::axis(var as usize) }));
            let value = if copy {
                from.push(Place::affine(Affine::axis(var as usize)));
                let value = this.value(x, &from)?;
                from.pop();
                value
            } else {
                fill.clone()
            };
            let place = flatten(&index, &ty.shape);
            index.pop();
            let store = Stmt::Store { buffer: out, place, value: (*value).clone() };
            Ok(nest::vectorize(this, var, vec![store]))
        };
        let mut copied = piece(&mut self, 0, before, false)?;
        copied.extend(piece(&mut self, before, source[last], true)?);
        copied.extend(piece(&mut self, before + source[last], after, false)?);
        let mut body = copied;
        let bordered: Vec<usize> = (0..last).filter(|&d| borders[d] != (0, 0)).collect();
        if !bordered.is_empty() || source[..last].contains(&0) {
            let filled = piece(&mut self, 0, ty.shape[last], false)?;
            let tests = (0..last)
                .filter(|&d| borders[d] != (0, 0))
                .map(|d| inside(to_expr(&scale(&index[d], 1, -(borders[d].0 as i64))), source[d]));
            let condition = tests
                .reduce(|a, b| Expr::Binary(BinaryFn::And, Arc::new(a), Arc::new(b)))
                .unwrap_or(Expr::Const(DType::Bool, Number::Int(0)));
            body = match source.contains(&0) {
                true => filled,
                false => vec![Stmt::If { condition, then: body, other: filled }],
            };
        }
        let nested =
            nest::wrap(&self.extents, &outer, body, nest::parallel_prefix(&self.extents, &outer));
        Ok(self.finish(nested))
    }

    /// The border alone, where other kernels store what it surrounds: a box for each side, those of
    /// later axes between those of earlier ones.
    pub fn border(mut self, root: usize, borders: &[(usize, usize)]) -> Lowering<Loops> {
        let ty = self.ty(root);
        let fill = self.body.nodes[root].args[1].index();
        let fill = self.value(fill, &vec![origin_place(); self.ty(fill).rank()])?;
        let shared = borders.iter().take_while(|b| **b == (0, 0)).count();
        let (outer, vars) = self.axes(&ty.shape[..shared])?;
        let between = |d: usize| (borders[d].0, ty.shape[d] - borders[d].0 - borders[d].1);
        let mut body = Vec::new();
        for (axis, &(before, after)) in borders.iter().enumerate().skip(shared) {
            for side in [(0, before), (ty.shape[axis] - after, after)] {
                let rest = ty.shape[axis + 1..].iter().map(|&extent| (0, extent));
                let part: Vec<(usize, usize)> =
                    (shared..axis).map(between).chain([side]).chain(rest).collect();
                if part.iter().any(|p| p.1 == 0) {
                    continue;
                }
                let extents: Vec<usize> = part.iter().map(|p| p.1).collect();
                let (inner, own) = self.axes(&extents)?;
                let inner = inner.iter().zip(&part).map(|(i, p)| scale(i, 1, p.0 as i64));
                let index: Vec<Index> = outer.iter().cloned().chain(inner).collect();
                let (buffer, place) = self.result(root, &index);
                let value = (*fill).clone();
                body.extend(boxes::nest(
                    &mut self,
                    own,
                    vec![Stmt::Store { buffer, place, value }],
                ));
            }
        }
        let parallel = nest::parallel_prefix(&self.extents, &vars);
        let body = nest::wrap(&self.extents, &vars, body, parallel);
        Ok(self.finish(body))
    }

    /// `out[0] = x[0]`, then `out[i + 1] = f(out[i], x[i + 1])`.
    pub fn scan(mut self, root: usize, f: ReduceFn, axis: usize) -> Lowering<Loops> {
        let ty = self.ty(root).clone();
        if ty.numel() == 0 {
            return Ok(self.finish(Vec::new()));
        }
        let x = self.body.nodes[root].args[0].index();
        let out = self.out(&ty);
        let mut shape = ty.shape.clone();
        shape[axis] = 1;
        let used = ty.used.iter().copied().filter(|u| u.0 as usize != axis).collect();
        let (mut index, outer) = self.axes_of(&Type { shape, used, ..ty.clone() })?;
        let first = self.value(x, &index)?;
        let place = flatten(&index, &ty.shape);
        let mut body = vec![Stmt::Store { buffer: out, place, value: (*first).clone() }];
        if ty.shape[axis] > 1 {
            let var = self.var(ty.shape[axis] - 1)?;
            index[axis] = Place::affine(Affine::axis(var as usize));
            let before = Expr::Load(out, flatten(&index, &ty.shape));
            index[axis] = Place::affine(Affine { offset: 1, ..Affine::axis(var as usize) });
            let next = self.value(x, &index)?;
            let value = Expr::Binary(f.binary(ty.dtype), Arc::new(before), next);
            let place = flatten(&index, &ty.shape);
            let store = Stmt::Store { buffer: out, place, value };
            let extent = self.extents[var as usize];
            body.push(Stmt::For { var, extent, kind: Kind::Serial, body: vec![store] });
        }
        let nested =
            nest::wrap(&self.extents, &outer, body, nest::parallel_prefix(&self.extents, &outer));
        Ok(self.finish(nested))
    }

    /// A copy, then one update after another.
    pub fn scatter(mut self, root: usize, f: Option<ReduceFn>) -> Lowering<Vec<Loops>> {
        let ty = self.ty(root).clone();
        let node = &self.body.nodes[root];
        let [x, y, z] = [0, 1, 2].map(|i: usize| node.args[i].index());
        let mut kernels = Vec::new();
        let copy = self.fresh();
        kernels.push(nest::map(copy, x)?);
        if self.ty(z).numel() == 0 {
            return Ok(kernels);
        }
        let out = self.out(&ty);
        let update_shape = self.ty(z).shape.clone();
        let (index, vars) = self.axes(&update_shape)?;
        let at = self.value(y, &index[..1])?;
        let length = self.length(&ty, 0);
        let at = from_end(Expr::Cast(DType::I64, at), length);
        // The place is read only where the index is inside; clamping keeps the checker happy.
        let mut to = vec![from_expr(clamp(at.clone(), ty.shape[0]))];
        to.extend_from_slice(&index[1..]);
        let place = flatten(&to, &ty.shape);
        let new = self.value(z, &index)?;
        let value = match f {
            None => (*new).clone(),
            Some(f) => {
                Expr::Binary(f.binary(ty.dtype), Arc::new(Expr::Load(out, place.clone())), new)
            }
        };
        let store = Stmt::Store { buffer: out, place, value };
        let guard =
            Stmt::If { condition: inside(at, ty.shape[0]), then: vec![store], other: Vec::new() };
        let nested = nest::wrap(&self.extents, &vars, vec![guard], 0);
        kernels.push(self.finish(nested));
        Ok(kernels)
    }
}

/// One kernel that computes all parts, or where threads could not share its work (and where there
/// are very many parts) one for each operand.
pub fn concat(parent: Lower, root: usize, axis: usize) -> Lowering<Vec<Loops>> {
    let body = parent.body;
    let ty = &body.nodes[root].ty;
    if ty.numel() > 0
        && ty.shape[..axis].iter().product::<usize>() > 1
        && let Ok(kernel) = nest::map(parent.fresh(), root)
    {
        return Ok(vec![kernel]);
    }
    let (mut start, mut before) = (0, None);
    let mut kernels = Vec::new();
    for arg in &body.nodes[root].args {
        let piece = &body.nodes[arg.index()].ty;
        if piece.numel() > 0 {
            let mut lower = parent.fresh();
            let mut shift = Place::affine(Affine::constant(start as i64));
            if let Some(before) = before {
                // What comes after a piece in use in part moves up to it.
                shift = add(&shift, &from_expr(lower.length(before, axis)));
            }
            let mut start = vec![origin_place(); ty.rank()];
            start[axis] = shift;
            lower.store_inside(ty, start);
            let kernel = boxes::store(lower, arg.index())?;
            // What is there already needs no kernel.
            kernels.extend((!kernel.body.is_empty()).then_some(kernel));
        }
        match span(piece, axis) {
            None => start += piece.shape[axis],
            Some(_) => before = Some(piece),
        }
    }
    Ok(kernels)
}
