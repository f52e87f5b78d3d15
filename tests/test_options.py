"""Every option of every method can be typed, and each is what its type hint says, wherever its value comes from."""

import dataclasses
import enum
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
import typer
from support import logits, vit
from typer.testing import CliRunner

from visgraft import LoRAConfig, TrainConfig, attach, list_methods, load, save
from visgraft.adapters.directory import CONFIG
from visgraft.bench.ledger import read_results
from visgraft.cli.bundles import with_bundles
from visgraft.cli.options import method_config, parse_option, train_config, train_flags, with_flags
from visgraft.core.method import Method
from visgraft.core.registry import METHODS, register
from visgraft.errors import AdapterError, VisgraftError
from visgraft.export.merge import remedy
from visgraft.option_types import choices_of, types_of, written
from visgraft.options import MethodConfig, method_fields, option

SEEN: list[dict[str, Any]] = []


def typed(*words: str) -> dict[str, Any]:
    """Return the values that the command receives."""
    app = typer.Typer()
    app.command()(with_flags(lambda **values: SEEN.append(values)))
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code == 0, found.output
    return SEEN[-1]


@dataclasses.dataclass(frozen=True)
class TypedSize:
    """Options that belong together."""

    width: Annotated[int, typer.Option(help="in pixels")] = 3
    height: int | None = None


def test_options_that_belong_together_are_typed_in_their_place_and_reach_the_verb_as_one() -> None:
    def draw(name: str, *, colour: str = "red", size: TypedSize, thick: bool = False) -> None:
        SEEN.append({"name": name, "colour": colour, "size": size, "thick": thick})

    app, verb = typer.Typer(), with_bundles(draw)
    app.command()(verb)
    assert list(inspect.signature(verb).parameters) == ["name", "colour", "width", "height", "thick"]
    assert CliRunner().invoke(app, ["a", "--height", "7", "--thick"]).exit_code == 0
    assert SEEN[-1] == {"name": "a", "colour": "red", "size": TypedSize(3, 7), "thick": True}


OPTIONS = [(name, field) for name, kind in list_methods().items() for field in method_fields(kind.Config)]


def example(method: str, field: dataclasses.Field[Any]) -> tuple[list[str], Any]:
    """Return an allowed value of an option, as typed and as the option holds it."""
    hint, flag = types_of(list_methods()[method].Config)[field.name], f"--{field.name.replace('_', '-')}"
    if choices := choices_of(hint):
        value: Any = tuple(choices) if "tuple" in str(hint) else choices[-1]
    elif hint is bool:
        return [flag], True
    else:
        value = field.default if field.default else 2 if "int" in str(hint) else 0.5
    return [flag, written(value)], value


@pytest.mark.parametrize(("method", "field"), OPTIONS, ids=[f"{name}-{field.name}" for name, field in OPTIONS])
def test_every_option_can_be_typed(method: str, field: dataclasses.Field[Any]) -> None:
    words, value = example(method, field)
    found = getattr(method_config(method, typed(*words)), field.name)
    assert found == value
    assert type(found) is type(value)


def test_one_name_means_what_the_chosen_method_means_by_it() -> None:
    assert method_config("partial", typed("--blocks", "3")).blocks == 3  # type: ignore[attr-defined]
    assert method_config("sct", typed("--blocks", "all")).blocks == "all"  # type: ignore[attr-defined]
    with pytest.raises(VisgraftError, match="--blocks is 'all', but must be a whole number"):
        method_config("partial", typed("--blocks", "all"))
    with pytest.raises(VisgraftError, match="blocks is '3', but must be one of late, all"):
        method_config("sct", typed("--blocks", "3"))


MODULE = '''
import enum
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from torch import nn

from visgraft.core.method import Method, Place
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig, option


class Start(enum.Enum):
    ZERO = "zero"
    NORMAL = "normal"


class Side(enum.StrEnum):
    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True)
class TypedConfig(MethodConfig):
    """An option of every type."""

    literal: Literal["first", "second"] = option("first", "a literal")
    level: Literal[1, 2] = option(1, "a literal of numbers")
    old: Optional[int] = option(None, "the older way to write it")
    new: int | None = option(None, "the newer way to write it")
    number: int | float = option(1, "any number")
    ratio: float = option(0.5, "a number")
    exact: bool = option(False, "a switch")
    maybe: bool | None = option(None, "a switch that can be left open")
    text: str = option("", "a text")
    words: tuple[str, ...] = option((), "texts")
    sizes: tuple[int, ...] = option((1,), "whole numbers")
    betas: tuple[float, float] = option((0.9, 0.999), "two numbers")
    layers: tuple[int, ...] | None = option(None, "whole numbers, or all")
    start: Start = option(Start.ZERO, "an enum")
    side: Side | None = option(None, "an enum of texts")
    amount: Literal["all"] | int = option("all", "a name or a number")
    few: tuple[Literal["x", "y"], ...] = option(("x",), "names")
    named: tuple[str, ...] | None = option(None, "names", ("attn", "mlp"), younger=True)

    shifts = True
    starts_as_identity = False

    @property
    def affine(self):
        return self.literal == "second"


@register("typed", paper="a test")
class Typed(Method):
    """x + b, which folds where the literal says so."""

    Config = TypedConfig
    recipe = TrainConfig()

    def __init__(self, config, position, shared):
        super().__init__(config, position, shared)
        self.offset = nn.Parameter(torch.ones(position.adds_width))

    @classmethod
    def placements(cls, config):
        return (Place.at("mlp.in"),)

    def delta(self, x, grid):
        return self.offset.expand_as(x)
'''


@pytest.fixture(params=["types", "texts"])
def module(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleType]:
    """A user's module that registers a method, its hints being types or texts; it is forgotten afterwards."""
    file, name = tmp_path / "typed_method.py", f"typed_method_{request.param}"
    first = "from __future__ import annotations\n" if request.param == "texts" else ""
    file.write_text(first + MODULE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(found)
        yield found
    finally:
        METHODS.pop("typed", None)
        del sys.modules[name]


# What Python gives, what the option then holds, what the file holds, and what is typed.
VALUES: list[tuple[str, Any, Any, Any, str]] = [
    ("literal", "second", "second", "second", "second"),
    ("level", np.int64(2), 2, 2, "2"),
    ("old", 4, 4, 4, "4"),
    ("old", None, None, None, "none"),
    ("new", np.int32(4), 4, 4, "4"),
    ("number", 1.5, 1.5, 1.5, "1.5"),
    ("number", 3, 3, 3, "3"),
    ("ratio", np.float32(0.25), 0.25, 0.25, "0.25"),
    ("ratio", 2.0, 2.0, 2.0, "2"),
    ("exact", np.True_, True, True, "true"),
    ("maybe", False, False, False, "false"),
    ("maybe", None, None, None, "none"),
    ("text", "none", "none", "none", "none"),
    ("words", ["a", "b"], ("a", "b"), ["a", "b"], "a, b"),
    ("words", (), (), [], ""),
    ("sizes", [np.int64(1), 2], (1, 2), [1, 2], "1,2"),
    ("betas", (0.5, 0.75), (0.5, 0.75), [0.5, 0.75], "0.5, 0.75"),
    ("layers", [0, 3], (0, 3), [0, 3], "0,3"),
    ("layers", None, None, None, "none"),
    ("start", "normal", "Start.NORMAL", "normal", "normal"),
    ("start", "Start.NORMAL", "Start.NORMAL", "normal", "normal"),
    ("side", "left", "Side.LEFT", "left", "left"),
    ("side", None, None, None, "none"),
    ("amount", 7, 7, 7, "7"),
    ("amount", "all", "all", "all", "all"),
    ("few", ["y", "x"], ("y", "x"), ["y", "x"], "y,x"),
    ("named", ["mlp"], ("mlp",), ["mlp"], "mlp"),
]


def member(value: Any, module: ModuleType) -> Any:
    """The member of an Enum of the module that a text such as "Start.ZERO" names; any other value as it is."""
    kind, _, name = value.partition(".") if isinstance(value, str) else ("", "", "")
    return getattr(module, kind)[name] if name else value


def same(found: Any, expected: Any) -> bool:
    """Whether both are equal and of the same type, inside tuples too."""
    if isinstance(expected, (tuple, list)):
        return type(found) is type(expected) and all(map(same, found, expected)) and len(found) == len(expected)
    return found == expected and type(found) is type(expected)


def test_an_option_of_every_type_is_made_stored_read_and_typed(module: ModuleType) -> None:
    Config = module.TypedConfig
    assert types_of(Config).keys() - types_of(MethodConfig).keys() == {name for name, *_ in VALUES}
    for name, given, expected, stored, word in VALUES:
        held = member(expected, module)
        config = Config(**{name: member(given, module)})
        assert same(getattr(config, name), held), name
        assert same(config.to_dict()[name], stored), name
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config, name
        assert same(getattr(Config.from_dict({name: stored}), name), held), name
        assert same(parse_option("typed", name, word), held), name
        given_words = [f"--{name}"] if name == "exact" else [f"--{name}", word]
        assert same(getattr(method_config("typed", typed(*given_words)), name), held), name
    assert "named" not in Config().to_dict(), "a younger option is left out where it holds the default"


def test_an_adapter_with_options_of_every_type_comes_back(module: ModuleType, tmp_path: Path) -> None:
    given = {name: member(given, module) for name, given, *_ in VALUES if given is not None}
    config = module.TypedConfig(**given)
    model = attach(vit(), config)
    save(model, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", backbone=vit()).model
    assert torch.equal(logits(loaded), logits(model))
    stored = json.loads((tmp_path / "adapter" / CONFIG).read_text(encoding="utf-8"))["method_config"]
    assert module.TypedConfig.from_dict(stored) == config
    assert (stored["start"], stored["betas"], stored["level"]) == ("normal", [0.5, 0.75], 2)


WRONG: list[tuple[str, Any, str | None, str]] = [
    ("literal", "secnd", "secnd", "must be one of first, second; did you mean second"),
    ("level", True, "3", "must be one of 1, 2"),
    ("old", 1.5, "1.5", "must be a whole number or none"),
    ("new", True, "x", "must be a whole number or none"),
    ("number", "1", "x", "must be a number"),
    ("ratio", None, "none", "must be a number"),
    ("exact", 1, None, "must be true or false"),
    ("text", 3, None, "must be a text"),
    ("words", "ab", None, "must be a tuple of texts"),
    ("sizes", [1, 2.5], "1,2.5", "must be a whole number"),
    ("betas", (0.5,), "0.5", "2 numbers"),
    ("betas", 0.5, "0.5,0.5,0.5", "2 numbers"),
    ("layers", 3, "x", "whole number"),
    ("start", "normall", "normall", "must be one of zero, normal; did you mean normal"),
    ("side", "up", "up", "must be one of left, right or none"),
    ("amount", "al", "al", "must be all or a whole number; did you mean all"),
    ("few", ["z"], "z", "must be one of x, y"),
    ("few", [], "", "is empty; name at least one of x, y"),
    ("named", ["mpl"], "mpl", "must be one of attn, mlp; did you mean mlp"),
]


def test_a_wrong_value_is_refused_in_one_line_with_class_option_and_what_is_expected(module: ModuleType) -> None:
    for name, value, word, expected in WRONG:
        tries = [lambda: module.TypedConfig(**{name: value}), lambda: module.TypedConfig.from_dict({name: value})]  # noqa: B023
        tries += [lambda: parse_option("typed", name, word)] if word is not None else []  # noqa: B023
        for called, build in zip([f"TypedConfig.{name}"] * 2 + [f"--{name}"], tries, strict=False):
            with pytest.raises(VisgraftError) as caught:
                build()
            message = str(caught.value)
            assert called in message and expected in message and "\n" not in message, message


def test_the_help_lists_the_names_and_a_number_is_shown_as_one(module: ModuleType) -> None:
    found = {flag.field.name: flag for flag in train_flags()}
    assert "(first, second)" in found["literal"].help and "(zero, normal)" in found["start"].help
    assert "(all or a whole number)" in found["amount"].help and "default 0.9,0.999" in found["betas"].help
    assert "default zero" in found["start"].help and "(attn, mlp)" in found["named"].help
    kinds = {name: found[name].kind for name in ("old", "new", "ratio", "exact", "maybe", "literal", "sizes")}
    assert kinds == {
        "old": int, "new": int, "ratio": float, "exact": bool, "maybe": str, "literal": str, "sizes": str
    }  # fmt: skip


def test_the_option_with_which_a_method_folds_is_found_among_a_literals_names(module: ModuleType) -> None:
    assert remedy(vit(), module.TypedConfig()).startswith("train it with literal=second, which folds")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoRAConfig(rank="4"), "LoRAConfig.rank is '4', but must be a whole number"),
        (lambda: LoRAConfig(rank=2.5), "LoRAConfig.rank is 2.5, but must be a whole number"),
        (lambda: LoRAConfig(rank=torch.ones(2, 2)), "LoRAConfig.rank is tensor([[1., 1.], [1., 1.]]), but must be a "),
        (lambda: LoRAConfig(targets="q"), "LoRAConfig.targets is 'q', but must be a tuple of names among q, k, v, "),
        (lambda: LoRAConfig(targets=("qq",)), "an item of LoRAConfig.targets is 'qq', but must be one of q, k, v"),
        (lambda: TrainConfig(lr="fast"), "TrainConfig.lr is 'fast', but must be a number"),
        (lambda: TrainConfig(class_weights=None), "TrainConfig.class_weights is None, but must be one of none, "),
    ],
)  # fmt: skip
def test_options_made_in_python_are_checked(build: Any, message: str) -> None:
    with pytest.raises(VisgraftError) as caught:
        build()
    assert str(caught.value).startswith(message)


def test_none_can_be_typed_where_an_option_may_be_left_open() -> None:
    values = typed("--head-lr", "none", "--class-weights", "none", "--channels", "none", "--mode", "none")
    recipe = train_config("sct", {**values, "epochs": "4"})
    assert (recipe.head_lr, recipe.class_weights, recipe.epochs) == (None, "none", 4)
    assert method_config("sct", values).to_dict()["channels"] is None
    with pytest.raises(VisgraftError, match=r"^--epochs is 'none', but must be a whole number$"):
        train_config("sct", typed("--epochs", "none"))
    assert parse_option(None, "class_weights", "none") == "none"
    assert parse_option(None, "head_lr", "none") is None


def test_a_number_keeps_its_kind_so_that_the_keys_of_stored_trials_stay() -> None:
    assert json.dumps(TrainConfig.from_dict({"lr": 1}).to_dict()["lr"]) == "1"
    assert json.dumps(TrainConfig.from_dict({"lr": 1.0}).to_dict()["lr"]) == "1.0"
    for result in read_results([Path(__file__).parents[1] / "results"]):
        trial = result.trial
        own = list_methods()[trial.method].Config.from_dict(trial.method_options)
        assert json.dumps(own.to_dict()) == json.dumps(trial.method_options)
        assert json.dumps(trial.train_config().to_dict()) == json.dumps(trial.train)


class Colour(enum.Enum):
    """Values that JSON has no form for."""

    RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        (dict, "dict"), (dict[str, int], "dict[str, int]"), (list[int], "list[int]"), (tuple, "tuple"), (Any, "Any"),
        (Path | None, "Path"), (Colour, "Colour"), (tuple[tuple[int, int], ...], "tuple[int, int]"),
        ("Nowhere | None", "Nowhere"),
    ],
)  # fmt: skip
def test_a_type_that_cannot_be_stored_is_refused_at_registration(hint: Any, told: str) -> None:
    fields = [("odd", hint, option(None, "an option"))]
    config = dataclasses.make_dataclass("OddConfig", fields, bases=(MethodConfig,), frozen=True)
    odd = type("Odd", (Method,), {"Config": config, "recipe": TrainConfig()})
    with pytest.raises(VisgraftError) as caught:
        register("odd", paper="a test")(odd)
    assert "odd" not in METHODS and "method" not in vars(config)
    message = str(caught.value)
    assert message.startswith("OddConfig.odd") and told in message and "\n" not in message


def write_options(adapter: Path, **changes: Any) -> None:
    """Change what an adapter's file says of its method."""
    stored = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    (adapter / CONFIG).write_text(json.dumps({**stored, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "mine"}, ["unknown method 'mine'", "import the module that registers it first"]),
        ({"method_config": {"rnk": 4}}, ["LoRAConfig has no option 'rnk'; did you mean rank", "update visgraft"]),
        ({"method_config": {"rank": "4"}}, ["LoRAConfig.rank is '4', but must be a whole number", "train again"]),
        ({"method_config": {"rank": 0}}, ["rank is 0, but must be above 0", "use the version of lora that wrote it"]),
        ({"method_config": {"targets": ["z"]}}, ["LoRAConfig.targets is 'z', but must be one of q, k, v"]),
    ],
)
def test_an_adapter_with_unknown_options_is_not_called_damaged(
    changes: dict[str, Any], says: list[str], tmp_path: Path
) -> None:
    adapter = save(attach(vit(), LoRAConfig()), tmp_path / "adapter")
    write_options(adapter, **changes)
    with pytest.raises(AdapterError) as caught:
        load(adapter, backbone=vit())
    message = str(caught.value)
    assert [text for text in [str(adapter / CONFIG), *says] if text not in message] == []
    assert "damaged" not in message and "\n" not in message


def test_checks_of_a_users_own_options_are_told_in_one_line(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class PickyConfig(MethodConfig):
        depth: Literal[1, 2] = option(1, "a depth")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.depth == 2:
                raise ValueError("two\nis too deep")

    picky = type("Picky", (Method,), {"Config": PickyConfig, "recipe": TrainConfig()})
    register("picky", paper="a test")(picky)
    try:
        adapter = save(attach(vit(), PickyConfig()), tmp_path / "adapter")
        write_options(adapter, method_config={"depth": 2})
        with pytest.raises(AdapterError, match=r"adapter_config\.json: two is too deep; update visgraft, use the"):
            load(adapter, backbone=vit())
    finally:
        METHODS.pop("picky")
