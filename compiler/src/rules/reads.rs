//! How a kernel reads its arguments: how often it computes the nodes of its body, and how many
//! elements that go into vector lanes do not lie side by side in memory.

use smallvec::{SmallVec, smallvec};

use crate::graph::op::{Op, Type};
use crate::graph::{Body, Node};

/// How far the index of each axis moves from one lane to the next.
type Steps = SmallVec<[i64; 6]>;

/// From this extent on, a reduction along the last axis runs across lanes (`kind.rs`).
const ROW: usize = 16;

/// For each node, how many of its elements the kernel computes or asks for: what windows repeat
/// is computed again for each of them.
pub fn asked(body: &Body) -> Vec<f64> {
    let nodes = &body.nodes;
    let numel = |n: usize| nodes[n].ty.numel() as f64;
    let mut asked = vec![0.0f64; nodes.len()];
    if let Some(root) = asked.last_mut() {
        *root = numel(nodes.len() - 1);
    }
    for n in (0..nodes.len()).rev() {
        for a in nodes[n].args.iter().map(|a| a.index()) {
            let share = match nodes[n].op {
                // What repeats along rows is computed once for each of them.
                Op::Concat(_) | Op::Binary(_) | Op::Select => {
                    asked[n] * numel(a) / numel(n).max(1.0)
                }
                // A reduction asks for all that it folds, a contraction is counted by itself.
                Op::Reduce(..) => asked[n].max(numel(a)),
                Op::Contract(_) => numel(a),
                _ => asked[n],
            };
            asked[a] = asked[a].max(share);
        }
    }
    asked
}

/// How many elements are read one by one, because an argument moves by more than one element from
/// lane to lane; none where it is the data that says which, so that the kernel cannot run in lanes.
/// Operands of contractions are not looked at.
pub fn apart(body: &Body, asked: &[f64]) -> Option<f64> {
    let nodes = &body.nodes;
    let root = nodes.last()?;
    let mut count = 0.0;
    let mut steps: Vec<SmallVec<[Steps; 2]>> = vec![SmallVec::new(); nodes.len()];
    // The result of rows that are folded whole has no lanes.
    let row = |n: &Node| match &n.op {
        Op::Reduce(_, axes) => is_row(axes, &nodes[n.args[0].index()].ty),
        _ => false,
    };
    if root.ty.shape.last() != Some(&1) || !nodes.iter().any(row) {
        steps[nodes.len() - 1].push(along_last(&root.ty));
    } else {
        steps[nodes.len() - 1].push(smallvec![0; root.ty.rank()]);
    }
    for n in (0..nodes.len()).rev() {
        for step in std::mem::take(&mut steps[n]) {
            let node = &nodes[n];
            if matches!(node.op, Op::Input(_)) {
                if !matches!(in_memory(&step, &node.ty), 0 | 1) {
                    count += asked[n];
                }
                continue;
            }
            for (k, arg) in node.args.iter().enumerate() {
                let from = &nodes[arg.index()].ty;
                let step = below(node, k, from, &step)?;
                let known = &mut steps[arg.index()];
                if !known.contains(&step) {
                    known.push(step);
                }
            }
        }
    }
    Some(count)
}

/// Whether a reduction runs across lanes.
fn is_row(axes: &[u8], from: &Type) -> bool {
    let last = from.rank() - 1;
    axes.last().is_some_and(|&a| a as usize == last) && from.shape[last] >= ROW
}

/// Lanes along the last axis that is longer than 1.
fn along_last(ty: &Type) -> Steps {
    let mut steps: Steps = smallvec![0; ty.rank()];
    if let Some(last) = (0..ty.rank()).rev().find(|&d| ty.shape[d] > 1) {
        steps[last] = 1;
    }
    steps
}

/// How many elements of memory lie between one lane and the next.
fn in_memory(steps: &[i64], ty: &Type) -> i64 {
    let mut stride = 1;
    let mut sum = 0;
    for (step, &extent) in steps.iter().zip(&ty.shape).rev() {
        sum += step * stride;
        stride *= extent as i64;
    }
    sum
}

/// The steps of an operand, given those of a node; none where they hang on data.
fn below(node: &Node, operand: usize, from: &Type, steps: &[i64]) -> Option<Steps> {
    let to = &node.ty;
    Some(match &node.op {
        Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast(_) | Op::Bits(_) | Op::Expand(_) => {
            let place = |d: usize| if from.shape[d] == 1 { 0 } else { steps[d] };
            (0..from.rank()).map(place).collect()
        }
        Op::Permute(axes) => {
            let mut moved: Steps = smallvec![0; from.rank()];
            axes.iter().zip(steps).for_each(|(&a, &s)| moved[a as usize] = s);
            moved
        }
        Op::Reshape(_) => spread(in_memory(steps, to), from),
        Op::Slice(ranges) => ranges.iter().zip(steps).map(|(r, s)| r.1 * s).collect(),
        Op::Window(windows) => {
            let first = from.rank() - windows.len();
            let mut moved = Steps::from_slice(&steps[..from.rank()]);
            for (k, &(_, stride, dilation)) in windows.iter().enumerate() {
                let inner = steps[from.rank() + k] * dilation as i64;
                moved[first + k] = steps[first + k] * stride as i64 + inner;
            }
            moved
        }
        Op::Reduce(_, axes) => {
            if is_row(axes, from) {
                along_last(from)
            } else {
                Steps::from_slice(steps)
            }
        }
        Op::Pad(_) if operand == 1 => smallvec![0; from.rank()],
        Op::Pad(_) | Op::Concat(_) => Steps::from_slice(steps),
        Op::Gather(axis) => {
            let axis = *axis as usize;
            let middle = if operand == 0 { to.rank() + 1 - from.rank() } else { from.rank() };
            let index = &steps[axis..axis + middle];
            if operand == 1 {
                return Some(Steps::from_slice(index));
            }
            if index.iter().any(|&s| s != 0) {
                return None;
            }
            let after = &steps[axis + middle..];
            steps[..axis].iter().copied().chain([0]).chain(after.iter().copied()).collect()
        }
        // These stand alone, or look after their operands themselves.
        Op::Contract(_) | Op::Scan(..) | Op::Scatter(_) | Op::Composite(_) | Op::Fused(_) => {
            smallvec![0; from.rank()]
        }
        Op::Input(_) | Op::Const(_) | Op::Iota(..) => Steps::new(),
    })
}

/// A step through memory as one along an axis: the longest that fits.
fn spread(step: i64, ty: &Type) -> Steps {
    let mut steps: Steps = smallvec![0; ty.rank()];
    let mut stride = ty.numel() as i64;
    for (d, &extent) in ty.shape.iter().enumerate() {
        stride /= extent.max(1) as i64;
        if step != 0 && extent > 1 && step % stride.max(1) == 0 {
            steps[d] = step / stride.max(1);
            return steps;
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::DType;

    use super::*;
    use crate::graph::Graph;
    use crate::graph::op::{Axes, ReduceFn, UnaryFn};

    /// A pooling of `exp(p(x))`, its result in the order of x or of p(x).
    fn pool(moved: bool, back: bool) -> Body {
        let axes = |order: [u8; 4]| Op::Permute(Axes::from_slice(&order));
        let mut graph = Graph::default();
        let shape: [usize; 4] = if moved { [1, 9, 9, 8] } else { [1, 8, 9, 9] };
        let mut y = graph.input("x", Type::new(DType::F32, &shape));
        let mut add = |op: Op, y| graph.add(op, &[y], &"n".into()).expect("fits");
        if moved {
            y = add(axes([0, 3, 1, 2]), y);
        }
        y = add(Op::Unary(UnaryFn::Exp), y);
        y = add(Op::Window(smallvec![(3, 2, 1), (3, 2, 1)]), y);
        y = add(Op::Reduce(ReduceFn::Max, Axes::from_slice(&[4, 5])), y);
        y = add(Op::Reshape(smallvec![1, 8, 4, 4]), y);
        if back {
            add(axes([0, 2, 3, 1]), y);
        }
        Body { nodes: graph.nodes }
    }

    #[test]
    fn lanes_are_where_elements_lie_side_by_side() {
        // Along the width, a pooling with steps of two takes every second element.
        let apart = |body: Body| apart(&body, &asked(&body));
        assert_eq!(apart(pool(false, false)), Some(1152.0));
        assert_eq!(apart(pool(true, false)), Some(1152.0));
        assert_eq!(apart(pool(false, true)), Some(1152.0));
        assert_eq!(apart(pool(true, true)), Some(0.0));
    }

    #[test]
    fn windows_ask_again() {
        let body = pool(true, true);
        let exp = body.nodes.iter().position(|n| matches!(n.op, Op::Unary(_)));
        assert_eq!(exp.map(|at| asked(&body)[at]), Some((8 * 4 * 4 * 9) as f64));
    }
}
