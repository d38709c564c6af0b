//! What a kernel does: operations and bytes as the graph states them, for any lengths of dims.

use kiln_runtime::work::{Term, Work};

use crate::graph::Body;
use crate::graph::op::{Op, Type};
use crate::graph::used::{Span, iteration, spans};
use crate::rules::cost::pieces_read;

/// What a body does. Of an argument that lies in the memory of the result nothing is read again,
/// and only what is behind it is written.
pub fn work(body: &Body, name: &str, appended: Option<usize>) -> Work {
    let flops = body.nodes.iter().filter_map(|node| {
        let args: Vec<&Type> = node.args.iter().map(|arg| &body.nodes[arg.index()].ty).collect();
        flops(&node.op, &args, &node.ty)
    });
    let root = &body.root().ty;
    let mut bytes = vec![elements(root, root.dtype.bytes() as i64)];
    for (at, node) in body.nodes.iter().enumerate() {
        let Op::Input(argument) = node.op else { continue };
        let size = node.ty.dtype.bytes() as i64;
        match appended == Some(argument as usize) {
            true => bytes.push(elements(&node.ty, -size)),
            false => bytes.extend(pieces_read(body, at).iter().map(|ty| elements(ty, size))),
        }
    }
    Work { name: name.to_string(), flops: gathered(flops), bytes: gathered(bytes) }
}

/// What a copy of a value does.
pub fn copy(ty: &Type, name: &str) -> Work {
    let bytes = vec![elements(ty, 2 * ty.dtype.bytes() as i64)];
    Work { name: name.to_string(), flops: Vec::new(), bytes }
}

/// Operations on numbers: what moves them only has none.
fn flops(op: &Op, args: &[&Type], ty: &Type) -> Option<Term> {
    match op {
        Op::Contract(contract) => {
            let spans = iteration(contract, [args[0], args[1]]);
            Some(product(contract.extents.iter().copied().zip(spans), 2))
        }
        Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast(_) => Some(elements(ty, 1)),
        Op::Reduce(..) | Op::Scan(..) => Some(elements(args[0], 1)),
        Op::Scatter(f) => f.is_some().then(|| elements(args[2], 1)),
        // In kernels they stand as their definitions.
        Op::Composite(_) => None,
        Op::Input(_) | Op::Const(_) | Op::Iota(..) | Op::Reshape(_) | Op::Permute(_) => None,
        Op::Expand(_) | Op::Slice(_) | Op::Pad(_) | Op::Window(_) | Op::Concat(_) => None,
        Op::Gather(_) | Op::Bits(_) | Op::Fused(_) => None,
    }
}

/// Elements of a type that are in use, so many times.
fn elements(ty: &Type, times: i64) -> Term {
    product(ty.shape.iter().copied().zip(spans(ty)), times)
}

fn product(axes: impl Iterator<Item = (usize, Option<Span>)>, times: i64) -> Term {
    axes.fold(Term { times, lengths: Vec::new() }, |mut term, (extent, span)| {
        match span {
            Some(Span::Dim { dim, more }) => term.lengths.push((dim.into(), more.into())),
            Some(Span::Mixed) | None => {
                let extent = i64::try_from(extent).unwrap_or(i64::MAX);
                term.times = term.times.saturating_mul(extent);
            }
        }
        term
    })
}

/// Terms of the same lengths as one.
fn gathered(terms: impl IntoIterator<Item = Term>) -> Vec<Term> {
    let mut sum: Vec<Term> = Vec::new();
    for mut term in terms {
        term.lengths.sort_unstable();
        match sum.iter_mut().find(|known| known.lengths == term.lengths) {
            Some(known) => known.times = known.times.saturating_add(term.times),
            None => sum.push(term),
        }
    }
    sum.retain(|term| term.times != 0);
    sum
}

#[cfg(test)]
mod tests {
    use kiln_runtime::plan::DIMS;
    use kiln_runtime::tensor::DType;
    use kiln_runtime::work::sum;

    use super::*;
    use crate::graph::op::{Affine, BinaryFn, Contract, UnaryFn};
    use crate::graph::used::Used;
    use crate::graph::{Node, NodeId};

    fn ty(shape: &[usize], used: &[(u8, Span)]) -> Type {
        Type { used: Used::from_slice(used), ..Type::new(DType::F32, shape) }
    }

    fn body(nodes: Vec<(Op, &[u32], Type)>) -> Body {
        let node = |(op, args, ty): (Op, &[u32], Type)| Node {
            op,
            args: args.iter().map(|&a| NodeId(a)).collect(),
            ty,
            origin: "n".into(),
        };
        Body { nodes: nodes.into_iter().map(node).collect() }
    }

    fn counts(work: &Work, length: i64) -> (f64, f64) {
        let mut dims = [0; DIMS];
        dims[0] = length;
        (sum(&work.flops, &dims), sum(&work.bytes, &dims))
    }

    #[test]
    fn a_product_with_what_follows_it() {
        const S: Span = Span::Dim { dim: 0, more: 0 };
        let rows: &[(u8, Span)] = &[(0, S)];
        let axis = Affine::axis;
        let contract = Contract {
            extents: [64, 32, 16].into_iter().collect(),
            n_out: 2,
            maps: [vec![axis(0), axis(2)], vec![axis(2), axis(1)]].map(|m| m.into()),
        };
        let body = body(vec![
            (Op::Input(0), &[], ty(&[64, 16], rows)),
            (Op::Input(1), &[], ty(&[16, 32], &[])),
            (Op::Contract(Box::new(contract)), &[0, 1], ty(&[64, 32], rows)),
            (Op::Unary(UnaryFn::Tanh), &[2], ty(&[64, 32], rows)),
        ]);
        let work = work(&body, "y", None);
        for length in [1.0, 10.0, 64.0] {
            let flops = length * 32.0 * 16.0 * 2.0 + length * 32.0;
            let bytes = 4.0 * (length * 16.0 + 16.0 * 32.0 + length * 32.0);
            assert_eq!(counts(&work, length as i64), (flops, bytes));
        }
    }

    #[test]
    fn rows_behind_a_cache_cost_as_much_as_they_are() {
        const PAST: Span = Span::Dim { dim: 0, more: 0 };
        const NEXT: Span = Span::Dim { dim: 0, more: 1 };
        let body = body(vec![
            (Op::Input(0), &[], ty(&[128, 8], &[(0, PAST)])),
            (Op::Input(1), &[], ty(&[1, 8], &[])),
            (Op::Concat(0), &[0, 1], ty(&[129, 8], &[(0, NEXT)])),
        ]);
        let in_place = work(&body, "cache", Some(0));
        let copied = work(&body, "cache", None);
        for past in [0, 7, 128] {
            assert_eq!(counts(&in_place, past), (0.0, 64.0));
            let rows = (past + past + 1 + 1) as f64;
            assert_eq!(counts(&copied, past), (0.0, 32.0 * rows));
        }
    }

    #[test]
    fn only_what_is_taken_of_an_argument_counts() {
        let first = Op::Slice([(0, 1, 10), (0, 1, 1)].into_iter().collect());
        let body = body(vec![
            (Op::Input(0), &[], ty(&[10, 100], &[])),
            (first, &[0], ty(&[10, 1], &[])),
            (Op::Binary(BinaryFn::Add), &[1, 1], ty(&[10, 1], &[])),
        ]);
        assert_eq!(counts(&work(&body, "y", None), 0), (10.0, 80.0));
    }
}
