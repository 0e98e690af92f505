"What would bore a reader of the grokking notebooks: interrupted recordings, results that are never half written, windows, odd arguments."
import json
import shutil

import pytest
import torch

from explaind_nb.cli import fresh, settings
from explaind_nb.grokking import train_run, write_json
from explaind_nb.history import History, Recorder
from explaind_nb.interventions import main as interventions
from explaind_nb.modular import fit


def test_an_interrupted_recording_goes_on(tmp_path):
    p, conf = 11, settings(11)
    train, val = train_run(tmp_path/"whole", p, 0, 40)
    model, optimizer = fresh(p, 0, **conf)
    with Recorder(model, optimizer, tmp_path/"cut") as recorder: fit(model, optimizer, train, val, 17, recorder)
    for _ in range(2): train_run(tmp_path/"cut", p, 0, 40)                # the second time there is nothing left to do
    whole, cut = History(tmp_path/"whole"), History(tmp_path/"cut")
    assert len(whole) == len(cut) == 40
    for s in (0, 17, 18, 40): assert all(torch.equal(v, cut.theta(s)[k]) for k, v in whole.theta(s).items()), s


def test_a_recording_without_steps_is_begun_anew(tmp_path):
    model, optimizer = fresh(11, 0, **settings(11))
    train, val = train_run(None, 11, 0, record=False)
    with Recorder(model, optimizer, tmp_path/"live") as recorder:
        shutil.copytree(tmp_path/"live", tmp_path/"run")                  # as if killed before the first step was written
        fit(model, optimizer, train, val, 1, recorder)
    train_run(tmp_path/"run", 11, 0, 12)
    assert len(History(tmp_path/"run")) == 12


def test_json_is_whole_or_old(tmp_path):
    file = tmp_path/"rows.json"
    write_json(file, [dict(a=1), dict(a=2)])
    assert json.loads(file.read_text()) == [dict(a=1), dict(a=2)]
    with pytest.raises(TypeError): write_json(file, [dict(a=object())])
    assert json.loads(file.read_text()) == [dict(a=1), dict(a=2)] and [o.name for o in tmp_path.iterdir()] == ["rows.json"]


def test_primes_without_limits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no limits for p = 7"): interventions(runs=str(tmp_path), out=str(tmp_path/"o.json"), primes="7")
