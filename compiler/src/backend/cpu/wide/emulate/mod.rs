//! A model of the processor for the instructions that kernels consist of, so that code for a CPU
//! can be tried on another one. Memory is that of the caller; anything else that a kernel touches,
//! a register that it reads before it is written, and an instruction that the model does not know,
//! are faults.

mod scalar;
mod vector;

use std::collections::{BTreeSet, HashMap};

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register, RoundingControl};

/// Why a kernel cannot go on.
pub type Fault = String;

/// An address per kind of memory; what lies between them is no memory.
const CODE: u64 = 0x1000_0000;
const TABLE: u64 = 0x2000_0000;
const STACK: u64 = 0x7000_0000;
const STACK_BYTES: usize = 1 << 16;
/// Buffers lie apart from each other, none on a multiple of more than 4 bytes.
const BUFFERS: u64 = 0x1_0000_0004;
const BUFFER_STEP: u64 = 0x1_0000_0040;
/// Where the kernel returns to.
const HOME: u64 = 0xdead_0000;
/// No test runs longer.
const MOST_STEPS: usize = 400_000_000;

/// A piece of memory.
struct Region<'a> {
    start: u64,
    bytes: Memory<'a>,
}

enum Memory<'a> {
    Read(&'a [u8]),
    Write(&'a mut [u8]),
    Own(Vec<u8>),
}

/// A buffer that a kernel is given.
pub enum Buffer<'a> {
    /// It must not change.
    Read(&'a [u8]),
    /// It may change.
    Write(&'a mut [u8]),
}

/// What comparisons leave behind.
#[derive(Clone, Copy)]
struct Flags {
    zero: bool,
    less: bool,
}

struct Processor<'a> {
    next: u64,
    general: [Option<u64>; 16],
    vectors: [Option<[u32; 16]>; 32],
    masks: [Option<u64>; 8],
    flags: Option<Flags>,
    memory: Vec<Region<'a>>,
}

/// Runs a kernel from `begin` to `end`; returns the instructions that it went through.
pub fn run(
    code: &[u8],
    buffers: Vec<Buffer>,
    begin: i64,
    end: i64,
) -> Result<BTreeSet<String>, Fault> {
    let mut table = Vec::new();
    let mut memory = vec![
        Region { start: CODE, bytes: Memory::Read(code) },
        Region { start: STACK, bytes: Memory::Own(vec![0xa5; STACK_BYTES]) },
    ];
    for (i, buffer) in buffers.into_iter().enumerate() {
        let start = BUFFERS + i as u64 * BUFFER_STEP;
        table.extend(start.to_le_bytes());
        let bytes = match buffer {
            Buffer::Read(bytes) => Memory::Read(bytes),
            Buffer::Write(bytes) => Memory::Write(bytes),
        };
        memory.push(Region { start, bytes });
    }
    memory.push(Region { start: TABLE, bytes: Memory::Own(table) });
    let mut processor = Processor {
        next: CODE,
        general: [None; 16],
        vectors: [None; 32],
        masks: [None; 8],
        flags: None,
        memory,
    };
    // As at the entry of a function: the return address is on top of an aligned stack.
    let top = STACK + STACK_BYTES as u64 - 72;
    processor.write(top, &HOME.to_le_bytes())?;
    let at_entry = [(4, top), (7, TABLE), (6, begin as u64), (2, end as u64)];
    for (number, value) in at_entry {
        processor.general[number] = Some(value);
    }
    let used = processor.go(code)?;
    if processor.general[4] != Some(top + 8) {
        return Err("the stack is not where it was".into());
    }
    // rbx, rbp and r12 to r15 belong to the caller; a pop of what was never written restores them.
    match [3, 5, 12, 13, 14, 15].iter().find(|&&n| processor.general[n].is_some()) {
        Some(n) => Err(format!("general register {n} is not as it was")),
        None => Ok(used),
    }
}

impl Processor<'_> {
    fn go(&mut self, code: &[u8]) -> Result<BTreeSet<String>, Fault> {
        let mut known: HashMap<u64, Instruction> = HashMap::new();
        let mut decoder = Decoder::with_ip(64, code, CODE, DecoderOptions::NONE);
        let mut used: BTreeSet<Code> = BTreeSet::new();
        for _ in 0..MOST_STEPS {
            if self.next == HOME {
                return Ok(used.into_iter().map(|code| format!("{code:?}")).collect());
            }
            let at = self.next;
            let instruction = *known.entry(at).or_insert_with(|| {
                let inside = decoder.set_position(at.wrapping_sub(CODE) as usize).is_ok();
                decoder.set_ip(at);
                if inside { decoder.decode() } else { Instruction::default() }
            });
            used.insert(instruction.code());
            self.next = instruction.next_ip();
            self.step(&instruction).map_err(|why| format!("{at:x}: {instruction}: {why}"))?;
        }
        Err("the kernel does not end".into())
    }

    fn step(&mut self, i: &Instruction) -> Result<(), Fault> {
        let rounded = i.rounding_control() != RoundingControl::None;
        if i.zeroing_masking() || i.suppress_all_exceptions() || rounded {
            return Err("a form of EVEX that the model does not know".into());
        }
        match self.scalar(i)? || self.vector(i)? {
            true => Ok(()),
            false => Err(format!("the model does not know {:?}", i.code())),
        }
    }

    fn read(&self, address: u64, len: usize) -> Result<&[u8], Fault> {
        for region in &self.memory {
            let bytes: &[u8] = match &region.bytes {
                Memory::Read(bytes) => bytes,
                Memory::Write(bytes) => bytes,
                Memory::Own(bytes) => bytes,
            };
            let at = address.wrapping_sub(region.start) as usize;
            if at < bytes.len() {
                return bytes.get(at..at + len).ok_or_else(|| format!("reads past {address:x}"));
            }
        }
        Err(format!("reads {len} bytes at {address:x}"))
    }

    fn write(&mut self, address: u64, value: &[u8]) -> Result<(), Fault> {
        for region in &mut self.memory {
            let bytes: &mut [u8] = match &mut region.bytes {
                Memory::Read(_) => continue,
                Memory::Write(bytes) => bytes,
                Memory::Own(bytes) => bytes,
            };
            let at = address.wrapping_sub(region.start) as usize;
            if at < bytes.len() {
                let to = bytes.get_mut(at..at + value.len());
                to.ok_or_else(|| format!("writes past {address:x}"))?.copy_from_slice(value);
                return Ok(());
            }
        }
        Err(format!("writes {} bytes at {address:x}", value.len()))
    }

    /// Where the operand in memory is.
    fn address(&self, i: &Instruction) -> Result<u64, Fault> {
        let displacement = i.memory_displacement64();
        if i.memory_base() == Register::RIP {
            return Ok(displacement);
        }
        let base = self.general(i.memory_base())?;
        let index = match i.memory_index() {
            Register::None => 0,
            index => self.general(index)?.wrapping_mul(u64::from(i.memory_index_scale())),
        };
        Ok(base.wrapping_add(index).wrapping_add(displacement))
    }
}

/// The number of a register in the row of 64-bit, 32-bit or low byte registers.
fn number(register: Register, first: Register, count: usize) -> Option<usize> {
    let at = (register as usize).checked_sub(first as usize)?;
    (at < count).then_some(at)
}

/// Whether an operand is memory.
fn is_memory(i: &Instruction, operand: u32) -> bool {
    i.op_kind(operand) == OpKind::Memory
}
