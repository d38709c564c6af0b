//! What every operation means: the reference interpreter, slow and obviously right.
//!
//! Floating point numbers are computed in f64 and rounded to the dtype after each node; integers
//! are computed exactly and wrapped. All other forms of a model are checked against this one.

use kiln_runtime::tensor::{DType, Tensor};

use super::op::{Affine, BinaryFn, Contract, Op, ReduceFn, Shape, Type, UnaryFn};
use super::scalar::{self, Number, bf16, cast_to_int, f16, float_binary, int_binary, wrap};
use super::{Body, Constant, Graph, Node, composite, small};

pub use super::scalar::{int_range, reduce_identity, round_float};

/// A tensor while it is interpreted.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Its type.
    pub ty: Type,
    /// Its elements in row-major order.
    pub data: Data,
}

/// Elements of a value.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Of a floating point dtype.
    Float(Vec<f64>),
    /// Of an integer dtype or bool.
    Int(Vec<i128>),
}

impl Default for Data {
    fn default() -> Data {
        Data::Int(Vec::new())
    }
}

impl Data {
    /// Zeros of a dtype.
    pub fn zeros(dtype: DType, len: usize) -> Data {
        match dtype.is_float() {
            true => Data::Float(vec![0.0; len]),
            false => Data::Int(vec![0; len]),
        }
    }

    /// Numbers of a dtype.
    fn collect(dtype: DType, numbers: impl Iterator<Item = Number>) -> Data {
        let float = |n| if let Number::Float(v) = n { Some(v) } else { None };
        let int = |n| if let Number::Int(v) = n { Some(v) } else { None };
        match dtype.is_float() {
            true => Data::Float(numbers.filter_map(float).collect()),
            false => Data::Int(numbers.filter_map(int).collect()),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::Float(v) => v.len(),
            Data::Int(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An element.
    pub fn get(&self, n: usize) -> Number {
        match self {
            Data::Float(v) => Number::Float(v[n]),
            Data::Int(v) => Number::Int(v[n]),
        }
    }

    /// Writes an element of the same kind.
    pub fn set(&mut self, n: usize, value: Number) {
        match (self, value) {
            (Data::Float(v), Number::Float(value)) => v[n] = value,
            (Data::Int(v), Number::Int(value)) => v[n] = value,
            (Data::Float(_), Number::Int(_)) | (Data::Int(_), Number::Float(_)) => {
                unreachable!("a value has the dtype of its buffer")
            }
        }
    }
}

impl Value {
    /// A value whose elements are all the same.
    pub fn splat(dtype: DType, shape: &[usize], value: f64) -> Value {
        let ty = Type::new(dtype, shape);
        let n = ty.numel();
        let data = match dtype {
            dtype if dtype.is_float() => Data::Float(vec![round_float(dtype, value); n]),
            DType::Small(small) => {
                let code = small::code(small, value);
                Data::Int(vec![wrap(dtype, code.into()); n])
            }
            dtype => Data::Int(vec![cast_to_int(dtype, value); n]),
        };
        Value { ty, data }
    }

    /// The value of a constant.
    pub fn from_constant(constant: &Constant) -> Value {
        Value::from_bytes(&constant.ty, &constant.bytes)
    }

    /// The value of a tensor.
    pub fn from_tensor(tensor: &Tensor) -> Value {
        Value::from_bytes(&Type::new(tensor.dtype(), tensor.shape()), tensor.bytes())
    }

    fn from_bytes(ty: &Type, bytes: &[u8]) -> Value {
        macro_rules! read {
            ($t:ty, $data:ident, $as:ty, $get:expr) => {
                Data::$data(
                    bytes
                        .chunks_exact(size_of::<$t>())
                        .map(|c| {
                            $get(<$t>::from_ne_bytes(c.try_into().expect("exact chunk"))) as $as
                        })
                        .collect(),
                )
            };
        }
        let data = match ty.dtype {
            DType::F32 | DType::TF32 => read!(f32, Float, f64, |v| v),
            DType::F64 => read!(f64, Float, f64, |v| v),
            DType::F16 => read!(u16, Float, f64, |v| half::f16::from_bits(v).to_f64()),
            DType::BF16 => read!(u16, Float, f64, |v| half::bf16::from_bits(v).to_f64()),
            DType::I8 => read!(i8, Int, i128, |v| v),
            DType::I16 => read!(i16, Int, i128, |v| v),
            DType::I32 => read!(i32, Int, i128, |v| v),
            DType::I64 => read!(i64, Int, i128, |v| v),
            DType::U8 => read!(u8, Int, i128, |v| v),
            DType::U16 => read!(u16, Int, i128, |v| v),
            DType::U32 => read!(u32, Int, i128, |v| v),
            DType::U64 => read!(u64, Int, i128, |v| v),
            DType::Bool => read!(u8, Int, i128, |v: u8| (v != 0) as u8),
            DType::Small(small) if small.is_signed() => read!(i8, Int, i128, |v| v),
            DType::Small(_) => read!(u8, Int, i128, |v| v),
        };
        Value { ty: ty.clone(), data }
    }

    /// The value as a tensor.
    pub fn to_tensor(&self) -> Tensor {
        let mut tensor = Tensor::zeros(self.ty.dtype, &self.ty.shape);
        let width = self.ty.dtype.bytes();
        for (i, out) in tensor.bytes_mut().chunks_exact_mut(width).enumerate() {
            match &self.data {
                Data::Float(v) => match self.ty.dtype {
                    DType::F64 => out.copy_from_slice(&v[i].to_ne_bytes()),
                    DType::F16 => out.copy_from_slice(&f16(v[i]).to_ne_bytes()),
                    DType::BF16 => out.copy_from_slice(&bf16(v[i]).to_ne_bytes()),
                    _ => out.copy_from_slice(&(v[i] as f32).to_ne_bytes()),
                },
                Data::Int(v) => out.copy_from_slice(&v[i].to_le_bytes()[..width]),
            }
        }
        tensor
    }

    /// The bits of the elements as another dtype of as many bytes.
    pub fn bits(&self, dtype: DType) -> Data {
        let ty = Type { dtype, ..self.ty.clone() };
        Value::from_bytes(&ty, self.to_tensor().bytes()).data
    }

    /// The elements as i64, where the dtype is an integer or bool.
    pub fn as_i64s(&self) -> Option<Vec<i64>> {
        match &self.data {
            Data::Int(v) => Some(v.iter().map(|&x| x as i64).collect()),
            Data::Float(_) => None,
        }
    }

    /// The elements as f64.
    pub fn as_f64s(&self) -> Vec<f64> {
        match &self.data {
            Data::Float(v) => v.clone(),
            Data::Int(v) => v.iter().map(|&x| x as f64).collect(),
        }
    }
}

/// Runs a graph on its inputs and returns the value of every node.
pub fn eval_nodes(graph: &Graph, inputs: &[Value]) -> Vec<Value> {
    let constants: &[Constant] = &graph.constants;
    let mut values: Vec<Value> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let value = eval_node(graph, node, &values, inputs, constants);
        debug_assert_eq!(value.ty, node.ty, "type of {}", node.origin);
        values.push(value);
    }
    values
}

/// Runs a graph on its inputs; values are dropped after their last use.
pub fn eval(graph: &Graph, inputs: &[Value]) -> Vec<Value> {
    let mut last = vec![0usize; graph.nodes.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.args.iter().for_each(|a| last[a.index()] = i);
    }
    graph.outputs.iter().for_each(|(_, id)| last[id.index()] = usize::MAX);
    let empty = Value::splat(DType::Bool, &[0], 0.0);
    let mut values: Vec<Value> = Vec::with_capacity(graph.nodes.len());
    for (i, node) in graph.nodes.iter().enumerate() {
        values.push(eval_node(graph, node, &values, inputs, &graph.constants));
        for a in node.args.iter().filter(|a| last[a.index()] == i) {
            values[a.index()] = empty.clone();
        }
    }
    graph.outputs.iter().map(|(_, id)| values[id.index()].clone()).collect()
}

fn eval_node(
    graph: &Graph,
    node: &Node,
    values: &[Value],
    inputs: &[Value],
    constants: &[Constant],
) -> Value {
    let args: Vec<&Value> = node.args.iter().map(|a| &values[a.index()]).collect();
    match &node.op {
        Op::Input(i) => inputs[*i as usize].clone(),
        Op::Const(i) => Value::from_constant(&constants[*i as usize]),
        Op::Fused(body) => eval_body(&graph.bodies[*body as usize], &args, constants),
        op => eval_op(op, &args, &node.ty),
    }
}

/// Runs a kernel body on its arguments.
pub fn eval_body(body: &Body, args: &[&Value], constants: &[Constant]) -> Value {
    let mut values: Vec<Value> = Vec::with_capacity(body.nodes.len());
    for node in &body.nodes {
        let operands: Vec<&Value> = node.args.iter().map(|a| &values[a.index()]).collect();
        values.push(match &node.op {
            Op::Input(i) => args[*i as usize].clone(),
            Op::Const(i) => Value::from_constant(&constants[*i as usize]),
            op => eval_op(op, &operands, &node.ty),
        });
    }
    values.pop().expect("a body has at least one node")
}

/// The value of an operation with a result of type `ty`; not Input, Const or Fused.
pub fn eval_op(op: &Op, args: &[&Value], ty: &Type) -> Value {
    let data = match op {
        Op::Input(_) | Op::Const(_) | Op::Fused(_) => {
            unreachable!("inputs, constants and bodies are resolved by the caller")
        }
        Op::Iota(shape, axis) => {
            Data::Int(indices(shape).map(|i| i[*axis as usize] as i128).collect())
        }
        Op::Unary(f) => eval_unary(*f, args[0]),
        Op::Binary(f) => eval_binary(*f, args[0], args[1], ty),
        Op::Select => {
            let [c, x, y] = [0, 1, 2].map(|k: usize| repeat(args[k], &ty.shape));
            let Data::Int(c) = c.data else { unreachable!("conditions are bools") };
            let pick = |(n, &c): (usize, &i128)| if c != 0 { x.data.get(n) } else { y.data.get(n) };
            Data::collect(ty.dtype, c.iter().enumerate().map(pick))
        }
        Op::Cast(dtype) => cast(args[0], *dtype),
        Op::Bits(dtype) => args[0].bits(*dtype),
        Op::Reshape(_) => args[0].data.clone(),
        Op::Permute(axes) => view(args[0], &ty.shape, |i, from| {
            axes.iter().enumerate().for_each(|(d, &a)| from[a as usize] = i[d]);
        }),
        Op::Expand(_) => repeat(args[0], &ty.shape).data,
        Op::Slice(axes) => view(args[0], &ty.shape, |i, from| {
            for (d, a) in axes.iter().enumerate() {
                from[d] = (a.0 + a.1 * i[d] as i64) as usize;
            }
        }),
        Op::Pad(borders) => eval_pad(args, borders, &ty.shape),
        Op::Window(axes) => {
            let lead = args[0].ty.rank() - axes.len();
            view(args[0], &ty.shape, |i, from| {
                from[..lead].copy_from_slice(&i[..lead]);
                for (d, a) in axes.iter().enumerate() {
                    from[lead + d] = i[lead + d] * a.1 + i[lead + axes.len() + d] * a.2;
                }
            })
        }
        Op::Concat(axis) => eval_concat(args, *axis as usize, ty),
        Op::Gather(axis) => eval_gather(args, *axis as usize, ty),
        Op::Scatter(f) => eval_scatter(*f, args),
        Op::Reduce(f, axes) => eval_reduce(*f, args[0], axes, ty),
        Op::Scan(f, axis) => eval_scan(*f, args[0], *axis as usize),
        Op::Contract(contract) => eval_contract(contract, args),
        Op::Composite(f) => {
            // Of halves it is rounded once, as code does it, and not at every step.
            let half = matches!(ty.dtype, DType::F16 | DType::BF16);
            let dtype = if half { DType::F64 } else { ty.dtype };
            let x = Value { ty: Type { dtype, ..ty.clone() }, data: args[0].data.clone() };
            let mut graph = Graph::default();
            let origin = "".into();
            let input = graph.input("x", x.ty.clone());
            let root =
                composite::define(&mut graph, *f, input, &origin).expect("the type was inferred");
            graph.outputs.push(("y".into(), root));
            cast(&eval(&graph, &[x]).swap_remove(0), ty.dtype)
        }
    };
    Value { ty: ty.clone(), data }
}

fn int(v: &Value, n: usize) -> i128 {
    match &v.data {
        Data::Int(v) => v[n],
        Data::Float(_) => unreachable!("integers are asked of integers only"),
    }
}

/// All indices of a shape in row-major order.
pub fn indices(shape: &[usize]) -> impl Iterator<Item = Shape> + use<> {
    let shape = Shape::from_slice(shape);
    let total: usize = shape.iter().product();
    let mut next: Shape = shape.iter().map(|_| 0).collect();
    (0..total).map(move |_| {
        let now = next.clone();
        for d in (0..shape.len()).rev() {
            next[d] += 1;
            if next[d] < shape[d] {
                break;
            }
            next[d] = 0;
        }
        now
    })
}

/// Row-major strides of a shape, in elements.
pub fn strides(shape: &[usize]) -> Shape {
    let mut strides: Shape = shape.iter().map(|_| 1).collect();
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    strides
}

fn flat(index: &[usize], strides: &[usize]) -> usize {
    index.iter().zip(strides).map(|(i, s)| i * s).sum()
}

/// The elements of `x` at the indices that `source(result index, &mut operand index)` gives.
fn view(x: &Value, shape: &[usize], source: impl Fn(&[usize], &mut [usize])) -> Data {
    let steps = strides(&x.ty.shape);
    let mut from: Shape = x.ty.shape.iter().map(|_| 0).collect();
    let places = indices(shape).map(|i| {
        source(&i, &mut from);
        flat(&from, &steps)
    });
    match &x.data {
        Data::Float(v) => Data::Float(places.map(|p| v[p]).collect()),
        Data::Int(v) => Data::Int(places.map(|p| v[p]).collect()),
    }
}

/// x with its axes of extent 1 repeated to a shape.
fn repeat(x: &Value, shape: &[usize]) -> Value {
    if x.ty.shape.as_slice() == shape {
        return x.clone();
    }
    let ones: Vec<bool> = x.ty.shape.iter().map(|&e| e == 1).collect();
    let data = view(x, shape, |i, from| {
        (0..i.len()).for_each(|d| from[d] = if ones[d] { 0 } else { i[d] });
    });
    Value { ty: Type::new(x.ty.dtype, shape), data }
}

fn eval_unary(f: UnaryFn, x: &Value) -> Data {
    let dtype = x.ty.dtype;
    let numbers = (0..x.data.len()).map(|n| scalar::unary(f, dtype, x.data.get(n)));
    Data::collect(dtype, numbers)
}

fn eval_binary(f: BinaryFn, x: &Value, y: &Value, ty: &Type) -> Data {
    let (x, y) = (repeat(x, &ty.shape), repeat(y, &ty.shape));
    let pairs = (0..x.data.len()).map(|n| (x.data.get(n), y.data.get(n)));
    Data::collect(ty.dtype, pairs.map(|(a, b)| scalar::binary(f, x.ty.dtype, a, b)))
}

fn cast(x: &Value, dtype: DType) -> Data {
    Data::collect(dtype, (0..x.data.len()).map(|n| scalar::cast(dtype, x.data.get(n))))
}

fn eval_pad(args: &[&Value], borders: &[(usize, usize)], shape: &[usize]) -> Data {
    let x = args[0];
    let steps = strides(&x.ty.shape);
    let place = |i: &[usize]| -> Option<usize> {
        i.iter().zip(borders).zip(&x.ty.shape).zip(&steps).try_fold(0, |sum, (((&i, b), &e), s)| {
            Some(sum + i.checked_sub(b.0).filter(|&k| k < e)? * s)
        })
    };
    match (&x.data, &args[1].data) {
        (Data::Float(v), Data::Float(fill)) => {
            Data::Float(indices(shape).map(|i| place(&i).map_or(fill[0], |p| v[p])).collect())
        }
        (Data::Int(v), Data::Int(fill)) => {
            Data::Int(indices(shape).map(|i| place(&i).map_or(fill[0], |p| v[p])).collect())
        }
        _ => unreachable!("the fill has the operand's dtype"),
    }
}

fn eval_concat(args: &[&Value], axis: usize, ty: &Type) -> Data {
    let outer: usize = ty.shape[..axis].iter().product();
    fn join<T: Copy>(parts: &[&[T]], outer: usize) -> Vec<T> {
        (0..outer)
            .flat_map(|o| {
                parts.iter().flat_map(move |p| {
                    let row = p.len() / outer;
                    p[o * row..(o + 1) * row].iter().copied()
                })
            })
            .collect()
    }
    if outer == 0 || ty.numel() == 0 {
        return Value::splat(ty.dtype, &ty.shape, 0.0).data;
    }
    let floats: Option<Vec<&[f64]>> = args
        .iter()
        .map(|a| if let Data::Float(v) = &a.data { Some(v.as_slice()) } else { None })
        .collect();
    match floats {
        Some(parts) => Data::Float(join(&parts, outer)),
        None => {
            let parts: Vec<&[i128]> = args
                .iter()
                .filter_map(|a| if let Data::Int(v) = &a.data { Some(v.as_slice()) } else { None })
                .collect();
            Data::Int(join(&parts, outer))
        }
    }
}

/// An index as Gather reads it: from the end where negative, then clamped.
fn clamp_index(index: i128, extent: usize) -> usize {
    let index = if index < 0 { index + extent as i128 } else { index };
    index.clamp(0, extent as i128 - 1) as usize
}

fn eval_gather(args: &[&Value], axis: usize, ty: &Type) -> Data {
    let (x, y) = (args[0], args[1]);
    let y_steps = strides(&y.ty.shape);
    let inner = axis + y.ty.rank();
    view(x, &ty.shape, |i, from| {
        from[..axis].copy_from_slice(&i[..axis]);
        from[axis] = clamp_index(int(y, flat(&i[axis..inner], &y_steps)), x.ty.shape[axis]);
        from[axis + 1..].copy_from_slice(&i[inner..]);
    })
}

fn eval_scatter(f: Option<ReduceFn>, args: &[&Value]) -> Data {
    let (x, y, z) = (args[0], args[1], args[2]);
    let extent = x.ty.shape[0];
    let row: usize = x.ty.shape[1..].iter().product();
    let dtype = x.ty.dtype;
    let mut out = x.data.clone();
    for j in 0..y.ty.numel() {
        let index = int(y, j);
        let index = if index < 0 { index + extent as i128 } else { index };
        if !(0..extent as i128).contains(&index) {
            continue;
        }
        for k in 0..row {
            let (to, from) = (index as usize * row + k, j * row + k);
            let (old, new) = (out.get(to), z.data.get(from));
            out.set(to, f.map_or(new, |f| scalar::binary(f.binary(dtype), dtype, old, new)));
        }
    }
    out
}

fn eval_reduce(f: ReduceFn, x: &Value, axes: &[u8], ty: &Type) -> Data {
    let steps = strides(&ty.shape);
    let (float_start, int_start) = reduce_identity(f, ty.dtype);
    let target = |mut i: Shape| {
        axes.iter().for_each(|&a| i[a as usize] = 0);
        flat(&i, &steps)
    };
    match &x.data {
        Data::Float(v) => {
            let mut out = vec![float_start; ty.numel()];
            for (n, i) in indices(&x.ty.shape).enumerate() {
                let to = target(i);
                out[to] = float_binary(f.binary(ty.dtype), out[to], v[n]);
            }
            Data::Float(out.into_iter().map(|v| round_float(ty.dtype, v)).collect())
        }
        Data::Int(v) => {
            let mut out = vec![int_start; ty.numel()];
            for (n, i) in indices(&x.ty.shape).enumerate() {
                let to = target(i);
                out[to] = wrap(ty.dtype, int_binary(f.binary(ty.dtype), out[to], v[n]));
            }
            Data::Int(out)
        }
    }
}

fn eval_scan(f: ReduceFn, x: &Value, axis: usize) -> Data {
    let step = strides(&x.ty.shape)[axis];
    let mut out = x.data.clone();
    for (n, i) in indices(&x.ty.shape).enumerate() {
        if i[axis] == 0 {
            continue;
        }
        let next = scalar::binary(f.binary(x.ty.dtype), x.ty.dtype, out.get(n - step), out.get(n));
        out.set(n, next);
    }
    out
}

fn eval_contract(contract: &Contract, args: &[&Value]) -> Data {
    let n_axes = contract.extents.len();
    // The place of an operand element is affine in the iteration axes, like its indices.
    let place = |operand: usize| -> Affine {
        let steps = strides(&args[operand].ty.shape);
        contract.maps[operand].iter().zip(&steps).fold(Affine::default(), |sum, (index, &step)| {
            let scaled =
                index.terms.iter().fold(sum, |s, t| s.plus(t.0 as usize, t.1 * step as i64));
            Affine { offset: scaled.offset + index.offset * step as i64, ..scaled }
        })
    };
    let places = [place(0), place(1)];
    let coefficients: Vec<[i64; 2]> =
        (0..n_axes).map(|a| [places[0].coefficient(a), places[1].coefficient(a)]).collect();
    let (out, summed) = contract.extents.split_at(contract.n_out);
    let at = |i: &[usize], first: usize, start: [i64; 2]| {
        i.iter().enumerate().fold(start, |[x, y], (a, &i)| {
            let c = coefficients[first + a];
            [x + c[0] * i as i64, y + c[1] * i as i64]
        })
    };
    // The innermost summed axis runs as plain strides: all else would be too slow for big models.
    let (rest, inner) = match summed.split_last() {
        Some((&inner, rest)) => (rest, inner),
        None => (summed, 1),
    };
    let step = if summed.is_empty() { [0, 0] } else { coefficients[n_axes - 1] };
    let offsets: Vec<[i64; 2]> = indices(rest).map(|i| at(&i, contract.n_out, [0, 0])).collect();
    let base = [places[0].offset, places[1].offset];
    match (&args[0].data, &args[1].data) {
        (Data::Float(x), Data::Float(y)) => {
            let dtype = args[0].ty.dtype;
            Data::Float(
                indices(out)
                    .map(|i| {
                        let start = at(&i, 0, base);
                        let mut sum = 0.0;
                        for offset in &offsets {
                            let (mut p, mut q) = (start[0] + offset[0], start[1] + offset[1]);
                            for _ in 0..inner {
                                sum += x[p as usize] * y[q as usize];
                                p += step[0];
                                q += step[1];
                            }
                        }
                        round_float(dtype, sum)
                    })
                    .collect(),
            )
        }
        (Data::Int(x), Data::Int(y)) => {
            let dtype = args[0].ty.dtype;
            let sum_of = |i: Shape| {
                let start = at(&i, 0, base);
                offsets.iter().fold(0i128, |sum, offset| {
                    (0..inner as i64).fold(sum, |sum, k| {
                        let p = start[0] + offset[0] + k * step[0];
                        let q = start[1] + offset[1] + k * step[1];
                        let product = x[p as usize].wrapping_mul(y[q as usize]);
                        wrap(dtype, sum.wrapping_add(product))
                    })
                })
            };
            Data::Int(indices(out).map(sum_of).collect())
        }
        _ => unreachable!("operands have one dtype"),
    }
}
