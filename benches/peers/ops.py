"""Models of one operator, or of few that belong together, which benches/compare --ops measures.

    ops.py FOLDER [NAME...]    writes FOLDER/NAME.onnx; without names all of them
    ops.py                     lists the names
"""
import os
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Single:
    """A model in the making."""

    def __init__(self, name):
        self.name, self.random = name, np.random.default_rng(sum(name.encode()))
        self.nodes, self.weights, self.inputs = [], [], []

    def input(self, *shape):
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, array):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def weight(self, *shape):
        scale = np.prod(shape[1:] if len(shape) == 4 else shape[:1]) ** -0.5
        return self.constant(self.random.standard_normal(shape) * scale)

    def op(self, kind, *args, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, args, [name], **attributes))
        return name

    def save(self, folder, result):
        y = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, self.name, self.inputs, [y], self.weights)
        opsets = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, ir_version=9, opset_imports=opsets)
        model = onnx.shape_inference.infer_shapes(model)
        onnx.save(model, os.path.join(folder, self.name + ".onnx"))


def matmul(g, m, k, n):
    return g.op("MatMul", g.input(m, k), g.weight(k, n))


def matmul_of_inputs(g, m, k, n):
    return g.op("MatMul", g.input(m, k), g.input(k, n))


def conv(g, channels, out, extent, group=1):
    x, w = g.input(1, channels, extent, extent), g.weight(out, channels // group, 3, 3)
    return g.op("Conv", x, w, g.weight(out), kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=group)


def softmax(g, *shape):
    return g.op("Softmax", g.input(*shape), axis=-1)


def layer_norm(g, *shape):
    scale, bias = g.constant(np.ones(shape[-1])), g.constant(np.zeros(shape[-1]))
    return g.op("LayerNormalization", g.input(*shape), scale, bias, axis=-1, epsilon=1e-5)


def layer_norm_gelu(g, *shape):
    return g.op("Gelu", layer_norm(g, *shape))


def gelu(g, *shape):
    return g.op("Gelu", g.input(*shape))


def chain(g, elements):
    x, y = g.input(elements), g.input(elements)
    t = g.op("Relu", g.op("Mul", g.op("Add", x, y), g.constant(0.5)))
    t = g.op("Add", g.op("Abs", g.op("Sub", t, x)), g.constant(1.0))
    return g.op("Add", g.op("Neg", g.op("Mul", g.op("Sqrt", t), y)), x)


def transpose(g, *shape):
    return g.op("Transpose", g.input(*shape), perm=[1, 0])


def mean(g, axis, *shape):
    g.weights.append(numpy_helper.from_array(np.array([axis], np.int64), "axes"))
    return g.op("ReduceMean", g.input(*shape), "axes", keepdims=1)


def attention(g, heads, queries, keys, width):
    q, k, v = (g.input(1, heads, rows, width) for rows in (queries, keys, keys))
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, g.constant(width**-0.5))
    return g.op("MatMul", g.op("Softmax", scores, axis=-1), v)


OPS = {
    "matmul_64": (matmul, 64, 64, 64),
    "matmul_128": (matmul, 128, 128, 128),
    "matmul_256": (matmul, 256, 256, 256),
    "matmul_512": (matmul, 512, 512, 512),
    "matmul_1024": (matmul, 1024, 1024, 1024),
    "matmul_1024_of_inputs": (matmul_of_inputs, 1024, 1024, 1024),
    "matmul_128x768x3072": (matmul, 128, 768, 3072),
    "gemv_768x3072": (matmul, 1, 768, 3072),
    "gemv_4096": (matmul, 1, 4096, 4096),
    "conv3x3_64_56": (conv, 64, 64, 56),
    "conv3x3_256_14": (conv, 256, 256, 14),
    "depthwise3x3_32_112": (conv, 32, 32, 112, 32),
    "depthwise3x3_576_14": (conv, 576, 576, 14, 576),
    "softmax_1536x128": (softmax, 1536, 128),
    "softmax_128x4096": (softmax, 128, 4096),
    "layernorm_128x768": (layer_norm, 128, 768),
    "layernorm_gelu_128x3072": (layer_norm_gelu, 128, 3072),
    "gelu_128x3072": (gelu, 128, 3072),
    "chain10_16M": (chain, 1 << 24),
    "transpose_1024": (transpose, 1024, 1024),
    "mean_rows_1024x4096": (mean, 1, 1024, 4096),
    "mean_columns_4096x1024": (mean, 0, 4096, 1024),
    "attention_12x128x64": (attention, 12, 128, 128, 64),
    "attention_12x512x64": (attention, 12, 512, 512, 64),
    "decode_12x4096x64": (attention, 12, 1, 4096, 64),
}


def main():
    if len(sys.argv) < 2:
        return print("\n".join(OPS))
    folder, names = sys.argv[1], sys.argv[2:] or OPS
    os.makedirs(folder, exist_ok=True)
    for name in names:
        build, *shape = OPS[name]
        model = Single(name)
        model.save(folder, build(model, *shape))


if __name__ == "__main__":
    main()
