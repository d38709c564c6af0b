//! What an emitter is: each step of the walk over loops (`emit.rs`) as instructions.

use kiln_runtime::tensor::DType;

use crate::graph::op::{BinaryFn, ReduceFn, UnaryFn};
use crate::loops::ir::{BufferId, Count, Number, Parts};

/// How an element is read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// One element.
    One,
    /// As many as there are lanes, so many elements apart: neighbours, where it is 1.
    Lanes(i64),
    /// One element, in all lanes.
    Splat,
}

/// What an emitter cannot do: the kernel goes to another one, or the model is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported(pub String);

/// Result of emitting a piece.
pub type Emitted<T> = Result<T, Unsupported>;

/// Operations on the bits of f32 values, for polynomials.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bits {
    /// Integer sum.
    Add,
    /// Integer difference.
    Sub,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
}

/// The part of a place that data decides: `value * bytes`.
#[derive(Clone, Copy)]
pub struct Dynamic<'a, V> {
    /// An i64.
    pub value: &'a V,
    /// Bytes of an element.
    pub bytes: i64,
    /// A power of two that divides the value.
    pub multiple: i64,
}

/// Makes instructions. Values are scalars or as wide as the lanes; integers are loop variables.
pub trait Machine {
    /// A value.
    type Value: Clone;
    /// A loop variable or what is computed of some.
    type Int: Clone;
    /// Where an element is.
    type Address;

    /// Starts a loop with values that it carries from turn to turn.
    fn loop_begin(
        &mut self,
        extent: usize,
        carried: &[Self::Value],
    ) -> (Self::Int, Vec<Self::Value>);
    /// Starts one of several copies of the same steps, none of which hangs on what another one
    /// stores to memory: they may be done in turns.
    fn copy_begins(&mut self) {}
    /// Ends the last one.
    fn copies_end(&mut self) {}
    /// A number of turns that the run decides, at most `extent`; `dims` has the lengths of dims.
    fn count(&mut self, dims: BufferId, count: Count, extent: usize) -> Emitted<Self::Value>;
    /// Starts a loop from one count (or 0) to another, which may be no turn at all.
    fn range_begin(
        &mut self,
        from: Option<&Self::Value>,
        to: &Self::Value,
        carried: &[Self::Value],
    ) -> Emitted<(Self::Int, Vec<Self::Value>)>;
    /// Ends the innermost loop; returns the carried values after it.
    fn loop_end(&mut self, next: &[Self::Value]) -> Vec<Self::Value>;
    /// Starts the loop from `begin` to `end`.
    fn parallel_begin(&mut self) -> Self::Int;
    /// Ends it.
    fn parallel_end(&mut self);
    /// Quotient and remainder by a constant; `limit` bounds the dividend.
    fn div_rem(
        &mut self,
        x: &Self::Int,
        divisor: usize,
        limit: usize,
    ) -> Emitted<(Self::Int, Self::Int)>;
    /// Values that the two blocks of a branch may change, before it begins; none on machines where
    /// blocks change nothing that is used after them.
    fn merged(&mut self, _before: &[Self::Value]) -> Option<Vec<Self::Value>> {
        None
    }
    /// Gives these their values at the end of a block.
    fn merge(&mut self, _merged: &[Self::Value], _next: &[Self::Value]) {}
    /// Starts a block that runs where the condition holds.
    fn branch_begin(&mut self, condition: &Self::Value) -> Emitted<()>;
    /// Starts the block that runs where it does not.
    fn branch_else(&mut self);
    /// Ends both.
    fn branch_end(&mut self);
    /// The element `sum of int * bytes + offset bytes + dynamic` of a buffer.
    fn address(
        &mut self,
        buffer: BufferId,
        terms: &[(Self::Int, i64)],
        offset: i64,
        dynamic: Option<Dynamic<Self::Value>>,
    ) -> Emitted<Self::Address>;
    /// Asks for the cache line of an element, where the machine can.
    fn prefetch(&mut self, _address: &Self::Address) -> Emitted<()> {
        Ok(())
    }
    /// Reads.
    fn load(
        &mut self,
        dtype: DType,
        address: &Self::Address,
        access: Access,
    ) -> Emitted<Self::Value>;
    /// Writes as many elements as the value has.
    fn store(&mut self, dtype: DType, address: &Self::Address, value: &Self::Value) -> Emitted<()>;
    /// Copies so many neighbours to shared memory, where they are after the next barrier; whether
    /// the machine can.
    fn copy(
        &mut self,
        _dtype: DType,
        _to: &Self::Address,
        _from: &Self::Address,
        _count: usize,
    ) -> Emitted<bool> {
        Ok(false)
    }
    /// A literal, in all lanes where `wide`.
    fn number(&mut self, dtype: DType, number: Number, wide: bool) -> Emitted<Self::Value>;
    /// An index as an i64 value.
    fn index(&mut self, terms: &[(Self::Int, i64)], offset: i64) -> Emitted<Self::Value>;
    /// f(x) of one instruction or few; transcendental functions come from `math`.
    fn unary(&mut self, f: UnaryFn, dtype: DType, x: &Self::Value) -> Emitted<Self::Value>;
    /// f(x, y); `dtype` is that of the operands.
    fn binary(
        &mut self,
        f: BinaryFn,
        dtype: DType,
        x: &Self::Value,
        y: &Self::Value,
    ) -> Emitted<Self::Value>;
    /// c ? x : y
    fn select(
        &mut self,
        dtype: DType,
        c: &Self::Value,
        x: &Self::Value,
        y: &Self::Value,
    ) -> Emitted<Self::Value>;
    /// x as another dtype.
    fn cast(&mut self, from: DType, to: DType, x: &Self::Value) -> Emitted<Self::Value>;
    /// x * y + z, rounded once.
    fn fma(
        &mut self,
        dtype: DType,
        x: &Self::Value,
        y: &Self::Value,
        z: &Self::Value,
    ) -> Emitted<Self::Value>;
    /// The products of the parts of x and y, and z, added as i32.
    fn dot(&mut self, parts: Parts, xyz: [&Self::Value; 3], wide: bool) -> Emitted<Self::Value>;
    /// x * y + z of a sum of products, which may be rounded twice where once would cost much.
    fn accumulate(
        &mut self,
        dtype: DType,
        x: &Self::Value,
        y: &Self::Value,
        z: &Self::Value,
    ) -> Emitted<Self::Value> {
        self.fma(dtype, x, y, z)
    }
    /// An operation on the bits of f32.
    fn bits(&mut self, op: Bits, x: &Self::Value, y: &Self::Value) -> Emitted<Self::Value>;
    /// The bits of an f32 shifted left, or right where negative (logically).
    fn shift(&mut self, x: &Self::Value, left: i32) -> Emitted<Self::Value>;
    /// The bits of an f32, an i32, as an f32.
    fn int_to_float(&mut self, x: &Self::Value) -> Emitted<Self::Value>;
    /// x * 2^n of f32, rounded once, n a whole number; nothing where no instruction does that.
    fn scaled(&mut self, _x: &Self::Value, _n: &Self::Value) -> Emitted<Option<Self::Value>> {
        Ok(None)
    }
    /// A scalar in all lanes.
    fn splat(&mut self, dtype: DType, x: &Self::Value) -> Emitted<Self::Value>;
    /// Lanes of two values: those of the second are counted after those of the first.
    fn pick(&mut self, _x: &Self::Value, _y: &Self::Value, _order: &[u8]) -> Emitted<Self::Value> {
        Err(Unsupported("lanes in another order".into()))
    }
    /// All lanes of these values, folded as `Expr::Fold` says, as a scalar.
    fn fold(&mut self, f: ReduceFn, x: &[Self::Value]) -> Emitted<Self::Value>;
    /// Starts what each thread of a block does once, for those below `extent`, with values that
    /// change for these threads only. Gives the number of the thread.
    fn threads_begin(
        &mut self,
        _extent: usize,
        _carried: &[Self::Value],
    ) -> Emitted<(Self::Int, Vec<Self::Value>)> {
        Err(Unsupported("threads of a block".into()))
    }
    /// Ends it; returns the carried values after it.
    fn threads_end(&mut self, next: &[Self::Value]) -> Vec<Self::Value> {
        next.to_vec()
    }
    /// Divides the threads of a block into so many groups, whose threads are counted anew: those of
    /// a group are all that there are until it ends. Gives the number of the group.
    fn groups_begin(&mut self, _count: usize) -> Emitted<Self::Int> {
        Err(Unsupported("threads of a block".into()))
    }
    /// Ends it.
    fn groups_end(&mut self) {}
    /// Adds to four sums of every thread of a warp what `loops::ir::Multiply` says, of rows and
    /// columns that begin at addresses and lie so many bytes apart.
    fn multiply(
        &mut self,
        _sides: &[(DType, Self::Address, [i64; 2]); 2],
        _sums: &[Self::Value],
    ) -> Emitted<Vec<Self::Value>> {
        Err(Unsupported("products by a warp".into()))
    }
    /// All threads of a block wait for each other.
    fn barrier(&mut self) -> Emitted<()> {
        Err(Unsupported("threads of a block".into()))
    }
    /// The values of the first `extent` threads of a block, folded as `Expr::Fold` says, for all of
    /// its threads.
    fn fold_threads(
        &mut self,
        _f: ReduceFn,
        _dtype: DType,
        _value: &Self::Value,
        _extent: usize,
    ) -> Emitted<Self::Value> {
        Err(Unsupported("threads of a block".into()))
    }
}
