"""Names of models: folders, the embedded checkpoint, and a hub that is never reached here."""

import os
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import errors, utils

from gemsmith.errors import HubError
from gemsmith.weights import hub
from gemsmith.weights.hub import KNOWN_IDS, resolve


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in ("GEMSMITH_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


class FakeHub:
    """Stands for huggingface_hub.snapshot_download: records calls, gives a folder or raises."""

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self.folder, self.calls, self.failure = folder, [], None
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")

    def __call__(self, repo: str, **options: object) -> str:
        self.calls.append((repo, options, utils.are_progress_bars_disabled()))
        if self.failure is not None:
            raise self.failure
        return str(self.folder)


@pytest.fixture
def fake(monkeypatch, tmp_path) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot", ("config.json", "model.safetensors"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def http_error(kind: type[errors.HfHubHTTPError], text: str = "status 4xx") -> Exception:
    class Response:
        headers: ClassVar[dict[str, str]] = {}
        request = None

    response: Any = Response()
    return kind(text, response=response)


def test_a_folder_is_itself(tmp_path, fake, monkeypatch):
    folder = tmp_path / "google" / "gemma-4-E2B-it"
    folder.mkdir(parents=True)
    assert resolve(folder) == folder
    assert resolve("google/gemma-4-E2B-it") == Path("google/gemma-4-E2B-it")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/google") == tmp_path / "google"
    assert fake.calls == []


def test_a_folder_has_no_revisions(tmp_path, fake):
    with pytest.raises(HubError, match="is a local folder; revision 'main' is for hub ids only"):
        resolve(tmp_path, revision="main")


def test_a_file_is_not_a_folder(tmp_path, fake):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(HubError, match=r"model.safetensors is a file; give the folder"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("./gemma-4-E2B-it", r"Did you mean google/gemma-4-E2B-it"),
        ("gemma-4-e2b-it", r"Did you mean google/gemma-4-E2B-it"),
        ("gemma-4-26B-A4B", r"Did you mean google/gemma-4-26B-A4B"),
        ("E4B", r"Did you mean google/gemma-4-E4B-it"),
        ("my-mode", r"Did you mean my-model\?"),
        ("a/b/c", "Give a folder, 'pocket', or a hub id such as google/"),
        ("", "Give a folder"),
        ("..x", "Give a folder"),
        ("/no/such/place", "Give a folder"),
        ("~nobody-of-that-name/x", "Give a folder"),
        ("x\0y", "Give a folder"),
        ("x" * 10_000, "Give a folder"),
        ("café/x y", "Give a folder"),
    ],
)
def test_what_cannot_be_found_is_named_with_near_matches(tmp_path, fake, name, hint):
    (tmp_path / "my-model").mkdir()
    with pytest.raises(HubError, match=rf"no folder .*{hint}") as error:
        resolve(name)
    assert len(str(error.value)) < 600
    assert fake.calls == []


def test_a_hub_id_asks_for_what_is_read_and_no_pickle(fake):
    assert resolve("google/gemma-4-E2B-it", revision="refs/pr/1") == fake.folder
    [(repo, options, quiet)] = fake.calls
    assert repo == "google/gemma-4-E2B-it"
    assert options["revision"] == "refs/pr/1"
    assert options["local_files_only"] is False
    assert not quiet
    offered = [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "model.safetensors", "model.safetensors.index.json"),
        "model-00001-of-00002.safetensors",
        *("pytorch_model.bin", "model.pt", "x.pkl", "consolidated.00.pth", "model.gguf"),
        *("modeling_gemma.py", "README.md", "original/model.safetensors", "tf_model.h5"),
    ]
    wanted = utils.filter_repo_objects(offered, allow_patterns=options["allow_patterns"])
    assert list(wanted) == offered[:8]


def test_what_is_fetched_is_what_the_loader_reads(fake, tmp_path):
    from gemsmith.testing import random_model, tiny_config
    from gemsmith.weights.generation import GenerationConfig
    from gemsmith.weights.load import load_model
    from gemsmith.weights.save import save_model

    config = tiny_config("E2B")
    source = tmp_path / "source"
    save_model(random_model(config), config, source, max_shard_bytes=50_000)
    GenerationConfig().save(source)
    held = [path.name for path in source.iterdir()]
    assert sorted(utils.filter_repo_objects(held, allow_patterns=list(hub.FETCHED))) == sorted(held)
    fake.folder = source
    assert load_model(resolve("someone/tiny"))[0] == config


def test_progress_can_be_silent_and_comes_back(fake):
    assert not utils.are_progress_bars_disabled()
    resolve("google/gemma-4-31B", progress=False)
    assert fake.calls[0][2]
    assert not utils.are_progress_bars_disabled()
    fake.failure = OSError("cut")
    with pytest.raises(HubError):
        resolve("google/gemma-4-31B", progress=False)
    assert not utils.are_progress_bars_disabled()


@pytest.mark.parametrize("variable", ["GEMSMITH_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    ("value", "offline"), [("1", True), ("True", True), ("0", False), ("", False)]
)
def test_the_environment_can_forbid_the_network(fake, monkeypatch, variable, value, offline):
    monkeypatch.setenv(variable, value)
    resolve("google/gemma-4-31B")
    resolve("google/gemma-4-31B", offline=not offline)
    assert [call[1]["local_files_only"] for call in fake.calls] == [offline, not offline]


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (
            http_error(errors.GatedRepoError),
            "google/gemma-4-E2B asks for its terms to be accepted: .*then run `hf auth login`",
        ),
        (
            http_error(errors.RepositoryNotFoundError),
            "the hub has no repository google/gemma-4-E2B, or it is private. Did you mean google/",
        ),
        (
            http_error(errors.RevisionNotFoundError),
            "google/gemma-4-E2B has no revision 'v9'; leave it out for the newest",
        ),
        (
            errors.LocalEntryNotFoundError("gone"),
            "at revision v9 is not in the local cache and the hub cannot be reached; connect once",
        ),
        (
            http_error(errors.HfHubHTTPError, "503 Server Error\nmore"),
            "the hub refused .* at revision v9: 503 Server Error; run the command again to resume",
        ),
        (OSError(28, "No space left on device"), "failed: .*No space left on device; run the"),
        (RuntimeError("read timed out"), "failed: read timed out; run the command again to resume"),
        (RuntimeError(), "failed: RuntimeError; run the command again"),
        (errors.HFValidationError("bad id"), "google/gemma-4-E2B is not a hub id: bad id"),
    ],
)
def test_each_way_to_fail_has_its_own_message(fake, failure, text):
    fake.failure = failure
    with pytest.raises(HubError, match=text):
        resolve("google/gemma-4-E2B", revision="v9")


def test_offline_says_so_and_hints_at_the_right_id(fake):
    fake.failure = errors.LocalEntryNotFoundError("gone")
    with pytest.raises(
        HubError, match=r"and offline mode is on; .*'pocket', which needs no netw.*\.$"
    ):
        resolve("google/gemma-4-E2B", offline=True)
    with pytest.raises(HubError, match=r"Did you mean google/gemma-4-E4B"):
        resolve("google/gemma4-E4B", offline=True)


def test_a_misspelt_relative_folder_that_could_be_an_id_gets_its_near_match(tmp_path, fake):
    (tmp_path / "models" / "gemma").mkdir(parents=True)
    fake.failure = http_error(errors.RepositoryNotFoundError)
    with pytest.raises(
        HubError, match=r"no repository models/gema, .* Did you mean models/gemma\?"
    ):
        resolve("models/gema")


@pytest.mark.parametrize("known", KNOWN_IDS)
def test_every_released_id_is_found_from_a_misspelling(fake, known):
    fake.failure = http_error(errors.RepositoryNotFoundError)
    with pytest.raises(HubError, match=rf"Did you mean {known}(\?| or)"):
        resolve(known.replace("gemma-4", "gemma4").replace("google/", "Google/").lower())


@pytest.mark.parametrize(
    "held", [(), ("config.json",), ("model.safetensors",), ("config.json", "a.bin")]
)
def test_a_repository_without_weights_it_reads_is_refused(fake, held):
    for path in fake.folder.iterdir():
        path.unlink()
    for name in held:
        (fake.folder / name).write_text("")
    with pytest.raises(
        HubError, match=r"holds no config.json with safetensors weights \(.+\); pickle"
    ):
        resolve("someone/model")


def test_pocket_is_the_embedded_checkpoint(fake, monkeypatch, tmp_path):
    (tmp_path / "pocket").mkdir()
    monkeypatch.setattr(resources, "files", lambda package: tmp_path / package)
    with pytest.raises(HubError, match="this installation carries no embedded checkpoint; install"):
        resolve("pocket")
    folder = tmp_path / "gemsmith" / "pocket" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve("pocket") == folder
    assert resolve("./pocket") == Path("pocket")
    assert fake.calls == []


def test_the_real_library_gives_a_clear_error_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "HF_HUB_OFFLINE" not in os.environ
    with pytest.raises(HubError, match="is not in the local cache and offline mode is on"):
        resolve("google/gemma-4-E2B-it", offline=True)
