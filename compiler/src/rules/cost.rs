//! What a kernel is modelled to cost on a CPU core: launch + the larger of traffic and arithmetic.
//! The figures are those of one AVX2 core; only their ratios decide.

use kiln_runtime::tensor::DType;

use super::attention;
use super::contract::through_view;
use super::kind::is_widening;
use super::reads;
use crate::graph::op::{Affine, BinaryFn, Contract, Op, Type, UnaryFn};
use crate::graph::scalar::{Dots, Parts};
use crate::graph::{Body, Graph, Node, NodeId};

/// Microseconds to start a kernel.
const LAUNCH_US: f64 = 0.3;
/// Bytes per microsecond.
const BYTES_PER_US: f64 = 20_000.0;
/// Floating point operations per microsecond at full rate.
const FLOPS_PER_US: f64 = 100_000.0;

/// Elements per microsecond that are read one by one into lanes.
const APART_PER_US: f64 = 1_000.0;
/// How much longer arithmetic takes outside of vector lanes.
const LANES: f64 = 8.0;
/// What folding an element takes, in floating point operations at full rate.
const FOLD_FLOPS: f64 = 8.0;

/// Elements of f32 per microsecond that are packed while a model runs: read and written, as by a
/// kernel that would bring them into order.
const PACKED_PER_US: f64 = BYTES_PER_US / 8.0;

/// Modelled time of all kernels of a graph that do not hang on constants only.
pub fn kernels_us(graph: &Graph, dots: Dots) -> f64 {
    let mut constant: Vec<bool> = Vec::with_capacity(graph.nodes.len());
    let mut total = 0.0;
    for node in &graph.nodes {
        let fixed = match node.op {
            Op::Input(_) => false,
            _ => node.args.iter().all(|a| constant[a.index()]),
        };
        constant.push(fixed);
        if let (Op::Fused(body), false) = (&node.op, fixed) {
            let weights: Vec<bool> = node.args.iter().map(|a| constant[a.index()]).collect();
            total += body_us(&graph.bodies[*body as usize], &weights, dots);
        }
    }
    total
}

/// Modelled time of one kernel on a machine with these dot products.
pub fn body_us(body: &Body, constant_args: &[bool], dots: Dots) -> f64 {
    let mut bytes = body.root().ty.size_bytes() as f64;
    let mut work_us = 0.0;
    let rows = attention::find(&body.nodes).map(|a| a.rows(&body.nodes));
    let asked = reads::asked(body);
    let apart = if rows.is_some() { Some(0.0) } else { reads::apart(body, &asked) };
    for (at, node) in body.nodes.iter().enumerate() {
        match &node.op {
            Op::Input(_) => bytes += bytes_read(body, at),
            op => {
                let constant = |k: usize| {
                    node.args.get(k).is_some_and(|a| match body.nodes[widened(body, *a)].op {
                        Op::Input(i) => constant_args.get(i as usize) == Some(&true),
                        _ => false,
                    })
                };
                work_us += match op {
                    Op::Contract(contract) => {
                        let read = through_views(body, contract, &node.args);
                        match rows {
                            Some(rows) => attention_us(&read, rows),
                            None => {
                                let from = [0, 1].map(|k: usize| widened_from(body, node.args[k]));
                                let constant = [constant(0), constant(1)];
                                match node.ty.dtype {
                                    DType::I32 => integers_us(&read, constant, from),
                                    _ => rounded_us(&read, constant, from, dots),
                                }
                            }
                        }
                    }
                    Op::Reduce(..) => asked[node.args[0].index()] * FOLD_FLOPS / FLOPS_PER_US,
                    op => op_us(op, asked[at], [constant(0), constant(1)]),
                };
            }
        }
    }
    let work_us = match apart {
        Some(apart) => work_us + apart / APART_PER_US,
        None => LANES * work_us,
    };
    LAUNCH_US + (bytes / BYTES_PER_US).max(work_us)
}

/// A contraction with its operands as they lie in memory, where the body only moves them.
fn through_views(body: &Body, contract: &Contract, args: &[NodeId]) -> Contract {
    let mut read = contract.clone();
    for (map, arg) in read.maps.iter_mut().zip(args) {
        let mut at = *arg;
        loop {
            let node = &body.nodes[at.index()];
            let Some(&x) = node.args.first() else { break };
            let from = &body.nodes[x.index()].ty.shape;
            if is_widening(&node.op, body.nodes[x.index()].ty.dtype) {
                at = x;
                continue;
            }
            let Some(next) = through_view(map, &node.op, from, &node.ty.shape) else { break };
            (*map, at) = (next, x);
        }
    }
    read
}

/// The node that is widened to the operand of a contraction; else that operand.
fn widened(body: &Body, operand: NodeId) -> usize {
    let node = &body.nodes[operand.index()];
    match node.args.first() {
        Some(x) if is_widening(&node.op, body.nodes[x.index()].ty.dtype) => x.index(),
        _ => operand.index(),
    }
}

/// What an operand of a contraction, moved or not, is widened from.
fn widened_from(body: &Body, operand: NodeId) -> Option<DType> {
    let mut at = operand;
    loop {
        let node = &body.nodes[at.index()];
        let x = *node.args.first()?;
        let from = body.nodes[x.index()].ty.dtype;
        if is_widening(&node.op, from) {
            return Some(from);
        }
        at = x;
    }
}

/// How much of each argument a body reads, where it only takes parts of it; else 1.
pub fn parts_read(body: &Body) -> impl Iterator<Item = f64> + '_ {
    let arguments = body.nodes.iter().enumerate().filter(|(_, n)| matches!(n.op, Op::Input(_)));
    arguments.map(|(at, node)| {
        let mut users = body.nodes.iter().filter(|n| n.args.iter().any(|a| a.index() == at));
        let part = |n: &Node| matches!(n.op, Op::Slice(_)).then(|| n.ty.numel());
        let read: Option<usize> = users.try_fold(0, |sum, n| Some(sum + part(n)?));
        let whole = node.ty.numel().max(1);
        read.map_or(1.0, |read| read.min(whole) as f64 / whole as f64)
    })
}

/// What a body reads of an argument: of one that it only takes parts of, those parts.
pub fn pieces_read(body: &Body, argument: usize) -> Vec<&Type> {
    let ty = &body.nodes[argument].ty;
    let users = body.nodes.iter().filter(|n| n.args.iter().any(|a| a.index() == argument));
    let part = |user: &'_ Node| match &user.op {
        Op::Slice(_) => true,
        Op::Gather(_) => user.args[0].index() == argument,
        _ => false,
    };
    let pieces: Option<Vec<&Type>> = users.map(|user| part(user).then_some(&user.ty)).collect();
    let elements = |pieces: &Vec<&Type>| pieces.iter().map(|ty| ty.numel()).sum::<usize>();
    pieces.filter(|pieces| elements(pieces) < ty.numel()).unwrap_or_else(|| vec![ty])
}

/// The bytes of that.
fn bytes_read(body: &Body, argument: usize) -> f64 {
    let size = body.nodes[argument].ty.dtype.bytes();
    pieces_read(body, argument).iter().map(|ty| ty.numel() * size).sum::<usize>() as f64
}

/// Modelled time of an operation's arithmetic for so many results.
pub fn op_us(op: &Op, results: f64, constant: [bool; 2]) -> f64 {
    match op {
        Op::Contract(contract) => contract_us(contract, constant),
        Op::Unary(f) => results * unary_weight(*f) / FLOPS_PER_US,
        Op::Binary(BinaryFn::Pow) => results * 100.0 / FLOPS_PER_US,
        Op::Binary(_) | Op::Select | Op::Cast(_) => results * 8.0 / FLOPS_PER_US,
        Op::Reduce(..) | Op::Scan(..) | Op::Scatter(_) | Op::Gather(_) => {
            results * 16.0 / FLOPS_PER_US
        }
        Op::Composite(_) => results * 200.0 / FLOPS_PER_US,
        Op::Input(_)
        | Op::Const(_)
        | Op::Iota(..)
        | Op::Bits(_)
        | Op::Reshape(_)
        | Op::Permute(_)
        | Op::Expand(_)
        | Op::Slice(_)
        | Op::Pad(_)
        | Op::Window(_)
        | Op::Concat(_)
        | Op::Fused(_) => 0.0,
    }
}

fn unary_weight(f: UnaryFn) -> f64 {
    match f {
        UnaryFn::Exp
        | UnaryFn::Log
        | UnaryFn::Tanh
        | UnaryFn::Erf
        | UnaryFn::Sin
        | UnaryFn::Cos => 100.0,
        UnaryFn::Recip | UnaryFn::Sqrt => 30.0,
        UnaryFn::Neg
        | UnaryFn::Abs
        | UnaryFn::Sign
        | UnaryFn::Floor
        | UnaryFn::Ceil
        | UnaryFn::Round
        | UnaryFn::Not => 8.0,
    }
}

/// Channels of a convolution from which on minimal filtering pays: there are transforms for each,
/// products for each pair.
pub const LEAST_CHANNELS: usize = 16;

/// Results of a tile along both axes of the image, in a convolution of 3 by 3 by minimal filtering
/// (`loops/winograd.rs`) whose result has these extents; none where it is too small.
pub fn results_of_tile(image: [usize; 2]) -> Option<usize> {
    match image[0].min(image[1]) {
        0..4 => None,
        4..9 => Some(2),
        _ => Some(4),
    }
}

/// How much faster a convolution of 3 by 3 is by minimal filtering, transforms included, where it
/// can be done so.
fn fewer_products(contract: &Contract, constant: [bool; 2]) -> Option<f64> {
    let weights = constant.iter().position(|&c| c)?;
    let channels = contract.maps[1 - weights].last()?.as_axis()?;
    let out = (0..contract.n_out).rev().find(|&axis| contract.extents[axis] > 1)?;
    let m = tile_of_products(contract, weights, [channels, out])?;
    Some(if m == 4 { 2.2 } else { 1.5 })
}

/// How many results the tiles of a convolution of 3 by 3 have along both axes of the image, where
/// it can be done by minimal filtering; its channels are these axes of the sum and of the result.
pub fn tile_of_products(
    contract: &Contract,
    weights: usize,
    [channels, out]: [usize; 2],
) -> Option<usize> {
    let (x, w) = (&contract.maps[1 - weights], &contract.maps[weights]);
    let windows = x.iter().filter_map(|index| match index.terms[..] {
        [(image, 1), (tap, 1)] if contract.extents[usize::from(tap)] == 3 => Some(image),
        _ => None,
    });
    let [Some(a), Some(b), None] = [0, 1, 2].map(|i| windows.clone().nth(i)) else { return None };
    let m = results_of_tile([a, b].map(|axis| contract.extents[usize::from(axis)]))?;
    let fits = |axis: usize| {
        contract.extents[axis] >= LEAST_CHANNELS && contract.extents[axis].is_multiple_of(8)
    };
    let pure = w.len() == 4 && w.iter().all(|index| index.as_axis().is_some());
    let summed =
        channels >= contract.n_out && w.iter().any(|index| index.as_axis() == Some(channels));
    let both = fits(channels) && fits(out) && !x.iter().any(|i| i.coefficient(out) != 0);
    (pure && summed && both).then_some(m)
}

/// A contraction of an attention with so many rows. Where they are many, each operand is packed for
/// some of them at a time, wherever it lies; where they are few, keys are read as they lie.
fn attention_us(contract: &Contract, rows: usize) -> f64 {
    let flops = 2.0 * contract.extents.iter().map(|&e| e as f64).product::<f64>();
    let us = |efficiency: f64| flops / FLOPS_PER_US / efficiency;
    let along = |k: usize| {
        let last = contract.extents.len() - 1;
        contract.maps[k].last().is_some_and(|i| i.coefficient(last) == 1)
    };
    match rows {
        attention::MANY.. => us(0.5) + flops / 2.0 / rows as f64 / PACKED_PER_US,
        ..=attention::FEW if along(0) && along(1) => us(0.25),
        _ => contract_us(contract, [false; 2]),
    }
}

/// Whether a contraction can sum over words of so many parts (`loops/words.rs`): one operand is
/// constant and alone in moving along the last axis of the result, and the other one steps by one
/// element along an axis of the sum that has a multiple of these.
pub fn in_words(contract: &Contract, constant: [bool; 2], parts: Parts) -> bool {
    let Some(weights) = constant.iter().position(|&c| c) else { return false };
    let Some(axis) = (0..contract.n_out).rev().find(|&a| contract.extents[a] > 1) else {
        return false;
    };
    let [x, w] = [1 - weights, weights].map(|k| &contract.maps[k]);
    let along = |map: &[Affine], axis: usize| map.iter().any(|i| i.coefficient(axis) != 0);
    let Some((last, others)) = x.split_last() else { return false };
    let whole = last.terms.iter().any(|&(k, step)| {
        let k = usize::from(k);
        let sum = k >= contract.n_out && step == 1 && !along(others, k) && along(w, k);
        sum && contract.extents[k].is_multiple_of(parts.count())
    });
    whole && along(w, axis) && !along(x, axis)
}

/// Modelled time of a contraction to i32 of what is widened from these. Pairs of i16 are summed 1.6
/// times as fast as numbers of f32, quads of bytes twice as fast as these; others go one by one.
pub fn integers_us(contract: &Contract, constant: [bool; 2], from: [Option<DType>; 2]) -> f64 {
    let products = contract.extents.iter().map(|&e| e as f64).product::<f64>();
    let lanes = (0..contract.n_out).rev().find(|&a| contract.extents[a] > 1);
    let extent = lanes.map_or(1, |a| contract.extents[a]);
    let filled = extent as f64 / extent.next_multiple_of(8) as f64;
    let parts = from[0].zip(from[1]).and_then(|(x, y)| Parts::of([x, y]));
    let efficiency = match parts.filter(|&parts| in_words(contract, constant, parts)) {
        Some(Parts::Pairs) if fewer_products(contract, constant).is_some() => 1.7,
        Some(Parts::Pairs) => 0.95 * filled,
        Some(Parts::Quads) => 1.9 * filled,
        Some(Parts::Halves) | None => 0.03,
    };
    2.0 * products / FLOPS_PER_US / efficiency
}

/// How much longer it takes to widen short floats one by one before they go into all lanes.
const ONE_BY_ONE: f64 = 2.5;

/// Modelled time of a contraction of f32 of which operands may be widened from short floats. Those
/// of two such are summed twice as fast where the machine has dot products of them.
pub fn rounded_us(
    contract: &Contract,
    constant: [bool; 2],
    from: [Option<DType>; 2],
    dots: Dots,
) -> f64 {
    if from == [None; 2] {
        return contract_us(contract, constant);
    }
    let us = products_us(contract, constant, None);
    let both = dots.rounded.is_some() && from.iter().all(|f| *f == dots.rounded);
    if both && (dots.warps || in_words(contract, constant, Parts::Halves)) {
        return us / 2.0;
    }
    let lanes = (0..contract.n_out).rev().find(|&a| contract.extents[a] > 1);
    let in_lanes = |k: usize| {
        lanes.is_some_and(|axis| contract.maps[k].iter().any(|i| i.coefficient(axis) != 0))
    };
    let widened = |k: usize| from[k].is_some_and(|from| from.bytes() < 4);
    if (0..2).any(|k| widened(k) && !in_lanes(k)) { us * ONE_BY_ONE } else { us }
}

/// A contraction by fewer products than it has, where it can be done so, or by all of them.
fn contract_us(contract: &Contract, constant: [bool; 2]) -> f64 {
    products_us(contract, constant, fewer_products(contract, constant))
}

/// The last result axis goes into lanes: fast where one operand steps along it by one element or
/// is constant (then it is packed), and the other stays or does the same.
fn products_us(contract: &Contract, constant: [bool; 2], fewer: Option<f64>) -> f64 {
    let flops = 2.0 * contract.extents.iter().map(|&e| e as f64).product::<f64>();
    let lanes = (0..contract.n_out).rev().find(|&a| contract.extents[a] > 1);
    let Some(axis) = lanes else { return flops / FLOPS_PER_US / 0.1 };
    let last_index = |k: usize| contract.maps[k].last().map_or(0, |a| a.coefficient(axis));
    let uses = |k: usize| contract.maps[k].iter().any(|a| a.coefficient(axis) != 0);
    let outer_use = |k: usize| {
        let n = contract.maps[k].len();
        contract.maps[k].iter().take(n.saturating_sub(1)).any(|a| a.coefficient(axis) != 0)
    };
    let unit = |k: usize| !uses(k) || constant[k] || (last_index(k) == 1 && !outer_use(k));
    let extent = contract.extents[axis];
    // Lanes that the last tile leaves empty.
    let filled = extent as f64 / extent.next_multiple_of(8) as f64;
    let packed = (0..2).any(|k| uses(k) && constant[k]);
    let wide = extent >= 8;
    // The longest part of the sum should run along an operand's last axis.
    let longest = (contract.n_out..contract.extents.len()).max_by_key(|&a| contract.extents[a]);
    let along = |k: usize| {
        constant[k]
            || longest
                .is_none_or(|a| contract.maps[k].last().is_some_and(|i| i.coefficient(a) == 1))
    };
    // An operand that is not constant is packed in each run, where no index picks two elements.
    let pure = |k: usize| contract.maps[k].iter().all(|a| a.terms.len() <= 1);
    let turned = (0..2).find(|&k| !unit(k) && !uses(1 - k) && pure(k));
    let picked = |k: usize| {
        let axes = (0..contract.extents.len())
            .filter(|&a| contract.maps[k].iter().any(|i| i.coefficient(a) != 0));
        axes.map(|a| contract.extents[a] as f64).product::<f64>()
    };
    if let (Some(k), true) = (turned, wide) {
        let packing = picked(k) / PACKED_PER_US;
        return packing + flops / FLOPS_PER_US / (0.3 * filled);
    }
    let efficiency = match (unit(0) && unit(1), wide) {
        (true, true) if let Some(fewer) = fewer => 0.6 * fewer,
        // Panels packed at compile time are read in order, whatever the other operand does.
        (true, true) if packed && along(0) && along(1) => 0.6 * filled,
        (true, true) if packed => 0.5 * filled,
        (true, true) => 0.3 * filled,
        (true, false) => 0.12,
        (false, _) => 0.04,
    };
    flops / FLOPS_PER_US / efficiency
}
