"""Networks for images as mobile devices run them: MobileNetV2, EfficientNet-B0; and ResNet-18."""
import numpy as np

from common import Builder


class Net(Builder):
    """Convolutions with what follows them; batch norms are in the weights or beside them."""

    def __init__(self, name, norms=False):
        super().__init__(name)
        self.norms = norms

    def conv(self, x, inputs, outputs, size=1, stride=1, groups=1, gain=1.0):
        fan_in = inputs // groups * size * size
        shape = (outputs, inputs // groups, size, size)
        args = [self.weight(*shape, scale=gain * np.sqrt(2 / fan_in))]
        if not self.norms:
            args.append(self.weight(outputs, scale=0.1))
        x = self.op("Conv", x, *args, kernel_shape=[size, size], strides=[stride, stride],
                    pads=[size // 2] * 4, group=groups)
        if not self.norms:
            return x
        scale = self.constant((1 + 0.1 * self.random.standard_normal(outputs)).astype(np.float32))
        variance = self.constant(self.random.uniform(0.5, 1.5, outputs).astype(np.float32))
        shift, mean = (self.weight(outputs, scale=0.1) for _ in range(2))
        return self.op("BatchNormalization", x, scale, shift, mean, variance, epsilon=1e-3)

    def relu6(self, x):
        return self.op("Clip", x, self.number(0), self.number(6))

    def silu(self, x):
        return self.op("Mul", x, self.op("Sigmoid", x))

    def classes(self, x, inputs, outputs):
        x = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.dense(x, inputs, outputs)


def mobilenet_v2():
    """https://arxiv.org/abs/1801.04381, table 2."""
    b = Net("mobilenet_v2")
    x = b.relu6(b.conv(b.input("x", 1, 3, 224, 224), 3, 32, 3, 2))
    inputs = 32
    for factor, outputs, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1)):
        for k in range(count):
            step, wide = stride if k == 0 else 1, inputs * factor
            y = x if factor == 1 else b.relu6(b.conv(x, inputs, wide))
            y = b.relu6(b.conv(y, wide, wide, 3, step, groups=wide))
            y = b.conv(y, wide, outputs, gain=0.7)
            x = b.op("Add", x, y) if step == 1 and inputs == outputs else y
            inputs = outputs
    b.save(b.classes(b.relu6(b.conv(x, 320, 1280)), 1280, 1000), 1, 1000)


def efficientnet_b0():
    """https://arxiv.org/abs/1905.11946, table 1, with squeeze and excitation."""
    b = Net("efficientnet_b0", norms=True)
    x = b.silu(b.conv(b.input("x", 1, 3, 224, 224), 3, 32, 3, 2))
    inputs = 32
    for factor, outputs, count, stride, size in (
            (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
            (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)):
        for k in range(count):
            step, wide = stride if k == 0 else 1, inputs * factor
            y = x if factor == 1 else b.silu(b.conv(x, inputs, wide))
            y = b.silu(b.conv(y, wide, wide, size, step, groups=wide))
            few = inputs // 4
            s = b.op("GlobalAveragePool", y)
            norms, b.norms = b.norms, False
            s = b.conv(b.silu(b.conv(s, wide, few)), few, wide)
            b.norms = norms
            y = b.conv(b.op("Mul", y, b.op("Sigmoid", s)), wide, outputs)
            x = b.op("Add", x, y) if step == 1 and inputs == outputs else y
            inputs = outputs
    b.save(b.classes(b.silu(b.conv(x, 320, 1280)), 1280, 1000), 1, 1000)


def resnet18(b):
    """The logits of https://arxiv.org/abs/1512.03385, table 1."""
    x = b.op("Relu", b.conv(b.input("x", 1, 3, 224, 224), 3, 64, 7, 2))
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for step in (stride, 1):
            y = b.op("Relu", b.conv(x, inputs, outputs, 3, step))
            y = b.conv(y, outputs, outputs, 3, gain=0.5)
            x = b.conv(x, inputs, outputs, 1, step, gain=0.7) if inputs != outputs else x
            x = b.op("Relu", b.op("Add", x, y))
            inputs = outputs
    return b.classes(x, 512, 1000)


if __name__ == "__main__":
    mobilenet_v2()
    efficientnet_b0()
    net = Net("resnet18")
    net.save(resnet18(net), 1, 1000)
