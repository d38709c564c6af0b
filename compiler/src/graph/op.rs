//! Every operation of the tensor graph, one enum, each variant with its equation.
//!
//! Operands of a pointwise operation have one rank; an extent is equal or 1 (then it repeats).
//! Reductions keep their axes with extent 1. Everything else is a view (an index map, no copy),
//! a move, or a contraction.

use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use super::used::Used;

/// Extents, outermost first.
pub type Shape = SmallVec<[usize; 6]>;
/// A list of axes.
pub type Axes = SmallVec<[u8; 6]>;

/// What an operation makes: element type and extents.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first: how much room there is.
    pub shape: Shape,
    /// Axes of which a run uses the first elements only.
    pub used: Used,
}

impl Type {
    /// A type, in use whole.
    pub fn new(dtype: DType, shape: &[usize]) -> Type {
        Type::of(dtype, Shape::from_slice(shape))
    }

    /// A type, in use whole.
    pub fn of(dtype: DType, shape: Shape) -> Type {
        Type { dtype, shape, used: Used::new() }
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements. Sizes are checked when a node is built, so the product fits.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of a dense value.
    pub fn size_bytes(&self) -> usize {
        self.numel() * self.dtype.bytes()
    }
}

/// Functions of one number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum UnaryFn {
    /// -x
    Neg,
    /// |x|
    Abs,
    /// -1, 0 or 1
    Sign,
    /// 1 / x
    Recip,
    /// Square root.
    Sqrt,
    /// e^x
    Exp,
    /// Natural logarithm.
    Log,
    /// Sine of radians.
    Sin,
    /// Cosine of radians.
    Cos,
    /// Hyperbolic tangent.
    Tanh,
    /// Error function.
    Erf,
    /// Largest integer not above x.
    Floor,
    /// Smallest integer not below x.
    Ceil,
    /// Nearest integer, ties to even.
    Round,
    /// Logical not of a bool, bitwise not of an integer.
    Not,
}

/// Functions of two numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum BinaryFn {
    /// a + b (integers wrap)
    Add,
    /// a - b
    Sub,
    /// a * b
    Mul,
    /// a / b (integers truncate; x / 0 is 0 and the least / -1 wraps)
    Div,
    /// Remainder with the sign of a, as C's fmod (x rem 0 is 0 for integers). Code is exact while
    /// the quotient of floats fits into their mantissa.
    Rem,
    /// The larger; NaN where either is NaN.
    Max,
    /// The smaller; NaN where either is NaN.
    Min,
    /// a^b
    Pow,
    /// a == b, a bool
    Eq,
    /// a != b, a bool
    Ne,
    /// a < b, a bool
    Lt,
    /// a <= b, a bool
    Le,
    /// Logical or bitwise and.
    And,
    /// Logical or bitwise or.
    Or,
    /// Logical or bitwise exclusive or.
    Xor,
}

/// What a reduction, a scan or a scatter folds with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ReduceFn {
    /// Sum; empty is 0.
    Sum,
    /// Product; empty is 1.
    Prod,
    /// Maximum; empty is the least value.
    Max,
    /// Minimum; empty is the greatest value.
    Min,
}

/// An index that depends on iteration axes: `offset + sum of coefficient * axis`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Affine {
    /// Pairs of iteration axis and coefficient; axes ascend and no coefficient is 0.
    pub terms: SmallVec<[(u8, i64); 2]>,
    /// The constant part.
    pub offset: i64,
}

impl Affine {
    /// The index that is one iteration axis.
    pub fn axis(axis: usize) -> Affine {
        Affine::scaled(axis, 1)
    }

    /// The index `coefficient * axis`.
    pub fn scaled(axis: usize, coefficient: i64) -> Affine {
        Affine::default().plus(axis, coefficient)
    }

    /// A constant index.
    pub fn constant(offset: i64) -> Affine {
        Affine { terms: SmallVec::new(), offset }
    }

    /// This plus `coefficient * axis`.
    pub fn plus(mut self, axis: usize, coefficient: i64) -> Affine {
        let axis = u8::try_from(axis).expect("an iteration space has fewer than 256 axes");
        match self.terms.binary_search_by_key(&axis, |t| t.0) {
            Ok(i) => self.terms[i].1 += coefficient,
            Err(i) => self.terms.insert(i, (axis, coefficient)),
        }
        self.terms.retain(|t| t.1 != 0);
        self
    }

    /// The axis, where the index is exactly one axis.
    pub fn as_axis(&self) -> Option<usize> {
        match (self.terms.as_slice(), self.offset) {
            ([(axis, 1)], 0) => Some(*axis as usize),
            _ => None,
        }
    }

    /// Coefficient of an axis, 0 where it does not occur.
    pub fn coefficient(&self, axis: usize) -> i64 {
        self.terms.iter().find(|t| t.0 as usize == axis).map_or(0, |t| t.1)
    }

    /// The index with every axis replaced by another index: `axis -> map(axis)`.
    pub fn substitute(&self, map: &dyn Fn(usize) -> Affine) -> Affine {
        self.terms.iter().fold(Affine::constant(self.offset), |sum, &(axis, coefficient)| {
            let inner = map(axis as usize);
            let scaled =
                inner.terms.iter().fold(sum, |s, t| s.plus(t.0 as usize, t.1 * coefficient));
            Affine { offset: scaled.offset + inner.offset * coefficient, ..scaled }
        })
    }

    /// Least and greatest value over an iteration space without empty axes.
    pub fn range(&self, extents: &[usize]) -> (i64, i64) {
        self.terms.iter().fold((self.offset, self.offset), |(low, high), &(axis, c)| {
            let reach = c * (extents[axis as usize] as i64 - 1);
            (low + reach.min(0), high + reach.max(0))
        })
    }
}

/// A sum of products over an iteration space. The first `n_out` axes of the space are the axes of
/// the result; the others are summed. Operand axis `d` is read at `maps[operand][d]`.
///
/// Matmul, batched matmul, einsum, and convolution (grouped, depthwise, dilated, strided) are this
/// with different maps; padding comes before as [`Op::Pad`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Contract {
    /// Extents of the iteration space, result axes first.
    pub extents: Shape,
    /// How many of them are axes of the result.
    pub n_out: usize,
    /// One index per operand axis, for both operands.
    pub maps: [SmallVec<[Affine; 4]>; 2],
}

/// A named function whose definition (`graph::composite`) stands in the same e-class.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Composite {
    /// 1 / (1 + e^-x)
    Sigmoid,
    /// x / (1 + e^-x)
    Silu,
    /// x / 2 * (1 + erf(x / sqrt 2))
    Gelu,
    /// e^(x - max) / sum of e^(x - max), over one axis.
    Softmax(u8),
    /// (x - mean) / sqrt(variance + epsilon) over the axes from this one on; epsilon as f32 bits.
    LayerNorm(u8, u32),
    /// x / sqrt(mean of x^2 + epsilon) over the axes from this one on; epsilon as f32 bits.
    RmsNorm(u8, u32),
}

/// An operation. `x`, `y`, ... are its operands in order.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Op {
    /// Input number i of the graph (of the kernel, within a body).
    Input(u32),
    /// A constant of the constant table.
    Const(u32),
    /// out[i] = i\[axis\], an i64.
    Iota(Shape, u8),
    /// out[i] = f(x[i])
    Unary(UnaryFn),
    /// out[i] = f(x[i], y[i])
    Binary(BinaryFn),
    /// out[i] = x[i] ? y[i] : z[i], x a bool
    Select,
    /// out[i] = x[i] as another dtype (float to integer truncates and saturates, to bool is != 0)
    Cast(DType),
    /// out[i] = the bits of x[i] as another dtype of as many bytes. It changes no byte: in memory,
    /// the result is the operand.
    Bits(DType),
    /// Same elements in row-major order under another shape.
    Reshape(Shape),
    /// out[i\[p0\], i\[p1\], ...] : axis d of the result is axis p\[d\] of x.
    Permute(Axes),
    /// Axes of extent 1 repeat to the given shape.
    Expand(Shape),
    /// out[i] = x[start + step * i], per axis (start, step, extent); steps may be negative.
    Slice(SmallVec<[(i64, i64, usize); 6]>),
    /// out = x with a border per axis (before, after), filled with the scalar y.
    Pad(SmallVec<[(usize, usize); 6]>),
    /// out[i.., k..] = x[i * stride + k * dilation] over the trailing axes, per axis
    /// (extent, stride, dilation); leading axes as they are. Sliding windows, no copy.
    Window(SmallVec<[(usize, usize, usize); 3]>),
    /// Operands one after another along an axis.
    Concat(u8),
    /// out[i.., j.., k..] = x[i.., y[j..], k..] at an axis of x; negative indices count from the
    /// end, others out of range are clamped.
    Gather(u8),
    /// out = x, then out[y[j], k..] = f(out[y[j], k..], z[j, k..]), j ascending; `None` replaces.
    /// Negative indices count from the end, others out of range are dropped.
    Scatter(Option<ReduceFn>),
    /// out[i] = f over the given axes of x, which stay with extent 1.
    Reduce(ReduceFn, Axes),
    /// out[.., i, ..] = f of x[.., 0..=i, ..] along an axis.
    Scan(ReduceFn, u8),
    /// A sum of products: see [`Contract`].
    Contract(Box<Contract>),
    /// A named function: see [`Composite`].
    Composite(Composite),
    /// A kernel made by the fuser: the body of that number, with the operands as its inputs.
    Fused(u32),
}

impl Op {
    /// Whether the result lies where the operand does, byte for byte.
    pub fn is_alias(&self) -> bool {
        matches!(self, Op::Reshape(_) | Op::Bits(_))
    }
}

impl UnaryFn {
    /// Every function with its name in text.
    pub const ALL: [(UnaryFn, &'static str); 15] = [
        (UnaryFn::Neg, "neg"),
        (UnaryFn::Abs, "abs"),
        (UnaryFn::Sign, "sign"),
        (UnaryFn::Recip, "recip"),
        (UnaryFn::Sqrt, "sqrt"),
        (UnaryFn::Exp, "exp"),
        (UnaryFn::Log, "log"),
        (UnaryFn::Sin, "sin"),
        (UnaryFn::Cos, "cos"),
        (UnaryFn::Tanh, "tanh"),
        (UnaryFn::Erf, "erf"),
        (UnaryFn::Floor, "floor"),
        (UnaryFn::Ceil, "ceil"),
        (UnaryFn::Round, "round"),
        (UnaryFn::Not, "not"),
    ];

    /// The name in text.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|e| e.0 == self).expect("every function is in the table").1
    }
}

impl BinaryFn {
    /// Every function with its name in text.
    pub const ALL: [(BinaryFn, &'static str); 15] = [
        (BinaryFn::Add, "add"),
        (BinaryFn::Sub, "sub"),
        (BinaryFn::Mul, "mul"),
        (BinaryFn::Div, "div"),
        (BinaryFn::Rem, "rem"),
        (BinaryFn::Max, "max"),
        (BinaryFn::Min, "min"),
        (BinaryFn::Pow, "pow"),
        (BinaryFn::Eq, "eq"),
        (BinaryFn::Ne, "ne"),
        (BinaryFn::Lt, "lt"),
        (BinaryFn::Le, "le"),
        (BinaryFn::And, "and"),
        (BinaryFn::Or, "or"),
        (BinaryFn::Xor, "xor"),
    ];

    /// The name in text.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|e| e.0 == self).expect("every function is in the table").1
    }

    /// Whether the result is a bool whatever the operands are.
    pub fn is_comparison(self) -> bool {
        matches!(self, BinaryFn::Eq | BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le)
    }
}

impl ReduceFn {
    /// Every function with its name in text.
    pub const ALL: [(ReduceFn, &'static str); 4] = [
        (ReduceFn::Sum, "sum"),
        (ReduceFn::Prod, "prod"),
        (ReduceFn::Max, "max"),
        (ReduceFn::Min, "min"),
    ];

    /// The name in text.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|e| e.0 == self).expect("every function is in the table").1
    }

    /// The function of two numbers of a dtype that it folds with; of bools it is a logical
    /// one.
    pub fn binary(self, dtype: DType) -> BinaryFn {
        match (self, dtype) {
            (ReduceFn::Sum | ReduceFn::Max, DType::Bool) => BinaryFn::Or,
            (ReduceFn::Prod | ReduceFn::Min, DType::Bool) => BinaryFn::And,
            (ReduceFn::Sum, _) => BinaryFn::Add,
            (ReduceFn::Prod, _) => BinaryFn::Mul,
            (ReduceFn::Max, _) => BinaryFn::Max,
            (ReduceFn::Min, _) => BinaryFn::Min,
        }
    }
}
