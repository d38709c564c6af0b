//! Operators of classical machine learning, as far as they are about numbers.

use kiln_runtime::tensor::{DType, Tensor};

use super::call::{Call, Outputs, not_supported, one};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::eval::Value;
use crate::graph::op::{BinaryFn, Composite, Op, ReduceFn, Shape};

/// Numbers of a table that the importer writes out at most.
const MOST: usize = 1 << 24;
/// Steps from the root of a tree to a leaf at most.
const DEEPEST: usize = 4096;

/// 1 where x is above a threshold, else 0.
pub(super) fn binarizer(call: &mut Call) -> Outputs {
    let threshold = f64::from(call.float_or("threshold", 0.0));
    let x = call.input(0)?;
    let ty = call.ty(x);
    let threshold = call.number(ty.dtype, ty.rank(), threshold);
    let above = call.graph.binary(BinaryFn::Lt, threshold, x, &call.origin)?;
    one(call.graph.cast(above, ty.dtype, &call.origin)?)
}

/// Columns of x; of a list, as a matrix of one row.
pub(super) fn array_feature_extractor(call: &mut Call) -> Outputs {
    let (mut x, index) = (call.input(0)?, call.input(1)?);
    let mut shape = call.shape(x);
    if shape.len() == 1 {
        shape.insert(0, 1);
        x = call.graph.reshape(x, &shape, &call.origin)?;
    }
    let Some(last) = shape.len().checked_sub(1) else {
        return Err(not_supported("columns of a single number"));
    };
    let count = call.ty(index).numel();
    let index = call.graph.reshape(index, &[count], &call.origin)?;
    one(call.graph.add(Op::Gather(last as u8), &[x, index], &call.origin)?)
}

/// Keys or values of labels: one of three attributes.
fn labels(call: &mut Call, side: &str) -> Result<Tensor, Diagnostic> {
    if let Some(list) = call.ints(&format!("{side}_int64s")) {
        return Ok(Tensor::from_slice(&[list.len()], &list));
    }
    if let Some(list) = call.floats(&format!("{side}_floats")) {
        return Ok(Tensor::from_slice(&[list.len()], &list));
    }
    match call.tensor(&format!("{side}_tensor"))? {
        Some(list) => Ok(Value::from_constant(&list).to_tensor()),
        None => Err(not_supported(format!("{side} of labels that are strings"))),
    }
}

/// For each element, the value that goes with the last key that it is equal to, or another one.
pub(super) fn label_encoder(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let (shape, count) = (call.shape(x), call.ty(x).numel());
    let (keys, values) = (labels(call, "keys")?, labels(call, "values")?);
    let (ks, vs) = (keys.shape().to_vec(), values.shape().to_vec());
    let [many] = ks[..] else {
        return Err(not_supported(format!("labels of shape {ks:?}")));
    };
    let dtype = values.dtype();
    let other = match (call.tensor("default_tensor")?, dtype) {
        (Some(other), _) => Value::from_constant(&other).to_tensor(),
        (None, DType::F32) => Tensor::from_slice(&[1], &[call.float_or("default_float", -0.0)]),
        (None, DType::I64) => Tensor::from_slice(&[1], &[call.int_or("default_int64", -1)]),
        (None, dtype) if dtype.is_float() => Value::splat(dtype, &[1], -0.0).to_tensor(),
        (None, dtype) => Value::splat(dtype, &[1], -1.0).to_tensor(),
    };
    for unused in ["default_float", "default_int64", "default_string"] {
        call.ignore(unused);
    }
    if vs != ks || other.numel() != 1 || other.dtype() != dtype {
        return Err(not_supported(format!("keys {ks:?} for values {vs:?}, else {other:?}")));
    }
    let (g, o) = (&mut *call.graph, &call.origin);
    let (keys, values, other) = (g.tensor(&keys, o), g.tensor(&values, o), g.tensor(&other, o));
    let (x, keys) = (g.reshape(x, &[count, 1], o)?, g.reshape(keys, &[1, many], o)?);
    let mut same = g.binary(BinaryFn::Eq, x, keys, o)?;
    if g.ty(x).dtype.is_float() {
        let (a, b) = (g.binary(BinaryFn::Ne, x, x, o)?, g.binary(BinaryFn::Ne, keys, keys, o)?);
        let both = g.binary(BinaryFn::And, a, b, o)?;
        same = g.binary(BinaryFn::Or, same, both, o)?;
    }
    // Counted from 1; the value for none stands before all others.
    let place = g.add(Op::Iota(Shape::from_slice(&[1, many]), 1), &[], o)?;
    let place = g.binary_number(BinaryFn::Add, place, 1.0, o)?;
    let none = g.scalar(DType::I64, 2, 0.0, o);
    let place = g.select(same, place, none, o)?;
    let place = g.reduce(ReduceFn::Max, place, &[1], o)?;
    let place = g.reshape(place, &shape, o)?;
    let other = g.reshape(other, &[1], o)?;
    let all = g.add(Op::Concat(0), &[other, values], o)?;
    one(g.add(Op::Gather(0), &[all, place], o)?)
}

/// Nodes of all trees, and after them the leaves, which lead to themselves.
struct Forest {
    features: Vec<i64>,
    modes: Vec<i64>,
    splits: Vec<f64>,
    missing: Vec<bool>,
    /// What each node leads to where it holds, and where it does not.
    next: [Vec<i64>; 2],
    /// For each node, the numbers that are in its set.
    members: Vec<Vec<f64>>,
    roots: Vec<i64>,
    depth: usize,
    weights: Vec<f64>,
    targets: Vec<i64>,
}

const MEMBER: i64 = 6;

fn numbers(call: &mut Call, name: &str) -> Result<Vec<f64>, Diagnostic> {
    let constant = call.tensor(name)?;
    Ok(constant.map_or(Vec::new(), |c| Value::from_constant(&c).as_f64s()))
}

fn forest(call: &mut Call) -> Result<Forest, Diagnostic> {
    let ints = |call: &Call, name: &str| call.ints(name).unwrap_or_default();
    let features = ints(call, "nodes_featureids");
    let count = features.len();
    let modes: Vec<i64> = numbers(call, "nodes_modes")?.into_iter().map(|m| m as i64).collect();
    let splits = numbers(call, "nodes_splits")?;
    let weights = numbers(call, "leaf_weights")?;
    let targets = ints(call, "leaf_targetids");
    let members = numbers(call, "membership_values")?;
    call.ignore("nodes_hitrates");
    let missing = call.ints("nodes_missing_value_tracks_true").unwrap_or_else(|| vec![0; count]);
    let roots = ints(call, "tree_roots");
    let leads = |call: &Call, ids: &str, leafs: &str| -> Vec<Option<i64>> {
        let (ids, leafs) = (ints(call, ids), ints(call, leafs));
        let place = |(&id, &leaf): (&i64, &i64)| {
            let below = if leaf != 0 { weights.len() } else { count };
            let at = usize::try_from(id).ok().filter(|&id| id < below)?;
            Some((at + if leaf != 0 { count } else { 0 }) as i64)
        };
        ids.iter().zip(&leafs).map(place).collect()
    };
    let yes = leads(call, "nodes_truenodeids", "nodes_trueleafs");
    let no = leads(call, "nodes_falsenodeids", "nodes_falseleafs");
    let lists = [modes.len(), splits.len(), missing.len(), yes.len(), no.len()];
    let inside = |list: &[i64], end: usize| list.iter().all(|&v| v >= 0 && (v as usize) < end);
    let fits = count > 0
        && lists.iter().all(|&len| len == count)
        && weights.len() == targets.len()
        && inside(&modes, 7)
        && inside(&roots, count)
        && !roots.is_empty();
    let next: Option<[Vec<i64>; 2]> = yes
        .into_iter()
        .collect::<Option<Vec<_>>>()
        .zip(no.into_iter().collect::<Option<Vec<_>>>())
        .map(|(yes, no)| [yes, no]);
    let (true, Some(next)) = (fits, next) else {
        let leaves = weights.len();
        return Err(not_supported(format!("{count} nodes and {leaves} leaves, lists {lists:?}")));
    };
    let missing = missing.into_iter().map(|m| m != 0).collect();
    let splits = splits.into_iter().collect();
    let mut all = Forest {
        features,
        modes,
        splits,
        missing,
        next,
        members: vec![Vec::new(); count],
        roots,
        depth: 0,
        weights,
        targets,
    };
    all.walk(&members)?;
    Ok(all)
}

impl Forest {
    /// Goes through the trees, each node before what it leads to and first where it holds: so sets
    /// are listed. Finds how deep they are, and that none goes round.
    fn walk(&mut self, members: &[f64]) -> Result<(), Diagnostic> {
        let count = self.features.len() as i64;
        // Each ends in a NaN, which is equal to nothing.
        let mut sets = members.split_inclusive(|v| v.is_nan());
        let mut seen = vec![false; count as usize];
        let mut open: Vec<(i64, usize)> = self.roots.iter().rev().map(|&root| (root, 1)).collect();
        while let Some((at, depth)) = open.pop() {
            if at >= count {
                continue;
            }
            if std::mem::replace(&mut seen[at as usize], true) || depth > DEEPEST {
                let what = format!("node {at} of a tree, met twice or deeper than {DEEPEST}");
                return Err(not_supported(what));
            }
            self.depth = self.depth.max(depth);
            if self.modes[at as usize] == MEMBER {
                let set = sets.next().ok_or_else(|| not_supported("a node without its set"))?;
                self.members[at as usize] = set.to_vec();
            }
            let [yes, no] = [0, 1].map(|k: usize| self.next[k][at as usize]);
            open.extend([(no, depth + 1), (yes, depth + 1)]);
        }
        Ok(())
    }
}

/// A table in a graph, one number for each node and leaf.
fn table(call: &mut Call, values: impl Iterator<Item = f64>, dtype: DType) -> Added {
    let values: Vec<f64> = values.collect();
    let all = call.graph.tensor(&Tensor::from_slice(&[values.len()], &values), &call.origin);
    call.graph.cast(all, dtype, &call.origin)
}

fn read(call: &mut Call, table: NodeId, at: NodeId) -> Added {
    call.graph.add(Op::Gather(0), &[table, at], &call.origin)
}

/// Whether the nodes at hold for the values of their features.
fn holds(call: &mut Call, forest: &Forest, at: NodeId, value: NodeId) -> Added {
    let leaves = forest.weights.len();
    let ty = call.ty(value);
    let splits = forest.splits.iter().copied().chain(vec![0.0; leaves]);
    let splits = table(call, splits, ty.dtype)?;
    let split = read(call, splits, at)?;
    let modes: Vec<f64> = forest.modes.iter().map(|&m| m as f64).collect();
    let modes = table(call, modes.into_iter().chain(vec![0.0; leaves]), DType::I32)?;
    let mode = read(call, modes, at)?;
    let mut result = call.number(DType::Bool, ty.rank(), 0.0);
    for number in 0..=MEMBER {
        if !forest.modes.contains(&number) {
            continue;
        }
        let (g, o) = (&mut *call.graph, &call.origin);
        let one = match number {
            0 => g.binary(BinaryFn::Le, value, split, o)?,
            1 => g.binary(BinaryFn::Lt, value, split, o)?,
            2 => g.binary(BinaryFn::Le, split, value, o)?,
            3 => g.binary(BinaryFn::Lt, split, value, o)?,
            4 => g.binary(BinaryFn::Eq, value, split, o)?,
            5 => g.binary(BinaryFn::Ne, value, split, o)?,
            _ => is_member(call, forest, at, value)?,
        };
        let (g, o) = (&mut *call.graph, &call.origin);
        let is_mode = g.binary_number(BinaryFn::Eq, mode, number as f64, o)?;
        let one = g.binary(BinaryFn::And, one, is_mode, o)?;
        result = g.binary(BinaryFn::Or, result, one, o)?;
    }
    if forest.missing.contains(&true) {
        let missing = forest.missing.iter().map(|&m| f64::from(u8::from(m)));
        let missing = table(call, missing.chain(vec![0.0; leaves]), DType::Bool)?;
        let missing = read(call, missing, at)?;
        let (g, o) = (&mut *call.graph, &call.origin);
        let is_nan = g.binary(BinaryFn::Ne, value, value, o)?;
        let missing = g.binary(BinaryFn::And, missing, is_nan, o)?;
        result = g.binary(BinaryFn::Or, result, missing, o)?;
    }
    Ok(result)
}

/// Whether values are in the sets of the nodes at; sets are as long as the longest.
fn is_member(call: &mut Call, forest: &Forest, at: NodeId, value: NodeId) -> Added {
    let longest = forest.members.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let rows = forest.members.len() + forest.weights.len();
    if rows.checked_mul(longest).is_none_or(|n| n > MOST) {
        return Err(not_supported(format!("sets of {longest} numbers for {rows} nodes")));
    }
    // NaN is equal to nothing.
    let mut values = vec![f64::NAN; rows * longest];
    for (row, set) in forest.members.iter().enumerate() {
        values[row * longest..][..set.len()].copy_from_slice(set);
    }
    let ty = call.ty(value);
    let (g, o) = (&mut *call.graph, &call.origin);
    let sets = g.tensor(&Tensor::from_slice(&[rows, longest], &values), o);
    let sets = g.cast(sets, ty.dtype, o)?;
    let sets = g.add(Op::Gather(0), &[sets, at], o)?;
    let mut shape = ty.shape.clone();
    shape.push(1);
    let value = g.reshape(value, &shape, o)?;
    let same = g.binary(BinaryFn::Eq, sets, value, o)?;
    let any = g.reduce(ReduceFn::Max, same, &[ty.rank()], o)?;
    g.reshape(any, &ty.shape, o)
}

/// Trees of comparisons: every row goes down every tree, as many steps as the deepest has.
pub(super) fn tree_ensemble(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let ty = call.ty(x);
    let [rows, columns] = ty.shape[..] else {
        return Err(not_supported(format!("features of shape {:?}", ty.shape)));
    };
    let forest = forest(call)?;
    let targets = call.int_or("n_targets", 0);
    let fold = call.int_or("aggregate_function", 1);
    let after = call.int_or("post_transform", 0);
    let targets = usize::try_from(targets).ok().filter(|&n| n > 0 && n <= MOST);
    let inside = |list: &[i64], end: usize| list.iter().all(|&v| v >= 0 && (v as usize) < end);
    let fits =
        targets.is_some_and(|n| inside(&forest.targets, n)) && inside(&forest.features, columns);
    let (Some(targets), true) = (targets, fits) else {
        let named = call.int_or("n_targets", 0);
        return Err(not_supported(format!("trees over {columns} features for {named} targets")));
    };
    let trees = forest.roots.len();
    let leaf = leaves_of(call, &forest, x)?;
    let count = forest.features.len();
    let weights = vec![0.0; count].into_iter().chain(forest.weights.iter().copied());
    let weights = table(call, weights, ty.dtype)?;
    let weight = read(call, weights, leaf)?;
    let owners = vec![0.0; count].into_iter().chain(forest.targets.iter().map(|&t| t as f64));
    let owners = table(call, owners, DType::I64)?;
    let owner = read(call, owners, leaf)?;
    let (f, fill) = match fold {
        0 | 1 => (ReduceFn::Sum, 0.0),
        2 => (ReduceFn::Min, if ty.dtype == DType::F64 { f64::MAX } else { f32::MAX.into() }),
        3 => (ReduceFn::Max, if ty.dtype == DType::F64 { f64::MIN } else { f32::MIN.into() }),
        other => return Err(not_supported(format!("the aggregate function {other}"))),
    };
    let fill = call.number(ty.dtype, 3, fill);
    let (g, o) = (&mut *call.graph, &call.origin);
    let (owner, weight) =
        (g.reshape(owner, &[rows, trees, 1], o)?, g.reshape(weight, &[rows, trees, 1], o)?);
    let target = g.add(Op::Iota(Shape::from_slice(&[1, 1, targets]), 2), &[], o)?;
    let own = g.binary(BinaryFn::Eq, owner, target, o)?;
    let own = g.select(own, weight, fill, o)?;
    let sum = g.reduce(f, own, &[1], o)?;
    let mut y = g.reshape(sum, &[rows, targets], o)?;
    if fold == 0 {
        y = g.binary_number(BinaryFn::Div, y, trees as f64, o)?;
    }
    one(match after {
        0 => y,
        1 => g.composite(Composite::Softmax(1), y, o)?,
        2 => g.composite(Composite::Sigmoid, y, o)?,
        other => return Err(not_supported(format!("the post transform {other}"))),
    })
}

/// The place of the leaf that each row comes to in each tree.
fn leaves_of(call: &mut Call, forest: &Forest, x: NodeId) -> Added {
    let (shape, dtype) = (call.shape(x), call.ty(x).dtype);
    let (rows, columns, trees) = (shape[0], shape[1], forest.roots.len());
    let (count, leaves) = (forest.features.len(), forest.weights.len());
    // Trees of one leaf are written as a node that leads to it either way.
    let features = forest.features.iter().map(|&f| f as f64).chain(vec![0.0; leaves]);
    let features = table(call, features, DType::I64)?;
    let leads = |k: usize| {
        let own = count..count + leaves;
        forest.next[k].iter().map(|&n| n as f64).chain(own.map(|n| n as f64))
    };
    let (yes, no) = (table(call, leads(0), DType::I64)?, table(call, leads(1), DType::I64)?);
    let (g, o) = (&mut *call.graph, &call.origin);
    let flat = g.reshape(x, &[rows * columns], o)?;
    let roots = g.i64s(&[1, trees], &forest.roots, o);
    let mut at = g.expand(roots, &[rows, trees], o)?;
    let row = g.add(Op::Iota(Shape::from_slice(&[rows, 1]), 0), &[], o)?;
    let row = g.binary_number(BinaryFn::Mul, row, columns as f64, o)?;
    for _ in 0..forest.depth {
        let feature = read(call, features, at)?;
        let place = call.graph.binary(BinaryFn::Add, feature, row, &call.origin)?;
        let value = read(call, flat, place)?;
        debug_assert_eq!(call.ty(value).dtype, dtype, "features are read as they are");
        let holds = holds(call, forest, at, value)?;
        let (there, elsewhere) = (read(call, yes, at)?, read(call, no, at)?);
        at = call.graph.select(holds, there, elsewhere, &call.origin)?;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::super::control::tests::{graph, ints, model, node, port};
    use super::super::proto::{AttributeProto, NodeProto, TensorProto};
    use super::*;
    use crate::interpret;
    use crate::tests::compiled;

    fn tensor(name: &str, data_type: i32, values: &[f32]) -> AttributeProto {
        let raw: Vec<u8> = match data_type {
            2 => values.iter().map(|&v| v as u8).collect(),
            _ => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        };
        let tensor = TensorProto {
            dims: vec![values.len() as i64],
            data_type: Some(data_type),
            raw_data: Some(raw.into()),
            ..Default::default()
        };
        AttributeProto { name: Some(name.into()), t: Some(Box::new(tensor)), ..Default::default() }
    }

    fn list(name: &str, ints: &[i64]) -> AttributeProto {
        AttributeProto { name: Some(name.into()), ints: ints.to_vec(), ..Default::default() }
    }

    /// Two trees over three features: one of all kinds of comparisons, one that is a leaf.
    fn forest() -> NodeProto {
        let mut trees = node("ai.onnx.ml.TreeEnsemble", &["x"], &["y"]);
        trees.attribute = vec![
            list("nodes_featureids", &[0, 1, 2, 0, 1, 2, 0, 1]),
            tensor("nodes_modes", 2, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]),
            tensor("nodes_splits", 1, &[0.5, -1.0, 2.0, 1.5, 1.0, 0.0, 0.0, 0.0]),
            list("nodes_truenodeids", &[1, 3, 5, 0, 1, 2, 3, 7]),
            list("nodes_trueleafs", &[0, 0, 0, 1, 1, 1, 1, 1]),
            list("nodes_falsenodeids", &[2, 4, 6, 4, 5, 6, 0, 7]),
            list("nodes_falseleafs", &[0, 0, 0, 1, 1, 1, 1, 1]),
            list("nodes_missing_value_tracks_true", &[1, 0, 0, 0, 0, 0, 0, 0]),
            tensor("membership_values", 1, &[2.0, 3.0, f32::NAN]),
            list("tree_roots", &[0, 7]),
            tensor("leaf_weights", 1, &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 0.5]),
            list("leaf_targetids", &[0, 1, 0, 1, 0, 1, 0, 1]),
            ints("n_targets", &[2]),
        ];
        trees
    }

    /// What the first tree says, written out.
    fn leaf([a, b, c]: [f32; 3]) -> usize {
        if a <= 0.5 || a.is_nan() {
            return match b < -1.0 {
                true if a > 1.5 => 0,
                true => 4,
                false if b == 1.0 => 1,
                false => 5,
            };
        }
        match c >= 2.0 {
            true if c != 0.0 => 2,
            true => 6,
            false if [2.0, 3.0].contains(&a) => 3,
            false => 0,
        }
    }

    #[test]
    fn trees_are_walked_from_their_roots_to_their_leaves() {
        let values = [-2.0, 0.0, 0.5, 1.0, 1.6, 2.0, 3.0, f32::NAN];
        let all: Vec<[f32; 3]> =
            (0..512).map(|i: usize| [values[i % 8], values[i / 8 % 8], values[i / 64]]).collect();
        let x = Tensor::from_slice(&[512, 3], &all.concat());
        let made = graph(&[port("x", &[512, 3], 1)], &[forest()], &["y"]);
        let made = model(made, false).expect("a model");
        let weights = [1.0f32, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];
        let meant = interpret(&made, std::slice::from_ref(&x)).remove(0);
        for found in [compiled(&made, &x), meant] {
            let rows = found.as_slice::<f32>().expect("f32").chunks(2);
            for (row, features) in rows.zip(&all) {
                let leaf = leaf(*features);
                let mut want = [0.0, 0.5];
                want[leaf % 2] += weights[leaf];
                assert_eq!(row, want, "{features:?}");
            }
        }
    }

    #[test]
    fn trees_that_are_none_are_refused() {
        let refused = |change: fn(&mut NodeProto)| {
            let mut trees = forest();
            change(&mut trees);
            let made = graph(&[port("x", &[4, 3], 1)], &[trees], &["y"]);
            model(made, false).expect_err("no tree")
        };
        let round = refused(|t| t.attribute[3].ints[1] = 0);
        let round_leaf = refused(|t| {
            t.attribute[3].ints[1] = 0;
            t.attribute[4].ints[1] = 0;
        });
        assert!(round_leaf.contains("met twice"), "{round_leaf}");
        assert!(round.contains("met twice") || round.contains("nodes and"), "{round}");
        for (change, what) in [
            ((|t| t.attribute[0].ints[2] = 3) as fn(&mut NodeProto), "trees over 3 features"),
            (|t| t.attribute[3].ints[0] = i64::MAX, "8 nodes and 8 leaves"),
            (|t| t.attribute[3].ints[0] = -1, "8 nodes and 8 leaves"),
            (|t| t.attribute[9].ints[0] = 8, "8 nodes and 8 leaves"),
            (|t| t.attribute[11].ints[0] = 2, "trees over 3 features for 2 targets"),
            (|t| drop(t.attribute.remove(8)), "a node without its set"),
            (|t| t.attribute[12].i = Some(1 << 40), "targets"),
        ] {
            let problem = refused(change);
            assert!(problem.contains(what), "{what}: {problem}");
        }
    }

    #[test]
    fn labels_are_looked_up_and_the_last_of_equal_keys_counts() {
        let mut made = node("ai.onnx.ml.LabelEncoder", &["x"], &["y"]);
        let keys = AttributeProto {
            name: Some("keys_floats".into()),
            floats: vec![1.0, f32::NAN, 2.0, 1.0],
            ..Default::default()
        };
        made.attribute = vec![keys, list("values_int64s", &[10, 20, 30, 40])];
        let of = |made: &NodeProto| {
            model(graph(&[port("x", &[2, 3], 1)], std::slice::from_ref(made), &["y"]), false)
        };
        let x = Tensor::from_slice(&[2, 3], &[1.0f32, 2.0, 3.0, f32::NAN, -1.0, 2.0]);
        let found = compiled(&of(&made).expect("a model"), &x);
        assert_eq!(found.as_slice::<i64>(), Some(&[40, 30, -1, 20, -1, 30][..]));
        made.attribute.push(ints("default_int64", &[7]));
        let found = compiled(&of(&made).expect("a model"), &x);
        assert_eq!(found.as_slice::<i64>(), Some(&[40, 30, 7, 20, 7, 30][..]));
        made.attribute[1] = list("values_int64s", &[10, 20, 30]);
        let problem = of(&made).expect_err("a value less");
        assert!(problem.contains("keys [4] for values [3]"), "{problem}");
        made.attribute.remove(1);
        let problem = of(&made).expect_err("no values");
        assert!(problem.contains("values of labels that are strings"), "{problem}");
    }
}
