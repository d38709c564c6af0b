//! Constants that hang on the lengths of dims. A graph for ranges of dims has them as they are for
//! the greatest lengths. What they are for other lengths is kept beside, so that a number is found
//! that does not grow as the dims do: the smaller one of a length and 3, say.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use kiln_runtime::plan::PlanDim;
use kiln_runtime::tensor::DType;

use super::eval::{Data, Value, eval_op};
use super::op::{Op, Type};
use super::used::{Span, span};
use super::{Constant, Graph, NodeId, Origin};

/// Lengths of one dim that are tried: all of them, where there are no more; else those near the
/// ends, and as many between.
const EACH: i64 = 4096;
const NEAR: i64 = 128;
/// Lengths of several dims at once that are tried.
const TOGETHER: usize = 64;

/// Lengths of dims that are tried, and constants that hang on them.
#[derive(Clone, Debug, Default)]
pub struct Lengths {
    /// By how much each dim is shorter than the longest, in each trial.
    trials: Arc<Vec<Vec<i64>>>,
    /// What constants are in each trial, by their numbers.
    others: HashMap<u32, Arc<Vec<Value>>>,
}

impl Lengths {
    /// The trials for dims: those with one shorter dim by 1 come first, in the order of the dims.
    pub fn new(dims: &[PlanDim]) -> Lengths {
        let spans: Vec<i64> = dims.iter().map(|dim| (dim.most - dim.least) as i64).collect();
        let only = |dim: usize, shorter: i64| {
            let mut trial = vec![0; dims.len()];
            trial[dim] = shorter.min(spans[dim]);
            trial
        };
        let mut trials: Vec<Vec<i64>> = (0..dims.len()).map(|dim| only(dim, 1)).collect();
        for (dim, &span) in spans.iter().enumerate() {
            let near = if span <= EACH { span } else { NEAR };
            let between = if span <= EACH { 0 } else { EACH };
            trials.extend((2..=near).map(|shorter| only(dim, shorter)));
            trials.extend((1..between).map(|i| only(dim, i * (span / between))));
            trials.extend((0..near.min(span - near)).map(|longer| only(dim, span - longer)));
        }
        if dims.len() > 1 {
            // Steps of a Weyl sequence: spread evenly, and the same in every run.
            let part = |i: usize, dim: usize| (i + 1) as f64 * f64::sqrt(2.5 + dim as f64) % 1.0;
            let shorter = |i, dim: usize| (part(i, dim) * (spans[dim] + 1) as f64).floor() as i64;
            trials.extend(
                (0..TOGETHER).map(|i| (0..dims.len()).map(|dim| shorter(i, dim)).collect()),
            );
        }
        Lengths { trials: Arc::new(trials), others: HashMap::new() }
    }

    /// Whether a constant is another one for other lengths.
    pub fn hangs(&self, constant: u32) -> bool {
        self.others.contains_key(&constant)
    }
}

impl Graph {
    /// The constant of a node that is one, and what it is for other lengths.
    fn hanging(&self, id: NodeId) -> Option<&Arc<Vec<Value>>> {
        match self.node(id).op {
            Op::Const(constant) => self.lengths.others.get(&constant),
            _ => None,
        }
    }

    /// Whether a node is a constant that does not grow as the dims do.
    pub fn is_bent(&self, id: NodeId) -> bool {
        let Some(others) = self.hanging(id) else { return false };
        let Some(longest) = self.constant(id).map(Value::from_constant) else { return false };
        let number = |value: &Value, at: usize| match &value.data {
            Data::Int(all) => all[at] as f64,
            Data::Float(all) => all[at],
        };
        (0..longest.ty.numel()).any(|at| {
            let most = number(&longest, at);
            // Per element that a dim is shorter.
            let slopes: Vec<f64> =
                (0..self.dims.len()).map(|dim| number(&others[dim], at) - most).collect();
            let grown = |trial: &[i64]| {
                slopes.iter().zip(trial).fold(most, |sum, (slope, &n)| sum + slope * n as f64)
            };
            let mut pairs = self.lengths.trials.iter().zip(others.iter());
            pairs.any(|(trial, value)| number(value, at) != grown(trial))
        })
    }

    /// A list of numbers that hang on the extents of a value.
    pub fn of_extents(
        &mut self,
        x: NodeId,
        shape: &[usize],
        numbers: impl Fn(&[i64]) -> Vec<i64>,
        origin: &Origin,
    ) -> NodeId {
        let ty = self.ty(x);
        let mut extents: Vec<i64> = ty.shape.iter().map(|&extent| extent as i64).collect();
        let list = |extents: &[i64]| {
            let numbers = numbers(extents).into_iter().map(i128::from);
            Value { ty: Type::new(DType::I64, shape), data: Data::Int(numbers.collect()) }
        };
        let longest = list(&extents);
        let spans = (0..ty.rank()).filter_map(|axis| match span(ty, axis)? {
            Span::Dim { dim, .. } => Some((axis, usize::from(dim))),
            Span::Mixed => None,
        });
        let spans: Vec<(usize, usize)> = spans.collect();
        let others = (!spans.is_empty()).then(|| {
            let trial = |trial: &Vec<i64>| {
                for &(axis, dim) in &spans {
                    extents[axis] = self.ty(x).shape[axis] as i64 - trial[dim];
                }
                list(&extents)
            };
            self.lengths.trials.iter().map(trial).collect::<Vec<_>>()
        });
        let others = others.filter(|others| others.iter().any(|other| *other != longest));
        self.constant_for(&longest, others, origin)
    }

    /// What folding an operation gives for other lengths; none where it is always the same.
    pub(super) fn fold_elsewhere(
        &self,
        op: &Op,
        args: &[NodeId],
        (ty, value): (&Type, &Value),
    ) -> Option<Vec<Value>> {
        if args.iter().all(|&arg| self.hanging(arg).is_none()) {
            return None;
        }
        let longest: Vec<Value> = args
            .iter()
            .map(|&arg| self.constant(arg).map(Value::from_constant))
            .collect::<Option<_>>()?;
        let of = |trial: usize| {
            let pick = |(i, &arg): (usize, &NodeId)| {
                self.hanging(arg).map_or(&longest[i], |others| &others[trial])
            };
            eval_op(op, &args.iter().enumerate().map(pick).collect::<Vec<_>>(), ty)
        };
        let others: Vec<Value> = (0..self.lengths.trials.len()).map(of).collect();
        others.iter().any(|other| other != value).then_some(others)
    }

    /// A constant, with what it is for other lengths, if that is not always the same. Such a one is
    /// shared with no other.
    pub(super) fn constant_for(
        &mut self,
        value: &Value,
        others: Option<Vec<Value>>,
        origin: &Origin,
    ) -> NodeId {
        let tensor = value.to_tensor();
        let Some(others) = others else { return self.tensor(&tensor, origin) };
        let index = self.constants.len() as u32;
        let (ty, bytes) = (value.ty.clone(), Bytes::copy_from_slice(tensor.bytes()));
        Arc::make_mut(&mut self.constants).push(Constant { ty: ty.clone(), bytes });
        self.lengths.others.insert(index, Arc::new(others));
        self.push(Op::Const(index), super::Args::new(), ty, origin)
    }
}

#[cfg(test)]
mod tests {
    use super::super::op::{BinaryFn, ReduceFn};
    use super::super::used::Used;
    use super::*;

    /// A graph with an input of 16 rows, of which 0 to 16 are in use, and their number.
    fn rows() -> (Graph, NodeId, Origin) {
        let dims = vec![
            PlanDim { name: "n".into(), least: 0, most: 16 },
            PlanDim { name: "m".into(), least: 1, most: 9 },
        ];
        let mut graph = Graph { lengths: Lengths::new(&dims), dims, ..Graph::default() };
        let spans = [(0, Span::Dim { dim: 0, more: 0 }), (1, Span::Dim { dim: 1, more: 1 })];
        let ty = Type { used: Used::from_slice(&spans), ..Type::new(DType::F32, &[16, 10]) };
        let x = graph.input("x", ty);
        let origin = Origin::from("shape");
        let extents = graph.of_extents(x, &[2], <[i64]>::to_vec, &origin);
        (graph, extents, origin)
    }

    #[test]
    fn what_grows_with_dims_is_known() {
        let (mut g, extents, o) = rows();
        let origin = &o;
        assert_eq!(g.value(extents).and_then(|v| v.as_i64s()), Some(vec![16, 10]));
        let twice = g.binary_number(BinaryFn::Mul, extents, 2.0, origin).expect("a product");
        let sum = g.reduce(ReduceFn::Sum, twice, &[0], origin).expect("a sum");
        assert_eq!(g.value(sum).and_then(|v| v.as_i64s()), Some(vec![52]));
        // An equal number that hangs on nothing is another constant.
        let other = g.i64s(&[1], &[52], origin);
        assert!(other != sum && g.hanging(other).is_none() && g.hanging(sum).is_some());
        let none = g.binary_number(BinaryFn::Mul, sum, 0.0, origin).expect("a product");
        assert!(g.hanging(none).is_none() && g.value(none).is_some());
        // Whether a length is negative is always the same.
        let least = g.binary_number(BinaryFn::Lt, extents, 0.0, origin).expect("a comparison");
        assert!(g.hanging(least).is_none());
    }

    #[test]
    fn what_does_not_grow_with_dims_is_not_known() {
        let (mut g, extents, o) = rows();
        for (f, number) in [(BinaryFn::Min, 3.0), (BinaryFn::Eq, 7.0), (BinaryFn::Rem, 5.0)] {
            let bent = g.binary_number(f, extents, number, &o).expect("a number");
            assert!(g.constant(bent).is_some() && g.value(bent).is_none(), "{f:?} {number}");
        }
        // In proportion to each dim, not to both.
        let product = g.reduce(ReduceFn::Prod, extents, &[0], &o).expect("a product");
        assert!(g.value(product).is_none());
    }
}
