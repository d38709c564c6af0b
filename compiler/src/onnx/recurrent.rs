//! Recurrent layers, unrolled: the products with the input are one product for all steps.

use super::call::{Call, Outputs, not_supported};
use crate::error::Diagnostic;
use crate::graph::NodeId;
use crate::graph::build::Added;
use crate::graph::op::{BinaryFn, Composite, Op, Shape, UnaryFn};

/// Steps that are unrolled at most.
pub(super) const MOST_STEPS: usize = 4096;

/// Which layer it is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Rnn,
    Gru,
    Lstm,
}

/// Activation functions by name; the defaults of each layer.
#[derive(Clone, Copy)]
enum Activation {
    Sigmoid,
    Tanh,
    Relu,
}

/// One direction of a layer.
struct Cell {
    kind: Kind,
    hidden: usize,
    /// Recurrent weights `[h, gates * h]`.
    weight: NodeId,
    /// Their bias `[1, gates * h]`.
    bias: Option<NodeId>,
    /// Three vectors `[1, h]` that the cell state is multiplied with.
    peepholes: Option<[NodeId; 3]>,
    functions: Vec<Activation>,
    linear_before_reset: bool,
}

fn activate(call: &mut Call, f: Activation, x: NodeId) -> Added {
    match f {
        Activation::Sigmoid => call.graph.composite(Composite::Sigmoid, x, &call.origin),
        Activation::Tanh => call.graph.unary(UnaryFn::Tanh, x, &call.origin),
        Activation::Relu => call.graph.binary_number(BinaryFn::Max, x, 0.0, &call.origin),
    }
}

fn add(call: &mut Call, x: NodeId, y: NodeId) -> Added {
    call.graph.binary(BinaryFn::Add, x, y, &call.origin)
}

fn mul(call: &mut Call, x: NodeId, y: NodeId) -> Added {
    call.graph.binary(BinaryFn::Mul, x, y, &call.origin)
}

/// Gate number i of `[b, gates * h]`.
fn gate(call: &mut Call, cell: &Cell, gates: NodeId, i: usize) -> Added {
    call.cut(gates, 1, ((i * cell.hidden) as i64, 1, cell.hidden))
}

/// h times the recurrent weights of some gates, plus their bias.
fn recur(call: &mut Call, cell: &Cell, h: NodeId, gates: std::ops::Range<usize>) -> Added {
    let range = ((gates.start * cell.hidden) as i64, 1, gates.len() * cell.hidden);
    let weight = call.cut(cell.weight, 1, range)?;
    let y = call.graph.matmul(h, weight, &call.origin)?;
    match cell.bias {
        Some(bias) => {
            let bias = call.cut(bias, 1, range)?;
            add(call, y, bias)
        }
        None => Ok(y),
    }
}

/// The next state, hidden first, from the products of the input `[b, gates * h]`.
fn step(
    call: &mut Call,
    cell: &Cell,
    x: NodeId,
    state: &[NodeId],
) -> Result<Vec<NodeId>, Diagnostic> {
    match cell.kind {
        Kind::Rnn => {
            let y = recur(call, cell, state[0], 0..1)?;
            let y = add(call, x, y)?;
            Ok(vec![activate(call, cell.functions[0], y)?])
        }
        Kind::Gru => Ok(vec![gru_step(call, cell, x, state[0])?]),
        Kind::Lstm => lstm_step(call, cell, x, state),
    }
}

/// z, r, h~: the next state is (1 - z) * h~ + z * h.
fn gru_step(call: &mut Call, cell: &Cell, x: NodeId, h: NodeId) -> Added {
    let zr = recur(call, cell, h, 0..2)?;
    let x_zr = call.cut(x, 1, (0, 1, 2 * cell.hidden))?;
    let zr = add(call, x_zr, zr)?;
    let zr = activate(call, cell.functions[0], zr)?;
    let (z, r) = (gate(call, cell, zr, 0)?, gate(call, cell, zr, 1)?);
    let inner = match cell.linear_before_reset {
        true => {
            let y = recur(call, cell, h, 2..3)?;
            mul(call, r, y)?
        }
        false => {
            let kept = mul(call, r, h)?;
            recur(call, cell, kept, 2..3)?
        }
    };
    let x_h = gate(call, cell, x, 2)?;
    let sum = add(call, x_h, inner)?;
    let new = activate(call, cell.functions[1], sum)?;
    // new + z * (h - new)
    let change = call.graph.binary(BinaryFn::Sub, h, new, &call.origin)?;
    let change = mul(call, z, change)?;
    add(call, new, change)
}

/// i, o, f, c~: c = f * c + i * c~ and h = o * tanh(c).
fn lstm_step(
    call: &mut Call,
    cell: &Cell,
    x: NodeId,
    state: &[NodeId],
) -> Result<Vec<NodeId>, Diagnostic> {
    let (h, c) = (state[0], state[1]);
    let gates = recur(call, cell, h, 0..4)?;
    let gates = add(call, x, gates)?;
    let mut parts = Vec::new();
    for i in 0..4 {
        parts.push(gate(call, cell, gates, i)?);
    }
    let peep = |call: &mut Call, i: usize, place: usize, c: NodeId| match cell.peepholes {
        Some(p) => {
            let seen = mul(call, p[place], c)?;
            add(call, parts[i], seen)
        }
        None => Ok(parts[i]),
    };
    let i = peep(call, 0, 0, c)?;
    let f = peep(call, 2, 2, c)?;
    let i = activate(call, cell.functions[0], i)?;
    let f = activate(call, cell.functions[0], f)?;
    let new = activate(call, cell.functions[1], parts[3])?;
    let kept = mul(call, f, c)?;
    let new = mul(call, i, new)?;
    let c = add(call, kept, new)?;
    let o = match cell.peepholes {
        Some(p) => {
            let seen = mul(call, p[1], c)?;
            add(call, parts[1], seen)?
        }
        None => parts[1],
    };
    let o = activate(call, cell.functions[0], o)?;
    let shown = activate(call, cell.functions[2], c)?;
    Ok(vec![mul(call, o, shown)?, c])
}

/// Activations of one direction, from `activations` or the defaults.
fn functions(call: &Call, kind: Kind, direction: usize) -> Result<Vec<Activation>, Diagnostic> {
    let defaults: &[&str] = match kind {
        Kind::Rnn => &["Tanh"],
        Kind::Gru => &["Sigmoid", "Tanh"],
        Kind::Lstm => &["Sigmoid", "Tanh", "Tanh"],
    };
    let given = call.strings("activations").unwrap_or_default();
    let at = |i: usize| match given.get(direction * defaults.len() + i) {
        Some(name) => name.as_str(),
        None => defaults[i],
    };
    (0..defaults.len())
        .map(|i| match at(i) {
            "Sigmoid" => Ok(Activation::Sigmoid),
            "Tanh" => Ok(Activation::Tanh),
            "Relu" => Ok(Activation::Relu),
            other => Err(not_supported(format!("activation {other}"))),
        })
        .collect()
}

/// `[d, rows, columns..]` at one direction, without that axis.
fn of_direction(call: &mut Call, x: NodeId, direction: usize) -> Added {
    let y = call.cut(x, 0, (direction as i64, 1, 1))?;
    let shape = call.shape(y);
    call.graph.reshape(y, &shape[1..], &call.origin)
}

/// Half number i of a row `[n]`, as `[1, n / 2]`.
fn bias_half(call: &mut Call, bias: NodeId, i: usize, width: usize) -> Added {
    let y = call.cut(bias, 0, ((i * width) as i64, 1, width))?;
    call.graph.reshape(y, &[1, width], &call.origin)
}

/// Sizes of a layer.
struct Sizes {
    steps: usize,
    batch: usize,
    hidden: usize,
    gates: usize,
    directions: usize,
}

fn sizes(call: &Call, kind: Kind, x: &Shape) -> Result<Sizes, Diagnostic> {
    let (w, r) = (call.shape(call.input(1)?), call.shape(call.input(2)?));
    let gates = match kind {
        Kind::Rnn => 1,
        Kind::Gru => 3,
        Kind::Lstm => 4,
    };
    let found = not_supported(format!("input {x:?}, weights {w:?} and {r:?}"));
    let (&[steps, batch, width], &[directions, rows, inputs], &[again, same, hidden]) =
        (&x[..], &w[..], &r[..])
    else {
        return Err(found);
    };
    let named = match call.string_or("direction", "forward").as_str() {
        "bidirectional" => 2,
        _ => 1,
    };
    let fits = hidden.checked_mul(gates) == Some(rows)
        && [again, same, inputs, directions] == [named, rows, width, named];
    if !fits {
        return Err(found);
    }
    if steps * directions > MOST_STEPS || steps == 0 {
        return Err(not_supported(format!("{steps} steps; at most {MOST_STEPS} are unrolled")));
    }
    Ok(Sizes { steps, batch, hidden, gates, directions })
}

/// One direction: its outputs by step in the order of the input, and the last state.
fn run(
    call: &mut Call,
    kind: Kind,
    x: NodeId,
    sizes: &Sizes,
    direction: usize,
) -> Result<(Vec<NodeId>, Vec<NodeId>), Diagnostic> {
    let Sizes { steps, batch, hidden, gates, .. } = *sizes;
    let wide = gates * hidden;
    let width = call.shape(x)[2];
    let dtype = call.ty(x).dtype;
    let (w, r) = (call.input(1)?, call.input(2)?);
    let (w, r) = (of_direction(call, w, direction)?, of_direction(call, r, direction)?);
    let (g, o) = (&mut *call.graph, &call.origin);
    let (w, weight) = (g.permute(w, &[1, 0], o)?, g.permute(r, &[1, 0], o)?);
    let flat = g.reshape(x, &[steps * batch, width], o)?;
    let mut inputs = g.matmul(flat, w, o)?;
    let mut bias = None;
    if let Some(both) = call.optional(3) {
        let both = of_direction(call, both, direction)?;
        let own = bias_half(call, both, 0, wide)?;
        inputs = add(call, inputs, own)?;
        bias = Some(bias_half(call, both, 1, wide)?);
    }
    let inputs = call.graph.reshape(inputs, &[steps, batch, wide], &call.origin)?;
    let mut peepholes = None;
    if let (Kind::Lstm, Some(p)) = (kind, call.optional(7)) {
        let p = of_direction(call, p, direction)?;
        let mut part = |i| bias_half(call, p, i, hidden);
        peepholes = Some([part(0)?, part(1)?, part(2)?]);
    }
    let functions = functions(call, kind, direction)?;
    let linear_before_reset = call.int_or("linear_before_reset", 0) != 0;
    let cell = Cell { kind, hidden, weight, bias, peepholes, functions, linear_before_reset };
    let mut state = Vec::new();
    for index in if kind == Kind::Lstm { vec![5, 6] } else { vec![5] } {
        state.push(match call.optional(index) {
            Some(first) => of_direction(call, first, direction)?,
            None => {
                let zero = call.number(dtype, 2, 0.0);
                call.graph.expand(zero, &[batch, hidden], &call.origin)?
            }
        });
    }
    let backwards = direction == 1 || call.string_or("direction", "forward") == "reverse";
    let mut outputs = Vec::new();
    for t in 0..steps {
        let t = if backwards { steps - 1 - t } else { t };
        let x = call.cut(inputs, 0, (t as i64, 1, 1))?;
        let x = call.graph.reshape(x, &[batch, wide], &call.origin)?;
        state = step(call, &cell, x, &state)?;
        outputs.push(state[0]);
    }
    if backwards {
        outputs.reverse();
    }
    Ok((outputs, state))
}

/// Rows `[b, h]` stacked along new leading axes.
fn stack(call: &mut Call, rows: &[NodeId], shape: &[usize]) -> Added {
    let mut tall = Vec::new();
    for &row in rows {
        let mut of = call.shape(row);
        of.insert(0, 1);
        tall.push(call.graph.reshape(row, &of, &call.origin)?);
    }
    let all = call.graph.add(Op::Concat(0), &tall, &call.origin)?;
    call.graph.reshape(all, shape, &call.origin)
}

fn layer(call: &mut Call, kind: Kind) -> Outputs {
    let batch_first = call.int_or("layout", 0) != 0;
    call.ignore("hidden_size");
    if call.float("clip").is_some() || call.int_or("input_forget", 0) != 0 {
        return Err(not_supported("clipped or coupled gates"));
    }
    if batch_first && (call.optional(5).is_some() || call.optional(6).is_some()) {
        return Err(not_supported("a first state with the batch first"));
    }
    let mut x = call.input(0)?;
    if batch_first && call.ty(x).rank() == 3 {
        x = call.graph.permute(x, &[1, 0, 2], &call.origin)?;
    }
    let sizes = sizes(call, kind, &call.shape(x))?;
    let Sizes { steps, batch, hidden, directions, .. } = sizes;
    let lengths = call.ints_input(4)?;
    if lengths.is_some_and(|lengths| lengths.iter().any(|&n| n != steps as i64)) {
        return Err(not_supported("sequences of different lengths"));
    }
    let mut rows = vec![Vec::new(); steps];
    let mut states: Vec<Vec<NodeId>> = vec![Vec::new(); 2];
    for direction in 0..directions {
        let (outputs, state) = run(call, kind, x, &sizes, direction)?;
        outputs.into_iter().enumerate().for_each(|(t, y)| rows[t].push(y));
        state.into_iter().enumerate().for_each(|(i, s)| states[i].push(s));
    }
    let y = stack(call, &rows.concat(), &[steps, directions, batch, hidden])?;
    let mut outputs = vec![y];
    for state in states.iter().filter(|s| !s.is_empty()) {
        outputs.push(stack(call, state, &[directions, batch, hidden])?);
    }
    if batch_first {
        let (g, o) = (&mut *call.graph, &call.origin);
        outputs[0] = g.permute(outputs[0], &[2, 0, 1, 3], o)?;
        for state in &mut outputs[1..] {
            *state = g.permute(*state, &[1, 0, 2], o)?;
        }
    }
    Ok(outputs.into_iter().map(Some).collect())
}

pub(super) fn rnn(call: &mut Call) -> Outputs {
    layer(call, Kind::Rnn)
}

pub(super) fn gru(call: &mut Call) -> Outputs {
    layer(call, Kind::Gru)
}

pub(super) fn lstm(call: &mut Call) -> Outputs {
    layer(call, Kind::Lstm)
}
