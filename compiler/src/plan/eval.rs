//! A program of kernels, run by the interpreter of loops.

use kiln_runtime::tensor::DType;

use super::kernels::{Launch, Program, Source, written_slot};
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::eval::{Data, Value};
use crate::graph::op::Type;
use crate::graph::{Graph, NodeId};
use crate::loops;
use crate::loops::ir::Scope;

/// The values of all outputs.
pub fn eval(graph: &Graph, program: &Program, inputs: &[Value]) -> Result<Vec<Value>> {
    let mut memory = vec![None; program.slots.len()];
    let types: Vec<&Type> = graph.outputs.iter().map(|(_, id)| graph.ty(*id)).collect();
    let wanted = program.outputs.iter().zip(&types).map(|(slot, ty)| (*slot, ty.dtype)).collect();
    let data = run(graph, program, wanted, &mut memory, &|input| inputs[input].clone())?;
    Ok(types.into_iter().zip(data).map(|(ty, data)| Value { ty: ty.clone(), data }).collect())
}

/// The value of one node by its own kernels, of given values of its operands.
pub fn eval_node(
    graph: &Graph,
    program: &Program,
    id: NodeId,
    operand: &dyn Fn(NodeId) -> Value,
) -> Result<Value> {
    let mut memory = vec![None; program.slots.len()];
    for arg in &graph.node(id).args {
        memory[program.values[arg.index()]] = Some(held(operand(*arg)));
    }
    let ty = graph.ty(id).clone();
    let wanted = vec![(program.values[id.index()], ty.dtype)];
    let inputs = |_| unreachable!("all operands are given");
    let data = run(graph, program, wanted, &mut memory, &inputs)?.swap_remove(0);
    Ok(Value { ty, data })
}

/// What a slot holds, and as what it was written: others may read the bytes as another dtype.
type Held = (DType, Data);

fn held(value: Value) -> Held {
    (value.ty.dtype, value.data)
}

/// What a slot holds as a dtype.
fn as_dtype((written, data): &Held, dtype: DType) -> Data {
    if written.stored() == dtype.stored() || written.bytes() != dtype.bytes() {
        return data.clone();
    }
    Value { ty: Type::new(*written, &[data.len()]), data: data.clone() }.bits(dtype)
}

/// What `wanted` slots hold after the launches that they hang on; `memory` is what slots hold
/// before.
fn run(
    graph: &Graph,
    program: &Program,
    wanted: Vec<(usize, DType)>,
    memory: &mut [Option<Held>],
    input: &dyn Fn(usize) -> Value,
) -> Result<Vec<Data>> {
    let mut needed: Vec<bool> = vec![false; program.slots.len()];
    wanted.iter().for_each(|&(slot, _)| needed[slot] = true);
    let mut chosen: Vec<&Launch> = Vec::new();
    for launch in program.launches.iter().rev() {
        let kernel = &program.kernels[launch.kernel];
        let written = written_slot(kernel, &launch.slots);
        if written.is_some_and(|slot| needed[slot] && memory[slot].is_none()) {
            launch.slots.iter().for_each(|&slot| needed[slot] = true);
            chosen.push(launch);
        }
    }
    for (slot, memory) in memory.iter_mut().enumerate() {
        match program.slots[slot].source {
            Source::Input(i) if needed[slot] && memory.is_none() => *memory = Some(held(input(i))),
            Source::Const(i) if needed[slot] && memory.is_none() => {
                *memory = Some(held(Value::from_constant(&graph.constants[i])));
            }
            // Without a caller, dims are as long as they may be.
            Source::Dims if needed[slot] => *memory = Some((DType::I64, longest(graph))),
            Source::Input(_) | Source::Const(_) | Source::Dims | Source::Made => {}
        }
    }
    for launch in chosen.iter().rev() {
        let kernel = &program.kernels[launch.kernel];
        let global = kernel.buffers.iter().filter(|b| b.scope == Scope::Global);
        let take = |(buffer, &slot): (&loops::ir::Buffer, &usize)| {
            let found = memory[slot].as_ref().map(|held| as_dtype(held, buffer.dtype));
            found.unwrap_or_else(|| Data::zeros(buffer.dtype, buffer.len))
        };
        let mut buffers: Vec<Data> = global.zip(&launch.slots).map(take).collect();
        loops::eval::eval(kernel, &mut buffers)
            .map_err(|diagnostic| Error::new(ErrorKind::Mismatch, diagnostic))?;
        let written = written_slot(kernel, &launch.slots);
        let global = kernel.buffers.iter().filter(|b| b.scope == Scope::Global);
        for ((&slot, data), buffer) in launch.slots.iter().zip(buffers).zip(global) {
            if Some(slot) == written {
                memory[slot] = Some((buffer.dtype, data));
            }
        }
    }
    let value = |&(slot, dtype): &(usize, DType)| {
        // Kernels over nothing do not run; their results have no elements.
        let empty = program.slots[slot].bytes == 0;
        let found = memory[slot].as_ref().map(|held| as_dtype(held, dtype));
        let found = found.or(empty.then(|| Data::zeros(dtype, 0)));
        found.ok_or_else(|| {
            let what = format!("no kernel writes slot {slot}");
            Error::new(ErrorKind::Mismatch, Diagnostic::new("K0905", what))
        })
    };
    wanted.iter().map(value).collect()
}

fn longest(graph: &Graph) -> Data {
    let mut dims: Vec<i128> = graph.dims.iter().map(|dim| dim.most as i128).collect();
    dims.resize(loops::ir::DIMS, 0);
    Data::Int(dims)
}
