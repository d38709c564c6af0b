//! Specialisation on demand: machine code is for numbers, models are for symbols. A model whose
//! axes have names, or whose shapes depend on the values of inputs, is compiled for those that it
//! meets, which takes milliseconds, and what was compiled is kept. One whose shapes depend on data
//! that it computes is compiled in stages.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kiln_runtime::tensor::{DType, Tensor, TensorView};

use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::model::Model;
use crate::onnx::{Body, Known, Later};
use crate::stages::{Step, through};
use crate::{Compiler, Executable, onnx};

/// Elements of an input whose values may decide shapes.
const SHAPE_ELEMENTS: usize = 1024;

/// A model that is compiled for the shapes it meets; clones share what was compiled.
///
/// ```no_run
/// # fn main() -> kiln::error::Result<()> {
/// # use kiln::tensor::{DType, Tensor};
/// let model = kiln::Model::open("bert.onnx", &kiln::Limits::default())?;
/// let bert = kiln::Compiler::new().dim_range("batch", 1..=8).on_demand(&model);
/// for batch in [1, 4, 1] {
///     let ids = Tensor::zeros(DType::I64, &[batch, 128]);
///     let outputs = bert.run(&[("input_ids", ids.view())])?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// What is compiled is an [`Executable`], or what [`Compiler::on_demand_with`] makes.
pub struct OnDemand<E = Executable>(Arc<Shared<E>>);

impl<E> Clone for OnDemand<E> {
    fn clone(&self) -> OnDemand<E> {
        OnDemand(self.0.clone())
    }
}

struct Shared<E> {
    compiler: Compiler,
    model: Model,
    compile: Arc<Compile<E>>,
    bytes: fn(&E) -> usize,
    /// What decides shapes, once tensors were seen.
    deciding: OnceLock<Deciding>,
    /// The latest used last.
    kept: Mutex<Vec<(Key, Kept<E>)>>,
    /// What cannot be compiled for any number of results of earlier stages, and why.
    refused: Mutex<Vec<(Key, Error)>>,
    /// Models that loops repeat, the latest last.
    bodies: Mutex<Vec<(Arc<Body>, OnDemand<E>)>>,
}

/// How many of these are remembered, and of models that loops repeat.
const REFUSED: usize = 256;
const BODIES: usize = 16;

/// Compiles a model for shapes that the compiler knows.
type Compile<E> = dyn Fn(&Compiler, &Model) -> Result<E> + Send + Sync;

/// Shape of each input, and its value where that decides shapes.
type Shapes = Vec<(Vec<usize>, Option<Vec<u8>>)>;

/// Shapes, and what earlier stages have made.
type Key = (Shapes, Option<Arc<Known>>);

/// What was compiled, and what follows where it is a stage of the model.
type Kept<E> = (E, Option<Arc<Later>>);

/// Tensors with the names of ports.
type Named = Vec<(String, Tensor)>;

/// Runs what was compiled on tensors given by name.
pub type RunWith<'r, E, X> =
    dyn Fn(&E, &[(&str, TensorView<'_>)]) -> std::result::Result<Named, X> + 'r;

/// What shapes hang on beside the shapes of inputs.
struct Deciding {
    /// Inputs whose values decide shapes.
    inputs: Vec<String>,
    /// Whether there is more: data that the model computes.
    staged: bool,
}

impl OnDemand {
    /// Runs the model on tensors given by name, compiled for their shapes.
    ///
    /// # Errors
    /// When an input is missing, unknown or does not fit, and where the model cannot be compiled
    /// for these shapes.
    pub fn run(&self, inputs: &[(&str, TensorView<'_>)]) -> Result<Named> {
        self.run_with(inputs, &|executable, inputs| {
            executable.run(inputs).map_err(|e| usage(Diagnostic::new("K0701", e.to_string())))
        })
    }
}

impl<E> OnDemand<E> {
    fn new(
        compiler: Compiler,
        model: Model,
        compile: Arc<Compile<E>>,
        bytes: fn(&E) -> usize,
    ) -> OnDemand<E> {
        OnDemand(Arc::new(Shared {
            compiler,
            model,
            compile,
            bytes,
            deciding: OnceLock::new(),
            kept: Mutex::default(),
            refused: Mutex::default(),
            bodies: Mutex::default(),
        }))
    }
}

impl<E: Clone> OnDemand<E> {
    /// The model.
    pub fn model(&self) -> &Model {
        &self.0.model
    }

    /// Runs the model where `run` runs what was compiled on tensors given by name, and gives its
    /// outputs in order. That is more than once where shapes hang on data that the model computes.
    ///
    /// # Errors
    /// When an input is missing or unknown, where the model cannot be compiled for these shapes,
    /// and those of `run`.
    pub fn run_with<X: From<Error>>(
        &self,
        inputs: &[(&str, TensorView<'_>)],
        run: &RunWith<'_, E, X>,
    ) -> std::result::Result<Named, X> {
        let ordered = self.ordered(inputs)?;
        let (compiler, deciding) = self.compiler_for(&ordered)?;
        // Inputs that became constants are not inputs of what was compiled.
        let is_own = |name: &str| !deciding.inputs.iter().any(|constant| constant == name);
        let own: Vec<_> = ordered.iter().filter(|(name, _)| is_own(name)).copied().collect();
        if !deciding.staged {
            match self.stage(&compiler, &ordered, deciding) {
                // Tensors of other shapes did not need stages.
                Err(error) if needs_value(&error) => {}
                whole => return run(&whole?.0, &own),
            }
        }
        let stage = |compiler: Compiler| Ok(self.stage(&compiler, &ordered, deciding)?);
        let outputs = through((&compiler, false), &own, stage, |step| {
            let outputs: std::result::Result<Named, X> = match step {
                Step::Stage(executable, tensors) => run(&executable, tensors),
                Step::Turn(body, tensors) => self.body(body)?.run_with(tensors, run),
            };
            Ok::<_, X>(outputs?.into_iter().map(|(_, tensor)| tensor).collect())
        })?;
        let names = self.0.model.outputs().iter().map(|port| port.name.clone());
        Ok(names.zip(outputs).collect())
    }

    /// The executable for tensors like these; compiled where there is none yet. Values of inputs
    /// that decide shapes are constants in it, and not inputs.
    ///
    /// # Errors
    /// When an input is missing or unknown, and where the model cannot be compiled for these
    /// shapes: where they hang on data that it computes, [`run_with`](Self::run_with) runs it.
    pub fn executable(&self, inputs: &[(&str, TensorView<'_>)]) -> Result<E> {
        let ordered = self.ordered(inputs)?;
        let (compiler, deciding) = self.compiler_for(&ordered)?;
        Ok(self.stage(&compiler, &ordered, deciding)?.0)
    }

    /// The compiler for tensors like these, and what decides shapes.
    fn compiler_for(&self, ordered: &[(&str, TensorView<'_>)]) -> Result<(Compiler, &Deciding)> {
        let shaped = with_shapes(&self.0.compiler, ordered);
        let deciding = match self.0.deciding.get() {
            Some(deciding) => deciding,
            None => {
                let found = deciding(&shaped, &self.0.model, ordered)?;
                self.0.deciding.get_or_init(|| found)
            }
        };
        Ok((with_values(&shaped, ordered, &deciding.inputs), deciding))
    }

    /// What is compiled for tensors like these after what the compiler knows.
    fn stage(
        &self,
        compiler: &Compiler,
        ordered: &[(&str, TensorView<'_>)],
        deciding: &Deciding,
    ) -> Result<Kept<E>> {
        let key = (key(ordered, &deciding.inputs), compiler.known.clone());
        if let Some(known) = self.known(&key) {
            return Ok(known);
        }
        let mut refused = self.0.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, why)) = refused.iter().find(|(known, _)| *known == key) {
            return Err(why.clone());
        }
        drop(refused);
        let made = self.compile(compiler);
        let is_range = compiler.known.as_ref().is_some_and(|known| !known.dims().is_empty());
        if let Err(why) = &made
            && is_range
        {
            refused = self.0.refused.lock().unwrap_or_else(PoisonError::into_inner);
            if refused.len() == REFUSED {
                refused.remove(0);
            }
            refused.push((key, why.clone()));
            return made;
        }
        Ok(self.keep(key, made?))
    }

    fn compile(&self, compiler: &Compiler) -> Result<Kept<E>> {
        let model = &self.0.model;
        let later = match compiler.known {
            Some(_) => compiler.stage(model)?.1.map(Arc::new),
            None => None,
        };
        Ok(((self.0.compile)(compiler, model)?, later))
    }

    /// The model that a loop repeats.
    fn body(&self, body: &Arc<Body>) -> Result<OnDemand<E>> {
        let mut bodies = self.0.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = bodies.iter().find(|(known, _)| Arc::ptr_eq(known, body)) {
            return Ok(known.clone());
        }
        let Shared { compiler, model, compile, bytes, .. } = &*self.0;
        let part = model.part(body.model.clone(), &compiler.limits)?;
        let made = OnDemand::new(compiler.of_part(), part, compile.clone(), *bytes);
        if bodies.len() == BODIES {
            bodies.remove(0);
        }
        bodies.push((body.clone(), made.clone()));
        Ok(made)
    }

    /// Bytes that the specialisations that are kept take together, with those of loops that run
    /// between stages.
    pub fn kept_bytes(&self) -> usize {
        let bodies = self.0.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let own: usize = kept.iter().map(|(_, known)| (self.0.bytes)(&known.0)).sum();
        own + bodies.iter().map(|(_, body)| body.kept_bytes()).sum::<usize>()
    }

    /// How many specialisations are kept.
    pub fn kept(&self) -> usize {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The tensors in the order of the model's inputs.
    fn ordered<'a, 'b>(
        &'b self,
        inputs: &[(&str, TensorView<'a>)],
    ) -> Result<Vec<(&'b str, TensorView<'a>)>> {
        let ports = self.0.model.inputs();
        let mut problems = Vec::new();
        for (i, (name, _)) in inputs.iter().enumerate() {
            let names: Vec<&str> = ports.iter().map(|p| p.name.as_str()).collect();
            if !names.contains(name) {
                let problem = Diagnostic::new("K0701", "the model has no such input");
                problems.push(problem.tensor(*name).expected(names.join(", ")));
            } else if inputs[..i].iter().any(|(earlier, _)| earlier == name) {
                problems.push(Diagnostic::new("K0701", "two tensors for one input").tensor(*name));
            }
        }
        let mut ordered = Vec::with_capacity(ports.len());
        for port in ports {
            match inputs.iter().find(|(name, _)| *name == port.name) {
                Some((_, view)) => ordered.push((port.name.as_str(), *view)),
                None => {
                    let problem = Diagnostic::new("K0701", "no tensor given for an input");
                    problems.push(problem.tensor(port.name.clone()).expected(port.ty.clone()));
                }
            }
        }
        match problems.is_empty() {
            true => Ok(ordered),
            false => Err(Error { kind: ErrorKind::Usage, diagnostics: problems }),
        }
    }

    fn known(&self, key: &Key) -> Option<Kept<E>> {
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == key)?;
        let entry = kept.remove(at);
        let found = entry.1.clone();
        kept.push(entry);
        Some(found)
    }

    fn keep(&self, key: Key, made: Kept<E>) -> Kept<E> {
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have compiled the same meanwhile.
        kept.retain(|(known, _)| *known != key);
        kept.push((key, made.clone()));
        // The one unused for longest goes first; the new one stays whatever its size.
        let mut bytes: usize = kept.iter().map(|(_, known)| (self.0.bytes)(&known.0)).sum();
        while bytes > self.0.compiler.kept_bytes && kept.len() > 1 {
            bytes -= (self.0.bytes)(&kept.remove(0).1.0);
        }
        made
    }
}

impl Compiler {
    /// The model, to be compiled for the shapes of the tensors that it is given.
    pub fn on_demand(&self, model: &Model) -> OnDemand {
        self.on_demand_with(model, Compiler::compile, Executable::memory_bytes)
    }

    /// The same where something else is made of the model, such as one for a GPU; `bytes` says how
    /// much memory that takes.
    pub fn on_demand_with<E>(
        &self,
        model: &Model,
        compile: impl Fn(&Compiler, &Model) -> Result<E> + Send + Sync + 'static,
        bytes: fn(&E) -> usize,
    ) -> OnDemand<E> {
        OnDemand::new(self.clone(), model.clone(), Arc::new(compile), bytes)
    }

    /// The compiler for tensors like these: their shapes settle dims, and the values that decide
    /// other shapes become constants. It knows whether the model then
    /// [needs stages](Self::needs_stages).
    ///
    /// # Errors
    /// When a shape does not fit the model, or the model cannot be read.
    pub fn for_inputs(&self, model: &Model, inputs: &[(&str, TensorView<'_>)]) -> Result<Compiler> {
        let shaped = with_shapes(self, inputs);
        let Deciding { inputs: names, staged } = deciding(&shaped, model, inputs)?;
        Ok(Compiler { staged, ..with_values(&shaped, inputs, &names) })
    }
}

fn with_shapes(compiler: &Compiler, inputs: &[(&str, TensorView<'_>)]) -> Compiler {
    inputs.iter().fold(compiler.clone(), |compiler, (name, view)| compiler.shape(name, view.shape))
}

fn with_values(
    compiler: &Compiler,
    inputs: &[(&str, TensorView<'_>)],
    names: &[String],
) -> Compiler {
    let wanted = inputs.iter().filter(|(name, _)| names.iter().any(|n| n == name));
    wanted.fold(compiler.clone(), |compiler, (name, view)| {
        match Tensor::from_bytes(view.dtype, view.shape, view.bytes) {
            Some(tensor) => compiler.value(name, tensor),
            None => compiler,
        }
    })
}

/// The inputs whose values must be known to know all shapes that hang on inputs alone: few, since
/// every new value of theirs is a new compilation.
fn deciding(
    compiler: &Compiler,
    model: &Model,
    inputs: &[(&str, TensorView<'_>)],
) -> Result<Deciding> {
    // What a compiler has to ask for before it can go on.
    let asks = |compiler: &Compiler| -> Result<_> {
        let (_, later) = compiler.after(Known::default()).stage(model)?;
        Ok(later.map_or(Vec::new(), |later| later.keys()))
    };
    let may = inputs.iter().filter(|(_, view)| may_decide_shapes(view));
    let mut names: Vec<String> = may.map(|(name, _)| name.to_string()).collect();
    let without = asks(compiler)?;
    if without.is_empty() || names.is_empty() {
        return Ok(Deciding { inputs: Vec::new(), staged: !without.is_empty() });
    }
    let fewest = asks(&with_values(compiler, inputs, &names))?;
    for name in names.clone() {
        let fewer: Vec<String> = names.iter().filter(|n| **n != name).cloned().collect();
        if asks(&with_values(compiler, inputs, &fewer)).is_ok_and(|asked| asked == fewest) {
            names = fewer;
        }
    }
    Ok(Deciding { inputs: names, staged: !fewest.is_empty() })
}

/// Whether a value decides shapes and is not known.
fn needs_value(error: &Error) -> bool {
    error.diagnostics.iter().any(|d| d.code == onnx::NEEDS_VALUE)
}

fn usage(diagnostic: Diagnostic) -> Error {
    Error::new(ErrorKind::Usage, diagnostic)
}

/// Shapes are made of few whole numbers.
fn may_decide_shapes(view: &TensorView<'_>) -> bool {
    let whole = matches!(view.dtype, DType::I64 | DType::I32 | DType::Bool);
    whole && view.shape.iter().product::<usize>() <= SHAPE_ELEMENTS
}

fn key(inputs: &[(&str, TensorView<'_>)], deciding: &[String]) -> Shapes {
    let entry = |(name, view): &(&str, TensorView<'_>)| {
        let decides = deciding.iter().any(|n| n == name);
        (view.shape.to_vec(), decides.then(|| view.bytes.to_vec()))
    };
    inputs.iter().map(entry).collect()
}
