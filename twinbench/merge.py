"""Merge checkpoints from disk to disk with a static method, without scores: a few tensors of each in memory at a time.

    python -m twinbench.merge method=ties base=DIR experts='{math: DIR, code: DIR}' out=DIR

Where the experts have the base's tensors, all are merged and the result is what the base is (a causal LM, say). Where
an expert has a head of its own (a classifier), the encoder is merged; heads, poolers included, are left out.
"""

from twinbench.system.ending import ended_well, importing

if __name__ == "__main__":
    importing()

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from twinbench.assets.sources import fetch
from twinbench.merging.merged import Merged, for_every_input
from twinbench.plan import preflight, targets
from twinbench.plan.exportable import UNWRITTEN
from twinbench.plan.signature import NAMED, Signature, checked_signature, hyperparameters, prepared_reads
from twinbench.system.errors import MISTAKES, one_line
from twinbench.system.files import new_folder
from twinbench.system.mistakes import Mistake, check_name, mistakes
from twinbench.weights.expert import bare, check_vocabulary, encoder, in_pooler, is_adapter, open_expert
from twinbench.weights.pretrained import copied, new_model
from twinbench.weights.state_dict import Layout, StateDict, check_finite, check_same_layout, layout, read_checkpoint
from twinbench.weights.write import write_weights

HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT's names of tasks whose models have a head of their own
BESIDE = (".json", ".txt", ".model", ".jinja")  # configuration and tokenizer, which a merged model takes from its base


@hydra.main(version_base="1.3", config_path="../conf", config_name="merge")
def main(cfg: DictConfig) -> None:
    """Compose, check, merge; of an error that leaves this function, Hydra would print a line more."""
    try:
        run(cfg)
    except MISTAKES as error:
        sys.exit(f"error: {one_line(error)}")


def run(cfg: DictConfig) -> None:
    """Check the configuration before any weight is read, and merge."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    choices = HydraConfig.get().runtime.choices
    names = {"method": choices["method"], "shared": choices["method@shared"]}
    takes = check(config, names)
    sources = {who: _source(where) for who, where in {"base": config["base"], **config["experts"]}.items()}
    method = bound(cfg, takes)
    with mistakes():
        method({}, {expert: {} for expert in config["experts"]})
    folders = {who: fetch(source) for who, source in sources.items()}
    start = time.perf_counter()
    values = hyperparameters(config["method"])
    values |= {"seed": config["seed"]} if any("seed" in each.arguments for each in takes.values()) else {}
    values |= {"shared": {"method": names["shared"], **hyperparameters(config["shared"])}} if "shared" in takes else {}
    text = card(names["method"], values, sources)
    out = Path(config["out"]).expanduser()
    size = merge(folders.pop("base"), folders, method, out, config["shard_bytes"], text)
    print(f"wrote {out}: {size:,} bytes of weights in {time.perf_counter() - start:.2f} s", flush=True)


def bound(cfg: DictConfig, takes: Mapping[str, Signature]) -> Callable[..., Merged]:
    """The method with all its arguments; where it modifies a static method's result, that is made first."""
    made = {}
    for which, signature in takes.items():
        given = {"seed": cfg.seed} if "seed" in signature.arguments else {}
        asks = {name: importlib.import_module(f"twinbench.prepared.{name}") for name in signature.arguments & NAMED}
        given |= {name: module.prepare(None) for name, module in asks.items()}
        made[which] = functools.partial(instantiate(cfg[which]), **given)
    if "shared" not in made:
        return made["method"]
    return lambda base, experts: made["method"](base, experts, shared=made["shared"](base, experts).shared)


def check(config: Mapping, names: Mapping[str, str]) -> dict[str, Signature]:
    """Find what is wrong with a resolved configuration.

    Args:
        names: the chosen files of ``method`` and of ``shared``.

    Returns:
        The signature of its method, and under ``shared`` that of the static method whose result it modifies.

    Raises:
        ValueError: one line with the key, the value and what is legal.
    """
    preflight.check_seed("seed", config["seed"])
    preflight.whole("shard_bytes", config["shard_bytes"])
    targets.check_kind("allow", config["allow"], "list[str]")
    targets.check(config, config["allow"])
    takes = {"method": _checked(config, names, "method")}
    if "shared" in takes["method"].arguments:
        takes["shared"] = _checked(config, names, "shared")
    experts = config["experts"]
    if not isinstance(experts, dict) or not experts:
        raise Mistake(f"experts must map names to sources, experts='{{a: DIR, b: DIR}}'; got {experts!r}")
    for expert, where in {"base": config["base"], **experts}.items():
        check_name("expert", expert)
        if not isinstance(where, str | dict) or not where:
            raise Mistake(f"{expert} must be a folder or a source such as {{path: DIR}}, got {where!r}")
    if "base" in experts:
        raise Mistake("experts: the name base is the base's own")
    if not isinstance(config["out"], str) or not config["out"]:
        raise Mistake(f"out must be a new folder, got {config['out']!r}")
    return takes


def _checked(config: Mapping, names: Mapping[str, str], which: str) -> Signature:
    """The signature of the method or of the one that it modifies; raises ValueError unless it takes weights alone."""
    takes, name = checked_signature(names[which], config[which]), names[which]
    group = "method" if which == "method" else "method@shared"
    if takes.route in UNWRITTEN:
        raise Mistake(
            f"{group}={name} gives {UNWRITTEN[takes.route]}, and no command writes these to disk; choose a static "
            "method, such as ties"
        )
    if takes.route or (which == "shared" and "shared" in takes.arguments):
        raise Mistake(
            f"{group}={name} gives a shared model with adapters: a suite of classifiers is written so by "
            f"python run.py suite=NAME method={name} export=DIR; here choose a static method, such as ties"
        )
    for argument in sorted(takes.arguments & NAMED):
        _check_needs_no_data(name, argument)
    targets.check_kinds(which, hyperparameters(config[which]), targets.arguments(config[which]["_target_"]))
    return takes


def merge(
    base: Path, experts: Mapping[str, Path], method: Callable[..., Merged], out: Path, shard_bytes: int, text: str
) -> int:
    """Write the merged weights, the base's configuration and tokenizer, and a card.

    Args:
        base, experts: Hugging Face folders; an expert may be a PEFT LoRA adapter of the base.
        method: a static method with its hyperparameters bound.
        out: a new folder; it appears when everything is in it.
        shard_bytes: largest size of a file of weights.
        text: the card.

    Returns:
        Bytes of the weights.

    Raises:
        ValueError: an expert does not fit the base, or weights are not finite.
        OSError: a file is missing, or the folder cannot be written.
    """
    state, named, entries, kind = opened(base, experts)
    with new_folder(out) as part:
        merged = _finite(for_every_input(method(state, named)), {"base": state, **named})
        write_weights(part, merged, entries, shard_bytes=shard_bytes, metadata={})
        for file in base.iterdir():
            if file.suffix in BESIDE and not file.name.endswith(".index.json"):
                copied(file, part / file.name)
        if kind:
            config = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"architectures": [kind]}
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (part / "README.md").write_text(text, encoding="utf-8")
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def opened(base: Path, experts: Mapping[str, Path]) -> tuple[StateDict, dict[str, StateDict], Layout, str | None]:
    """Open the checkpoints and check that they fit.

    Returns:
        The base, the experts, the layout of each, and the bare model's class where only that is merged.
    """
    state, entries = read_checkpoint(base), layout(base)
    headed = [name for name, folder in experts.items() if _has_own_head(folder, entries)]
    prefix, own, kind = _bare_model(base) if headed else ("", list(entries), None)
    whole, held = state, entries
    if headed:
        whole, held = bare(state, entries, prefix, own, "base")
        state, entries = encoder(whole, held)
        print(f"{', '.join(headed)}: with heads of their own, so the bare {kind} is merged", flush=True)
    named = {}
    for name, folder in experts.items():
        who = f"expert {name}"
        named[name], found = open_expert(folder, whole, held, prefix)
        if headed:
            named[name], found = encoder(*bare(named[name], found, prefix, own, who))
        check_same_layout(entries, found, who)
        check_vocabulary(base, folder, who)
    return state, named, entries, kind


def card(method: str, values: Mapping, sources: Mapping[str, Mapping]) -> str:
    """A model card: the method, its hyperparameters, and what was merged."""
    hub = sources["base"].get("hub")
    lines = ["---", "library_name: transformers", *([f"base_model: {hub}"] if hub else []), "tags:"]
    lines += ["- merge", "- twinbench", f"- {method}", "---", "", f"# {method} of {len(sources) - 1} experts", ""]
    lines += ["Made by twinbench; not scored.", "", "| | |", "|---|---|", f"| method | {method} |"]
    lines += [f"| parameters | `{json.dumps(values)}` |"]
    lines += [f"| {who} | `{json.dumps(dict(source))}` |" for who, source in sources.items()]
    return "\n".join(lines) + "\n"


def _check_needs_no_data(method: str, argument: str) -> None:
    if (read := prepared_reads(argument)) != "nothing":
        raise Mistake(
            f"method={method} needs {argument}, which reads {read}, and here are weights alone; a suite has data, and "
            f"its experts are merged by python run.py suite=NAME method={method} export=DIR"
        )


def _source(where: str | Mapping) -> dict:
    return {"path": where} if isinstance(where, str) else dict(where)


def _has_own_head(folder: Path, entries: Layout) -> bool:
    if is_adapter(folder):
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type") in HEADED
    return layout(folder).keys() != entries.keys()


def _bare_model(base: Path) -> tuple[str, list[str], str]:
    """What headed models put before the bare model's names, its encoder's names, and its class."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = new_model(AutoModel, base)
    own = [name for name in model.state_dict() if not in_pooler(name)]
    return f"{model.base_model_prefix}.", own, type(model).__name__


def _finite(merged: Mapping[str, Tensor], inputs: Mapping[str, Mapping[str, Tensor]]) -> StateDict:
    """The merged tensors, refused where they are not finite: every method lets NaN and infinity through."""

    def tensor(name: str) -> Tensor:
        result = merged[name]
        try:
            check_finite({name: result}, "the merged model")
        except ValueError:
            for who, state in inputs.items():  # whose fault it is
                check_finite({name: state[name]}, who)
            raise
        return result

    return StateDict(merged, tensor)


if __name__ == "__main__":
    ended_well(main, kept="nothing was written, as a merged model appears when it is whole")
