//! Graphs computed by libtorch: floats as f64, integers as i64 that are wrapped after each
//! operation, so that it says what exact arithmetic gives.

use kiln::graph::eval::{Data, Value};
use kiln::graph::op::{BinaryFn, Composite, Contract, Op, ReduceFn, Type, UnaryFn};
use kiln::graph::{Graph, Node};
use kiln::tensor::DType;
use tch::{Kind, Tensor};

/// The outputs of a graph; `None` where it has something that libtorch has not: integers of 64
/// bits without a sign, or values without elements.
pub fn eval(graph: &Graph, inputs: &[Value]) -> Option<Vec<Value>> {
    let known = |node: &Node| node.ty.dtype != DType::U64 && node.ty.numel() > 0;
    if !graph.nodes.iter().all(known) {
        return None;
    }
    let mut values: Vec<Tensor> = Vec::new();
    for node in &graph.nodes {
        let args: Vec<&Tensor> = node.args.iter().map(|a| &values[a.index()]).collect();
        let value = match &node.op {
            Op::Input(i) => to_torch(&inputs[*i as usize]),
            Op::Const(i) => to_torch(&Value::from_constant(&graph.constants[*i as usize])),
            op => {
                let from = node.args.first().map(|a| graph.ty(*a).dtype);
                operation(op, &args, from.unwrap_or(DType::I64), &node.ty)
            }
        };
        values.push(wrapped(value, node.ty.dtype));
    }
    let output = |(_, id): &(String, _)| from_torch(graph.ty(*id), &values[id.index()]);
    Some(graph.outputs.iter().map(output).collect())
}

fn longs(extents: &[usize]) -> Vec<i64> {
    extents.iter().map(|&e| e as i64).collect()
}

fn to_torch(value: &Value) -> Tensor {
    let flat = match &value.data {
        Data::Float(numbers) => Tensor::from_slice(numbers),
        Data::Int(numbers) => {
            Tensor::from_slice(&numbers.iter().map(|&v| v as i64).collect::<Vec<_>>())
        }
    };
    flat.view(&longs(&value.ty.shape)[..])
}

fn from_torch(ty: &Type, tensor: &Tensor) -> Value {
    assert_eq!(tensor.size(), longs(&ty.shape));
    let flat = tensor.contiguous().view(-1);
    let data = match ty.dtype.is_float() {
        true => Data::Float(Vec::<f64>::try_from(&flat).expect("a dense list")),
        false => {
            let numbers = Vec::<i64>::try_from(&flat).expect("a dense list");
            Data::Int(numbers.into_iter().map(i128::from).collect())
        }
    };
    Value { ty: ty.clone(), data }
}

/// An integer as its dtype has it.
fn wrapped(x: Tensor, dtype: DType) -> Tensor {
    let bits = 8 * dtype.bytes() as u32;
    match dtype.stored() {
        DType::Bool => x.ne(0).to_kind(Kind::Int64),
        _ if dtype.is_float() || bits == 64 => x,
        DType::U8 | DType::U16 | DType::U32 => x.bitwise_and((1i64 << bits) - 1),
        _ => {
            let half = 1i64 << (bits - 1);
            (x + half).bitwise_and((1i64 << bits) - 1) - half
        }
    }
}

/// `from`: the dtype of the first operand.
fn operation(op: &Op, args: &[&Tensor], from: DType, ty: &Type) -> Tensor {
    let shape = longs(&ty.shape);
    let x = || args[0];
    match op {
        Op::Input(_) | Op::Const(_) | Op::Fused(_) => unreachable!("graphs are not fused"),
        Op::Iota(_, axis) => {
            let mut along = vec![1; shape.len()];
            along[*axis as usize] = shape[*axis as usize];
            let numbers = Tensor::arange(shape[*axis as usize], (Kind::Int64, tch::Device::Cpu));
            numbers.view(&along[..]).expand(&shape, false)
        }
        Op::Unary(f) => unary(*f, x(), from),
        Op::Binary(f) => binary(*f, args[0], args[1], from),
        Op::Select => args[1].where_self(&args[0].ne(0), args[2]),
        Op::Cast(to) => cast(x(), from, *to),
        Op::Bits(to) => wrapped(x().shallow_clone(), *to),
        Op::Reshape(_) => x().reshape(&shape[..]),
        Op::Permute(axes) => x().permute(axes.iter().map(|&a| i64::from(a)).collect::<Vec<_>>()),
        Op::Expand(_) => x().expand(&shape, false),
        Op::Slice(ranges) => {
            let mut y = x().shallow_clone();
            for (axis, &(start, step, extent)) in ranges.iter().enumerate() {
                let at: Vec<i64> = (0..extent as i64).map(|i| start + step * i).collect();
                y = y.index_select(axis as i64, &Tensor::from_slice(&at));
            }
            y
        }
        Op::Pad(borders) => {
            let y = args[1].reshape([] as [i64; 0]).expand(&shape, false).contiguous();
            let mut inside = y.shallow_clone();
            for (axis, (border, extent)) in borders.iter().zip(x().size()).enumerate() {
                inside = inside.narrow(axis as i64, border.0 as i64, extent);
            }
            inside.copy_(x());
            y
        }
        Op::Window(windows) => window(x(), windows),
        Op::Concat(axis) => Tensor::cat(args, i64::from(*axis)),
        Op::Gather(axis) => {
            let extent = x().size()[*axis as usize];
            let index = args[1].reshape([-1]);
            let index = index.where_self(&index.ge(0), &(&index + extent)).clamp(0, extent - 1);
            x().index_select(i64::from(*axis), &index).reshape(&shape[..])
        }
        Op::Scatter(f) => scatter(*f, args, from),
        Op::Reduce(f, axes) => {
            let fold = |y: Tensor, &axis: &u8| fold(*f, &y, i64::from(axis));
            axes.iter().fold(x().shallow_clone(), fold)
        }
        Op::Scan(f, axis) => {
            let axis = i64::from(*axis);
            match f {
                ReduceFn::Sum => x().cumsum(axis, None),
                ReduceFn::Prod => x().cumprod(axis, None),
                ReduceFn::Max => x().cummax(axis).0,
                ReduceFn::Min => x().cummin(axis).0,
            }
        }
        Op::Contract(contract) => product(contract, args),
        Op::Composite(f) => composite(*f, x()),
    }
}

fn unary(f: UnaryFn, x: &Tensor, dtype: DType) -> Tensor {
    match f {
        UnaryFn::Neg => x.neg(),
        UnaryFn::Abs => x.abs(),
        UnaryFn::Sign => x.sign(),
        UnaryFn::Recip => x.reciprocal(),
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Exp => x.exp(),
        UnaryFn::Log => x.log(),
        UnaryFn::Sin => x.sin(),
        UnaryFn::Cos => x.cos(),
        UnaryFn::Tanh => x.tanh(),
        UnaryFn::Erf => x.erf(),
        UnaryFn::Floor => x.floor(),
        UnaryFn::Ceil => x.ceil(),
        UnaryFn::Round => x.round(),
        UnaryFn::Not if dtype == DType::Bool => x.eq(0).to_kind(Kind::Int64),
        UnaryFn::Not => x.bitwise_not(),
    }
}

fn binary(f: BinaryFn, x: &Tensor, y: &Tensor, dtype: DType) -> Tensor {
    let whole = !dtype.is_float();
    // Integers are not divided by 0: the result is 0.
    let divisor = || y.where_self(&y.ne(0), &y.ones_like());
    let or_zero = |z: Tensor| z.where_self(&y.ne(0), &z.zeros_like());
    match f {
        BinaryFn::Add => x + y,
        BinaryFn::Sub => x - y,
        BinaryFn::Mul => x * y,
        BinaryFn::Div if whole => or_zero(x.divide_tensor_mode(&divisor(), "trunc")),
        BinaryFn::Div => x / y,
        BinaryFn::Rem if whole => or_zero(x.fmod_tensor(&divisor())),
        BinaryFn::Rem => x.fmod_tensor(y),
        BinaryFn::Max => x.maximum(y),
        BinaryFn::Min => x.minimum(y),
        BinaryFn::Pow => x.pow(y),
        BinaryFn::Eq => x.eq_tensor(y).to_kind(Kind::Int64),
        BinaryFn::Ne => x.ne_tensor(y).to_kind(Kind::Int64),
        BinaryFn::Lt => x.lt_tensor(y).to_kind(Kind::Int64),
        BinaryFn::Le => x.le_tensor(y).to_kind(Kind::Int64),
        BinaryFn::And => x.bitwise_and_tensor(y),
        BinaryFn::Or => x.bitwise_or_tensor(y),
        BinaryFn::Xor => x.bitwise_xor_tensor(y),
    }
}

fn cast(x: &Tensor, from: DType, to: DType) -> Tensor {
    match (from.is_float(), to.is_float()) {
        (_, true) => x.to_kind(Kind::Double),
        (true, false) if to == DType::Bool => x.ne(0).to_kind(Kind::Int64),
        (true, false) => {
            let (least, most) = kiln::graph::eval::int_range(to);
            x.clamp(least as f64, most as f64).trunc().to_kind(Kind::Int64)
        }
        (false, false) => x.shallow_clone(),
    }
}

/// Sliding windows: elements are picked along each axis, then taps go to the end.
fn window(x: &Tensor, windows: &[(usize, usize, usize)]) -> Tensor {
    let mut y = x.shallow_clone();
    let lead = y.dim() - windows.len();
    // From the last axis on, so that the numbers of earlier ones stay.
    for (d, &(size, stride, dilation)) in windows.iter().enumerate().rev() {
        let axis = lead + d;
        let extent = y.size()[axis] as usize;
        let turns = (extent - (size - 1) * dilation - 1) / stride + 1;
        let taps =
            (0..turns).flat_map(|i| (0..size).map(move |k| (i * stride + k * dilation) as i64));
        let at: Vec<i64> = taps.collect();
        let mut to = y.size();
        to.splice(axis..=axis, [turns as i64, size as i64]);
        y = y.index_select(axis as i64, &Tensor::from_slice(&at)).view(&to[..]);
        // The taps behind all axes, before those of later windows.
        let last = y.dim() - (windows.len() - 1 - d) - 1;
        let mut order: Vec<i64> = (0..y.dim() as i64).collect();
        let taps = order.remove(axis + 1);
        order.insert(last, taps);
        y = y.permute(order);
    }
    y
}

fn scatter(f: Option<ReduceFn>, args: &[&Tensor], dtype: DType) -> Tensor {
    let y = args[0].copy();
    let extent = y.size()[0];
    let index = Vec::<i64>::try_from(args[1].contiguous()).expect("a list");
    for (j, &at) in index.iter().enumerate() {
        let at = if at < 0 { at + extent } else { at };
        if !(0..extent).contains(&at) {
            continue;
        }
        let (mut row, new) = (y.select(0, at), args[2].select(0, j as i64));
        let value = match f {
            None => new,
            Some(f) => wrapped(binary(f.binary(dtype), &row, &new, dtype), dtype),
        };
        row.copy_(&value);
    }
    y
}

fn fold(f: ReduceFn, x: &Tensor, axis: i64) -> Tensor {
    match f {
        ReduceFn::Sum => x.sum_dim_intlist(&[axis][..], true, None),
        ReduceFn::Prod => x.prod_dim_int(axis, true, None),
        ReduceFn::Max => x.amax(&[axis][..], true),
        ReduceFn::Min => x.amin(&[axis][..], true),
    }
}

/// Every operand read at each point of the iteration space, multiplied, summed.
fn product(contract: &Contract, args: &[&Tensor]) -> Tensor {
    let extents = longs(&contract.extents);
    let read = |k: usize| {
        let mut flat = Tensor::zeros(&extents[..], (Kind::Int64, tch::Device::Cpu));
        for (index, extent) in contract.maps[k].iter().zip(args[k].size()) {
            let mut at = Tensor::full(&extents[..], index.offset, (Kind::Int64, tch::Device::Cpu));
            for &(axis, coefficient) in &index.terms {
                let mut along = vec![1; extents.len()];
                along[axis as usize] = extents[axis as usize];
                let steps = Tensor::arange(extents[axis as usize], (Kind::Int64, tch::Device::Cpu));
                at += (steps * coefficient).view(&along[..]);
            }
            flat = flat * extent + at;
        }
        args[k].reshape([-1]).index_select(0, &flat.reshape([-1])).view(&extents[..])
    };
    let products = read(0) * read(1);
    let sums: Vec<i64> = (contract.n_out as i64..extents.len() as i64).collect();
    match sums.is_empty() {
        true => products,
        false => products.sum_dim_intlist(&sums[..], false, None),
    }
}

fn composite(f: Composite, x: &Tensor) -> Tensor {
    let own = |axis: u8| -> Vec<i64> { (i64::from(axis)..x.dim() as i64).collect() };
    let mean = |x: &Tensor, axis: u8| x.mean_dim(&own(axis)[..], true, None);
    let epsilon = |bits: u32| f64::from(f32::from_bits(bits));
    match f {
        Composite::Sigmoid => x.sigmoid(),
        Composite::Silu => x.silu(),
        Composite::Gelu => x.gelu("none"),
        Composite::Softmax(axis) => x.softmax(i64::from(axis), None),
        Composite::LayerNorm(axis, bits) => {
            let centred = x - mean(x, axis);
            let variance = mean(&(&centred * &centred), axis);
            centred / (variance + epsilon(bits)).sqrt()
        }
        Composite::RmsNorm(axis, bits) => x / (mean(&(x * x), axis) + epsilon(bits)).sqrt(),
    }
}
