//! Scans: a graph for each row of some operands, which hands states from one to the next.

use super::Import;
use super::call::not_supported;
use super::control::{Made, Site};
use super::recurrent::MOST_STEPS;
use super::{Held, proto::GraphProto};
use crate::error::Diagnostic;
use crate::graph::op::Op;
use crate::graph::{NodeId, Origin};

/// Along which axis rows lie, and whether the last one comes first.
type Way = (i64, bool);

/// A scan of one batch.
struct Rows<'s> {
    body: &'s GraphProto,
    origin: &'s Origin,
    /// Operands whose rows are read, and how.
    read: Vec<(NodeId, Way)>,
    /// How the rows of each result lie.
    made: Vec<Way>,
}

type Refusable<T> = Result<T, Option<Diagnostic>>;

fn axis_of(axis: i64, rank: usize) -> Refusable<usize> {
    let from_end = if axis < 0 { axis.saturating_add(rank as i64) } else { axis };
    let found = usize::try_from(from_end).ok().filter(|&axis| axis < rank);
    found.ok_or_else(|| Some(not_supported(format!("rows along axis {axis} of {rank}"))))
}

impl Rows<'_> {
    /// The states after the last row, and the results.
    fn run(&self, import: &mut Import, mut states: Vec<NodeId>) -> Refusable<Vec<NodeId>> {
        let mut axes = Vec::new();
        for (x, (axis, _)) in &self.read {
            axes.push(axis_of(*axis, import.graph.ty(*x).rank())?);
        }
        let extent = |(x, axis): (&(NodeId, Way), &usize)| import.graph.ty(x.0).shape[*axis];
        let extents: Vec<usize> = self.read.iter().zip(&axes).map(extent).collect();
        let steps = extents.first().copied().unwrap_or(0);
        if steps > MOST_STEPS || extents.iter().any(|&extent| extent != steps) {
            let what = format!("{extents:?} rows; at most {MOST_STEPS}, of each");
            return Err(Some(not_supported(what)));
        }
        let mut rows = vec![Vec::new(); self.made.len()];
        for step in 0..steps {
            let mut inputs = states.clone();
            for (&(x, (_, backwards)), &axis) in self.read.iter().zip(&axes) {
                let at = if backwards { steps - 1 - step } else { step };
                inputs.push(row(import, x, axis, at, self.origin)?);
            }
            let outputs = import.within(self.body, &inputs)?;
            let (next, made) = outputs.split_at(states.len());
            states = next.to_vec();
            rows.iter_mut().zip(made).for_each(|(rows, &row)| rows.push(row));
        }
        for (mut rows, (axis, backwards)) in rows.into_iter().zip(&self.made) {
            if *backwards {
                rows.reverse();
            }
            let rank = rows.first().map_or(1, |&r| import.graph.ty(r).rank() + 1);
            let axis = axis_of(*axis, rank)?;
            states.push(import.stacked(&rows, axis, self.origin)?);
        }
        Ok(states)
    }
}

/// One row of an axis, which it has no more.
fn row(
    import: &mut Import,
    x: NodeId,
    axis: usize,
    at: usize,
    origin: &Origin,
) -> Refusable<NodeId> {
    let mut shape = import.graph.ty(x).shape.clone();
    let cut = |(d, &e): (usize, &usize)| if d == axis { (at as i64, 1, 1) } else { (0, 1, e) };
    let ranges = shape.iter().enumerate().map(cut).collect();
    let row = import.put(Op::Slice(ranges), &[x], origin)?;
    shape.remove(axis);
    import.put(Op::Reshape(shape), &[row], origin)
}

/// The graph of a scan, its states, and the operands whose rows are read.
fn parts<'s>(
    site: &Site<'s>,
    first: usize,
) -> Refusable<(&'s GraphProto, Vec<NodeId>, Vec<NodeId>)> {
    let body = site.graph("body")?;
    let mut states: Vec<NodeId> =
        (first..site.inputs.len()).map(|i| site.input(i)).collect::<Result<_, _>>()?;
    let count = usize::try_from(site.int("num_scan_inputs").unwrap_or(0)).unwrap_or(0);
    let given = states.len();
    if count == 0 || count > given || body.output.len() < given - count {
        let made = body.output.len();
        return Err(Some(not_supported(format!("{count} rows of {given} operands, {made} made"))));
    }
    let read = states.split_off(given - count);
    Ok((body, states, read))
}

fn tensors(values: Vec<NodeId>) -> Made {
    Ok(values.into_iter().map(Held::Tensor).collect())
}

/// A scan whose rows lie as the model says.
pub(super) fn scan(import: &mut Import, site: &Site) -> Made {
    let (body, states, read) = parts(site, 0)?;
    let listed = |name: &str, at: usize| site.ints(name).get(at).copied().unwrap_or(0);
    let way = |side: &str, k: usize| -> Way {
        let axis = listed(&format!("scan_{side}_axes"), k);
        (axis, listed(&format!("scan_{side}_directions"), k) != 0)
    };
    let made = (0..body.output.len() - states.len()).map(|k| way("output", k)).collect();
    let read = read.into_iter().enumerate().map(|(k, x)| (x, way("input", k))).collect();
    let rows = Rows { body, origin: &site.origin, read, made };
    tensors(rows.run(import, states)?)
}

/// The first kind of scans: operands have batches before their rows, and each is a scan by itself.
pub(super) fn scan_of_batches(import: &mut Import, site: &Site) -> Made {
    if site.inputs.first().copied().flatten().is_some() {
        return Err(Some(not_supported("batches of scans with lengths of their own")));
    }
    let (body, states, read) = parts(site, 1)?;
    let batch_of = |import: &Import, x: NodeId| import.graph.ty(x).shape.first().copied();
    let batches: Vec<Option<usize>> =
        states.iter().chain(&read).map(|&x| batch_of(import, x)).collect();
    let count = batches.first().copied().flatten().filter(|&n| n > 0 && n <= MOST_STEPS);
    let Some(count) = count.filter(|_| batches.iter().all(|&n| n == batches[0])) else {
        return Err(Some(not_supported(format!("scans of {batches:?} batches"))));
    };
    let made = vec![(0, false); body.output.len() - states.len()];
    let mut all: Vec<Vec<NodeId>> = vec![Vec::new(); body.output.len()];
    for batch in 0..count {
        let mut own = Vec::new();
        for &x in states.iter().chain(&read) {
            own.push(row(import, x, 0, batch, &site.origin)?);
        }
        let rows = own.split_off(states.len()).into_iter().enumerate();
        let backwards = |k: usize| site.ints("directions").get(k).is_some_and(|&d| d != 0);
        let read = rows.map(|(k, x)| (x, (0, backwards(k)))).collect();
        let rows = Rows { body, origin: &site.origin, read, made: made.clone() };
        let outputs = rows.run(import, own)?;
        all.iter_mut().zip(outputs).for_each(|(all, output)| all.push(output));
    }
    let joined = all.iter().map(|batches| import.stacked(batches, 0, &site.origin));
    tensors(joined.collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::Tensor;

    use super::super::control::tests::{graph, ints, model_at, node, outputs, port, with};
    use super::super::proto::NodeProto;

    /// A scan that sums rows from the last to the first.
    fn sums(inputs: &[&str]) -> NodeProto {
        let body = graph(
            &[port("s", &[], 1), port("r", &[], 1)],
            &[node("Add", &["s", "r"], &["t"]), node("Identity", &["t"], &["u"])],
            &["t", "u"],
        );
        let mut scan = with(node("Scan", inputs, &["last", "y"]), "body", body);
        scan.attribute.push(ints("num_scan_inputs", &[1]));
        scan
    }

    #[test]
    fn batches_are_scans_by_themselves() {
        let mut scan = sums(&["", "start", "x"]);
        scan.attribute.push(ints("directions", &[1]));
        let ports = [port("start", &[2], 1), port("x", &[2, 3], 1)];
        let made = graph(&ports, &[scan], &["last", "y"]);
        let start = Tensor::from_slice(&[2], &[100.0f32, 200.0]);
        let x = Tensor::from_slice(&[2, 3], &[1.0f32, 2.0, 4.0, 10.0, 20.0, 40.0]);
        let made = model_at(8, made, false).expect("a model");
        let found = outputs(&made, &[start, x]);
        assert_eq!(found[0], [107.0, 270.0]);
        assert_eq!(found[1], [104.0, 106.0, 107.0, 240.0, 260.0, 270.0]);
    }

    #[test]
    fn scans_that_do_not_fit_are_refused() {
        let refused = |opset, inputs: &[&str], shapes: [&[i64]; 2], axes: i64| {
            let mut scan = sums(inputs);
            scan.attribute.extend((opset > 8).then(|| ints("scan_input_axes", &[axes])));
            let ports = [port("start", shapes[0], 1), port("x", shapes[1], 1)];
            let made = graph(&ports, &[scan], &["last", "y"]);
            model_at(opset, made, false).expect_err("no such scan")
        };
        let old = ["", "start", "x"];
        let batches = refused(8, &old, [&[2], &[3, 3]], 0);
        assert!(batches.contains("[Some(2), Some(3)]"), "{batches}");
        let none = refused(8, &old, [&[], &[]], 0);
        assert!(none.contains("[None, None]"), "{none}");
        let lengths = refused(8, &["x", "start", "x"], [&[2], &[2, 3]], 0);
        assert!(lengths.contains("lengths of their own"), "{lengths}");
        for axis in [1, -2, i64::MIN] {
            let outside = refused(11, &old[1..], [&[], &[3]], axis);
            assert!(outside.contains("rows along axis"), "{outside}");
        }
        let long = refused(11, &old[1..], [&[], &[1 << 20]], 0);
        assert!(long.contains("[1048576] rows"), "{long}");
    }
}
