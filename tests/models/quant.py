"""Quantised models: ResNet-18 and an MLP at batch 1 and 64, by onnxruntime's static quantiser.

Activations are u8 with a zero point per tensor, weights s8 per channel, biases i32. References are
of onnxruntime without its rewriting of graphs, which computes in f32 between the quantisations: its
integer kernels saturate sums of two products on processors that have no dot products of bytes.
"""
import os
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnxruntime import quantization

from common import Builder, save
from vision import Net, resnet18


class Calibration(quantization.CalibrationDataReader):
    """A few random inputs."""

    def __init__(self, feed, count=4):
        random = np.random.default_rng(3)
        draw = lambda a: random.standard_normal(a.shape, dtype=np.float32)
        self.feeds = iter([{k: draw(a) for k, a in feed.items()} for _ in range(count)])

    def get_next(self):
        return next(self.feeds, None)


def plain(path, feed):
    """What onnxruntime says of a model as it stands."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]).run(None, feed)


def quantised(builder, output, *shape):
    """Saves the model that the builder has made, quantised."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = (os.path.join(folder, n) for n in ("float.onnx", "quantised.onnx"))
        onnx.save(builder.model(output, *shape), source)
        quantization.quantize_static(
            source, target, Calibration(builder.feed), per_channel=True,
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8)
        model = onnx.load(target)
        outputs = plain(target, builder.feed)
    assert len(np.unique(outputs[0])) > 5, "outputs take several of the 256 values"
    save(builder.name, model, builder.feed, outputs)


def mlp(batch):
    b = Builder(f"qdq_mlp_b{batch}")
    x = b.input("x", batch, 784)
    x = b.op("Relu", b.dense(x, 784, 512))
    x = b.op("Relu", b.dense(x, 512, 512))
    quantised(b, b.dense(x, 512, 10), batch, 10)


for batch in (1, 64):
    mlp(batch)
resnet = Net("qdq_resnet18")
quantised(resnet, resnet18(resnet), 1, 1000)
