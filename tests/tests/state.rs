//! Sessions that keep states give what the same model gives when its states are passed by hand.

use kiln::onnx::read_tensor;
use kiln::tensor::{DType, Tensor, TensorView};
use kiln::{Compiler, Executable, Limits, Model, Precision, Session};
use kiln_tests::{Random, Tolerance, difference, oracle};

fn executable(name: &str, compiler: &Compiler) -> Option<Executable> {
    let path = oracle("dynamic")?.join(name).join("model.onnx");
    let model = Model::open(path, &Limits::default()).expect("a model");
    Some(compiler.compile_ranges(&model).unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// Pairs of inputs and outputs of the language model.
fn caches() -> Vec<(String, String)> {
    let kinds = ["k0", "v0", "k1", "v1"].into_iter();
    kinds.map(|kind| (format!("past_{kind}"), format!("present_{kind}"))).collect()
}

/// What a cache begins with: one place that holds zeros.
fn empty() -> Tensor {
    Tensor::zeros(DType::F32, &[1, 2, 1, 16])
}

fn number(value: i64) -> Tensor {
    Tensor::from_slice(&[1, 1], &[value])
}

/// The token with the greatest score.
fn best(outputs: &[(String, Tensor)]) -> i64 {
    let (_, scores) = outputs.iter().find(|(name, _)| name == "scores").expect("scores");
    let scores = scores.as_slice::<f32>().expect("f32");
    let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    best.expect("a vocabulary") as i64
}

/// Tokens that follow, each the best one after those before it.
fn generate(session: &mut Session, mut token: i64, positions: std::ops::Range<i64>) -> Vec<i64> {
    let next = |position| {
        let (given, place) = (number(token), number(position));
        let outputs = session.run(&[("token", given.view()), ("position", place.view())]);
        let outputs = outputs.expect("a step");
        assert_eq!(outputs.len(), 1, "caches are kept, not given out");
        token = best(&outputs);
        token
    };
    positions.map(next).collect()
}

fn session(executable: &Executable) -> Session {
    let session = caches().into_iter().fold(executable.session(), |session, (input, output)| {
        session.keep(&input, &output).expect("a cache")
    });
    start(session)
}

/// The language model, with its caches in place.
fn in_place(past: std::ops::RangeInclusive<usize>) -> Option<Executable> {
    let compiler = Compiler::new().dim_range("past", past).state("past_*", "present_*");
    executable("language", &compiler)
}

#[test]
fn text_is_the_same_where_caches_are_appended_to_in_place() {
    let compiler = Compiler::new().dim_range("past", 1..=80);
    let Some(plain) = executable("language", &compiler) else { return };
    let expected = generate(&mut session(&plain), 7, 0..64);
    let executable = in_place(1..=80).expect("the same model");
    let plan = executable.plan();
    assert!(plan.states.len() == 4 && plan.states.iter().all(|state| state.in_place), "{plan}");
    // Nothing reads a cache but attention, and no copies are left.
    assert!(!plan.steps.iter().any(|s| s.name == "take in" || s.name == "give out"), "{plan}");
    let mut session = start(executable.session());
    assert_eq!(generate(&mut session, 7, 0..20), expected[..20]);
    let mut fork = session.fork();
    assert_eq!(generate(&mut session, expected[19], 20..64), expected[20..]);
    let rows = session.state("past_k1").expect("a cache");
    assert_eq!(rows.shape(), [1, 2, 65, 16]);
    assert_eq!(generate(&mut fork, expected[19], 20..64), expected[20..]);
    assert_eq!(fork.state("past_k1").expect("a cache"), rows);
    // Back to a draft, and on from there.
    session.rewind("past", 31).expect("it was that long");
    assert_eq!(generate(&mut session, expected[29], 30..64), expected[30..]);
    assert!(session.rewind("past", 66).is_err() && session.rewind("batch", 1).is_err());
    assert_eq!(session.state("past_k1").expect("a cache"), rows);
    // As full as it may be, and no further.
    let error = (64..90).try_for_each(|position| {
        let (given, place) = (number(1), number(position));
        session.run(&[("token", given.view()), ("position", place.view())]).map(|_| ())
    });
    let text = error.expect_err("a cache that is full").to_string();
    assert!(text.contains("dim `past` 81, expected 1 to 80"), "{text}");
    // Without a session there is nowhere to keep it.
    let (token, cache) = (number(0), empty());
    let mut inputs = vec![("token", token.view()), ("position", token.view())];
    let names = caches();
    inputs.extend(names.iter().map(|(input, _)| (input.as_str(), cache.view())));
    let text = executable.run(&inputs).expect_err("a run without a session").to_string();
    assert!(text.contains("session"), "{text}");
}

#[test]
fn a_cache_may_begin_empty() {
    let Some(executable) = in_place(0..=80) else { return };
    let mut session = executable.session();
    let tokens = generate(&mut session, 7, 0..64);
    assert_eq!(session.state("past_v0").expect("a cache").shape(), [1, 2, 64, 16]);
    session.reset();
    assert_eq!(generate(&mut session, 7, 0..64), tokens);
    // The same by hand, with tensors of no rows.
    let compiler = Compiler::new().dim_range("past", 0..=80);
    let plain = self::executable("language", &compiler).expect("the same model");
    let mut session = caches().into_iter().fold(plain.session(), |session, (input, output)| {
        session.keep(&input, &output).expect("a cache")
    });
    for (input, _) in caches() {
        session.set_state(&input, Tensor::zeros(DType::F32, &[1, 2, 0, 16])).expect("a cache");
    }
    assert_eq!(generate(&mut session, 7, 0..64), tokens);
    // Shapes that are fixed mean the same.
    let model = oracle("dynamic").expect("it was there").join("language").join("model.onnx");
    let model = Model::open(model, &Limits::default()).expect("a model");
    let on_demand = Compiler::new().on_demand(&model);
    let (token, place, cache) = (number(7), number(0), Tensor::zeros(DType::F32, &[1, 2, 0, 16]));
    let mut inputs = vec![("token", token.view()), ("position", place.view())];
    let names = caches();
    inputs.extend(names.iter().map(|(input, _)| (input.as_str(), cache.view())));
    assert_eq!(best(&on_demand.run(&inputs).expect("a step")), tokens[0]);
}

/// Products are of bf16 in both, whose caches lie apart.
#[test]
fn steps_in_bf16_are_the_same_with_caches_in_place_and_by_hand() {
    let compiler = Compiler::new().dim_range("past", 1..=40).precision(Precision::Bf16);
    let Some(plain) = executable("language", &compiler) else { return };
    let in_place = executable("language", &compiler.state("past_*", "present_*"));
    let in_place = in_place.expect("the same model");
    let (mut by_hand, mut kept) = (session(&plain), start(in_place.session()));
    for position in 0..30 {
        let (token, place) = (number(position * 7 % 50), number(position));
        let given = [("token", token.view()), ("position", place.view())];
        let [a, b] = [&mut by_hand, &mut kept].map(|s| s.run(&given).expect("a step").remove(0));
        let tolerance = Tolerance { rtol: 2f64.powi(-6), atol: 2f64.powi(-6) };
        assert_eq!(difference(&b.1, &a.1, tolerance), None, "step {position}");
    }
    let exact = Compiler::new().dim_range("past", 1..=40);
    let mut exact = session(&executable("language", &exact).expect("the same model"));
    let zero = number(0);
    let given = [("token", zero.view()), ("position", zero.view())];
    let (want, got) = (exact.run(&given), session(&plain).run(&given));
    let (want, got) = (want.expect("a step").remove(0), got.expect("a step").remove(0));
    assert_ne!(want.1.bytes(), got.1.bytes(), "nothing was rounded");
}

fn start(mut session: Session) -> Session {
    caches().iter().for_each(|(input, _)| session.set_state(input, empty()).expect("a cache"));
    session
}

#[test]
fn text_is_the_same_with_caches_in_the_session_and_by_hand() {
    let compiler = Compiler::new().dim_range("past", 1..=80);
    let Some(executable) = executable("language", &compiler) else { return };
    let mut stateless = Vec::new();
    let mut values: Vec<(String, Tensor)> =
        caches().into_iter().map(|(input, _)| (input, empty())).collect();
    let mut token = 7;
    for position in 0..64 {
        let (given, place) = (number(token), number(position));
        let mut inputs = vec![("token", given.view()), ("position", place.view())];
        inputs.extend(values.iter().map(|(name, value)| (name.as_str(), value.view())));
        let outputs = executable.run(&inputs).expect("a step");
        token = best(&outputs);
        stateless.push(token);
        for ((_, value), (_, output)) in values.iter_mut().zip(caches()) {
            *value = outputs.iter().find(|(name, _)| *name == output).expect("a cache").1.clone();
        }
    }
    let mut session = session(&executable);
    assert_eq!(generate(&mut session, 7, 0..64), stateless);
    let (longest, last) = (session.state("past_k0").expect("a cache"), &values[0].1);
    assert_eq!((longest.shape(), longest.bytes()), (&[1, 2, 65, 16][..], last.bytes()));
    // It varies, or it would show little.
    assert!(stateless.windows(2).any(|pair| pair[0] != pair[1]), "{stateless:?}");
    // From the start, and from the middle twice.
    session.reset();
    let place = number(0);
    let unset = session.run(&[("token", place.view()), ("position", place.view())]);
    let text = unset.expect_err("a cache without a value").to_string();
    assert!(text.contains("past_k0") && text.contains("set_state"), "{text}");
    let mut session = start(session);
    assert_eq!(generate(&mut session, 7, 0..20), stateless[..20]);
    let mut fork = session.fork();
    assert_eq!(generate(&mut session, stateless[19], 20..64), stateless[20..]);
    assert_eq!(generate(&mut fork, stateless[19], 20..64), stateless[20..]);
    // No further than the range.
    let error = (64..90).try_for_each(|position| {
        let (given, place) = (number(1), number(position));
        fork.run(&[("token", given.view()), ("position", place.view())]).map(|_| ())
    });
    let text = error.expect_err("a cache that is full").to_string();
    assert!(text.contains("dim `past` 81, expected 1 to 80"), "{text}");
}

/// What a decoder of `tests/models/generation.py` begins with.
const FIRST: i64 = 7;

/// The scores of a decoder after a token.
type Step<'a> = dyn FnMut(&[(&str, TensorView)]) -> Vec<(String, Tensor)> + 'a;

/// Tokens that follow, each the best that was not said before, and the scores of the last.
fn greedy(steps: std::ops::Range<usize>, said: &mut Vec<i64>, step: &mut Step) -> Tensor {
    let mut last = None;
    for position in steps {
        let (token, place) = (number(said[position]), number(position as i64));
        let outputs = step(&[("input_ids", token.view()), ("position_ids", place.view())]);
        let (_, logits) = outputs.into_iter().find(|(name, _)| name == "logits").expect("logits");
        let mut scores = logits.as_slice::<f32>().expect("f32").to_vec();
        said.iter().for_each(|&token| scores[token as usize] = f32::NEG_INFINITY);
        let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        said.push(best.expect("a vocabulary") as i64);
        last = Some(logits);
    }
    last.expect("a step")
}

/// A decoder says the same as it does in onnxruntime, with caches by hand and in a session.
fn decoder_says_what_is_stored(name: &str) {
    let compiler = Compiler::new().threads(2).dim_range("past", 1..=80);
    let Some(executable) = executable(name, &compiler) else { return };
    let folder = oracle("dynamic").expect("the folder of the model").join(name);
    let stored = |kind: &str| {
        let bytes = std::fs::read(folder.join(format!("{kind}.pb"))).expect("a file");
        read_tensor(bytes.into()).expect("a tensor")
    };
    let (tokens, logits) = (stored("tokens"), stored("logits"));
    let tokens = tokens.as_slice::<i64>().expect("i64");
    let inputs = executable.plan().inputs.iter().filter(|port| port.name.starts_with("past"));
    let mut caches: Vec<(String, Tensor)> = inputs
        .map(|port| {
            let shape = [port.shape[0], port.shape[1], 1, port.shape[3]];
            (port.name.clone(), Tensor::zeros(DType::F32, &shape))
        })
        .collect();
    let empty = caches.clone();
    let present = |past: &str| past.replace("past_key_values", "present");
    let mut said = vec![FIRST];
    let found = greedy(0..tokens.len(), &mut said, &mut |given| {
        let mut inputs = given.to_vec();
        inputs.extend(caches.iter().map(|(name, value)| (name.as_str(), value.view())));
        let outputs = executable.run(&inputs).expect("a step");
        for (name, value) in &mut caches {
            let output = outputs.iter().find(|(output, _)| *output == present(name));
            *value = output.expect("a cache").1.clone();
        }
        outputs
    });
    assert_eq!(said[1..], *tokens, "{name}, caches by hand");
    let tolerance = Tolerance { rtol: 1e-3, atol: 1e-3 };
    let far = difference(&found, &logits, tolerance);
    assert!(far.is_none(), "{name}: {far:?}");
    let kept = |session: Session, (name, value): &(String, Tensor)| {
        let mut session = session.keep(name, &present(name)).expect("a cache");
        session.set_state(name, value.clone()).expect("a first value");
        session
    };
    let mut session = empty.iter().fold(executable.session(), kept);
    let mut run = |given: &[(&str, TensorView)]| session.run(given).expect("a step");
    let mut said = vec![FIRST];
    let same = greedy(0..tokens.len(), &mut said, &mut run);
    assert_eq!(said[1..], *tokens, "{name}, caches in a session");
    assert_eq!(same.bytes(), found.bytes(), "{name}, caches in a session");
    // And where each is one piece of memory.
    let compiler = compiler.state("past_key_values*", "present*");
    let executable = self::executable(name, &compiler).expect("the same model");
    let plan = executable.plan();
    assert!(plan.states.len() == empty.len() && plan.states.iter().all(|state| state.in_place));
    assert!(!plan.steps.iter().any(|s| s.name == "take in" || s.name == "give out"), "{plan}");
    let mut session = executable.session();
    for (name, value) in &empty {
        session.set_state(name, value.clone()).expect("a first value");
    }
    let mut run = |given: &[(&str, TensorView)]| session.run(given).expect("a step");
    let mut said = vec![FIRST];
    let close = greedy(0..tokens.len(), &mut said, &mut run);
    assert_eq!(said[1..], *tokens, "{name}, caches in place");
    let far = difference(&close, &logits, tolerance);
    assert!(far.is_none(), "{name}, caches in place: {far:?}");
}

#[test]
fn gpt2_says_what_onnxruntime_says() {
    decoder_says_what_is_stored("gpt2_step_opset20");
    decoder_says_what_is_stored("gpt2_step_opset23");
}

#[test]
fn llama_says_what_onnxruntime_says() {
    decoder_says_what_is_stored("llama_step_opset20");
    decoder_says_what_is_stored("llama_step_opset23");
}

#[test]
fn a_state_of_fixed_shape_starts_with_zeros() {
    let Some(executable) = executable("recurrent", &Compiler::new()) else { return };
    let mut random = Random::new(3);
    let inputs: Vec<Tensor> = (0..5).map(|_| random.tensor(&[2, 8])).collect();
    let mut h = Tensor::zeros(DType::F32, &[2, 16]);
    let mut by_hand = Vec::new();
    for x in &inputs {
        let outputs = executable.run(&[("x", x.view()), ("h", h.view())]).expect("a step");
        by_hand.push(outputs[0].1.clone());
        h = outputs[1].1.clone();
    }
    let mut session = executable.session().keep("h", "next_h").expect("a state");
    for _ in 0..2 {
        for (x, expected) in inputs.iter().zip(&by_hand) {
            let outputs = session.run(&[("x", x.view())]).expect("a step");
            assert_eq!(outputs[0].1.bytes(), expected.bytes());
        }
        session.reset();
    }
}

#[test]
fn wrong_pairs_are_refused_with_both_names() {
    let Some(executable) = executable("recurrent", &Compiler::new()) else { return };
    let keep = |input: &str, output: &str| {
        let error = executable.session().keep(input, output).err().expect("an error");
        error.to_string()
    };
    assert!(keep("hidden", "next_h").contains("no input `hidden`, but x, h"));
    assert!(keep("h", "next").contains("no output `next`, but y, next_h"));
    let text = keep("x", "next_h");
    assert!(text.contains("next_h: f32[2,16]") && text.contains("x: f32[2,8]"), "{text}");
    let session = executable.session().keep("h", "next_h").expect("a state");
    assert!(session.keep("h", "next_h").is_err());
    let mut session = executable.session().keep("h", "next_h").expect("a state");
    let short = Tensor::zeros(DType::F32, &[1, 16]);
    assert!(session.set_state("h", short).is_err());
    assert!(session.set_state("x", Tensor::zeros(DType::F32, &[2, 8])).is_err());
    let (x, h) = (Tensor::zeros(DType::F32, &[2, 8]), Tensor::zeros(DType::F32, &[2, 16]));
    let given: [(&str, TensorView); 2] = [("x", x.view()), ("h", h.view())];
    assert!(session.run(&given).is_err(), "a state that is also given");
}
