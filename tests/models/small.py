"""Small models: a CNN and an MLP at batch 1 and 64, and a transformer encoder layer."""
import numpy as np

from common import Builder


def cnn(batch):
    b = Builder(f"cnn_b{batch}")
    x = b.input("x", batch, 1, 28, 28)
    bias = b.weight(32, scale=0.02)
    x = b.op("Conv", x, b.weight(32, 1, 3, 3, fan_in=9), bias, kernel_shape=[3, 3])
    x = b.op("MaxPool", b.op("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    x = b.op("Relu", b.dense(b.op("Flatten", x), 32 * 13 * 13, 128))
    b.save(b.op("Softmax", b.dense(x, 128, 10), axis=-1), batch, 10)


def mlp(batch):
    b = Builder(f"mlp_b{batch}")
    x = b.input("x", batch, 784)
    x = b.op("Relu", b.dense(x, 784, 512))
    x = b.op("Relu", b.dense(x, 512, 512))
    b.save(b.dense(x, 512, 10), batch, 10)


class Encoder(Builder):
    """One transformer encoder layer: attention, then two dense layers, each with a norm after."""

    SEQUENCE, WIDTH, HEADS, HIDDEN = 128, 256, 4, 1024

    def linear(self, x, inputs, outputs):
        weight = self.weight(inputs, outputs, scale=1 / np.sqrt(inputs))
        return self.op("Add", self.op("MatMul", x, weight), self.weight(outputs, scale=0.02))

    def heads(self, x, order):
        shape = self.ints(1, self.SEQUENCE, self.HEADS, self.WIDTH // self.HEADS)
        return self.op("Transpose", self.op("Reshape", x, shape), perm=order)

    def attention(self, x):
        w = self.WIDTH
        q, v = (self.heads(self.linear(x, w, w), [0, 2, 1, 3]) for _ in range(2))
        k = self.heads(self.linear(x, w, w), [0, 2, 3, 1])
        scores = self.op("MatMul", q, k)
        scores = self.op("Div", scores, self.number(np.sqrt(w // self.HEADS)))
        y = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        y = self.op("Transpose", y, perm=[0, 2, 1, 3])
        y = self.op("Reshape", y, self.ints(1, self.SEQUENCE, w))
        return self.linear(y, w, w)

    def gain_and_shift(self):
        gain = self.random.standard_normal(self.WIDTH) * 0.1 + 1
        return self.constant(gain.astype(np.float32)), self.weight(self.WIDTH, scale=0.1)


class Composed(Encoder):
    """Norm and GELU as one node each."""

    def norm(self, x):
        return self.op("LayerNormalization", x, *self.gain_and_shift(), axis=-1, epsilon=1e-5)

    def gelu(self, x):
        return self.op("Gelu", x)


class Decomposed(Encoder):
    """Norm and GELU spelled out, as exporters of older opsets do."""

    def norm(self, x):
        mean = self.op("ReduceMean", x, axes=[-1])
        centred = self.op("Sub", x, mean)
        square = self.op("Pow", centred, self.number(2))
        variance = self.op("ReduceMean", square, axes=[-1])
        root = self.op("Sqrt", self.op("Add", variance, self.number(1e-5)))
        gain, shift = self.gain_and_shift()
        return self.op("Add", self.op("Mul", self.op("Div", centred, root), gain), shift)

    def gelu(self, x):
        erf = self.op("Erf", self.op("Div", x, self.number(np.sqrt(2))))
        y = self.op("Mul", x, self.op("Add", erf, self.number(1)))
        return self.op("Mul", y, self.number(0.5))


def encoder(b):
    x = b.input("x", 1, b.SEQUENCE, b.WIDTH)
    x = b.norm(b.op("Add", x, b.attention(x)))
    h = b.linear(b.gelu(b.linear(x, b.WIDTH, b.HIDDEN)), b.HIDDEN, b.WIDTH)
    b.save(b.norm(b.op("Add", x, h)), 1, b.SEQUENCE, b.WIDTH)


for batch in (1, 64):
    cnn(batch)
    mlp(batch)
encoder(Composed("encoder", opset=20))
encoder(Decomposed("encoder_decomposed", opset=17))
