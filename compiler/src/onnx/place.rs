//! Indices that are known to say where they stand: an index that counts along an axis reads what a
//! view has as well, without a table of places.

use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use crate::error::Diagnostic;
use crate::graph::op::{BinaryFn, Op};
use crate::graph::{Graph, NodeId, Origin};

/// What all elements of an index are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// A number.
    At(i64),
    /// Their own place along an axis.
    Along(usize),
}

/// How many steps are followed from an index to what it is made of; exports have about ten. What a
/// model can make this cost is small, however long its chains of nodes are.
const MOST_STEPS: usize = 64;
/// Constants of more elements are not looked at.
const MOST_ELEMENTS: usize = 4096;

/// What the elements of an integer value are, where its nodes tell.
fn place(graph: &Graph, id: NodeId) -> Option<Place> {
    let mut passed: SmallVec<[NodeId; 16]> = SmallVec::new();
    let mut at = id;
    let begin = loop {
        // Of other numbers some are no places: 0.5, or 300 in a byte.
        let integer = matches!(graph.ty(at).dtype, DType::I64 | DType::I32);
        if !integer || passed.len() == MOST_STEPS {
            return None;
        }
        passed.push(at);
        let node = graph.node(at);
        at = match &node.op {
            Op::Const(_) => break counted(graph, at)?,
            Op::Iota(_, axis) => break Place::Along((*axis).into()),
            Op::Cast(_) | Op::Expand(_) | Op::Reshape(_) => node.args[0],
            Op::Binary(f) if keeps(*f, counted(graph, node.args[1])) => node.args[0],
            Op::Input(_) | Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Permute(_) => {
                return None;
            }
            Op::Slice(_) | Op::Pad(_) | Op::Window(_) | Op::Concat(_) | Op::Gather(_) => {
                return None;
            }
            Op::Scatter(_) | Op::Reduce(..) | Op::Scan(..) | Op::Contract(_) => return None,
            Op::Bits(_) | Op::Composite(_) | Op::Fused(_) => return None,
        };
    };
    passed.iter().rev().try_fold(begin, |place, &id| after(graph, id, place))
}

/// Whether an operation gives its first operand again, for such a second one.
fn keeps(f: BinaryFn, other: Option<Place>) -> bool {
    match f {
        BinaryFn::Mul | BinaryFn::Div => other == Some(Place::At(1)),
        BinaryFn::Add | BinaryFn::Sub => other == Some(Place::At(0)),
        BinaryFn::Rem | BinaryFn::Max | BinaryFn::Min | BinaryFn::Pow | BinaryFn::Eq => false,
        BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le => false,
        BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => false,
    }
}

/// What the elements of a node are, where `place` is what those of its operand are, or its own.
fn after(graph: &Graph, id: NodeId, place: Place) -> Option<Place> {
    let (node, shape) = (graph.node(id), &graph.ty(id).shape);
    let Place::Along(axis) = place else { return Some(place) };
    let axis = match matches!(node.op, Op::Reshape(_)) {
        true => same_axis(&graph.ty(node.args[0]).shape, shape, axis)?,
        false => axis,
    };
    Some(if shape[axis] == 1 { Place::At(0) } else { Place::Along(axis) })
}

/// Where an axis is after a reshape in which only axes of extent 1 come and go.
fn same_axis(before: &[usize], shape: &[usize], axis: usize) -> Option<usize> {
    let long = |shape: &[usize]| -> SmallVec<[usize; 6]> {
        (0..shape.len()).filter(|&axis| shape[axis] != 1).collect()
    };
    let (from, to) = (long(before), long(shape));
    let same = from.iter().map(|&a| before[a]).eq(to.iter().map(|&a| shape[a]));
    let at = from.iter().position(|&a| a == axis)?;
    same.then(|| to[at])
}

/// What the elements of a constant are.
fn counted(graph: &Graph, id: NodeId) -> Option<Place> {
    let shape = &graph.ty(id).shape;
    if graph.ty(id).numel() > MOST_ELEMENTS {
        return None;
    }
    let values = graph.value(id)?.as_i64s()?;
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

/// The parts of an index along its last axis.
fn columns(graph: &mut Graph, index: NodeId, origin: &Origin) -> Result<Vec<NodeId>, Diagnostic> {
    let (node, of) = (graph.node(index), graph.ty(index).shape.clone());
    let last = of.len() - 1;
    let single = |&arg: &NodeId| graph.ty(arg).shape[last] == 1;
    if node.op == Op::Concat(last as u8) && node.args.iter().all(single) {
        return Ok(node.args.to_vec());
    }
    let column = |k: usize| {
        let ranges = of.iter().enumerate();
        let ranges = ranges.map(|(d, &e)| if d == last { (k as i64, 1, 1) } else { (0, 1, e) });
        graph.add(Op::Slice(ranges.collect()), &[index], origin)
    };
    (0..of[last]).map(column).collect()
}

/// `x[index]` as a view of x, where each part of the index is a number or counts along an axis; the
/// last axis of the index has at least one part, and at most one for each axis of x.
pub(super) fn view(
    graph: &mut Graph,
    [x, index]: [NodeId; 2],
    origin: &Origin,
) -> Result<Option<NodeId>, Diagnostic> {
    let (shape, of) = (graph.ty(x).shape.clone(), graph.ty(index).shape.clone());
    let last = of.len() - 1;
    let columns = columns(graph, index, origin)?;
    let mut ranges: SmallVec<[(i64, i64, usize); 6]> = shape.iter().map(|&e| (0, 1, e)).collect();
    let mut along = vec![None; last];
    for (axis, &column) in columns.iter().enumerate() {
        match place(graph, column) {
            Some(Place::At(at)) if (0..shape[axis] as i64).contains(&at) => {
                ranges[axis] = (at, 1, 1);
            }
            Some(Place::Along(to)) if of[to] <= shape[axis] && along[to].is_none() => {
                ranges[axis] = (0, 1, of[to]);
                along[to] = Some(axis);
            }
            Some(Place::At(_) | Place::Along(_)) | None => return Ok(None),
        }
    }
    let depth = columns.len();
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

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::Tensor;

    use super::*;
    use crate::graph::eval::{Value, eval};
    use crate::graph::op::{Shape, Type};

    fn origin() -> Origin {
        Origin::from("index")
    }

    /// The numbers 0, 1, 2 ... along an axis, as a node of the graph.
    fn count(graph: &mut Graph, shape: &[usize], axis: u8) -> NodeId {
        graph.push(
            Op::Iota(Shape::from_slice(shape), axis),
            Default::default(),
            Type::new(DType::I64, shape),
            &origin(),
        )
    }

    fn number(graph: &mut Graph, dtype: DType, value: f64) -> NodeId {
        graph.scalar(dtype, 1, value, &origin())
    }

    /// An index of which each column has a shape that repeats to `places`.
    fn index(graph: &mut Graph, places: &[usize], columns: &[NodeId]) -> NodeId {
        let whole: Vec<usize> = places.iter().copied().chain([1]).collect();
        let column = |graph: &mut Graph, id: NodeId| {
            let unit: Vec<usize> = graph.ty(id).shape.iter().copied().chain([1]).collect();
            let id = graph.reshape(id, &unit, &origin()).expect("one more axis");
            let id = graph.with_rank(id, whole.len(), &origin()).expect("a rank");
            graph.expand(id, &whole, &origin()).expect("a column")
        };
        let columns: Vec<NodeId> = columns.iter().map(|&id| column(graph, id)).collect();
        graph.add(Op::Concat(places.len() as u8), &columns, &origin()).expect("an index")
    }

    /// `x[index]` element by element.
    fn picked(x: &[f64], shape: &[usize], index: &[f64], depth: usize) -> Vec<f64> {
        let inner: usize = shape[depth..].iter().product();
        let row = |place: &[f64]| {
            let at = place.iter().zip(shape).fold(0, |at, (&i, &extent)| at * extent + i as usize);
            x[at * inner..(at + 1) * inner].to_vec()
        };
        index.chunks(depth).flat_map(row).collect()
    }

    /// Compares the view of an index with what the index picks.
    fn check(shape: &[usize], places: &[usize], make: &dyn Fn(&mut Graph) -> Vec<NodeId>) {
        let mut graph = Graph::default();
        let x = graph.input("x", Type::new(DType::F32, shape));
        let columns = make(&mut graph);
        let index = index(&mut graph, places, &columns);
        let view = view(&mut graph, [x, index], &origin()).expect("nodes that fit");
        let view = view.expect("an index that is seen through");
        assert!(!graph.nodes.iter().any(|node| matches!(node.op, Op::Gather(_))));
        graph.outputs = vec![("view".to_string(), view), ("index".to_string(), index)];
        let numbers: Vec<f32> = (0..shape.iter().product()).map(|i: usize| i as f32).collect();
        let x = Value::from_tensor(&Tensor::from_slice(shape, &numbers));
        let found = eval(&graph, std::slice::from_ref(&x));
        let want = picked(&x.as_f64s(), shape, &found[1].as_f64s(), columns.len());
        let ty: Vec<usize> = places.iter().chain(&shape[columns.len()..]).copied().collect();
        assert_eq!(graph.ty(view).shape.as_slice(), ty);
        assert_eq!(found[0].as_f64s(), want, "{shape:?} at {places:?}");
    }

    #[test]
    fn a_view_is_what_its_index_picks() {
        let both = |a: u8, b: u8| {
            move |g: &mut Graph| {
                let shape = [[4, 1], [1, 5]];
                [a, b].map(|axis| count(g, &shape[usize::from(axis)], axis)).to_vec()
            }
        };
        check(&[4, 5], &[4, 5], &both(0, 1));
        check(&[5, 4], &[4, 5], &both(1, 0));
        // Shorter than the axes that are read, and rows of a third axis.
        check(&[6, 7, 3], &[4, 5], &both(0, 1));
        // Read once, repeated along what it does not count along.
        check(&[5, 2], &[4, 5], &|g| vec![count(g, &[1, 5], 1)]);
        // A row of a table, whole and as numbers that the model holds.
        check(&[3, 5], &[5], &|g| vec![number(g, DType::I64, 2.0), count(g, &[5], 0)]);
        check(&[3, 5, 2], &[3, 5], &|g| {
            let rows = g.i64s(&[3, 1], &[0, 1, 2], &origin());
            let columns = g.i64s(&[1, 5], &[0, 1, 2, 3, 4], &origin());
            vec![rows, columns]
        });
        // An axis of extent 1 has one place.
        check(&[3, 5], &[1, 5], &|g| vec![count(g, &[1, 5], 0), count(g, &[1, 5], 1)]);
    }

    #[test]
    fn steps_of_exporters_are_seen_through() {
        let mut graph = Graph::default();
        let (g, o) = (&mut graph, &origin());
        let count = count(g, &[6], 0);
        let [zero, one] = [0.0, 1.0].map(|value| number(g, DType::I64, value));
        let x = g.add(Op::Binary(BinaryFn::Mul), &[count, one], o).expect("a product");
        let x = g.add(Op::Binary(BinaryFn::Add), &[x, zero], o).expect("a sum");
        assert_eq!(place(g, x), Some(Place::Along(0)));
        let x = g.reshape(x, &[1, 6, 1], o).expect("unit axes");
        assert_eq!(place(g, x), Some(Place::Along(1)));
        let x = g.expand(x, &[3, 6, 2], o).expect("repeated");
        let x = g.cast(x, DType::I32, o).expect("another integer");
        assert_eq!(place(g, x), Some(Place::Along(1)));
        assert_eq!(place(g, one), Some(Place::At(1)));
        let table = g.i64s(&[2, 3], &[0, 1, 2, 0, 1, 2], o);
        assert_eq!(place(g, table), Some(Place::Along(1)));
    }

    #[test]
    fn other_numbers_are_not_places() {
        let mut graph = Graph::default();
        let (g, o) = (&mut graph, &origin());
        let count = count(g, &[6], 0);
        let one = number(g, DType::I64, 1.0);
        let later = g.add(Op::Binary(BinaryFn::Add), &[count, one], o).expect("a sum");
        assert_eq!(place(g, later), None);
        // 0, 1.5, 3 ... as integers are not the places 0, 1, 2; nor are 0, 0, 1, 1 ...
        let float = g.cast(count, DType::F32, o).expect("floats");
        for (f, value) in [(BinaryFn::Mul, 1.5), (BinaryFn::Add, -0.5), (BinaryFn::Mul, 0.5)] {
            let factor = number(g, DType::F32, value);
            let x = g.add(Op::Binary(f), &[float, factor], o).expect("floats");
            let x = g.cast(x, DType::I64, o).expect("integers");
            assert_eq!(place(g, x), None, "{value}");
        }
        // A byte counts from 0 again.
        let byte = g.cast(count, DType::U8, o).expect("bytes");
        let byte = g.cast(byte, DType::I64, o).expect("integers");
        assert_eq!(place(g, byte), None);
        // An axis that is parted is counted along by neither of its parts.
        let parted = g.reshape(count, &[2, 3], o).expect("parted");
        assert_eq!(place(g, parted), None);
        let table = g.i64s(&[4], &[0, 1, 3, 2], o);
        assert_eq!(place(g, table), None);
        let input = g.input("places", Type::new(DType::I64, &[6]));
        assert_eq!(place(g, input), None);
    }

    #[test]
    fn an_index_out_of_its_axis_is_left_to_a_table() {
        let mut graph = Graph::default();
        let x = graph.input("x", Type::new(DType::F32, &[3, 5]));
        let far = [-1.0, 3.0].map(|value| number(&mut graph, DType::I64, value));
        let long = count(&mut graph, &[4], 0);
        for column in [far[0], far[1], long] {
            let index = index(&mut graph, &[4], &[column]);
            let view = view(&mut graph, [x, index], &origin()).expect("nodes that fit");
            assert_eq!(view, None);
        }
        // One axis of the index that counts along two of x is a diagonal.
        let count = count(&mut graph, &[3], 0);
        let index = index(&mut graph, &[3], &[count, count]);
        assert_eq!(view(&mut graph, [x, index], &origin()).expect("nodes that fit"), None);
    }

    #[test]
    fn long_chains_are_not_followed_to_their_end() {
        let mut graph = Graph::default();
        let one = number(&mut graph, DType::I64, 1.0);
        let mut id = count(&mut graph, &[6], 0);
        for length in 0..100_000 {
            if length == 50 {
                assert_eq!(place(&graph, id), Some(Place::Along(0)));
            }
            id = graph.add(Op::Binary(BinaryFn::Mul), &[id, one], &origin()).expect("a chain");
        }
        assert_eq!(place(&graph, id), None);
    }
}
