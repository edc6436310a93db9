"""What the rest of the package may ask of a checkpoint family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ttt_lit.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of Hugging Face checkpoint: each of our parameters is one stored tensor of the same shape."""

    name: str
    """Name in the table of families and in our checkpoint folder."""
    config_class: type[PreTrainedConfig]
    """transformers' class of the config.json."""
    spec_from_config: Callable[[Mapping[str, Any]], ModelSpec]
    """Parsed config.json -> spec. Refuses, by key, what it does not implement."""
    not_expressible: Callable[[ModelSpec], list[str]]
    """What this family's models cannot be, one entry each for an error message."""
    write: Callable[[ModelSpec, dict[str, Any]], None]
    """Puts the fields of the spec into a config and removes those that would contradict them."""
    stored_name: Callable[[str], str]
    """Our parameter name -> its name in the family's checkpoints."""
    refused_by_vllm: Callable[[ModelSpec], list[str]] = lambda _: []
    """What vLLM's class of this model type does not run although transformers does, one entry each for an error message."""

    @property
    def model_type(self) -> str:
        """Value of ``model_type`` in config.json."""
        return self.config_class.model_type

    @property
    def default_positions(self) -> int:
        """``max_position_embeddings`` that a config.json without the field stands for."""
        return int(self.config_class().max_position_embeddings)

    def stored_names(self, spec: ModelSpec) -> dict[str, str]:
        """Our parameter -> its stored name, for every name in ``spec.parameter_shapes()``."""
        return {name: self.stored_name(name) for name in spec.parameter_shapes()}

    def config_from_spec(self, spec: ModelSpec, source: Mapping[str, Any] | None) -> dict[str, Any]:
        """config.json for ``spec``; a ``source`` that still means the same model is kept as it is, and fields that still hold are.

        Raises:
            ValueError: something that a model of this family cannot be; the message lists it all.
        """
        if spec.score_scale == spec.head_dim**-0.5:
            spec = dataclasses.replace(spec, score_scale=None)
        if problems := self.not_expressible(spec):
            raise ValueError(f"a {self.model_type} config.json cannot express: " + "; ".join(problems))
        config = dict(source or {})
        # The code it points to is not part of a checkpoint folder.
        config.pop("auto_map", None)
        if source is not None and self.spec_from_config(config) == spec:
            return config
        config["model_type"] = self.model_type
        self.write(spec, config)
        if self.spec_from_config(config) != spec:
            raise ValueError("the exported config.json would mean another model: this is a defect, please report it")
        return config
