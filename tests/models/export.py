"""Models as torch exports them: torch.onnx (dynamo) on modules of torch, torchvision, transformers.

    export.py DATA MODELS [NAME...]    run by the Python that KILN_EXPORT names (tests/run)

Weights are random. Each model has named dims, and two cases of other lengths by torch itself: the
folder of a model has model.onnx, and folders 0 and 1 with input_K.pb and output_K.pb.
"""
import os
import sys

# This folder has a transformers.py of its own.
sys.path = sys.path[1:]
import numpy as np
import torch
import torchvision
import transformers
from onnx import numpy_helper
from torch.export import Dim
from transformers.cache_utils import DynamicCache

MODELS, ONLY = sys.argv[2], sys.argv[3:]


def ids(high, *shape):
    return torch.randint(0, high, shape)


def mask(*shape):
    """The last tokens of each row but the first are padding."""
    tensor = torch.ones(shape, dtype=torch.int64)
    for row in range(1, shape[0]):
        tensor[row, shape[1] - min(row, shape[1] - 1) :] = 0
    return tensor


class Adapter(torch.nn.Module):
    """A model of transformers with tensors for arguments and for results."""

    def __init__(self, model, *names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, first, second=None):
        given = {} if second is None else {"attention_mask": second}
        found = self.model(first, **given)
        return tuple(found[name] for name in self.names)


class Cached(torch.nn.Module):
    """A decoder that is given its cache layer by layer, and gives it back."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        found = self.model(input_ids=input_ids, attention_mask=attention_mask,
                           position_ids=position_ids, past_key_values=cache, use_cache=True)
        present = [t for layer in found.past_key_values.layers for t in (layer.keys, layer.values)]
        return (found.logits, *present)


def config(kind, **more):
    return getattr(transformers, kind)(**more)


def torch_encoder():
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    case = lambda batch, sequence: (torch.randn(batch, sequence, 64),)
    return model, ["x"], ({0: "batch", 1: "sequence"},), ["y"], [case(2, 9), case(3, 17)]


def resnet18():
    model = torchvision.models.resnet18()
    case = lambda batch: (torch.randn(batch, 3, 64, 64),)
    return model, ["image"], ({0: "batch"},), ["logits"], [case(2), case(3)]


def bert():
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = transformers.BertModel(config("BertConfig", vocab_size=500, **size))
    both = {0: "batch", 1: "sequence"}
    case = lambda *shape: (ids(500, *shape), mask(*shape))
    return (Adapter(model, "last_hidden_state", "pooler_output"), ["input_ids", "attention_mask"],
            (both, both), ["last_hidden_state", "pooler_output"], [case(2, 9), case(3, 17)])


def gpt2():
    size = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=500)
    model = transformers.GPT2LMHeadModel(config("GPT2Config", use_cache=False, **size))
    both = {0: "batch", 1: "sequence"}
    case = lambda *shape: (ids(500, *shape), mask(*shape))
    return (Adapter(model, "logits"), ["input_ids", "attention_mask"], (both, both), ["logits"],
            [case(2, 9), case(3, 17)])


def cached(model, layers, heads, width, rows):
    """The parts of an export of a decoder with a cache."""
    lead = {0: "batch"} if rows == 1 else {0: "batch", 1: "sequence"}
    cache = {0: "batch", 2: "past"}

    def case(batch, sequence, past):
        total = torch.ones((batch, past + sequence), dtype=torch.int64)
        places = torch.arange(past, past + sequence)[None].repeat(batch, 1)
        kept = [[torch.randn(batch, heads, past, width) for _ in "kv"] for _ in range(layers)]
        return ids(500, batch, sequence), total, places, kept

    names = [f"{{}}.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    inputs += [name.format("past_key_values") for name in names]
    total = {0: "batch", 1: "total"}
    dims = (lead, total, lead, [[cache, cache] for _ in range(layers)])
    outputs = ["logits"] + [name.format("present") for name in names]
    sizes = [(2, rows, 9), (3, rows, 17)] if rows == 1 else [(2, 5, 9), (3, 2, 17)]
    return Cached(model), inputs, dims, outputs, [case(*size) for size in sizes]


def llama(rows):
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    kind = config("LlamaConfig", vocab_size=500, intermediate_size=96, **size)
    return cached(transformers.LlamaForCausalLM(kind), 2, 2, 16, rows)


def gpt2_cached():
    size = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=500)
    return cached(transformers.GPT2LMHeadModel(config("GPT2Config", **size)), 2, 4, 16, 1)


def vit():
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = transformers.ViTModel(config("ViTConfig", image_size=64, **size))
    case = lambda batch: (torch.randn(batch, 3, 64, 64),)
    return (Adapter(model, "last_hidden_state", "pooler_output"), ["pixel_values"],
            ({0: "batch"},), ["last_hidden_state", "pooler_output"], [case(2), case(3)])


def whisper_encoder():
    size = dict(d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128,
                decoder_layers=1, decoder_attention_heads=4)
    kind = config("WhisperConfig", max_source_positions=50, **size)
    model = transformers.WhisperModel(kind).get_encoder()
    case = lambda batch: (torch.randn(batch, 80, 100),)
    return (Adapter(model, "last_hidden_state"), ["input_features"], ({0: "batch"},),
            ["last_hidden_state"], [case(1), case(3)])


EXPORTS = {
    "torch_encoder": (torch_encoder, (18, 23)),
    "resnet18": (resnet18, (18,)),
    "bert": (bert, (18, 23)),
    "gpt2": (gpt2, (18, 23)),
    "gpt2_cached": (gpt2_cached, (20,)),
    "llama_cached": (lambda: llama(1), (20, 23)),
    "llama_chunk": (lambda: llama(5), (20,)),
    "vit": (vit, (18,)),
    "whisper_encoder": (whisper_encoder, (18,)),
}


def flat(values):
    """Tensors of lists within lists."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)]


def dynamic(dims):
    """Names as dims of torch.export; equal names are one dim."""
    if isinstance(dims, dict):
        return {axis: Dim.DYNAMIC if name == "total" else name for axis, name in dims.items()}
    return type(dims)(dynamic(d) for d in dims)


def write(folder, kind, names, tensors):
    for k, (name, tensor) in enumerate(zip(names, tensors)):
        proto = numpy_helper.from_array(np.ascontiguousarray(tensor.detach().numpy()), name)
        with open(os.path.join(folder, f"{kind}_{k}.pb"), "wb") as file:
            file.write(proto.SerializeToString())


def export(name, build, opsets):
    torch.manual_seed(0)
    model, inputs, dims, outputs, cases = build()
    model.eval()
    for opset in opsets:
        folder = os.path.join(MODELS, f"{name}_opset{opset}")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(model, cases[0], path, dynamo=True, opset_version=opset,
                          input_names=inputs, output_names=outputs, dynamic_shapes=dynamic(dims),
                          external_data=False, verbose=False)
        for k, case in enumerate(cases):
            place = os.path.join(folder, str(k))
            os.makedirs(place, exist_ok=True)
            with torch.no_grad():
                found = flat(model(*case))
            write(place, "input", inputs, flat(case))
            write(place, "output", outputs, found)
        print(f"  {name}_opset{opset}", flush=True)


if __name__ == "__main__":
    for name, (build, opsets) in EXPORTS.items():
        if not ONLY or name in ONLY:
            export(name, build, opsets)
