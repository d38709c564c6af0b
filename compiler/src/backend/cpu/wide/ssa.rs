//! Machine instructions over virtual registers, in blocks: what the register allocator reads.
//!
//! The function is in SSA form. Only jumps carry arguments, and blocks are numbered in the order
//! in which they are laid out.

use iced_x86::{Code, OpKind};
use regalloc2::{
    Block, Inst, InstRange, MachineEnv, Operand, Output, PReg, PRegSet, RegClass, RegallocOptions,
    VReg,
};
use smallvec::{SmallVec, smallvec};

use super::isa::{Level, Width};
use super::{interleave, literals};
use crate::backend::emit::{Emitted, Unsupported};

/// A general register that holds an argument, by hardware number: rdi, rsi, rdx.
const ARGUMENTS: [usize; 3] = [7, 6, 2];
/// rax, rcx, rdx, rsi, rdi, r8-r11: free to change.
const CALLER_SAVED: [usize; 9] = [0, 1, 2, 6, 7, 8, 9, 10, 11];
/// rbx, r12-r15: saved by who changes them. rbp keeps the frame.
pub const CALLEE_SAVED: [usize; 5] = [3, 12, 13, 14, 15];

/// An operand of an instruction; small numbers are places among the allocated registers.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Arg {
    /// A 64-bit general register.
    Gpr(u8),
    /// Its low half.
    Gpr32(u8),
    /// A vector register, or its low part.
    Vector(u8, Width),
    /// A mask register.
    Mask(u8),
    /// The mask register under which the instruction works; no operand by itself.
    Under(u8),
    /// Memory at a base, perhaps an index, and a displacement.
    Memory(u8, Option<u8>, i32),
    /// A constant in the pool: its bits, in every lane.
    Pool(u32),
    /// The same, for instructions that put an element into every lane.
    Element(u32),
    /// A vector of the pool: a number for each lane.
    Order([u8; 16]),
    /// An immediate number, and how it is written.
    Imm(OpKind, i64),
}

/// What an integer comparison asks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Ask {
    /// x < y, signed
    Lt,
    /// x <= y, signed
    Le,
    /// x == y
    Eq,
    /// x != y
    Ne,
}

/// What a branch tests; it is taken where the answer is yes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Test {
    /// The register is not 0.
    NonZero,
    /// The register is not this number.
    NotImm(i32),
    /// The two registers differ.
    Differ,
}

/// What a step does.
#[derive(Clone, PartialEq, Debug)]
pub enum What {
    /// The arguments arrive.
    Params,
    /// One instruction.
    Plain(Code, SmallVec<[Arg; 4]>),
    /// 1 or 0, by a comparison of two registers.
    Set(Ask),
    /// Goes on at a block.
    Jump(usize),
    /// Goes on at the first block where the test says yes, else at the second.
    Branch(Test, usize, usize),
    /// Returns.
    Return,
}

/// A step with the registers that it names.
#[derive(Clone, PartialEq, Debug)]
pub struct Step {
    /// What it does.
    pub what: What,
    /// Registers for the allocator: the result first.
    pub operands: SmallVec<[Operand; 4]>,
}

/// A block.
#[derive(Default)]
pub struct Piece {
    /// Registers that jumps give it.
    pub params: Vec<VReg>,
    /// Its steps; the last one leaves it.
    pub steps: Vec<Step>,
    /// Arguments of the jump at the end.
    pub args: Vec<VReg>,
}

impl Piece {
    /// The blocks that may come after it.
    pub fn next(&self) -> SmallVec<[usize; 2]> {
        match self.steps.last().map(|s| &s.what) {
            Some(&What::Jump(to)) => smallvec![to],
            Some(&What::Branch(_, yes, no)) => smallvec![yes, no],
            _ => SmallVec::new(),
        }
    }

    /// Adds a step before the one that leaves it.
    pub fn insert_last(&mut self, what: What, operands: SmallVec<[Operand; 4]>) {
        self.steps.insert(self.steps.len() - 1, Step { what, operands });
    }
}

/// A function under construction.
#[derive(Default)]
pub struct Builder {
    pieces: Vec<Piece>,
    registers: usize,
}

impl Builder {
    /// A new register.
    pub fn register(&mut self, class: RegClass) -> VReg {
        self.registers += 1;
        VReg::new(self.registers - 1, class)
    }

    /// A new block behind all others.
    pub fn block(&mut self) -> usize {
        self.pieces.push(Piece::default());
        self.pieces.len() - 1
    }

    /// A new parameter of a block.
    pub fn param(&mut self, block: usize, class: RegClass) -> VReg {
        let register = self.register(class);
        self.pieces[block].params.push(register);
        register
    }

    fn push(&mut self, block: usize, what: What, operands: SmallVec<[Operand; 4]>) {
        self.pieces[block].steps.push(Step { what, operands });
    }

    /// The arguments of the function.
    pub fn arguments(&mut self, block: usize) -> [VReg; 3] {
        let registers = ARGUMENTS.map(|_| self.register(RegClass::Int));
        let fixed = registers
            .iter()
            .zip(ARGUMENTS)
            .map(|(&r, n)| Operand::reg_fixed_def(r, PReg::new(n, RegClass::Int)));
        self.push(block, What::Params, fixed.collect());
        registers
    }

    /// An instruction with a result. The result is register 0 of `args`, `uses` follow.
    pub fn make(
        &mut self,
        block: usize,
        class: RegClass,
        code: Code,
        args: &[Arg],
        uses: &[VReg],
    ) -> VReg {
        let result = self.register(class);
        let mut operands: SmallVec<[Operand; 4]> = [Operand::reg_def(result)].into_iter().collect();
        operands.extend(uses.iter().map(|&u| Operand::reg_use(u)));
        self.push(block, What::Plain(code, args.into()), operands);
        result
    }

    /// As [`Builder::make`], where the result takes the register of the used one of that number
    /// (from 1).
    pub fn change(
        &mut self,
        block: usize,
        code: Code,
        args: &[Arg],
        uses: &[VReg],
        reused: usize,
    ) -> VReg {
        let result = self.register(uses[reused - 1].class());
        let reuse = Operand::reg_reuse_def(result, reused);
        let mut operands: SmallVec<[Operand; 4]> = [reuse].into_iter().collect();
        operands.extend(uses.iter().map(|&u| Operand::reg_use(u)));
        self.push(block, What::Plain(code, args.into()), operands);
        result
    }

    /// An instruction without a result; the used ones are numbered from 0.
    pub fn effect(&mut self, block: usize, code: Code, args: &[Arg], uses: &[VReg]) {
        let operands = uses.iter().map(|&u| Operand::reg_use(u)).collect();
        self.push(block, What::Plain(code, args.into()), operands);
    }

    /// The answer of a comparison of integers, as 1 or 0.
    pub fn ask(&mut self, block: usize, ask: Ask, x: VReg, y: VReg) -> VReg {
        let result = self.register(RegClass::Int);
        let operands = [Operand::reg_def(result), Operand::reg_use(x), Operand::reg_use(y)];
        self.push(block, What::Set(ask), operands.into_iter().collect());
        result
    }

    /// Steps of a block so far.
    pub fn len(&self, block: usize) -> usize {
        self.pieces[block].steps.len()
    }

    /// Steps that do the same for one value after another, from each of `starts` to the next: puts
    /// them in turns, as many as there are registers for, so that none waits for its own result.
    pub fn interleave(&mut self, block: usize, starts: &[usize], level: Level) {
        let (Some(&first), Some(&end)) = (starts.first(), starts.last()) else { return };
        let steps = &self.pieces[block].steps[first..end];
        let copies: Vec<&[Step]> =
            starts.windows(2).map(|w| &steps[w[0] - first..w[1] - first]).collect();
        let width = interleave::width(&copies, level.registers());
        if width < 2 {
            return;
        }
        let order: Vec<Step> = copies.chunks(width).flat_map(interleave::in_turns).collect();
        self.pieces[block].steps.splice(first..end, order);
    }

    /// Ends a block with a jump.
    pub fn jump(&mut self, block: usize, to: usize, args: &[VReg]) {
        self.push(block, What::Jump(to), SmallVec::new());
        self.pieces[block].args = args.to_vec();
    }

    /// Ends a block with a branch.
    pub fn branch(&mut self, block: usize, test: Test, uses: &[VReg], yes: usize, no: usize) {
        let operands = uses.iter().map(|&u| Operand::reg_use(u)).collect();
        self.push(block, What::Branch(test, yes, no), operands);
    }

    /// Ends a block with a return.
    pub fn ret(&mut self, block: usize) {
        self.push(block, What::Return, SmallVec::new());
    }

    /// The finished function.
    pub fn finish(mut self, level: Level) -> Flat {
        let mut registers = self.registers;
        literals::keep(&mut self.pieces, level, || {
            registers += 1;
            VReg::new(registers - 1, RegClass::Float)
        });
        self.registers = registers;
        let mut flat = Flat::new(level, self.registers);
        for piece in self.pieces {
            let start = flat.steps.len();
            flat.next.push(piece.next().into_iter().map(Block::new).collect());
            flat.steps.extend(piece.steps);
            let end = Inst::new(flat.steps.len());
            flat.ranges.push(InstRange::new(Inst::new(start), end));
            flat.params.push(piece.params);
            flat.args.push(piece.args);
        }
        flat.previous = vec![Vec::new(); flat.next.len()];
        for (from, next) in flat.next.iter().enumerate() {
            for to in next {
                flat.previous[to.index()].push(Block::new(from));
            }
        }
        flat
    }
}

/// A function as the allocator wants it. Vectors are of its class of floats, masks of its class of
/// vectors.
pub struct Flat {
    /// What instructions there are.
    pub level: Level,
    /// All steps, block after block.
    pub steps: Vec<Step>,
    ranges: Vec<InstRange>,
    params: Vec<Vec<VReg>>,
    args: Vec<Vec<VReg>>,
    next: Vec<Vec<Block>>,
    previous: Vec<Vec<Block>>,
    registers: usize,
}

impl Flat {
    fn new(level: Level, registers: usize) -> Flat {
        Flat {
            level,
            registers,
            steps: Vec::new(),
            ranges: Vec::new(),
            params: Vec::new(),
            args: Vec::new(),
            next: Vec::new(),
            previous: Vec::new(),
        }
    }

    /// Gives every register a place.
    pub fn allocate(&self) -> Emitted<Output> {
        let set = |numbers: &mut dyn Iterator<Item = usize>, class| {
            let mut set = PRegSet::empty();
            numbers.for_each(|n| set.add(PReg::new(n, class)));
            set
        };
        let free = set(&mut CALLER_SAVED.into_iter(), RegClass::Int);
        let saved = set(&mut CALLEE_SAVED.into_iter(), RegClass::Int);
        let vectors = set(&mut (0..self.level.registers()), RegClass::Float);
        // Under k0, instructions work on every lane.
        let masks = match self.level {
            Level::Avx2 => PRegSet::empty(),
            Level::Avx512 => set(&mut (1..8), RegClass::Vector),
        };
        let none = PRegSet::empty();
        let env = MachineEnv {
            preferred_regs_by_class: [free, vectors, masks],
            non_preferred_regs_by_class: [saved, none, none],
            scratch_by_class: [None; 3],
            fixed_stack_slots: Vec::new(),
        };
        let options = RegallocOptions { validate_ssa: cfg!(test), ..Default::default() };
        regalloc2::run(self, &env, &options)
            .map_err(|e| Unsupported(format!("register allocation: {e}")))
    }
}

impl regalloc2::Function for Flat {
    fn num_insts(&self) -> usize {
        self.steps.len()
    }

    fn num_blocks(&self) -> usize {
        self.ranges.len()
    }

    fn entry_block(&self) -> Block {
        Block::new(0)
    }

    fn block_insns(&self, block: Block) -> InstRange {
        self.ranges[block.index()]
    }

    fn block_succs(&self, block: Block) -> &[Block] {
        &self.next[block.index()]
    }

    fn block_preds(&self, block: Block) -> &[Block] {
        &self.previous[block.index()]
    }

    fn block_params(&self, block: Block) -> &[VReg] {
        &self.params[block.index()]
    }

    fn is_ret(&self, inst: Inst) -> bool {
        self.steps[inst.index()].what == What::Return
    }

    fn is_branch(&self, inst: Inst) -> bool {
        matches!(self.steps[inst.index()].what, What::Jump(_) | What::Branch(..))
    }

    fn branch_blockparams(&self, block: Block, _inst: Inst, _next: usize) -> &[VReg] {
        &self.args[block.index()]
    }

    fn inst_operands(&self, inst: Inst) -> &[Operand] {
        &self.steps[inst.index()].operands
    }

    fn inst_clobbers(&self, _inst: Inst) -> PRegSet {
        PRegSet::empty()
    }

    fn num_vregs(&self) -> usize {
        self.registers
    }

    fn spillslot_size(&self, class: RegClass) -> usize {
        match class {
            RegClass::Int | RegClass::Vector => 1,
            RegClass::Float => self.level.bytes() / 8,
        }
    }
}
