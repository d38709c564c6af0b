//! The grammar of loops, on one page.
//!
//! ```text
//! kernel    = buffers, statements
//! statement = For | Store | If | Prefetch | Multiply
//! value     = Load | Index | Const | Unary | Binary | Select | Cast | Fma | Fold | Word | Dot
//! ```
//! Loops run a constant number of times (at least once) and are serial, parallel (outermost only),
//! vector (innermost only, one step of `lanes`) or unrolled. On a GPU, outermost loops may be
//! blocks; what is in these are loops over threads, one after another, and loops around such. A
//! thread loop sees all that the ones before it have stored. A thread loop that holds such a
//! sequence again is one over groups of threads: each of them does what a block would. Places in
//! buffers are affine in the loop variables plus, where data decides, a value.

use std::sync::Arc;

use kiln_runtime::tensor::DType;

use crate::graph::op::{Affine, BinaryFn, ReduceFn, UnaryFn};

pub use crate::graph::scalar::{Number, Parts};

/// Number of a loop variable; indices are [`Affine`] in these.
pub type Var = u8;

/// Where a buffer lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// In memory, handed to the kernel.
    Global,
    /// In registers: places are constants once loops are unrolled, but for the number of a thread,
    /// which has registers of its own.
    Register,
    /// In memory that the threads of a block share while they run.
    Shared,
}

/// Who a buffer of global scope belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Param {
    /// Argument of that number.
    Arg(usize),
    /// Memory that lives from one kernel of a node to its next ones.
    Scratch(usize),
    /// The result.
    Out,
    /// How long the dims of the model are in this run: [`DIMS`] numbers.
    Dims,
    /// Nobody's: a buffer of registers or of shared memory.
    None,
}

pub use kiln_runtime::plan::DIMS;

/// A number of turns that the run decides: `(dims[dim] + add) / width * times`, at least 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Count {
    /// Number of the dim.
    pub dim: u8,
    /// Added to it; the sum counts as 0 where it is less.
    pub add: i64,
    /// Divides that, at least 1; what is left over falls away.
    pub width: i64,
    /// Multiplies that, at least 1.
    pub times: i64,
}

/// The turns of a loop that a run makes: of `0..extent`, those from `from` (or 0) to `to`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// The loop variable.
    pub var: Var,
    /// The first one.
    pub from: Option<Count>,
    /// The first one that is not made any more.
    pub to: Count,
}

impl Count {
    /// The number for dims of these lengths.
    pub fn of(&self, dims: impl Fn(usize) -> i64) -> i64 {
        let sum = dims(self.dim as usize).saturating_add(self.add).max(0);
        (sum / self.width).saturating_mul(self.times)
    }
}

/// A flat array.
#[derive(Clone, PartialEq, Debug)]
pub struct Buffer {
    /// Element type.
    pub dtype: DType,
    /// Number of elements.
    pub len: usize,
    /// Where it lives.
    pub scope: Scope,
    /// Whose it is.
    pub param: Param,
}

/// Number of a buffer.
pub type BufferId = usize;

/// How a loop runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// One after another.
    Serial,
    /// In any order, in pieces, by several threads. Only the outermost loops.
    Parallel,
    /// All at once in the lanes of a register. Only innermost; the extent is the lane count.
    Vector,
    /// Written out; the variable becomes a constant.
    Unroll,
    /// In any order, each turn by threads of its own. Only the outermost loops.
    Block,
    /// All at once, each turn by a thread of the block. Only in blocks; those in others are one
    /// loop with them.
    Thread,
}

/// An element of a buffer: `affine + dynamic`.
#[derive(Clone, PartialEq, Debug)]
pub struct Place {
    /// The part that loop variables decide.
    pub affine: Affine,
    /// The part that data decides, an i64.
    pub dynamic: Option<Arc<Expr>>,
}

impl Place {
    /// A place without a part that data decides.
    pub fn affine(affine: Affine) -> Place {
        Place { affine, dynamic: None }
    }
}

/// A statement.
#[derive(Clone, PartialEq, Debug)]
pub enum Stmt {
    /// Runs the body for `var` in `0..extent`.
    For {
        /// The loop variable.
        var: Var,
        /// Number of iterations, at least 1.
        extent: usize,
        /// How it runs.
        kind: Kind,
        /// What it runs.
        body: Vec<Stmt>,
    },
    /// `buffer[place] = value`
    Store {
        /// Written buffer.
        buffer: BufferId,
        /// Written element.
        place: Place,
        /// What is written.
        value: Expr,
    },
    /// Runs one of two blocks.
    If {
        /// A bool that does not depend on a vector variable.
        condition: Expr,
        /// Run where it holds.
        then: Vec<Stmt>,
        /// Run where it does not.
        other: Vec<Stmt>,
    },
    /// Asks for the cache line of an element that will be read soon. It changes nothing, so the
    /// element may lie outside of the buffer, and a machine may pass it over.
    Prefetch {
        /// Buffer in memory.
        buffer: BufferId,
        /// Element.
        place: Affine,
    },
    /// Adds a product to sums, by all threads of a warp.
    Multiply(Box<Multiply>),
}

/// A product of 16 rows and 8 columns in shared memory, which the threads of a warp add to sums:
/// the sum of as many products as fit into 32 bytes of a row. Every thread has four of the sums:
/// number `e` is that of row `lane[0] + 8 * (e / 2)` and of column `2 * lane[1] + e % 2`.
#[derive(Clone, PartialEq, Debug)]
pub struct Multiply {
    /// The first of four sums in registers.
    pub sums: (BufferId, Affine),
    /// The rows, and the columns.
    pub sides: [Side; 2],
    /// Variables of the innermost loops over threads, of 8 and of 4 turns.
    pub lane: [Var; 2],
}

/// Rows or columns in shared memory.
#[derive(Clone, PartialEq, Debug)]
pub struct Side {
    /// Where they are.
    pub buffer: BufferId,
    /// The first element of the first one.
    pub place: Affine,
    /// Steps from one to the next, and from product to product.
    pub steps: [i64; 2],
}

/// Rows and columns of a product by a warp.
pub const WARP_LINES: [usize; 2] = [16, 8];
/// Bytes of each of its rows and columns.
pub const WARP_BYTES: usize = 32;

/// A value.
#[derive(Clone, PartialEq, Debug)]
pub enum Expr {
    /// `buffer[place]`
    Load(BufferId, Place),
    /// An index, an i64.
    Index(Affine),
    /// A number of a dtype; integers exactly, floats rounded.
    Const(DType, Number),
    /// f(x)
    Unary(UnaryFn, Arc<Expr>),
    /// f(x, y)
    Binary(BinaryFn, Arc<Expr>, Arc<Expr>),
    /// condition ? x : y
    Select(Arc<Expr>, Arc<Expr>, Arc<Expr>),
    /// x as another dtype.
    Cast(DType, Arc<Expr>),
    /// x * y + z, rounded once.
    Fma(Arc<Expr>, Arc<Expr>, Arc<Expr>),
    /// All lanes of a register buffer (a power of two of them), folded as a tree: lane i with
    /// lane i + n/2, and so on with the half.
    Fold(ReduceFn, BufferId),
    /// `buffer[place]` and the elements after it, two i16 or bf16 or four bytes, as the parts of an
    /// i32: the first is the lowest one.
    Word(BufferId, Place),
    /// The products of the parts of x and y, and z, all added: as i32, or as f32 where the parts
    /// are bf16.
    Dot(Parts, Arc<Expr>, Arc<Expr>, Arc<Expr>),
}

/// One kernel.
#[derive(Clone, PartialEq, Debug)]
pub struct Loops {
    /// Where it comes from, for people.
    pub name: String,
    /// Its buffers.
    pub buffers: Vec<Buffer>,
    /// Loops of which a run makes some turns only, by variable.
    pub ranges: Vec<Range>,
    /// Its statements.
    pub body: Vec<Stmt>,
}

impl Loops {
    /// Which turns a run makes of a loop; all where there is none.
    pub fn range(&self, var: Var) -> Option<Range> {
        self.ranges.iter().find(|r| r.var == var).copied()
    }

    /// Extent of the collapsed outer loops over pieces or blocks; 1 where there are none.
    pub fn parallel_extent(&self) -> usize {
        let mut extent = 1;
        let mut body = &self.body;
        while let [Stmt::For { extent: n, kind: Kind::Parallel | Kind::Block, body: inner, .. }] =
            body.as_slice()
        {
            extent *= n;
            body = inner;
        }
        extent
    }

    /// Whether its outermost loop is one over blocks.
    pub fn has_blocks(&self) -> bool {
        matches!(self.body[..], [Stmt::For { kind: Kind::Block, .. }])
    }

    /// How many lanes its vector loops have; none where there are no such loops.
    pub fn lanes(&self) -> Option<usize> {
        fn of(body: &[Stmt]) -> Option<usize> {
            body.iter().find_map(|stmt| match stmt {
                Stmt::For { extent, kind: Kind::Vector, .. } => Some(*extent),
                Stmt::For { body, .. } => of(body),
                Stmt::If { then, other, .. } => of(then).or_else(|| of(other)),
                Stmt::Store { .. } | Stmt::Prefetch { .. } | Stmt::Multiply(_) => None,
            })
        }
        of(&self.body)
    }

    /// Floating point operations and other work of one run, counted roughly.
    pub fn work(&self) -> u64 {
        work(&self.buffers, &self.body)
    }

    /// The dtype of a value.
    pub fn dtype(&self, e: &Expr) -> DType {
        dtype(&self.buffers, e)
    }
}

/// Whether there are loops over threads in statements.
pub fn has_threads(body: &[Stmt]) -> bool {
    body.iter().any(|stmt| match stmt {
        Stmt::For { kind: Kind::Thread, .. } => true,
        Stmt::For { body, .. } => has_threads(body),
        Stmt::If { then, other, .. } => has_threads(then) || has_threads(other),
        Stmt::Store { .. } | Stmt::Prefetch { .. } | Stmt::Multiply(_) => false,
    })
}

/// Work of statements: one for each value node, and some for what is written to memory.
pub fn work(buffers: &[Buffer], body: &[Stmt]) -> u64 {
    const STORE: u64 = 16;
    fn expr(e: &Expr) -> u64 {
        1 + match e {
            Expr::Load(..) | Expr::Index(_) | Expr::Const(..) | Expr::Fold(..) | Expr::Word(..) => {
                0
            }
            Expr::Unary(_, x) => 8 + expr(x),
            Expr::Cast(_, x) => expr(x),
            Expr::Binary(_, x, y) => expr(x) + expr(y),
            Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
                expr(x) + expr(y) + expr(z)
            }
        }
    }
    let of = |s: &Stmt| match s {
        Stmt::For { body, kind: Kind::Vector, .. } => work(buffers, body),
        Stmt::For { extent, body, .. } => work(buffers, body).saturating_mul(*extent as u64),
        Stmt::Store { buffer, value, .. } => match buffers[*buffer].scope {
            Scope::Global => STORE + expr(value),
            Scope::Register | Scope::Shared => expr(value),
        },
        Stmt::If { then, other, .. } => work(buffers, then).max(work(buffers, other)),
        Stmt::Prefetch { .. } => 0,
        Stmt::Multiply(_) => 4 * WARP_BYTES as u64,
    };
    body.iter().map(of).fold(0, u64::saturating_add)
}

/// What numbers of a dtype are computed as: short floats as f32, and they are rounded when they are
/// stored to memory or cast.
pub fn compute_dtype(dtype: DType) -> DType {
    if dtype.is_rounded() { DType::F32 } else { dtype }
}

/// The dtype of a value over these buffers.
pub fn dtype(buffers: &[Buffer], e: &Expr) -> DType {
    match e {
        Expr::Load(buffer, _) | Expr::Fold(_, buffer) => buffers[*buffer].dtype,
        Expr::Index(_) => DType::I64,
        Expr::Const(dtype, _) | Expr::Cast(dtype, _) => *dtype,
        Expr::Unary(_, x) | Expr::Fma(x, _, _) | Expr::Select(_, x, _) => dtype(buffers, x),
        Expr::Binary(f, ..) if f.is_comparison() => DType::Bool,
        Expr::Binary(_, x, _) => dtype(buffers, x),
        Expr::Word(..) => DType::I32,
        Expr::Dot(parts, ..) => parts.sum(),
    }
}
