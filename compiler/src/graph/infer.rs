//! The type that an operation makes from the types of its operands, or why it cannot.

use kiln_runtime::tensor::{DType, size_bytes};

use super::op::{BinaryFn, Contract, Op, Shape, Type, UnaryFn};
use super::used::used;

/// What an operation asked for and what it got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// What would have been right.
    pub expected: String,
    /// What was there.
    pub found: String,
}

fn misfit<T>(expected: impl Into<String>, found: impl Into<String>) -> Result<T, Misfit> {
    Err(Misfit { expected: expected.into(), found: found.into() })
}

fn ensure(holds: bool, expected: &str, found: impl std::fmt::Debug) -> Result<(), Misfit> {
    if holds { Ok(()) } else { misfit(expected, format!("{found:?}")) }
}

/// Number of operands, or `None` where any number from 1 is right.
pub fn arity(op: &Op) -> Option<usize> {
    match op {
        Op::Input(_) | Op::Const(_) | Op::Iota(..) => Some(0),
        Op::Unary(_)
        | Op::Cast(_)
        | Op::Bits(_)
        | Op::Reshape(_)
        | Op::Permute(_)
        | Op::Expand(_)
        | Op::Slice(_)
        | Op::Window(_)
        | Op::Reduce(..)
        | Op::Scan(..)
        | Op::Composite(_) => Some(1),
        Op::Binary(_) | Op::Pad(_) | Op::Gather(_) | Op::Contract(_) => Some(2),
        Op::Select | Op::Scatter(_) => Some(3),
        Op::Concat(_) | Op::Fused(_) => None,
    }
}

/// The type of `op` over operands of these types. Input, Const and Fused carry their type outside
/// and are not asked here.
pub fn infer(op: &Op, args: &[&Type]) -> Result<Type, Misfit> {
    if arity(op).is_some_and(|n| n != args.len()) || (arity(op).is_none() && args.is_empty()) {
        return misfit(format!("{:?} operands", arity(op)), format!("{}", args.len()));
    }
    let ty = infer_unchecked(op, args)?;
    let ty = Type { used: used(op, args, &ty), ..ty };
    match size_bytes(ty.dtype, &ty.shape) {
        Some(_) => Ok(ty),
        None => misfit("a size that fits in memory", format!("{:?}", ty.shape)),
    }
}

fn infer_unchecked(op: &Op, args: &[&Type]) -> Result<Type, Misfit> {
    match op {
        Op::Input(_) | Op::Const(_) | Op::Fused(_) => misfit("a type from outside", "none"),
        Op::Iota(shape, axis) => {
            ensure((*axis as usize) < shape.len(), "an axis of the shape", axis)?;
            Ok(Type::of(DType::I64, shape.clone()))
        }
        Op::Unary(f) => unary(*f, args[0]),
        Op::Binary(f) => binary(*f, args[0], args[1]),
        Op::Select => {
            ensure(args[0].dtype == DType::Bool, "a bool condition", args[0].dtype)?;
            ensure(args[1].dtype == args[2].dtype, "two operands of one dtype", args[2].dtype)?;
            let shape = broadcast(&args[0].shape, &broadcast(&args[1].shape, &args[2].shape)?)?;
            Ok(Type::of(args[1].dtype, shape))
        }
        Op::Cast(dtype) => {
            ensure_numbers(args[0])?;
            ensure(!is_small(*dtype), "a type of numbers", dtype)?;
            Ok(Type::of(*dtype, args[0].shape.clone()))
        }
        Op::Bits(dtype) => {
            let width = format!("a type of {} bytes", args[0].dtype.bytes());
            ensure(dtype.bytes() == args[0].dtype.bytes(), &width, dtype)?;
            // Of a bool, code knows that it is 0 or 1.
            ensure(*dtype != DType::Bool, "a type of which all bits are free", dtype)?;
            Ok(Type::of(*dtype, args[0].shape.clone()))
        }
        Op::Reshape(shape) => {
            let before: usize = args[0].numel();
            let after = shape.iter().try_fold(1usize, |p, &e| p.checked_mul(e));
            ensure(after == Some(before), &format!("{before} elements"), shape)?;
            Ok(Type::of(args[0].dtype, shape.clone()))
        }
        Op::Permute(axes) => {
            let mut sorted = axes.clone();
            sorted.sort_unstable();
            let is_permutation = sorted.iter().enumerate().all(|(i, &a)| i == a as usize)
                && axes.len() == args[0].rank();
            ensure(is_permutation, &format!("each of {} axes once", args[0].rank()), axes)?;
            let shape = axes.iter().map(|&a| args[0].shape[a as usize]).collect();
            Ok(Type::of(args[0].dtype, shape))
        }
        Op::Expand(shape) => {
            let fits = shape.len() == args[0].rank()
                && args[0].shape.iter().zip(shape).all(|(&from, &to)| from == to || from == 1);
            ensure(fits, &format!("extents that {:?} repeats to", args[0].shape), shape)?;
            Ok(Type::of(args[0].dtype, shape.clone()))
        }
        Op::Slice(axes) => slice(args[0], axes),
        Op::Pad(borders) => {
            ensure(borders.len() == args[0].rank(), "a border for each axis", borders)?;
            ensure(args[1].numel() == 1, "a scalar fill", &args[1].shape)?;
            ensure(args[1].dtype == args[0].dtype, args[0].dtype.name(), args[1].dtype)?;
            let mut shape = Shape::new();
            for (&extent, &(before, after)) in args[0].shape.iter().zip(borders) {
                match extent.checked_add(before).and_then(|e| e.checked_add(after)) {
                    Some(extent) => shape.push(extent),
                    None => return misfit("an extent that fits", format!("{borders:?}")),
                }
            }
            Ok(Type::of(args[0].dtype, shape))
        }
        Op::Window(axes) => window(args[0], axes),
        Op::Concat(axis) => concat(args, *axis as usize),
        Op::Gather(axis) => {
            let axis = *axis as usize;
            ensure(axis < args[0].rank(), "an axis of the operand", axis)?;
            ensure(is_index(args[1].dtype), "i32 or i64 indices", args[1].dtype)?;
            let empty = args[0].shape[axis] == 0 && args[1].numel() > 0;
            ensure(!empty, "something to gather from", &args[0].shape)?;
            let mut shape = Shape::from_slice(&args[0].shape[..axis]);
            shape.extend_from_slice(&args[1].shape);
            shape.extend_from_slice(&args[0].shape[axis + 1..]);
            Ok(Type::of(args[0].dtype, shape))
        }
        Op::Scatter(f) => {
            f.map_or(Ok(()), |_| ensure_numbers(args[0]))?;
            ensure(is_index(args[1].dtype), "i32 or i64 indices", args[1].dtype)?;
            ensure(
                args[1].rank() == 1 && args[0].rank() >= 1,
                "a list of indices",
                &args[1].shape,
            )?;
            let mut shape = Shape::from_slice(&args[1].shape);
            shape.extend_from_slice(&args[0].shape[1..]);
            ensure(args[2].shape == shape, &format!("updates {shape:?}"), &args[2].shape)?;
            ensure(args[2].dtype == args[0].dtype, args[0].dtype.name(), args[2].dtype)?;
            Ok(args[0].clone())
        }
        Op::Reduce(_, axes) => {
            ensure_numbers(args[0])?;
            let fits = axes.windows(2).all(|w| w[0] < w[1])
                && axes.iter().all(|&a| (a as usize) < args[0].rank());
            ensure(fits, "ascending axes of the operand", axes)?;
            let mut shape = args[0].shape.clone();
            axes.iter().for_each(|&a| shape[a as usize] = 1);
            Ok(Type::of(args[0].dtype, shape))
        }
        Op::Scan(_, axis) => {
            ensure_numbers(args[0])?;
            ensure((*axis as usize) < args[0].rank(), "an axis of the operand", axis)?;
            Ok(args[0].clone())
        }
        Op::Contract(contract) => contraction(contract, args[0], args[1]),
        Op::Composite(_) => {
            ensure(args[0].dtype.is_float(), "floating point numbers", args[0].dtype)?;
            Ok(args[0].clone())
        }
    }
}

fn is_small(dtype: DType) -> bool {
    matches!(dtype, DType::Small(_))
}

/// Codes are moved; numbers are computed with.
fn ensure_numbers(x: &Type) -> Result<(), Misfit> {
    ensure(!is_small(x.dtype), "numbers (codes are cast or dequantised before)", x.dtype)
}

fn is_index(dtype: DType) -> bool {
    matches!(dtype, DType::I32 | DType::I64)
}

fn unary(f: UnaryFn, x: &Type) -> Result<Type, Misfit> {
    ensure_numbers(x)?;
    let float_only = match f {
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
        | UnaryFn::Round => true,
        UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Sign | UnaryFn::Not => false,
    };
    ensure(!float_only || x.dtype.is_float(), "floating point numbers", x.dtype)?;
    match f {
        UnaryFn::Not => ensure(!x.dtype.is_float(), "bools or integers", x.dtype)?,
        _ => ensure(x.dtype != DType::Bool, "numbers", x.dtype)?,
    }
    Ok(x.clone())
}

fn binary(f: BinaryFn, x: &Type, y: &Type) -> Result<Type, Misfit> {
    ensure_numbers(x)?;
    ensure(x.dtype == y.dtype, &format!("two operands of {}", x.dtype), y.dtype)?;
    match f {
        BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => {
            ensure(!x.dtype.is_float(), "bools or integers", x.dtype)?
        }
        // Bools are ordered.
        BinaryFn::Eq | BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le => {}
        BinaryFn::Max | BinaryFn::Min => {}
        _ => ensure(x.dtype != DType::Bool, "numbers", x.dtype)?,
    }
    let dtype = if f.is_comparison() { DType::Bool } else { x.dtype };
    Ok(Type::of(dtype, broadcast(&x.shape, &y.shape)?))
}

/// The shape of a pointwise operation: one rank, extents equal or 1.
pub fn broadcast(x: &[usize], y: &[usize]) -> Result<Shape, Misfit> {
    ensure(x.len() == y.len(), &format!("an operand of rank {}", x.len()), y)?;
    x.iter()
        .zip(y)
        .map(|(&a, &b)| match (a, b) {
            (a, b) if a == b => Ok(a),
            (1, b) => Ok(b),
            (a, 1) => Ok(a),
            _ => misfit(format!("extents equal to {x:?} or 1"), format!("{y:?}")),
        })
        .collect()
}

fn slice(x: &Type, axes: &[(i64, i64, usize)]) -> Result<Type, Misfit> {
    ensure(axes.len() == x.rank(), "a range for each axis", axes)?;
    for (&(start, step, extent), &from) in axes.iter().zip(&x.shape) {
        let last = (extent as i64 - 1).checked_mul(step).and_then(|reach| start.checked_add(reach));
        let inside = |i: i64| (0..from as i64).contains(&i);
        let fits = extent == 0 || (inside(start) && last.is_some_and(inside));
        ensure(fits, &format!("a range within {:?}", x.shape), axes)?;
    }
    Ok(Type::of(x.dtype, axes.iter().map(|a| a.2).collect()))
}

fn window(x: &Type, axes: &[(usize, usize, usize)]) -> Result<Type, Misfit> {
    ensure(axes.len() <= x.rank(), "no more windows than axes", axes)?;
    let lead = x.rank() - axes.len();
    let mut shape = Shape::from_slice(&x.shape[..lead]);
    for (&(extent, stride, dilation), &from) in axes.iter().zip(&x.shape[lead..]) {
        let reach = extent.checked_sub(1).and_then(|n| n.checked_mul(dilation));
        let room = reach.and_then(|r| from.checked_sub(r)).filter(|&room| room > 0);
        match room {
            Some(room) if stride > 0 && dilation > 0 => shape.push((room - 1) / stride + 1),
            _ => {
                return misfit(format!("windows that fit into {:?}", x.shape), format!("{axes:?}"));
            }
        }
    }
    shape.extend(axes.iter().map(|a| a.0));
    Ok(Type::of(x.dtype, shape))
}

fn concat(args: &[&Type], axis: usize) -> Result<Type, Misfit> {
    let mut ty = args[0].clone();
    ensure(axis < ty.rank(), "an axis of the operands", axis)?;
    for other in &args[1..] {
        let fits = other.dtype == ty.dtype
            && other.rank() == ty.rank()
            && (0..ty.rank()).all(|d| d == axis || other.shape[d] == ty.shape[d]);
        ensure(fits, &format!("operands like {ty:?}"), other)?;
        match ty.shape[axis].checked_add(other.shape[axis]) {
            Some(extent) => ty.shape[axis] = extent,
            None => return misfit("an extent that fits", "an overflow"),
        }
    }
    Ok(ty)
}

fn contraction(contract: &Contract, x: &Type, y: &Type) -> Result<Type, Misfit> {
    ensure_numbers(x)?;
    ensure(x.dtype == y.dtype && x.dtype != DType::Bool, "two operands of one dtype", y.dtype)?;
    ensure(contract.n_out <= contract.extents.len(), "result axes of the space", contract.n_out)?;
    let empty = contract.extents.contains(&0);
    for (map, operand) in contract.maps.iter().zip([x, y]) {
        ensure(map.len() == operand.rank(), "an index for each operand axis", map)?;
        for (index, &extent) in map.iter().zip(&operand.shape) {
            let known = index.terms.iter().all(|t| (t.0 as usize) < contract.extents.len());
            ensure(known, "axes of the iteration space", index)?;
            if !empty {
                let (low, high) = index.range(&contract.extents);
                let inside = low >= 0 && high < extent as i64;
                ensure(inside, &format!("indices below {extent}"), (low, high))?;
            }
        }
    }
    Ok(Type::new(x.dtype, &contract.extents[..contract.n_out]))
}
