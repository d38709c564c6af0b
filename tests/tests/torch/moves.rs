//! Views and moves: nothing is computed, so results are equal in every bit.

use kiln::graph::op::{Axes, Op, ReduceFn, Shape};
use kiln::tensor::DType;
use kiln_tests::Random;
use proptest::prelude::*;
use smallvec::SmallVec;
use tch::{Kind, Tensor};

use crate::numbers::{Numbers, tensor};
use crate::trial::{Bound, Checked, Trial, origin};
use crate::{any_dtype, cases, longs, property, shape};

/// A case of a view: the operation on an input, and what libtorch says.
fn view(
    name: &str,
    (dtype, shape, seed): (DType, &[usize], u64),
    op: Op,
    torch: impl Fn(&Tensor) -> Tensor,
) -> Checked {
    let mut trial = Trial::default();
    let x = trial.input(tensor(&mut Random::new(seed), dtype, shape, Numbers::Any));
    let y = trial.graph.add(op, &[x.node], &origin());
    trial.want((name, dtype), y, torch(&x.native), Bound::EXACT)?;
    trial.check()
}

/// Positions as a tensor.
fn positions(values: impl Iterator<Item = i64>) -> Tensor {
    Tensor::from_slice(&values.collect::<Vec<i64>>())
}

#[test]
fn reshape() {
    let strategy = (any_dtype(), shape(0, 9, 1..=4), any::<u64>());
    property(cases(DType::F32), strategy, |(dtype, shape, seed)| {
        // The factors of the extents, dealt out to other axes.
        let mut random = Random::new(seed);
        let mut to: Shape = std::iter::repeat_n(1, 1 + random.below(4)).collect();
        for &extent in &shape {
            let mut rest = extent;
            for factor in [2, 3, 5, 7] {
                while rest > 0 && rest.is_multiple_of(factor) {
                    let axis = random.below(to.len());
                    to[axis] *= factor;
                    rest /= factor;
                }
            }
            let axis = random.below(to.len());
            to[axis] *= rest;
        }
        let sizes = longs(&to);
        view("reshape", (dtype, &shape, seed), Op::Reshape(to), |x| x.reshape(&sizes))
    });
}

#[test]
fn permute() {
    let strategy = (any_dtype(), shape(0, 9, 0..=5), any::<u64>());
    property(cases(DType::F32), strategy, |(dtype, shape, seed)| {
        let mut random = Random::new(seed);
        let mut left: Vec<u8> = (0..shape.len() as u8).collect();
        let axes: Axes =
            (0..shape.len()).map(|_| left.swap_remove(random.below(left.len()))).collect();
        let order: Vec<i64> = axes.iter().map(|&a| i64::from(a)).collect();
        view("permute", (dtype, &shape, seed), Op::Permute(axes), |x| x.permute(&order))
    });
}

#[test]
fn expand() {
    let strategy = (any_dtype(), shape(0, 9, 1..=4), any::<u8>(), any::<u64>());
    property(cases(DType::F32), strategy, |(dtype, to, ones, seed)| {
        let from: Vec<usize> =
            to.iter().enumerate().map(|(d, &e)| if ones >> d & 1 == 1 { 1 } else { e }).collect();
        let sizes = longs(&to);
        let op = Op::Expand(to.iter().copied().collect());
        view("expand", (dtype, &from, seed), op, |x| x.expand(&sizes, false))
    });
}

/// Steps of either sign, and none.
#[test]
fn slice() {
    let strategy = (any_dtype(), shape(1, 12, 1..=4), any::<u64>());
    property(cases(DType::F32), strategy, |(dtype, shape, seed)| {
        let mut random = Random::new(seed);
        let range = |&extent: &usize| {
            let (start, step) = (random.below(extent), random.below(7) as i64 - 3);
            let room = match step {
                0 => 4,
                1.. => (extent - 1 - start) / step as usize + 1,
                _ => start / step.unsigned_abs() as usize + 1,
            };
            // Often as far as it goes; sometimes nothing at all.
            let n = if random.below(2) == 0 { room } else { random.below(room + 1) };
            (start as i64, step, n)
        };
        let ranges: SmallVec<[(i64, i64, usize); 6]> = shape.iter().map(range).collect();
        let picks: Vec<Tensor> = ranges
            .iter()
            .map(|&(start, step, n)| positions((0..n as i64).map(|i| start + step * i)))
            .collect();
        view("slice", (dtype, &shape, seed), Op::Slice(ranges), |x| {
            picks
                .iter()
                .enumerate()
                .fold(x.shallow_clone(), |x, (axis, pick)| x.index_select(axis as i64, pick))
        })
    });
}

#[test]
fn pad() {
    let strategy = (any_dtype(), shape(0, 8, 1..=4), any::<bool>(), any::<u64>());
    property(cases(DType::F32), strategy, |(dtype, shape, constant, seed)| {
        let mut trial = Trial::default();
        let mut random = Random::new(seed);
        let x = trial.input(tensor(&mut random, dtype, &shape, Numbers::Any));
        let fill = trial.either(constant, tensor(&mut random, dtype, &[], Numbers::Any));
        let borders: SmallVec<[(usize, usize); 6]> =
            shape.iter().map(|_| (random.below(4), random.below(4))).collect();
        let whole: Vec<usize> = shape.iter().zip(&borders).map(|(e, b)| b.0 + e + b.1).collect();
        let torch = fill.native.expand(longs(&whole), false).contiguous();
        let inner = borders.iter().zip(&shape).enumerate().fold(
            torch.shallow_clone(),
            |inner, (axis, (border, &extent))| {
                inner.narrow(axis as i64, border.0 as i64, extent as i64)
            },
        );
        { inner }.copy_(&x.native);
        let y = trial.graph.add(Op::Pad(borders), &[x.node, fill.node], &origin());
        trial.want(("pad", dtype), y, torch, Bound::EXACT)?;
        trial.check()
    });
}

/// Windows alone: reductions over them are in `sums`.
#[test]
fn window() {
    let axis = (1usize..4, 1usize..4, 1usize..3, 0usize..9);
    let strategy =
        (any_dtype(), shape(1, 4, 0..=2), prop::collection::vec(axis, 1..=3), any::<u64>());
    property(cases(DType::F32), strategy, |(dtype, lead, axes, seed)| {
        let extents = axes.iter().map(|&(k, _, dilation, more)| (k - 1) * dilation + 1 + more);
        let shape: Vec<usize> = lead.iter().copied().chain(extents).collect();
        let windows: SmallVec<[(usize, usize, usize); 3]> =
            axes.iter().map(|a| (a.0, a.1, a.2)).collect();
        let (lead, strides) = (lead.len(), longs(&kiln::graph::eval::strides(&shape)));
        let (mut sizes, mut steps) = (longs(&shape[..lead]), strides[..lead].to_vec());
        for (d, &(k, stride, dilation)) in windows.iter().enumerate() {
            let room = shape[lead + d] - (k - 1) * dilation;
            sizes.push(((room - 1) / stride + 1) as i64);
            steps.push(strides[lead + d] * stride as i64);
        }
        for (d, &(k, _, dilation)) in windows.iter().enumerate() {
            sizes.push(k as i64);
            steps.push(strides[lead + d] * dilation as i64);
        }
        view("window", (dtype, &shape, seed), Op::Window(windows), |x| {
            x.as_strided(&sizes, &steps, 0)
        })
    });
}

#[test]
fn concat() {
    let strategy = (
        any_dtype(),
        shape(1, 8, 1..=4),
        any::<prop::sample::Index>(),
        prop::collection::vec(0usize..6, 1..=4),
        any::<u64>(),
    );
    property(cases(DType::F32), strategy, |(dtype, shape, axis, extents, seed)| {
        let axis = axis.index(shape.len());
        let mut trial = Trial::default();
        let mut random = Random::new(seed);
        let parts: Vec<_> = extents
            .iter()
            .map(|&extent| {
                let mut shape = shape.clone();
                shape[axis] = extent;
                let part = tensor(&mut random, dtype, &shape, Numbers::Any);
                trial.either(random.below(3) == 0, part)
            })
            .collect();
        let nodes: Vec<_> = parts.iter().map(|p| p.node).collect();
        let y = trial.graph.add(Op::Concat(axis as u8), &nodes, &origin());
        let natives: Vec<&Tensor> = parts.iter().map(|p| &p.native).collect();
        let torch = Tensor::cat(&natives, axis as i64);
        trial.want(("concat", dtype), y, torch, Bound::EXACT)?;
        trial.check()
    });
}

/// Indices of either dtype, from the end, and out of range.
fn indices(random: &mut Random, shape: &[usize], extent: usize) -> kiln::tensor::Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<i64> = (0..n)
        .map(|_| match random.below(8) {
            0 => random.below(4 * extent) as i64 - 2 * extent as i64,
            _ => random.below(2 * extent) as i64 - extent as i64,
        })
        .collect();
    match random.below(2) {
        0 => kiln::tensor::Tensor::from_slice(shape, &values),
        _ => {
            let short: Vec<i32> = values.iter().map(|&v| v as i32).collect();
            kiln::tensor::Tensor::from_slice(shape, &short)
        }
    }
}

/// Indices that count from the end, from the start.
fn from_start(indices: &Tensor, extent: usize) -> Tensor {
    let indices = indices.to_kind(Kind::Int64);
    let counted = &indices + extent as i64;
    counted.where_self(&indices.lt(0), &indices)
}

#[test]
fn gather() {
    let strategy = (
        any_dtype(),
        shape(1, 8, 1..=4),
        any::<prop::sample::Index>(),
        shape(0, 4, 0..=2),
        any::<bool>(),
        any::<u64>(),
    );
    property(cases(DType::F32), strategy, |(dtype, shape, axis, picks, constant, seed)| {
        let axis = axis.index(shape.len());
        let mut trial = Trial::default();
        let mut random = Random::new(seed);
        let x = trial.input(tensor(&mut random, dtype, &shape, Numbers::Any));
        let y = trial.either(constant, indices(&mut random, &picks, shape[axis]));
        let z = trial.graph.add(Op::Gather(axis as u8), &[x.node, y.node], &origin());
        let places = from_start(&y.native, shape[axis]).clamp(0, shape[axis] as i64 - 1);
        let sizes = [&shape[..axis], &picks, &shape[axis + 1..]].concat();
        let torch = x.native.index_select(axis as i64, &places.reshape([-1i64]));
        trial.want(("gather", dtype), z, torch.reshape(longs(&sizes)), Bound::EXACT)?;
        trial.check()
    });
}

/// What a row becomes when another one is scattered onto it.
fn scattered(f: Option<ReduceFn>, old: &Tensor, new: &Tensor) -> Tensor {
    match f {
        None => new.shallow_clone(),
        Some(ReduceFn::Sum) => old + new,
        Some(ReduceFn::Prod) => old * new,
        Some(ReduceFn::Max) => old.maximum(new),
        Some(ReduceFn::Min) => old.minimum(new),
    }
}

#[test]
fn scatter() {
    let all = [None].into_iter().chain(ReduceFn::ALL.map(|f| Some(f.0)));
    for f in all {
        let strategy = (any_dtype(), shape(1, 8, 1..=3), 0usize..9, any::<u64>());
        property(cases(DType::F32), strategy, |(dtype, shape, n, seed)| {
            // Sums and products of bools are no operations.
            let arithmetic = matches!(f, Some(ReduceFn::Sum | ReduceFn::Prod));
            let dtype = if arithmetic && dtype == DType::Bool { DType::F32 } else { dtype };
            let mut trial = Trial::default();
            let mut random = Random::new(seed);
            let x = trial.input(tensor(&mut random, dtype, &shape, Numbers::Any));
            let at = trial.input(indices(&mut random, &[n], shape[0]));
            let rows = [&[n], &shape[1..]].concat();
            let z = trial.input(tensor(&mut random, dtype, &rows, Numbers::Any));
            let torch = x.native.copy();
            let places = Vec::<i64>::try_from(&from_start(&at.native, shape[0]));
            for (j, place) in places.expect("a list of i64").into_iter().enumerate() {
                if (0..shape[0] as i64).contains(&place) {
                    let mut row = torch.select(0, place);
                    row.copy_(&scattered(f, &row, &z.native.select(0, j as i64)));
                }
            }
            let y = trial.graph.add(Op::Scatter(f), &[x.node, at.node, z.node], &origin());
            trial.want(("scatter", dtype), y, torch, Bound::EXACT)?;
            trial.check()
        });
    }
}
