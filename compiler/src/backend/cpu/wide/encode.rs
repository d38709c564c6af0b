//! From allocated steps to bytes: frame, moves, branches, and a pool of constants behind the code.

use iced_x86::{
    Code, Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, MemoryOperand, OpKind,
    Register,
};
use regalloc2::{Allocation, Block, Edit, Function, InstOrEdit, Output, PReg, RegClass};

use super::isa::{self, Level, Op, Width};
use super::ssa::{Arg, Ask, CALLEE_SAVED, Flat, Step, Test, What};
use crate::backend::emit::{Emitted, Unsupported};

/// Bytes of a short branch.
const SHORT: usize = 2;

const GPR: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// The register of that hardware number in a row that starts with `first`.
fn row(first: Register, number: usize) -> Register {
    Register::try_from(first as usize + number).expect("registers of a kind are numbered in a row")
}

fn number(place: Allocation) -> Emitted<usize> {
    match place.as_reg() {
        Some(register) => Ok(register.hw_enc()),
        None => Err(Unsupported("an operand that was left in memory".into())),
    }
}

struct Encoder<'a> {
    flat: &'a Flat,
    allocated: &'a Output,
    pool: Vec<u32>,
    /// Vectors of numbers, before the pool.
    orders: Vec<[u8; 16]>,
    /// Branches go to blocks, constants lie at offsets in the pool, until all sizes are known.
    code: Vec<Instruction>,
    /// The first instruction of each block.
    starts: Vec<usize>,
    saved: Vec<Register>,
    frame: usize,
}

/// Machine code of a function with its constants, and the size without them.
pub fn encode(flat: &Flat, allocated: &Output) -> Emitted<(Vec<u8>, usize)> {
    let mut encoder = Encoder {
        flat,
        allocated,
        pool: Vec::new(),
        orders: orders(flat),
        code: Vec::new(),
        starts: vec![0; flat.num_blocks()],
        saved: Vec::new(),
        frame: (allocated.num_spillslots * 8).next_multiple_of(flat.level.bytes()),
    };
    encoder.find_saved();
    encoder.run()?;
    let (mut bytes, pool_at) = encoder.assemble()?;
    let size = bytes.len();
    if !(encoder.pool.is_empty() && encoder.orders.is_empty()) {
        bytes.resize(pool_at, 0xcc);
        for order in &encoder.orders {
            let lanes = &order[..flat.level.lanes()];
            bytes.extend(lanes.iter().flat_map(|&lane| u32::from(lane).to_le_bytes()));
        }
        for bits in &encoder.pool {
            bytes.extend(bits.to_le_bytes().repeat(pool_bytes(flat.level) / 4));
        }
    }
    Ok((bytes, size))
}

/// The vectors of numbers that instructions take, each once.
fn orders(flat: &Flat) -> Vec<[u8; 16]> {
    let mut orders = Vec::new();
    for step in &flat.steps {
        let What::Plain(_, args) = &step.what else { continue };
        for arg in args {
            if let Arg::Order(order) = arg
                && !orders.contains(order)
            {
                orders.push(*order);
            }
        }
    }
    orders
}

/// Bytes of a constant: AVX-512 spreads elements wherever it reads memory.
fn pool_bytes(level: Level) -> usize {
    match level {
        Level::Avx2 => level.bytes(),
        Level::Avx512 => 4,
    }
}

fn refused(e: iced_x86::IcedError) -> Unsupported {
    Unsupported(format!("encoding: {e}"))
}

/// The text of machine code.
pub fn disassemble(code: &[u8]) -> String {
    let mut formatter = IntelFormatter::new();
    let mut text = String::new();
    for instruction in &mut Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
        text.push_str(&format!("{:6x}  ", instruction.ip()));
        formatter.format(&instruction, &mut text);
        text.push('\n');
    }
    text
}

impl Encoder<'_> {
    fn find_saved(&mut self) {
        let mut used = [false; 16];
        let mut mark = |place: &Allocation| {
            if let Some(register) = place.as_reg().filter(|r| r.class() == RegClass::Int) {
                used[register.hw_enc()] = true;
            }
        };
        self.allocated.allocs.iter().for_each(&mut mark);
        for (_, Edit::Move { from, to }) in &self.allocated.edits {
            mark(from);
            mark(to);
        }
        self.saved = CALLEE_SAVED.into_iter().filter(|&n| used[n]).map(|n| GPR[n]).collect();
    }

    fn run(&mut self) -> Emitted<()> {
        self.prologue();
        let threads = self.threads();
        for block in 0..threads.len() {
            if threads[block] != block {
                continue;
            }
            self.starts[block] = self.code.len();
            let next = (block + 1..threads.len()).find(|&b| threads[b] == b);
            let (allocated, flat) = (self.allocated, self.flat);
            for item in allocated.block_insts_and_edits(flat, Block::new(block)) {
                match item {
                    InstOrEdit::Edit(Edit::Move { from, to }) => self.shift(*from, *to)?,
                    InstOrEdit::Inst(inst) => {
                        let places = allocated.inst_allocs(inst);
                        self.step(&flat.steps[inst.index()], places, &threads, next)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Bytes of all instructions, and where the pool has to be. Branches are short where they can.
    fn assemble(&mut self) -> Emitted<(Vec<u8>, usize)> {
        let mut encoder = iced_x86::Encoder::new(64);
        let mut sizes = Vec::with_capacity(self.code.len());
        for instruction in &self.code {
            let mut sample = *instruction;
            if is_branch(instruction) {
                sample.set_near_branch64(0);
            }
            sizes.push(encoder.encode(&sample, 0).map_err(refused)?);
        }
        let offsets = loop {
            let mut at = 0;
            let mut offsets = vec![0];
            for size in &sizes {
                at += size;
                offsets.push(at);
            }
            let mut shorter = false;
            for (i, instruction) in self.code.iter_mut().enumerate() {
                if !is_branch(instruction) || sizes[i] == SHORT {
                    continue;
                }
                // Distances only shrink from here on.
                let to = offsets[self.starts[instruction.near_branch64() as usize]] as i64;
                if i8::try_from(to - offsets[i] as i64 - SHORT as i64).is_ok() {
                    instruction.set_code(short(instruction.code()));
                    sizes[i] = SHORT;
                    shorter = true;
                }
            }
            if !shorter {
                break offsets;
            }
        };
        let pool_at = offsets[self.code.len()].next_multiple_of(self.flat.level.bytes());
        let _ = encoder.take_buffer();
        for (i, instruction) in self.code.iter_mut().enumerate() {
            if is_branch(instruction) {
                let to = offsets[self.starts[instruction.near_branch64() as usize]];
                instruction.set_near_branch64(to as u64);
            } else if instruction.memory_base() == Register::RIP {
                let to = instruction.memory_displacement64() + pool_at as u64;
                instruction.set_memory_displacement64(to);
            }
            encoder.encode(instruction, offsets[i] as u64).map_err(refused)?;
        }
        Ok((encoder.take_buffer(), pool_at))
    }

    /// For each block the one that runs in its place: others than itself stand for empty ones.
    fn threads(&self) -> Vec<usize> {
        let steps = |block: usize| {
            let mut items = self.allocated.block_insts_and_edits(self.flat, Block::new(block));
            match (items.next(), items.next()) {
                (Some(InstOrEdit::Inst(inst)), None) => Some(&self.flat.steps[inst.index()].what),
                _ => None,
            }
        };
        let next: Vec<usize> = (0..self.flat.num_blocks())
            .map(|block| match steps(block) {
                Some(What::Jump(to)) => *to,
                _ => block,
            })
            .collect();
        // No loop is empty: each has a test.
        let follow = |mut block: usize| {
            while next[block] != block {
                block = next[block];
            }
            block
        };
        (0..next.len()).map(follow).collect()
    }

    /// An instruction of registers, memory and numbers.
    fn put(&mut self, code: Code, operands: &[Out]) {
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        for (i, operand) in operands.iter().enumerate() {
            let i = i as u32;
            match *operand {
                Out::Register(register) => {
                    instruction.set_op_kind(i, OpKind::Register);
                    instruction.set_op_register(i, register);
                }
                Out::Memory(memory) => {
                    instruction.set_op_kind(i, OpKind::Memory);
                    instruction.set_memory_base(memory.base);
                    instruction.set_memory_index(memory.index);
                    instruction.set_memory_index_scale(memory.scale);
                    instruction.set_memory_displ_size(memory.displ_size);
                    instruction.set_memory_displacement64(memory.displacement as u64);
                    instruction.set_is_broadcast(memory.is_broadcast);
                }
                Out::Imm(kind, value) => {
                    instruction.set_op_kind(i, kind);
                    instruction.set_immediate_i64(i, value);
                }
                // Always behind the operands.
                Out::Under(mask) => instruction.set_op_mask(mask),
            }
        }
        self.code.push(instruction);
    }

    fn prologue(&mut self) {
        use Out::Register as R;
        if self.saved.is_empty() && self.frame == 0 {
            return;
        }
        self.put(Code::Push_r64, &[R(Register::RBP)]);
        self.put(Code::Mov_r64_rm64, &[R(Register::RBP), R(Register::RSP)]);
        for register in self.saved.clone() {
            self.put(Code::Push_r64, &[R(register)]);
        }
        if self.frame > 0 {
            let (size, align) = (self.frame as i64, -(self.flat.level.bytes() as i64));
            self.put(
                Code::Sub_rm64_imm32,
                &[R(Register::RSP), Out::Imm(OpKind::Immediate32to64, size)],
            );
            self.put(
                Code::And_rm64_imm8,
                &[R(Register::RSP), Out::Imm(OpKind::Immediate8to64, align)],
            );
        }
    }

    fn epilogue(&mut self) {
        use Out::Register as R;
        self.put(Code::VEX_Vzeroupper, &[]);
        if !(self.saved.is_empty() && self.frame == 0) {
            let saved = MemoryOperand::with_base_displ(Register::RBP, -8 * self.saved.len() as i64);
            self.put(Code::Lea_r64_m, &[R(Register::RSP), Out::Memory(saved)]);
            for register in self.saved.clone().into_iter().rev() {
                self.put(Code::Pop_r64, &[R(register)]);
            }
            self.put(Code::Pop_r64, &[R(Register::RBP)]);
        }
        self.put(Code::Retnq, &[]);
    }

    /// A move that the allocator asked for.
    fn shift(&mut self, from: Allocation, to: Allocation) -> Emitted<()> {
        let slot = |place: Allocation| {
            let slot = place.as_stack().ok_or_else(lost)?;
            let bytes = 8 * slot.index() as i64;
            Ok(Out::Memory(MemoryOperand::with_base_displ(Register::RSP, bytes)))
        };
        let (code, to, from) = match (from.as_reg(), to.as_reg()) {
            (Some(x), Some(y)) => (self.moves(x.class()).0, self.whole(y), self.whole(x)),
            (None, Some(y)) => (self.moves(y.class()).0, self.whole(y), slot(from)?),
            (Some(x), None) => (self.moves(x.class()).1, slot(to)?, self.whole(x)),
            (None, None) => return Err(lost()),
        };
        self.put(code, &[to, from]);
        Ok(())
    }

    /// Moves into registers of a class, and from there to the stack.
    fn moves(&self, class: RegClass) -> (Code, Code) {
        let whole = |op: Op| op.code(self.flat.level, self.flat.level.width());
        match class {
            RegClass::Int => (Code::Mov_r64_rm64, Code::Mov_rm64_r64),
            RegClass::Float => (whole(isa::MOVE), whole(isa::SPILL)),
            RegClass::Vector => (Code::VEX_Kmovq_kr_km64, Code::VEX_Kmovq_m64_kr),
        }
    }

    /// All of a register.
    fn whole(&self, register: PReg) -> Out {
        let number = register.hw_enc();
        Out::Register(match register.class() {
            RegClass::Int => GPR[number],
            RegClass::Float => vector(self.flat.level.width(), number),
            RegClass::Vector => row(Register::K0, number),
        })
    }

    /// The place of a constant in the pool.
    fn constant(&mut self, bits: u32) -> MemoryOperand {
        let place = self.pool.iter().position(|&b| b == bits).unwrap_or_else(|| {
            self.pool.push(bits);
            self.pool.len() - 1
        });
        let before = self.orders.len() * self.flat.level.bytes();
        let offset = (before + place * pool_bytes(self.flat.level)) as i64;
        MemoryOperand::with_base_displ(Register::RIP, offset)
    }

    fn operand(&mut self, arg: Arg, places: &[Allocation]) -> Emitted<Out> {
        let at = |k: u8| number(places[k as usize]);
        Ok(match arg {
            Arg::Gpr(k) => Out::Register(GPR[at(k)?]),
            Arg::Gpr32(k) => Out::Register(row(Register::EAX, at(k)?)),
            Arg::Vector(k, width) => Out::Register(vector(width, at(k)?)),
            Arg::Mask(k) => Out::Register(row(Register::K0, at(k)?)),
            Arg::Under(k) => Out::Under(row(Register::K0, at(k)?)),
            Arg::Imm(kind, value) => Out::Imm(kind, value),
            Arg::Memory(base, index, displacement) => {
                let index = match index {
                    Some(k) => GPR[at(k)?],
                    None => Register::None,
                };
                let size = u32::from(displacement != 0);
                Out::Memory(MemoryOperand::with_base_index_scale_displ_size(
                    GPR[at(base)?],
                    index,
                    1,
                    i64::from(displacement),
                    size,
                ))
            }
            Arg::Pool(bits) => {
                let is_broadcast = self.flat.level == Level::Avx512;
                Out::Memory(MemoryOperand { is_broadcast, ..self.constant(bits) })
            }
            Arg::Element(bits) => Out::Memory(self.constant(bits)),
            Arg::Order(order) => {
                let place = self.orders.iter().position(|o| *o == order).ok_or_else(lost)?;
                let offset = (place * self.flat.level.bytes()) as i64;
                Out::Memory(MemoryOperand::with_base_displ(Register::RIP, offset))
            }
        })
    }

    fn step(
        &mut self,
        step: &Step,
        places: &[Allocation],
        threads: &[usize],
        next: Option<usize>,
    ) -> Emitted<()> {
        use Out::Register as R;
        match &step.what {
            What::Params => {}
            What::Plain(code, args) => {
                let operands: Vec<Out> =
                    args.iter().map(|&arg| self.operand(arg, places)).collect::<Emitted<_>>()?;
                // A value may get the register of the value that it is a copy of.
                let (copy, _) = self.moves(RegClass::Float);
                match operands.as_slice() {
                    [R(to), R(from)] if *code == copy && to == from => {}
                    operands => self.put(*code, operands),
                }
            }
            What::Set(ask) => {
                let [to, x, y] = [number(places[0])?, number(places[1])?, number(places[2])?];
                let code = match ask {
                    Ask::Lt => Code::Setl_rm8,
                    Ask::Le => Code::Setle_rm8,
                    Ask::Eq => Code::Sete_rm8,
                    Ask::Ne => Code::Setne_rm8,
                };
                self.put(Code::Cmp_r64_rm64, &[R(GPR[x]), R(GPR[y])]);
                let byte = R(low_byte(to));
                self.put(code, &[byte]);
                self.put(Code::Movzx_r32_rm8, &[R(row(Register::EAX, to)), byte]);
            }
            What::Jump(to) => {
                if Some(threads[*to]) != next {
                    self.go(Code::Jmp_rel32_64, threads[*to])?;
                }
            }
            What::Branch(test, yes, no) => {
                self.test(*test, places)?;
                let (yes, no) = (threads[*yes], threads[*no]);
                if Some(yes) == next {
                    self.go(Code::Je_rel32_64, no)?;
                } else {
                    self.go(Code::Jne_rel32_64, yes)?;
                    if Some(no) != next {
                        self.go(Code::Jmp_rel32_64, no)?;
                    }
                }
            }
            What::Return => self.epilogue(),
        }
        Ok(())
    }

    fn test(&mut self, test: Test, places: &[Allocation]) -> Emitted<()> {
        let x = Out::Register(GPR[number(places[0])?]);
        match test {
            Test::NonZero => self.put(Code::Test_rm64_r64, &[x, x]),
            Test::NotImm(value) => {
                let (code, kind) = match i8::try_from(value) {
                    Ok(_) => (Code::Cmp_rm64_imm8, OpKind::Immediate8to64),
                    Err(_) => (Code::Cmp_rm64_imm32, OpKind::Immediate32to64),
                };
                self.put(code, &[x, Out::Imm(kind, i64::from(value))]);
            }
            Test::Differ => {
                let y = Out::Register(GPR[number(places[1])?]);
                self.put(Code::Cmp_r64_rm64, &[x, y]);
            }
        }
        Ok(())
    }

    fn go(&mut self, code: Code, block: usize) -> Emitted<()> {
        self.code.push(Instruction::with_branch(code, block as u64).map_err(refused)?);
        Ok(())
    }
}

fn is_branch(instruction: &Instruction) -> bool {
    matches!(instruction.op0_kind(), OpKind::NearBranch64) && instruction.op_count() == 1
}

/// The form of a branch that has a displacement of one byte.
fn short(code: Code) -> Code {
    match code {
        Code::Jmp_rel32_64 => Code::Jmp_rel8_64,
        Code::Je_rel32_64 => Code::Je_rel8_64,
        Code::Jne_rel32_64 => Code::Jne_rel8_64,
        other => other,
    }
}

/// An operand with registers in place.
#[derive(Clone, Copy)]
enum Out {
    Register(Register),
    Memory(MemoryOperand),
    Imm(OpKind, i64),
    /// The mask of the instruction.
    Under(Register),
}

fn vector(width: Width, number: usize) -> Register {
    let first = match width {
        Width::Xmm => Register::XMM0,
        Width::Ymm => Register::YMM0,
        Width::Zmm => Register::ZMM0,
    };
    row(first, number)
}

fn lost() -> Unsupported {
    Unsupported("a move between places in memory".into())
}

/// al, cl, dl, bl, then spl and so on, which have numbers of their own.
fn low_byte(number: usize) -> Register {
    match number {
        0..4 => row(Register::AL, number),
        _ => row(Register::SPL, number - 4),
    }
}
