"""Do our methods give what FusionBench's and mergekit's do? The same random weights through both.

    PYTHONPATH=. PYTHON tests/studies/parity.py

PYTHON is that of an environment of its own with twinbench's packages and, without their pins, fusion-bench and
mergekit: `pip install --no-deps fusion-bench mergekit`, and what their imports ask for. Writes
results/studies/parity.md: per method the dialect and the largest difference, as a share of the largest task vector.
"""

import contextlib
import importlib.metadata
import io
import math
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import typing_extensions

typing.override = typing_extensions.override  # which FusionBench takes from Python 3.12

from mergekit.merge_methods.base import TensorGroup  # noqa: E402
from mergekit.merge_methods.model_stock import model_stock_merge_method  # noqa: E402
from mergekit.merge_methods.sce import sce_merge  # noqa: E402
from mergekit.sparsify import magnitude, magnitude_outliers  # noqa: E402

from baselines import (  # noqa: E402
    breadcrumbs,
    emr,
    fisher,
    iso_c,
    iso_cts,
    knots,
    magmax,
    model_stock,
    regmean,
    sce,
    smile,
    svc,
    task_arithmetic,
    ties,
    tsv_m,
    wudi,
)
from twinbench.merging.compress import basis  # noqa: E402
from twinbench.merging.merged import materialize, with_route  # noqa: E402
from twinbench.routing.layerwise import gated  # noqa: E402

FILE = Path(__file__).parents[2] / "results" / "studies" / "parity.md"
SHAPES = {"up.weight": (48, 32), "down.weight": (32, 48), "square.weight": (40, 40), "up.bias": (48,)}
TASKS = 4
State = dict[str, torch.Tensor]


def weights() -> tuple[State, dict[str, State]]:
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return base, {
        f"task{t}": {name: b + 0.05 * torch.randn(b.shape, generator=draw) for name, b in base.items()}
        for t in range(TASKS)
    }


BASE, EXPERTS = weights()
VECTORS = [{name: own[name] - BASE[name] for name in BASE} for own in EXPERTS.values()]
LARGEST = max(float(tensor.abs().max()) for vector in VECTORS for tensor in vector.values())


def gram(name: str, place: int) -> torch.Tensor:
    inputs = torch.randn(200, SHAPES[name][1], generator=torch.Generator().manual_seed(place))
    return inputs.T @ inputs / 200


GRAMS = {
    task: {name: gram(name, place) for name in BASE if BASE[name].dim() == 2} for place, task in enumerate(EXPERTS)
}


def moved(vector: State) -> State:
    return {name: BASE[name] + vector[name] for name in BASE}


def group(name: str) -> TensorGroup:
    return TensorGroup.from_tensors([BASE[name], *(own[name] for own in EXPERTS.values())], base_index=0)


def difference(ours: State, theirs: State) -> float:
    scale = float(theirs["outputs"].abs().max()) if "outputs" in theirs else LARGEST
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / scale


def fusion_iso_c() -> tuple[State, State]:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c as theirs

    return dict(iso_c.merge(BASE, EXPERTS, scaling=1.0).shared), moved(theirs(VECTORS, accelerator="cpu"))


def fusion_iso_cts() -> tuple[State, State]:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts as theirs

    found = iso_cts.merge(BASE, EXPERTS, scaling=1.0, common=0.8).shared
    return dict(found), moved(theirs(VECTORS, 0.8, accelerator="cpu"))


def fusion_tsv_m() -> tuple[State, State]:
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction as theirs

    found = tsv_m.merge(BASE, EXPERTS, scaling=1.0, basis=basis).shared
    wide = [{name: tensor.double() for name, tensor in vector.items()} for vector in VECTORS]
    return dict(found), moved(theirs(wide, accelerator="cpu"))


def fusion_wudi() -> tuple[State, State]:
    from fusion_bench.method.wudi.wudi import wudi_merging as theirs

    found = wudi.merge(BASE, EXPERTS, solver="adam", steps=300, lr=1e-5, scaling=1.0, others="mean").shared
    merged = {name: tensor.detach() for name, tensor in theirs(VECTORS, accelerator="cpu", iter_num=300).items()}
    return dict(found), moved(merged)


def fusion_magmax() -> tuple[State, State]:
    from fusion_bench.method.magmax.magmax import _magmax_select as theirs

    vector = {name: 0.5 * tensor for name, tensor in theirs(VECTORS).items()}
    return dict(magmax.merge(BASE, EXPERTS, scaling=0.5).shared), moved(vector)


def fusion_svc() -> tuple[State, State]:
    from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration as theirs

    shared = dict(task_arithmetic.merge(BASE, EXPERTS, scaling=0.3).shared)
    found = svc.merge(BASE, EXPERTS, shared=shared, floor=0.1).shared
    names = [name for name in BASE if BASE[name].dim() == 2]
    merged = {
        name: theirs(BASE[name], [own[name] for own in EXPERTS.values()], shared[name], alpha=0.1) for name in names
    }
    return dict(found), merged


def fusion_emr() -> tuple[State, State]:
    from fusion_bench.method.emr_merging.utils import emr_merge as theirs

    unified, masks, scales = theirs(VECTORS)
    merged = materialize(emr.merge(BASE, EXPERTS, reduce="tensor_mean"))
    ours, other = {}, {}
    for place, task in enumerate(EXPERTS):
        state = with_route(merged, [float(task == each) for each in merged.exclusive])
        ours |= {f"{task} {name}": state[name] for name in BASE}
        other |= {f"{task} {n}": BASE[n] + scales[place] * masks[n][place] * unified[n] for n in BASE}
    return ours, other


def fusion_regmean() -> tuple[State, State]:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights as theirs

    given = {name: [own[name] for own in EXPERTS.values()] for name in BASE}
    seen = [{name.removesuffix(".weight"): gram.clone() for name, gram in own.items()} for own in GRAMS.values()]
    ours = regmean.merge(BASE, EXPERTS, rows=1, scaling=0.9, ridge=1e-12, gram=lambda task, _: GRAMS[task]).shared
    return dict(ours), theirs(given, seen, reduce_non_diagonal_ratio=0.9)


def fusion_fisher() -> tuple[State, State]:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights as theirs

    draw = torch.Generator().manual_seed(1)
    found = {task: {name: torch.rand(t.shape, generator=draw) for name, t in BASE.items()} for task in EXPERTS}
    given = {name: [own[name] for own in EXPERTS.values()] for name in BASE}
    ours = fisher.merge(BASE, EXPERTS, rows=1, normalize=False, ridge=1e-12, fisher=lambda task, _: found[task]).shared
    merged = theirs(given, list(found.values()), torch.ones(TASKS) / TASKS, normalize_fisher_weight=False)
    return dict(ours), merged


def fusion_smile() -> tuple[State, State]:
    from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear

    def layer(state: State) -> torch.nn.Linear:
        linear = torch.nn.Linear(32, 48)
        linear.load_state_dict({"weight": state["up.weight"], "bias": state["up.bias"]})
        return linear

    x = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(3))
    other = SmileMoELinear(layer(BASE), [layer(own) for own in EXPERTS.values()], gate_k=2, k=8, top_k=2)

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = layer(BASE)

        def forward(self, x):
            return self.up(x)

    names = ("up.weight", "up.bias")
    base, experts = {n: BASE[n] for n in names}, {t: {n: own[n] for n in names} for t, own in EXPERTS.items()}
    merged, model = materialize(smile.merge(base, experts, rank=8, gate_rank=2, top_k=2, basis=basis)), Holder()
    with torch.inference_mode(), gated(model, merged):
        return {"outputs": model(x)}, {"outputs": other(x)}


def fusion_knots() -> tuple[State, State]:
    from fusion_bench.method.knots.knots_utils import subspace_alignment as theirs

    draw, name = torch.Generator().manual_seed(2), "square.weight"
    low = [torch.randn(40, 3, generator=draw) @ torch.randn(3, 40, generator=draw) / 20 for _ in range(TASKS)]
    experts = {f"t{place}": {name: BASE[name] + own} for place, own in enumerate(low)}
    settings = {"density": 0.4, "scaling": 1.0, "scope": "global", "aggregate": "mean"}
    found = knots.merge({name: BASE[name]}, experts, **settings).shared
    left, values, rights = theirs(low)
    turned = {f"t{place}": {name: values[:, None] * right} for place, right in enumerate(rights)}
    merged = ties.merge({name: torch.zeros_like(turned["t0"][name])}, turned, **settings).shared
    return dict(found), {name: BASE[name] + left @ merged[name]}


def fusion_model_stock() -> tuple[State, State]:
    from fusion_bench.method.model_stock.model_stock import compute_angle, compute_ratio, merge_weights

    one, two = list(_alike().values())
    ratio = compute_ratio(compute_angle(one, two, BASE))
    return dict(model_stock.merge(BASE, _alike()).shared), merge_weights(one, two, BASE, ratio)


def _alike() -> dict[str, State]:
    """Two experts that point the same way, more or less, as two of one task do."""
    one, two = list(EXPERTS.values())[:2]
    return {"a": one, "b": {name: (one[name] + two[name]) / 2 for name in BASE}}


def mergekit_model_stock() -> tuple[State, State]:
    kit = {
        name: model_stock_merge_method.merge_group(
            TensorGroup.from_tensors([BASE[name], *(own[name] for own in _alike().values())], base_index=0),
            filter_wise=False,
        )
        for name in BASE
    }
    return dict(model_stock.merge(BASE, _alike()).shared), kit


def mergekit_sce() -> tuple[State, State]:
    kit = {name: sce_merge.merge_group(group(name), int8_mask=False, select_topk=0.4) for name in BASE}
    return dict(sce.merge(BASE, EXPERTS, density=0.4).shared), kit


def mergekit_ties() -> tuple[State, State]:
    """Its trimming per tensor, its election, its mean over agreeing models."""
    kit = {}
    for name in BASE:
        kept = torch.stack([magnitude(vector[name], 0.25) for vector in VECTORS])
        agrees = (kept.sign() == torch.where(kept.sum(0) >= 0, 1.0, -1.0)).float()
        kit[name] = BASE[name] + (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    ours = ties.merge(BASE, EXPERTS, density=0.25, scaling=1.0, scope="tensor", aggregate="mean").shared
    return dict(ours), kit


def mergekit_breadcrumbs() -> tuple[State, State]:
    """Of vectors alone, which are one row in both; its density counts what are outliers, too."""
    names = [name for name in BASE if BASE[name].dim() == 1]
    share = 0.25 * (48 - math.floor(0.125 * 48)) / 48
    kit = {
        name: BASE[name] + 0.3 * sum(magnitude_outliers(vector[name], share + 1e-9, gamma=0.125) for vector in VECTORS)
        for name in names
    }
    return dict(breadcrumbs.merge(BASE, EXPERTS, density=0.25, outliers=0.125, scaling=0.3).shared), kit


PAIRS: list[tuple[str, str, str, Callable[[], tuple[State, State]]]] = [
    ("iso_c", "fusion-bench", "sum of the task vectors, alpha 1", fusion_iso_c),
    ("iso_cts", "fusion-bench", "alpha 1, common 0.8", fusion_iso_cts),
    ("tsv_m", "fusion-bench", "alpha 1; its in float64, for in float32 its error is larger than ours", fusion_tsv_m),
    ("wudi", "fusion-bench", "Adam, 300 steps of 1e-5, others averaged", fusion_wudi),
    ("magmax", "fusion-bench", "scaling 0.5", fusion_magmax),
    ("svc", "fusion-bench", "on Task Arithmetic, floor 0.1", fusion_svc),
    ("emr", "fusion-bench", "reduce=tensor_mean", fusion_emr),
    ("regmean", "fusion-bench", "the same Gram matrices, no ridge", fusion_regmean),
    ("fisher", "fusion-bench", "the same information, not normalized, no ridge", fusion_fisher),
    ("smile", "fusion-bench", "outputs of one layer; rank 8, gate rank 2, top 2", fusion_smile),
    ("knots", "fusion-bench", "its aligned subspace, merged by TIES", fusion_knots),
    ("model_stock", "fusion-bench", "two experts, where a mean of angles is one of cosines", fusion_model_stock),
    ("model_stock", "mergekit", "per tensor", mergekit_model_stock),
    ("sce", "mergekit", "select_topk 0.4", mergekit_sce),
    ("ties", "mergekit", "its trimming per tensor, mean", mergekit_ties),
    ("breadcrumbs", "mergekit", "of vectors; it takes a whole tensor for one row", mergekit_breadcrumbs),
]


def main() -> None:
    lines = ["| method | peer | dialect | largest difference |", "| --- | --- | --- | ---: |"]
    for method, peer, dialect, run in PAIRS:
        with contextlib.redirect_stdout(io.StringIO()):
            ours, theirs = run()
        lines.append(f"| `{method}` | {peer} | {dialect} | {difference(ours, theirs):.0e} |")
        print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("fusion-bench", "mergekit", "torch"))
    text = f"""# The same weights through other people's code

{TASKS} experts of four random tensors. The difference is the largest of all weights, as a share of the largest value of
a task vector (for `smile` of the largest output).

{chr(10).join(lines)}

Made by `tests/studies/parity.py` with {versions}. Not compared: DELLA and DARE, whose draws differ, and methods that
neither has.
"""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text)


if __name__ == "__main__":
    main()
