//! Graph operations, interpreted and compiled, against libtorch on random shapes and numbers.

use kiln::error::Diagnostic;
use kiln::graph::op::{BinaryFn, Composite, Op, ReduceFn, Type, UnaryFn};
use kiln::graph::{Graph, NodeId, Origin};
use kiln::tensor::{DType, Tensor};
use kiln_tests::{Random, Tolerance, compilers, difference, interpret, run_compiled};
use proptest::prelude::*;
use smallvec::SmallVec;
use tch::Kind;

/// Different orders of summation and approximations of functions; no more.
const CLOSE: Tolerance = Tolerance { rtol: 2e-5, atol: 2e-5 };

fn to_torch(tensor: &Tensor) -> tch::Tensor {
    let kind = match tensor.dtype() {
        DType::F32 => Kind::Float,
        DType::I64 => Kind::Int64,
        other => panic!("no test uses {other}"),
    };
    let shape: Vec<i64> = tensor.shape().iter().map(|&e| e as i64).collect();
    tch::Tensor::from_data_size(tensor.bytes(), &shape, kind)
}

fn from_torch(tensor: &tch::Tensor) -> Tensor {
    let shape: Vec<usize> = tensor.size().iter().map(|&e| e as usize).collect();
    let values = Vec::<f32>::try_from(tensor.to_kind(Kind::Float).contiguous().flatten(0, -1));
    Tensor::from_slice(&shape, &values.expect("a dense tensor of f32"))
}

type Made = Result<NodeId, Diagnostic>;

/// Builds a graph over inputs of f32, runs it in every way, and compares with libtorch.
fn check(
    inputs: &[Tensor],
    build: impl Fn(&mut Graph, &[NodeId], &Origin) -> Made,
    torch: impl Fn(&[tch::Tensor]) -> tch::Tensor,
) -> Result<(), TestCaseError> {
    check_within(CLOSE, inputs, build, torch)
}

/// What two sums of the same numbers in other orders may differ by: one unit roundoff of the sum
/// of magnitudes, far below the bound of n - 1 units (Higham 2002, section 4.2).
fn sum_tolerance(x: &Tensor) -> Tolerance {
    let magnitudes: f64 =
        x.as_slice::<f32>().unwrap_or(&[]).iter().map(|v| f64::from(v.abs())).sum();
    Tolerance { atol: CLOSE.atol + f64::from(f32::EPSILON) / 2.0 * magnitudes, ..CLOSE }
}

fn check_within(
    tolerance: Tolerance,
    inputs: &[Tensor],
    build: impl Fn(&mut Graph, &[NodeId], &Origin) -> Made,
    torch: impl Fn(&[tch::Tensor]) -> tch::Tensor,
) -> Result<(), TestCaseError> {
    tch::set_num_threads(1);
    let mut graph = Graph::default();
    let names: Vec<String> = (0..inputs.len()).map(|i| format!("x{i}")).collect();
    let nodes: Vec<NodeId> = (inputs.iter().zip(&names))
        .map(|(t, name)| graph.input(name, Type::new(t.dtype(), t.shape())))
        .collect();
    let y = build(&mut graph, &nodes, &Origin::from("y"))
        .map_err(|d| TestCaseError::fail(d.to_string()))?;
    graph.outputs.push(("y".into(), y));
    let want = from_torch(&torch(&inputs.iter().map(to_torch).collect::<Vec<_>>()));
    let mut results = vec![("interpreted", interpret(&graph, inputs))];
    for (name, compiler) in compilers() {
        let got = run_compiled(&graph, inputs, &compiler)
            .map_err(|e| TestCaseError::fail(format!("{name}: {e}")))?;
        results.push((name, got));
    }
    for (name, got) in results {
        if let Some(difference) = difference(&got[0], &want, tolerance) {
            return Err(TestCaseError::fail(format!("{name}: {difference}")));
        }
    }
    Ok(())
}

fn config() -> ProptestConfig {
    let cases = std::env::var("KILN_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(256);
    // Failures are printed; a seed file beside the sources would be one more thing to keep.
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn longs(values: &[usize]) -> Vec<i64> {
    values.iter().map(|&v| v as i64).collect()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn matmul(
        batch in proptest::collection::vec(1usize..4, 0..3),
        (m, k, n) in (1usize..70, 1usize..70, 1usize..70),
        shared in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let shape = |lead: &[usize], tail: [usize; 2]| [lead, &tail].concat();
        let ones = vec![1; batch.len()];
        let x = random.tensor(&shape(&batch, [m, k]));
        let y = random.tensor(&shape(if shared { &ones } else { &batch }, [k, n]));
        check(&[x, y], |g, x, o| g.matmul(x[0], x[1], o), |x| x[0].matmul(&x[1]))?;
    }

    #[test]
    fn convolution(
        (n, groups, cg, og) in (1usize..3, 1usize..4, 1usize..5, 1usize..9),
        (h, w, r, s) in (3usize..20, 3usize..20, 1usize..4, 1usize..4),
        (stride, pad, dilation) in (1usize..4, 0usize..3, 1usize..3),
        seed in any::<u64>(),
    ) {
        prop_assume!(h + 2 * pad > dilation * (r - 1) && w + 2 * pad > dilation * (s - 1));
        let mut random = Random::new(seed);
        let x = random.tensor(&[n, groups * cg, h, w]);
        let weight = random.tensor(&[groups * og, cg, r, s]);
        check(
            &[x, weight],
            |g, x, o| {
                let zero = g.scalar(DType::F32, 0, 0.0, o);
                let border = (pad, pad);
                let borders = SmallVec::from_slice(&[(0, 0), (0, 0), border, border]);
                let padded = g.add(Op::Pad(borders), &[x[0], zero], o)?;
                g.conv([padded, x[1]], (&[stride; 2], &[dilation; 2]), groups, o)
            },
            |x| {
                let [s, p, d] = [stride, pad, dilation].map(|v| [v as i64; 2]);
                x[0].conv2d(&x[1], None::<&tch::Tensor>, s, p, d, groups as i64)
            },
        )?;
    }

    #[test]
    fn max_pool(
        (c, h, w) in (1usize..5, 4usize..20, 4usize..20),
        (kernel, stride, dilation) in (1usize..4, 1usize..4, 1usize..3),
        seed in any::<u64>(),
    ) {
        prop_assume!(h.min(w) > dilation * (kernel - 1));
        let x = Random::new(seed).tensor(&[2, c, h, w]);
        check(
            &[x],
            |g, x, o| {
                let window = (kernel, stride, dilation);
                let windows = Op::Window(SmallVec::from_slice(&[window, window]));
                let windows = g.add(windows, &[x[0]], o)?;
                let max = g.reduce(ReduceFn::Max, windows, &[4, 5], o)?;
                let shape: Vec<usize> = g.ty(max).shape[..4].to_vec();
                g.reshape(max, &shape, o)
            },
            |x| {
                let [k, s, d] = [kernel, stride, dilation].map(|v| [v as i64; 2]);
                x[0].max_pool2d(k, s, [0, 0], d, false)
            },
        )?;
    }

    #[test]
    fn named_functions(
        shape in proptest::collection::vec(1usize..40, 1..4),
        axis in any::<prop::sample::Index>(),
        seed in any::<u64>(),
    ) {
        let x = Random::new(seed).tensor(&shape);
        let axis = axis.index(shape.len());
        let tail = longs(&shape[axis..]);
        let epsilon = 1e-5f32;
        let x = [x];
        let norm = |x: &tch::Tensor| {
            x.layer_norm(&tail, None::<&tch::Tensor>, None::<&tch::Tensor>, 1e-5, false)
        };
        let rms = |x: &tch::Tensor| {
            let dims: Vec<i64> = (axis as i64..shape.len() as i64).collect();
            let mean = (x * x).mean_dim(dims.as_slice(), true, Kind::Float);
            x * (mean + 1e-5).rsqrt()
        };
        let at = axis as u8;
        type Reference<'a> = &'a dyn Fn(&tch::Tensor) -> tch::Tensor;
        let table: [(Composite, Reference); 6] = [
            (Composite::Sigmoid, &|x| x.sigmoid()),
            (Composite::Silu, &|x| x.silu()),
            (Composite::Gelu, &|x| x.gelu("none")),
            (Composite::Softmax(at), &|x| x.softmax(axis as i64, Kind::Float)),
            (Composite::LayerNorm(at, epsilon.to_bits()), &norm),
            (Composite::RmsNorm(at, epsilon.to_bits()), &rms),
        ];
        for (f, torch) in table {
            // The norm of one number divides 0 by nearly 0: its last digits mean nothing.
            let norm = matches!(f, Composite::LayerNorm(..));
            if norm && shape[axis..].iter().product::<usize>() < 4 {
                continue;
            }
            check(&x, |g, x, o| g.composite(f, x[0], o), |x| torch(&x[0]))?;
        }
    }

    #[test]
    fn functions_of_one_number(
        shape in proptest::collection::vec(1usize..40, 0..4),
        seed in any::<u64>(),
    ) {
        let x = [Random::new(seed).tensor(&shape)];
        type Reference = fn(&tch::Tensor) -> tch::Tensor;
        let table: [(UnaryFn, Reference); 11] = [
            (UnaryFn::Neg, |x| x.neg()),
            (UnaryFn::Abs, |x| x.abs()),
            (UnaryFn::Sign, |x| x.sign()),
            (UnaryFn::Exp, |x| x.exp()),
            (UnaryFn::Sin, |x| x.sin()),
            (UnaryFn::Cos, |x| x.cos()),
            (UnaryFn::Tanh, |x| x.tanh()),
            (UnaryFn::Erf, |x| x.erf()),
            (UnaryFn::Floor, |x| x.floor()),
            (UnaryFn::Ceil, |x| x.ceil()),
            (UnaryFn::Round, |x| x.round()),
        ];
        for (f, torch) in table {
            check(&x, |g, x, o| g.unary(f, x[0], o), |x| torch(&x[0]))?;
        }
        check(
            &x,
            |g, x, o| {
                let positive = g.unary(UnaryFn::Abs, x[0], o)?;
                let positive = g.binary_number(BinaryFn::Add, positive, 0.5, o)?;
                let root = g.unary(UnaryFn::Sqrt, positive, o)?;
                let log = g.unary(UnaryFn::Log, root, o)?;
                let recip = g.unary(UnaryFn::Recip, root, o)?;
                g.binary(BinaryFn::Add, log, recip, o)
            },
            |x| {
                let root = (x[0].abs() + 0.5).sqrt();
                root.log() + root.reciprocal()
            },
        )?;
    }

    #[test]
    fn functions_of_two_numbers(
        shape in proptest::collection::vec((1usize..20, any::<bool>(), any::<bool>()), 1..5),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let side = |one: fn(&(usize, bool, bool)) -> bool| -> Vec<usize> {
            shape.iter().map(|e| if one(e) { 1 } else { e.0 }).collect()
        };
        let x = [random.tensor(&side(|e| e.1)), random.tensor(&side(|e| e.2 && !e.1))];
        type Reference = fn(&tch::Tensor, &tch::Tensor) -> tch::Tensor;
        let table: [(BinaryFn, Reference); 5] = [
            (BinaryFn::Add, |x, y| x + y),
            (BinaryFn::Sub, |x, y| x - y),
            (BinaryFn::Mul, |x, y| x * y),
            (BinaryFn::Max, |x, y| x.maximum(y)),
            (BinaryFn::Min, |x, y| x.minimum(y)),
        ];
        for (f, torch) in table {
            check(&x, |g, x, o| g.binary(f, x[0], x[1], o), |x| torch(&x[0], &x[1]))?;
        }
        check(
            &x,
            |g, x, o| {
                let less = g.binary(BinaryFn::Lt, x[0], x[1], o)?;
                let sum = g.binary(BinaryFn::Add, x[0], x[1], o)?;
                g.select(less, sum, x[1], o)
            },
            |x| (&x[0] + &x[1]).where_self(&x[0].lt_tensor(&x[1]), &x[1]),
        )?;
    }

    #[test]
    fn reductions_and_scans(
        shape in proptest::collection::vec(1usize..30, 1..4),
        picks in any::<u8>(),
        seed in any::<u64>(),
    ) {
        let x = [Random::new(seed).tensor(&shape)];
        let mut axes: Vec<usize> = (0..shape.len()).filter(|a| picks >> a & 1 == 1).collect();
        if axes.is_empty() {
            axes.push(0);
        }
        let dims = longs(&axes);
        type Reference<'a> = &'a dyn Fn(&tch::Tensor) -> tch::Tensor;
        let table: [(ReduceFn, Reference); 3] = [
            (ReduceFn::Sum, &|x| x.sum_dim_intlist(dims.as_slice(), true, Kind::Float)),
            (ReduceFn::Max, &|x| x.amax(dims.as_slice(), true)),
            (ReduceFn::Min, &|x| x.amin(dims.as_slice(), true)),
        ];
        for (f, torch) in table {
            // Extremes are exact; only sums depend on their order.
            let tolerance = if f == ReduceFn::Sum { sum_tolerance(&x[0]) } else { CLOSE };
            check_within(tolerance, &x, |g, x, o| g.reduce(f, x[0], &axes, o), |x| torch(&x[0]))?;
        }
        let at = axes[0];
        check_within(
            sum_tolerance(&x[0]),
            &x,
            |g, x, o| g.add(Op::Scan(ReduceFn::Sum, at as u8), &[x[0]], o),
            |x| x[0].cumsum(at as i64, Kind::Float),
        )?;
    }

    #[test]
    fn moves(
        shape in proptest::collection::vec(1usize..12, 1..5),
        axis in any::<prop::sample::Index>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let axis = axis.index(shape.len());
        let x = [random.tensor(&shape), random.tensor(&shape)];
        let mut order: Vec<usize> = (0..shape.len()).collect();
        order.rotate_left(random.below(shape.len()));
        let picks: Vec<i64> = (0..5).map(|_| random.below(shape[axis]) as i64).collect();
        check(
            &x,
            |g, x, o| {
                let both = g.add(Op::Concat(axis as u8), &[x[0], x[1]], o)?;
                let picks = g.i64s(&[picks.len()], &picks, o);
                let some = g.add(Op::Gather(axis as u8), &[both, picks], o)?;
                g.permute(some, &order, o)
            },
            |x| {
                let both = tch::Tensor::cat(&[&x[0], &x[1]], axis as i64);
                let some = both.index_select(axis as i64, &tch::Tensor::from_slice(&picks));
                some.permute(longs(&order))
            },
        )?;
    }
}
