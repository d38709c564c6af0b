//! The ONNX backend suite, interpreted and compiled in every way, against a ledger.
//!
//! Every case passes or has a reason in `tests/ledger.txt`; a case that does better than its line
//! fails as one that does worse does. `BLESS=1` writes the ledger, and `tests/ledger.md`, the same
//! as a table of operators. (PTX has the same cases in `ptx/main.rs`.)

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use kiln::Compiler;
use kiln::graph::Graph;
use kiln::graph::eval::Value;
use kiln::onnx::proto::ModelProto;
use kiln::tensor::{Tensor, TensorView};
use kiln_tests::cases::read;
use kiln_tests::suite::{Given, KINDS, cases, given, reason, run_all};
use kiln_tests::{ONNX, Run, difference, interpret, oracle, run_compiled, run_library};
use prost::Message;

fn compare(got: &[Tensor], want: &[Tensor]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} outputs, expected {}", got.len(), want.len()));
    }
    match got.iter().zip(want).find_map(|(got, want)| difference(got, want, ONNX)) {
        Some(difference) => Err(difference),
        None => Ok(()),
    }
}

/// What a case that passes has to pass in.
const BACKENDS: [(&str, Run); 4] = [
    ("the interpreter", |graph, inputs| Ok(interpret(graph, inputs))),
    ("code", |graph, inputs| code(graph, inputs, &Compiler::new())),
    ("code without the e-graph", |graph, inputs| {
        code(graph, inputs, &Compiler::new().egraph(false))
    }),
    ("a shared library", run_library),
];

fn code(graph: &Graph, inputs: &[Tensor], compiler: &Compiler) -> Result<Vec<Tensor>, String> {
    run_compiled(graph, inputs, compiler).map_err(|e| reason(&e))
}

/// What the ledger says of a case.
fn outcome(folder: &Path) -> Result<String, String> {
    let given = given(folder)?;
    let Given { graph, inputs, outputs, names, .. } = &given;
    let constants: Vec<&str> =
        names.iter().filter(|n| graph.inputs.iter().all(|p| p.0 != **n)).map(|n| &n[..]).collect();
    let note = match constants.as_slice() {
        [] => String::new(),
        names => format!(" with constant {}", names.join(" ")),
    };
    for (name, run) in BACKENDS {
        let right = run(graph, inputs).and_then(|got| compare(&got, outputs));
        // The interpreter says what a model means: without it there is nothing to compile.
        right.map_err(|why| match name == BACKENDS[0].0 {
            true => format!("differs: {why}"),
            false => format!("{name}: {why}"),
        })?;
    }
    check_loops(graph, inputs, outputs).map_err(|e| format!("loops: {e}"))?;
    if !constants.is_empty() {
        check_stages(&given).map_err(|e| format!("in stages: {e}"))?;
    }
    Ok(format!("pass{note}"))
}

/// The loops of what compiles: their text reads back, and their interpreter gives the outputs.
fn check_loops(graph: &Graph, inputs: &[Tensor], outputs: &[Tensor]) -> Result<(), String> {
    let compiler = Compiler::new();
    let kernels = compiler.optimise(graph).map_err(|e| reason(&e))?;
    let program = compiler.lower(&kernels).map_err(|e| reason(&e))?;
    for kernel in &program.kernels {
        let text = kiln::loops::text::print(kernel);
        let again = kiln::loops::text::parse(&text).map_err(|e| e.to_string())?;
        // As text: a NaN is not equal to itself.
        if format!("{again:?}") != format!("{:?}", [kernel]) {
            return Err(format!("the text reads back as another kernel: {text}"));
        }
    }
    let inputs: Vec<Value> = inputs.iter().map(Value::from_tensor).collect();
    let found = kiln::plan::eval::eval(&kernels, &program, &inputs).map_err(|e| e.to_string())?;
    let different = found
        .iter()
        .zip(outputs)
        .find_map(|(found, want)| difference(&found.to_tensor(), want, ONNX));
    different.map_or(Ok(()), Err)
}

/// A model of which no value is known when it is compiled, however its shapes hang on them.
fn check_stages(given: &Given) -> Result<(), String> {
    let Given { names, model, all, outputs, .. } = given;
    let inputs: Vec<(&str, TensorView)> =
        names.iter().map(String::as_str).zip(all.iter().map(Tensor::view)).collect();
    let compiler = inputs.iter().fold(Compiler::new(), |c, (name, x)| c.shape(name, x.shape));
    for (name, run) in &BACKENDS[..2] {
        let run = |graph: &Graph, tensors: &[(&str, TensorView)]| -> Result<_, Stopped> {
            let wanted = graph.inputs.iter().map(|(port, _)| {
                let (_, x) = tensors.iter().find(|(name, _)| name == port).expect("an input");
                Tensor::from_bytes(x.dtype, x.shape, x.bytes).expect("a tensor")
            });
            run(graph, &wanted.collect::<Vec<_>>()).map_err(Stopped)
        };
        let found = compiler.run_in_stages(model, &inputs, run);
        found
            .map_err(|e| e.0)
            .and_then(|found| compare(&found, outputs))
            .map_err(|e| format!("{name}: {e}"))?;
    }
    Ok(())
}

/// Why a stage has given nothing.
struct Stopped(String);

impl From<kiln::error::Error> for Stopped {
    fn from(error: kiln::error::Error) -> Stopped {
        Stopped(reason(&error))
    }
}

fn summary(results: &BTreeMap<String, String>, kind: &str) -> String {
    let of_kind = results.iter().filter(|r| r.0.starts_with(kind)).map(|r| r.1.as_str());
    let lines: Vec<&str> = of_kind.collect();
    let count = |start: &str| lines.iter().filter(|l| l.starts_with(start)).count();
    let (pass, specialised) = (count("pass"), count("pass with"));
    format!("{kind}: {pass} of {} pass ({specialised} with inputs made constants)", lines.len(),)
}

/// Operators of the first two tiers: what networks of images and of text are made of, and what
/// detection, audio and quantisation need beyond that. All others are the third.
const TIERS: [&str; 2] = [
    "Add Sub Mul Div Pow Sqrt Exp Log Neg Abs Reciprocal Erf Tanh Sigmoid Relu LeakyRelu Elu \
     HardSigmoid HardSwish Clip Gelu Swish Mish Softplus PRelu MatMul Gemm Conv \
     BatchNormalization LayerNormalization RMSNormalization GroupNormalization \
     InstanceNormalization Softmax LogSoftmax MaxPool AveragePool GlobalAveragePool \
     GlobalMaxPool ReduceMean ReduceSum ReduceMax ReduceMin Concat Split Slice Gather Reshape \
     Transpose Squeeze Unsqueeze Flatten Expand Tile Pad Cast CastLike Where Equal Less \
     LessOrEqual Greater GreaterOrEqual And Or Not Min Max Shape Size Constant \
     ConstantOfShape Range Identity Dropout Sin Cos ArgMax ArgMin CumSum Trilu IsNaN \
     ScatterND GatherND GatherElements Floor Ceil Round Sign Mod Sum Mean RotaryEmbedding \
     Attention TensorScatter SwiGLU",
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear MatMulInteger ConvInteger \
     QLinearConv QLinearMatMul Resize Upsample ConvTranspose NonMaxSuppression TopK NonZero \
     RoiAlign GridSample AffineGrid DepthToSpace SpaceToDepth ScatterElements OneHot Einsum \
     ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceProd ReduceSumSquare CenterCropPad \
     LRN LpNormalization LpPool MeanVarianceNormalization Celu Selu Softsign ThresholdedRelu \
     Hardmax Shrink Xor BitwiseAnd BitwiseOr BitwiseXor BitwiseNot BitShift BitCast CumProd \
     Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh IsInf LSTM GRU RNN STFT DFT \
     MelWeightMatrix HannWindow HammingWindow BlackmanWindow EyeLike ReverseSequence Compress \
     Col2Im If Loop GlobalLpPool",
];

fn tier(operator: &str) -> usize {
    let first = TIERS.iter().position(|tier| tier.split_whitespace().any(|op| op == operator));
    first.unwrap_or(TIERS.len()) + 1
}

/// The operator that each node case is of: that of its first node; one whose function was written
/// out is of the operator that it was of before.
fn operators(data: &Path) -> BTreeMap<String, String> {
    let mut operators: BTreeMap<String, String> = BTreeMap::new();
    for (name, folder) in cases(data).iter().filter(|(name, _)| name.starts_with("node/")) {
        let twin = name.split("_expanded").next().unwrap_or(name);
        let model = ModelProto::decode(read(&folder.join("model.onnx"))).unwrap_or_default();
        let first = model.graph.and_then(|g| g.node.into_iter().next()).unwrap_or_default();
        let known = operators.get(twin).cloned();
        operators.insert(name.clone(), known.unwrap_or(first.op_type.unwrap_or_default()));
    }
    operators
}

/// How many cases pass, and why others do not.
#[derive(Default)]
struct Row {
    all: usize,
    pass: usize,
    constant: usize,
    why: BTreeMap<String, usize>,
}

impl Row {
    fn note(&mut self, line: &str) {
        self.all += 1;
        self.pass += usize::from(line.starts_with("pass"));
        self.constant += usize::from(line.starts_with("pass with"));
        if let Some(why) = line.strip_prefix("no: ") {
            *self.why.entry(why.to_string()).or_default() += 1;
        }
    }

    fn text(&self, name: &str) -> String {
        let Row { all, pass, constant, why } = self;
        let why = why.iter().map(|(why, count)| format!("{count}: {}", why.replace('|', "/")));
        let why = why.collect::<Vec<_>>().join("; ");
        format!("| {name} | {all} | {pass} | {constant} | {why} |\n")
    }
}

/// The ledger as a table: sums of all, then a row for every operator.
fn table(results: &BTreeMap<String, String>, operators: &BTreeMap<String, String>) -> String {
    let mut rows: BTreeMap<(usize, &str), Row> = BTreeMap::new();
    let mut sums: BTreeMap<String, Row> = BTreeMap::new();
    for (name, operator) in operators {
        let (line, tier) = (&results[name], tier(operator));
        rows.entry((tier, operator)).or_default().note(line);
        let base = if name.contains("_expanded") { "functions written out" } else { "base" };
        for sum in ["all".to_string(), base.to_string(), format!("tier {tier}")] {
            sums.entry(sum).or_default().note(line);
        }
    }
    sums.values_mut().for_each(|sum| sum.why.clear());
    let mut text = String::from(
        "# The node cases of ONNX 1.22.0\n\n\
         Written by `BLESS=1 cargo test -p kiln-tests --test node_suite`; each case is in\n\
         `ledger.txt`. A case that passes does so in the interpreter, in code with and without\n\
         the e-graph, and in a shared library. Some need an input that decides a shape to be\n\
         a constant.\n\n\
         | cases | all | pass | with constants | |\n|---|---|---|---|---|\n",
    );
    sums.iter().for_each(|(name, sum)| text += &sum.text(name));
    text += "\n| operator | all | pass | with constants | of the others |\n|---|---|---|---|---|\n";
    rows.iter().for_each(|((_, operator), row)| text += &row.text(operator));
    text
}

#[test]
fn every_case_is_as_the_ledger_says() {
    let Some(data) = oracle("onnx-1.22.0") else { return };
    let results = run_all(&cases(&data), outcome);
    let line = |result: Result<String, String>| match result {
        Ok(line) => line,
        Err(why) if why.starts_with("PANIC") => why,
        Err(why) => format!("no: {why}"),
    };
    let results: BTreeMap<String, String> =
        results.into_iter().map(|(name, result)| (name, line(result).replace('\n', " "))).collect();
    for kind in KINDS {
        println!("{}", summary(&results, kind));
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = folder.join("ledger.txt");
    let rendered = (folder.join("ledger.md"), table(&results, &operators(&data)));
    let mut text = String::from(
        "# What becomes of each case of the ONNX 1.22.0 suite; BLESS=1 writes this file.\n",
    );
    for (name, line) in &results {
        writeln!(text, "{name} | {line}").expect("a string takes all");
    }
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &text).expect("the ledger can be written");
        std::fs::write(&rendered.0, &rendered.1).expect("the table can be written");
    }
    let panics: Vec<_> = results.iter().filter(|r| r.1.starts_with("PANIC")).collect();
    assert!(panics.is_empty(), "panics: {panics:#?}");
    let ledger = std::fs::read_to_string(&path).unwrap_or_default();
    let known: std::collections::BTreeSet<&str> = ledger.lines().collect();
    let news: Vec<&str> = text.lines().filter(|l| !known.contains(l)).collect();
    assert!(news.is_empty(), "{} lines are not in the ledger:\n{}", news.len(), news.join("\n"));
    assert_eq!(ledger.lines().count(), text.lines().count(), "cases of the ledger");
    let table = std::fs::read_to_string(&rendered.0).unwrap_or_default();
    assert!(table == rendered.1, "ledger.md is not the ledger; BLESS=1 writes it");
}
