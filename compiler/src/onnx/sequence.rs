//! Sequences of tensors within a model. How many there are is known when it is imported, so that
//! they are lists of values, and nothing of them is left in the graph.

use super::call::not_supported;
use super::control::{Flow, Made, Site, not_known};
use super::recurrent::MOST_STEPS;
use super::{Held, Import};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::op::{Op, Shape};

const fn row(
    name: &'static str,
    attributes: &'static [&'static str],
    import: fn(&mut Import, &Site) -> Made,
) -> Flow {
    Flow { name, since: 11, attributes, sequences: true, import }
}

/// The operators of sequences.
pub(super) static SEQUENCES: &[Flow] = &[
    row("ConcatFromSequence", &["axis", "new_axis"], concat),
    row("SequenceAt", &[], at),
    row("SequenceConstruct", &[], construct),
    row("SequenceEmpty", &["dtype"], empty),
    row("SequenceErase", &[], erase),
    row("SequenceInsert", &[], insert),
    row("SequenceLength", &[], length),
    row("SplitToSequence", &["axis", "keepdims"], split),
];

type Refusable<T> = Result<T, Option<Diagnostic>>;

fn sequence<'s>(site: &'s Site) -> Refusable<&'s [NodeId]> {
    let first = site.sequences.first().map(Vec::as_slice);
    first.ok_or_else(|| Some(not_supported("a tensor where a sequence is asked for")))
}

fn one(x: NodeId) -> Made {
    Ok(vec![Held::Tensor(x)])
}

fn all(values: Vec<NodeId>) -> Made {
    Ok(vec![Held::Sequence(values)])
}

/// The numbers of an operand, which decide how long sequences are.
fn numbers(import: &mut Import, site: &Site, id: NodeId, what: &str) -> Refusable<Vec<i64>> {
    import
        .asks
        .value(&import.graph, &site.origin, id)
        .and_then(|v| v.as_i64s())
        .ok_or_else(|| not_known(what))
}

/// A place in a sequence of so many, where the operand says one; it may count from the end.
fn place(
    import: &mut Import,
    site: &Site,
    operand: usize,
    count: usize,
) -> Refusable<Option<usize>> {
    let Some(id) = site.inputs.get(operand).copied().flatten() else { return Ok(None) };
    let given = numbers(import, site, id, "a place in a sequence")?;
    let [given] = given[..] else {
        return Err(Some(not_supported(format!("{} places in a sequence", given.len()))));
    };
    let from_end = if given < 0 { given.saturating_add(count as i64) } else { given };
    let found = usize::try_from(from_end).ok().filter(|&at| at <= count);
    let misfit = || Some(not_supported(format!("place {given} in a sequence of {count}")));
    found.map(Some).ok_or_else(misfit)
}

fn construct(_: &mut Import, site: &Site) -> Made {
    all((0..site.inputs.len()).map(|i| site.input(i)).collect::<Result<_, _>>()?)
}

fn empty(_: &mut Import, _: &Site) -> Made {
    all(Vec::new())
}

fn at(import: &mut Import, site: &Site) -> Made {
    let values = sequence(site)?;
    site.input(1)?;
    let found = place(import, site, 1, values.len())?.and_then(|at| values.get(at));
    let misfit = || Some(not_supported(format!("an element after {} of them", values.len())));
    one(*found.ok_or_else(misfit)?)
}

fn insert(import: &mut Import, site: &Site) -> Made {
    let mut values = sequence(site)?.to_vec();
    let at = place(import, site, 2, values.len())?.unwrap_or(values.len());
    if values.len() == MOST_STEPS {
        return Err(Some(not_supported(format!("a sequence of more than {MOST_STEPS}"))));
    }
    values.insert(at, site.input(1)?);
    all(values)
}

fn erase(import: &mut Import, site: &Site) -> Made {
    let mut values = sequence(site)?.to_vec();
    let last = values.len().checked_sub(1).ok_or_else(|| Some(not_supported("an element less")))?;
    let at = place(import, site, 1, values.len())?.unwrap_or(last);
    values.remove(at.min(last));
    all(values)
}

fn length(import: &mut Import, site: &Site) -> Made {
    let count = sequence(site)?.len() as i64;
    one(import.graph.i64s(&[], &[count], &site.origin))
}

/// Elements one after another, along an axis that they have or a new one.
fn concat(import: &mut Import, site: &Site) -> Made {
    let values = sequence(site)?;
    let new = site.int("new_axis").unwrap_or(0) != 0;
    let Some(&first) = values.first() else {
        return Err(Some(not_supported("a sequence of none to be joined")));
    };
    let rank = import.graph.ty(first).rank() + usize::from(new);
    let given = site.int("axis").unwrap_or(0);
    let axis = if given < 0 { given.saturating_add(rank as i64) } else { given };
    let axis = usize::try_from(axis).ok().filter(|&axis| axis < rank);
    let axis = axis.ok_or_else(|| Some(not_supported(format!("axis {given} of {rank}"))))?;
    one(match new {
        true => import.stacked(values, axis, &site.origin)?,
        false => import.put(Op::Concat(axis as u8), values, &site.origin)?,
    })
}

/// Pieces of an axis: of one element each, of so many each, or of the lengths of a list.
fn split(import: &mut Import, site: &Site) -> Made {
    let (x, origin) = (site.input(0)?, &site.origin);
    let shape = import.graph.ty(x).shape.clone();
    let given = site.int("axis").unwrap_or(0);
    let axis = if given < 0 { given.saturating_add(shape.len() as i64) } else { given };
    let axis = usize::try_from(axis).ok().filter(|&axis| axis < shape.len());
    let axis = axis.ok_or_else(|| Some(not_supported(format!("axis {given} of {shape:?}"))))?;
    let extent = shape[axis];
    let by = site.inputs.get(1).copied().flatten();
    let dropped = by.is_none() && site.int("keepdims") == Some(0);
    let lengths = match by {
        None => vec![1; extent.min(MOST_STEPS + 1)],
        Some(by) => lengths(import, site, by, extent)?,
    };
    let sum = lengths.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
    if sum != Some(extent) || lengths.len() > MOST_STEPS {
        let count = lengths.len();
        return Err(Some(not_supported(format!("{count} pieces of axis {axis} of {shape:?}"))));
    }
    let mut values = Vec::with_capacity(lengths.len());
    let mut start = 0;
    for length in lengths {
        let cut = |(d, &e): (usize, &usize)| match d == axis {
            true if length == 0 => (0, 1, 0),
            true => (start as i64, 1, length),
            false => (0, 1, e),
        };
        let ranges = shape.iter().enumerate().map(cut).collect();
        let mut piece = import.put(Op::Slice(ranges), &[x], origin)?;
        if dropped {
            let mut rest: Shape = shape.clone();
            rest.remove(axis);
            piece = import.put(Op::Reshape(rest), &[piece], origin)?;
        }
        values.push(piece);
        start += length;
    }
    all(values)
}

/// The lengths of pieces: a list, or one number, which the last piece may fall short of.
fn lengths(import: &mut Import, site: &Site, by: NodeId, extent: usize) -> Refusable<Vec<usize>> {
    let given = numbers(import, site, by, "how an axis is cut")?;
    let list: Option<Vec<usize>> = given.iter().map(|&n| usize::try_from(n).ok()).collect();
    let misfit = || Some(not_supported(format!("pieces of {given:?} of {extent}")));
    let list = list.ok_or_else(misfit)?;
    if import.graph.ty(by).rank() > 0 {
        return Ok(list);
    }
    let each = list.first().copied().filter(|&each| each > 0).ok_or_else(misfit)?;
    let count = extent.div_ceil(each).min(MOST_STEPS + 1);
    Ok((0..count).map(|i| each.min(extent - i * each)).collect())
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::Tensor;

    use super::super::control::tests::{graph, ints, model, node, outputs, port};
    use super::super::proto::{GraphProto, NodeProto, TensorProto};

    fn with_numbers(nodes: &[NodeProto], known: &[(&str, &[i64], &[i64])]) -> GraphProto {
        let mut made = graph(&[port("x", &[5, 2], 1)], nodes, &["y"]);
        let constant = |&(name, dims, values): &(&str, &[i64], &[i64])| TensorProto {
            name: Some(name.into()),
            dims: dims.to_vec(),
            data_type: Some(7),
            int64_data: values.to_vec(),
            ..Default::default()
        };
        made.initializer = known.iter().map(constant).collect();
        made
    }

    #[test]
    fn sequences_are_cut_changed_and_joined() {
        let nodes = [
            node("SplitToSequence", &["x", "two"], &["pieces"]),
            node("SequenceErase", &["pieces", "zero"], &["fewer"]),
            node("SequenceAt", &["pieces", "zero"], &["first"]),
            node("SequenceInsert", &["fewer", "first"], &["turned"]),
            node("ConcatFromSequence", &["turned"], &["y"]),
        ];
        let mut joined = nodes.to_vec();
        joined[4].attribute.push(ints("axis", &[0]));
        let known = [("two", &[][..], &[2][..]), ("zero", &[], &[0])];
        let made = model(with_numbers(&joined, &known), false).expect("a model");
        let values: Vec<f32> = (0..10).map(|i| i as f32).collect();
        let x = Tensor::from_slice(&[5, 2], &values);
        let found = outputs(&made, &[x]);
        assert_eq!(found, [[4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 0.0, 1.0, 2.0, 3.0]]);
    }

    #[test]
    fn sequences_that_do_not_fit_are_refused() {
        let refused = |nodes: &[NodeProto], known: &[(&str, &[i64], &[i64])]| {
            model(with_numbers(nodes, known), false).expect_err("no such sequence")
        };
        let whole = node("SequenceConstruct", &["x", "x"], &["s"]);
        let at = [whole.clone(), node("SequenceAt", &["s", "n"], &["y"])];
        for (place, what) in [(2, "after 2"), (-3, "place -3"), (i64::MIN, "in a sequence of 2")] {
            let problem = refused(&at, &[("n", &[], &[place])]);
            assert!(problem.contains(what), "{problem}");
        }
        let tensor = refused(&[whole.clone(), node("Neg", &["s"], &["y"])], &[]);
        assert!(tensor.contains("a sequence where this operator takes a tensor"), "{tensor}");
        let output = refused(&[node("SequenceConstruct", &["x"], &["y"])], &[]);
        assert!(output.contains("an output that is no tensor"), "{output}");
        let number = refused(&[node("SequenceLength", &["x"], &["y"])], &[]);
        assert!(number.contains("a tensor where a sequence is asked for"), "{number}");
        let cut =
            [node("SplitToSequence", &["x", "n"], &["s"]), node("SequenceLength", &["s"], &["y"])];
        for (dims, list, what) in [
            (&[][..], &[0][..], "pieces of [0] of 5"),
            (&[2], &[2, 2], "2 pieces of axis 0 of [5, 2]"),
            (&[2], &[i64::MAX, i64::MAX], "2 pieces"),
            (&[2], &[-1, 6], "pieces of [-1, 6] of 5"),
        ] {
            let problem = refused(&cut, &[("n", dims, list)]);
            assert!(problem.contains(what), "{what}: {problem}");
        }
    }
}
