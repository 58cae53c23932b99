"""What caching saves is told from what was measured, and not told without."""

from pathlib import Path
from typing import Any

import pytest

from rae.pipeline.break_even import say_break_even
from rae.pipeline.console import Console
from tests.conftest import Rae

LONG = ("-s", "train_dit.steps=1200")  # 96 images in batches of 8: 100 epochs


def caching(rae: Rae, *words: object) -> dict[str, Any]:
    """What `rae plan --json` says of it; the plan may end in any exit code that a run would."""
    ran = rae.verb("plan", *words, "--json")
    assert "Traceback" not in ran.err
    (row,) = [row for row in ran.json if row["stage"] == "encode"]
    account: dict[str, Any] = row["caching"]
    return account


def test_the_account_follows_from_what_the_stages_noted(finished: Rae) -> None:
    account = caching(finished, *LONG)
    encoded, trained = (finished.artifact(f"{kind}/tiny")["metrics"] for kind in ("latents", "dit"))
    rows = encoded["rows"]
    encoder = 1 / encoded["images_per_second"]
    transformer = (1 - trained["data_wait"]) / trained["images_per_s"]
    assert account["seconds_saved_per_epoch"] == pytest.approx(rows * encoder)
    assert account["seconds_saved"] == pytest.approx(99 * rows * encoder)  # of 100 epochs, one encodes
    assert account["encoder_share_of_step"] == pytest.approx(encoder / (encoder + transformer))
    assert account["bytes"] == rows * 112 * 4 * 4 * 2
    assert account["epochs"] == 100


def test_two_views_are_even_after_two_epochs(finished: Rae) -> None:
    account = caching(finished, "-s", "encode.horizontal_flip=true", "--measure", "--device", "cpu", *LONG)
    assert account["break_even_epochs"] == 2
    assert account["seconds_to_encode"] == pytest.approx(2 * account["seconds_saved_per_epoch"])


def test_less_than_an_epoch_does_not_pay(finished: Rae) -> None:
    assert caching(finished)["pays"] is False
    assert "caching does not pay" in finished.verb("plan").out


def test_without_measurements_the_plan_names_the_command_that_measures(rae_with: Any) -> None:
    rae = rae_with("shards")
    account = caching(rae)
    assert account.keys() == {"unknown", "next"}
    assert account["next"].startswith("rae plan")
    assert account["next"].endswith("--measure")


def test_sizes_that_were_never_trained_here_are_not_guessed(finished: Rae) -> None:
    account = caching(finished, "-s", "train_dit.depth=[2,1]")
    assert "no transformer of this size" in account["unknown"]


def test_measuring_needs_no_latents_and_leaves_nothing_behind(rae_with: Any) -> None:
    rae = rae_with("shards")
    before = sorted(rae.workspace.rglob("*"))
    account = caching(rae, "--measure", "--device", "cpu", *LONG)
    assert sorted(rae.workspace.rglob("*")) == before
    assert 0 < account["encoder_share_of_step"] < 1
    assert account["measured"] == "timed now on cpu"


def test_an_encoder_that_hardly_counts_is_said_so_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    account = {
        "encoder_seconds_per_view": 0.004,
        "transformer_seconds_per_image": 0.096,
        "measured": "timed now on cpu",
        "encoder_share_of_step": 0.04,
        "seconds_saved_per_epoch": 5000.0,
        "seconds_to_encode": 10000.0,
        "seconds_saved": 390000.0,
        "epochs": 80,
        "break_even_epochs": 2,
        "bytes": 10**12,
        "pays": False,
    }
    say_break_even(account, Console(quiet=False, as_json=False))
    said = capsys.readouterr().out
    assert "caching does not pay by its time: the encoder is only 4 % of a step" in said
    assert "even after 2 of 80 epochs" in said
    assert "1 TB of disk" in said


def test_a_decoder_alone_has_nothing_to_account_for(finished: Rae, tmp_path: Path) -> None:
    rae = Rae(tmp_path, {key: value for key, value in finished.sections.items() if key not in ("train_dit", "sample")})
    rows = rae.verb("plan", "--json").json
    assert all("caching" not in row for row in rows)
