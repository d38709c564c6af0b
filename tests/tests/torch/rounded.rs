//! Products of numbers that are rounded to bf16 or f16, which libtorch rounds as well.

use kiln::graph::op::Op;
use kiln::tensor::DType;
use kiln::{Compiler, Precision};
use kiln_tests::Random;
use proptest::prelude::*;
use tch::{Kind, Tensor};

use crate::numbers::{Numbers, tensor};
use crate::trial::{Bound, Checked, Operand, Trial, origin};
use crate::{cases, longs, property};

/// A product of operands that are rounded, of `n` numbers each, and how far sums may be from it.
fn products(
    (n, short): (usize, Kind),
    [x, y]: [&Operand; 2],
    f: impl Fn(&Tensor, &Tensor) -> Tensor,
) -> (Tensor, Bound) {
    let [x, y] = [x, y].map(|o| o.native.to_kind(short).to_kind(Kind::Double));
    (f(&x, &y), Bound::sum(DType::F32, n, f(&x.abs(), &y.abs())))
}

/// What is rounded to, and what libtorch calls it.
const SHORT: [(Precision, Kind); 2] =
    [(Precision::Bf16, Kind::BFloat16), (Precision::F16, Kind::Half)];

/// Checks the graph with the operands of its products rounded: as the kernels of a machine that
/// does not multiply such numbers and of this one.
fn check(mut trial: Trial, precision: Precision) -> Checked {
    let compiler = Compiler::new().precision(precision).exact_convolutions(true);
    trial.graph = compiler.rounded(trial.graph);
    let short = Op::Cast(precision.dtype());
    let casts = trial.graph.nodes.iter().filter(|n| n.op == short).count();
    prop_assert!(casts > 0, "nothing was rounded");
    trial.check_by("compiled with rounding", &compiler)?;
    trial.check_by("compiled with rounding, without the e-graph", &compiler.egraph(false))?;
    trial.check()
}

#[test]
fn matmul() {
    let strategy = || {
        let batch = prop::collection::vec(1usize..4, 0..3);
        let ways = (any::<bool>(), 0..SHORT.len());
        (batch, (1usize..70, 1usize..40, 16usize..70), ways, any::<u64>())
    };
    property(cases(DType::F32), strategy(), |(batch, (m, half, n), ways, seed)| {
        let (transposed, (precision, kind)) = (ways.0, SHORT[ways.1]);
        let (mut random, k) = (Random::new(seed), 2 * half);
        let mut trial = Trial::default();
        let shape = [&batch[..], &[m, k]].concat();
        let x = trial.input(tensor(&mut random, DType::F32, &shape, Numbers::Calm));
        let w = if transposed { [n, k] } else { [k, n] };
        let w = trial.constant(tensor(&mut random, DType::F32, &w, Numbers::Calm));
        let turned = match transposed {
            true => trial.graph.permute(w.node, &[1, 0], &origin()),
            false => Ok(w.node),
        };
        let z = turned
            .and_then(|w| trial.graph.with_rank(w, shape.len(), &origin()))
            .and_then(|w| trial.graph.matmul(x.node, w, &origin()));
        let (torch, bound) = products((k, kind), [&x, &w], |x, w| match transposed {
            true => x.matmul(&w.tr()),
            false => x.matmul(w),
        });
        trial.want(("matmul", DType::F32), z, torch, bound)?;
        check(trial, precision)
    });
}

/// Of an image, whose channels come first or last; grouped, strided, padded.
#[test]
fn convolution() {
    let strategy = || {
        let channels = (1usize..3, 1usize..3, 1usize..20, 16usize..40);
        let image = (1usize..4, 0usize..3, (3usize..13, 3usize..13));
        (channels, image, 1usize..3, (any::<bool>(), 0..SHORT.len()), any::<u64>())
    };
    property(cases(DType::F32), strategy(), |(channels, image, step, ways, seed)| {
        let (last, (precision, kind)) = (ways.0, SHORT[ways.1]);
        let ((n, groups, half, og), (size, border, (height, width))) = (channels, image);
        let mut random = Random::new(seed);
        let mut trial = Trial::default();
        let cg = 2 * half;
        let shape = match last {
            true => [n, height, width, groups * cg],
            false => [n, groups * cg, height, width],
        };
        let w = [groups * og, cg, size, size];
        let x = trial.input(tensor(&mut random, DType::F32, &shape, Numbers::Calm));
        let w = trial.constant(tensor(&mut random, DType::F32, &w, Numbers::Calm));
        let zero = trial.graph.scalar(DType::F32, 0, 0.0, &origin());
        let borders = [(0, 0), (0, 0), (border, border), (border, border)];
        let order: &[usize] = if last { &[0, 3, 1, 2] } else { &[0, 1, 2, 3] };
        let y = trial
            .graph
            .permute(x.node, order, &origin())
            .and_then(|x| {
                trial.graph.add(Op::Pad(borders.into_iter().collect()), &[x, zero], &origin())
            })
            .and_then(|x| trial.graph.conv([x, w.node], (&[step; 2], &[1; 2]), groups, &origin()));
        let (s, p, order) = (longs(&[step; 2]), longs(&[border; 2]), longs(order));
        let (torch, bound) = products((cg * size * size, kind), [&x, &w], |x, w| {
            let (x, still) = (x.permute(&order), [0i64; 2]);
            let groups = groups as i64;
            x.convolution(w, None::<&Tensor>, &s, &p, [1i64, 1], false, still, groups)
        });
        trial.want(("convolution", DType::F32), y, torch, bound)?;
        check(trial, precision)
    });
}
