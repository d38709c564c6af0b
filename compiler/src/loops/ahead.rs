//! Panels that are asked for before they are read.
//!
//! The weights of a network are more than a cache holds, so each kernel finds its own in memory.
//! While the tiles of one panel are summed there is time to fetch the next one.

use super::contract::{Roles, factors, heights, widened};
use super::ir::{BufferId, Stmt, Var};
use super::lower::Lower;
use super::panels::Strip;
use crate::graph::op::Affine;

/// What the tiles of a panel ask for while they sum: each a part of the panel after it.
pub struct Ahead {
    /// The panels.
    pub buffer: BufferId,
    /// What is asked for in each turn of the sums, by the first tile of rows.
    pub place: Affine,
    /// From one tile of rows to the next.
    pub step: i64,
}

/// Panels are asked for ahead where they are so many bytes: fewer stay in the cache of a core.
const AHEAD_BYTES: usize = 256 << 10;

/// What tiles ask for ahead, of the loops over panels, those over what one panel serves, and the
/// sums; `body` is as `row_tiles` takes it.
pub fn ahead(
    lower: &Lower,
    body: &[Stmt],
    (roles, rows): (Roles, Option<Var>),
    strip: Strip,
    [panels, shared, sums]: [&[Var]; 3],
) -> Option<Ahead> {
    let (buffer, place) = widened(factors(body)?[roles.lanes])?;
    let memory = &lower.buffers[buffer];
    let extent = |v: Var| lower.extents[usize::from(v)];
    let innermost = panels.iter().rev().find(|v| extent(**v) > 1)?;
    let panel = usize::try_from(place.coefficient(usize::from(*innermost))).ok()?;
    let turns: usize = sums.iter().map(|&v| extent(v)).product();
    let tiles = rows.map_or(1, |rows| {
        let [height, whole, left] = heights(lower, strip, extent(rows));
        whole + left.min(height).min(1)
    });
    let parts = shared.iter().map(|&v| extent(v)).product::<usize>() * tiles;
    // Where more tiles share a panel, little of the time is spent on reading it.
    let few = 2..=2 * lower.target.lanes * strip.vectors;
    let apart = !roles.both && panel >= turns && strip.vectors > 0;
    if !apart || memory.len * memory.dtype.bytes() < AHEAD_BYTES || !few.contains(&parts) {
        return None;
    }
    let mut step = panel.div_ceil(turns * parts) as i64;
    let mut place = place.substitute(&|v| match panels.iter().any(|&p| usize::from(p) == v) {
        true => Affine::axis(v),
        false => Affine::constant(0),
    });
    place.offset += panel as i64;
    for &v in sums.iter().rev() {
        place = place.plus(v.into(), step);
        step *= extent(v) as i64;
    }
    let tile = step;
    step *= tiles as i64;
    for &v in shared.iter().rev() {
        place = place.plus(v.into(), step);
        step *= extent(v) as i64;
    }
    Some(Ahead { buffer, place, step: tile })
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use super::*;
    use crate::Compiler;
    use crate::graph::Graph;
    use crate::graph::op::Type;
    use crate::loops::ir::{Kind, Loops};
    use kiln_runtime::tensor::{DType, Tensor};

    /// The kernels of a product with constant weights.
    fn product([m, k, n]: [usize; 3], wide: bool) -> Vec<Loops> {
        let (mut graph, origin) = (Graph::default(), "product".into());
        let x = graph.input("x", Type::new(DType::F32, &[m, k]));
        let w = graph.tensor(&Tensor::from_slice(&[k, n], &vec![0.5f32; k * n]), &origin);
        let y = graph.matmul(x, w, &origin).expect("fits");
        graph.outputs.push(("y".into(), y));
        let compiler = Compiler::new().wide(wide);
        let kernels = compiler.optimise(&graph).expect("a sound graph");
        compiler.lower(&kernels).expect("kernels").kernels
    }

    /// The cache lines of f32 that statements ask for.
    fn asked(body: &[Stmt], at: &mut HashMap<Var, i64>, lines: &mut BTreeSet<i64>) {
        for stmt in body {
            match stmt {
                Stmt::For { var, extent, kind, body } if *kind != Kind::Unroll => {
                    for turn in 0..*extent {
                        at.insert(*var, turn as i64);
                        asked(body, at, lines);
                    }
                }
                Stmt::Prefetch { place, .. } => {
                    let terms = place.terms.iter().map(|&(v, c)| c * at[&v]);
                    lines.insert((place.offset + terms.sum::<i64>()) / 16);
                }
                Stmt::If { then, .. } => asked(then, at, lines),
                Stmt::For { .. } | Stmt::Store { .. } | Stmt::Multiply(_) => {}
            }
        }
    }

    #[test]
    fn every_panel_but_the_first_is_asked_for() {
        for wide in [false, true] {
            for [m, k, n] in [[40, 300, 512], [16, 512, 256], [23, 128, 640]] {
                let kernels = product([m, k, n], wide);
                let mut lines = BTreeSet::new();
                for kernel in &kernels {
                    asked(&kernel.body, &mut HashMap::new(), &mut lines);
                }
                let first = lines.first().copied();
                let first = first.unwrap_or_else(|| panic!("{wide} {m} x {k} x {n}"));
                let panel = 16 * first as usize / k;
                assert!(panel.is_power_of_two() && (8..=32).contains(&panel), "{panel} wide");
                let last = (k * n / 16) as i64;
                let missing: Vec<i64> = (first..last).filter(|l| !lines.contains(l)).collect();
                assert_eq!(missing, [], "{m} x {k} x {n}");
            }
        }
    }

    #[test]
    fn what_stays_in_a_cache_or_is_read_once_is_not_asked_for() {
        for shape in [[40, 64, 512], [4, 300, 512]] {
            let mut lines = BTreeSet::new();
            for kernel in product(shape, true) {
                asked(&kernel.body, &mut HashMap::new(), &mut lines);
            }
            assert!(lines.is_empty(), "{shape:?}");
        }
    }
}
