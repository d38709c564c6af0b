//! Kiln: a tensor compiler. It takes a trained network and makes machine code of it.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let x = kiln::tensor::Tensor::zeros(kiln::tensor::DType::F32, &[1, 3, 224, 224]);
//! let model = kiln::Model::open("resnet50.onnx", &kiln::Limits::default())?;
//! let executable = kiln::Compiler::new().threads(2).compile(&model)?;
//! let outputs = executable.run(&[("data", x.view())])?;
//! # Ok(())
//! # }
//! ```
//!
//! The pipeline is [`Compiler::compile`]: import, optimise, lower, emit, assemble.

pub mod backend;
mod cache;
mod compile;
mod cuda;
pub mod error;
pub mod graph;
mod load;
pub mod loops;
mod model;
mod on_demand;
pub mod onnx;
mod package;
pub mod plan;
mod precision;
mod ranges;
pub mod rules;
mod stages;
mod states;

#[cfg(test)]
mod tests;

pub use cache::CacheUse;
pub use cuda::Cuda;
pub use half;
pub use kiln_runtime::load::ArtifactFile;
pub use kiln_runtime::session::{Executable, RunError, Session};
pub use kiln_runtime::{code, gpu, manifest, npz, tensor, work};
pub use load::{is_artifact, is_cuda_artifact, load, load_cuda, load_opened, open_artifact};
pub use model::{Dim, DimRange, Limits, Model, ModelNode, ModelPort, read_tensor_pb};
pub use on_demand::{OnDemand, RunWith};
pub use package::{Form, Kind, Package, identifier};
pub use precision::Precision;

use std::path::PathBuf;
use std::sync::Arc;

use backend::cpu::{Cpu, Emitted, emit_all};
use error::{Diagnostic, Error, ErrorKind, Result};
use graph::Graph;
use graph::op::Op;
use graph::scalar::Dots;
use graph::verify::verify;
use kiln_runtime::artifact::Constants;
use kiln_runtime::plan::Plan;
use loops::lower::Target;
use manifest::Hash;
use onnx::{Known, Later};
use plan::kernels::{Program, program};
use rules::Budget;

/// How a model is compiled. Cheap to clone; every method gives a changed copy.
#[derive(Clone, Debug)]
pub struct Compiler {
    threads: usize,
    egraph: bool,
    wide: bool,
    exact: bool,
    precision: Precision,
    target: Option<Cpu>,
    verify_code: bool,
    limits: Limits,
    kept_bytes: usize,
    dims: Vec<(String, DimRange)>,
    shapes: Vec<(String, Vec<usize>)>,
    values: Vec<(String, tensor::Tensor)>,
    states: Vec<(String, String)>,
    cache: Option<PathBuf>,
    /// What earlier stages of the model have made, where it is compiled in stages.
    known: Option<Arc<Known>>,
    /// Whether the tensors that this is a compiler for need stages.
    staged: bool,
}

impl Default for Compiler {
    fn default() -> Compiler {
        Compiler::new()
    }
}

impl Compiler {
    /// The default: one thread, all optimisation, this CPU.
    pub fn new() -> Compiler {
        Compiler {
            threads: 1,
            egraph: true,
            wide: true,
            exact: false,
            precision: Precision::F32,
            target: None,
            verify_code: cfg!(debug_assertions),
            limits: Limits::default(),
            kept_bytes: 1 << 30,
            dims: Vec::new(),
            shapes: Vec::new(),
            values: Vec::new(),
            states: Vec::new(),
            cache: None,
            known: None,
            staged: false,
        }
    }

    /// Threads of the executable's own pool, at least 1.
    pub fn threads(self, threads: usize) -> Compiler {
        Compiler { threads: threads.max(1), ..self }
    }

    /// Whether the e-graph optimises; without it, the greedy fuser works on the model as it is.
    pub fn egraph(self, egraph: bool) -> Compiler {
        Compiler { egraph, ..self }
    }

    /// Whether vectors wider than 128 bits may be used.
    pub fn wide(self, wide: bool) -> Compiler {
        Compiler { wide, ..self }
    }

    /// Whether convolutions sum the products that the model writes down, and not fewer others
    /// (Winograd's minimal filtering, whose results differ by some 1e-5 of their size, and whose
    /// weights take up to four times the memory).
    pub fn exact_convolutions(self, exact: bool) -> Compiler {
        Compiler { exact, ..self }
    }

    /// What the operands of products with weights are rounded to; all else is computed as the model
    /// says, and sums are f32. With bf16 and f16, weights take half the memory. GPUs multiply all
    /// of them by their units for matrices, CPUs with AVX512_BF16 multiply bf16 twice as fast;
    /// elsewhere they are only rounded.
    pub fn precision(self, precision: Precision) -> Compiler {
        Compiler { precision, ..self }
    }

    /// The CPU that code is made for; by default the one that this runs on.
    pub fn target(self, cpu: Cpu) -> Compiler {
        Compiler { target: Some(cpu), ..self }
    }

    /// Whether the code generator's own verifier runs, which takes a third more time.
    pub fn verify_code(self, verify_code: bool) -> Compiler {
        Compiler { verify_code, ..self }
    }

    /// Bytes that specialisations on demand may take together: when they are more, the one unused
    /// for longest goes. 1 GiB where nothing is said.
    pub fn kept_bytes(self, kept_bytes: usize) -> Compiler {
        Compiler { kept_bytes, ..self }
    }

    /// Limits on the model.
    pub fn limits(self, limits: Limits) -> Compiler {
        Compiler { limits, ..self }
    }

    /// The extent of a dim that the model names.
    pub fn dim(self, name: &str, extent: usize) -> Compiler {
        self.dim_range(name, extent..=extent)
    }

    /// What a dim that the model names may be. Where nothing settles it, it is the most.
    pub fn dim_range(mut self, name: &str, range: impl Into<DimRange>) -> Compiler {
        self.dims.push((name.to_string(), range.into()));
        self
    }

    /// The shape of an input, which settles the dims that the model names there.
    pub fn shape(mut self, name: &str, shape: &[usize]) -> Compiler {
        self.shapes.push((name.to_string(), shape.to_vec()));
        self
    }

    /// Makes an input of the model a constant, as where it decides a shape.
    pub fn value(mut self, name: &str, value: tensor::Tensor) -> Compiler {
        self.values.push((name.to_string(), value));
        self
    }

    /// Makes an output the next value of an input: sessions keep it, and neither is given any more.
    /// A `*` in both names stands for the same text, as in `past_*` and `present_*`. Where the
    /// output is the input with more behind it, along an axis that has the length of a dim with a
    /// range, it is appended to where it lies.
    pub fn state(mut self, input: &str, output: &str) -> Compiler {
        self.states.push((input.to_string(), output.to_string()));
        self
    }

    /// Keeps what is compiled in this folder, and takes it from there the next time. Code is
    /// loaded from it: it must belong to this user, and nobody else may write it.
    pub fn cache(self, folder: impl Into<PathBuf>) -> Compiler {
        Compiler { cache: Some(folder.into()), ..self }
    }

    /// The CPU that code is made for.
    pub fn cpu(&self) -> Cpu {
        let cpu = match (&self.target, self.wide) {
            (None, wide) => Cpu::host(wide),
            (Some(cpu), true) => cpu.clone(),
            (Some(cpu), false) => cpu.clone().narrow(),
        };
        match self.precision {
            Precision::Bf16 => cpu,
            Precision::F32 | Precision::F16 | Precision::Tf32 => cpu.without_halves(),
        }
    }

    /// Compiles a model for this machine. The whole pipeline, stage by stage.
    pub fn compile(&self, model: &Model) -> Result<Executable> {
        Ok(self.compile_through_cache(model)?.0)
    }

    /// The same, and what the [`cache`](Self::cache) did for it.
    pub fn compile_through_cache(&self, model: &Model) -> Result<(Executable, CacheUse)> {
        self.find_or_build(model, &self.graph(model)?)
    }

    /// Optimises and builds the graph of a model, unless the cache has it.
    fn find_or_build(&self, model: &Model, graph: &Graph) -> Result<(Executable, CacheUse)> {
        let Some(folder) = &self.cache else {
            return Ok((self.build(&self.optimise(graph)?)?, CacheUse::Off));
        };
        let cpu = self.cpu();
        cpu.must_run_here()?;
        let key = cache::key(graph, (self.budget(), self.exact), self.precision, &cpu);
        cache::compile(folder, &key, self.threads, |name| {
            let form = Form::new(Kind::Shared, name);
            Ok(self.package_of(graph, model.hash(), &form)?.file)
        })
    }

    /// The same for all lengths of dims within their ranges (`dim_range`): one executable that
    /// takes tensors of any of these shapes, in memory for the longest.
    ///
    /// # Errors
    /// As [`compile`](Self::compile), and where a node needs the length of a dim as a number.
    pub fn compile_ranges(&self, model: &Model) -> Result<Executable> {
        Ok(self.find_or_build(model, &self.graph_for_ranges(model)?)?.0)
    }

    /// The graph of a model for all lengths of dims within their ranges, rounded as `precision`
    /// says.
    pub fn graph_for_ranges(&self, model: &Model) -> Result<Graph> {
        if self.dims.iter().all(|(_, range)| range.least == range.most) {
            return self.graph(model);
        }
        let dims = model.settle(&self.shapes, &self.dims)?;
        let graph = model.import_ranges(&self.limits, dims, &self.dims, &self.values)?;
        Ok(self.rounded(states::keep(graph, &self.states)?))
    }

    /// The graph of a model, rounded as `precision` says.
    pub fn graph(&self, model: &Model) -> Result<Graph> {
        Ok(self.stage(model)?.0)
    }

    /// The same, with what follows where it is one of several stages.
    fn stage(&self, model: &Model) -> Result<(Graph, Option<Later>)> {
        let dims = model.settle(&self.shapes, &self.dims)?;
        let known = self.known.clone();
        let (graph, later) = model.import(&self.limits, dims, &self.shapes, &self.values, known)?;
        Ok((self.rounded(states::keep(graph, &self.states)?), later))
    }

    /// A graph with the operands of its products rounded as [`precision`](Self::precision) says:
    /// graphs of models are so already.
    pub fn rounded(&self, graph: Graph) -> Graph {
        precision::rounded(graph, self.precision, self.exact)
    }

    /// The graph as kernels.
    pub fn optimise(&self, graph: &Graph) -> Result<Graph> {
        self.fused(graph, self.cpu().wanted_dots())
    }

    /// What the e-graph may grow to, where there is one.
    pub fn budget(&self) -> Option<Budget> {
        self.egraph.then(|| Budget { nodes: self.limits.max_egraph, ..Budget::default() })
    }

    /// The graph as kernels, where these are not too many.
    fn fused(&self, graph: &Graph, dots: Dots) -> Result<Graph> {
        let fused = rules::optimise(graph, self.budget(), dots)?.graph;
        let kernels = fused.nodes.iter().filter(|node| matches!(node.op, Op::Fused(_))).count();
        if kernels > self.limits.max_kernels {
            let diagnostic = Diagnostic::new("K0104", "the model has too many kernels")
                .expected(format!("at most {}", self.limits.max_kernels))
                .found(kernels.to_string())
                .help("--max-kernels raises it");
            return Err(Error::new(ErrorKind::Limit, diagnostic));
        }
        Ok((*fused).clone())
    }

    /// The loops of a graph of kernels.
    pub fn lower(&self, kernels: &Graph) -> Result<Program> {
        let target = Target { exact: self.exact, ..self.cpu().target() };
        program(&verify(kernels.clone())?, target)
    }

    /// The executable of a graph of kernels and its loops.
    pub fn emit(&self, kernels: &Graph, program: &Program) -> Result<Executable> {
        let cpu = self.cpu().best_here().clone();
        cpu.must_run_here()?;
        let emitted = emit_all(&program.kernels, &cpu, self.verify_code, false)?;
        let (plan, constants) = self.assemble(kernels, program, &cpu, &emitted)?;
        compile::load(&emitted, plan, constants, self.threads)
    }

    /// The plan of a program and the constants that it reads; `emitted` is code for `cpu`.
    fn assemble(
        &self,
        kernels: &Graph,
        program: &Program,
        cpu: &Cpu,
        emitted: &Emitted,
    ) -> Result<(Plan, Constants)> {
        if cpu.runs_here() {
            return compile::assemble(kernels, program, emitted, self.threads);
        }
        let here = compile::emit_constants(program, &cpu.stand_in(), self.verify_code)?;
        compile::assemble(kernels, program, &here, self.threads)
    }

    /// The executable of a graph of kernels.
    pub fn build(&self, kernels: &Graph) -> Result<Executable> {
        self.emit(kernels, &self.lower(kernels)?)
    }

    /// A compiled model as a file that a program can load or link, with its C header.
    pub fn package(&self, model: &Model, form: &Form) -> Result<Package> {
        self.package_of(&self.graph_for_ranges(model)?, model.hash(), form)
    }

    /// The same from a graph on; the file says that it was made from a model of that hash.
    pub fn package_of(&self, graph: &Graph, model_hash: Hash, form: &Form) -> Result<Package> {
        let kernels = self.optimise(graph)?;
        let program = self.lower(&kernels)?;
        let cpu = self.cpu();
        let mut sets = Vec::new();
        for cpu in cpu.faster.iter().chain([&cpu]) {
            sets.push((cpu.clone(), emit_all(&program.kernels, cpu, self.verify_code, false)?));
        }
        let best = sets.iter().find(|set| set.0.runs_here()).unwrap_or(&sets[sets.len() - 1]);
        let (plan, constants) = self.assemble(&kernels, &program, &best.0, &best.1)?;
        let contents = package::Contents { plan: &plan, sets: &sets, constants, model_hash };
        package::package(contents, form, self.verify_code)
    }

    /// Every stage as text.
    pub fn stages(&self, model: &Model) -> Result<Stages> {
        self.stages_of(&self.graph_for_ranges(model)?)
    }

    /// The same from a graph on.
    pub fn stages_of(&self, graph: &Graph) -> Result<Stages> {
        let kernels = self.optimise(graph)?;
        let cpu = self.cpu();
        let program = self.lower(&kernels)?;
        let emitted = emit_all(&program.kernels, &cpu, self.verify_code, true)?;
        let (plan, _) = self.assemble(&kernels, &program, &cpu, &emitted)?;
        Ok(Stages {
            graph: graph::text::print(graph),
            fused: graph::text::print(&kernels),
            loops: program.kernels.iter().map(loops::text::print).collect(),
            plan: plan.to_string(),
            clif: emitted.clif,
            asm: emitted.asm,
        })
    }
}

/// The stages of a compilation, for people and tests.
#[derive(Clone, Debug)]
pub struct Stages {
    /// The imported graph.
    pub graph: String,
    /// The graph of kernels.
    pub fused: String,
    /// The loops of each kernel.
    pub loops: String,
    /// Cranelift's text.
    pub clif: String,
    /// Disassembly.
    pub asm: String,
    /// Order, memory and threads.
    pub plan: String,
}

/// Runs a graph by the reference interpreter: slow and obviously right.
pub fn interpret(graph: &Graph, inputs: &[tensor::Tensor]) -> Vec<tensor::Tensor> {
    let inputs: Vec<graph::eval::Value> =
        inputs.iter().map(graph::eval::Value::from_tensor).collect();
    graph::eval::eval(graph, &inputs).iter().map(graph::eval::Value::to_tensor).collect()
}
