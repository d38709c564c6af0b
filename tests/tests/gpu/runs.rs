//! Models that run are right, however late the device does what it is asked for.

use kiln::gpu::GpuArtifact;
use kiln_cuda::{CudaModel, Options};
use kiln_gpu::Behaviour;
use kiln_tests::small::MODELS;

use super::{artifact, inputs, is_right, model, named, small};

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
    drop((session, model));
    assert_eq!(double.problems(), [""; 0]);
}
