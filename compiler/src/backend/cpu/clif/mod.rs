//! The Cranelift emitter: complete by itself, 128-bit vectors, every target that Cranelift has.
//! Where a target has no vectors, lanes are scalars side by side.

mod cast;
mod float;
mod int;
mod lanes;

use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::immediates::Offset32;
use cranelift_codegen::ir::{
    AbiParam, Block, BlockArg, Endianness, Function, InstBuilder, MemFlagsData, Signature, Type,
    Value, types,
};
use cranelift_codegen::isa::{CallConv, OwnedTargetIsa, TargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{Context, isa};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use kiln_runtime::tensor::DType;
use smallvec::SmallVec;

use self::cast::{is_half, mask};
use crate::backend::emit::{Access, Bits, Dynamic, Emitted, Machine, Unsupported, emit};
use crate::backend::{dot, rounded};
use crate::graph::op::{BinaryFn, ReduceFn, UnaryFn};
use crate::loops::ir::{BufferId, Count, Loops, Number, Parts, compute_dtype};

/// Bytes and texts of one function.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Machine code, position independent.
    pub code: Vec<u8>,
    /// Cranelift's text of the function.
    pub clif: String,
    /// Disassembly, where it was asked for.
    pub asm: String,
}

/// The instruction set of a target triple with the named features.
pub fn target_isa(triple: &str, features: &[&str], verify: bool) -> Emitted<OwnedTargetIsa> {
    let fail = |e: &dyn std::fmt::Display| Unsupported(format!("target {triple}: {e}"));
    let mut flags = settings::builder();
    let verify = if verify { "true" } else { "false" };
    // What functions refer to is in the same file, at a distance known when they are linked; `pic`
    // would go through a table of addresses instead.
    for (name, value) in [("opt_level", "speed"), ("enable_verifier", verify), ("is_pic", "false")]
    {
        flags.set(name, value).map_err(|e| fail(&e))?;
    }
    if triple.contains("windows") {
        // The stack there grows page by page: none may be skipped.
        for (name, value) in [("enable_probestack", "true"), ("probestack_strategy", "inline")] {
            flags.set(name, value).map_err(|e| fail(&e))?;
        }
    }
    let mut builder = isa::lookup_by_name(triple).map_err(|e| fail(&e))?;
    for feature in features {
        builder.enable(feature).map_err(|e| fail(&e))?;
    }
    builder.finish(settings::Flags::new(flags)).map_err(|e| fail(&e))
}

/// Compiles a kernel.
pub fn compile(loops: &Loops, isa: &dyn TargetIsa, lanes: usize, texts: bool) -> Emitted<Compiled> {
    let mut context = Context::new();
    context.func = Function::with_name_signature(Default::default(), signature());
    let mut scratch = FunctionBuilderContext::new();
    let mut builder = FunctionBuilder::new(&mut context.func, &mut scratch);
    let entry = builder.create_block();
    builder.append_block_params_for_function_params(entry);
    builder.switch_to_block(entry);
    let params = builder.block_params(entry).to_vec();
    let mut bases = Vec::new();
    let mut slot = 0i32;
    for buffer in &loops.buffers {
        bases.push((buffer.scope == crate::loops::ir::Scope::Global).then(|| {
            slot += 8;
            builder.ins().load(types::I64, MemFlagsData::trusted(), params[0], slot - 8)
        }));
    }
    let has =
        |name: &str| isa.isa_flags().iter().any(|f| f.name == name && f.as_bool() == Some(true));
    let (piece, has_fma) = match isa.name() {
        "x64" => (types::F32X4, has("has_fma")),
        "riscv64" => (types::F32, true),
        _ => (types::F32X4, true),
    };
    let open = Vec::new();
    let mut machine = Clif { b: builder, bases, params, lanes, piece, has_fma, open };
    emit(loops, &mut machine)?;
    machine.b.ins().return_(&[]);
    machine.b.seal_all_blocks();
    machine.b.finalize(isa.frontend_config());
    let clif = if texts { context.func.display().to_string() } else { String::new() };
    context.set_disasm(texts);
    let compiled = context
        .compile(isa, &mut ControlPlane::default())
        .map_err(|e| Unsupported(format!("Cranelift: {:?}", e.inner)))?;
    if !compiled.buffer.relocs().is_empty() {
        return Err(Unsupported("an operation that this CPU needs a library for".into()));
    }
    let asm = compiled.vcode.clone().unwrap_or_default();
    Ok(Compiled { code: compiled.code_buffer().to_vec(), clif, asm })
}

fn signature() -> Signature {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params = vec![AbiParam::new(types::I64); 3];
    signature
}

/// A value: one SSA value, or several that make up the lanes.
#[derive(Clone)]
enum Val {
    One(Value),
    Lanes(SmallVec<[Value; 4]>),
}

enum Open {
    Loop { header: Block, exit: Block, turn: Value, end: Value, carried: Vec<Val> },
    Parallel { header: Block, exit: Block, turn: Value },
    Branch { other: Block, exit: Block },
}

struct Clif<'a> {
    b: FunctionBuilder<'a>,
    bases: Vec<Option<Value>>,
    params: Vec<Value>,
    lanes: usize,
    /// What one SSA value of several lanes is: four of them, or one where there are no vectors.
    piece: Type,
    /// Whether there is an instruction for x * y + z, rounded once.
    has_fma: bool,
    open: Vec<Open>,
}

const LITTLE: fn() -> MemFlagsData = || MemFlagsData::new().with_endianness(Endianness::Little);

fn scalar_type(dtype: DType) -> Type {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::TF32 => types::F32,
        DType::F64 => types::F64,
        DType::I8 | DType::U8 | DType::Bool | DType::Small(_) => types::I8,
        DType::I16 | DType::U16 => types::I16,
        DType::I32 | DType::U32 => types::I32,
        DType::I64 | DType::U64 => types::I64,
    }
}

fn flat(values: &[Val]) -> Vec<Value> {
    values
        .iter()
        .flat_map(|v| match v {
            Val::One(v) => vec![*v],
            Val::Lanes(v) => v.to_vec(),
        })
        .collect()
}

fn like(shape: &[Val], flat: &[Value]) -> Vec<Val> {
    let mut at = 0;
    shape
        .iter()
        .map(|v| match v {
            Val::One(_) => {
                at += 1;
                Val::One(flat[at - 1])
            }
            Val::Lanes(v) => {
                at += v.len();
                Val::Lanes(flat[at - v.len()..at].iter().copied().collect())
            }
        })
        .collect()
}

fn args(values: &[Value]) -> Vec<BlockArg> {
    values.iter().copied().map(BlockArg::Value).collect()
}

impl Clif<'_> {
    /// Starts a loop from one value to another; `perhaps` there is no turn.
    fn begin(
        &mut self,
        from: Value,
        end: Value,
        carried: &[Val],
        perhaps: bool,
    ) -> (Value, Vec<Val>) {
        let (header, exit) = (self.b.create_block(), self.b.create_block());
        let before = flat(carried);
        let turn = self.b.append_block_param(header, types::I64);
        for &v in &before {
            let ty = self.b.func.dfg.value_type(v);
            self.b.append_block_param(header, ty);
            self.b.append_block_param(exit, ty);
        }
        let mut all = vec![from];
        all.extend(&before);
        match perhaps {
            false => self.b.ins().jump(header, &args(&all)),
            true => {
                let some = self.b.ins().icmp(IntCC::SignedLessThan, from, end);
                self.b.ins().brif(some, header, &args(&all), exit, &args(&before))
            }
        };
        self.b.switch_to_block(header);
        let inside = like(carried, &self.b.block_params(header)[1..]);
        self.open.push(Open::Loop { header, exit, turn, end, carried: carried.to_vec() });
        (turn, inside)
    }

    fn memory() -> MemFlagsData {
        MemFlagsData::new().with_notrap()
    }

    /// How many SSA values the lanes are.
    fn pieces(&self) -> usize {
        self.lanes / self.piece.lane_count() as usize
    }

    fn lift1(&mut self, x: &Val, f: impl Fn(&mut Self, Value) -> Value) -> Val {
        match x {
            Val::One(x) => Val::One(f(self, *x)),
            Val::Lanes(x) => Val::Lanes(x.iter().map(|&x| f(self, x)).collect()),
        }
    }

    fn lift2(&mut self, x: &Val, y: &Val, f: impl Fn(&mut Self, Value, Value) -> Value) -> Val {
        match (x, y) {
            (Val::One(x), Val::One(y)) => Val::One(f(self, *x, *y)),
            (Val::Lanes(x), Val::Lanes(y)) => {
                Val::Lanes(x.iter().zip(y).map(|(&x, &y)| f(self, x, y)).collect())
            }
            _ => unreachable!("operands are as wide as each other"),
        }
    }

    fn one(&self, x: &Val) -> Emitted<Value> {
        match x {
            Val::One(x) => Ok(*x),
            Val::Lanes(_) => Err(Unsupported("a scalar operation in lanes".into())),
        }
    }

    fn cast_bits(&mut self, x: Value, ty: Type) -> Value {
        match self.b.func.dfg.value_type(x) == ty {
            true => x,
            false => self.b.ins().bitcast(ty, LITTLE(), x),
        }
    }

    /// Integer vector type beside a float type.
    fn int_type(&self, x: Value) -> Type {
        match self.b.func.dfg.value_type(x) {
            types::F32X4 => types::I32X4,
            types::F64 => types::I64,
            types::F32 => types::I32,
            other => other,
        }
    }
}

impl Machine for Clif<'_> {
    type Value = Val;
    type Int = Value;
    type Address = (Value, i32);

    fn loop_begin(&mut self, extent: usize, carried: &[Val]) -> (Value, Vec<Val>) {
        let zero = self.b.ins().iconst(types::I64, 0);
        let end = self.b.ins().iconst(types::I64, extent as i64);
        self.begin(zero, end, carried, false)
    }

    fn count(&mut self, dims: BufferId, count: Count, extent: usize) -> Emitted<Val> {
        let base = self.bases[dims].ok_or_else(|| Unsupported("dims in registers".into()))?;
        let at = i32::from(count.dim) * 8;
        let length = self.b.ins().load(types::I64, Self::memory(), base, at);
        let number = |this: &mut Self, v: i64| this.b.ins().iconst(types::I64, v);
        let sum = self.b.ins().iadd_imm_s(length, count.add);
        let zero = number(self, 0);
        let sum = self.b.ins().smax(sum, zero);
        let width = number(self, count.width);
        let whole = if count.width == 1 { sum } else { self.b.ins().udiv(sum, width) };
        let times = number(self, count.times);
        let turns = if count.times == 1 { whole } else { self.b.ins().imul(whole, times) };
        let most = number(self, extent as i64);
        Ok(Val::One(self.b.ins().umin(turns, most)))
    }

    fn range_begin(
        &mut self,
        from: Option<&Val>,
        to: &Val,
        carried: &[Val],
    ) -> Emitted<(Value, Vec<Val>)> {
        let from = match from {
            Some(from) => self.one(from)?,
            None => self.b.ins().iconst(types::I64, 0),
        };
        let to = self.one(to)?;
        Ok(self.begin(from, to, carried, true))
    }

    fn loop_end(&mut self, next: &[Val]) -> Vec<Val> {
        let Some(Open::Loop { header, exit, turn, end, carried }) = self.open.pop() else {
            unreachable!("loops end in the order in which they begin")
        };
        let after = self.b.ins().iadd_imm_s(turn, 1);
        let more = self.b.ins().icmp(IntCC::SignedLessThan, after, end);
        let values = flat(next);
        let mut all = vec![after];
        all.extend(&values);
        self.b.ins().brif(more, header, &args(&all), exit, &args(&values));
        self.b.switch_to_block(exit);
        like(&carried, self.b.block_params(exit))
    }

    fn parallel_begin(&mut self) -> Value {
        let (header, exit) = (self.b.create_block(), self.b.create_block());
        let turn = self.b.append_block_param(header, types::I64);
        let begin = self.params[1];
        self.b.ins().jump(header, &args(&[begin]));
        self.b.switch_to_block(header);
        self.open.push(Open::Parallel { header, exit, turn });
        turn
    }

    fn parallel_end(&mut self) {
        let Some(Open::Parallel { header, exit, turn }) = self.open.pop() else {
            unreachable!("loops end in the order in which they begin")
        };
        let after = self.b.ins().iadd_imm_s(turn, 1);
        let more = self.b.ins().icmp(IntCC::SignedLessThan, after, self.params[2]);
        self.b.ins().brif(more, header, &args(&[after]), exit, &[]);
        self.b.switch_to_block(exit);
    }

    fn div_rem(&mut self, x: &Value, divisor: usize, _limit: usize) -> Emitted<(Value, Value)> {
        let d = self.b.ins().iconst(types::I64, divisor as i64);
        let quotient = self.b.ins().udiv(*x, d);
        let product = self.b.ins().imul(quotient, d);
        Ok((quotient, self.b.ins().isub(*x, product)))
    }

    fn branch_begin(&mut self, condition: &Val) -> Emitted<()> {
        let condition = self.one(condition)?;
        let then = self.b.create_block();
        let (other, exit) = (self.b.create_block(), self.b.create_block());
        self.b.ins().brif(condition, then, &[], other, &[]);
        self.b.switch_to_block(then);
        self.open.push(Open::Branch { other, exit });
        Ok(())
    }

    fn branch_else(&mut self) {
        let Some(Open::Branch { other, exit }) = self.open.last() else {
            unreachable!("a branch is open")
        };
        let (other, exit) = (*other, *exit);
        self.b.ins().jump(exit, &[]);
        self.b.switch_to_block(other);
    }

    fn branch_end(&mut self) {
        let Some(Open::Branch { exit, .. }) = self.open.pop() else {
            unreachable!("a branch is open")
        };
        self.b.ins().jump(exit, &[]);
        self.b.switch_to_block(exit);
    }

    fn address(
        &mut self,
        buffer: BufferId,
        terms: &[(Value, i64)],
        offset: i64,
        dynamic: Option<Dynamic<Val>>,
    ) -> Emitted<(Value, i32)> {
        let mut base = self.bases[buffer].ok_or_else(|| Unsupported("a register place".into()))?;
        for &(int, bytes) in terms {
            let step = self.b.ins().imul_imm_s(int, bytes);
            base = self.b.ins().iadd(base, step);
        }
        if let Some(Dynamic { value, bytes, .. }) = dynamic {
            let value = self.one(value)?;
            let step = self.b.ins().imul_imm_s(value, bytes);
            base = self.b.ins().iadd(base, step);
        }
        match i32::try_from(offset) {
            Ok(offset) => Ok((base, offset)),
            Err(_) => Ok((self.b.ins().iadd_imm_s(base, offset), 0)),
        }
    }

    fn load(&mut self, dtype: DType, at: &(Value, i32), access: Access) -> Emitted<Val> {
        let (base, offset) = (at.0, Offset32::new(at.1));
        Ok(match (access, dtype) {
            (Access::Lanes(1), DType::F32) => Val::Lanes(
                (0..self.pieces() as i32)
                    .map(|k| {
                        let offset = at.1 + self.piece.bytes() as i32 * k;
                        self.b.ins().load(self.piece, Self::memory(), base, offset)
                    })
                    .collect(),
            ),
            (Access::Lanes(step), DType::F32) => Val::Lanes(
                (0..self.pieces() as i64)
                    .map(|k| self.apart(at, k, step))
                    .collect::<Emitted<_>>()?,
            ),
            (Access::Lanes(_), _) => {
                let lanes = (0..self.pieces()).map(|k| self.load_lanes(dtype, base, at.1, k));
                let lanes = Val::Lanes(lanes.collect::<Emitted<_>>()?);
                self.as_read(dtype, lanes)?
            }
            (_, _) => {
                let ty = if is_half(dtype) { types::I16 } else { scalar_type(dtype) };
                let value = self.b.ins().load(ty, Self::memory(), base, offset);
                let value = self.as_read(dtype, Val::One(value))?;
                match access {
                    Access::Splat => self.spread(compute_dtype(dtype), &value)?,
                    Access::One | Access::Lanes(_) => value,
                }
            }
        })
    }

    fn store(&mut self, dtype: DType, at: &(Value, i32), value: &Val) -> Emitted<()> {
        match self.as_stored(dtype, value)? {
            Val::One(v) => {
                self.b.ins().store(Self::memory(), v, at.0, at.1);
            }
            Val::Lanes(v) => {
                for (k, v) in v.into_iter().enumerate() {
                    let v = self.packed(dtype, v);
                    let lanes = self.piece.lane_count() as usize;
                    let offset = at.1 + (dtype.bytes() * lanes * k) as i32;
                    self.b.ins().store(Self::memory(), v, at.0, offset);
                }
            }
        }
        Ok(())
    }

    fn number(&mut self, dtype: DType, number: Number, wide: bool) -> Emitted<Val> {
        let value = match number {
            Number::Float(v) => self.float_const(scalar_type(dtype), v),
            Number::Int(v) => self.b.ins().iconst(scalar_type(dtype), mask(dtype, v)),
        };
        match wide {
            true => self.spread(dtype, &Val::One(value)),
            false => Ok(Val::One(value)),
        }
    }

    fn index(&mut self, terms: &[(Value, i64)], offset: i64) -> Emitted<Val> {
        let mut sum = self.b.ins().iconst(types::I64, offset);
        for &(int, coefficient) in terms {
            let step = self.b.ins().imul_imm_s(int, coefficient);
            sum = self.b.ins().iadd(sum, step);
        }
        Ok(Val::One(sum))
    }

    fn unary(&mut self, f: UnaryFn, dtype: DType, x: &Val) -> Emitted<Val> {
        let values = flat(std::slice::from_ref(x));
        let results: Vec<Value> = values
            .into_iter()
            .map(|v| match dtype.is_float() {
                true => self.float_unary(f, v),
                false => self.int_unary(f, dtype, v),
            })
            .collect::<Emitted<_>>()?;
        Ok(like(std::slice::from_ref(x), &results).swap_remove(0))
    }

    fn binary(&mut self, f: BinaryFn, dtype: DType, x: &Val, y: &Val) -> Emitted<Val> {
        let (a, b) = (flat(std::slice::from_ref(x)), flat(std::slice::from_ref(y)));
        let wide = matches!(x, Val::Lanes(_));
        let results: Vec<Value> = a
            .into_iter()
            .zip(b)
            .map(|(x, y)| match (dtype.is_float(), wide) {
                (true, _) => self.float_binary(f, x, y),
                (false, false) => self.int_binary(f, dtype, x, y),
                (false, true) => self.lanes_binary(f, dtype, x, y),
            })
            .collect::<Emitted<_>>()?;
        Ok(like(std::slice::from_ref(x), &results).swap_remove(0))
    }

    fn select(&mut self, _dtype: DType, c: &Val, x: &Val, y: &Val) -> Emitted<Val> {
        let [c, a, b] = [c, x, y].map(|v| flat(std::slice::from_ref(v)));
        let results: Vec<Value> =
            c.into_iter().zip(a).zip(b).map(|((c, x), y)| self.choose(c, x, y)).collect();
        Ok(like(std::slice::from_ref(x), &results).swap_remove(0))
    }

    fn cast(&mut self, from: DType, to: DType, x: &Val) -> Emitted<Val> {
        match x {
            _ if to.is_rounded() && from != to => {
                let x = self.cast(from, DType::F32, x)?;
                rounded::rounded(self, to, &x, matches!(x, Val::Lanes(_)))
            }
            Val::One(x) => Ok(Val::One(self.cast_one(from, to, *x))),
            Val::Lanes(x) => {
                let lanes = x.iter().map(|&x| self.lanes_cast(from, to, x));
                Ok(Val::Lanes(lanes.collect::<Emitted<_>>()?))
            }
        }
    }

    fn fma(&mut self, dtype: DType, x: &Val, y: &Val, z: &Val) -> Emitted<Val> {
        if !dtype.is_float() {
            let product = self.binary(BinaryFn::Mul, dtype, x, y)?;
            return self.binary(BinaryFn::Add, dtype, &product, z);
        }
        let [a, b, c] = [x, y, z].map(|v| flat(std::slice::from_ref(v)));
        let results: Vec<Value> =
            a.into_iter().zip(b).zip(c).map(|((x, y), z)| self.float_fma(x, y, z)).collect();
        Ok(like(std::slice::from_ref(x), &results).swap_remove(0))
    }

    fn dot(&mut self, parts: Parts, [x, y, z]: [&Val; 3], wide: bool) -> Emitted<Val> {
        match parts {
            Parts::Quads => return dot::of_bytes(self, [x, y, z], wide),
            Parts::Halves => return rounded::dot(self, [x, y, z], wide),
            Parts::Pairs => {}
        }
        let sum = self.lift2(x, y, Self::pairs);
        Ok(self.lift2(&sum, z, |this, x, y| this.b.ins().iadd(x, y)))
    }

    fn accumulate(&mut self, dtype: DType, x: &Val, y: &Val, z: &Val) -> Emitted<Val> {
        if self.has_fma || !dtype.is_float() {
            return self.fma(dtype, x, y, z);
        }
        let product = self.binary(BinaryFn::Mul, dtype, x, y)?;
        self.binary(BinaryFn::Add, dtype, &product, z)
    }

    fn bits(&mut self, op: Bits, x: &Val, y: &Val) -> Emitted<Val> {
        Ok(self.lift2(x, y, |this, x, y| {
            let (float, int) = (this.b.func.dfg.value_type(x), this.int_type(x));
            let (x, y) = (this.cast_bits(x, int), this.cast_bits(y, int));
            let result = match op {
                Bits::Add => this.b.ins().iadd(x, y),
                Bits::Sub => this.b.ins().isub(x, y),
                Bits::And => this.b.ins().band(x, y),
                Bits::Or => this.b.ins().bor(x, y),
                Bits::Xor => this.b.ins().bxor(x, y),
            };
            this.cast_bits(result, float)
        }))
    }

    fn shift(&mut self, x: &Val, left: i32) -> Emitted<Val> {
        Ok(self.lift1(x, |this, x| {
            let (float, int) = (this.b.func.dfg.value_type(x), this.int_type(x));
            let x = this.cast_bits(x, int);
            let result = match left {
                0.. => this.b.ins().ishl_imm_u(x, i64::from(left)),
                _ => this.b.ins().ushr_imm_u(x, i64::from(-left)),
            };
            this.cast_bits(result, float)
        }))
    }

    fn int_to_float(&mut self, x: &Val) -> Emitted<Val> {
        Ok(self.lift1(x, |this, x| {
            let (float, int) = (this.b.func.dfg.value_type(x), this.int_type(x));
            let x = this.cast_bits(x, int);
            this.b.ins().fcvt_from_sint(float, x)
        }))
    }

    fn splat(&mut self, dtype: DType, x: &Val) -> Emitted<Val> {
        self.spread(compute_dtype(dtype), x)
    }

    fn pick(&mut self, x: &Val, y: &Val, order: &[u8]) -> Emitted<Val> {
        self.picked(x, y, order)
    }

    fn fold(&mut self, f: ReduceFn, x: &[Val]) -> Emitted<Val> {
        self.folded(f.binary(DType::F32), flat(x))
    }
}
