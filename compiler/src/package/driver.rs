//! What a program calls in a compiled model: the plan as straight code, and the answers to what
//! its inputs, outputs and memory are. The C side of each function is in `header.rs`.

mod answers;

use cranelift_codegen::Context;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    AbiParam, FuncRef, Function, GlobalValueData, InstBuilder, MemFlagsData, Signature,
    StackSlotData, StackSlotKind, Type, Value, types,
};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use cranelift_module::{DataDescription, DataId, FuncId, Linkage, Module, ModuleError};
use cranelift_object::ObjectModule;
use kiln_runtime::plan::{Place, Plan, Port, Step};

use super::header::{ABI_VERSION, Call, FIRST_DIM, Status};
use crate::backend::cpu::Emitted;

/// Places in memory that every kernel may count on.
const ALIGN: i64 = 64;
const POINTER: Type = types::I64;
const TRUSTED: fn() -> MemFlagsData = MemFlagsData::trusted;

/// What a compiled model is made of, to be put into a file.
pub struct Parts<'a> {
    /// What its functions begin with: a C identifier.
    pub name: &'a str,
    /// Order and memory.
    pub plan: &'a Plan,
    /// Kernels, the fastest set first.
    pub sets: &'a [Set],
    /// Bytes of constants.
    pub weights: usize,
    /// Whether the caller hands the constants in, else they are in the file.
    pub external: bool,
    /// What `NAME_about` says.
    pub about: &'a str,
}

/// The kernels of a model, as code for one kind of processor.
pub struct Set {
    /// The code.
    pub emitted: Emitted,
    /// Machine code that returns 1 where this processor can run the kernels, else 0; none where
    /// every processor of the target can.
    pub supported: Option<Vec<u8>>,
}

/// What the rest of the file needs to know.
pub struct Defined {
    /// The kernels of each set, in order.
    pub kernels: Vec<Vec<FuncId>>,
    /// The constants, to be defined where they are in the file.
    pub weights: Option<DataId>,
}

/// Writes the functions of one model into a module.
pub struct Driver<'a> {
    module: &'a mut ObjectModule,
    parts: &'a Parts<'a>,
    context: Context,
    scratch: FunctionBuilderContext,
    tables: DataId,
}

type Built<T> = Result<T, Box<ModuleError>>;

/// Defines every function of a model.
pub fn define(module: &mut ObjectModule, parts: &Parts) -> Built<Defined> {
    let data = |module: &mut ObjectModule, name: &str, linkage, writable| -> Built<DataId> {
        Ok(module.declare_data(&format!("{}.{name}", parts.name), linkage, writable, false)?)
    };
    let tables = data(module, "tables", Linkage::Local, false)?;
    let checked = data(module, "checked", Linkage::Local, true)?;
    let weights = match parts.external || parts.weights == 0 {
        true => None,
        false => Some(data(module, "weights", Linkage::Import, false)?),
    };
    let scratch = FunctionBuilderContext::new();
    let mut driver = Driver { module, parts, context: Context::new(), scratch, tables };
    let sets = 0..parts.sets.len();
    let kernels = sets.clone().map(|set| driver.kernels(set)).collect::<Built<Vec<_>>>()?;
    let task = driver.task()?;
    let supported = sets.map(|set| driver.supported(set)).collect::<Built<Vec<_>>>()?;
    let plans = kernels.iter().enumerate();
    let plans = plans.map(|(set, kernels)| driver.plan(set, kernels, task, weights));
    let plans = plans.collect::<Built<Vec<_>>>()?;
    let run = driver.run(&plans, &supported, checked)?;
    driver.run_simple(run)?;
    driver.answers()?;
    let mut zero = DataDescription::new();
    zero.define_zeroinit(8);
    driver.module.define_data(checked, &zero)?;
    Ok(Defined { kernels, weights })
}

/// Names of kernels, made of names in a model, as they may stand in an object file.
fn symbol(name: &str) -> String {
    let clean = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    name.chars().take(80).map(clean).collect()
}

/// The signature of a kernel; its convention is the same on every system.
fn kernel_signature() -> Signature {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params = vec![AbiParam::new(types::I64); 3];
    signature
}

/// A function while it is written.
struct Body<'a> {
    b: FunctionBuilder<'a>,
    params: Vec<Value>,
}

impl Body<'_> {
    fn number(&mut self, value: i64) -> Value {
        self.b.ins().iconst(types::I64, value)
    }

    fn load(&mut self, base: Value, offset: i32) -> Value {
        self.b.ins().load(types::I64, TRUSTED(), base, offset)
    }

    fn store(&mut self, value: Value, base: Value, offset: i32) {
        self.b.ins().store(TRUSTED(), value, base, offset);
    }

    /// Leaves the function with a status where a condition holds.
    fn leave_if(&mut self, condition: Value, status: Status) {
        self.leave_if_code(condition, status as i64);
    }

    fn leave_if_code(&mut self, condition: Value, code: i64) {
        let (leave, stay) = (self.b.create_block(), self.b.create_block());
        self.b.ins().brif(condition, leave, &[], stay, &[]);
        self.b.switch_to_block(leave);
        self.leave(code);
        self.b.switch_to_block(stay);
    }

    fn leave(&mut self, code: i64) {
        let status = self.b.ins().iconst(types::I32, code);
        self.b.ins().return_(&[status]);
    }

    fn leave_if_null(&mut self, pointer: Value) {
        let null = self.b.ins().icmp_imm_s(IntCC::Equal, pointer, 0);
        self.leave_if(null, Status::NullPointer);
    }

    fn slot(&mut self, bytes: usize) -> Value {
        let data = StackSlotData::new(StackSlotKind::ExplicitSlot, bytes.max(8) as u32, 3);
        let slot = self.b.create_sized_stack_slot(data);
        self.b.ins().stack_addr(POINTER, slot, 0)
    }
}

impl Driver<'_> {
    /// Defines a function; `body` writes it and ends with a return.
    fn function(
        &mut self,
        (name, linkage): (&str, Linkage),
        params: &[Type],
        returns: &[Type],
        body: impl FnOnce(&mut Self, &mut Body) -> Built<()>,
    ) -> Built<FuncId> {
        let mut signature = self.module.make_signature();
        signature.params = params.iter().map(|&t| AbiParam::new(t)).collect();
        signature.returns = returns.iter().map(|&t| AbiParam::new(t)).collect();
        let separator = if linkage == Linkage::Export { '_' } else { '.' };
        let name = format!("{}{separator}{name}", self.parts.name);
        let id = self.module.declare_function(&name, linkage, &signature)?;
        let mut context = std::mem::replace(&mut self.context, Context::new());
        let mut scratch = std::mem::take(&mut self.scratch);
        context.func = Function::with_name_signature(Default::default(), signature);
        let mut b = FunctionBuilder::new(&mut context.func, &mut scratch);
        let entry = b.create_block();
        b.append_block_params_for_function_params(entry);
        b.switch_to_block(entry);
        let params = b.block_params(entry).to_vec();
        let mut writer = Body { b, params };
        body(self, &mut writer)?;
        writer.b.seal_all_blocks();
        writer.b.finalize(self.module.target_config());
        self.module.define_function(id, &mut context)?;
        self.module.clear_context(&mut context);
        (self.context, self.scratch) = (context, scratch);
        Ok(id)
    }

    /// The kernels of a set as they were emitted.
    fn kernels(&mut self, set: usize) -> Built<Vec<FuncId>> {
        let emitted = &self.parts.sets[set].emitted;
        let names = |i: usize| {
            let steps = &self.parts.plan.steps;
            let name = steps.iter().find(|s| s.kernel == i).map_or("constant", |s| &s.name);
            format!("{}.s{set}.k{i}.{}", self.parts.name, symbol(name))
        };
        let mut ids = Vec::new();
        for (i, (&entry, &size)) in emitted.entries.iter().zip(&emitted.sizes).enumerate() {
            let id =
                self.module.declare_function(&names(i), Linkage::Local, &kernel_signature())?;
            let code = &emitted.code[entry..entry + size];
            self.module.define_function_bytes(id, ALIGN as u64, code, &[])?;
            ids.push(id);
        }
        Ok(ids)
    }

    /// The check of the processor.
    fn supported(&mut self, set: usize) -> Built<Option<FuncId>> {
        let Some(code) = &self.parts.sets[set].supported else { return Ok(None) };
        let mut signature = Signature::new(CallConv::SystemV);
        signature.returns = vec![AbiParam::new(types::I32)];
        let name = format!("{}.s{set}.supported", self.parts.name);
        let id = self.module.declare_function(&name, Linkage::Local, &signature)?;
        self.module.define_function_bytes(id, 16, code, &[])?;
        Ok(Some(id))
    }

    /// `void task(void *work, size_t index)`: one chunk of a step. The work is four words: kernel,
    /// its buffers, iterations and chunks.
    fn task(&mut self) -> Built<FuncId> {
        let params = [POINTER, types::I64];
        self.function(("task", Linkage::Local), &params, &[], |_, f| {
            let (work, index) = (f.params[0], f.params[1]);
            let [kernel, buffers, extent, chunks] = [0, 8, 16, 24].map(|at| f.load(work, at));
            let next = f.b.ins().iadd_imm_s(index, 1);
            let [begin, end] = [index, next].map(|index| {
                let product = f.b.ins().imul(extent, index);
                f.b.ins().udiv(product, chunks)
            });
            let (work, done) = (f.b.create_block(), f.b.create_block());
            let some = f.b.ins().icmp(IntCC::SignedLessThan, begin, end);
            f.b.ins().brif(some, work, &[], done, &[]);
            f.b.switch_to_block(work);
            let signature = f.b.import_signature(kernel_signature());
            f.b.ins().call_indirect(signature, kernel, &[buffers, begin, end]);
            f.b.ins().jump(done, &[]);
            f.b.switch_to_block(done);
            f.b.ins().return_(&[]);
            Ok(())
        })
    }

    fn reference(&mut self, f: &mut Body, id: FuncId) -> FuncRef {
        self.module.declare_func_in_func(id, f.b.func)
    }

    fn address(&mut self, f: &mut Body, data: DataId) -> Value {
        let value = self.module.declare_data_in_func(data, f.b.func);
        // All data, the weights too, are in the same file: no table of addresses is needed.
        if let GlobalValueData::Symbol { colocated, .. } = &mut f.b.func.global_values[value] {
            *colocated = true;
        }
        f.b.ins().symbol_value(POINTER, value)
    }

    /// `int32_t NAME_run_with(const kiln_call *call)`
    fn run(
        &mut self,
        plans: &[FuncId],
        supported: &[Option<FuncId>],
        checked: DataId,
    ) -> Built<FuncId> {
        let name = ("run_with", Linkage::Export);
        self.function(name, &[POINTER], &[types::I32], |this, f| {
            let call = f.params[0];
            f.leave_if_null(call);
            let version = f.b.ins().load(types::I32, TRUSTED(), call, Call::ABI_VERSION);
            let other = f.b.ins().icmp_imm_s(IntCC::NotEqual, version, i64::from(ABI_VERSION));
            f.leave_if(other, Status::AbiVersion);
            let choice = this.choose(f, supported, checked);
            for (set, &plan) in plans.iter().enumerate() {
                let (go, next) = (f.b.create_block(), f.b.create_block());
                let this_one = f.b.ins().icmp_imm_s(IntCC::Equal, choice, set as i64 + 1);
                f.b.ins().brif(this_one, go, &[], next, &[]);
                f.b.switch_to_block(go);
                let plan = this.reference(f, plan);
                let status = f.b.ins().call(plan, &[call]);
                let status = f.b.inst_results(status)[0];
                f.b.ins().return_(&[status]);
                f.b.switch_to_block(next);
            }
            f.leave(Status::UnsupportedCpu as i64);
            Ok(())
        })
    }

    /// The steps of the plan, by the kernels of a set.
    fn plan(
        &mut self,
        set: usize,
        kernels: &[FuncId],
        task: FuncId,
        weights: Option<DataId>,
    ) -> Built<FuncId> {
        let name = format!("s{set}.plan");
        self.function((&name, Linkage::Local), &[POINTER], &[types::I32], |this, f| {
            let call = f.params[0];
            let plan = this.parts.plan;
            let inputs = this.tensors(f, Call::INPUTS, &plan.inputs, |_| false);
            let kept = |port| plan.is_output_kept(port);
            let mut outputs = this.tensors(f, Call::OUTPUTS, &plan.outputs, kept);
            for state in plan.states.iter().filter(|state| state.in_place) {
                outputs[state.output] = inputs[state.input];
            }
            let arena = this.arena(f);
            let weights = match weights {
                Some(id) => this.address(f, id),
                None => this.external_weights(f),
            };
            let pool = f.load(call, Call::POOL);
            let most = plan.steps.iter().map(|s| s.buffers.len()).max().unwrap_or(0);
            let buffers = f.slot(most * 8);
            let work = f.slot(32);
            let dims = this.dims(f);
            let task = this.reference(f, task);
            for step in &plan.steps {
                for (i, place) in step.buffers.iter().enumerate() {
                    let pointer = match *place {
                        Place::Input(port) => inputs[port],
                        Place::Output(port) => outputs[port],
                        Place::Arena(offset) => f.b.ins().iadd_imm_s(arena, offset as i64),
                        Place::Const(offset) => f.b.ins().iadd_imm_s(weights, offset as i64),
                        Place::Dims => dims,
                    };
                    f.store(pointer, buffers, i as i32 * 8);
                }
                let kernel = this.reference(f, kernels[step.kernel]);
                launch(f, step, kernel, task, (pool, buffers, work));
            }
            f.leave(Status::Ok as i64);
            Ok(())
        })
    }

    /// The first set that the processor can run, counted from 1, and one more than there are
    /// where it can run none. Asks once and remembers.
    fn choose(&mut self, f: &mut Body, supported: &[Option<FuncId>], checked: DataId) -> Value {
        if let [None] = supported {
            return f.number(1);
        }
        let checked = self.address(f, checked);
        let known = f.load(checked, 0);
        let (ask, go) = (f.b.create_block(), f.b.create_block());
        f.b.append_block_param(go, types::I64);
        f.b.ins().brif(known, go, &[known.into()], ask, &[]);
        f.b.switch_to_block(ask);
        let mut choice = f.number(supported.len() as i64 + 1);
        for (set, &supported) in supported.iter().enumerate().rev() {
            let this_one = f.number(set as i64 + 1);
            choice = match supported {
                None => this_one,
                Some(supported) => {
                    let supported = self.reference(f, supported);
                    let answer = f.b.ins().call(supported, &[]);
                    let answer = f.b.inst_results(answer)[0];
                    f.b.ins().select(answer, this_one, choice)
                }
            };
        }
        f.store(choice, checked, 0);
        f.b.ins().jump(go, &[choice.into()]);
        f.b.switch_to_block(go);
        f.b.block_params(go)[0]
    }

    /// Pointers to all tensors of one side; only empty ones may be null.
    /// The caller's pointers to tensors; `kept` says which of them nobody follows.
    fn tensors(
        &mut self,
        f: &mut Body,
        at: i32,
        ports: &[Port],
        kept: impl Fn(usize) -> bool,
    ) -> Vec<Value> {
        if (0..ports.len()).all(&kept) {
            return vec![f.number(0); ports.len()];
        }
        let call = f.params[0];
        let array = f.load(call, at);
        f.leave_if_null(array);
        let mut pointers = Vec::new();
        for (i, port) in ports.iter().enumerate() {
            let pointer = f.load(array, i as i32 * 8);
            if port.size_bytes() != Some(0) && !kept(i) {
                f.leave_if_null(pointer);
            }
            pointers.push(pointer);
        }
        pointers
    }

    /// The arena: the first aligned address of the caller's memory.
    fn arena(&mut self, f: &mut Body) -> Value {
        let call = f.params[0];
        let wanted = scratch_bytes(self.parts.plan);
        let arena = f.load(call, Call::SCRATCH);
        if wanted > 0 {
            let len = f.load(call, Call::SCRATCH_SIZE);
            let least = f.number(wanted);
            let small = f.b.ins().icmp(IntCC::UnsignedLessThan, len, least);
            f.leave_if(small, Status::ScratchTooSmall);
            f.leave_if_null(arena);
        }
        let arena = f.b.ins().iadd_imm_s(arena, ALIGN - 1);
        f.b.ins().band_imm_s(arena, -ALIGN)
    }

    /// The lengths of dims, checked; null where the model has none.
    fn dims(&mut self, f: &mut Body) -> Value {
        let call = f.params[0];
        if self.parts.plan.dims.is_empty() {
            return f.number(0);
        }
        let dims = f.load(call, Call::DIMS);
        f.leave_if_null(dims);
        for (i, dim) in self.parts.plan.dims.iter().enumerate() {
            let length = f.load(dims, i as i32 * 8);
            let above = f.b.ins().iadd_imm_s(length, -(dim.least as i64));
            let most = f.number((dim.most - dim.least) as i64);
            let outside = f.b.ins().icmp(IntCC::UnsignedGreaterThan, above, most);
            f.leave_if_code(outside, FIRST_DIM + i as i64);
        }
        dims
    }

    /// Constants that the caller hands in.
    fn external_weights(&mut self, f: &mut Body) -> Value {
        if self.parts.weights == 0 {
            return f.number(0);
        }
        let call = f.params[0];
        let weights = f.load(call, Call::WEIGHTS);
        f.leave_if_null(weights);
        let len = f.load(call, Call::WEIGHTS_SIZE);
        let right = f.number(self.parts.weights as i64);
        let other = f.b.ins().icmp(IntCC::NotEqual, len, right);
        f.leave_if(other, Status::Weights);
        let low = f.b.ins().band_imm_s(weights, ALIGN - 1);
        f.leave_if(low, Status::Weights);
        weights
    }

    /// `int32_t NAME_run(inputs, outputs, scratch, scratch_size)`
    fn run_simple(&mut self, run: FuncId) -> Built<()> {
        if self.parts.external || !self.parts.plan.dims.is_empty() {
            return Ok(());
        }
        let params = [POINTER; 4];
        self.function(("run", Linkage::Export), &params, &[types::I32], |this, f| {
            let call = f.slot(Call::SIZE as usize);
            let zero = f.number(0);
            (0..Call::SIZE / 8).for_each(|word| f.store(zero, call, word * 8));
            let version = f.b.ins().iconst(types::I32, i64::from(ABI_VERSION));
            f.b.ins().store(TRUSTED(), version, call, Call::ABI_VERSION);
            let places = [Call::INPUTS, Call::OUTPUTS, Call::SCRATCH, Call::SCRATCH_SIZE];
            for (i, place) in places.into_iter().enumerate() {
                f.store(f.params[i], call, place);
            }
            let run = this.reference(f, run);
            let status = f.b.ins().call(run, &[call]);
            let status = f.b.inst_results(status)[0];
            f.b.ins().return_(&[status]);
            Ok(())
        })?;
        Ok(())
    }
}

/// Bytes that a caller must give, at any address.
pub fn scratch_bytes(plan: &Plan) -> i64 {
    if plan.arena_bytes == 0 { 0 } else { plan.arena_bytes as i64 + ALIGN - 1 }
}

/// One step: on this thread, or in chunks on the caller's pool.
fn launch(
    f: &mut Body,
    step: &Step,
    kernel: FuncRef,
    task: FuncRef,
    (pool, buffers, work): (Value, Value, Value),
) {
    let (zero, extent) = (f.number(0), f.number(step.extent));
    if step.chunks <= 1 {
        f.b.ins().call(kernel, &[buffers, zero, extent]);
        return;
    }
    let (shared, alone, done) = (f.b.create_block(), f.b.create_block(), f.b.create_block());
    f.b.ins().brif(pool, shared, &[], alone, &[]);
    f.b.switch_to_block(alone);
    f.b.ins().call(kernel, &[buffers, zero, extent]);
    f.b.ins().jump(done, &[]);
    f.b.switch_to_block(shared);
    let chunks = f.number(step.chunks);
    let kernel = f.b.ins().func_addr(POINTER, kernel);
    for (i, word) in [kernel, buffers, extent, chunks].into_iter().enumerate() {
        f.store(word, work, i as i32 * 8);
    }
    let (context, run) = (f.load(pool, 0), f.load(pool, 8));
    let task = f.b.ins().func_addr(POINTER, task);
    let mut signature = Signature::new(f.b.func.signature.call_conv);
    signature.params = [POINTER, POINTER, POINTER, types::I64].map(AbiParam::new).to_vec();
    signature.returns = vec![AbiParam::new(types::I32)];
    let signature = f.b.import_signature(signature);
    let status = f.b.ins().call_indirect(signature, run, &[context, task, work, chunks]);
    let status = f.b.inst_results(status)[0];
    f.leave_if(status, Status::Pool);
    f.b.ins().jump(done, &[]);
    f.b.switch_to_block(done);
}
