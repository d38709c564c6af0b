//! From text to instructions. What is not known is refused, and so are registers of another type
//! than the instruction's.

use std::collections::HashMap;

/// Types of instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ty {
    /// A condition.
    Pred,
    /// A signed integer of so many bits.
    S(u32),
    /// An unsigned one.
    U(u32),
    /// Bits.
    B(u32),
    /// A float of so many bits.
    F(u32),
    /// The short float with the exponent of f32.
    BF16,
    /// A float with 10 bits of mantissa, the others of its 32 are 0.
    TF32,
}

impl Ty {
    fn of(name: &str) -> Option<Ty> {
        name.get(..1)?;
        Some(match name {
            "pred" => Ty::Pred,
            "bf16" => Ty::BF16,
            "tf32" => Ty::TF32,
            _ => {
                let bits = name.get(1..)?.parse().ok()?;
                let fits = [8, 16, 32, 64].contains(&bits);
                match name.as_bytes()[0] {
                    b's' if fits => Ty::S(bits),
                    b'u' if fits => Ty::U(bits),
                    b'b' if fits => Ty::B(bits),
                    b'f' if fits && bits > 8 => Ty::F(bits),
                    _ => return None,
                }
            }
        })
    }

    /// Its bits.
    pub fn bits(self) -> u32 {
        match self {
            Ty::Pred => 1,
            Ty::BF16 => 16,
            Ty::TF32 => 32,
            Ty::S(bits) | Ty::U(bits) | Ty::B(bits) | Ty::F(bits) => bits,
        }
    }

    /// The type of the registers that hold it.
    fn held(self) -> Ty {
        match self {
            Ty::BF16 | Ty::TF32 | Ty::F(16) => Ty::B(self.bits()),
            other => other,
        }
    }

    /// Whether registers of a type may stand for it. Those of short integers may be wider.
    fn fits(self, register: Ty, wider: bool) -> bool {
        let kind = match (self, register) {
            (Ty::B(_), other) | (other, Ty::B(_)) => other != Ty::Pred,
            (Ty::F(_), Ty::F(_)) | (Ty::Pred, Ty::Pred) => true,
            (Ty::S(_) | Ty::U(_), Ty::S(_) | Ty::U(_)) => true,
            _ => false,
        };
        let same = self.bits() == register.bits();
        kind && (same || wider && self.bits() < register.bits() && !matches!(self, Ty::F(_)))
    }
}

/// What an instruction reads.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Operand {
    /// A register.
    Reg(usize),
    /// Bits.
    Bits(u64),
    /// Number of the thread.
    Thread,
    /// Number of the block.
    Block,
}

/// Kinds of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Space {
    /// Of the device.
    Global,
    /// Of the block.
    Shared,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub enum Code {
    /// An operation, by its name without the type.
    Op(&'static str, Ty, usize, Vec<Operand>),
    /// A comparison, by its name.
    Set(&'static str, Ty, usize, [Operand; 2]),
    /// One of two.
    Select(usize, [Operand; 2], usize),
    /// To the first type from the second, by the name of how it rounds.
    Convert(&'static str, [Ty; 2], usize, Operand),
    /// A parameter.
    Param(usize, usize),
    /// A load.
    Load(Space, Ty, Vec<usize>, (Operand, i64)),
    /// A store.
    Store(Space, Ty, Vec<usize>, (Operand, i64)),
    /// Matrices from shared memory, a register for each; whether they are turned.
    Matrices(Vec<usize>, (Operand, i64), bool),
    /// A product of these types by a warp: to, rows, columns, sums.
    Multiply([Ty; 2], [Vec<usize>; 4]),
    /// So many bytes to shared memory, from memory.
    Copy([(Operand, i64); 2], usize),
    /// Waits for copies.
    Wait,
    /// The value of the lane whose number differs in these bits.
    Shuffle(usize, usize, u32),
    /// All threads of the block wait.
    Barrier,
    /// Goes on elsewhere.
    Branch(usize),
    /// Ends the thread.
    Return,
}

/// An instruction.
#[derive(Clone, Debug)]
pub struct Inst {
    /// Only where a register is so.
    pub guard: Option<(usize, bool)>,
    /// What it does.
    pub code: Code,
    /// Its text.
    pub text: String,
}

/// A kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Number of its parameters.
    pub params: usize,
    /// Threads of a block at most.
    pub threads: usize,
    /// Bytes of shared memory.
    pub shared: usize,
    /// Number of its registers.
    pub registers: usize,
    /// Its instructions.
    pub code: Vec<Inst>,
}

/// The kernels of a text.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its kernels, in order.
    pub kernels: Vec<Kernel>,
}

type Parsed<T> = Result<T, String>;

/// Operations with their operands, without types.
const OPS: [(&str, usize); 29] = [
    ("mov", 1),
    ("cvta.to.global", 1),
    ("add", 2),
    ("add.rn", 2),
    ("sub", 2),
    ("sub.rn", 2),
    ("mul.lo", 2),
    ("mul.rn", 2),
    ("mul.wide", 2),
    ("mad.lo", 3),
    ("mad.wide", 3),
    ("fma.rn", 3),
    ("div", 2),
    ("div.rn", 2),
    ("rem", 2),
    ("min", 2),
    ("max", 2),
    ("min.NaN", 2),
    ("max.NaN", 2),
    ("neg", 1),
    ("abs", 1),
    ("sqrt.rn", 1),
    ("rcp.rn", 1),
    ("and", 2),
    ("or", 2),
    ("xor", 2),
    ("not", 1),
    ("shl", 2),
    ("shr", 2),
];

const COMPARISONS: [&str; 8] = ["eq", "ne", "neu", "lt", "le", "gt", "ge", "nan"];
const ROUNDS: [&str; 7] = ["", "rn", "rna", "rzi", "rni", "rmi", "rpi"];

/// Reads a text.
pub fn parse(text: &str) -> Parsed<Module> {
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("//"));
    for start in [".version ", ".target sm_", ".address_size 64"] {
        let line = lines.next().unwrap_or_default();
        line.starts_with(start).then_some(()).ok_or(format!("`{start}` is missing: {line}"))?;
    }
    let mut kernels = Vec::new();
    while let Some(line) = lines.next() {
        let head = line.strip_prefix(".visible .entry ").ok_or(format!("not known: {line}"))?;
        let (name, params) = head.split_once('(').ok_or("a kernel without parameters")?;
        let params = params.matches(".param .u64 ").count();
        let threads = lines.next().and_then(|l| l.strip_prefix(".maxntid ")?.split(',').next());
        let threads = threads.and_then(|t| t.trim().parse().ok()).ok_or("no .maxntid")?;
        let mut begin = lines.next();
        if begin == Some(".minnctapersm 1") {
            begin = lines.next();
        }
        if begin != Some("{") {
            return Err(format!("{name} does not begin"));
        }
        let body: Vec<&str> = lines.by_ref().take_while(|l| *l != "}").collect();
        let kernel = Kernel {
            name: name.to_string(),
            params,
            threads,
            shared: 0,
            registers: 0,
            code: Vec::new(),
        };
        kernels.push(Body::new(kernel).read(&body).map_err(|why| format!("{name}: {why}"))?);
    }
    Ok(Module { kernels })
}

/// A kernel while it is read.
struct Body {
    kernel: Kernel,
    /// First register of each prefix, how many, and their type.
    files: Vec<(String, usize, usize, Ty)>,
    labels: HashMap<String, usize>,
}

impl Body {
    fn new(kernel: Kernel) -> Body {
        Body { kernel, files: Vec::new(), labels: HashMap::new() }
    }

    fn read(mut self, lines: &[&str]) -> Parsed<Kernel> {
        let mut at = 0;
        for line in lines {
            match line.strip_suffix(':') {
                Some(label) => {
                    if self.labels.insert(label.to_string(), at).is_some() {
                        return Err(format!("two labels {label}"));
                    }
                }
                None if line.starts_with('.') => self.declare(line)?,
                None => at += 1,
            }
        }
        for line in lines.iter().filter(|l| !l.ends_with(':') && !l.starts_with('.')) {
            let inst = self.inst(line).map_err(|why| format!("{why}: `{line}`"))?;
            self.kernel.code.push(inst);
        }
        match self.kernel.code.last() {
            Some(Inst { guard: None, code: Code::Return, .. }) => Ok(self.kernel),
            _ => Err("it does not end".into()),
        }
    }

    fn declare(&mut self, line: &str) -> Parsed<()> {
        let strange = || format!("not known: {line}");
        if line == ".pragma \"nounroll\";" {
            return Ok(());
        }
        if let Some(rest) = line.strip_prefix(".shared .align 16 .b8 shared_memory[") {
            let bytes = rest.strip_suffix("];").and_then(|n| n.parse().ok());
            self.kernel.shared = bytes.ok_or_else(strange)?;
            return Ok(());
        }
        let words = line.strip_prefix(".reg .").and_then(|l| l.split_once(' '));
        let (ty, names) = words.ok_or_else(strange)?;
        let (prefix, count) = names.split_once('<').ok_or_else(strange)?;
        let count = count.strip_suffix(">;").and_then(|n| n.parse().ok()).ok_or_else(strange)?;
        let ty = Ty::of(ty).ok_or_else(strange)?;
        self.files.push((prefix.to_string(), self.kernel.registers, count, ty));
        self.kernel.registers += count;
        Ok(())
    }

    /// A register, and its type.
    fn register(&self, name: &str) -> Parsed<(usize, Ty)> {
        let unknown = || format!("unknown register {name}");
        let digits = name.find(|c: char| c.is_ascii_digit()).ok_or_else(unknown)?;
        let number: usize = name[digits..].parse().map_err(|_| unknown())?;
        let file = self.files.iter().find(|f| f.0 == name[..digits] && number < f.2);
        file.map(|f| (f.1 + number, f.3)).ok_or_else(unknown)
    }

    /// A register of a type.
    fn of(&self, name: &str, ty: Ty, wider: bool) -> Parsed<usize> {
        let (reg, found) = self.register(name)?;
        match ty.fits(found, wider) {
            true => Ok(reg),
            false => Err(format!("{name} is {found:?} where {ty:?} is right")),
        }
    }

    fn operand(&self, word: &str, ty: Ty) -> Parsed<Operand> {
        let hex = |from: usize| u64::from_str_radix(&word[from..], 16);
        Ok(match word {
            "%tid.x" => Operand::Thread,
            "%ctaid.x" => Operand::Block,
            "shared_memory" => Operand::Bits(0),
            _ if word.starts_with('%') => Operand::Reg(self.of(word, ty, false)?),
            _ => {
                let bits = match word.get(..2) {
                    Some("0f") if ty == Ty::F(32) => hex(2).map_err(|e| e.to_string())?,
                    Some("0d") if ty == Ty::F(64) => hex(2).map_err(|e| e.to_string())?,
                    _ if matches!(ty, Ty::F(_) | Ty::Pred | Ty::BF16 | Ty::TF32) => {
                        return Err(format!("{word} is no {ty:?}"));
                    }
                    _ => word.parse::<i64>().map_err(|_| format!("{word} is no number"))? as u64,
                };
                Operand::Bits(if ty.bits() == 32 { bits & 0xffff_ffff } else { bits })
            }
        })
    }

    /// `[%d1+8]`
    fn place(&self, word: &str, space: Space) -> Parsed<(Operand, i64)> {
        let inside = word.strip_prefix('[').and_then(|w| w.strip_suffix(']'));
        let (base, offset) = inside.and_then(|w| w.split_once('+')).ok_or("no address")?;
        let ty = if space == Space::Global { Ty::U(64) } else { Ty::U(32) };
        Ok((self.operand(base, ty)?, offset.parse().map_err(|_| "no offset")?))
    }

    fn inst(&self, line: &str) -> Parsed<Inst> {
        let text = line.to_string();
        let line = line.strip_suffix(';').ok_or("no end")?;
        let (guard, line) = match line.strip_prefix('@') {
            None => (None, line),
            Some(rest) => {
                let (name, rest) = rest.split_once(' ').ok_or("a guard of nothing")?;
                let bare = name.trim_start_matches('!');
                let reg = self.of(bare, Ty::Pred, false)?;
                (Some((reg, bare == name)), rest)
            }
        };
        let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
        Ok(Inst { guard, code: self.code(name, &words(rest))?, text })
    }

    fn code(&self, name: &str, words: &[String]) -> Parsed<Code> {
        let count = |n: usize| {
            (words.len() == n).then_some(()).ok_or(format!("{} operands, not {n}", words.len()))
        };
        let parts: Vec<&str> = name.split('.').collect();
        match name {
            "ret" => return count(0).map(|()| Code::Return),
            "cp.async.wait_all" => return count(0).map(|()| Code::Wait),
            "bar.sync" if words == ["0"] => return Ok(Code::Barrier),
            "bra" => {
                let label = words.first().and_then(|w| self.labels.get(w));
                return Ok(Code::Branch(*label.ok_or("an unknown label")?));
            }
            "ld.param.u64" => {
                count(2)?;
                let number = words[1].trim_matches(['[', ']', 'b']).parse();
                let number = number.map_err(|_| "an unknown parameter")?;
                let fits = number < self.kernel.params;
                fits.then_some(()).ok_or("an unknown parameter")?;
                return Ok(Code::Param(self.of(&words[0], Ty::U(64), false)?, number));
            }
            "shfl.sync.bfly.b32" => {
                count(5)?;
                let mask = words[2].parse().map_err(|_| "no lanes")?;
                (words[3] == "31" && words[4] == "-1").then_some(()).ok_or("other lanes")?;
                let [to, from] = [0, 1].map(|k: usize| self.of(&words[k], Ty::B(32), false));
                return Ok(Code::Shuffle(to?, from?, mask));
            }
            _ => {}
        }
        match parts[0] {
            "ldmatrix" => self.matrices(name, words),
            "mma" => self.multiply(name, words),
            "cp" => self.copy(name, words),
            "ld" | "st" => self.access(&parts, words),
            "setp" if parts.len() == 3 => {
                count(3)?;
                let cmp = COMPARISONS.into_iter().find(|c| *c == parts[1]);
                let ty = Ty::of(parts[2]).ok_or("an unknown type")?;
                let cmp = cmp.filter(|_| ty != Ty::Pred).ok_or("an unknown comparison")?;
                let to = self.of(&words[0], Ty::Pred, false)?;
                let [x, y] = [1, 2].map(|k: usize| self.operand(&words[k], ty));
                Ok(Code::Set(cmp, ty, to, [x?, y?]))
            }
            "selp" if parts.len() == 2 => {
                count(4)?;
                let ty = Ty::of(parts[1]).filter(|t| *t != Ty::Pred).ok_or("an unknown type")?;
                let to = self.of(&words[0], ty, false)?;
                let [x, y] = [1, 2].map(|k: usize| self.operand(&words[k], ty));
                Ok(Code::Select(to, [x?, y?], self.of(&words[3], Ty::Pred, false)?))
            }
            "cvt" => {
                count(2)?;
                let (round, types) = match parts[1..] {
                    [to, from] => ("", [to, from]),
                    [round, to, from] => (round, [to, from]),
                    _ => return Err("an unknown conversion".into()),
                };
                let round = ROUNDS.into_iter().find(|r| *r == round).ok_or("unknown rounding")?;
                let [to, from] = types.map(|t| Ty::of(t).ok_or("an unknown type"));
                let (to, from) = (to?, from?);
                super::arithmetic::convertible(round, to, from)?;
                let target = self.converted(&words[0], to)?;
                Ok(Code::Convert(round, [to, from], target, self.operand(&words[1], from.held())?))
            }
            _ => self.operation(name, words),
        }
    }

    /// So many registers in braces.
    fn group(&self, word: &str, ty: Ty, count: usize) -> Parsed<Vec<usize>> {
        let regs = word.strip_prefix('{').and_then(|w| w.strip_suffix('}')).ok_or("no braces")?;
        let regs = regs.split(',').map(|reg| self.of(reg.trim(), ty, false));
        let regs = regs.collect::<Parsed<Vec<usize>>>()?;
        if regs.len() != count {
            return Err(format!("{} registers, not {count}", regs.len()));
        }
        Ok(regs)
    }

    /// The register that a conversion gives its result.
    fn converted(&self, word: &str, to: Ty) -> Parsed<usize> {
        if to == Ty::TF32 {
            self.plain(word)?;
        }
        self.of(word, to.held(), true)
    }

    /// Whether registers are of 32 bits without a meaning: where the assembler takes no others.
    fn plain(&self, word: &str) -> Parsed<()> {
        for name in word.trim_matches(['{', '}']).split(',') {
            match self.register(name.trim())?.1 {
                Ty::B(32) => {}
                found => return Err(format!("{name} is {found:?} where .b32 is right")),
            }
        }
        Ok(())
    }

    fn copy(&self, name: &str, words: &[String]) -> Parsed<Code> {
        let sizes: &[usize] = match name {
            "cp.async.cg.shared.global" => &[16],
            "cp.async.ca.shared.global" => &[4, 8, 16],
            _ => return Err("an unknown copy".into()),
        };
        let [to, from, bytes] = words else { return Err("three operands are right".into()) };
        let bytes = bytes.parse().map_err(|_| "no number of bytes")?;
        sizes.contains(&bytes).then_some(()).ok_or("another number of bytes")?;
        let to = self.place(to, Space::Shared)?;
        Ok(Code::Copy([to, self.place(from, Space::Global)?], bytes))
    }

    fn matrices(&self, name: &str, words: &[String]) -> Parsed<Code> {
        let kind = name.strip_prefix("ldmatrix.sync.aligned.m8n8.x");
        let (count, turned) = match kind.unwrap_or_default() {
            "1.shared.b16" => (1, false),
            "2.shared.b16" => (2, false),
            "4.shared.b16" => (4, false),
            "1.trans.shared.b16" => (1, true),
            "2.trans.shared.b16" => (2, true),
            "4.trans.shared.b16" => (4, true),
            _ => return Err("unknown matrices".into()),
        };
        let [to, place] = words else { return Err("two operands are right".into()) };
        let to = self.group(to, Ty::B(32), count)?;
        Ok(Code::Matrices(to, self.place(place, Space::Shared)?, turned))
    }

    fn multiply(&self, name: &str, words: &[String]) -> Parsed<Code> {
        let known = |rest: &str| match rest {
            "m16n8k16.row.col.f32.bf16.bf16.f32" => Some(([Ty::BF16; 2], Ty::F(32))),
            "m16n8k16.row.col.f32.f16.f16.f32" => Some(([Ty::F(16); 2], Ty::F(32))),
            "m16n8k8.row.col.f32.tf32.tf32.f32" => Some(([Ty::TF32; 2], Ty::F(32))),
            _ => None,
        };
        let bytes = |rest: &str| {
            let rest = rest.strip_prefix("m16n8k32.row.col.s32.")?.strip_suffix(".s32")?;
            let (x, y) = rest.split_once('.')?;
            let ty = |name: &str| Ty::of(name).filter(|t| matches!(t, Ty::S(8) | Ty::U(8)));
            Some(([ty(x)?, ty(y)?], Ty::S(32)))
        };
        let rest = name.strip_prefix("mma.sync.aligned.").unwrap_or_default();
        let (types, sum) = known(rest).or_else(|| bytes(rest)).ok_or("an unknown product")?;
        let [to, x, y, sums] = words else { return Err("four operands are right".into()) };
        self.plain(x)?;
        self.plain(y)?;
        let part = |word, ty, count| self.group(word, ty, count);
        let [to, sums] = [part(to, sum, 4)?, part(sums, sum, 4)?];
        Ok(Code::Multiply(types, [to, part(x, Ty::B(32), 4)?, part(y, Ty::B(32), 2)?, sums]))
    }

    fn operation(&self, name: &str, words: &[String]) -> Parsed<Code> {
        let (op, ty) = name.rsplit_once('.').ok_or("an unknown instruction")?;
        let ty = Ty::of(ty).ok_or("an unknown type")?;
        let known = OPS.into_iter().find(|o| o.0 == op).ok_or("an unknown instruction")?;
        super::arithmetic::known(op, ty)?;
        if words.len() != known.1 + 1 {
            return Err(format!("{} operands, not {}", words.len(), known.1 + 1));
        }
        let wide = |k: usize| op.ends_with(".wide") && (k == 0 || k == 3);
        let of = |k: usize| match (wide(k), op, k) {
            (true, ..) => Ty::U(64),
            (_, "shl" | "shr", 2) => Ty::U(32),
            _ => ty,
        };
        let from = (1..words.len()).map(|k| self.operand(&words[k], of(k)));
        let from = from.collect::<Parsed<Vec<Operand>>>()?;
        Ok(Code::Op(known.0, ty, self.of(&words[0], of(0), false)?, from))
    }

    fn access(&self, parts: &[&str], words: &[String]) -> Parsed<Code> {
        let space = match parts.get(1) {
            Some(&"global") => Space::Global,
            Some(&"shared") => Space::Shared,
            _ => return Err("unknown memory".into()),
        };
        let (many, ty) = match parts[2..] {
            [ty] => (1, ty),
            ["v2", ty] => (2, ty),
            ["v4", ty] => (4, ty),
            _ => return Err("unknown elements".into()),
        };
        let ty = Ty::of(ty).filter(|t| *t != Ty::Pred).ok_or("an unknown type")?;
        let load = parts[0] == "ld";
        let [place, regs] = match (words, load) {
            ([regs, place], true) | ([place, regs], false) => [place, regs],
            _ => return Err("two operands are right".into()),
        };
        let regs: Vec<&str> = regs.trim_matches(['{', '}']).split(',').map(str::trim).collect();
        let fits = regs.len() == many && many as u32 * ty.bits() <= 128;
        fits.then_some(()).ok_or("elements of another number")?;
        let regs = regs.into_iter().map(|r| self.of(r, ty, true)).collect::<Parsed<_>>()?;
        let place = self.place(place, space)?;
        Ok(match load {
            true => Code::Load(space, ty, regs, place),
            false => Code::Store(space, ty, regs, place),
        })
    }
}

/// Operands: apart by commas, but for those in braces.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut depth) = (vec![String::new()], 0);
    for c in text.chars() {
        match c {
            ',' if depth == 0 => words.push(String::new()),
            c => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                words.last_mut().expect("one at least").push(c);
            }
        }
    }
    let words = words.into_iter().map(|w| w.trim().to_string());
    words.filter(|w| !w.is_empty()).collect()
}
