#!/usr/bin/env python3
"""Trains the small CNN that the README runs: examples/digits.onnx and examples/digits_test.npz.

Data: the 1797 handwritten digits of 8 x 8 pixels that scikit-learn carries (UCI ML repository,
CC BY 4.0). Network: Conv 16 3x3 relu, MaxPool 2, Flatten, Dense 64 relu, Dense 10 softmax, trained
by plain numpy. Both files are checked in; this makes them again (about ten seconds):

    pip install numpy==2.4.6 onnx==1.22.0 scikit-learn==1.9.1
    python3 examples/train_digits.py
"""
import os

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

CHANNELS, HIDDEN, CLASSES = 16, 64, 10
EPOCHS, BATCH, RATE = 40, 32, 2e-3
HELD_OUT = 360
FOLDER = os.path.dirname(os.path.abspath(__file__))


def data(random):
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = random.permutation(len(images))
    images, labels = images[order], digits.target[order].astype(np.int64)
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def new_weights(random):
    def he(*shape, fan_in):
        return (random.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    return {
        "conv.weight": he(CHANNELS, 1, 3, 3, fan_in=9),
        "conv.bias": np.zeros(CHANNELS, np.float32),
        "dense1.weight": he(HIDDEN, CHANNELS * 9, fan_in=CHANNELS * 9),
        "dense1.bias": np.zeros(HIDDEN, np.float32),
        "dense2.weight": he(CLASSES, HIDDEN, fan_in=HIDDEN),
        "dense2.bias": np.zeros(CLASSES, np.float32),
    }


def forward(w, x):
    """Probabilities, and what the backward pass needs."""
    n = len(x)
    windows = sliding_window_view(x[:, 0], (3, 3), axis=(1, 2)).reshape(n, 36, 9)
    conv = windows @ w["conv.weight"].reshape(CHANNELS, 9).T + w["conv.bias"]
    # [n, 6, 6, c] -> [n, c, 3, 3, 4]: the four pixels that each cell of the pool looks at.
    cells = np.maximum(conv, 0).reshape(n, 3, 2, 3, 2, CHANNELS)
    cells = cells.transpose(0, 5, 1, 3, 2, 4).reshape(n, CHANNELS, 3, 3, 4)
    best = cells.argmax(-1)
    flat = cells.max(-1).reshape(n, -1)
    hidden = np.maximum(flat @ w["dense1.weight"].T + w["dense1.bias"], 0)
    logits = hidden @ w["dense2.weight"].T + w["dense2.bias"]
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True), (windows, conv, best, flat, hidden)


def gradients(w, x, labels):
    """Gradients of the mean cross entropy."""
    probabilities, (windows, conv, best, flat, hidden) = forward(w, x)
    n = len(x)
    d_logits = probabilities.copy()
    d_logits[np.arange(n), labels] -= 1
    d_logits /= n
    d_hidden = (d_logits @ w["dense2.weight"]) * (hidden > 0)
    d_flat = d_hidden @ w["dense1.weight"]
    d_cells = np.zeros((n, CHANNELS, 3, 3, 4), np.float32)
    np.put_along_axis(d_cells, best[..., None], d_flat.reshape(n, CHANNELS, 3, 3, 1), -1)
    d_conv = d_cells.reshape(n, CHANNELS, 3, 3, 2, 2).transpose(0, 2, 4, 3, 5, 1)
    d_conv = d_conv.reshape(n, 36, CHANNELS) * (conv > 0)
    d_weight = np.einsum("npc,npk->ck", d_conv, windows)
    return {
        "conv.weight": d_weight.reshape(CHANNELS, 1, 3, 3),
        "conv.bias": d_conv.sum((0, 1)),
        "dense1.weight": d_hidden.T @ flat,
        "dense1.bias": d_hidden.sum(0),
        "dense2.weight": d_logits.T @ hidden,
        "dense2.bias": d_logits.sum(0),
    }


def train(w, images, labels, random):
    """Adam, with the usual constants."""
    mean = {k: np.zeros_like(v) for k, v in w.items()}
    square = {k: np.zeros_like(v) for k, v in w.items()}
    step = 0
    for _ in range(EPOCHS):
        order = random.permutation(len(images))
        for start in range(0, len(images), BATCH):
            pick = order[start : start + BATCH]
            step += 1
            rate = RATE * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            for name, g in gradients(w, images[pick], labels[pick]).items():
                mean[name] = 0.9 * mean[name] + 0.1 * g
                square[name] = 0.999 * square[name] + 0.001 * g * g
                w[name] -= (rate * mean[name] / (np.sqrt(square[name]) + 1e-8)).astype(np.float32)


def model(w):
    nodes = [
        helper.make_node("Conv", ["image", "conv.weight", "conv.bias"], ["conv"], "conv"),
        helper.make_node("Relu", ["conv"], ["conv.relu"], "conv.relu"),
        helper.make_node("MaxPool", ["conv.relu"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "dense1.weight", "dense1.bias"], ["dense1"], "dense1"),
        helper.make_node("Relu", ["dense1"], ["dense1.relu"], "dense1.relu"),
        helper.make_node("Gemm", ["dense1.relu", "dense2.weight", "dense2.bias"], ["dense2"],
                         "dense2"),
        helper.make_node("Softmax", ["dense2"], ["probabilities"], "softmax"),
    ]
    attributes = {
        "conv": {"kernel_shape": [3, 3]},
        "pool": {"kernel_shape": [2, 2], "strides": [2, 2]},
        "dense1": {"transB": 1},
        "dense2": {"transB": 1},
        "softmax": {"axis": -1},
    }
    for node in nodes:
        for key, value in attributes.get(node.name, {}).items():
            node.attribute.append(helper.make_attribute(key, value))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "digits",
        [value("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [value("probabilities", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in w.items()],
    )
    made = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    made.producer_name = "examples/train_digits.py"
    onnx.checker.check_model(made, full_check=True)
    return made


def main():
    random = np.random.default_rng(0)
    images, labels, test_images, test_labels = data(random)
    w = new_weights(random)
    train(w, images, labels, random)
    hits = forward(w, test_images)[0].argmax(1) == test_labels
    print(f"{hits.mean():.2%} of {len(hits)} held-out digits are read right")
    onnx.save(model(w), os.path.join(FOLDER, "digits.onnx"))
    np.savez_compressed(
        os.path.join(FOLDER, "digits_test.npz"), image=test_images, label=test_labels
    )


if __name__ == "__main__":
    main()
