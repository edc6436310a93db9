"""What the rest of the package may ask of a checkpoint family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ttt_lit.families.keys import RenameRules
from ttt_lit.model.spec import ModelSpec

ReadConfig = Callable[[Mapping[str, Any]], ModelSpec]
WriteConfig = Callable[[ModelSpec, Mapping[str, Any] | None], dict[str, Any]]
Shapes = dict[str, tuple[int, ...]]
Layout = Literal["same", "transposed", "paired_rows", "paired_vector"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one of our parameters lives in the family's checkpoint and how to read it from there."""

    key: str
    """Stored name."""
    index: int | None = None
    """Position on axis 0 where several layers share one stored tensor. None: the whole tensor."""
    layout: Layout = "same"
    """How the stored values are arranged: ``transposed`` is (in, out); the ``paired`` ones are rotated by RoPE in
    adjacent pairs, as transposed projection (``paired_rows``) or as a vector over the head (``paired_vector``)."""
    heads: int = 1
    """Heads along the rotated axis, for the ``paired`` layouts."""

    def to_ours(self, stored: torch.Tensor) -> torch.Tensor:
        """Our parameter from the stored tensor (the layer's own slice, without axis 0)."""
        if self.layout in ("transposed", "paired_rows"):
            stored = stored.t()
        return _halves_from_pairs(stored, self.heads) if self.layout.startswith("paired") else stored

    def to_theirs(self, ours: torch.Tensor) -> torch.Tensor:
        """Inverse of ``to_ours``."""
        if self.layout.startswith("paired"):
            ours = _pairs_from_halves(ours, self.heads)
        return ours.t() if self.layout in ("transposed", "paired_rows") else ours


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint."""

    name: str
    """Name in the table of families and in our checkpoint folder."""
    model_types: tuple[str, ...]
    """Values of ``model_type`` in config.json that belong to this family."""
    spec_from_config: ReadConfig
    """Parsed config.json -> spec. Refuses, by field name, what it does not implement."""
    config_from_spec: WriteConfig | None
    """Spec and the config it came from (or None) -> config.json. None: the family has no Hugging Face model class."""
    stored_shapes: Callable[[ModelSpec], Shapes]
    """Every tensor that a checkpoint of this spec must hold, by stored name."""
    sources: Callable[[ModelSpec], dict[str, Source]]
    """Our parameter -> where it is stored, for every name in ``spec.parameter_shapes()``."""
    dropped: Callable[[ModelSpec], dict[str, str]]
    """Stored names that may be present although the spec has no use for them, with the reason."""
    head_key: str | None
    """Stored name of the output head, which a tied checkpoint may hold as a copy of the embedding. None: never."""
    default_positions: int = 0
    """``max_position_embeddings`` that a config.json without the field stands for."""
    refused_by_vllm: Callable[[ModelSpec], list[str]] = lambda _: []
    """What vLLM's class of this model type does not run although transformers does, one entry each for an error message."""


def renamed_family(
    *,
    name: str,
    model_types: tuple[str, ...],
    rules: RenameRules,
    spec_from_config: ReadConfig,
    config_from_spec: WriteConfig,
    default_positions: int,
    refused_by_vllm: Callable[[ModelSpec], list[str]] = lambda _: [],
) -> Family:
    """A family that stores each of our parameters as one tensor of the same shape, under another name."""

    def sources(spec: ModelSpec) -> dict[str, Source]:
        return {ours: Source(key=theirs) for ours, theirs in rules.map_to_theirs(spec.parameter_shapes()).items()}

    def stored_shapes(spec: ModelSpec) -> Shapes:
        shapes = spec.parameter_shapes()
        return {source.key: shapes[ours] for ours, source in sources(spec).items()}

    return Family(
        name=name,
        model_types=model_types,
        spec_from_config=spec_from_config,
        config_from_spec=config_from_spec,
        stored_shapes=stored_shapes,
        sources=sources,
        dropped=lambda _: {},
        head_key=rules.to_theirs("lm_head.weight"),
        default_positions=default_positions,
        refused_by_vllm=refused_by_vllm,
    )


def _halves_from_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Axis 0 from adjacent RoPE pairs (0, 1), (2, 3), ... to half-split pairs (i, i + d/2), head by head."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _pairs_from_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
