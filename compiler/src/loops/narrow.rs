//! Products of words whose last axis is a little shorter than a vector.
//!
//! Weights are packed with columns of zeros beside their own, so that the sums of a row are a
//! vector. Sums lie in scratch memory: results are made of those that the axis has.

use std::sync::Arc;

use super::contract::{Product, Roles, plain_load, tile, zero};
use super::ir::{Expr, Param, Place, Scope, Stmt, Var};
use super::lower::{Lower, Lowered, Lowering, Refused, origin_place};
use super::panels::{Panels, Strip, pack, packed_len, panel_order};
use super::{nest, rewrite};
use crate::graph::op::Affine;

/// Whether a product is such a contraction: single elements would take longer than empty lanes.
pub fn fits(lower: &Lower, product: &Product, roles: Roles) -> bool {
    let load = plain_load(&product.operands[roles.lanes]);
    let (Some((source, _)), Some(&n)) = (load, product.vars.last()) else { return false };
    let (extent, lanes) = (lower.extents[usize::from(n)], lower.target.lanes);
    let settled = |&v: &Var| lower.span(v).is_none();
    (lanes.div_ceil(2)..lanes).contains(&extent)
        && lower.target.registers > 16
        && product.parts.is_some()
        && roles.packed
        && !roles.both
        && lower.is_constant(source)
        && product.vars.iter().chain(&product.summed).all(settled)
}

/// Its kernels.
pub fn lower(
    parent: &Lower,
    product: Product,
    roles: Roles,
    summed: &[Var],
    lowered: &mut Lowered,
) -> Lowering<()> {
    let n = *product.vars.last().ok_or_else(|| Refused("a result without axes".into()))?;
    let load = plain_load(&product.operands[roles.lanes]);
    let (source, affine) = load.ok_or_else(|| Refused("a packed load".into()))?;
    let (lanes, kept) = (parent.target.lanes, parent.buffers[source].dtype);
    let strip = Strip { start: 0, tiles: 1, width: lanes, vectors: 1, packed: 0 };
    let len = packed_len(parent, &product, affine) / parent.extents[usize::from(n)] * lanes;
    let panels = lowered.scratch.len();
    lowered.scratch.push((kept, len));
    let mut clear = parent.fresh();
    let to = clear.buffer(kept, len, Scope::Global, Param::Scratch(panels));
    let all = clear.var(len)?;
    let at = Place::affine(Affine::axis(all.into()));
    lowered.kernels.push(nest::store_nest(clear, vec![all], to, at, Arc::new(zero(kept))));
    let order = panel_order(&product, affine, summed, n);
    let memory = (panels, len);
    let (kernel, place) = pack(parent, source, affine, (&order, n), strip, memory, product.parts)?;
    lowered.kernels.push(kernel);
    // Sums by rows, each a vector long.
    let extents = |v: Var| parent.extents[usize::from(v)];
    let (mut rows, mut step) = (Affine::axis(n.into()), lanes);
    for &v in product.vars.iter().rev().skip(1) {
        rows = rows.plus(v.into(), step as i64);
        step *= extents(v);
    }
    let dtype = parent.buffers[product.cell].dtype;
    let sums = lowered.scratch.len();
    lowered.scratch.push((dtype, step));
    let mut copy = parent.copy();
    copy.extents[usize::from(n)] = lanes;
    let out = copy.buffer(dtype, step, Scope::Global, Param::Scratch(sums));
    let whole = Product {
        out,
        place: Place::affine(rows.clone()),
        result: Arc::new(Expr::Load(product.cell, origin_place())),
        ..product.clone()
    };
    let panels = Panels { scratch: (panels, len), place, kept };
    lowered.kernels.push(tile(copy, &whole, roles, summed, strip, Some(panels))?);
    let mut copy = parent.copy();
    let from = copy.buffer(dtype, step, Scope::Global, Param::Scratch(sums));
    let (buffer, place, value) = (product.out, product.place, (*product.result).clone());
    let store = [Stmt::Store { buffer, place, value }];
    let store = rewrite::retarget(&store, product.cell, from, &rows);
    let [Stmt::Store { buffer, place, value }] = &store[..] else {
        return Err(Refused("a store".into()));
    };
    let value = Arc::new(value.clone());
    lowered.kernels.push(nest::store_nest(copy, product.vars, *buffer, place.clone(), value));
    Ok(())
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::{DType, Tensor};

    use crate::Compiler;
    use crate::graph::eval::{Value, eval};
    use crate::graph::op::{BinaryFn, Op, Type, UnaryFn};
    use crate::graph::{Args, Graph};

    #[test]
    fn results_of_fewer_columns_than_lanes() {
        for (rows, columns) in [(1, 10), (13, 10), (64, 15), (5, 8), (13, 3)] {
            let (mut graph, o) = (Graph::default(), "product".into());
            let values = |n: usize, of: usize| (0..n).map(move |k| (k * 37 % of) as u8);
            let x = graph.input("x", Type::new(DType::U8, &[rows, 52]));
            let x = graph.cast(x, DType::I32, &o).expect("fits");
            let weights: Vec<i8> = values(52 * columns, 251).map(|v| v as i8).collect();
            let w = graph.tensor(&Tensor::from_slice(&[52, columns], &weights), &o);
            // As if it were too large to be folded while the graph is built.
            let ty = Type::new(DType::I32, &[52, columns]);
            let w = graph.push(Op::Cast(DType::I32), Args::from_slice(&[w]), ty, &o);
            let bias: Vec<f32> = values(columns, 7).map(f32::from).collect();
            let b = graph.tensor(&Tensor::from_slice(&[1, columns], &bias), &o);
            let y = graph.matmul(x, w, &o).expect("fits");
            let y = graph.cast(y, DType::F32, &o).expect("fits");
            let y = graph.binary_number(BinaryFn::Mul, y, 1e-5, &o).expect("fits");
            let y = graph.binary(BinaryFn::Add, y, b, &o).expect("fits");
            let y = graph.unary(UnaryFn::Tanh, y, &o).expect("fits");
            graph.outputs.push(("y".into(), y));
            let given =
                Tensor::from_slice(&[rows, 52], &values(rows * 52, 253).collect::<Vec<u8>>());
            let inputs = [Value::from_tensor(&given)];
            let expected = eval(&graph, &inputs);
            for wide in [false, true] {
                let compiler = Compiler::new().wide(wide);
                let kernels = compiler.optimise(&graph).unwrap_or_else(|e| panic!("{e}"));
                let program = compiler.lower(&kernels).unwrap_or_else(|e| panic!("{e}"));
                let launches = program.launches.iter().filter(|l| !l.constant).count();
                let narrow = compiler.cpu().target().lanes == 16 && columns >= 8;
                assert!(!narrow || launches == 2, "{rows} by {columns}: {launches}");
                crate::tests::check_loops(&kernels, &program, &inputs, (&expected, 1e-5));
                let executable = compiler.build(&kernels).unwrap_or_else(|e| panic!("{e}"));
                let got = executable.run(&[("x", given.view())]).unwrap_or_else(|e| panic!("{e}"));
                let got = Value::from_tensor(&got[0].1).as_f64s();
                let close = |(a, b): (&f64, f64)| (a - b).abs() < 1e-5;
                assert!(got.iter().zip(expected[0].as_f64s()).all(close), "{rows} by {columns}");
            }
        }
    }
}
