"""Models with named dims: batch, sequence, cached tokens. The tests compile each for ranges."""
import os
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper

from common import MODELS, Builder


class Dynamic(Builder):
    """Inputs and outputs with names for extents; no stored outputs."""

    def input(self, name, *shape, dtype=TensorProto.FLOAT):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def write(self, **outputs):
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, infos, self.weights)
        opsets = [helper.make_opsetid("", self.opset)]
        folder = os.path.join(MODELS, self.name)
        os.makedirs(folder, exist_ok=True)
        model = helper.make_model(graph, ir_version=8, opset_imports=opsets)
        onnx.checker.check_model(model)
        onnx.save(model, os.path.join(folder, "model.onnx"))

    def named(self, value, name):
        for node in self.nodes:
            node.output[:] = [name if v == value else v for v in node.output]
            node.input[:] = [name if v == value else v for v in node.input]

    def linear(self, x, inputs, outputs):
        weight = self.weight(inputs, outputs, scale=1 / np.sqrt(inputs))
        return self.op("Add", self.op("MatMul", x, weight), self.weight(outputs, scale=0.02))

    def heads(self, x, heads, width, order):
        shape = self.ints(0, -1, heads, width // heads)
        return self.op("Transpose", self.op("Reshape", x, shape), perm=order)

    def norm(self, x, width):
        return self.op("LayerNormalization", x, self.weight(width, scale=1.0),
                       self.weight(width, scale=0.1), axis=-1, epsilon=1e-5)


def cnn():
    b = Dynamic("cnn")
    x = b.input("x", "batch", 3, 12, 12)
    x = b.op("Conv", x, b.weight(8, 3, 3, 3, fan_in=27), b.weight(8, scale=0.1), kernel_shape=[3, 3],
             pads=[1, 1, 1, 1])
    x = b.op("MaxPool", b.op("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    x = b.op("GlobalAveragePool", b.op("Relu", b.op("Conv", x, b.weight(20, 8, 3, 3, fan_in=72))))
    y = b.op("Softmax", b.dense(b.op("Flatten", x), 20, 10), axis=-1)
    b.named(y, "y")
    b.write(y=["batch", 10])


def encoder(width=32, heads=2, hidden=48):
    """Embedding by token and position, attention under a mask, and what a pooler takes."""
    b = Dynamic("encoder", opset=20)
    ids = b.input("ids", "batch", "sequence", dtype=TensorProto.INT64)
    mask = b.input("mask", "batch", "sequence")
    x = b.op("Gather", b.weight(50, width, scale=1.0), ids, axis=0)
    length = b.op("Gather", b.op("Shape", ids), b.constant(np.array(1, np.int64)), axis=0)
    positions = b.op("Range", b.constant(np.array(0, np.int64)), length,
                     b.constant(np.array(1, np.int64)))
    x = b.op("Add", x, b.op("Gather", b.weight(100, width, scale=0.3), positions, axis=0))
    x = b.norm(x, width)
    for _ in range(2):
        q, v = (b.heads(b.linear(x, width, width), heads, width, [0, 2, 1, 3]) for _ in range(2))
        k = b.heads(b.linear(x, width, width), heads, width, [0, 2, 3, 1])
        scores = b.op("Mul", b.op("MatMul", q, k), b.number(1 / np.sqrt(width // heads)))
        hidden_mask = b.op("Mul", b.op("Sub", mask, b.number(1)), b.number(10000))
        hidden_mask = b.op("Unsqueeze", hidden_mask, b.ints(1, 2))
        scores = b.op("Softmax", b.op("Add", scores, hidden_mask), axis=-1)
        y = b.op("Transpose", b.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        y = b.linear(b.op("Reshape", y, b.ints(0, -1, width)), width, width)
        x = b.norm(b.op("Add", x, y), width)
        h = b.linear(b.op("Gelu", b.linear(x, width, hidden)), hidden, width)
        x = b.norm(b.op("Add", x, h), width)
    first = b.op("Tanh", b.linear(b.op("Gather", x, b.constant(np.array(0, np.int64)), axis=1),
                                  width, width))
    b.named(x, "states")
    b.named(first, "pooled")
    b.write(states=["batch", "sequence", width], pooled=["batch", width])


def decoder(width=32, heads=2):
    """One step of attention with a cache: what was seen before comes in, and goes out longer."""
    b = Dynamic("decoder")
    size = width // heads
    x = b.input("x", "batch", 1, width)
    past_k = b.input("past_k", "batch", heads, "past", size)
    past_v = b.input("past_v", "batch", heads, "past", size)
    q, k, v = (b.heads(b.linear(x, width, width), heads, width, [0, 2, 1, 3]) for _ in range(3))
    k = b.op("Concat", past_k, k, axis=2)
    v = b.op("Concat", past_v, v, axis=2)
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.op("Softmax", b.op("Mul", scores, b.number(1 / np.sqrt(size))), axis=-1)
    y = b.op("Transpose", b.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = b.linear(b.op("Reshape", y, b.ints(0, -1, width)), width, width)
    for value, name in ((y, "y"), (k, "present_k"), (v, "present_v")):
        b.named(value, name)
    cache = ["batch", heads, "past + 1", size]
    b.write(y=["batch", 1, width], present_k=cache, present_v=cache)


def language(width=32, heads=2, layers=2, vocabulary=60):
    """A decoder that says the next token: one token at a time, with a cache for each layer."""
    b = Dynamic("language", opset=20)
    size = width // heads
    token = b.input("token", 1, 1, dtype=TensorProto.INT64)
    position = b.input("position", 1, 1, dtype=TensorProto.INT64)
    x = b.op("Add", b.op("Gather", b.weight(vocabulary, width, scale=1.0), token, axis=0),
             b.op("Gather", b.weight(128, width, scale=1.0), position, axis=0))
    outputs = {}
    for layer in range(layers):
        y = b.norm(x, width)
        q, k, v = (b.heads(b.linear(y, width, width), heads, width, [0, 2, 1, 3]) for _ in range(3))
        past = [b.input(f"past_{kind}{layer}", 1, heads, "past", size) for kind in "kv"]
        k, v = (b.op("Concat", old, new, axis=2) for old, new in zip(past, (k, v)))
        for kind, value in (("k", k), ("v", v)):
            b.named(value, f"present_{kind}{layer}")
            outputs[f"present_{kind}{layer}"] = [1, heads, "past + 1", size]
        k, v = f"present_k{layer}", f"present_v{layer}"
        scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = b.op("Softmax", b.op("Mul", scores, b.number(1 / np.sqrt(size))), axis=-1)
        y = b.op("Transpose", b.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        x = b.op("Add", x, b.linear(b.op("Reshape", y, b.ints(0, -1, width)), width, width))
        h = b.op("Gelu", b.linear(b.norm(x, width), width, 4 * width))
        x = b.op("Add", x, b.linear(h, 4 * width, width))
    b.named(b.linear(b.norm(x, width), width, vocabulary), "scores")
    b.write(scores=[1, 1, vocabulary], **outputs)


def recurrent(width=16):
    """One step of a recurrent network, whose state has a fixed shape."""
    b = Dynamic("recurrent")
    x, h = b.input("x", 2, 8), b.input("h", 2, width)
    both = b.op("Add", b.op("MatMul", x, b.weight(8, width, scale=0.5)),
                b.op("MatMul", h, b.weight(width, width, scale=0.3)))
    h = b.op("Tanh", both)
    b.named(b.linear(h, width, 4), "y")
    b.named(h, "next_h")
    b.write(y=[2, 4], next_h=[2, width])


def joined(width=32, heads=2):
    """Layers over [batch * sequence, width], attention over [batch * heads, sequence, size], and a
    mask that is read by index, as torch exports them."""
    b = Dynamic("joined", opset=20)
    size = width // heads
    x = b.input("x", "batch", "sequence", width)
    mask = b.input("mask", "batch", "sequence")
    shape = b.op("Shape", x)
    number = lambda value: b.op("Squeeze", b.ints(value))
    lengths = [b.op("Gather", shape, number(axis), axis=0) for axis in (0, 1)]
    row, column = (b.op("Range", number(0), length, number(1)) for length in lengths)
    row, column = b.op("Unsqueeze", row, b.ints(1, 2, 3)), b.op("Unsqueeze", column, b.ints(0, 1, 2))
    both = b.op("Shape", b.op("Max", row, column))
    index = [b.op("Unsqueeze", b.op("Expand", i, both), b.ints(-1)) for i in (row, column)]
    seen = b.op("GatherND", mask, b.op("Concat", *index, axis=-1))

    def rows(x, outputs):
        flat = b.op("Reshape", x, b.ints(-1, width))
        return b.dense(flat, width, outputs)

    three = b.op("Concat", *(b.op("Unsqueeze", i, b.ints(0)) for i in lengths),
                 b.ints(3, heads, size), axis=0)
    y = b.op("Transpose", b.op("Reshape", rows(x, 3 * width), three), perm=[2, 0, 3, 1, 4])
    q, k, v = (b.op("Gather", y, number(i), axis=0) for i in range(3))
    flat = b.op("Concat", b.ints(-1), b.op("Slice", shape, b.ints(1), b.ints(2)), b.ints(size),
                axis=0)
    turned = b.op("Transpose", b.op("Reshape", k, flat), perm=[0, 2, 1])
    apart = b.op("Concat", b.op("Slice", shape, b.ints(0), b.ints(1)), b.ints(heads, size),
                 b.op("Slice", shape, b.ints(1), b.ints(2)), axis=0)
    scores = b.op("MatMul", q, b.op("Reshape", turned, apart))
    bias = b.op("Log", b.op("Add", b.op("Abs", seen), b.number(0.1)))
    shares = b.op("Softmax", b.op("Add", scores, bias), axis=-1)
    y = b.op("Transpose", b.op("MatMul", shares, v), perm=[0, 2, 1, 3])
    y = b.op("Reshape", b.op("Tanh", rows(y, width)), shape)
    b.named(b.op("Add", x, y), "y")
    b.write(y=["batch", "sequence", width])


def mean():
    """Divides by the length of a dim: no code for a range can have that as a number."""
    b = Dynamic("mean")
    y = b.op("ReduceMean", b.input("x", "batch", "sequence", 8), axes=[1], keepdims=0)
    b.named(y, "y")
    b.write(y=["batch", 8])


def cut(name, end):
    """Sums a column of x as far as `end` says, which may be as far as another input is long."""
    b = Dynamic(name)
    x, y = b.input("x", "past", 4), b.input("y", "sequence", 1)
    starts, axes = b.ints(0, 2), b.ints(0, 1)
    end = b.op("Concat", end(b, y), b.ints(3), axis=0)
    x = b.op("ReduceSum", b.op("Slice", x, starts, end, axes), b.ints(0), keepdims=1)
    b.named(b.op("Add", x, y), "z")
    b.write(z=["sequence", 1])


for model in (cnn, encoder, decoder, language, recurrent, joined, mean):
    model()
cut("cut", lambda b, y: b.op("Slice", b.op("Shape", y), b.ints(0), b.ints(1)))
cut("cut_far", lambda b, y: b.ints(512))
print("  models with named dims", file=sys.stderr)
