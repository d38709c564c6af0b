//! What the suite does not reach: pressure on registers, pieces of parallel loops, special values,
//! and that results are those of Cranelift, bit by bit.

use std::sync::Arc;

use kiln_runtime::code::Code;
use kiln_runtime::tensor::DType;

use super::compile;
use crate::backend::cpu::{Cpu, clif};
use crate::graph::op::{Affine, BinaryFn, ReduceFn, UnaryFn};
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

/// `count` vectors are read, kept over a loop of `turns` that adds the first to each, and stored
/// in the opposite order.
fn pressing(count: usize, turns: usize) -> Loops {
    let cell = |k: usize| at(&[], k as i64);
    let lane = |k: usize| at(&[(1, 1)], 8 * k as i64);
    let vector = |body: Vec<Stmt>| Stmt::For { var: 1, extent: 8, kind: Kind::Vector, body };
    let store = |buffer, place, value| Stmt::Store { buffer, place, value };
    let load = |buffer, place| Arc::new(Expr::Load(buffer, place));
    let read = (0..count).map(|k| store(2, cell(k), Expr::Load(0, lane(k)))).collect();
    let add = (0..count)
        .map(|k| {
            let sum = Expr::Binary(BinaryFn::Add, load(2, cell(k)), load(0, at(&[(0, 8)], 0)));
            store(2, cell(k), sum)
        })
        .collect();
    let write = (0..count).map(|k| store(1, lane(count - 1 - k), Expr::Load(2, cell(k)))).collect();
    let body = vec![vector(add)];
    let sums = Stmt::For { var: 0, extent: turns, kind: Kind::Serial, body };
    Loops {
        name: "pressing".into(),
        buffers: vec![
            buffer(8 * count, Scope::Global, Param::Arg(0)),
            buffer(8 * count, Scope::Global, Param::Out),
            buffer(count, Scope::Register, Param::None),
        ],
        body: vec![vector(read), sums, vector(write)],
    }
}

/// Runs a kernel on its buffers, from `begin` to `end`.
fn run(code: &[u8], buffers: &[*mut u8], begin: i64, end: i64) {
    let code = Code::load(code, vec![0]).expect("the system lets tests load code");
    // SAFETY: the kernel reads and writes the buffers that its loops name, which are as long.
    unsafe { code.entry(0)(buffers.as_ptr(), begin, end) };
}

/// Runs a kernel with an input and an output buffer, in pieces, by both emitters.
fn agree(loops: &Loops, x: &[f32]) -> Vec<f32> {
    let cpu = Cpu::host(true);
    let isa = clif::target_isa(&cpu.triple, &cpu.features, true).unwrap();
    let compiled =
        [compile(loops, 8, true).unwrap(), clif::compile(loops, &*isa, 8, false).unwrap()];
    assert!(!compiled[0].asm.contains("(bad)"), "{}", compiled[0].asm);
    let turns = loops.parallel_extent() as i64;
    let pieces = [0, turns / 3, turns / 2, turns];
    let results = compiled.map(|compiled| {
        let mut y = vec![-7f32; loops.buffers[1].len];
        let buffers = [x.as_ptr() as *mut u8, y.as_mut_ptr() as *mut u8];
        for piece in pieces.windows(2).filter(|p| p[0] < p[1]) {
            run(&compiled.code, &buffers, piece[0], piece[1]);
        }
        y
    });
    let bits = |v: &[f32]| v.iter().map(|v| if v.is_nan() { 1 } else { v.to_bits() }).collect();
    let [wide, narrow]: [Vec<u32>; 2] = [bits(&results[0]), bits(&results[1])];
    assert_eq!(wide, narrow);
    let [wide, _] = results;
    wide
}

fn skip() -> bool {
    Cpu::host(true).wide_lanes != 8
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
    Loops { name: "k".into(), buffers, body }
}

fn two(f: BinaryFn, x: Expr, y: Expr) -> Expr {
    Expr::Binary(f, Arc::new(x), Arc::new(y))
}

#[test]
fn parallel_loops_in_pieces() {
    if skip() {
        return;
    }
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
    let y = agree(&kernel([x, x], nest(&axes, body)), &input);
    let mut sorted = y.clone();
    sorted.sort_by(f32::total_cmp);
    assert_eq!(sorted, input, "every element is read once");
    let (i, j, k, l) = (5, 4, 3, 2);
    let from = i + a * (b - 1 - j) + k * a * b * d + l * a * b;
    assert_eq!(y[195 * i + 15 * j + 3 * k + l], from as f32);
    // One parallel loop counts by itself.
    let body = vec![Stmt::Store {
        buffer: 1,
        place: at(&[(0, 8), (1, 1)], 0),
        value: Expr::Load(0, at(&[(0, -8), (1, 1)], 8 * 99)),
    }];
    let input: Vec<f32> = (0..800).map(|k| k as f32).collect();
    let axes = [(0, 100, Kind::Parallel), (1, 8, Kind::Vector)];
    let y = agree(&kernel([800, 800], nest(&axes, body)), &input);
    assert_eq!(&y[8 * 30..8 * 31], &input[8 * 69..8 * 70]);
}

#[test]
fn special_values() {
    if skip() {
        return;
    }
    let special = [f32::NAN, 0.0, -0.0, 1.5, -2.5, f32::INFINITY, f32::NEG_INFINITY, 1e-40];
    let mut x = Vec::new();
    for first in special {
        x.extend([first; 8]);
        x.extend(special);
    }
    let load = |k: i64| Expr::Load(0, at(&[(0, 16), (1, 1)], 8 * k));
    let literal = |v: f64| Expr::Const(DType::F32, Number::Float(v));
    let zero_one =
        |c: Expr| Expr::Select(Arc::new(c), Arc::new(literal(1.0)), Arc::new(literal(f64::NAN)));
    let mut values = Vec::new();
    for f in [BinaryFn::Max, BinaryFn::Min, BinaryFn::Sub, BinaryFn::Div] {
        values.push(two(f, load(0), load(1)));
        values.push(two(f, load(0), literal(0.5)));
        values.push(two(f, literal(-0.0), load(1)));
    }
    for f in [BinaryFn::Lt, BinaryFn::Le, BinaryFn::Eq, BinaryFn::Ne] {
        values.push(zero_one(two(f, load(0), load(1))));
        values.push(zero_one(two(f, literal(1.5), load(1))));
    }
    for f in [UnaryFn::Sign, UnaryFn::Neg, UnaryFn::Abs, UnaryFn::Recip, UnaryFn::Round] {
        values.push(Expr::Unary(f, Arc::new(load(1))));
    }
    for value in values {
        for lane in [Kind::Vector, Kind::Serial] {
            let place = at(&[(0, 8), (1, 1)], 0);
            let body = vec![Stmt::Store { buffer: 1, place, value: value.clone() }];
            agree(&kernel([128, 64], nest(&[(0, 8, Kind::Serial), (1, 8, lane)], body)), &x);
        }
    }
}

#[test]
fn conditions_on_indices() {
    if skip() {
        return;
    }
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
    let a = agree(&kernel([99, 99], nest(&axes, store(chosen))), &x);
    let b = agree(&kernel([99, 99], nest(&axes, branch)), &x);
    assert_eq!(a, b);
    assert_eq!((a[9 * 4 + 4], a[9 * 4 + 5], a[9 * 8 + 3]), (41.0, 0.25, 0.25));
}

#[test]
fn folds_are_trees() {
    if skip() {
        return;
    }
    let x: Vec<f32> = (0..32).map(|k| ((k * 7919 % 101) as f32).exp2()).collect();
    for f in [ReduceFn::Sum, ReduceFn::Prod, ReduceFn::Max, ReduceFn::Min] {
        let read = (0..4)
            .map(|k| Stmt::Store {
                buffer: 2,
                place: at(&[], 8 * k),
                value: Expr::Load(0, at(&[(1, 1)], 8 * k)),
            })
            .collect();
        let mut body = nest(&[(1, 8, Kind::Vector)], read);
        let value = Expr::Fold(f, 2);
        body.push(Stmt::Store { buffer: 1, place: at(&[], 0), value });
        agree(&kernel([32, 1], body), &x);
    }
}

#[test]
fn values_that_do_not_fit_into_registers() {
    if skip() {
        return;
    }
    for count in [3, 15, 16, 17, 40] {
        let compiled = compile(&pressing(count, 2), 8, true).unwrap();
        let x: Vec<f32> = (0..8 * count).map(|k| (k * k % 97) as f32).collect();
        let mut y = vec![0f32; 8 * count];
        run(&compiled.code, &[x.as_ptr() as *mut u8, y.as_mut_ptr() as *mut u8], 0, 1);
        for (k, &found) in y.iter().enumerate() {
            let from = 8 * (count - 1 - k / 8) + k % 8;
            assert_eq!(found, x[from] + x[0] + x[8], "{count} values, element {k}");
        }
        let spills = compiled.asm.contains("[rsp");
        assert!(count.abs_diff(16) < 2 || spills == (count > 16), "{}", compiled.asm);
    }
}

#[test]
fn places_from_index_arithmetic() {
    if skip() {
        return;
    }
    // A transposition by quotients and remainders of the flat index, as views that do not
    // compose leave it.
    let [rows, columns] = [13, 35];
    let number = |n| Expr::Const(DType::I64, Number::Int(n));
    let flat = || Expr::Index(at(&[(0, 35), (1, 5), (2, 1)], 0).affine);
    let row = two(BinaryFn::Mul, two(BinaryFn::Rem, flat(), number(rows)), number(columns));
    let place = two(BinaryFn::Add, row, two(BinaryFn::Div, flat(), number(rows)));
    let load = Expr::Load(0, Place { dynamic: Some(Arc::new(place)), ..at(&[(3, 1)], 2) });
    let axes = [
        (0, rows as usize, Kind::Parallel),
        (1, 7, Kind::Serial),
        (2, 5, Kind::Unroll),
        (3, 8, Kind::Vector),
    ];
    let to = at(&[(0, 280), (1, 40), (2, 8), (3, 1)], 0);
    let body = vec![Stmt::Store { buffer: 1, place: to, value: load }];
    let x: Vec<f32> = (0..13 * 35 + 10).map(|k| k as f32).collect();
    let y = agree(&kernel([x.len(), 13 * 35 * 8], nest(&axes, body)), &x);
    for flat in 0..13 * 35 {
        assert_eq!(y[8 * flat + 3], x[flat % 13 * 35 + flat / 13 + 5], "element {flat}");
    }
}
