//! What the suite does not reach: pressure on registers, pieces of parallel loops, special values,
//! and that results are those of Cranelift, bit by bit. Code of both levels runs in the model of
//! the processor, and on this one where it can.

use std::collections::BTreeSet;
use std::sync::Arc;

use kiln_runtime::code::Code;
use kiln_runtime::tensor::DType;

use super::compile;
use super::emulate::{self, Buffer as Lent};
use crate::backend::cpu::features::{DOTS, HALVES};
use crate::backend::cpu::{Cpu, clif};
use crate::graph::op::{Affine, BinaryFn, ReduceFn, UnaryFn};
use crate::graph::scalar::Dots;
use crate::loops::ir::{Buffer, Expr, Kind, Loops, Number, Param, Place, Scope, Stmt};

fn buffer(len: usize, scope: Scope, param: Param) -> Buffer {
    Buffer { dtype: DType::F32, len, scope, param }
}

fn at(terms: &[(u8, i64)], offset: i64) -> Place {
    let mut affine = Affine::constant(offset);
    for &(var, c) in terms {
        affine = affine.plus(var as usize, c);
    }
    Place::affine(affine)
}

/// Lanes of AVX2 and of AVX-512.
pub const LEVELS: [usize; 2] = [8, 16];

/// `count` vectors are read, kept over a loop of `turns` that adds the first to each, and stored
/// in the opposite order.
fn pressing(count: usize, turns: usize, lanes: usize) -> Loops {
    let cell = |k: usize| at(&[], k as i64);
    let lane = |k: usize| at(&[(1, 1)], (lanes * k) as i64);
    let vector = |body: Vec<Stmt>| Stmt::For { var: 1, extent: lanes, kind: Kind::Vector, body };
    let store = |buffer, place, value| Stmt::Store { buffer, place, value };
    let load = |buffer, place| Arc::new(Expr::Load(buffer, place));
    let read = (0..count).map(|k| store(2, cell(k), Expr::Load(0, lane(k)))).collect();
    let add = (0..count)
        .map(|k| {
            let sum =
                Expr::Binary(BinaryFn::Add, load(2, cell(k)), load(0, at(&[(0, lanes as i64)], 0)));
            store(2, cell(k), sum)
        })
        .collect();
    let write = (0..count).map(|k| store(1, lane(count - 1 - k), Expr::Load(2, cell(k)))).collect();
    let body = vec![vector(add)];
    let sums = Stmt::For { var: 0, extent: turns, kind: Kind::Serial, body };
    Loops {
        name: "pressing".into(),
        buffers: vec![
            buffer(lanes * count, Scope::Global, Param::Arg(0)),
            buffer(lanes * count, Scope::Global, Param::Out),
            buffer(count, Scope::Register, Param::None),
        ],
        ranges: Vec::new(),
        body: vec![vector(read), sums, vector(write)],
    }
}

/// Runs a kernel on its buffers, from `begin` to `end`.
fn run(code: &[u8], buffers: &mut [Vec<f32>], begin: i64, end: i64) {
    let code = Code::load(code, vec![0]).expect("the system lets tests load code");
    let buffers: Vec<*mut u8> = buffers.iter_mut().map(|b| b.as_mut_ptr().cast()).collect();
    // SAFETY: the kernel reads and writes the buffers that its loops name, which are as long.
    unsafe { code.entry(0)(buffers.as_ptr(), begin, end) };
}

/// The same in the model of the processor. Buffers that the loops do not write must not change.
fn model(
    loops: &Loops,
    code: &[u8],
    buffers: &mut [Vec<f32>],
    (begin, end): (i64, i64),
) -> BTreeSet<String> {
    let global = loops.buffers.iter().filter(|b| b.scope == Scope::Global);
    let lent = global
        .zip(buffers)
        .map(|(b, data)| match b.param {
            Param::Arg(_) => Lent::Read(bytemuck::cast_slice(data)),
            Param::Scratch(_) | Param::Out | Param::Dims | Param::None => {
                Lent::Write(bytemuck::cast_slice_mut(data))
            }
        })
        .collect();
    emulate::run(code, lent, begin, end).unwrap_or_else(|why| panic!("{}: {why}", loops.name))
}

fn bits(buffers: &[Vec<f32>]) -> Vec<Vec<u32>> {
    let bits = |v: &f32| if v.is_nan() { 1 } else { v.to_bits() };
    buffers.iter().map(|b| b.iter().map(bits).collect()).collect()
}

/// Runs a piece of a kernel on its buffers.
type Piece<'a> = dyn FnMut(&mut [Vec<f32>], i64, i64) + 'a;

/// What one kernel did in the model.
pub struct Agreed {
    /// Its global buffers afterwards.
    pub buffers: Vec<Vec<f32>>,
    /// The instructions that it went through.
    pub used: BTreeSet<String>,
}

/// Runs a kernel on its global buffers, in pieces of the first turns of its parallel loop: as
/// Cranelift's code, as wide code in the model, and as wide code here if this CPU has the level.
/// Results are the same, with and without instructions for dot products. `None` where the kernel is
/// not for wide code.
pub fn try_agree(loops: &Loops, lanes: usize, before: &[Vec<f32>], turns: i64) -> Option<Agreed> {
    let lanes = loops.lanes().unwrap_or(lanes);
    let plain = agreed(loops, (lanes, Dots::default()), before, turns)?;
    let rounded = (lanes == 16).then_some(DType::BF16);
    let all = Dots { whole: true, rounded, ..Dots::default() };
    let dots = agreed(loops, (lanes, all), before, turns)?;
    assert!(bits(&plain.buffers) == bits(&dots.buffers), "{}, {lanes} lanes", loops.name);
    Some(Agreed { used: plain.used.union(&dots.used).cloned().collect(), ..plain })
}

fn agreed(
    loops: &Loops,
    (lanes, dots): (usize, Dots),
    before: &[Vec<f32>],
    turns: i64,
) -> Option<Agreed> {
    let wide = compile(loops, lanes, dots, true).ok()?;
    assert!(!wide.asm.contains("(bad)"), "{}", wide.asm);
    let cpu = Cpu::host(true);
    let isa = clif::target_isa(cpu.triple.name, &cpu.flags(), true).unwrap();
    let narrow = clif::compile(loops, &*isa, lanes, false).unwrap();
    let pieces = [0, turns / 3, turns / 2, turns];
    let in_pieces = |run: &mut Piece| {
        let mut buffers = before.to_vec();
        for piece in pieces.windows(2).filter(|p| p[0] < p[1]) {
            run(&mut buffers, piece[0], piece[1]);
        }
        buffers
    };
    let expected = in_pieces(&mut |buffers, begin, end| run(&narrow.code, buffers, begin, end));
    let mut used = BTreeSet::new();
    let buffers = in_pieces(&mut |buffers, begin, end| {
        used.append(&mut model(loops, &wide.code, buffers, (begin, end)));
    });
    assert!(bits(&buffers) == bits(&expected), "{}, {lanes} lanes\n{}", loops.name, wide.asm);
    let whole = !dots.whole || kiln_runtime::cpu::has(DOTS[usize::from(lanes == 16)]);
    let halves = dots.rounded.is_none() || kiln_runtime::cpu::has(HALVES);
    if cpu.wide_lanes >= lanes && whole && halves {
        let here = in_pieces(&mut |buffers, begin, end| run(&wide.code, buffers, begin, end));
        assert!(bits(&here) == bits(&expected), "{}, {lanes} lanes, here", loops.name);
    }
    Some(Agreed { buffers, used })
}

/// The same for a kernel with an input and an output buffer, which wide code must take.
fn agree(loops: &Loops, lanes: usize, x: &[f32]) -> Vec<f32> {
    let before = [x.to_vec(), vec![-7f32; loops.buffers[1].len]];
    let turns = loops.parallel_extent() as i64;
    let agreed = try_agree(loops, lanes, &before, turns).expect("wide code takes it");
    agreed.buffers[1].clone()
}

fn nest(loops: &[(u8, usize, Kind)], body: Vec<Stmt>) -> Vec<Stmt> {
    loops
        .iter()
        .rev()
        .fold(body, |body, &(var, extent, kind)| vec![Stmt::For { var, extent, kind, body }])
}

fn kernel(lens: [usize; 2], body: Vec<Stmt>) -> Loops {
    let buffers = vec![
        buffer(lens[0], Scope::Global, Param::Arg(0)),
        buffer(lens[1], Scope::Global, Param::Out),
        buffer(32, Scope::Register, Param::None),
    ];
    Loops { name: "k".into(), buffers, ranges: Vec::new(), body }
}

fn two(f: BinaryFn, x: Expr, y: Expr) -> Expr {
    Expr::Binary(f, Arc::new(x), Arc::new(y))
}

#[test]
fn parallel_loops_in_pieces() {
    let [a, b, c, d] = [7, 13, 5, 3usize];
    let (x, place) = (a * b * c * d, at(&[(0, 195), (1, 15), (2, 3), (3, 1)], 0));
    // Backwards along the second axis, so that a step is negative.
    let from = at(&[(0, 1), (1, -(a as i64)), (2, (a * b * d) as i64), (3, (a * b) as i64)], {
        (a * (b - 1)) as i64
    });
    let body = vec![Stmt::Store { buffer: 1, place, value: Expr::Load(0, from) }];
    let p = Kind::Parallel;
    let axes = [(0, a, p), (1, b, p), (2, c, p), (3, d, Kind::Serial)];
    let input: Vec<f32> = (0..x).map(|k| k as f32).collect();
    for lanes in LEVELS {
        let y = agree(&kernel([x, x], nest(&axes, body.clone())), lanes, &input);
        let mut sorted = y.clone();
        sorted.sort_by(f32::total_cmp);
        assert_eq!(sorted, input, "every element is read once");
        let (i, j, k, l) = (5, 4, 3, 2);
        let from = i + a * (b - 1 - j) + k * a * b * d + l * a * b;
        assert_eq!(y[195 * i + 15 * j + 3 * k + l], from as f32);
    }
}

#[test]
fn one_parallel_loop_counts_by_itself() {
    for lanes in LEVELS {
        let step = lanes as i64;
        let body = vec![Stmt::Store {
            buffer: 1,
            place: at(&[(0, step), (1, 1)], 0),
            value: Expr::Load(0, at(&[(0, -step), (1, 1)], step * 99)),
        }];
        let size = 100 * lanes;
        let input: Vec<f32> = (0..size).map(|k| k as f32).collect();
        let axes = [(0, 100, Kind::Parallel), (1, lanes, Kind::Vector)];
        let y = agree(&kernel([size, size], nest(&axes, body)), lanes, &input);
        assert_eq!(&y[lanes * 30..lanes * 31], &input[lanes * 69..lanes * 70]);
    }
}

const SPECIAL: [f32; 16] = [
    f32::NAN,
    0.0,
    -0.0,
    1.5,
    -2.5,
    f32::INFINITY,
    f32::NEG_INFINITY,
    1e-40,
    -1e-40,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    0.5,
    2.5,
    1e9,
    -1.0,
];

/// Every pair of special values, the first ones in lanes of their own.
fn pairs(lanes: usize) -> Vec<f32> {
    let mut x = Vec::new();
    for first in SPECIAL {
        for seconds in SPECIAL.chunks(lanes) {
            x.extend(vec![first; lanes]);
            x.extend(seconds);
        }
    }
    x
}

#[test]
fn special_values() {
    let literal = |v: f64| Expr::Const(DType::F32, Number::Float(v));
    let zero_one =
        |c: Expr| Expr::Select(Arc::new(c), Arc::new(literal(1.0)), Arc::new(literal(f64::NAN)));
    for lanes in LEVELS {
        let (x, step) = (pairs(lanes), lanes as i64);
        let load = |k: i64| Expr::Load(0, at(&[(0, 2 * step), (1, 1)], step * k));
        let mut values = Vec::new();
        for f in [BinaryFn::Max, BinaryFn::Min, BinaryFn::Sub, BinaryFn::Div, BinaryFn::Mul] {
            values.push(two(f, load(0), load(1)));
            values.push(two(f, load(0), literal(0.5)));
            values.push(two(f, literal(-0.0), load(1)));
        }
        for f in [BinaryFn::Lt, BinaryFn::Le, BinaryFn::Eq, BinaryFn::Ne] {
            values.push(zero_one(two(f, load(0), load(1))));
            values.push(zero_one(two(f, literal(1.5), load(1))));
        }
        for (f, _) in UnaryFn::ALL.into_iter().filter(|f| f.0 != UnaryFn::Not) {
            values.push(Expr::Unary(f, Arc::new(load(1))));
        }
        values.push(Expr::Fma(Arc::new(load(0)), Arc::new(load(1)), Arc::new(load(1))));
        values.push(Expr::Fma(Arc::new(load(0)), Arc::new(load(1)), Arc::new(literal(3.0))));
        let groups = x.len() / (2 * lanes);
        for value in values {
            for lane in [Kind::Vector, Kind::Serial] {
                let place = at(&[(0, step), (1, 1)], 0);
                let body = vec![Stmt::Store { buffer: 1, place, value: value.clone() }];
                let axes = [(0, groups, Kind::Serial), (1, lanes, lane)];
                agree(&kernel([x.len(), x.len() / 2], nest(&axes, body)), lanes, &x);
            }
        }
    }
}

#[test]
fn functions_over_all_numbers() {
    // Bits at random: every exponent, both signs, NaN.
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        f32::from_bits(state ^ state >> 15)
    };
    let x: Vec<f32> = (0..1 << 14).map(|_| next()).collect();
    // And where the functions are not constant.
    let near = (0..1 << 14).map(|k| (k as f32 - 8192.0) / 512.0 + 1e-4);
    let x: Vec<f32> = x.into_iter().chain(near).collect();
    for (f, _) in UnaryFn::ALL.into_iter().filter(|f| f.0 != UnaryFn::Not) {
        for lanes in LEVELS {
            let place = at(&[(0, lanes as i64), (1, 1)], 0);
            let value = Expr::Unary(f, Arc::new(Expr::Load(0, place.clone())));
            let body = vec![Stmt::Store { buffer: 1, place, value }];
            let axes = [(0, x.len() / lanes, Kind::Parallel), (1, lanes, Kind::Vector)];
            agree(&kernel([x.len(), x.len()], nest(&axes, body)), lanes, &x);
        }
    }
}

#[test]
fn conditions_on_indices() {
    let index = |terms: &[(u8, i64)], offset| Expr::Index(at(terms, offset).affine);
    let number = |n| Expr::Const(DType::I64, Number::Int(n));
    let inside = two(
        BinaryFn::And,
        two(BinaryFn::Le, number(0), index(&[(0, 1), (1, -1)], 0)),
        two(BinaryFn::Lt, index(&[(0, 1), (1, 2)], -1), number(13)),
    );
    let place = at(&[(0, 9), (1, 1)], 0);
    let load = Expr::Load(0, place.clone());
    let other = Expr::Const(DType::F32, Number::Float(0.25));
    let store = |value| vec![Stmt::Store { buffer: 1, place: place.clone(), value }];
    let chosen =
        Expr::Select(Arc::new(inside.clone()), Arc::new(load.clone()), Arc::new(other.clone()));
    let branch = vec![Stmt::If {
        condition: inside,
        then: store(load),
        other: nest(&[(2, 3, Kind::Serial)], store(other)),
    }];
    let x: Vec<f32> = (1..100).map(|k| k as f32).collect();
    let axes = [(0, 11, Kind::Parallel), (1, 9, Kind::Serial)];
    for lanes in LEVELS {
        let a = agree(&kernel([99, 99], nest(&axes, store(chosen.clone()))), lanes, &x);
        let b = agree(&kernel([99, 99], nest(&axes, branch.clone())), lanes, &x);
        assert_eq!(a, b);
        assert_eq!((a[9 * 4 + 4], a[9 * 4 + 5], a[9 * 8 + 3]), (41.0, 0.25, 0.25));
    }
}

#[test]
fn conditions_on_indices_choose_lanes() {
    for lanes in LEVELS {
        let step = lanes as i64;
        let index = |terms: &[(u8, i64)], offset| Expr::Index(at(terms, offset).affine);
        let early = two(BinaryFn::Lt, index(&[(0, 2)], 1), index(&[(0, 1)], 4));
        let place = at(&[(0, step), (1, 1)], 0);
        let load = Arc::new(Expr::Load(0, place.clone()));
        let other = Arc::new(Expr::Const(DType::F32, Number::Float(0.25)));
        let value = Expr::Select(Arc::new(early), load, other);
        let body = vec![Stmt::Store { buffer: 1, place, value }];
        let axes = [(0, 9, Kind::Serial), (1, lanes, Kind::Vector)];
        let size = 9 * lanes;
        let loops = kernel([size, size], nest(&axes, body));
        // Cranelift's emitter has no such choice, so that there is nothing to compare with.
        let wide = compile(&loops, lanes, Dots::default(), false).unwrap();
        let mut buffers = [(1..=size).map(|k| k as f32).collect(), vec![0.0; size]];
        model(&loops, &wide.code, &mut buffers, (0, 1));
        let [x, y] = buffers;
        assert_eq!(y[..3 * lanes], x[..3 * lanes]);
        assert!(y[3 * lanes..].iter().all(|&v| v == 0.25));
    }
}

#[test]
fn lanes_may_be_read_one_by_one() {
    for lanes in LEVELS {
        for step in [2i64, 3, 17, -1, -4] {
            let size = 5 * lanes;
            let room = size * step.unsigned_abs() as usize + 1;
            let first = if step < 0 { room as i64 - 1 } else { 0 };
            let from = at(&[(0, step * lanes as i64), (1, step)], first);
            let store = Stmt::Store {
                buffer: 1,
                place: at(&[(0, lanes as i64), (1, 1)], 0),
                value: Expr::Load(0, from),
            };
            let axes = [(0, 5, Kind::Parallel), (1, lanes, Kind::Vector)];
            let loops = kernel([room, size], nest(&axes, vec![store]));
            let x: Vec<f32> = (0..room).map(|k| k as f32 + 0.5).collect();
            let want: Vec<f32> = (0..size as i64).map(|k| x[(first + step * k) as usize]).collect();
            assert_eq!(agree(&loops, lanes, &x), want, "{lanes} lanes, {step} apart");
        }
    }
}

#[test]
fn folds_are_trees() {
    for (lanes, vectors) in [(8, 4), (16, 4), (16, 1), (8, 1)] {
        let size = vectors * lanes;
        let x: Vec<f32> = (0..size).map(|k| ((k * 7919 % 101) as f32).exp2()).collect();
        for f in [ReduceFn::Sum, ReduceFn::Prod, ReduceFn::Max, ReduceFn::Min] {
            let offsets = (0..vectors).map(|k| (lanes * k) as i64);
            let read = offsets
                .map(|offset| Stmt::Store {
                    buffer: 2,
                    place: at(&[], offset),
                    value: Expr::Load(0, at(&[(1, 1)], offset)),
                })
                .collect();
            let mut body = nest(&[(1, lanes, Kind::Vector)], read);
            let value = Expr::Fold(f, 2);
            body.push(Stmt::Store { buffer: 1, place: at(&[], 0), value });
            agree(&kernel([size, 1], body), lanes, &x);
        }
    }
}

#[test]
fn values_that_do_not_fit_into_registers() {
    for (count, lanes) in
        [3, 15, 16, 17, 31, 32, 33, 70].into_iter().flat_map(|c| LEVELS.map(|l| (c, l)))
    {
        let x: Vec<f32> = (0..lanes * count).map(|k| (k * k % 97) as f32).collect();
        let loops = pressing(count, 2, lanes);
        let y = agree(&loops, lanes, &x);
        for (k, &found) in y.iter().enumerate() {
            let from = lanes * (count - 1 - k / lanes) + k % lanes;
            assert_eq!(found, x[from] + x[0] + x[lanes], "{count} values, element {k}");
        }
        let registers = 2 * lanes;
        let asm = compile(&loops, lanes, Dots::default(), true).unwrap().asm;
        let spills = asm.contains("[rsp");
        assert!(count.abs_diff(registers) < 2 || spills == (count > registers), "{asm}");
    }
}

#[test]
fn masks_that_do_not_fit_into_registers() {
    // The masks of all vectors are known before the first one chooses.
    let count = 12;
    for lanes in LEVELS {
        let lane = |k: usize| at(&[(1, 1)], (lanes * k) as i64);
        let load = |k: usize| Arc::new(Expr::Load(0, lane(k)));
        let zero = Arc::new(Expr::Const(DType::F32, Number::Float(0.0)));
        let masks: Vec<Arc<Expr>> = (0..count)
            .map(|k| Arc::new(Expr::Binary(BinaryFn::Lt, zero.clone(), load(k))))
            .collect();
        let mut body = Vec::new();
        for turn in 0..2 {
            for (k, mask) in masks.iter().enumerate() {
                let chosen = Expr::Select(mask.clone(), load(k), load((k + 1) % count));
                let place = lane(count * turn + k);
                body.push(Stmt::Store { buffer: 1, place, value: chosen });
            }
        }
        let x: Vec<f32> = (0..lanes * count).map(|k| (k * k % 97) as f32 - 48.0).collect();
        let body = nest(&[(1, lanes, Kind::Vector)], body);
        agree(&kernel([x.len(), 2 * x.len()], body), lanes, &x);
    }
}

#[test]
fn places_from_index_arithmetic() {
    // A transposition by quotients and remainders of the flat index, as views that do not
    // compose leave it.
    let [rows, columns] = [13, 35];
    let number = |n| Expr::Const(DType::I64, Number::Int(n));
    let flat = || Expr::Index(at(&[(0, 35), (1, 5), (2, 1)], 0).affine);
    let row = two(BinaryFn::Mul, two(BinaryFn::Rem, flat(), number(rows)), number(columns));
    let place = two(BinaryFn::Add, row, two(BinaryFn::Div, flat(), number(rows)));
    let load = Expr::Load(0, Place { dynamic: Some(Arc::new(place)), ..at(&[(3, 1)], 2) });
    for lanes in LEVELS {
        let axes = [
            (0, rows as usize, Kind::Parallel),
            (1, 7, Kind::Serial),
            (2, 5, Kind::Unroll),
            (3, lanes, Kind::Vector),
        ];
        let step = lanes as i64;
        let to = at(&[(0, 35 * step), (1, 5 * step), (2, step), (3, 1)], 0);
        let body = vec![Stmt::Store { buffer: 1, place: to, value: load.clone() }];
        let x: Vec<f32> = (0..13 * 35 + 2 + lanes).map(|k| k as f32).collect();
        let y = agree(&kernel([x.len(), 13 * 35 * lanes], nest(&axes, body)), lanes, &x);
        for flat in 0..13 * 35 {
            assert_eq!(y[lanes * flat + 3], x[flat % 13 * 35 + flat / 13 + 5], "element {flat}");
        }
    }
}

#[test]
fn the_model_finds_faults() {
    let body = vec![Stmt::Store {
        buffer: 1,
        place: at(&[(0, 1)], 0),
        value: Expr::Load(0, at(&[(0, 1)], 1)),
    }];
    let loops = kernel([10, 10], nest(&[(0, 10, Kind::Serial)], body));
    let wide = compile(&loops, 16, Dots::default(), false).unwrap();
    let (x, mut y) = (vec![0u8; 40], vec![0u8; 40]);
    let lent = vec![Lent::Read(&x), Lent::Write(&mut y)];
    let fault = emulate::run(&wide.code, lent, 0, 1).unwrap_err();
    assert!(fault.contains("vmovss"), "one past the end: {fault}");
    let lent = vec![Lent::Read(&x), Lent::Read(&x)];
    let fault = emulate::run(&wide.code, lent, 0, 1).unwrap_err();
    assert!(fault.contains("writes"), "a buffer that may not change: {fault}");
    // vaddps zmm0, zmm0, zmm1, and ret.
    let code = [0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1, 0xc3];
    let fault = emulate::run(&code, Vec::new(), 0, 1).unwrap_err();
    assert!(fault.contains("ZMM0 has no value yet"), "{fault}");
    // rdtsc
    let fault = emulate::run(&[0x0f, 0x31], Vec::new(), 0, 1).unwrap_err();
    assert!(fault.contains("does not know Rdtsc"), "{fault}");
}
