//! Contractions as register tiles.
//!
//! The last axis of the result goes into vector lanes: one operand steps by one element along it
//! (or is packed into panels so that it does), the other does not move and is broadcast. A tile of
//! P rows times Q vectors stays in registers while the sum runs; then the epilogue is computed and
//! stored. Operands that are packed and constant are packed once, when the model is compiled.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::index::{Index, add, flatten, scale};
use super::ir::{BufferId, Expr, Kind, Loops, Number, Param, Place, Scope, Stmt, Var};
use super::lower::{Lower, Lowered, Lowering, Refused, origin_place};
use super::{nest, pairs, rewrite, winograd};
use crate::graph::op::{Affine, BinaryFn, Op};
use crate::graph::used::iteration;

/// A contraction while it is lowered: everything as functions of the loop variables.
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
    /// Where the sum runs over pairs of i16: how far apart those of a pair lie in the operand that
    /// is packed.
    pub halves: Option<i64>,
}

/// The kernels of a body with a contraction.
pub fn lower(mut lower: Lower, root: usize, contract: usize, name: &str) -> Lowering<Lowered> {
    if lower.ty(root).numel() == 0 {
        return Ok(Lowered::default());
    }
    let mut product = product(&mut lower, root, contract)?;
    let mut lowered = Lowered::default();
    let mut few = false;
    if let Some(pairs) = pairs::paired(&mut lower, &product)?
        && let Some(roles) = roles(&lower, &pairs)
    {
        let bare = pairs::bare(&lower, product);
        few = winograd::lower(&lower, &bare, roles, &mut lowered)?;
        product = pairs;
    }
    match roles(&lower, &product) {
        Some(roles) => {
            few |=
                product.halves.is_none() && winograd::lower(&lower, &product, roles, &mut lowered)?;
            if !few {
                tiles(lower, product, roles, &mut lowered)?;
            }
        }
        None => {
            let kernel = plain(lower, product, &mut lowered)?;
            lowered.kernels.push(kernel);
        }
    }
    for (i, kernel) in lowered.kernels.iter_mut().enumerate() {
        let pack = kernel.buffers.iter().all(|b| b.param != Param::Out);
        kernel.name = match (pack, i, kernel.name.as_str()) {
            (true, _, "") => format!("{name}.pack{i}"),
            (false, 0, "") => name.to_string(),
            (false, _, "") => format!("{name}.{i}"),
            (_, _, part) => format!("{name}.{part}"),
        };
    }
    Ok(lowered)
}

/// A contraction of a body whose result is `root`, as functions of loop variables.
pub fn product(lower: &mut Lower, root: usize, contract: usize) -> Lowering<Product> {
    let ty = lower.ty(root).clone();
    let cell = lower.register(lower.ty(contract).dtype, 1);
    let out = lower.out(&ty);
    let (index, vars) = lower.axes_of(&ty)?;
    lower.bind_cell(contract, Expr::Load(cell, origin_place()));
    let result = lower.value(root, &index)?;
    let (operands, summed) = operands(lower, contract)?;
    let place = flatten(&index, &ty.shape);
    Ok(Product { vars, summed, operands, cell, out, place, result, halves: None })
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

fn zero(dtype: DType) -> Expr {
    let number = if dtype.is_float() { Number::Float(0.0) } else { Number::Int(0) };
    Expr::Const(dtype, number)
}

/// The affine place of a plain load, or of that of a pair.
pub fn plain_load(e: &Expr) -> Option<(BufferId, &Affine)> {
    match e {
        Expr::Load(buffer, Place { affine, dynamic: None })
        | Expr::Pair(buffer, Place { affine, dynamic: None }) => Some((*buffer, affine)),
        _ => None,
    }
}

/// Which operand goes into lanes, and whether it is packed.
#[derive(Clone, Copy)]
pub struct Roles {
    /// The operand that moves along the last axis.
    pub lanes: usize,
    /// Whether that operand is packed into panels.
    pub packed: bool,
}

fn roles(lower: &Lower, product: &Product) -> Option<Roles> {
    let n = *product.vars.last()? as usize;
    let loads = [plain_load(&product.operands[0])?, plain_load(&product.operands[1])?];
    let pairs = product.halves.is_some();
    let float = loads.iter().all(|l| lower.buffers[l.0].dtype == DType::F32);
    let steps = loads.map(|l| l.1.coefficient(n));
    let lanes = match steps {
        [0, s] if s != 0 => 1,
        [s, 0] if s != 0 => 0,
        _ => return None,
    };
    let constant = lower.is_constant(loads[lanes].0);
    let packed = steps[lanes] != 1 || constant || pairs;
    let (buffer, place) = (product.out, product.place.clone());
    let epilogue = Stmt::Store { buffer, place, value: (*product.result).clone() };
    let fits = (!packed || packable(lower, loads[lanes]))
        && nest::is_vector(&lower.buffers, &[epilogue], n as Var);
    ((float || pairs) && fits && !product.summed.is_empty()).then_some(Roles { lanes, packed })
}

/// An operand can be packed where every variable picks other elements, so that nothing repeats.
fn packable(lower: &Lower, (buffer, affine): (BufferId, &Affine)) -> bool {
    let picked = affine.terms.iter().map(|t| lower.extents[t.0 as usize]);
    picked.product::<usize>() <= lower.buffers[buffer].len
}

/// A piece of the last axis that is tiled in one way.
#[derive(Clone, Copy)]
pub struct Strip {
    /// First element.
    pub start: usize,
    /// Number of tiles.
    pub tiles: usize,
    /// Elements of a tile.
    pub width: usize,
    /// Vectors of a tile; 0 where elements go one by one.
    pub vectors: usize,
}

/// An operand that is packed into panels.
pub struct Panels {
    /// The scratch memory that holds it.
    pub scratch: usize,
    /// The place of an element in terms of the product's variables, with the tile as variable 255
    /// and the element within the tile as variable 254.
    pub place: Affine,
}

/// The last axis in pieces: tiles of so many vectors, whole vectors that are left, single elements.
pub fn strips(n: usize, lanes: usize, vectors: usize) -> Vec<Strip> {
    let mut strips = Vec::new();
    let mut start = 0;
    let wide = vectors * lanes;
    if n >= wide {
        strips.push(Strip { start, tiles: n / wide, width: wide, vectors });
        start = n / wide * wide;
    }
    let left = (n - start) / lanes;
    if left > 0 {
        strips.push(Strip { start, tiles: 1, width: left * lanes, vectors: left });
        start += left * lanes;
    }
    if start < n {
        strips.push(Strip { start, tiles: 1, width: n - start, vectors: 0 });
    }
    strips
}

fn tiles(lower: Lower, product: Product, roles: Roles, lowered: &mut Lowered) -> Lowering<()> {
    let n = *product.vars.last().ok_or_else(|| Refused("a result without axes".into()))?;
    let extent = lower.extents[n as usize];
    let rows = row_axis(&product, roles).map_or(1, |m| lower.extents[m as usize]);
    let vectors = if rows == 1 { 4 } else { 2 };
    let panel_loads = plain_load(&product.operands[roles.lanes]);
    let (source, affine) = panel_loads.ok_or_else(|| Refused("a packed load".into()))?;
    // The sum runs in the order of the broadcast operand's memory, largest steps first.
    let mut summed = product.summed.clone();
    let other = plain_load(&product.operands[1 - roles.lanes]).map(|l| l.1.clone());
    let step = |v: &Var| other.as_ref().map_or(0, |a| a.coefficient(*v as usize).abs());
    summed.sort_by_key(|v| std::cmp::Reverse(step(v)));
    let scratch = roles.packed.then(|| {
        let dtype = lower.buffers[source].dtype;
        lowered.scratch.push((dtype, packed_len(&lower, &product, affine)));
        lowered.scratch.len() - 1
    });
    let mut offset = 0;
    for strip in strips(extent, lower.target.lanes, vectors) {
        let mut panel = None;
        if let Some(scratch) = scratch {
            let order = panel_order(&product, affine, &summed, n);
            let to = (scratch, offset);
            let (pack, place) =
                pairs::pack(&lower, source, affine, (&order, n), strip, to, product.halves)?;
            lowered.kernels.push(pack);
            let elements = if product.halves.is_some() { 2 } else { 1 };
            offset += strip.tiles * strip.width * order_len(&lower, &order) * elements;
            panel = Some(Panels { scratch, place });
        }
        let mut copy = lower.fresh();
        copy.buffers = lower.buffers.clone();
        copy.extents = lower.extents.clone();
        copy.share_ranges(&lower);
        lowered.kernels.push(tile(copy, &product, roles, &summed, strip, panel)?);
    }
    Ok(())
}

fn order_len(lower: &Lower, order: &[Var]) -> usize {
    order.iter().map(|&v| lower.extents[v as usize]).product()
}

fn packed_len(lower: &Lower, product: &Product, affine: &Affine) -> usize {
    let elements: usize = if product.halves.is_some() { 2 } else { 1 };
    elements * affine.terms.iter().map(|t| lower.extents[t.0 as usize]).product::<usize>()
}

/// Variables of the packed operand but the last axis, in the order of the loops.
fn panel_order(product: &Product, affine: &Affine, summed: &[Var], n: Var) -> Vec<Var> {
    product
        .vars
        .iter()
        .chain(summed)
        .copied()
        .filter(|&v| v != n && affine.coefficient(v as usize) != 0)
        .collect()
}

/// A kernel that copies a strip of an operand into panels `[tile][order..][width]`; and the place
/// of an element in terms of the product's variables, with the tile as variable 255 and the
/// element within the tile as variable 254.
pub fn pack(
    lower: &Lower,
    source: BufferId,
    affine: &Affine,
    axes: (&[Var], Var),
    strip: Strip,
    to: (usize, usize),
) -> Lowering<(Loops, Affine)> {
    pairs::pack(lower, source, affine, axes, strip, to, None)
}

/// The innermost result axis along which only the broadcast operand moves.
fn row_axis(product: &Product, roles: Roles) -> Option<Var> {
    let panel = plain_load(&product.operands[roles.lanes])?.1;
    let other = plain_load(&product.operands[1 - roles.lanes])?.1;
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
    if let Some(Panels { scratch, place: packed }) = panel {
        let load = plain_load(&operands[roles.lanes]);
        let of = |l: (usize, &Affine)| (lower.buffers[l.0].dtype, packed_len(&lower, product, l.1));
        let (dtype, len) = load.map_or((DType::F32, 0), of);
        let buffer = lower.buffer(dtype, len, Scope::Global, Param::Scratch(scratch));
        let place = Place::affine(packed.substitute(&|v| match v {
            255 => Affine::axis(tile as usize),
            254 => element.clone(),
            v => Affine::axis(v),
        }));
        operands[roles.lanes] = Arc::new(match product.halves {
            Some(_) => Expr::Pair(buffer, place),
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
    let update = match product.halves {
        Some(_) => Expr::Dot(x, y, cell),
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
    loops.push(tile);
    loops.extend(shared);
    let inner = row_tiles(&mut lower, product.cell, shape, strip, &sums, body)?;
    let (loops, single): (Vec<Var>, Vec<Var>) =
        loops.into_iter().partition(|&v| lower.extents[v as usize] > 1);
    let zero = Affine::constant(0);
    let inner = single.iter().fold(inner, |body, &v| rewrite::substitute(&body, v, &zero));
    Ok(finish(lower, loops, inner, product.cell))
}

/// What the update of the cell multiplies.
fn factors(body: &[Stmt]) -> Option<[&Arc<Expr>; 2]> {
    match &body[0] {
        Stmt::Store { value: Expr::Fma(x, y, _) | Expr::Dot(x, y, _), .. } => Some([x, y]),
        Stmt::Store { .. } | Stmt::For { .. } | Stmt::If { .. } => None,
    }
}

/// Whether the operand in lanes moves along a variable.
fn panel_moves(body: &[Stmt], roles: Roles, var: Var) -> bool {
    let Some([x, y]) = factors(body) else { return false };
    plain_load([x, y][roles.lanes]).is_some_and(|l| l.1.coefficient(var as usize) != 0)
}

/// After coalescing: the innermost axis along which the broadcast operand moves and the lanes do
/// not. `body[0]` is the update of the cell.
fn rows_of(body: &[Stmt], vars: &[Var], roles: Roles) -> Option<Var> {
    let operands = factors(body)?;
    let panel = plain_load(operands[roles.lanes])?.1;
    let other = plain_load(operands[1 - roles.lanes])?.1;
    let free =
        |v: &&Var| panel.coefficient(**v as usize) == 0 && other.coefficient(**v as usize) != 0;
    vars.iter().rev().find(free).copied()
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

/// Loops over the row axis: whole tiles of P rows, then the rows that are left.
pub fn row_tiles(
    lower: &mut Lower,
    cell: BufferId,
    shape: Shape,
    strip: Strip,
    sums: &[Var],
    body: Vec<Stmt>,
) -> Lowering<Vec<Stmt>> {
    let Some(rows) = shape.rows else {
        return register_tile(lower, cell, (shape, 1, None), strip, sums, &body);
    };
    let extent = lower.extents[rows as usize];
    let most = ((lower.target.registers - 3) / strip.vectors.max(1)).saturating_sub(1).clamp(1, 12);
    let count = extent.div_ceil(most);
    let height = extent.div_ceil(count);
    let (whole, left) = (extent / height, extent % height);
    let mut out = Vec::new();
    for (start, turns, height) in [(0, whole, height), (whole * height, 1, left)] {
        if height == 0 || turns == 0 {
            continue;
        }
        let (turn, row) = (lower.piece(rows, turns, start, height)?, lower.var(height)?);
        let index = Affine {
            offset: start as i64,
            ..Affine::scaled(turn as usize, height as i64).plus(row as usize, 1)
        };
        let piece = rewrite::substitute(&body, rows, &index);
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
    sums: &[Var],
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
    out.extend(nest::wrap(&lower.extents, sums, unrolled(vec![swap[0].clone()]), 0));
    out.extend(unrolled(vec![swap[1].clone()]));
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

/// A constant operand that does not step by one along the last axis, packed so that it does: the
/// weights of a depthwise convolution.
fn repacked(
    lower: &mut Lower,
    operand: &Arc<Expr>,
    product: &Product,
    n: Var,
    lowered: &mut Lowered,
) -> Lowering<Arc<Expr>> {
    let Some((buffer, affine)) = plain_load(operand) else { return Ok(operand.clone()) };
    let step = affine.coefficient(n as usize);
    let useful = step != 0 && step != 1 && lower.buffers[buffer].dtype == DType::F32;
    if !useful || !lower.is_constant(buffer) || !packable(lower, (buffer, affine)) {
        return Ok(operand.clone());
    }
    let extent = lower.extents[n as usize];
    let strip = Strip { start: 0, tiles: 1, width: extent, vectors: 0 };
    let order = panel_order(product, affine, &product.summed, n);
    let scratch = lowered.scratch.len();
    lowered.scratch.push((DType::F32, packed_len(lower, product, affine)));
    let (kernel, packed) = pack(lower, buffer, affine, (&order, n), strip, (scratch, 0))?;
    lowered.kernels.push(kernel);
    let len = packed_len(lower, product, affine);
    let to = lower.buffer(DType::F32, len, Scope::Global, Param::Scratch(scratch));
    let place = packed.substitute(&|v| match v {
        255 => Affine::constant(0),
        254 => Affine::axis(n as usize),
        v => Affine::axis(v),
    });
    Ok(Arc::new(Expr::Load(to, Place::affine(place))))
}
