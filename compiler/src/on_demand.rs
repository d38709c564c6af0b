//! Specialisation on demand: machine code is for numbers, models are for symbols. A model whose
//! axes have names, or whose shapes depend on the values of inputs, is compiled for those that it
//! meets, which takes milliseconds, and what was compiled is kept.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kiln_runtime::session::Executable;
use kiln_runtime::tensor::{DType, Tensor, TensorView};

use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::model::Model;
use crate::{Compiler, onnx};

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
    compile: Box<Compile<E>>,
    bytes: fn(&E) -> usize,
    /// Inputs whose values decide shapes, once tensors were seen.
    deciding: OnceLock<Vec<String>>,
    /// The latest used last.
    kept: Mutex<Vec<(Key, E)>>,
}

/// Compiles a model for shapes that the compiler knows.
type Compile<E> = dyn Fn(&Compiler, &Model) -> Result<E> + Send + Sync;

/// Shape of each input, and its value where that decides shapes.
type Key = Vec<(Vec<usize>, Option<Vec<u8>>)>;

impl OnDemand {
    /// Runs the model on tensors given by name, compiled for their shapes.
    ///
    /// # Errors
    /// When an input is missing, unknown or does not fit, and where the model cannot be compiled
    /// for these shapes.
    pub fn run(&self, inputs: &[(&str, TensorView<'_>)]) -> Result<Vec<(String, Tensor)>> {
        let executable = self.executable(inputs)?;
        // Inputs that became constants are not inputs of what was compiled.
        let own = |name: &str| executable.inputs().iter().any(|port| port.name == name);
        let inputs: Vec<_> = inputs.iter().filter(|(name, _)| own(name)).copied().collect();
        executable.run(&inputs).map_err(|e| usage(Diagnostic::new("K0701", e.to_string())))
    }
}

impl<E: Clone> OnDemand<E> {
    /// The model.
    pub fn model(&self) -> &Model {
        &self.0.model
    }

    /// The executable for tensors like these; compiled where there is none yet. Values of inputs
    /// that decide shapes are constants in it, and not inputs.
    ///
    /// # Errors
    /// When an input is missing or unknown, and where the model cannot be compiled for these
    /// shapes.
    pub fn executable(&self, inputs: &[(&str, TensorView<'_>)]) -> Result<E> {
        let ordered = self.ordered(inputs)?;
        let shaped = with_shapes(&self.0.compiler, &ordered);
        let deciding = match self.0.deciding.get() {
            Some(deciding) => deciding,
            None => {
                let found = deciding(&shaped, &self.0.model, &ordered)?;
                self.0.deciding.get_or_init(|| found)
            }
        };
        let key = key(&ordered, deciding);
        if let Some(known) = self.known(&key) {
            return Ok(known);
        }
        let compiler = with_values(&shaped, &ordered, deciding);
        Ok(self.keep(key, (self.0.compile)(&compiler, &self.0.model)?))
    }

    /// Bytes that the specialisations that are kept take together.
    pub fn kept_bytes(&self) -> usize {
        let kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().map(|(_, known)| (self.0.bytes)(known)).sum()
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

    fn known(&self, key: &Key) -> Option<E> {
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == key)?;
        let entry = kept.remove(at);
        let executable = entry.1.clone();
        kept.push(entry);
        Some(executable)
    }

    fn keep(&self, key: Key, executable: E) -> E {
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have compiled the same meanwhile.
        kept.retain(|(known, _)| *known != key);
        kept.push((key, executable.clone()));
        // The one unused for longest goes first; the new one stays whatever its size.
        let mut bytes: usize = kept.iter().map(|(_, known)| (self.0.bytes)(known)).sum();
        while bytes > self.0.compiler.kept_bytes && kept.len() > 1 {
            bytes -= (self.0.bytes)(&kept.remove(0).1);
        }
        executable
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
        OnDemand(Arc::new(Shared {
            compiler: self.clone(),
            model: model.clone(),
            compile: Box::new(compile),
            bytes,
            deciding: OnceLock::new(),
            kept: Mutex::default(),
        }))
    }

    /// The compiler for tensors like these: their shapes settle dims, and the values that decide
    /// other shapes become constants.
    ///
    /// # Errors
    /// When a shape does not fit the model, or the model cannot be read.
    pub fn for_inputs(&self, model: &Model, inputs: &[(&str, TensorView<'_>)]) -> Result<Compiler> {
        let shaped = with_shapes(self, inputs);
        let deciding = deciding(&shaped, model, inputs)?;
        Ok(with_values(&shaped, inputs, &deciding))
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

/// The inputs whose values must be known to know all shapes: few, since every new value of theirs
/// is a new compilation.
fn deciding(
    compiler: &Compiler,
    model: &Model,
    inputs: &[(&str, TensorView<'_>)],
) -> Result<Vec<String>> {
    let may = inputs.iter().filter(|(_, view)| may_decide_shapes(view));
    let mut names: Vec<String> = may.map(|(name, _)| name.to_string()).collect();
    if names.is_empty() {
        return Ok(names);
    }
    let needs_value = |e: &Error| e.diagnostics.iter().any(|d| d.code == onnx::NEEDS_VALUE);
    match compiler.graph(model) {
        Ok(_) => return Ok(Vec::new()),
        Err(error) if !needs_value(&error) => return Err(error),
        Err(_) => {}
    }
    with_values(compiler, inputs, &names).graph(model)?;
    for name in names.clone() {
        let fewer: Vec<String> = names.iter().filter(|n| **n != name).cloned().collect();
        if with_values(compiler, inputs, &fewer).graph(model).is_ok() {
            names = fewer;
        }
    }
    Ok(names)
}

fn usage(diagnostic: Diagnostic) -> Error {
    Error::new(ErrorKind::Usage, diagnostic)
}

/// Shapes are made of few whole numbers.
fn may_decide_shapes(view: &TensorView<'_>) -> bool {
    let whole = matches!(view.dtype, DType::I64 | DType::I32 | DType::Bool);
    whole && view.shape.iter().product::<usize>() <= SHAPE_ELEMENTS
}

fn key(inputs: &[(&str, TensorView<'_>)], deciding: &[String]) -> Key {
    let entry = |(name, view): &(&str, TensorView<'_>)| {
        let decides = deciding.iter().any(|n| n == name);
        (view.shape.to_vec(), decides.then(|| view.bytes.to_vec()))
    };
    inputs.iter().map(entry).collect()
}
