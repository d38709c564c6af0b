//! Indices that are known to say where they stand: an index that counts along an axis reads what a
//! view has as well, without a table of places.

use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::call::Call;
use crate::error::Diagnostic;
use crate::graph::op::{BinaryFn, Op};
use crate::graph::{Graph, NodeId};

/// What all elements of an index are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// A number.
    At(i64),
    /// Their own place along an axis.
    Along(usize),
}

/// What the elements of an integer value are, where its nodes tell.
pub(super) fn place(graph: &Graph, id: NodeId) -> Option<Place> {
    let (node, shape) = (graph.node(id), &graph.ty(id).shape);
    let number = |id: NodeId| match place(graph, id) {
        Some(Place::At(number)) => Some(number),
        Some(Place::Along(_)) | None => None,
    };
    let found = match &node.op {
        Op::Const(_) => counted(graph, id)?,
        Op::Iota(_, axis) => Place::Along((*axis).into()),
        Op::Cast(DType::I64 | DType::I32) => place(graph, node.args[0])?,
        Op::Binary(BinaryFn::Mul) if number(node.args[1]) == Some(1) => place(graph, node.args[0])?,
        Op::Binary(BinaryFn::Add) if number(node.args[1]) == Some(0) => place(graph, node.args[0])?,
        Op::Expand(_) => place(graph, node.args[0])?,
        Op::Reshape(_) => match place(graph, node.args[0])? {
            Place::At(number) => Place::At(number),
            Place::Along(axis) => {
                // Axes of extent 1 come and go.
                let before = &graph.ty(node.args[0]).shape;
                let wide = |shape: &[usize]| -> SmallVec<[usize; 6]> {
                    (0..shape.len()).filter(|&axis| shape[axis] != 1).collect()
                };
                let (from, to) = (wide(before), wide(shape));
                let same = from.iter().map(|&a| before[a]).eq(to.iter().map(|&a| shape[a]));
                let at = from.iter().position(|&a| a == axis)?;
                same.then(|| Place::Along(to[at]))?
            }
        },
        _ => return None,
    };
    Some(match found {
        Place::Along(axis) if shape[axis] == 1 => Place::At(0),
        found => found,
    })
}

/// What the elements of a constant are.
fn counted(graph: &Graph, id: NodeId) -> Option<Place> {
    let (shape, values) = (&graph.ty(id).shape, graph.value(id)?);
    let values: Vec<i64> = values.as_f64s().into_iter().map(|v| v as i64).collect();
    let first = *values.first()?;
    if values.iter().all(|&value| value == first) {
        return Some(Place::At(first));
    }
    let along = |axis: usize| {
        let inner: usize = shape[axis + 1..].iter().product();
        let mut places = values.iter().enumerate();
        places.all(|(i, &value)| value == (i / inner % shape[axis]) as i64)
    };
    (0..shape.len()).find(|&axis| along(axis)).map(Place::Along)
}

/// The parts of an index along its last axis, where it is put together of them.
fn columns(call: &mut Call, index: NodeId) -> Result<Option<Vec<Place>>, Diagnostic> {
    let of = call.shape(index);
    let last = of.len() - 1;
    let node = call.graph.node(index).clone();
    if !matches!(node.op, Op::Concat(axis) if usize::from(axis) == last) {
        let mut found = Vec::new();
        for k in 0..of[last] {
            let ranges = of.iter().enumerate();
            let ranges = ranges.map(|(d, &e)| if d == last { (k as i64, 1, 1) } else { (0, 1, e) });
            let column = call.graph.add(Op::Slice(ranges.collect()), &[index], &call.origin)?;
            found.push(place(call.graph, column));
        }
        return Ok(found.into_iter().collect());
    }
    let single = node.args.iter().all(|&arg| call.graph.ty(arg).shape[last] == 1);
    let found = node.args.iter().map(|&arg| place(call.graph, arg));
    Ok(if single { found.collect() } else { None })
}

/// `x[index]` as a view of x, where each part of the index is a number or counts along an axis.
pub(super) fn view(
    call: &mut Call,
    x: NodeId,
    index: NodeId,
) -> Result<Option<NodeId>, Diagnostic> {
    let (shape, of) = (call.shape(x), call.shape(index));
    let last = of.len() - 1;
    let Some(columns) = columns(call, index)? else { return Ok(None) };
    let depth = columns.len();
    let mut ranges: SmallVec<[(i64, i64, usize); 6]> = shape.iter().map(|&e| (0, 1, e)).collect();
    let mut along = vec![None; last];
    for (axis, place) in columns.into_iter().enumerate() {
        match place {
            Place::At(at) if (0..shape[axis] as i64).contains(&at) => ranges[axis] = (at, 1, 1),
            Place::Along(to) if of[to] <= shape[axis] && along[to].is_none() => {
                ranges[axis] = (0, 1, of[to]);
                along[to] = Some(axis);
            }
            Place::At(_) | Place::Along(_) => return Ok(None),
        }
    }
    let (graph, origin) = (&mut *call.graph, &call.origin);
    let cut = graph.add(Op::Slice(ranges), &[x], origin)?;
    // Axes that are counted along in the order of the index, then those that are not read by it.
    let counted = along.iter().flatten().copied();
    let numbers = (0..depth).filter(|axis| !along.contains(&Some(*axis)));
    let order: Vec<usize> = numbers.chain(counted).chain(depth..shape.len()).collect();
    let turned = graph.permute(cut, &order, origin)?;
    let rest = shape[depth..].iter().copied();
    let unit = along.iter().zip(&of).map(|(axis, &extent)| if axis.is_some() { extent } else { 1 });
    let unit: Vec<usize> = unit.chain(rest.clone()).collect();
    let full: Vec<usize> = of[..last].iter().copied().chain(rest).collect();
    let spread = graph.reshape(turned, &unit, origin)?;
    graph.expand(spread, &full, origin).map(Some)
}
