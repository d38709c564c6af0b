//! The instructions of PTX that the backend uses, as data that prints itself. Registers have types,
//! so that the assembler checks them.

use std::fmt::{self, Display, Formatter};

/// Types of instructions.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Ty {
    /// A condition.
    Pred,
    /// 8 bits, signed; only in memory.
    S8,
    /// 8 bits, unsigned; only in memory.
    U8,
    /// 16 bits, signed; only in memory.
    S16,
    /// 16 bits, unsigned; only in memory.
    U16,
    /// 16 bits of any meaning.
    B16,
    /// A short float, in a register of 16 bits.
    F16,
    /// A short float with the exponent of f32.
    BF16,
    /// 32 bits, signed.
    S32,
    /// 32 bits, unsigned.
    U32,
    /// 32 bits of any meaning.
    B32,
    /// 64 bits, signed.
    S64,
    /// 64 bits, unsigned.
    U64,
    /// 64 bits of any meaning.
    B64,
    /// A float with 10 bits of mantissa, in a register of 32 bits.
    TF32,
    /// A float.
    F32,
    /// A long float.
    F64,
}

impl Ty {
    /// How it is spelled.
    pub fn name(self) -> &'static str {
        match self {
            Ty::Pred => "pred",
            Ty::S8 => "s8",
            Ty::U8 => "u8",
            Ty::S16 => "s16",
            Ty::U16 => "u16",
            Ty::B16 => "b16",
            Ty::F16 => "f16",
            Ty::BF16 => "bf16",
            Ty::S32 => "s32",
            Ty::U32 => "u32",
            Ty::B32 => "b32",
            Ty::S64 => "s64",
            Ty::U64 => "u64",
            Ty::B64 => "b64",
            Ty::TF32 => "tf32",
            Ty::F32 => "f32",
            Ty::F64 => "f64",
        }
    }

    /// Bytes in memory.
    pub fn bytes(self) -> i64 {
        match self {
            Ty::Pred | Ty::S8 | Ty::U8 => 1,
            Ty::S16 | Ty::U16 | Ty::B16 | Ty::F16 | Ty::BF16 => 2,
            Ty::S32 | Ty::U32 | Ty::B32 | Ty::TF32 | Ty::F32 => 4,
            Ty::S64 | Ty::U64 | Ty::B64 | Ty::F64 => 8,
        }
    }

    /// The type without a sign, for what does not ask.
    pub fn bits(self) -> Ty {
        match self {
            Ty::S32 | Ty::U32 => Ty::B32,
            Ty::S64 | Ty::U64 => Ty::B64,
            other => other,
        }
    }

    /// Whether it is a float that is computed with.
    pub fn is_float(self) -> bool {
        matches!(self, Ty::F32 | Ty::F64)
    }

    /// The registers that hold it.
    pub fn class(self) -> Class {
        match self {
            Ty::Pred => Class::P,
            Ty::B16 | Ty::F16 | Ty::BF16 => Class::H,
            Ty::F32 => Class::F,
            Ty::F64 => Class::G,
            Ty::S64 | Ty::U64 | Ty::B64 => Class::D,
            Ty::S8 | Ty::U8 | Ty::S16 | Ty::U16 => Class::R,
            Ty::S32 | Ty::U32 | Ty::B32 | Ty::TF32 => Class::R,
        }
    }
}

/// Files of registers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Class {
    /// Conditions.
    P,
    /// 16 bits.
    H,
    /// Integers of 32 bits.
    R,
    /// Integers of 64 bits.
    D,
    /// f32.
    F,
    /// f64.
    G,
}

/// Every class with its type and the beginning of the names of its registers.
pub const CLASSES: [(Class, &str, &str); 6] = [
    (Class::P, "pred", "%p"),
    (Class::H, "b16", "%h"),
    (Class::R, "b32", "%r"),
    (Class::D, "u64", "%d"),
    (Class::F, "f32", "%f"),
    (Class::G, "f64", "%g"),
];

/// A register.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Reg {
    /// Its class.
    pub class: Class,
    /// Its number there.
    pub number: u32,
}

/// What an instruction reads.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Operand {
    /// A register.
    Reg(Reg),
    /// An integer, of 32 bits where nothing says otherwise.
    Int(i64),
    /// An integer of 64 bits.
    Long(i64),
    /// An f32.
    F32(f32),
    /// An f64.
    F64(f64),
    /// Number of the thread in its block.
    Thread,
    /// Number of the block.
    Block,
    /// The shared memory of the kernel.
    Shared,
}

/// What is computed of one, two or three operands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)]
pub enum Op {
    Mov,
    Add,
    Sub,
    Mul,
    MulWide,
    Mad,
    MadWide,
    Div,
    Rem,
    Min,
    Max,
    Neg,
    Abs,
    Sqrt,
    Recip,
    And,
    Or,
    Xor,
    Not,
    Shl,
    Shr,
    ToGlobal,
}

/// How operations are spelled for integers, and for floats: these always say how they round, so
/// that the assembler does not join a product and a sum.
const OPS: [(Op, &str, &str); 22] = [
    (Op::Mov, "mov", "mov"),
    (Op::Add, "add", "add.rn"),
    (Op::Sub, "sub", "sub.rn"),
    (Op::Mul, "mul.lo", "mul.rn"),
    (Op::MulWide, "mul.wide", ""),
    (Op::Mad, "mad.lo", "fma.rn"),
    (Op::MadWide, "mad.wide", ""),
    (Op::Div, "div", "div.rn"),
    (Op::Rem, "rem", ""),
    (Op::Min, "min", "min.NaN"),
    (Op::Max, "max", "max.NaN"),
    (Op::Neg, "neg", "neg"),
    (Op::Abs, "abs", "abs"),
    (Op::Sqrt, "", "sqrt.rn"),
    (Op::Recip, "", "rcp.rn"),
    (Op::And, "and", ""),
    (Op::Or, "or", ""),
    (Op::Xor, "xor", ""),
    (Op::Not, "not", ""),
    (Op::Shl, "shl", ""),
    (Op::Shr, "shr", ""),
    (Op::ToGlobal, "cvta.to.global", ""),
];

/// Comparisons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cmp {
    /// Equal.
    Eq,
    /// Not equal; of floats also where one is NaN.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater or equal.
    Ge,
    /// One is NaN; of floats only.
    Nan,
}

impl Cmp {
    fn name(self, ty: Ty) -> &'static str {
        match self {
            Cmp::Eq => "eq",
            Cmp::Ne if ty.is_float() => "neu",
            Cmp::Ne => "ne",
            Cmp::Lt => "lt",
            Cmp::Le => "le",
            Cmp::Ge => "ge",
            Cmp::Nan => "nan",
        }
    }
}

/// How a conversion rounds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Round {
    /// It need not.
    Exact,
    /// To the nearest number, ties to even.
    Nearest,
    /// To the nearest number, ties away from zero.
    Away,
    /// To an integer, towards zero.
    Zero,
    /// To the nearest integer, ties to even.
    Whole,
    /// To an integer, down.
    Down,
    /// To an integer, up.
    Up,
}

impl Round {
    fn name(self) -> &'static str {
        match self {
            Round::Exact => "",
            Round::Nearest => ".rn",
            Round::Away => ".rna",
            Round::Zero => ".rzi",
            Round::Whole => ".rni",
            Round::Down => ".rmi",
            Round::Up => ".rpi",
        }
    }
}

/// Kinds of memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Space {
    /// Of the device.
    Global,
    /// Of a block.
    Shared,
}

impl Space {
    fn name(self) -> &'static str {
        match self {
            Space::Global => "global",
            Space::Shared => "shared",
        }
    }
}

/// A place in memory.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Address {
    /// A register of 64 bits, of shared memory 32.
    pub base: Reg,
    /// Bytes from there.
    pub offset: i64,
    /// What the base is a multiple of, 16 at most.
    pub align: i64,
}

/// An instruction.
#[derive(Clone, PartialEq, Debug)]
pub enum Inst {
    /// An operation of a type.
    Op(Op, Ty, Reg, Vec<Operand>),
    /// Whether two numbers of a type compare so.
    Set(Cmp, Ty, Reg, [Operand; 2]),
    /// One of two values, as a condition says.
    Select(Ty, Reg, [Operand; 2], Reg),
    /// From the second type to the first one.
    Convert(Round, [Ty; 2], Reg, Reg),
    /// A parameter of the kernel, 64 bits.
    Param(Reg, usize),
    /// One element, or two or four beside each other.
    Load(Space, Ty, Vec<Reg>, Address),
    /// The same.
    Store(Space, Ty, Address, Vec<Reg>),
    /// Bytes from memory to shared memory, 4, 8 or 16 of them; they are there once they are waited
    /// for.
    Copy(Address, Address, i64),
    /// Matrices of 8 rows of 16 bytes from shared memory, each row from the address of a lane of
    /// its own; a register for each, turned where so: then elements of 2 bytes change places.
    Matrices(Vec<Reg>, Address, bool),
    /// A product of 16 rows and 8 columns of these types by a warp, added to sums: to, rows,
    /// columns, sums.
    Multiply([Ty; 2], [Vec<Reg>; 4]),
    /// Waits for the copies of this thread.
    Wait,
    /// The value of the lane whose number differs in these bits.
    Shuffle(Reg, Reg, u32),
    /// All threads of the block wait for each other.
    Barrier,
    /// A place to go to.
    Label(u32),
    /// Says that the loop that begins here is written out enough.
    NoUnroll,
    /// Goes there: always, or where a condition is so.
    Branch(u32, Option<(Reg, bool)>),
    /// The end of the thread.
    Return,
}

impl Display for Reg {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let prefix = CLASSES.iter().find(|c| c.0 == self.class).map_or("", |c| c.2);
        write!(f, "{prefix}{}", self.number)
    }
}

impl Display for Operand {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Operand::Reg(reg) => reg.fmt(f),
            Operand::Int(v) | Operand::Long(v) => v.fmt(f),
            Operand::F32(v) => write!(f, "0f{:08X}", v.to_bits()),
            Operand::F64(v) => write!(f, "0d{:016X}", v.to_bits()),
            Operand::Thread => f.write_str("%tid.x"),
            Operand::Block => f.write_str("%ctaid.x"),
            Operand::Shared => f.write_str("shared_memory"),
        }
    }
}

impl Display for Address {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        write!(f, "[{}+{}]", self.base, self.offset)
    }
}

/// Registers in braces.
fn group(regs: &[Reg]) -> String {
    let names: Vec<String> = regs.iter().map(Reg::to_string).collect();
    format!("{{{}}}", names.join(", "))
}

/// Elements beside each other.
fn vector(regs: &[Reg]) -> (&'static str, String) {
    match regs.len() {
        1 => ("", regs[0].to_string()),
        2 => (".v2", group(regs)),
        _ => (".v4", group(regs)),
    }
}

impl Display for Inst {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Inst::Op(op, ty, to, from) => {
                let row = OPS.iter().find(|row| row.0 == *op).expect("every operation is there");
                let name = if ty.is_float() { row.2 } else { row.1 };
                let from: Vec<String> = from.iter().map(Operand::to_string).collect();
                write!(f, "{name}.{} {to}, {};", ty.name(), from.join(", "))
            }
            Inst::Set(cmp, ty, to, [x, y]) => {
                write!(f, "setp.{}.{} {to}, {x}, {y};", cmp.name(*ty), ty.name())
            }
            Inst::Select(ty, to, [x, y], c) => {
                write!(f, "selp.{} {to}, {x}, {y}, {c};", ty.bits().name())
            }
            Inst::Convert(round, [to_ty, from_ty], to, from) => {
                let (to_ty, from_ty) = (to_ty.name(), from_ty.name());
                write!(f, "cvt{}.{to_ty}.{from_ty} {to}, {from};", round.name())
            }
            Inst::Param(to, number) => write!(f, "ld.param.u64 {to}, [b{number}];"),
            Inst::Load(space, ty, to, at) => {
                let ((many, to), space) = (vector(to), space.name());
                write!(f, "ld.{space}{many}.{} {to}, {at};", ty.name())
            }
            Inst::Store(space, ty, at, from) => {
                let ((many, from), space) = (vector(from), space.name());
                write!(f, "st.{space}{many}.{} {at}, {from};", ty.name())
            }
            Inst::Copy(to, from, bytes) => {
                // What is read at once by no others need not be kept close by.
                let cache = if *bytes == 16 { "cg" } else { "ca" };
                write!(f, "cp.async.{cache}.shared.global {to}, {from}, {bytes};")
            }
            Inst::Matrices(to, at, turned) => {
                let turned = if *turned { ".trans" } else { "" };
                let (count, to) = (to.len(), group(to));
                write!(f, "ldmatrix.sync.aligned.m8n8.x{count}{turned}.shared.b16 {to}, {at};")
            }
            Inst::Multiply([x, y], parts) => {
                let (shape, sum) = match x.bytes() {
                    1 => ("m16n8k32", "s32"),
                    2 => ("m16n8k16", "f32"),
                    _ => ("m16n8k8", "f32"),
                };
                let parts: Vec<String> = parts.iter().map(|part| group(part)).collect();
                let (x, y) = (x.name(), y.name());
                write!(
                    f,
                    "mma.sync.aligned.{shape}.row.col.{sum}.{x}.{y}.{sum} {};",
                    parts.join(", ")
                )
            }
            Inst::Wait => f.write_str("cp.async.wait_all;"),
            Inst::Shuffle(to, from, mask) => {
                write!(f, "shfl.sync.bfly.b32 {to}, {from}, {mask}, 31, -1;")
            }
            Inst::Barrier => f.write_str("bar.sync 0;"),
            Inst::Label(label) => write!(f, "L{label}:"),
            Inst::NoUnroll => f.write_str(".pragma \"nounroll\";"),
            Inst::Branch(label, None) => write!(f, "bra L{label};"),
            Inst::Branch(label, Some((c, holds))) => {
                let not = if *holds { "" } else { "!" };
                write!(f, "@{not}{c} bra L{label};")
            }
            Inst::Return => f.write_str("ret;"),
        }
    }
}
