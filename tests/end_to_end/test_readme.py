"""README, docs/ and results/README.md show what the committed records give, name what exists, and their code runs."""

import re
import shlex
import shutil

import pandas as pd
import pytest
import torch
import yaml

from support.commands import ROOT, command, composed, planned, read, rows_of
from support.family import CLASSES
from support.reports import heads
from twinbench.command import run
from twinbench.plan.signature import signature
from twinbench.protocol import PROTOCOLS
from twinbench.records import store
from twinbench.report.make import make

REFERENCE = ROOT / "results" / "reference"
REPORTS = REFERENCE / "reports"
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
README, RESULTS = TEXTS["README.md"], TEXTS["results/README.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without those of its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def table(text: str, head: str) -> str:
    (found,) = [block for block in text.split("\n\n") if block.startswith("|") and head in block.splitlines()[0]]
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Module or script, and arguments of every command in a block."""
    found = [block.replace("\\\n", " ") for text in TEXTS.values() for block in blocks(text, "")]
    lines = [line for block in found for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if ".venv/bin/python" in line]
    words = [found[found.index(".venv/bin/python") + 1 :] for found in words]
    return [(found[1], found[2:]) if found[0] == "-m" else (found[0], found[1:]) for found in words]


def test_the_page_on_experiments_has_all_of_them():
    told = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table_lines("docs/experiments.md")))
    assert sorted(told) == sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))


def table_lines(page: str) -> list[str]:
    return [line for line in TEXTS[page].splitlines() if line.startswith("| `")]


def test_its_table_is_that_of_the_reference_reports():
    scores, storage = (pd.read_csv(REPORTS / "demo" / f"strict_{kind}.csv") for kind in ("normalized", "storage"))
    rows = scores.merge(storage, on="method", validate="one_to_one")
    lines = cells(table(README, "worst task"))
    assert lines == [
        [
            row.method,
            f"{row.average:.1f}",
            f"{row.average_low:.1f} to {row.average_high:.1f}",
            f"{row.corrected:.1f}",
            f"{row.worst:.1f} {row.worst_task}",
            f"{row.total / 1e6:.0f}",
        ]
        for row in rows.itertuples()
    ]


def test_the_tables_of_the_results_are_those_of_the_reference_reports():
    found = [block for block in RESULTS.split("\n\n") if "| difference |" in block.splitlines()[0]]
    for block, report in zip(found, ("demo", "glue_mpnet", "glue_minilm"), strict=True):
        assert block in (REPORTS / report / "leaderboard.md").read_text()


def test_the_table_of_heads_is_that_of_the_reference_report():
    merged, kept = heads()
    lines = cells(table(RESULTS, "pooler in the head"))
    assert len(lines) == len(kept) == len(merged)
    for method, in_head, in_encoder, cost in lines:
        scores = [frame.loc[method, "average"] for frame in (kept, merged)]
        assert [in_head, in_encoder, cost] == [f"{score:.1f}" for score in (*scores, scores[0] - scores[1])], method


def test_the_times_of_a_merge_are_those_of_the_benchmark():
    measured = cells(table((ROOT / "results/benchmarks/merge.md").read_text(), "tool"))
    wall = {(row[0], row[1].split()[0]): row[2] for row in measured}
    for label, *times in cells(table(TEXTS["docs/merging.md"], "mergekit")):
        for tool, time in zip(("twinbench", "mergekit", "fusion-bench"), times, strict=True):
            found = wall.get((label.lower().replace(" ", "_"), tool))
            assert time == (f"{found} s" if found else "more than 22 GB")


def test_the_reference_report_is_made_of_the_reference_records(tmp_path):
    for folder in ("records", "predictions"):
        shutil.copytree(REFERENCE / folder, tmp_path / folder)
    for file in (tmp_path / "records").glob("*.jsonl"):  # the demo's report is of before the field was measured
        if '"experiment": "demo_field"' in file.read_text(encoding="utf-8"):
            file.unlink()
    make(tmp_path, suite="demo")
    for name in ("strict_raw.csv", "strict_storage.csv", "blind_raw.csv", "experts.csv"):
        assert (tmp_path / "reports" / "demo" / name).read_bytes() == (REPORTS / "demo" / name).read_bytes()


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200
    assert max(map(len, README.splitlines())) <= 110


@pytest.mark.parametrize("file", TEXTS)
def test_the_files_that_it_names_are_there(file):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXTS[file])
    for link in links:
        assert ((ROOT / file).parent / link).exists(), link
    named = re.findall(r"`((?:twinbench|baselines|conf|tests|results|docs)/[\w./]*)`", TEXTS[file])
    for path in named:
        assert (ROOT / path).exists() or "NAME" in path or path.startswith("results/local"), path


def test_the_table_of_protocols_has_each():
    rows = cells(table(TEXTS["docs/results.md"], "protocol"))
    assert [re.search("`(.+?)`", row[0])[1] for row in rows] == list(PROTOCOLS)


def test_the_map_has_every_room():
    named = re.findall(r"`(?:twinbench/)?([\w.]+)/?`", "\n".join(row[0] for row in cells(table(README, "| |"))))
    rooms = {path.name for path in (ROOT / "twinbench").iterdir() if not path.name.startswith("__")}
    assert rooms <= set(named), rooms - set(named)


def test_its_commands_are_commands():
    """Every override names what there is; a sweep's are those of its first run."""
    found = commands()
    assert {name for name, _ in found} == {"run.py", "twinbench.report", "twinbench.merge"}
    for name, arguments in found:
        if name == "run.py":
            sweep = "-m" in arguments
            given = [word.split(",")[0] if sweep else word for word in arguments if word != "-m"]
            read(*given)
        else:
            assert all("=" in word for word in arguments)


def test_the_variants_of_the_tables_are_configurations():
    rows = [row for text in ("variant", "router") for row in cells(table(TEXTS["docs/methods.md"], f"| {text} |"))]
    ids = [planned(*re.search("`(.+?)`", row[1])[1].split()).run_id for row in rows]
    assert len(ids) == len({*ids})


def test_the_table_of_methods_says_what_their_files_say():
    for names, _, parts, route, needs in cells(table(TEXTS["docs/methods.md"], "| method |")):
        for name in re.findall("`(.+?)`", names):
            takes = signature(yaml.safe_load((ROOT / f"conf/method/{name}.yaml").read_text())["_target_"])
            assert (takes.route or "", takes.reads) == (route, needs), name
            assert (parts == "none") == (not route)


def test_a_method_takes_the_two_files_that_it_shows():
    (code, _), (numbers, _) = blocks(README, "python"), blocks(README, "yaml")
    space = {}
    exec(compile(code, "README.md", "exec"), space)
    base, experts = {"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}, "b": {"w": -2 * torch.ones(2)}}
    values = {key: value for key, value in yaml.safe_load(numbers).items() if not key.startswith("_")}
    assert space["merge"](base, experts, **values | {"scaling": 0.5}).shared["w"].tolist() == [-1.0, -1.0]


def test_a_suite_and_a_task_of_ones_own_are_the_files_that_it_shows(family, tmp_path):
    _, suite = blocks(README, "yaml")
    (task,) = blocks(TEXTS["docs/suites.md"], "yaml")
    places = {"/models/my-bert-sst2": "experts/letters", "/models/my-bert": "base", "/data/mine": "data/letters"}
    suite = suite.replace("  - /task@tasks.sst2", "  - /task@tasks.mine: mine\n  - /task@tasks.sst2")
    suite += "  mine: {path: /models/my-bert-sst2}\n"  # the last lines are the checkpoints
    for name, text in {"suite/NAME.yaml": suite, "task/mine.yaml": task}.items():
        for shown, here in places.items():
            text = text.replace(shown, str(family / here))
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    lengths = [f"suite.tasks.{task}.max_length=16" for task in ("mine", "sst2")]  # the tiny base has few positions
    done = command(f"hydra.searchpath=[file://{tmp_path}]", "suite=NAME", "method=average", *lengths, "plan=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("to run")


def test_a_generative_suite_has_the_keys_that_it_shows():
    (shown,) = blocks(TEXTS["docs/generative.md"], "yaml")
    kept = [
        yaml.safe_load((ROOT / f"conf/{name}.yaml").read_text())
        for name in ("suite/generative_smollm", "workload/generation")
    ]
    assert yaml.safe_load(shown).keys() <= {"base"}.union(*kept)


def test_an_exported_model_is_loaded_by_the_lines_that_it_shows(family, tmp_path):
    """They predict what the record's predictions are."""
    pytest.importorskip("peft", reason="an adapter is loaded by PEFT")
    folder, results = tmp_path / "exported", tmp_path / "results"
    given = ["method=twin_merging", "router=oracle", "method.rank_ratio=0.2", f"export={folder}"]
    assert run(composed(family / "conf", results, *given)).status == "ok"
    predicted = store.predictions(results, rows_of(results)[0]["run_id"])
    _, block = blocks(README, "python")
    for task in CLASSES:
        text = pd.read_parquet(family / "data" / task / "test.parquet")["text"][0]
        space = {}
        line = f"folder, task, text = {str(folder)!r}, {task!r}, {text!r}"
        exec(compile(re.sub("^folder, task, text = .*$", line, block, flags=re.MULTILINE), "README.md", "exec"), space)
        (found,) = space["logits"].argmax(1) if CLASSES[task] else space["logits"][:, 0]
        wanted = predicted[(predicted["task"] == task) & (predicted["row"] == 0)]["prediction"].item()
        assert float(found) == pytest.approx(wanted, abs=1e-4)
