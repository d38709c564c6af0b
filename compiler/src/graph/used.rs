//! Axes of which a run uses only the first elements. A type says how much room there is; a [`Span`]
//! says how much of it holds a value: as many elements as a dim of the model is long, which is
//! known when the model runs. What lies beyond is memory without meaning.
//!
//! This is bounded dynamism as XLA has it: strides are numbers, only the turns of loops vary.

use smallvec::SmallVec;

use super::op::{Contract, Op, Type};

/// How many elements of an axis are in use, counted from the first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Span {
    /// As many as a dim of the model is long, and some more.
    Dim {
        /// Number of the dim.
        dim: u8,
        /// How many more; the sum is at least 0 wherever the dim is in its range.
        more: i32,
    },
    /// Not the first ones only: elements without meaning lie between. Such a value may be computed
    /// by the way, but nothing that counts may depend on it.
    Mixed,
}

/// Axes that are in use in part, ascending.
pub type Used = SmallVec<[(u8, Span); 1]>;

/// Which part of an axis is in use; none where all of it is.
pub fn span(ty: &Type, axis: usize) -> Option<Span> {
    ty.used.iter().find(|u| u.0 as usize == axis).map(|u| u.1)
}

/// Whether a type has elements without meaning in between.
pub fn is_mixed(ty: &Type) -> bool {
    ty.used.iter().any(|u| u.1 == Span::Mixed)
}

/// What is in use of two values at once.
fn both(a: Option<Span>, b: Option<Span>) -> Option<Span> {
    match (a, b) {
        (None, other) | (other, None) => other,
        (Some(a), Some(b)) if a == b => Some(a),
        (Some(_), Some(_)) => Some(Span::Mixed),
    }
}

fn list(spans: impl IntoIterator<Item = Option<Span>>) -> Used {
    let some = spans.into_iter().enumerate().filter_map(|(a, s)| Some((a as u8, s?)));
    some.collect()
}

/// Spans of all axes of a type.
pub fn spans(ty: &Type) -> Vec<Option<Span>> {
    (0..ty.rank()).map(|a| span(ty, a)).collect()
}

/// What is in use of the result of an operation, whose type but for that is `ty`.
pub fn used(op: &Op, args: &[&Type], ty: &Type) -> Used {
    if args.iter().all(|a| a.used.is_empty()) {
        return Used::new();
    }
    let mut used = of(op, args, ty);
    // What has no meaning is never forgotten, wherever it was.
    if args.iter().any(|a| is_mixed(a)) && !used.iter().any(|u| u.1 == Span::Mixed) {
        used.retain(|u| u.0 != 0);
        used.insert(0, (0, Span::Mixed));
    }
    used
}

fn of(op: &Op, args: &[&Type], ty: &Type) -> Used {
    match op {
        Op::Input(_) | Op::Const(_) | Op::Fused(_) | Op::Iota(..) => Used::new(),
        Op::Unary(_) | Op::Cast(_) | Op::Bits(_) => args[0].used.clone(),
        Op::Composite(_) | Op::Scan(..) => args[0].used.clone(),
        Op::Binary(_) | Op::Select => {
            // Axes of extent 1 repeat; they are in use whole.
            list((0..ty.rank()).map(|a| {
                let there = args.iter().filter(|x| x.shape[a] == ty.shape[a]);
                there.fold(None, |all, x| both(all, span(x, a)))
            }))
        }
        Op::Reshape(_) => reshape(args[0], &ty.shape),
        Op::Permute(axes) => list(axes.iter().map(|&a| span(args[0], a as usize))),
        Op::Expand(_) => args[0].used.clone(),
        Op::Slice(axes) => list(axes.iter().enumerate().map(|(a, &(start, step, extent))| {
            let span = span(args[0], a)?;
            match (start, step, extent) {
                // The first elements, as many as there are; that a run does not use more of the
                // whole than this is for `ranges.rs` to prove.
                (0, 1, extent) if extent > 1 || args[0].shape[a] == 1 => Some(span),
                // Every run uses the first element.
                (0, _, 1) => None,
                _ => Some(Span::Mixed),
            }
        })),
        Op::Pad(borders) => list(borders.iter().enumerate().map(|(a, &border)| {
            let span = span(args[0], a)?;
            Some(if border == (0, 0) { span } else { Span::Mixed })
        })),
        Op::Window(axes) => {
            let lead = args[0].rank() - axes.len();
            let windowed = axes.iter().enumerate().map(|(i, &(extent, stride, _))| {
                let span = span(args[0], lead + i)?;
                Some(if (extent, stride) == (1, 1) { span } else { Span::Mixed })
            });
            list((0..lead).map(|a| span(args[0], a)).chain(windowed))
        }
        Op::Concat(axis) => list((0..ty.rank()).map(|a| match a == *axis as usize {
            false => args.iter().fold(None, |all, x| both(all, span(x, a))),
            true => joined(args, a),
        })),
        Op::Gather(axis) => {
            let axis = *axis as usize;
            let mut all = spans(args[0]);
            all.splice(axis..axis + 1, spans(args[1]));
            list(all)
        }
        Op::Scatter(_) => match args[1].used.is_empty() && args[2].used.is_empty() {
            true => args[0].used.clone(),
            false => list([Some(Span::Mixed)]),
        },
        Op::Reduce(_, axes) => list((0..ty.rank()).map(|a| match span(args[0], a) {
            // A sum over what has no meaning has none.
            Some(Span::Dim { .. }) if axes.contains(&(a as u8)) => None,
            span => span,
        })),
        Op::Contract(contract) => contraction(contract, args[0], args[1]),
    }
}

/// Pieces one after another: at most one of them may be in use in part.
fn joined(args: &[&Type], axis: usize) -> Option<Span> {
    let partial: Vec<usize> = (0..args.len()).filter(|&i| span(args[i], axis).is_some()).collect();
    let [only] = partial[..] else {
        return (!partial.is_empty()).then_some(Span::Mixed);
    };
    let others: usize = (0..args.len()).filter(|&i| i != only).map(|i| args[i].shape[axis]).sum();
    match (span(args[only], axis)?, i32::try_from(others)) {
        (Span::Dim { dim, more }, Ok(others)) => {
            Some(more.checked_add(others).map_or(Span::Mixed, |more| Span::Dim { dim, more }))
        }
        _ => Some(Span::Mixed),
    }
}

/// Axes that keep their elements when a shape is written in another way keep their spans.
fn reshape(x: &Type, shape: &[usize]) -> Used {
    let mut spans = vec![None; shape.len()];
    for (from, to) in groups(&x.shape, shape) {
        let partial = from.clone().filter_map(|a| Some((a, span(x, a)?)));
        let wide = |shape: &[usize], axes: std::ops::Range<usize>| -> Vec<usize> {
            axes.filter(|&a| shape[a] != 1).collect()
        };
        let (before, after) = (wide(&x.shape, from.clone()), wide(shape, to.clone()));
        for (axis, span) in partial {
            match (&before[..], &after[..]) {
                (&[only], &[target]) if only == axis => spans[target] = Some(span),
                _ => after.iter().for_each(|&a| spans[a] = Some(Span::Mixed)),
            }
        }
    }
    list(spans)
}

/// Runs of axes of two shapes that hold the same elements, each as short as can be.
fn groups(x: &[usize], y: &[usize]) -> Vec<(std::ops::Range<usize>, std::ops::Range<usize>)> {
    let mut groups = Vec::new();
    let (mut i, mut j) = (0, 0);
    while i < x.len() || j < y.len() {
        let (from, to) = (i, j);
        let (mut a, mut b) = (1usize, 1usize);
        loop {
            // Sizes fit, so products of some of the extents do, but for those beside a 0.
            if i < x.len() && (a <= b || j == y.len()) {
                a = a.saturating_mul(x[i]);
                i += 1;
            } else if j < y.len() {
                b = b.saturating_mul(y[j]);
                j += 1;
            }
            let begun = i > from && j > to || i == x.len() && j == y.len();
            if begun && a == b || i == x.len() && j == y.len() {
                break;
            }
        }
        groups.push((from..i, to..j));
    }
    groups
}

/// What is in use of each axis of a contraction's iteration space.
pub fn iteration(contract: &Contract, args: [&Type; 2]) -> Vec<Option<Span>> {
    let mut spans = vec![None; contract.extents.len()];
    for (map, operand) in contract.maps.iter().zip(args) {
        for (axis, index) in map.iter().enumerate() {
            let Some(found) = span(operand, axis) else { continue };
            match index.as_axis() {
                Some(a) => spans[a] = both(spans[a], Some(found)),
                None => {
                    index.terms.iter().for_each(|t| spans[t.0 as usize] = Some(Span::Mixed));
                }
            }
        }
    }
    spans
}

fn contraction(contract: &Contract, x: &Type, y: &Type) -> Used {
    let spans = iteration(contract, [x, y]);
    let (out, summed) = spans.split_at(contract.n_out);
    match summed.contains(&Some(Span::Mixed)) {
        // A sum over what has no meaning; the first axis says so, even where there is none.
        true => list([Some(Span::Mixed)]),
        false => list(out.iter().copied()),
    }
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::DType;

    use super::super::infer::infer;
    use super::super::op::{Affine, BinaryFn, ReduceFn};
    use super::*;

    const B: Span = Span::Dim { dim: 0, more: 0 };
    const S: Span = Span::Dim { dim: 1, more: 0 };

    fn ty(shape: &[usize], used: &[(u8, Span)]) -> Type {
        Type { used: Used::from_slice(used), ..Type::new(DType::F32, shape) }
    }

    fn after(op: Op, args: &[&Type]) -> Vec<(u8, Span)> {
        infer(&op, args).expect("a type").used.to_vec()
    }

    #[test]
    fn spans_go_with_their_axes() {
        let x = ty(&[8, 512, 768], &[(0, B), (1, S)]);
        let bias = ty(&[1, 1, 768], &[]);
        assert_eq!(after(Op::Binary(BinaryFn::Add), &[&x, &bias]), [(0, B), (1, S)]);
        let heads = Op::Reshape([8, 512, 12, 64].into_iter().collect());
        assert_eq!(after(heads, &[&x]), [(0, B), (1, S)]);
        assert_eq!(after(Op::Permute([1, 2, 0].into_iter().collect()), &[&x]), [(0, S), (2, B)]);
        assert_eq!(after(Op::Reduce(ReduceFn::Sum, [1].into_iter().collect()), &[&x]), [(0, B)]);
        let first = Op::Slice([(0, 1, 8), (0, 1, 1), (0, 1, 768)].into_iter().collect());
        assert_eq!(after(first, &[&x]), [(0, B)]);
        let table = ty(&[1000, 768], &[]);
        let ids = Type { dtype: DType::I64, ..ty(&[8, 512], &[(0, B), (1, S)]) };
        assert_eq!(after(Op::Gather(0), &[&table, &ids]), [(0, B), (1, S)]);
        let (past, new) = (ty(&[8, 512, 64], &[(1, S)]), ty(&[8, 1, 64], &[]));
        let longer = Span::Dim { dim: 1, more: 1 };
        assert_eq!(after(Op::Concat(1), &[&past, &new]), [(1, longer)]);
        assert_eq!(after(Op::Concat(1), &[&past, &past]), [(1, Span::Mixed)]);
    }

    #[test]
    fn what_has_no_meaning_is_never_forgotten() {
        let x = ty(&[8, 512, 768], &[(0, B), (1, S)]);
        let rows = infer(&Op::Reshape([4096, 768].into_iter().collect()), &[&x]).expect("a type");
        assert_eq!(rows.used.to_vec(), [(0, Span::Mixed)]);
        assert_eq!(
            after(Op::Reduce(ReduceFn::Sum, [0].into_iter().collect()), &[&rows]),
            [(0, Span::Mixed)]
        );
        let late = Op::Slice([(0, 1, 8), (511, 1, 1), (0, 1, 768)].into_iter().collect());
        let scalar = Type { used: Used::from_slice(&[(0, Span::Mixed)]), ..ty(&[1, 1, 1], &[]) };
        let more = after(Op::Binary(BinaryFn::Mul), &[&x, &scalar]);
        assert_eq!(more, [(0, Span::Mixed), (1, S)]);
        assert_eq!(after(late, &[&x]), [(0, B), (1, Span::Mixed)]);
        let other = ty(&[8, 512, 768], &[(0, S)]);
        assert_eq!(after(Op::Binary(BinaryFn::Mul), &[&x, &other]), [(0, Span::Mixed), (1, S)]);
    }

    #[test]
    fn sums_of_products_run_over_what_is_in_use() {
        // scores[i,j] * values[j,d], j in part.
        let axis = Affine::axis;
        let contract =
            |maps| Contract { extents: [512, 64, 512].into_iter().collect(), n_out: 2, maps };
        let product = contract([vec![axis(0), axis(2)], vec![axis(2), axis(1)]].map(|m| m.into()));
        let (x, y) = (ty(&[512, 512], &[(0, S), (1, S)]), ty(&[512, 64], &[(0, S)]));
        assert_eq!(iteration(&product, [&x, &y]), [Some(S), None, Some(S)]);
        assert_eq!(after(Op::Contract(Box::new(product.clone())), &[&x, &y]), [(0, S)]);
        let z = ty(&[512, 64], &[(0, B)]);
        assert_eq!(after(Op::Contract(Box::new(product)), &[&x, &z]), [(0, Span::Mixed)]);
    }

    #[test]
    fn shapes_fall_into_groups() {
        assert_eq!(groups(&[2, 3, 4], &[6, 4]), [(0..2, 0..1), (2..3, 1..2)]);
        assert_eq!(groups(&[2, 1, 3], &[2, 3]), [(0..1, 0..1), (1..3, 1..2)]);
        assert_eq!(groups(&[], &[1, 1]), [(0..0, 0..2)]);
        assert_eq!(groups(&[8, 512], &[512, 8]), [(0..2, 0..2)]);
    }
}
