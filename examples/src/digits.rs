//! Compiles the network that ships with Kiln and shows it handwritten digits it has never seen.

use std::error::Error;
use std::time::{Duration, Instant};

use kiln::tensor::{DType, Tensor, TensorView};
use kiln::{Compiler, Executable, Limits, Model};
use kiln_examples::shipped;

/// Height and width of an image.
const SIDE: usize = 8;
const PIXELS: usize = SIDE * SIDE;
/// Digits in a row of the drawing.
const COLUMNS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let arrays = kiln::npz::read_npz(&std::fs::read(shipped("digits_test.npz"))?)?;
    let array = |key: &str| arrays.iter().find(|(name, _)| name == key).map(|(_, tensor)| tensor);
    let images = array("image").and_then(Tensor::as_slice::<f32>).ok_or("no images")?;
    let labels = array("label").and_then(Tensor::as_slice::<i64>).ok_or("no labels")?;

    let begin = Instant::now();
    let model = Model::open(shipped("digits.onnx"), &Limits::default())?;
    let executable = Compiler::new().threads(1).dim("batch", 1).compile(&model)?;
    let compile_time = begin.elapsed();

    let (answers, times) = classify(&executable, images)?;
    draw(images, labels, &answers);
    let right = answers.iter().zip(labels).filter(|(answer, label)| answer.digit == **label);
    let right = right.count();
    println!(
        "accuracy  {:.1} % ({right} of {} digits that were held out of training)",
        100.0 * right as f64 / labels.len() as f64,
        labels.len()
    );
    println!("compile   {:.1} ms, from the bytes of the file", ms(compile_time));
    println!("latency   {:.1} us for one digit (median)", 1e3 * ms(times[times.len() / 2]));
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What the network says of an image.
struct Answer {
    digit: i64,
    probability: f32,
}

/// Runs the network on each image, and gives its answers and the sorted times.
fn classify(
    executable: &Executable,
    images: &[f32],
) -> Result<(Vec<Answer>, Vec<Duration>), Box<dyn Error>> {
    let shape = executable.inputs()[0].shape.clone();
    // Both tensors are used again for every image: `run_into` does not allocate.
    let mut input = Tensor::zeros(DType::F32, &shape);
    let mut output = Tensor::zeros(DType::F32, &executable.outputs()[0].shape);
    let mut answers = Vec::new();
    let mut times = Vec::new();
    for image in images.chunks_exact(PIXELS) {
        input.as_slice_mut::<f32>().ok_or("f32 input")?.copy_from_slice(image);
        let begin = Instant::now();
        let inputs: [TensorView<'_>; 1] = [input.view()];
        executable.run_into(&inputs, &mut [output.view_mut()])?;
        times.push(begin.elapsed());
        let scores = output.as_slice::<f32>().ok_or("f32 output")?;
        let best = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let best = best.ok_or("no scores")?;
        answers.push(Answer { digit: best as i64, probability: scores[best] });
    }
    times.sort_unstable();
    Ok((answers, times))
}

/// Draws the first image of every digit, and then the network's mistakes, as many as fit a row.
fn draw(images: &[f32], labels: &[i64], answers: &[Answer]) {
    let first = (0..10).filter_map(|digit| labels.iter().position(|label| *label == digit));
    let first: Vec<usize> = first.collect();
    let wrong = (0..labels.len()).filter(|index| answers[*index].digit != labels[*index]);
    let wrong: Vec<usize> = wrong.take(COLUMNS).collect();
    first.chunks(COLUMNS).for_each(|row| draw_row(images, labels, answers, row));
    if !wrong.is_empty() {
        println!("and where it is wrong:\n");
        draw_row(images, labels, answers, &wrong);
    }
}

fn draw_row(images: &[f32], labels: &[i64], answers: &[Answer], row: &[usize]) {
    let brightest = images.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    for y in 0..SIDE {
        let line = |index: &usize| -> String {
            let from = index * PIXELS + y * SIDE;
            images[from..from + SIDE].iter().map(|pixel| shade(pixel / brightest)).collect()
        };
        println!("{}", row.iter().map(line).collect::<Vec<_>>().join("  "));
    }
    let caption = |index: &usize| {
        let Answer { digit, probability } = answers[*index];
        let mark = if digit == labels[*index] { "" } else { " (wrong)" };
        format!("{:<16}", format!("{digit}, {:.1} %{mark}", 100.0 * probability))
    };
    println!("{}\n", row.iter().map(caption).collect::<Vec<_>>().join("  ").trim_end());
}

/// Two characters, which together are about as wide as high.
fn shade(brightness: f32) -> &'static str {
    match (brightness * 5.0) as u32 {
        0 => "  ",
        1 => "░░",
        2 => "▒▒",
        3 => "▓▓",
        _ => "██",
    }
}
