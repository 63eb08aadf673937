"""Names of repositories; push and pull between processes through a Hub on loopback; what goes wrong there."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.hub import RepoName, build_repo_name, parse_repo_name, push_folder
from jeidnn_hf.stored import portable

sys.path.insert(0, str(Path(__file__).parent))
from hub_client import ANY, CIFAR, RUNS, TRAINED, VIT, shake  # noqa: E402
from hub_server import LocalHub  # noqa: E402

# Names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("jeidnn-t2t14-cifar100-lam1", ("t2t_vit_14", "cifar100", 1.0)),
        ("jeidnn-t2t7-svhn-lam0.05", ("t2t_vit_7", "svhn", 0.05)),
        ("jeidnn-t2t7-cifar100-lt-any", ("t2t_vit_7", "cifar100-lt", None)),
        ("jeidnn-vit_small_patch16_224.augreg_in1k-x-lam1e-05", ("vit_small_patch16_224.augreg_in1k", "x", 1e-5)),
        ("jeidnn-resnet18-x-lam1e16", ("resnet18", "x", 1e16)),
    ],
)
def test_a_name_is_built_and_taken_apart(name, parts):
    assert build_repo_name(*parts) == name
    assert parse_repo_name(name) == parse_repo_name(f"org/{name}") == RepoName(*parts)


def test_a_range_of_lambdas_is_any():
    assert build_repo_name("t2t_vit_14", "cifar100", [0.01, 1.0]) == "jeidnn-t2t14-cifar100-any"


@given(
    # With the longest data set and lambda drawn here, a backbone of 45 letters makes a name of 94; the Hub takes 96.
    backbone=st.sampled_from(
        [name for name in timm.list_models(pretrained=True) if len(name) <= 45]
        + ["t2t_vit_7", "t2t_vit_14", "resnet56_cifar"]
    ),
    dataset=st.from_regex(r"[a-z0-9]+([-_.](lam[0-9]|any|[a-z0-9]{1,3})){0,2}", fullmatch=True).filter(
        lambda name: len(name) <= 15
    ),
    lam=st.none() | st.floats(0, 1e300),
)
def test_every_name_comes_back(backbone, dataset, lam):
    name = build_repo_name(backbone, dataset, lam)
    assert parse_repo_name(name) == (backbone, dataset, lam)
    assert re.fullmatch(r"\w[\w.-]{0,94}\w", name) and ".." not in name and "--" not in name


@pytest.mark.parametrize(
    "parts",
    [
        ("a-b", "cifar10", 1.0),
        ("t2t7", "cifar10", 1.0),
        ("resnet18", "uoft-cs/cifar10", 1.0),
        ("resnet18", "-x", 1.0),
        ("resnet18", "a..b", 1.0),
        ("resnet18", "", 1.0),
        ("resnet18", "x" * 90, 1.0),
        ("resnet18", "x", -1.0),
    ],
)
def test_what_cannot_be_named_is_refused(parts):
    with pytest.raises(ValueError, match="Expected"):
        build_repo_name(*parts)


@pytest.mark.parametrize(
    "name",
    [
        "bert-base",
        "jeidnn-t2t14-cifar100",
        "jeidnn-t2t14-lam1",
        "jeidnn-a-b-lam",
        "jeidnn-a-b-lam1.2.3",
        "jeidnn-a--b-any",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="Expected a name like"):
        parse_repo_name(name)


# Push and pull


@dataclass
class Round:
    """A Hub to which one process has pushed everything that `hub_client.push` pushes."""

    hub: LocalHub
    folder: Path

    def run(self, role: str, *arguments: str, home: str, token: str | None = None, **env: str) -> str:
        """Runs a client in a process and a working directory of its own; returns what it printed."""
        work = self.folder / f"work-{role}"
        work.mkdir(exist_ok=True)
        client = [sys.executable, str(Path(__file__).parent / "hub_client.py"), role, str(self.folder), *arguments]
        env = self.hub.env(self.folder / home, token, **env)
        done = subprocess.run(client, env=env, cwd=work, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    weights = folder / "only_here" / "resnet20.safetensors"
    weights.parent.mkdir()
    safetensors.torch.save_file(timm.create_model("resnet20_cifar").state_dict(), weights)
    with LocalHub() as hub:
        backbone = safetensors.torch.save(timm.create_model("test_vit").state_dict())
        hub.add("timm/test_vit.r160_in1k", {"model.safetensors": backbone})
        pushed = Round(hub, folder)
        pushed.run("push", str(weights), home="pusher", token=LocalHub.WRITE)
        weights.unlink()
        yield pushed


def tensors(content: bytes) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(content)


def test_a_backbone_of_timm_is_not_pushed(pushed):
    repo = pushed.hub.repos[VIT]
    assert sorted(repo.tree()) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert not [key for key in tensors(repo.tree()["model.safetensors"]) if key.startswith("backbone")]


def test_a_plain_push_writes_our_card_and_leaves_one_that_is_there(pushed):
    repo = pushed.hub.repos[VIT]
    card = repo.tree()["README.md"].decode()
    assert card.startswith("---\n") and "library_name: jeidnn-hf" in card and f'from_pretrained("{VIT}")' in card
    pushes = [commit["README.md"] for commit in pushed.hub.repos[ANY].commits.values() if "README.md" in commit]
    assert len(set(pushes)) == 1


def test_a_backbone_from_a_local_file_goes_along_once(pushed):
    repo = pushed.hub.repos[ANY]
    saved = {"backbone.safetensors", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(repo.uploaded[0]) == saved | {"README.md"}
    assert len(repo.uploaded) == 2 and list(repo.uploaded[1]) == ["model.safetensors"]
    assert not [key for key in tensors(repo.tree()["model.safetensors"]) if key.startswith("backbone")]
    assert json.loads(repo.tree()["config.json"])["backbone_weights"] == "backbone.safetensors"


def test_a_revision_is_a_branch(pushed):
    repo = pushed.hub.repos[VIT]
    assert repo.tree("v2")["model.safetensors"] != repo.tree("main")["model.safetensors"]
    assert list(repo.uploaded[1]) == ["model.safetensors"]


def test_runs_go_to_a_repository_each_or_to_folders_of_one(pushed):
    files = {"backbone.safetensors", "config.json", "model.safetensors", "preprocessor_config.json"}
    one, low, high = (pushed.hub.repos[f"{RUNS}{tail}"].tree() for tail in ("", "-lam0.1", "-lam2"))
    assert set(low) == files and set(high) == files | {"calibration.json"}
    expected = {f"lam0.1/{name}" for name in low} | {f"lam2/{name}" for name in high} | {"README.md"}
    assert set(one) == expected
    assert json.loads(high["calibration.json"])["lam"] == 2.0


def test_the_index_card_shows_how_to_load_what(pushed):
    repo = pushed.hub.repos[RUNS]
    each, folders = repo.commits[list(repo.commits)[1]]["README.md"].decode(), repo.tree()["README.md"].decode()
    assert folders.startswith("---\nlibrary_name: jeidnn-hf\n")
    rows = [line.strip("| ").split(" | ") for line in folders.splitlines() if line.startswith("| [")]
    assert [row[1:4] for row in rows] == [
        [f'`"{RUNS}", subfolder="lam0.1"`', "0.1", "3"],
        [f'`"{RUNS}", subfolder="lam2"`', "2", "3"],
    ]
    assert [row[5:] for row in rows] == [["-", "-", "-", "-", "-"], ["-", "-", "2", "0.05", "60"]]
    assert f'`"{RUNS}-lam2"`' in each and "subfolder" not in each


def test_the_trainer_pushes_what_can_be_loaded_at_every_save(pushed):
    repo = pushed.hub.repos[TRAINED]
    assert {"backbone.safetensors", "config.json", "model.safetensors"} <= set(repo.uploaded[0])
    assert "library_name: jeidnn-hf" in repo.tree()["README.md"].decode()
    assert not [name for name in repo.tree() if "optimizer" in name]


@pytest.fixture(scope="module")
def pulled(pushed):
    """What a second process, which had to get the answers of the first, asked of the Hub."""
    before = len(pushed.hub.requests)
    pushed.run("pull", home="puller")
    return pushed.hub.requests[before:]


def test_another_process_gets_the_same_answers(pushed, pulled):
    answers = safetensors.torch.load_file(pushed.folder / "answers.safetensors")
    assert not torch.equal(answers["vit/logits"], answers["vit-v2/logits"])
    assert not torch.equal(answers["any-0.1/exit_index"], answers["any-10/exit_index"])
    assert len(answers["any-0.1/exit_index"].unique()) > 1
    downloads = [path for method, path in pulled if method == "GET" and "/resolve/" in path]
    assert len(downloads) == len(set(downloads)) and any(path.startswith("/timm/") for path in downloads)


def test_offline_the_cache_is_enough(pushed, pulled):
    before = len(pushed.hub.requests)
    pushed.run("pull", home="puller", HF_HUB_OFFLINE="1")
    assert len(pushed.hub.requests) == before


def test_without_a_network_only_what_is_cached_loads(pushed, pulled):
    cases = {"here": ("load", [ANY], {}), "not here": ("load", ["org/elsewhere"], {})}
    pushed.run("faults", json.dumps(cases), home="puller", HF_ENDPOINT="http://127.0.0.1:9")
    raised = json.loads((pushed.folder / "raised.json").read_text())
    assert raised["here"] is None
    assert re.search("We couldn't connect to 'http://127.0.0.1:9'", raised["not here"]["text"])
    assert "\n" not in raised["not here"]["text"] and "OSError" in raised["not here"]["kinds"]


# What goes wrong


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def raised(pushed):
    """What each case raised, all in one process."""
    hub, known, good = pushed.hub, set(pushed.hub.repos), dict(pushed.hub.repos[ANY].tree())
    config = json.loads(good["config.json"])

    def edited(**changes) -> dict[str, bytes]:
        return good | {"config.json": json.dumps(config | changes).encode()}

    def without(*names: str) -> dict[str, bytes]:
        return {name: content for name, content in good.items() if name not in names}

    bomb = {"pytorch_model.bin": pickle.dumps(Bomb(pushed.folder / "exploded"))}
    adapter = {"adapter_model.bin": bomb["pytorch_model.bin"]}
    outside = {
        "model.safetensors.index.json": b'{"metadata": {}, "weight_map": {"heads.a": "../../../up.safetensors"}}'
    }
    other = safetensors.torch.save(timm.create_model("resnet20_cifar").state_dict())
    hub.add("org/private", good, private=True)
    hub.add("org/gated", good, gated=True)
    hub.add("org/forbidden", good, forbidden=True)
    hub.add("org/closed", good, truncated=["closed"] * 99)
    hub.add("org/resumed", good, truncated=["closed"])
    hub.add("org/short", good, truncated=["short"])
    hub.add("org/headless", without("model.safetensors"))
    hub.add("org/newer", edited(format_version=99))
    hub.add("org/bert", edited(model_type="bert"))
    hub.add("org/broken-config", good | {"config.json": b'{"model_type": '})
    hub.add("org/broken-weights", good | {"model.safetensors": good["model.safetensors"][:1000]})
    hub.add("org/pickle", without("model.safetensors") | bomb)
    hub.add("org/both", good | bomb)
    hub.add("org/adapter", edited(transformers_weights="adapter_model.bin") | adapter)
    hub.add("org/outside", without("model.safetensors") | outside)
    hub.add("org/climbs", good | {"../../../../climbed.txt": b"x", "../climbed.safetensors": b"x"})
    hub.add("org/no-backbone", without("backbone.safetensors"))
    hub.add("org/other-backbone", good | {"backbone.safetensors": other})
    hub.add("org/broken-card", good | {"README.md": b"---\ntags: [early-exit\n---\n"})
    names = [name.removeprefix("org/") for name in hub.repos if name not in known] + ["unknown"]
    cases = {name: ("load", [f"org/{name}"], {}) for name in names} | {
        "short, again": ("load", ["org/short"], {}),
        "private, with a token": ("load", ["org/private"], {"token": LocalHub.READ}),
        "wrong token": ("load", [ANY], {"token": "hf_wrong"}),
        "unknown revision": ("load", [ANY], {"revision": "v9"}),
        "unknown subfolder": ("load", [RUNS], {"subfolder": "lam7"}),
        "no subfolder": ("load", [RUNS], {}),
        "asked for a pickle": ("load", ["org/pickle"], {"use_safetensors": False}),
        "push without a token": ("push", ["org/new"], {"token": False}),
        "push with a reader's token": ("push", ["org/new"], {"token": LocalHub.READ}),
        "push beside a broken card": ("push", ["org/broken-card"], {"token": LocalHub.WRITE}),
        "push to a forbidden one": ("push", ["org/forbidden"], {"token": LocalHub.WRITE}),
    }
    pushed.run("faults", json.dumps(cases), home="faults")
    return json.loads((pushed.folder / "raised.json").read_text())


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("unknown", "OSError", "org/unknown is not a local folder and is not a valid model identifier"),
        ("private", "OSError", "org/private .* pass a token"),
        ("wrong token", "OSError", "401"),
        ("gated", "OSError", "gated repo.* https?://"),
        ("forbidden", "OSError", "403 Forbidden"),
        ("unknown revision", "OSError", "v9 is not a valid git identifier"),
        ("unknown subfolder", "ValueError", "Expected the config.json of .*pass subfolder="),
        ("no subfolder", "ValueError", "Expected the config.json of .*pass subfolder="),
        ("closed", "OSError", "Expected to fetch model.safetensors of 'org/closed'.*try again"),
        ("short", "OSError", "file should be of size"),
        ("headless", "ValueError", "Expected model.safetensors in 'org/headless', but there is none"),
        ("newer", "ValueError", "Expected a config of format 2 or older, but got 99"),
        ("bert", "ValueError", "Expected a JEI-DNN checkpoint in 'org/bert', but got model_type 'bert'"),
        ("broken-config", "OSError", "not a valid JSON file"),
        ("broken-weights", "ValueError", "Expected complete weights in 'org/broken-weights'"),
        ("pickle", "ValueError", "Expected model.safetensors in 'org/pickle'.*pickle is never loaded"),
        ("asked for a pickle", "ValueError", "Expected use_safetensors=True"),
        ("adapter", "ValueError", "its config names 'adapter_model.bin'"),
        ("outside", "ValueError", "name files beside it, but got '../../../up.safetensors'"),
        ("no-backbone", "OSError", "backbone.safetensors"),
        ("other-backbone", "ValueError", "Expected backbone weights with fingerprint"),
        ("push without a token", "OSError", "401"),
        ("push with a reader's token", "OSError", "403 Forbidden: You need a write token"),
        ("push beside a broken card", "ValueError", "Expected valid YAML in the head of README.md"),
        ("push to a forbidden one", "OSError", "403 Forbidden"),
    ],
)
def test_a_fault_is_one_clear_line(raised, case, kind, words):
    assert raised[case] is not None, "nothing was raised"
    assert kind in raised[case]["kinds"]
    assert re.search(words, raised[case]["text"]), raised[case]["text"]
    assert "\n" not in raised[case]["text"]


@pytest.mark.parametrize("case", ["resumed", "short, again", "private, with a token", "both", "climbs"])
def test_what_is_right_or_mended_loads(raised, case):
    assert raised[case] is None


def test_nothing_is_unpickled_or_written_outside_or_by_halves(raised, pushed):
    assert not (pushed.folder / "exploded").exists()
    assert not list(pushed.folder.rglob("climbed*")) and not list(pushed.folder.rglob("up.safetensors"))
    cache = pushed.folder / "faults" / "hub"
    assert not list(cache.glob("models--org--closed/snapshots/*/model.safetensors"))
    assert not list(cache.glob("models--org--*/blobs/*.incomplete"))
    assert "org/new" not in pushed.hub.repos
    uploads = pushed.hub.repos["org/forbidden"].uploaded
    assert uploads == []


def test_weights_are_not_fetched_for_what_is_refused_by_its_config(raised, pushed):
    for name in ("newer", "bert", "broken-config", "adapter"):
        assert ("GET", f"/org/{name}/resolve/main/model.safetensors") not in pushed.hub.requests
        asked = [path for _, path in pushed.hub.requests if path.startswith(f"/org/{name}/")]
        assert asked and not [path for path in asked if "safetensors" in path]
    assert not [path for _, path in pushed.hub.requests if "discussions" in path]  # no bot is asked to convert


# Without a Hub


def test_the_backbone_beside_a_checkpoint_is_stored_as_it_was_also_from_a_model_in_half_precision(tmp_path):
    torch.manual_seed(1)
    safetensors.torch.save_file(timm.create_model("resnet20_cifar").state_dict(), tmp_path / "weights.safetensors")
    weights = tmp_path / "weights.safetensors"
    model = shake(JEIDNNForImageClassification.from_backbone_pretrained(**CIFAR, weights=str(weights)), 0)
    with portable(model):
        model.save_pretrained(tmp_path / "a" / "lam1")
    assert model.config.backbone_weights == str(weights)
    weights.unlink()
    half = JEIDNNForImageClassification.from_pretrained(tmp_path / "a", subfolder="lam1", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "b")
    stored = [safetensors.torch.load_file(tmp_path / f / "backbone.safetensors") for f in ("a/lam1", "b")]
    assert stored[0].keys() == stored[1].keys() == model.backbone.model.state_dict().keys()
    for key, value in model.backbone.model.state_dict().items():
        assert torch.equal(stored[0][key], value) and torch.equal(stored[1][key], value)
    JEIDNNForImageClassification.from_pretrained(tmp_path / "b")


def test_a_run_that_does_not_load_is_not_pushed(tmp_path):
    model = JEIDNNForImageClassification(JEIDNNConfig(**CIFAR))
    model.save_pretrained(tmp_path)
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match="Expected an operating point"):
        push_folder(tmp_path, "org/never", token="none")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="Expected complete weights"):
        push_folder(tmp_path, "org/never", token="none")
