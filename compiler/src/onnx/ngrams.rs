//! Which pieces of sequences of numbers are there, and how often.

use kiln_runtime::tensor::{DType, Tensor};

use super::call::{Call, Outputs, not_supported, one};
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, ReduceFn};

/// Numbers of a table that the importer writes out at most.
const MOST: usize = 1 << 24;
/// Numbers that are skipped at most.
const FARTHEST: usize = 4096;

/// Which of the n-grams of a pool a list, or each row of a matrix, has, and how often.
pub(super) fn tf_idf(call: &mut Call) -> Outputs {
    let x = call.input(0)?;
    let shape = call.shape(x);
    let pool = call.ints("pool_int64s").ok_or_else(|| not_supported("n-grams of strings"))?;
    let starts = call.ints("ngram_counts").unwrap_or_default();
    let columns = call.ints("ngram_indexes").unwrap_or_default();
    let (shortest, longest) =
        (call.int_or("min_gram_length", 1), call.int_or("max_gram_length", 1));
    let skips = usize::try_from(call.int_or("max_skip_count", 0)).unwrap_or(0);
    let mode = call.string_or("mode", "TF");
    let weights = call.floats("weights").unwrap_or_default();
    let (rows, length) = match shape[..] {
        [length] => (1, length),
        [rows, length] => (rows, length),
        _ => return Err(not_supported(format!("n-grams of a tensor {shape:?}"))),
    };
    let width = columns.iter().max().map_or(0, |&last| last.saturating_add(1));
    let width = usize::try_from(width).ok().filter(|&n| n > 0 && n <= MOST);
    let fits = columns.iter().all(|&c| c >= 0)
        && (weights.is_empty() || Some(weights.len()) == width)
        && skips.min(length) <= FARTHEST;
    let grams = grams(&pool, &starts);
    let (Some(width), Some(grams), true) = (width, grams, fits) else {
        let (n, all) = (columns.len(), pool.len());
        return Err(not_supported(format!("{n} columns for n-grams of {all} numbers, {starts:?}")));
    };
    let x = call.graph.reshape(x, &[rows, length], &call.origin)?;
    let x = call.graph.cast(x, DType::I64, &call.origin)?;
    let mut sum = call.number(DType::F32, 2, 0.0);
    sum = call.graph.expand(sum, &[rows, width], &call.origin)?;
    let mut first = 0;
    for (size, list) in (1..).zip(grams) {
        let many = list.len() / size;
        let wanted = (shortest..=longest).contains(&(size as i64));
        let own: Option<&[i64]> = columns.get(first..first + many);
        first += many;
        let own = own.ok_or_else(|| not_supported(format!("no columns for {size}-grams")))?;
        if wanted && many > 0 {
            let counts = counted(call, x, (list, size), (own, width), skips)?;
            sum = call.graph.binary(BinaryFn::Add, sum, counts, &call.origin)?;
        }
    }
    let weighed = |call: &mut Call, y: NodeId| match weights.is_empty() {
        true => Ok(y),
        false => {
            let weights = Tensor::from_slice(&[1, width], &weights);
            let weights = call.graph.tensor(&weights, &call.origin);
            call.graph.binary(BinaryFn::Mul, y, weights, &call.origin)
        }
    };
    let y = match mode.as_str() {
        "TF" => sum,
        "TFIDF" => weighed(call, sum)?,
        "IDF" => {
            let there = call.graph.binary_number(BinaryFn::Min, sum, 1.0, &call.origin)?;
            weighed(call, there)?
        }
        other => return Err(not_supported(format!("the mode {other:?}"))),
    };
    let shape = if shape.len() == 1 { vec![width] } else { vec![rows, width] };
    one(call.graph.reshape(y, &shape, &call.origin)?)
}

/// The n-grams of each size, one after another, where their beginnings are in order.
fn grams<'p>(pool: &'p [i64], starts: &[i64]) -> Option<Vec<&'p [i64]>> {
    let start = |i: usize| match starts.get(i) {
        Some(&start) => usize::try_from(start).ok(),
        None => Some(pool.len()),
    };
    (0..starts.len())
        .map(|i| pool.get(start(i)?..start(i + 1)?).filter(|list| list.len().is_multiple_of(i + 1)))
        .collect()
}

/// How often each n-gram of one size stands in each row, in its column.
fn counted(
    call: &mut Call,
    x: NodeId,
    (list, size): (&[i64], usize),
    (columns, width): (&[i64], usize),
    skips: usize,
) -> Added {
    let (many, shape) = (list.len() / size, call.shape(x));
    let (rows, length) = (shape[0], shape[1]);
    if many.checked_mul(width).is_none_or(|n| n > MOST) {
        return Err(not_supported(format!("{many} n-grams in {width} columns")));
    }
    // Of equal n-grams, the last one counts.
    let mut into = vec![0f32; many * width];
    for (gram, &column) in columns.iter().enumerate() {
        let own = &list[gram * size..][..size];
        let again = list[(gram + 1) * size..].chunks(size).any(|later| later == own);
        into[gram * width + column as usize] = if again { 0.0 } else { 1.0 };
    }
    let mut sum = call.number(DType::F32, 2, 0.0);
    sum = call.graph.expand(sum, &[rows, many], &call.origin)?;
    // A single number has nothing between its parts.
    let most = if size == 1 { 0 } else { skips.min(length) };
    for apart in 1..=most + 1 {
        let Some(places) = length.checked_sub(apart * (size - 1)).filter(|&n| n > 0) else { break };
        let mut all: Option<NodeId> = None;
        for part in 0..size {
            let own: Vec<i64> = list.iter().skip(part).step_by(size).copied().collect();
            let x = call.cut(x, 1, ((part * apart) as i64, 1, places))?;
            let (g, o) = (&mut *call.graph, &call.origin);
            let x = g.reshape(x, &[rows, places, 1], o)?;
            let own = g.i64s(&[1, 1, many], &own, o);
            let same = g.binary(BinaryFn::Eq, x, own, o)?;
            all = Some(all.map_or(Ok(same), |all| g.binary(BinaryFn::And, all, same, o))?);
        }
        let Some(all) = all else { break };
        let (g, o) = (&mut *call.graph, &call.origin);
        let all = g.cast(all, DType::F32, o)?;
        let found = g.reduce(ReduceFn::Sum, all, &[1], o)?;
        let found = g.reshape(found, &[rows, many], o)?;
        sum = g.binary(BinaryFn::Add, sum, found, o)?;
    }
    let into = call.graph.tensor(&Tensor::from_slice(&[many, width], &into), &call.origin);
    call.graph.matmul(sum, into, &call.origin)
}

#[cfg(test)]
mod tests {
    use super::super::control::tests::{graph, ints, model, node, port};
    use super::super::proto::{AttributeProto, NodeProto};
    use super::*;
    use crate::tests::compiled;

    fn list(name: &str, ints: &[i64]) -> AttributeProto {
        AttributeProto { name: Some(name.into()), ints: ints.to_vec(), ..Default::default() }
    }

    #[test]
    fn n_grams_are_counted_with_numbers_between_them() {
        let mut counted = node("TfIdfVectorizer", &["x"], &["y"]);
        let text = |name: &str, s: &str| AttributeProto {
            name: Some(name.into()),
            s: Some(s.as_bytes().to_vec().into()),
            ..Default::default()
        };
        counted.attribute = vec![
            list("pool_int64s", &[1, 2, 1, 2, 2, 3, 1, 3]),
            list("ngram_counts", &[0, 2]),
            list("ngram_indexes", &[4, 0, 1, 2, 3]),
            ints("min_gram_length", &[1]),
            ints("max_gram_length", &[2]),
            ints("max_skip_count", &[1]),
            text("mode", "TF"),
        ];
        let made = |counted: &NodeProto, len: i64| {
            model(graph(&[port("x", &[len], 7)], std::slice::from_ref(counted), &["y"]), false)
        };
        let x = Tensor::from_slice(&[6], &[1i64, 2, 3, 1, 2, 9]);
        let found = compiled(&made(&counted, 6).expect("a model"), &x);
        // 2 of 2; 1 2 twice; 2 3 once; 1 . 3 once; 2 of 1.
        assert_eq!(found.as_slice::<f32>(), Some(&[2.0, 2.0, 1.0, 1.0, 2.0][..]));
        counted.attribute[6] = text("mode", "IDF");
        let weights = AttributeProto {
            name: Some("weights".into()),
            floats: vec![2.0, 3.0, 4.0, 5.0, 6.0],
            ..Default::default()
        };
        counted.attribute.push(weights);
        let found = compiled(&made(&counted, 6).expect("a model"), &x);
        assert_eq!(found.as_slice::<f32>(), Some(&[2.0, 3.0, 4.0, 5.0, 6.0][..]));
        counted.attribute[1] = list("ngram_counts", &[0, 5]);
        assert!(made(&counted, 6).expect_err("an odd number").contains("[0, 5]"));
        counted.attribute[1] = list("ngram_counts", &[4, 2]);
        assert!(made(&counted, 6).expect_err("out of order").contains("[4, 2]"));
        counted.attribute[1] = list("ngram_counts", &[0, 2]);
        counted.attribute[5] = ints("max_skip_count", &[1 << 40]);
        assert!(made(&counted, 1 << 20).expect_err("too far").contains("K0130"));
    }
}
