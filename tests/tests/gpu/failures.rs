//! Whatever call of the driver fails, it is said, and everything is given back.

use kiln::gpu::GpuArtifact;
use kiln::graph::Graph;
use kiln_cuda::driver::FaultKind;
use kiln_cuda::{CudaError, CudaModel, Options};
use kiln_gpu::Behaviour;
use kiln_tests::gpu;

use super::{artifact, inputs, is_right, model, named, small};

/// Everything that a model can be asked for.
fn all(model: &CudaModel, graph: &Graph) -> Result<(), CudaError> {
    let given = [inputs(graph, 1), inputs(graph, 2)];
    let right = |inputs: &[_], outputs: &[_]| {
        is_right(graph, inputs, outputs).unwrap_or_else(|why| panic!("a wrong result: {why}"));
    };
    right(&given[0], &model.run(&named(graph, &given[0]))?);
    let mut session = model.session()?;
    right(&given[1], &session.run(&named(graph, &given[1]))?);
    session.profile(&named(graph, &given[0]))?;
    session.time(&named(graph, &given[0]), 2)?;
    session.reset()?;
    right(&given[0], &session.fork()?.run_stepwise(&named(graph, &given[0]))?);
    model.footprints()?;
    let mut stream = model.stream()?;
    for i in 0..4 {
        if let Some(outputs) = stream.push(&named(graph, &given[i % 2]))? {
            right(&given[i % 2], &outputs);
        }
    }
    let mut next = 0;
    while let Some(outputs) = stream.finish()? {
        right(&given[next % 2], &outputs);
        next += 1;
    }
    // What failed once may be asked again.
    right(&given[1], &model.run(&named(graph, &given[1]))?);
    Ok(())
}

/// Whether a call waits for a lane that nobody needs any more: all of its streams, one after
/// another. Whether that fails is nobody's concern.
fn is_last_wait(calls: &[&str], number: usize) -> bool {
    let waits = |calls: &[&str]| calls.len() == 3 && calls.iter().all(|c| *c == "synchronize");
    (number.saturating_sub(2)..=number).any(|at| calls.get(at..at + 3).is_some_and(waits))
}

#[test]
fn any_call_may_fail() {
    let graph = small("attention");
    let artifact = artifact(&graph);
    for kind in [FaultKind::Memory, FaultKind::Assembly, FaultKind::Broken, FaultKind::Other] {
        let mut failed = 0;
        for number in 0.. {
            let behaviour = Behaviour { fails: Some((number, kind)), ..Behaviour::default() };
            let (double, made) = gpu::model(&artifact, behaviour, Options::default());
            let result = made.and_then(|model| all(&model, &graph));
            let calls = double.calls();
            assert_eq!(double.problems(), [""; 0], "call {number}, {:?}", calls.get(number));
            match result {
                Ok(()) if calls.len() <= number => break,
                Ok(()) if is_last_wait(&calls, number) => {}
                Ok(()) => panic!("call {number}, {}, fails and nobody says so", calls[number]),
                Err(error) => {
                    let text = format!("{error} {}", error.help());
                    let was = matches!(error, CudaError::Memory { .. });
                    let asks = ["allocate", "pin", "load", "stream", "event"];
                    let asked = kind == FaultKind::Memory && asks.contains(&calls[number]);
                    assert!(was == asked || calls[number] == "event", "{}: {text}", calls[number]);
                    failed += 1;
                }
            }
        }
        assert!(failed > 100, "{failed} calls");
    }
}

#[test]
fn a_run_after_one_that_failed_is_right() {
    let graph = small("cnn");
    let artifact = artifact(&graph);
    let (double, made) = gpu::model(&artifact, Behaviour::default(), Options::default());
    let loaded = double.calls().len();
    let given = inputs(&graph, 1);
    made.expect("a model").run(&named(&graph, &given)).expect("a run");
    let calls = double.calls();
    for number in (loaded..calls.len()).filter(|at| !is_last_wait(&calls, *at)) {
        let kind = FaultKind::Other;
        let behaviour = Behaviour { fails: Some((number, kind)), ..Behaviour::default() };
        let (double, made) = gpu::model(&artifact, behaviour, Options::default());
        let model = made.expect("a model");
        assert!(model.run(&named(&graph, &given)).is_err(), "call {number}");
        let outputs = model.run(&named(&graph, &given)).expect("a run");
        is_right(&graph, &given, &outputs).expect("right");
        let mut session = model.session().expect("a session");
        session.run(&named(&graph, &given)).expect("a run");
        drop((session, model));
        assert_eq!(double.problems(), [""; 0], "call {number}");
    }
}

#[test]
fn kernels_for_later_devices_are_refused() {
    let artifact = artifact(&small("mlp"));
    let behaviour = Behaviour { sm: 75, ..Behaviour::default() };
    let (double, made) = gpu::model(&artifact, behaviour, Options::default());
    let error = made.err().expect("no kernels for it");
    assert!(matches!(error, CudaError::Architecture { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("has sm_75, the model was compiled for sm_80"), "{text}");
    assert_eq!((double.calls().len(), double.problems().len()), (0, 0));
}

/// An artifact whose kernels touch what its plan does not give them.
fn astray() -> (Graph, GpuArtifact) {
    let graph = small("attention");
    let mut artifact = artifact(&graph);
    artifact.plan.arena_bytes -= 64;
    (graph, artifact)
}

#[test]
fn kernels_that_go_astray_are_named() {
    let (graph, artifact) = astray();
    let given = inputs(&graph, 1);
    let (double, model) = model(&artifact, Behaviour::default(), Options::default());
    let error = model.run(&named(&graph, &given)).expect_err("out of bounds");
    assert!(matches!(error, CudaError::Driver { .. }), "{error}");
    drop(model);
    assert!(double.faults()[0].contains("out of bounds"), "{:?}", double.faults());
    let (_, model) = self::model(&artifact, Behaviour::default(), Options::default());
    let mut session = model.session().expect("a session");
    let error = session.run_stepwise(&named(&graph, &given)).expect_err("out of bounds");
    let CudaError::Step { step, .. } = &error else { panic!("{error}") };
    assert!(model.plan().steps.iter().any(|s| s.name == *step), "{error}");
}

#[test]
fn text_that_the_driver_does_not_take_is_refused() {
    let graph = small("mlp");
    let mut artifact = artifact(&graph);
    let text = String::from_utf8(artifact.text).expect("text");
    artifact.text = text.replacen("ld.global", "ld.globul", 1).into_bytes();
    let (double, made) = gpu::model(&artifact, Behaviour::default(), Options::default());
    let error = made.err().expect("no instruction");
    assert!(matches!(error, CudaError::Assembly { sm: 80, .. }), "{error}");
    assert!(error.to_string().contains("ld.globul"), "{error}");
    assert_eq!(double.problems(), [""; 0]);
}

#[test]
fn tensors_that_do_not_fit_are_refused_before_anything_is_done() {
    let graph = small("mlp");
    let (double, model) = model(&artifact(&graph), Behaviour::default(), Options::default());
    let calls = double.calls().len();
    let wrong = kiln::tensor::Tensor::zeros(kiln::tensor::DType::F32, &[3, 3]);
    for given in [vec![("x", wrong.view())], vec![], vec![("z", wrong.view())]] {
        assert!(matches!(model.run(&given), Err(CudaError::Run(_))));
    }
    assert_eq!(double.calls().len(), calls);
}
