"""Weights come from where the caller said, complete and unchanged, or there is an error."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from jeidnn_hf.backbones import build_model, fingerprint, pretrained_cfg
from jeidnn_hf.backbones.loading import HUB_WEIGHTS, WEIGHTS_DIR_VARIABLE, load_state, read_state_dict


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv(WEIGHTS_DIR_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, img_size=32).state_dict()


def vit(weights: object, **options) -> torch.nn.Module:
    return build_model("test_vit", **({"num_classes": 5, "image_size": 32, "weights": str(weights)} | options))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Names


def test_description_of_a_known_model():
    cfg = pretrained_cfg("t2t_vit_7")
    assert (cfg["input_size"], cfg["num_classes"], cfg["classifier"]) == ((3, 224, 224), 1000, "head")
    assert pretrained_cfg("test_vit.r160_in1k")["hf_hub_id"].endswith("test_vit.r160_in1k")


@pytest.mark.parametrize("call", [pretrained_cfg, lambda name: build_model(name, num_classes=3)])
def test_an_unknown_name_is_answered_with_names_like_it(call):
    with pytest.raises(ValueError, match="^Expected the name of a timm model, but got 't2t_vit_8'; names like it") as e:
        call("t2t_vit_8")
    listed = re.findall(r"'([^']+)'", str(e.value))[1:]
    assert {"t2t_vit_14", "t2t_vit_7"} <= set(listed) and all(map(timm.is_model, listed))


@pytest.mark.parametrize(("name", "meant"), [("vit_tny_patch16_224", "vit_tiny_patch16_224"), ("resnt18", "resnet18")])
def test_a_misspelt_name_is_answered_with_the_name_that_was_meant(name, meant):
    with pytest.raises(ValueError, match=f"names like it: .*'{meant}'"):
        pretrained_cfg(name)


def test_an_unknown_tag_is_a_value_error():
    with pytest.raises(ValueError, match="Expected .*test_vit.*nonsense"):
        pretrained_cfg("test_vit.nonsense")


# Building


def test_size_channels_and_classes_reach_the_model():
    model = build_model("test_vit", num_classes=0, image_size=48, num_channels=1)
    assert model.pos_embed.shape == (1, 10, 64) and model.patch_embed.proj.in_channels == 1
    assert model.num_classes == 0 and isinstance(model.head, torch.nn.Identity)
    assert build_model("test_vit", num_classes=7).patch_embed.img_size == (160, 160)
    assert build_model("resnet20_cifar", num_classes=7, image_size=64)(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_options_that_the_model_cannot_be_built_with():
    with pytest.raises(ValueError, match=r"^Expected .* but got .*33") as error:
        build_model("t2t_vit_7", num_classes=5, image_size=33)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^Expected options that test_vit can be built with, but got \{.*-3\}: "):
        build_model("test_vit", num_classes=5, num_channels=-3)


def test_random_weights_when_none_are_named():
    first, second = (build_model("test_vit", num_classes=5, image_size=32) for _ in range(2))
    assert not torch.equal(first.blocks[0].attn.qkv.weight, second.blocks[0].attn.qkv.weight)


# Fingerprint


def test_fingerprint_is_stable_across_files_order_and_strides(state, tmp_path):
    print_ = fingerprint(state)
    assert re.fullmatch("[0-9a-f]{64}", print_)
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for path in tmp_path.glob("w.*"):
        assert fingerprint(read_state_dict(path)) == print_
        assert fingerprint(vit(path).state_dict()) == print_
    assert fingerprint(dict(reversed(state.items()))) == print_
    strided = {key: value.mT.contiguous().mT if value.dim() > 1 else value for key, value in state.items()}
    assert any(not value.is_contiguous() for value in strided.values()) and fingerprint(strided) == print_
    assert fingerprint({key: torch.nn.Parameter(value) for key, value in state.items()}) == print_


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_fingerprint_changes_with_any_bit(data):
    state = {
        "weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "half": torch.arange(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }
    before = fingerprint(state)
    name = data.draw(st.sampled_from(["weight", "half", "count"]))
    raw = state[name].flatten().view(torch.uint8)
    position, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[position] ^= 1 << bit
    assert fingerprint(state) != before
    raw[position] ^= 1 << bit
    assert fingerprint(state) == before


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(2, dtype=torch.float64)},
        {"a": -torch.zeros(4)},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
        {},
    ],
)
def test_fingerprint_covers_names_shapes_and_types(other):
    assert fingerprint(other) != fingerprint({"a": torch.zeros(4)})


# Files


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "bin"])
def test_both_kinds_of_file_load_bit_for_bit(state, tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    assert equal(read_state_dict(path), state) and equal(read_state_dict(str(path)), state)
    assert equal(vit(path).state_dict(), state)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain", [True, False])
def test_no_pickled_object_is_ever_run(tmp_path, plain):
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "w.pth"
    if plain:
        path.write_bytes(pickle.dumps({"weight": trap}, protocol=2))
    else:
        torch.save({"weight": torch.zeros(2), "extra": trap}, path)
    with pytest.raises(ValueError, match=f"^Expected a complete weights file, but '{re.escape(str(path))}' cannot be"):
        read_state_dict(path)
    assert not trap.path.exists()
    pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)
    assert trap.path.exists()  # the trap does work


@pytest.mark.parametrize("content", [{"model": {"w": torch.ones(2)}}, [torch.ones(2)], {"w": torch.ones(2), "n": 3}])
def test_a_torch_file_must_be_a_plain_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"^Expected '.*w\.pth' to hold a plain state dict of tensors, but it does "):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("kept", [0, 5, 3000, -1])
def test_a_truncated_file_is_refused(state, tmp_path, suffix, kept):
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"^Expected a complete weights file, but '.*w\.{suffix}' cannot be read: "):
        read_state_dict(path)


def test_files_are_also_looked_up_by_name_in_the_weights_folder(state, tmp_path, monkeypatch):
    path, folder = tmp_path / "gone" / "w.safetensors", tmp_path / "folder"
    folder.mkdir()
    save_file(state, folder / "w.safetensors")
    hint = rf"^Expected a weights file, but there is none at {path}, or set {WEIGHTS_DIR_VARIABLE} to the folder that "
    with pytest.raises(ValueError, match=hint):
        read_state_dict(path)
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(folder))
    assert equal(read_state_dict(path), state)
    assert equal(read_state_dict("w.safetensors"), state)
    with pytest.raises(ValueError, match=rf"there is none at other\.pth or {folder / 'other.pth'}\.$"):
        read_state_dict("other.pth")
    path.parent.mkdir()
    mine = state | {"norm.bias": state["norm.bias"] + 1}
    save_file(mine, path)
    assert equal(read_state_dict(path), mine)  # the file itself comes first


# Do they fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.3.norm1.bias"), r"1 tensors are missing \['blocks.3.norm1.bias'\] and 0 are unknown"),
        (lambda s: s.update(extra=torch.zeros(1)), r"0 tensors are missing \[\] and 1 are unknown \['extra'\]"),
        (lambda s: s.update({"norm.bias": torch.zeros(65)}), r"norm.bias of shape \(64,\) .*, but got \(65,\)\.$"),
        (lambda s: s.update({"norm.bias": torch.zeros(64, 1)}), r"norm.bias of shape \(64,\) .*, but got \(64, 1\)\.$"),
        (lambda s: s.clear(), r"^Expected the weights of this backbone in '.*', but 80 tensors are missing"),
    ],
)
def test_every_tensor_must_be_there_and_fit(state, tmp_path, change, message):
    wrong = dict(state)
    change(wrong)
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        vit(tmp_path / "w.safetensors")
    assert str(error.value).startswith("Expected") and str(tmp_path / "w.safetensors") in str(error.value)


def test_a_model_that_was_refused_its_weights_is_left_as_it_was(state):
    model = timm.create_model("test_vit", num_classes=5, img_size=32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        load_state(model, state | {"norm.bias": torch.zeros(65)}, "w")
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "resnet20_cifar", "t2t_vit_7"])
def test_a_classifier_that_the_model_lacks_is_left_out(tmp_path, name):
    options = {} if "resnet" in name else {"img_size": 32}
    source = timm.create_model(name, num_classes=5, **options).state_dict()
    save_file(source, tmp_path / "w.safetensors")
    model = build_model(name, num_classes=0, image_size=32, weights=str(tmp_path / "w.safetensors"))
    body, heads = model.state_dict(), tuple(f"{h}." for h in ("head", "head_dist", "linear"))
    assert source.keys() - body.keys() == {key for key in source if key.startswith(heads)} != set()
    assert all(torch.equal(source[key], value) for key, value in body.items())
    with pytest.raises(ValueError, match=r"^Expected the weights .* 1 are unknown \['extra'\]\.$"):
        load_state(model, source | {"extra": torch.zeros(1)}, "w")


def test_a_model_with_a_classifier_needs_one_in_the_file(state, tmp_path):
    save_file({key: value for key, value in state.items() if not key.startswith("head.")}, tmp_path / "w.safetensors")
    assert vit(tmp_path / "w.safetensors", num_classes=0).num_classes == 0
    with pytest.raises(ValueError, match=r"2 tensors are missing \['head.bias', 'head.weight'\]"):
        vit(tmp_path / "w.safetensors")


def test_batch_norm_counts_may_be_missing(tmp_path):
    source = timm.create_model("resnet20_cifar", num_classes=5).state_dict()
    counts = [key for key in source if key.endswith("num_batches_tracked")]
    for key in source:
        source[key] = source[key] + 1
    save_file({key: value for key, value in source.items() if key not in counts}, tmp_path / "w.safetensors")
    loaded = build_model("resnet20_cifar", num_classes=5, weights=str(tmp_path / "w.safetensors")).state_dict()
    assert all(torch.equal(loaded[key], torch.tensor(0) if key in counts else source[key]) for key in source)
    with pytest.raises(ValueError, match="19 tensors are missing"):
        state = {key: value for key, value in source.items() if not key.endswith("running_var")}
        load_state(build_model("resnet20_cifar", num_classes=5), state, "w")


# timm's tags


def test_a_tag_that_is_neither_online_nor_cached():
    message = (
        r"^Expected the pretrained weights of 'test_vit.r160_in1k' from the Hub or its cache, but they cannot be had "
        r"\(\w+\); go online once, or pass weights=a local file\.$"
    )
    with pytest.raises(ValueError, match=message):
        build_model("test_vit.r160_in1k", num_classes=1000, weights=HUB_WEIGHTS)


@pytest.mark.parametrize("name", ["t2t_vit_7", "resnet20_cifar"])
def test_a_model_without_pretrained_weights(name):
    message = rf"^Expected weights=a file, since timm knows no pretrained weights for '{name}'\.$"
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=0, weights=HUB_WEIGHTS)


def test_a_tags_classifier_has_its_own_number_of_classes():
    message = r"^Expected num_labels=1000, the classes of test_vit.r160_in1k's .*, but got 10; pass native_head=False "
    with pytest.raises(ValueError, match=message):
        build_model("test_vit.r160_in1k", num_classes=10, weights=HUB_WEIGHTS)


@pytest.mark.parametrize("num_classes", [1000, 0])
def test_a_tag_that_can_be_had(monkeypatch, num_classes):
    torch.manual_seed(0)
    source = timm.create_model("test_vit").state_dict()
    asked = []

    def from_hub(model_id, *args, **kwargs):
        asked.append((model_id, kwargs["weights_only"]))
        return {key: value.clone() for key, value in source.items()}

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", from_hub)
    model = build_model("test_vit.r160_in1k", num_classes=num_classes, image_size=32, weights=HUB_WEIGHTS)
    assert asked == [("timm/test_vit.r160_in1k", True)] and model.num_classes == num_classes
    loaded = model.state_dict()
    same = {key for key in loaded if loaded[key].shape == source[key].shape and torch.equal(loaded[key], source[key])}
    assert same == loaded.keys() - {"pos_embed"}
    assert loaded["pos_embed"].shape == (1, 5, 64)
    again = build_model("test_vit", num_classes=num_classes, image_size=32, weights=HUB_WEIGHTS)
    assert fingerprint(again.state_dict()) == fingerprint(loaded)
