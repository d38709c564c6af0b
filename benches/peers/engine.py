"""Measures one engine on one model and prints the object that `kiln bench --json` prints.

    engine.py ENGINE MODEL THREADS SECONDS [PRECISION]
"""
import json
import os
import sys
import time

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
import onnx

WARMUP_SHARE, FEWEST, MOST = 0.2, 3, 100_000
# How tract writes types.
DTYPES = {"float32": "f32", "int32": "i32", "int64": "i64", "bool": "bool"}


def inputs(path):
    """Seeded random inputs; weights of old models are listed as inputs and are none."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {w.name for w in graph.initializer}
    random = np.random.default_rng(0)
    feed = {}
    for value in graph.input:
        if value.name not in weights:
            tensor = value.type.tensor_type
            shape = [max(d.dim_value, 1) for d in tensor.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            array = random.standard_normal(shape)
            # Integers are mostly indices, and 0 and 1 are inside of every table.
            feed[value.name] = (array if dtype.kind == "f" else array > 0).astype(dtype)
    return feed


def onnxruntime(path, feed, threads, _):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def openvino(path, feed, threads, precision):
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # the default is bf16 where the CPU has it
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # the whole process is pinned
    }
    model = core.read_model(path)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    for name, array in feed.items():
        request.set_tensor(name, ov.Tensor(array, shared_memory=True))
    return request.infer


def tract(path, feed, threads, _):
    """The wheel has no pool of threads."""
    import tract

    if threads > 1:
        sys.exit("tract's wheel runs on one thread")
    model = tract.onnx().load(path)
    for index, array in enumerate(feed.values()):
        model.set_input_fact(index, f"{','.join(map(str, array.shape))},{DTYPES[array.dtype.name]}")
    runnable = model.into_model().into_runnable()
    given = [tract.Tensor.from_numpy(array) for array in feed.values()]
    return lambda: runnable.run(given)


def jax(path, feed, threads, _):
    """Through a small reader of ONNX that knows the operators of ops.py; weights are arguments."""
    import jax
    from jax import numpy as jnp, lax, nn

    def convolution(a, x, w, bias):
        pads = a["pads"][: len(a["pads"]) // 2], a["pads"][len(a["pads"]) // 2 :]
        y = lax.conv_general_dilated(x, w, a.get("strides", (1, 1)), list(zip(*pads)),
                                     feature_group_count=a.get("group", 1))
        return y + bias[:, None, None]

    def layer_norm(a, x, scale, bias):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + a["epsilon"]) * scale + bias

    operators = {
        "Abs": lambda a, x: abs(x),
        "Add": lambda a, x, y: x + y,
        "Conv": convolution,
        "Gelu": lambda a, x: nn.gelu(x, approximate=False),
        "LayerNormalization": layer_norm,
        "MatMul": lambda a, x, y: x @ y,
        "Mul": lambda a, x, y: x * y,
        "Neg": lambda a, x: -x,
        "ReduceMean": lambda a, x, axes: x.mean(tuple(axes.tolist()), keepdims=True),
        "Relu": lambda a, x: nn.relu(x),
        "Softmax": lambda a, x: nn.softmax(x, axis=a["axis"]),
        "Sqrt": lambda a, x: jnp.sqrt(x),
        "Sub": lambda a, x, y: x - y,
        "Transpose": lambda a, x: jnp.transpose(x, a["perm"]),
    }
    graph = onnx.load(path).graph
    missing = {n.op_type for n in graph.node} - set(operators)
    if missing:
        sys.exit(f"the reader of ONNX for jax lacks {', '.join(sorted(missing))}")
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    # Numbers that shape a result are no arguments.
    shaping = {name: w for name, w in weights.items() if w.dtype == np.int64}

    def forward(values):
        values = {**values, **shaping}
        for node in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            given = (values[name] for name in node.input)
            values[node.output[0]] = operators[node.op_type](attributes, *given)
        return [values[v.name] for v in graph.output]

    given = {n: w for n, w in weights.items() if n not in shaping} | feed
    given = {name: jax.device_put(array) for name, array in given.items()}
    compiled = jax.jit(forward).lower(given).compile()
    return lambda: jax.block_until_ready(compiled(given))


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino, "tract": tract, "jax": jax}


def measure(run, seconds):
    """Milliseconds of each run, after a warm-up."""
    end = time.perf_counter() + seconds * WARMUP_SHARE
    run()
    while time.perf_counter() < end:
        run()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST or time.perf_counter() < end and len(times) < MOST:
        start = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return sorted(times)


def peak_rss_mb():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main():
    engine, path, threads, seconds, *rest = sys.argv[1:]
    precision = rest[0] if rest else "f32"
    feed = inputs(path)
    start = time.perf_counter()
    run = ENGINES[engine](path, feed, int(threads), precision)
    load_ms = (time.perf_counter() - start) * 1e3
    times = measure(run, float(seconds))
    at = lambda percent: times[min(len(times) - 1, len(times) * percent // 100)]
    report = {
        "schema": "kiln/1",
        "model": path,
        "threads": int(threads),
        "compile_ms": load_ms,
        "load_ms": 0,
        "runs": len(times),
        "min_ms": times[0],
        "p50_ms": at(50),
        "p90_ms": at(90),
        "p99_ms": at(99),
        "peak_rss_mb": peak_rss_mb(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
