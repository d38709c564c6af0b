//! Kernels at the border: a caller's tensors are dense for the extents of the run, values inside
//! have room for the most that these may be.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use crate::graph::op::{BinaryFn, Op, Type};
use crate::graph::used::span;
use crate::graph::{Args, Body, Node};
use crate::loops::index::{Index, add, clamp, flatten, from_expr, to_expr};
use crate::loops::ir::{Expr, Loops, Number, Param, Place, Scope};
use crate::loops::lower::{Arguments, Lower, Lowering, Target};
use crate::loops::nest::store_nest;

/// Which way values go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the caller's dense tensor.
    In,
    /// To it.
    Out,
}

/// The kernel that copies a value of a type in or out.
pub fn border(ty: &Type, way: Way, target: Target) -> Lowering<Loops> {
    let node = Node { op: Op::Input(0), args: Args::new(), ty: ty.clone(), origin: "copy".into() };
    let body = Body { nodes: vec![node] };
    let mut lower = Lower::new(&body, &[], Arguments::default(), target);
    let from = lower.buffer(ty.dtype, ty.numel(), Scope::Global, Param::Arg(0));
    let to = lower.out(ty);
    let (index, vars) = lower.axes_of(ty)?;
    let dense = dense(&mut lower, ty, &index);
    let roomy = flatten(&index, &ty.shape);
    let (read, written) = match way {
        Way::In => (dense, roomy),
        Way::Out => (roomy, dense),
    };
    let name = if way == Way::In { "take in" } else { "give out" };
    let kernel = store_nest(lower, vars, to, written, Arc::new(Expr::Load(from, read)));
    Ok(Loops { name: name.into(), ..kernel })
}

/// The place of an index where every axis is as long as it is in use.
fn dense(lower: &mut Lower, ty: &Type, index: &[Index]) -> Place {
    let last = (0..ty.rank()).rev().find(|&axis| span(ty, axis).is_some());
    let Some(last) = last else { return flatten(index, &ty.shape) };
    // Axes behind the last one that is in use in part are whole: they keep their places.
    let inner: usize = ty.shape[last + 1..].iter().product();
    let binary = |f, x, y| Expr::Binary(f, Arc::new(x), Arc::new(y));
    let rows = (1..=last).fold(to_expr(&index[0]), |rows, axis| {
        let length = lower.length(ty, axis);
        binary(BinaryFn::Add, binary(BinaryFn::Mul, rows, length), to_expr(&index[axis]))
    });
    let width = Expr::Const(DType::I64, Number::Int(inner as i128));
    let start = binary(BinaryFn::Mul, rows, width);
    // The checker sees that it stays inside: a dense tensor is no larger than a roomy one.
    let start = clamp(start, ty.numel() - inner + 1);
    let inside = flatten(&index[last + 1..], &ty.shape[last + 1..]);
    add(&inside, &from_expr(start))
}
