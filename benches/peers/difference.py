"""Prints how far an engine's results are from those of onnxruntime in f32.

    difference.py ENGINE MODEL PRECISION FOLDER KILN

Of each output, the largest difference relative to its largest number; of these the largest.
"""
import os
import subprocess
import sys

import numpy as np

import engine


def kiln(command, path, precision, folder, feed):
    given, results = os.path.join(folder, "in.npz"), os.path.join(folder, "out.npz")
    np.savez(given, **feed)
    argv = [command, "run", path, "--precision", precision, "-i", given, "-o", results]
    subprocess.run(argv, check=True, capture_output=True)
    return dict(np.load(results))


def openvino(path, precision, feed):
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    results = compiled(feed)
    return {name: results[port] for port in compiled.outputs for name in port.names}


def main():
    name, path, precision, folder, command = sys.argv[1:]
    import onnxruntime as ort

    feed = engine.inputs(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {o.name: r for o, r in zip(session.get_outputs(), session.run(None, feed))}
    if name == "kiln":
        found = kiln(command, path, precision, folder, feed)
    else:
        found = openvino(path, precision, feed)
    far = 0.0
    for output, want in wanted.items():
        if want.dtype.kind == "f" and want.size:
            apart = np.abs(found[output].astype(np.float64) - want).max()
            far = max(far, apart / max(np.abs(want).max(), 1e-30))
    print(far)


if __name__ == "__main__":
    main()
