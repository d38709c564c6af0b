"""What the scripts that make test models share: a small model builder and the stored references."""
import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

DATA, MODELS = sys.argv[1:3] if len(sys.argv) == 3 else ("", "")


class Builder:
    """A model in the making: nodes in order, weights drawn from one seeded generator."""

    def __init__(self, name, opset=17):
        self.name, self.opset = name, opset
        self.random = np.random.default_rng(sum(name.encode()))
        self.nodes, self.weights, self.inputs, self.feed = [], [], [], {}

    def input(self, name, *shape):
        self.feed[name] = self.random.standard_normal(shape, dtype=np.float32)
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, array):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def number(self, value):
        return self.constant(np.array(value, np.float32))

    def ints(self, *values):
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape, fan_in=None, scale=None):
        scale = np.sqrt(2 / fan_in) if scale is None else scale
        return self.constant((self.random.standard_normal(shape) * scale).astype(np.float32))

    def op(self, kind, *args, **attributes):
        name = f"v{len(self.nodes)}"
        node = helper.make_node(kind, args, [name], f"/{kind.lower()}{len(self.nodes)}")
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.nodes.append(node)
        return name

    def dense(self, x, inputs, outputs):
        weight = self.weight(outputs, inputs, fan_in=inputs)
        return self.op("Gemm", x, weight, self.weight(outputs, scale=0.02), transB=1)

    def model(self, output, *shape):
        self.nodes[-1].output[0] = "y"
        assert output == f"v{len(self.nodes) - 1}", "the last node makes the output"
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, self.name, self.inputs, [y], self.weights)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, ir_version=8, opset_imports=opsets)

    def save(self, output, *shape):
        save(self.name, self.model(output, *shape), self.feed)


def run(model, names, feed):
    """What onnxruntime says of a model, given as a path or as bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    return session.run(names, feed)


def save(name, model, feed, outputs=None):
    """Writes models/<name>/{model.onnx, input_K.pb, output_K.pb}; outputs are by onnxruntime."""
    folder = os.path.join(MODELS, name)
    os.makedirs(folder, exist_ok=True)
    onnx.save(model, os.path.join(folder, "model.onnx"))
    names = [v.name for v in model.graph.output]
    if outputs is None:
        outputs = run(os.path.join(folder, "model.onnx"), names, feed)
    for kind, arrays in (("input", feed.items()), ("output", zip(names, outputs))):
        for k, (tensor, array) in enumerate(arrays):
            proto = numpy_helper.from_array(np.asarray(array), tensor)
            with open(os.path.join(folder, f"{kind}_{k}.pb"), "wb") as file:
                file.write(proto.SerializeToString())
    print(f"  {name}: {len(model.graph.node)} nodes", flush=True)
    return outputs
