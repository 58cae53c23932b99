"""What sections refuse, and what stays out of recipes."""

from typing import Any

import pytest
from pydantic import ValidationError

from rae.stages.models.sizes import DIT_SIZES, VIT_SIZES
from rae.stages.models.transport import create_transport
from rae.stages.sections import EncodeSection, SampleSection
from rae.stages.training.sections import TrainDecoderSection, TrainDitSection
from rae.store.errors import ConfigError


def test_a_transformer_narrower_than_a_token_is_refused() -> None:
    head = TrainDitSection(steps=1, hidden_size=(16, 32), depth=(1, 1), num_heads=(2, 2))
    head.check_width(32)
    with pytest.raises(ConfigError, match=r"the head is 32 wide and a token has 33 channels.*Theorem 1.*allow_narrow"):
        head.check_width(33)
    plain = TrainDitSection(model="LightningDiT", steps=1, hidden_size=(32,), depth=(1,), num_heads=(2,))
    with pytest.raises(ConfigError, match="the transformer is 32 wide"):
        plain.check_width(36)
    plain.model_copy(update={"allow_narrow": True}).check_width(36)


def test_a_plain_transformer_takes_its_sizes_without_brackets() -> None:
    plain = TrainDitSection(model="LightningDiT", steps=1, hidden_size=32, depth=2, num_heads=4)
    assert (plain.hidden_size, plain.depth, plain.num_heads) == ((32,), (2,), (4,))
    with pytest.raises(ValidationError, match=r"`hidden_size` needs 2 number\(s\) for DiT-DH, got \[32\]"):
        TrainDitSection(steps=1, hidden_size=32)


@pytest.mark.parametrize("path_type", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("loss_weight", [None, "velocity", "likelihood"])
def test_a_loss_that_the_transport_refuses_is_refused_before_torch_is_loaded(
    path_type: str, prediction: str, loss_weight: str | None
) -> None:
    def refusal(make: Any) -> str:
        try:
            make(path_type=path_type, prediction=prediction, loss_weight=loss_weight)
        except ConfigError as error:
            return error.message
        except ValidationError as error:
            return str(error.errors()[0]["ctx"]["error"])
        return ""

    assert refusal(create_transport) == refusal(lambda **choice: TrainDitSection(steps=1, **choice))


def test_what_does_not_change_the_result_stays_out_of_the_recipe() -> None:
    one = EncodeSection(encoder="here/dinov2", workers=1)
    other = EncodeSection(encoder="there/dinov2", workers=8, weights="/data/x.pth")
    assert one.in_recipe() == other.in_recipe()
    assert one.in_recipe() != EncodeSection(encoder="here/dinov2", workers=1, batch_size=7).in_recipe()
    log_often = TrainDecoderSection(steps=5, log_every=1, checkpoint_every=1)
    assert log_often.in_recipe() == TrainDecoderSection(steps=5).in_recipe()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"atol": 1e-4}, "`atol` belongs to `sampler: adaptive`, not to euler"),
        ({"sampler": "sde", "rtol": 1e-4}, "`rtol` belongs to `sampler: adaptive`"),
        ({"sampler": "heun", "diffusion_form": "SBDM"}, "`diffusion_form` belongs to `sampler: sde`"),
        ({"sampler": "adaptive", "last_step": None}, "`last_step` belongs to `sampler: sde`"),
        ({"sampler": "adaptive", "num_steps": 20}, "`num_steps` belongs to .*, not to adaptive: leave it at 50"),
        ({"sampler": "sde", "last_step": None, "last_step_size": 0.1}, "`last_step_size` is the size of a `last_step`"),
        ({"sampler": "sde", "num_steps": 2}, "needs 3 points or more"),
        ({"guide": "dit/early"}, "`guide` has no effect at `guidance_scale` 1"),
        ({"guidance_interval": (0.1, 0.6)}, "`guidance_interval` has no effect"),
        ({"guidance_scale": 2, "guidance_interval": (0.6, 0.6)}, "is empty"),
    ],
)
def test_an_option_of_sampling_without_effect_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SampleSection(**settings)


@pytest.mark.parametrize(
    ("idle", "at_work", "change"),
    [
        ({"adversarial_loss": "none"}, {}, {"disc_weight": 0.5}),
        ({"adversarial_loss": "none"}, {"adversarial_loss": "encoder"}, {"ks": 3, "gan_start_step": 4}),
        ({"adversarial_loss": "encoder"}, {}, {"recipe": "S_16"}),
        ({"perceptual_loss": "none"}, {}, {"perceptual_weight": 0.5, "perceptual_start_epoch": 1.0}),
    ],
)
def test_a_decoder_s_recipe_holds_no_option_of_a_loss_that_it_does_without(
    idle: dict[str, Any], at_work: dict[str, Any], change: dict[str, Any]
) -> None:
    def recipe(**settings: Any) -> dict[str, Any]:
        return TrainDecoderSection(steps=5, **settings).in_recipe()

    assert recipe(**idle, **change) == recipe(**idle)
    assert recipe(**at_work, **change) != recipe(**at_work)


@pytest.mark.parametrize(
    ("weight", "loss", "other"),
    [("disc_weight", "adversarial_loss", "encoder"), ("perceptual_weight", "perceptual_loss", "lpips")],
)
def test_a_loss_of_weight_0_is_none(weight: str, loss: str, other: str) -> None:
    for given in ({}, {loss: other}, {loss: "none"}):
        section = TrainDecoderSection(steps=5, **given, **{weight: 0})
        assert getattr(section, loss) == "none"
        assert section.in_recipe() == TrainDecoderSection(steps=5, **{loss: "none"}).in_recipe()
    assert getattr(TrainDecoderSection(steps=5, **{loss: other, weight: 1e-9}), loss) == other


@pytest.mark.parametrize("section", [TrainDecoderSection, TrainDitSection])
@pytest.mark.parametrize(
    ("key", "value", "default"),
    [("decay_start_epoch", 3.0, "0.0"), ("decay_end_epoch", 8.0, "null"), ("final_lr", 1e-5, "2e-05")],
)
def test_an_option_of_the_decay_is_refused_to_a_constant_rate(
    section: type[TrainDecoderSection | TrainDitSection], key: str, value: float, default: str
) -> None:
    with pytest.raises(ValidationError, match=f"`{key}` {value} has no effect: .* leave `{key}` at {default}"):
        section(steps=1, **{key: value})
    assert getattr(section(steps=1, schedule="cosine", **{key: value}), key) == value
    constant = section(steps=1)
    assert section(**constant.model_dump()) == constant  # with every default written out


def test_a_transformer_s_recipe_holds_windows_where_there_are_any() -> None:
    def recipe(**settings: Any) -> dict[str, Any]:
        return TrainDitSection(steps=5, **settings).in_recipe()

    assert recipe(window_parts=3) == recipe()
    assert recipe(window_parts=3, shuffle="windowed") != recipe(shuffle="windowed")


def test_a_sampler_s_recipe_holds_its_own_options_alone() -> None:
    shared = {"num_images", "classes", "seed", "sampler", "guidance_scale", "guidance_interval"}
    shared |= {"weights", "batch_size", "precision"}
    stochastic = {"num_steps", "diffusion_form", "diffusion_norm", "last_step", "last_step_size"}
    own = {"euler": {"num_steps"}, "heun": {"num_steps"}, "adaptive": {"atol", "rtol"}, "sde": stochastic}
    for sampler, options in own.items():
        section = SampleSection(sampler=sampler)
        assert set(section.in_recipe()) == shared | options
        assert SampleSection(**section.model_dump()) == section  # with every default written out


def test_one_and_one_point_zero_are_one_recipe() -> None:
    assert TrainDecoderSection(steps=5, lr=1).in_recipe() == TrainDecoderSection(steps=5, lr=1.0).in_recipe()
    assert '"lr":1.0' in TrainDecoderSection(steps=5, lr=1).model_dump_json()


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_a_size_is_the_numbers_that_it_stands_for(size: str) -> None:
    numbers = TrainDecoderSection(steps=1, **VIT_SIZES[size])
    assert TrainDecoderSection(steps=1, size=size) == numbers
    assert TrainDecoderSection(steps=1, size=size).in_recipe() == numbers.in_recipe()
    assert "size" not in numbers.in_recipe()
    for model, sizes in DIT_SIZES.items():
        given = {"steps": 1, "model": model}
        assert TrainDitSection(**given, size=size).in_recipe() == TrainDitSection(**given, **sizes[size]).in_recipe()


def test_the_transformer_s_sizes_are_the_body_s_and_the_head_s() -> None:
    section = TrainDitSection(steps=1, size="L")
    assert (section.hidden_size, section.depth, section.num_heads) == ((1024, 2048), (24, 2), (16, 16))
    plain = TrainDitSection(steps=1, size="L", model="LightningDiT")
    assert (plain.hidden_size, plain.depth, plain.num_heads) == ((1024,), (24,), (16,))


def test_sizes_without_a_name_stay_and_null_takes_one_back() -> None:
    free = TrainDecoderSection(steps=1, size=None, hidden_size=36, depth=1, num_heads=9, intermediate_size=5)
    assert (free.hidden_size, free.intermediate_size) == (36, 5)
    taken_back = {"hidden_size": None, "depth": None, "num_heads": None}
    assert TrainDitSection(steps=1, size="B", **taken_back) == TrainDitSection(steps=1, size="B")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "XXL"}, r"there is no `size` XXL \(did you mean `XL`\?\): it is one of S, B, L, XL"),
        ({"size": "l"}, r"did you mean `L`"),
        ({"size": ["S"]}, r"there is no `size` \['S'\]"),
        ({"size": "S", "depth": 12}, "`size` S says what `depth` is"),
    ],
)
@pytest.mark.parametrize("section", [TrainDecoderSection, TrainDitSection])
def test_a_size_that_says_nothing_or_too_much_is_refused(
    section: type[TrainDecoderSection | TrainDitSection], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        section(steps=1, **settings)
