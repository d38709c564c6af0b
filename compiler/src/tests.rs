//! Compiled kernels against the reference interpreter.

use kiln_runtime::tensor::{DType, Tensor, TensorView};

use crate::backend::cpu::{Cpu, emit_all};
use crate::compile::{assemble, emit_constants, load};
use crate::graph::eval::{Data, Value, eval};
use crate::graph::op::{BinaryFn, Composite, Op, ReduceFn, Type, UnaryFn};
use crate::graph::scalar::{Dots, round_float};
use crate::graph::verify::Verified;
use crate::graph::{Graph, Node, NodeId};
use crate::loops::lower::Target;
use crate::plan::kernels::{Program, program};
use crate::plan::order::unfused;
use crate::{loops, plan};

fn ramp(ty: &Type, seed: u64) -> Value {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..ty.numel()).map(|_| next()).collect();
    Value::from_tensor(&Tensor::from_slice(&ty.shape, &values))
}

/// Compiles a graph unfused, runs it, and compares with the interpreter.
pub fn check(graph: &Graph, tolerance: f64) {
    check_kernels(graph, &unfused(graph).unwrap(), tolerance);
}

/// Compiles the kernels of a graph, runs them, and compares with the interpreter.
fn check_kernels(graph: &Graph, kernels: &Verified<Graph>, tolerance: f64) {
    let inputs: Vec<Value> =
        graph.inputs.iter().enumerate().map(|(i, (_, ty))| ramp(ty, i as u64 + 1)).collect();
    let expected = eval(graph, &inputs);
    for wide in [false, true] {
        let cpu = Cpu::host(wide);
        let program = program(kernels, cpu.target()).unwrap();
        check_loops(kernels, &program, &inputs, (&expected, tolerance));
        let emitted = emit_all(&program.kernels, &cpu, true, false).unwrap();
        let (plan, constants) = assemble(kernels, &program, &emitted, 2).unwrap();
        let executable = load(&emitted, plan, constants, 2).unwrap();
        let tensors: Vec<Tensor> = inputs.iter().map(Value::to_tensor).collect();
        let named: Vec<(&str, TensorView)> =
            graph.inputs.iter().zip(&tensors).map(|((n, _), t)| (n.as_str(), t.view())).collect();
        let outputs = executable.run(&named).unwrap();
        for ((name, tensor), expected) in outputs.iter().zip(&expected) {
            let got = Value::from_tensor(tensor).as_f64s();
            let want = expected.as_f64s();
            assert_eq!(got.len(), want.len());
            for (i, (a, b)) in got.iter().zip(&want).enumerate() {
                let close = (a - b).abs() <= tolerance * (1.0 + b.abs()) || a == b;
                assert!(close, "{name}[{i}] wide {wide}: {a}, expected {b}");
            }
        }
    }
}

/// The loops of a graph of kernels: their text reads back, and their interpreter gives what the
/// graph's does.
pub fn check_loops(
    kernels: &Graph,
    program: &Program,
    inputs: &[Value],
    (expected, tolerance): (&[Value], f64),
) {
    for kernel in &program.kernels {
        let text = loops::text::print(kernel);
        let again = loops::text::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        // As text: a NaN is not equal to itself.
        assert_eq!(format!("{again:?}"), format!("{:?}", [kernel]), "{text}");
    }
    let found = plan::eval::eval(kernels, program, inputs).unwrap_or_else(|e| panic!("{e}"));
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.ty, expected.ty);
        for (i, (a, b)) in found.as_f64s().iter().zip(expected.as_f64s()).enumerate() {
            let close = (a - b).abs() <= tolerance * (1.0 + b.abs());
            let same = *a == b || (a.is_nan() && b.is_nan());
            let text = || program.kernels.iter().map(loops::text::print).collect::<String>();
            assert!(close || same, "loops: element {i} is {a}, expected {b}\n{}", text());
        }
    }
}

pub fn graph_of(shapes: &[&[usize]], make: impl Fn(&mut Graph, &[crate::graph::NodeId])) -> Graph {
    let mut graph = Graph::default();
    let inputs: Vec<_> = shapes
        .iter()
        .enumerate()
        .map(|(i, s)| graph.input(&format!("x{i}"), Type::new(DType::F32, s)))
        .collect();
    make(&mut graph, &inputs);
    let last = crate::graph::NodeId(graph.nodes.len() as u32 - 1);
    graph.outputs.push(("y".into(), last));
    graph
}

#[test]
fn unary_functions() {
    for (f, name) in UnaryFn::ALL {
        if f == UnaryFn::Not {
            continue;
        }
        let graph = graph_of(&[&[3, 37]], |g, x| {
            let x = match f {
                UnaryFn::Sqrt | UnaryFn::Log => g.unary(UnaryFn::Abs, x[0], &name.into()).unwrap(),
                _ => g
                    .binary_number(crate::graph::op::BinaryFn::Mul, x[0], 4.0, &name.into())
                    .unwrap(),
            };
            g.unary(f, x, &name.into()).unwrap();
        });
        check(&graph, 3e-6);
    }
}

#[test]
fn functions_beside_one() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let mut x: Vec<f32> = (-400..=400).map(|i| i as f32 / 40.0).collect();
    x.extend([-1e30, -88.5, -87.4, -1e-9, 0.0, 1e-9, 87.4, 88.5, 88.75, 1e30, inf, -inf, nan]);
    for (f, order) in [(UnaryFn::Exp, 0), (UnaryFn::Erf, 1), (UnaryFn::Tanh, 1)] {
        let (mut graph, o) = (Graph::default(), "one".into());
        let given = graph.input("x", Type::new(DType::F32, &[x.len()]));
        let y = graph.unary(f, given, &o).unwrap();
        let one = graph.scalar(DType::F32, 1, 1.0, &o);
        let one = graph.expand(one, &[x.len()], &o).unwrap();
        let args = if order == 0 { [y, one] } else { [one, y] };
        let sum = graph.binary(BinaryFn::Add, args[0], args[1], &o).unwrap();
        graph.outputs.push(("y".into(), sum));
        let given = Tensor::from_slice(&[x.len()], &x);
        let want =
            Value::from_tensor(&crate::interpret(&graph, std::slice::from_ref(&given)).remove(0));
        let got = Value::from_tensor(&compiled(&graph, &given)).as_f64s();
        for ((got, want), x) in got.iter().zip(want.as_f64s()).zip(&x) {
            let near = (got - want).abs() <= 3e-7 * want.abs().max(1.0);
            let same = *got == want || got.is_nan() && want.is_nan();
            assert!(near || same, "1 + {} of {x}: {got}, not {want}", f.name());
        }
    }
}

#[test]
fn sums_of_columns_and_turned_matrices() {
    for shape in [[37, 8], [5, 64], [16, 100], [9, 200], [64, 48]] {
        check(
            &graph_of(&[&shape], |g, x| {
                g.mean(x[0], &[0], &"mean".into()).unwrap();
            }),
            2e-6,
        );
        check(
            &graph_of(&[&shape], |g, x| {
                g.permute(x[0], &[1, 0], &"turn".into()).unwrap();
            }),
            0.0,
        );
    }
}

#[test]
fn matrix_products() {
    for (m, k, n) in [(1, 5, 7), (7, 16, 16), (13, 33, 41), (64, 67, 10), (9, 96, 3), (1, 100, 200)]
    {
        let graph = graph_of(&[&[2, m, k], &[2, k, n]], |g, x| {
            g.matmul(x[0], x[1], &"matmul".into()).unwrap();
        });
        check(&graph, 2e-6);
        // Rows of few results are summed in lanes, where weights can be packed for that.
        let graph = graph_of(&[&[m, k]], |g, x| {
            let (o, w) = ("matmul".into(), ramp(&Type::new(DType::F32, &[k, n]), 7).to_tensor());
            let w = g.tensor(&w, &o);
            let y = g.matmul(x[0], w, &o).unwrap();
            g.binary_number(BinaryFn::Max, y, 0.0, &o).unwrap();
        });
        check(&graph, 2e-6);
    }
}

#[test]
fn convolutions() {
    let depthwise = [(6, 6, 6, 1), (19, 19, 19, 1), (16, 16, 16, 2)];
    let others = [(3, 16, 1, 1), (8, 20, 1, 2), (8, 12, 2, 2), (8, 42, 2, 1)];
    for (c, o, groups, stride) in others.into_iter().chain(depthwise) {
        let graph = graph_of(&[&[1, c, 9, 11]], |g, x| {
            let weight = ramp(&Type::new(DType::F32, &[o, c / groups, 3, 3]), 77);
            let w = g.tensor(&weight.to_tensor(), &"w".into());
            let origin = "conv".into();
            let zero = g.scalar(DType::F32, 0, 0.0, &origin);
            let pad = Op::Pad([(0, 0), (0, 0), (1, 1), (1, 2)].into_iter().collect());
            let x = g.add(pad, &[x[0], zero], &origin).unwrap();
            // Channels last, as the optimiser would have it.
            let y = g.conv([x, w], (&[stride, stride], &[1, 1]), groups, &origin).unwrap();
            g.permute(y, &[0, 2, 3, 1], &origin).unwrap();
        });
        check(&graph, 2e-6);
    }
}

/// A convolution with a border, whose groups share a result axis with their channels.
fn grouped(groups: usize, [channels, outputs]: [usize; 2], graph: &mut Graph, x: NodeId) -> NodeId {
    let origin = "conv".into();
    let weight = ramp(&Type::new(DType::F32, &[outputs, channels / groups, 1, 1]), 77);
    let w = graph.tensor(&weight.to_tensor(), &"w".into());
    let y = graph.conv([x, w], (&[1, 1], &[1, 1]), groups, &origin).expect("fits");
    graph.permute(y, &[0, 2, 3, 1], &origin).expect("fits")
}

/// Compiles a graph whose result is stored inside a border, by the kernel that computes it.
fn bordered(graph: &Graph, tolerance: f64) {
    let fused = crate::rules::optimise(graph, None, Dots::default()).unwrap().graph;
    let inside = |n: &Node| match n.op {
        Op::Fused(body) => {
            let nodes = &fused.bodies[body as usize].nodes;
            let last = &nodes[nodes.len() - 1];
            let below = last.args.first().map(|a| &nodes[a.index()].op);
            matches!(last.op, Op::Pad(_)) && !matches!(below, Some(Op::Input(_)))
        }
        _ => false,
    };
    assert!(fused.nodes.iter().any(inside), "{}", crate::graph::text::print(&fused));
    check_kernels(graph, &fused, tolerance);
}

#[test]
fn results_are_stored_inside_a_border() {
    let o = || "op".into();
    let padded = |g: &mut Graph, y: NodeId, borders: [(usize, usize); 4]| {
        let fill = g.scalar(DType::F32, 0, -2.5, &o());
        g.add(Op::Pad(borders.into_iter().collect()), &[y, fill], &o()).expect("fits");
    };
    let images = [(0, 0), (1, 2), (3, 1), (0, 0)];
    for borders in [images, [(1, 0), (0, 0), (0, 2), (1, 1)]] {
        // A contraction with groups, a map, a pooling.
        let graph = graph_of(&[&[2, 12, 5, 7]], |g, x| {
            let y = grouped(2, [12, 18], g, x[0]);
            padded(g, y, borders);
        });
        bordered(&graph, 2e-6);
        let graph = graph_of(&[&[2, 12, 5, 7]], |g, x| {
            let y = g.unary(UnaryFn::Tanh, x[0], &o()).expect("fits");
            padded(g, y, borders);
        });
        bordered(&graph, 2e-6);
        let graph = graph_of(&[&[2, 12, 5, 7]], |g, x| {
            let windows = Op::Window([(3, 1, 1), (2, 2, 1)].into_iter().collect());
            let windows = g.add(windows, &[x[0]], &o()).expect("fits");
            let y = g.reduce(ReduceFn::Max, windows, &[4, 5], &o()).expect("fits");
            let y = g.reshape(y, &[2, 12, 3, 3], &o()).expect("fits");
            padded(g, y, borders);
        });
        bordered(&graph, 0.0);
    }
}

#[test]
fn rows_windows_and_moves() {
    let o = || "op".into();
    let graph = graph_of(&[&[5, 203]], |g, x| {
        g.composite(Composite::Softmax(1), x[0], &o()).unwrap();
    });
    check(&graph, 2e-6);
    let graph = graph_of(&[&[2, 3, 8, 8]], |g, x| {
        let windows =
            g.add(Op::Window([(2, 2, 1), (3, 1, 1)].into_iter().collect()), &[x[0]], &o());
        g.reduce(ReduceFn::Max, windows.unwrap(), &[4, 5], &o()).unwrap();
    });
    check(&graph, 0.0);
    let graph = graph_of(&[&[4, 6, 10]], |g, x| {
        let y = g.permute(x[0], &[2, 0, 1], &o()).unwrap();
        let y = g.reshape(y, &[20, 12], &o()).unwrap();
        let a =
            g.add(Op::Slice([(18, -2, 9), (1, 3, 4)].into_iter().collect()), &[y], &o()).unwrap();
        let b = g.add(Op::Slice([(1, 2, 9), (0, 1, 4)].into_iter().collect()), &[y], &o()).unwrap();
        let c = g.add(Op::Concat(1), &[a, b], &o()).unwrap();
        let i = g.i64s(&[3], &[-1, 0, 7], &o());
        let d = g.add(Op::Gather(0), &[c, i], &o()).unwrap();
        let s = g.add(Op::Scan(ReduceFn::Sum, 1), &[d], &o()).unwrap();
        let at = g.i64s(&[2], &[2, 0], &o());
        let e = g.add(Op::Slice([(0, 1, 2), (0, 1, 8)].into_iter().collect()), &[s], &o()).unwrap();
        g.add(Op::Scatter(Some(ReduceFn::Sum)), &[s, at, e], &o()).unwrap();
    });
    check(&graph, 1e-6);
    for axes in [vec![0], vec![1], vec![2], vec![0, 2], vec![1, 2], vec![0, 1, 2]] {
        for (f, _) in ReduceFn::ALL {
            let graph = graph_of(&[&[3, 17, 40]], |g, x| {
                g.reduce(f, x[0], &axes, &o()).unwrap();
            });
            check(&graph, 1e-5);
        }
    }
}

/// A function of pairs of numbers, compiled in every width, and what it should give.
fn check_pairs(f: BinaryFn, dtype: DType, pairs: &[(f64, f64, f64)]) {
    let column = |pick: fn(&(f64, f64, f64)) -> f64| {
        let data = Data::Float(pairs.iter().map(pick).collect());
        Value { ty: Type::new(dtype, &[pairs.len()]), data }.to_tensor()
    };
    let (x, y, want) = (column(|p| p.0), column(|p| p.1), column(|p| p.2));
    let mut graph = Graph::default();
    let args = ["x", "y"].map(|name| graph.input(name, Type::new(dtype, &[pairs.len()])));
    let z = graph.binary(f, args[0], args[1], &"z".into()).unwrap();
    graph.outputs.push(("z".into(), z));
    let mut results = vec![crate::interpret(&graph, &[x.clone(), y.clone()]).remove(0)];
    for wide in [false, true] {
        let compiler = crate::Compiler::new().wide(wide);
        let executable = compiler.build(&compiler.optimise(&graph).unwrap()).unwrap();
        results.push(executable.run(&[("x", x.view()), ("y", y.view())]).unwrap().remove(0).1);
    }
    for got in results.iter().map(|r| Value::from_tensor(r).as_f64s()) {
        for ((got, want), pair) in got.iter().zip(Value::from_tensor(&want).as_f64s()).zip(pairs) {
            let close = *got == want || (got.is_nan() && want.is_nan());
            let near = (got - want).abs() <= 1e-14 * want.abs();
            assert!(close || near, "{} of {dtype} {pair:?}: {got}", f.name());
        }
    }
}

#[test]
fn remainders() {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    // The quotient of the first pair rounds up to 3.
    let y = f64::from(0.7f32);
    let near = f64::from(f32::from_bits(((3.0 * y) as f32).to_bits() - 1));
    for dtype in [DType::F32, DType::F64] {
        check_pairs(
            BinaryFn::Rem,
            dtype,
            &[
                (near, y, near % y),
                (-near, y, -near % y),
                (5.0, -3.0, 2.0),
                (-5.0, 3.0, -2.0),
                (2.0, inf, 2.0),
                (-inf, inf, nan),
                (inf, 2.0, nan),
                (1.0, 0.0, nan),
            ],
        );
    }
}

#[test]
fn powers_of_extreme_numbers() {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let pairs = [
        (-inf, -1.5, 0.0),
        (-inf, 1.5, inf),
        (-inf, 3.0, -inf),
        (-0.0, -3.0, -inf),
        (-0.0, -0.5, inf),
        (-1.0, inf, 1.0),
        (-1.0, nan, nan),
        (nan, 0.0, 1.0),
        (-2.0, 0.5, nan),
        (0.5, inf, 0.0),
        (-8.0, 3.0, -512.0),
    ];
    for dtype in [DType::F32, DType::F64] {
        check_pairs(BinaryFn::Pow, dtype, &pairs);
    }
    // Just below 1, and subnormal.
    let x = 1.0f64 - 1e-6;
    let pairs = [(x, 100.0, x.powf(100.0)), (1e-310, 0.5, 1e-310f64.sqrt())];
    check_pairs(BinaryFn::Pow, DType::F64, &pairs);
}

#[test]
fn sums_of_nothing() {
    let graph = graph_of(&[&[0, 8]], |g, x| {
        g.reduce(ReduceFn::Sum, x[0], &[0, 1], &"y".into()).unwrap();
    });
    check(&graph, 0.0);
    let graph = graph_of(&[&[0, 8], &[5, 8]], |g, x| {
        let sum = g.reduce(ReduceFn::Prod, x[0], &[0], &"y".into()).unwrap();
        g.binary(BinaryFn::Add, sum, x[1], &"y".into()).unwrap();
    });
    let compiler = crate::Compiler::new();
    compiler.build(&compiler.optimise(&graph).unwrap()).unwrap();
}

/// The number lies above a tie by less than the low half of an f64 holds.
#[test]
fn short_floats_are_rounded_once() {
    for (dtype, tie, next) in
        [(DType::BF16, 5.015625, 5.03125), (DType::F16, 1.00048828125, 1.0009765625)]
    {
        assert_eq!(round_float(dtype, tie + 1e-12), next);
        assert!(round_float(dtype, tie) < next);
        assert_eq!(round_float(dtype, -tie - 1e-12), -next);
        assert!(round_float(dtype, tie - 1e-12) < tie);
    }
}

#[test]
fn functions_of_f64_and_powers_of_integers() {
    let values: Vec<f64> = (-400..400).map(|i| f64::from(i) * 0.0317).collect();
    let count = values.len();
    for f in [UnaryFn::Exp, UnaryFn::Sin, UnaryFn::Cos, UnaryFn::Tanh, UnaryFn::Erf, UnaryFn::Log] {
        let mut graph = Graph::default();
        let x = graph.input("x", Type::new(DType::F64, &[count]));
        let y = graph.unary(f, x, &"y".into()).unwrap();
        graph.outputs.push(("y".into(), y));
        let x = Tensor::from_slice(&[count], &values);
        let (got, want) =
            (compiled(&graph, &x), crate::interpret(&graph, std::slice::from_ref(&x)));
        let pairs = got.as_slice::<f64>().unwrap().iter().zip(want[0].as_slice::<f64>().unwrap());
        for ((got, want), x) in pairs.zip(&values) {
            // The interpreter's own erf is good to 1e-13.
            let units = if f == UnaryFn::Erf { 1e-13 } else { 1e-14 };
            let close = (got - want).abs() <= units * want.abs() + 1e-16;
            let same = got == want || got.is_nan() && want.is_nan();
            assert!(close || same, "{f:?}({x}) = {got}, not {want}");
        }
    }
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(DType::I32, &[10, 2]));
    let [a, b] = [0, 1].map(|k| {
        let ranges = [(0, 1, 10), (k, 1, 1)].into_iter().collect();
        graph.add(Op::Slice(ranges), &[x], &"part".into()).unwrap()
    });
    let y = graph.binary(crate::graph::op::BinaryFn::Pow, a, b, &"y".into()).unwrap();
    graph.outputs.push(("y".into(), y));
    let pairs =
        [3, 4, -2, 31, 0, 0, 7, -1, -1, -3, 1, -9, -1, -2, i32::MAX, -3, 2, 40, i32::MIN, 1];
    let x = Tensor::from_slice(&[10, 2], &pairs);
    let want = crate::interpret(&graph, std::slice::from_ref(&x));
    assert_eq!(compiled(&graph, &x).as_slice::<i32>(), want[0].as_slice::<i32>());
}

pub fn compiled(graph: &Graph, x: &Tensor) -> Tensor {
    let compiler = crate::Compiler::new();
    let executable = compiler.build(&compiler.optimise(graph).unwrap()).unwrap();
    executable.run(&[("x", x.view())]).unwrap().remove(0).1
}

#[test]
fn what_follows_a_product_may_have_no_lanes() {
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(DType::F32, &[1, 24, 16]));
    let o: crate::graph::Origin = "y".into();
    let turned = graph.permute(x, &[0, 2, 1], &o).unwrap();
    let y = graph.matmul(x, turned, &o).unwrap();
    let zero = graph.scalar(DType::F32, 0, 0.0, &o);
    let zero = graph.with_rank(zero, 3, &o).unwrap();
    let row = graph.reduce(ReduceFn::Sum, x, &[2], &o).unwrap();
    let mask = graph.binary(crate::graph::op::BinaryFn::Lt, zero, row, &o).unwrap();
    let masked = graph.select(mask, y, zero, &o).unwrap();
    let short = graph.add(Op::Cast(DType::F16), &[y], &o).unwrap();
    graph.outputs.push(("masked".into(), masked));
    graph.outputs.push(("short".into(), short));
    let values = ramp(&Type::new(DType::F32, &[1, 24, 16]), 5).to_tensor();
    let want = crate::interpret(&graph, std::slice::from_ref(&values));
    for egraph in [false, true] {
        let compiler = crate::Compiler::new().egraph(egraph);
        let executable = compiler.build(&compiler.optimise(&graph).unwrap()).unwrap();
        let got = executable.run(&[("x", values.view())]).unwrap();
        for ((_, got), want) in got.iter().zip(&want) {
            let of = |t: &Tensor| Value::from_tensor(t).as_f64s();
            let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-3;
            assert!(of(got).iter().zip(&of(want)).all(near));
        }
    }
}

#[test]
fn constants_of_other_targets_are_folded_here() {
    let mut graph = Graph::default();
    let o: crate::graph::Origin = "y".into();
    let x = graph.input("x", Type::new(DType::F32, &[9, 24]));
    let weights = ramp(&Type::new(DType::F32, &[24, 35]), 3).to_tensor();
    let weights = graph.tensor(&weights, &o);
    let weights = graph.unary(UnaryFn::Exp, weights, &o).unwrap();
    let y = graph.matmul(x, weights, &o).unwrap();
    graph.outputs.push(("y".into(), y));
    let kernels = unfused(&graph).unwrap();
    let linux = Some("x86_64-unknown-linux-gnu");
    let cpus = ["x86-64-v2", "x86-64-v3", "x86-64-v4"].map(|cpu| Cpu::named(linux, Some(cpu)));
    let others = ["aarch64-unknown-linux-gnu", "riscv64gc-unknown-linux-gnu"];
    for cpu in cpus.into_iter().chain(others.map(|t| Cpu::named(Some(t), None))) {
        let cpu = cpu.unwrap();
        let program = program(&kernels, cpu.target()).unwrap();
        let emitted = emit_constants(&program, &cpu.stand_in(), true).unwrap();
        let (plan, constants) = assemble(&kernels, &program, &emitted, 1).unwrap();
        // All of the program for the stand-in: what was folded is what it needs.
        let all = emit_all(&program.kernels, &cpu.stand_in(), true, false).unwrap();
        let executable = load(&all, plan, constants, 1).unwrap();
        let x = ramp(&Type::new(DType::F32, &[9, 24]), 4).to_tensor();
        let got = executable.run(&[("x", x.view())]).unwrap().remove(0).1;
        let want = crate::interpret(&graph, &[x]);
        let pairs = got.as_slice::<f32>().unwrap().iter().zip(want[0].as_slice::<f32>().unwrap());
        for (got, want) in pairs {
            assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{got} {want} {cpu:?}");
        }
    }
}

/// A convolution of 3 by 3 with an epilogue, on data of unit variance.
fn three_by_three([images, channels, height, width]: [usize; 4], out: usize) -> Graph {
    let (mut graph, o) = (Graph::default(), "conv".into());
    // As a convolution before it would give it.
    let x = graph.input("x", Type::new(DType::F32, &[images, height, width, channels]));
    let x = graph.permute(x, &[0, 3, 1, 2], &o).unwrap();
    let unit = graph.binary_number(BinaryFn::Mul, x, 3f64.sqrt(), &o).unwrap();
    let zero = graph.scalar(DType::F32, 0, 0.0, &o);
    let padded = graph.add(
        Op::Pad([(0, 0), (0, 0), (1, 1), (1, 1)].into_iter().collect()),
        &[unit, zero],
        &o,
    );
    let mut weight = |shape: &[usize], scale: f32, seed| {
        let values = ramp(&Type::new(DType::F32, shape), seed).to_tensor();
        let values: Vec<f32> =
            values.as_slice::<f32>().unwrap().iter().map(|v| v * scale).collect();
        graph.tensor(&Tensor::from_slice(shape, &values), &"w".into())
    };
    let w = weight(&[out, channels, 3, 3], (1.0 / (3 * channels) as f32).sqrt(), 5);
    let bias = weight(&[1, out, 1, 1], 1.0, 6);
    let steps = (&[1, 1][..], &[1, 1][..]);
    let y = graph.conv([padded.unwrap(), w], steps, 1, &o).unwrap();
    let y = graph.binary(BinaryFn::Add, y, bias, &o).unwrap();
    let y = graph.binary_number(BinaryFn::Max, y, 0.0, &o).unwrap();
    graph.outputs.push(("y".into(), y));
    graph
}

#[test]
fn convolutions_by_minimal_filtering() {
    let sizes: [([usize; 4], usize); 7] = [
        ([1, 16, 12, 12], 16),
        ([2, 32, 14, 9], 48),
        ([1, 24, 7, 7], 32),
        ([3, 16, 5, 6], 16),
        ([1, 16, 4, 23], 24),
        ([1, 64, 13, 10], 32),
        // Too few channels.
        ([1, 8, 12, 12], 16),
    ];
    for (shape, out) in sizes {
        let graph = three_by_three(shape, out);
        let optimised =
            crate::rules::optimise(&graph, Some(crate::rules::Budget::default()), Dots::default())
                .unwrap()
                .graph;
        check_kernels(&graph, &optimised, 3e-5);
        let kernels = |exact| {
            let target = Target { exact, ..Cpu::host(true).target() };
            let program = program(&optimised, target).unwrap();
            program.kernels.iter().filter(|k| k.name.ends_with(".products")).count()
        };
        // Channels are whole vectors, and not too few.
        let lanes = Cpu::host(true).target().lanes;
        let fits = shape[1] >= 16 && [shape[1], out].iter().all(|c| c.is_multiple_of(lanes));
        assert_eq!(
            (kernels(false), kernels(true)),
            (usize::from(fits), 0),
            "{}",
            crate::graph::text::print(&optimised)
        );
    }
}
