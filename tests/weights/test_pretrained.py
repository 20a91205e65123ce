"""What transformers opens and what is copied from a folder that may be hostile: none of its code, no file elsewhere."""

import io
import json
import re
import shutil
import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from support.commands import ROOT
from twinbench.weights.pretrained import copied, new_model, open_pretrained

OWN = """
from pathlib import Path
from transformers import BertConfig as Config, BertForSequenceClassification as Model, BertTokenizer as Tokenizer
Path({trace!r}).touch()
"""


@pytest.fixture
def hostile(family, tmp_path, monkeypatch):
    """Give a base's settings code of its own; whoever is asked whether it may run says yes."""
    folder = tmp_path / "hostile"
    shutil.copytree(family / "base", folder)
    (folder / "own.py").write_text(OWN.format(trace=str(tmp_path / "trace")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))

    def edit(file, **changes):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return edit


@pytest.mark.parametrize("kind", [AutoConfig, AutoTokenizer, AutoModel])
def test_code_of_a_base_is_never_run(hostile, tmp_path, kind):
    names = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    folder = hostile("config.json", model_type="own", auto_map=names)
    hostile("tokenizer_config.json", tokenizer_class="Own", auto_map=names)
    with pytest.raises(ValueError, match="code of its own") as error:
        open_pretrained(kind, folder)
    assert str(error.value).startswith(f"{folder}: {kind.__name__} cannot open it") and "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()


def test_code_for_a_class_that_transformers_has_not_is_never_run(hostile, tmp_path):
    names = {"AutoModelForSequenceClassification": "own.Model"}
    folder = hostile("config.json", model_type="vit", auto_map=names)
    with pytest.raises(ValueError, match="code of its own"):
        new_model(AutoModelForSequenceClassification, folder)
    assert not (tmp_path / "trace").exists()


def test_no_other_module_opens_anything_with_transformers():
    for file in (ROOT / "twinbench").rglob("*.py"):
        opens = re.search(r"\.(from_pretrained|from_config)\(", file.read_text(encoding="utf-8"))
        assert not opens or file.name == "pretrained.py", file


@pytest.mark.parametrize(("file", "kind"), [("tokenizer.json", AutoTokenizer), ("config.json", AutoConfig)])
def test_a_broken_file_of_a_base_is_one_line_with_its_folder(family, tmp_path, file, kind):
    shutil.copytree(family / "base", tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_bytes(path.read_bytes()[:-40])
    said = f"^{re.escape(str(tmp_path / 'base'))}: {kind.__name__} cannot open it: ."
    with pytest.raises(ValueError, match=said) as error:
        open_pretrained(kind, tmp_path / "base")
    assert "\n" not in str(error.value)


def test_links_are_copied_only_of_a_folder_or_of_the_hubs_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "0123", tmp_path / "models--a" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (blobs / "0f").write_text("a blob")
    (snapshot / "own.json").write_text("own")
    leads = {"hub.json": "../../blobs/0f", "beside.json": "own.json", "secret.json": str(tmp_path / "secret")}
    for name, target in leads.items():
        (snapshot / name).symlink_to(target)
    (tmp_path / "base").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "base"):
        for name, content in (("hub.json", "a blob"), ("beside.json", "own"), ("own.json", "own")):
            assert copied(folder / name, tmp_path / "out").read_text() == content
        with pytest.raises(ValueError, match=r"secret\.json: a link out of its folder, to .*secret, is not copied"):
            copied(folder / "secret.json", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "own"
