"""The bank itself: adapters by name, and one call that answers every image with the adapter that is named for it."""

import contextlib
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.adapters.directory import Adapted, check_canary
from visgraft.adapters.hub import resolve
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import Backbone, create_backbone
from visgraft.bank.configuration import Configuration, configuration_key
from visgraft.bank.ground import FrozenBackbone, HeadKind
from visgraft.bank.grouping import adapter_tensors, grouped, mixed_forward, tiles
from visgraft.bank.held import BankAdapter, Held, Shelf
from visgraft.bank.reading import read_adapter
from visgraft.bank.trees import Compile, MixedTree, UniformTree
from visgraft.core.fitting import check_shape
from visgraft.data.decode import open_image
from visgraft.data.tasks import LabelTask
from visgraft.data.urls import path_or_url
from visgraft.errors import DataError, VisgraftError, nearest
from visgraft.measure.evaluation import answers_of
from visgraft.measure.precision import Compute, resolve_precision

MOST_TREES = 64
"""Combinations of configurations for which modules are kept ready; the ones used longest ago are made anew."""


class BankAnswer(NamedTuple):
    """What an adapter says of an image: `logits` [outputs], in the order of `classes` (empty: not named).

    `tasks` are what the outputs answer where that is not one label.
    """

    adapter: str
    logits: Tensor
    classes: tuple[str, ...]
    multi_label: bool
    tasks: tuple[LabelTask, ...] = ()

    @property
    def probabilities(self) -> Tensor:
        """The probability of each output [outputs]: over all, or of each alone where an image may have several.

        With `tasks`, over the classes of each; in place of a number's output stands the number, in its unit.
        """
        return answers_of(self.logits.float(), self.tasks, self.multi_label)


class BankMemory(NamedTuple):
    """Bytes on the backbone's device: of its tensors, the adapters' and their heads'; and of the adapters `parked`.

    The backbone's are half as many again once an adapter has answered in bf16.
    """

    backbone: int
    adapters: int
    heads: int
    parked: int


class Bank:
    """Adapters of one frozen backbone by name; every image of a batch is answered with its own.

    The backbone's tensors are used where they are, not copied, so they must not be changed. Any number of threads may
    ask while one adds and removes: a call answers with the adapters that were there when it began.
    """

    def __init__(
        self, backbone: nn.Module | Backbone, *, capacity: int | None = None, compile: Compile | None = None
    ) -> None:
        """Hold a plain backbone, on the device and in the precision in which it answers.

        Args:
            backbone: a plain timm model, or where to get one.
            capacity: how many adapters are kept beside the backbone; the others are parked in host memory, or in files
                where the backbone is in host memory itself, and come back when they are asked for. None: all.
            compile: what to put around the modules, such as `torch.compile`; other adapters compile nothing anew.

        Raises:
            VisgraftError: something is attached to the backbone, it holds no data, or the capacity is below 1.
        """
        if capacity is not None and capacity < 1:
            raise VisgraftError(f"capacity is {capacity}, but must be at least 1")
        self._ground = FrozenBackbone(create_backbone(backbone) if isinstance(backbone, Backbone) else backbone)
        self._compile = compile
        self._shelf = Shelf(capacity, self._ground.device)
        self._adapters: dict[str, BankAdapter] = {}  # never changed, but replaced
        self._configurations: dict[str, Configuration] = {}
        self._heads: dict[Any, HeadKind] = {}
        self._shapes: set[torch.Size] = set()  # of images that the backbone takes
        self._trees: OrderedDict[Any, deque[Any]] = OrderedDict()
        self._writing, self._lending = threading.RLock(), threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which they were added."""
        return tuple(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def record(self, name: str) -> AdapterRecord:
        """Return all that is known of an adapter.

        Raises:
            VisgraftError: there is none of this name.
        """
        return _named(self._adapters, name).record

    def add(
        self, name: str, adapter: str | Path | Adapted | nn.Module, *, replace: bool = False, canary: bool = True
    ) -> None:
        """Take in an adapter; where it is refused, the bank stays as it was.

        Args:
            name: what it is called from now on.
            adapter: its directory, `hf:USER/NAME`, what `load` returns, or a model with something attached, of which
                the adapter's tensors are copied.
            replace: put it in place of one of the same name.
            canary: let an adapter from a directory answer its seeded picture, which takes a forward of one image.

        Raises:
            AdapterError: it is damaged, or was trained on another backbone.
            VisgraftError: the name is taken or empty.
        """
        with self._writing:
            self._check_free(name, replace)
            made = self.open(name, adapter)
            if canary and isinstance(adapter, str | Path):
                self._check(made, Path(adapter))
            self.put(made, replace=replace)

    def open(self, name: str, adapter: str | Path | Adapted | nn.Module) -> BankAdapter:
        """Return an adapter read and checked, but for its seeded picture, that the bank answers with but does not hold.

        Raises:
            AdapterError: it is damaged, or was trained on another backbone.
            VisgraftError: the name is empty.
        """
        if not isinstance(name, str) or not name:
            raise VisgraftError(f"an adapter's name must be a text that is not empty, not {name!r}")
        with self._writing:
            read = read_adapter(adapter, self._ground, self._configuration)
            head = self._heads.setdefault(read.head.key, read.head)
        rows = read.configuration.layout.flatten(read.tensors, self._ground.device)
        heads = head.layout.flatten(read.tensors, self._ground.device)
        precision = resolve_precision(read.record.precision)
        path = resolve(adapter).absolute() if isinstance(adapter, str | Path) else None
        return BankAdapter(name, read.record, read.configuration, head, precision, Held(rows, heads), path)

    def put(self, adapter: BankAdapter, *, replace: bool = False, pinned: bool = False) -> None:
        """Hold an adapter that `open` returned, under its name, from now on.

        Args:
            adapter: the adapter.
            replace: put it in place of one of the same name.
            pinned: never park it.

        Raises:
            VisgraftError: the name is taken.
        """
        with self._writing:
            self._check_free(adapter.name, replace)
            before = self._adapters.get(adapter.name)
            adapter.held.pinned = pinned
            self._shelf.put(adapter.held)
            self._adapters = {**self._adapters, adapter.name: adapter}
            if before is not None:
                self._shelf.drop(before.held)

    def adapter(self, name: str) -> BankAdapter:
        """Return an adapter itself, with which a call answers even where another has taken its name meanwhile.

        Raises:
            VisgraftError: there is none of this name.
        """
        return _named(self._adapters, name)

    def remove(self, name: str) -> None:
        """Let go of an adapter.

        Raises:
            VisgraftError: there is none of this name.
        """
        with self._writing:
            gone = _named(self._adapters, name)
            self._adapters = {other: adapter for other, adapter in self._adapters.items() if other != name}
            self._shelf.drop(gone.held)

    def prepare(self, image: Any, name: str, *, background: str | None = None) -> Tensor:
        """Return a picture (PIL, or its path) as an adapter's were in training [3, H, W].

        Args:
            image: the picture; a tensor is taken to be prepared.
            name: the adapter.
            background: the colour behind transparent places of a file; None: as in training.

        Raises:
            VisgraftError: there is no adapter of this name.
            DataError: a file is no image.
        """
        return _prepared(image, _named(self._adapters, name), background)

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Any], names: Sequence[str | BankAdapter]) -> list[BankAnswer]:
        """Answer each image with the adapter that is named for it, in as few forwards as can be.

        Args:
            images: prepared ones, [B, 3, H, W] or a list of [3, H, W] of any sizes that the backbone takes; or pictures
                (PIL, or their paths), each prepared as its adapter's were in training.
            names: an adapter for each image, by its name or as `adapter` or `open` returned it.

        Raises:
            VisgraftError: there is no adapter of a name, or not as many names as images.
            DataError: a file is no image, or an image is none that the backbone takes.
        """
        adapters = self._adapters
        if isinstance(names, str) or len(images) != len(names):
            raise VisgraftError(f"{len(images)} images need as many names, but there are {len(names)}")
        asked = [name if isinstance(name, BankAdapter) else _named(adapters, name) for name in names]
        prepared = [_prepared(image, adapter) for image, adapter in zip(images, asked, strict=True)]
        found: list[BankAnswer | None] = [None] * len(asked)
        for group in grouped(prepared, asked):
            if isinstance(images, Tensor) and group.images == list(range(len(images))):
                x = images  # as it is, which saves a copy
            else:
                x = torch.stack([prepared[number] for number in group.images])
            self._check_shape(x)
            logits = self._logits(x.to(self._ground.device, self._ground.dtype), group.adapters)
            for number, adapter, row in zip(group.images, group.adapters, logits, strict=True):
                found[number] = _answer(adapter, row)
        return [answer for answer in found if answer is not None]

    @torch.no_grad()
    def every(self, images: Tensor, names: Sequence[str]) -> list[list[BankAnswer]]:
        """Answer every image with every adapter that is named: for each image a list with an answer of each.

        Blocks before the first one in which any of the adapters differs from the backbone run once.

        Args:
            images: prepared ones [B, 3, H, W].
            names: the adapters.

        Raises:
            VisgraftError: there is no adapter of a name, or `names` is one name and no list.
            DataError: the images are no batch, or none that the backbone takes.
        """
        adapters = self._adapters
        if isinstance(names, str):
            raise VisgraftError(f"a list of names is needed, but {names!r} is one; pass [name]")
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise DataError("every needs prepared images as one tensor [B, channels, height, width]")
        asked = [_named(adapters, name) for name in names]
        self._check_shape(images)
        x, found = images.to(self._ground.device, self._ground.dtype), dict[BankAdapter, list[Tensor]]()
        distinct = list(dict.fromkeys(asked)) if len(x) else []
        for group in grouped([x[0]] * len(distinct), distinct):
            for rows, together in tiles(group.adapters, len(x)):
                logits = self._logits(x[rows], together, every=True).unflatten(0, (len(together), -1))
                for adapter, of_adapter in zip(together, logits, strict=True):
                    found.setdefault(adapter, []).extend(of_adapter)
        return [[_answer(adapter, found[adapter][row]) for adapter in asked] for row in range(len(x))]

    @contextlib.contextmanager
    def lent(self, name: str | None) -> Iterator[nn.Module]:
        """Lend the backbone with one adapter attached, as `load` makes it, for a look inside; None: without any.

        Nobody else is lent the same modules meanwhile. Their tensors are the bank's, so they must not be changed, and
        hooks that are put on them must be taken off again.

        Raises:
            VisgraftError: there is no adapter of this name.
        """
        if name is None:
            yield self._ground.copy()
            return
        adapter = _named(self._adapters, name)
        (flats,) = self._shelf.take([adapter.held])
        with self._lent_uniform(adapter) as tree, tree.holding(adapter_tensors(adapter, flats)):
            yield tree.model

    def check_images(self, images: Tensor) -> None:
        """Raise a DataError unless the backbone takes images of this shape [B, channels, height, width]."""
        self._check_shape(images)

    def explain(self) -> str:
        """Return, a line for each configuration, how its adapters are computed beside others."""
        counts = Counter(adapter.configuration for adapter in self._adapters.values())
        return "\n".join(f"{kind.config.method} × {count}: {kind.way}" for kind, count in counts.items())

    def memory(self) -> BankMemory:
        """Return what the backbone and the adapters take beside each other, and what is parked elsewhere."""
        adapters = list(self._adapters.values())
        sizes = [adapter.held.bytes for adapter in adapters]
        parked = sum(
            adapter.configuration.layout.bytes + adapter.head.layout.bytes
            for adapter, size in zip(adapters, sizes, strict=True)
            if size == (0, 0)
        )
        return BankMemory(self._ground.bytes, sum(rows for rows, _ in sizes), sum(h for _, h in sizes), parked)

    def _check_free(self, name: str, replace: bool) -> None:
        if name in self._adapters and not replace:
            raise VisgraftError(f"the bank holds an adapter {name!r} already; pass replace=True, or another name")

    def _check_shape(self, x: Tensor) -> None:
        """Raise a DataError unless the backbone takes images of this shape."""
        if len(x) and x.shape[1:] not in self._shapes:
            check_shape(self._ground.plain, x.shape[1], x.shape[2:], "the images")
            self._shapes.add(x.shape[1:])

    def _configuration(self, record: AdapterRecord) -> Configuration:
        key = configuration_key(record.method, record.own)
        if key not in self._configurations:
            self._configurations[key] = Configuration(self._ground, record.method, record.own)
        return self._configurations[key]

    def _check(self, adapter: BankAdapter, path: Path) -> None:
        with self._lent_uniform(adapter) as tree, tree.holding(adapter_tensors(adapter, adapter.held.here or ())):
            check_canary(tree.model, adapter.record, path)

    def _logits(self, x: Tensor, adapters: Sequence[BankAdapter], every: bool = False) -> Tensor:
        """Return the logits of images [B, 3, H, W] whose adapters share a forward, one for each; padded with zeros.

        With `every`, each adapter answers all images: those of one adapter behind another's.
        """
        distinct = list(dict.fromkeys(adapters))
        flats = dict(zip(distinct, self._shelf.take(one.held for one in distinct), strict=True))
        precision = adapters[0].precision
        with Compute(self._ground.device, precision).autocast():
            if len(distinct) == 1:
                with self._lent_uniform(distinct[0], precision) as tree:
                    return tree.run(x, adapter_tensors(distinct[0], flats[distinct[0]]))
            kinds = list(dict.fromkeys(adapter.configuration for adapter in adapters))
            forward = mixed_forward(adapters, flats)
            if every:
                common = [kind.shared for kind in kinds]
                forward.copies = len(adapters)
                forward.shared = None if None in common else min(n for n in common if n is not None)
            key = (*kinds, precision)
            with self._lent(key, lambda: MixedTree(self._ground, kinds, self._compile, precision)) as tree:
                return tree.run(x, forward)

    def _lent_uniform(self, adapter: BankAdapter, precision: str = "fp32") -> contextlib.AbstractContextManager[Any]:
        kind, head = adapter.configuration, adapter.head
        halves = {} if precision == "fp32" else self._ground.halves()
        return self._lent((kind, head, precision), lambda: UniformTree(kind, head, self._compile, halves))

    @contextlib.contextmanager
    def _lent(self, key: Any, make: Callable[[], Any]) -> Iterator[Any]:
        """Lend a tree of a kind to one forward; it is taken back also after an error."""
        with self._lending:
            free = self._trees.setdefault(key, deque())
            self._trees.move_to_end(key)
            if len(self._trees) > MOST_TREES:
                self._trees.popitem(last=False)
        try:
            tree = free.pop()
        except IndexError:
            tree = make()
        try:
            yield tree
        finally:
            free.append(tree)


def _named(adapters: dict[str, BankAdapter], name: str) -> BankAdapter:
    try:
        return adapters[name]
    except (KeyError, TypeError):
        raise VisgraftError(f"the bank holds no adapter {name!r}{nearest(str(name), adapters)}; add it first") from None


def _answer(adapter: BankAdapter, row: Tensor) -> BankAnswer:
    """Return what an adapter says, of a row of logits that may be padded."""
    record, outputs = adapter.record, adapter.head.outputs
    row = row[:outputs] if outputs else row
    return BankAnswer(adapter.name, row, record.classes, record.multi_label, record.tasks)


def _prepared(image: Any, adapter: BankAdapter, background: str | None = None) -> Tensor:
    """Return an image as the model takes it [3, H, W]."""
    if isinstance(image, str | Path):
        image = open_image(path_or_url(image), background or adapter.record.background or "white")
    if not isinstance(image, Tensor):
        image = adapter.transform(image)
    if image.ndim != 3:
        raise DataError(f"an image is a tensor of shape {tuple(image.shape)}, but must be [channels, height, width]")
    return image
