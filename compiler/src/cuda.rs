//! Compiling for GPUs: the same pipeline to text, and to all that it takes to run it.

use kiln_runtime::gpu::{GpuArtifact, Kernel, Module};
use kiln_runtime::manifest::Hash;

use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Entry, Gpu};
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::graph::scalar::Dots;
use crate::graph::verify::verify;
use crate::loops::ir::Loops;
use crate::plan::kernels::{Program, program, program_folded};
use crate::{CacheUse, Compiler, Form, Kind, Model, Package, cache, compile, package};

/// A model as text for a GPU.
#[derive(Clone, Debug)]
pub struct Cuda {
    /// Its graph of kernels.
    pub kernels: Graph,
    /// Their loops, launches and memory.
    pub program: Program,
    /// Their text; entries are in the order of the program's kernels.
    pub module: cuda::Module,
}

impl Compiler {
    /// A model as PTX text for a GPU, with all that a launch of its kernels needs.
    pub fn cuda(&self, model: &Model, gpu: Gpu) -> Result<Cuda> {
        self.cuda_of(&self.graph_for_ranges(model)?, gpu)
    }

    /// The same from a graph on.
    pub fn cuda_of(&self, graph: &Graph, gpu: Gpu) -> Result<Cuda> {
        let kernels = self.optimise_cuda(graph)?;
        let program = program(&verify(kernels.clone())?, gpu.target())?;
        let module = cuda::emit_all(&program.kernels, gpu)?;
        Ok(Cuda { kernels, program, module })
    }

    /// A model for GPUs that have one of these versions of the instruction set or a later one.
    ///
    /// # Errors
    /// As [`compile`](Self::compile), and where a kernel has no PTX.
    pub fn compile_cuda(&self, model: &Model, gpus: &[Gpu]) -> Result<GpuArtifact> {
        Ok(self.compile_cuda_through_cache(model, &self.graph_for_ranges(model)?, gpus)?.0)
    }

    /// The same from the graph of a model on, and what the [`cache`](Self::cache) did for it.
    ///
    /// # Errors
    /// As [`compile_cuda`](Self::compile_cuda), and where the folder cannot be used.
    pub fn compile_cuda_through_cache(
        &self,
        model: &Model,
        graph: &Graph,
        gpus: &[Gpu],
    ) -> Result<(GpuArtifact, CacheUse)> {
        let Some(folder) = &self.cache else {
            return Ok((self.compile_cuda_of(graph, gpus)?, CacheUse::Off));
        };
        let key = cache::key(graph, (self.budget(), self.exact), self.precision, &gpus);
        cache::compile_cuda(folder, &key, |name| {
            let form = Form::new(Kind::Shared, name);
            let artifact = self.compile_cuda_of(graph, gpus)?;
            Ok(package::gpu::package(artifact, model.hash(), &form)?.file)
        })
    }

    /// The same from a graph on. Kernels are lowered for the earliest version, and emitted for all:
    /// they share the plan, its memory and the constants.
    pub fn compile_cuda_of(&self, graph: &Graph, gpus: &[Gpu]) -> Result<GpuArtifact> {
        self.build_cuda(&self.optimise_cuda(graph)?, gpus)
    }

    /// The graph as kernels for GPUs.
    pub fn optimise_cuda(&self, graph: &Graph) -> Result<Graph> {
        // Bytes and short floats are multiplied as they are, by warps.
        let rounded = Some(self.precision.dtype()).filter(|dtype| dtype.is_rounded());
        let dots = Dots { whole: true, rounded, warps: true };
        self.fused(graph, dots)
    }

    /// A graph of kernels for GPUs.
    ///
    /// # Errors
    /// As [`compile_cuda`](Self::compile_cuda).
    pub fn build_cuda(&self, kernels: &Graph, gpus: &[Gpu]) -> Result<GpuArtifact> {
        let mut gpus = gpus.to_vec();
        gpus.sort_by_key(|gpu| gpu.sm);
        gpus.dedup();
        let Some(first) = gpus.first() else {
            let diagnostic = Diagnostic::new("K0702", "no version of the instruction set");
            return Err(Error::new(ErrorKind::Usage, diagnostic.help("give --sm, such as 80")));
        };
        // Constants have the same bits on every machine that compiles: 128 bits are everywhere.
        let here = Cpu::host(false);
        let program = program_folded(&verify(kernels.clone())?, first.target(), here.target())?;
        let folding = compile::emit_constants(&program, &here, self.verify_code)?;
        let (plan, constants) = compile::assemble(kernels, &program, &folding, self.threads)?;
        let (plan, kept) = package::used(&plan);
        let loops: Vec<Loops> = kept.iter().map(|&k| program.kernels[k].clone()).collect();
        let (mut text, mut modules) = (Vec::new(), Vec::new());
        for gpu in gpus {
            let module = cuda::emit_all(&loops, gpu)?;
            let start = text.len();
            text.extend(module.text.into_bytes());
            // The driver reads up to a zero.
            text.push(0);
            let kernels = module.entries.iter().map(kernel).collect::<Result<Vec<Kernel>>>()?;
            modules.push(Module { sm: gpu.sm, text: start..text.len(), kernels });
        }
        Ok(GpuArtifact { plan, text, modules, constants })
    }

    /// A model that was compiled for GPUs as a file.
    ///
    /// # Errors
    /// As [`compile_cuda`](Self::compile_cuda).
    pub fn package_cuda(&self, model: &Model, gpus: &[Gpu], form: &Form) -> Result<Package> {
        package::gpu::package(self.compile_cuda(model, gpus)?, model.hash(), form)
    }

    /// The same from a graph on; the file says that it was made from a model of that hash.
    ///
    /// # Errors
    /// As [`compile_cuda`](Self::compile_cuda).
    pub fn package_cuda_of(
        &self,
        graph: &Graph,
        model_hash: Hash,
        gpus: &[Gpu],
        form: &Form,
    ) -> Result<Package> {
        package::gpu::package(self.compile_cuda_of(graph, gpus)?, model_hash, form)
    }
}

/// What a launch of a kernel takes.
fn kernel(entry: &Entry) -> Result<Kernel> {
    let number = |what: &str, number: usize| {
        u32::try_from(number).map_err(|_| {
            let diagnostic = Diagnostic::new("K0701", format!("{number} {what} of a kernel"));
            Error::new(ErrorKind::Model, diagnostic.node(entry.name.clone()))
        })
    };
    Ok(Kernel {
        name: entry.name.clone(),
        blocks: number("blocks", entry.blocks)?,
        threads: number("threads", entry.threads)?,
        shared: number("bytes of shared memory", entry.shared)?,
    })
}
