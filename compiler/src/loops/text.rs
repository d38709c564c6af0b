//! The text form of loops, a small program; [`parse`] reads back what [`print`] writes.
//!
//! ```text
//! kernel "relu" {
//!   b0 : f32[1024] arg 0
//!   b1 : f32[1024] out
//!   parallel i0 in 128 {
//!     vector i1 in 8 {
//!       b1[8*i0 + i1] = max(b0[8*i0 + i1], 0.0:f32)
//!     }
//!   }
//! }
//! ```

use std::fmt::Write as _;
use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::cursor::{Cursor, Parsed, digits};
use super::ir::{
    Buffer, Count, Expr, Kind, Loops, Multiply, Number, Param, Parts, Place, Range, Scope, Side,
    Stmt, Var,
};
use super::verify::typed;
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::op::{Affine, BinaryFn, ReduceFn, UnaryFn};

/// The text of a kernel.
pub fn print(loops: &Loops) -> String {
    let mut text = format!("kernel {:?} {{\n", loops.name);
    for (i, buffer) in loops.buffers.iter().enumerate() {
        let owner = match (buffer.scope, buffer.param) {
            (Scope::Register, _) => "register".to_string(),
            (Scope::Shared, _) => "shared".to_string(),
            (Scope::Global, Param::Arg(k)) => format!("arg {k}"),
            (Scope::Global, Param::Scratch(k)) => format!("scratch {k}"),
            (Scope::Global, Param::Out) => "out".to_string(),
            (Scope::Global, Param::Dims) => "dims".to_string(),
            (Scope::Global, Param::None) => "none".to_string(),
        };
        let _ = writeln!(text, "  b{i} : {}[{}] {owner}", buffer.dtype, buffer.len);
    }
    for Range { var, from, to } in &loops.ranges {
        let from = from.map_or(String::new(), |from| format!("from {} ", bound_text(from)));
        let _ = writeln!(text, "  turns i{var} : {from}to {}", bound_text(*to));
    }
    block(&loops.body, 1, &mut text);
    text.push_str("}\n");
    text
}

fn bound_text(Count { dim, add, width, times }: Count) -> String {
    format!("(d{dim} + {add}) / {width} * {times}")
}

fn block(body: &[Stmt], depth: usize, text: &mut String) {
    let pad = "  ".repeat(depth);
    for stmt in body {
        match stmt {
            Stmt::For { var, extent, kind, body } => {
                let kind = match kind {
                    Kind::Serial => "for",
                    Kind::Parallel => "parallel",
                    Kind::Vector => "vector",
                    Kind::Unroll => "unroll",
                    Kind::Block => "block",
                    Kind::Thread => "thread",
                };
                let _ = writeln!(text, "{pad}{kind} i{var} in {extent} {{");
                block(body, depth + 1, text);
                let _ = writeln!(text, "{pad}}}");
            }
            Stmt::Store { buffer, place, value } => {
                let _ = writeln!(text, "{pad}b{buffer}[{}] = {}", place_text(place), expr(value));
            }
            Stmt::If { condition, then, other } => {
                let _ = writeln!(text, "{pad}if {} {{", expr(condition));
                block(then, depth + 1, text);
                let _ = writeln!(text, "{pad}}} else {{");
                block(other, depth + 1, text);
                let _ = writeln!(text, "{pad}}}");
            }
            Stmt::Prefetch { buffer, place } => {
                let _ = writeln!(text, "{pad}prefetch b{buffer}[{}]", affine(place));
            }
            Stmt::Multiply(m) => {
                let _ = write!(text, "{pad}multiply b{}[{}]", m.sums.0, affine(&m.sums.1));
                for Side { buffer, place, steps } in &m.sides {
                    let _ = write!(text, " b{buffer}[{}] {} {}", affine(place), steps[0], steps[1]);
                }
                let _ = writeln!(text, " over i{} i{}", m.lane[0], m.lane[1]);
            }
        }
    }
}

/// An index, such as `8*i0 + i1 + 3`.
pub fn affine(index: &Affine) -> String {
    let mut parts: Vec<String> = index
        .terms
        .iter()
        .map(|&(var, c)| if c == 1 { format!("i{var}") } else { format!("{c}*i{var}") })
        .collect();
    if index.offset != 0 || parts.is_empty() {
        parts.push(index.offset.to_string());
    }
    parts.join(" + ")
}

fn place_text(place: &Place) -> String {
    match &place.dynamic {
        None => affine(&place.affine),
        Some(dynamic) => format!("{} + {}", affine(&place.affine), expr(dynamic)),
    }
}

fn expr(e: &Expr) -> String {
    match e {
        Expr::Load(buffer, place) => format!("b{buffer}[{}]", place_text(place)),
        Expr::Index(index) => format!("index({})", affine(index)),
        Expr::Const(dtype, Number::Float(v)) => format!("{v:?}:{dtype}"),
        Expr::Const(dtype, Number::Int(v)) => format!("{v}:{dtype}"),
        Expr::Unary(f, x) => format!("{}({})", f.name(), expr(x)),
        Expr::Binary(f, x, y) => format!("{}({}, {})", f.name(), expr(x), expr(y)),
        Expr::Select(c, x, y) => format!("select({}, {}, {})", expr(c), expr(x), expr(y)),
        Expr::Cast(dtype, x) => format!("{dtype}({})", expr(x)),
        Expr::Fma(x, y, z) => format!("fma({}, {}, {})", expr(x), expr(y), expr(z)),
        Expr::Fold(f, buffer) => format!("fold_{}(b{buffer})", f.name()),
        Expr::Word(buffer, place) => format!("word(b{buffer}[{}])", place_text(place)),
        Expr::Dot(parts, x, y, z) => {
            format!("{}({}, {}, {})", dot_name(*parts), expr(x), expr(y), expr(z))
        }
    }
}

/// Reads kernels, as many as there are. Their types fit; whether they stay within their buffers
/// is for [`verify`](super::verify::verify) to say.
pub fn parse(text: &str) -> Result<Vec<Loops>> {
    let mut cursor = Cursor { text, at: 0, depth: 0 };
    kernels(&mut cursor).map_err(|why| {
        let before = &text[..cursor.at];
        let start = before.rfind('\n').map_or(0, |n| n + 1);
        let (line, column) =
            (before.matches('\n').count() + 1, before[start..].chars().count() + 1);
        let rest: String = text[cursor.at..].chars().take_while(|&c| c != '\n').take(40).collect();
        let found = if rest.is_empty() { "the end of the line".to_string() } else { rest };
        let place = format!("line {line}, column {column}");
        Error::new(ErrorKind::Model, Diagnostic::new("K0903", why).tensor(place).found(found))
    })
}

fn kernels(cursor: &mut Cursor) -> Parsed<Vec<Loops>> {
    let mut kernels = Vec::new();
    while !cursor.rest().is_empty() {
        cursor.expect("kernel")?;
        cursor.rest();
        let start = cursor.at;
        let name = quoted(cursor)?;
        cursor.expect("{")?;
        let mut buffers = Vec::new();
        while digits(cursor.peek(), 'b').is_some() && is_buffer(cursor) {
            buffers.push(buffer(cursor, buffers.len())?);
        }
        let mut ranges = Vec::new();
        while cursor.peek() == "turns" {
            ranges.push(turns(cursor)?);
        }
        let body = statements(cursor, &buffers)?;
        let kernel = Loops { name, buffers, ranges, body };
        if let Err(unfit) = typed(&kernel) {
            cursor.at = start;
            return Err(unfit.0);
        }
        kernels.push(kernel);
    }
    Ok(kernels)
}

/// A name in quotes, with Rust's escapes.
fn quoted(cursor: &mut Cursor) -> Parsed<String> {
    cursor.expect("\"")?;
    let mut name = String::new();
    loop {
        let rest = &cursor.text[cursor.at..];
        let next = rest.chars().next().ok_or("a name does not end")?;
        let (taken, c) = match next {
            '"' => {
                cursor.at += 1;
                return Ok(name);
            }
            '\\' => escape(rest).ok_or("no such escape")?,
            c => (c.len_utf8(), c),
        };
        name.push(c);
        cursor.at += taken;
    }
}

/// The character of an escape, and how long the escape is.
fn escape(text: &str) -> Option<(usize, char)> {
    Some(match text.chars().nth(1)? {
        'n' => (2, '\n'),
        'r' => (2, '\r'),
        't' => (2, '\t'),
        '0' => (2, '\0'),
        'u' => {
            let code = text.strip_prefix("\\u{")?.split_once('}')?.0;
            let c = char::from_u32(u32::from_str_radix(code, 16).ok()?)?;
            ("\\u{}".len() + code.len(), c)
        }
        c @ ('"' | '\\' | '\'') => (2, c),
        _ => return None,
    })
}

/// Whether a buffer is declared here, not written: `b0 :`, not `b0[`.
fn is_buffer(cursor: &mut Cursor) -> bool {
    let word = cursor.peek().len();
    cursor.rest()[word..].trim_start().starts_with(':')
}

fn dtype(cursor: &mut Cursor) -> Parsed<DType> {
    cursor.one("dtype", DType::from_name)
}

fn buffer(cursor: &mut Cursor, next: usize) -> Parsed<Buffer> {
    cursor.one("buffer in order", |word| (digits(word, 'b')? == next.to_string()).then_some(()))?;
    cursor.expect(":")?;
    let dtype = dtype(cursor)?;
    cursor.expect("[")?;
    let len = cursor.number("length")?;
    cursor.expect("]")?;
    let known = |word: &str| {
        ["register", "shared", "arg", "scratch", "out", "dims", "none"]
            .into_iter()
            .find(|known| *known == word)
    };
    let (scope, param) = match cursor.one("kind of buffer", known)? {
        "register" => (Scope::Register, Param::None),
        "shared" => (Scope::Shared, Param::None),
        "arg" => (Scope::Global, Param::Arg(cursor.number("number")?)),
        "scratch" => (Scope::Global, Param::Scratch(cursor.number("number")?)),
        "out" => (Scope::Global, Param::Out),
        "dims" => (Scope::Global, Param::Dims),
        _ => (Scope::Global, Param::None),
    };
    Ok(Buffer { dtype, len, scope, param })
}

/// `turns i3 : from (d1 + 0) / 8 * 8 to (d1 + 0) / 1 * 1`
fn turns(cursor: &mut Cursor) -> Parsed<Range> {
    cursor.expect("turns")?;
    let var = cursor.numbered('i', "loop variable")?;
    cursor.expect(":")?;
    let from = if cursor.eat("from") { Some(bound(cursor)?) } else { None };
    cursor.expect("to")?;
    Ok(Range { var, from, to: bound(cursor)? })
}

fn bound(cursor: &mut Cursor) -> Parsed<Count> {
    cursor.expect("(")?;
    let dim = cursor.numbered('d', "dim")?;
    cursor.expect("+")?;
    let add = cursor.number("number")?;
    cursor.expect(")")?;
    cursor.expect("/")?;
    let width = cursor.number("number of elements")?;
    cursor.expect("*")?;
    let times = cursor.number("number of times")?;
    match width > 0 && times > 0 {
        true => Ok(Count { dim, add, width, times }),
        false => Err("a bound of no width".into()),
    }
}

/// Statements up to the end of their block.
fn statements(cursor: &mut Cursor, buffers: &[Buffer]) -> Parsed<Vec<Stmt>> {
    let mut body = Vec::new();
    while !cursor.eat("}") {
        if cursor.rest().is_empty() {
            return Err("a block does not end".into());
        }
        body.push(cursor.nested(|cursor| stmt(cursor, buffers))?);
    }
    Ok(body)
}

fn stmt(cursor: &mut Cursor, buffers: &[Buffer]) -> Parsed<Stmt> {
    let kind = match cursor.peek() {
        "for" => Kind::Serial,
        "parallel" => Kind::Parallel,
        "vector" => Kind::Vector,
        "unroll" => Kind::Unroll,
        "block" => Kind::Block,
        "thread" => Kind::Thread,
        "if" => {
            cursor.word();
            let condition = value(cursor, buffers)?;
            cursor.expect("{")?;
            let then = statements(cursor, buffers)?;
            cursor.expect("else")?;
            cursor.expect("{")?;
            return Ok(Stmt::If { condition, then, other: statements(cursor, buffers)? });
        }
        "prefetch" => {
            cursor.word();
            let (buffer, Place { affine: place, .. }) = element(cursor, buffers)?;
            return Ok(Stmt::Prefetch { buffer, place });
        }
        "multiply" => {
            cursor.word();
            return Ok(Stmt::Multiply(Box::new(multiply(cursor, buffers)?)));
        }
        _ => {
            let (buffer, place) = element(cursor, buffers)?;
            cursor.expect("=")?;
            return Ok(Stmt::Store { buffer, place, value: value(cursor, buffers)? });
        }
    };
    cursor.word();
    let var = cursor.numbered('i', "loop variable")?;
    cursor.expect("in")?;
    let extent = cursor.number("number of turns")?;
    cursor.expect("{")?;
    Ok(Stmt::For { var, extent, kind, body: statements(cursor, buffers)? })
}

/// `b4[i0] b2[i1] 40 1 b3[8] 1 72 over i5 i6`
fn multiply(cursor: &mut Cursor, buffers: &[Buffer]) -> Parsed<Multiply> {
    let (buffer, place) = element(cursor, buffers)?;
    let mut side = || -> Parsed<Side> {
        let (buffer, Place { affine: place, .. }) = element(cursor, buffers)?;
        let steps = [cursor.number("step")?, cursor.number("step")?];
        Ok(Side { buffer, place, steps })
    };
    let sides = [side()?, side()?];
    cursor.expect("over")?;
    let lane = [cursor.numbered('i', "loop variable")?, cursor.numbered('i', "loop variable")?];
    Ok(Multiply { sums: (buffer, place.affine), sides, lane })
}

fn buffer_id(cursor: &mut Cursor, buffers: &[Buffer]) -> Parsed<usize> {
    let known = |word: &str| digits(word, 'b')?.parse().ok().filter(|&n| n < buffers.len());
    cursor.one("buffer of this kernel", known)
}

/// `b0[8*i0 + i1]`
fn element(cursor: &mut Cursor, buffers: &[Buffer]) -> Parsed<(usize, Place)> {
    let buffer = buffer_id(cursor, buffers)?;
    cursor.expect("[")?;
    let mut place = Place::affine(Affine::default());
    loop {
        // The part from data comes last.
        if !term(cursor, &mut place.affine)? {
            place.dynamic = Some(Arc::new(value(cursor, buffers)?));
            break;
        }
        if !cursor.eat("+") {
            break;
        }
    }
    cursor.expect("]")?;
    Ok((buffer, place))
}

/// Adds a term (`8*i0`, `i0` or `8`) to an index; gives whether there is one.
fn term(cursor: &mut Cursor, index: &mut Affine) -> Parsed<bool> {
    let var = |word: &str| -> Option<Var> { digits(word, 'i')?.parse().ok() };
    let start = cursor.at;
    let word = cursor.peek();
    if digits(word, 'i').is_some() && !cursor.rest()[word.len()..].starts_with('(') {
        let var = cursor.one("loop variable", var)?;
        return add_term(index, var, 1).map(|()| true);
    }
    if !cursor.rest().starts_with(|c: char| c.is_ascii_digit() || c == '-') {
        return Ok(false);
    }
    let Ok(number) = cursor.number::<i64>("index") else { return Ok(false) };
    if cursor.eat("*") {
        let var = cursor.one("loop variable", var)?;
        return add_term(index, var, number).map(|()| true);
    }
    // A literal such as `8:i64` or `0.5:f32` is a value.
    if cursor.rest().starts_with([':', '.', 'e', 'E']) {
        cursor.at = start;
        return Ok(false);
    }
    index.offset = index.offset.checked_add(number).ok_or("an index is too large")?;
    Ok(true)
}

fn add_term(index: &mut Affine, var: Var, coefficient: i64) -> Parsed<()> {
    if index.coefficient(var.into()) != 0 {
        return Err(format!("i{var} occurs twice"));
    }
    *index = std::mem::take(index).plus(var.into(), coefficient);
    Ok(())
}

/// An index without a part from data.
fn index(cursor: &mut Cursor) -> Parsed<Affine> {
    let mut index = Affine::default();
    loop {
        if !term(cursor, &mut index)? {
            return Err("an index is missing".into());
        }
        if !cursor.eat("+") {
            return Ok(index);
        }
    }
}

fn value(cursor: &mut Cursor, buffers: &[Buffer]) -> Parsed<Expr> {
    cursor.nested(|cursor| {
        let word = cursor.peek();
        if digits(word, 'b').is_some() {
            let (buffer, place) = element(cursor, buffers)?;
            return Ok(Expr::Load(buffer, place));
        }
        let rest = &cursor.rest()[word.len()..];
        if word.is_empty() || !rest.starts_with('(') {
            return literal(cursor);
        }
        call(cursor, word, buffers)
    })
}

/// `1.5:f32`, `-inf:f64` or `3:i64`
fn literal(cursor: &mut Cursor) -> Parsed<Expr> {
    let word = cursor.span(|c| c.is_ascii_alphanumeric() || c == '-' || c == '+' || c == '.');
    let start = cursor.at;
    cursor.at += word.len();
    cursor.eat(":");
    let dtype = dtype(cursor);
    let number = match &dtype {
        Ok(dtype) if dtype.is_float() => word.parse().ok().map(Number::Float),
        Ok(_) => word.parse().ok().map(Number::Int),
        Err(_) => None,
    };
    match (dtype, number) {
        (Ok(dtype), Some(number)) => Ok(Expr::Const(dtype, number)),
        _ => {
            cursor.at = start;
            Err("a value is missing".into())
        }
    }
}

fn call(cursor: &mut Cursor, name: &str, buffers: &[Buffer]) -> Parsed<Expr> {
    let start = cursor.at;
    cursor.at += name.len();
    cursor.expect("(")?;
    let fold = |word: &str| -> Option<ReduceFn> {
        let name = word.strip_prefix("fold_")?;
        ReduceFn::ALL.iter().find(|f| f.1 == name).map(|f| f.0)
    };
    let e = if name == "index" {
        Expr::Index(index(cursor)?)
    } else if let Some(f) = fold(name) {
        Expr::Fold(f, buffer_id(cursor, buffers)?)
    } else {
        let mut args = vec![Arc::new(value(cursor, buffers)?)];
        while args.len() < 3 && cursor.eat(",") {
            args.push(Arc::new(value(cursor, buffers)?));
        }
        match apply(name, &args) {
            Some(e) => e,
            None => {
                cursor.at = start;
                return Err(format!("no function of {} values is called `{name}`", args.len()));
            }
        }
    };
    cursor.expect(")")?;
    Ok(e)
}

/// The name of a dot product of such parts.
pub fn dot_name(parts: Parts) -> &'static str {
    match parts {
        Parts::Pairs => "dot2",
        Parts::Quads => "dot4",
        Parts::Halves => "dot2bf16",
    }
}

/// The function of that name and that many values.
fn apply(name: &str, args: &[Arc<Expr>]) -> Option<Expr> {
    Some(match args {
        [x] if name == "word" => match &**x {
            Expr::Load(buffer, place) => Expr::Word(*buffer, place.clone()),
            _ => return None,
        },
        [x] => match UnaryFn::ALL.iter().find(|f| f.1 == name) {
            Some((f, _)) => Expr::Unary(*f, x.clone()),
            None => Expr::Cast(DType::from_name(name)?, x.clone()),
        },
        [x, y] => {
            let f = BinaryFn::ALL.iter().find(|f| f.1 == name)?.0;
            Expr::Binary(f, x.clone(), y.clone())
        }
        [x, y, z] if name == "select" => Expr::Select(x.clone(), y.clone(), z.clone()),
        [x, y, z] if name.starts_with("dot") => {
            let parts = Parts::ALL.into_iter().find(|p| dot_name(*p) == name)?;
            Expr::Dot(parts, x.clone(), y.clone(), z.clone())
        }
        [x, y, z] if name == "fma" => Expr::Fma(x.clone(), y.clone(), z.clone()),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELU: &str = r#"kernel "a \"relu\"\u{7}" {
  b0 : f32[1024] arg 0
  b1 : i64[4] scratch 1
  b2 : f32[8] register
  b3 : f32[1024] out
  b4 : i16[16] arg 1
  b5 : i32[8] scratch 2
  parallel i0 in 128 {
    prefetch b0[8*i0 + 9000]
    vector i8 in 8 {
      b5[i8] = dot2(word(b4[2*i8]), word(b4[14]), b5[i8])
      b2[i8] = fma(b0[8*i0 + i8], -0.0:f32, NaN:f32)
      b3[-8*i0 + i8 + 1016] = max(b0[i0 + -1 + index(8*i8)], inf:f32)
    }
    if lt(index(i0 + -3), 9223372036854775807:i64) {
      b3[0 + i64(fold_sum(b2))] = select(true_is(), 1e-45:f32, 1e300:f32)
    } else {
    }
  }
}
"#;

    fn relu() -> String {
        RELU.replace("true_is()", "ne(b1[2 + b1[0]], 1:i64)")
    }

    #[test]
    fn text_parses_back() {
        let kernels = parse(&relu()).unwrap();
        assert_eq!(print(&kernels[0]), relu());
        assert_eq!(kernels[0].name, "a \"relu\"\u{7}");
        let twice = parse(&(relu() + "\n" + &relu())).unwrap();
        assert_eq!(format!("{twice:?}"), format!("{:?}", [&kernels[..], &kernels[..]].concat()));
    }

    #[test]
    fn errors_say_where() {
        let start = "kernel \"k\" {\n  b0 : f32[8] out\n";
        for (body, place, why) in [
            ("  b1[0] = 1.0:f32", "line 3, column 3", "`b1` is no buffer of this kernel"),
            ("  b0[i256] = 1.0:f32", "line 3, column 6", "`i256` is no loop variable"),
            ("  b0[i0 + i0] = 1.0:f32", "line 3, column 13", "i0 occurs twice"),
            ("  b0[0] = 1.0:f31", "line 3, column 11", "a value is missing"),
            ("  b0[0] = foo(1.0:f32)", "line 3, column 11", "no function of 1 values"),
            ("  b0[0] = max(1.0:f32)", "line 3, column 11", "no function of 1 values"),
            ("  b0[0] = 1:i64", "line 1, column 8", "holds f32"),
            ("  b0[0] = add(1.0:f32, 1.0:f64)", "line 1, column 8", "f32 and f64"),
            ("  for i0 in 3 {", "line 5, column 1", "a block does not end"),
        ] {
            let error = parse(&format!("{start}{body}\n}}\n")).expect_err(body);
            let d = &error.diagnostics[0];
            assert_eq!(d.tensor.as_deref(), Some(place), "{body}: {error}");
            assert!(d.message.contains(why), "{body}: {error}");
        }
    }

    #[test]
    fn nothing_panics() {
        let text = relu();
        for end in (1..text.len() - 1).filter(|&e| text.is_char_boundary(e)) {
            assert!(parse(&text[..end]).is_err(), "{end}");
        }
        let mut state = 1u64;
        for _ in 0..5_000 {
            let mut bytes = text.clone().into_bytes();
            for _ in 0..3 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let at = (state >> 33) as usize % bytes.len();
                bytes[at] = text.as_bytes()[(state >> 13) as usize % text.len()];
            }
            let _ = parse(&String::from_utf8_lossy(&bytes));
        }
        for deep in ["neg(", "b0[", "for i0 in 1 {", "if "] {
            assert!(
                parse(&format!("kernel \"k\" {{ b0 : f32[1] out {}", deep.repeat(99_999))).is_err()
            );
        }
    }
}
