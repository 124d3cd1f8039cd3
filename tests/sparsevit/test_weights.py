"""Pretrained files: every layout there and back, strict loading, positions; timm and a real network where they are."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.errors import CheckpointError
from sparsevit import weights
from sparsevit.model import arch_size, build
from sparsevit.weights import load_weights, resize_positions


def own_state(lab, **sizes):
    return lab.network(**sizes).state_dict()


def write(path, tensors, layout, heads=3):
    if layout == "google":
        np.savez(path.with_suffix(".npz"), **weights.to_google(tensors, heads))
        return path.with_suffix(".npz")
    convert = {"timm": weights.to_timm, "huggingface": weights.to_huggingface, "own": dict}[layout]
    save_file({n: t.contiguous().clone() for n, t in convert(tensors).items()}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


LAYOUTS = ("timm", "google", "huggingface", "own")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_layout
def test_a_network_goes_to_a_layout_and_back_to_the_same_bits(lab, tmp_path, layout):
    state = own_state(lab)
    path = write(tmp_path / "w", state, layout)
    network = build(lab.small_size(), seed=99)
    loaded = load_weights(path, network, "none")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert loaded.notes == ()
    assert layout in loaded.layout.lower().replace(" ", "")
    assert f"{path.stat().st_size:,} bytes" in str(loaded)
    assert len(loaded.sha256) == 64
    assert loaded.sha256 in str(loaded)


def test_layer_scale_goes_to_timm_and_back(lab, tmp_path):
    state = own_state(lab, layer_scale=True)
    assert "blocks.1.ls2.gamma" in weights.to_timm(state)
    network = build(lab.small_size(layer_scale=True), seed=99)
    load_weights(write(tmp_path / "w", state, "timm"), network, "none")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_the_names_and_shapes_of_each_layout_are_those_of_the_real_files():
    state = {n: torch.zeros(p.shape) for n, p in build(arch_size("vit_ti16", 32, 3, 5), 0).state_dict().items()}
    timm = {n: tuple(t.shape) for n, t in weights.to_timm(state).items()}
    assert timm["blocks.0.attn.qkv.weight"] == (576, 192)
    assert timm["blocks.11.mlp.fc2.bias"] == (192,)
    assert timm["patch_embed.proj.weight"] == (192, 3, 16, 16)
    assert {"cls_token", "pos_embed", "norm.bias", "head.weight"} <= set(timm)
    google = {n: a.shape for n, a in weights.to_google(state, 3).items()}
    start = "Transformer/encoderblock_7/"
    assert google["embedding/kernel"] == (16, 16, 3, 192)
    assert google[f"{start}MultiHeadDotProductAttention_1/query/kernel"] == (192, 3, 64)
    assert google[f"{start}MultiHeadDotProductAttention_1/query/bias"] == (3, 64)
    assert google[f"{start}MultiHeadDotProductAttention_1/out/kernel"] == (3, 64, 192)
    assert google[f"{start}MultiHeadDotProductAttention_1/out/bias"] == (192,)
    assert google[f"{start}LayerNorm_2/scale"] == (192,)
    assert google[f"{start}MlpBlock_3/Dense_0/kernel"] == (192, 768)
    assert google["Transformer/posembed_input/pos_embedding"] == (1, 5, 192)
    assert google["head/kernel"] == (192, 5)
    face = weights.to_huggingface(state)
    assert "vit.encoder.layer.3.attention.attention.query.weight" in face
    assert "vit.encoder.layer.3.intermediate.dense.bias" in face
    assert {"vit.embeddings.cls_token", "vit.layernorm.weight", "classifier.weight"} <= set(face)


def test_files_that_big_vision_wrote_are_read_too(lab, tmp_path):
    state = own_state(lab)
    arrays = {}
    for name, array in weights.to_google(state, 3).items():
        for theirs, googles in weights.BIG_VISION.items():
            name = name.replace(googles, theirs)
        arrays[name] = array
    np.savez(tmp_path / "w.npz", **arrays)
    network = build(lab.small_size(), seed=99)
    load_weights(tmp_path / "w.npz", network, "none")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_the_names_of_other_libraries_are_theirs():
    """Written down from their own code: a table that is wrong both ways would read what it wrote itself."""
    values = torch.zeros(12)
    for theirs, ours in {
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.attention.query": "attn.q",
        "attention.attention.key": "attn.k", "attention.attention.value": "attn.v",
        "attention.output.dense": "attn.out", "intermediate.dense": "fc1", "output.dense": "fc2",
    }.items():  # fmt: skip
        found = weights.from_huggingface({f"vit.encoder.layer.1.{theirs}.bias": values})
        assert list(found) == [f"blocks.1.{ours}.bias"]
    for theirs, ours in {
        "LayerNorm_0/scale": "norm1.weight", "LayerNorm_2/bias": "norm2.bias", "LayerNorm_1/scale": "norm2.weight",
        "MlpBlock_3/Dense_0/bias": "fc1.bias", "MlpBlock_0/Dense_1/bias": "fc2.bias",
        "MultiHeadDotProductAttention_1/query/bias": "attn.q.bias",
        "MultiHeadDotProductAttention_0/key/bias": "attn.k.bias",
        "MultiHeadDotProductAttention_0/value/bias": "attn.v.bias",
    }.items():  # fmt: skip
        found = weights.from_google({f"Transformer/encoderblock_0/{theirs}": values.view(3, 4).numpy()})
        assert list(found) == [f"blocks.0.{ours}"]


@pytest.mark.parametrize("swap", [(0, 1), (0, 2), (1, 2)])
def test_swapping_thirds_of_the_fused_matrix_changes_the_logits(lab, tmp_path, swap):
    state = weights.to_timm(own_state(lab))
    for kind in ("weight", "bias"):
        parts = list(state[f"blocks.0.attn.qkv.{kind}"].chunk(3))
        parts[swap[0]], parts[swap[1]] = parts[swap[1]], parts[swap[0]]
        state[f"blocks.0.attn.qkv.{kind}"] = torch.cat(parts)
    save_file(state, tmp_path / "w.safetensors")
    network = build(lab.small_size(), seed=99).eval()
    load_weights(tmp_path / "w.safetensors", network, "none")
    images = lab.images(size=network.size)
    # q and k may be swapped only together with a transposed map: their product changes as well
    assert not torch.allclose(network(images), lab.network()(images), atol=1e-3)


@each_layout
def test_another_number_of_classes_re_initialises_the_head_and_says_so(lab, tmp_path, layout):
    path = write(tmp_path / "w", own_state(lab), layout)
    network = build(lab.small_size(classes=7), seed=99)
    before = network.head.weight.clone()
    loaded = load_weights(path, network, "none")
    assert any("head re-initialised" in note for note in loaded.notes)
    assert torch.equal(network.head.weight, before)
    assert torch.equal(network.cls, own_state(lab)["cls"])


@each_layout
def test_a_file_without_a_head_is_a_start_too(lab, tmp_path, layout):
    state = {n: t for n, t in own_state(lab).items() if not n.startswith("head.")}
    loaded = load_weights(write(tmp_path / "w", state, layout), build(lab.small_size(), 9), "none")
    assert any("head re-initialised" in note for note in loaded.notes)


def test_the_layer_before_the_head_is_left_out(lab, tmp_path):
    arrays = weights.to_google(own_state(lab), 3) | {"pre_logits/kernel": np.zeros((12, 12), np.float32)}
    np.savez(tmp_path / "w.npz", **arrays)
    loaded = load_weights(tmp_path / "w.npz", build(lab.small_size(), 9), "none")
    assert loaded.notes == ("left out pre_logits/weight",)


# --- what is refused --------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_key_that_is_missing_or_extra_or_of_another_shape_is_named(lab, tmp_path, layout, change):
    state = own_state(lab)
    if change == "missing":
        del state["blocks.1.fc1.bias"]
    elif change == "extra":
        state["blocks.2.fc1.bias"] = torch.zeros(3)
    else:
        state["blocks.1.fc1.bias"] = torch.zeros(3)
    path = write(tmp_path / "w", state, layout)
    network = build(lab.small_size(), 9)
    before = {n: t.clone() for n, t in network.state_dict().items()}
    number = 2 if change == "extra" else 1
    with pytest.raises(CheckpointError, match=rf"blocks\.{number}\.fc1\.bias") as found:
        load_weights(path, network, "none")
    assert "\n" not in str(found.value)
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())


def test_a_file_of_a_network_of_another_size_is_refused(lab, tmp_path):
    path = write(tmp_path / "w", own_state(lab, width=24, mlp=8), "timm")
    with pytest.raises(CheckpointError, match=r"the network wants .*choose the model\.arch"):
        load_weights(path, build(lab.small_size(), 9), "none")


@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.safetensors", "w.npz"])
def test_a_pickle_is_never_opened_whatever_its_name(lab, tmp_path, name):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"pickle.*timm.*Google.*Hugging Face") as found:
        load_weights(tmp_path / name, build(lab.small_size(), 9), "none")
    assert "\n" not in str(found.value)
    torch.save(own_state(lab), tmp_path / "torch.pth")
    with pytest.raises(CheckpointError, match="pickle"):
        load_weights(tmp_path / "torch.pth", build(lab.small_size(), 9), "none")
    np.savez(tmp_path / "objects.npz", a=np.array([Trap()], dtype=object))
    with pytest.raises(CheckpointError, match="plain arrays"):
        load_weights(tmp_path / "objects.npz", build(lab.small_size(), 9), "none")
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_is_missing_empty_damaged_or_of_another_layout_is_refused_in_one_line(lab, tmp_path):
    network = build(lab.small_size(), 9)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    good = write(tmp_path / "w", own_state(lab), "timm")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    npz = write(tmp_path / "w", own_state(lab), "google").read_bytes()
    (tmp_path / "cut.npz").write_bytes(npz[:-200])
    np.savez(tmp_path / "text.npz", cls=np.array(["a"]))
    np.savez(tmp_path / "flat.npz", **{"Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": np.zeros(3, np.float32)})
    names = ("none.safetensors", "empty.safetensors", "cut.safetensors", "other.safetensors", "cut.npz", "text.npz",
             "flat.npz")  # fmt: skip
    for name in names:
        with pytest.raises(CheckpointError, match=name) as found:
            load_weights(tmp_path / name, network, "none")
        assert "\n" not in str(found.value)


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bicubic", "bicubic_antialias", "bilinear"])
def test_positions_are_resized_around_the_class_token(how):
    positions = torch.randn(1, 24 * 24 + 1, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_positions(positions, 577, how), positions)
    small = resize_positions(positions, 197, how)
    assert small.shape == (1, 197, 8)
    assert torch.equal(small[:, 0], positions[:, 0])
    constant = torch.full((1, 577, 2), 0.7)
    assert torch.allclose(resize_positions(constant, 197, how), torch.full((1, 197, 2), 0.7), atol=1e-6)
    slope = torch.arange(24.0).repeat_interleave(24)[None, :, None].expand(1, -1, 3)
    bent = resize_positions(torch.cat([torch.zeros(1, 1, 3), slope], 1), 197, how)[0, 1:, 0].view(14, 14)
    assert bool((bent.diff(dim=0) > 0).all()), "rows stay rows"
    assert float(bent.diff(dim=1).abs().max()) < 1e-4
    if how == "bilinear":  # the corners are not aligned: each new row is read at its own middle
        assert torch.allclose(bent[:, 0], (torch.arange(14) + 0.5) * 24 / 14 - 0.5, atol=1e-4)


def test_antialiasing_matters_when_shrinking_and_no_resize_is_silent(lab, tmp_path):
    positions = torch.randn(1, 577, 8, generator=torch.Generator().manual_seed(0))
    one, two = (resize_positions(positions, 197, how) for how in ("bicubic", "bicubic_antialias"))
    assert not torch.allclose(one, two, atol=0.1)
    path = write(tmp_path / "w", own_state(lab, image=16), "timm")
    network = build(lab.small_size(), 9)
    with pytest.raises(CheckpointError, match=r"has 17 positions, the network 5.*weights\.pos_resize"):
        load_weights(path, network, "none")
    loaded = load_weights(path, network, "bicubic")
    assert loaded.notes == ("positions resized from 17 to 5 tokens (bicubic)",)


@pytest.mark.parametrize("tokens", [1, 2 + 1, 15, 18])
def test_a_grid_that_is_not_square_cannot_be_resized(tokens):
    with pytest.raises(CheckpointError, match="no square grid"):
        resize_positions(torch.zeros(1, tokens, 4), 5, "bicubic")


# --- against others ---------------------------------------------------------------------------------------------------


def test_logits_are_timms(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=11).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    from sparsevit.model import uniform_size

    ours = build(uniform_size(32, 3, 8, 192, 12, 3, 768, 11), 9).eval()
    load_weights(tmp_path / "w.safetensors", ours, "none")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        assert torch.allclose(ours.observe(images, maps=range(12))[0], theirs(images), atol=1e-5)


def test_timm_reads_our_npz(tmp_path):
    timm = pytest.importorskip("timm")
    from sparsevit.model import uniform_size

    ours = build(uniform_size(32, 3, 8, 192, 12, 3, 768, 11), 9).eval()
    np.savez(tmp_path / "w.npz", **weights.to_google(ours.state_dict(), 3))
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=11).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    found = weights.from_timm(theirs.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.state_dict().items())
