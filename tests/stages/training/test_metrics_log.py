import json
import math

import pytest
import torch

from rae.stages.training.metrics_log import Meter, MetricsLog, read
from rae.store.errors import CorruptData


def test_one_object_a_line_and_null_for_what_json_cannot_hold(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(step=10, loss=0.5)
    log.log(step=20, loss=math.nan, grad_norm=math.inf)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == read(log.path)
    assert read(log.path) == [{"step": 10, "loss": 0.5}, {"step": 20, "loss": None, "grad_norm": None}]


def test_a_resumed_log_drops_what_the_checkpoint_does_not_know(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.log(step=step, loss=float(step))
    MetricsLog(tmp_path, step=20).log(step=30, loss=-1.0)
    assert read(log.path) == [{"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 30, "loss": -1.0}]


def test_a_new_attempt_carries_the_lines_of_the_one_it_continues(tmp_path):
    first = MetricsLog(tmp_path / "first")
    first.log(step=10, loss=1.0)
    first.log(step=20, loss=2.0)
    second = MetricsLog(tmp_path / "second", step=10, earlier=tmp_path / "first")
    assert read(second.path) == [{"step": 10, "loss": 1.0}]
    assert len(read(first.path)) == 2


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = MetricsLog(tmp_path).path
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read(path) == [{"step": 1, "loss": 2.0}]
    MetricsLog(tmp_path, step=5).log(step=6)
    assert [line["step"] for line in read(path)] == [1, 6]


@pytest.mark.parametrize("text", ["not json\n", '{"loss": 1.0}\n', "[1]\n"])
def test_a_file_that_is_no_log_is_refused(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(CorruptData, match=r"metrics\.jsonl"):
        read(path)


def test_the_meter_means_over_a_window_and_sums_over_the_run():
    meter = Meter()
    for loss in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(loss)}, seconds=2.0, data_wait_seconds=0.5)
    assert meter.window.per_second(8) == 4.0
    assert meter.window.data_wait == 0.25
    meter.close_window()
    assert meter.latest == {"loss": 3.0}
    meter.add({"loss": 5.0}, seconds=1.0, data_wait_seconds=0.0)
    meter.close_window()
    assert meter.latest == {"loss": 5.0}
    assert (meter.run.steps, meter.run.seconds, meter.run.data_wait_seconds) == (4, 7.0, 1.5)


def test_the_meter_travels_as_json():
    meter = Meter()
    meter.add({"loss": 0.25, "grad_norm": torch.tensor(math.inf)}, 1.0, 0.5)
    meter.close_window()
    meter.add({"loss": 0.1, "grad_norm": torch.tensor(0.1)}, 1.0, 0.5)
    copy = Meter.from_json(json.loads(json.dumps(meter.to_json(), allow_nan=False)))
    assert (copy.run, copy.window, copy.sums) == (meter.run, meter.window, meter.sums)
    assert copy.latest["loss"] == 0.25
    assert math.isnan(copy.latest["grad_norm"])
