"""Quickstart made small: from digits to scores, by one command, by four, and through the Python API as documented."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import rae as api
from rae.stages.models.encoders import load_encoder
from rae.stages.models.weights import locate_encoder
from rae.store.errors import ConfigError, MissingInput, StaleInput
from tests.conftest import TINY, VERBS, Rae, one_thread

KINDS = ("shards", "latents", "decoder", "dit", "samples", "scores")


def tree(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def place(finished: Rae) -> str:
    return str(finished.workspace)


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_a_run_ends_in_every_kind_of_artifact_with_its_numbers(finished: Rae) -> None:
    metrics = {kind: finished.artifact(f"{kind}/tiny")["metrics"] for kind in KINDS}
    assert (metrics["shards"]["rows"], metrics["shards"]["val_rows"]) == (100, 20)
    assert (metrics["latents"]["rows"], metrics["latents"]["invalid_rows"]) == (100, 0)
    assert metrics["latents"]["shape"] == [112, 4, 4]
    assert metrics["decoder"]["steps"] == TINY["train_decoder"]["steps"]
    assert metrics["dit"]["steps"] == TINY["train_dit"]["steps"]
    assert metrics["samples"]["images"] == 20
    assert {
        "reconstruction_psnr_db",
        "reconstruction_ssim",
        "class_agreement",
        "transfer_accuracy",
        "precision",
        "recall",
        "frechet_distance",
    } <= set(metrics["scores"])
    assert all(metrics[kind]["seconds"] >= 0 for kind in KINDS)


def test_four_verbs_in_order_end_in_the_same_scores(finished: Rae, rae: Rae) -> None:
    for verb in VERBS:
        assert rae.verb(verb, "--json").succeeded().json["reused"] is False
    for kind in KINDS:
        ours, theirs = rae.artifact(f"{kind}/tiny"), finished.artifact(f"{kind}/tiny")
        assert (ours["id"], ours["content"]) == (theirs["id"], theirs["content"])
        assert rae.payload(kind) == finished.payload(kind)


def test_a_second_run_does_nothing_but_the_report(finished: Rae) -> None:
    before = tree(finished.workspace)
    said = finished.verb("run").succeeded().out
    assert said.count("already done") == 6
    assert "begins" not in said
    after = tree(finished.workspace)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert changed == {"reports/tiny.html"}


def test_scores_say_under_which_protocol_they_were_taken(finished: Rae) -> None:
    (path,) = finished.workspace.glob("objects/scores/*/attempts/*/scores.json")
    scores = json.loads(path.read_text())
    assert set(scores["generation"]) >= {"samples", "real"}
    protocol = scores["protocol"]
    assert protocol["images"] == 20
    assert protocol["held_out_images"] == 20
    assert protocol["extractor"]["digest"] == locate_encoder("efficientnet-lite0").digests["tf_efficientnet_lite0"]
    assert protocol["sample"]["num_steps"] == TINY["sample"]["num_steps"]
    assert sum(protocol["labels"].values()) == 20
    assert set(protocol["labels"].values()) == {2}  # balanced


def test_lineage_leads_from_scores_to_latents(finished: Rae) -> None:
    shown = finished("inspect", "scores/tiny", "-w", finished.workspace).succeeded().out
    for kind in ("samples", "decoder", "dit", "latents"):
        assert f"{kind}/{finished.artifact(f'{kind}/tiny')['id']}" in shown


def test_the_report_stands_alone(finished: Rae) -> None:
    page = (finished.workspace / "reports" / "tiny.html").read_text(encoding="utf-8")
    assert "class_agreement" in page
    assert 'src="http' not in page


# ---- the Python API, as DESIGN has it -------------------------------------------------------------------------------


def test_latents_open_by_name_id_and_path(finished: Rae, place: str) -> None:
    latents = api.open_latents("tiny", workspace=place)
    assert len(latents) == 100
    assert latents.shape == (112, 4, 4)
    row = latents[17]
    assert set(row) == {"latent", "label", "key"}
    assert (row["latent"].shape, row["latent"].dtype) == ((112, 4, 4), np.float32)
    assert isinstance(row["label"], int)
    assert isinstance(row["key"], str)
    assert latents.manifest["kind"] == "latents"
    id = latents.manifest["id"]
    folder = finished.workspace / "objects" / "latents" / id
    for ref in (f"latents/{id}", id, str(folder)):
        np.testing.assert_array_equal(api.open_latents(ref, workspace=place)[17]["latent"], row["latent"])


def test_latents_are_whitened_unless_raw(place: str) -> None:
    latents, raw = api.open_latents("tiny", workspace=place), api.open_latents("tiny", workspace=place, raw=True)
    white = np.stack([latents[row]["latent"] for row in range(100)])
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=2e-3)
    np.testing.assert_allclose(white.std(axis=0), 1, atol=2e-2)
    mean, variance = latents.stats.mean, latents.stats.variance
    np.testing.assert_allclose(white[3], (raw[3]["latent"] - mean) / np.sqrt(variance + 1e-5), rtol=1e-3, atol=1e-4)


def test_batches_are_the_same_for_the_same_epoch(place: str) -> None:
    latents = api.open_latents("tiny", workspace=place)
    batches = list(latents.batches(batch_size=16, seed=0, epoch=3))
    assert len(batches) == 100 // 16
    again = list(latents.batches(batch_size=16, seed=0, epoch=3))
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one["latent"], other["latent"])
        assert one["row"].tolist() == other["row"].tolist()
    other_epoch = next(iter(latents.batches(batch_size=16, seed=0, epoch=4)))
    assert other_epoch["row"].tolist() != batches[0]["row"].tolist()


def test_torch_dataset_feeds_a_data_loader(place: str) -> None:
    latents = api.open_latents("tiny", workspace=place)
    dataset = api.torch_dataset(latents, seed=0)
    dataset.set_epoch(1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=10, shuffle=True)
    batch = next(iter(loader))
    assert batch["latent"].shape == (10, 112, 4, 4)
    assert batch["latent"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert [latents.labels[row] for row in batch["row"]] == batch["label"].tolist()


def test_encode_takes_names_modules_and_both_kinds_of_images(place: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    tokens = api.encode(images, encoder="efficientnet-lite0", feature_index=3)
    assert tokens.shape == (3, 112, 4, 4)
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(api.encode(floats, encoder="efficientnet-lite0", feature_index=3), tokens)
    module = load_encoder(locate_encoder("efficientnet-lite0"), 64, 3)
    torch.testing.assert_close(api.encode(floats, encoder=module), tokens)
    own = torch.nn.AvgPool2d(16)
    assert api.encode(floats, encoder=own, version="1").shape == (3, 3, 4, 4)


def test_autoencoder_and_decoder_are_the_trained_ones(place: str) -> None:
    autoencoder = api.load_autoencoder("tiny", workspace=place)
    decoder = api.load_decoder("tiny", workspace=place)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = autoencoder.encode(images)
    assert tokens.shape == (2, 112, 4, 4)
    made = decoder(tokens)
    assert made.shape == (2, 3, 32, 32)
    assert 0 <= made.min() <= made.max() <= 1
    torch.testing.assert_close(autoencoder.decode(tokens), made)
    noisy = autoencoder.noising(tokens, 0.5, torch.Generator().manual_seed(0))
    assert noisy.shape == tokens.shape
    assert not torch.equal(noisy, tokens)
    torch.testing.assert_close(autoencoder.noising(tokens, 0.0), tokens)


def test_stored_latents_are_what_the_autoencoder_encodes(finished: Rae, place: str) -> None:
    """The decoder's input in sampling has the scale of the tokens that it was trained on."""
    raw = api.open_latents("tiny", workspace=place, raw=True)
    dit = api.load_dit("tiny", workspace=place)
    white = torch.from_numpy(api.open_latents("tiny", workspace=place)[5]["latent"])
    torch.testing.assert_close(
        dit.raw(white[None])[0], torch.from_numpy(raw[5]["latent"]).float(), rtol=1e-3, atol=1e-3
    )


def test_dit_and_transport_train_and_sample(place: str) -> None:
    dit = api.load_dit("tiny", workspace=place)
    x, t, y = torch.randn(2, 112, 4, 4), torch.rand(2), torch.tensor([3, dit.num_classes])
    assert dit(x, t, y).shape == x.shape
    assert dit.latent_shape == (112, 4, 4)
    transport = api.create_transport(
        path_type="Linear", prediction="velocity", loss_weight=None, time_dist_type="uniform", time_dist_shift=6.93
    )
    losses = transport.training_losses(dit, x, y)
    assert losses.shape == (2,)
    assert torch.isfinite(losses).all()


def test_weights_of_ema_and_model_differ(place: str) -> None:
    ema, model = (api.load_dit("tiny", workspace=place, weights=weights) for weights in ("ema", "model"))
    assert any(not torch.equal(one, other) for one, other in zip(ema.parameters(), model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="`weights` is 'emma'; it must be one of ema, model"):
        api.load_dit("tiny", workspace=place, weights="emma")


def test_the_sampler_s_images_depend_on_seed_index_and_class_alone(place: str) -> None:
    dit, decoder = api.load_dit("tiny", workspace=place), api.load_decoder("tiny", workspace=place)
    labels = [2, 7, 2, 0, 9]

    def sample(labels: list[int], **options: int) -> np.ndarray:
        return api.sample(dit, decoder, labels=labels, num_steps=4, **options).astype(int)

    images = sample(labels, seed=0)
    assert images.shape == (5, 32, 32, 3)
    for batch_size in (1, 2, 5, 64):
        assert np.abs(sample(labels, seed=0, batch_size=batch_size) - images).max() <= 1
    np.testing.assert_array_equal(sample(labels, seed=0), images)
    np.testing.assert_array_equal(sample(labels[:3], seed=0), images[:3])  # whatever comes after it
    others = sample([4, 7, 4, 4, 9], seed=0)
    np.testing.assert_array_equal(others[[1, 4]], images[[1, 4]])  # whatever is around it
    assert np.abs(sample(labels, seed=1) - images).max() > 1
    assert np.abs(images[0] - images[2]).max() > 1  # same class, other index


def test_every_sampler_and_a_guide_are_at_hand(place: str) -> None:
    dit, decoder = api.load_dit("tiny", workspace=place), api.load_decoder("tiny", workspace=place)
    guide = api.load_dit("tiny", workspace=place, weights="model")
    drawn = {
        "euler": api.sample(dit, decoder, [2, 7]),
        "heun": api.sample(dit, decoder, [2, 7], sampler="heun"),
        "adaptive": api.sample(dit, decoder, [2, 7], sampler="adaptive", atol=1e-3, rtol=1e-2),
        "sde": api.sample(dit, decoder, [2, 7], sampler="sde", diffusion_form="SBDM", last_step="Tweedie"),
        "guided": api.sample(dit, decoder, [2, 7], guide=guide, guidance_scale=3.0),
    }
    exact = drawn["adaptive"].astype(int)
    assert np.abs(drawn["heun"] - exact).mean() <= np.abs(drawn["euler"] - exact).mean() < 4
    assert np.abs(drawn["sde"] - exact).mean() > 4
    assert (drawn["guided"] != drawn["euler"]).any()


def test_the_command_and_the_api_draw_the_same_images(finished: Rae, place: str) -> None:
    batches = sorted(finished.workspace.glob("objects/samples/*/attempts/*/images/batch-*.npz"))
    stored = [np.load(path) for path in batches]
    images, labels = (np.concatenate([batch[key] for batch in stored]) for key in ("images", "labels"))
    dit, decoder = api.load_dit("tiny", workspace=place), api.load_decoder("tiny", workspace=place)
    drawn = api.sample(dit, decoder, labels=labels.tolist(), seed=0, num_steps=4, batch_size=8)
    assert np.abs(drawn.astype(int) - images.astype(int)).max() <= 1
    assert sorted(set(labels.tolist())) == list(range(10))


def test_run_finds_what_is_done_and_makes_what_is_not(finished: Rae, rae: Rae) -> None:
    done = api.run(str(finished.config), workspace=str(finished.workspace))
    assert [artifact.kind for artifact in done] == list(KINDS)
    overrides = ["train_decoder=null", "train_dit=null", "sample=null", "evaluate=null"]
    made = api.run(str(rae.config), workspace=str(rae.workspace), overrides=overrides, device="cpu")
    assert [artifact.kind for artifact in made] == ["shards", "latents"]
    assert made[1].manifest.content == finished.content("latents")
    words = [word for override in overrides for word in ("-s", override)]
    command = ["rae", "run", str(rae.config), *words, "-w", str(rae.workspace)]
    assert shlex.split(made[1].manifest.provenance["command"]) == command


def test_what_is_wrong_is_said_to_callers_too(place: str, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no latents `nobody`"):
        api.open_latents("nobody", workspace=place)
    with pytest.raises(StaleInput, match="of kind dit, and decoder is needed"):
        api.load_decoder("dit/tiny", workspace=place)
    with pytest.raises(MissingInput):
        api.open_latents("tiny", workspace=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="did you mean `quickstart`"):
        api.run("quikstart", workspace=place)
    dit, decoder = api.load_dit("tiny", workspace=place), api.load_decoder("tiny", workspace=place)
    for label in (-1, 11):
        with pytest.raises(ConfigError, match=f"no class {label}: .* knows 0 to 9"):
            api.sample(dit, decoder, labels=[3, label], num_steps=4)
    with pytest.raises(ConfigError, match=r"rae\.sample: unknown key `atoll` \(did you mean `atol`"):
        api.sample(dit, decoder, labels=[3], sampler="adaptive", atoll=1e-3)
    with pytest.raises(ConfigError, match="`atol` belongs to `sampler: adaptive`"):
        api.sample(dit, decoder, labels=[3], atol=1e-3)
    with pytest.raises(ConfigError, match="no effect at `guidance_scale` 1"):
        api.sample(dit, decoder, labels=[3], guide=dit)
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        api.tune  # noqa: B018
    assert set(api.__all__) <= set(dir(api))


def test_the_environment_names_the_workspace(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAE_WORKSPACE", place)
    assert len(api.open_latents("tiny")) == 100
