//! What loops mean: they are run as they stand, one number at a time, slow and obviously right.
//!
//! Numbers are those of `graph/scalar.rs`: each operation is computed in f64 (or exactly, of
//! integers) and rounded to what code computes its dtype in, a multiply-add once.

use kiln_runtime::tensor::DType;

use super::ir::{
    BufferId, Count, Expr, Loops, Multiply, Param, Place, Scope, Stmt, Var, WARP_BYTES,
    compute_dtype,
};
use super::text::affine;
use super::verify::typed;
use crate::error::Diagnostic;
use crate::graph::eval::Data;
use crate::graph::op::Affine;
use crate::graph::scalar::{self, Number};

/// Runs a kernel. `buffers` are those of global scope, in order.
pub fn eval(loops: &Loops, buffers: &mut [Data]) -> Result<(), Diagnostic> {
    let problem = |what: &str| Diagnostic::new("K0904", what).node(&loops.name);
    typed(loops).map_err(|unfit| problem("the dtypes of a kernel do not fit").found(unfit.0))?;
    let mut given = buffers.iter_mut();
    let mut all = Vec::new();
    for (i, buffer) in loops.buffers.iter().enumerate() {
        all.push(match buffer.scope {
            // What these hold at first is not to be relied on.
            Scope::Register | Scope::Shared => match buffer.dtype.is_float() {
                true => Data::Float(vec![f64::NAN; buffer.len]),
                false => Data::zeros(buffer.dtype, buffer.len),
            },
            Scope::Global => {
                let found = given.next().map(std::mem::take);
                let float = |data: &Data| matches!(data, Data::Float(_));
                let fits = |data: &Data| {
                    data.len() == buffer.len && float(data) == buffer.dtype.is_float()
                };
                found.filter(fits).ok_or_else(|| {
                    problem("a kernel is given another buffer than its own")
                        .tensor(format!("b{i}"))
                        .expected(format!("{}[{}]", buffer.dtype, buffer.len))
                })?
            }
        });
    }
    let mut run = Run { loops, buffers: all, vars: [None; 256] };
    let result = run.block(&loops.body);
    let global = loops.buffers.iter().zip(run.buffers).filter(|(b, _)| b.scope == Scope::Global);
    buffers.iter_mut().zip(global).for_each(|(given, (_, data))| *given = data);
    result
}

struct Run<'a> {
    loops: &'a Loops,
    buffers: Vec<Data>,
    /// Values of the loop variables, within their loops.
    vars: [Option<usize>; 256],
}

impl Run<'_> {
    fn block(&mut self, body: &[Stmt]) -> Result<(), Diagnostic> {
        for stmt in body {
            match stmt {
                // Whatever the kind: turns that run in any order, or at once, may run in order.
                Stmt::For { var, extent, kind: _, body } => {
                    for turn in self.turns(*var, *extent)? {
                        self.vars[usize::from(*var)] = Some(turn);
                        self.block(body)?;
                    }
                    self.vars[usize::from(*var)] = None;
                }
                Stmt::Store { buffer, place, value } => {
                    let value = self.value(value)?;
                    let at = self.place(*buffer, place)?;
                    let into = &self.loops.buffers[*buffer];
                    let value = match into.scope {
                        Scope::Register => value,
                        Scope::Global | Scope::Shared => scalar::cast(into.dtype, value),
                    };
                    self.buffers[*buffer].set(at, value);
                }
                Stmt::If { condition, then, other } => {
                    let holds = self.value(condition)? != Number::Int(0);
                    self.block(if holds { then } else { other })?;
                }
                Stmt::Prefetch { .. } => {}
                Stmt::Multiply(m) => self.multiply(m)?,
            }
        }
        Ok(())
    }

    /// The part of a product by a warp that is this thread's.
    fn multiply(&mut self, m: &Multiply) -> Result<(), Diagnostic> {
        let lane = m.lane.map(|v| self.vars[usize::from(v)].unwrap_or(0));
        let dtype = self.loops.buffers[m.sums.0].dtype;
        for e in 0..4 {
            let mut at = Place::affine(m.sums.1.clone());
            at.affine.offset += e as i64;
            let at = self.place(m.sums.0, &at)?;
            let lines = [lane[0] + 8 * (e / 2), 2 * lane[1] + e % 2];
            let mut sum = self.buffers[m.sums.0].get(at);
            let bytes = self.loops.buffers[m.sides[0].buffer].dtype.bytes();
            for product in 0..WARP_BYTES / bytes {
                let mut factors = [Number::Int(0); 2];
                for ((side, line), factor) in m.sides.iter().zip(lines).zip(&mut factors) {
                    let mut at = Place::affine(side.place.clone());
                    at.affine.offset +=
                        line as i64 * side.steps[0] + product as i64 * side.steps[1];
                    *factor = self.buffers[side.buffer].get(self.place(side.buffer, &at)?);
                }
                let [x, y] = factors.map(|factor| scalar::cast(dtype, factor));
                sum = scalar::fma(dtype, x, y, sum);
            }
            self.buffers[m.sums.0].set(at, sum);
        }
        Ok(())
    }

    /// The turns of a loop that this run makes.
    fn turns(&self, var: Var, extent: usize) -> Result<std::ops::Range<usize>, Diagnostic> {
        let Some(range) = self.loops.range(var) else { return Ok(0..extent) };
        let dims = self.loops.buffers.iter().position(|b| b.param == Param::Dims);
        let Some(Data::Int(dims)) = dims.map(|at| &self.buffers[at]) else {
            let what = format!("loop i{var} asks for dims that the kernel does not have");
            return Err(Diagnostic::new("K0904", what).node(&self.loops.name));
        };
        let number = |bound: Count| {
            let number = bound.of(|dim| dims.get(dim).map_or(0, |&d| d as i64));
            usize::try_from(number).unwrap_or(0).min(extent)
        };
        Ok(range.from.map_or(0, number)..number(range.to))
    }

    fn affine(&self, index: &Affine) -> Result<i128, Diagnostic> {
        index.terms.iter().try_fold(i128::from(index.offset), |sum, &(var, c)| {
            let turn = self.vars[usize::from(var)].ok_or_else(|| {
                let what = format!("i{var} is used outside of its loop");
                Diagnostic::new("K0904", what).node(&self.loops.name)
            })?;
            Ok(sum + i128::from(c) * turn as i128)
        })
    }

    /// The element that a place is, or where it went astray.
    fn place(&self, buffer: BufferId, place: &Place) -> Result<usize, Diagnostic> {
        let mut at = self.affine(&place.affine)?;
        if let Some(dynamic) = &place.dynamic
            && let Number::Int(more) = self.value(dynamic)?
        {
            at += more;
        }
        let len = self.buffers[buffer].len();
        usize::try_from(at).ok().filter(|&at| at < len).ok_or_else(|| {
            let turns = self.vars.iter().enumerate();
            let turns: Vec<String> =
                turns.filter_map(|(i, turn)| turn.map(|turn| format!("i{i} = {turn}"))).collect();
            Diagnostic::new("K0904", "a kernel leaves its buffer")
                .node(&self.loops.name)
                .tensor(format!("b{buffer}[{}]", affine(&place.affine)))
                .found(format!("element {at} where {}", turns.join(", ")))
                .expected(format!("an element of {len}"))
        })
    }

    /// What a value is computed as.
    fn computed(&self, e: &Expr) -> DType {
        compute_dtype(self.loops.dtype(e))
    }

    fn value(&self, e: &Expr) -> Result<Number, Diagnostic> {
        Ok(match e {
            Expr::Load(buffer, place) => self.buffers[*buffer].get(self.place(*buffer, place)?),
            Expr::Index(index) => Number::Int(scalar::wrap(DType::I64, self.affine(index)?)),
            Expr::Const(dtype, number) => scalar::cast(compute_dtype(*dtype), *number),
            Expr::Unary(f, x) => scalar::unary(*f, self.computed(x), self.value(x)?),
            Expr::Binary(f, x, y) => {
                scalar::binary(*f, self.computed(x), self.value(x)?, self.value(y)?)
            }
            Expr::Select(c, x, y) => {
                let (c, x, y) = (self.value(c)?, self.value(x)?, self.value(y)?);
                if c != Number::Int(0) { x } else { y }
            }
            Expr::Cast(dtype, x) => scalar::cast(*dtype, self.value(x)?),
            Expr::Fma(x, y, z) => {
                let dtype = self.computed(x);
                scalar::fma(dtype, self.value(x)?, self.value(y)?, self.value(z)?)
            }
            Expr::Fold(f, buffer) => {
                let data = &self.buffers[*buffer];
                let mut lanes: Vec<Number> = (0..data.len()).map(|n| data.get(n)).collect();
                let dtype = compute_dtype(self.loops.buffers[*buffer].dtype);
                while lanes.len() > 1 {
                    let (low, high) = lanes.split_at(lanes.len() / 2);
                    let pairs = low.iter().zip(high);
                    lanes = pairs
                        .map(|(x, y)| scalar::binary(f.binary(dtype), dtype, *x, *y))
                        .collect();
                }
                lanes[0]
            }
            Expr::Word(buffer, place) => {
                let (at, elements) = (self.place(*buffer, place)?, &self.buffers[*buffer]);
                let bytes = self.loops.buffers[*buffer].dtype.bytes();
                // The place was within the buffer; the ones after it may not be.
                if at + 4 / bytes > elements.len() {
                    let why = format!("a word from element {at} of {}", elements.len());
                    return Err(Diagnostic::new("K0904", why).node(&self.loops.name));
                }
                let word = (0..4 / bytes).rev().fold(0, |word, k| {
                    let part = match elements.get(at + k) {
                        Number::Int(v) => v,
                        Number::Float(v) => scalar::bf16(v).to_bits().into(),
                    };
                    (word << (8 * bytes)) | (part & ((1 << (8 * bytes)) - 1))
                });
                Number::Int(scalar::wrap(DType::I32, word))
            }
            Expr::Dot(parts, x, y, z) => {
                scalar::dot(*parts, self.value(x)?, self.value(y)?, self.value(z)?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loops::text::parse;

    fn run(text: &str, buffers: &mut [Data]) -> Result<(), Diagnostic> {
        let kernels = parse(text).unwrap_or_else(|e| panic!("{e}"));
        kernels.iter().try_for_each(|kernel| eval(kernel, buffers))
    }

    #[test]
    fn a_row_is_summed_as_a_tree() {
        let text = r#"kernel "sum" {
          b0 : f32[12] arg 0
          b1 : f32[4] register
          b2 : f32[1] out
          vector i0 in 4 { b1[i0] = 0.0:f32 }
          for i1 in 3 { vector i0 in 4 { b1[i0] = fma(b0[4*i1 + i0], 2.0:f32, b1[i0]) } }
          b2[0] = fold_sum(b1)
        }"#;
        let numbers = (0..12).map(f64::from).collect();
        let mut buffers = [Data::Float(numbers), Data::Float(vec![0.0])];
        run(text, &mut buffers).unwrap();
        assert_eq!(buffers[1], Data::Float(vec![132.0]));
    }

    #[test]
    fn integers_wrap_and_conditions_choose() {
        let text = r#"kernel "k" {
          b0 : i8[4] arg 0
          b1 : bool[4] out
          for i0 in 4 {
            if lt(index(i0), 2:i64) {
              b1[i0] = lt(add(b0[i0], 100:i8), b0[0 + i64(i8(index(i0)))])
            } else { b1[3 + mul(index(i0 + -2), -1:i64)] = bool(select(b1[0], b0[i0], 0:i8)) }
          }
        }"#;
        let mut buffers = [Data::Int(vec![27, 28, 5, 0]), Data::Int(vec![0; 4])];
        run(text, &mut buffers).unwrap();
        assert_eq!(buffers[1], Data::Int(vec![0, 1, 0, 0]));
    }

    #[test]
    fn a_place_out_of_bounds_is_named() {
        let text = r#"kernel "astray" {
          b0 : f32[8] out
          for i0 in 3 { for i2 in 3 { b0[4*i0 + i2] = 1.0:f32 } }
        }"#;
        let error = run(text, &mut [Data::Float(vec![0.0; 8])]).unwrap_err();
        assert_eq!(error.node.as_deref(), Some("astray"));
        assert_eq!(error.tensor.as_deref(), Some("b0[4*i0 + i2]"));
        assert_eq!(error.found.as_deref(), Some("element 8 where i0 = 2, i2 = 0"));
        let outside = text.replace("i2] =", "i3] =");
        let error = run(&outside, &mut [Data::Float(vec![0.0; 8])]).unwrap_err();
        assert!(error.message.contains("i3"), "{error}");
        assert!(run(text, &mut [Data::Float(vec![0.0; 7])]).is_err());
        assert!(run(text, &mut [Data::Int(vec![0; 8])]).is_err());
        assert!(run(text, &mut []).is_err());
    }
}
