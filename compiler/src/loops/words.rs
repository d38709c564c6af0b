//! Sums of products of short numbers, two or four products at a time.
//!
//! Both operands are numbers that the contraction widens: two i16, or one u8 and one i8, or two
//! bf16 where the target has instructions for these. The one that is broadcast has neighbours along
//! the sum side by side in memory, so that a word of them is read as one i32; the other one is
//! packed with the parts of its words side by side. Sums are what they stand for, i32 or f32.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::{Product, plain_load};
use super::ir::{Expr, Parts, Place, Var};
use super::lower::{Lower, Lowering};
use crate::graph::op::Affine;

/// The load of short numbers that an operand is widened from.
fn short<'e>(lower: &Lower, e: &'e Expr) -> Option<(usize, &'e Affine)> {
    let Expr::Cast(to, x) = e else { return None };
    let load = plain_load(x)?;
    let from = lower.buffers[load.0].dtype;
    let fits = match to {
        DType::I32 => from.bytes() <= 2,
        DType::F32 => from == DType::BF16 && lower.target.halves,
        _ => false,
    };
    fits.then_some(load)
}

/// A product of short integers with its operands as they are before they are widened.
pub fn bare(lower: &Lower, product: Product) -> Product {
    let operand = |e: &Arc<Expr>| match (short(lower, e), &**e) {
        (Some(_), Expr::Cast(_, x)) => x.clone(),
        _ => e.clone(),
    };
    let operands = [0, 1].map(|k: usize| operand(&product.operands[k]));
    Product { operands, ..product }
}

/// The product as a sum over words, where it is one: the innermost axis of the sum along which the
/// operand that is broadcast steps by one element has as many times fewer turns. That operand comes
/// first where the parts of the two are not the same.
pub fn in_words(lower: &mut Lower, product: &Product) -> Lowering<Option<Product>> {
    let loads = [0, 1].map(|k: usize| short(lower, &product.operands[k]));
    let ([Some(x), Some(y)], Some(&n)) = (loads, product.vars.last()) else { return Ok(None) };
    let along = |load: (usize, &Affine), var: Var| load.1.coefficient(var as usize);
    let (panel, other) = match [along(x, n), along(y, n)] {
        [0, s] if s != 0 => (y, x),
        [s, 0] if s != 0 => (x, y),
        _ => return Ok(None),
    };
    let dtypes = [other, panel].map(|load| lower.buffers[load.0].dtype);
    let known = Parts::ALL.into_iter().find(|p| p.dtypes() == dtypes);
    let Some(parts) = known else { return Ok(None) };
    let count = parts.count();
    let fits = |&&var: &&Var| {
        along(other, var) == 1
            && along(panel, var) != 0
            && lower.extents[var as usize].is_multiple_of(count)
            && lower.span(var).is_none()
    };
    let Some(&whole) = product.summed.iter().find(fits) else { return Ok(None) };
    let apart = along(panel, whole);
    let extent = lower.extents[whole as usize] / count;
    let word = lower.var(extent)?;
    let spread = |affine: &Affine| {
        affine.substitute(&|v| match v == whole as usize {
            true => Affine::scaled(word as usize, count as i64),
            false => Affine::axis(v),
        })
    };
    let read = |l: (usize, &Affine)| Arc::new(Expr::Word(l.0, Place::affine(spread(l.1))));
    let operands = match parts {
        Parts::Pairs | Parts::Halves => [read(x), read(y)],
        Parts::Quads => [read(other), read(panel)],
    };
    let summed = product.summed.iter().map(|&v| if v == whole { word } else { v });
    Ok(Some(Product {
        vars: product.vars.clone(),
        summed: summed.collect(),
        operands,
        cell: product.cell,
        out: product.out,
        place: product.place.clone(),
        result: product.result.clone(),
        parts: Some((parts, apart)),
    }))
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::Tensor;
    use smallvec::smallvec;

    use super::*;
    use crate::Compiler;
    use crate::graph::eval::{Value, eval};
    use crate::graph::op::{BinaryFn, Op, Type, UnaryFn};
    use crate::graph::{Args, Graph};

    /// A convolution between quantisations, of numbers that f32 holds: of 3 by 3 or of 1 by 1.
    /// Either the weights are i8 or the other factor.
    fn quantised(
        [ic, oc, size, stride]: [usize; 4],
        image: [usize; 2],
        signed_weights: bool,
    ) -> (Graph, Tensor) {
        let (mut graph, o) = (Graph::default(), "conv".into());
        let shape = [2, ic, image[0], image[1]];
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            (state >> 16) as i32
        };
        let x: Vec<f32> =
            (0..shape.iter().product()).map(|_| (next() % 300 - 130) as f32 / 4.0).collect();
        let given = Tensor::from_slice(&shape, &x);
        let x = graph.input("x", Type::new(DType::F32, &shape));
        let mut whole = |x| {
            let y = graph.binary_number(BinaryFn::Mul, x, 4.0, &o)?;
            let y = graph.unary(UnaryFn::Round, y, &o)?;
            let (dtype, zero) = if signed_weights { (DType::U8, 117) } else { (DType::I8, -9) };
            let y = graph.binary_number(BinaryFn::Add, y, f64::from(zero), &o)?;
            let y = graph.cast(y, dtype, &o)?;
            let y = graph.cast(y, DType::I32, &o)?;
            let zero = graph.tensor(&Tensor::from_slice(&[], &[zero]), &o);
            let y = graph.binary(BinaryFn::Sub, y, zero, &o)?;
            let y = graph.cast(y, DType::F32, &o)?;
            graph.binary_number(BinaryFn::Mul, y, 0.25, &o)
        };
        let x = whole(x).expect("fits");
        let weights: Vec<i8> = (0..oc * ic * size * size).map(|_| next() as i8).collect();
        let of = [oc, ic, size, size];
        let raised: Vec<u8> = weights.iter().map(|&w| w as u8 ^ 0x80).collect();
        let w = match signed_weights {
            true => graph.tensor(&Tensor::from_slice(&of, &weights), &o),
            false => graph.tensor(&Tensor::from_slice(&of, &raised), &o),
        };
        let middle = graph.tensor(&Tensor::from_slice(&[oc, 1, 1, 1], &vec![128i32; oc]), &o);
        let scales: Vec<f32> = (0..oc).map(|k| 0.5f32.powi(k as i32 % 5)).collect();
        let scales = graph.tensor(&Tensor::from_slice(&[oc, 1, 1, 1], &scales), &o);
        // As if they were too large to be folded while the graph is built.
        let mut unfolded = |op, args: &[_], dtype| {
            graph.push(op, Args::from_slice(args), Type::new(dtype, &of), &o)
        };
        let mut w = unfolded(Op::Cast(DType::I32), &[w], DType::I32);
        if !signed_weights {
            w = unfolded(Op::Binary(BinaryFn::Sub), &[w, middle], DType::I32);
        }
        let w = unfolded(Op::Cast(DType::F32), &[w], DType::F32);
        let w = unfolded(Op::Binary(BinaryFn::Mul), &[w, scales], DType::F32);
        let fill = graph.scalar(DType::F32, 0, 0.0, &o);
        let b = size / 2;
        let borders = Op::Pad(smallvec![(0, 0), (0, 0), (b, b), (b, b)]);
        let x = graph.add(borders, &[x, fill], &o).expect("fits");
        let steps = (&[stride; 2][..], &[1; 2][..]);
        let y = graph.conv([x, w], steps, 1, &o).expect("fits");
        graph.outputs.push(("y".into(), y));
        (graph, given)
    }

    #[test]
    fn convolutions_of_integers_are_exact() {
        for (sizes, image, few) in [
            ([16, 32, 3, 1], [9, 7], true),
            ([32, 16, 3, 1], [4, 6], true),
            ([16, 32, 3, 2], [9, 7], false),
            ([10, 19, 3, 1], [5, 6], false),
            ([7, 40, 3, 1], [5, 6], false),
            ([3, 24, 7, 2], [19, 22], false),
            ([256, 64, 1, 1], [12, 10], false),
        ] {
            for (wide, signed_weights) in
                [(false, true), (true, true), (false, false), (true, false)]
            {
                let (graph, given) = quantised(sizes, image, signed_weights);
                let expected = eval(&graph, &[Value::from_tensor(&given)]);
                let compiler = Compiler::new().wide(wide);
                let kernels = compiler.optimise(&graph).unwrap_or_else(|e| panic!("{e}"));
                let program = compiler.lower(&kernels).unwrap_or_else(|e| panic!("{e}"));
                let text: String = program.kernels.iter().map(crate::loops::text::print).collect();
                assert!(text.contains("dot"), "{sizes:?}\n{text}");
                // Bytes are multiplied directly.
                let bytes = compiler.cpu().wanted_dots().whole;
                assert_eq!(text.contains("dot4("), bytes, "{sizes:?}\n{text}");
                assert_eq!(text.contains(".products"), few && !bytes, "{sizes:?}");
                let inputs = [Value::from_tensor(&given)];
                crate::tests::check_loops(&kernels, &program, &inputs, (&expected, 0.0));
                let executable = compiler.build(&kernels).unwrap_or_else(|e| panic!("{e}"));
                let got = executable.run(&[("x", given.view())]).unwrap_or_else(|e| panic!("{e}"));
                assert!(Value::from_tensor(&got[0].1) == expected[0], "{sizes:?}, wide {wide}");
            }
        }
    }
}
