"""The nine light CNNs of the ONNX suite, as they are and with random weights.

In the suite every weight is one repeated number, which hides errors of indexing: the twins
`<name>_random` have seeded random weights of a sane scale, and outputs by onnxruntime. Their last
layer is scaled so that no class takes all: a softmax of one 1 and many 0 would check little.
"""
import glob
import os

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common import DATA, run, save

# The standard deviation of what goes into the last softmax.
SPREAD = 1.5


def ramp_inputs(model):
    """The inputs of the ONNX suite's own runner: np.arange(n) / n."""
    weights = {w.name for w in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name not in weights:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            n = int(np.prod(shape))
            feed[value.name] = (np.arange(n).reshape(shape) / n).astype(np.float32)
    return feed


def random_weight(random, op, position, shape):
    """A weight for an operand of an operator, of such a scale that activations stay near 1."""
    normal = random.standard_normal(shape)
    if op == "BatchNormalization":
        near = {1: 1 + 0.05 * normal, 4: 1 + 0.2 * random.random(shape)}
        return near.get(position, 0.05 * normal)
    if op == "Conv" and position == 1:
        return normal * np.sqrt(2 / np.prod(shape[1:]))
    if op in ("Gemm", "MatMul") and position == 1:
        return normal / np.sqrt(shape[1] if op == "Gemm" else shape[0])
    if op == "Mul":
        return 1 + 0.05 * normal
    return 0.02 * normal


def with_random_weights(model):
    random = np.random.default_rng(1)
    role = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            role.setdefault(name, (node.op_type, position))
    weights = {w.name: w for w in model.graph.initializer}
    nodes, made = [], []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            nodes.append(node)
            continue
        shape = [int(d) for d in numpy_helper.to_array(weights[node.input[0]])]
        array = random_weight(random, *role[node.output[0]], shape).reshape(shape)
        made.append(numpy_helper.from_array(array.astype(np.float32), node.output[0]))
    used = {name for node in nodes for name in node.input}
    kept = [w for w in model.graph.initializer if w.name in used] + made
    names = {w.name for w in kept}
    inputs = [v for v in model.graph.input if v.name in used and v.name not in names]
    for field, values in (("node", nodes), ("initializer", kept), ("input", inputs)):
        del getattr(model.graph, field)[:]
        getattr(model.graph, field).extend(values)
    model.ir_version = max(model.ir_version, 4)  # weights need not be inputs from here on
    return model


def calibrate(model, feed):
    """Scales the last layer that has weights: its results spread as those of a trained model."""
    last = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")][-1]
    end = model.graph.node[-1]
    name = end.input[0] if end.op_type == "Softmax" else end.output[0]
    probe = onnx.ModelProto.FromString(model.SerializeToString())
    del probe.graph.output[:]
    probe.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    (scores,) = run(probe.SerializeToString(), [name], feed)
    assert np.isfinite(scores).all() and 1e-4 < scores.std() < 1e4, scores.std()
    weights = set(last.input[1:])
    weights |= {n.input[0] for n in model.graph.node if n.output[0] in weights}  # by a Reshape
    for weight in model.graph.initializer:
        if weight.name in weights:
            array = numpy_helper.to_array(weight) * np.float32(SPREAD / scores.std())
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def check_spread(model, output):
    """Many classes have a share of the result."""
    scores = output.ravel().astype(np.float64)
    if model.graph.node[-1].op_type != "Softmax":
        scores = np.exp(scores - scores.max())
    shares = scores / scores.sum()
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum()
    assert np.isfinite(output).all() and shares.max() < 0.5 and entropy > 2, (shares.max(), entropy)
    print(f"    largest share {shares.max():.3f}, entropy {entropy:.2f} nats", flush=True)


for path in sorted(glob.glob(os.path.join(DATA, "light", "*.onnx"))):
    name = os.path.basename(path)[: -len(".onnx")]
    model = onnx.load(path)
    with open(path[: -len(".onnx")] + "_output_0.pb", "rb") as file:
        output = numpy_helper.to_array(onnx.TensorProto.FromString(file.read()))
    feed = ramp_inputs(model)
    save(name, model, feed, [output])
    model = with_random_weights(model)
    random = np.random.default_rng(2)
    feed = {k: random.standard_normal(a.shape, dtype=np.float32) for k, a in feed.items()}
    calibrate(model, feed)
    check_spread(model, save(name + "_random", model, feed)[0])
