"""Which trained models belong together: a decoder with a transformer or an encoder, a guide with a transformer."""

from rae.stages.models.saving import digest_weights
from rae.stages.models.trained import Dit
from rae.store.errors import StaleInput
from rae.store.manifest import Json, differing_fields

# What two encoders must share for one's latents to be read by a decoder trained on the other's.
_SAME_TOKENS = ("feature_index", "input_size", "token_dim", "grid")


def check_compatible(maker: Json, decoder: Json, who: str = "the transformer") -> None:
    """Refuse a decoder that reads other tokens than `who` makes; both are encoders' descriptions.

    Where one of them does not know its encoder's digest, their names are compared.
    """
    verified = all(one.get("digest") for one in (maker, decoder))
    asked, found = (_identity(one, verified) for one in (maker, decoder))
    if fields := "; ".join(differing_fields(asked, found, "encoder")):
        raise StaleInput(f"the decoder reads other latents than {who} makes ({fields})")


def check_guide(dit: Dit, guide: Dit) -> None:
    """Refuse a guide whose predictions mean something else than the transformer's at the same x, t and y.

    Both must predict the same thing on the same path, of latents whitened alike, for the same classes, whose names are
    compared where both know them. Sizes, losses and times of training may differ.
    """
    named = dit.about.classes is not None and guide.about.classes is not None
    asked, found = (_meaning(one, named) for one in (dit, guide))
    if fields := "; ".join(differing_fields(asked, found)):
        raise StaleInput(f"the guide was trained on something else than the transformer that it guides ({fields})")


def _meaning(dit: Dit, named: bool) -> Json:
    transport = dit.about.create_transport()
    return {
        "path_type": transport.path_type,
        "prediction": transport.prediction,
        "latent_shape": list(dit.latent_shape),
        "latent_stats": digest_weights({"mean": dit.mean, "var": dit.var})[:16],
        "num_classes": dit.num_classes,
        "conditioning_dim": dit.config.conditioning_dim,
        "classes": list(dit.about.classes or ()) if named else None,
    }


def _identity(encoder: Json, verified: bool) -> Json:
    # A folder goes by its last part, so that a hub id and a copy of it are one.
    weights = {"digest": encoder["digest"]} if verified else {"name": str(encoder.get("name")).rpartition("/")[2]}
    return weights | {key: encoder.get(key) for key in _SAME_TOKENS}
