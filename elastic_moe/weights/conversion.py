"""Which checkpoint tensors make which tensors of the model, by transformers' own conversion mapping.

The flow is that of `transformers.core_model_loading.convert_and_load_state_dict_in_model`, cut in two: `plan` needs
only the names, `run` only the tensors of one target.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Source(NamedTuple):
    """A checkpoint tensor, and the number that stands for the `*` of the pattern it matched (None: there is none)."""

    name: str
    number: int | None


@dataclass(frozen=True)
class Recipe:
    """How checkpoint tensors make the model's `target` (a converter may make more than this one).

    Attributes:
        target: name in the model's state dict.
        converter: None when the one source is only renamed.
        sources: by the converter's source pattern, in transformers' order.
    """

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[Source]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All checkpoint tensors it takes."""
        return [source.name for group in self.sources.values() for source in group]


class Conversion:
    """The conversion mapping of one model.

    Args:
        model: with its original modules; it may be on the meta device. Nothing of it is kept but its config.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self._config = model.config
        self.targets = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}

    def plan(self, names: Iterable[str]) -> tuple[list[Recipe], list[str]]:
        """Recipes for what the checkpoint holds, and the checkpoint names that the model has no use for."""
        recipes: dict[str, Recipe] = {}
        unexpected: list[str] = []
        for name in sorted(names, key=dot_natural_key):
            target, pattern, number = self._rename(name)
            if target not in self.targets:
                unexpected.append(name)
                continue
            converter = None if pattern is None else self._by_pattern[pattern]
            recipe = recipes.setdefault(target, Recipe(target, converter))
            second = recipe.converter is None and bool(recipe.sources)
            if second or (recipe.converter is None) != (converter is None):
                unexpected.append(name)  # the target is already made in another way: the first one wins
                continue
            recipe.sources.setdefault(pattern or name, []).append(Source(name, number))
        return list(recipes.values()), unexpected

    def _rename(self, name: str) -> tuple[str, str | None, int | None]:
        renamed = apply_renamings(name, self._renamings)
        target, pattern = rename_source_key(renamed, [], self._converters, self._prefix, self.targets)
        if target not in self.targets and name in self.targets:
            target, pattern = rename_source_key(name, [], [], self._prefix, self.targets)
        return target, pattern, None if pattern is None else _number(pattern, renamed)

    def run(
        self, recipe: Recipe, tensors: Mapping[str, list[torch.Tensor]], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Run the recipe's operations on `tensors` (by source pattern).

        Args:
            recipe: from `plan`.
            tensors: of any device, meta included.
            targets: where an operation looks up the shape of what it makes.

        Returns:
            The tensors made, by their name in the model's state dict; the dtypes are those of `tensors`.
        """
        if recipe.converter is None:
            ((tensor,),) = tensors.values()
            return {recipe.target: tensor}
        converter = deepcopy(recipe.converter)  # it collects tensors in itself
        converter.collected_tensors.update(tensors)  # pyright: ignore[reportArgumentType, reportCallIssue]
        model = cast("PreTrainedModel", _Shapes(targets))
        made = converter.convert(recipe.target, model=model, config=self._config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class _Shapes:
    """Stands in for the model in an operation, which asks it for shapes only."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._targets = targets

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._targets[name]


def _number(pattern: str, name: str) -> int | None:
    """What stands for the one `*` of a converter's pattern."""
    if pattern.count("*.") != 1:
        return None
    match = re.search(pattern.replace("*.", r"(?P<number>\d+)\."), name)
    return int(match["number"]) if match else None


def merges_experts(recipe: Recipe) -> bool:
    """Whether the recipe stacks numbered tensors, one for each expert, and then treats each expert by itself."""
    if recipe.converter is None:
        return False
    first, *others = recipe.converter.operations
    numbered = all(source.number is not None for group in recipe.sources.values() for source in group)
    return numbered and isinstance(first, MergeModulelist) and first.dim == 0 and all(map(_keeps_first_dim, others))


def treats_experts_alone(recipe: Recipe) -> bool:
    """Whether the recipe, given tensors stacked by expert, treats each expert by itself."""
    single = all(len(group) == 1 for group in recipe.sources.values())
    return single and (recipe.converter is None or all(map(_keeps_first_dim, recipe.converter.operations)))


def _keeps_first_dim(operation: ConversionOps) -> bool:
    """An operation that says which dimensions it acts on, none of them the first (nor counted from the last)."""
    dims = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
    stacks = isinstance(operation, MergeModulelist)
    return bool(dims) and not stacks and all(dim > 0 for dim in dims)


def target_dtypes(model: "PreTrainedModel") -> dict[str, torch.dtype]:
    """The dtype that `from_pretrained` gives each tensor of the state dict: the model's own, but float32 where the
    model asks to keep it (`_keep_in_fp32_modules`)."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    plan = model._get_dtype_plan(model.dtype)
    if plan:
        pattern, globs, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            if (match := pattern.search(name)) and match.lastgroup:
                dtypes[name] = plan[globs[match.lastgroup]]
    return dtypes
