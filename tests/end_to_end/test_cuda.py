"""On a GPU every method gives what it gives on the CPU."""

import numpy as np
import pytest
import torch

from support.commands import ROOT, composed
from support.family import write_suite
from twinbench.command import run
from twinbench.records import store

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
MORE = {"expert": ["method.task=letters"]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_those_of_the_cpu(family, tmp_path, method):
    write_suite(family, tmp_path / "conf")
    frames = []
    for device in ("cpu", "cuda"):
        results = tmp_path / device
        overrides = [f"method={method}", f"device={device}", "router=oracle", *MORE.get(method, [])]
        done = run(composed(tmp_path / "conf", results, *overrides))
        assert done.status == "ok"
        frames.append(store.predictions(results, done.run_id))
    regression = (frames[0]["task"] == "size").to_numpy()
    cpu, gpu = (frame["prediction"].to_numpy() for frame in frames)
    np.testing.assert_allclose(gpu[regression], cpu[regression], rtol=1e-5, atol=1e-6)
    assert np.mean(gpu[~regression] == cpu[~regression]) > 0.98, "classes differ only where two are as likely"
