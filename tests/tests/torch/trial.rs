//! A graph beside what libtorch says of its results, and how far from that they may be.

use std::hash::{Hash, Hasher};

use kiln::Compiler;
use kiln::backend::cpu::Cpu;
use kiln::error::Diagnostic;
use kiln::graph::eval::{Data, Value};
use kiln::graph::op::Type;
use kiln::graph::{Graph, NodeId, Origin};
use kiln::tensor::{DType, Tensor};
use kiln_tests::machines::{Emulator, emulators, machines};
use kiln_tests::{compilers, emit_for, environment, interpret, old_compiler, ptx, run_compiled};
use proptest::test_runner::TestCaseError;
use tch::Kind;

use crate::refused::refused;
use crate::{KINDS, longs};

/// Result of a case.
pub type Checked = Result<(), TestCaseError>;
/// Result of adding a node.
pub type Added = Result<NodeId, Diagnostic>;

/// Of each floating point dtype: the distance from 1 to the next number, the least number above
/// 0, and that distance in the dtype in which sums are kept.
///
/// Machine code computes f16 and bf16 in f32 and rounds what it stores; the interpreter rounds
/// after each node; libtorch is asked in f64, of exactly the operands that Kiln sees, and its
/// answer is rounded once. So one correctly rounded operation must agree in every bit.
const PRECISION: [(DType, f64, f64, f64); 4] = [
    (DType::F32, f32::EPSILON as f64, 1.4e-45, f32::EPSILON as f64),
    (DType::F16, 9.765625e-4, 6e-8, f32::EPSILON as f64),
    (DType::BF16, 7.8125e-3, 9.2e-41, f32::EPSILON as f64),
    (DType::F64, f64::EPSILON, 4.9e-324, f64::EPSILON),
];

fn precision(dtype: DType) -> (f64, f64, f64) {
    PRECISION.iter().find(|p| p.0 == dtype).map_or((0.0, 0.0, 0.0), |p| (p.1, p.2, p.3))
}

/// How far results may be from libtorch's. Integers and bools are always equal.
pub struct Bound {
    ulps: f64,
    absolute: f64,
    noise: Option<tch::Tensor>,
}

impl Bound {
    /// Equal in every bit, but for the sign of zero.
    pub const EXACT: Bound = Bound { ulps: 0.0, absolute: 0.0, noise: None };

    /// So many times the distance of neighbours in the dtype.
    pub fn ulps(ulps: f64) -> Bound {
        Bound { ulps, ..Bound::EXACT }
    }

    /// As much whatever the result is.
    pub fn absolute(self, absolute: f64) -> Bound {
        Bound { absolute, ..self }
    }

    /// For sums: `magnitude` is the sum of the magnitudes of the n that are summed, for each
    /// result. Two orders differ by less than n - 1 unit roundoffs of it, and by about the root
    /// of n as rounding goes up and down (Higham 2002, section 4.2; Higham and Mary 2019).
    pub fn sum(dtype: DType, n: usize, magnitude: tch::Tensor) -> Bound {
        let roundoffs = 2.0 + (n as f64).sqrt();
        let noise = magnitude.to_kind(Kind::Double) * (precision(dtype).2 / 2.0 * roundoffs);
        Bound { ulps: 1.0, absolute: 0.0, noise: Some(noise) }
    }

    /// An error in the operands of so much, each as a multiple of what one rounding changes.
    pub fn noise(self, dtype: DType, noise: tch::Tensor) -> Bound {
        Bound { noise: Some(noise.to_kind(Kind::Double) * precision(dtype).0), ..self }
    }

    /// Anything, where the quotient of the operands does not fit into the mantissa: there, libtorch
    /// itself says NaN for some.
    pub fn whole_quotients(self, dtype: DType, x: &tch::Tensor, y: &tch::Tensor) -> Bound {
        if !dtype.is_float() {
            return self;
        }
        let limit = if dtype == DType::F64 { 53.0 } else { 24.0 };
        let quotient = (x / y).abs();
        // The quotient of infinities is NaN, as is the remainder: not a matter of size.
        let beyond = quotient.ge(f64::exp2(limit)).logical_and(&x.isfinite()).logical_and(&y.ne(0));
        let noise = beyond.to_kind(Kind::Double).masked_fill(&beyond, f64::INFINITY);
        Bound { noise: Some(noise), ..self }
    }
}

/// An operand: in the graph, in libtorch as it is, and there with floats as f64.
pub struct Operand {
    /// In the graph.
    pub node: NodeId,
    /// In libtorch, of its own dtype.
    pub native: tch::Tensor,
    /// In libtorch, floats as f64.
    pub exact: tch::Tensor,
}

struct Want {
    name: String,
    interpreted_only: bool,
    value: tch::Tensor,
    bound: Bound,
}

/// A graph under test.
#[derive(Default)]
pub struct Trial {
    /// The graph.
    pub graph: Graph,
    inputs: Vec<Tensor>,
    wants: Vec<Want>,
}

/// libtorch's name of a dtype.
pub fn kind(dtype: DType) -> Kind {
    KINDS.iter().find(|k| k.0 == dtype).expect("a dtype of libtorch").1
}

/// A tensor in libtorch.
pub fn to_torch(tensor: &Tensor) -> tch::Tensor {
    tch::Tensor::from_data_size(tensor.bytes(), &longs(tensor.shape()), kind(tensor.dtype()))
}

/// A tensor of floats from libtorch.
pub fn from_torch(tensor: &tch::Tensor) -> Tensor {
    let shape: Vec<usize> = tensor.size().iter().map(|&e| e as usize).collect();
    let dtype = KINDS.iter().find(|k| k.1 == tensor.kind()).expect("a dtype of Kiln").0;
    Value { ty: Type::new(dtype, &shape), data: Data::Float(list(tensor)) }.to_tensor()
}

/// The origin of all nodes here.
pub fn origin() -> Origin {
    Origin::from("test")
}

impl Trial {
    fn operand(&self, node: NodeId, tensor: &Tensor) -> Operand {
        let native = to_torch(tensor);
        let exact = match tensor.dtype().is_float() {
            true => native.to_kind(Kind::Double),
            false => native.shallow_clone(),
        };
        Operand { node, native, exact }
    }

    /// An input with that value.
    pub fn input(&mut self, tensor: Tensor) -> Operand {
        let name = format!("x{}", self.inputs.len());
        let node = self.graph.input(&name, Type::new(tensor.dtype(), tensor.shape()));
        self.inputs.push(tensor);
        self.operand(node, &self.inputs[self.inputs.len() - 1])
    }

    /// A constant.
    pub fn constant(&mut self, tensor: Tensor) -> Operand {
        let node = self.graph.tensor(&tensor, &origin());
        self.operand(node, &tensor)
    }

    /// An input, or a constant.
    pub fn either(&mut self, constant: bool, tensor: Tensor) -> Operand {
        if constant { self.constant(tensor) } else { self.input(tensor) }
    }

    /// Says what a node should give. `name` and the dtype of the first operand are what the table
    /// of refused operations goes by.
    pub fn want(
        &mut self,
        (name, dtype): (&str, DType),
        node: Added,
        torch: tch::Tensor,
        bound: Bound,
    ) -> Checked {
        let node = node.map_err(|d| TestCaseError::fail(format!("{name} of {dtype}: {d}")))?;
        let value = torch.to_kind(kind(self.graph.ty(node).dtype));
        let name = format!("{name} of {dtype}");
        self.graph.outputs.push((format!("y{}", self.wants.len()), node));
        let interpreted_only = refused(&name);
        self.wants.push(Want { name, interpreted_only, value, bound });
        Ok(())
    }

    /// Compiles the graph in one way, runs it here, and compares.
    pub fn check_by(&self, way: &str, compiler: &Compiler) -> Checked {
        let got = run_compiled(&self.graph, &self.inputs, compiler);
        let got = got.map_err(|e| TestCaseError::fail(format!("{way}: {e}")))?;
        compare(way, &got, &self.wants.iter().collect::<Vec<_>>())
    }

    /// Runs the graph in every way and compares.
    pub fn check(self) -> Checked {
        let all: Vec<&Want> = self.wants.iter().collect();
        compare("interpreted", &interpret(&self.graph, &self.inputs), &all)?;
        let compiled: Vec<&Want> = all.iter().copied().filter(|w| !w.interpreted_only).collect();
        if compiled.is_empty() {
            return Ok(());
        }
        let mut graph = self.graph.clone();
        let mut kept = self.wants.iter();
        graph.outputs.retain(|_| kept.next().is_some_and(|w| !w.interpreted_only));
        let rare = rare(&graph);
        let old = old_compiler().filter(|_| rare);
        for (name, compiler) in compilers().into_iter().chain(old) {
            let got = run_compiled(&graph, &self.inputs, &compiler)
                .map_err(|e| TestCaseError::fail(format!("{name}: {e}")))?;
            compare(name, &got, &compiled)?;
        }
        if rare {
            let got = ptx::run(&graph, &self.inputs, &Compiler::new());
            let got = got.map_err(|e| TestCaseError::fail(format!("PTX: {e}")))?;
            compare("PTX", &got, &compiled)?;
            self.check_elsewhere(&graph, &compiled)?;
        }
        Ok(())
    }

    /// Compiles for other architectures, and runs what there is an emulator for.
    fn check_elsewhere(&self, graph: &Graph, wants: &[&Want]) -> Checked {
        let fail = |cpu: &Cpu, why: &dyn std::fmt::Display| {
            TestCaseError::fail(format!("{}: {why}", cpu.triple.name))
        };
        for Emulator { cpu, .. } in emulators() {
            emit_for(cpu.clone(), graph).map_err(|e| fail(&cpu, &e))?;
        }
        for machine in machines() {
            let mut machine = machine.lock().unwrap_or_else(|e| e.into_inner());
            let got = machine.run(graph, &self.inputs);
            let got = got.map_err(|e| fail(machine.cpu(), &e))?;
            compare(machine.cpu().triple.name, &got, wants)?;
        }
        Ok(())
    }
}

/// Whether a graph is among the few that are tried where code is slow: one in `KILN_EMULATED`,
/// the same ones in every run.
fn rare(graph: &Graph) -> bool {
    let mut hash = std::hash::DefaultHasher::new();
    kiln::graph::text::print(graph).hash(&mut hash);
    hash.finish().is_multiple_of(environment("KILN_EMULATED", 8).max(1))
}

fn compare(way: &str, got: &[Tensor], wants: &[&Want]) -> Checked {
    for (got, want) in got.iter().zip(wants) {
        if let Some(why) = difference(got, want) {
            return Err(TestCaseError::fail(format!("{} {way}: {why}", want.name)));
        }
    }
    Ok(())
}

fn list(tensor: &tch::Tensor) -> Vec<f64> {
    let flat = tensor.to_kind(Kind::Double).contiguous().view(-1);
    Vec::<f64>::try_from(&flat).expect("a dense list of f64")
}

fn difference(got: &Tensor, want: &Want) -> Option<String> {
    if longs(got.shape()) != want.value.size() || kind(got.dtype()) != want.value.kind() {
        return Some(format!("{got:?}, libtorch says {:?}", want.value));
    }
    let value = Value::from_tensor(got);
    if !got.dtype().is_float() {
        let flat = want.value.to_kind(Kind::Int64).contiguous().view(-1);
        let (a, b) = (value.as_i64s()?, Vec::<i64>::try_from(&flat).expect("a list of i64"));
        let at = a.iter().zip(&b).position(|(a, b)| a != b)?;
        return Some(format!("element {at} is {}, libtorch says {}", a[at], b[at]));
    }
    let (a, b) = (value.as_f64s(), list(&want.value));
    let noise = want.bound.noise.as_ref().map(list);
    let anything = |i: usize| noise.as_ref().is_some_and(|n| n[i] == f64::INFINITY);
    let (epsilon, least, _) = precision(got.dtype());
    let allowed = |i: usize| {
        let noise = noise.as_ref().map_or(0.0, |n| n[i]);
        want.bound.ulps * (epsilon * b[i].abs() + least) + want.bound.absolute + noise
    };
    let close = |i: usize| {
        anything(i)
            || a[i] == b[i]
            || (a[i].is_nan() && b[i].is_nan())
            || (a[i] - b[i]).abs() <= allowed(i)
    };
    let at = (0..a.len()).find(|&i| !close(i))?;
    let (a, b, allowed) = (a[at], b[at], allowed(at));
    let shape = got.shape();
    Some(format!("element {at} of {shape:?} is {a:e}, libtorch says {b:e}; {allowed:e} allowed"))
}
