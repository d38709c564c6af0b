//! Reductions, scans, contractions, and named functions.

use kiln::graph::op::{Affine, Composite, Contract, Op, ReduceFn};
use kiln::tensor::DType;
use kiln_tests::Random;
use proptest::prelude::*;
use smallvec::SmallVec;
use tch::{Kind, Tensor};

use crate::numbers::{Numbers, tensor};
use crate::trial::{Bound, Operand, Trial, kind, origin};
use crate::{FLOATS, cases, dtypes, longs, property, property_of_dtypes, shape};

/// Numbers that a function of many can take: NaN and infinities where nothing is rounded.
fn numbers_for(f: ReduceFn, dtype: DType) -> Numbers {
    match f {
        ReduceFn::Max | ReduceFn::Min => Numbers::Any,
        ReduceFn::Sum | ReduceFn::Prod if !dtype.is_float() => Numbers::Any,
        ReduceFn::Sum => Numbers::Calm,
        ReduceFn::Prod => Numbers::NearOne,
    }
}

/// A bool has an order, but no sum.
fn fits(f: ReduceFn, dtype: DType) -> bool {
    dtype != DType::Bool || matches!(f, ReduceFn::Max | ReduceFn::Min)
}

/// One reduction over some axes of x, the axes kept.
fn reduced(f: ReduceFn, x: &Tensor, axes: &[i64]) -> Tensor {
    let over = |x: &Tensor, one: &dyn Fn(&Tensor, i64) -> Tensor| {
        axes.iter().fold(x.shallow_clone(), |x, &axis| one(&x, axis))
    };
    match f {
        ReduceFn::Sum => x.sum_dim_intlist(axes, true, x.kind()),
        ReduceFn::Prod => over(x, &|x, axis| x.prod_dim_int(axis, true, x.kind())),
        ReduceFn::Max => x.amax(axes, true),
        ReduceFn::Min => x.amin(axes, true),
    }
}

fn reduce_bound(f: ReduceFn, dtype: DType, x: &Operand, axes: &[i64]) -> Bound {
    if !dtype.is_float() || matches!(f, ReduceFn::Max | ReduceFn::Min) {
        return Bound::EXACT;
    }
    let n: i64 = axes.iter().map(|&a| x.exact.size()[a as usize]).product();
    // A product rounds as often as a sum, in proportion to itself.
    Bound::sum(dtype, n as usize, reduced(f, &x.exact.abs(), axes))
}

#[test]
fn reduce() {
    for (f, name) in ReduceFn::ALL {
        // Products of many numbers leave the range of f16.
        let most = if f == ReduceFn::Prod { 5 } else { 18 };
        let least = if matches!(f, ReduceFn::Sum | ReduceFn::Prod) { 0 } else { 1 };
        let strategy = || (shape(least, most, 1..=4), any::<u8>(), any::<u64>());
        let all = dtypes().filter(|d| fits(f, *d));
        property_of_dtypes(all, strategy, |dtype, (shape, picks, seed)| {
            let picked = (0..shape.len()).filter(|a| picks >> a & 1 == 1);
            let axes: Vec<usize> =
                if f == ReduceFn::Prod { picked.take(1).collect() } else { picked.collect() };
            let axes = if axes.is_empty() { vec![shape.len() - 1] } else { axes };
            let dims = longs(&axes);
            let mut trial = Trial::default();
            let mut random = Random::new(seed);
            let x = trial.input(tensor(&mut random, dtype, &shape, numbers_for(f, dtype)));
            let y = trial.graph.reduce(f, x.node, &axes, &origin());
            let bound = reduce_bound(f, dtype, &x, &dims);
            trial.want(
                (&format!("reduce {name}"), dtype),
                y,
                reduced(f, &x.exact, &dims),
                bound,
            )?;
            trial.check()
        });
    }
}

fn scanned(f: ReduceFn, x: &Tensor, axis: i64) -> Tensor {
    match f {
        ReduceFn::Sum => x.cumsum(axis, x.kind()),
        ReduceFn::Prod => x.cumprod(axis, x.kind()),
        ReduceFn::Max => x.cummax(axis).0,
        ReduceFn::Min => x.cummin(axis).0,
    }
}

/// Each step rounds what it has so far, and may round it to the dtype.
fn scan_bound(f: ReduceFn, dtype: DType, x: &Tensor, axis: i64) -> Bound {
    if !dtype.is_float() || matches!(f, ReduceFn::Max | ReduceFn::Min) {
        return Bound::EXACT;
    }
    let partial = scanned(f, x, axis).abs();
    let noise = match f {
        ReduceFn::Prod => &partial * Tensor::ones_like(x).cumsum(axis, Kind::Double),
        ReduceFn::Sum | ReduceFn::Max | ReduceFn::Min => partial.cumsum(axis, Kind::Double),
    };
    Bound::ulps(1.0).noise(dtype, noise)
}

#[test]
fn scan() {
    for (f, name) in ReduceFn::ALL {
        let strategy = || (shape(1, 8, 1..=3), any::<prop::sample::Index>(), any::<u64>());
        let all = dtypes().filter(|d| fits(f, *d));
        property_of_dtypes(all, strategy, |dtype, (shape, axis, seed)| {
            let axis = axis.index(shape.len());
            let mut trial = Trial::default();
            let mut random = Random::new(seed);
            let x = trial.input(tensor(&mut random, dtype, &shape, numbers_for(f, dtype)));
            let y = trial.graph.add(Op::Scan(f, axis as u8), &[x.node], &origin());
            let bound = scan_bound(f, dtype, &x.exact, axis as i64);
            let torch = scanned(f, &x.exact, axis as i64);
            trial.want((&format!("scan {name}"), dtype), y, torch, bound)?;
            trial.check()
        });
    }
}

/// The dtypes of contractions: sums of products of bools are none.
fn contracted() -> impl Iterator<Item = DType> {
    dtypes().filter(|d| *d != DType::Bool)
}

/// An operand of a contraction in f64, which holds every sum of small integers.
fn wide(x: &Operand) -> Tensor {
    x.exact.to_kind(Kind::Double)
}

/// A contraction's result and bound, from what libtorch makes of the operands in f64; n products
/// are summed.
fn products(
    dtype: DType,
    n: usize,
    [x, y]: [&Operand; 2],
    f: impl Fn(&Tensor, &Tensor) -> Tensor,
) -> (Tensor, Bound) {
    let (x, y) = (wide(x), wide(y));
    let bound = Bound::sum(dtype, n, f(&x.abs(), &y.abs()));
    let result = f(&x, &y);
    match dtype.is_float() {
        true => (result, bound),
        // Narrow integers wrap.
        false => (result.to_kind(Kind::Int64).to_kind(kind(dtype)), Bound::EXACT),
    }
}

#[test]
fn matmul() {
    let strategy = || {
        let batch = prop::collection::vec(1usize..4, 0..3);
        (batch, (1usize..70, 1usize..70, 1usize..70), any::<(bool, bool)>(), any::<u64>())
    };
    property_of_dtypes(
        contracted(),
        strategy,
        |dtype, (batch, (m, k, n), (shared, constant), seed)| {
            let mut random = Random::new(seed);
            let mut trial = Trial::default();
            let ones = vec![1; batch.len()];
            let lead = if shared { &ones } else { &batch };
            let (a, b) = ([&batch[..], &[m, k]].concat(), [&lead[..], &[k, n]].concat());
            let x = trial.input(tensor(&mut random, dtype, &a, Numbers::Calm));
            let y = trial.either(constant, tensor(&mut random, dtype, &b, Numbers::Calm));
            let z = trial.graph.matmul(x.node, y.node, &origin());
            let (torch, bound) = products(dtype, k, [&x, &y], |x, y| x.matmul(y));
            trial.want(("matmul", dtype), z, torch, bound)?;
            trial.check()
        },
    );
}

/// Integers of all bits wrap.
#[test]
fn matmul_wraps() {
    let strategy = || ((1usize..20, 1usize..20, 1usize..20), any::<u64>());
    let all = contracted().filter(|d| !d.is_float());
    property_of_dtypes(all, strategy, |dtype, ((m, k, n), seed)| {
        let mut random = Random::new(seed);
        let mut trial = Trial::default();
        let x = trial.input(tensor(&mut random, dtype, &[m, k], Numbers::Any));
        let y = trial.input(tensor(&mut random, dtype, &[k, n], Numbers::Any));
        let z = trial.graph.matmul(x.node, y.node, &origin());
        let sum =
            (x.exact.unsqueeze(2) * y.exact.unsqueeze(0)).sum_dim_intlist(1, false, kind(dtype));
        trial.want(("matmul", dtype), z, sum, Bound::EXACT)?;
        trial.check()
    });
}

/// Extent beyond the window, kernel, stride, dilation and border of one axis.
type Axis = (usize, usize, usize, usize, usize);

/// Of 1 to 3 axes; grouped, depthwise, strided, dilated, padded.
#[test]
fn convolution() {
    let strategy = || {
        let axis = (0usize..10, 1usize..4, 1usize..4, 1usize..3, 0usize..3);
        let channels = (1usize..3, 1usize..5, 1usize..5, 1usize..9);
        (channels, prop::collection::vec(axis, 1..=3), any::<(bool, bool)>(), any::<u64>())
    };
    property_of_dtypes(
        contracted(),
        strategy,
        |dtype, ((n, groups, cg, og), axes, flags, seed)| {
            let (depthwise, constant) = flags;
            let (cg, og) = if depthwise { (1, 1) } else { (cg, og) };
            let mut random = Random::new(seed);
            let mut trial = Trial::default();
            let list = |f: &dyn Fn(&Axis) -> usize| -> Vec<usize> { axes.iter().map(f).collect() };
            let extents = list(&|a| ((a.1 - 1) * a.3 + 1 + a.0).saturating_sub(2 * a.4).max(1));
            let kernels = list(&|a| a.1);
            let (strides, dilations, pads) = (list(&|a| a.2), list(&|a| a.3), list(&|a| a.4));
            // Where the border makes up for less than the window, the border grows.
            let pads: Vec<usize> = (0..axes.len())
                .map(|d| {
                    pads[d].max(
                        (((kernels[d] - 1) * dilations[d] + 1).saturating_sub(extents[d]))
                            .div_ceil(2),
                    )
                })
                .collect();
            let x = [&[n, groups * cg], &extents[..]].concat();
            let w = [&[groups * og, cg], &kernels[..]].concat();
            let x = trial.input(tensor(&mut random, dtype, &x, Numbers::Calm));
            let w = trial.either(constant, tensor(&mut random, dtype, &w, Numbers::Calm));
            let zero = trial.graph.scalar(dtype, 0, 0.0, &origin());
            let borders = [(0, 0); 2].into_iter().chain(pads.iter().map(|&p| (p, p)));
            let padded = trial.graph.add(Op::Pad(borders.collect()), &[x.node, zero], &origin());
            let y = padded.and_then(|padded| {
                trial.graph.conv([padded, w.node], (&strides, &dilations), groups, &origin())
            });
            let (s, p, d) = (longs(&strides), longs(&pads), longs(&dilations));
            let still = vec![0i64; axes.len()];
            let summed = cg * kernels.iter().product::<usize>();
            let (torch, bound) = products(dtype, summed, [&x, &w], |x, w| {
                x.convolution(w, None::<&Tensor>, &s, &p, &d, false, &still, groups as i64)
            });
            trial.want(("convolution", dtype), y, torch, bound)?;
            trial.check()
        },
    );
}

/// One axis of an einsum: its extent, where it is (x, y or both), and whether it is summed.
type Label = (usize, u8, bool);

#[test]
fn einsum() {
    let strategy = || {
        let label = (1usize..9, 0u8..3, any::<bool>());
        (prop::collection::vec(label, 2..=6), any::<bool>(), any::<u64>())
    };
    property_of_dtypes(contracted(), strategy, |dtype, (mut labels, constant, seed)| {
        let mut random = Random::new(seed);
        // Results first, as a contraction has them.
        labels.sort_by_key(|l: &Label| l.2);
        let n_out = labels.iter().filter(|l| !l.2).count();
        let letter = |i: usize| char::from(b'a' + i as u8);
        let mut side = |one: u8| -> Vec<usize> {
            let mut left: Vec<usize> =
                (0..labels.len()).filter(|&i| labels[i].1 == one || labels[i].1 == 2).collect();
            (0..left.len()).map(|_| left.swap_remove(random.below(left.len()))).collect()
        };
        let sides = [side(0), side(1)];
        let text = |axes: &[usize]| axes.iter().map(|&i| letter(i)).collect::<String>();
        let out: String = (0..n_out).map(letter).collect();
        let equation = format!("{},{}->{out}", text(&sides[0]), text(&sides[1]));
        let contract = Contract {
            extents: labels.iter().map(|l| l.0).collect(),
            n_out,
            maps: [0, 1].map(|k: usize| sides[k].iter().map(|&i| Affine::axis(i)).collect()),
        };
        let mut trial = Trial::default();
        let extents = |k: usize| -> Vec<usize> { sides[k].iter().map(|&i| labels[i].0).collect() };
        let x = trial.input(tensor(&mut random, dtype, &extents(0), Numbers::Calm));
        let y = trial.either(constant, tensor(&mut random, dtype, &extents(1), Numbers::Calm));
        let op = Op::Contract(Box::new(contract));
        let z = trial.graph.add(op, &[x.node, y.node], &origin());
        let summed = labels[n_out..].iter().map(|l| l.0).product();
        let (torch, bound) = products(dtype, summed, [&x, &y], |x, y| {
            Tensor::einsum(&equation, &[x, y], None::<&[i64]>)
        });
        trial.want(("einsum", dtype), z, torch, bound)?;
        trial.check()
    });
}

/// Indices that fall, skip and overlap: sum over k of x[a i + b k + c] y[k, j].
#[test]
fn contractions_of_affine_indices() {
    let strategy = || {
        let space = (1usize..20, 1usize..20, 1usize..8);
        (space, (-3i64..4, -3i64..4, 0i64..3), any::<bool>(), any::<u64>())
    };
    property_of_dtypes(
        contracted(),
        strategy,
        |dtype, ((m, n, k), (a, b, more), constant, seed)| {
            let mut random = Random::new(seed);
            let index = Affine::scaled(0, a).plus(2, b);
            let (low, high) = index.range(&[m, n, k]);
            let index = Affine { offset: more - low, ..index };
            let picks: Vec<i64> = (0..(m * k) as i64)
                .map(|i| a * (i / k as i64) + b * (i % k as i64) + index.offset)
                .collect();
            let maps: [SmallVec<[Affine; 4]>; 2] = [
                SmallVec::from_iter([index]),
                SmallVec::from_iter([Affine::axis(2), Affine::axis(1)]),
            ];
            let contract = Contract { extents: SmallVec::from_slice(&[m, n, k]), n_out: 2, maps };
            let mut trial = Trial::default();
            let extent = (high - low + more) as usize + 1;
            let x = trial.input(tensor(&mut random, dtype, &[extent], Numbers::Calm));
            let y = trial.either(constant, tensor(&mut random, dtype, &[k, n], Numbers::Calm));
            let z = trial.graph.add(Op::Contract(Box::new(contract)), &[x.node, y.node], &origin());
            let (picks, sizes) = (Tensor::from_slice(&picks), [m as i64, k as i64]);
            let (torch, bound) = products(dtype, k, [&x, &y], |x, y| {
                x.index_select(0, &picks).reshape(sizes).matmul(y)
            });
            trial.want(("affine contraction", dtype), z, torch, bound)?;
            trial.check()
        },
    );
}

const EPSILON: f32 = 1e-5;

/// A named function: its definition, rounded after each node as the interpreter does it, differs
/// from the exact function by this.
fn named(f: Composite, dtype: DType, x: &Tensor) -> (&'static str, Tensor, Bound) {
    let tail = |axis: u8| (i64::from(axis)..x.dim() as i64).collect::<Vec<i64>>();
    // Means and sums round as they add up; eight more for the other nodes.
    let ulps = |axis: u8| {
        let n: i64 = x.size()[usize::from(axis)..].iter().product();
        Bound::ulps(8.0 + (n as f64).sqrt())
    };
    let mean = |x: &Tensor, axis: u8| x.mean_dim(tail(axis).as_slice(), true, Kind::Double);
    let epsilon = f64::from(EPSILON);
    match f {
        Composite::Sigmoid => ("sigmoid", x.sigmoid(), Bound::ulps(4.0)),
        Composite::Silu => ("silu", x.silu(), Bound::ulps(4.0)),
        // 1 + erf cancels for negative numbers.
        Composite::Gelu => {
            ("gelu", x.gelu("none"), Bound::ulps(4.0).absolute(1e-12).noise(dtype, x.abs()))
        }
        Composite::Softmax(axis) => {
            let y = x.softmax(i64::from(axis), Kind::Double);
            // What rounding x - max changes in the exponent.
            let shift = (x.amax([i64::from(axis)].as_slice(), true) - x) * &y;
            ("softmax", y, ulps(axis).noise(dtype, shift))
        }
        Composite::LayerNorm(axis, _) => {
            let centred = x - mean(x, axis);
            let rstd = (mean(&(&centred * &centred), axis) + epsilon).rsqrt();
            let y = centred * &rstd;
            // What rounding the mean changes, in x - mean and in the variance.
            let largest = x.abs().amax(tail(axis).as_slice(), true);
            let noise = (y.abs() + 1.0) * largest * rstd * 2.0;
            ("layer_norm", y, ulps(axis).noise(dtype, noise))
        }
        Composite::RmsNorm(axis, _) => {
            ("rms_norm", x * (mean(&(x * x), axis) + epsilon).rsqrt(), ulps(axis))
        }
    }
}

#[test]
fn named_functions() {
    let strategy = || (shape(1, 11, 1..=3), any::<prop::sample::Index>(), any::<u64>());
    property_of_dtypes(FLOATS, strategy, |dtype, (shape, axis, seed)| {
        let axis = axis.index(shape.len()) as u8;
        let mut trial = Trial::default();
        let x = trial.input(tensor(&mut Random::new(seed), dtype, &shape, Numbers::Calm));
        for f in [
            Composite::Sigmoid,
            Composite::Silu,
            Composite::Gelu,
            Composite::Softmax(axis),
            Composite::LayerNorm(axis, EPSILON.to_bits()),
            Composite::RmsNorm(axis, EPSILON.to_bits()),
        ] {
            let (name, torch, bound) = named(f, dtype, &x.exact);
            let y = trial.graph.composite(f, x.node, &origin());
            trial.want((name, dtype), y, torch, bound)?;
        }
        trial.check()
    });
}

/// Pooling: a maximum over windows, in one kernel.
#[test]
fn max_pool() {
    let strategy = (
        (1usize..5, 4usize..20, 4usize..20),
        (1usize..4, 1usize..4, 1usize..3),
        0usize..FLOATS.len(),
        any::<u64>(),
    );
    property(cases(DType::F32), strategy, |((c, h, w), (k, stride, dilation), dtype, seed)| {
        let (h, w) = (h.max(dilation * (k - 1) + 1), w.max(dilation * (k - 1) + 1));
        let dtype = FLOATS[dtype];
        let mut trial = Trial::default();
        let x = trial.input(tensor(&mut Random::new(seed), dtype, &[2, c, h, w], Numbers::Calm));
        let window = (k, stride, dilation);
        let windows = Op::Window(SmallVec::from_slice(&[window, window]));
        let windows = trial.graph.add(windows, &[x.node], &origin());
        let max = windows.and_then(|w| trial.graph.reduce(ReduceFn::Max, w, &[4, 5], &origin()));
        let y = max.and_then(|max| {
            let shape: Vec<usize> = trial.graph.ty(max).shape[..4].to_vec();
            trial.graph.reshape(max, &shape, &origin())
        });
        let [k, s, d] = [k, stride, dilation].map(|v| [v as i64; 2]);
        trial.want(
            ("max pool", dtype),
            y,
            x.exact.max_pool2d(k, s, [0, 0], d, false),
            Bound::EXACT,
        )?;
        trial.check()
    });
}
