"""Frozen dataclasses that hold every option; the command line generates its flags from them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from visgraft.errors import VisgraftError, nearest
from visgraft.option_types import convert, plain, types_of


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    *,
    kw_only: bool = False,
    younger: bool = False,
    typed: bool = True,
) -> Any:
    """Return a dataclass field with a default, a help line and, where the values are names, the allowed ones.

    A field of type `Literal` or `Enum` lists its names by itself and needs no `choices`.
    `younger` marks one that was added when results with these options existed already; one that is not `typed` is set
    by the library alone.
    """
    metadata = {"help": help, "choices": choices, "younger": younger, "typed": typed}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


def flag_of(name: str) -> str:
    """Return how an option is typed on the command line; one underscore at the end keeps a name off Python's words."""
    return f"--{name.removesuffix('_').replace('_', '-')}"


@dataclass(frozen=True)
class Options:
    """A frozen set of options whose values are checked against the types of its fields.

    A field may be a `bool`, `int`, `float`, `str`, `Literal`, an `Enum` of these or a tuple of these, or a union of
    them with each other and None. Numbers of NumPy become plain ones, lists tuples, and an Enum's values its members.

    Raises:
        VisgraftError: a value is not of its field's type or not among its names, a tuple of names is empty, or a type
            cannot be stored; the field is named.
    """

    def __post_init__(self) -> None:
        for name, hint in types_of(type(self)).items():
            value = convert(getattr(self, name), hint, f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)  # the class is frozen

    def check_positive(self, *names: str) -> None:
        """Raise a VisgraftError that names the first of the given fields that is set and not above zero."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise VisgraftError(f"{name} is {value}, but must be above 0")

    def check_rates(self, *names: str) -> None:
        """Raise a VisgraftError that names the first of the given fields that is below 0, or 1 and above."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise VisgraftError(f"{name} is {getattr(self, name)}, but must be at least 0 and below 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a dictionary of plain JSON values.

        Younger ones are left out where they hold the default: the key of a trial is a digest of these values, and
        trials made before such an option existed must keep theirs.
        """
        values = {}
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            if not (field.metadata.get("younger") and value == plain(field.default)):
                values[field.name] = value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the options from `to_dict()`'s form.

        Raises:
            VisgraftError: a name is not an option of this class, or a value has the wrong type.
        """
        hints = types_of(cls)
        for name in values:
            if name not in hints:
                raise VisgraftError(f"{cls.__name__} has no option {name!r}{nearest(name, hints)}")
        return cls(**{name: convert(value, hints[name], f"{cls.__name__}.{name}") for name, value in values.items()})


AUTO = "auto"
"""In place of a method's name: the method is to be chosen."""
ALSO_TRAINED = ("biases", "norms", "biases+norms")
PLACED = ("last_blocks", "also_train", "blend")
"""Options of `MethodConfig` that have an effect only on methods with modules in blocks."""


@dataclass(frozen=True)
class MethodConfig(Options):
    """Base of every method's options, with the one that all methods with modules in blocks share.

    `method` is the registered name, `has_places` says whether the method puts modules anywhere, and `head_only` whether
    nothing but the head trains, so that the backbone's features never change; the class of the method sets all three.
    The properties say what follows from the options; a config overrides those that differ for it. `last_blocks` K
    adapts only the last K blocks, counted over all stages; of the blocks that a method would choose by itself, those
    among them. Modules outside the blocks stay where they stand behind them. `also_train` trains tensors of the
    backbone itself beside the modules, of the same blocks. `blend` is set where adapters were blended.

    Raises:
        VisgraftError: `last_blocks` is not above zero, or either is given though the method trains nothing but the
            backbone's own tensors; on attaching, `last_blocks` exceeds what the backbone has.
    """

    method: ClassVar[str] = ""
    has_places: ClassVar[bool] = True
    head_only: ClassVar[bool] = False

    last_blocks: int | None = option(
        None,
        "adapt only the last K blocks; without augmentation, those before run once per image; none: all",
        kw_only=True,
        younger=True,
    )
    also_train: str | None = option(
        None,
        "tensors of the backbone itself that train too, with --backbone-lr; none: its weights stay as they are",
        ALSO_TRAINED,
        kw_only=True,
        younger=True,
    )
    blend: tuple[float, ...] | None = option(
        None,
        "weights of several adapters whose modules stand side by side; none: one",
        kw_only=True,
        younger=True,
        typed=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in PLACED:
            if getattr(self, name) is not None and not self.has_places:
                raise VisgraftError(
                    f"{name} has no effect on {self.method}, which puts no modules into blocks; leave it out"
                )
        self.check_positive("last_blocks")
        if self.blend is not None and not (self.blend and all(map(math.isfinite, self.blend))):
            raise VisgraftError(f"blend is {self.blend!r:.80}, but must be finite weights, at least one")

    @property
    def starts_as_identity(self) -> bool:
        """Whether the model answers exactly as before right after `attach`."""
        return True

    @property
    def passes(self) -> tuple[int, ...]:
        """The numbers of outputs of the tasks that are answered in passes of their own; empty: one pass for all."""
        return ()

    def for_tasks(self, outputs: tuple[int, ...]) -> Self:
        """Return the options for images with several labels, whose tasks have so many outputs; empty: one label.

        Raises:
            VisgraftError: an option would have no effect.
        """
        return self

    @property
    def affine(self) -> bool:
        """Whether `delta` is an affine map of each token, so that it may fold into a neighbouring linear layer."""
        return False

    @property
    def shifts(self) -> bool:
        """Whether that map has a constant term, for which the layer needs a bias to take it over."""
        return False

    @property
    def additive(self) -> bool:
        """Whether `delta` is linear in the module's tensors, so that the mean of tensors adds the mean of the maps."""
        return False

    @property
    def diagonal(self) -> bool:
        """Whether that map treats every channel apart, so that even a normalisation layer can take it over."""
        return False


def method_fields(config: type[MethodConfig]) -> tuple["dataclasses.Field[Any]", ...]:
    """Return the fields of the options that a user sets; those that have no effect on the method are none of them."""
    return tuple(
        f for f in dataclasses.fields(config) if f.metadata["typed"] and (config.has_places or f.name not in PLACED)
    )


WEIGHTINGS = ("none", "balanced", "sqrt")
SAMPLERS = ("shuffle", "balanced")


@dataclass(frozen=True)
class TrainConfig(Options):
    """How to train: optimiser, schedule, regularisation, augmentation and precision."""

    epochs: int = option(30, "passes over the training images")
    warmup_epochs: float = option(3.0, "epochs over which the learning rate rises linearly")
    batch_size: int = option(32, "images per step")
    gradient_accumulation: int = option(
        1, "run each step's images in so many pieces, one after another, to the same weights: less memory", younger=True
    )
    lr: float = option(2e-3, "peak learning rate of AdamW")
    head_lr: float | None = option(None, "peak learning rate of the head; none: the same as --lr")
    backbone_lr: float | None = option(
        None, "peak learning rate of the backbone's own tensors that train; none: the same as --lr", younger=True
    )
    head_first: int | None = option(
        None,
        "epochs over which the head trains alone first, on the plain model's features; none: it starts with the rest",
        younger=True,
    )
    min_lr: float = option(0.0, "learning rate that the cosine ends at")
    warmup_lr: float | None = option(None, "learning rate that the warm-up starts at; none: a thousandth of the peak")
    schedule: str = option("step", "change the learning rate with every step, or once per epoch", ("step", "epoch"))
    drop_last: bool = option(False, "leave out an epoch's last batch where it is not full")
    weight_decay: float = option(1e-4, "decoupled weight decay, on every trained tensor")
    label_smoothing: float = option(0.0, "label smoothing of the cross-entropy, between 0 and 1")
    class_weights: str = option(
        "none", "factor per class in the loss: balanced, inverse to its images, or its square root", WEIGHTINGS
    )
    task_weights: tuple[str, ...] | None = option(
        None,
        "NAME=WEIGHT of tasks in the loss, e.g. reading=2; none: what a constant answer costs counts alike",
        younger=True,
    )
    sampler: str = option("shuffle", "every image once, or drawn so that classes come equally often", SAMPLERS)
    drop_path: float = option(0.0, "stochastic depth: the last block's rate, rising linearly from 0")
    flip: bool = option(False, "flip training images left to right with probability 0.5")
    rand_augment: str | None = option(None, "RandAugment in timm's notation, e.g. rand-m9-mstd0.5-inc1")
    crop_scale: float | None = option(
        None, "cut out pieces of at least this share of each picture's area; none: whole pictures", younger=True
    )
    mixup: float | None = option(None, "blend pairs of images, by shares from a beta distribution", younger=True)
    cutmix: float | None = option(None, "put a piece of one image into another, likewise", younger=True)
    cached_views: int | None = option(
        None,
        "augment each image K times in all and take turns, so that frozen blocks run once per view; none: ever anew",
        younger=True,
    )
    grad_checkpointing: bool = option(
        False, "compute each block anew in the backward pass: less memory, longer steps", younger=True
    )
    precision: str = option("auto", "auto: bf16 where this machine computes faster in it", ("auto", "fp32", "bf16"))
    select: str = option("last", "keep the last epoch, or the best one on the validation images", ("last", "val"))
    seed: int = option(0, "seed of initialisation, order, augmentation and dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("epochs", "batch_size", "lr", "head_lr", "warmup_lr", "cached_views")
        self.check_positive("backbone_lr", "head_first", "crop_scale", "mixup", "cutmix", "gradient_accumulation")
        if self.gradient_accumulation > self.batch_size:
            raise VisgraftError(
                f"gradient_accumulation is {self.gradient_accumulation}, but a batch_size of {self.batch_size} has no "
                "more pieces than images; lower it"
            )
        if self.crop_scale is not None and self.crop_scale >= 1:
            raise VisgraftError(
                f"crop_scale is {self.crop_scale}, but must be below 1; leave it out for whole pictures"
            )
        if self.cached_views and not self.augmented:
            raise VisgraftError("cached_views has no effect without augmentation; add flip, crop_scale or rand_augment")
        if self.cached_views and self.mixed:
            raise VisgraftError("cached_views keeps what frozen blocks make of images, which mixup and cutmix change")
        self.check_rates("label_smoothing", "drop_path")
        for name in ("weight_decay", "warmup_epochs", "min_lr", "seed"):
            if getattr(self, name) < 0:
                raise VisgraftError(f"{name} is {getattr(self, name)}, but must not be negative")

    @property
    def augmented(self) -> bool:
        """Whether each image is changed at random by itself."""
        return bool(self.flip or self.rand_augment or self.crop_scale)

    @property
    def mixed(self) -> bool:
        """Whether the images of a batch are mixed with each other."""
        return bool(self.mixup or self.cutmix)

    @property
    def anew(self) -> bool:
        """Whether an image looks different every time, so that nothing computed from it can be kept."""
        return self.mixed or (self.augmented and not self.cached_views)
