"""Reads a Hugging Face safetensors checkpoint one expert at a time, and only the bytes of that expert."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from elastic_moe.errors import CheckpointError
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.weights.conversion import Conversion, target_dtypes
from elastic_moe.weights.copies import Copy, find_copies
from elastic_moe.weights.lanes import Lane, Part
from elastic_moe.weights.plan import Access, Step, make_plan
from elastic_moe.weights.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CheckpointReader:
    """Every tensor of a checkpoint, converted as `from_pretrained` does, the experts one by one.

    A context manager; experts may be read by several threads at once. An expert whose tensors are only put beside each
    other (see `copies`) is read right into its place, by way of a slice of pinned memory if that is on a GPU; any
    other takes memory of its own size in each thread. The exception is a conversion that mixes experts: then the whole
    layer is read for each of them, as `bytes_per_expert` tells.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        model: built by transformers, with its original experts modules, best on the meta device; it is not kept.
        experts: layout by the qualified name of each experts module, e.g. `model.layers.3.mlp.experts`.

    Attributes:
        unexpected: names in the checkpoint that the model has no use for.
        missing: names in the model's state dict that the checkpoint lacks and, by the model's own word, may lack
            (tied weights are not among them).

    Raises:
        CheckpointError: quantised; a file is missing or unreadable; a tensor is missing or does not fit.
        ValueError: a layout is not that of the model.
    """

    def __init__(self, folder: str | Path, model: "PreTrainedModel", experts: Mapping[str, ExpertLayout]) -> None:
        self.folder = Path(folder)
        _refuse_quantised(self.folder)
        self._layouts = dict(experts)
        self._conversion = Conversion(model)
        self._dtypes = target_dtypes(model)
        self._shards = Shards(self.folder)
        self.fingerprint = self._shards.fingerprint
        """See `Shards.fingerprint`."""
        try:
            self._plan = make_plan(self._conversion, self._shards, self._layouts, model)
        except BaseException:
            self._shards.close()
            raise
        self._lane = Lane()
        self._known: dict[object, tuple[Copy, ...] | None] = {}
        """Copies of conversions that were tried: those of all layers are alike."""
        self._copies = {module: [*map(self._find_copies, self._steps(module))] for module in self._layouts}
        self._expert_bytes = {module: sum(map(self._num_bytes, self._steps(module))) for module in self._layouts}
        self.unexpected = self._plan.unexpected
        self.missing = self._plan.missing

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Tensors already read stay valid."""
        self._shards.close()

    def on_slice(self, act: Callable[[], None]) -> None:
        """Have `act` called with every slice of a file that is read, in the thread that reads."""
        self._shards.on_slice = act

    @property
    def bytes_read(self) -> int:
        """Bytes read from the checkpoint so far."""
        return self._shards.bytes_read

    @property
    def bytes_total_dense(self) -> int:
        """Bytes that a full `read_dense` reads."""
        return sum(self._num_bytes(step) for step in self._plan.dense)

    def bytes_per_expert(self, module: str) -> int:
        """Bytes that `read_expert` reads for one expert of `module`: the same for all of them."""
        self._steps(module)
        return self._expert_bytes[module]

    def dense_names(self) -> tuple[str, ...]:
        """The names that `read_dense` yields, in its order."""
        return tuple(name for step in self._plan.dense for name in step.made)

    def read_expert(self, module: str, expert: int, out: Sequence[torch.Tensor]) -> int:
        """Read one logical expert into `out`, casting where needed. From any thread.

        Args:
            module: a key of `experts`.
            expert: 0 to E - 1.
            out: one tensor for each name of the layout, of the per-expert shape, on any device, of any dtype.

        Returns:
            Bytes read from the checkpoint.

        Raises:
            CheckpointError: the file cannot be read.
            ValueError: an argument does not fit the layout.
        """
        steps, layout = self._steps(module), self._layouts[module]
        if not 0 <= expert < layout.num_experts:
            raise ValueError(f"expert {expert} of {module} is not in 0..{layout.num_experts - 1}")
        shapes = tuple(tuple(tensor.shape) for tensor in out)
        if shapes != layout.shapes:
            raise ValueError(f"out has shapes {shapes}, but an expert of {module} has {layout.shapes}")
        place = {
            f"{module}.{name}": tensor.detach() if tensor.requires_grad else tensor
            for name, tensor in zip(layout.names, out, strict=True)
        }
        straight: list[Part] = []
        for step, copies in zip(steps, self._copies[module], strict=True):
            if copies is not None:
                parts = step.parts(expert)
                straight += [
                    Part(*parts[copy.pattern][copy.position], into[copy.region] if copy.is_part else into)
                    for copy in copies
                    if (into := place.get(step.made[copy.target])) is not None
                ]
                continue
            whole = step.access is Access.WHOLE
            made = self._make(step, expert, self._conversion.targets if whole else self._plan.single)
            for name in made.keys() & place.keys():
                place[name].copy_(made[name][expert if whole else 0])
        self._lane.read(self._shards, straight)
        return self.bytes_per_expert(module)

    def read_dense(
        self, device: torch.device | str = "cpu", but: Collection[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what is not an expert's, parameters and persistent buffers, one at a time, in the order of the files.

        Args:
            device: where the tensors are put.
            but: names to leave out.

        Yields:
            Name in the model's state dict, and a tensor with memory of its own in the dtype that `from_pretrained`
            gives it.

        Raises:
            CheckpointError: a file cannot be read.
        """
        for step in self._plan.dense:
            wanted = [name for name in step.made if name not in but]
            if not wanted:
                continue
            made = self._make(step, None, self._conversion.targets)
            for name in wanted:
                dtype = self._dtypes[name]
                yield name, made.pop(name).to(device, dtype, copy=True, memory_format=torch.contiguous_format)

    def _steps(self, module: str) -> list[Step]:
        if module not in self._layouts:
            raise ValueError(f"{module!r} is not an experts module of this reader: {', '.join(self._layouts)}")
        return self._plan.experts[module]

    def _find_copies(self, step: Step) -> tuple[Copy, ...] | None:
        if step.access is Access.WHOLE:
            return None
        parts = step.parts(0)
        shapes = {
            pattern: [
                self._shards.shape(name) if index is None else (1, *self._shards.shape(name)[1:])
                for name, index in group
            ]
            for pattern, group in parts.items()
        }
        key = id(step.recipe.converter), repr(shapes)
        if key not in self._known:
            self._known[key] = find_copies(
                shapes, lambda tensors: self._conversion.run(step.recipe, tensors, self._plan.single)
            )
        return self._known[key]

    def _make(self, step: Step, expert: int | None, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {p: [self._shards.read(*part) for part in group] for p, group in step.parts(expert).items()}
        return self._conversion.run(step.recipe, tensors, targets)

    def _num_bytes(self, step: Step) -> int:
        return sum(self._shards.num_bytes(*part) for group in step.parts(0).values() for part in group)


def _refuse_quantised(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text())
        quantisation = config.get("quantization_config") or config.get("compression_config")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: {error!r}") from error
    if quantisation:
        method = quantisation.get("quant_method", "of an unnamed method")
        raise CheckpointError(f"quantised checkpoints are not supported yet: {method}; give a bf16 one ({folder})")
