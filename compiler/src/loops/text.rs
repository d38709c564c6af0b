//! The text form of loops, a small program.
//!
//! ```text
//! kernel relu {
//!   b0 : f32[1024] arg 0
//!   b1 : f32[1024] out
//!   parallel i0 in 128 {
//!     vector i1 in 8 {
//!       b1[8*i0 + i1] = max(b0[8*i0 + i1], 0.0)
//!     }
//!   }
//! }
//! ```

use std::fmt::Write as _;

use super::ir::{Expr, Kind, Loops, Number, Param, Place, Scope, Stmt};
use crate::error::sanitize;
use crate::graph::op::Affine;

/// The text of a kernel.
pub fn print(loops: &Loops) -> String {
    let mut text = format!("kernel {} {{\n", sanitize(&loops.name));
    for (i, buffer) in loops.buffers.iter().enumerate() {
        let owner = match (buffer.scope, buffer.param) {
            (Scope::Register, _) => "register".to_string(),
            (Scope::Global, Param::Arg(k)) => format!("arg {k}"),
            (Scope::Global, Param::Scratch(k)) => format!("scratch {k}"),
            (Scope::Global, Param::Out) => "out".to_string(),
            (Scope::Global, Param::None) => "none".to_string(),
        };
        let _ = writeln!(text, "  b{i} : {}[{}] {owner}", buffer.dtype, buffer.len);
    }
    block(&loops.body, 1, &mut text);
    text.push_str("}\n");
    text
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
        Expr::Const(dtype, Number::Float(v)) => format!("{v:?}{dtype}"),
        Expr::Const(dtype, Number::Int(v)) => format!("{v}{dtype}"),
        Expr::Unary(f, x) => format!("{}({})", f.name(), expr(x)),
        Expr::Binary(f, x, y) => format!("{}({}, {})", f.name(), expr(x), expr(y)),
        Expr::Select(c, x, y) => format!("select({}, {}, {})", expr(c), expr(x), expr(y)),
        Expr::Cast(dtype, x) => format!("{dtype}({})", expr(x)),
        Expr::Fma(x, y, z) => format!("fma({}, {}, {})", expr(x), expr(y), expr(z)),
        Expr::Fold(f, buffer) => format!("fold_{}(b{buffer})", f.name()),
    }
}
