//! Contractions as register tiles.
//!
//! The last axis of the result goes into vector lanes: one operand steps by one element along it
//! (or is packed into panels so that it does), the other does not move and is broadcast. A tile of
//! P rows times Q vectors stays in registers while the sum runs; then the epilogue is computed and
//! stored. Operands that are packed and constant are packed once, when the model is compiled.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::ahead::{Ahead, ahead};
use super::index::{Index, add, flatten, scale, unflatten};
use super::ir::{BufferId, Expr, Kind, Loops, Number, Param, Parts, Place, Scope, Stmt, Var};
use super::lower::{Lower, Lowered, Lowering, Refused, origin_place};
use super::panels::{
    Panels, Strip, pack, packable, packed_len, panel_elements, panel_order, strips,
};
use super::{dots, narrow, nest, rewrite, winograd, words};
use crate::graph::op::{Affine, BinaryFn, Op};
use crate::graph::used::iteration;

/// A contraction while it is lowered, as functions of the loop variables.
#[derive(Clone)]
pub struct Product {
    /// Variables of the result, outermost first.
    pub vars: Vec<Var>,
    /// Variables of the sum.
    pub summed: Vec<Var>,
    /// Operands at these variables.
    pub operands: [Arc<Expr>; 2],
    /// The cell that stands for the sum in the result.
    pub cell: BufferId,
    /// Where the result goes.
    pub out: BufferId,
    /// The place there.
    pub place: Place,
    /// What goes there.
    pub result: Arc<Expr>,
    /// Where the sum runs over words: their parts, and how far apart these lie where it is packed.
    pub parts: Option<(Parts, i64)>,
}

/// The kernels of a body with a contraction.
pub fn lower(mut lower: Lower, root: usize, contract: usize, name: &str) -> Lowering<Lowered> {
    if lower.ty(root).numel() == 0 {
        return Ok(Lowered::default());
    }
    let mut product = product(&mut lower, root, contract)?;
    let mut lowered = Lowered::default();
    if lower.target.threads > 0 {
        let tiles = super::gpu_tiles::tiles(&mut lower, &product, &mut lowered.scratch)?;
        lowered.kernels = match tiles {
            Some(kernels) => kernels,
            None => vec![plain(lower, product, &mut lowered)?],
        };
        for kernel in &mut lowered.kernels {
            kernel.name = match kernel.name.as_str() {
                "" => name.into(),
                part => format!("{name}.{part}"),
            };
        }
        return Ok(lowered);
    }
    let mut few = false;
    if let Some(words) = words::in_words(&mut lower, &product)?
        && let Some(roles) = roles(&lower, &words)
    {
        if let Some((Parts::Pairs, _)) = words.parts {
            let bare = words::bare(&lower, product);
            few = winograd::lower(&lower, &bare, roles, &mut lowered)?;
        }
        product = words;
    }
    let in_lanes = dots::lower(&lower, &product, &mut lowered)?;
    if let (Some(&n), None) = (product.vars.last(), product.parts) {
        lower.target = lower.target.for_axis(lower.extents[usize::from(n)]);
    }
    match roles(&lower, &product) {
        _ if in_lanes.is_some() => lowered.kernels.extend(in_lanes),
        Some(roles) => {
            few |=
                product.parts.is_none() && winograd::lower(&lower, &product, roles, &mut lowered)?;
            if !few {
                tiles(lower, product, roles, &mut lowered)?;
            }
        }
        None => {
            let kernel = plain(lower, product, &mut lowered)?;
            lowered.kernels.push(kernel);
        }
    }
    Ok(lowered.named(name))
}

/// A contraction of a body whose result is `root`, as functions of loop variables.
pub fn product(lower: &mut Lower, root: usize, contract: usize) -> Lowering<Product> {
    let ty = lower.ty(root).clone();
    let cell = lower.register(lower.ty(contract).dtype, 1);
    let (index, vars) = match from_contract(lower, contract, root)? {
        Some(path) => {
            let (mut index, vars) = lower.axes_of(lower.ty(contract))?;
            for node in path {
                index = forward(lower, node, &index);
            }
            (index, vars)
        }
        None => lower.axes_of(&ty)?,
    };
    let (out, place) = lower.result(root, &index);
    lower.bind_cell(contract, Expr::Load(cell, origin_place()), None);
    let result = lower.value(root, &index)?;
    let (operands, summed) = operands(lower, contract)?;
    Ok(Product { vars, summed, operands, cell, out, place, result, parts: None })
}

/// The operations from a contraction to the result, where an index of the result is affine in those
/// of the contraction and not the other way round: they join axes that the contraction has apart.
fn from_contract(lower: &Lower, contract: usize, root: usize) -> Lowering<Option<Vec<usize>>> {
    let body = lower.body;
    let mut path = Vec::new();
    let mut at = contract;
    while at != root {
        let user = |n: &usize| body.nodes[*n].args.iter().any(|a| a.index() == at);
        let Some(next) = (at + 1..=root).find(user) else { return Ok(None) };
        if lower.ty(next).numel() != lower.ty(at).numel() {
            return Ok(None);
        }
        path.push(next);
        at = next;
    }
    let affine = |index: &[Index]| index.iter().all(|i| i.dynamic.is_none());
    // Variables of the trial are not those of the kernel.
    let mut trial = lower.fresh();
    let (mut down, _) = trial.axes(&lower.ty(root).shape)?;
    for &node in path.iter().rev() {
        down = trial.view_index(&body.nodes[node].op, node, &down).unwrap_or(down);
    }
    let (mut up, _) = trial.axes(&lower.ty(contract).shape)?;
    for &node in &path {
        up = forward(&trial, node, &up);
    }
    Ok((!affine(&down) && affine(&up)).then_some(path))
}

/// The index of a node's result for an index of its operand, where it moves no element to two.
fn forward(lower: &Lower, node: usize, index: &[Index]) -> Vec<Index> {
    let node = &lower.body.nodes[node];
    match &node.op {
        Op::Reshape(to) => {
            let from = &lower.ty(node.args[0].index()).shape;
            unflatten(&flatten(index, from), to, &lower.extents)
        }
        Op::Permute(axes) => axes.iter().map(|&a| index[usize::from(a)].clone()).collect(),
        _ => index.to_vec(),
    }
}

/// The operands of a contraction for the element that was asked for, and the variables of its sum.
pub fn operands(lower: &mut Lower, contract: usize) -> Lowering<([Arc<Expr>; 2], Vec<Var>)> {
    let node = &lower.body.nodes[contract];
    let Op::Contract(spec) = &node.op else { return Err(Refused("a contraction".into())) };
    let asked = lower.asked(contract).ok_or_else(|| Refused("a dead contraction".into()))?;
    let empty = spec.extents[spec.n_out..].contains(&0);
    let operands = [0, 1].map(|k: usize| lower.ty(node.args[k].index()));
    let spans = iteration(spec, operands);
    let (sums, summed) = lower.axes_in_use(&spec.extents[spec.n_out..], &spans[spec.n_out..])?;
    let point: Vec<Index> = asked.into_iter().chain(sums).collect();
    let mut operand = |k: usize| -> Lowering<Arc<Expr>> {
        if empty {
            return Ok(Arc::new(zero(node.ty.dtype)));
        }
        let index: Vec<Index> = spec.maps[k]
            .iter()
            .map(|a| {
                let start = Place::affine(Affine::constant(a.offset));
                a.terms
                    .iter()
                    .fold(start, |sum, &(axis, c)| add(&sum, &scale(&point[axis as usize], c, 0)))
            })
            .collect();
        lower.value(node.args[k].index(), &index)
    };
    let operands = [operand(0)?, operand(1)?];
    Ok((operands, if empty { Vec::new() } else { summed }))
}

pub(super) fn zero(dtype: DType) -> Expr {
    let number = if dtype.is_float() { Number::Float(0.0) } else { Number::Int(0) };
    Expr::Const(dtype, number)
}

/// The affine place of a plain load, or of that of a word.
pub fn plain_load(e: &Expr) -> Option<(BufferId, &Affine)> {
    match e {
        Expr::Load(buffer, Place { affine, dynamic: None })
        | Expr::Word(buffer, Place { affine, dynamic: None }) => Some((*buffer, affine)),
        _ => None,
    }
}

/// The same of a load that may be widened to f32.
pub fn widened(e: &Expr) -> Option<(BufferId, &Affine)> {
    match e {
        Expr::Cast(DType::F32, x) => plain_load(x),
        _ => plain_load(e),
    }
}

/// The same of an operand that lanes hold as f32, and keep as a short float or as it is.
fn float<'e>(lower: &Lower, e: &'e Expr) -> Option<(BufferId, &'e Affine)> {
    let fits = |t: DType| if let Expr::Cast(..) = e { t.is_rounded() } else { t == DType::F32 };
    widened(e).filter(|l| fits(lower.buffers[l.0].dtype))
}

/// Which operand goes into lanes, and whether it is packed.
#[derive(Clone, Copy)]
pub struct Roles {
    /// Whether the other operand moves along the last axis as well, as in a depthwise convolution.
    pub both: bool,
    /// The operand that moves along the last axis.
    pub lanes: usize,
    /// Whether that operand is packed into panels.
    pub packed: bool,
}

fn roles(lower: &Lower, product: &Product) -> Option<Roles> {
    let n = *product.vars.last()? as usize;
    let words = product.parts.is_some();
    let load = |e| if words { plain_load(e) } else { float(lower, e) };
    let loads = [load(&product.operands[0])?, load(&product.operands[1])?];
    let steps = loads.map(|l| l.1.coefficient(n));
    let constant = loads.map(|l| lower.is_constant(l.0));
    let lanes = match steps {
        [0, s] if s != 0 => 1,
        [s, 0] if s != 0 => 0,
        // Depthwise: both move, and the constant one is packed.
        [1, s] if s != 0 && constant[1] => 1,
        [s, 1] if s != 0 && constant[0] => 0,
        _ => return None,
    };
    let packed =
        steps[lanes] != 1 || constant[lanes] || words || is_read_often(lower, product, lanes);
    let (buffer, place) = (product.out, product.place.clone());
    let epilogue = Stmt::Store { buffer, place, value: (*product.result).clone() };
    let fits = (!packed || packable(lower, loads[lanes]))
        && nest::is_vector(&lower.buffers, &[epilogue], n as Var);
    (fits && !product.summed.is_empty()).then_some(Roles {
        both: steps[1 - lanes] != 0,
        lanes,
        packed,
    })
}

/// Whether the operand in lanes is read by many rows and does not fit in a cache of the first
/// level: its elements are then packed at run time, so that those of a panel are not a row apart.
fn is_read_often(lower: &Lower, product: &Product, lanes: usize) -> bool {
    const ROWS: usize = 64;
    const ELEMENTS: usize = 1 << 14;
    let Some((_, panel)) = widened(&product.operands[lanes]) else { return false };
    let stays = |v: &&Var| panel.coefficient(**v as usize) == 0;
    let rows: usize =
        product.vars.iter().filter(stays).map(|&v| lower.extents[v as usize]).product();
    rows >= ROWS && packed_len(lower, product, panel) >= ELEMENTS
}

fn tiles(lower: Lower, product: Product, roles: Roles, lowered: &mut Lowered) -> Lowering<()> {
    let n = *product.vars.last().ok_or_else(|| Refused("a result without axes".into()))?;
    let extent = lower.extents[n as usize];
    let rows = row_axis(&product, roles).map_or(1, |m| lower.extents[m as usize]);
    let vectors = match rows {
        1 => 4,
        _ if roles.both => 1,
        _ => 2,
    };
    let panel_loads = widened(&product.operands[roles.lanes]);
    let (source, affine) = panel_loads.ok_or_else(|| Refused("a packed load".into()))?;
    // The sum runs in the order of the broadcast operand's memory, largest steps first.
    let mut summed = product.summed.clone();
    let other = widened(&product.operands[1 - roles.lanes]).map(|l| l.1.clone());
    let step = |v: &Var| other.as_ref().map_or(0, |a| a.coefficient(*v as usize).abs());
    summed.sort_by_key(|v| std::cmp::Reverse(step(v)));
    if narrow::fits(&lower, &product, roles) {
        return narrow::lower(&lower, product, roles, &summed, lowered);
    }
    let kept = lower.buffers[source].dtype;
    let strips = strips(extent, lower.target.lanes, vectors);
    let scratch = roles.packed.then(|| {
        let len = packed_len(&lower, &product, affine) / extent * panel_elements(&strips);
        lowered.scratch.push((kept, len));
        (lowered.scratch.len() - 1, len)
    });
    for strip in strips {
        let mut panel = None;
        if let Some(scratch) = scratch {
            let order = panel_order(&product, affine, &summed, n);
            let axes = (&order[..], n);
            let (pack, place) = pack(&lower, source, affine, axes, strip, scratch, product.parts)?;
            lowered.kernels.push(pack);
            panel = Some(Panels { scratch, place, kept });
        }
        lowered.kernels.push(tile(lower.copy(), &product, roles, &summed, strip, panel)?);
    }
    Ok(())
}

/// The innermost result axis along which only the broadcast operand moves.
fn row_axis(product: &Product, roles: Roles) -> Option<Var> {
    let panel = widened(&product.operands[roles.lanes])?.1;
    let other = widened(&product.operands[1 - roles.lanes])?.1;
    let (_, outer) = product.vars.split_last()?;
    let free =
        |v: &&Var| panel.coefficient(**v as usize) == 0 && other.coefficient(**v as usize) != 0;
    outer.iter().rev().find(free).copied()
}

/// The register-tile kernel of one strip.
pub fn tile(
    mut lower: Lower,
    product: &Product,
    roles: Roles,
    summed: &[Var],
    strip: Strip,
    panel: Option<Panels>,
) -> Lowering<Loops> {
    let lanes = lower.target.lanes;
    let (&n, outer) =
        product.vars.split_last().ok_or_else(|| Refused("a result without axes".into()))?;
    let tile = lower.piece(n, strip.tiles, strip.start, strip.width)?;
    let (vector, lane) = match strip.vectors {
        0 => (lower.piece(n, strip.width, strip.start, 1)?, lower.var(1)?),
        q => (lower.var(q)?, lower.var(lanes)?),
    };
    let step = if strip.vectors == 0 { 1 } else { lanes };
    let element = Affine::scaled(vector as usize, step as i64).plus(lane as usize, 1);
    let mut operands = product.operands.clone();
    if let Some(panels) = panel {
        let (buffer, place) = element_of(&mut lower, &panels, tile, &element);
        operands[roles.lanes] = Arc::new(match product.parts {
            Some(_) => Expr::Word(buffer, place),
            None if panels.kept.is_rounded() => {
                Expr::Cast(DType::F32, Arc::new(Expr::Load(buffer, place)))
            }
            None => Expr::Load(buffer, place),
        });
    }
    let n_index = Affine {
        offset: strip.start as i64,
        ..element.clone().plus(tile as usize, strip.width as i64)
    };
    let [x, y] = operands;
    let cell = Arc::new(Expr::Load(product.cell, origin_place()));
    let store = |buffer, place: Place, value| Stmt::Store { buffer, place, value };
    let update = match product.parts {
        Some((parts, _)) => Expr::Dot(parts, x, y, cell),
        None => Expr::Fma(x, y, cell),
    };
    let body = vec![
        store(product.cell, origin_place(), update),
        store(product.out, product.place.clone(), (*product.result).clone()),
    ];
    let body = rewrite::substitute(&body, n, &n_index);
    let mut vars: Vec<Var> = outer.to_vec();
    let mut sums = summed.to_vec();
    let body = nest::coalesce(&mut lower, &mut vars, body);
    let body = nest::coalesce(&mut lower, &mut sums, body);
    let rows = rows_of(&body, &vars, roles);
    let vars: Vec<Var> = vars.into_iter().filter(|&v| Some(v) != rows).collect();
    let shape = Shape { vector, lane, scalar: strip.vectors == 0, rows };
    // Along axes of both operands each turn has panels of its own; along others one panel serves
    // all turns.
    let own = |v: &Var| panel_moves(&body, roles, *v);
    let (mut loops, shared): (Vec<Var>, Vec<Var>) = vars.into_iter().partition(own);
    // What both operands move along is read in the order of memory.
    let (before, after) = if roles.both { (shared, vec![]) } else { (vec![], shared) };
    loops.push(tile);
    let ahead = ahead(&lower, &body, (roles, rows), strip, [&loops, &after, &sums]);
    loops.splice(loops.len() - 1..loops.len() - 1, before);
    loops.extend(after);
    let inner = row_tiles(&mut lower, product.cell, shape, (strip, ahead), &sums, body)?;
    let (loops, single): (Vec<Var>, Vec<Var>) =
        loops.into_iter().partition(|&v| lower.extents[v as usize] > 1);
    let zero = Affine::constant(0);
    let inner = single.iter().fold(inner, |body, &v| rewrite::substitute(&body, v, &zero));
    Ok(finish(lower, loops, inner, product.cell))
}

/// Where an element of a tile stands in panels.
fn element_of(lower: &mut Lower, panels: &Panels, tile: Var, at: &Affine) -> (BufferId, Place) {
    let (scratch, len) = panels.scratch;
    let buffer = lower.buffer(panels.kept, len, Scope::Global, Param::Scratch(scratch));
    let place = panels.place.substitute(&|v| match v {
        255 => Affine::axis(tile as usize),
        254 => at.clone(),
        v => Affine::axis(v),
    });
    (buffer, Place::affine(place))
}

/// What the update of the cell multiplies.
pub fn factors(body: &[Stmt]) -> Option<[&Arc<Expr>; 2]> {
    match &body[0] {
        Stmt::Store { value: Expr::Fma(x, y, _) | Expr::Dot(_, x, y, _), .. } => Some([x, y]),
        Stmt::Store { .. } | Stmt::For { .. } | Stmt::If { .. } => None,
        Stmt::Prefetch { .. } | Stmt::Multiply(_) => None,
    }
}

/// Whether the operand in lanes moves along a variable.
fn panel_moves(body: &[Stmt], roles: Roles, var: Var) -> bool {
    let Some([x, y]) = factors(body) else { return false };
    widened([x, y][roles.lanes]).is_some_and(|l| l.1.coefficient(var as usize) != 0)
}

/// After coalescing: the innermost axis along which the broadcast operand moves and the lanes do
/// not, or else the other way round. `body[0]` is the update of the cell.
fn rows_of(body: &[Stmt], vars: &[Var], roles: Roles) -> Option<Var> {
    let operands = factors(body)?;
    let panel = widened(operands[roles.lanes])?.1;
    let other = widened(operands[1 - roles.lanes])?.1;
    let alone = |moves: &Affine, stays: &Affine| {
        let alone =
            |v: &&Var| moves.coefficient(**v as usize) != 0 && stays.coefficient(**v as usize) == 0;
        vars.iter().rev().find(alone).copied()
    };
    alone(other, panel).or_else(|| alone(panel, other))
}

/// Rows of a tile, whole tiles, and rows that are left.
pub fn heights(lower: &Lower, strip: Strip, extent: usize) -> [usize; 3] {
    let most = ((lower.target.registers - 3) / strip.vectors.max(1)).saturating_sub(1).clamp(1, 12);
    let count = extent.div_ceil(most);
    let height = extent.div_ceil(count);
    [height, extent / height, extent % height]
}

/// Variables of a tile.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Of the vectors of a tile.
    pub vector: Var,
    /// Of their lanes.
    pub lane: Var,
    /// Elements one by one instead of in lanes.
    pub scalar: bool,
    /// Of the rows.
    pub rows: Option<Var>,
}

/// Loops over the row axis: whole tiles of P rows, then the rows that are left. The first statement
/// of `body` is for every turn of the sums, the others follow it.
pub fn row_tiles(
    lower: &mut Lower,
    cell: BufferId,
    shape: Shape,
    (strip, ahead): (Strip, Option<Ahead>),
    sums: &[Var],
    body: Vec<Stmt>,
) -> Lowering<Vec<Stmt>> {
    let Some(rows) = shape.rows else {
        let ask = ahead.map(|a| Stmt::Prefetch { buffer: a.buffer, place: a.place });
        return register_tile(lower, cell, (shape, 1, None), strip, (sums, ask), &body);
    };
    let [whole_height, whole, left] = heights(lower, strip, lower.extents[rows as usize]);
    let mut out = Vec::new();
    for (before, turns, height) in [(0, whole, whole_height), (whole, 1, left)] {
        if height == 0 || turns == 0 {
            continue;
        }
        let start = before * whole_height;
        let (turn, row) = (lower.piece(rows, turns, start, height)?, lower.var(height)?);
        let index = Affine {
            offset: start as i64,
            ..Affine::scaled(turn as usize, height as i64).plus(row as usize, 1)
        };
        let piece = rewrite::substitute(&body, rows, &index);
        let ask = ahead.as_ref().map(|a| {
            let mut place = a.place.clone().plus(turn.into(), a.step);
            place.offset += before as i64 * a.step;
            Stmt::Prefetch { buffer: a.buffer, place }
        });
        let sums = (sums, ask);
        let inner = register_tile(lower, cell, (shape, height, Some(row)), strip, sums, &piece)?;
        match turns {
            1 => out.extend(rewrite::substitute(&inner, turn, &Affine::constant(0))),
            _ => out.push(Stmt::For { var: turn, extent: turns, kind: Kind::Serial, body: inner }),
        }
    }
    Ok(out)
}

/// P rows of Q vectors (or single elements): start with 0, sum, store.
fn register_tile(
    lower: &mut Lower,
    cell: BufferId,
    (shape, height, row): (Shape, usize, Option<Var>),
    strip: Strip,
    (sums, ask): (&[Var], Option<Stmt>),
    body: &[Stmt],
) -> Lowering<Vec<Stmt>> {
    let lanes = if shape.scalar { 1 } else { lower.target.lanes };
    let across = if shape.scalar { 1 } else { strip.vectors };
    let dtype = lower.buffers[cell].dtype;
    let tile = lower.register(dtype, height * across * lanes);
    let mut at = Affine::axis(shape.lane as usize);
    if !shape.scalar {
        at = at.plus(shape.vector as usize, lanes as i64);
    } else {
        at = Affine::default();
    }
    if let Some(row) = row {
        at = at.plus(row as usize, (across * lanes) as i64);
    }
    let place = Place::affine(at.clone());
    let swap = rewrite::retarget(body, cell, tile, &at);
    let unrolled = |body: Vec<Stmt>| {
        let mut body = body;
        if !shape.scalar {
            body = vec![Stmt::For { var: shape.lane, extent: lanes, kind: Kind::Vector, body }];
            body = vec![Stmt::For { var: shape.vector, extent: across, kind: Kind::Unroll, body }];
        }
        match row {
            Some(var) => vec![Stmt::For { var, extent: height, kind: Kind::Unroll, body }],
            None => body,
        }
    };
    let start = zero(dtype);
    let mut out = unrolled(vec![Stmt::Store { buffer: tile, place, value: start }]);
    let step = ask.into_iter().chain(unrolled(vec![swap[0].clone()])).collect();
    out.extend(nest::wrap(&lower.extents, sums, step, 0));
    out.extend(unrolled(swap[1..].to_vec()));
    if shape.scalar {
        let extent = lower.extents[shape.vector as usize];
        out = rewrite::substitute(&out, shape.lane, &Affine::constant(0));
        out = vec![Stmt::For { var: shape.vector, extent, kind: Kind::Serial, body: out }];
    }
    Ok(out)
}

fn finish(mut lower: Lower, loops: Vec<Var>, inner: Vec<Stmt>, cell: BufferId) -> Loops {
    let parallel = nest::parallel_prefix(&lower.extents, &loops);
    let body = nest::wrap(&lower.extents, &loops, inner, parallel);
    // The one-element cell has become a tile.
    lower.buffers[cell].len = 1;
    lower.finish(body)
}

/// Any other contraction: every element of the result sums by itself.
fn plain(mut lower: Lower, product: Product, lowered: &mut Lowered) -> Lowering<Loops> {
    let mut operands = product.operands.clone();
    if let Some(&n) = product.vars.last() {
        for operand in &mut operands {
            *operand = repacked(&mut lower, operand, &product, n, lowered)?;
        }
    }
    let [x, y] = operands;
    let dtype = lower.buffers[product.cell].dtype;
    let cell = Arc::new(Expr::Load(product.cell, origin_place()));
    let update = match dtype {
        DType::F32 => Expr::Fma(x, y, cell),
        _ => Expr::Binary(BinaryFn::Add, cell, Arc::new(Expr::Binary(BinaryFn::Mul, x, y))),
    };
    let result = (product.out, product.place, product.result);
    let start = [zero(dtype), update];
    Ok(nest::accumulate(lower, product.vars, product.summed, product.cell, start, result))
}

/// A constant operand that does not step by one along an axis, packed so that it does: the weights
/// of a depthwise convolution.
pub fn repacked(
    lower: &mut Lower,
    operand: &Arc<Expr>,
    product: &Product,
    n: Var,
    lowered: &mut Lowered,
) -> Lowering<Arc<Expr>> {
    let Some((buffer, affine)) = plain_load(operand) else { return Ok(operand.clone()) };
    let step = affine.coefficient(n as usize);
    let useful = lower.target.threads == 0
        && step != 0
        && step != 1
        && lower.buffers[buffer].dtype == DType::F32;
    if !useful || !lower.is_constant(buffer) || !packable(lower, (buffer, affine)) {
        return Ok(operand.clone());
    }
    let extent = lower.extents[n as usize];
    let strip = Strip { start: 0, tiles: 1, width: extent, vectors: 0, packed: 0 };
    let order = panel_order(product, affine, &product.summed, n);
    let (scratch, len) = (lowered.scratch.len(), packed_len(lower, product, affine));
    lowered.scratch.push((DType::F32, len));
    let (kernel, packed) = pack(lower, buffer, affine, (&order, n), strip, (scratch, len), None)?;
    lowered.kernels.push(kernel);
    let to = lower.buffer(DType::F32, len, Scope::Global, Param::Scratch(scratch));
    let place = packed.substitute(&|v| match v {
        255 => Affine::constant(0),
        254 => Affine::axis(n as usize),
        v => Affine::axis(v),
    });
    Ok(Arc::new(Expr::Load(to, Place::affine(place))))
}
