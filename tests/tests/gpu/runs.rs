//! Models that run are right, however late the device does what it is asked for.

use kiln::backend::cuda::Gpu;
use kiln::gpu::GpuArtifact;
use kiln::graph::Graph;
use kiln::graph::op::{BinaryFn, ReduceFn, Type, UnaryFn};
use kiln::plan::{PlanState, Port};
use kiln::tensor::{DType, Tensor};
use kiln::{Compiler, Limits, Model};
use kiln_cuda::{CudaModel, CudaSession, MemoryPolicy, Options};
use kiln_gpu::Behaviour;
use kiln_tests::small::MODELS;
use kiln_tests::{ONNX, Random, Tolerance, difference, gpu, interpret, oracle, suite};

use super::{CLOSE, artifact, inputs, is_right, model, named, small};

/// The device works at once, or as late as can be; launches are a graph, or one by one.
fn ways() -> impl Iterator<Item = (Behaviour, Options)> {
    let ways = [(false, true), (true, true), (false, false), (true, false)].into_iter();
    ways.map(|(early, graphs)| {
        let behaviour = Behaviour { early, ..Behaviour::default() };
        (behaviour, Options { graphs, ..Options::default() })
    })
}

#[test]
fn small_models_are_right_and_give_all_back() {
    for (name, _) in MODELS {
        let graph = small(name);
        let artifact = artifact(&graph);
        for (behaviour, options) in ways() {
            let (double, model) = model(&artifact, behaviour, options);
            for seed in 0..3 {
                let inputs = inputs(&graph, seed);
                let outputs = model.run(&named(&graph, &inputs)).expect(name);
                is_right(&graph, &inputs, &outputs).unwrap_or_else(|why| panic!("{name}: {why}"));
            }
            drop(model);
            assert_eq!(double.problems(), [""; 0], "{name}");
            let count = |call: &str| double.calls().iter().filter(|c| **c == call).count();
            assert_eq!((count("load"), count("upload_now")), (1, 1), "{name}: once for all runs");
            let captured = usize::from(options.graphs);
            assert_eq!((count("begin_capture"), count("replay")), (captured, 3 * captured));
            let steps = artifact.plan.steps.len();
            assert_eq!(count("launch"), if options.graphs { steps } else { 3 * steps });
        }
    }
}

#[test]
fn constants_are_folded_when_the_model_is_compiled() {
    for (name, _) in MODELS {
        let GpuArtifact { plan, modules, .. } = artifact(&small(name));
        let used = |kernel: usize| plan.steps.iter().any(|step| step.kernel == kernel);
        assert!((0..modules[0].kernels.len()).all(used), "{name}: kernels that nothing launches");
        let given = |step: &kiln::plan::Step| {
            step.buffers.iter().any(|place| !matches!(place, kiln::plan::Place::Const(_)))
        };
        assert!(plan.steps.iter().all(given), "{name}");
    }
}

/// Runs through a pipeline; gives the outputs in order.
fn pipeline(model: &CudaModel, graph: &kiln::graph::Graph, seeds: std::ops::Range<u64>) {
    let mut stream = model.stream().expect("a stream");
    let mut made = Vec::new();
    for seed in seeds.clone() {
        let inputs = inputs(graph, seed);
        // The tensors are gone when the run ends: they were copied.
        made.extend(stream.push(&named(graph, &inputs)).expect("a run"));
    }
    while let Some(outputs) = stream.finish().expect("a run") {
        made.push(outputs);
    }
    assert_eq!(made.len() as u64, seeds.end - seeds.start);
    for (seed, outputs) in seeds.zip(&made) {
        let right = is_right(graph, &inputs(graph, seed), outputs);
        right.unwrap_or_else(|why| panic!("run {seed}: {why}"));
    }
}

#[test]
fn pipelines_give_each_run_its_own_outputs() {
    for (name, _) in MODELS {
        let graph = small(name);
        let artifact = artifact(&graph);
        for (behaviour, options) in ways() {
            let (double, model) = model(&artifact, behaviour, options);
            pipeline(&model, &graph, 0..7);
            pipeline(&model, &graph, 7..8);
            // One that is dropped while its runs are under way.
            let mut stream = model.stream().expect("a stream");
            stream.push(&named(&graph, &inputs(&graph, 9))).expect("a run");
            drop(stream);
            drop(model);
            assert_eq!(double.problems(), [""; 0], "{name}");
        }
    }
}

#[test]
fn steps_are_timed_and_waited_for_one_by_one() {
    let graph = small("cnn");
    let (double, model) = model(&artifact(&graph), Behaviour::default(), Options::default());
    let given = inputs(&graph, 1);
    let mut session = model.session().expect("a session");
    let outputs = session.run_stepwise(&named(&graph, &given)).expect("a run");
    is_right(&graph, &given, &outputs).expect("right");
    let profile = session.profile(&named(&graph, &given)).expect("a run");
    assert_eq!(profile.ends.len(), model.plan().steps.len());
    assert!(profile.ends.is_sorted() && profile.ends[0] > 0, "{:?}", profile.ends);
    assert!(session.time(&named(&graph, &given), 3).expect("runs") > 0);
    drop((session, model));
    assert_eq!(double.problems(), [""; 0]);
}

/// The token with the greatest score.
fn best(outputs: &[(String, Tensor)]) -> i64 {
    let (_, scores) = outputs.iter().find(|(name, _)| name == "scores").expect("scores");
    let scores = scores.as_slice::<f32>().expect("f32");
    let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    best.expect("a vocabulary") as i64
}

/// What a step of the language model reads besides its caches.
fn step(token: i64, position: i64) -> [(&'static str, Tensor); 2] {
    let number = |value: i64| Tensor::from_slice(&[1, 1], &[value]);
    [("token", number(token)), ("position", number(position))]
}

/// A language model whose caches stay on the device writes what it writes on the CPU; forks and
/// lengths that are taken back do not disturb one another.
#[test]
fn caches_stay_on_the_device() {
    let Some(folder) = oracle("dynamic") else { return };
    let language = Model::open(folder.join("language/model.onnx"), &Limits::default());
    let language = language.expect("a model");
    let compiler = Compiler::new().dim_range("past", 1..=12).state("past_*", "present_*");
    let names = ["past_k0", "past_v0", "past_k1", "past_v1"];
    let empty = Tensor::zeros(DType::F32, &[1, 2, 1, 16]);
    let executable = compiler.compile_ranges(&language).expect("a model");
    let mut expected = executable.session();
    let artifact = compiler.compile_cuda(&language, &[Gpu::of(80).expect("a GPU")]).expect("PTX");
    let memory = artifact.memory();
    let (double, model) = model(&artifact, Behaviour::default(), Options::default());
    let mut session = model.session().expect("a session");
    assert!(memory.kept > 0 && double.taken() == memory.total());
    for name in names {
        expected.set_state(name, empty.clone()).expect("a cache");
        session.set_state(name, empty.clone()).expect("a cache");
    }
    let next = |session: &mut CudaSession, token, position| {
        let given = step(token, position);
        let views: Vec<_> = given.iter().map(|(name, tensor)| (*name, tensor.view())).collect();
        best(&session.run(&views).expect("a step"))
    };
    let mut tokens = vec![7];
    for position in 0..6 {
        let given = step(tokens[position], position as i64);
        let views: Vec<_> = given.iter().map(|(name, tensor)| (*name, tensor.view())).collect();
        tokens.push(best(&expected.run(&views).expect("a step")));
    }
    for position in 0..4 {
        assert_eq!(next(&mut session, tokens[position], position as i64), tokens[position + 1]);
    }
    let mut fork = session.fork().expect("a fork");
    for session in [&mut session, &mut fork] {
        assert_eq!(next(session, tokens[4], 4), tokens[5]);
    }
    session.rewind("past", 3).expect("it was longer");
    for position in 2..6 {
        assert_eq!(next(&mut session, tokens[position], position as i64), tokens[position + 1]);
    }
    for name in names {
        let (got, want) = (session.state(name).expect("a state"), expected.state(name));
        let (got, want) = (got.expect("a cache"), want.expect("a cache"));
        assert_eq!(difference(&got, &want, CLOSE), None, "{name}");
    }
    drop((session, fork, model));
    assert_eq!(double.problems(), [""; 0]);
}

/// A recurrent network of one layer: its state and what it says of it.
fn recurrent() -> Graph {
    let (mut graph, o) = (Graph::default(), &"recurrent".into());
    let x = graph.input("x", Type::new(DType::F32, &[2, 6]));
    let h = graph.input("h", Type::new(DType::F32, &[2, 5]));
    let weight = |graph: &mut Graph, seed, shape: &[usize]| {
        graph.tensor(&Random::new(seed).tensor(shape), o)
    };
    let (w, u) = (weight(&mut graph, 1, &[6, 5]), weight(&mut graph, 2, &[5, 5]));
    let x = graph.matmul(x, w, o).expect("a product");
    let h = graph.matmul(h, u, o).expect("a product");
    let next = graph.binary(BinaryFn::Add, x, h, o).expect("a sum");
    let next = graph.unary(UnaryFn::Tanh, next, o).expect("a function");
    let y = graph.reduce(ReduceFn::Max, next, &[1], o).expect("the most");
    graph.outputs.extend([("y".into(), y), ("next".into(), next)]);
    graph.states.push(PlanState { input: 1, output: 1, in_place: false });
    graph
}

/// States that a run makes anew go from output to input on the device; who takes a run's memory
/// after that sees nothing of it.
#[test]
fn states_of_fixed_shape_stay_on_the_device() {
    let graph = recurrent();
    let artifact = artifact(&graph);
    let given = |seed| [Random::new(seed).tensor(&[2, 6])];
    // What the graph gives for an input and a state.
    let meant = |x: &[Tensor; 1], h: &Tensor| interpret(&graph, &[x[0].clone(), h.clone()]);
    let zeros = || Tensor::zeros(DType::F32, &[2, 5]);
    let same = |got: &Tensor, want: &Tensor| assert_eq!(difference(got, want, CLOSE), None);
    for (behaviour, options) in ways() {
        let options = Options { memory: MemoryPolicy::Preallocate, ..options };
        let (double, model) = model(&artifact, behaviour, options);
        let mut session = model.session().expect("a session");
        let mut h = zeros();
        let step = |session: &mut CudaSession, h: &mut Tensor, seed| {
            let x = given(seed);
            let want = meant(&x, h);
            let got = session.run(&[("x", x[0].view())]).expect("a step");
            assert_eq!(got.len(), 1, "the state is no output");
            same(&got[0].1, &want[0]);
            *h = want[1].clone();
        };
        (0..4).for_each(|seed| step(&mut session, &mut h, seed));
        let count = |call: &str| double.calls().iter().filter(|c| **c == call).count();
        assert_eq!([count("upload"), count("download"), count("copy")], [4, 4, 4]);
        same(&session.state("h").expect("a state").expect("a value"), &h);
        h = Random::new(9).tensor(&[2, 5]);
        session.set_state("h", h.clone()).expect("a state");
        (4..6).for_each(|seed| step(&mut session, &mut h, seed));
        session.reset().expect("a session");
        h = zeros();
        (6..8).for_each(|seed| step(&mut session, &mut h, seed));
        drop(session);
        // The memory of the session serves a run that gives and takes everything.
        let (x, h) = (given(11), Random::new(12).tensor(&[2, 5]));
        let got = model.run(&[("x", x[0].view()), ("h", h.view())]).expect("a run");
        got.iter().zip(&meant(&x, &h)).for_each(|((_, got), want)| same(got, want));
        let mut session = model.session().expect("a session");
        step(&mut session, &mut zeros(), 13);
        drop((session, model));
        assert_eq!(double.problems(), [""; 0]);
    }
    // Forks go their own ways.
    let (double, model) = model(&artifact, Behaviour::default(), Options::default());
    let mut session = model.session().expect("a session");
    let run = |session: &mut CudaSession, seed| {
        session.run(&[("x", given(seed)[0].view())]).expect("a step");
    };
    run(&mut session, 0);
    let mut fork = session.fork().expect("a fork");
    run(&mut session, 1);
    run(&mut fork, 2);
    let first = meant(&given(0), &zeros());
    for (session, seed) in [(&session, 1), (&fork, 2)] {
        let want = meant(&given(seed), &first[1]);
        same(&session.state("h").expect("a state").expect("a value"), &want[1]);
    }
    drop((session, fork, model));
    assert_eq!(double.problems(), [""; 0]);
}

/// Every case of the ONNX suite that the CPU passes, through the runtime.
#[test]
fn cases_of_the_suite_are_right() {
    let Some(data) = oracle("onnx-1.22.0") else { return };
    let ledger = include_str!("../../ledger.txt");
    let passes = |name: &str| ledger.lines().any(|l| l.starts_with(&format!("{name} | pass")));
    let mut cases = suite::cases(&data);
    cases.retain(|(name, _)| passes(name));
    let results = suite::run_all(&cases, |folder| {
        let suite::Given { graph, inputs, outputs, .. } = suite::given(folder)?;
        let artifact = gpu::artifact(&graph, &Compiler::new())?;
        let (double, made) = gpu::model(&artifact, Behaviour::default(), Options::default());
        let model = made.map_err(|e| e.to_string())?;
        let got = model.run(&named(&graph, &inputs)).map_err(|e| e.to_string())?;
        drop(model);
        let problems = double.problems();
        let mut pairs = got.iter().zip(&outputs);
        match pairs.find_map(|((_, got), want)| difference(got, want, ONNX)) {
            Some(why) => Err(format!("differs: {why}")),
            None if !problems.is_empty() => Err(problems.join(", ")),
            None => Ok(String::new()),
        }
    });
    let wrong: Vec<String> = results
        .iter()
        .filter_map(|(name, result)| Some(format!("{name}: {}", result.as_ref().err()?)))
        .collect();
    println!("{} of {} cases are right on the runtime", results.len() - wrong.len(), results.len());
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
    assert!(results.len() > 1000, "cases of the suite");
}

/// Networks from files, whose kernels go through tiles and rows, as the CPU runs them.
#[test]
fn networks_give_what_the_cpu_gives() {
    let Some(folder) = oracle("models") else { return };
    for name in ["mlp_b1", "cnn_b1", "qdq_mlp_b1"] {
        let network = Model::open(folder.join(name).join("model.onnx"), &Limits::default());
        let network = network.expect("a model");
        let graph = Compiler::new().graph(&network).expect("a graph");
        let given = inputs(&graph, 3);
        let executable = Compiler::new().compile(&network).expect("code");
        let want = executable.run(&named(&graph, &given)).expect("a run");
        let (double, model) = model(&artifact(&graph), Behaviour::default(), Options::default());
        let got = model.run(&named(&graph, &given)).expect("a run");
        for ((port, got), (_, want)) in got.iter().zip(&want) {
            let close = Tolerance { rtol: 1e-3, atol: 1e-4 };
            assert_eq!(difference(got, want, close), None, "{name}: {port}");
        }
        drop(model);
        assert_eq!(double.problems(), [""; 0], "{name}");
    }
}

/// One plan for all lengths of its dims: what is copied and what kernels do follows the lengths of
/// each run, in sessions and in a pipeline whose runs have other ones.
#[test]
fn lengths_of_dims_may_change_from_run_to_run() {
    let Some(folder) = oracle("dynamic") else { return };
    for (name, ranges, lengths) in [
        ("cnn", &[("batch", 4)][..], &[&[1][..], &[4], &[2], &[3]][..]),
        ("encoder", &[("batch", 2), ("sequence", 10)], &[&[1, 1], &[2, 10], &[2, 3], &[1, 7]]),
        ("decoder", &[("batch", 2), ("past", 6)], &[&[1, 1], &[2, 6], &[2, 3], &[1, 5]]),
        ("joined", &[("batch", 4), ("sequence", 20)], &[&[1, 1], &[4, 20], &[2, 3], &[3, 8]]),
        ("cut_far", &[("past", 40), ("sequence", 64)], &[&[1, 1], &[40, 64], &[2, 3], &[5, 2]]),
    ] {
        let network = Model::open(folder.join(name).join("model.onnx"), &Limits::default());
        let network = network.expect("a model");
        let compiler = ranges.iter().fold(Compiler::new(), |c, r| c.dim_range(r.0, 1..=r.1));
        let executable = compiler.compile_ranges(&network).expect("code");
        let isa = Gpu::of(80).expect("a GPU");
        let artifact = compiler.compile_cuda(&network, &[isa]).expect("PTX");
        let given = |lengths: &[usize], seed: u64| -> Vec<(String, Tensor)> {
            let mut random = Random::new(seed);
            let tensor = |port: &Port| {
                let mut shape = port.shape.clone();
                for at in &port.lengths {
                    let dim = &artifact.plan.dims[at.dim].name;
                    let dim = ranges.iter().position(|r| r.0 == dim).expect("a dim of the model");
                    shape[at.axis] = (lengths[dim] as i64 + at.more) as usize;
                }
                let tensor = match port.dtype {
                    DType::I64 => {
                        let count = shape.iter().product();
                        let ids: Vec<i64> = (0..count).map(|_| random.below(50) as i64).collect();
                        Tensor::from_slice(&shape, &ids)
                    }
                    _ => random.tensor(&shape),
                };
                (port.name.clone(), tensor)
            };
            artifact.plan.inputs.iter().map(tensor).collect()
        };
        let on_cpu = |given: &[(String, Tensor)]| -> Vec<(String, Tensor)> {
            let named: Vec<_> = given.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
            executable.run(&named).expect("a run")
        };
        let close = |got: &[(String, Tensor)], want: &[(String, Tensor)]| {
            for ((port, got), (_, want)) in got.iter().zip(want) {
                let tolerance = Tolerance { rtol: 1e-4, atol: 1e-4 };
                assert_eq!(difference(got, want, tolerance), None, "{name}: {port}");
            }
        };
        let (double, model) = model(&artifact, Behaviour::default(), Options::default());
        let (mut stream, mut expected, mut made) =
            (model.stream().expect("a stream"), Vec::new(), Vec::new());
        for (seed, lengths) in (1..).zip(lengths) {
            let given = given(lengths, seed);
            let named: Vec<_> = given.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
            expected.push(on_cpu(&given));
            close(&model.run(&named).expect("a run"), &expected[expected.len() - 1]);
            made.extend(stream.push(&named).expect("a run"));
        }
        while let Some(outputs) = stream.finish().expect("a run") {
            made.push(outputs);
        }
        assert_eq!(made.len(), expected.len());
        made.iter().zip(&expected).for_each(|(got, want)| close(got, want));
        drop((stream, model));
        assert_eq!(double.problems(), [""; 0], "{name}");
        let captures = double.calls().iter().filter(|call| **call == "begin_capture").count();
        assert_eq!(captures, 3, "one graph for each set of ports, whatever the lengths");
    }
}

/// A model with named dims is compiled for the device and the shapes that it meets; what was
/// compiled is kept there, within bounds, and given back.
#[test]
fn models_are_compiled_for_the_device_on_demand() {
    let Some(folder) = oracle("dynamic") else { return };
    let network = Model::open(folder.join("cnn/model.onnx"), &Limits::default()).expect("a model");
    let double = kiln_gpu::Double::new(Behaviour::default());
    let gpu = kiln_cuda::Gpu::with(double.clone());
    let on_device = move |compiler: &Compiler, model: &Model| {
        let isa = Gpu::of(80).expect("a GPU");
        let artifact = compiler.compile_cuda_of(&compiler.graph(model)?, &[isa])?;
        // SAFETY: the text was emitted from loops that were checked against the plan.
        let made = unsafe { CudaModel::new(&gpu, &artifact, Options::default()) };
        Ok(made.unwrap_or_else(|why| panic!("{why}")))
    };
    let bytes = |model: &CudaModel| model.memory().total() as usize;
    let compiler = Compiler::new().kept_bytes(100_000);
    let device = compiler.on_demand_with(&network, on_device, bytes);
    let cpu = compiler.on_demand(&network);
    for batch in [1, 3, 1, 2, 1] {
        let x = Random::new(batch as u64).tensor(&[batch, 3, 12, 12]);
        let given = [("x", x.view())];
        let model = device.executable(&given).expect("a model on the device");
        let (got, want) = (model.run(&given).expect("a run"), cpu.run(&given).expect("a run"));
        let close = Tolerance { rtol: 1e-4, atol: 1e-5 };
        assert_eq!(difference(&got[0].1, &want[0].1, close), None, "batch {batch}");
        assert!(device.kept_bytes() <= 100_000);
    }
    let loads = double.calls().iter().filter(|call| **call == "load").count();
    assert_eq!((loads, device.kept()), (3, 3));
    drop(device);
    assert_eq!((double.taken(), double.problems()), (0, vec![]));
}
