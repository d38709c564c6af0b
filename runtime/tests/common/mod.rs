//! Kernels written by hand, so that the runtime is tested without the compiler.

use std::sync::Arc;

use kiln_runtime::artifact::{Artifact, Constants};
use kiln_runtime::code::Code;
use kiln_runtime::plan::{Place, Plan, Port, Step};
use kiln_runtime::pool::Pool;
use kiln_runtime::session::Executable;
use kiln_runtime::tensor::DType;
use kiln_runtime::work::Work;

/// `c[i] = a[i] + b[i]` in f32, for `i` in `begin..end`; buffers a, b, c.
#[rustfmt::skip]
pub const ADD: &[u8] = &[
    0x48, 0x8b, 0x07,                   // mov rax, [rdi]
    0x48, 0x8b, 0x4f, 0x08,             // mov rcx, [rdi + 8]
    0x4c, 0x8b, 0x47, 0x10,             // mov r8, [rdi + 16]
    0x48, 0x39, 0xd6,                   // cmp rsi, rdx
    0x7d, 0x15,                         // jge ret
    0xf3, 0x0f, 0x10, 0x04, 0xb0,       // movss xmm0, [rax + rsi * 4]
    0xf3, 0x0f, 0x58, 0x04, 0xb1,       // addss xmm0, [rcx + rsi * 4]
    0xf3, 0x41, 0x0f, 0x11, 0x04, 0xb0, // movss [r8 + rsi * 4], xmm0
    0x48, 0xff, 0xc6,                   // inc rsi
    0xeb, 0xe6,                         // jmp cmp
    0xc3,                               // ret
];

/// Number of elements of the tensors of [`executable`].
pub const N: usize = 1000;

/// `y = (a + b) + 0.5` in two steps through the arena, each in `chunks` chunks.
pub fn executable(threads: usize, chunks: i64) -> Executable {
    let port = |name: &str| Port::new(name, DType::F32, &[10, N / 10]);
    let step = |name: &str, buffers| Step {
        name: name.into(),
        kernel: 0,
        work: 0,
        buffers,
        extent: N as i64,
        chunks,
    };
    let plan = Plan {
        states: Vec::new(),
        dims: Vec::new(),
        inputs: vec![port("a"), port("b")],
        outputs: vec![port("y")],
        steps: vec![
            step("add", vec![Place::Input(0), Place::Input(1), Place::Arena(64)]),
            step("bias", vec![Place::Arena(64), Place::Const(0), Place::Output(0)]),
        ],
        work: vec![Work::default()],
        arena_bytes: 64 + 4 * N,
    };
    let code = Code::load(ADD, vec![0]).expect("code loads");
    let constants = Constants::from_bytes(bytemuck::cast_slice(&[0.5f32; N]));
    let pool = Arc::new(Pool::new(threads).expect("threads"));
    // SAFETY: the kernel adds two buffers of N elements into a third.
    unsafe { Executable::new(Artifact { plan, code, constants }, pool) }.expect("a sound plan")
}
