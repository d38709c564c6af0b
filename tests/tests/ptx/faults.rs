//! Faults that are planted in right texts, one at a time. The interpreter reports each one, or the
//! results are wrong.

use kiln::backend::cuda::Gpu;
use kiln::graph::Graph;
use kiln::graph::op::{Composite, ReduceFn, UnaryFn};
use kiln::tensor::DType;
use kiln::{Compiler, Precision};
use kiln_tests::{difference, interpret, ptx};

use crate::moves::permuted;
use crate::sums::reduced;
use crate::{
    attention, close, convolution, elements, inputs, product, rounded_product, rows,
    short_attention, short_product,
};

/// Changes of a text that are tried for each fault at most.
const MOST: usize = 10;

/// A fault: its name, the line that it makes of one that it concerns, and how many of its changes
/// do no harm, with the reason.
type Fault = (&'static str, fn(&str) -> Option<String>, (usize, &'static str));

const ALL: (usize, &str) = (0, "");

/// A line in which one text stands for another.
fn instead(line: &str, from: &str, to: &str) -> Option<String> {
    line.contains(from).then(|| line.replacen(from, to, 1))
}

/// A line of that beginning whose last number is another one.
fn number(line: &str, start: &str, change: i64) -> Option<String> {
    let (head, last) = line.strip_suffix(';')?.rsplit_once(", ")?;
    let last: i64 = last.parse().ok()?;
    line.starts_with(start).then(|| format!("{head}, {};", last + change))
}

/// The first of its operands that begin so.
fn operands(line: &str, start: &str, count: usize) -> Option<String> {
    let rest = line.strip_prefix(start)?.strip_suffix(';')?;
    Some(rest.split(", ").take(count).collect::<Vec<_>>().join(", "))
}

const BARRIERS: &[Fault] = &[
    (
        "a missing barrier",
        |l| instead(l, "bar.sync 0;", ""),
        (1, "before the first fold there is nothing to wait for"),
    ),
    (
        "a barrier for some threads",
        |l| {
            instead(
                l,
                "bar.sync 0;",
                "mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p0, %r0, 40;\n@%p0 bar.sync 0;",
            )
        },
        ALL,
    ),
];

const ROW: &[Fault] = &[
    ("half a warp is not folded", |l| instead(l, ", 16, 31, -1;", ", 8, 31, -1;"), ALL),
    ("a lane is not folded", |l| instead(l, ", 1, 31, -1;", ", 2, 31, -1;"), ALL),
    ("threads beyond the row", |l| number(l, "setp.ge.u32", 40), ALL),
    ("a thread too few", |l| number(l, "setp.ge.u32", -1), ALL),
    ("a thread that turns off", |l| instead(l, "@%p", "@!%p"), ALL),
    ("the block for the thread", |l| instead(l, "%tid.x", "%ctaid.x"), ALL),
    ("a turn too few", |l| number(l, "setp.lt.u32", -1), ALL),
    (
        "another row",
        |l| number(l, "mad.wide.s32 %d", 4).or(instead(l, ", 132016, %d", ", 132000, %d")),
        ALL,
    ),
];

const KEPT: &[Fault] = &[
    (
        "the elements of another turn",
        |l| l.starts_with("ld.global").then_some(()).and_then(|()| instead(l, "+0]", "+1024]")),
        ALL,
    ),
    (
        "results of another turn",
        |l| l.starts_with("st.global").then_some(()).and_then(|()| instead(l, "+1024]", "+0]")),
        ALL,
    ),
    ("threads beyond the row", |l| number(l, "setp.ge.u32", 40), ALL),
    ("a thread too few", |l| number(l, "setp.ge.u32", -1), ALL),
];

const GROUPS: &[Fault] = &[
    ("another row", |l| instead(l, "%r0, 3;", "%r0, 4;"), ALL),
    ("threads of two rows", |l| number(l, "and.b32", 8), ALL),
    ("half of a row is not folded", |l| instead(l, ", 4, 31, -1;", ", 2, 31, -1;"), ALL),
    ("the row beside is folded too", |l| instead(l, ", 4, 31, -1;", ", 8, 31, -1;"), ALL),
    ("rows of another block", |l| instead(l, "%ctaid.x", "%tid.x"), ALL),
];

const SQUARES: &[Fault] = &[
    ("a missing barrier", |l| instead(l, "bar.sync 0;", ""), ALL),
    ("another line of shared memory", |l| instead(l, ", 132, ", ", 128, "), ALL),
    ("another line of memory", |l| number(l, "setp.lt.s64", -1), ALL),
    ("a dropped bound", |l| number(l, "setp.lt.s64", 40), ALL),
    (
        "the next line of shared memory",
        |l| l.starts_with("st.shared").then_some(()).and_then(|()| instead(l, "+132]", "+264]")),
        ALL,
    ),
    (
        "the next element",
        |l| l.starts_with("ld.shared").then_some(()).and_then(|()| instead(l, "+4]", "+8]")),
        ALL,
    ),
    ("another square", |l| instead(l, ", 32, ", ", 16, "), ALL),
];

const SUMS: &[Fault] = &[
    ("a missing barrier", |l| instead(l, "bar.sync 0;", ""), ALL),
    ("a part that is not folded", |l| instead(l, "+128]", "+0]"), ALL),
    ("a turn too few", |l| number(l, "setp.lt.u32", -1), ALL),
    ("a dropped bound", |l| number(l, "setp.lt.s64", 40), ALL),
    ("a result too few", |l| number(l, "setp.lt.s64", -1), ALL),
];

const TILE: &[Fault] = &[
    ("a missing barrier", |l| instead(l, "bar.sync 0;", ""), ALL),
    ("a missing wait for copies", |l| instead(l, "cp.async.wait_all;", ""), ALL),
    ("a dropped bound", |l| number(l, "setp.lt.s64", 1000), (2, "there the other factor is 0")),
    ("a row or column too few", |l| number(l, "setp.lt.s64", -4), ALL),
    ("another line of shared memory", |l| instead(l, ", 80, ", ", 64, "), ALL),
    (
        "a copy from the piece before",
        |l| l.starts_with("cp.async").then_some(()).and_then(|()| instead(l, "+64]", "+0]")),
        ALL,
    ),
    (
        "the next element",
        |l| l.starts_with("ld.shared").then_some(()).and_then(|()| instead(l, "+0]", "+16]")),
        ALL,
    ),
    (
        "vectors that are not aligned",
        |l| l.contains(".v4.").then_some(()).and_then(|()| instead(l, "+0]", "+4]")),
        ALL,
    ),
    (
        "a product instead of a sum",
        |l| operands(l, "fma.rn.f32 ", 3).map(|l| format!("mul.rn.f32 {l};")),
        ALL,
    ),
    ("a sum that does not begin", |l| instead(l, "mov.f32 %f0, 0f00000000;", ""), ALL),
    ("a pair of pieces too few", |l| number(l, "setp.lt.u32", -1), ALL),
    ("a difference for a sum", |l| instead(l, "add.rn.f32", "sub.rn.f32"), ALL),
    ("another block", |l| instead(l, "%ctaid.x", "0"), ALL),
];

const ATTENTION: &[Fault] = &[
    ("a missing barrier", |l| instead(l, "bar.sync 0;", ""), ALL),
    ("sums as they were", |l| instead(l, "mul.rn.f32", "add.rn.f32"), ALL),
    (
        "a turn too few",
        |l| number(l, "setp.lt.u32", -1),
        (2, "any score of a row may stand for its greatest"),
    ),
    ("the next row", |l| instead(l, ", 2080, ", ", 2048, "), ALL),
    ("powers of the other sign", |l| instead(l, "sub.rn.f32", "add.rn.f32"), ALL),
];

/// A product by a warp in which two registers of an operand change places.
fn exchanged(line: &str, operand: usize, [a, b]: [usize; 2]) -> Option<String> {
    let (name, rest) =
        line.strip_suffix("};").filter(|l| l.starts_with("mma"))?.split_once(" {")?;
    let mut groups: Vec<Vec<&str>> = rest.split("}, {").map(|g| g.split(", ").collect()).collect();
    groups[operand].swap(a, b);
    let groups: Vec<String> = groups.iter().map(|g| format!("{{{}}}", g.join(", "))).collect();
    Some(format!("{name} {};", groups.join(", ")))
}

/// Of the sums of an attention that warps multiply.
const WARP_ATTENTION: &[Fault] = &[
    ("a missing barrier", |l| instead(l, "bar.sync 0;", ""), ALL),
    ("a missing wait for copies", |l| instead(l, "cp.async.wait_all;", ""), ALL),
    ("rows in another order", |l| exchanged(l, 1, [0, 1]), ALL),
    ("halves of columns in another order", |l| exchanged(l, 2, [0, 1]), ALL),
    ("sums in another order", |l| exchanged(l, 3, [1, 2]), ALL),
    ("a matrix that is not turned", |l| instead(l, ".trans", ""), ALL),
    ("scores of another row", |l| instead(l, ", 160, ", ", 128, "), ALL),
    ("powers of another row", |l| instead(l, ", 80;", ", 64;"), ALL),
    ("a block of keys too few", |l| number(l, "setp.lt.u32", -1), ALL),
];

/// A store of two neighbours in which they change places.
fn turned(line: &str) -> Option<String> {
    let (place, pair) = line.strip_suffix("};")?.split_once(", {")?;
    let (x, y) = pair.split_once(", ")?;
    line.starts_with("st.global.v2").then(|| format!("{place}, {{{y}, {x}}};"))
}

const WARP: &[Fault] = &[
    ("neighbours in another order", turned, ALL),
    ("rows in another order", |l| exchanged(l, 1, [0, 1]), ALL),
    ("halves of rows in another order", |l| exchanged(l, 1, [1, 2]), ALL),
    ("halves of columns in another order", |l| exchanged(l, 2, [0, 1]), ALL),
    ("sums in another order", |l| exchanged(l, 3, [1, 2]), ALL),
    ("results in another order", |l| exchanged(l, 0, [0, 1]), ALL),
    ("a matrix that is not turned", |l| instead(l, ".trans", ""), ALL),
    ("a matrix that is turned", |l| instead(l, "x4.shared", "x4.trans.shared"), ALL),
    (
        "the products before",
        |l| l.starts_with("ldmatrix").then_some(()).and_then(|()| instead(l, "+32]", "+0]")),
        ALL,
    ),
    ("lines without room between them", |l| instead(l, ", 80;", ", 64;"), ALL),
    ("rows that are not aligned", |l| instead(l, ", 80;", ", 72;"), ALL),
    ("another half of a line", |l| number(l, "shr.u32", 1), ALL),
    ("a missing barrier", |l| instead(l, "bar.sync 0;", ""), ALL),
    ("a missing wait for copies", |l| instead(l, "cp.async.wait_all;", ""), ALL),
    (
        "a product by a part of a warp",
        |l| {
            l.starts_with("mma")
                .then(|| format!("mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p0, %r0, 20;\n@%p0 {l}"))
        },
        ALL,
    ),
];

/// Of numbers of tf32, the weights of which are read word by word.
const WORDS: &[Fault] = &[
    ("a number that is not rounded", |l| instead(l, "cvt.rna.tf32.f32", "mov.b32"), ALL),
    ("rows in another order", |l| exchanged(l, 1, [0, 1]), ALL),
    ("halves of rows in another order", |l| exchanged(l, 1, [1, 2]), ALL),
    ("halves of columns in another order", |l| exchanged(l, 2, [0, 1]), ALL),
    ("results in another order", |l| exchanged(l, 0, [0, 1]), ALL),
    (
        "the products before",
        |l| l.starts_with("ldmatrix").then_some(()).and_then(|()| instead(l, "+32]", "+0]")),
        ALL,
    ),
    (
        "the word before",
        |l| l.starts_with("ld.shared.b32").then_some(()).and_then(|()| instead(l, "+0]", "+4]")),
        ALL,
    ),
    ("another line", |l| number(l, "shr.u32", 1), ALL),
    ("a missing barrier", |l| instead(l, "bar.sync 0;", ""), ALL),
];

const BYTES: &[Fault] = &[
    ("bytes of another sign", |l| instead(l, ".u8.s8.", ".s8.s8."), ALL),
    ("rows in another order", |l| exchanged(l, 1, [0, 1]), ALL),
    ("halves of columns in another order", |l| exchanged(l, 2, [0, 1]), ALL),
];

const PIXELS: &[Fault] = &[
    ("another pixel", |l| number(l, "rem.u32", 1), ALL),
    ("another line of pixels", |l| number(l, "div.u32", 1), ALL),
    ("a missing wait for copies", |l| instead(l, "cp.async.wait_all;", ""), ALL),
];

const ELEMENTS: &[Fault] = &[
    ("one element too many", |l| number(l, "setp.ge.u32", 1), ALL),
    ("one element too few", |l| number(l, "setp.ge.u32", -1), ALL),
    ("a bound that is dropped", |l| instead(l, "@!%p", "@%p"), ALL),
    ("a register of nothing", |l| instead(l, "mov.u32 %r0, %ctaid.x;", ""), ALL),
    (
        "results beside their places",
        |l| l.starts_with("st.global").then_some(()).and_then(|()| instead(l, "+0]", "+4]")),
        ALL,
    ),
    (
        "operands from other places",
        |l| l.starts_with("ld.global").then_some(()).and_then(|()| instead(l, "+0]", "+4]")),
        ALL,
    ),
    (
        "bytes that are not aligned",
        |l| l.starts_with("ld.global").then_some(()).and_then(|()| instead(l, "+0]", "+2]")),
        ALL,
    ),
    ("rounded up", |l| instead(l, "cvt.rmi", "cvt.rpi"), ALL),
    ("rounded to the nearest", |l| instead(l, "cvt.rmi", "cvt.rni"), ALL),
];

const VECTORS: &[Fault] = &[
    ("elements that overlap", |l| instead(l, ", 16, %d", ", 8, %d"), ALL),
    ("vectors that are not aligned", |l| instead(l, "+0]", "+4]"), ALL),
    ("lanes in another order", |l| instead(l, "{%f0, %f1,", "{%f1, %f0,"), ALL),
];

/// Texts in which one line is another.
fn changes(text: &str, change: fn(&str) -> Option<String>) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let changed = lines.iter().enumerate().filter_map(|(at, line)| {
        let changed = change(line.trim())?;
        let (before, after) = (lines[..at].join("\n"), lines[at + 1..].join("\n"));
        Some(format!("{before}\n{changed}\n{after}\n"))
    });
    changed.take(MOST).collect()
}

/// Plants faults in the text of a graph: those that are not found as they should be.
fn plant(graph: &Graph, faults: &[Fault]) -> Vec<String> {
    plant_by(graph, &Compiler::new(), faults)
}

fn plant_by(graph: &Graph, compiler: &Compiler, faults: &[Fault]) -> Vec<String> {
    let inputs = inputs(graph);
    let cuda = compiler.cuda_of(graph, Gpu::of(80).expect("a GPU")).expect("a text");
    let want = interpret(graph, &inputs);
    let mut problems = Vec::new();
    for (name, change, (harmless, _)) in faults {
        let texts = changes(&cuda.module.text, *change);
        let mut missed = 0;
        for text in &texts {
            let module = kiln_ptx::parse(text).unwrap_or_else(|why| panic!("{name}: {why}"));
            let got = ptx::run_text(&cuda, &module, &inputs);
            missed += usize::from(got.is_ok_and(|got| {
                got.iter().zip(&want).all(|(a, b)| difference(a, b, close(a.dtype())).is_none())
            }));
        }
        println!("{name}: {} planted, {missed} without harm", texts.len());
        if texts.is_empty() || missed != *harmless {
            problems.push(format!("{name}: {missed} of {} are not found", texts.len()));
        }
    }
    problems
}

#[test]
fn planted_faults_are_found() {
    let norm = Composite::LayerNorm(1, 1e-5f32.to_bits());
    let row = rows(norm, 2, 33004);
    let mut problems = plant(&row, BARRIERS);
    problems.extend(plant(&row, ROW));
    problems.extend(plant(&attention([2, 6, 1100, 8, 12]), ATTENTION));
    let short = short_attention([2, 40, 100, 16, 24], DType::F16);
    problems.extend(plant(&short, WARP_ATTENTION));
    let kept = rows(norm, 3, 1200);
    problems.extend(plant(&kept, BARRIERS));
    problems.extend(plant(&kept, KEPT));
    problems.extend(plant(&rows(Composite::Softmax(1), 64, 64), GROUPS));
    problems.extend(plant(&permuted(&[2, 44, 52], &[0, 2, 1], DType::F32), SQUARES));
    let few = reduced(&[300, 70], &[0], ReduceFn::Sum, DType::F32);
    problems.extend(plant(&few, SUMS));
    problems.extend(plant(&product(70, 100, 68, false), TILE));
    let short = [DType::BF16; 2];
    let warps = short_product([70, 248, 72], short, [false, false]);
    problems.extend(plant(&warps, WARP));
    let tf32 = Compiler::new().precision(Precision::Tf32);
    let words = rounded_product([70, 248, 72], [false, false], &tf32);
    problems.extend(plant_by(&words, &tf32, WORDS));
    let bytes = short_product([40, 100, 24], [DType::U8, DType::I8], [false, true]);
    problems.extend(plant(&bytes, BYTES));
    problems.extend(plant(&convolution([2, 8, 17, 1], ([7, 12], [3, 3]), (1, 1)), PIXELS));
    problems.extend(plant(&elements(UnaryFn::Floor, &[3, 111]), ELEMENTS));
    problems.extend(plant(&elements(UnaryFn::Floor, &[3, 400]), VECTORS));
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
