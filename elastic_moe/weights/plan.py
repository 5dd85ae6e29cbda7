"""What to read of a checkpoint for which tensor, worked out and checked from the headers alone."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from elastic_moe.errors import CheckpointError
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.weights.conversion import Conversion, Recipe, Source, merges_experts, treats_experts_alone
from elastic_moe.weights.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


OF_QUANTISED = (
    *("scale", "scale_inv", "scales", "scale_2", "zero_point", "zeros"),
    *("qweight", "qzeros", "g_idx", "absmax", "quant_map", "quant_state", "weight_packed", "_blocks"),
)
"""How the names of what quantised weights need end."""
MIN_FLOAT_BYTES = 2


class Access(Enum):
    """How one expert is taken out of what its recipe needs."""

    NUMBERED = "tensors of its own"
    STACKED = "its part of tensors stacked by expert"
    WHOLE = "its part of the result, after converting all experts"


@dataclass(frozen=True)
class Step:
    """One recipe, and what it makes.

    Attributes:
        recipe: the checkpoint tensors and their conversion.
        made: names in the model's state dict.
        access: None for a dense recipe.
    """

    recipe: Recipe
    made: tuple[str, ...]
    access: Access | None = None

    def parts(self, expert: int | None = None) -> dict[str, list[tuple[str, int | None]]]:
        """By source pattern: the tensors to read, each whole (None) or at an index of its first dimension."""
        index = expert if self.access is Access.STACKED else None
        sources = (
            self.recipe.sources if self.access is not Access.NUMBERED or expert is None else self._of_expert[expert]
        )
        return {pattern: [(source.name, index) for source in group] for pattern, group in sources.items()}

    @cached_property
    def _of_expert(self) -> dict[int | None, dict[str, list[Source]]]:
        """Numbered sources by their number."""
        of: dict[int | None, dict[str, list[Source]]] = {}
        for pattern, group in self.recipe.sources.items():
            for source in group:
                of.setdefault(source.number, {}).setdefault(pattern, []).append(source)
        return of


@dataclass(frozen=True)
class ReadPlan:
    """All steps for one model and one checkpoint.

    Attributes:
        experts: by experts module.
        dense: the rest, in the order of the files.
        unexpected: names in the checkpoint that the model has no use for.
        missing: names in the model that the checkpoint lacks, and may lack; tied ones are not among them.
        single: the model's tensors (meta), those of experts with one expert only.
    """

    experts: dict[str, list[Step]]
    dense: list[Step]
    unexpected: tuple[str, ...]
    missing: frozenset[str]
    single: dict[str, torch.Tensor]


def make_plan(
    conversion: Conversion, shards: Shards, layouts: Mapping[str, ExpertLayout], model: "PreTrainedModel"
) -> ReadPlan:
    """Plan how to read `shards` for `model`.

    Raises:
        CheckpointError: a tensor is missing or does not fit.
        ValueError: a layout is not that of the model.
    """
    module_of = _expert_targets(conversion.targets, layouts)
    single = conversion.targets | {name: conversion.targets[name][:1] for name in module_of}
    recipes, unexpected = conversion.plan(shards.names)
    _refuse_scales(unexpected, shards)
    experts: dict[str, list[Step]] = {module: [] for module in layouts}
    dense: list[Step] = []
    for recipe in recipes:
        module = module_of.get(recipe.target)
        access = None if module is None else _access(recipe, shards, layouts[module].num_experts)
        expected = single if access in (Access.NUMBERED, Access.STACKED) else conversion.targets
        step = _checked(Step(recipe, (), access), conversion, shards, expected)
        if len({name in module_of for name in step.made}) > 1:
            raise CheckpointError(f"{recipe.names[0]} makes both expert and dense tensors: {', '.join(step.made)}")
        if module is None:
            dense.append(step)
        else:
            for owner in sorted({module_of[name] for name in step.made}):
                experts[owner].append(step)
    dense.sort(key=lambda step: min(map(shards.place, step.recipe.names)))
    made = {name for steps in (dense, *experts.values()) for step in steps for name in step.made}
    missing = _allowed_missing(model, conversion.targets.keys() - made, module_of)
    return ReadPlan(experts, dense, tuple(unexpected), missing, single)


def _expert_targets(targets: Mapping[str, torch.Tensor], layouts: Mapping[str, ExpertLayout]) -> dict[str, str]:
    """Module by state dict name, for every expert tensor."""
    module_of: dict[str, str] = {}
    for module, layout in layouts.items():
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            target = targets.get(f"{module}.{name}")
            if target is None or tuple(target.shape) != (layout.num_experts, *shape):
                found = "nothing" if target is None else tuple(target.shape)
                raise ValueError(
                    f"the layout of {module} has {name} of {(layout.num_experts, *shape)}, the model has {found}"
                )
            module_of[f"{module}.{name}"] = module
    return module_of


def _access(recipe: Recipe, shards: Shards, num_experts: int) -> Access:
    """The cheapest way to one expert.

    Raises:
        CheckpointError: an expert is missing, or there is one too many, or they differ in shape.
    """
    if merges_experts(recipe):
        for pattern, group in recipe.sources.items():
            numbers = {source.number for source in group}
            wrong = sorted(numbers.symmetric_difference(range(num_experts)), key=str)
            if wrong or len(group) != num_experts:
                state = "missing" if wrong and wrong[0] not in numbers else "one too many"
                which = wrong[0] if wrong else "one"
                raise CheckpointError(f"{recipe.target}: expert {which} of {num_experts} is {state} (for {pattern!r})")
            shapes = {shards.shape(source.name): source.name for source in group}
            if len(shapes) > 1:
                raise CheckpointError(f"{recipe.target}: experts differ in shape: {shapes}")
        return Access.NUMBERED
    stacked = all(shards.shape(name)[:1] == (num_experts,) for name in recipe.names)
    return Access.STACKED if stacked and treats_experts_alone(recipe) else Access.WHOLE


def _checked(step: Step, conversion: Conversion, shards: Shards, expected: Mapping[str, torch.Tensor]) -> Step:
    """Run the step on the meta device to see what it makes.

    Raises:
        CheckpointError: the result is not what `expected` has.
    """
    source = _source(step.recipe)
    for name in step.recipe.names:
        _refuse_dtype(name, step.recipe, shards, expected)
    tensors = {p: [_blank(shards, *part) for part in group] for p, group in step.parts(0).items()}
    try:
        made = conversion.run(step.recipe, tensors, expected)
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{step.recipe.target} cannot be made of {source}: {error}") from error
    for name, tensor in made.items():
        if name not in expected:
            raise CheckpointError(f"{source} makes {name}, which the model does not have")
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint ({source}), but the model needs "
                f"{tuple(expected[name].shape)}"
            )
    return replace(step, made=tuple(made))


def _refuse_scales(unexpected: Iterable[str], shards: Shards) -> None:
    """What a quantised checkpoint has beside its weights must not be left out in silence; what belongs to modules that
    the model does not have may.

    Raises:
        CheckpointError: there is such a tensor.
    """
    used = {name.rpartition(".")[0] for name in set(shards.names) - set(unexpected)}
    for name in unexpected:
        owner, _, last = name.rpartition(".")
        if owner in used and last.endswith(OF_QUANTISED):
            raise CheckpointError(
                f"{name} in {shards.where(name)}: the weights are quantised, though config.json has no "
                "quantization_config; give a checkpoint in bfloat16, float16 or float32"
            )


def _refuse_dtype(name: str, recipe: Recipe, shards: Shards, expected: Mapping[str, torch.Tensor]) -> None:
    """Integers and 8-bit floats are no weights by themselves: they need the scale they were divided by.

    Raises:
        CheckpointError: the model has a float of 16 bits or more where the checkpoint has such.
    """
    target, dtype = expected.get(recipe.target), shards.dtype(name)
    is_weight = target is None or target.is_floating_point()
    if is_weight and (dtype is None or not dtype.is_floating_point or dtype.itemsize < MIN_FLOAT_BYTES):
        raise CheckpointError(
            f"{name} in {shards.where(name)} is {str(dtype).removeprefix('torch.')}, where the model has a float: the "
            "weights are quantised, and config.json does not say how; give a checkpoint in bfloat16, float16 or float32"
        )


def _source(recipe: Recipe) -> str:
    """What the recipe is made of, in short, and what it lacks."""
    others = f" and {len(recipe.names) - 1} more" if len(recipe.names) > 1 else ""
    patterns = recipe.converter.source_patterns if recipe.converter else []
    lacking = "".join(f", nothing for {pattern!r}" for pattern in patterns if pattern not in recipe.sources)
    return f"{recipe.names[0]}{others}{lacking}"


def _blank(shards: Shards, name: str, index: int | None) -> torch.Tensor:
    shape = shards.shape(name)
    return torch.empty(shape if index is None else (1, *shape[1:]), device="meta")


def _allowed_missing(model: "PreTrainedModel", absent: Iterable[str], experts: Collection[str]) -> frozenset[str]:
    """Those of `absent` that the model allows to be absent, without those tied to a tensor that is there. No tensor of
    `experts` may be.

    Raises:
        CheckpointError: there are others.
    """
    absent = set(absent)
    tied: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, {source}).add(target)
    for group in tied.values():
        if not group <= absent:
            absent -= group
    patterns = model._keys_to_ignore_on_load_missing or ()
    needed = sorted(
        name for name in absent if name in experts or not any(re.search(pattern, name) for pattern in patterns)
    )
    if needed:
        shown = ", ".join(needed[:4]) + (", ..." if len(needed) > 4 else "")
        raise CheckpointError(f"the checkpoint lacks {len(needed)} tensors of the model: {shown}")
    return frozenset(absent)
