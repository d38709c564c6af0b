//! Operators whose results are as large as data say. They are computed by the importer where the
//! data are known, else between two stages of the model.

use std::cmp::Ordering;

use kiln_runtime::tensor::Tensor;

use super::call::{Call, Outputs, not_supported, one};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::eval::Value;
use crate::graph::op::Op;
use crate::graph::scalar::Number;

/// Pairs of boxes that are compared at most, and scores that are looked at.
const MOST: usize = 1 << 28;

/// The ends of a box along y and x.
type Box2 = [[f32; 2]; 2];

/// A box of four numbers: two corners, or the middle, the width and the height.
fn box_of(numbers: &[f64], centred: bool) -> Box2 {
    let [a, b, c, d] = [0, 1, 2, 3].map(|k: usize| numbers[k] as f32);
    match centred {
        true => [[b - d / 2.0, b + d / 2.0], [a - c / 2.0, a + c / 2.0]],
        false => [[a.min(c), a.max(c)], [b.min(d), b.max(d)]],
    }
}

/// How much of two boxes together is in both.
fn shared(a: &Box2, b: &Box2) -> f32 {
    let along = |k: usize| a[k][1].min(b[k][1]) - a[k][0].max(b[k][0]);
    let area = |x: &Box2| (x[0][1] - x[0][0]) * (x[1][1] - x[1][0]);
    let (down, across) = (along(0), along(1));
    if down <= 0.0 || across <= 0.0 || area(a) <= 0.0 || area(b) <= 0.0 {
        return 0.0;
    }
    down * across / (area(a) + area(b) - down * across)
}

/// What `NonMaxSuppression` is told.
#[derive(Clone, Copy)]
struct Suppression {
    /// Whether boxes are middles and sizes.
    centred: bool,
    /// Boxes of a class at most.
    most: usize,
    /// How much a box may share with one taken before.
    limit: f32,
    /// Scores must be above that.
    least: Option<f64>,
}

/// The number that an operand is; none where it is absent or empty.
fn number(values: &[Value], at: Option<usize>) -> Option<f64> {
    values[at?].as_f64s().first().copied()
}

/// The boxes of each class from the highest score down that share little with those taken before.
pub(super) fn non_max_suppression(call: &mut Call) -> Outputs {
    let centred = call.int_or("center_point_box", 0) != 0;
    let operands: Vec<usize> = (0..5).filter(|&i| i < 2 || call.optional(i).is_some()).collect();
    let at = [2, 3, 4].map(|i| operands.iter().position(|&operand| operand == i));
    let found = call.computed(&operands, &[Some(0)], move |values| {
        let told = Suppression {
            centred,
            most: number(values, at[0]).unwrap_or(0.0).max(0.0) as usize,
            limit: number(values, at[1]).unwrap_or(0.0) as f32,
            least: number(values, at[2]),
        };
        suppressed(&values[0], &values[1], told)
    })?;
    one(found[0])
}

/// Image, class and box of all that are taken, as `[count, 3]`.
fn suppressed(boxes: &Value, scores: &Value, told: Suppression) -> Result<Vec<Tensor>, Diagnostic> {
    let Suppression { centred, most, limit, least } = told;
    let (bs, ss) = (&boxes.ty.shape, &scores.ty.shape);
    let ([images, count, 4], [batch, classes, of_each]) = (&bs[..], &ss[..]) else {
        return Err(not_supported(format!("boxes {bs:?} with scores {ss:?}")));
    };
    let too_many = || not_supported(format!("boxes {bs:?} with scores {ss:?}, {most} of a class"));
    // Without boxes there still is something to do for each class.
    let looks = images.checked_mul(*classes).and_then(|n| n.checked_mul(count + 1));
    if images != batch || count != of_each || looks.is_none_or(|n| n > MOST) {
        return Err(too_many());
    }
    let mut compared = 0;
    let (numbers, scores) = (boxes.as_f64s(), scores.as_f64s());
    let mut found: Vec<i64> = Vec::new();
    for image in 0..*images {
        let corner = |i: usize| &numbers[(image * count + i) * 4..][..4];
        let boxes: Vec<Box2> = (0..*count).map(|i| box_of(corner(i), centred)).collect();
        for class in 0..*classes {
            let scores = &scores[(image * classes + class) * count..][..*count];
            let mut order: Vec<usize> =
                (0..*count).filter(|&i| least.is_none_or(|least| scores[i] > least)).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let mut taken: Vec<usize> = Vec::new();
            for i in order {
                if taken.len() == most {
                    break;
                }
                compared += taken.len();
                if compared > MOST {
                    return Err(too_many());
                }
                let apart = |&j: &usize| shared(&boxes[i], &boxes[j]) <= limit;
                if taken.iter().all(apart) {
                    taken.push(i);
                    found.extend([image as i64, class as i64, i as i64]);
                }
            }
        }
    }
    Ok(vec![Tensor::from_slice(&[found.len() / 3, 3], &found)])
}

/// Where elements are not 0, as `[rank, count]`.
pub(super) fn non_zero(call: &mut Call) -> Outputs {
    let places = |values: &[Value]| {
        let (shape, numbers) = (&values[0].ty.shape, values[0].as_f64s());
        let found: Vec<usize> = (0..numbers.len()).filter(|&i| numbers[i] != 0.0).collect();
        let mut places = Vec::with_capacity(shape.len() * found.len());
        for axis in 0..shape.len() {
            let step: usize = shape[axis + 1..].iter().product();
            places.extend(found.iter().map(|&i| (i / step % shape[axis]) as i64));
        }
        Ok(vec![Tensor::from_slice(&[shape.len(), found.len()], &places)])
    };
    one(call.computed(&[0], &[Some(1)], places)?[0])
}

/// The first operand and an axis of it; without one, all of its elements in a row.
fn along_an_axis(call: &mut Call) -> Result<(NodeId, usize), Diagnostic> {
    let x = call.input(0)?;
    let shape = call.shape(x);
    match call.int("axis") {
        Some(axis) => Ok((x, call.axis(axis, shape.len())?)),
        None => Ok((call.graph.reshape(x, &[shape.iter().product()], &call.origin)?, 0)),
    }
}

/// Slices of a value at the places that an index lists, if any.
fn picked(call: &mut Call, x: NodeId, axis: usize, index: NodeId) -> Added {
    match call.shape(index)[0] {
        0 => call.cut(x, axis, (0, 1, 0)),
        _ => call.graph.add(Op::Gather(axis as u8), &[x, index], &call.origin),
    }
}

/// The elements along an axis for which a condition holds.
pub(super) fn compress(call: &mut Call) -> Outputs {
    let (x, axis) = along_an_axis(call)?;
    let extent = call.shape(x)[axis];
    let chosen = move |values: &[Value]| {
        let holds = values[0].as_f64s();
        let chosen = (0..holds.len().min(extent)).filter(|&i| holds[i] != 0.0);
        let chosen: Vec<i64> = chosen.map(|i| i as i64).collect();
        Ok(vec![Tensor::from_slice(&[chosen.len()], &chosen)])
    };
    let index = call.computed(&[1], &[Some(0)], chosen)?[0];
    one(picked(call, x, axis, index)?)
}

/// The order of numbers of one dtype; what is no number comes last, and is the same as another.
fn order(a: Number, b: Number) -> Ordering {
    match (a, b) {
        (Number::Int(a), Number::Int(b)) => a.cmp(&b),
        (Number::Float(a), Number::Float(b)) => {
            let nan = a.is_nan().cmp(&b.is_nan());
            nan.then(a.partial_cmp(&b).unwrap_or(Ordering::Equal))
        }
        (Number::Int(_), Number::Float(_)) => Ordering::Less,
        (Number::Float(_), Number::Int(_)) => Ordering::Greater,
    }
}

/// Each different slice along an axis, or each different element, once: with the first place of
/// each, which of them each slice is, and how often each is there.
pub(super) fn unique(call: &mut Call) -> Outputs {
    let sorted = call.int_or("sorted", 1) != 0;
    let (x, axis) = along_an_axis(call)?;
    let shape = call.shape(x);
    // Other axes may be as long as they like there.
    if call.ty(x).numel() == 0 && shape.len() > 1 {
        return Err(not_supported(format!(
            "slices without elements, along axis {axis} of {shape:?}"
        )));
    }
    let counted = &[Some(0), None, Some(0)];
    let found =
        call.computed(&[0], counted, move |values| Ok(groups(&values[0], &shape, axis, sorted)))?;
    let index = found[0];
    let y = picked(call, x, axis, index)?;
    Ok([y].into_iter().chain(found).map(Some).collect())
}

/// Groups of equal slices along an axis of a value of that shape: the first place of each, which of
/// them each slice is in, and how many slices each has.
fn groups(value: &Value, shape: &[usize], axis: usize, sorted: bool) -> Vec<Tensor> {
    let (count, inner) = (shape[axis], shape[axis + 1..].iter().product::<usize>());
    let outer: usize = shape[..axis].iter().product();
    // The elements of a slice, in order.
    let at = |i: usize, k: usize| value.data.get((k / inner * count + i) * inner + k % inner);
    let compare = |a: usize, b: usize| {
        let mut parts = (0..outer * inner).map(|k| order(at(a, k), at(b, k)));
        parts.find(|part| part.is_ne()).unwrap_or(Ordering::Equal)
    };
    let mut places: Vec<usize> = (0..count).collect();
    places.sort_by(|&a, &b| compare(a, b));
    // Equal ones stand side by side, the first one first.
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for place in places {
        match groups.last_mut() {
            Some(group) if compare(group[0], place) == Ordering::Equal => group.push(place),
            _ => groups.push(vec![place]),
        }
    }
    if !sorted {
        groups.sort_by_key(|group| group[0]);
    }
    let first: Vec<i64> = groups.iter().map(|group| group[0] as i64).collect();
    let mut inverse = vec![0i64; count];
    for (number, group) in groups.iter().enumerate() {
        group.iter().for_each(|&place| inverse[place] = number as i64);
    }
    let counts: Vec<i64> = groups.iter().map(|group| group.len() as i64).collect();
    [first, inverse, counts].map(|list| Tensor::from_slice(&[list.len()], &list)).to_vec()
}

#[cfg(test)]
mod tests {
    use super::super::NEEDS_VALUE;
    use super::super::control::tests::{graph, ints, model, node, outputs, port};
    use super::super::proto::TensorProto;

    fn constant(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
        TensorProto {
            name: Some(name.into()),
            dims: dims.to_vec(),
            data_type: Some(1),
            float_data: values.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn slices_are_taken_once_and_counted() {
        let mut unique = node("Unique", &["c"], &["y", "first", "which", "count"]);
        unique.attribute.extend([ints("axis", &[-1]), ints("sorted", &[0])]);
        let mut made = graph(&[], &[unique], &["y", "first", "which", "count"]);
        // Columns 2 1, NaN 0, 2 1, -0 0, 0 0, NaN 0.
        let rows = [2.0, f32::NAN, 2.0, -0.0, 0.0, f32::NAN, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0];
        made.initializer.push(constant("c", &[2, 6], &rows));
        let found = outputs(&model(made, false).expect("a model"), &[]);
        assert_eq!(found[1], [0.0, 1.0, 3.0]);
        assert_eq!(found[2], [0.0, 1.0, 0.0, 2.0, 2.0, 1.0]);
        assert_eq!(found[3], [2.0, 2.0, 2.0]);
        assert_eq!(found[0][3..], [1.0, 0.0, 0.0]);
    }

    #[test]
    fn what_is_not_known_and_what_does_not_fit_is_refused() {
        let unknown = graph(&[port("x", &[4], 1)], &[node("Unique", &["x"], &["y"])], &["y"]);
        assert!(model(unknown, false).expect_err("data").contains(NEEDS_VALUE));
        let boxes = |shape: &[i64], scores: &[i64], most: f32| {
            let numbers = |shape: &[i64]| vec![0.5; shape.iter().product::<i64>() as usize];
            let taken = node("NonMaxSuppression", &["b", "s", "m"], &["y"]);
            let mut made = graph(&[], &[taken], &["y"]);
            made.initializer = vec![
                constant("b", shape, &numbers(shape)),
                constant("s", scores, &numbers(scores)),
                constant("m", &[1], &[most]),
            ];
            model(made, false)
        };
        for (shape, scores) in
            [([1, 3, 5], [1, 1, 3]), ([1, 3, 4], [2, 1, 3]), ([1, 3, 4], [1, 1, 4])]
        {
            let problem = boxes(&shape, &scores, 2.0).expect_err("shapes that do not fit");
            assert!(problem.contains(&format!("{shape:?}")), "{problem}");
        }
        // Images without boxes, as many as there is no memory for.
        let none = boxes(&[1 << 40, 0, 4], &[1 << 40, 1, 0], 1.0).expect_err("too many");
        assert!(none.contains("NonMaxSuppression"), "{none}");
        for dims in [[1 << 40, 0], [0, 1 << 40]] {
            let mut unique = node("Unique", &["c"], &["y"]);
            unique.attribute.push(ints("axis", &[0]));
            let mut made = graph(&[], &[unique], &["y"]);
            made.initializer.push(constant("c", &dims, &[]));
            let empty = model(made, false).expect_err("slices of nothing");
            assert!(empty.contains("slices without elements"), "{empty}");
        }
        let many = boxes(&[1, 24_000, 4], &[1, 1, 24_000], 1e9).expect_err("too many pairs");
        assert!(many.contains("24000"), "{many}");
        assert!(boxes(&[1, 3, 4], &[1, 1, 3], -1.0).is_ok());
    }
}
