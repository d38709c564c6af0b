//! Code for GPUs: PTX text of the same loops as for CPUs, by the same walk (`backend/emit.rs`).
//!
//! Parallel loops have a thread for each turn. A schedule that wants more says so in the loops:
//! blocks, threads in them, shared memory (`loops/gpu.rs`).

mod arithmetic;
pub mod isa;
mod join;
mod kernel;
mod machine;
mod reuse;
mod warp;

use std::fmt::Write as _;

use kiln_runtime::gpu::runs;

use self::isa::{CLASSES, Inst};
use self::kernel::{Layout, Ptx};
use crate::backend::emit;
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::loops::ir::{Kind, Loops, Scope, Stmt};
use crate::loops::lower::Target;

/// What PTX text is made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gpu {
    /// Version of the instruction set, such as 80.
    pub sm: u32,
    /// Its name in the text. What has this version or a later one can run the text; where the name
    /// ends in `a`, this version only.
    target: &'static str,
    /// Version of PTX.
    version: &'static str,
    /// Bytes of shared memory that a block can have without asking for more.
    shared: usize,
}

/// The instruction sets that text can be made for.
const GPUS: [Gpu; 2] = [
    Gpu { sm: 80, target: "sm_80", version: "7.4", shared: 48 << 10 },
    Gpu { sm: 90, target: "sm_90a", version: "8.0", shared: 48 << 10 },
];

/// Threads of a block, where nothing says how many.
const THREADS: usize = 256;

impl Gpu {
    /// The one of a version, such as 80.
    pub fn of(sm: u32) -> Option<Gpu> {
        GPUS.into_iter().find(|gpu| gpu.sm == sm)
    }

    /// The latest one whose text a device of that version can run.
    pub fn for_device(sm: u32) -> Option<Gpu> {
        GPUS.into_iter().filter(|gpu| runs(gpu.sm, sm)).max_by_key(|gpu| gpu.sm)
    }

    /// Versions that there are.
    pub fn known() -> Vec<u32> {
        GPUS.iter().map(|gpu| gpu.sm).collect()
    }

    /// What lowering needs to know.
    pub fn target(self) -> Target {
        // Sums are those of the products of the model: Winograd's kernels are for lanes.
        Target { lanes: 1, registers: 64, exact: true, halves: false, threads: THREADS }
    }
}

/// One kernel of a module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Its name in the text.
    pub name: String,
    /// Blocks of a launch.
    pub blocks: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of shared memory of a block.
    pub shared: usize,
}

/// PTX text and what is in it.
#[derive(Clone, Default, Debug)]
pub struct Module {
    /// The text.
    pub text: String,
    /// A kernel for each one of the program, whose parameters are its global buffers in order.
    pub entries: Vec<Entry>,
}

/// Emits every kernel.
pub fn emit_all(kernels: &[Loops], gpu: Gpu) -> Result<Module> {
    let mut module = Module {
        text: format!(".version {}\n.target {}\n.address_size 64\n", gpu.version, gpu.target),
        entries: Vec::new(),
    };
    let mut problems = Vec::new();
    for (number, kernel) in kernels.iter().enumerate() {
        match entry(kernel, number, gpu, &mut module.text) {
            Ok(entry) => module.entries.push(entry),
            Err(why) => problems.push(
                Diagnostic::new("K0701", "the CUDA backend cannot emit a kernel")
                    .node(kernel.name.clone())
                    .found(why.0)
                    .help("an operation or dtype that has no PTX yet; cast to f32 if you can"),
            ),
        }
    }
    match problems.is_empty() {
        true => Ok(module),
        false => Err(Error { kind: ErrorKind::Model, diagnostics: problems }),
    }
}

/// How a kernel is laid out.
fn layout(kernel: &Loops) -> emit::Emitted<Layout> {
    let most = |n: usize| u32::try_from(n).ok().filter(|n| *n <= i32::MAX as u32);
    let too_many = |turns| emit::Unsupported(format!("{turns} turns at once"));
    let turns = kernel.parallel_extent();
    let blocks = matches!(kernel.body[..], [Stmt::For { kind: Kind::Block, .. }]);
    let threads = match blocks {
        true => threads_of(&kernel.body),
        false => turns.min(THREADS),
    };
    most(turns).ok_or_else(|| too_many(turns))?;
    Ok(Layout { blocks, turns, threads })
}

/// The most threads that loops over them take.
fn threads_of(body: &[Stmt]) -> usize {
    let of = |stmt: &Stmt| match stmt {
        Stmt::For { extent, kind: Kind::Thread, body, .. } => extent * threads_of(body),
        Stmt::For { body, .. } => threads_of(body),
        Stmt::Store { .. } | Stmt::Prefetch { .. } | Stmt::Multiply(_) => 1,
        Stmt::If { then, other, .. } => threads_of(then).max(threads_of(other)),
    };
    body.iter().map(of).max().unwrap_or(1)
}

/// A name that PTX allows.
fn symbol(number: usize, name: &str) -> String {
    let clean = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    format!("k{number}_{}", name.chars().take(60).map(clean).collect::<String>())
}

/// Writes one kernel.
fn entry(kernel: &Loops, number: usize, gpu: Gpu, text: &mut String) -> emit::Emitted<Entry> {
    let layout = layout(kernel)?;
    let mut ptx = Ptx::new(kernel, layout, kernel.lanes().unwrap_or(1));
    emit::emit(kernel, &mut ptx)?;
    ptx.code.push(Inst::Return);
    if ptx.shared > gpu.shared {
        let why = format!("{} bytes of shared memory, of {}", ptx.shared, gpu.shared);
        return Err(emit::Unsupported(why));
    }
    let name = symbol(number, &kernel.name);
    let count = kernel.buffers.iter().filter(|b| b.scope == Scope::Global).count();
    let params: Vec<String> = (0..count).map(|i| format!(".param .u64 b{i}")).collect();
    let _ = writeln!(text, "\n.visible .entry {name}({})", params.join(", "));
    let _ = writeln!(text, ".maxntid {}, 1, 1", layout.threads);
    if ptx.shared > 0 {
        // Else the assembler keeps some sums of a tile in memory, to have room for more blocks.
        text.push_str(".minnctapersm 1\n");
    }
    text.push_str("{\n");
    for (class, ty, prefix) in CLASSES {
        let count = ptx.counts[class as usize];
        if count > 0 {
            let _ = writeln!(text, "  .reg .{ty} {prefix}<{count}>;");
        }
    }
    if ptx.shared > 0 {
        let _ = writeln!(text, "  .shared .align 16 .b8 shared_memory[{}];", ptx.shared);
    }
    let mut code = join::join(std::mem::take(&mut ptx.code));
    if code.iter().any(|inst| matches!(inst, Inst::Copy(..))) {
        // What a thread has copied is there for the others after a barrier.
        code = code
            .into_iter()
            .flat_map(|inst| match inst {
                Inst::Barrier => vec![Inst::Wait, Inst::Barrier],
                inst => vec![inst],
            })
            .collect();
    }
    for inst in &code {
        let indent = if matches!(inst, Inst::Label(_)) { "" } else { "  " };
        let _ = writeln!(text, "{indent}{inst}");
    }
    text.push_str("}\n");
    let blocks = match layout.blocks {
        true => layout.turns,
        false => layout.turns.div_ceil(layout.threads),
    };
    Ok(Entry { name, blocks, threads: layout.threads, shared: ptx.shared })
}
