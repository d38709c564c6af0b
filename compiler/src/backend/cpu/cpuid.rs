//! Machine code that asks an x86-64 CPU whether it has what other code needs: artifacts ask before
//! they run, so that a CPU which lacks something is an error, never an illegal instruction.

use iced_x86::{Code, Encoder, IcedError, Instruction, OpKind, Register as R};

use super::features::{Bit, OSXSAVE, Register};
use super::target::Cpu;

/// Bits that `cpuid` has to give, and bits of XCR0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checks {
    /// Bits in the order of their questions, each once.
    pub bits: Vec<Bit>,
    /// State that the system has to save: bits of XCR0.
    pub state: u32,
}

/// What a CPU has to be asked; `None` where every one of the architecture will do.
pub fn checks(cpu: &Cpu) -> Option<Checks> {
    if cpu.features.is_empty() {
        return None;
    }
    let state = cpu.features.iter().fold(0, |state, f| state | f.state);
    let mut bits: Vec<Bit> = cpu.features.iter().map(|f| f.bit).collect();
    if state != 0 {
        bits.push(OSXSAVE);
    }
    bits.sort_unstable();
    bits.dedup();
    Some(Checks { bits, state })
}

/// The last question of its kind that a CPU answers is its first answer.
const KINDS: [u32; 2] = [0, 0x8000_0000];

/// A function without arguments that returns 1 as an i32 where all checks hold, else 0. It keeps
/// the registers that System V and Windows want kept, reads no memory, and runs anywhere.
pub fn supported(checks: &Checks) -> Vec<u8> {
    assemble(checks).expect("operands fit these instructions")
}

fn assemble(checks: &Checks) -> Result<Vec<u8>, IcedError> {
    let mut code = vec![Instruction::with1(Code::Push_r64, R::RBX)?];
    for kind in KINDS {
        let last = checks.bits.iter().map(|b| b.leaf).filter(|l| l & KINDS[1] == kind).max();
        if let Some(last) = last {
            ask(&mut code, kind, 0)?;
            code.push(Instruction::with2(Code::Cmp_EAX_imm32, R::EAX, last)?);
            code.push(Instruction::with_branch(Code::Jb_rel32_64, 0)?);
        }
    }
    for question in checks.bits.chunk_by(|a, b| (a.leaf, a.subleaf) == (b.leaf, b.subleaf)) {
        ask(&mut code, question[0].leaf, question[0].subleaf)?;
        for answer in question.chunk_by(|a, b| a.register == b.register) {
            let mask = answer.iter().fold(0u32, |mask, b| mask | (1 << b.bit));
            demand(&mut code, register(answer[0].register), mask)?;
        }
    }
    if checks.state != 0 {
        code.push(Instruction::with2(Code::Mov_r32_imm32, R::ECX, 0)?);
        code.push(Instruction::with(Code::Xgetbv));
        demand(&mut code, R::EAX, checks.state)?;
    }
    let mut result = |value: u32| -> Result<usize, IcedError> {
        let at = code.len();
        code.push(Instruction::with2(Code::Mov_r32_imm32, R::EAX, value)?);
        code.push(Instruction::with1(Code::Pop_r64, R::RBX)?);
        code.push(Instruction::with(Code::Retnq));
        Ok(at)
    };
    result(1)?;
    let fail = result(0)?;
    link(&mut code, fail)
}

/// All branches go to the failure; they have one size wherever that is.
fn link(code: &mut [Instruction], fail: usize) -> Result<Vec<u8>, IcedError> {
    let mut encoder = Encoder::new(64);
    let mut at = 0;
    let mut target = 0;
    for (i, instruction) in code.iter().enumerate() {
        if i == fail {
            target = at;
        }
        at += encoder.encode(instruction, 0)? as u64;
    }
    let _ = encoder.take_buffer();
    at = 0;
    for instruction in code {
        if instruction.op0_kind() == OpKind::NearBranch64 {
            instruction.set_near_branch64(target);
        }
        at += encoder.encode(instruction, at)? as u64;
    }
    Ok(encoder.take_buffer())
}

fn ask(code: &mut Vec<Instruction>, leaf: u32, subleaf: u32) -> Result<(), IcedError> {
    code.push(Instruction::with2(Code::Mov_r32_imm32, R::EAX, leaf)?);
    code.push(Instruction::with2(Code::Mov_r32_imm32, R::ECX, subleaf)?);
    code.push(Instruction::with(Code::Cpuid));
    Ok(())
}

fn demand(code: &mut Vec<Instruction>, register: R, mask: u32) -> Result<(), IcedError> {
    code.push(Instruction::with2(Code::And_rm32_imm32, register, mask)?);
    code.push(Instruction::with2(Code::Cmp_rm32_imm32, register, mask)?);
    code.push(Instruction::with_branch(Code::Jne_rel32_64, 0)?);
    Ok(())
}

fn register(register: Register) -> R {
    match register {
        Register::Eax => R::EAX,
        Register::Ebx => R::EBX,
        Register::Ecx => R::ECX,
        Register::Edx => R::EDX,
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::features::FEATURES;
    use super::*;

    fn call(checks: &Checks) -> bool {
        let code = kiln_runtime::code::Code::load(&supported(checks), vec![0]).unwrap();
        // SAFETY: the function takes no arguments and returns an i32.
        let f = unsafe {
            std::mem::transmute::<kiln_runtime::code::KernelFn, extern "C" fn() -> i32>(
                code.entry(0),
            )
        };
        match f() {
            0 => false,
            1 => true,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn this_machine_has_what_it_has() {
        assert!(call(&Checks::default()));
        assert!(call(&checks(&Cpu::host(true)).unwrap()));
        assert!(call(&checks(&Cpu::host(false)).unwrap()));
        for feature in FEATURES {
            let cpu = Cpu { features: vec![feature], ..Cpu::host(true) };
            assert_eq!(call(&checks(&cpu).unwrap()), feature.here(), "{}", feature.name);
        }
    }

    #[test]
    fn what_no_machine_answers_is_missing() {
        let bit = |leaf, register| Bit { leaf, subleaf: 0, register, bit: 31 };
        for leaf in [0x0fff_ffff, 0x8fff_ffff] {
            let bits = vec![bit(leaf, Register::Eax)];
            assert!(!call(&Checks { bits, state: 0 }));
        }
        // A bit of XCR0 that is reserved.
        assert!(!call(&Checks { bits: vec![OSXSAVE], state: 0x4000_0000 }));
    }

    #[test]
    fn each_question_is_asked_once() {
        let cpu = Cpu::named(Some("x86_64-unknown-linux-gnu"), Some("x86-64-v4")).unwrap();
        let checks = checks(&cpu).unwrap();
        assert_eq!((checks.bits.len(), checks.state), (20, 0xe6));
        let code = supported(&checks);
        let asked = code.windows(2).filter(|w| *w == [0x0f, 0xa2]).count();
        // What there is of each kind, and leaves 1, 7 and 0x80000001.
        assert_eq!(asked, 5);
        assert!(code.len() < 200, "{}", code.len());
    }
}
