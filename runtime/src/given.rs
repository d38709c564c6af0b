//! Tensors that are given to a run: whether they fit the ports of a plan.

use crate::plan::{DIMS, Dims, Length, Plan, Port};
use crate::run_error::{Names, RunError};
use crate::tensor::{DType, Tensor, TensorView, TensorViewMut, size_bytes};

/// Runs on tensors given by name; gives the outputs that are not kept in place, by number.
///
/// # Errors
/// When a tensor is missing, unknown, or does not fit, and those of the run.
pub fn run_named<E: From<RunError>>(
    plan: &Plan,
    inputs: &[(&str, TensorView<'_>)],
    run_into: impl FnOnce(&[TensorView<'_>], &mut [TensorViewMut<'_>]) -> Result<(), E>,
) -> Result<Vec<(usize, Tensor)>, E> {
    let views = by_port(plan, inputs)?;
    let dims = lengths(plan, &views)?;
    let shapes: Vec<Vec<usize>> = plan.outputs.iter().map(|port| port.shape_for(&dims)).collect();
    let mut outputs: Vec<(usize, Tensor)> = (0..shapes.len())
        .filter(|&port| !plan.is_output_kept(port))
        .map(|port| (port, Tensor::zeros(plan.outputs[port].dtype, &shapes[port])))
        .collect();
    let mut made = outputs.iter_mut();
    let target = |(port, shape)| match plan.is_output_kept(port) {
        true => TensorViewMut { dtype: plan.outputs[port].dtype, shape, bytes: &mut [] },
        false => made.next().expect("a tensor for each output that is not kept").1.view_mut(),
    };
    let mut targets: Vec<TensorViewMut> =
        shapes.iter().map(Vec::as_slice).enumerate().map(target).collect();
    run_into(&views, &mut targets)?;
    Ok(outputs)
}

/// Puts tensors given by name into the order of the ports.
///
/// # Errors
/// When one is missing, unknown or given twice.
pub fn by_port<'a>(
    plan: &Plan,
    inputs: &[(&str, TensorView<'a>)],
) -> Result<Vec<TensorView<'a>>, RunError> {
    for (index, (name, _)) in inputs.iter().enumerate() {
        if !plan.inputs.iter().any(|port| port.name == *name) {
            let expected = Names(plan.inputs.iter().map(|port| port.name.clone()).collect());
            return Err(RunError::UnknownInput { found: name.to_string(), expected });
        }
        if inputs[..index].iter().any(|(earlier, _)| earlier == name) {
            return Err(RunError::DuplicateInput(name.to_string()));
        }
    }
    let find = |port: &Port| {
        let given = inputs.iter().find(|(name, _)| port.name == *name);
        given
            .map(|(_, view)| *view)
            .ok_or_else(|| RunError::MissingInput { expected: port.clone() })
    };
    plan.inputs.iter().map(find).collect()
}

/// Checks the tensors of a run, in the order of the ports, and gives the lengths of dims.
///
/// # Errors
/// When their number, a type or a shape is not that of the model.
pub fn check(
    plan: &Plan,
    inputs: &[TensorView<'_>],
    outputs: &[TensorViewMut<'_>],
) -> Result<Dims, RunError> {
    check_count("inputs", inputs.len(), plan.inputs.len())?;
    check_count("outputs", outputs.len(), plan.outputs.len())?;
    let dims = check_inputs(plan, inputs)?;
    for (i, (port, view)) in plan.outputs.iter().zip(outputs).enumerate() {
        let bytes = (!plan.is_output_kept(i)).then_some(view.bytes.len());
        check_port(port, &dims, (view.dtype, view.shape, bytes))?;
    }
    Ok(dims)
}

/// The same of the inputs alone.
///
/// # Errors
/// As [`check`].
pub fn check_inputs(plan: &Plan, inputs: &[TensorView<'_>]) -> Result<Dims, RunError> {
    check_count("inputs", inputs.len(), plan.inputs.len())?;
    let dims = lengths(plan, inputs)?;
    for (i, (port, view)) in plan.inputs.iter().zip(inputs).enumerate() {
        // What is kept in place comes without bytes: the run knows its memory.
        let bytes = (!plan.is_input_kept(i)).then_some(view.bytes.len());
        check_port(port, &dims, (view.dtype, view.shape, bytes))?;
    }
    Ok(dims)
}

/// The lengths of dims that the shapes of inputs give. Does not allocate where they fit.
fn lengths(plan: &Plan, inputs: &[TensorView<'_>]) -> Result<Dims, RunError> {
    let mut dims = [0; DIMS];
    let mut known = [false; DIMS];
    for (port, view) in plan.inputs.iter().zip(inputs) {
        for &Length { axis, dim, more } in &port.lengths {
            let extent = *view.shape.get(axis).ok_or_else(|| RunError::Shape {
                found: view.shape.to_vec(),
                expected: port.clone(),
            })?;
            let found = i64::try_from(extent).unwrap_or(i64::MAX).saturating_sub(more);
            let range = &plan.dims[dim];
            if !usize::try_from(found).is_ok_and(|n| (range.least..=range.most).contains(&n)) {
                let (dim, port) = (range.clone(), port.name.clone());
                return Err(RunError::Range { axis, found, dim, port });
            }
            if known[dim] && dims[dim] != found {
                let (before, dim) = (dims[dim], range.name.clone());
                let port = port.name.clone();
                return Err(RunError::Differ { axis, found, before, dim, port });
            }
            (known[dim], dims[dim]) = (true, found);
        }
    }
    Ok(dims)
}

fn check_count(what: &'static str, found: usize, expected: usize) -> Result<(), RunError> {
    if found == expected { Ok(()) } else { Err(RunError::Count { what, found, expected }) }
}

fn check_port(
    port: &Port,
    dims: &Dims,
    (dtype, shape, bytes): (DType, &[usize], Option<usize>),
) -> Result<(), RunError> {
    if dtype != port.dtype {
        return Err(RunError::DType { found: dtype, expected: port.clone() });
    }
    let expected = |(axis, &most): (usize, &usize)| {
        let length = port.lengths.iter().find(|l| l.axis == axis);
        length.map_or(most as i64, |l| dims[l.dim] + l.more)
    };
    let fits = shape.len() == port.shape.len()
        && port.shape.iter().enumerate().map(expected).eq(shape.iter().map(|&e| e as i64));
    if !fits {
        return Err(RunError::Shape { found: shape.to_vec(), expected: port.clone() });
    }
    // `Plan::check` made sure that the size exists.
    let expected_bytes = size_bytes(dtype, shape).unwrap_or(usize::MAX);
    match bytes {
        Some(found) if found != expected_bytes => {
            Err(RunError::Bytes { found, expected_bytes, expected: port.clone() })
        }
        Some(_) | None => Ok(()),
    }
}
