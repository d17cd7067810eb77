"""Image classifiers: any timm model, and the cross-entropy they are trained with."""

import difflib

import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import BadInput
from lib.params import Model


def build(
    model: Model, num_classes: int, pretrained: bool, input_size: tuple[int, int] | None = None
) -> nn.Module:
    """A timm model with a head of `num_classes`; (B, C, H, W) to logits (B, num_classes).

    Networks of a fixed input size (most transformers) are built for `input_size` (height, width).

    Raises BadInput: an unknown name, an option the model does not have, weights that cannot be
    fetched.
    """
    import timm

    if not timm.is_model(model.name):
        near = difflib.get_close_matches(model.name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise BadInput(f"model.name: timm has no model {model.name!r}{hint}")
    options: dict[str, object] = {}
    if model.drop_path_rate:
        options["drop_path_rate"] = model.drop_path_rate
    try:
        config = timm.get_pretrained_cfg(model.name, allow_unregistered=True)
        if input_size and config is not None and config.fixed_input_size:
            options["img_size"] = input_size  # its positions are learnt for one size
        return timm.create_model(
            model.name,
            pretrained=pretrained,
            num_classes=num_classes,
            in_chans=model.in_chans,
            drop_rate=model.drop_rate,
            **options,
        )
    except TypeError as error:
        raise BadInput(f"model: {model.name} does not take one of these keys: {error}") from None
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not pretrained:
            raise BadInput(f"model: timm cannot build {model.name}: {reason}") from None
        raise BadInput(
            f"model.pretrained: the weights of {model.name} cannot be fetched ({reason}); "
            "check the network, or give a file as model.weights"
        ) from None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    mixed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean cross-entropy in nats; of a mixed batch, each label's by its share.

    logits: (B, K). labels: (B,). mixed: the partners' labels (B,) and own shares (B,).
    """
    if mixed is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    partner_labels, share = mixed
    own, partner = (
        F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")
        for target in (labels, partner_labels)
    )
    return (share * own + (1 - share) * partner).mean()
