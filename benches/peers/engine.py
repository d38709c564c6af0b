"""Measures one engine on one model and prints the object that `kiln bench --json` prints.

    engine.py ENGINE MODEL THREADS SECONDS
"""
import json
import os
import sys
import time

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
import onnx

WARMUP_SHARE, FEWEST, MOST = 0.2, 3, 100_000


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


def onnxruntime(path, feed, threads):
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


def openvino(path, feed, threads):
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bf16 where the CPU has it
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


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino}


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
    engine, path, threads, seconds = sys.argv[1:5]
    feed = inputs(path)
    start = time.perf_counter()
    run = ENGINES[engine](path, feed, int(threads))
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
