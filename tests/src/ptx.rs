//! Models for GPUs, run by the interpreter of PTX.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln::backend::cuda::Gpu;
use kiln::graph::Graph;
use kiln::loops::ir::DIMS;
use kiln::plan::kernels::{Program, Source};
use kiln::tensor::Tensor;
use kiln::{Compiler, Cuda};
use kiln_ptx::{Copies, Counts, Memory, Module, launch, parse};

/// The outputs of a graph that was compiled for a GPU.
pub fn run(graph: &Graph, inputs: &[Tensor], compiler: &Compiler) -> Result<Vec<Tensor>, String> {
    let gpu = Gpu::of(80).ok_or("the least of GPUs")?;
    let cuda = compiler.cuda_of(graph, gpu).map_err(|e| e.to_string())?;
    run_text(&cuda, &parse(&cuda.module.text)?, inputs)
}

/// The same by a text that may be another than the compiler's. Copies that run beside other work
/// are done as late as they may be; where there are any, as early as well.
pub fn run_text(cuda: &Cuda, module: &Module, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let (late, _) = run_with(cuda, module, Copies::Late, inputs)?;
    let copies =
        |kernel: &kiln_ptx::Kernel| kernel.code.iter().any(|i| i.text.contains("cp.async"));
    if module.kernels.iter().any(copies) {
        let (early, _) = run_with(cuda, module, Copies::Early, inputs)?;
        if early.iter().zip(&late).any(|(a, b)| a.bytes() != b.bytes()) {
            return Err("results hang on when copies are done".into());
        }
    }
    Ok(late)
}

/// What all launches of a graph do, for these inputs.
pub fn counts(cuda: &Cuda, inputs: &[Tensor]) -> Result<Counts, String> {
    Ok(run_with(cuda, &parse(&cuda.module.text)?, Copies::Late, inputs)?.1)
}

fn run_with(
    cuda: &Cuda,
    module: &Module,
    copies: Copies,
    inputs: &[Tensor],
) -> Result<(Vec<Tensor>, Counts), String> {
    let (graph, program) = (&cuda.kernels, &cuda.program);
    let mut memory = memory(graph, program, inputs);
    let mut counts = Counts::default();
    for step in &program.launches {
        let (kernel, entry) = (&module.kernels[step.kernel], &cuda.module.entries[step.kernel]);
        if kernel.name != entry.name {
            return Err(format!("{} where {} is expected", kernel.name, entry.name));
        }
        let grid = (entry.blocks, entry.threads);
        counts += launch(kernel, grid, copies, &mut memory, &step.slots)
            .map_err(|fault| format!("{}: {fault}", step.name))?;
    }
    let output = |((name, id), slot): (&(String, _), &usize)| {
        let ty = graph.ty(*id);
        let bytes = memory[*slot].bytes().map_err(|why| format!("output {name}: {why}"))?;
        Tensor::from_bytes(ty.dtype, &ty.shape, bytes).ok_or(format!("the size of output {name}"))
    };
    let outputs: Result<Vec<Tensor>, String> =
        graph.outputs.iter().zip(&program.outputs).map(output).collect();
    Ok((outputs?, counts))
}

/// All memory of a program before it runs. What kernels write is not known.
fn memory(graph: &Graph, program: &Program, inputs: &[Tensor]) -> Vec<Memory> {
    let slots = program.slots.iter().map(|slot| match slot.source {
        Source::Input(i) => Memory::given(inputs[i].bytes()),
        Source::Const(i) => Memory::given(&graph.constants[i].bytes),
        Source::Dims => {
            let mut dims: Vec<i64> = graph.dims.iter().map(|dim| dim.most as i64).collect();
            dims.resize(DIMS, 0);
            Memory::given(&dims.iter().flat_map(|d| d.to_le_bytes()).collect::<Vec<u8>>())
        }
        Source::Made => Memory::fresh(slot.bytes),
    });
    slots.collect()
}

/// The assembler of PTX, where `tests/run` has fetched it.
pub fn assembler() -> Option<PathBuf> {
    crate::oracle("ptxas").map(|folder| folder.join("ptxas"))
}

/// Assembles a text for a version of the instruction set, such as `90a`. Gives what the assembler
/// says of registers and memory; warnings and spills are errors.
pub fn assemble(ptxas: &Path, text: &str, sm: &str) -> Result<String, String> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("model.ptx"), text).map_err(|e| e.to_string())?;
    let mut command = Command::new(ptxas);
    command.args(["-v", "-arch", &format!("sm_{sm}"), "-o"]).arg(path("model.cubin"));
    let output = command.arg(path("model.ptx")).output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    let spills = |line: &str| line.contains("spill") && !line.contains("0 bytes spill stores, 0 ");
    let bad = |line: &&str| line.contains("warning") || line.contains("error") || spills(line);
    match said.lines().find(bad) {
        _ if !output.status.success() => Err(said),
        Some(line) => Err(line.to_string()),
        None => Ok(said),
    }
}
