//! What the suite does not reach: pressure on registers, and the bytes themselves.

use std::sync::Arc;

use kiln_runtime::code::Code;
use kiln_runtime::tensor::DType;

use super::compile;
use crate::backend::cpu::Cpu;
use crate::graph::op::{Affine, BinaryFn};
use crate::loops::ir::{Buffer, Expr, Kind, Loops, Param, Place, Scope, Stmt};

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

/// Runs a kernel on its buffers.
fn run(code: &[u8], buffers: &[*mut u8]) {
    let code = Code::load(code, vec![0]).expect("the system lets tests load code");
    // SAFETY: the kernel reads and writes the buffers that its loops name, which are as long.
    unsafe { code.entry(0)(buffers.as_ptr(), 0, 1) };
}

#[test]
fn values_that_do_not_fit_into_registers() {
    if Cpu::host(true).wide_lanes != 8 {
        return;
    }
    for count in [3, 15, 16, 17, 40] {
        let compiled = compile(&pressing(count, 2), 8, true).unwrap();
        let x: Vec<f32> = (0..8 * count).map(|k| (k * k % 97) as f32).collect();
        let mut y = vec![0f32; 8 * count];
        run(&compiled.code, &[x.as_ptr() as *mut u8, y.as_mut_ptr() as *mut u8]);
        for k in 0..8 * count {
            let from = 8 * (count - 1 - k / 8) + k % 8;
            assert_eq!(y[k], x[from] + x[0] + x[8], "{count} values, element {k}");
        }
        let spills = compiled.asm.contains("[rsp");
        assert!(count.abs_diff(16) < 2 || spills == (count > 16), "{}", compiled.asm);
    }
}
