//! What every operation means: the reference interpreter, slow and obviously right.
//!
//! Floating point numbers are computed in f64 and rounded to the dtype after each node; integers
//! are computed exactly and wrapped. All other forms of a model are checked against this one.

use kiln_runtime::tensor::{DType, Tensor};

use super::op::{Affine, BinaryFn, Contract, Op, ReduceFn, Shape, Type, UnaryFn};
use super::{Body, Constant, Graph, Node, composite};

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

impl Value {
    /// A value whose elements are all the same.
    pub fn splat(dtype: DType, shape: &[usize], value: f64) -> Value {
        let ty = Type::new(dtype, shape);
        let n = ty.numel();
        let data = match dtype.is_float() {
            true => Data::Float(vec![round_float(dtype, value); n]),
            false => Data::Int(vec![cast_to_int(dtype, value); n]),
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
            DType::F32 => read!(f32, Float, f64, |v| v),
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

/// The number as f32, or where there is none the neighbour with an odd mantissa: rounding that
/// once more gives what rounding the number would. (`half` drops the low half of an f64.)
fn sticky(v: f64) -> f32 {
    let near = v as f32;
    let exact = near as f64 == v || v.is_nan() || near.is_infinite();
    match near.to_bits() & 1 {
        0 if !exact => f32::from_bits(match (near as f64).abs() < v.abs() {
            true => near.to_bits() + 1,
            false => near.to_bits() - 1,
        }),
        _ => near,
    }
}

fn bf16(v: f64) -> half::bf16 {
    half::bf16::from_f32(sticky(v))
}

fn f16(v: f64) -> half::f16 {
    half::f16::from_f32(sticky(v))
}

/// The nearest number of a floating point dtype.
pub fn round_float(dtype: DType, v: f64) -> f64 {
    match dtype {
        DType::F64 => v,
        DType::F16 => f16(v).to_f64(),
        DType::BF16 => bf16(v).to_f64(),
        _ => v as f32 as f64,
    }
}

/// An integer wrapped to a dtype.
fn wrap(dtype: DType, v: i128) -> i128 {
    match dtype {
        DType::I8 => v as i8 as i128,
        DType::I16 => v as i16 as i128,
        DType::I32 => v as i32 as i128,
        DType::I64 => v as i64 as i128,
        DType::U8 => v as u8 as i128,
        DType::U16 => v as u16 as i128,
        DType::U32 => v as u32 as i128,
        DType::U64 => v as u64 as i128,
        DType::Bool => (v != 0) as i128,
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 => v,
    }
}

/// Least and greatest value of an integer dtype.
pub fn int_range(dtype: DType) -> (i128, i128) {
    match dtype {
        DType::I8 => (i8::MIN as i128, i8::MAX as i128),
        DType::I16 => (i16::MIN as i128, i16::MAX as i128),
        DType::I32 => (i32::MIN as i128, i32::MAX as i128),
        DType::I64 => (i64::MIN as i128, i64::MAX as i128),
        DType::U8 => (0, u8::MAX as i128),
        DType::U16 => (0, u16::MAX as i128),
        DType::U32 => (0, u32::MAX as i128),
        DType::U64 => (0, u64::MAX as i128),
        DType::Bool | DType::F32 | DType::F16 | DType::BF16 | DType::F64 => (0, 1),
    }
}

/// Float to integer: truncated and saturated, NaN is 0; to bool it is `!= 0`.
fn cast_to_int(dtype: DType, v: f64) -> i128 {
    if dtype == DType::Bool {
        return (v != 0.0) as i128;
    }
    let (low, high) = int_range(dtype);
    (v as i128).clamp(low, high)
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
            let pick = |n: usize| if c[n] != 0 { &x } else { &y };
            match &x.data {
                Data::Float(_) => Data::Float((0..c.len()).map(|n| float(pick(n), n)).collect()),
                Data::Int(_) => Data::Int((0..c.len()).map(|n| int(pick(n), n)).collect()),
            }
        }
        Op::Cast(dtype) => cast(args[0], *dtype),
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
            let mut graph = Graph::default();
            let origin = "".into();
            let x = graph.input("x", args[0].ty.clone());
            let root =
                composite::define(&mut graph, *f, x, &origin).expect("the type was inferred");
            graph.outputs.push(("y".into(), root));
            return eval(&graph, &[args[0].clone()]).swap_remove(0);
        }
    };
    Value { ty: ty.clone(), data }
}

fn float(v: &Value, n: usize) -> f64 {
    match &v.data {
        Data::Float(v) => v[n],
        Data::Int(v) => v[n] as f64,
    }
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
    match &x.data {
        Data::Float(v) => {
            Data::Float(v.iter().map(|&x| round_float(dtype, float_unary(f, x))).collect())
        }
        Data::Int(v) => Data::Int(v.iter().map(|&x| wrap(dtype, int_unary(f, x, dtype))).collect()),
    }
}

/// A function of one f64.
pub fn float_unary(f: UnaryFn, x: f64) -> f64 {
    match f {
        UnaryFn::Neg => -x,
        UnaryFn::Abs => x.abs(),
        UnaryFn::Sign if x == 0.0 || x.is_nan() => x,
        UnaryFn::Sign => x.signum(),
        UnaryFn::Recip => 1.0 / x,
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Exp => x.exp(),
        UnaryFn::Log => x.ln(),
        UnaryFn::Sin => x.sin(),
        UnaryFn::Cos => x.cos(),
        UnaryFn::Tanh => x.tanh(),
        UnaryFn::Erf => erf(x),
        UnaryFn::Floor => x.floor(),
        UnaryFn::Ceil => x.ceil(),
        UnaryFn::Round => x.round_ties_even(),
        UnaryFn::Not => (x == 0.0) as u8 as f64,
    }
}

fn int_unary(f: UnaryFn, x: i128, dtype: DType) -> i128 {
    match f {
        UnaryFn::Neg => -x,
        UnaryFn::Abs => x.abs(),
        UnaryFn::Sign => x.signum(),
        UnaryFn::Not if dtype == DType::Bool => (x == 0) as i128,
        UnaryFn::Not => !x,
        UnaryFn::Recip
        | UnaryFn::Sqrt
        | UnaryFn::Exp
        | UnaryFn::Log
        | UnaryFn::Sin
        | UnaryFn::Cos
        | UnaryFn::Tanh
        | UnaryFn::Erf
        | UnaryFn::Floor
        | UnaryFn::Ceil
        | UnaryFn::Round => unreachable!("inference refuses {f:?} of integers"),
    }
}

/// Error function: its Taylor series where that converges fast, else the continued fraction of
/// its complement (Abramowitz and Stegun 7.1.5 and 7.1.14); error below 1e-13.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return x;
    }
    let value = if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        std::f64::consts::FRAC_2_SQRT_PI * sum
    } else if a > 6.5 {
        1.0
    } else {
        let tail = (1..60).rev().fold(a, |t, k| a + k as f64 / 2.0 / t);
        1.0 - (-a * a).exp() / (tail * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

fn eval_binary(f: BinaryFn, x: &Value, y: &Value, ty: &Type) -> Data {
    let (x, y) = (repeat(x, &ty.shape), repeat(y, &ty.shape));
    let compare = |v: bool| v as i128;
    match (&x.data, &y.data) {
        (Data::Float(a), Data::Float(b)) => {
            let pairs = a.iter().copied().zip(b.iter().copied());
            match f {
                BinaryFn::Eq => Data::Int(pairs.map(|(a, b)| compare(a == b)).collect()),
                BinaryFn::Ne => Data::Int(pairs.map(|(a, b)| compare(a != b)).collect()),
                BinaryFn::Lt => Data::Int(pairs.map(|(a, b)| compare(a < b)).collect()),
                BinaryFn::Le => Data::Int(pairs.map(|(a, b)| compare(a <= b)).collect()),
                _ => Data::Float(
                    pairs.map(|(a, b)| round_float(ty.dtype, float_binary(f, a, b))).collect(),
                ),
            }
        }
        (Data::Int(a), Data::Int(b)) => {
            let pairs = a.iter().copied().zip(b.iter().copied());
            Data::Int(pairs.map(|(a, b)| wrap(ty.dtype, int_binary(f, a, b))).collect())
        }
        _ => unreachable!("operands have one dtype"),
    }
}

/// A function of two f64; comparisons give 0 or 1.
pub fn float_binary(f: BinaryFn, a: f64, b: f64) -> f64 {
    match f {
        BinaryFn::Add => a + b,
        BinaryFn::Sub => a - b,
        BinaryFn::Mul => a * b,
        BinaryFn::Div => a / b,
        BinaryFn::Rem => a % b,
        BinaryFn::Max if a.is_nan() || b.is_nan() => f64::NAN,
        BinaryFn::Min if a.is_nan() || b.is_nan() => f64::NAN,
        BinaryFn::Max => a.max(b),
        BinaryFn::Min => a.min(b),
        BinaryFn::Pow => a.powf(b),
        BinaryFn::Eq => (a == b) as u8 as f64,
        BinaryFn::Ne => (a != b) as u8 as f64,
        BinaryFn::Lt => (a < b) as u8 as f64,
        BinaryFn::Le => (a <= b) as u8 as f64,
        BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => {
            unreachable!("inference refuses {f:?} of floats")
        }
    }
}

fn int_binary(f: BinaryFn, a: i128, b: i128) -> i128 {
    match f {
        BinaryFn::Add => a + b,
        BinaryFn::Sub => a - b,
        // Of 64-bit factors: the product fits.
        BinaryFn::Mul => a.wrapping_mul(b),
        BinaryFn::Div => a.checked_div(b).unwrap_or(0),
        BinaryFn::Rem => a.checked_rem(b).unwrap_or(0),
        BinaryFn::Max => a.max(b),
        BinaryFn::Min => a.min(b),
        BinaryFn::Pow => int_pow(a, b),
        BinaryFn::Eq => (a == b) as i128,
        BinaryFn::Ne => (a != b) as i128,
        BinaryFn::Lt => (a < b) as i128,
        BinaryFn::Le => (a <= b) as i128,
        BinaryFn::And => a & b,
        BinaryFn::Or => a | b,
        BinaryFn::Xor => a ^ b,
    }
}

/// a^b, wrapping; a negative exponent truncates the fraction.
fn int_pow(a: i128, b: i128) -> i128 {
    match (a, b) {
        (1, _) => 1,
        (-1, b) => {
            if b % 2 == 0 {
                1
            } else {
                -1
            }
        }
        (_, b) if b < 0 => 0,
        (a, b) => {
            let (mut result, mut base, mut rest) = (1i128, a, b);
            while rest > 0 {
                if rest & 1 == 1 {
                    result = result.wrapping_mul(base);
                }
                base = base.wrapping_mul(base);
                rest >>= 1;
            }
            result
        }
    }
}

fn cast(x: &Value, dtype: DType) -> Data {
    match &x.data {
        Data::Float(v) if dtype.is_float() => {
            Data::Float(v.iter().map(|&v| round_float(dtype, v)).collect())
        }
        Data::Float(v) => Data::Int(v.iter().map(|&v| cast_to_int(dtype, v)).collect()),
        Data::Int(v) if dtype.is_float() => {
            Data::Float(v.iter().map(|&v| round_float(dtype, v as f64)).collect())
        }
        Data::Int(v) => Data::Int(v.iter().map(|&v| wrap(dtype, v)).collect()),
    }
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
            match &mut out {
                Data::Float(v) => {
                    let new = float(z, from);
                    let old = v[to];
                    v[to] =
                        f.map_or(new, |f| round_float(dtype, float_binary(f.binary(), old, new)));
                }
                Data::Int(v) => {
                    let new = int(z, from);
                    let old = v[to];
                    v[to] = f.map_or(new, |f| wrap(dtype, int_binary(f.binary(), old, new)));
                }
            }
        }
    }
    out
}

/// What a reduction of no elements gives.
pub fn reduce_identity(f: ReduceFn, dtype: DType) -> (f64, i128) {
    let (low, high) = int_range(dtype);
    match f {
        ReduceFn::Sum => (0.0, 0),
        ReduceFn::Prod => (1.0, 1),
        ReduceFn::Max => (f64::NEG_INFINITY, low),
        ReduceFn::Min => (f64::INFINITY, high),
    }
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
                out[to] = float_binary(f.binary(), out[to], v[n]);
            }
            Data::Float(out.into_iter().map(|v| round_float(ty.dtype, v)).collect())
        }
        Data::Int(v) => {
            let mut out = vec![int_start; ty.numel()];
            for (n, i) in indices(&x.ty.shape).enumerate() {
                let to = target(i);
                out[to] = wrap(ty.dtype, int_binary(f.binary(), out[to], v[n]));
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
        match &mut out {
            Data::Float(v) => {
                v[n] = round_float(x.ty.dtype, float_binary(f.binary(), v[n - step], v[n]))
            }
            Data::Int(v) => v[n] = wrap(x.ty.dtype, int_binary(f.binary(), v[n - step], v[n])),
        }
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
                        wrap(dtype, sum + x[p as usize].wrapping_mul(y[q as usize]))
                    })
                })
            };
            Data::Int(indices(out).map(sum_of).collect())
        }
        _ => unreachable!("operands have one dtype"),
    }
}
