"""What does not fit together is refused before the first token; what nobody reads refuses nothing."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml

from ttt_lit.train.checks import check_callbacks

BASE = Path(__file__).parents[2] / "configs" / "base.yaml"


def base_callbacks():
    """As configs/base.yaml lists them."""
    paths = [one["class_path"].rsplit(".", 1) for one in yaml.safe_load(BASE.read_text())["trainer"]["callbacks"]]
    return [getattr(import_module(module), name)() for module, name in paths]


@pytest.mark.parametrize("name", ["StartValidation", "DamageLog", "PeriodicEvaluation"])
def test_a_list_without_a_callback_that_a_setting_needs_is_refused(name):
    """Without these ``damage_blocks`` or ``every_share`` would be accepted and ignored, or a run would end late."""
    callbacks = base_callbacks()
    check_callbacks(callbacks)
    (here,) = (one for one in callbacks if type(one).__name__ == name)
    others = [one for one in callbacks if one is not here]
    for wrong in (others, [*others, here]):
        with pytest.raises(ValueError, match=f"^trainer.callbacks: got .*, expected .*{name}, .* in this order; add "):
            check_callbacks(wrong)
