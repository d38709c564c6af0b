//! Kernels of whole graphs, as the pipeline makes them, in wide code of both levels: bit by bit
//! what Cranelift's code of as many lanes gives.

use std::collections::BTreeSet;

use kiln_runtime::tensor::{DType, Tensor};

use super::compile;
use super::isa::{self, Level, Op as Instruction, Width};
use super::tests::{LEVELS, try_agree};
use crate::graph::op::{BinaryFn, Composite, Op, ReduceFn, Type, UnaryFn};
use crate::graph::scalar::Dots;
use crate::graph::verify::verify;
use crate::graph::{Graph, NodeId, Origin};
use crate::loops::ir::{Loops, Scope};
use crate::loops::lower::Target;
use crate::plan::kernels::program;
use crate::rules::{Budget, optimise};

/// A small deterministic generator (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) % n as u64) as usize
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.below(1 << 20) as f32 / (1 << 18) as f32 - 2.0).collect()
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// What has been compared at one level.
#[derive(Default)]
struct Tally {
    compared: usize,
    left: BTreeSet<String>,
    used: BTreeSet<String>,
}

/// Work that is done in the model at most, about.
const MOST_WORK: u64 = 1 << 20;

impl Tally {
    fn kernel(&mut self, kernel: &Loops, lanes: usize) {
        let mut random = Random(self.compared as u64 + 1);
        let global = kernel.buffers.iter().filter(|b| b.scope == Scope::Global);
        // Elements of other types than f32 are of no use to wide code, which leaves the kernel.
        let before: Vec<Vec<f32>> =
            global.map(|b| random.floats((b.len * b.dtype.bytes()).div_ceil(4))).collect();
        let all = kernel.parallel_extent() as u64;
        let turns = (MOST_WORK * all / kernel.work().max(1)).clamp(1, all);
        match try_agree(kernel, lanes, &before, turns as i64) {
            Some(mut agreed) => {
                self.compared += 1;
                self.used.append(&mut agreed.used);
            }
            None => {
                self.left.insert(kernel.name.clone());
            }
        }
    }

    fn graph(&mut self, graph: &Graph, lanes: usize) {
        let optimised = optimise(graph, Some(Budget::default()), Dots::default()).unwrap().graph;
        let registers = Level::of(lanes).unwrap().registers();
        let program = program(
            &optimised,
            Target { lanes, registers, exact: false, halves: false, threads: 0 },
        )
        .unwrap();
        program.kernels.iter().for_each(|kernel| self.kernel(kernel, lanes));
    }
}

fn weight(graph: &mut Graph, random: &mut Random, shape: &[usize]) -> NodeId {
    let values = random.floats(shape.iter().product());
    graph.tensor(&Tensor::from_slice(shape, &values), &"w".into())
}

/// One more operation over the values so far; `None` where the choice does not fit.
fn grow(graph: &mut Graph, random: &mut Random, values: &[NodeId]) -> Option<NodeId> {
    let o: Origin = "n".into();
    let x = values[random.below(values.len())];
    let y = values[random.below(values.len())];
    let shape = graph.ty(x).shape.to_vec();
    let (rank, axis) = (shape.len(), random.below(shape.len()));
    match random.below(14) {
        0 => {
            let all: Vec<UnaryFn> = UnaryFn::ALL.into_iter().map(|f| f.0).collect();
            let f = random.pick(&all);
            graph.unary(f, x, &o).ok().filter(|_| f != UnaryFn::Not)
        }
        1 => {
            let axis = axis as u8;
            let epsilon = 1e-5f32.to_bits();
            let named = [
                Composite::Sigmoid,
                Composite::Silu,
                Composite::Gelu,
                Composite::Softmax(axis),
                Composite::LayerNorm(axis, epsilon),
                Composite::RmsNorm(axis, epsilon),
            ];
            graph.composite(random.pick(&named), x, &o).ok()
        }
        2 | 3 => {
            let mut to = vec![1; rank];
            to[axis] = shape[axis];
            let c = weight(graph, random, &to);
            let f = [BinaryFn::Mul, BinaryFn::Add, BinaryFn::Sub, BinaryFn::Max, BinaryFn::Div];
            graph.binary(random.pick(&f), x, c, &o).ok()
        }
        4 => {
            let mut axes: Vec<usize> = (0..rank).collect();
            (1..rank).for_each(|i| axes.swap(i, random.below(i + 1)));
            graph.permute(x, &axes, &o).ok()
        }
        5 if axis + 1 < rank && rank > 2 => {
            let mut to = shape.clone();
            to[axis] *= to.remove(axis + 1);
            graph.reshape(x, &to, &o).ok()
        }
        6 => {
            let ranges =
                shape.iter().map(|&e| if e > 4 { (1, 2, e / 2 - 1) } else { (0, 1, e) }).collect();
            graph.add(Op::Slice(ranges), &[x], &o).ok()
        }
        7 => {
            let f = [ReduceFn::Sum, ReduceFn::Max, ReduceFn::Min, ReduceFn::Prod];
            graph.reduce(random.pick(&f), x, &[axis], &o).ok()
        }
        8 => graph.add(Op::Concat(axis as u8), &[x, y], &o).ok(),
        9 => {
            let less = graph.binary(BinaryFn::Lt, x, y, &o).ok()?;
            let zero = graph.scalar(DType::F32, 0, 0.0, &o);
            let zero = graph.with_rank(zero, rank, &o).ok()?;
            let zero = graph.expand(zero, &shape, &o).ok()?;
            graph.select(less, x, zero, &o).ok()
        }
        10 if rank == 4 => {
            let (zero, k) = (graph.scalar(DType::F32, 0, 0.0, &o), random.pick(&[1, 3]));
            let border = (k / 2, k / 2);
            let pad = Op::Pad([(0, 0), (0, 0), border, border].into_iter().collect());
            let padded = graph.add(pad, &[x, zero], &o).ok()?;
            let out = random.pick(&[3, 8, 16, 24]);
            let w = weight(graph, random, &[out, shape[1], k, k]);
            graph.conv([padded, w], (&[1, 1], &[1, 1]), 1, &o).ok()
        }
        11 | 12 => {
            let n = random.pick(&[1, 7, 16, 20, 33, 64, 70]);
            let w = weight(graph, random, &[shape[rank - 1], n]);
            let w = graph.with_rank(w, rank, &o).ok()?;
            graph.matmul(x, w, &o).ok()
        }
        _ => graph.binary(BinaryFn::Add, x, y, &o).ok(),
    }
}

fn random_graph(seed: u64) -> Graph {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut graph = Graph::default();
    let shapes: [&[usize]; 5] =
        [&[37, 53], &[1, 6, 9, 17], &[2, 19, 32], &[3, 4, 16, 16], &[5, 129]];
    let shape = random.pick(&shapes);
    let mut values = vec![graph.input("x", Type::new(DType::F32, shape))];
    for _ in 0..10 {
        if let Some(id) = grow(&mut graph, &mut random, &values)
            && graph.ty(id).numel() <= 20_000
            && graph.ty(id).rank() > 0
            && graph.ty(id).dtype == DType::F32
        {
            values.push(id);
        }
    }
    let last = values[values.len() - 1];
    graph.outputs.push(("y".into(), last));
    verify(graph.clone()).unwrap();
    graph
}

/// Product, bias, and a named function: the tiles of contractions with their epilogues.
fn product(m: usize, k: usize, n: usize, constant: bool) -> Graph {
    let (mut graph, mut random, o) = (Graph::default(), Random(7), Origin::from("n"));
    let x = graph.input("x", Type::new(DType::F32, &[m, k]));
    let w = match constant {
        true => weight(&mut graph, &mut random, &[k, n]),
        false => graph.input("w", Type::new(DType::F32, &[k, n])),
    };
    let product = graph.matmul(x, w, &o).unwrap();
    let bias = weight(&mut graph, &mut random, &[1, n]);
    let sum = graph.binary(BinaryFn::Add, product, bias, &o).unwrap();
    let y = graph.composite(Composite::Gelu, sum, &o).unwrap();
    graph.outputs.push(("y".into(), y));
    graph
}

#[test]
fn products_agree() {
    for lanes in LEVELS {
        let mut tally = Tally::default();
        for (m, k, n) in
            [(1, 64, 96), (1, 33, 10), (5, 7, 16), (12, 40, 32), (29, 31, 75), (64, 48, 200)]
        {
            tally.graph(&product(m, k, n, false), lanes);
            tally.graph(&product(m, k, n, true), lanes);
        }
        assert!(tally.compared >= 12, "{} at {lanes} lanes", tally.compared);
        assert!(tally.left.is_empty(), "{:?}", tally.left);
    }
}

/// The texts of loops that have no other loop in them.
fn innermost(asm: &str) -> Vec<String> {
    let lines: Vec<(u64, &str)> = asm
        .lines()
        .filter_map(|line| line.trim_start().split_once(' '))
        .map(|(at, text)| (u64::from_str_radix(at, 16).unwrap(), text))
        .collect();
    let mut loops = Vec::new();
    let mut after = 0;
    for (i, &(at, text)) in lines.iter().enumerate() {
        let Some(to) = text.trim_start().strip_prefix("jne ") else { continue };
        let to = u64::from_str_radix(to.trim_end_matches('h'), 16).unwrap();
        let start = lines.partition_point(|l| l.0 < to);
        if to < at && start >= after {
            loops.push(lines[start..i].iter().map(|l| l.1).collect());
            after = i;
        }
    }
    loops
}

#[test]
fn tiles_fill_the_registers() {
    for (lanes, rows) in [(8, 5), (16, 12)] {
        let registers = Level::of(lanes).unwrap().registers();
        let optimised =
            optimise(&product(60, 48, 64, false), Some(Budget::default()), Dots::default())
                .unwrap()
                .graph;
        let program = program(
            &optimised,
            Target { lanes, registers, exact: false, halves: false, threads: 0 },
        )
        .unwrap();
        let tile = |kernel: &Loops| {
            let held = kernel.buffers.iter().filter(|b| b.scope == Scope::Register);
            held.map(|b| b.len).max().unwrap_or(0)
        };
        assert_eq!(program.kernels.iter().map(tile).max(), Some(rows * 2 * lanes));
        for kernel in &program.kernels {
            let asm = compile(kernel, lanes, Dots::default(), true).unwrap().asm;
            let sums = innermost(&asm);
            assert!(sums.iter().any(|l| l.matches("vfmadd231ps").count() == rows * 2), "{asm}");
            assert!(sums.iter().all(|l| !l.contains("[rsp")), "a loop spills\n{asm}");
        }
    }
}

/// The forms of the table that kernels of a level may contain.
fn forms(level: Level) -> BTreeSet<String> {
    let name = |op: Instruction, width| format!("{:?}", op.code(level, width));
    let narrow = isa::NARROW.iter().map(|&(_, op)| name(op, Width::Xmm));
    let wide = isa::WIDE.iter().map(|&(_, op)| name(op, level.width()));
    narrow.chain(wide).collect()
}

#[test]
fn random_graphs_agree() {
    for lanes in LEVELS {
        let mut tally = Tally::default();
        for (f, name) in UnaryFn::ALL.into_iter().filter(|f| f.0 != UnaryFn::Not) {
            let mut graph = Graph::default();
            let x = graph.input("x", Type::new(DType::F32, &[5, 129]));
            let y = graph.unary(f, x, &name.into()).unwrap();
            graph.outputs.push(("y".into(), y));
            tally.graph(&graph, lanes);
        }
        for seed in 0..120 {
            tally.graph(&random_graph(seed), lanes);
        }
        let level = Level::of(lanes).unwrap();
        let spill = format!("{:?}", isa::SPILL.code(level, level.width()));
        let mut untried: Vec<String> = forms(level).difference(&tally.used).cloned().collect();
        // Another test runs out of registers.
        untried.retain(|form| *form != spill);
        println!("{lanes} lanes: {} kernels, by {:?}", tally.compared, tally.used);
        assert!(untried.is_empty(), "{untried:?} at {lanes} lanes");
        assert!(tally.compared > 300, "{} at {lanes} lanes", tally.compared);
    }
}

/// An order of axes, and a sum with what lies in that order.
fn moved(shape: &[usize], order: &[usize], add: bool) -> Graph {
    let (mut graph, o) = (Graph::default(), Origin::from("n"));
    let x = graph.input("x", Type::new(DType::F32, shape));
    let mut y = graph.permute(x, order, &o).unwrap();
    if add {
        let to = graph.ty(y).clone();
        let other = graph.input("z", to);
        y = graph.binary(BinaryFn::Add, y, other, &o).unwrap();
    }
    graph.outputs.push(("y".into(), y));
    graph
}

#[test]
fn moves_agree() {
    for (lanes, form) in [(8, "VEX_Vpermps_ymm"), (16, "EVEX_Vpermt2ps_zmm")] {
        let mut tally = Tally::default();
        for add in [false, true] {
            for (shape, order) in [
                (&[64, 48][..], &[1, 0][..]),
                (&[133, 77], &[1, 0]),
                (&[3, 37, 5, 41], &[2, 3, 0, 1]),
            ] {
                tally.graph(&moved(shape, order, add), lanes);
            }
            for few in 2..=7 {
                tally.graph(&moved(&[5, few, 67], &[0, 2, 1], add), lanes);
                tally.graph(&moved(&[5, 67, few], &[0, 2, 1], add), lanes);
            }
        }
        assert!(tally.left.is_empty(), "{:?}", tally.left);
        assert!(tally.used.iter().any(|used| used.starts_with(form)), "{:?}", tally.used);
    }
}
