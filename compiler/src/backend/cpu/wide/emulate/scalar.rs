//! Addresses, counters and control.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Fault, Flags, Processor, is_memory, number};

impl Processor<'_> {
    /// A general register, zero-extended.
    pub fn general(&self, register: Register) -> Result<u64, Fault> {
        let (number, mask) = place(register)?;
        let value = self.general[number];
        value.map(|v| v & mask).ok_or_else(|| format!("{register:?} has no value yet"))
    }

    pub fn set(&mut self, register: Register, value: u64) -> Result<(), Fault> {
        let (number, mask) = place(register)?;
        let kept = match mask {
            0xff => self.general[number].unwrap_or(0) & !0xff,
            _ => 0,
        };
        self.general[number] = Some(kept | value & mask);
        Ok(())
    }

    /// An operand of up to 64 bits: register, memory or number.
    fn operand(&self, i: &Instruction, k: u32) -> Result<u64, Fault> {
        match i.op_kind(k) {
            OpKind::Register => self.general(i.op_register(k)),
            OpKind::Memory => {
                let bytes = self.read(self.address(i)?, i.memory_size().size())?;
                let mut value = [0; 8];
                value[..bytes.len()].copy_from_slice(bytes);
                Ok(u64::from_le_bytes(value))
            }
            OpKind::NearBranch64 => Ok(i.near_branch64()),
            _ => Ok(i.immediate(k)),
        }
    }

    fn store(&mut self, i: &Instruction, value: u64) -> Result<(), Fault> {
        if is_memory(i, 0) {
            let address = self.address(i)?;
            return self.write(address, &value.to_le_bytes());
        }
        self.set(i.op_register(0), value)
    }

    fn push(&mut self, value: u64) -> Result<(), Fault> {
        let top = self.general(Register::RSP)? - 8;
        self.set(Register::RSP, top)?;
        self.write(top, &value.to_le_bytes())
    }

    fn pop(&mut self) -> Result<u64, Fault> {
        let top = self.general(Register::RSP)?;
        let bytes = self.read(top, 8)?;
        let value = u64::from_le_bytes(bytes.try_into().expect("8 bytes were read"));
        self.set(Register::RSP, top + 8)?;
        Ok(value)
    }

    /// What a caller's register holds: known by its number, of no use to a kernel.
    fn secret(number: usize) -> u64 {
        0x5ec2_e75e_c2e7_0000 + number as u64
    }

    fn compare(&mut self, result: u64, less: bool) {
        self.flags = Some(Flags { zero: result == 0, less });
    }

    fn asked(&self) -> Result<Flags, Fault> {
        self.flags.ok_or_else(|| "nothing was compared".to_string())
    }

    fn branch(&mut self, i: &Instruction, taken: bool) {
        if taken {
            self.next = i.near_branch64();
        }
    }

    /// Runs an instruction if it is one of these.
    pub fn scalar(&mut self, i: &Instruction) -> Result<bool, Fault> {
        let [x, y] = [0, 1];
        match i.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movzx => self.store(i, self.operand(i, y)?)?,
            Mnemonic::Prefetcht1 => _ = self.address(i)?,
            Mnemonic::Movsx => {
                let value = self.operand(i, y)?;
                let short = i.memory_size().size() == 2;
                let value = if short { value as i16 as i32 } else { i32::from(value as i8) };
                self.store(i, value as u32 as u64)?;
            }
            Mnemonic::Lea => self.store(i, self.address(i)?)?,
            Mnemonic::Imul => {
                self.flags = None;
                let product = self.operand(i, 1)?.wrapping_mul(self.operand(i, 2)?);
                self.store(i, product)?;
            }
            Mnemonic::Add
            | Mnemonic::Sub
            | Mnemonic::And
            | Mnemonic::Or
            | Mnemonic::Shl
            | Mnemonic::Shr => {
                let (a, b) = (self.operand(i, x)?, self.operand(i, y)?);
                self.flags = None;
                let result = match i.mnemonic() {
                    Mnemonic::Add => a.wrapping_add(b),
                    Mnemonic::Sub => a.wrapping_sub(b),
                    Mnemonic::And => a & b,
                    Mnemonic::Or => a | b,
                    Mnemonic::Shl => a << (b & 63),
                    _ => a >> (b & 63),
                };
                self.store(i, result)?;
            }
            Mnemonic::Neg => {
                self.flags = None;
                self.store(i, self.operand(i, x)?.wrapping_neg())?;
            }
            Mnemonic::Cmp => {
                let (a, b) = (self.operand(i, x)?, self.operand(i, y)?);
                self.compare(a.wrapping_sub(b), (a as i64) < b as i64);
            }
            Mnemonic::Test => {
                let both = self.operand(i, x)? & self.operand(i, y)?;
                self.compare(both, (both as i64) < 0);
            }
            Mnemonic::Setl => self.store(i, self.asked()?.less.into())?,
            Mnemonic::Setle => {
                let flags = self.asked()?;
                self.store(i, (flags.less || flags.zero).into())?;
            }
            Mnemonic::Sete => self.store(i, self.asked()?.zero.into())?,
            Mnemonic::Setne => self.store(i, (!self.asked()?.zero).into())?,
            Mnemonic::Jmp => self.branch(i, true),
            Mnemonic::Je => self.branch(i, self.asked()?.zero),
            Mnemonic::Jne => self.branch(i, !self.asked()?.zero),
            Mnemonic::Ret => self.next = self.pop()?,
            Mnemonic::Push => {
                let (number, _) = place(i.op_register(0))?;
                self.push(self.general[number].unwrap_or(Self::secret(number)))?;
            }
            Mnemonic::Pop => {
                let (number, value) = (place(i.op_register(0))?.0, self.pop()?);
                self.general[number] = (value != Self::secret(number)).then_some(value);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The number of a register and the bits that it names.
fn place(register: Register) -> Result<(usize, u64), Fault> {
    let low = match number(register, Register::AL, 4) {
        Some(n) => Some(n),
        None => number(register, Register::SPL, 12).map(|n| n + 4),
    };
    let half = number(register, Register::EAX, 16).map(|n| (n, 0xffff_ffff));
    let whole = number(register, Register::RAX, 16).map(|n| (n, u64::MAX));
    let found = low.map(|n| (n, 0xff)).or(half).or(whole);
    found.ok_or_else(|| format!("{register:?} is no general register"))
}
