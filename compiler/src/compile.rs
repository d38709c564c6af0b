//! From a program of kernels to an executable: code, memory, and constants computed once.

use std::collections::BTreeSet;
use std::sync::Arc;

use kiln_runtime::artifact::{Artifact, Constants};
use kiln_runtime::code::Code;
use kiln_runtime::memory::AlignedBytes;
use kiln_runtime::plan::{Length, Place, Plan, Port, Step};
use kiln_runtime::pool::Pool;
use kiln_runtime::session::Executable;
use kiln_runtime::tensor::{DType, TensorView, TensorViewMut};
use kiln_runtime::work::Work;

use crate::backend::cpu::{Cpu, Emitted, emit_all};
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::graph::op::Type;
use crate::graph::used::Span;
use crate::loops::ir::Loops;
use crate::loops::share::chunks;
use crate::plan::kernels::{Launch, Program, Source};
use crate::plan::memory::{ALIGN, Lifetime, assign};

fn internal(what: &str, why: impl std::fmt::Display) -> Error {
    let diagnostic = Diagnostic::new("K0801", format!("{what}: {why}"));
    Error::new(ErrorKind::Incompatible, diagnostic)
}

/// Places of slots, and what they need.
struct Layout {
    places: Vec<Option<Place>>,
    arena_bytes: usize,
}

/// Steps of the launches that `choose` picks, and what they do.
fn steps(
    program: &Program,
    choose: impl Fn(&Launch) -> bool,
    layout: &Layout,
) -> (Vec<Step>, Vec<Work>) {
    let mut works: Vec<usize> = Vec::new();
    let step = |launch: &Launch| {
        // Those of one work follow one another.
        if works.last() != Some(&launch.work) {
            works.push(launch.work);
        }
        let kernel = &program.kernels[launch.kernel];
        let extent = kernel.parallel_extent() as i64;
        let place = |s: &usize| layout.places[*s].expect("every slot of a launch has a place");
        Step {
            name: launch.name.clone(),
            kernel: launch.kernel,
            work: works.len() - 1,
            buffers: launch.slots.iter().map(place).collect(),
            extent,
            chunks: extent.min(chunks(kernel.work()) as i64),
        }
    };
    let steps = program.launches.iter().filter(|l| choose(l)).map(step).collect();
    (steps, works.into_iter().map(|work| program.work[work].clone()).collect())
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

/// Runs what hangs on constants only. Raw constants are read where they are, in the model's file,
/// and results are written where runs will read them.
fn fold(graph: &Graph, program: &Program, emitted: &Emitted, threads: usize) -> Result<Folded> {
    let launches: Vec<&Launch> = program.launches.iter().filter(|l| l.constant).collect();
    let raw = |slot: usize| match program.slots[slot].source {
        Source::Const(constant) => Some(&graph.constants[constant].bytes),
        Source::Input(_) | Source::Dims | Source::Made => None,
    };
    let mut wanted = vec![false; program.slots.len()];
    for launch in program.launches.iter().filter(|l| !l.constant) {
        launch.slots.iter().for_each(|&s| wanted[s] = program.slots[s].constant);
    }
    // The constants of a run: raw ones first, then the folded ones.
    let slots =
        |is_raw: bool| (0..program.slots.len()).filter(move |&s| raw(s).is_some() == is_raw);
    let kept: Vec<usize> = slots(true).filter(|&s| wanted[s]).collect();
    let made: Vec<usize> = slots(false).filter(|&s| wanted[s]).collect();
    let mut places: Vec<Option<Place>> = vec![None; program.slots.len()];
    let mut len = 0;
    for &slot in kept.iter().chain(&made) {
        places[slot] = Some(Place::Const(len));
        len += program.slots[slot].bytes.next_multiple_of(ALIGN);
    }
    let mut bytes = AlignedBytes::zeroed(len);
    let mut rest = bytes.bytes_mut();
    let mut next = |slot: usize| {
        let len = program.slots[slot].bytes;
        let (this, after) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(ALIGN));
        rest = after;
        &mut this[..len]
    };
    for &slot in &kept {
        next(slot).copy_from_slice(raw(slot).map_or(&[][..], |bytes| bytes));
    }
    let results: Vec<&mut [u8]> = made.iter().map(|&slot| next(slot)).collect();
    if launches.is_empty() {
        return Ok(Folded { bytes: bytes.into(), places });
    }
    let mut layout = Layout { places: vec![None; program.slots.len()], arena_bytes: 0 };
    let mut plan = Plan::default();
    let port = |slot: usize| {
        Port::new(format!("constant {slot}"), DType::U8, &[program.slots[slot].bytes])
    };
    let mut given = Vec::new();
    for slot in slots(true).filter(|s| launches.iter().any(|l| l.slots.contains(s))) {
        layout.places[slot] = Some(Place::Input(given.len()));
        plan.inputs.push(port(slot));
        given.push(raw(slot).map_or(&[][..], |bytes| bytes));
    }
    for &slot in &made {
        layout.places[slot] = Some(Place::Output(plan.outputs.len()));
        plan.outputs.push(port(slot));
    }
    place_in_arena(program, &launches, &mut layout);
    (plan.steps, plan.work) = steps(program, |l| l.constant, &layout);
    plan.arena_bytes = layout.arena_bytes;
    run_once(load(emitted, plan, Constants::from_bytes(&[]), threads)?, &given, results)?;
    Ok(Folded { bytes: bytes.into(), places })
}

/// The kernels that constants hang on, as code of `here`, this machine: that of the others is
/// missing, and nobody asks for it.
pub fn emit_constants(program: &Program, here: &Cpu, verify: bool) -> Result<Emitted> {
    let constant = program.launches.iter().filter(|l| l.constant);
    let kernels: BTreeSet<usize> = constant.map(|l| l.kernel).collect();
    let loops: Vec<Loops> = kernels.iter().map(|&k| program.kernels[k].clone()).collect();
    let emitted = emit_all(&loops, here, verify, false)?;
    let mut entries = vec![0; program.kernels.len()];
    let mut sizes = entries.clone();
    for (i, &k) in kernels.iter().enumerate() {
        (entries[k], sizes[k]) = (emitted.entries[i], emitted.sizes[i]);
    }
    Ok(Emitted { entries, sizes, ..emitted })
}

/// Runs a plan whose ports are bytes.
fn run_once(executable: Executable, inputs: &[&[u8]], outputs: Vec<&mut [u8]>) -> Result<()> {
    let shapes: Vec<[usize; 1]> = inputs.iter().map(|bytes| [bytes.len()]).collect();
    let views = shapes.iter().zip(inputs);
    let views: Vec<TensorView> =
        views.map(|(shape, bytes)| TensorView { dtype: DType::U8, shape, bytes }).collect();
    let shapes: Vec<[usize; 1]> = outputs.iter().map(|bytes| [bytes.len()]).collect();
    let results = shapes.iter().zip(outputs);
    let mut results: Vec<TensorViewMut> =
        results.map(|(shape, bytes)| TensorViewMut { dtype: DType::U8, shape, bytes }).collect();
    let ran = executable.run_into(&views, &mut results);
    ran.map_err(|e| internal("folding constants", e))
}

/// An executable of kernels, for this machine.
pub fn load(
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

/// Which axes of a port are as long as dims.
fn lengths(ty: &Type) -> Vec<Length> {
    let length = |&(axis, span): &(u8, Span)| match span {
        Span::Dim { dim, more } => {
            Some(Length { axis: axis.into(), dim: dim.into(), more: more.into() })
        }
        Span::Mixed => None,
    };
    ty.used.iter().filter_map(length).collect()
}

/// The plan of a program and the constants that it reads, which `emitted` computes here.
pub fn assemble(
    graph: &Graph,
    program: &Program,
    emitted: &Emitted,
    threads: usize,
) -> Result<(Plan, Constants)> {
    let folded = fold(graph, program, emitted, threads)?;
    let mut layout = Layout { places: folded.places, arena_bytes: 0 };
    for (i, slot) in program.slots.iter().enumerate() {
        match slot.source {
            Source::Input(input) => layout.places[i] = Some(Place::Input(input)),
            Source::Dims => layout.places[i] = Some(Place::Dims),
            Source::Const(_) | Source::Made => {}
        }
    }
    for (i, &slot) in program.outputs.iter().enumerate() {
        layout.places[slot] = Some(Place::Output(i));
    }
    let launches: Vec<&Launch> = program.launches.iter().filter(|l| !l.constant).collect();
    place_in_arena(program, &launches, &mut layout);
    let port = |name: &str, ty: &Type| Port {
        name: name.to_string(),
        dtype: ty.dtype,
        shape: ty.shape.to_vec(),
        lengths: lengths(ty),
    };
    let (steps, work) = steps(program, |l| !l.constant, &layout);
    let plan = Plan {
        dims: graph.dims.clone(),
        inputs: graph.inputs.iter().map(|(name, ty)| port(name, ty)).collect(),
        outputs: graph.outputs.iter().map(|(name, id)| port(name, graph.ty(*id))).collect(),
        states: graph.states.clone(),
        steps,
        work,
        arena_bytes: layout.arena_bytes,
    };
    Ok((plan, folded.bytes))
}
