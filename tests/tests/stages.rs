//! Models whose shapes hang on data that they compute, against onnxruntime.

use kiln::error::Error;
use kiln::graph::Graph;
use kiln::onnx::proto::tensor_shape_proto::{Dimension, dimension::Value::DimValue};
use kiln::onnx::proto::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto,
    TypeProto, ValueInfoProto, type_proto,
};
use kiln::tensor::{Tensor, TensorView};
use kiln::{Compiler, Limits, Model};
use kiln_tests::cases::{Case, folders, name_of, read_case};
use kiln_tests::{Tolerance, WAYS, difference, oracle};
use prost::Message;

/// Sums of f32 in another order than onnxruntime's.
const TOLERANCE: Tolerance = Tolerance { rtol: 1e-4, atol: 1e-5 };

/// A model and its cases.
struct Subject {
    name: String,
    model: Model,
    cases: Vec<Case>,
}

impl Subject {
    fn named<'a>(&'a self, case: &'a Case) -> Vec<(&'a str, TensorView<'a>)> {
        let names = self.model.inputs().iter().map(|port| port.name.as_str());
        names.zip(case.inputs.iter().map(Tensor::view)).collect()
    }
}

fn subjects() -> Option<Vec<Subject>> {
    let subject = |folder: std::path::PathBuf| {
        let model = folder.join("model.onnx");
        let sets = folders(&folder);
        let case = |set: &std::path::PathBuf| read_case(&folder, set).expect("a case");
        Subject {
            name: name_of(&folder),
            cases: sets.iter().map(case).collect(),
            model: Model::open(model, &Limits::default()).expect("a model"),
        }
    };
    Some(folders(&oracle("stages")?).into_iter().map(subject).collect())
}

fn compare(found: &[Tensor], case: &Case) -> Option<String> {
    if found.len() != case.outputs.len() {
        return Some(format!("{} outputs, expected {}", found.len(), case.outputs.len()));
    }
    found.iter().zip(&case.outputs).find_map(|(a, b)| difference(a, b, TOLERANCE))
}

struct Stopped(String);

impl From<Error> for Stopped {
    fn from(error: Error) -> Stopped {
        Stopped(error.to_string())
    }
}

#[test]
fn every_way_gives_what_onnxruntime_gives() {
    let Some(subjects) = subjects() else { return };
    let mut problems = Vec::new();
    for subject in &subjects {
        let mut staged = 0;
        for (number, case) in subject.cases.iter().enumerate() {
            let inputs = subject.named(case);
            let compiler = Compiler::new().for_inputs(&subject.model, &inputs).expect("a compiler");
            staged += usize::from(compiler.needs_stages());
            for (way, run) in WAYS {
                let run = |graph: &Graph, tensors: &[(&str, TensorView)]| {
                    let wanted = graph.inputs.iter().map(|(port, _)| {
                        let (_, x) = tensors.iter().find(|(n, _)| n == port).expect("an input");
                        Tensor::from_bytes(x.dtype, x.shape, x.bytes).expect("a tensor")
                    });
                    run(graph, &wanted.collect::<Vec<_>>()).map_err(Stopped)
                };
                let found = compiler.run_in_stages(&subject.model, &inputs, run);
                let why = match found {
                    Ok(found) => compare(&found, case),
                    Err(Stopped(why)) => Some(why),
                };
                problems.extend(why.map(|why| format!("{} {number} {way}: {why}", subject.name)));
            }
        }
        // Where there is no row, no turn of the loop over rows waits for data.
        let whole = if subject.name == "maybe" { 2 } else { 0 };
        assert_eq!(staged + whole, subject.cases.len(), "{}", subject.name);
    }
    assert!(subjects.len() >= 13, "{} models", subjects.len());
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn what_was_compiled_serves_other_numbers_of_results() {
    let Some(subjects) = subjects() else { return };
    for subject in &subjects {
        let on_demand = Compiler::new().on_demand(&subject.model);
        let mut kept = Vec::new();
        for case in subject.cases.iter().chain(&subject.cases) {
            let found = on_demand.run(&subject.named(case));
            let found = found.unwrap_or_else(|e| panic!("{}: {e}", subject.name));
            let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
            let wanted: Vec<&str> =
                subject.model.outputs().iter().map(|port| port.name.as_str()).collect();
            assert_eq!(names, wanted);
            let found: Vec<Tensor> = found.into_iter().map(|(_, tensor)| tensor).collect();
            assert_eq!(compare(&found, case), None, "{}", subject.name);
            kept.push(on_demand.kept());
        }
        println!("{}: {kept:?}", subject.name);
        // The second time, everything is there.
        let half = kept.len() / 2;
        assert!(kept[half..].iter().all(|&n| n == kept[half - 1]), "{}: {kept:?}", subject.name);
        // The same code for any number up to 16, and for the next power of two.
        let expected = match subject.name.as_str() {
            "detector" => 3,
            _ => continue,
        };
        assert_eq!(kept[half], expected, "{}: {kept:?}", subject.name);
    }
}

fn node(op: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<AttributeProto>) -> NodeProto {
    let all = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    NodeProto {
        op_type: Some(op.into()),
        name: Some(outputs[0].into()),
        input: all(inputs),
        output: all(outputs),
        attribute: attributes,
        ..NodeProto::default()
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: Some(name.into()), i: Some(value), ..AttributeProto::default() }
}

fn named(name: &str, ty: Option<TypeProto>) -> ValueInfoProto {
    ValueInfoProto { name: Some(name.into()), r#type: ty, ..ValueInfoProto::default() }
}

/// Two numbers, as many turns as their sum, in which what is carried, and collected, gets longer.
fn growing(body_inputs: &[&str]) -> Result<Model, Error> {
    let body = GraphProto {
        node: vec![
            node("Identity", &["going"], &["again"], vec![]),
            node("Concat", &["y", "y"], &["next"], vec![int("axis", 0)]),
            node("Identity", &["next"], &["row"], vec![]),
        ],
        input: body_inputs.iter().map(|name| named(name, None)).collect(),
        output: ["again", "next", "row"].map(|name| named(name, None)).to_vec(),
        ..GraphProto::default()
    };
    let body = AttributeProto {
        name: Some("body".into()),
        g: Some(Box::new(body)),
        ..AttributeProto::default()
    };
    let dim = Dimension { value: Some(DimValue(2)), denotation: None };
    let shape = Some(TensorShapeProto { dim: vec![dim] });
    let tensor = type_proto::Tensor { elem_type: Some(1), shape };
    let value = Some(type_proto::Value::TensorType(tensor));
    let graph = GraphProto {
        node: vec![
            node("ReduceSum", &["x"], &["sum"], vec![int("keepdims", 0)]),
            node("Cast", &["sum"], &["turns"], vec![int("to", 7)]),
            node("Loop", &["turns", "", "x"], &["last", "rows"], vec![body]),
        ],
        input: vec![named("x", Some(TypeProto { value, ..TypeProto::default() }))],
        output: ["last", "rows"].map(|name| named(name, None)).to_vec(),
        ..GraphProto::default()
    };
    let opset = OperatorSetIdProto { domain: None, version: Some(17) };
    let model =
        ModelProto { graph: Some(graph), opset_import: vec![opset], ..ModelProto::default() };
    Model::from_bytes(model.encode_to_vec().into(), &Limits::default())
}

#[test]
fn a_loop_that_fails_is_named() {
    let x = Tensor::from_slice(&[2], &[1.0f32, 2.0]);
    for (inputs, expected) in [
        (&["i", "going", "y"][..], "values of [4] and of [8]"),
        (&["i", "going"][..], "a graph of 2 inputs for 3 values"),
    ] {
        let on_demand = Compiler::new().on_demand(&growing(inputs).expect("a model"));
        let error = on_demand.run(&[("x", x.view())]).expect_err("no such loop").to_string();
        for part in [expected, "last", "Loop, opset 17"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
