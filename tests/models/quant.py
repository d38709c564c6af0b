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


class Resnet(Builder):
    """ResNet-18 with its batch norms already in the weights."""

    def conv(self, x, inputs, outputs, size, stride, gain=1.0):
        fan_in = inputs * size * size
        weight = self.weight(outputs, inputs, size, size, scale=gain * np.sqrt(2 / fan_in))
        bias = self.weight(outputs, scale=0.1)
        pads = [size // 2] * 4
        return self.op("Conv", x, weight, bias, kernel_shape=[size, size],
                       strides=[stride, stride], pads=pads)

    def block(self, x, inputs, outputs, stride):
        y = self.op("Relu", self.conv(x, inputs, outputs, 3, stride))
        y = self.conv(y, outputs, outputs, 3, 1, gain=0.5)
        if inputs != outputs:
            x = self.conv(x, inputs, outputs, 1, stride, gain=0.7)
        return self.op("Relu", self.op("Add", y, x))


def resnet18():
    b = Resnet("qdq_resnet18")
    x = b.input("x", 1, 3, 224, 224)
    x = b.op("Relu", b.conv(x, 3, 64, 7, 2))
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    width = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        x = b.block(x, width, outputs, stride)
        x = b.block(x, outputs, outputs, 1)
        width = outputs
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    quantised(b, b.dense(x, 512, 1000), 1, 1000)


for batch in (1, 64):
    mlp(batch)
resnet18()
