"""Methods that read nothing but weights: each against its equation written out, and the limits that it implies."""

import math

import pytest
import torch

from baselines import (
    ace,
    average,
    breadcrumbs,
    cart,
    consensus,
    dare_ties,
    della,
    fr,
    free,
    iso_c,
    iso_cts,
    knots,
    lines,
    localize_and_stitch,
    magmax,
    model_stock,
    pcb,
    sce,
    svc,
    t_switch,
    task_arithmetic,
    ties,
    tsv_c,
    tsv_m,
    wudi,
)
from support.methods import YAMLS, assert_same, call, models
from twinbench.merging.blocks import block, count
from twinbench.merging.compress import basis, generator
from twinbench.merging.merged import exclusive_bytes, materialize, with_route
from twinbench.merging.spectral import by_gram, polar, triplets
from twinbench.plan.signature import signature
from twinbench.weights.parts import dense

MATRICES = ("embed.weight", "up.weight", "down.weight")
CLOSED = {"solver": "closed", "steps": 1, "lr": 1e-3, "scaling": 1.0, "others": "mean"}
ONE_IS_ITSELF = {  # what a method makes of one expert is that expert
    "tsv_m": {"scaling": 1.0},
    "wudi": CLOSED,
    "magmax": {"scaling": 1.0},
    "consensus": {"agreeing": 1, "scaling": 1.0},
    "cart": {},
    "della": {"density": 1.0, "window": 0.0, "scaling": 1.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0, "scaling": 1.0},
    "sce": {},
    "knots": {"density": 1.0, "scaling": 1.0},
}
ORDERED = {"magmax", "dare", "dare_ties", "della"}  # ties between tasks, and draws that go by their names


def yaml(stem: str):
    return next(path for path in YAMLS if path.stem == stem)


def vectors(base, experts, name):
    return [(expert[name] - base[name]).double() for expert in experts.values()]


def moved(base, merged, name):
    return (merged.shared[name] - base[name]).double()


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def test_triplets_are_the_singular_value_decomposition():
    for shape in ((12, 8), (8, 12), (9, 9)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found, (_, values, _) = triplets(matrix, 5), torch.linalg.svd(matrix)
        close(found.values, values[:5])
        close(found.left.T @ found.left, torch.eye(5))
        close(found.right @ found.right.T, torch.eye(5))
        full = triplets(matrix)
        close(full.left * full.values @ full.right, matrix)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        close(polar(matrix), left @ right)


def test_triplets_that_are_not_there_are_left_out():
    matrix = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 4))
    assert triplets(matrix).values.shape == (1,)
    assert triplets(torch.zeros(5, 3)).left.shape == (5, 0)
    close(polar(torch.zeros(5, 3)), torch.zeros(5, 3))


def test_a_gram_matrix_that_lacks_directions_gives_the_least_result():
    inputs = torch.randn(4, 9, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    wanted = torch.randn(3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(2)) @ inputs
    close(by_gram(wanted @ (inputs.T @ inputs), inputs.T @ inputs), wanted.float(), 1e-4)
    with pytest.raises(ValueError, match="not finite"):
        by_gram(torch.ones(2, 3), torch.full((3, 3), torch.nan))


@pytest.mark.parametrize("stem", ONE_IS_ITSELF)
def test_one_expert_is_itself(stem):
    base, experts = models(count=1)
    assert_same(dict(call(yaml(stem), base, experts, **ONE_IS_ITSELF[stem]).shared), experts["task0"], 1e-5)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_the_order_of_experts_changes_nothing(path):
    if path.stem in ORDERED or path.stem == "expert":
        pytest.skip("it draws by place, or settles a tie by it")
    base, experts = models()
    turned = dict(reversed(experts.items()))
    first, second = (materialize(call(path, base, given)) for given in (experts, turned))
    assert_same(first.shared, second.shared, 1e-5)
    for task, parts in first.exclusive.items():
        assert_same(
            {n: dense(p) for n, p in parts.items()}, {n: dense(p) for n, p in second.exclusive[task].items()}, 1e-5
        )


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_experts_that_are_the_base_stay_the_base(path):
    """All task vectors are zero: every division by their size has to be guarded."""
    if path.stem == "multitask":
        pytest.skip("it does not merge the experts, it trains the base")
    base, experts = models()
    same = {task: dict(base) for task in experts}
    merged = materialize(call(path, base, same))
    assert_same(merged.shared, base, 1e-6)
    for parts in merged.exclusive.values():
        assert all(not dense(part).any() for part in parts.values())


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_rows_and_numbers_of_every_shape_pass(path):
    """A row like RoBERTa's token types, a number, a vector of one, positions; some methods round ranks down to 0."""
    shapes = {"types.weight": (1, 8), "scale": (), "one.bias": (1,), "thin.weight": (2, 5)}
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    experts = {
        f"task{t}": {n: b + 0.1 * torch.randn(b.shape, generator=draw) for n, b in base.items()} for t in range(8)
    }
    positions = {"positions": torch.arange(4)}
    base |= positions
    experts = {task: own | positions for task, own in experts.items()}
    if signature(target(path)).reads != "nothing":
        pytest.skip("what it reads is of other tensors")
    merged = materialize(
        call(path, base, experts, **({"shared": base} if "shared" in signature(target(path)).arguments else {}))
    )
    assert merged.shared["positions"].equal(base["positions"])
    for name, tensor in merged.shared.items():
        assert tensor.shape == base[name].shape and torch.isfinite(tensor).all()


def target(path):
    from omegaconf import OmegaConf

    return OmegaConf.load(path)["_target_"]


def test_tsv_m_is_its_equation():
    base, experts = models(count=3)
    merged = tsv_m.merge(base, experts, scaling=0.7, basis=basis)
    for name in MATRICES:
        given = vectors(base, experts, name)
        rank = min(given[0].shape) // 3
        parts = [torch.linalg.svd(vector, full_matrices=False) for vector in given]
        polars = []
        for stacked in (
            torch.cat([left[:, :rank] for left, _, _ in parts], 1),
            torch.cat([right[:rank] for _, _, right in parts]),
        ):
            left, _, right = torch.linalg.svd(stacked, full_matrices=False)
            polars.append(left @ right)
        values = torch.cat([values[:rank] for _, values, _ in parts])
        close(moved(base, merged, name), 0.7 * polars[0] @ values.diag() @ polars[1])
    close(moved(base, merged, "up.bias"), 0.7 * sum(vectors(base, experts, "up.bias")) / 3)


def test_iso_c_has_one_singular_value_and_keeps_the_nuclear_norm():
    base, experts = models()
    merged = iso_c.merge(base, experts, scaling=0.7)
    for name in MATRICES:
        left, values, right = torch.linalg.svd(sum(vectors(base, experts, name)), full_matrices=False)
        close(moved(base, merged, name), 0.7 * values.mean() * left @ right)
        close(torch.linalg.svdvals(moved(base, merged, name)), (0.7 * values.mean()).expand(len(values)))


def test_iso_cts_is_its_equation_and_iso_c_without_directions_of_tasks():
    base, experts = models(count=2)
    merged = iso_cts.merge(base, experts, scaling=0.7, common=0.5)
    for name in MATRICES:
        given = vectors(base, experts, name)
        whole = min(given[0].shape)
        own = round((whole - int(0.5 * whole)) / 2)
        left, values, right = torch.linalg.svd(sum(given), full_matrices=False)
        common = whole - 2 * own
        lefts, rights, sizes = [], [], []
        for vector in given:
            rest = vector - left[:, :common] @ left[:, :common].T @ vector
            u, s, v = torch.linalg.svd(rest, full_matrices=False)
            lefts, rights, sizes = [*lefts, u[:, :own]], [*rights, v[:own]], [*sizes, s[:own]]
        lefts, rights, sizes = [*lefts, left[:, :common]], [*rights, right[:common]], [*sizes, values[:common]]
        polars = []
        for stacked in (torch.cat(lefts, 1), torch.cat(rights)):
            u, _, v = torch.linalg.svd(stacked, full_matrices=False)
            polars.append(u @ v)
        close(moved(base, merged, name), 0.7 * torch.cat(sizes).mean() * polars[0] @ polars[1])
    alone = iso_cts.merge(base, experts, scaling=0.7, common=1.0)
    assert_same(dict(alone.shared), dict(iso_c.merge(base, experts, scaling=0.7).shared), 1e-5)


def loss(tau, given):
    return sum(((tau - own) @ own.T).square().sum() / own.square().sum() for own in given)


def test_wudi_closed_is_the_minimum_and_adam_goes_there():
    base, experts = models()
    closed = wudi.merge(base, experts, **CLOSED)
    settings = CLOSED | {"solver": "adam", "lr": 1e-2}
    for name in ("up.weight", "down.weight"):
        given = vectors(base, experts, name)
        best = moved(base, closed, name).requires_grad_()
        (slope,) = torch.autograd.grad(loss(best, given), best)
        best = best.detach()
        assert slope.abs().max() < 1e-4 * sum(own.abs().max() for own in given)
        losses = [
            float(loss(moved(base, wudi.merge(base, experts, **settings | {"steps": steps}), name), given))
            for steps in (1, 30, 1000)
        ]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] == pytest.approx(float(loss(best, given)), rel=1e-3)
    base_only = wudi.merge(base, experts, **CLOSED | {"others": "base"})
    assert base_only.shared["embed.weight"].equal(base["embed.weight"])
    assert not closed.shared["embed.weight"].equal(base["embed.weight"])


def test_wudis_steps_are_those_of_adam_on_the_loss_itself():
    base, experts = models()
    settings = {"solver": "adam", "steps": 7, "lr": 1e-2, "scaling": 0.5, "others": "mean"}
    merged = wudi.merge(base, experts, **settings)
    given = [own.float() for own in vectors(base, experts, "up.weight")]
    tau = sum(given).clone().requires_grad_()
    optimizer = torch.optim.Adam([tau], lr=1e-2)
    for _ in range(7):
        optimizer.zero_grad()
        loss(tau, given).backward()
        optimizer.step()
    close(moved(base, merged, "up.weight").float(), 0.5 * tau.detach(), 1e-4)


@pytest.mark.parametrize("uneven", [0.0, 1e9])
def test_ace_is_its_equation(uneven):
    base, experts = models()
    merged = ace.merge(base, experts, ridge=0.03, uneven=uneven, refined=0.5, scaling=0.7)
    for name in MATRICES:
        given = vectors(base, experts, name)
        centred = [own - own.mean(0, keepdim=True) for own in given]
        sigmas, ridges = [own.T @ own for own in centred], [0.03] * len(given)
        if not uneven:
            traces = [sigma.trace() for sigma in sigmas]
            ridges = [0.03 / trace for trace in traces]
            sigmas = [sigma / trace for sigma, trace in zip(sigmas, traces, strict=True)]
        constant = sum(sigmas).mean(0, keepdim=True).expand(sigmas[0].shape)
        if not uneven:
            constant = constant / (sum((own.T @ own).trace() for own in given) / len(given))
        each = [sigma + ridge * torch.eye(len(sigma)) for sigma, ridge in zip(sigmas, ridges, strict=True)]
        tau = sum(own @ sigma for own, sigma in zip(centred, each, strict=True)) @ (sum(each) + constant).inverse()
        if not uneven:
            mean = sum(each) / len(each)
            left, values, right = torch.linalg.svd(
                sum(own @ (sigma - mean) for own, sigma in zip(given, sigmas, strict=True)) + tau, full_matrices=False
            )
            kept = int(0.5 * min(tau.shape))
            tau = tau + values[:kept].mean() * left[:, :kept] @ right[:kept]
        close(moved(base, merged, name), 0.7 * tau, 1e-4)


def test_breadcrumbs_is_its_equation():
    base, experts = models()
    merged = breadcrumbs.merge(base, experts, density=0.4, outliers=0.2, scaling=0.7)
    for name, origin in base.items():
        wanted = torch.zeros(origin.shape, dtype=torch.double).view(-1, origin.shape[-1])
        for own in vectors(base, experts, name):
            for row, total in zip(own.view(wanted.shape), wanted, strict=True):
                order = sorted(range(len(row)), key=lambda at, row=row: -abs(row[at]))
                dropped = math.floor(0.2 * len(row))
                for at in order[dropped : dropped + max(1, round(0.4 * (len(row) - dropped)))]:
                    total[at] += row[at]
        close(moved(base, merged, name), 0.7 * wanted.view(origin.shape))


def test_della_keeps_large_values_more_often_and_is_unbiased():
    base, experts = models(count=1)
    settings = {"density": 0.5, "window": 0.8, "scaling": 1.0, "aggregate": "sum"}
    own = experts["task0"]["up.weight"] - base["up.weight"]
    kept, total = torch.zeros_like(own), torch.zeros_like(own)
    for seed in range(400):
        found = della.merge(base, experts, seed=seed, **settings).shared["up.weight"] - base["up.weight"]
        kept += found.abs() > 1e-7
        total += found
    share = 0.1 + 0.8 * own.abs().argsort(1).argsort(1) / (own.shape[1] - 1)
    assert (kept / 400 - share).abs().max() < 0.1  # 4 standard errors
    assert (total / 400 - own).abs().max() < 5 * float((own.abs() * (1 / share - 1).sqrt()).max()) / 20


def test_della_without_a_window_is_dare_on_ties_that_trims_nothing():
    base, experts = models()
    settings = {"density": 1.0, "scaling": 0.7, "aggregate": "mean"}
    merged = della.merge(base, experts, window=0.0, seed=0, **settings)
    wanted = dare_ties.merge(base, experts, keep=1.0, scope="global", seed=0, **settings)
    assert_same(dict(merged.shared), dict(wanted.shared), 1e-6)
    draws = [della.merge(base, experts, **settings | {"density": 0.5}, window=0.0, seed=seed) for seed in (0, 0, 1)]
    first, same, other = (draw.shared["up.weight"] for draw in draws)
    assert first.equal(same) and not first.equal(other)


def test_consensus_is_its_equation_and_task_arithmetic_without_one():
    base, experts = models()
    for agreeing in (0, 1, 2, 3):
        merged = consensus.merge(base, experts, threshold=0.4, agreeing=agreeing, scaling=0.7)
        for name in base:
            given = vectors(base, experts, name)
            votes = sum((own.abs() > 0.4 * (sum(given) - own).abs()).double() for own in given)
            close(moved(base, merged, name), 0.7 * sum(given) * (votes >= agreeing))
    plain = task_arithmetic.merge(base, experts, scaling=0.7)
    none = consensus.merge(base, experts, threshold=0.4, agreeing=0, scaling=0.7)
    assert_same(dict(none.shared), dict(plain.shared), 1e-6)


@pytest.mark.parametrize("inter", ["sum", "signs"])
def test_pcb_is_its_equation(inter):
    base, experts = models()
    merged = pcb.merge(base, experts, density=0.3, clip=0.02, inter=inter, scaling=0.7)
    flat = [
        torch.cat([own.flatten() for name in base for own in vectors(base, {"a": expert}, name)])
        for expert in experts.values()
    ]
    clipped, shares = [], []
    for own in flat:
        order = own.abs().sort().values
        low, high = order[len(own) - round(0.98 * len(own))], order[len(own) - round(0.02 * len(own))]
        size = own.abs().clamp(low, high)
        clipped.append(own.sign() * size)
        shares.append((size - low) / (high - low))
    against = sum(clipped) if inter == "sum" else sum(c.sign() * n for c, n in zip(clipped, shares, strict=True))
    top, bottom = 0, 0
    for own, share in zip(clipped, shares, strict=True):
        beta = (3 * share**2).exp() * (own * against).tanh()
        least = beta.sort().values[len(beta) - round(0.3 * len(beta))]
        assert least > 0, "the case that the equation is about"
        weight = (beta.clamp(min=least) - least) / (beta.max() - least)
        top, bottom = top + weight * own, bottom + weight
    found = torch.cat([moved(base, merged, name).flatten() for name in base])
    close(found, 0.7 * top / bottom.clamp(min=1e-12))


def deep():
    names = ["embeddings.weight", *(f"encoder.layer.{i}.dense.weight" for i in range(3)), "norm.weight"]
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(4, 4, generator=draw) for name in names}
    return base, {f"t{t}": {n: w + 0.1 * torch.randn(4, 4, generator=draw) for n, w in base.items()} for t in range(2)}


def test_blocks_are_read_from_names():
    names = ["encoder.layer.3.a.weight", "model.layers.11.b", "transformer.h.0.c", "word_embeddings.weight", "x.3.y"]
    assert [block(name) for name in names] == [3, 11, 0, None, None]
    assert count(names) == 12 and count(["a"]) == 0


def test_lines_scales_deeper_blocks_more():
    base, experts = deep()
    shared = dict(task_arithmetic.merge(base, experts, scaling=1.0).shared)
    found = lines.merge(base, experts, shared=shared, intercept=None, slope=0.4).shared
    for name, factor in zip(base, (0.5, 0.5, 0.7, 0.9, 0.5), strict=True):
        close(found[name] - base[name], factor * (shared[name] - base[name]))
    same = lines.merge(base, experts, shared=shared, intercept=1.0, slope=0.0).shared
    assert_same(dict(same), shared, 1e-6)
    half = dict(task_arithmetic.merge(base, experts, scaling=0.5).shared)
    doubled = lines.merge(base, experts, shared=half, intercept=None, slope=0.0).shared
    assert_same(dict(doubled), dict(average.merge(base, experts).shared), 1e-6)


def test_model_stock_limits():
    base, experts = models(count=1)
    same = {f"copy{i}": experts["task0"] for i in range(3)}
    assert_same(dict(model_stock.merge(base, same).shared), experts["task0"], 1e-6)
    zero = {"w": torch.zeros(4)}
    apart = {f"t{i}": {"w": torch.eye(4)[i]} for i in range(3)}
    assert_same(dict(model_stock.merge(zero, apart).shared), zero, 1e-7)
    against = {"a": {"w": torch.tensor([1.0, 0])}, "b": {"w": torch.tensor([-1.0, 0.1])}}
    assert_same(dict(model_stock.merge({"w": torch.zeros(2)}, against).shared), {"w": torch.zeros(2)})
    half = {"a": {"w": torch.tensor([1.0, 0])}, "b": {"w": torch.tensor([0.5, math.sqrt(3) / 2])}}  # 60 degrees
    mean = torch.tensor([0.75, math.sqrt(3) / 4])
    assert_same(dict(model_stock.merge({"w": torch.zeros(2)}, half).shared), {"w": mean * 2 / 3}, 1e-6)
    with pytest.raises(ValueError, match="at least 2 experts"):
        model_stock.merge(base, experts)


def test_magmax_takes_the_largest():
    base = {"w": torch.zeros(3)}
    experts = {"a": {"w": torch.tensor([1.0, -2, 3])}, "b": {"w": torch.tensor([-1.0, 1, -4])}}
    assert magmax.merge(base, experts, scaling=0.5).shared["w"].tolist() == [-0.5, -1.0, -2.0]


def test_svc_is_its_equation_and_changes_nothing_for_one_expert():
    base, experts = models()
    shared = dict(task_arithmetic.merge(base, experts, scaling=1.0).shared)
    found = svc.merge(base, experts, shared=shared, floor=0.2)
    for name in MATRICES:
        left, values, right = torch.linalg.svd((shared[name] - base[name]).double(), full_matrices=False)
        for place in range(len(values)):
            merged = left[:, place] @ (shared[name] - base[name]).double()
            held = 0
            for own in vectors(base, experts, name):
                response = left[:, place] @ own
                held += max(0.2, float(merged @ response / response.square().sum()))
            values[place] *= 3 / held
        close(moved(base, found, name), left * values @ right, 1e-4)
    assert found.shared["up.bias"].equal(shared["up.bias"])
    one = {"task0": experts["task0"]}
    assert_same(dict(svc.merge(base, one, shared=experts["task0"], floor=1.0).shared), experts["task0"], 1e-5)


def test_cart_is_its_equation():
    base, experts = models()
    merged = cart.merge(base, experts, rank_ratio=0.3, scaling=1.6, basis=basis)
    mean = {name: sum(expert[name].double() for expert in experts.values()) / 3 for name in base}
    for name in ("up.weight", "down.weight"):
        low = 0
        for expert in experts.values():
            left, values, right = torch.linalg.svd(expert[name].double() - mean[name], full_matrices=False)
            low = low + left[:, :2] * values[:2] @ right[:2]
        close(merged.shared[name].double(), mean[name] + 1.6 * low)
    for name in ("embed.weight", "up.bias"):
        close(merged.shared[name].double(), mean[name])


def test_localize_and_stitch_is_its_equation():
    base, experts = deep()
    merged = localize_and_stitch.merge(base, experts, density=0.25)
    inside = [name for name in base if "layer" in name]
    total = {name: torch.zeros(4, 4) for name in inside}
    votes = {name: torch.zeros(4, 4) for name in inside}
    for expert in experts.values():
        flat = torch.cat([(expert[name] - base[name]).flatten() for name in inside]).abs()
        least = flat.sort(descending=True).values[round(0.25 * len(flat)) - 1]
        for name in inside:
            kept = (expert[name] - base[name]).abs() >= least
            total[name] += kept * (expert[name] - base[name])
            votes[name] += kept
    for name in inside:
        close(merged.shared[name] - base[name], total[name] / votes[name].clamp(min=1))
    for name in ("embeddings.weight", "norm.weight"):
        assert merged.shared[name].equal(base[name])


def low_rank(rank: int = 2):
    """A base and experts that differ from it by matrices of a small rank."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) for name, shape in {"a": (12, 8), "b": (6, 16)}.items()}

    def factors(shape):
        return torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)

    return base, {
        f"t{t}": {name: tensor + 0.1 * factors(tensor.shape) for name, tensor in base.items()} for t in range(2)
    }


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_knots_is_ties_in_the_common_directions(scope):
    base, experts = low_rank()
    settings = {"density": 0.4, "scaling": 0.7, "scope": scope, "aggregate": "mean"}
    merged = knots.merge(base, experts, **settings)
    lefts, turned = {}, {task: {} for task in experts}
    for name in base:
        beside = torch.cat([expert[name] - base[name] for expert in experts.values()], 1)
        left, values, right = torch.linalg.svd(beside, full_matrices=False)
        lefts[name] = left[:, :4]
        blocks = (values[:4, None] * right[:4]).chunk(2, 1)
        for own, part in zip(turned.values(), blocks, strict=True):
            own[name] = part
    zero = {name: torch.zeros_like(part) for name, part in turned["t0"].items()}
    wanted = ties.merge(zero, turned, **settings).shared
    for name in base:
        close(merged.shared[name] - base[name], lefts[name] @ wanted[name])


def test_knots_that_sums_everything_is_task_arithmetic():
    base, experts = low_rank()
    opposite = {
        task: {name: base[name] + (own[name] - base[name]).abs() for name in base} for task, own in experts.items()
    }
    one = {"t0": opposite["t0"]}
    whole = knots.merge(base, one, density=1.0, scaling=0.7, scope="global", aggregate="sum")
    assert_same(dict(whole.shared), dict(task_arithmetic.merge(base, one, scaling=0.7).shared), 1e-5)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_sce_is_its_equation(density):
    base, experts = models()
    merged = sce.merge(base, experts, density=density)
    for name in base:
        given = torch.stack([own.flatten() for own in vectors(base, experts, name)])
        kept = given.var(0, correction=0).argsort(descending=True)[: int(density * given.shape[1])]
        selected = torch.zeros_like(given)
        selected[:, kept] = given[:, kept]
        shares = selected.square().sum(1) / selected.square().sum()
        wanted = torch.zeros(given.shape[1], dtype=torch.double)
        for at in kept.tolist():
            sign = 1 if selected[:, at].sum() >= 0 else -1
            agreeing = [t for t in range(3) if selected[t, at] * sign > 0]
            wanted[at] = sum(shares[t] * selected[t, at] for t in agreeing) / sum(shares[t] for t in agreeing)
        close(moved(base, merged, name).flatten(), wanted)


def test_free_filters_the_lowest_frequencies_and_keeps_the_largest_of_each_row():
    base, experts = models()
    shared = fr.merge(base, experts, radius=0.5, scaling=0.7).shared
    merged = materialize(free.merge(base, experts, shared=shared, density=0.25, rescale=8.0))
    for name in MATRICES:
        height, width = base[name].shape
        total = 0
        for own in vectors(base, experts, name):
            spectrum = torch.fft.fft2(own)
            for row in range(height):
                for column in range(width):
                    if math.hypot(row - height // 2, column - width // 2) > 0.5 * max(height, width):
                        spectrum[row, column] = 0
            total = total + torch.fft.ifft2(spectrum).real
        close(moved(base, merged, name), 0.7 * total, 1e-5)
        for task, expert in experts.items():
            own = expert[name] - base[name]
            kept = own.abs() >= own.abs().sort(1, descending=True).values[:, round(0.25 * width) - 1 :][:, :1]
            close(dense(merged.exclusive[task][name]), 8 * own * kept)
    assert not fr.filtered(torch.ones(12, 12), 0.6).abs().max() > 1e-6, "a constant is the lowest frequency"
    ripple = torch.tensor([1.0, -1.0]).repeat(6)[:, None] * torch.tensor([1.0, -1.0]).repeat(6)
    close(fr.filtered(ripple, 0.6), ripple)


def test_disjoint_masks_copy_each_task():
    base = {"layer.0.w": torch.zeros(4)}
    experts = {"a": {"layer.0.w": torch.tensor([3.0, 0.1, 0, 0])}, "b": {"layer.0.w": torch.tensor([0.0, 0, 0.2, -5])}}
    assert localize_and_stitch.merge(base, experts, density=0.25).shared["layer.0.w"].tolist() == [3, 0, 0, -5]


def test_tsv_c_keeps_the_leading_triplets_and_one_expert_whole():
    base, experts = models()
    merged = materialize(tsv_c.merge(base, experts, basis=basis))
    for position, expert in enumerate(experts.values()):
        state = with_route(merged, [float(position == other) for other in range(3)])
        left, values, right = torch.linalg.svd(expert["up.weight"] - base["up.weight"], full_matrices=False)
        close(state["up.weight"] - base["up.weight"], left[:, :2] * values[:2] @ right[:2])
        close(state["up.bias"], expert["up.bias"])
    one = materialize(tsv_c.merge(base, {"task0": experts["task0"]}, basis=basis))
    assert_same(with_route(one, [1.0]), experts["task0"], 1e-5)


def test_t_switch_keeps_signs_and_the_norm_of_what_is_kept():
    base = {"w": torch.zeros(6)}
    experts = {"a": {"w": torch.tensor([4.0, 1, 2, -3, -1, 0])}}
    merged = materialize(t_switch.merge(base, experts, density=0.5))  # 2 of 3 positive values (1.5 is even), 1 of 2
    size = math.sqrt((16 + 4 + 9) / 3)
    close(dense(merged.exclusive["a"]["w"]), torch.tensor([size, 0, size, -size, 0, 0]))
    ones = {"w": torch.tensor([2.0, -2, 2, 2, -2, 2])}
    exact = materialize(t_switch.merge(base, {"a": ones}, density=1.0))
    assert_same(with_route(exact, [1.0]), ones, 1e-6)


def test_t_switch_takes_a_bit_a_weight_and_one_a_kept_weight():
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(1000, 1000)}
    experts = {"a": {"w": torch.randn(1000, 1000, generator=draw)}}
    taken = exclusive_bytes(materialize(t_switch.merge(base, experts, density=0.3)))
    assert taken == pytest.approx(1.3 * 1000 * 1000 / 8, rel=2e-3)


def test_tasks_draw_of_their_own():
    base, experts = models(count=1)
    twice = {"a": experts["task0"], "b": experts["task0"]}
    merged = della.merge(base, twice, density=0.5, window=0.0, scaling=1.0, aggregate="sum", seed=0)
    names = [torch.rand(12, 8, generator=generator(0, task, "up.weight")) < 0.5 for task in "ab"]
    assert not names[0].equal(names[1])
    both = (moved(base, merged, "up.weight") != 0).float().mean()
    assert 0.6 < both < 0.9, "a weight survives if either draw keeps it"


@pytest.mark.parametrize(
    ("stem", "changes", "word"),
    [
        ("tsv_m", {"scaling": math.inf}, "scaling"),
        ("iso_c", {"scaling": math.nan}, "scaling"),
        ("iso_cts", {"scaling": math.nan}, "scaling"),
        ("iso_cts", {"common": 1.1}, "common"),
        ("wudi", {"solver": "sgd"}, "solver"),
        ("wudi", {"steps": 0}, "steps"),
        ("wudi", {"lr": 0.0}, "lr"),
        ("wudi", {"scaling": math.inf}, "scaling"),
        ("wudi", {"others": "zero"}, "others"),
        ("ace", {"ridge": 0.0}, "ridge"),
        ("ace", {"uneven": math.nan}, "uneven"),
        ("della", {"scaling": math.inf}, "scaling"),
        ("ace", {"refined": 1.5}, "refined"),
        ("ace", {"scaling": math.inf}, "scaling"),
        ("breadcrumbs", {"density": 0.0}, "density"),
        ("breadcrumbs", {"outliers": 1.0}, "outliers"),
        ("breadcrumbs", {"scaling": math.inf}, "scaling"),
        ("della", {"density": 0.05}, "window"),
        ("della", {"density": 0.95}, "window"),
        ("della", {"window": -0.1}, "window"),
        ("della", {"aggregate": "median"}, "aggregate"),
        ("consensus", {"threshold": -0.1}, "threshold"),
        ("consensus", {"agreeing": 3}, "agreeing"),
        ("consensus", {"scaling": math.inf}, "scaling"),
        ("pcb", {"density": 0.0}, "density"),
        ("pcb", {"clip": 0.5}, "clip"),
        ("pcb", {"inter": "product"}, "inter"),
        ("pcb", {"scaling": math.inf}, "scaling"),
        ("lines", {"slope": math.inf}, "slope"),
        ("lines", {"intercept": math.nan}, "intercept"),
        ("magmax", {"scaling": math.inf}, "scaling"),
        ("svc", {"floor": 0.0}, "floor"),
        ("cart", {"rank_ratio": 0.0}, "rank_ratio"),
        ("cart", {"scaling": math.inf}, "scaling"),
        ("localize_and_stitch", {"density": 0.0}, "density"),
        ("t_switch", {"density": 1.1}, "density"),
        ("auto_switch", {"density": 0.0}, "density"),
        ("sce", {"density": 0.0}, "density"),
        ("fr", {"radius": 0.0}, "radius"),
        ("fr", {"scaling": math.inf}, "scaling"),
        ("free", {"density": 0.0}, "density"),
        ("free", {"rescale": math.inf}, "rescale"),
        ("esm", {"rows": 0}, "rows"),
        ("esm_pp", {"rows": 0}, "rows"),
        ("esm_pp", {"rank": 0}, "rank"),
        ("esm", {"power": -1.0}, "power"),
        ("esm", {"scaling": math.inf}, "scaling"),
        ("knots", {"density": 0.0}, "density"),
    ],
)
def test_hyperparameters_out_of_range_are_named_before_any_tensor_is_read(stem, changes, word):
    with pytest.raises(ValueError, match=word):
        call(yaml(stem), {}, {"task0": {}, "task1": {}}, **changes)
