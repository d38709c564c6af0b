//! Device memory: exactly what was announced, when it was announced, and no more than is allowed.

use kiln_cuda::{CudaError, MemoryPolicy, Options};
use kiln_gpu::Behaviour;
use kiln_tests::gpu;

use super::{artifact, inputs, is_right, model, named, small};

fn policy(memory: MemoryPolicy) -> Options {
    Options { memory, ..Options::default() }
}

#[test]
fn memory_grows_with_runs_at_once_and_is_given_back() {
    let graph = small("attention");
    let artifact = artifact(&graph);
    let memory = artifact.memory();
    assert!(memory.weights > 0 && memory.arena > 0 && memory.ports > 0, "{memory:?}");
    let (double, model) = model(&artifact, Behaviour::default(), policy(MemoryPolicy::Grow));
    assert_eq!((double.taken(), model.taken()), (memory.weights, memory.weights));
    let given = inputs(&graph, 1);
    for _ in 0..3 {
        model.run(&named(&graph, &given)).expect("a run");
        assert_eq!((double.taken(), model.taken()), (memory.total(), memory.total()));
    }
    let sessions: Vec<_> = (0..3).map(|_| model.session().expect("a session")).collect();
    assert_eq!(double.taken(), memory.weights + 3 * memory.lane(1), "weights are shared");
    let stream = model.stream().expect("a stream");
    assert_eq!(double.taken(), memory.weights + 3 * memory.lane(1) + memory.lane(2));
    drop((sessions, stream));
    assert_eq!((double.taken(), model.taken()), (memory.weights, memory.weights));
    let clone = model.clone();
    drop(model);
    clone.run(&named(&graph, &given)).expect("a run");
    drop(clone);
    assert_eq!((double.taken(), double.problems()), (0, vec![]));
}

#[test]
fn what_is_preallocated_is_all_that_there_is() {
    let graph = small("cnn");
    let artifact = artifact(&graph);
    let total = artifact.memory().total();
    let options = policy(MemoryPolicy::Preallocate);
    let (double, model) = model(&artifact, Behaviour::default(), options);
    assert_eq!(double.taken(), total);
    let given = inputs(&graph, 1);
    model.run(&named(&graph, &given)).expect("a run");
    let session = model.session().expect("a session");
    assert!(matches!(model.session().err(), Some(CudaError::Limit { .. })));
    assert!(matches!(model.run(&named(&graph, &given)).err(), Some(CudaError::Limit { .. })));
    drop(session);
    model.run(&named(&graph, &given)).expect("a run");
    assert_eq!(double.most(), total);
    drop(model);
    assert_eq!(double.problems(), [""; 0]);
}

#[test]
fn runs_wait_for_one_another_where_memory_is_limited() {
    let graph = small("attention");
    let artifact = artifact(&graph);
    let memory = artifact.memory();
    for (limit, lanes) in [(memory.total(), 1), (memory.total() + memory.lane(1), 2)] {
        let options = policy(MemoryPolicy::Limit(limit));
        let (double, model) = model(&artifact, Behaviour::default(), options);
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (model, graph) = (model.clone(), &graph);
                scope.spawn(move || {
                    for turn in 0..8 {
                        let given = inputs(graph, seed * 100 + turn);
                        let outputs = model.run(&named(graph, &given)).expect("a run");
                        is_right(graph, &given, &outputs).expect("right");
                    }
                });
            }
        });
        assert!(double.most() <= memory.weights + lanes * memory.lane(1));
        drop(model);
        assert_eq!(double.problems(), [""; 0]);
    }
}

#[test]
fn a_limit_that_is_too_low_is_said_before_anything_is_asked_for() {
    let artifact = artifact(&small("mlp"));
    let limit = artifact.memory().total() - 1;
    let options = policy(MemoryPolicy::Limit(limit));
    let (double, made) = gpu::model(&artifact, Behaviour::default(), options);
    let error = made.err().expect("too little");
    assert!(matches!(error, CudaError::Limit { .. }), "{error}");
    let text = format!("{} bytes of device memory, {limit} are allowed", limit + 1);
    assert!(error.to_string().contains(&text), "{error}");
    assert_eq!(double.calls(), [""; 0]);
}

#[test]
fn a_device_that_is_too_small_is_an_error_with_numbers() {
    let graph = small("mlp");
    let artifact = artifact(&graph);
    let memory = artifact.memory();
    for all in [memory.weights - 1, memory.total() - 1] {
        let behaviour = Behaviour { memory: all, ..Behaviour::default() };
        let (double, made) = gpu::model(&artifact, behaviour, Options::default());
        let given = inputs(&graph, 1);
        let error = made.and_then(|model| model.run(&named(&graph, &given)).map(|_| ()));
        let error = error.expect_err("too little");
        assert!(matches!(error, CudaError::Memory { .. }), "{error}");
        assert!(error.to_string().contains(&format!("of {all} are free")), "{error}");
        assert_eq!((double.taken(), double.problems()), (0, vec![]));
    }
}
