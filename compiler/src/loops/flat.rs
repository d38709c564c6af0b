//! Several axes that are counted as one: an index into all of them, and where that leads.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::index::{Index, add};
use super::ir::{Expr, Number, Place, Var};
use super::lower::Lower;
use crate::graph::op::{Affine, BinaryFn};

/// Axes that are counted as one, outermost first, each with its extent.
#[derive(Clone, Debug)]
pub struct Group(Vec<(Var, usize)>);

/// An index into a group: `base + rest`, where the rest stays within the innermost axis if it stays
/// below what divides both the base and that axis.
#[derive(Clone, Debug)]
pub struct Flat {
    /// Where it begins.
    pub base: Affine,
    /// The part that stays within the innermost axis, from a multiple of so many elements on.
    pub rest: (Affine, usize),
}

impl Flat {
    /// The whole index.
    pub fn whole(&self) -> Affine {
        sum(&self.base, &self.rest.0)
    }
}

/// `x + y`
pub fn sum(x: &Affine, y: &Affine) -> Affine {
    let terms = y.terms.iter().fold(x.clone(), |sum, t| sum.plus(t.0.into(), t.1));
    Affine { offset: x.offset + y.offset, ..terms }
}

/// `index * step`
pub fn times(index: &Affine, step: usize) -> Affine {
    let step = step as i64;
    let zero = Affine::constant(index.offset * step);
    index.terms.iter().fold(zero, |sum, t| sum.plus(t.0.into(), t.1 * step))
}

fn number(n: usize) -> Arc<Expr> {
    Arc::new(Expr::Const(DType::U32, Number::Int(n as i128)))
}

impl Group {
    /// The group of these variables.
    pub fn new(lower: &Lower, vars: Vec<Var>) -> Group {
        Group(vars.into_iter().map(|v| (v, lower.extents[usize::from(v)])).collect())
    }

    /// Its axes, outermost first, with their extents.
    pub fn axes(&self) -> &[(Var, usize)] {
        &self.0
    }

    /// How far it counts.
    pub fn extent(&self) -> usize {
        self.0.iter().map(|v| v.1).product()
    }

    /// Its innermost axis.
    pub fn innermost(&self) -> Option<(Var, usize)> {
        self.0.last().copied()
    }

    /// Whether so many neighbours from a multiple of their number on lie on one innermost axis.
    pub fn holds(&self, count: usize) -> bool {
        self.innermost().is_some_and(|v| v.1.is_multiple_of(count))
    }

    /// A place with the axes of the group at an index: what is no sum of variables is computed.
    pub fn place(&self, place: &Affine, at: &Flat) -> Index {
        let mut out = Place::affine(place.clone());
        for &(var, _) in &self.0 {
            out.affine.terms.retain(|t| t.0 != var);
        }
        let coefficient = |n: usize| place.coefficient(self.0[n].0.into());
        let mut last = self.0.len();
        while last > 0 {
            // Axes that move on together as they are counted.
            let mut first = last - 1;
            while first > 0 && coefficient(first - 1) == coefficient(first) * self.0[first].1 as i64
            {
                first -= 1;
            }
            if coefficient(last - 1) != 0 {
                out = add(&out, &self.run(first..last, coefficient(last - 1), at));
            }
            last = first;
        }
        out
    }

    /// What some of its axes add that move on together, by so much from one element to the next.
    fn run(&self, axes: std::ops::Range<usize>, step: i64, at: &Flat) -> Index {
        let inside: usize = self.0[axes.end..].iter().map(|v| v.1).product();
        let own: usize = self.0[axes.clone()].iter().map(|v| v.1).product();
        let times = |a: &Affine| {
            let zero = Affine { offset: a.offset * step, ..Affine::default() };
            a.terms.iter().fold(zero, |sum, t| sum.plus(t.0.into(), t.1 * step))
        };
        if inside == 1 && axes.start == 0 {
            return Place::affine(times(&at.whole()));
        }
        // The rest does not leave the innermost axis: it counts there only.
        let within = self.holds(at.rest.1);
        let counted = if within { at.base.clone() } else { at.whole() };
        let index = Arc::new(Expr::Index(counted));
        let mut value = Arc::new(Expr::Cast(DType::U32, index));
        if inside > 1 {
            value = Arc::new(Expr::Binary(BinaryFn::Div, value, number(inside)));
        }
        if axes.start > 0 {
            value = Arc::new(Expr::Binary(BinaryFn::Rem, value, number(own)));
        }
        let value = Arc::new(Expr::Cast(DType::I64, value));
        let step_value = Arc::new(Expr::Const(DType::I64, Number::Int(step.into())));
        let dynamic = Some(Arc::new(Expr::Binary(BinaryFn::Mul, value, step_value)));
        let rest = if within && inside == 1 { times(&at.rest.0) } else { Affine::default() };
        Place { affine: rest, dynamic }
    }
}
