//! Grids of threads.

use super::Fault;
use super::arithmetic::{compare, convert, mask, operation};
use super::memory::{Memory, Who};
use super::parse::{Code, Inst, Kernel, Operand, Space, Ty};
use super::requests::{Requests, Transactions};

/// Threads of a warp.
const WARP: usize = 32;
/// Bits of an address within its buffer.
const BUFFER: u32 = 40;

/// Where a thread stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    /// It can go on.
    Runs,
    /// At what all threads of a warp do together.
    Meets,
    /// At a barrier.
    Waits,
    /// It has ended.
    Ended,
}

struct Thread {
    registers: Vec<u64>,
    known: Vec<bool>,
    at: usize,
    stop: Stop,
    /// Copies into shared memory that are under way: where to, and what.
    copies: Vec<(u64, Vec<u8>)>,
}

/// What a launch did.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Instructions of all threads.
    pub instructions: u64,
    /// Products that were added to sums, of numbers.
    pub products: u64,
    /// Bytes that were read from memory, and copied from there.
    pub read: u64,
    /// What memory did for that.
    pub transactions: Transactions,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.instructions += other.instructions;
        self.products += other.products;
        self.read += other.read;
        self.transactions += other.transactions;
    }
}

/// When copies are done that run beside other work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copies {
    /// At once.
    Early,
    /// When they are waited for.
    Late,
}

pub(crate) struct Block<'a> {
    kernel: &'a Kernel,
    memory: &'a mut [Memory],
    /// The address that each parameter has.
    params: &'a [u64],
    pub(crate) shared: Memory,
    copies: Copies,
    counts: Counts,
    requests: Requests,
    threads: Vec<Thread>,
    number: usize,
    span: u32,
    first: u32,
}

/// Runs a kernel with so many blocks of so many threads; its parameters are these pieces of memory.
pub fn launch(
    kernel: &Kernel,
    (blocks, threads): (usize, usize),
    copies: Copies,
    memory: &mut [Memory],
    params: &[usize],
) -> Result<Counts, Fault> {
    let params: Vec<u64> = params.iter().map(|&piece| address(piece)).collect();
    launch_at(kernel, (blocks, threads), copies, memory, &params)
}

/// The address at which a piece of memory begins.
pub fn address(piece: usize) -> u64 {
    (piece as u64 + 1) << BUFFER
}

/// The piece of memory that an address is in, and the byte of it.
pub fn piece(address: u64) -> Option<(usize, usize)> {
    let (piece, at) = (address >> BUFFER, address & ((1 << BUFFER) - 1));
    Some((piece.checked_sub(1)? as usize, at as usize))
}

/// The same with parameters that are addresses.
pub fn launch_at(
    kernel: &Kernel,
    (blocks, threads): (usize, usize),
    copies: Copies,
    memory: &mut [Memory],
    params: &[u64],
) -> Result<Counts, Fault> {
    let fault = |why: String| {
        let (kernel, instruction) = (kernel.name.clone(), String::new());
        Fault { kernel, instruction, block: 0, thread: 0, why }
    };
    if threads > kernel.threads || params.len() != kernel.params {
        let (most, wanted, given) = (kernel.threads, kernel.params, params.len());
        return Err(fault(format!("{threads} threads of {most}, {given} buffers of {wanted}")));
    }
    let mut touched: Vec<usize> = params.iter().filter_map(|&at| Some(piece(at)?.0)).collect();
    touched.sort_unstable();
    touched.dedup();
    for number in touched {
        let memory = memory.get_mut(number);
        memory.ok_or_else(|| fault(format!("there is no memory {number}")))?.settle();
    }
    let (mut span, mut counts) = (1, Counts::default());
    for number in 0..blocks {
        let thread = || Thread {
            registers: vec![0; kernel.registers],
            known: vec![false; kernel.registers],
            at: 0,
            stop: Stop::Runs,
            copies: Vec::new(),
        };
        let mut block = Block {
            kernel,
            memory,
            params,
            shared: Memory::fresh(kernel.shared),
            copies,
            counts: Counts::default(),
            requests: Requests::default(),
            threads: (0..threads).map(|_| thread()).collect(),
            number,
            span,
            first: span,
        };
        block.run()?;
        span = block.span + 1;
        block.counts.transactions = block.requests.transactions(kernel);
        counts += block.counts;
    }
    Ok(counts)
}

impl Block<'_> {
    pub(crate) fn fault(&self, thread: usize, why: impl Into<String>) -> Fault {
        let inst = self.kernel.code.get(self.threads[thread].at);
        Fault {
            kernel: self.kernel.name.clone(),
            instruction: inst.map_or(String::new(), |i| i.text.clone()),
            block: self.number,
            thread,
            why: why.into(),
        }
    }

    fn run(&mut self) -> Result<(), Fault> {
        let count = self.threads.len();
        loop {
            for first in (0..count).step_by(WARP) {
                self.warp(first..(first + WARP).min(count))?;
            }
            let waits = |t: &Thread| t.stop == Stop::Waits;
            let Some(one) = self.threads.iter().position(waits) else { return Ok(()) };
            let at = self.threads[one].at;
            if let Some(other) = self.threads.iter().position(|t| !waits(t) || t.at != at) {
                let why = format!("thread {other} does not come to the barrier");
                return Err(self.fault(one, why));
            }
            self.span += 1;
            for thread in &mut self.threads {
                thread.at += 1;
                thread.stop = Stop::Runs;
            }
        }
    }

    /// Runs the threads of a warp until they wait for others or end.
    fn warp(&mut self, lanes: std::ops::Range<usize>) -> Result<(), Fault> {
        loop {
            for thread in lanes.clone() {
                while self.threads[thread].stop == Stop::Runs {
                    self.step(thread).map_err(|why| self.fault(thread, why))?;
                }
            }
            let meets = |t: &Thread| t.stop == Stop::Meets;
            let Some(one) = lanes.clone().find(|&t| meets(&self.threads[t])) else {
                return Ok(());
            };
            let at = self.threads[one].at;
            let mut all = lanes.clone();
            let missing = all.any(|t| !meets(&self.threads[t]) || self.threads[t].at != at);
            if missing || lanes.len() < WARP {
                return Err(self.fault(one, "a lane does not come to the shuffle"));
            }
            let kernel = self.kernel;
            match &kernel.code[at].code {
                Code::Matrices(to, place, turned) => {
                    self.matrices(lanes.start, to, *place, *turned)?;
                }
                Code::Multiply(types, parts) => self.multiply(lanes.start, *types, parts)?,
                _ => self.shuffle(lanes.clone())?,
            }
            for thread in &mut self.threads[lanes.clone()] {
                thread.at += 1;
                thread.stop = Stop::Runs;
            }
        }
    }

    fn shuffle(&mut self, lanes: std::ops::Range<usize>) -> Result<(), Fault> {
        let Code::Shuffle(to, from, bits) = self.kernel.code[self.threads[lanes.start].at].code
        else {
            unreachable!("threads stop at shuffles")
        };
        let values: Result<Vec<u64>, Fault> = lanes
            .clone()
            .map(|t| self.read(t, Operand::Reg(from)).map_err(|why| self.fault(t, why)))
            .collect();
        let values = values?;
        for (lane, t) in lanes.enumerate() {
            let Some(value) = values.get(lane ^ bits as usize) else {
                return Err(self.fault(t, "a lane beyond the warp"));
            };
            self.write(t, to, *value);
        }
        Ok(())
    }

    pub(crate) fn read(&self, thread: usize, operand: Operand) -> Result<u64, String> {
        let state = &self.threads[thread];
        match operand {
            Operand::Reg(reg) if state.known[reg] => Ok(state.registers[reg]),
            Operand::Reg(_) => Err("a register is read before it is written".into()),
            Operand::Bits(bits) => Ok(bits),
            Operand::Thread => Ok(thread as u64),
            Operand::Block => Ok(self.number as u64),
        }
    }

    pub(crate) fn write(&mut self, thread: usize, reg: usize, value: u64) {
        let state = &mut self.threads[thread];
        (state.registers[reg], state.known[reg]) = (value, true);
    }

    fn step(&mut self, t: usize) -> Result<(), String> {
        let kernel = self.kernel;
        let Inst { guard, code, .. } = &kernel.code[self.threads[t].at];
        self.counts.instructions += 1;
        if let Some((reg, wanted)) = *guard
            && (self.read(t, Operand::Reg(reg))? != 0) != wanted
        {
            self.threads[t].at += 1;
            return Ok(());
        }
        match code {
            Code::Op(op, ty, to, from) => {
                self.counts.products += u64::from(*op == "fma.rn");
                let mut values = [0; 3];
                for (value, operand) in values.iter_mut().zip(from) {
                    *value = self.read(t, *operand)?;
                }
                let value = operation(op, *ty, &values[..from.len()])?;
                self.write(t, *to, value);
            }
            Code::Set(cmp, ty, to, [x, y]) => {
                let holds = compare(cmp, *ty, self.read(t, *x)?, self.read(t, *y)?);
                self.write(t, *to, holds.into());
            }
            Code::Select(to, [x, y], c) => {
                // Both are read, as on the machine.
                let (x, y) = (self.read(t, *x)?, self.read(t, *y)?);
                let c = self.read(t, Operand::Reg(*c))?;
                self.write(t, *to, if c != 0 { x } else { y });
            }
            Code::Convert(round, [to, from], reg, x) => {
                let value = convert(round, *to, *from, self.read(t, *x)?);
                self.write(t, *reg, value);
            }
            Code::Param(to, number) => {
                self.write(t, *to, self.params[*number]);
            }
            Code::Load(space, ty, regs, place) => self.load(t, (*space, *ty), regs, *place)?,
            Code::Store(space, ty, regs, place) => self.store(t, (*space, *ty), regs, *place)?,
            Code::Copy([to, from], bytes) => self.copy(t, *to, *from, *bytes)?,
            Code::Wait => self.wait(t)?,
            Code::Shuffle(..) | Code::Matrices(..) | Code::Multiply(..) => {
                if let Code::Multiply([ty, _], _) = code {
                    // Each of its threads has four sums.
                    self.counts.products += 4 * 256 / u64::from(ty.bits());
                }
                self.threads[t].stop = Stop::Meets;
                return Ok(());
            }
            Code::Barrier => {
                self.threads[t].stop = Stop::Waits;
                return Ok(());
            }
            Code::Branch(to) => {
                self.threads[t].at = *to;
                return Ok(());
            }
            Code::Return => {
                if !self.threads[t].copies.is_empty() {
                    return Err("the thread ends before it has waited for its copies".into());
                }
                self.threads[t].stop = Stop::Ended;
                return Ok(());
            }
        }
        self.threads[t].at += 1;
        Ok(())
    }

    fn load(
        &mut self,
        t: usize,
        (space, ty): (Space, Ty),
        regs: &[usize],
        place: (Operand, i64),
    ) -> Result<(), String> {
        let size = (ty.bits() / 8) as usize;
        self.request(t, place, size * regs.len())?;
        let who = self.who(t);
        let (memory, at) = self.memory(t, space, place)?;
        let bytes = memory.load(at, size * regs.len(), who)?.to_vec();
        self.counts.read += if space == Space::Global { bytes.len() as u64 } else { 0 };
        for (reg, bytes) in regs.iter().zip(bytes.chunks(size)) {
            let mut value = [0; 8];
            value[..size].copy_from_slice(bytes);
            let value = u64::from_le_bytes(value);
            // Short integers fill their registers.
            let value = match ty {
                Ty::S(bits) => convert("", Ty::S(bits.max(32)), ty, value),
                _ => value,
            };
            self.write(t, *reg, value);
        }
        Ok(())
    }

    fn store(
        &mut self,
        t: usize,
        (space, ty): (Space, Ty),
        regs: &[usize],
        place: (Operand, i64),
    ) -> Result<(), String> {
        let size = (ty.bits() / 8) as usize;
        let mut bytes = Vec::with_capacity(16);
        for reg in regs {
            let value = self.read(t, Operand::Reg(*reg))? & mask(ty.bits());
            bytes.extend_from_slice(&value.to_le_bytes()[..size]);
        }
        self.request(t, place, bytes.len())?;
        let who = self.who(t);
        let (memory, at) = self.memory(t, space, place)?;
        memory.store(at, &bytes, who)
    }

    /// Counts a request of a thread where it stands.
    fn request(&mut self, t: usize, place: (Operand, i64), bytes: usize) -> Result<(), String> {
        let address = self.address(t, place)?;
        self.requests.touch(t, self.threads[t].at, address, bytes);
        Ok(())
    }

    /// Ends the copies of a thread.
    fn wait(&mut self, t: usize) -> Result<(), String> {
        let who = self.who(t);
        let copies = std::mem::take(&mut self.threads[t].copies);
        copies.iter().try_for_each(|(to, bytes)| self.shared.arrives(*to, bytes, who))
    }

    /// Starts a copy into shared memory. Nobody may touch what it writes before it is waited for.
    fn copy(
        &mut self,
        t: usize,
        to: (Operand, i64),
        from: (Operand, i64),
        size: usize,
    ) -> Result<(), String> {
        self.request(t, from, size)?;
        let (who, copies) = (self.who(t), self.copies);
        let (memory, at) = self.memory(t, Space::Global, from)?;
        let bytes = memory.load(at, size, who)?.to_vec();
        self.counts.read += size as u64;
        let (memory, at) = self.memory(t, Space::Shared, to)?;
        memory.store(at, &bytes, who)?;
        memory.leaves(at, size, copies == Copies::Late);
        self.threads[t].copies.push((at, bytes));
        Ok(())
    }

    pub(crate) fn who(&self, thread: usize) -> Who {
        Who { span: self.span, first: self.first, thread: thread as u32 }
    }

    pub(crate) fn address(&self, t: usize, (base, offset): (Operand, i64)) -> Result<u64, String> {
        Ok(self.read(t, base)?.wrapping_add_signed(offset))
    }

    /// The memory that a place is in, and the byte there.
    fn memory(
        &mut self,
        t: usize,
        space: Space,
        place: (Operand, i64),
    ) -> Result<(&mut Memory, u64), String> {
        let at = self.address(t, place)?;
        if space == Space::Shared {
            return Ok((&mut self.shared, at));
        }
        // What is a little before a buffer is out of its bounds, and not far behind another one.
        let half = 1u64 << (BUFFER - 1);
        let number = (at.wrapping_add(half) >> BUFFER) as usize;
        let buffer = number.checked_sub(1).and_then(|n| self.memory.get_mut(n));
        let buffer = buffer.ok_or_else(|| format!("address {at:#x} is that of no buffer"))?;
        Ok((buffer, at.wrapping_sub((number as u64) << BUFFER)))
    }
}
