//! Runs of hand-written kernels: results, threads, errors.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::{N, executable};
use kiln_runtime::session::RunError;
use kiln_runtime::tensor::{DType, Tensor};

fn inputs(seed: usize) -> (Tensor, Tensor) {
    let values = |factor: usize| (0..N).map(|i| (i * factor + seed) as f32).collect::<Vec<_>>();
    (Tensor::from_slice(&[10, N / 10], &values(1)), Tensor::from_slice(&[10, N / 10], &values(3)))
}

fn expected(seed: usize) -> Vec<f32> {
    (0..N).map(|i| (i * 4 + 2 * seed) as f32 + 0.5).collect()
}

#[test]
fn results_are_equal_for_every_number_of_threads() {
    for (threads, chunks) in [(1, 1), (1, 8), (2, 0), (2, 8), (3, 64)] {
        let executable = executable(threads, chunks);
        for seed in 0..50 {
            let (a, b) = inputs(seed);
            let outputs = executable.run(&[("b", b.view()), ("a", a.view())]).expect("a run");
            assert_eq!(outputs[0].0, "y");
            assert_eq!(outputs[0].1.as_slice::<f32>().expect("f32"), expected(seed));
        }
    }
}

#[test]
fn clones_run_from_many_threads_at_once() {
    let executable = executable(2, 8);
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let executable = executable.clone();
            scope.spawn(move || {
                let (a, b) = inputs(seed);
                for _ in 0..200 {
                    let out = executable.run(&[("a", a.view()), ("b", b.view())]).expect("a run");
                    assert_eq!(out[0].1.as_slice::<f32>().expect("f32"), expected(seed));
                }
            });
        }
    });
}

#[test]
fn sessions_fork_and_reset() {
    let executable = executable(2, 4);
    let mut session = executable.session();
    let (a, b) = inputs(7);
    let given = [("a", a.view()), ("b", b.view())];
    assert_eq!(session.run(&given).expect("a run")[0].1.as_slice::<f32>().unwrap(), expected(7));
    let mut fork = session.fork();
    session.reset();
    for session in [&mut session, &mut fork] {
        let out = session.run(&given).expect("a run");
        assert_eq!(out[0].1.as_slice::<f32>().expect("f32"), expected(7));
    }
}

#[test]
fn profile_times_every_step() {
    let (a, b) = inputs(0);
    let mut y = Tensor::zeros(DType::F32, &[10, N / 10]);
    let profile =
        executable(2, 4).profile(&[a.view(), b.view()], &mut [y.view_mut()]).expect("a run");
    assert_eq!(profile.ends.len(), 2);
    assert!(profile.ends.is_sorted() && profile.total() > 0);
    assert_eq!(y.as_slice::<f32>().expect("f32"), expected(0));
    let mut session = executable(1, 1).session().keep("a", "y").expect("a state");
    session.set_state("a", a).expect("its value");
    let profile = session.profile(&[("b", b.view())]).expect("a run");
    assert_eq!(profile.ends.len(), 2);
    assert_eq!(session.state("a").as_ref(), Some(&y));
}

#[test]
fn errors_say_what_was_found_and_expected() {
    let executable = executable(1, 1);
    let (a, _) = inputs(0);
    let short = Tensor::zeros(DType::F32, &[10]);
    let wide = Tensor::zeros(DType::F64, &[10, N / 10]);
    let mut cut = a.view();
    cut.bytes = &cut.bytes[4..];
    let texts = [
        (vec![("a", a.view())], "no tensor given for input b: f32[10,100]"),
        (vec![("c", a.view())], "the model has no input `c`; its inputs are `a`, `b`"),
        (vec![("a", a.view()), ("a", a.view())], "two tensors given for input `a`"),
        (vec![("a", a.view()), ("b", short.view())], "`b` has shape [10], expected b: f32[10,100]"),
        (vec![("a", wide.view()), ("b", a.view())], "`a` is f64, expected a: f32[10,100]"),
        (vec![("a", cut), ("b", a.view())], "`a` has 3996 bytes, expected 4000 for a: f32[10,100]"),
    ];
    for (given, text) in texts {
        assert_eq!(executable.run(&given).expect_err("an error").to_string(), text);
    }
    let count = executable.run_into(&[a.view()], &mut []).expect_err("an error");
    assert_eq!(count, RunError::Count { what: "inputs", found: 1, expected: 2 });
}
