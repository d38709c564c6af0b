//! Attention on a GPU: a block of threads for each row of queries. Its scores are in shared memory
//! from the products to the sums of weighted values.

use super::attention::{Tiles, mixed, row_of, scores, softmax};
use super::contract;
use super::gpu;
use super::ir::{Expr, Loops, Stmt, Var};
use super::lower::{Lower, Lowered, Lowering, origin_place};
use super::nest::{self, wrap};
use crate::rules::attention::Attention;
use kiln_runtime::tensor::DType;

/// Keys at most: their scores have to fit into the shared memory of a block.
const KEYS: usize = 8 << 10;
/// Threads of a block at most.
const THREADS: usize = 128;

/// The kernel of an attention, where the scores of a row fit into shared memory.
pub fn lower(
    mut lower: Lower,
    root: usize,
    parts: &Attention,
    name: &str,
) -> Lowering<Option<Lowered>> {
    let weight = lower.register(DType::F32, 1);
    lower.bind_cell(parts.weights, Expr::Load(weight, origin_place()));
    let product = contract::product(&mut lower, root, parts.mixed)?;
    let asked = lower.asked(parts.weights);
    lower.unbind(parts.weights);
    let (key, row) = row_of(&product, asked.as_deref())?;
    let keys = lower.extents[key as usize];
    if keys > KEYS {
        return Ok(None);
    }
    let outer: Vec<Var> = product.vars[..product.vars.len() - 1].to_vec();
    lower.row_threads = keys.next_power_of_two().clamp(gpu::WARP, THREADS);
    let line = (gpu::shared(&mut lower, DType::F32, keys + 1), origin_place());
    let scores = scores(&mut lower, parts, (&row, keys), &line)?;
    let most = nest::reduce_pass(&mut lower, parts.most, &row, (&[keys], &[None]), None)?;
    let (softmax, scale) = softmax(&mut lower, parts, (&row, keys), &line)?;
    let mixed = mixed(product, parts.side, (key, scale), &line)?;
    let mut body = each(&mut lower, &scores)?;
    body.extend(most);
    body.extend(softmax);
    body.extend(each(&mut lower, &mixed)?);
    let body = gpu::blocks(&mut lower, &outer, body)?;
    let kernels = vec![Loops { name: name.to_string(), ..lower.finish(body) }];
    Ok(Some(Lowered { kernels, scratch: Vec::new() }))
}

/// A thread for each element of a contraction: a sum of its own.
fn each(lower: &mut Lower, tiles: &Tiles) -> Lowering<Vec<Stmt>> {
    let value = contract::zero(DType::F32);
    let mut body = vec![Stmt::Store { buffer: tiles.cell, place: origin_place(), value }];
    let update = tiles.update(tiles.operands[0].clone());
    body.extend(wrap(&lower.extents, &tiles.summed, vec![update], 0));
    body.extend(tiles.end.iter().cloned());
    gpu::pass(lower, vec![tiles.lanes], body)
}
