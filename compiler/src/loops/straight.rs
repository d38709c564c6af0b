//! Straight code in lanes, and the transforms of Winograd's minimal filtering as such.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::ir::{BufferId, Expr, Kind, Number, Place, Stmt, Var};
use super::lower::Lower;
use crate::graph::op::{Affine, BinaryFn};

/// Statements one after another, whose values are named: each stands in a register of its own.
pub struct Straight {
    registers: BufferId,
    lanes: usize,
    lane: Var,
    count: usize,
    whole: bool,
    body: Vec<Stmt>,
}

impl Straight {
    /// No statements yet, in the lanes of a variable; of integers or of f32.
    pub fn new(lower: &mut Lower, lane: Var, whole: bool) -> Straight {
        let lanes = lower.target.lanes;
        let registers = lower.register(if whole { DType::I32 } else { DType::F32 }, 0);
        Straight { registers, lanes, lane, count: 0, whole, body: Vec::new() }
    }

    fn number(&self, value: f64) -> Expr {
        match self.whole {
            true => Expr::Const(DType::I32, Number::Int(value as i128)),
            false => Expr::Const(DType::F32, Number::Float(value)),
        }
    }

    /// A value of memory as it is computed with.
    pub fn load(&self, buffer: BufferId, place: Place) -> Expr {
        match self.whole {
            true => Expr::Cast(DType::I32, Arc::new(Expr::Load(buffer, place))),
            false => Expr::Load(buffer, place),
        }
    }

    /// Stores a value in memory of inputs or of weights.
    pub fn store(&mut self, buffer: BufferId, place: Place, value: Expr) {
        let value = if self.whole { Expr::Cast(DType::I16, Arc::new(value)) } else { value };
        self.body.push(Stmt::Store { buffer, place, value });
    }

    /// Keeps a value and gives it back as a name.
    pub fn keep(&mut self, value: Expr) -> Expr {
        let place = self.place(self.count);
        self.count += 1;
        self.body.push(Stmt::Store { buffer: self.registers, place: place.clone(), value });
        Expr::Load(self.registers, place)
    }

    /// More statements.
    pub fn extend(&mut self, more: Vec<Stmt>) {
        self.body.extend(more);
    }

    fn place(&self, number: usize) -> Place {
        Place::affine(Affine {
            offset: (number * self.lanes) as i64,
            ..Affine::axis(self.lane.into())
        })
    }

    /// A quarter of what is a multiple of 4.
    pub fn quarter(&mut self, x: Expr) -> Expr {
        let four = Arc::new(self.number(4.0));
        self.keep(Expr::Binary(BinaryFn::Div, Arc::new(x), four))
    }

    /// `x + c * y`, with as little work as that takes.
    fn sum(&mut self, x: &Expr, c: f64, y: &Expr) -> Expr {
        let [a, b] = [x, y].map(|e| Arc::new(e.clone()));
        let value = match c {
            1.0 => Expr::Binary(BinaryFn::Add, a, b),
            -1.0 => Expr::Binary(BinaryFn::Sub, a, b),
            c => Expr::Fma(Arc::new(self.number(c)), b, a),
        };
        self.keep(value)
    }

    /// `sum of c * x` for every row of a matrix.
    fn times(&mut self, rows: &[&[f64]], x: &[Expr]) -> Vec<Expr> {
        let row = |row: &&[f64]| {
            let mut sum: Option<Expr> = None;
            for (&c, x) in row.iter().zip(x).filter(|(c, _)| **c != 0.0) {
                sum = Some(match (sum, c) {
                    (None, 1.0) => x.clone(),
                    (None, c) => {
                        let (c, x) = (Arc::new(self.number(c)), Arc::new(x.clone()));
                        self.keep(Expr::Binary(BinaryFn::Mul, c, x))
                    }
                    (Some(sum), c) => self.sum(&sum, c, x),
                });
            }
            sum.unwrap_or_else(|| self.number(0.0))
        };
        rows.iter().map(row).collect()
    }

    /// Applies a transform to the columns of a square of `width` by `width` elements, then to the
    /// rows of what comes out.
    pub fn both(
        &mut self,
        width: usize,
        element: impl Fn(&Straight, [usize; 2]) -> Expr,
        transform: impl Fn(&mut Straight, &[Expr]) -> Vec<Expr>,
    ) -> Vec<Vec<Expr>> {
        let mut column = |j: usize| {
            let given = (0..width).map(|i| {
                let value = element(self, [i, j]);
                self.keep(value)
            });
            let given: Vec<Expr> = given.collect();
            transform(self, &given)
        };
        let columns: Vec<Vec<Expr>> = (0..width).map(&mut column).collect();
        let height = columns.first().map_or(0, Vec::len);
        let row = |i: usize| columns.iter().map(|column| column[i].clone()).collect::<Vec<Expr>>();
        (0..height).map(|i| transform(self, &row(i))).collect()
    }

    /// The statements in lanes.
    pub fn finish(self, lower: &mut Lower) -> Vec<Stmt> {
        lower.buffers[self.registers].len = (self.count * self.lanes).max(1);
        let (var, extent) = (self.lane, self.lanes);
        vec![Stmt::For { var, extent, kind: Kind::Vector, body: self.body }]
    }
}

/// The points of F(4, 3) are 0, these with both signs, and infinity. With 1 and 2, whose numbers
/// are integers, results have some three times the error.
const A: f64 = 0.625;
const B: f64 = 1.5;
const AA: f64 = A * A;
const BB: f64 = B * B;

/// G: 3 weights to n numbers.
pub fn weights(s: &mut Straight, m: usize, g: &[Expr]) -> Vec<Expr> {
    match m {
        2 if s.whole => s.times(&[&[2.0], &[1.0; 3], &[1.0, -1.0, 1.0], &[0.0, 0.0, 2.0]], g),
        2 => s.times(&[&[1.0], &[0.5, 0.5, 0.5], &[0.5, -0.5, 0.5], &[0.0, 0.0, 1.0]], g),
        _ => {
            let point = |x: f64, other: f64| {
                let product = 2.0 * x * x * (x * x - other * other);
                [1.0, x, x * x].map(|c| c / product)
            };
            let rows = [point(A, B), point(-A, B), point(B, A), point(-B, A)];
            let first = [1.0 / (AA * BB)];
            s.times(&[&first, &rows[0], &rows[1], &rows[2], &rows[3], &[0.0, 0.0, 1.0]], g)
        }
    }
}

/// The transpose of B: n elements of the input to n numbers. Numbers that differ in a sign share
/// their halves.
pub fn inputs(s: &mut Straight, m: usize, d: &[Expr]) -> Vec<Expr> {
    if m == 2 {
        let rows: [&[f64]; 4] =
            [&[1.0, 0.0, -1.0], &[0.0, 1.0, 1.0], &[0.0, -1.0, 1.0], &[0.0, 1.0, 0.0, -1.0]];
        return s.times(&rows, d);
    }
    let (even, odd) = (s.sum(&d[4], -BB, &d[2]), s.sum(&d[3], -BB, &d[1]));
    let (near, far) = (s.sum(&d[4], -AA, &d[2]), s.sum(&d[3], -AA, &d[1]));
    let (first, last) = (s.sum(&d[4], AA * BB, &d[0]), s.sum(&d[5], AA * BB, &d[1]));
    vec![
        s.sum(&first, -AA - BB, &d[2]),
        s.sum(&even, A, &odd),
        s.sum(&even, -A, &odd),
        s.sum(&near, B, &far),
        s.sum(&near, -B, &far),
        s.sum(&last, -AA - BB, &d[3]),
    ]
}

/// The transpose of A: n sums to m results.
pub fn results(s: &mut Straight, m: usize, x: &[Expr]) -> Vec<Expr> {
    if m == 2 {
        return s.times(&[&[1.0, 1.0, 1.0], &[0.0, 1.0, -1.0, -1.0]], x);
    }
    let (even, odd) = (s.sum(&x[1], 1.0, &x[2]), s.sum(&x[1], -1.0, &x[2]));
    let (more, less) = (s.sum(&x[3], 1.0, &x[4]), s.sum(&x[3], -1.0, &x[4]));
    let first = s.sum(&x[0], 1.0, &even);
    let mut both = |a: f64, x: &Expr, b: f64, y: &Expr| {
        let (a, x) = (Arc::new(s.number(a)), Arc::new(x.clone()));
        let sum = s.keep(Expr::Binary(BinaryFn::Mul, a, x));
        s.sum(&sum, b, y)
    };
    let [second, third, last] =
        [both(A, &odd, B, &less), both(AA, &even, BB, &more), both(AA * A, &odd, BB * B, &less)];
    vec![s.sum(&first, 1.0, &more), second, third, s.sum(&last, 1.0, &x[5])]
}
