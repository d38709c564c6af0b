//! Exchanges of lanes between vectors: rows that become columns, and rows that are woven into one.

use super::emit::{Emitted, Machine};

/// Element k of the results, one after the other, is that of lane k / n of value k % n.
pub fn woven<M: Machine>(
    machine: &mut M,
    values: &[M::Value],
    lanes: usize,
) -> Emitted<Vec<M::Value>> {
    let n = values.len();
    if !n.is_power_of_two() {
        let from = |k: usize| (k % n, k / n);
        return gathered(machine, values, lanes, |v, lane| from(v * lanes + lane));
    }
    let mut values = values.to_vec();
    for _ in 0..n.ilog2() {
        let mut next = Vec::with_capacity(n);
        for (a, b) in (0..n / 2).map(|k| (&values[k], &values[k + n / 2])) {
            for half in [0, lanes / 2] {
                let order: Vec<u8> =
                    (0..lanes).map(|l| (half + l / 2 + l % 2 * lanes) as u8).collect();
                next.push(machine.pick(a, b, &order)?);
            }
        }
        values = next;
    }
    Ok(values)
}

/// The reverse: lane i of result r is element n * i + r of the values, one after the other.
pub fn unwoven<M: Machine>(
    machine: &mut M,
    values: &[M::Value],
    lanes: usize,
) -> Emitted<Vec<M::Value>> {
    let n = values.len();
    if !n.is_power_of_two() {
        let from = |k: usize| (k / lanes, k % lanes);
        return gathered(machine, values, lanes, |r, lane| from(n * lane + r));
    }
    let mut values = values.to_vec();
    for _ in 0..n.ilog2() {
        let mut halves = [Vec::with_capacity(n), Vec::with_capacity(n / 2)];
        for pair in values.chunks_exact(2) {
            for (odd, half) in halves.iter_mut().enumerate() {
                let order: Vec<u8> = (0..lanes).map(|l| (2 * l + odd) as u8).collect();
                half.push(machine.pick(&pair[0], &pair[1], &order)?);
            }
        }
        let [mut even, odd] = halves;
        even.extend(odd);
        values = even;
    }
    Ok(values)
}

/// As many vectors, of which each lane is one of a value.
fn gathered<M: Machine>(
    machine: &mut M,
    values: &[M::Value],
    lanes: usize,
    from: impl Fn(usize, usize) -> (usize, usize),
) -> Emitted<Vec<M::Value>> {
    (0..values.len())
        .map(|result| {
            let mut whole = values[0].clone();
            for (next, value) in values.iter().enumerate().skip(1) {
                let order: Vec<u8> = (0..lanes)
                    .map(|lane| match from(result, lane) {
                        (value, at) if value == next => (lanes + at) as u8,
                        (0, at) if next == 1 => at as u8,
                        _ => lane as u8,
                    })
                    .collect();
                whole = machine.pick(&whole, value, &order)?;
            }
            Ok(whole)
        })
        .collect()
}
