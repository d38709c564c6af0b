//! From a program of kernels to an executable: code, memory, and constants computed once.

use std::sync::Arc;

use kiln_runtime::artifact::{Artifact, Constants};
use kiln_runtime::code::Code;
use kiln_runtime::plan::{Place, Plan, Port, Step};
use kiln_runtime::pool::Pool;
use kiln_runtime::session::Executable;
use kiln_runtime::tensor::{DType, TensorViewMut};

use crate::backend::cpu::Emitted;
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::plan::kernels::{Launch, Program, Source};
use crate::plan::memory::{ALIGN, Lifetime, assign};

/// Work (in value nodes) below which a kernel is not worth sharing out to threads.
const SERIAL_WORK: u64 = 20_000;
/// Pieces that the work of a large kernel is cut into.
const CHUNKS: i64 = 16;

fn internal(what: &str, why: impl std::fmt::Display) -> Error {
    let diagnostic = Diagnostic::new("K0801", format!("{what}: {why}"));
    Error::new(ErrorKind::Incompatible, diagnostic)
}

/// Places of slots, and what they need.
struct Layout {
    places: Vec<Option<Place>>,
    arena_bytes: usize,
}

/// Steps of the launches that `choose` picks.
fn steps(program: &Program, choose: impl Fn(&Launch) -> bool, layout: &Layout) -> Vec<Step> {
    let step = |launch: &Launch| {
        let kernel = &program.kernels[launch.kernel];
        let extent = kernel.parallel_extent() as i64;
        let serial = kernel.work() < SERIAL_WORK;
        let place = |s: &usize| layout.places[*s].expect("every slot of a launch has a place");
        Step {
            name: launch.name.clone(),
            kernel: launch.kernel,
            buffers: launch.slots.iter().map(place).collect(),
            extent,
            chunks: if serial { 1 } else { CHUNKS.min(extent) },
        }
    };
    program.launches.iter().filter(|l| choose(l)).map(step).collect()
}

/// Gives arena places to the slots that launches touch and that have none.
fn place_in_arena(program: &Program, launches: &[&Launch], layout: &mut Layout) {
    let mut lifetimes: Vec<(usize, Lifetime)> = Vec::new();
    let mut seen: Vec<Option<usize>> = vec![None; program.slots.len()];
    for (i, launch) in launches.iter().enumerate() {
        for &slot in &launch.slots {
            if layout.places[slot].is_some() {
                continue;
            }
            match seen[slot] {
                Some(at) => lifetimes[at].1.last = i,
                None => {
                    seen[slot] = Some(lifetimes.len());
                    let bytes = program.slots[slot].bytes;
                    lifetimes.push((slot, Lifetime { bytes, first: i, last: i }));
                }
            }
        }
    }
    let values: Vec<Lifetime> = lifetimes.iter().map(|l| l.1).collect();
    let (offsets, total) = assign(&values);
    for ((slot, _), offset) in lifetimes.iter().zip(offsets) {
        layout.places[*slot] = Some(Place::Arena(offset));
    }
    layout.arena_bytes = layout.arena_bytes.max(total);
}

/// Constants that a run reads: raw ones as they are in the model, others computed here.
struct Folded {
    bytes: Constants,
    places: Vec<Option<Place>>,
}

fn fold(graph: &Graph, program: &Program, emitted: &Emitted) -> Result<Folded> {
    let constant: Vec<&Launch> = program.launches.iter().filter(|l| l.constant).collect();
    let wanted = |slot: usize| {
        program.slots[slot].constant
            && program.launches.iter().any(|l| !l.constant && l.slots.contains(&slot))
    };
    let mut used: Vec<usize> = (0..program.slots.len()).filter(|&s| wanted(s)).collect();
    used.dedup();
    // First the raw constants that the constant launches read.
    let mut raw_places: Vec<Option<Place>> = vec![None; program.slots.len()];
    let raw = |slot: &usize| matches!(program.slots[*slot].source, Source::Const(_));
    let mut read: Vec<usize> =
        constant.iter().flat_map(|l| l.slots.iter().copied()).filter(|s| raw(s)).collect();
    read.sort_unstable();
    read.dedup();
    let raw_bytes = copy_constants(graph, program, &read, &mut raw_places);
    // Results that a run wants are outputs of the folding plan.
    let made: Vec<usize> = used.iter().copied().filter(|s| !raw(s)).collect();
    let mut layout = Layout { places: raw_places, arena_bytes: 0 };
    let mut outputs = Vec::new();
    for &slot in &made {
        layout.places[slot] = Some(Place::Output(outputs.len()));
        let shape = vec![program.slots[slot].bytes];
        outputs.push(Port { name: format!("constant {slot}"), dtype: DType::U8, shape });
    }
    place_in_arena(program, &constant, &mut layout);
    let steps = steps(program, |l| l.constant, &layout);
    let plan = Plan { inputs: Vec::new(), outputs, steps, arena_bytes: layout.arena_bytes };
    // The final constants: raw ones first, then the folded ones in place.
    let kept: Vec<usize> = used.iter().copied().filter(|s| raw(s)).collect();
    let mut places: Vec<Option<Place>> = vec![None; program.slots.len()];
    let mut offset = 0usize;
    for &slot in kept.iter().chain(&made) {
        places[slot] = Some(Place::Const(offset));
        offset += program.slots[slot].bytes.next_multiple_of(ALIGN);
    }
    let mut bytes = Constants::zeroed(offset);
    write_raw(graph, program, &kept, &places, &mut bytes);
    let shapes: Vec<[usize; 1]> = made.iter().map(|&s| [program.slots[s].bytes]).collect();
    if !made.is_empty() {
        let mut views = Vec::new();
        let first = kept.iter().map(|&s| program.slots[s].bytes.next_multiple_of(ALIGN)).sum();
        let (_, mut rest) = bytes.bytes_mut().split_at_mut(first);
        for shape in &shapes {
            let (this, after) = rest.split_at_mut(shape[0].next_multiple_of(ALIGN));
            views.push(TensorViewMut { dtype: DType::U8, shape, bytes: &mut this[..shape[0]] });
            rest = after;
        }
        let executable = build(emitted, plan, raw_bytes, 1)?;
        executable.run_into(&[], &mut views).map_err(|e| internal("folding constants", e))?;
    }
    Ok(Folded { bytes, places })
}

fn copy_constants(
    graph: &Graph,
    program: &Program,
    slots: &[usize],
    places: &mut [Option<Place>],
) -> Constants {
    let mut offset = 0;
    for &slot in slots {
        places[slot] = Some(Place::Const(offset));
        offset += program.slots[slot].bytes.next_multiple_of(ALIGN);
    }
    let mut bytes = Constants::zeroed(offset);
    write_raw(graph, program, slots, places, &mut bytes);
    bytes
}

fn write_raw(
    graph: &Graph,
    program: &Program,
    slots: &[usize],
    places: &[Option<Place>],
    bytes: &mut Constants,
) {
    for &slot in slots {
        if let (Source::Const(i), Some(Place::Const(at))) =
            (&program.slots[slot].source, places[slot])
        {
            let from = &graph.constants[*i].bytes;
            bytes.bytes_mut()[at..at + from.len()].copy_from_slice(from);
        }
    }
}

fn build(
    emitted: &Emitted,
    plan: Plan,
    constants: Constants,
    threads: usize,
) -> Result<Executable> {
    let code = Code::load(&emitted.code, emitted.entries.clone())
        .map_err(|e| internal("executable memory", e))?;
    let pool = Pool::new(threads).map_err(|e| internal("threads", e))?;
    let artifact = Artifact { plan, code, constants };
    // SAFETY: the code was emitted from loops that `loops::verify` has checked against the sizes
    // of the buffers that this plan gives them.
    unsafe { Executable::new(artifact, Arc::new(pool)) }.map_err(|e| internal("the plan", e))
}

/// The executable of a program.
pub fn assemble(
    graph: &Graph,
    program: &Program,
    emitted: &Emitted,
    threads: usize,
) -> Result<Executable> {
    let folded = fold(graph, program, emitted)?;
    let mut layout = Layout { places: folded.places, arena_bytes: 0 };
    for (i, slot) in program.slots.iter().enumerate() {
        if let Source::Input(input) = slot.source {
            layout.places[i] = Some(Place::Input(input));
        }
    }
    for (i, &slot) in program.outputs.iter().enumerate() {
        layout.places[slot] = Some(Place::Output(i));
    }
    let launches: Vec<&Launch> = program.launches.iter().filter(|l| !l.constant).collect();
    place_in_arena(program, &launches, &mut layout);
    let port = |name: &str, ty: &crate::graph::op::Type| Port {
        name: name.to_string(),
        dtype: ty.dtype,
        shape: ty.shape.to_vec(),
    };
    let plan = Plan {
        inputs: graph.inputs.iter().map(|(name, ty)| port(name, ty)).collect(),
        outputs: graph.outputs.iter().map(|(name, id)| port(name, graph.ty(*id))).collect(),
        steps: steps(program, |l| !l.constant, &layout),
        arena_bytes: layout.arena_bytes,
    };
    build(emitted, plan, folded.bytes, threads)
}
